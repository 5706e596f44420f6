"""The loop with a fake engine and learner: what is done, with what, how often; resuming mends any death of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeLearner, Spoken, fake_policy, fake_prompt, logprobs_of

from online_dpo import scoring
from online_dpo.arms import Run
from online_dpo.config import Experiment, validate_experiment
from online_dpo.errors import JudgeError, RunFolderError
from online_dpo.evaluate_stage import held_out_sampling
from online_dpo.files import digest
from online_dpo.loop import collect_metrics, run_experiment
from online_dpo.pairing import make_pairs
from online_dpo.policies import read_policy
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.records import read_candidates, read_held_out, read_pairs, read_verdicts
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, RunStore, StageRecord
from online_dpo.types import Candidate, Policy, Prompt

TRAIN = tuple(fake_prompt(f"train-{i}") for i in range(7))
HELD_OUT = tuple(fake_prompt(f"held-{i}") for i in range(3))
TWO_ARMS = {"on_policy": {}, "self_offline": {"source": "initial"}}
TIMINGS = ("seconds", "tokens_per_second", "ledger")


class Killed(BaseException):
    """Stands for the process's death: nothing but the test catches it."""


def experiment(**changes: Any) -> Experiment:
    """Two rounds of two arms."""
    data = {
        "name": "tiny",
        "model": "m",
        "prompts": {"path": "p.jsonl", "per_round": 3, "held_out": 3},
        "sampling": {"n": 3},
        "judge": {"use": "judges.length:LengthJudge", "unit": "characters"},
        "dpo": {"batch_size": 1},
        "rounds": 2,
        "arms": TWO_ARMS,
        "audit": {"prompts": 0},
    }
    # What off-policyness costs is told in test_off_policy_stage.py.
    evaluation = {"off_policy": 0} | changes.pop("evaluation", {})
    return validate_experiment(data | changes | {"evaluation": evaluation}, "test")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of these tests' time would be the disk's; what it is for is tested in test_files.py."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class World:
    """A run with fakes, in folder `root`; `reopen` is what a new process would have."""

    def __init__(self, root: Path, spec: Experiment, **parts: Any) -> None:
        self.root = root
        self.calls: list[tuple[Any, ...]] = []
        self.progress = Spoken()
        self.parts = parts
        store = RunStore.open(root) if RunStore.exists(root) else RunStore.create(root, spec, {})
        initial = fake_policy(root.parent / "initial", "initial", "initial")
        self.run = Run(
            store=store,
            experiment=store.experiment,
            initial=initial,
            train_prompts=TRAIN,
            held_out=HELD_OUT,
            engine=parts.get("engine", FakeEngine)(self.calls),
            learner=parts.get("learner", FakeLearner)(self.calls),
            progress=self.progress,
            judge_folders=parts.get("judge_folders", ()),
        )

    def reopen(self) -> World:
        return World(self.root, self.run.experiment, **self.parts)

    def go(self) -> World:
        assert run_experiment(self.run) == {}
        return self

    def folder(self, arm: str, index: int) -> RoundFolder:
        return self.run.store.round(arm, 0, index)

    def metrics(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {(row["arm"], row["round"]): row for row in collect_metrics(self.run.store, self.run.experiment)}

    def asked(self, kind: str) -> list[tuple[Any, ...]]:
        """The calls of one kind."""
        return [call[1:] for call in self.calls if call[0] == kind]


def without_timings(data: Any) -> Any:
    """`data` but for what a clock says."""
    if isinstance(data, dict):
        return {key: without_timings(value) for key, value in data.items() if key not in TIMINGS}
    return data


def results(root: Path) -> dict[str, Any]:
    """All that a run computed: digests of tables and policies, pins, metrics; nothing that a clock says."""
    arms = root / "arms"
    found: dict[str, Any] = {}
    folders = [*arms.rglob("policy"), *arms.rglob("reference")]
    for path in sorted([*arms.rglob("*.parquet"), *folders, *arms.rglob("*.pruned")]):
        found[path.relative_to(arms).as_posix()] = digest(path)
    for path in sorted([*arms.rglob("round.json"), *arms.rglob("metrics.json")]):
        found[path.relative_to(arms).as_posix()] = without_timings(json.loads(path.read_text(encoding="utf-8")))
    return found


# --- what is done ---


def test_policies_of_each_round(tmp_path: Path) -> None:
    """On-policy: each round begins with, samples from and refers to the policy before it; offline always samples π₀."""
    world = World(tmp_path / "run", experiment(rounds=3)).go()
    policies = {
        (arm, index): world.run.initial.digest if index == 0 else world.metrics()[arm, index]["policy"]["digest"]
        for arm in TWO_ARMS
        for index in range(4)
    }
    for index in range(1, 4):
        on, off = world.metrics()["on_policy", index], world.metrics()["self_offline", index]
        assert on["source"]["digest"] == on["reference"]["digest"] == policies["on_policy", index - 1]
        assert off["source"]["digest"] == policies["self_offline", 0]
        assert off["reference"]["digest"] == policies["self_offline", index - 1]
    trained = {call[0]: call[1:4] for call in world.asked("train")}
    assert trained["self_offline/seed_0/round_03"] == (
        policies["self_offline", 2],
        policies["self_offline", 2],
        policies["self_offline", 0],
    )
    assert len(set(policies.values())) == 6  # π₀ and round 1's are shared, rounds 2 and 3 differ


def test_the_engine_holds_the_source_when_it_samples_and_the_new_policy_when_it_is_measured(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {"source": "initial"}})).go()
    by_digest = {world.run.initial.digest: 0, **{row["policy"]["digest"]: k[1] for k, row in world.metrics().items()}}
    order = [
        by_digest[call[1]] if call[0] == "load" else "sample" for call in world.calls if call[0] in ("load", "sample")
    ]
    measured = [by_digest[world.run.initial.digest]]
    assert measured == [0]
    assert order == [0, "sample", 0, "sample", 1, "sample", 0, "sample", 2, "sample"]


