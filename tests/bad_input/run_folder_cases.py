"""Run folders that are none, not whole, edited by hand, linked, held, or moved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from case import Case
from one_process import one_process
from real_runs import ROOT, Change, finished, round_of, unclosed
from tiny_models import copy, edit_json, llama

from experiments import write_rows, written

Arrange = Callable[[Path], list[str]]
DEEP = "[" * 100_000 + "]" * 100_000
MANIFEST, YAML = "manifest.json", "experiment.yaml"


# --- what is done to a folder ---


def lost(name: str, index: int | None = None) -> Change:
    """A file or folder of the run, or of one of its rounds, is gone."""

    def change(root: Path) -> None:
        path = _at(root, name, index)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def holds(name: str, content: str | bytes, index: int | None = None) -> Change:
    """It holds something else."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda root: _at(root, name, index).write_bytes(data)


def cut(name: str, index: int | None = None, kept: float = 0.5) -> Change:
    """It ends too soon."""

    def change(root: Path) -> None:
        file = _at(root, name, index)
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])

    return change


def flipped(name: str, index: int | None = None) -> Change:
    """One of its last bits is another."""

    def change(root: Path) -> None:
        file = _at(root, name, index)
        data = bytearray(file.read_bytes())
        data[-20] ^= 1
        file.write_bytes(bytes(data))

    return change


def instead(name: str, index: int | None = None) -> Change:
    """A folder lies there in its place."""

    def change(root: Path) -> None:
        lost(name, index)(root)
        _at(root, name, index).mkdir()

    return change


def edited(name: str, index: int | None = None, **changes: Any) -> Change:
    """Keys of its JSON are others; None takes one away."""
    return lambda root: edit_json(_at(root, name, index), **changes)


def replaced(name: str, old: str, new: str) -> Change:
    """As an editor changes a text."""

    def change(root: Path) -> None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text, (name, old)
        (root / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def by_hand(**changes: Any) -> Change:
    """Keys of its experiment.yaml are others, and its digest is gone: whoever sends a folder can do that."""

    def change(root: Path) -> None:
        file = root / YAML
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        for key, value in changes.items():
            data[key] = data[key] | value if isinstance(value, dict) else value
        file.write_text(yaml.safe_dump(data), encoding="utf-8")

    return change


def linked(name: str, index: int | None = None) -> Change:
    """It is a link to itself, elsewhere."""

    def change(root: Path) -> None:
        path = _at(root, name, index)
        path.rename(root.parent.parent / "elsewhere")
        path.symlink_to(root.parent.parent / "elsewhere")

    return change


def piped(root: Path) -> None:
    os.mkfifo(round_of(root) / "notes")


def rewritten(name: str, index: int, change: Callable[[Any], Any]) -> Change:
    """A table of a round, changed, and its record made to agree: whoever sends a folder can do that."""

    def spoil(root: Path) -> None:
        import pyarrow.parquet as pq

        from online_dpo.files import digest

        file = _at(root, name, index)
        table = change(pq.read_table(file))
        pq.write_table(table, file)
        for record in (round_of(root, index) / "stages").glob("*.json"):
            outputs = json.loads(record.read_text(encoding="utf-8"))["outputs"]
            if name in outputs:
                edit_json(record, outputs=outputs | {name: digest(file)})

    return spoil


def _at(root: Path, name: str, index: int | None) -> Path:
    return (root if index is None else round_of(root, index)) / name


# --- the command lines ---


def show(change: Change) -> Arrange:
    return finished("show", ROOT, change=change)


def resume(change: Change) -> Arrange:
    """`resume` of the run that was stopped before it closed its second round."""
    return unclosed("resume", ROOT, "--quiet", change=change)


def run_again(change: Change = lambda root: None, **changes: Any) -> Arrange:
    """`run` of the experiment, changed, where its run lies."""

    def arrange(folder: Path) -> list[str]:
        finished(change=change)(folder)
        file = folder / YAML
        spec = yaml.safe_load(file.read_text(encoding="utf-8")) | changes
        file.write_text(yaml.safe_dump(spec), encoding="utf-8")
        return ["run", YAML, "--quiet"]

    return arrange


def a_folder(*arguments: str, files: tuple[str, ...] = ()) -> Arrange:
    """A command in a folder `here` that is no run folder and has these files."""

    def arrange(folder: Path) -> list[str]:
        (folder / "here").mkdir()
        for name in files:
            (folder / "here" / name).write_text("mine\n", encoding="utf-8")
        return list(arguments)

    return arrange


def a_model(folder: Path) -> list[str]:
    copy(llama, folder / "model")
    return ["show", "model"]


def two_inside(folder: Path) -> list[str]:
    finished()(folder)
    shutil.copytree(folder / ROOT, folder / "runs" / "small")
    return ["show", "runs"]


def a_round(folder: Path) -> list[str]:
    finished()(folder)
    return ["show", str(round_of(Path(ROOT)))]


def a_file_of_it(folder: Path) -> list[str]:
    finished()(folder)
    return ["resume", f"{ROOT}/{MANIFEST}"]


def laid_into_a_foreign_folder(folder: Path) -> list[str]:
    """The run folder's place is taken by a folder whose files are links."""
    arguments = written(folder, "run")
    (folder / ROOT).mkdir(parents=True)
    (folder / ROOT / "prompts.parquet").symlink_to("/dev/null")
    return [*arguments, "--quiet"]


def other_prompts(folder: Path) -> list[str]:
    arguments = run_again()(folder)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"Now of number {i}."} for i in range(9)])
    return arguments


