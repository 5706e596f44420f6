"""Training on another arm's saved rounds: in their order, shuffled, or their answers judged anew."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import World, experiment, pairs_of, rows_of, tokens_of
from test_loop import TRAIN, Killed, results, with_death

from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.loop import run_experiment
from online_dpo.records import read_candidates, read_verdicts
from online_dpo.sources.dealing import Take, dealt
from online_dpo.sources.streamed import StreamedArm, check_streams
from online_dpo.types import Verdict

JUDGE_OF_WORDS = {"use": "judges.length:LengthJudge", "unit": "words"}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def arms(**replay: Any) -> dict[str, Any]:
    return {"replay": {"source": {"stream": "on_policy", **replay}}, "on_policy": {}}


# --- in order ---


def test_in_order_it_is_the_other_arm_again(tmp_path: Path) -> None:
    """Everything equal but the source: the same pairs, from the same policy, make the same policies; nothing is
    sampled, judged or trained for it. Its pins and records say where from."""
    world = World(tmp_path / "run", experiment(arms=arms(), rounds=3)).go()
    rows = world.metrics()
    assert [call[0] for call in world.asked("train")] == [f"on_policy/seed_0/round_0{index}" for index in (1, 2, 3)]
    for index in (1, 2, 3):
        ours, theirs = world.folder("replay", index), world.folder("on_policy", index)
        for name in ("candidates.parquet", "verdicts.parquet", "pairs.parquet"):
            assert (ours.path / name).stat().st_ino == (theirs.path / name).stat().st_ino
        assert rows["replay", index]["policy"]["digest"] == rows["on_policy", index]["policy"]["digest"]
        assert rows["replay", index]["source"]["digest"] == rows["on_policy", index]["source"]["digest"]
        assert rows["replay", index]["pairs"] == rows["on_policy", index]["pairs"]
        assert rows["replay", index]["sample"] == {
            "candidates": 9,
            "tokens": 0,
            "from": f"on_policy/seed_0/round_0{index}",
        }
        assert (rows["replay", index]["judge"]["verdicts"], rows["replay", index]["judge"]["labels"]) == (0, 9)
        record = ours.done("sample")
        assert record is not None
        assert set(record.inputs) == {"stream", "prompts", "take", "order"}


def test_the_streamed_arm_runs_first_whatever_their_order(tmp_path: Path) -> None:
    waiting = {"third": {"source": {"stream": "second"}}, "second": {"source": {"stream": "first"}}, "first": {}}
    world = World(tmp_path / "run", experiment(arms=waiting, rounds=1)).go()
    assert world.run.experiment.run_order() == ["first", "second", "third"]
    assert len({world.metrics()[name, 1]["policy"]["digest"] for name in waiting}) == 1


def test_another_loss_trains_another_policy_on_the_same_pairs(tmp_path: Path) -> None:
    """From round 2 on the other arm's policy is none of its own; the one that sampled is found in its folder."""
    replay = {"source": {"stream": "on_policy"}, "dpo": {"beta": 0.5}}
    world = World(tmp_path / "run", experiment(arms={"on_policy": {}, "replay": replay})).go()
    jobs = {call[0]: call for call in world.asked("train")}
    first, second = jobs["on_policy/seed_0/round_02"], jobs["replay/seed_0/round_02"]
    assert tokens_of(first[4]) == tokens_of(second[4])
    assert second[3] == first[3] == world.metrics()["on_policy", 1]["policy"]["digest"]
    assert second[1] != first[1]


def test_a_sampler_that_was_not_kept_is_none(tmp_path: Path) -> None:
    """keep: last gives up the other arm's policy 1, which sampled its round 2, before this arm begins."""
    replay = {"source": {"stream": "on_policy"}, "dpo": {"beta": 0.5}}
    spec = experiment(arms={"on_policy": {}, "replay": replay}, keep="last")
    world = World(tmp_path / "run", spec).go()
    jobs = {call[0]: call for call in world.asked("train")}
    assert jobs["replay/seed_0/round_01"][3] == world.run.initial.digest
    assert jobs["replay/seed_0/round_02"][3] is None
    assert world.metrics()["replay", 2]["source"] is None


