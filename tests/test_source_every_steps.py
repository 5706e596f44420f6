"""A round whose source is refreshed within it: how it is cut, who samples what, and that any death of it is mended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeLearner, fake_prompt
from hypothesis import given
from hypothesis import strategies as st
from test_loop import HELD_OUT, TRAIN, Killed, World, experiment, results, with_death, without_timings

from online_dpo.budget import arm_budget
from online_dpo.config import ArmSettings, Experiment
from online_dpo.display import stage_table
from online_dpo.errors import ConfigError, JudgeError, RunFolderError
from online_dpo.files import digest
from online_dpo.loop import run_experiment
from online_dpo.prompts import prompts_for_round
from online_dpo.records import read_candidates, read_pairs, read_verdicts
from online_dpo.sources.blocks import Block, cut_round
from online_dpo.store import RoundFolder
from online_dpo.types import Candidate, Prompt

FILES = ("candidates.parquet", "verdicts.parquet", "pairs.parquet")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def online(k: int = 1, **changes: Any) -> Experiment:
    """One round of three prompts with one pair each, in steps of one pair, the source refreshed every `k` of them."""
    return experiment(**{"arms": {"a": {"source": {"every_steps": k}}}, "rounds": 1} | changes)


def first_prompts(count: int = 3) -> tuple[Prompt, ...]:
    """The prompts of round 1."""
    return prompts_for_round(TRAIN, 0, 1, count)


# --- how a round is cut ---


def cut(prompts: int, **changes: Any) -> list[tuple[int, int, int | None]]:
    """(prompts, steps, pairs by then) of each block."""
    spec = experiment(**{"arms": {"a": {}}} | changes)
    blocks = cut_round([fake_prompt(str(i)) for i in range(prompts)], spec.arm("a"))
    assert [block.number for block in blocks] == list(range(1, len(blocks) + 1))
    return [(len(block.prompts), block.steps, block.pairs) for block in blocks]


@pytest.mark.parametrize(
    ("prompts", "k", "batch", "n", "pairing", "expected"),
    [
        # One pair a prompt: a block is k·batch prompts, the last one takes the rest.
        (8, 1, 2, 2, {}, [(2, 1, None)] * 4),
        (7, 1, 2, 2, {}, [(2, 1, None)] * 3 + [(1, 1, None)]),
        (7, 2, 2, 2, {}, [(4, 2, None), (3, 2, None)]),
        (7, 4, 2, 2, {}, [(7, 4, None)]),
        (7, 99, 2, 2, {}, [(7, 4, None)]),
        # 3 pairs a prompt, 8 to a batch: 8, 16 and 24 pairs are reached with prompts 3, 6 and 8; 27 pairs are 4 steps.
        (9, 1, 8, 3, {"rule": "all_pairs"}, [(3, 1, None), (3, 1, None), (2, 1, None), (1, 1, None)]),
        # A prompt is worth 3 steps.
        (2, 1, 2, 4, {"rule": "all_pairs"}, [(1, 3, None), (1, 3, None)]),
        # 4 of 8 pairs are wanted, 2 to a batch: a prompt gives half a pair, a block is 4 prompts.
        (8, 1, 2, 2, {"max_pairs": 4}, [(4, 1, 2), (4, 1, 4)]),
        (3, 1, 1, 2, {"max_pairs": 2}, [(2, 1, 1), (1, 1, 2)]),
        (3, 1, 1, 2, {"max_pairs": 9}, [(1, 1, 3), (1, 1, 6), (1, 1, 9)]),
        # One answer a prompt makes no pair: nothing to cut by.
        (3, 1, 1, 1, {}, [(3, 0, None)]),
    ],
)
def test_blocks_by_hand(
    prompts: int, k: int, batch: int, n: int, pairing: dict[str, Any], expected: list[tuple[int, int, int | None]]
) -> None:
    found = cut(prompts, source={"every_steps": k}, dpo={"batch_size": batch}, sampling={"n": n}, pairing=pairing)
    assert found == expected


@given(
    prompts=st.integers(1, 40),
    k=st.integers(1, 5),
    batch=st.integers(1, 9),
    n=st.integers(2, 4),
    max_pairs=st.none() | st.integers(1, 200),
)
def test_blocks_are_the_round(prompts: int, k: int, batch: int, n: int, max_pairs: int | None) -> None:
    """All prompts in their order, each block with one; in sum the steps of the round in one go and all its pairs."""
    settings = ArmSettings.model_validate(
        {
            "judge": "judges.length:LengthJudge",
            "source": {"every_steps": k},
            "sampling": {"n": n},
            "dpo": {"batch_size": batch},
            "pairing": {"rule": "all_pairs", "max_pairs": max_pairs},
        }
    )
    given_prompts = [fake_prompt(str(i)) for i in range(prompts)]
    blocks = cut_round(given_prompts, settings)
    assert [prompt for block in blocks for prompt in block.prompts] == given_prompts
    assert all(block.prompts and block.steps >= 1 for block in blocks)
    each = n * (n - 1) // 2
    most = min(prompts * each, max_pairs or prompts * each)
    assert sum(block.steps for block in blocks) == -(-most // batch)
    made = 0
    for block in blocks:
        allowed = len(block.prompts) * each if block.pairs is None else block.pairs - made
        assert allowed >= 1
        made += min(allowed, len(block.prompts) * each)
    assert made == most


# --- who samples, who is trained, with what ---


def test_each_block_is_sampled_by_the_policy_that_the_block_before_has_left(tmp_path: Path) -> None:
    world = World(tmp_path / "run", online()).go()
    initial = world.run.initial.digest
    order = [call for call in world.calls if call[0] in ("load", "sample", "train")]
    order = order[2:-2]  # held-out answers of round 0 and of round 1
    assert [call[0] for call in order] == ["load", "sample", "train"] * 3
    jobs = [call for call in order if call[0] == "train"]
    trained = [call[2] for call in jobs]
    assert trained[0] == initial
    assert len(set(trained)) == 3
    for place, call in enumerate(jobs):
        _, policy_id, policy, reference, source, pairs, _ = call
        assert policy_id == f"a/seed_0/round_01/block_00{place + 1}"
        assert reference == initial
        assert source == policy == order[3 * place][1], "sampled by another policy than is trained"
        assert [pair.prompt.id for pair in pairs] == [first_prompts()[place].id]
    assert len({call[6] for call in jobs}) == 3, "the same shuffle in every block"


def test_answers_have_the_seeds_of_an_on_policy_round(tmp_path: Path) -> None:
    arms = {"current": {}, "online": {"source": {"every_steps": 1}}}
    world = World(tmp_path / "run", online(arms=arms)).go()
    own = {arm: read_candidates(world.folder(arm, 1).path / "candidates.parquet") for arm in arms}
    keys = {arm: [(c.prompt_id, c.index, c.seed) for c in answers] for arm, answers in own.items()}
    assert keys["current"] == keys["online"]
    assert own["current"][:3] == own["online"][:3]  # the first block is on-policy in both
    assert own["current"][3:] != own["online"][3:]


def test_the_optimiser_and_the_count_of_steps_go_on(tmp_path: Path) -> None:
    """Seven pairs in steps of two, a refresh every step: blocks of 2, 2, 2 and 1."""
    spec = online(prompts={"path": "p", "per_round": 7, "held_out": 3}, dpo={"batch_size": 2})
    world = World(tmp_path / "run", spec).go()
    learner = world.run.learner
    assert isinstance(learner, FakeLearner)
    done = ["", "block_001: 1 ", "block_001: 1 block_002: 1 ", "block_001: 1 block_002: 1 block_003: 1 "]
    assert learner.parts == [(number, 1, 4, before) for number, before in enumerate(done)]


class Tied(FakeEngine):
    """All answers to the second prompt of round 1 are the same: no pair."""

    def candidate(self, prompt: Prompt, index: int, seed: int) -> Candidate:
        found = super().candidate(prompt, index, seed)
        if prompt.id != first_prompts()[1].id:
            return found
        return Candidate(prompt.id, index, "a", (0,), (-1.0,), "stop", seed)


def test_a_block_without_pairs_trains_nothing_and_shortens_the_schedule(tmp_path: Path) -> None:
    """Three steps are planned before the second block turns out to have no pair; the next one samples from the same
    policy as that one."""
    world = World(tmp_path / "run", online(), engine=Tied).go()
    learner = world.run.learner
    assert isinstance(learner, FakeLearner)
    assert learner.parts == [(0, 1, 3, ""), (1, 1, 2, "block_001: 1 ")]
    ids = [call[0] for call in world.asked("train")]
    assert ids == ["a/seed_0/round_01/block_001", "a/seed_0/round_01/block_003"]
    row = world.metrics()["a", 1]
    assert (row["pairs"]["kept"], row["pairs"]["dropped"], row["train"]["steps"]) == (2, {"tie": 1}, 2)


def test_no_pair_in_any_block_stops_the_arm(tmp_path: Path) -> None:
    class AllTied(FakeEngine):
        def candidate(self, prompt: Prompt, index: int, seed: int) -> Candidate:
            return Candidate(prompt.id, index, "a", (0,), (-1.0,), "stop", seed)

    world = World(tmp_path / "run", online(), engine=AllTied)
    line = "round 1 has no pairs to train on (dropped: {'tie': 3})"
    assert run_experiment(world.run) == {"a · seed 0": line}


def test_each_side_rests_while_the_other_works(tmp_path: Path) -> None:
    world = World(tmp_path / "run", online(engine={"share_gpu": True})).go()
    resting = ""
    for call in world.calls:
        if call[0].endswith(" rest"):
            resting = call[0].split()[0]
        elif call[0] == "sample":
            assert resting == "learner"
        elif call[0] in ("train", "score"):
            assert resting == "engine"


def test_progress_names_the_block(tmp_path: Path) -> None:
    """And `Spoken.finish` holds that each stage ends where it said, also where a step takes more than a batch."""
    spec = online(pairing={"rule": "all_pairs"}, dpo={"batch_size": 2}, sampling={"n": 3})
    world = World(tmp_path / "run", spec).go()
    labels = [label for label, _ in world.progress.stages]
    assert labels[1] == "a · seed 0 · round 1 block 1 of 3 sample"
    assert "a · seed 0 · round 1 block 3 of 3 train" in labels


# --- a block as large as the round is an on-policy round ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dpo": {"batch_size": 2}},
        {"pairing": {"rule": "all_pairs", "max_pairs": 4}, "dpo": {"batch_size": 3}},
        {"reference": "initial"},
    ],
)
def test_one_block_is_an_on_policy_round_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every file and every figure, two rounds on; in runs of their own, so that neither takes over the other's work."""
    spec: dict[str, Any] = {"rounds": 2, **changes}
    one = World(tmp_path / "one" / "run", online(99, **spec), engine=Tied).go()
    current = World(tmp_path / "current" / "run", online(arms={"a": {}}, **spec), engine=Tied).go()
    for index in (1, 2):
        ours, theirs = one.folder("a", index).path, current.folder("a", index).path
        for name in (*FILES, "held_out.parquet", "policy", "round.json"):
            assert digest(ours / name) == digest(theirs / name), name
    assert without_timings(one.metrics()) == without_timings(current.metrics())


