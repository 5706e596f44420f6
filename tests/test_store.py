"""The run folder: whole stages or none, whatever the moment of death; damage named; work shared, moved and locked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import Experiment, validate_experiment
from online_dpo.errors import RunFolderError
from online_dpo.files import digest
from online_dpo.store import FORMAT, RoundFolder, RunStore, changed_keys

INPUTS = {"source": "s0", "prompts": "p0"}
OUTPUTS = ["candidates.parquet", "policy"]
KILLED = 9


def experiment(**changes: Any) -> Experiment:
    """A small experiment."""
    data = {
        "name": "tiny",
        "model": "m",
        "prompts": {"path": "p.jsonl"},
        "judge": {"use": "judges.length:LengthJudge"},
        "arms": {"a": {}, "b": {"source": "initial"}},
    }
    return validate_experiment(data | changes, "test")


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "run", experiment(), {"folder": "x"})


def produce(folder: Path) -> Mapping[str, Any]:
    """Writes both outputs, always the same."""
    (folder / "candidates.parquet").write_bytes(b"candidates" * 100)
    (folder / "policy" / "sub").mkdir(parents=True)
    (folder / "policy" / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "policy" / "sub" / "more").write_bytes(b"more")
    return {"tokens": 12}


def never(_: Path) -> Mapping[str, Any]:
    raise AssertionError("the stage is done: it must not be done again")


def work(store: RunStore, arm: str = "a", make: Callable[[Path], Mapping[str, Any]] = produce) -> RoundFolder:
    """Round 1's sample stage of `arm`."""
    folder = store.round(arm, 0, 1)
    folder.stage("sample", INPUTS, OUTPUTS, make)
    return folder


def names(folder: Path) -> list[str]:
    """All files and folders under `folder`."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


WHOLE = [
    "candidates.parquet",
    "policy",
    "policy/model.safetensors",
    "policy/sub",
    "policy/sub/more",
    "stages",
    "stages/sample.json",
]


# --- stages ---


def test_a_stage_is_done_once(store: RunStore) -> None:
    folder = work(store)
    assert names(folder.path) == WHOLE
    record = folder.done("sample")
    assert record is not None
    assert record.info == {"tokens": 12}
    assert record.inputs == INPUTS
    assert record.outputs == {name: digest(folder.path / name) for name in OUTPUTS}
    assert record.reused_from is None
    assert work(store, make=never).done("sample") == record
    assert work(RunStore.open(store.root), make=never).done("sample") == record


def test_a_failing_stage_leaves_nothing_that_counts(store: RunStore) -> None:
    def fail(folder: Path) -> Mapping[str, Any]:
        produce(folder)
        (folder / "left-over").write_bytes(b"x")
        raise ValueError("judge is on holiday")

    with pytest.raises(ValueError, match="on holiday"):
        work(store, make=fail)
    assert store.round("a", 0, 1).done("sample") is None
    assert not (store.round("a", 0, 1).path / "policy").exists()
    assert names(work(store).path) == WHOLE


def test_a_stage_must_write_what_it_promised(store: RunStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.round("a", 0, 1).stage("sample", INPUTS, OUTPUTS, lambda folder: {})
    assert store.round("a", 0, 1).done("sample") is None


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"source": "s1", "prompts": "p0"}, "another source"),
        ({"source": "s1", "prompts": "p1"}, "another source, prompts"),
        ({"source": "s0", "prompts": "p0", "engine": "vllm"}, "another engine"),
        ({"source": "s0"}, "another prompts, source"),
    ],
)
def test_other_inputs_are_named(store: RunStore, inputs: dict[str, str], named: str) -> None:
    folder = work(store)
    with pytest.raises(RunFolderError) as caught:
        folder.stage("sample", inputs, OUTPUTS, never)
    assert str(caught.value) == f"{folder.path}: stage 'sample' was done from {named}"


# --- death at any moment ---


def dies_at(moment: int, task: Callable[[], object]) -> bool:
    """Do `task` in a child process that dies, as by kill -9, just before its `moment`-th change on disk.

    Changes are what Python's audit events tell: files opened for writing, renames, links, new and removed files and
    folders. Nothing is flushed or cleaned up: an opened file stays without what was written to it. Returns whether
    it died; False when `task` made fewer changes.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"):
                if seen == moment:
                    os._exit(KILLED)
                seen += 1

        try:
            sys.addaudithook(watch)
            task()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), "the task failed by itself"
    return status == KILLED