def test_each_side_rests_while_the_other_works(tmp_path: Path) -> None:
    """On one shared GPU the learner must have left before the engine samples, and the other way round."""
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=1, engine={"share_gpu": True})).go()
    resting = ""
    for call in world.calls:
        if call[0].endswith(" rest"):
            resting = call[0].split()[0]
        elif call[0] == "sample":
            assert resting == "learner"
        elif call[0] in ("train", "score"):
            assert resting == "engine"


def test_two_arms_do_equal_work_once(tmp_path: Path) -> None:
    """Round 0 and round 1 of both arms have the same inputs: sampled, judged, paired, trained, measured once."""
    world = World(tmp_path / "run", experiment()).go()
    first, second = world.folder("on_policy", 1), world.folder("self_offline", 1)
    assert [call[0] for call in world.asked("train")] == [
        "on_policy/seed_0/round_01",
        "on_policy/seed_0/round_02",
        "self_offline/seed_0/round_02",
    ]
    # Samplings: held-out at 0, 1, 2 and 2; rounds 1, 2 and 2.
    assert len(world.asked("sample")) == 7
    for name in ("candidates.parquet", "pairs.parquet", "policy/model.safetensors"):
        assert (first.path / name).stat().st_ino == (second.path / name).stat().st_ino
    assert world.metrics()["on_policy", 1]["reused"] == []
    assert world.metrics()["self_offline", 1]["reused"] == ["sample", "judge", "pair", "train", "evaluate"]
    assert world.metrics()["self_offline", 0]["reused"] == ["evaluate"]
    assert world.metrics()["self_offline", 2]["reused"] == []


def test_arms_and_seeds_that_differ_share_nothing_that_differs(tmp_path: Path) -> None:
    spec = experiment(arms={"a": {}, "b": {"dpo": {"beta": 0.2}}}, seeds=[0, 1], rounds=1)
    world = World(tmp_path / "run", spec).go()
    rows = {(row["arm"], row["seed"], row["round"]): row for row in collect_metrics(world.run.store, spec)}
    assert rows["b", 0, 1]["reused"] == ["sample", "judge", "pair"]
    assert rows["a", 1, 1]["reused"] == []
    assert len({row["policy"]["digest"] for row in rows.values() if row["round"]}) == 4
    assert [(row["seed"], row["arm"], row["round"]) for row in collect_metrics(world.run.store, spec)] == [
        (seed, arm, index) for seed in (0, 1) for arm in "ab" for index in (0, 1)
    ]


@pytest.mark.parametrize(
    ("change", "round_1", "round_2"),
    [
        # A stage is shared when its inputs' contents are the same: the fake answers alike at any temperature, so only
        # the sampling itself is not shared there; with another share of abstentions no verdict changes.
        ({"source": "initial"}, "sample judge pair train evaluate", ""),
        ({"reference": "initial"}, "sample judge pair train evaluate", "sample judge pair"),
        ({"sampling": {"temperature": 0.5}}, "judge pair train evaluate", "judge pair train evaluate"),
        ({"judge": {"use": "judges.length:LengthJudge", "unit": "words"}}, "sample", ""),
        ({"max_abstain": 0.5}, "sample pair train", "sample pair train"),
        ({"pairing": {"rule": "best_vs_random"}}, "sample judge", ""),
        ({"dpo": {"lr": 1e-5}}, "sample judge pair", ""),
        ({}, "sample judge pair train evaluate", "sample judge pair train evaluate"),
    ],
)
def test_arms_share_exactly_what_they_have_in_common(
    tmp_path: Path, change: dict[str, Any], round_1: str, round_2: str
) -> None:
    world = World(tmp_path / "run", experiment(arms={"first": {}, "second": change})).go()
    assert world.metrics()["second", 1]["reused"] == round_1.split()
    assert world.metrics()["second", 2]["reused"] == round_2.split()


def test_neither_rounds_nor_seeds_share_answers_to_the_same_prompt(tmp_path: Path) -> None:
    """One prompt, always π₀: nothing but the dice tell rounds and seeds apart."""
    spec = experiment(
        arms={"a": {"source": "initial"}}, seeds=[0, 1], prompts={"path": "p", "per_round": 1, "held_out": 3}
    )
    world = World(tmp_path / "run", spec)
    world.run.train_prompts = TRAIN[:1]
    world.go()
    files = [world.run.store.round("a", seed, index).path / "candidates.parquet" for seed in (0, 1) for index in (1, 2)]
    assert len({candidate.seed for file in files for candidate in read_candidates(file)}) == 4 * 3
    assert len({digest(file) for file in files}) == 4


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(rounds=5)).go()
    held_out = [prompt.id for prompt in HELD_OUT]
    measured = trained = 0
    for (requests,) in world.asked("sample"):
        ids = [prompt_id for prompt_id, _ in requests]
        if ids == held_out:
            measured += 1
        else:
            assert not set(ids) & set(held_out)
            trained += 1
    assert (measured, trained) == (10, 9)  # held-out: 0 and 1 shared, 2 to 5 twice; rounds: 1 shared, 2 to 5 twice
    for call in world.asked("train"):
        assert not {pair.prompt.id for pair in call[4]} & set(held_out)