# --- shuffled ---


@pytest.mark.parametrize("rule", ["all_pairs", pytest.param("best_vs_worst", marks=pytest.mark.slow)])
def test_shuffled_it_is_the_same_pairs_in_rounds_of_the_same_size(tmp_path: Path, rule: str) -> None:
    """With two prompts a round of seven, round 4 meets prompts again: their answers get indices of their own."""
    spec = experiment(
        arms=arms(order="shuffled"),
        rounds=4,
        pairing={"rule": rule},
        prompts={"path": "p", "per_round": 2, "held_out": 3},
    )
    world = World(tmp_path / "run", spec).go()
    theirs = [pairs_of(world, "on_policy", index) for index in range(1, 5)]
    ours = [pairs_of(world, "replay", index) for index in range(1, 5)]
    assert [len(pairs) for pairs in ours] == [len(pairs) for pairs in theirs]
    flat = [sorted(map(repr, (item for pairs in group for item in tokens_of(pairs)))) for group in (theirs, ours)]
    assert flat[0] == flat[1]
    assert [tokens_of(pairs) for pairs in ours] != [tokens_of(pairs) for pairs in theirs]
    for index in range(1, 5):
        assert world.metrics()["replay", index]["source"] is None
        folder = world.folder("replay", index).path
        verdicts = {(v.prompt_id, v.index): v for v in read_verdicts(folder / "verdicts.parquet")}
        candidates = read_candidates(folder / "candidates.parquet")
        assert {(c.prompt_id, c.index) for c in candidates} == verdicts.keys()
        assert len(candidates) == len(verdicts)
        for pair in ours[index - 1]:
            verdict = verdicts[pair.chosen.prompt_id, pair.chosen.index]
            assert isinstance(verdict, Verdict)
            assert verdict.score == pair.chosen_score


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_every_pair_is_dealt_once_whatever_the_seed(shuffled_run: World, seed: int) -> None:
    streamed = StreamedArm(shuffled_run.run.store, "on_policy", 0, 3, elsewhere=False)
    pairs = [shuffled_run.metrics()["on_policy", index]["pairs"]["kept"] for index in (1, 2, 3)]
    takes: dict[Take, list[int]] = {"pairs": pairs, "candidates": [3, 3, 3]}
    for take, sizes in takes.items():
        parts = [dealt(streamed, index, take, seed) for index in (1, 2, 3)]
        assert [len(part) for part in parts] == sizes
        assert len({card for part in parts for card in part}) == sum(sizes)
        assert parts == [dealt(streamed, index, take, seed) for index in (1, 2, 3)]


@pytest.fixture(scope="module")
def shuffled_run(tmp_path_factory: pytest.TempPathFactory) -> World:
    spec = experiment(arms={"on_policy": {}}, rounds=3, pairing={"rule": "all_pairs"})
    return World(tmp_path_factory.mktemp("shuffled") / "run", spec).go()


def test_seeds_deal_differently(shuffled_run: World) -> None:
    streamed = StreamedArm(shuffled_run.run.store, "on_policy", 0, 3, elsewhere=False)
    assert len({tuple(dealt(streamed, 1, "pairs", seed)) for seed in range(5)}) == 5


def test_pairs_of_one_policy_have_it_as_their_source_in_any_order(tmp_path: Path) -> None:
    replay = {"source": {"stream": "offline", "order": "shuffled"}}
    world = World(tmp_path / "run", experiment(arms={"offline": {"source": "initial"}, "replay": replay})).go()
    assert {world.metrics()["replay", index]["source"]["digest"] for index in (1, 2)} == {world.run.initial.digest}


# --- answers alone ---


