"""Commands, options and overrides that are not what they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from case import Case
from small_runs import RUN, of_run

from experiments import write_rows, written

Arrange = Callable[[Path], list[str]]
RANDOM = "judges.random_baseline:RandomJudge"


def line(*arguments: str) -> Arrange:
    """This command line in an empty folder."""
    return lambda folder: list(arguments)


def check(*arguments: str) -> Arrange:
    """`check` of a right experiment with more arguments."""
    return lambda folder: [*written(folder), *arguments]


def run(*arguments: str) -> Arrange:
    """`run` of a right experiment with more arguments."""
    return lambda folder: [*written(folder, "run"), *arguments]


def sets(*assignments: str) -> Arrange:
    return check(*(part for assignment in assignments for part in ("--set", assignment)))


def with_pairs(*arguments: str) -> Arrange:
    """This command line beside a file of pairs."""

    def arrange(folder: Path) -> list[str]:
        rows = [{"prompt": f"How is {i}?", "chosen": "Good, thank you.", "rejected": "Bad."} for i in range(6)]
        write_rows(folder / "pairs.jsonl", rows)
        return list(arguments)

    return arrange


def taken(name: str, *arguments: str) -> Arrange:
    """This command line where a file of this name lies."""

    def arrange(folder: Path) -> list[str]:
        (folder / name).write_text("mine\n", encoding="utf-8")
        return with_pairs(*arguments)(folder)

    return arrange


USAGE: tuple[tuple[str, Arrange, str], ...] = (
    ("no such command", line("trian", "x.yaml"), r"No such command 'trian'"),
    ("a misspelt command", line("chekc", "x.yaml"), r"No such command 'chekc'\. Did you mean 'check'\?"),
    ("a misspelt command of judge", line("judge", "adit"), r"'adit'\. Did you mean 'audit'\?"),
    ("a file in place of the command", line("experiment.yaml"), r"No such command 'experiment\.yaml'"),
    ("run without a file", line("run"), r"Missing argument 'EXPERIMENT\.yaml' \(see online-dpo run --help\)"),
    ("two experiments", check("other.yaml"), r"unexpected extra argument.*other\.yaml"),
    ("an unknown option", check("--verbose"), r"No such option: --verbose"),
    ("a misspelt option", check("--sed", "1"), r"No such option: --sed .*--seed"),
    ("an option without its value", check("--set"), r"'--set' requires an argument"),
    ("a seed that is a word", check("--seed", "one"), r"'--seed'.*integer"),
    ("a control sequence as option", check("--\x1b[2J"), r"No such option"),
    ("an option that is no text", check("--\udcff\udcfe"), r"No such option"),
    ("watch of nothing", line("watch"), r"Missing argument 'RUN'"),
    ("compare of nothing", line("compare"), r"Missing argument 'RUN"),
    (
        "compare by no known rule",
        of_run("compare", RUN, "--select", "bset"),
        r"'--select': 'bset' is not one of 'last'",
    ),
    ("export without a target", of_run("export", RUN), r"Missing option '--out'"),
    ("export as no known format", of_run("export", RUN, "--out", "x", "--format", "csv"), r"'csv' is not one of 'trl'"),
    ("report of no answers", of_run("report", RUN, "--answers", "0"), r"'--answers'.*greater than or equal to 1"),
    ("fork without an arm", of_run("fork", RUN, "--round", "1"), r"Missing option '--arm'"),
    ("audit without pairs", line("judge", "audit", "--judge", RANDOM), r"Missing option '--pairs'"),
    (
        "audit by no known length",
        line("judge", "audit", "--judge", "x", "--pairs", "y", "--length", "miles"),
        r"'miles'",
    ),
    (
        "fit in one fold",
        with_pairs("judge", "fit", "pairs.jsonl", "-o", "out", "--folds", "1"),
        r"'--folds'.*equal to 2",
    ),
    (
        "train for no epochs",
        with_pairs("judge", "train", "pairs.jsonl", "--model", "m", "--out", "o", "--epochs", "0"),
        r"'--epochs'.*equal to 1",
    ),
)
"""What the command line's own rules refuse."""