def moments(prepare: Callable[[Path], Callable[[], object]], folder: Path) -> Iterator[Path]:
    """A fresh run folder for every moment at which the task that `prepare` returns can die; it died there."""
    moment = 0
    while True:
        root = folder / f"moment-{moment}"
        died = dies_at(moment, prepare(root))
        yield root
        if not died:
            return
        moment += 1


def check_whole_or_absent(root: Path) -> bool:
    """Whether the stage is done; if so its files must be there, whole."""
    folder = RunStore.open(root).round("a", 0, 1)
    record = folder.done("sample")
    if record is not None:
        folder.verify(record)
    return record is not None


def test_killed_anywhere_a_stage_is_whole_or_done_again(tmp_path: Path) -> None:
    def prepare(root: Path) -> Callable[[], object]:
        store = RunStore.create(root, experiment(), {})
        return lambda: work(store)

    done = []
    for root in moments(prepare, tmp_path):
        done.append(check_whole_or_absent(root))
        folder = work(RunStore.open(root), make=never if done[-1] else produce)
        assert names(folder.path) == WHOLE
        record = folder.done("sample")
        assert record is not None
        assert record.outputs == {name: digest(folder.path / name) for name in OUTPUTS}
        assert record.info == {"tokens": 12}
    # Aside and three folders, three files, two renames, clearing, the record: each was a moment; only the last is done.
    assert len(done) >= 12
    assert done == [False] * (len(done) - 1) + [True]


def test_killed_anywhere_while_taking_over_another_arms_stage(tmp_path: Path) -> None:
    def prepare(root: Path) -> Callable[[], object]:
        store = RunStore.create(root, experiment(), {})
        work(store, "b")
        return lambda: work(store, "a", never)

    count = 0
    for root in moments(prepare, tmp_path):
        check_whole_or_absent(root)
        folder = work(RunStore.open(root), "a", never)
        assert names(folder.path) == WHOLE
        assert RunStore.open(root).round("b", 0, 1).done("sample") is not None
        RunStore.open(root).round("b", 0, 1).trust("sample")
        count += 1
    assert count >= 10


def test_killed_anywhere_while_a_stage_is_done_again(tmp_path: Path) -> None:
    """The person deleted the record as the error told: the old outputs are replaced, not mixed with the new."""

    def prepare(root: Path) -> Callable[[], object]:
        folder = work(RunStore.create(root, experiment(), {}))
        (folder.path / "policy" / "stale").write_bytes(b"old")
        (folder.path / "stages" / "sample.json").unlink()
        return lambda: work(RunStore.open(root))

    for root in moments(prepare, tmp_path):
        check_whole_or_absent(root)
        assert names(work(RunStore.open(root)).path) == WHOLE


def test_killed_anywhere_the_pin_and_the_close_are_whole(tmp_path: Path) -> None:
    def prepare(root: Path) -> Callable[[], object]:
        folder = RunStore.create(root, experiment(), {}).round("a", 0, 1)

        def task() -> None:
            folder.pin(lambda: {"source": "first"})
            folder.close({"reward": 1.5})

        return task

    for root in moments(prepare, tmp_path):
        folder = RunStore.open(root).round("a", 0, 1)
        pinned = folder.pin(lambda: {"source": "second"})
        assert pinned in ({"source": "first"}, {"source": "second"})
        assert folder.pin(lambda: {"source": "third"}) == pinned
        if folder.closed:
            assert folder.metrics == {"reward": 1.5}
            assert pinned == {"source": "first"}


def test_killed_anywhere_a_new_run_is_none_or_complete(tmp_path: Path) -> None:
    for root in moments(lambda root: lambda: RunStore.create(root, experiment(), {"folder": "x"}), tmp_path):
        if RunStore.exists(root):
            assert RunStore.open(root).experiment == experiment()
            assert RunStore.open(root).manifest == {"format": FORMAT, "folder": "x"}
        assert RunStore.create(root, experiment(), {"folder": "x"}).experiment == experiment()


def test_killed_anywhere_a_pruned_output_is_given_up_or_whole(tmp_path: Path) -> None:
    def prepare(root: Path) -> Callable[[], object]:
        folder = work(RunStore.create(root, experiment(), {}))
        return lambda: folder.prune("policy")

    for root in moments(prepare, tmp_path):
        folder = RunStore.open(root).round("a", 0, 1)
        folder.trust("sample")  # half removed but not marked would be an error
        folder.prune("policy")
        assert not (folder.path / "policy").exists()
        folder.trust("sample")


# --- damage ---