@pytest.mark.parametrize("order", ["in_order", "shuffled"])
def test_answers_are_judged_and_paired_by_this_arm(tmp_path: Path, order: str) -> None:
    """Fresh labels of stored samples: the judge by words has other scores; the rule all_pairs makes more pairs."""
    replay = {
        "source": {"stream": "on_policy", "take": "candidates", "order": order},
        "judge": JUDGE_OF_WORDS,
        "pairing": {"rule": "all_pairs"},
    }
    world = World(tmp_path / "run", experiment(arms={"on_policy": {}, "replay": replay})).go()
    theirs = [rows_of(world, "on_policy", index) for index in (1, 2)]
    ours = [rows_of(world, "replay", index) for index in (1, 2)]
    assert sorted(chain(*theirs)) == sorted(chain(*ours))
    assert (ours == theirs) == (order == "in_order")
    for index in (1, 2):
        folder = world.folder("replay", index).path
        verdicts = read_verdicts(folder / "verdicts.parquet")
        candidates = read_candidates(folder / "candidates.parquet")
        assert [getattr(v, "score", None) for v in verdicts] == [len(c.text.split()) for c in candidates]
        assert world.metrics()["replay", index]["judge"]["verdicts"] == len(candidates)
        assert len(pairs_of(world, "replay", index)) > len(pairs_of(world, "on_policy", index))
    assert len([call for call in world.asked("sample") if call[0][0][0].startswith("train")]) == 2


# --- of another run ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of three rounds, with what a real one's folder has beside."""
    world = World(tmp_path_factory.mktemp("finished") / "run", experiment(arms={"a": {}}, rounds=3))
    world.save_prompts()
    return world.go()


def replaying(finished: World, **changes: Any) -> dict[str, Any]:
    return {"replay": {"source": {"stream": f"{finished.root}:a"}, **changes}}


def test_another_run_is_trained_on_again_bit_for_bit(tmp_path: Path, finished: World) -> None:
    """Nothing is shared between runs, so it is really trained: the same policies come of it."""
    world = World(tmp_path / "run", experiment(arms=replaying(finished), rounds=3))
    world.save_prompts()
    world.go()
    assert len(world.asked("train")) == 3
    assert [call[1:] for call in world.asked("train")] == [call[1:] for call in finished.asked("train")]
    for index in (1, 2, 3):
        ours, theirs = world.metrics()["replay", index], finished.metrics()["a", index]
        assert ours["policy"]["digest"] == theirs["policy"]["digest"]
        assert ours["train"]["reference_from"] == "engine"
        assert ours["sample"]["from"] == f"tiny:a/seed_0/round_0{index}"


def test_a_relative_run_is_searched_beside_the_experiment(tmp_path: Path, finished: World) -> None:
    arms = {"replay": {"source": {"stream": f"{finished.root.name}:a"}}}
    world = World(tmp_path / "run", experiment(arms=arms), judge_folders=(finished.root.parent,))
    world.save_prompts()
    assert world.go().metrics()["replay", 1]["pairs"]["kept"] == 3


@pytest.mark.parametrize(
    ("stream", "changes", "message"),
    [
        ("{root}:b", {}, r"arms\.replay\.source\.stream: no arm 'b' in .*; arms: a"),
        ("{root}x:a", {}, r"runx is no run folder"),
        ("{root}:a", {"seeds": [0, 7]}, "was not run with seed 7 but 0"),
        ("{root}:a", {"rounds": 4}, "has 3 rounds, this arm 4"),
    ],
)
def test_what_is_not_there_is_told_before_anything_runs(
    finished: World, stream: str, changes: dict[str, Any], message: str
) -> None:
    source = {"stream": stream.format(root=finished.root)}
    spec = experiment(arms={"replay": {"source": source}}, **changes)
    with pytest.raises((ConfigError, RunFolderError), match=message) as told:
        check_streams(spec, [], "digest")
    assert "\n" not in str(told.value)


def test_a_run_of_another_model_is_refused(finished: World) -> None:
    with pytest.raises(ConfigError, match="is a run of another model"):
        check_streams(experiment(arms=replaying(finished)), [], "another")
    check_streams(experiment(arms=replaying(finished)), [], "digest")


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    other = World(tmp_path / "other" / "run", experiment(arms={"a": {}}))
    other.save_prompts()
    with pytest.raises(Killed):
        with_death(other, "a", 2, "train", "before")
    with pytest.raises(RunFolderError, match="stopped before it had finished round 2: resume that run first"):
        check_streams(experiment(arms=replaying(other)), [], "digest")