def test_held_out_answers_have_the_same_seeds_in_every_round_and_arm(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(rounds=3)).go()
    held_out = [requests for (requests,) in world.asked("sample") if requests[0][0] == "held-0"]
    assert len(held_out) == 6
    expected = [(f"held-{i}", (derive_seed(0, "held_out", f"held-{i}"),)) for i in range(3)]
    assert all(requests == expected for requests in held_out)


def test_every_candidate_has_a_seed_of_its_own(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {}}, seeds=[0, 1], rounds=3)).go()
    seeds = [
        candidate.seed
        for seed in (0, 1)
        for index in (1, 2, 3)
        for candidate in read_candidates(world.run.store.round("a", seed, index).path / "candidates.parquet")
    ]
    assert len(seeds) == 2 * 3 * 3 * 3
    assert len(set(seeds)) == len(seeds)
    first = read_candidates(world.folder("a", 2).path / "candidates.parquet")[0]
    assert first.seed == derive_seed(0, "sample", 2, first.prompt_id, 0)


def test_both_arms_train_on_the_same_prompts(tmp_path: Path) -> None:
    """Three a round of seven: rounds 1 and 2 share none, round 3 begins the second permutation."""
    world = World(tmp_path / "run", experiment(rounds=3)).go()

    def prompts(arm: str, index: int) -> list[str]:
        pinned = json.loads((world.folder(arm, index).path / "round.json").read_text(encoding="utf-8"))
        return list(pinned["prompts"])

    for index in (1, 2, 3):
        assert prompts("on_policy", index) == prompts("self_offline", index)
        assert len(set(prompts("on_policy", index))) == 3
    assert not set(prompts("on_policy", 1)) & set(prompts("on_policy", 2))


def test_files_agree_with_each_other(tmp_path: Path) -> None:
    """Candidates in the prompts' order though the engine answers in another; pairs are those of the verdicts."""
    world = World(tmp_path / "run", experiment()).go()
    for arm in TWO_ARMS:
        for index in (1, 2):
            path = world.folder(arm, index).path
            pinned = json.loads((path / "round.json").read_text(encoding="utf-8"))["prompts"]
            candidates = read_candidates(path / "candidates.parquet")
            assert [(c.prompt_id, c.index) for c in candidates] == [(p, i) for p in pinned for i in range(3)]
            verdicts = read_verdicts(path / "verdicts.parquet")
            assert [getattr(verdict, "score", None) for verdict in verdicts] == [len(c.text) for c in candidates]
            prompts = {prompt.id: prompt for prompt in TRAIN if prompt.id in pinned}
            expected = make_pairs(
                {p: prompts[p] for p in pinned}, candidates, verdicts, world.run.experiment.pairing,
                derive_seed(0, "pair", index),
            )  # fmt: skip
            assert read_pairs(path / "pairs.parquet", prompts, candidates) == list(expected.pairs)


def test_progress_ends_where_it_said(tmp_path: Path) -> None:
    """`Spoken.finish` holds what was announced against what was done; pairs of the last batch count once."""
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=1, dpo={"batch_size": 2})).go()
    assert world.progress.stages == [
        ("a · seed 0 · round 0 evaluate", 3),
        ("a · seed 0 · round 1 sample", 9),
        ("a · seed 0 · round 1 judge", 9),
        ("a · seed 0 · round 1 pair", 3),
        ("a · seed 0 · round 1 train", 3),
        ("a · seed 0 · round 1 evaluate", 3),
        ("a · seed 0 · round 1 evaluate, KL", 3),
    ]


def test_faults_that_are_switched_on_are_said_before_each_training(tmp_path: Path) -> None:
    """And stand with the loss in the round's figures; an arm without any says nothing."""
    arms: dict[str, Any] = {"right": {}, "wrong": {"dpo": {"faults": {"score_padding": True}}}}
    world = World(tmp_path / "run", experiment(arms=arms)).go()
    line = "wrong · seed 0 · round {}: faults are switched on: padding is scored"
    assert world.progress.lines == [line.format(1), line.format(2)]
    losses = {arm: world.metrics()[arm, 1]["train"]["loss"] for arm in arms}
    assert "FAULTS" not in losses["right"]
    assert losses["wrong"].endswith("FAULTS SWITCHED ON: padding is scored")


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment()).go()
    before = {path: path.stat().st_mtime_ns for path in world.root.rglob("*")}
    again = world.reopen().go()
    assert again.calls == []
    assert again.progress.stages == []
    assert {path: path.stat().st_mtime_ns for path in world.root.rglob("*")} == before


# --- figures ---


class TwoAnswers(FakeEngine):
    """Held-out answers of 2 and 4 letters from π₀, of 3 and 4 from any other policy; in training 1 to 3 letters."""

    initial = ""

    def candidate(self, prompt: Prompt, index: int, seed: int) -> Candidate:
        assert self.policy is not None
        trained = self.policy.id != "initial"
        if prompt.id.startswith("held"):
            letters = {"held-0": 3 if trained else 2, "held-1": 4}[prompt.id]
            tokens = tuple(range(letters))
            text = " ".join("ab"[i % 2] for i in range(letters))
        else:
            tokens, text = (index,), "x" * (index + 1)
        stop = prompt.id == "held-0"
        return Candidate(prompt.id, index, text, tokens, (-1.0,) * len(tokens), "stop" if stop else "length", seed)


class HalfLikely(FakeLearner):
    """To π₀ every token of another policy has log-prob −1.5: half a nat less than −1, which its own policy gives it."""

    def score(self, policy: Policy, items: Any) -> list[list[float]]:
        assert policy.id == "initial"
        return [[-1.5] * len(candidate.token_ids) for _, candidate in items]