def damage_fault(store: RunStore) -> str:
    """The one line that a reopened run says of its damaged stage."""
    with pytest.raises(RunFolderError) as caught:
        work(RunStore.open(store.root), make=never)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("file", ["candidates.parquet", "policy/model.safetensors", "policy/sub/more"])
@pytest.mark.parametrize("harm", [edit, truncate, Path.unlink])
def test_damage_names_the_output(store: RunStore, file: str, harm: Callable[[Path], None]) -> None:
    """One bit, one byte less, or gone: also deep in a folder."""
    folder = work(store).path
    if file == "policy/sub/more" and harm is edit:
        (folder / file).write_bytes(b"Mone")
    else:
        harm(folder / file)
    message = damage_fault(store)
    gone = harm is Path.unlink and file == "candidates.parquet"
    assert message.startswith(f"{folder / Path(file).parts[0]} {'is missing' if gone else 'was changed'} after stage")
    assert f"delete stages/sample.json in {folder} to do the stage again" in message


def test_damage_advice_holds(store: RunStore) -> None:
    folder = work(store).path
    edit(folder / "candidates.parquet")
    (folder / "stages" / "sample.json").unlink()
    assert names(work(RunStore.open(store.root)).path) == WHOLE


def test_a_closed_rounds_advice_names_its_metrics_too(store: RunStore) -> None:
    folder = work(store)
    folder.close({})
    edit(folder.path / "candidates.parquet")
    assert "delete stages/sample.json and metrics.json in" in damage_fault(store)


def test_trust_verifies_once_and_only_what_this_process_did_not_do(store: RunStore) -> None:
    folder = work(store)
    edit(folder.path / "candidates.parquet")
    folder.trust("sample")  # written by this process a moment ago
    reopened = RunStore.open(store.root).round("a", 0, 1)
    with pytest.raises(RunFolderError, match="was changed"):
        reopened.trust("sample")
    with pytest.raises(RunFolderError, match="has no record"):
        reopened.trust("train")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "sample"}', '{"stage": "sample", "extra": 1}', "\xff\xfe"])
