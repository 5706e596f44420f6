"""The stage `sft` with a fake learner: done once, whole or not at all, and every arm begins with what it made."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeLearner, Spoken, fake_policy

from online_dpo.backends import factory
from online_dpo.config import Experiment, SftSpec, validate_experiment
from online_dpo.dataset_rows import Answer, DatasetRows, Row
from online_dpo.errors import RunFolderError, TrainingError
from online_dpo.files import digest
from online_dpo.sft_stage import answers_of, describe_sft, initial_model
from online_dpo.sources.datasets import SFT
from online_dpo.store import RunStore
from online_dpo.types import Message, Policy, Prompt

SPEC = {"dataset": "given.jsonl", "lr": 1e-3, "batch_size": 2, "epochs": 1}


def experiment(**changes: Any) -> Experiment:
    data = {"name": "tiny", "model": "m", "prompts": {"path": "p.jsonl"}, "judge": "a:B", "sft": SPEC}
    return validate_experiment(data | changes, "test")


def rows(digest: str = "d" * 64, pairs: bool = False) -> DatasetRows:
    """Three rows; the second has a rejected answer where `pairs`."""

    def row(number: int) -> Row:
        rejected = Answer("no", array("i", [9, number, 2])) if pairs and number == 1 else None
        prompt = Prompt(f"r{number}", (Message("user", "x"),), (1, 10 + number))
        return Row(prompt, Answer("yes", array("i", [5, number, 2])), rejected)

    return DatasetRows(tuple(row(number) for number in range(3)), {}, {"too_long": 4}, digest, "given.jsonl")


class Desk:
    """A run folder, and what its stage `sft` does; `learner` is what the stage gets."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, spec: Experiment | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.learner = FakeLearner(self.calls)
        self.progress = Spoken()
        self.store = RunStore.open(root) if RunStore.exists(root) else RunStore.create(root, spec or experiment(), {})
        self.model = fake_policy(root.parent / "model", "initial", "m")
        self.started: list[Experiment] = []

        @contextmanager
        def started(found: Experiment, initial: Policy, **_: Any) -> Iterator[FakeLearner]:
            assert initial == self.model
            self.started.append(found)
            yield self.learner

        monkeypatch.setattr(factory, "start_learner", started)

    def go(self, data: DatasetRows | None = None) -> Policy:
        datasets = {SFT: data or rows()}
        return initial_model(self.store, self.model, datasets, (1, 2), self.progress)


def test_its_policy_is_what_every_arm_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path / "run", monkeypatch)
    policy = desk.go()
    assert policy.path == tmp_path / "run" / "sft" / "policy"
    assert (policy.id, policy.adapter) == ("initial", False)
    assert policy.digest != desk.model.digest
    assert policy.probe is not None
    assert desk.progress.stages == [("sft", 3)]
    record = json.loads((tmp_path / "run" / "sft" / "stages" / "sft.json").read_text(encoding="utf-8"))
    assert set(record["inputs"]) == {"model", "dataset", "sft"}
    assert record["inputs"]["model"] == desk.model.digest
    info = record["info"]
    assert (info["loss"], info["rows"], info["answers"], info["steps"]) == (
        "sft on the chosen answers, averaged log-probs", 3, 3, 2,
    )  # fmt: skip
    assert [point["loss"] for point in info["curve"]] == pytest.approx([0.6, 0.5])
    assert record["seconds"] >= 0


def test_it_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process starts no learner and finds the same policy."""
    first = Desk(tmp_path / "run", monkeypatch).go()
    again = Desk(tmp_path / "run", monkeypatch)
    assert again.go() == first
    assert again.started == []


def test_without_it_the_model_is_what_arms_begin_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path / "run", monkeypatch, experiment(sft=None))
    assert initial_model(desk.store, desk.model, {}, (1, 2), desk.progress) == desk.model
    assert not (tmp_path / "run" / "sft").exists()


def test_killed_in_the_middle_it_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the policy was saved and before the stage was committed: nothing half done is taken for the whole."""
    desk = Desk(tmp_path / "run", monkeypatch)
    monkeypatch.setattr("online_dpo.sft_stage.train_figures", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        desk.go()
    assert not (tmp_path / "run" / "sft" / "policy").exists()
    monkeypatch.undo()
    other = Desk(tmp_path / "run", monkeypatch)
    policy = other.go()
    assert len(other.started) == 1
    alone = Desk(tmp_path / "other" / "run", monkeypatch).go()
    assert policy.digest == alone.digest
    assert digest(policy.path) == digest(alone.path)
    assert sorted(path.name for path in (tmp_path / "run" / "sft").iterdir()) == ["policy", "stages"]


def test_a_training_that_fails_leaves_no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path / "run", monkeypatch)
    desk.learner = FakeLearner(desk.calls, stop=lambda _: True)
    with pytest.raises(TrainingError, match="loss nan"):
        desk.go()
    assert not (tmp_path / "run" / "sft" / "policy").exists()


def test_changed_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Desk(tmp_path / "run", monkeypatch).go()
    with (policy.path / "model.safetensors").open("ab") as handle:
        handle.write(b"\0")
    with pytest.raises(RunFolderError, match="was changed after stage 'sft' wrote it") as caught:
        Desk(tmp_path / "run", monkeypatch).go()
    assert "\n" not in str(caught.value)


def test_another_dataset_or_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Desk(tmp_path / "run", monkeypatch).go()
    with pytest.raises(RunFolderError, match="stage 'sft' was done from another dataset"):
        Desk(tmp_path / "run", monkeypatch).go(rows("e" * 64))
    desk = Desk(tmp_path / "run", monkeypatch)
    desk.model = replace(desk.model, digest="0" * 64)
    with pytest.raises(RunFolderError, match="stage 'sft' was done from another model"):
        desk.go()


def test_what_the_learner_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights, though arms may train adapters; no pairs, no source, no reference but the model itself."""
    desk = Desk(tmp_path / "run", monkeypatch, experiment(lora={"rank": 2}))
    desk.go()
    assert desk.calls == [("train", "initial", desk.model.digest, desk.model.digest, None, [], 0)]


@pytest.mark.parametrize(("on", "count"), [("chosen", 3), ("both", 4)])
def test_which_answers(on: str, count: int) -> None:
    """In the dataset's order, each behind its own prompt; a row without a rejected answer has one."""
    found = answers_of(rows(pairs=True), SftSpec.model_validate(SPEC | {"on": on}))
    assert len(found) == count
    assert found[0] == ((1, 10), (5, 0, 2))
    assert found[-1] == ((1, 12), (5, 2, 2))
    assert (((1, 11), (9, 1, 2)) in found) == (on == "both")


def test_the_plan_in_one_line() -> None:
    """Four answers in twos, three epochs: six steps."""
    spec = experiment(sft=SPEC | {"on": "both", "epochs": 3})
    assert describe_sft(spec, {SFT: rows(pairs=True)}) == [
        "sft: 4 answers (both), 6 steps of 2 in 3 epoch(s), all weights, before round 0"
    ]
    assert describe_sft(experiment(sft=None), {}) == []


def test_a_run_without_its_dataset_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path / "run", monkeypatch)
    with pytest.raises(RunFolderError, match="the dataset of sft was not read"):
        initial_model(desk.store, desk.model, {}, (1, 2), desk.progress)