def test_figures_by_hand(tmp_path: Path) -> None:
    """Two held-out prompts. Words (one a token): before 2 and 4, after 3 and 4.

    - reward (2 + 4)/2 = 3 before, 3.5 after; change (1 + 0)/2 = 0.5. Of resamples of two values a quarter take
      each twice, so the bounds are the values: [3, 4], [0, 1].
    - win rate: one win, one tie: (1 + ½)/2 = 0.75. Wilson, n = 2, z² = 3.8415: centre (0.75 + z²/4)/(1 + z²/2)
      = 1.71037/2.92073 = 0.58560, half 1.95996·√(0.75·0.25/2 + z²/16)/2.92073 = 1.95996·0.57779/2.92073 = 0.38773.
    - KL: half a nat a token, 3 and 4 tokens: mean 1.75 in [1.5, 2]; a token 0.5.
    - length 3.5; one of two ended by itself.
    - distinct bigrams: "a b a" has (a b), (b a); "a b a b" has (a b), (b a), (a b): 2 of 5.
    Training: two prompts, answers of 1, 2, 3 letters: best 3, worst 1, margin 2; two pairs in steps of one.
    The fake's steps have losses 0.6 and 0.5, margins 0.1 and 0.2, norms 1 and 2, tokens 10 and 20 in ½ s each.
    """
    spec = experiment(
        arms={"a": {}},
        rounds=1,
        prompts={"path": "p", "per_round": 2, "held_out": 2},
        evaluation={"judge": {"use": "judges.length:LengthJudge", "unit": "words"}},
    )
    world = World(tmp_path / "run", spec, engine=TwoAnswers, learner=HalfLikely)
    world.run.held_out = HELD_OUT[:2]
    world.go()
    start, end = world.metrics()["a", 0], world.metrics()["a", 1]

    assert start["held_out"]["reward"] == {"mean": 3.0, "low": 2.0, "high": 4.0}
    assert start["held_out"]["reward_change"] is None
    assert start["held_out"]["win_rate"] is None
    assert start["held_out"]["kl_initial"] is None
    assert start["held_out"]["kl_reference"] is None
    assert start["held_out"]["length"] == 3.0

    held_out = end["held_out"]
    assert held_out["n"] == 2
    assert held_out["abstained"] == 0
    assert held_out["reward"] == {"mean": 3.5, "low": 3.0, "high": 4.0}
    assert held_out["reward_change"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert held_out["win_rate"]["mean"] == 0.75
    assert held_out["win_rate"]["low"] == pytest.approx(0.58560 - 0.38773, abs=2e-5)
    assert held_out["win_rate"]["high"] == pytest.approx(0.58560 + 0.38773, abs=2e-5)
    assert held_out["kl_initial"] == {"mean": 1.75, "low": 1.5, "high": 2.0}
    assert held_out["kl_initial_token"] == 0.5
    assert held_out["kl_reference"] == held_out["kl_initial"]  # round 1's reference is π₀
    assert held_out["length"] == 3.5
    assert held_out["ended"] == 0.5
    assert held_out["distinct_2"] == 0.4

    assert (end["arm"], end["seed"], end["round"]) == ("a", 0, 1)
    assert end["policy"]["id"] == "a/seed_0/round_01"
    assert end["source"] == end["reference"] == {"id": "initial", "digest": world.run.initial.digest}
    assert (end["sample"]["candidates"], end["sample"]["tokens"]) == (6, 6)
    assert end["sample"]["probe_gap"] == 0.0
    assert end["judge"] == {
        "verdicts": 6,
        "abstained": 0,
        "reasons": {},
        "details": {},
        "ledger": {"asked": 6, "cached": 0},
    }
    assert end["pairs"] == {"kept": 2, "dropped": {}, "margin": 2.0}
    train = end["train"]
    assert train["steps"] == 2
    assert (train["loss_first"], train["loss_last"]) == (pytest.approx(0.6), pytest.approx(0.5))
    assert (train["loss_mean"], train["accuracy_mean"]) == (pytest.approx(0.55), 0.5)
    assert (train["margin_last"], train["accuracy_last"], train["grad_norm_largest"]) == (0.2, 0.5, 2)
    assert (train["chosen_logp_change"], train["rejected_logp_change"]) == (-0.2, -0.4)
    assert (train["reference_from"], train["engine_gap_token"], train["engine_gap_sequence"]) == ("engine", 1e-6, 2e-6)
    assert (train["tokens"], train["tokens_per_second"]) == (30, 30.0)
    assert [step["margin"] for step in train["curve"]] == [0.1, 0.2]
    assert set(end["seconds"]) == {"sample", "judge", "pair", "train", "evaluate"}


@pytest.mark.parametrize("evaluation", [{"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_kl_is_left_out_where_answers_are_not_the_policys_own_distribution(
    tmp_path: Path, evaluation: dict[str, float]
) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=1, evaluation=evaluation)).go()
    held_out = world.metrics()["a", 1]["held_out"]
    assert held_out["kl_initial"] is None
    assert held_out["kl_initial_token"] is None
    assert held_out["kl_reference"] is None
    assert held_out["reward_change"] is not None


def test_held_out_sampling_takes_the_evaluations_own_settings() -> None:
    spec = experiment(sampling={"n": 5, "temperature": 0.3, "max_tokens": 17})
    default = held_out_sampling(spec, spec.arm("on_policy"))
    assert (default.n, default.temperature, default.top_p, default.max_tokens) == (1, 1.0, 1.0, 17)
    spec = experiment(evaluation={"temperature": 0.5, "top_p": 0.8, "max_tokens": 9})
    own = held_out_sampling(spec, spec.arm("on_policy"))
    assert (own.n, own.temperature, own.top_p, own.max_tokens) == (1, 0.5, 0.8, 9)


def test_initial_log_probs_are_the_stored_ones_where_it_sampled_and_the_learners_elsewhere(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=1)).go()
    for answer in read_held_out(world.folder("a", 0).path / "held_out.parquet"):
        assert answer.initial_logprobs == answer.candidate.logprobs
    assert world.asked("score") == [(world.run.initial.digest, ["held-0", "held-1", "held-2"])]
    kl = [
        sum(answer.candidate.logprobs) - sum(answer.initial_logprobs)
        for answer in read_held_out(world.folder("a", 1).path / "held_out.parquet")
    ]
    assert world.metrics()["a", 1]["held_out"]["kl_initial"]["mean"] == pytest.approx(sum(kl) / 3)