def test_one_block_takes_over_an_on_policy_arms_work(tmp_path: Path) -> None:
    arms = {"current": {}, "one": {"source": {"every_steps": 99}}}
    world = World(tmp_path / "run", online(arms=arms)).go()
    assert [call[0] for call in world.asked("train")] == ["current/seed_0/round_01"]
    assert world.metrics()["one", 1]["reused"] == ["sample", "judge", "pair", "train", "evaluate"]
    policy = json.loads((world.folder("one", 1).path / "policy" / "policy.json").read_text(encoding="utf-8"))
    assert policy["id"] == "one/seed_0/round_01"
    assert world.metrics()["current", 1]["policy"]["id"] == "current/seed_0/round_01"
    assert world.reopen().go().calls == []


# --- the round's own files ---


def test_the_round_has_all_blocks_files_together(tmp_path: Path) -> None:
    world = World(tmp_path / "run", online()).go()
    folder = world.folder("a", 1).path
    blocks = [folder / f"block_00{number}" for number in (1, 2, 3)]
    prompts = {prompt.id: prompt for prompt in TRAIN}
    candidates = read_candidates(folder / "candidates.parquet")
    assert candidates == [c for block in blocks for c in read_candidates(block / "candidates.parquet")]
    assert [c.prompt_id for c in candidates] == [prompt.id for prompt in first_prompts() for _ in range(3)]
    verdicts = read_verdicts(folder / "verdicts.parquet")
    assert verdicts == [v for block in blocks for v in read_verdicts(block / "verdicts.parquet")]
    pairs = read_pairs(folder / "pairs.parquet", prompts, candidates)
    assert pairs == [p for block in blocks for p in read_pairs(block / "pairs.parquet", prompts, candidates)]
    assert world.metrics()["a", 1]["policy"]["id"] == "a/seed_0/round_01"


