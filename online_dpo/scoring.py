"""The learner's log-probs of answers that are there already, a part at a time, so that a person sees how far it is."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.arms import Arm
from online_dpo.types import Candidate, Policy, Prompt

SCORED_AT_ONCE = 32
"""Answers a call: enough to batch well, few enough to show progress."""


def score_answers(arm: Arm, label: str, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
    """Per-token log-probs of each answer under `policy`, nats, by the learner's own forward."""
    arm.run.rest_engine()
    logprobs: list[list[float]] = []
    arm.run.progress.start(f"{arm.label} · {label}", len(items), "answers")
    for start in range(0, len(items), SCORED_AT_ONCE):
        scored = arm.run.learner.score(policy, items[start : start + SCORED_AT_ONCE])
        logprobs.extend(scored)
        arm.run.progress.advance(len(scored))
    arm.run.progress.finish()
    return logprobs
