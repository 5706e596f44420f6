"""The measures of a real run: at zero on-policy, further off by the round offline, and what a direct pass finds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stories import NAMES, THINGS, Outcome, run

from online_dpo.records import read_candidates, read_held_out, read_prompts
from online_dpo.scored_records import read_human_pairs, read_off_policy

pytestmark = pytest.mark.slow

ARMS = ("on_policy", "self_offline", "offline")
ENDINGS = ("They were happy.", "He ran to the park and saw a cat.", "It was gone.")


def given(place: int) -> dict[str, str]:
    """A pair that nobody sampled, for one of the prompts that `stories.write_experiment` writes."""
    name, thing = NAMES[place % len(NAMES)], THINGS[place // len(NAMES)]
    return {
        "prompt": f"Once upon a time, {name} had {thing}.",
        "chosen": ENDINGS[place % 3],
        "rejected": "xq zzz blorp" if place % 2 else "The the the the",
    }


@pytest.fixture(scope="module")
def outcome(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Three rounds of three arms, at a learning rate that moves the policy a little in each."""
    folder = tmp_path_factory.mktemp("off_policy")
    rows = [given(place) for place in range(len(NAMES) * len(THINGS))]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = run(
        folder,
        small_model,
        "measured",
        arms={
            "on_policy": {},
            "self_offline": {"source": "initial"},
            "offline": {"source": {"dataset": "pairs.jsonl"}},
        },
        rounds=3,
        audit={"prompts": 0},
        dpo={"lr": 1.0e-4, "batch_size": 2, "epochs": 4},
        evaluation={
            "off_policy": 6,
            "pairs": {"path": "pairs.jsonl", "limit": 7},
            "gold": {"use": "judges.length:LengthJudge", "unit": "words"},
        },
    )
    assert done.status == 0, done.stderr
    return done