def test_initial_log_probs_asked_for_in_parts_are_in_the_answers_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SCORED_AT_ONCE", 2)
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=1)).go()
    assert [call[1] for call in world.asked("score")] == [["held-0", "held-1"], ["held-2"]]
    answers = read_held_out(world.folder("a", 1).path / "held_out.parquet")
    assert [answer.candidate.prompt_id for answer in answers] == ["held-0", "held-1", "held-2"]
    for answer in answers:
        assert answer.initial_logprobs == logprobs_of(world.run.initial.digest, answer.candidate.token_ids)


class Checkpointing(FakeLearner):
    """Leaves a checkpoint, and beside it what a kill in the middle of saving one leaves."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__(calls)
        self.jobs: list[TrainJob] = []

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        self.jobs.append(job)
        assert job.checkpoint is not None
        for suffix in ("", ".before", ".new"):
            folder = job.checkpoint.with_name(job.checkpoint.name + suffix)
            folder.mkdir()
            (folder / "state.json").write_text("{}")
        yield from super().train(job)


def test_a_trained_round_keeps_no_checkpoint(tmp_path: Path) -> None:
    """Each round has a place of its own, beside what the stage puts together, and nothing stays there."""
    world = World(tmp_path / "run", experiment(arms={"a": {}}), learner=Checkpointing).go()
    learner = world.run.learner
    assert isinstance(learner, Checkpointing)
    assert len(learner.jobs) == 2
    for index, job in enumerate(learner.jobs, start=1):
        assert job.checkpoint is not None
        assert job.checkpoint.parent == world.folder("a", index).path
        assert job.checkpoint not in job.out.parents
        assert list(job.checkpoint.parent.glob(f"{job.checkpoint.name}*")) == []
        assert job.cache == world.run.store.root / "logps.sqlite"


@pytest.mark.parametrize("reference", ["prior", {"every": 2}, {"ema": 0.5}])
def test_kl_is_from_the_rounds_own_reference(tmp_path: Path, reference: Any) -> None:
    """Scored by the learner under the very policy that the round was trained against; π₀ is not scored twice."""
    world = World(tmp_path / "run", experiment(arms={"a": {"reference": reference}}, rounds=3)).go()
    initial, asked = world.run.initial.digest, []
    for index in (1, 2, 3):
        row = world.metrics()["a", index]
        referred = row["reference"]["digest"]
        asked += [initial] if referred == initial else [initial, referred]
        answers = read_held_out(world.folder("a", index).path / "held_out.parquet")
        for answer in answers:
            assert answer.reference_logprobs == logprobs_of(referred, answer.candidate.token_ids)
            assert answer.initial_logprobs == logprobs_of(initial, answer.candidate.token_ids)
        logs = [(a.candidate.logprobs, a.reference_logprobs or ()) for a in answers]
        assert row["held_out"]["kl_reference"]["mean"] == pytest.approx(sum(sum(p) - sum(q) for p, q in logs) / 3)
    assert [policy for policy, _ in world.asked("score")] == asked
    assert all(a.reference_logprobs is None for a in read_held_out(world.folder("a", 0).path / "held_out.parquet"))


class Unreferred(FakeLearner):
    """Trains as a loss without a reference would."""

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        return super().train(replace(job, reference=job.policy))


def test_one_policy_measured_against_two_references_is_measured_twice(tmp_path: Path) -> None:
    """Both arms train the same policies; from round 2 on KL to the reference is another."""
    arms = {"first": {}, "second": {"reference": "initial"}}
    world = World(tmp_path / "run", experiment(arms=arms), learner=Unreferred).go()
    first, second = world.metrics()["first", 2], world.metrics()["second", 2]
    assert first["policy"]["digest"] == second["policy"]["digest"]
    assert second["reused"] == ["sample", "judge", "pair"]
    assert second["held_out"]["kl_reference"] == second["held_out"]["kl_initial"]
    assert first["held_out"]["kl_reference"] != second["held_out"]["kl_reference"]


# --- references that move in their own time ---


def weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["w"].double()


def test_a_reference_refreshed_every_second_round(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {"reference": {"every": 2}}}, rounds=5)).go()
    rows = world.metrics()
    after = [world.run.initial.digest, *(rows["a", index]["policy"]["digest"] for index in range(1, 6))]
    refreshed = [after[i] for i in (0, 0, 2, 2, 4)]
    assert [rows["a", index]["reference"]["digest"] for index in range(1, 6)] == refreshed
    assert [call[1:3] for call in world.asked("train")] == list(zip(after[:5], refreshed, strict=True))


def test_an_averaged_reference(tmp_path: Path) -> None:
    """α = ¼: W₀; ¾W₀ + ¼W₁; 9/16·W₀ + 3/16·W₁ + ¼W₂. Training is given them, and they are named in the figures."""
    world = World(tmp_path / "run", experiment(arms={"a": {"reference": {"ema": 0.25}}}, rounds=3)).go()
    trained = {call[0]: call[2] for call in world.asked("train")}
    w = [weights(world.run.initial.path), *(weights(world.folder("a", index).path / "policy") for index in (1, 2))]
    expected = {2: 3 / 4 * w[0] + 1 / 4 * w[1], 3: 9 / 16 * w[0] + 3 / 16 * w[1] + 1 / 4 * w[2]}
    assert trained["a/seed_0/round_01"] == world.run.initial.digest
    assert not (world.folder("a", 1).path / "reference").exists()
    for index, formula in expected.items():
        folder = world.folder("a", index).path / "reference"
        assert float((weights(folder) - formula).abs().max()) < 1.5e-7  # numbers below 1, two float32 roundings
        made = read_policy(folder)
        row = world.metrics()["a", index]
        assert row["reference"] == {"id": f"a/seed_0/reference_{index:02d}", "digest": made.digest}
        assert trained[f"a/seed_0/round_{index:02d}"] == made.digest
        assert set(row["seconds"]) == {"reference", "sample", "judge", "pair", "train", "evaluate"}


def test_arms_that_average_alike_do_it_once(tmp_path: Path) -> None:
    """Equal policies and α; another α shares nothing but what comes before."""
    arms = {
        "first": {"reference": {"ema": 0.5}},
        "second": {"reference": {"ema": 0.5}, "max_abstain": 0.5},
        "third": {"reference": {"ema": 0.25}},
    }
    world = World(tmp_path / "run", experiment(arms=arms)).go()
    files = [world.folder(arm, 2).path / "reference" / "model.safetensors" for arm in arms]
    assert files[0].stat().st_ino == files[1].stat().st_ino != files[2].stat().st_ino
    assert world.metrics()["second", 2]["reused"] == ["reference", "sample", "pair", "train"]
    assert world.metrics()["third", 2]["reused"] == ["sample", "judge", "pair"]


def test_other_names_of_the_prior_reference_share_everything(tmp_path: Path) -> None:
    arms = {"first": {}, "second": {"reference": {"every": 1}}, "third": {"reference": {"ema": 1}}}
    world = World(tmp_path / "run", experiment(arms=arms)).go()
    for arm in ("second", "third"):
        assert world.metrics()[arm, 2]["reused"] == ["sample", "judge", "pair", "train", "evaluate"]


def references_left(world: World, arm: str) -> list[int]:
    last = world.run.experiment.arm(arm).rounds
    return [i for i in range(1, last + 1) if (world.folder(arm, i).path / "reference").exists()]


@pytest.mark.parametrize(("keep", "left"), [("all", [2, 3, 4]), ("last", []), ("best", [])])
def test_averages_are_given_up_once_no_later_one_needs_them(tmp_path: Path, keep: str, left: list[int]) -> None:
    arms = {"a": {"reference": {"ema": 0.5}}}
    world = World(tmp_path / "run", experiment(arms=arms, rounds=4, keep=keep)).go()
    assert references_left(world, "a") == left
    assert policies_left(world, "a")[-1] == 4


@pytest.mark.parametrize("keep", ["all", "last"])
def test_resuming_around_an_average_gives_what_an_uninterrupted_run_gives(tmp_path: Path, keep: str) -> None:
    """Killed before, within and after the making of it, before the pin and after, and where the one before goes."""
    spec = experiment(arms={"a": {"reference": {"ema": 0.5}}}, rounds=4, keep=keep)
    whole = results(World(tmp_path / "whole" / "run", spec).go().root)
    assert any(name.endswith("/reference" if keep == "all" else "/.reference.pruned") for name in whole)
    world = World(tmp_path / "run", spec)
    for index, stage, moment in (
        (2, "reference", "before"),
        (2, "reference", "within"),
        (2, "sample", "before"),
        (2, "train", "within"),
        (3, "reference", "after"),
        (3, "close", "after"),
        (4, "reference", "within"),
        (4, "evaluate", "within"),
    ):
        with pytest.raises(Killed):
            with_death(world.reopen(), "a", index, stage, moment)
    again = world.reopen().go()
    assert results(again.root) == whole
    assert [path.name for path in again.root.rglob("*.tmp")] == []


# --- what stops an arm, what stops a run ---


def stopping(*policy_ids: str) -> Callable[[list[tuple[Any, ...]]], FakeLearner]:
    return lambda calls: FakeLearner(calls, stop=lambda policy_id: policy_id in policy_ids)


def test_a_training_error_stops_one_arm_and_keeps_its_last_policy(tmp_path: Path) -> None:
    spec = experiment(arms={"wild": {"dpo": {"lr": 1.0}}, "tame": {}}, rounds=3)
    world = World(tmp_path / "run", spec, learner=stopping("wild/seed_0/round_02"))
    assert run_experiment(world.run) == {"wild · seed 0": "loss nan"}
    assert world.progress.lines == ["wild · seed 0 stopped: loss nan"]
    assert world.folder("wild", 1).closed
    world.folder("wild", 1).trust("train")
    assert (world.folder("wild", 1).path / "policy" / "model.safetensors").exists()
    assert not world.folder("wild", 2).closed
    assert not (world.folder("wild", 2).path / "policy").exists()
    assert all(world.folder("tame", index).closed for index in range(4))
    assert [key for key in world.metrics() if key[0] == "wild"] == [("wild", 0), ("wild", 1)]

    # Resumed, it tries again: nothing but that training, since all before it is done.
    again = world.reopen()
    assert run_experiment(again.run) == {"wild · seed 0": "loss nan"}
    assert [call[0] for call in again.calls if call[0] in ("sample", "train", "score")] == ["train"]


def test_a_round_without_pairs_stops_its_arm_and_tells_why(tmp_path: Path) -> None:
    spec = experiment(arms={"strict": {"pairing": {"min_margin": 1e6}}, "plain": {}}, rounds=1)
    world = World(tmp_path / "run", spec)
    stopped = run_experiment(world.run)
    assert stopped == {"strict · seed 0": "round 1 has no pairs to train on (dropped: {'below_margin': 3})"}
    assert world.folder("plain", 1).closed


@pytest.fixture
def moody(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A judge by characters, whose module lies in a folder of its own, and a file; while that is there it fails."""
    folder = tmp_path / f"judges_of_{tmp_path.name}"
    folder.mkdir()
    name = f"moody_{abs(hash(tmp_path))}"
    flag = folder / "moody"
    (folder / f"{name}.py").write_text(
        "from pathlib import Path\n"
        "from online_dpo.errors import JudgeError\n"
        "class Moody:\n"
        "    def __init__(self, how='error'):\n"
        "        self.how = how\n"
        "    def score(self, prompt, candidates):\n"
        f"        if Path({str(flag)!r}).exists():\n"
        "            if self.how == 'error':\n"
        "                raise JudgeError('no more credit')\n"
        "            raise ValueError('service is down')\n"
        "        return [len(candidate.text) for candidate in candidates]\n",
        encoding="utf-8",
    )
    return {"use": f"{name}:Moody"}, flag


