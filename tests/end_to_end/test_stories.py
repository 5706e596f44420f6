"""Whole runs with real Ray workers, the transformers engine and a real language model of 260 thousand parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from stories import Outcome, run, uninterrupted

from online_dpo.policies import read_policy
from online_dpo.records import read_candidates, read_held_out, read_pairs, read_prompts, read_verdicts
from online_dpo.types import Policy, Verdict

ARMS = ("on_policy", "self_offline")
STAGES = ("sample", "judge", "audit", "pair", "train", "off_policy", "evaluate")
ROUND = {
    "round.json",
    "candidates.parquet",
    "verdicts.parquet",
    "audit.json",
    "audit.png",
    "audit.svg",
    "pairs.parquet",
    "off_policy.parquet",
    "held_out.parquet",
    "policy",
    "stages",
    "metrics.json",
}


@pytest.fixture(scope="session")
def outcome(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two rounds of two arms, full fine-tuning."""
    return uninterrupted(tmp_path_factory.getbasetemp() / "stories", small_model)


def probe_gap(policy: Policy, model: Any) -> float:
    """Largest |difference| of a loaded model's log-probs from those that the policy's probe recorded."""
    import torch

    assert policy.probe is not None
    ids = torch.tensor([policy.probe.token_ids])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return float((logps - torch.tensor(policy.probe.logprobs)).abs().max())


def test_it_ends_well(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.startswith("engine: transformers (as the experiment says)\n")
    for stage in ("sample", "judge", "train", "evaluate"):
        assert f"on_policy · seed 0 · round 2 {stage}: " in outcome.stderr


def test_tables(outcome: Outcome) -> None:
    for part in ("Held-out reward (8 prompts", "KL to initial", "Pairs", "Training", "Speed", "Budget", "Prompt: "):
        assert part in outcome.stdout
    lines = outcome.stdout.splitlines()
    assert lines[-1] == "run folder: runs/tiny"
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("self_offline, round 2 ") for line in lines) == 3  # evaluation.show prompts


def test_layout(outcome: Outcome) -> None:
    """What store.py's docstring draws, and nothing else."""
    assert {path.name for path in outcome.root.iterdir()} == {
        "experiment.yaml",
        "manifest.json",
        "prompts.parquet",
        "initial.json",
        "verdicts.sqlite",
        "logps.sqlite",
        "arms",
        ".lock",
    }
    assert {path.name for path in (outcome.root / "arms").iterdir()} == set(ARMS)
    for arm in ARMS:
        assert {path.name for path in outcome.folder(arm, 0).parent.iterdir()} == {"round_00", "round_01", "round_02"}
        assert {path.name for path in outcome.folder(arm, 0).iterdir()} == {
            "held_out.parquet",
            "stages",
            "metrics.json",
        }
        for index in (1, 2):
            assert {path.name for path in outcome.folder(arm, index).iterdir()} == ROUND
            records = {path.stem for path in (outcome.folder(arm, index) / "stages").iterdir()}
            assert records == set(STAGES)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("index", [1, 2])
def test_a_fresh_round_begins_at_ln_2(outcome: Outcome, arm: str, index: int) -> None:
    """Policy = reference: −log σ(0) = ln 2, but for the engine's rounding where its log-probs are the reference's.

    A gap of g nats a sequence moves the margin by at most 2βg and the loss by half of that.
    """
    train = outcome.metrics(arm, index)["train"]
    assert abs(train["loss_first"] - math.log(2)) <= 0.1 * train["engine_gap_sequence"] + 1e-5
    assert train["loss_last"] != train["loss_first"]
    assert train["steps"] == 12  # 6 pairs in twos, 4 epochs
    assert train["engine_gap_token"] <= 1e-4
    assert train["engine_gap_sequence"] <= 1e-3
    assert outcome.metrics(arm, index)["sample"]["probe_gap"] <= 1e-4