def of_a_lost_model(command: str) -> Arrange:
    """The run's model lies in no folder any more."""

    def arrange(folder: Path) -> list[str]:
        unclosed(change=by_hand(model="/nowhere/at/all"))(folder)
        return [command, ROOT, "--quiet"]

    return arrange


def of_another_model(folder: Path) -> list[str]:
    """The model's folder has other weights than when the run began."""
    unclosed()(folder)
    model = copy(llama, folder / "model")
    edit_json(model / "config.json", rope_theta=5000.0)
    by_hand(model=str(model))(folder / ROOT)
    return ["resume", ROOT, "--quiet"]


def of_a_lost_judge(folder: Path) -> list[str]:
    unclosed(change=by_hand(judge={"use": "my_own_judge:Mine"}))(folder)
    return ["resume", ROOT, "--quiet"]


def moved(command: str, *more: str) -> Arrange:
    """The run, without its experiment, under another name elsewhere."""

    def arrange(folder: Path) -> list[str]:
        finished()(folder)
        (folder / "far").mkdir()
        (folder / ROOT).rename(folder / "far" / "away")
        return [command, "far/away", *more]

    return arrange


def with_stale_lock(folder: Path) -> list[str]:
    """A killed process's lock file, with a number that no process has."""
    return finished("resume", ROOT, "--quiet", change=holds(".lock", "4194305\nsomewhere\n"))(folder)


@contextmanager
def held() -> Iterator[None]:
    """Inside, somebody else works in the run folder of the current case."""
    from unittest.mock import patch

    from filelock import FileLock

    import online_dpo.run_lock as lock

    @contextmanager
    def hold_twice(root: Path, **options: Any) -> Iterator[None]:
        with FileLock(root / lock.NAME), real(root, **options):
            yield

    real = lock.hold
    with patch.object(lock, "hold", hold_twice):
        yield


# --- the cases ---

