"""Branching a run: what is taken over, what is done anew, and what cannot be asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from sources import World, experiment
from test_loop import Killed, results, with_death

from online_dpo.errors import ConfigError, OnlineDPOError, RunFolderError
from online_dpo.forking import Fork, lay_fork, plan_fork
from online_dpo.records import read_verdicts
from online_dpo.store import RunStore

BY_WORDS = ["judge.use=judges.length:LengthJudge", "judge.unit=words"]
TWO = {"on_policy": {}, "replay": {"source": {"stream": "on_policy"}}}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("runs") / "run", experiment(arms=TWO, rounds=3, seeds=[0, 1]))
    world.save_prompts()
    return world.go()


def branch(old: World, arm: str, index: int, changes: list[str], **how: Any) -> Path:
    """Lay a fork of `old` out; the name follows from the changes, so that each has a folder of its own."""
    how.setdefault("name", f"fork-{len(list(old.root.parent.iterdir()))}")
    return lay_fork(plan_fork(RunStore.open(old.root), arm, index, changes, **how), {"on_policy": "j"}, {})


def go_on(root: Path, **parts: Any) -> World:
    return World(root, RunStore.open(root).experiment, **parts).go()


def sampled(world: World) -> list[int]:
    """How many answers to training prompts each round sampled in this process, in its order."""
    return [len(call[0]) for call in world.asked("sample") if call[0][0][0].startswith("train")]


def test_another_judge_judges_the_same_answers(finished: World) -> None:
    """Forked at round 2: rounds 0 and 1 are there as they were, round 2's answers are judged, paired and trained on
    anew, round 3 samples for itself."""
    world = go_on(branch(finished, "on_policy", 2, BY_WORDS, seed=0))
    assert len(sampled(world)) == 1
    assert [call[0] for call in world.asked("train")] == ["on_policy/seed_0/round_02", "on_policy/seed_0/round_03"]
    new = world.metrics()
    assert set(new) == {("on_policy", index) for index in range(4)}
    for index in (0, 1):
        assert new["on_policy", index] == finished.folder("on_policy", index).metrics
        ours, theirs = world.folder("on_policy", index).path, finished.folder("on_policy", index).path
        assert (ours / "held_out.parquet").stat().st_ino == (theirs / "held_out.parquet").stat().st_ino
    # The two judges may choose the same pairs: then the policy is the same, and so is what was measured of it.
    assert [stage for stage in new["on_policy", 2]["reused"] if stage != "evaluate"] == ["sample"]
    record = world.folder("on_policy", 2).done("sample")
    assert record is not None
    assert record.reused_from == "forked_from/arms/on_policy/seed_0/round_02"
    ours, theirs = (one.folder("on_policy", 2).path for one in (world, finished))
    assert (ours / "candidates.parquet").stat().st_ino == (theirs / "candidates.parquet").stat().st_ino
    scores = [getattr(v, "score", None) for v in read_verdicts(ours / "verdicts.parquet")]
    assert scores != [getattr(v, "score", None) for v in read_verdicts(theirs / "verdicts.parquet")]
    assert new["on_policy", 3]["reused"] == []


def test_what_was_measured_is_measured_by_the_same_judge(finished: World) -> None:
    world = go_on(branch(finished, "on_policy", 1, BY_WORDS, seed=0))
    spec = world.run.experiment
    assert spec.evaluation_judge("on_policy") == finished.run.experiment.arm("on_policy").judge
    assert spec.arm("on_policy").judge.params == {"unit": "words"}


@pytest.mark.parametrize(
    ("changes", "reused"),
    [
        (["pairing.rule=random"], ["sample", "judge"]),
        (["dpo.beta=0.3"], ["sample", "judge", "pair"]),
        (["arms.on_policy.dpo.beta=0.3"], ["sample", "judge", "pair"]),
        (["rounds=2"], ["sample", "judge", "pair", "train", "evaluate"]),
        (["sampling.temperature=0.5"], ["judge", "pair", "train", "evaluate"]),  # the fake answers alike
        (["source=initial"], []),
    ],
)
def test_stages_whose_inputs_are_the_same_are_taken_over(
    finished: World, changes: list[str], reused: list[str]
) -> None:
    world = go_on(branch(finished, "on_policy", 2, changes, seed=0))
    assert world.metrics()["on_policy", 2]["reused"] == reused


def test_all_seeds_unless_one_is_named(finished: World) -> None:
    root = branch(finished, "on_policy", 3, ["dpo.beta=0.3"])
    assert RunStore.open(root).experiment.seeds == [0, 1]
    assert sorted(path.name for path in (root / "arms" / "on_policy").iterdir()) == ["seed_0", "seed_1"]
    world = go_on(root)
    assert sampled(world) == []
    assert [call[0] for call in world.asked("train")] == [f"on_policy/seed_{seed}/round_03" for seed in (0, 1)]


def test_the_manifest_says_what_it_was_forked_from(finished: World) -> None:
    root = branch(finished, "on_policy", 2, ["dpo.beta=0.3", "dpo.lr=1e-5"], seed=1)
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    origin = manifest["forked_from"]
    assert origin.pop("experiment")
    assert origin == {
        "run": str(finished.root.resolve()),
        "arm": "on_policy",
        "seeds": [1],
        "round": 2,
        "changed": ["dpo.beta", "dpo.lr"],
    }
    assert manifest["judges"] == {"on_policy": "j"}
    assert manifest["prompts"] == finished.run.store.manifest["prompts"]


def test_a_stream_of_the_old_run_becomes_one_of_another_run(finished: World) -> None:
    world = go_on(branch(finished, "replay", 2, ["dpo.beta=0.3"], seed=0))
    source = world.run.experiment.arm("replay").source
    assert getattr(source, "stream", None) == f"{finished.root.resolve()}:on_policy"
    assert world.metrics()["replay", 2]["reused"] == ["sample", "judge", "pair"]
    assert sampled(world) == []


def test_a_fork_of_a_fork_and_of_a_mixture(tmp_path: Path) -> None:
    """Parts are stages too: at a later round they are taken over with their rounds, and found by their inputs."""
    mixture = [{"share": 0.5, "source": "current"}, {"share": 0.5, "source": {"history": 2}}]
    arms = {"a": {"source": {"mixture": mixture}}}
    prompts = {"path": "p", "per_round": 4, "held_out": 3}
    world = World(tmp_path / "run", experiment(arms=arms, rounds=3, prompts=prompts))
    world.save_prompts()
    world.go()
    first = go_on(branch(world, "a", 2, ["dpo.beta=0.3"]))
    assert first.metrics()["a", 2]["reused"] == ["sample", "judge", "pair"]
    assert len(sampled(first)) == 2  # round 3's two parts
    second = go_on(branch(first, "a", 3, ["dpo.beta=0.2"]))
    assert sampled(second) == []
    assert second.metrics()["a", 2] == first.metrics()["a", 2]


def test_a_stopped_run_is_forked_where_it_stopped(tmp_path: Path) -> None:
    """Killed before round 2 was judged: its answers are taken over."""
    world = World(tmp_path / "run", experiment(arms={"a": {}}))
    world.save_prompts()
    with pytest.raises(Killed):
        with_death(world, "a", 2, "judge", "before")
    again = go_on(branch(world, "a", 2, BY_WORDS))
    assert sampled(again) == []
    assert again.metrics()["a", 2]["reused"] == ["sample"]


def test_a_kept_decision_is_taken_over(tmp_path: Path) -> None:
    source = {"refresh_when": {"kl_above": 1000.0}}
    world = World(tmp_path / "run", experiment(arms={"a": {"source": source}}))
    world.save_prompts()
    world.go()
    again = go_on(branch(world, "a", 2, ["dpo.beta=0.3"]))
    assert again.metrics()["a", 2]["refresh"] == world.metrics()["a", 2]["refresh"]
    assert again.metrics()["a", 2]["reused"] == ["refresh", "sample", "judge", "pair"]


class Deadly(FakeEngine):
    """Dies when it is asked to sample."""

    def sample(self, requests: Any, sampling: Any) -> Any:
        raise Killed


def test_a_fork_that_was_killed_is_resumed(finished: World) -> None:
    whole = go_on(branch(finished, "on_policy", 2, ["dpo.beta=0.3"], seed=0))
    root = branch(finished, "on_policy", 2, ["dpo.beta=0.3"], seed=0)
    with pytest.raises(Killed):
        go_on(root, engine=Deadly)
    # A policy's card names the run; its digest stands in the figures.
    ours, theirs = (
        {name: value for name, value in results(one.root).items() if not name.endswith("/policy")}
        for one in (go_on(root), whole)
    )
    assert ours == theirs


def test_a_fork_killed_while_it_is_laid_out_leaves_nothing_in_its_place(
    finished: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = plan_fork(finished.run.store, "on_policy", 2, ["dpo.beta=0.3"], name="half")
    create = RunStore.create

    def dying(*args: Any) -> RunStore:
        create(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunStore, "create", dying)
        lay_fork(fork, {}, {})
    assert not fork.root.exists()
    assert RunStore.open(lay_fork(fork, {}, {})).experiment.name == "half"
    assert not list(fork.root.parent.glob(".half*"))


@pytest.mark.parametrize(
    ("arm", "index", "changes", "how", "message"),
    [
        ("on_polic", 2, ["dpo.beta=0.3"], {}, r"no arm 'on_polic' in .* \(did you mean 'on_policy'\?\)"),
        ("on_policy", 0, ["dpo.beta=0.3"], {}, "--round 0: the arm has rounds 1 to 3"),
        ("on_policy", 4, ["dpo.beta=0.3"], {}, "--round 4: the arm has rounds 1 to 3"),
        ("on_policy", 3, ["rounds=2"], {}, "--round 3: the arm has rounds 1 to 2"),
        ("on_policy", 5, ["rounds=6"], {}, "has not finished round 4: fork at round 4 at the latest"),
        ("on_policy", 2, [], {}, "with nothing changed"),
        ("on_policy", 2, ["dpo.beta=0.1"], {}, "with nothing changed"),
        ("on_policy", 2, ["dpo.bta=0.3"], {}, r"unknown key .*did you mean 'beta'"),
        ("on_policy", 2, ["dop.beta=0.3"], {}, r"unknown key 'dop' \(did you mean 'dpo'\?\)"),
        ("on_policy", 2, ["model=other"], {}, "--set model: a fork keeps it"),
        ("on_policy", 2, ["evaluation.temperature=0"], {}, "--set evaluation: a fork keeps it"),
        ("on_policy", 2, ["arms.replay.dpo.beta=1"], {}, "a fork has the arm 'on_policy' alone"),
        ("on_policy", 2, ["dpo.beta=0.3"], {"seed": 7}, "was not run with seed 7 but 0, 1"),
        ("on_policy", 2, ["dpo.beta=0.3"], {"name": "run"}, "run is there already: go on with 'online-dpo resume"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    finished: World, arm: str, index: int, changes: list[str], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(OnlineDPOError, match=message) as told:
        plan_fork(finished.run.store, arm, index, changes, **how)
    assert isinstance(told.value, ConfigError | RunFolderError)
    assert "\n" not in str(told.value)


def test_a_policy_that_was_not_kept_cannot_be_gone_on_from(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=3, keep="last"))
    world.save_prompts()
    world.go()
    with pytest.raises(RunFolderError, match=r"a · seed 0 did not keep the policy of round 1 \(keep: last\)"):
        plan_fork(world.run.store, "a", 2, ["dpo.beta=0.3"])
    fork = plan_fork(world.run.store, "a", 1, ["dpo.beta=0.3"])
    assert isinstance(fork, Fork)


def test_a_damaged_file_is_not_taken_over(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {}}))
    world.save_prompts()
    world.go()
    file = world.folder("a", 1).path / "held_out.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=r"held_out\.parquet was changed"):
        branch(world, "a", 2, ["dpo.beta=0.3"])


def test_the_command_tells_what_is_wrong_before_it_starts_anything(finished: World) -> None:
    from typer.testing import CliRunner

    from online_dpo.cli import app

    done = CliRunner().invoke(app, ["fork", str(finished.root), "--arm", "nobody", "--round", "2"])
    assert done.exit_code == 2
    assert "no arm 'nobody'" in done.output
    assert "Traceback" not in done.output