def test_the_references_log_probs_come_from_the_engine_exactly_on_policy(outcome: Outcome) -> None:
    assert outcome.metrics("on_policy", 1)["train"]["reference_from"] == "engine"
    assert outcome.metrics("on_policy", 2)["train"]["reference_from"] == "engine"
    # Round 2 of the offline arm: sampled by π₀, held against what round 1 trained.
    assert outcome.metrics("self_offline", 2)["train"]["reference_from"] == "learner"


def test_sources(outcome: Outcome) -> None:
    on, off = outcome.metrics("on_policy", 2), outcome.metrics("self_offline", 2)
    assert on["source"] == on["reference"] == outcome.metrics("on_policy", 1)["policy"]
    assert off["source"]["id"] == "initial"
    assert off["reference"] == outcome.metrics("self_offline", 1)["policy"]
    assert outcome.metrics("self_offline", 1)["reused"] == list(STAGES)


@pytest.mark.parametrize("arm", ARMS)
def test_figures_are_there(outcome: Outcome, arm: str) -> None:
    for index in (1, 2):
        metrics = outcome.metrics(arm, index)
        held_out = metrics["held_out"]
        assert (held_out["n"], held_out["abstained"]) == (8, 0)
        for name in ("reward", "reward_change", "win_rate", "kl_initial"):
            figure = held_out[name]
            assert figure["low"] <= figure["mean"] <= figure["high"]
        assert 0 <= held_out["win_rate"]["mean"] <= 1
        assert 0 < held_out["length"] <= 24
        assert metrics["sample"]["candidates"] == 18
        assert metrics["sample"]["tokens"] <= 18 * 24
        assert metrics["sample"]["tokens_per_second"] > 0
        assert metrics["train"]["tokens_per_second"] > 0
        # One pair a prompt; a tie or two equal texts leave one out, and say so.
        pairs = metrics["pairs"]
        assert pairs["kept"] + sum(pairs["dropped"].values()) == 6
        assert pairs["kept"] >= 4
        assert set(metrics["seconds"]) == set(STAGES)
    assert outcome.metrics(arm, 2)["held_out"]["kl_initial"]["mean"] > 0


def test_training_raises_what_it_should(outcome: Outcome) -> None:
    """After 12 steps on 6 pairs at this rate the margins that were trained on have grown, whatever the seed."""
    for arm in ARMS:
        curve = outcome.metrics(arm, 1)["train"]["curve"]
        assert sum(step["loss"] for step in curve[-3:]) < sum(step["loss"] for step in curve[:3])


def test_held_out_prompts_are_never_sampled_for_training(outcome: Outcome) -> None:
    prompts = read_prompts(outcome.root / "prompts.parquet")
    held_out = {prompt.id for prompt in prompts["held_out"]}
    assert len(held_out) == 8
    assert len(prompts["train"]) == 16
    assert not held_out & {prompt.id for prompt in prompts["train"]}
    for arm in ARMS:
        seen: list[str] = []
        for index in (1, 2):
            folder = outcome.folder(arm, index)
            sampled = {candidate.prompt_id for candidate in read_candidates(folder / "candidates.parquet")}
            assert len(sampled) == 6
            assert not sampled & held_out
            assert {answer.candidate.prompt_id for answer in read_held_out(folder / "held_out.parquet")} == held_out
            seen.extend(sampled)
        assert len(set(seen)) == 12  # no prompt twice before all had their turn