def test_figures_are_the_blocks_together(tmp_path: Path) -> None:
    """The fake's step i has loss 0.7 − 0.1·i, margin 0.1·i, norm i and 10·i tokens in ½ s: three of them."""
    world = World(tmp_path / "run", online()).go()
    row = world.metrics()["a", 1]
    train = row["train"]
    assert (train["steps"], train["answers"], train["grad_norm_largest"]) == (3, 6, 3)
    assert (train["loss_first"], train["loss_last"]) == (pytest.approx(0.6), pytest.approx(0.4))
    assert (train["loss_mean"], train["accuracy_mean"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert [point["grad_norm"] for point in train["curve"]] == [1, 2, 3]
    assert (train["tokens"], train["tokens_per_second"]) == (60, 40.0)
    assert train["reference_from"] == "engine, learner"
    assert (row["sample"]["candidates"], row["judge"]["verdicts"], row["pairs"]["kept"]) == (9, 9, 3)
    assert row["sample"]["tokens"] == sum(
        len(c.token_ids) for c in read_candidates(world.folder("a", 1).path / "candidates.parquet")
    )
    assert row["judge"]["ledger"] == {"asked": 9, "cached": 0}
    assert row["source"] is None
    assert row["reference"]["digest"] == world.run.initial.digest
    assert stage_table([row]) is not None


def test_answers_pairs_and_steps_are_those_of_an_on_policy_round(tmp_path: Path) -> None:
    arms = {"current": {}, "online": {"source": {"every_steps": 1}}}
    spec = online(arms=arms, prompts={"path": "p", "per_round": 7, "held_out": 3}, dpo={"batch_size": 3})
    world = World(tmp_path / "run", spec).go()
    assert arm_budget(spec, "online", 3) == arm_budget(spec, "current", 3)
    current, own = (world.metrics()[arm, 1] for arm in arms)
    for section, figure in (("sample", "candidates"), ("judge", "verdicts"), ("pairs", "kept"), ("train", "steps")):
        assert own[section][figure] == current[section][figure], figure


@pytest.mark.slow
def test_the_judge_is_audited_once_a_round(tmp_path: Path) -> None:
    world = World(tmp_path / "run", online(audit={"prompts": 2})).go()
    assert world.metrics()["a", 1]["audit"]["prompts"] == 2
    assert len(list(world.root.rglob("audit.png"))) == 1


def test_nothing_of_a_block_stays_but_its_tables(tmp_path: Path) -> None:
    """Policies and optimiser states go as soon as a later block, or the round, has gone on from them."""

    class Watching(FakeLearner):
        def train(self, job: Any) -> Any:
            folder = job.out.parent.parent.parent
            self.calls.append(("there", sorted(p.parent.name for p in folder.glob("block_*/optimiser"))))
            yield from super().train(job)

    world = World(tmp_path / "run", online(), learner=Watching).go()
    assert [there for (there,) in world.asked("there")] == [[], ["block_001"], ["block_002"]]
    for block in (world.folder("a", 1).path / f"block_00{number}" for number in (1, 2, 3)):
        assert {path.name for path in block.iterdir() if path.name[0] != "."} == {*FILES, "stages"}


def test_budget_of_pairs_is_dealt_out_over_the_blocks(tmp_path: Path) -> None:
    """Three prompts of up to 3 pairs, at most 6 in the round, in steps of two: each block may have 2."""
    spec = online(pairing={"rule": "all_pairs", "max_pairs": 6}, dpo={"batch_size": 2})
    world = World(tmp_path / "run", spec).go()
    rows = world.metrics()["a", 1]
    assert rows["pairs"]["kept"] <= 6
    kept = [world.folder("a", 1).inside(f"block_00{number}").done("pair") for number in (1, 2, 3)]
    assert [record.info["kept"] for record in kept if record is not None] == [2, 2, 2]


def test_what_a_block_leaves_of_the_budget_later_blocks_may_use(tmp_path: Path) -> None:
    """The second of three prompts has no pair: its two are left for the third."""
    spec = online(pairing={"rule": "all_pairs", "max_pairs": 6}, dpo={"batch_size": 2}, sampling={"n": 4})
    world = World(tmp_path / "run", spec, engine=Tied).go()
    kept = [world.folder("a", 1).inside(f"block_00{number}").done("pair") for number in (1, 2, 3)]
    assert [record.info["kept"] for record in kept if record is not None] == [2, 0, 4]


ABSTAINING = """
class Judge:
    def score(self, prompt, candidates):
        return [None if "{word}" in prompt.text else len(c.text) for c in candidates]
"""


def abstaining(folder: Path, share: float) -> World:
    """A judge that says nothing of the second prompt, in a run that allows `share` of abstentions."""
    folder.mkdir()
    text = first_prompts()[1].text
    module = f"silent_judge_{folder.name}"
    (folder / f"{module}.py").write_text(ABSTAINING.format(word=text), encoding="utf-8")
    evaluation = {"judge": "judges.length:LengthJudge"}
    spec = online(judge={"use": f"{module}:Judge"}, max_abstain=share, evaluation=evaluation)
    return World(folder / "run", spec, judge_folders=(folder,))


def test_abstentions_are_a_share_of_the_round_not_of_a_block(tmp_path: Path) -> None:
    """One of three prompts: all of its block, a third of the round."""
    row = abstaining(tmp_path / "some", 0.34).go().metrics()["a", 1]
    assert (row["judge"]["abstained"], row["pairs"]["kept"]) == (3, 2)
    with pytest.raises(JudgeError, match="abstained on 3 of the 3 candidates"):
        run_experiment(abstaining(tmp_path / "few", 0.3).run)


# --- death ---


STAGES = ("sample", "judge", "pair", "train")
PLACES = [*((block, stage) for block in ("block_001", "block_002", "block_003") for stage in STAGES)]
PLACES += [(".", stage) for stage in STAGES]
"""Where a run may die: in a stage of a block, and in one of the round's own that put the blocks together."""
FEW = [PLACES[5], PLACES[7], PLACES[11], PLACES[13], PLACES[15]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """The results of a run that nobody stopped; with or without a block that has no pairs."""
    return {tied: results(death_world(tmp_path_factory.mktemp("whole"), tied).go().root) for tied in (False, True)}


def death_world(folder: Path, tied: bool) -> World:
    return World(folder / "run", online(), engine=Tied if tied else FakeEngine)


def resumed(world: World) -> dict[str, Any]:
    again = world.reopen().go()
    assert [path.name for path in again.root.rglob("*.tmp")] == []
    assert list(again.root.rglob("optimiser")) == []
    return results(again.root)


@pytest.mark.parametrize(("inside", "stage"), FEW)
def test_resuming_after_a_death_within_a_stage(
    tmp_path: Path, uninterrupted: dict[bool, dict[str, Any]], inside: str, stage: str
) -> None:
    world = death_world(tmp_path, tied=False)
    with pytest.raises(Killed):
        with_death(world, "a", 1, stage, "within", inside)
    assert resumed(world) == uninterrupted[False]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("inside", "stage"), PLACES)
def test_resuming_after_any_death(
    tmp_path: Path, uninterrupted: dict[bool, dict[str, Any]], inside: str, stage: str, tied: bool
) -> None:
    """Byte for byte: every table, the policy, every figure but those of a clock."""
    for moment in ("before", "within", "after"):
        world = death_world(tmp_path / moment, tied)
        if tied and (inside, stage) == ("block_002", "train"):
            continue  # there is none
        with pytest.raises(Killed):
            with_death(world, "a", 1, stage, moment, inside)
        assert resumed(world) == uninterrupted[tied]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("number", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 5))])