@pytest.mark.parametrize("how", ["error", "abstain"])
def test_a_judge_error_stops_the_run_and_resuming_goes_on(
    tmp_path: Path, moody: tuple[dict[str, Any], Path], how: str
) -> None:
    judge, flag = moody
    spec = experiment(judge=judge | {"how": how})
    whole = World(tmp_path / "whole" / "run", spec, judge_folders=(flag.parent,)).go()

    class TurnsMoody(FakeEngine):
        """The judge's mood turns while round 2's answers are sampled."""

        def sample(self, requests: Any, sampling: Any) -> Iterator[list[Candidate]]:
            if sum(call[0] == "sample" for call in self.calls) == 3:
                flag.touch()
            return super().sample(requests, sampling)

    world = World(tmp_path / "run", spec, engine=TurnsMoody, judge_folders=(flag.parent,))
    fault = "no more credit" if how == "error" else r"abstained on .* ValueError: service is down"
    with pytest.raises(JudgeError, match=fault):
        run_experiment(world.run)
    assert world.folder("on_policy", 1).closed
    assert world.folder("on_policy", 2).done("sample") is not None
    assert world.folder("on_policy", 2).done("judge") is None
    assert not world.folder("self_offline", 0).path.exists()

    flag.unlink()
    again = World(tmp_path / "run", spec, judge_folders=(flag.parent,)).go()
    assert results(again.root) == results(whole.root)