SETS: tuple[tuple[str, Arrange, str], ...] = (
    ("no equals sign", sets("rounds"), r"--set rounds: write key=value"),
    ("no key", sets("=3"), r"--set =3: write key=value"),
    ("an empty part of a key", sets("dpo..beta=1"), r"--set dpo\.\.beta=1: write key=value"),
    ("an unknown key", sets("dpo.bta=1"), r"unknown key 'dpo\.bta' \(did you mean 'beta'\?\)"),
    ("an unknown section", sets("dop.beta=1"), r"unknown key 'dop' \(did you mean 'dpo'\?\)"),
    ("a key without its section", sets("beta=1"), r"unknown key 'beta' \(did you mean 'dpo\.beta'\?\)"),
    ("a wrong type", sets("rounds=many"), r"rounds: .*found 'many'"),
    ("nothing for a number", sets("rounds="), r"rounds: .*found null"),
    ("NaN", sets("dpo.beta=.nan"), r"dpo\.beta: .*finite"),
    ("a key inside a number", sets("rounds.more=1"), r"--set rounds\.more: 'rounds' holds a value, not a mapping"),
    ("a key inside a list", sets("seeds.0=1"), r"seeds: a list is expected"),
    ("an unclosed list", sets("seeds=[1, 2"), r"--set seeds: '\[1, 2' is not valid YAML: line 1"),
    ("the same key twice in a mapping", sets("dpo={beta: 1, beta: 2}"), r"--set dpo.*key 'beta' stands twice"),
    ("an arm's key that is for all", sets("arms.a.model=x"), r"arms\.a\.model: 'model' is one for all arms"),
    ("a date of month 13", sets("name=2026-13-01"), r"--set name.*is no date"),
    ("a control character", sets("name=\x07"), r"--set name: '.x07' is not valid YAML: line 1: the character U\+0007"),
    ("brackets two thousand deep", sets("seeds=" + "[" * 2000), r"--set seeds.*(nested too deep|not valid YAML)"),
    ("a hundred thousand characters", sets("name=" + "x" * 100_000), r"name: letters"),
    ("letters that are no text", sets("name=\udcff"), r"--set name: '.udcff' is not valid YAML"),
    ("a seed below 0", check("--seed", "-3"), r"seeds\.0: .*greater than or equal to 0"),
    ("the same seed twice", check("--seed", "3", "--seed", "3"), r"seeds: the same seed twice"),
)
"""`--set` and `--seed`."""