NONE: tuple[tuple[str, Arrange, str], ...] = (
    ("an empty folder", a_folder("show", "here"), r"here is no run folder \(no manifest\.json in it\)"),
    ("an empty folder, resumed", a_folder("resume", "here"), r"here is no run folder"),
    ("a folder of other things", a_folder("resume", "here", files=("a.txt", "b.json")), r"here is no run folder"),
    ("a folder of other things, compared", a_folder("compare", "here", files=("a",)), r"here is no run folder"),
    ("a folder of other things, reported", a_folder("report", "here", files=("a",)), r"here is no run folder"),
    ("a folder of other things, exported", a_folder("export", "here", "--out", "x"), r"here is no run folder"),
    ("a folder of other things, watched", a_folder("watch", "here", files=("a",)), r"here is no run folder|no run"),
    ("a model's folder", a_model, r"model is no run folder"),
    ("the folder above two runs", two_inside, r"runs is no run folder.*; runs in it: small, tiny"),
    ("a round of a run", a_round, r"round_01 is no run folder"),
    ("a file of a run", a_file_of_it, r"manifest\.json is no run folder"),
    ("no manifest", show(lost(MANIFEST)), r"runs/tiny is no run folder \(no manifest\.json"),
    ("no manifest, resumed", resume(lost(MANIFEST)), r"runs/tiny is no run folder \(no manifest\.json"),
    ("a manifest that is a folder", show(instead(MANIFEST)), r"manifest\.json is missing or damaged"),
    ("a manifest of no bytes", show(holds(MANIFEST, "")), r"manifest\.json is missing or damaged"),
    ("half a manifest", show(cut(MANIFEST)), r"manifest\.json is missing or damaged"),
    ("half a manifest, resumed", resume(cut(MANIFEST)), r"manifest\.json is missing or damaged"),
    ("a manifest that is a list", show(holds(MANIFEST, "[]")), r"manifest\.json is damaged: expected a mapping"),
    ("a manifest that is null", show(holds(MANIFEST, "null")), r"manifest\.json is damaged: expected a mapping"),
    ("a manifest of noise", show(holds(MANIFEST, bytes(range(256)))), r"manifest\.json is missing or damaged"),
    ("a manifest without end", show(holds(MANIFEST, DEEP)), r"manifest\.json is missing or damaged: .*too deep"),
    ("a manifest of an older format", show(edited(MANIFEST, format=1)), r"has run format 1, this version reads"),
    ("a manifest of a newer format", resume(edited(MANIFEST, format=99)), r"has run format 99, this version reads"),
    ("a manifest of no format", show(edited(MANIFEST, format=None)), r"has run format None"),
    ("a manifest whose format is a text", show(edited(MANIFEST, format="4")), r"has run format"),
    (
        "a manifest without its folder",
        resume(edited(MANIFEST, folder=None)),
        r"manifest\.json is damaged: 'folder' is not what",
    ),
    (
        "a manifest without its model",
        resume(edited(MANIFEST, model=None)),
        r"manifest\.json is damaged: 'model' is not what",
    ),
    (
        "a manifest without its prompts",
        resume(edited(MANIFEST, prompts=None)),
        r"manifest\.json is damaged: 'prompts' is not what",
    ),
    (
        "a manifest without its judges",
        resume(edited(MANIFEST, judges=None)),
        r"manifest\.json is damaged: 'judges' is not what",
    ),
    (
        "a manifest whose judges are a list",
        resume(edited(MANIFEST, judges=[])),
        r"manifest\.json is damaged: 'judges'.*found \[\]",
    ),
    (
        "a manifest whose datasets are a number",
        resume(edited(MANIFEST, datasets=7)),
        r"manifest\.json is damaged: 'datasets'.*found 7",
    ),
)
"""Folders that are no run folders, or whose manifest is none."""

EXPERIMENT: tuple[tuple[str, Arrange, str], ...] = (
    ("no experiment", show(lost(YAML)), r"experiment\.yaml is missing or damaged"),
    ("no experiment, resumed", resume(lost(YAML)), r"experiment\.yaml is missing or damaged"),
    ("an experiment of no bytes", resume(holds(YAML, "")), r"experiment\.yaml is missing or damaged: .*is empty"),
    ("half an experiment", resume(cut(YAML)), r"experiment\.yaml (is not whole \(no '\w|is missing or damaged)"),
    (
        "an experiment edited by hand",
        resume(replaced(YAML, "beta: 0.1", "beta: 0.9")),
        r"experiment\.yaml was edited after",
    ),
    ("an experiment with tabs", resume(holds(YAML, "name:\n\tx")), r"experiment\.yaml is missing or damaged: .*tab"),
    ("an experiment with an unknown key", resume(by_hand(rouns=3)), r"unknown key 'rouns' \(did you mean 'rounds'\?\)"),
    ("an experiment of another model", of_another_model, r"the model .* is not the one the run began with"),
    ("an experiment of a model that is gone", of_a_lost_model("resume"), r"no model '/nowhere/at/all'"),
    ("an experiment of a judge that is gone", of_a_lost_judge, r"no module 'my_own_judge'"),
    (
        "an experiment of another judge",
        resume(by_hand(judge={"unit": "words"})),
        r"arm on_policy's judge was changed after the run began",
    ),
    (
        "an experiment that samples otherwise",
        resume(by_hand(sampling={"n": 3})),
        r"stage 'sample' was done from another sampling",
    ),
    (
        "an experiment of other prompts a round",
        resume(by_hand(prompts={"per_round": 3})),
        r"round_02: the prompts pinned in round\.json are not this round's",
    ),
    ("run again with another beta", run_again(dpo={"beta": 0.9, "batch_size": 2}), r"it differs in .*dpo\.beta"),
    ("run again with another seed", run_again(seeds=[1]), r"it differs in seeds"),
    ("run again with another arm", run_again(arms={"other": {}}), r"it differs in .*arms\.other"),
    ("run again with other prompts", other_prompts, r"the prompts are not those that the run began with"),
    (
        "run again with a judge changed",
        run_again(judge={"use": "judges.length:LengthJudge", "unit": "words"}),
        r"it differs in .*judge\.unit",
    ),
    ("run again in half a run", run_again(cut(MANIFEST)), r"manifest\.json is missing or damaged"),
    ("run where a folder with links lies", laid_into_a_foreign_folder, r"prompts\.parquet is a symbolic link"),
)
"""Its experiment, edited by hand, and the experiment that it is run with again."""

