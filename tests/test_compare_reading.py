"""Outcomes read from real run folders, written by the loop with a fake engine and learner."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loop import HELD_OUT, World, experiment

from online_dpo.compare import closing_lines, compare, open_runs, read_outcomes, read_runs
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.records import read_held_out
from online_dpo.store import RunStore
from online_dpo.types import Message, Prompt


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_loop.py."""
    import os

    monkeypatch.setattr(os, "fsync", lambda handle: None)


def finished(folder: Path, **changes: Any) -> RunStore:
    return World(folder, experiment(**changes)).go().run.store


def test_arrays_are_what_the_files_say(tmp_path: Path) -> None:
    store = finished(tmp_path / "run", seeds=[0, 1])
    found = read_outcomes(store)
    assert [(one.seed, one.arm, one.round) for one in found] == [
        (seed, arm, index) for seed in (0, 1) for arm in ("on_policy", "self_offline") for index in range(3)
    ]
    one = found[2]
    rows = read_held_out(store.round("on_policy", 0, 2).path / "held_out.parquet")
    assert one.prompt_ids == tuple(prompt.id for prompt in HELD_OUT)
    assert one.reward.tolist() == [row.score for row in rows]
    assert one.tokens.tolist() == [len(row.candidate.token_ids) for row in rows]
    expected = [math.fsum(row.candidate.logprobs) - math.fsum(row.initial_logprobs) for row in rows]
    assert one.log_ratio is not None and one.log_ratio.tolist() == pytest.approx(expected)
    assert (one.run, one.gold) == ("run", None)
    assert one.judge and one.sampling


def test_figures_agree_with_the_rounds_own(tmp_path: Path) -> None:
    """Means of a round by the loop and by the comparison."""
    store = finished(tmp_path / "run", arms={"a": {}})
    metrics = store.round("a", 0, 2).metrics["held_out"]
    point = compare(read_outcomes(store)).curves[2]
    assert point.kl is not None
    assert point.reward.mean == pytest.approx(metrics["reward"]["mean"])
    assert point.kl.mean == pytest.approx(metrics["kl_initial"]["mean"])
    assert point.win_rate.mean == pytest.approx(metrics["win_rate"]["mean"])
    assert point.win_rate.low == pytest.approx(metrics["win_rate"]["low"])
    assert point.tokens.mean == pytest.approx(metrics["length"])


def test_no_divergence_where_answers_are_not_the_policys_own(tmp_path: Path) -> None:
    store = finished(tmp_path / "run", arms={"a": {}}, rounds=1, evaluation={"temperature": 0.5})
    assert [one.log_ratio for one in read_outcomes(store)] == [None, None]


def test_a_gold_judge_and_its_abstentions(tmp_path: Path) -> None:
    evaluation = {"gold": {"use": "judges.length:LengthJudge", "unit": "words"}}
    store = finished(tmp_path / "run", arms={"a": {}}, rounds=1, evaluation=evaluation)
    one = read_outcomes(store)[1]
    rows = read_held_out(store.round("a", 0, 1).path / "held_out.parquet")
    assert one.gold is not None
    assert one.gold.tolist() == [float(len(row.candidate.text.split())) for row in rows]
    assert np.all(np.isfinite(one.gold))


def test_files_that_were_changed_are_refused(tmp_path: Path) -> None:
    finished(tmp_path / "run", arms={"a": {}}, rounds=1)
    file = tmp_path / "run" / "arms" / "a" / "seed_0" / "round_01" / "held_out.parquet"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(RunFolderError, match="was changed after"):
        read_outcomes(RunStore.open(tmp_path / "run"))


def test_runs_on_other_prompts_are_refused_in_one_line(tmp_path: Path) -> None:
    first = finished(tmp_path / "first", arms={"a": {}}, rounds=1)
    world = World(tmp_path / "second", experiment(arms={"b": {}}, rounds=1))
    world.run.held_out = (*HELD_OUT[1:], Prompt("other", (Message("user", "?"),), (1, 2)))
    second = world.go().run.store
    with pytest.raises(RunFolderError, match=r"not those of run 'first' \(1 of these are missing, 1 are others\)"):
        read_runs([first, second])


def test_runs_in_another_order_of_prompts_are_brought_into_the_first_ones(tmp_path: Path) -> None:
    first = finished(tmp_path / "first", arms={"a": {}}, rounds=1)
    world = World(tmp_path / "second", experiment(arms={"a": {}}, rounds=1))
    world.run.held_out = HELD_OUT[::-1]
    one, other = read_runs([first])[1], read_runs([first, world.go().run.store])[3]
    assert (other.run, other.prompt_ids) == ("second", one.prompt_ids)
    assert other.reward.tolist() == one.reward.tolist()


def test_which_runs_can_be_opened_together(tmp_path: Path) -> None:
    finished(tmp_path / "one", arms={"a": {}}, rounds=1)
    finished(tmp_path / "two", arms={"a": {}}, rounds=1, select="best")
    with pytest.raises(RunFolderError, match="given twice"):
        open_runs([tmp_path / "one", tmp_path / "two" / ".." / "one"])
    with pytest.raises(ConfigError, match=r"differ in select \(best, last\)"):
        open_runs([tmp_path / "one", tmp_path / "two"])
    assert open_runs([tmp_path / "one", tmp_path / "two"], "last")[1] == "last"
    assert open_runs([tmp_path / "two"])[1] == "best"
    finished(tmp_path / "deep" / "one", arms={"a": {}}, rounds=1)
    with pytest.raises(RunFolderError, match="two of the runs are called 'one'"):
        read_runs(open_runs([tmp_path / "one", tmp_path / "deep" / "one"])[0])


def test_a_run_without_a_closed_round(tmp_path: Path) -> None:
    store = World(tmp_path / "run", experiment()).run.store
    assert read_outcomes(store) == []
    with pytest.raises(RunFolderError, match="no closed round yet"):
        read_runs([store])


def test_what_a_run_ends_with(tmp_path: Path) -> None:
    lines = closing_lines(finished(tmp_path / "run"))
    assert lines[0].startswith("verdict: ")
    assert lines[-1] == "more: online-dpo compare RUN"
    assert any("one seed" in line for line in lines)
    assert closing_lines(finished(tmp_path / "alone", arms={"a": {}})) == []


def test_the_kept_policy_is_the_one_that_stands_for_the_arm(tmp_path: Path) -> None:
    """`keep: best` with `select: best`: what a comparison would choose is on disk, and it is not simply the last."""
    store = finished(tmp_path / "run", arms={"a": {}}, rounds=5, keep="best", select="best")
    (chosen,) = compare(read_outcomes(store), "best").selected
    left = [index for index in range(1, 6) if (store.round("a", 0, index).path / "policy").exists()]
    assert left == sorted({chosen.round, 5})
    assert chosen.round < 5