FILES: tuple[tuple[str, Arrange, str], ...] = (
    ("run of no file", line("run", "absent.yaml"), r"no experiment file at absent\.yaml"),
    ("run of a folder", line("run", "."), r"\. is a folder; an experiment is a YAML file"),
    ("run of a file name with a null character", line("run", "a\0.yaml"), r"'EXPERIMENT\.yaml': embedded null byte"),
    ("run of a file name longer than file systems take", line("run", "x" * 300 + ".yaml"), r"cannot read x+"),
    ("run of a file in no folder", line("run", "nowhere/x.yaml"), r"no experiment file at nowhere/x\.yaml"),
    ("run of a file in a file", taken("f", "run", "f/x.yaml"), r"f/x\.yaml"),
    (
        "run where the runs folder is a file",
        lambda folder: [*taken("runs")(folder), *run()(folder)],
        r"run folder runs/tiny cannot be made",
    ),
    ("resume of nothing", line("resume", "runs/nothing"), r"runs/nothing is no run folder"),
    (
        "resume of a misspelt run",
        of_run("resume", "runs/wrods"),
        r"runs/wrods is no run folder.*did you mean 'runs/words'",
    ),
    ("resume of the runs folder", of_run("resume", "runs"), r"runs is no run folder.*runs/words"),
    ("resume of an experiment", lambda folder: ["resume", written(folder)[1]], r"experiment\.yaml.*online-dpo run"),
    (
        "check of a run folder",
        of_run("check", RUN),
        r"runs/words is a folder.*did you mean 'runs/words/experiment\.yaml'",
    ),
    ("show of nothing", line("show", "nothing"), r"nothing is no run folder"),
    ("show of a misspelt run", of_run("show", "runs/word"), r"did you mean 'runs/words'"),
    ("watch of nothing", line("watch", "nothing"), r"no run folder at nothing"),
    ("report of nothing", line("report", "nothing"), r"nothing is no run folder"),
    ("report into a file", taken("out", "report", RUN, "--out", "out"), r"runs/words is no run folder"),
    (
        "report of a run into a file",
        lambda folder: [*taken("out")(folder), *of_run("report", RUN, "--out", "out")(folder)],
        r"out.*",
    ),
    ("compare of nothing with nothing", line("compare", "a", "b"), r"a is no run folder"),
    ("compare of a run with itself", of_run("compare", RUN, RUN), r"twice"),
    (
        "compare into a folder that is not there",
        of_run("compare", RUN, "--json", "no/where.json"),
        r"cannot write no/where\.json",
    ),
    ("export of nothing", line("export", "nothing", "--out", "x"), r"nothing is no run folder"),
    (
        "export of an arm that is not there",
        of_run("export", RUN, "--out", "x", "--arm", "on_polcy"),
        r"--arm on_polcy: no such arm \(did you mean 'on_policy'\?\)",
    ),
    (
        "export of a seed that is not there",
        of_run("export", RUN, "--out", "x", "--seed", "7"),
        r"--seed 7: the run has 0",
    ),
    (
        "export of rounds that are a word",
        of_run("export", RUN, "--out", "x", "--rounds", "all"),
        r"--rounds all: write a round",
    ),
    ("export of rounds that run backwards", of_run("export", RUN, "--out", "x", "--rounds", "3-1"), r"--rounds 3-1"),
    (
        "export of rounds that are not there",
        of_run("export", RUN, "--out", "x", "--rounds", "8", "--format", "parquet"),
        r"no closed rounds|rounds",
    ),
    (
        "export into a folder that is full",
        of_run("export", RUN, "--out", "runs", "--format", "parquet"),
        r"runs is there already",
    ),
    (
        "export into a file",
        lambda folder: [*taken("x")(folder), *of_run("export", RUN, "--out", "x", "--format", "parquet")(folder)],
        r"x",
    ),
    ("fork of nothing", line("fork", "nothing", "--arm", "a", "--round", "1"), r"nothing is no run folder"),
    (
        "fork of an arm that is not there",
        of_run("fork", RUN, "--arm", "on_polcy", "--round", "1"),
        r"no arm 'on_polcy'.*did you mean 'on_policy'",
    ),
    ("fork with nothing changed", of_run("fork", RUN, "--arm", "on_policy", "--round", "1"), r"nothing changed"),
    (
        "fork at a round that is not there",
        of_run("fork", RUN, "--arm", "on_policy", "--round", "9", "--set", "dpo.beta=0.2"),
        r"--round 9: the arm has rounds 1 to 1",
    ),
    (
        "fork at round 0",
        of_run("fork", RUN, "--arm", "on_policy", "--round", "0", "--set", "dpo.beta=0.2"),
        r"--round 0",
    ),
    (
        "fork of a seed that is not there",
        of_run("fork", RUN, "--arm", "on_policy", "--round", "1", "--seed", "9"),
        r"seed 9",
    ),
    (
        "fork to a name that leaves the runs folder",
        of_run("fork", RUN, "--arm", "on_policy", "--round", "1", "--set", "dpo.beta=0.2", "--name", "../../x"),
        r"name: letters",
    ),
    (
        "fork with an unknown key",
        of_run("fork", RUN, "--arm", "on_policy", "--round", "1", "--set", "dpo.bta=0.2"),
        r"dpo\.bta' \(did you mean 'beta'",
    ),
    (
        "fork with a key that its first rounds were made with",
        of_run("fork", RUN, "--arm", "on_policy", "--round", "1", "--set", "model=x"),
        r"--set model: a fork keeps it",
    ),
    (
        "init where the files are",
        lambda folder: [*(written(folder) and ["init", "."])],
        r"has experiment\.yaml, prompts\.jsonl already",
    ),
    ("init in a file", taken("x", "init", "x"), r"x cannot be written"),
    (
        "audit of no judge",
        with_pairs("judge", "audit", "--judge", "judges.lenght:LengthJudge", "--pairs", "pairs.jsonl"),
        r"no module 'judges\.lenght' \(did you mean 'judges\.length'\?\)",
    ),
    (
        "audit of what is no judge's name",
        with_pairs("judge", "audit", "--judge", "length", "--pairs", "pairs.jsonl"),
        r'"module:Class"',
    ),
    (
        "audit of a YAML file that is not there",
        with_pairs("judge", "audit", "--judge", "x.yaml", "--pairs", "pairs.jsonl"),
        r"x\.yaml",
    ),
    (
        "audit with pairs that are not there",
        with_pairs("judge", "audit", "--judge", "judges.length:LengthJudge", "--pairs", "pears.jsonl"),
        r"no .* at 'pears\.jsonl' \(did you mean 'pairs\.jsonl'\?\)",
    ),
    (
        "audit with a key that the judge has not",
        with_pairs(
            "judge", "audit", "--judge", "judges.length:LengthJudge", "--pairs", "pairs.jsonl", "--set", "unti=words"
        ),
        r"unknown key 'unti' \(did you mean 'unit'\?\)",
    ),
    (
        "audit into a file",
        taken("out", "judge", "audit", "--judge", "judges.length:LengthJudge", "--pairs", "pairs.jsonl", "-o", "out"),
        r"out",
    ),
    ("fit to pairs that are not there", line("judge", "fit", "pairs.jsonl", "-o", "out"), r"no .* at 'pairs\.jsonl'"),
    ("fit to too few pairs", with_pairs("judge", "fit", "pairs.jsonl", "-o", "out"), r"pairs|prompts"),
    ("fit into a file", taken("out", "judge", "fit", "pairs.jsonl", "-o", "out"), r"out|pairs"),
    (
        "train into a folder that is full",
        lambda folder: [
            *written(folder)[:0],
            *with_pairs("judge", "train", "pairs.jsonl", "--model", "x", "--out", ".")(folder),
        ],
        r"\. is there already",
    ),
    (
        "train from no model",
        with_pairs("judge", "train", "pairs.jsonl", "--model", "/nowhere", "--out", "o"),
        r"no model '/nowhere'",
    ),
    (
        "train at a negative rate",
        with_pairs("judge", "train", "pairs.jsonl", "--model", "x", "--out", "o", "--lr", "-1"),
        r"lr: .*greater than 0",
    ),
    (
        "train with all prompts held out",
        with_pairs("judge", "train", "pairs.jsonl", "--model", "x", "--out", "o", "--held-out", "1"),
        r"held.out",
    ),
    (
        "train at a rate of NaN",
        with_pairs("judge", "train", "pairs.jsonl", "--model", "x", "--out", "o", "--lr", "nan"),
        r"lr: .*finite",
    ),
    ("ask about nothing", line("judge", "ask", "nothing"), r"nothing is no run folder"),
    (
        "ask about an arm that is not there",
        of_run("judge", "ask", RUN, "--arm", "on_polcy"),
        r"on_polcy.*did you mean 'on_policy'",
    ),
    ("ask about a round that is not there", of_run("judge", "ask", RUN, "--round", "7"), r"round"),
    ("ask in a name that leaves the folder", of_run("judge", "ask", RUN, "--name", "../../me"), r"name|\.\./"),
)
"""Files, folders and values of each command."""

CASES: tuple[Case, ...] = (
    *(Case(f"usage: {name}", arrange, says, exit_code=2) for name, arrange, says in USAGE),
    *(Case(f"set: {name}", arrange, says, exit_code=2) for name, arrange, says in SETS),
    *(Case(f"command: {name}", arrange, says, exit_code=2) for name, arrange, says in FILES),
)