ROUNDS: tuple[tuple[str, Arrange, str], ...] = (
    ("no prompts", resume(lost("prompts.parquet")), r"prompts\.parquet"),
    ("half its prompts", resume(cut("prompts.parquet")), r"prompts\.parquet"),
    ("prompts of noise", resume(holds("prompts.parquet", bytes(range(256)))), r"prompts\.parquet"),
    ("half a record of the initial policy", resume(cut("initial.json")), r"initial\.json is (missing or )?damaged"),
    ("half a round's plan", resume(cut("round.json", 2)), r"round\.json is missing or damaged"),
    ("a round's plan of another policy", resume(edited("round.json", 2, start={"after_round": 9})), r"round"),
    ("a round's plan of prompts that are not there", resume(edited("round.json", 2, prompts=["x"])), r"'x'|prompt"),
    ("a round's plan of a number", resume(edited("round.json", 2, prompts=7)), r"round"),
    ("half a round's figures", show(cut("metrics.json", 1)), r"metrics\.json is missing or damaged"),
    ("a round's figures NaN", show(holds("metrics.json", '{"round": NaN}', 1)), r"metrics\.json.*NaN is no number"),
    ("a round's figures a list", show(holds("metrics.json", "[]", 1)), r"metrics\.json is damaged: expected a mapping"),
    ("a round's figures a folder", show(instead("metrics.json", 1)), r"metrics\.json is missing or damaged"),
    ("no policy", resume(lost("policy", 1)), r"policy"),
    ("a policy's weights cut off", resume(cut("policy/model.safetensors", 1)), r"policy"),
    ("a policy's weights of no bytes", resume(holds("policy/model.safetensors", "", 1)), r"policy"),
    ("a policy's weights with one bit changed", resume(flipped("policy/model.safetensors", 1)), r"policy.*was changed"),
    ("a policy without weights", resume(lost("policy/model.safetensors", 1)), r"policy"),
    ("no policy's record", resume(lost("policy/policy.json", 1)), r"policy"),
    ("half a policy's record", resume(cut("policy/policy.json", 1)), r"policy"),
    ("half a stage's record", show(cut("stages/train.json", 1)), r"stages/train\.json is missing or damaged"),
    ("a stage's record of another stage", show(edited("stages/train.json", 1, stage="pair")), r"it is no record of"),
    ("a stage's record with more keys", resume(edited("stages/train.json", 2, more=1)), r"train\.json is damaged"),
    (
        "a stage's record that leads elsewhere",
        show(edited("stages/train.json", 1, outputs={"../../x": "0" * 64})),
        r"train\.json is damaged: it is no record of this stage",
    ),
    ("a stage's record of a number", show(holds("stages/judge.json", "7", 1)), r"judge\.json is damaged: expected"),
    (
        "candidates changed",
        finished("export", ROOT, "--out", "x", change=flipped("candidates.parquet", 1)),
        r"candidates\.parquet was changed after stage 'sample'",
    ),
    (
        "candidates cut off",
        finished("export", ROOT, "--out", "x", "--format", "parquet", change=cut("candidates.parquet", 2)),
        r"candidates\.parquet was changed after stage 'sample'",
    ),
    (
        "no candidates",
        finished("export", ROOT, "--out", "x", "--format", "parquet", change=lost("candidates.parquet", 1)),
        r"candidates\.parquet is missing after stage 'sample' wrote it",
    ),
    (
        "no pairs",
        finished("export", ROOT, "--out", "x", change=lost("pairs.parquet", 1)),
        r"pairs\.parquet is missing after stage 'pair' wrote it",
    ),
    ("half the pairs", finished("export", ROOT, "--out", "x", change=cut("pairs.parquet", 2)), r"pairs\.parquet"),
    ("half the held-out answers", show(cut("held_out.parquet", 2)), r"held_out\.parquet is missing or damaged"),
    ("no held-out answers", show(lost("held_out.parquet", 2)), r"held_out\.parquet is missing or damaged"),
    ("half the held-out answers, compared", finished("compare", ROOT, change=cut("held_out.parquet", 2)), r"held_out"),
    (
        "held-out answers without their texts",
        show(rewritten("held_out.parquet", 2, lambda table: table.drop_columns(["text"]))),
        r"held_out\.parquet",
    ),
    (
        "held-out answers of other names",
        show(
            rewritten("held_out.parquet", 2, lambda table: table.rename_columns([f"{n}_" for n in table.schema.names]))
        ),
        r"held_out\.parquet",
    ),
    (
        "a cache of verdicts that is none",
        resume(holds("verdicts.sqlite", "no database at all" * 9)),
        r"verdicts\.sqlite",
    ),
)
"""What is in it."""