def test_resuming_after_a_death_while_something_is_given_up(
    tmp_path: Path, uninterrupted: dict[bool, dict[str, Any]], number: int, half: bool
) -> None:
    """Policy and optimiser of two blocks, then the last block's policy: killed before each is marked, or after it is
    marked and some of its files are gone."""
    world = death_world(tmp_path, tied=False)
    pruned: list[str] = []
    prune = RoundFolder.prune

    def dying(self: RoundFolder, output: str) -> None:
        pruned.append(output)
        if len(pruned) == number:
            if half:
                (self.path / f".{output}.pruned").touch()
                next(path for path in (self.path / output).iterdir()).unlink()
            raise Killed
        prune(self, output)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RoundFolder, "prune", dying)
        run_experiment(world.run)
    assert resumed(world) == uninterrupted[False]


class TiedAtTheEnd(FakeEngine):
    """All answers to the third prompt of round 1 are the same: the last block has no pair."""

    def candidate(self, prompt: Prompt, index: int, seed: int) -> Candidate:
        found = super().candidate(prompt, index, seed)
        if prompt.id != first_prompts()[2].id:
            return found
        return Candidate(prompt.id, index, "a", (0,), (-1.0,), "stop", seed)


@pytest.mark.parametrize(("inside", "stage"), [("block_003", "judge"), (".", "train"), (".", "evaluate")])
def test_resuming_where_the_last_block_has_no_pair(tmp_path: Path, inside: str, stage: str) -> None:
    """It was sampled from the policy that the round keeps, which the block before it gives up in the end."""
    whole = World(tmp_path / "whole" / "run", online(), engine=TiedAtTheEnd).go()
    assert [call[0][-9:] for call in whole.asked("train")] == ["block_001", "block_002"]
    world = World(tmp_path / "dead" / "run", online(), engine=TiedAtTheEnd)
    with pytest.raises(Killed):
        with_death(world, "a", 1, stage, "before", inside)
    assert resumed(world) == results(whole.root)