def direct(folder: Path, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    """Log-probs by transformers alone, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for prompt, answer in items:
            ids = torch.tensor([[*prompt, *answer]])
            logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logps.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist())
    return found


def test_on_policy_a_round_starts_at_the_engine_gap(outcome: Outcome) -> None:
    """The start's figures are those of engine and learner at the same weights: zero but for rounding."""
    for index in (1, 2, 3):
        found = outcome.metrics("on_policy", index)["off_policy"]
        assert (found["staleness"], found["exact"]) == (0, True)
        assert found["with_behaviour"] == found["answers"] >= 8
        assert abs(found["start"]["ess"] - 1) < 1e-5
        assert abs(found["start"]["kl_token"]) < 1e-5
        assert found["start"]["kl_token_k3"] < 1e-8
        assert found["engine_gap"]["ess"] == found["start"]["ess"]
        assert found["end"]["ess"] < 0.999


def test_offline_the_effective_sample_falls_by_round(outcome: Outcome) -> None:
    found = [outcome.metrics("self_offline", index)["off_policy"] for index in (1, 2, 3)]
    steps = [outcome.metrics("self_offline", index)["train"]["steps"] for index in (1, 2, 3)]
    assert [one["staleness"] for one in found] == [0, steps[0], steps[0] + steps[1]]
    starts = [one["start"]["ess"] for one in found]
    assert starts[0] > 0.999 > starts[1]
    assert starts[0] > starts[1] > starts[2]
    divergence = [one["start"]["kl_token_k3"] for one in found]
    assert divergence[0] < divergence[1] < divergence[2]


def test_given_answers_have_no_sampler_and_are_seldom_covered(outcome: Outcome) -> None:
    for index in (1, 2, 3):
        found = outcome.metrics("offline", index)["off_policy"]
        assert (found["with_behaviour"], found["staleness"], found["engine_gap"]) == (0, None, None)
        assert found["start"]["ess"] is found["end"]["kl_token"] is None
    assert outcome.metrics("offline", 1)["off_policy"]["start"]["coverage"] >= 0.5
    assert outcome.metrics("on_policy", 1)["off_policy"]["start"]["coverage"] < 0.5


@pytest.mark.parametrize("arm", ARMS)
def test_displacement_is_what_a_direct_pass_finds(outcome: Outcome, small_model: Path, arm: str) -> None:
    """Round 2: the policies of rounds 1 and 2, loaded by transformers alone, on the tokens that were trained on."""
    folder = outcome.folder(arm, 2)
    scored = read_off_policy(folder / "off_policy.parquet")
    prompts = {prompt.id: prompt for prompt in read_prompts(outcome.root / "prompts.parquet")["train"]}
    answers = {(one.prompt_id, one.index): one for one in read_candidates(folder / "candidates.parquet")}
    if not all(row.prompt_id in prompts for row in scored):
        pytest.skip("the dataset's own prompts are not in prompts.parquet")
    items = [(prompts[row.prompt_id].token_ids, answers[row.prompt_id, row.index].token_ids) for row in scored]
    start, end = (direct(outcome.folder(arm, index) / "policy", items) for index in (1, 2))
    for row, before, after in zip(scored, start, end, strict=True):
        assert row.start_logprobs == pytest.approx(before, abs=1e-4)
        assert row.end_logprobs == pytest.approx(after, abs=1e-4)
    for role, place in (("chosen", 0), ("rejected", 1)):
        moved = [math.fsum(b) - math.fsum(a) for a, b in zip(start[place::2], end[place::2], strict=True)]
        found = outcome.metrics(arm, 2)["off_policy"]["displacement"][role]["mean"]
        assert found == pytest.approx(sum(moved) / len(moved), abs=1e-3)
        assert abs(found) > 1e-3
    assert outcome.metrics(arm, 2)["off_policy"]["implicit_accuracy"]["mean"] > 0.5  # on what it was trained on


@pytest.mark.parametrize("arm", ARMS)
def test_held_out_figures(outcome: Outcome, arm: str) -> None:
    for index in (0, 1, 2, 3):
        held_out = outcome.metrics(arm, index)["held_out"]
        rows = read_held_out(outcome.folder(arm, index) / "held_out.parquet")
        assert held_out["gold"]["mean"] == sum(len(row.candidate.text.split()) for row in rows) / len(rows)
        tokens = [logprob for row in rows for logprob in row.candidate.logprobs]
        assert held_out["entropy"] == pytest.approx(-sum(tokens) / len(tokens))
        assert 0 <= held_out["self_bleu"] <= 1
        assert (held_out["gold_change"] is None) == (index == 0)


def test_human_pairs_rank_as_a_direct_pass_ranks_them(outcome: Outcome, small_model: Path) -> None:
    """Seven of the eight whose prompts are held out; for every arm the same, under the policy and under π₀."""
    from online_dpo.human_pairs import read_given_pairs

    pairs = read_given_pairs(outcome.root / "human_pairs.parquet")
    assert len(pairs) == 7
    items = [(pair.prompt.token_ids, answer.token_ids) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    sums = [math.fsum(row) for row in direct(small_model, items)]
    for arm in ARMS:
        rows = read_human_pairs(outcome.folder(arm, 3) / "human_pairs.parquet")
        assert [row.initial_chosen_logprob for row in rows] == pytest.approx(sums[::2], abs=1e-3)
        assert [row.initial_rejected_logprob for row in rows] == pytest.approx(sums[1::2], abs=1e-3)
        right = [row.chosen_logprob > row.rejected_logprob for row in rows]
        found = outcome.metrics(arm, 3)["held_out"]["human_pairs"]
        assert found["ranking_accuracy"]["mean"] == sum(right) / len(right)
    held_out = {prompt.token_ids for prompt in read_prompts(outcome.root / "prompts.parquet")["held_out"]}
    assert {pair.prompt.token_ids for pair in pairs} <= held_out
    assert outcome.metrics("offline", 3)["held_out"]["human_pairs"]["implicit_accuracy"]["mean"] > 0.5
