"""Pairs drawn from an arm's own last rounds: which, how many, with what weight."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import World, experiment, pairs_of, tokens_of
from test_loop import Killed, results, with_death

from online_dpo.records import read_candidates, read_pairs
from online_dpo.sources.drawing import divide, draw, largest_remainder


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# --- the draw ---

NAMES = st.lists(st.tuples(st.integers(0, 5), st.text(max_size=5)), unique=True, max_size=20)


@given(names=NAMES, count=st.integers(0, 25), seed=st.text(max_size=4), decay=st.floats(1e-300, 1.0))
def test_a_draw_takes_each_thing_once_and_does_not_depend_on_their_order(
    names: list[tuple[int, str]], count: int, seed: str, decay: float
) -> None:
    def drawn(these: list[tuple[int, str]]) -> set[tuple[int, str]]:
        places = draw(these, [age * math.log(decay) for age, _ in these], count, seed)
        assert places == sorted(set(places))
        assert len(places) == min(count, len(these))
        return {these[place] for place in places}

    assert drawn(names) == drawn(names[::-1])


def test_a_draw_follows_the_weights() -> None:
    """One of three with weights 1, ½, ¼: chances 4/7, 2/7, 1/7. Of 4,000 seeds the counts have standard deviations of
    at most √(4000·¼) = 32; 130 are four of them."""
    counts = Counter(
        draw([(0,), (1,), (2,)], [0, math.log(0.5), math.log(0.25)], 1, str(seed))[0] for seed in range(4000)
    )
    for place, chance in enumerate((4 / 7, 2 / 7, 1 / 7)):
        assert abs(counts[place] - 4000 * chance) < 130


def test_two_drawn_without_replacement_follow_the_weights() -> None:
    """Weights 1, 1, ½. The last is left out when it is neither first nor second: 2·(1/2.5)·(1/1.5) = 0.5333."""
    out = sum(2 not in draw([(0,), (1,), (2,)], [0, 0, math.log(0.5)], 2, str(seed)) for seed in range(4000))
    assert abs(out - 4000 * 0.53333) < 130


@given(
    total=st.integers(0, 500),
    weights=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    seed=st.text(max_size=3),
)
def test_shares_are_whole_and_as_near_as_they_can_be(total: int, weights: list[int], seed: str) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = largest_remainder(total, shares)
    assert sum(counts) == total
    assert all(abs(count - total * share) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))
    names = [f"p{number}" for number in range(total)]
    parts = divide(names, shares, seed)
    assert [len(part) for part in parts] == counts
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(part == sorted(part, key=names.index) for part in parts[:2])


def test_shares_by_hand() -> None:
    """7 by ½, ¼, ¼: 3.5, 1.75, 1.75; floors 3, 1, 1, and the two left go to the remainders .75. 100 by .29 is 29,
    though 100·.29 is 28.999999999999996 in floats."""
    assert largest_remainder(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    assert largest_remainder(100, [0.29, 0.71]) == [29, 71]
    assert largest_remainder(3, [0.5, 0.5]) == [2, 1]


# --- rounds ---


def test_the_first_round_is_an_on_policy_one(tmp_path: Path) -> None:
    """Nothing to draw from but the fresh pairs: the same files, the same source; nothing is done twice."""
    spec = experiment(arms={"on_policy": {}, "replay": {"source": {"history": 3}}}, rounds=1)
    world = World(tmp_path / "run", spec).go()
    ours, theirs = world.metrics()["replay", 1], world.metrics()["on_policy", 1]
    assert ours["policy"]["digest"] == theirs["policy"]["digest"]
    assert ours["source"] == theirs["source"]
    assert ours["pairs"] == theirs["pairs"] | {"by_age": {"0": 3}}
    assert ours["reused"] == ["sample", "judge", "pair", "train", "evaluate"]
    assert [call[0] for call in world.asked("train")] == ["on_policy/seed_0/round_01"]


@pytest.mark.parametrize("per_round", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_round_draws_as_many_as_it_made_from_its_last_rounds(tmp_path: Path, per_round: int) -> None:
    """Of what rounds t, t−1 and t−2 made (not of what they drew), with the very tokens and log-probs; seven prompts, so
    that prompts come again within the window."""
    prompts = {"path": "p", "per_round": per_round, "held_out": 3}
    spec = experiment(arms={"a": {"source": {"history": 3}}}, rounds=6, prompts=prompts)
    world = World(tmp_path / "run", spec).go()
    made = {}
    for index in range(1, 7):
        fresh = world.folder("a", index).path / "fresh"
        prompts_of_run = {prompt.id: prompt for prompt in world.run.train_prompts}
        candidates = read_candidates(fresh / "candidates.parquet")
        made[index] = tokens_of(read_pairs(fresh / "pairs.parquet", prompts_of_run, candidates))
    mixed = 0
    for index in range(1, 7):
        drawn = tokens_of(pairs_of(world, "a", index))
        row = world.metrics()["a", index]
        by_age = {int(age): count for age, count in row["pairs"]["by_age"].items()}
        assert set(by_age) == set(range(min(3, index)))
        assert len(drawn) == len(set(drawn)) == sum(by_age.values()) == len(made[index])
        for age, count in by_age.items():
            assert len(set(drawn) & set(made[index - age])) == count
        all_fresh = by_age[0] == len(drawn)
        assert (row["source"] is None) != all_fresh
        mixed += not all_fresh
        assert row["sample"]["tokens"] == sum(
            len(c.token_ids) for c in read_candidates(world.folder("a", index).path / "fresh" / "candidates.parquet")
        )
    assert mixed >= 3


def test_a_strong_decay_leaves_the_fresh_pairs_alone(tmp_path: Path) -> None:
    spec = experiment(arms={"on_policy": {}, "a": {"source": {"history": 4, "decay": 1e-12}}}, rounds=3)
    world = World(tmp_path / "run", spec).go()
    for index in (1, 2, 3):
        assert world.metrics()["a", index]["policy"] == world.metrics()["on_policy", index]["policy"] | {
            "id": world.metrics()["a", index]["policy"]["id"]
        }


def test_seeds_draw_differently(tmp_path: Path) -> None:
    spec = experiment(arms={"a": {"source": {"history": 3}}}, rounds=3, seeds=[0, 1, 2])
    world = World(tmp_path / "run", spec).go()
    drawn = {str([world.run.store.round("a", seed, i).metrics["pairs"]["by_age"] for i in (2, 3)]) for seed in range(3)}
    assert len(drawn) > 1


@pytest.mark.parametrize("keep", [pytest.param("all", marks=pytest.mark.slow), "last"])
def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path: Path, keep: str) -> None:
    """Killed in the round's own stages and in those of its fresh part."""
    spec = experiment(arms={"a": {"source": {"history": 2}}}, rounds=4, keep=keep)
    whole = results(World(tmp_path / "whole" / "run", spec).go().root)
    world = World(tmp_path / "run", spec)
    for index, stage, moment in (
        (1, "pair", "before"),
        (2, "sample", "within"),
        (2, "judge", "before"),
        (2, "pair", "within"),
        (2, "train", "before"),
        (3, "sample", "after"),
        (3, "pair", "after"),
        (3, "train", "within"),
    ):
        with pytest.raises(Killed):
            with_death(world.reopen(), "a", index, stage, moment)
    for stage in ("sample", "judge", "pair"):
        with pytest.raises(Killed):
            with_death(world.reopen(), "a", 4, stage, "within", inside="fresh")
    assert results(world.reopen().go().root) == whole


@pytest.mark.slow
def test_the_audit_of_the_fresh_part_is_the_rounds(tmp_path: Path) -> None:
    spec = experiment(arms={"a": {"source": {"history": 2}}}, rounds=1, audit={"prompts": 2})
    world = World(tmp_path / "run", spec).go()
    assert world.metrics()["a", 1]["audit"]["prompts"] == 2
    assert (world.folder("a", 1).path / "audit.json").exists()