LINKS: tuple[tuple[str, Arrange, str], ...] = (
    (
        "its manifest is a link",
        show(linked(MANIFEST)),
        r"manifest\.json is a symbolic link: in a run folder such are not",
    ),
    ("its experiment is a link", resume(linked(YAML)), r"experiment\.yaml is a symbolic link"),
    ("its prompts are a link", resume(linked("prompts.parquet")), r"prompts\.parquet is a symbolic link"),
    ("its arms are a link", show(linked("arms")), r"arms is a symbolic link"),
    ("a round is a link", resume(linked("", 1)), r"round_01 is a symbolic link"),
    ("a policy is a link", resume(linked("policy", 1)), r"policy is a symbolic link"),
    ("weights are a link", resume(linked("policy/model.safetensors", 1)), r"model\.safetensors is a symbolic link"),
    (
        "a table is a link, exported",
        finished("export", ROOT, "--out", "x", change=linked("pairs.parquet", 1)),
        r"pairs\.parquet is a symbolic link",
    ),
    (
        "a table is a link, reported",
        finished("report", ROOT, "--out", "x", change=linked("pairs.parquet", 1)),
        r"pairs\.parquet is a symbolic link",
    ),
    ("its lock is a link", resume(linked(".lock")), r"\.lock is a symbolic link"),
    ("a pipe in it", show(piped), r"notes is neither a file nor a folder"),
    ("a pipe in it, resumed", resume(piped), r"notes is neither a file nor a folder"),
)
"""Links and pipes in it."""


def begun(name: str, arrange: Arrange, says: str, **keys: Any) -> Case:
    """A resumed run starts no Ray, and what it did before the fault stays."""
    return Case(f"folder: {name}", arrange, says, around=one_process, **keys)


CASES: tuple[Case, ...] = (
    *(Case(f"folder: {name}", arrange, says, exit_code=2) for name, arrange, says in NONE),
    *(begun(name, arrange, says, exit_code=2) for name, arrange, says in (*EXPERIMENT, *ROUNDS)),
    *(Case(f"folder: {name}", arrange, says, exit_code=2) for name, arrange, says in LINKS),
    Case(
        "folder: held by another process",
        resume(lambda root: None),
        r"runs/tiny is in use by another process",
        exit_code=2,
        around=held,
    ),
    Case(
        "folder: run again while another process holds it",
        run_again(),
        r"runs/tiny is in use by another process",
        exit_code=2,
        around=held,
    ),
    Case(
        "folder: shown while another process holds it", show(lambda root: None), r"runs/tiny", goes_on=True, around=held
    ),
    Case("folder: a lock that a killed process left", with_stale_lock, r"this run is finished", goes_on=True),
    Case("folder: moved", moved("show"), r"run folder: far/away", goes_on=True),
    Case("folder: moved, and resumed", moved("resume", "--quiet"), r"this run is finished", goes_on=True),
    Case("folder: finished, and run again", run_again(), r"this run is finished", goes_on=True),
    begun("stopped, and resumed", resume(lambda root: None), r"run folder: runs/tiny", goes_on=True),
)
