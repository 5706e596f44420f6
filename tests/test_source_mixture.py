"""A round whose prompts are shared out between sources."""

from __future__ import annotations

import os
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from sources import World, experiment, pairs_of, tokens_of
from test_loop import Killed, results, with_death

from online_dpo.config import Experiment
from online_dpo.errors import ConfigError
from online_dpo.files import digest
from online_dpo.records import read_candidates, read_verdicts


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def mixed(*parts: tuple[float, Any], others: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    mixture = [{"share": share, "source": source} for share, source in parts]
    prompts = {"path": "p", "per_round": 6, "held_out": 3}
    arms = {"a": {"source": {"mixture": mixture}}, **(others or {})}
    return experiment(**{"arms": arms, "prompts": prompts, **changes})


def prompts_of(world: World, index: int, part: int) -> list[str]:
    candidates = read_candidates(world.folder("a", index).path / f"part_{part}" / "candidates.parquet")
    return list(dict.fromkeys(candidate.prompt_id for candidate in candidates))


def test_each_part_samples_its_prompts_from_its_own_policy(tmp_path: Path) -> None:
    """Six prompts by ½, ⅓, ⅙: 3, 2, 1. In round 3: the current policy is 2, refreshed every second round it is 2 too,
    and the initial one is 0."""
    spec = mixed((1 / 2, "current"), (1 / 3, "initial"), (1 / 6, {"every": 2}), rounds=3)
    world = World(tmp_path / "run", spec).go()
    after = [world.run.initial.digest, *(world.metrics()["a", index]["policy"]["digest"] for index in (1, 2))]
    for index, sources in ((1, (0, 0, 0)), (2, (1, 0, 0)), (3, (2, 0, 2))):
        folder = world.folder("a", index)
        parts = [prompts_of(world, index, part) for part in (1, 2, 3)]
        assert [len(part) for part in parts] == [3, 2, 1]
        assert sorted(chain(*parts)) == sorted(folder.pinned["prompts"])
        records = [folder.inside(f"part_{part}").done("sample") for part in (1, 2, 3)]
        assert [record and record.inputs["source"] for record in records] == [after[at] for at in sources]
        candidates = read_candidates(folder.path / "candidates.parquet")
        assert len(candidates) == len(read_verdicts(folder.path / "verdicts.parquet")) == 18
        figures = world.metrics()["a", index]
        assert figures["sample"]["candidates"] == 18
        assert figures["sample"]["tokens"] == sum(len(candidate.token_ids) for candidate in candidates)
        assert figures["judge"]["verdicts"] == figures["judge"]["ledger"]["asked"] == 18
        assert figures["pairs"]["kept"] == len(pairs_of(world, "a", index)) == sum(figures["pairs"]["by_part"].values())
        assert (figures["source"] is None) == (index > 1)


def test_rounds_and_seeds_share_out_differently(tmp_path: Path) -> None:
    world = World(tmp_path / "run", mixed((0.5, "current"), (0.5, "initial"), seeds=[0, 1], rounds=2)).go()
    folders = [world.run.store.round("a", seed, index) for seed in (0, 1) for index in (1, 2)]
    shares = []
    for folder in folders:
        candidates = read_candidates(folder.path / "part_1" / "candidates.parquet")
        shares.append(tuple(sorted({candidate.prompt_id for candidate in candidates})))
    assert len(set(shares)) > 1


def test_the_budget_is_the_whole_rounds(tmp_path: Path) -> None:
    """Six prompts give a pair each at most; four are kept, whichever part they are of."""
    whole = World(tmp_path / "whole" / "run", mixed((0.5, "current"), (0.5, "initial"))).go()
    world = World(tmp_path / "run", mixed((0.5, "current"), (0.5, "initial"), pairing={"max_pairs": 4})).go()
    made, figures = whole.metrics()["a", 1]["pairs"], world.metrics()["a", 1]["pairs"]
    assert figures["kept"] == 4 == len(pairs_of(world, "a", 1))
    assert figures["dropped"]["over_budget"] == made["kept"] - 4
    assert set(tokens_of(pairs_of(world, "a", 1))) < set(tokens_of(pairs_of(whole, "a", 1)))


def test_a_part_without_prompts_is_left_out(tmp_path: Path) -> None:
    world = World(tmp_path / "run", mixed((0.99, "current"), (0.01, "initial"), rounds=1)).go()
    assert not (world.folder("a", 1).path / "part_2").exists()
    assert world.metrics()["a", 1]["sample"]["candidates"] == 18
    assert world.metrics()["a", 1]["source"]["digest"] == world.run.initial.digest


def test_a_stream_gives_its_share_of_the_other_arms_pairs(tmp_path: Path) -> None:
    """In order, both arms have the same prompts: the streamed half is the other arm's pairs of the other three."""
    spec = mixed((0.5, "initial"), (0.5, {"stream": "other"}), others={"other": {}}, rounds=2)
    world = World(tmp_path / "run", spec).go()
    for index in (1, 2):
        own, streamed = (prompts_of(world, index, part) for part in (1, 2))
        assert not set(own) & set(streamed)
        theirs = [item for item in tokens_of(pairs_of(world, "other", index)) if item[0] in streamed]
        ours = [item for item in tokens_of(pairs_of(world, "a", index)) if item[0] in streamed]
        assert ours == theirs
        assert len(own) == len(streamed) == 3


def test_shuffled_streams_meet_the_rounds_own_prompts_without_mixing_answers_up(tmp_path: Path) -> None:
    """A dealt pair may be of a prompt that another part samples: no two answers have the same prompt and index, and
    every pair has the tokens that its part had."""
    stream = {"stream": "other", "order": "shuffled"}
    spec = mixed((0.5, "current"), (0.5, stream), others={"other": {}}, rounds=4, pairing={"rule": "all_pairs"})
    world = World(tmp_path / "run", spec).go()
    met = 0
    for index in range(1, 5):
        candidates = read_candidates(world.folder("a", index).path / "candidates.parquet")
        places = Counter((candidate.prompt_id, candidate.index) for candidate in candidates)
        assert set(places.values()) == {1}
        parts = [prompts_of(world, index, part) for part in (1, 2)]
        met += len(set(parts[0]) & set(parts[1]))
        answers = Counter((candidate.prompt_id, candidate.token_ids, candidate.logprobs) for candidate in candidates)
        theirs: Counter[Any] = Counter()
        for part in (1, 2):
            own = read_candidates(world.folder("a", index).path / f"part_{part}" / "candidates.parquet")
            theirs.update((candidate.prompt_id, candidate.token_ids, candidate.logprobs) for candidate in own)
        assert answers == theirs
        figures = world.metrics()["a", index]["pairs"]
        assert figures["kept"] == sum(figures["by_part"].values()) == len(pairs_of(world, "a", index))
    assert met


def test_a_history_draws_from_the_same_part_of_older_rounds(tmp_path: Path) -> None:
    spec = mixed((0.5, "initial"), (0.5, {"history": 3}), rounds=4)
    world = World(tmp_path / "run", spec).go()
    for index in range(1, 5):
        inside = world.folder("a", index).inside("part_2")
        record = inside.done("pair")
        assert record is not None
        assert len(record.info["by_age"]) == min(3, index)
        drawn = {c.prompt_id for c in read_candidates(inside.path / "candidates.parquet")}
        older = [world.folder("a", past).path / "part_2" / "fresh" for past in range(max(1, index - 2), index + 1)]
        made = {c.prompt_id for path in older for c in read_candidates(path / "candidates.parquet")}
        assert drawn <= made
        assert set(prompts_of(world, index, 1)) | drawn <= set(world.folder("a", index).pinned["prompts"])


def test_a_mixture_of_one_policy_with_itself_has_the_pairs_of_that_policy(tmp_path: Path) -> None:
    """Answers and labels of a prompt do not depend on which other prompts stand beside it."""
    world = World(tmp_path / "run", mixed((0.5, "current"), (0.5, {"every": 1}), others={"plain": {}}, rounds=1)).go()
    assert sorted(tokens_of(pairs_of(world, "a", 1))) == sorted(tokens_of(pairs_of(world, "plain", 1)))
    assert world.metrics()["a", 1]["source"]["digest"] == world.run.initial.digest


def test_what_parts_need_is_kept(tmp_path: Path) -> None:
    """Under keep: last the policy that a part samples from is there until it is refreshed: in the second part rounds 1
    to 4 sample by 0, 0, 2, 2."""
    spec = mixed((0.5, "current"), (0.5, {"every": 2}), rounds=4, keep="last")
    world = World(tmp_path / "run", spec).go()
    assert [(world.folder("a", index).path / "policy").exists() for index in range(1, 5)] == [False, False, False, True]
    free = World(tmp_path / "free" / "run", mixed((0.5, "current"), (0.5, {"every": 2}), rounds=4)).go()
    assert world.metrics()["a", 4]["policy"]["digest"] == free.metrics()["a", 4]["policy"]["digest"]


def test_resuming_again_and_again_gives_what_an_uninterrupted_run_gives(tmp_path: Path) -> None:
    spec = mixed((0.5, "initial"), (0.5, {"history": 2}), keep="last")
    whole = results(World(tmp_path / "whole" / "run", spec).go().root)
    world = World(tmp_path / "run", spec)
    for place, stage, moment in (
        ("part_1", "judge", "within"),
        ("part_2/fresh", "sample", "before"),
        ("part_2", "pair", "within"),
        (".", "sample", "within"),
        (".", "pair", "after"),
    ):
        with pytest.raises(Killed):
            with_death(world.reopen(), "a", 2, stage, moment, inside=place)
    assert results(world.reopen().go().root) == whole


@pytest.mark.slow
@pytest.mark.parametrize("place", ["part_1", "part_2", "part_2/fresh", "."])
def test_resuming_after_any_death(tmp_path: Path, place: str) -> None:
    spec = mixed((0.5, "initial"), (0.5, {"history": 2}), keep="last")
    whole = results(World(tmp_path / "whole" / "run", spec).go().root)
    for stage in ("sample", "judge", "pair"):
        for moment in ("before", "within", "after"):
            world = World(tmp_path / stage / moment / "run", spec)
            with pytest.raises(Killed):
                with_death(world, "a", 2, stage, moment, inside=place)
            assert results(world.reopen().go().root) == whole


def test_a_damaged_part_stops_the_resumed_run_by_name(tmp_path: Path) -> None:
    from online_dpo.errors import RunFolderError
    from online_dpo.loop import run_experiment

    world = World(tmp_path / "run", mixed((0.5, "current"), (0.5, "initial")))
    with pytest.raises(Killed):
        with_death(world, "a", 2, "train", "before")
    file = world.folder("a", 2).path / "part_1" / "verdicts.parquet"
    before = digest(file)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert digest(file) != before
    with pytest.raises(RunFolderError, match=r"part_1/verdicts\.parquet was changed"):
        run_experiment(world.reopen().run)


@pytest.mark.slow
def test_the_audit_of_the_first_part_that_has_one_is_the_rounds(tmp_path: Path) -> None:
    spec = mixed((0.5, {"stream": "other"}), (0.5, "current"), others={"other": {}}, rounds=1, audit={"prompts": 2})
    world = World(tmp_path / "run", spec).go()
    assert world.metrics()["a", 1]["audit"]["prompts"] == 2
    assert (world.folder("a", 1).path / "audit.json").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0.5, "current"), (0.4, "initial")], "shares must add up to 1, found 0.9"),
        ([(0.5, "current"), (0.5, {"every_steps": 1})], "a part of a mixture cannot be every_steps"),
        ([(0.5, "current"), (0.5, {"stream": "nobody"})], "no arm 'nobody'"),
    ],
)
def test_wrong_mixtures_are_told_when_the_experiment_is_read(parts: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixed(*parts)