def test_resuming_again_and_again_over_two_rounds(tmp_path: Path) -> None:
    """Work that was done is not done again: every block is sampled once, whatever the deaths."""
    whole = World(tmp_path / "whole" / "run", online(rounds=2, keep="last")).go()
    world = World(tmp_path / "run", online(rounds=2, keep="last"))
    calls: list[tuple[Any, ...]] = []
    for index, inside, stage, moment in (
        (1, "block_001", "train", "after"),
        (1, "block_003", "judge", "before"),
        (1, ".", "train", "after"),
        (2, "block_002", "train", "before"),
        (2, ".", "sample", "after"),
        (2, ".", "close", "before"),
    ):
        world = world.reopen()
        with pytest.raises(Killed):
            with_death(world, "a", index, stage, moment, inside)
        calls += world.calls
    world = world.reopen().go()
    assert results(world.root) == results(whole.root)
    sampled = [str(call) for call in [*calls, *world.calls] if call[0] == "sample"]
    assert sorted(sampled) == sorted(str(call) for call in whole.calls if call[0] == "sample")


def test_a_stopped_block_keeps_the_round_before(tmp_path: Path) -> None:
    """A loss that is not finite in the second block of round 2: the arm stops there, and again when it is resumed."""

    def learner(calls: list[tuple[Any, ...]]) -> FakeLearner:
        return FakeLearner(calls, stop=lambda policy_id: policy_id == "a/seed_0/round_02/block_002")

    world = World(tmp_path / "run", online(rounds=2), learner=learner)
    assert run_experiment(world.run) == {"a · seed 0": "loss nan"}
    again = world.reopen()
    assert run_experiment(again.run) == {"a · seed 0": "loss nan"}
    assert [call[0] for call in again.asked("train")] == ["a/seed_0/round_02/block_002"]
    assert again.folder("a", 1).closed and not again.folder("a", 2).closed


