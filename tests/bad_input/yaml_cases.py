"""Experiments that are no YAML, no mapping, or hold what an experiment cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from case import Case

from experiments import experiment, written

Arrange = Callable[[Path], list[str]]
NAN, INFINITE = float("nan"), float("inf")
JUDGE = {"use": "judges.length:LengthJudge"}


def with_text(text: str | bytes) -> Arrange:
    """`check` of a file with `text` alone."""

    def arrange(folder: Path) -> list[str]:
        file = folder / "experiment.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["check", file.name]

    return arrange


def added(text: str) -> Arrange:
    """`check` of a right experiment with `text` after it."""

    def arrange(folder: Path) -> list[str]:
        arguments = written(folder)
        with (folder / "experiment.yaml").open("a", encoding="utf-8") as file:
            file.write(text)
        return arguments

    return arrange


def encoded(encoding: str) -> Arrange:
    """`check` of a right experiment, with a comment beyond ASCII, in another encoding."""

    def arrange(folder: Path) -> list[str]:
        (folder / "experiment.yaml").write_bytes(f"# Été\n{plain(folder)}".encode(encoding))
        return ["check", "experiment.yaml"]

    return arrange


def changed(**changes: Any) -> Arrange:
    """`check` of an experiment that is right but for `changes`."""
    return lambda folder: written(folder, **changes)


def without(*keys: str) -> Arrange:
    """`check` of a right experiment that lacks `keys`."""

    def arrange(folder: Path) -> list[str]:
        left = {key: value for key, value in experiment(folder).items() if key not in keys}
        (folder / "experiment.yaml").write_text(yaml.safe_dump(left), encoding="utf-8")
        return ["check", "experiment.yaml"]

    return arrange


def prompts(**changes: Any) -> dict[str, Any]:
    return {"path": "prompts.jsonl", "per_round": 2, "held_out": 2, "max_tokens": 64, **changes}


def arms(**changes: Mapping[str, Any] | None) -> Arrange:
    return changed(arms=changes)


def a_folder(folder: Path) -> list[str]:
    (folder / "experiment.yaml").mkdir()
    return ["check", "experiment.yaml"]


def no_file(folder: Path) -> list[str]:
    (folder / "experiment.yaml").write_text("name: x\n", encoding="utf-8")
    return ["check", "experimnt.yaml"]


def a_link_to_itself(folder: Path) -> list[str]:
    (folder / "experiment.yaml").symlink_to("experiment.yaml")
    return ["check", "experiment.yaml"]


def the_prompts_instead(folder: Path) -> list[str]:
    written(folder)
    return ["check", "prompts.jsonl"]


def bomb(depth: int) -> str:
    """Aliases of aliases: nine to the power of `depth` texts when written out."""
    lines = ["b0: &b0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, depth):
        lines.append(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]")
    return "\n".join(lines) + "\n"


def merge_bomb(depth: int) -> str:
    lines = ["m0: &m0 {k: 1}"]
    for i in range(1, depth):
        lines.append(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}")
    return "\n".join(lines) + "\n"


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


FILES: tuple[tuple[str, Arrange, str], ...] = (
    ("an empty file", with_text(""), r"^online-dpo: experiment\.yaml is empty"),
    ("comments alone", with_text("# nothing\n\n"), r"experiment\.yaml is empty"),
    ("no such file", no_file, r"no experiment file at experimnt\.yaml \(did you mean 'experiment\.yaml'\?\)"),
    ("a folder", a_folder, r"experiment\.yaml is a folder"),
    ("a link to itself", a_link_to_itself, r"cannot read experiment\.yaml"),
    ("the prompts in place of the experiment", the_prompts_instead, r"prompts\.jsonl is not valid YAML: line 2"),
    ("a list", with_text("- a\n- b\n"), r"an experiment is a mapping of keys, found a list"),
    ("a text", with_text("just words\n"), r"an experiment is a mapping of keys, found a text"),
    ("a number", with_text("7\n"), r"an experiment is a mapping of keys, found a number"),
    ("two documents", with_text("name: a\n---\nname: b\n"), r"line 2.*document"),
    ("unclosed", with_text("name: [a, b\n"), r"not valid YAML.*line 2"),
    ("an unclosed quote", with_text('name: "a\nmodel: b\n'), r"not valid YAML.*line 1"),
    ("tabs", with_text("name: x\nprompts:\n\tpath: p\n"), r"line 3.*tab"),
    ("a key without its colon", with_text("name: x\nmodel\nrounds: 1\n"), r"not valid YAML.*line 3"),
    ("indented askew", with_text("name: x\n  model: y\n"), r"not valid YAML.*line 2"),
    ("a null character", with_text("name: a\0b\n"), r"line 1: the character U\+0000"),
    ("a control character", with_text("name: a\x1b[2J\n"), r"line 1: the character U\+001B"),
    ("bytes that are no text", with_text(b"\xff\xfe\xfa\x80\x81"), r"experiment\.yaml is not UTF-8"),
    ("Latin-1", encoded("latin-1"), r"experiment\.yaml is not UTF-8.*line \d+"),
    ("UTF-16", encoded("utf-16"), r"experiment\.yaml is not UTF-8"),
    ("UTF-32 without a mark", encoded("utf-32-le"), r"experiment\.yaml"),
    ("a Python object", with_text("name: !!python/object/apply:os.system ['true']\n"), r"not valid YAML.*line 1.*tag"),
    ("an unknown tag", with_text("name: !include other.yaml\n"), r"not valid YAML.*!include"),
    ("an alias of nothing", with_text("name: *base\n"), r"not valid YAML.*alias 'base'"),
    ("an alias of itself", added("seeds: &s [*s]\n"), r"line \d+: an alias stands for something that holds"),
    ("a mapping in itself", added("x: &x {y: *x}\n"), r"line \d+: an alias stands for something"),
    ("a mapping that merges itself", added("x: &x {<<: *x}\n"), r"experiment\.yaml"),
    ("a bomb of aliases", with_text(bomb(12)), r"line 6: more than 500,000 values"),
    ("a bomb of aliases in a right key", added(bomb(12) + "seeds: *b11\n"), r"more than 500,000 values"),
    (
        "a bomb of aliases in an arm",
        with_text(f"arms:\n  a:\n    judge: &j {{use: 'a:B'}}\n{bomb(9)}"),
        r"more than 500,000 values",
    ),
    ("a bomb of merged mappings", with_text(merge_bomb(12)), r"experiment\.yaml"),
    ("brackets a thousand deep", with_text("name: " + "[" * 2000 + "]" * 2000), r"nested too deep"),
    ("mappings a thousand deep", with_text("".join(" " * i + "a:\n" for i in range(1500))), r"nested too deep"),
    ("a date of month 13", added("revision: 2026-13-01\n"), r"line \d+: '2026-13-01' is no date; in quotes it is text"),
    ("a tag that its value does not fit", added("revision: !!int abc\n"), r"line \d+: 'abc' is no number"),
    ("a key of a thousand words", added("? " + "x " * 1000 + "\n: 1\n"), r"unknown key 'x x.{50,60}…'"),
    ("a judge's setting two hundred deep", changed(judge=JUDGE | {"unit": deep(200)}), r"nested too deep|unit"),
    ("a judge's setting forty deep", changed(judge=JUDGE | {"unit": deep(40)}), r"unit"),
    ("ten megabytes", with_text("name: x\n" + "#" * 10_000_000), r"more than 8,000,000 bytes"),
    ("the same key twice", added("rounds: 3\n"), r"key 'rounds' stands twice \(line \d+"),
    ("the same key twice, deep inside", added("evaluation: {show: 1, show: 2}\n"), r"key 'show' stands twice \(line"),
    ("the same number as key twice", added("arms: {1: {}, 1: {}}\n"), r"key '1' stands twice"),
    ("a number as key", added("7: seven\n"), r"a key is text, found 7: put it into quotes"),
    ("nothing as key", added("? \n: x\n"), r"a key is text, found null"),
    ("a list as key", added("? [a, b]\n: x\n"), r"experiment\.yaml.*line \d+.*key"),
    (
        "a date as key of an arm",
        added("arms: {2026-01-01: {}}\n"),
        r"arms: a key is text, found 2026-01-01: put it into quotes",
    ),
    (
        "ten thousand keys",
        with_text("".join(f"k{i}: {i}\n" for i in range(10_000))),
        r"unknown key 'k0'.*and 10003 more",
    ),
    ("a key of a megabyte", added("x" * 1_000_000 + ": 1\n"), r"not valid YAML: line \d+"),
    ("a value of a megabyte", changed(name="x" * 1_000_000), r"name: letters, digits"),
)
"""What the file is."""

KEYS: tuple[tuple[str, Arrange, str], ...] = (
    ("no model", without("model"), r"key 'model' is missing"),
    ("nothing that is needed", without("model", "name", "judge", "prompts"), r"key '\w+' is missing \(and 3 more\)"),
    ("no prompts' path", changed(prompts={"per_round": 2}), r"key 'prompts\.path' is missing"),
    ("a judge without its class", changed(judge={"unit": "words"}), r"key 'judge\.use' is missing"),
    ("a misspelt section", changed(smapling={"n": 2}), r"unknown key 'smapling' \(did you mean 'sampling'\?\)"),
    ("a misspelt key", changed(dpo={"bta": 0.1}), r"unknown key 'dpo\.bta' \(did you mean 'beta'\?\)"),
    ("a key in capitals", changed(Rounds=2), r"unknown key 'Rounds' \(did you mean 'rounds'\?\)"),
    ("a key with a dash", changed(dpo={"batch-size": 2}), r"unknown key 'dpo\.batch-size' \(did you mean 'batch_size'"),
    ("a key of another library", changed(dpo={"learning_rate": 1e-6}), r"unknown key 'dpo\.learning_rate'"),
    ("a key at the wrong level", changed(beta=0.2), r"unknown key 'beta' \(did you mean 'dpo\.beta'\?\)"),
    (
        "a key of a section at the top",
        changed(per_round=5),
        r"unknown key 'per_round' \(did you mean 'prompts\.per_round'",
    ),
    ("a key of the top in a section", changed(dpo={"rounds": 2}), r"unknown key 'dpo\.rounds' \(did you mean 'rounds'"),
    ("a dotted key", changed(**{"dpo.beta": 0.2}), r"unknown key 'dpo\.beta': write it nested, dpo: \{beta: …\}"),
    (
        "an unknown key in an arm's section",
        arms(a={"pairing": {"rul": "random"}}),
        r"'arms\.a\.pairing\.rul' \(did you",
    ),
    ("a key for all arms in an arm", arms(a={"model": "x"}), r"arms\.a\.model: 'model' is one for all arms"),
    ("no arms", arms(), r"arms: at least one arm"),
    ("arms as a list", changed(arms=["a", "b"]), r"arms: a mapping of keys is expected \(found \['a', 'b'\]\)"),
    ("an arm that is a text", changed(arms={"a": "initial"}), r"arms\.a: .*mapping"),
    ("an arm's name with a slash", arms(**{"a/b": {}}), r"arms\.a/b: letters, digits"),
    ("an arm's name that leaves the folder", arms(**{"..": {}}), r"arms\.\.\.: letters"),
    ("no name", changed(name=""), r"name: letters, digits"),
    ("a name that leaves the runs folder", changed(name="../../x"), r"name: letters, digits"),
    ("a name that is a number", changed(name=7), r"name: .*\(found 7\)"),
    ("a name of another alphabet", changed(name="эксперимент"), r"name: letters"),
    ("no section", changed(prompts=None), r"prompts: a mapping of keys is expected"),
    ("a section that is a list", changed(sampling=[2]), r"sampling: a mapping of keys is expected"),
    ("a section that is a number", changed(dpo=3), r"dpo: a mapping of keys is expected \(found 3\)"),
    ("a judge that is a number", changed(judge=5), r"judge: a mapping of keys is expected"),
    ("a judge without a colon", changed(judge="judges.length"), r'judge.*"module:Class"'),
    ("text for a number", changed(rounds="three"), r"rounds: .*\(found 'three'\)"),
    ("a fraction for a count", changed(rounds=1.5), r"rounds: .*\(found 1\.5\)"),
    ("yes for a number", changed(rounds=True), r"rounds: true and false are no value"),
    ("a list for a number", changed(sampling={"n": [2]}), r"sampling\.n"),
    ("null for a number", changed(rounds=None), r"rounds: .*found null"),
    ("a date for a text", changed(name=date(2026, 1, 1)), r"name"),
    ("a comma for a point", changed(dpo={"beta": "0,1"}), r"dpo\.beta.*found '0,1'"),
    ("a percentage", changed(max_abstain="20%"), r"max_abstain.*found '20%'"),
    ("a negative count", changed(rounds=-1), r"rounds: .*greater than or equal to 1 \(found -1\)"),
    ("no rounds", changed(rounds=0), r"rounds: .*greater than or equal to 1"),
    ("a negative beta", changed(dpo={"beta": -0.1}), r"dpo\.beta: .*greater than 0"),
    ("NaN", changed(dpo={"beta": NAN}), r"dpo\.beta: .*finite number"),
    ("NaN in an arm", arms(a={"dpo": {"lr": NAN}}), r"arms\.a\.dpo\.lr: .*finite number"),
    ("infinity", changed(dpo={"lr": INFINITE}), r"dpo\.lr: .*finite number"),
    ("minus infinity", changed(sampling={"temperature": -INFINITE}), r"sampling\.temperature: .*"),
    ("a number beyond floating point", changed(dpo={"beta": "1e999"}), r"dpo\.beta: .*finite number"),
    ("a huge count", changed(rounds=10**30), r"rounds: .*less than"),
    (
        "a count of a thousand digits",
        added("evaluation: {show: 1" + "0" * 5000 + "}\n"),
        r"line \d+: '10+…' is no number",
    ),
    ("more rounds than anyone has", changed(rounds=10**12), r"rounds: .*less than or equal to 100000"),
    ("more candidates than memory", changed(sampling={"n": 10**15}), r"sampling\.n: .*less than"),
    ("more tokens than any context", changed(sampling={"max_tokens": 10**9}), r"max_tokens|tokens"),
    ("one candidate", changed(sampling={"n": 1}), r"arm on_policy: sampling\.n is 1.*2 or more"),
    ("one candidate in one arm", arms(a={}, b={"sampling": {"n": 1}}), r"arm b: sampling\.n is 1.*2 or more"),
    (
        "temperature 0 for two candidates",
        changed(sampling={"n": 2, "temperature": 0}),
        r"sampling\.temperature is 0.* set it above 0",
    ),
    ("top_p of 0", changed(sampling={"top_p": 0}), r"sampling\.top_p: .*greater than 0"),
    ("a seed below 0", changed(seeds=[-1]), r"seeds\.0: .*greater than or equal to 0"),
    ("a seed beyond 31 bits", changed(seeds=[2**40]), r"seeds\.0: .*less than"),
    ("the same seed twice", changed(seeds=[1, 2, 1]), r"seeds: the same seed twice"),
    ("no seeds", changed(seeds=[]), r"seeds"),
    ("a seed alone", changed(seeds=3), r"seeds: .*list"),
    (
        "an unknown loss",
        changed(dpo={"loss": "sigmiod"}),
        r"dpo\.loss: no loss of this name \(did you mean 'sigmoid'\?\)",
    ),
    ("an unknown rule", changed(pairing={"rule": "best_vs_wrost"}), r"pairing\.rule: .*'best_vs_worst'"),
    ("an unknown source", changed(source="currnet"), r"source: .*'current'"),
    (
        "two sources in one",
        changed(source={"every": 2, "history": 3}),
        r"source: exactly one of .* found every and history",
    ),
    ("an unknown key in a source", changed(source={"evry": 2}), r"unknown key 'source\.evry' \(did you mean 'every'"),
    (
        "shares that do not add up",
        changed(source={"mixture": [{"share": 0.5, "source": "current"}] * 3}),
        r"shares must add",
    ),
    ("a stream of an arm that is not there", arms(a={}, b={"source": {"stream": "c"}}), r"no arm 'c'"),
    (
        "two arms that wait for each other",
        arms(a={"source": {"stream": "b"}}, b={"source": {"stream": "a"}}),
        r"waits for",
    ),
    (
        "a contrast with an arm that is not there",
        changed(arms={"one": {}, "two": {}}, contrasts=[["one", "tow"]]),
        r"did you mean 'two'",
    ),
    (
        "held-out prompts below 1",
        changed(prompts=prompts(held_out=0)),
        r"prompts\.held_out: .*greater than or equal to 1",
    ),
    (
        "a key to a service in plain text",
        changed(judge={**JUDGE, "api_key": "abc"}),
        r"judge\.api_key looks like a key",
    ),
    ("GPUs where there are none", changed(engine={"kind": "transformers", "gpus": 1}), r"ask for 1 GPUs, there are 0"),
    ("GPUs for the learner where there are none", changed(learner={"gpus_per_worker": 2}), r"there are 0"),
    (
        "a GPU for the judge where there is none",
        changed(judge={**JUDGE, "actor": {"gpus": 1}}),
        r"actor\.gpus asks for 1 GPU",
    ),
    ("an engine of no kind", changed(engine="vlm"), r"engine\.kind: .*'vllm'"),
    ("an address that is a Ray client's", changed(cluster="ray://head:10001"), r"cluster\.address: a run is a driver"),
    ("an address without a port", changed(cluster="head"), r"cluster\.address: null, auto or host:port"),
    (
        "a run folder under a file",
        changed(output="prompts.jsonl"),
        r"run folder prompts\.jsonl/tiny cannot be made: prompts\.jsonl is no folder",
    ),
)
"""What its keys hold."""

ODD: tuple[tuple[str, Arrange, str], ...] = (
    ("a byte order mark", encoded("utf-8-sig"), r"run folder: runs/tiny"),
    ("Windows' line ends", lambda folder: with_text(crlf(folder))(folder), r"run folder: runs/tiny"),
    ("a number in quotes", changed(rounds="2", dpo={"lr": "5e-7"}), r"run folder"),
    ("an arm without changes", arms(a=None, b={"rounds": 2}), r"run folder"),
    ("JSON", lambda folder: with_text(as_json(folder))(folder), r"run folder"),
    ("a date of month 13 in quotes", changed(arms={"2026-13-01": {}}), r"run folder"),
    ("a document's mark and end", lambda folder: with_text(f"---\n{plain(folder)}...\n")(folder), r"run folder"),
    ("a merged mapping", added("evaluation: {<<: {show: 0}, off_policy: 0}\n"), r"run folder"),
)


def plain(folder: Path) -> str:
    return yaml.safe_dump(experiment(folder))


def crlf(folder: Path) -> str:
    return plain(folder).replace("\n", "\r\n")


def as_json(folder: Path) -> str:
    import json

    return json.dumps(experiment(folder), indent=2)


CASES: tuple[Case, ...] = (
    *(Case(f"yaml: {name}", arrange, says, exit_code=2) for name, arrange, says in FILES),
    *(Case(f"keys: {name}", arrange, says, exit_code=2) for name, arrange, says in KEYS),
    *(Case(f"yaml: {name}", arrange, says, goes_on=True) for name, arrange, says in ODD),
)