def test_a_damaged_record_is_named(store: RunStore, text: str) -> None:
    file = work(store).path / "stages" / "sample.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunFolderError) as caught:
        RunStore.open(store.root)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_run_is_named(store: RunStore) -> None:
    (store.root / "experiment.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"experiment\.yaml is missing or damaged"):
        _ = RunStore.open(store.root).experiment
    (store.root / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"manifest\.json is missing or damaged"):
        RunStore.open(store.root)
    (store.root / "manifest.json").write_text('{"format": 3}', encoding="utf-8")
    with pytest.raises(RunFolderError, match="has run format 3, this version reads format 4"):
        RunStore.open(store.root)
    (store.root / "manifest.json").unlink()
    with pytest.raises(RunFolderError, match="is no run folder"):
        RunStore.open(store.root)


# --- the lock ---


HOLD = """
import sys, time
from pathlib import Path
from online_dpo.store import RunStore
with RunStore(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_cannot_hold_a_run(store: RunStore) -> None:
    with holder(store.root), pytest.raises(RunFolderError, match="is in use by another process"), store.locked():
        pytest.fail("both hold it")


def test_a_killed_process_holds_nothing(store: RunStore) -> None:
    with holder(store.root) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with store.locked():
            pass


def test_the_lock_is_free_after_an_error(store: RunStore) -> None:
    with pytest.raises(ValueError, match="x"), store.locked():
        raise ValueError("x")
    with store.locked():
        pass


# --- sharing work ---


def test_an_equal_stage_of_another_arm_is_taken_over_by_links(store: RunStore) -> None:
    first = work(store, "a")
    second = work(store, "b", never)
    record, other = second.done("sample"), first.done("sample")
    assert record is not None
    assert other is not None
    assert record.reused_from == "arms/a/seed_0/round_01"
    assert (record.inputs, record.outputs, record.info) == (other.inputs, other.outputs, other.info)
    assert names(second.path) == WHOLE
    for file in ("candidates.parquet", "policy/model.safetensors", "policy/sub/more"):
        assert (second.path / file).stat().st_ino == (first.path / file).stat().st_ino


def test_a_reopened_run_takes_over_too(store: RunStore) -> None:
    work(store, "a")
    record = work(RunStore.open(store.root), "b", never).done("sample")
    assert record is not None
    assert record.reused_from == "arms/a/seed_0/round_01"


def test_other_inputs_or_another_stage_are_not_taken_over(store: RunStore) -> None:
    work(store, "a")
    done: list[str] = []

    def make(folder: Path) -> Mapping[str, Any]:
        done.append(folder.name)
        return produce(folder)

    folder = store.round("b", 0, 1)
    folder.stage("sample", INPUTS | {"source": "s1"}, OUTPUTS, make)
    folder.stage("train", INPUTS, OUTPUTS, make)
    assert done == [".sample.tmp", ".train.tmp"]


def test_damaged_files_are_not_taken_over(store: RunStore) -> None:
    edit(work(store, "a").path / "candidates.parquet")
    with pytest.raises(RunFolderError, match=r"/a/.*candidates\.parquet was changed"):
        work(RunStore.open(store.root), "b")
    assert store.round("b", 0, 1).done("sample") is None


def test_a_pruned_output_is_not_taken_over_but_made_again(store: RunStore) -> None:
    folder = work(store, "a")
    folder.prune("policy")
    assert names(folder.path) == [".policy.pruned", "candidates.parquet", "stages", "stages/sample.json"]
    made = work(RunStore.open(store.root), "b")
    record = made.done("sample")
    assert record is not None
    assert record.reused_from is None
    assert names(made.path) == WHOLE
    folder.trust("sample")  # given up on purpose is no damage


def test_pruning_one_arms_policy_leaves_the_one_that_shares_it(store: RunStore) -> None:
    first, second = work(store, "a"), work(store, "b", never)
    first.prune("policy")
    RunStore.open(store.root).round("b", 0, 1).trust("sample")
    assert names(second.path) == WHOLE


# --- moving, changing ---


def test_a_moved_run_folder_goes_on(store: RunStore, tmp_path: Path) -> None:
    work(store, "a")
    target = tmp_path / "elsewhere" / "renamed"
    target.parent.mkdir()
    shutil.move(store.root, target)
    moved = RunStore.open(target)
    work(moved, "a", never)
    record = work(moved, "b", never).done("sample")
    assert record is not None
    assert record.reused_from == "arms/a/seed_0/round_01"
    written = [file.read_bytes() for file in target.rglob("*") if file.is_file()]
    assert not any(str(store.root).encode() in data for data in written)


def test_a_copied_run_folder_goes_on(store: RunStore, tmp_path: Path) -> None:
    """A copy has no hard links; its digests hold all the same."""
    work(store, "a")
    work(store, "b", never)
    shutil.copytree(store.root, tmp_path / "copy")
    shutil.rmtree(store.root)
    work(RunStore.open(tmp_path / "copy"), "b", never)


def test_the_experiment_survives_the_disk(store: RunStore) -> None:
    assert RunStore.open(store.root).experiment == experiment()
    assert changed_keys(RunStore.open(store.root).experiment, experiment()) == []


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"dpo": {"beta": 0.2, "lr": 1e-5}}, ["dpo.beta", "dpo.lr"]),
        ({"seeds": [0, 1]}, ["seeds"]),
        ({"arms": {"a": {}, "b": {"source": "current"}}}, ["arms.b.source"]),
        ({"arms": {"a": {}}}, ["arms.b.source"]),
        ({"arms": {"a": {}, "b": {"source": "initial"}, "c": {}}}, ["arms.c"]),
        ({"arms": {"a": {}, "b": {"source": "initial"}, "c": None}}, ["arms.c"]),
        (
            {"lora": {"rank": 8}},
            ["lora", "lora.rank", "lora.alpha", "lora.dropout", "lora.target_modules", "lora.serve"],
        ),
        ({"judge": {"use": "judges.length:LengthJudge", "target": 3}}, ["judge.target"]),
        ({"source": {"every": 2}}, ["source", "source.every"]),
        ({"output": "elsewhere"}, []),
    ],
)
def test_changed_keys_are_named(change: dict[str, Any], keys: list[str]) -> None:
    assert changed_keys(experiment(), experiment(**change)) == keys
    assert sorted(changed_keys(experiment(**change), experiment())) == sorted(keys)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../x", "/etc", "", ".hidden", "a\nb", "a\\b", "-x", "x" * 65, "é"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str) -> None:
    from online_dpo.errors import ConfigError

    with pytest.raises(ConfigError, match="letters, digits"):
        experiment(arms={name: {}})
    with pytest.raises(ConfigError, match="letters, digits"):
        experiment(name=name)


def test_the_manifest_is_plain_json(store: RunStore) -> None:
    assert json.loads((store.root / "manifest.json").read_text(encoding="utf-8")) == {"format": FORMAT, "folder": "x"}