@pytest.mark.parametrize(("output", "name"), [("optimiser", "state"), ("policy", "model.safetensors")])
def test_what_a_block_left_is_not_gone_on_from_when_it_was_changed(tmp_path: Path, output: str, name: str) -> None:
    world = death_world(tmp_path, tied=False)
    with pytest.raises(Killed):
        with_death(world, "a", 1, "sample", "before", "block_002")
    file = world.folder("a", 1).path / "block_001" / output / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=rf"block_001/{output} was changed after stage 'train'"):
        run_experiment(world.reopen().run)


def test_a_rounds_policy_that_is_gone_cannot_be_made_of_blocks_that_were_given_up(tmp_path: Path) -> None:
    world = death_world(tmp_path, tied=False)
    with pytest.raises(Killed):
        with_death(world, "a", 1, "close", "before")
    (world.folder("a", 1).path / "stages" / "train.json").unlink()
    with pytest.raises(RunFolderError, match=r"delete stages/ and the block folders in .* to do the round again"):
        run_experiment(world.reopen().run)


# --- settings ---


def test_more_than_one_epoch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"every_steps trains on each answer .* dpo.epochs must be 1 \(found 2\)"):
        online(dpo={"epochs": 2})


def test_a_loss_of_answers_drawn_from_the_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dpo\.xpo_alpha needs answers drawn from the reference"):
        online(dpo={"xpo_alpha": 0.1})


def test_another_source_has_no_blocks() -> None:
    with pytest.raises(ValueError, match=r"only source: \{every_steps: k\}"):
        cut_round(HELD_OUT, online().model_copy(update={"source": "current"}))


def test_a_block_says_what_it_is() -> None:
    settings = online(2).arm("a")
    assert cut_round(TRAIN[:3], settings) == [Block(1, TRAIN[:2], 2, None), Block(2, TRAIN[2:3], 1, None)]