def test_a_judge_whose_source_changed_within_a_round_is_refused(
    tmp_path: Path, moody: tuple[dict[str, Any], Path]
) -> None:
    judge, flag = moody
    spec = experiment(judge=judge)
    world = World(tmp_path / "run", spec, judge_folders=(flag.parent,))
    with pytest.raises(Killed):
        with_death(world, "on_policy", 2, "train", "before")
    file = next(flag.parent.glob("*.py"))
    file.write_text(
        file.read_text(encoding="utf-8").replace("len(candidate.text)", "-len(candidate.text)"), encoding="utf-8"
    )
    with pytest.raises(RunFolderError, match="stage 'judge' was done from another judge"):
        run_experiment(world.reopen().run)


# --- which policies stay ---


def policies_left(world: World, arm: str) -> list[int]:
    last = world.run.experiment.arm(arm).rounds
    return [i for i in range(1, last + 1) if (world.folder(arm, i).path / "policy").exists()]


def test_keep_all(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(rounds=4)).go()
    assert policies_left(world, "on_policy") == policies_left(world, "self_offline") == [1, 2, 3, 4]


def test_keep_last(tmp_path: Path) -> None:
    """The last round's policy alone, whatever the source; the initial model is never touched."""
    arms = {"on_policy": {}, "semi": {"source": {"every": 2}}, "offline": {"source": "initial"}}
    world = World(tmp_path / "run", experiment(rounds=4, keep="last", arms=arms)).go()
    for arm in arms:
        assert policies_left(world, arm) == [4]
    assert (world.run.initial.path / "model.safetensors").exists()


class BestInTheMiddle(FakeEngine):
    """Held-out answers are longest after round 2, then after round 3; rounds 2 and 4 of arm `tied` are equal."""

    def candidate(self, prompt: Prompt, index: int, seed: int) -> Candidate:
        assert self.policy is not None
        made = super().candidate(prompt, index, seed)
        if not prompt.id.startswith("held"):
            return made
        after = int(self.policy.id[-2:]) if self.policy.id != "initial" else 0
        letters = (9, 1, 5, 3, 5 if self.policy.id.startswith("tied") else 2)[after]
        return Candidate(made.prompt_id, index, "x" * letters, made.token_ids, made.logprobs, "stop", seed)