def test_a_damaged_file_of_the_other_run_is_not_trained_on(tmp_path: Path) -> None:
    other = World(tmp_path / "other" / "run", experiment(arms={"a": {}}))
    other.save_prompts()
    other.go()
    file = other.folder("a", 2).path / "pairs.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    world = World(tmp_path / "run", experiment(arms=replaying(other)))
    with pytest.raises(RunFolderError, match=r"round_02/pairs\.parquet was changed"):
        run_experiment(world.run)


def test_prompts_that_are_held_out_here_are_refused(tmp_path: Path, finished: World) -> None:
    world = World(tmp_path / "run", experiment(arms=replaying(finished)))
    world.run.held_out = TRAIN
    with pytest.raises(RunFolderError, match="which is held out here"):
        run_experiment(world.run)


# --- what is wrong in the experiment ---


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {}, "b": {"source": {"stream": "c"}}}, r"arms\.b\.source\.stream: no arm 'c'"),
        ({"on_policy": {}, "b": {"source": {"stream": "on_polic"}}}, "did you mean 'on_policy'"),
        ({"a": {"source": {"stream": "b"}}, "b": {"source": {"stream": "a"}}}, "a waits for b waits for a"),
        ({"a": {}, "b": {"rounds": 3, "source": {"stream": "a"}}}, "arm 'a' has 2 rounds, 'b' 3"),
        (
            {
                "a": {},
                "b": {"source": {"mixture": [{"share": 0.5, "source": {"stream": "a"}},
                                             {"share": 0.5, "source": {"stream": "b"}}]}},
            },
            "b waits for b",
        ),
    ],
)  # fmt: skip
def test_wrong_streams_are_told_when_the_experiment_is_read(arms: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(arms=arms)


def test_an_arm_whose_source_stopped_stops_too_and_the_others_go_on(tmp_path: Path) -> None:
    spec = experiment(arms={**arms(), "other": {"dpo": {"beta": 0.3}}})
    world = World(tmp_path / "run", spec, stop=("on_policy/seed_0/round_02",))
    stopped = run_experiment(world.run)
    assert stopped["replay · seed 0"] == "its source, on_policy · seed 0, stopped before it had finished round 2"
    assert world.folder("other", 2).closed


# --- any death ---


SHUFFLED_ANSWERS = {"order": "shuffled", "take": "candidates"}


@pytest.mark.parametrize("source", [{}, SHUFFLED_ANSWERS])
def test_resuming_again_and_again_gives_what_an_uninterrupted_run_gives(tmp_path: Path, source: dict[str, str]) -> None:
    spec = experiment(arms=arms(**source))
    whole = results(World(tmp_path / "whole" / "run", spec).go().root)
    world = World(tmp_path / "run", spec)
    for stage, moment in (("sample", "within"), ("judge", "before"), ("pair", "within"), ("train", "before")):
        with pytest.raises(Killed):
            with_death(world.reopen(), "replay", 2, stage, moment)
    assert results(world.reopen().go().root) == whole


@pytest.mark.slow
@pytest.mark.parametrize("source", [{}, {"order": "shuffled"}, SHUFFLED_ANSWERS])
@pytest.mark.parametrize("stage", ["sample", "judge", "pair", "train"])
def test_resuming_after_any_death(tmp_path: Path, source: dict[str, str], stage: str) -> None:
    spec = experiment(arms=arms(**source))
    whole = results(World(tmp_path / "whole" / "run", spec).go().root)
    for moment in ("before", "within", "after"):
        if stage == "train" and not source and moment == "within":
            continue  # taken over from the other arm: nothing is produced
        world = World(tmp_path / moment / "run", spec)
        with pytest.raises(Killed):
            with_death(world, "replay", 2, stage, moment)
        assert results(world.reopen().go().root) == whole