def test_tables_on_disk_agree(outcome: Outcome, small_model: Path) -> None:
    """Texts are the tokens' own, scores are the judge's of these texts, pairs the best against the worst."""
    from online_dpo.models import load_tokenizer

    tokenizer: Any = load_tokenizer(small_model)
    prompts = {prompt.id: prompt for prompt in read_prompts(outcome.root / "prompts.parquet")["train"]}
    folder = outcome.folder("on_policy", 2)
    candidates = read_candidates(folder / "candidates.parquet")
    scores: dict[tuple[str, int], float] = {}
    for candidate, verdict in zip(candidates, read_verdicts(folder / "verdicts.parquet"), strict=True):
        assert candidate.text == tokenizer.decode(candidate.token_ids, skip_special_tokens=True)
        assert len(candidate.token_ids) == len(candidate.logprobs) <= 24
        assert all(logprob <= 0 for logprob in candidate.logprobs)
        assert isinstance(verdict, Verdict)
        assert verdict.score == len(candidate.text)
        scores[verdict.prompt_id, verdict.index] = verdict.score
    assert len({candidate.seed for candidate in candidates}) == 18
    for pair in read_pairs(folder / "pairs.parquet", prompts, candidates):
        own = [score for (prompt_id, _), score in scores.items() if prompt_id == pair.prompt.id]
        assert (pair.chosen_score, pair.rejected_score) == (max(own), min(own))


def test_policies_load_and_are_what_was_measured(outcome: Outcome, small_model: Path, one_thread: None) -> None:
    """transformers alone loads each folder; its log-probs on the probe are those that the learner recorded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    initial: Any = AutoModelForCausalLM.from_pretrained(small_model)
    digests = set()
    for arm, index in (("on_policy", 1), ("on_policy", 2), ("self_offline", 2)):
        policy = read_policy(outcome.folder(arm, index) / "policy")
        model = AutoModelForCausalLM.from_pretrained(policy.path)
        assert probe_gap(policy, model) <= 1e-4
        assert probe_gap(policy, initial) > 1e-3
        assert AutoTokenizer.from_pretrained(policy.path).decode([5]) is not None
        assert outcome.metrics(arm, index)["policy"] == {"id": policy.id, "digest": policy.digest}
        digests.add(policy.digest)
    assert len(digests) == 3


def test_the_manifest_says_what_the_run_began_with(outcome: Outcome, small_model: Path) -> None:
    from online_dpo.models import digest_folder

    manifest = json.loads((outcome.root / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["digest"] == digest_folder(small_model)
    assert (manifest["prompts"]["train"], manifest["prompts"]["held_out"]) == (16, 8)
    assert {"torch", "transformers", "ray"} <= set(manifest["packages"])


@pytest.mark.slow
def test_lora_with_two_learner_workers(tmp_path: Path, small_model: Path, one_thread: None) -> None:
    """An adapter is trained, saved, merged by the engine, and trained on; both workers' gradients are in it."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    outcome = run(
        tmp_path,
        small_model,
        "lora",
        arms={"on_policy": {}},
        lora={"rank": 4, "alpha": 8},
        dpo={"lr": 1.0e-2, "batch_size": 4, "epochs": 2},
        learner={"workers": 2, "threads": 1, "tokens_per_pass": 1},
    )
    assert outcome.status == 0, outcome.stderr
    for index in (1, 2):
        train = outcome.metrics("on_policy", index)["train"]
        assert abs(train["loss_first"] - math.log(2)) <= 0.1 * train["engine_gap_sequence"] + 1e-5
        assert train["reference_from"] == "engine"
        assert train["engine_gap_token"] <= 1e-4  # in round 2: the merged adapter in the engine against the learner's
        policy = read_policy(outcome.folder("on_policy", index) / "policy")
        assert policy.adapter
        assert {path.name for path in policy.path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
        weights = load_file(policy.path / "adapter_model.safetensors")
        assert all(bool(weight.abs().sum() > 0) for name, weight in weights.items() if "lora_B" in name)
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), str(policy.path))
        assert probe_gap(policy, model.eval()) <= 1e-4
    assert outcome.metrics("on_policy", 2)["source"] == outcome.metrics("on_policy", 1)["policy"]
    first, last = (
        [answer.candidate.text for answer in read_held_out(outcome.folder("on_policy", index) / "held_out.parquet")]
        for index in (0, 2)
    )
    assert first != last