def test_keep_best(tmp_path: Path) -> None:
    """The best trained policy by held-out reward (the earliest of equals), and the last one."""
    arms = {"free": {}, "tied": {"dpo": {"beta": 0.5}}}
    world = World(tmp_path / "run", experiment(rounds=4, keep="best", arms=arms), engine=BestInTheMiddle).go()
    assert policies_left(world, "free") == [2, 4]
    assert policies_left(world, "tied") == [2, 4]


def test_discarding_is_finished_after_a_death_in_the_middle_of_it(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(rounds=3, keep="last", arms={"a": {}}))
    with pytest.raises(Killed):
        with_death(world, "a", 2, "train", "before")
    # Marked, but not yet removed.
    folder = world.folder("a", 1)
    (folder.path / ".policy.pruned").touch()
    again = world.reopen().go()
    assert policies_left(again, "a") == [3]


# --- any death, any stage, any round ---


def with_death(world: World, arm: str, index: int, stage: str, moment: str, inside: str = ".") -> None:
    """Run `world`; raise `Killed` before, within or after a stage (or the closing) of a round, or of a folder in it."""
    real_stage, real_close = RoundFolder.stage, RoundFolder.close
    fatal = world.folder(arm, index).path / inside

    def dying_stage(
        self: RoundFolder,
        name: str,
        inputs: Mapping[str, str],
        outputs: Any,
        produce: Callable[[Path], Mapping[str, Any]],
    ) -> StageRecord:
        hit = (self.path, name) == (fatal, stage)
        if hit and moment == "before":
            raise Killed

        def dying_produce(out: Path) -> Mapping[str, Any]:
            info = produce(out)
            if hit and moment == "within":
                raise Killed
            return info

        record = real_stage(self, name, inputs, outputs, dying_produce)
        if hit and moment == "after":
            raise Killed
        return record

    def dying_close(self: RoundFolder, metrics: Mapping[str, Any]) -> None:
        hit = (self.path, "close") == (fatal, stage)
        if hit and moment != "after":
            raise Killed
        real_close(self, metrics)
        if hit:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundFolder, "stage", dying_stage)
        patch.setattr(RoundFolder, "close", dying_close)
        run_experiment(world.run)


KEEP = ("all", "last", "best")
STAGES = ("sample", "judge", "pair", "train", "evaluate", "close")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of a run that nobody stopped, by what is kept."""
    found = {}
    for keep in KEEP:
        root = tmp_path_factory.mktemp(keep) / "run"
        found[keep] = results(World(root, experiment(keep=keep)).go().root)
    return found


@pytest.mark.parametrize("arm", list(TWO_ARMS))
@pytest.mark.parametrize(
    ("index", "stage"),
    [(0, "evaluate"), (0, "close"), *((index, stage) for index in (1, 2) for stage in STAGES)],
)
def test_resuming_after_any_death_gives_what_an_uninterrupted_run_gives(
    tmp_path: Path, uninterrupted: dict[str, dict[str, Any]], arm: str, index: int, stage: str
) -> None:
    """Byte for byte: every table, every policy, every figure but those of a clock."""
    for number, moment in enumerate(("before", "within", "after")):
        if arm == "self_offline" and index < 2 and moment == "within" and stage != "close":
            continue  # taken over from the other arm: nothing is produced
        keep = KEEP[(index + STAGES.index(stage) + number) % 3]
        world = World(tmp_path / moment / "run", experiment(keep=keep))
        with pytest.raises(Killed):
            with_death(world, arm, index, stage, moment)
        again = world.reopen().go()
        assert results(again.root) == uninterrupted[keep]
        assert [path.name for path in again.root.rglob("*.tmp")] == []


def test_resuming_again_and_again(tmp_path: Path) -> None:
    whole = results(World(tmp_path / "whole" / "run", experiment(keep="best", rounds=3)).go().root)
    world = World(tmp_path / "run", experiment(keep="best", rounds=3))
    for arm, index, stage, moment in (
        ("on_policy", 1, "train", "within"),
        ("on_policy", 1, "evaluate", "within"),
        ("on_policy", 3, "sample", "within"),
        ("on_policy", 3, "close", "after"),
        ("self_offline", 2, "pair", "after"),
        ("self_offline", 3, "close", "before"),
    ):
        with pytest.raises(Killed):
            with_death(world.reopen(), arm, index, stage, moment)
    assert results(world.reopen().go().root) == whole


def test_a_damaged_table_stops_the_resumed_run_by_name(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment())
    with pytest.raises(Killed):
        with_death(world, "on_policy", 2, "train", "before")
    file = world.folder("on_policy", 2).path / "verdicts.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=r"on_policy/seed_0/round_02/verdicts\.parquet was changed"):
        run_experiment(world.reopen().run)


def test_damaged_initial_answers_of_a_closed_round_are_not_compared_with(tmp_path: Path) -> None:
    world = World(tmp_path / "run", experiment(arms={"a": {}}))
    with pytest.raises(Killed):
        with_death(world, "a", 2, "train", "before")
    file = world.folder("a", 0).path / "held_out.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=r"round_00/held_out\.parquet was changed"):
        run_experiment(world.reopen().run)


def test_every_figure_is_a_number_or_absent(tmp_path: Path) -> None:
    """JSON has no NaN: one held-out prompt gives means without intervals, not a file that cannot be read."""
    world = World(tmp_path / "run", experiment(arms={"a": {}}, rounds=1))
    world.run.held_out = HELD_OUT[:1]
    world.go()
    held_out = world.metrics()["a", 1]["held_out"]
    assert held_out["reward"]["low"] is None
    assert math.isfinite(held_out["reward"]["mean"])
