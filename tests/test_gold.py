"""The gold judge: scored beside the first on the held-out prompts, never seen by training; with fakes for models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from test_loop import HELD_OUT, Killed, TwoAnswers, World, experiment, results, with_death

from online_dpo.errors import ConfigError, JudgeError
from online_dpo.records import read_held_out
from online_dpo.runs import check_judges

WORDS = {"use": "judges.length:LengthJudge", "unit": "words"}
CHARACTERS = {"use": "judges.length:LengthJudge", "unit": "characters"}
COMPARES = '''
from online_dpo.judging import PairwiseJudge

class Longer(PairwiseJudge):
    """1 for the longer answer."""
    def prefer(self, prompt, first, second):
        return (len(first.text) > len(second.text)) + 0.5 * (len(first.text) == len(second.text))
'''


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def golden(root: Path, gold: Any = WORDS, **changes: Any) -> World:
    return World(root, experiment(**{"arms": {"a": {}}, "rounds": 1, "evaluation": {"gold": gold}, **changes}))


def test_gold_beside_reward_by_hand(tmp_path: Path) -> None:
    """Words of the two answers: 2 and 4 before, 3 and 4 after; characters 3 and 7 before, 5 and 7 after (a space
    between). gold 3.5, change ½, win rate ¾; reward 6, change 1."""
    prompts = {"path": "p", "per_round": 2, "held_out": 2}
    spec = experiment(arms={"a": {}}, rounds=1, evaluation={"gold": WORDS}, prompts=prompts)
    world = World(tmp_path / "run", spec, engine=TwoAnswers)
    world.run.held_out = HELD_OUT[:2]
    start, end = (world.go().metrics()["a", index]["held_out"] for index in (0, 1))
    assert (start["reward"]["mean"], start["gold"]["mean"]) == (5.0, 3.0)
    assert start["gold_change"] is start["gold_win_rate"] is None
    assert (end["reward"]["mean"], end["reward_change"]["mean"]) == (6.0, 1.0)
    assert end["gold"] == {"mean": 3.5, "low": 3.0, "high": 4.0}
    assert end["gold_change"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert end["gold_win_rate"]["mean"] == 0.75
    assert end["gold_abstained"] == 0
    rows = read_held_out(world.folder("a", 1).path / "held_out.parquet")
    assert [(row.score, row.gold_score) for row in rows] == [(5.0, 3.0), (7.0, 4.0)]
    assert [row.gold_abstain_reason for row in rows] == [None, None]


def test_without_one_there_are_no_gold_figures(tmp_path: Path) -> None:
    world = golden(tmp_path / "run", gold=None).go()
    held_out = world.metrics()["a", 1]["held_out"]
    assert [held_out[name] for name in ("gold", "gold_change", "gold_win_rate", "gold_abstained")] == [None] * 4
    rows = read_held_out(world.folder("a", 1).path / "held_out.parquet")
    assert {(row.gold_score, row.gold_abstain_reason) for row in rows} == {(None, None)}


def test_training_does_not_see_it(tmp_path: Path) -> None:
    """With a gold judge and without: the same policies and training files, byte for byte."""
    with_gold, without = golden(tmp_path / "w" / "run").go(), golden(tmp_path / "o" / "run", gold=None).go()
    changed = {name for name, value in results(with_gold.root).items() if results(without.root)[name] != value}
    assert {name.rpartition("/")[2] for name in changed} == {"held_out.parquet", "metrics.json"}


def test_a_gold_judge_that_compares_measures_against_the_initial_policy(tmp_path: Path) -> None:
    """½ at round 0, unasked; then 1 for the longer one."""
    (tmp_path / "gold_compares.py").write_text(COMPARES, encoding="utf-8")
    check_judges(experiment(judge="gold_compares:Longer"), tmp_path)
    spec = experiment(arms={"a": {}}, rounds=1, evaluation={"gold": {"use": "gold_compares:Longer"}})
    world = World(tmp_path / "run", spec, judge_folders=(tmp_path,)).go()
    before, after = (read_held_out(world.folder("a", index).path / "held_out.parquet") for index in (0, 1))
    assert [row.gold_score for row in before] == [0.5] * 3
    lengths = [(len(new.candidate.text), len(old.candidate.text)) for new, old in zip(after, before, strict=True)]
    assert [row.gold_score for row in after] == [(new > old) + 0.5 * (new == old) for new, old in lengths]
    evaluated = world.folder("a", 1).done("evaluate")
    assert evaluated is not None
    assert "against" in evaluated.inputs


def test_an_abstention_of_the_gold_judge_is_its_own(tmp_path: Path) -> None:
    """It abstains on the first prompt: gold figures are over the others, the reward over all three."""
    (tmp_path / "gold_silent.py").write_text(
        "from online_dpo.judging import PointwiseJudge\n"
        "class Silent(PointwiseJudge):\n"
        "    def score(self, prompt, candidates):\n"
        "        return [None if prompt.id == 'held-0' else 1.0 for c in candidates]\n",
        encoding="utf-8",
    )
    spec = experiment(arms={"a": {}}, rounds=1, max_abstain=0.5, evaluation={"gold": {"use": "gold_silent:Silent"}})
    world = World(tmp_path / "run", spec, judge_folders=(tmp_path,)).go()
    held_out = world.metrics()["a", 1]["held_out"]
    assert (held_out["abstained"], held_out["gold_abstained"]) == (0, 1)
    row = read_held_out(world.folder("a", 1).path / "held_out.parquet")[0]
    assert (row.score is None, row.gold_score) == (False, None)
    assert row.gold_abstain_reason
    strict = experiment(arms={"a": {}}, rounds=1, evaluation={"gold": {"use": "gold_silent:Silent"}})
    with pytest.raises(JudgeError, match="abstained"):
        World(tmp_path / "strict" / "run", strict, judge_folders=(tmp_path,)).go()


def test_a_gold_judge_that_training_sees_is_warned_of(tmp_path: Path) -> None:
    """By digest: the same judge under equal keys, whichever arm trains on it."""
    arms = {"a": {}, "b": {"judge": WORDS}}
    assert [
        line for line in golden(tmp_path / "one" / "run", arms=arms).go().progress.lines if "evaluation.gold" in line
    ]
    clean = golden(tmp_path / "two" / "run", arms={"a": {}}).go()
    assert clean.progress.lines == []


def test_a_gold_judge_that_asks_the_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name another judge in evaluation\.gold"):
        check_judges(experiment(evaluation={"gold": {"use": "judges.self_judge:SelfJudge"}}), tmp_path)


def test_the_runs_judges_are_other_ones_with_another_gold_judge(tmp_path: Path) -> None:
    """A run whose gold judge was changed is refused as with any judge: its digest is among the arm's."""
    digests = [check_judges(experiment(evaluation={"gold": gold}), tmp_path) for gold in (None, WORDS, CHARACTERS)]
    assert len({found["on_policy"] for found in digests}) == 3


def test_resuming_a_measured_round_with_gold(tmp_path: Path) -> None:
    whole = results(golden(tmp_path / "whole" / "run").go().root)
    for moment in ("before", "within", "after"):
        with pytest.raises(Killed):
            with_death(golden(tmp_path / moment / "run"), "a", 1, "evaluate", moment)
        assert results(golden(tmp_path / moment / "run").go().root) == whole
