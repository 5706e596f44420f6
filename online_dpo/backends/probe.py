"""Does an engine hold the weights it should? Its log-probs on a fixed probe must be the learner's."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.errors import EngineError
from online_dpo.types import Policy

TOLERANCE = {"float32": 5e-4, "bfloat16": 0.1, "float16": 0.05}
"""Nats per token, mean over the probe. Rounding stays far below (float32: 5e-5 a token at most, measured)."""


def check_probe(policy: Policy, found: Sequence[float], dtype: str, before: Policy | None = None) -> float:
    """The largest |engine − learner| over the probe's tokens, nats.

    Raises `EngineError` when the engine samples from other weights than `policy`'s, so that whatever it sampled
    would be labelled with the wrong source: the mean difference is beyond the dtype's tolerance, or the engine is
    nearer to the policy that it held `before` (a small learning rate moves a probe by less than any tolerance).
    """
    if policy.probe is None:
        raise EngineError(f"policy {policy.id} carries no probe to check the engine's weights against")
    off = mean_gap(found, policy.probe.logprobs)
    if not off <= TOLERANCE[dtype]:
        raise EngineError(
            f"the engine does not hold the weights of {policy.id}: on the probe its log-probs are off by "
            f"{off:.4f} nats a token (allowed {TOLERANCE[dtype]}); nothing was sampled"
        )
    if before is not None and before.probe is not None and before.digest != policy.digest:
        moved = mean_gap(before.probe.logprobs, policy.probe.logprobs)
        if mean_gap(found, before.probe.logprobs) < off and moved > 1e-5:
            raise EngineError(f"the engine still holds {before.id}, not {policy.id}; nothing was sampled")
    return max(abs(mine - theirs) for mine, theirs in zip(found, policy.probe.logprobs, strict=True))


def mean_gap(found: Sequence[float], expected: Sequence[float]) -> float:
    """Mean |difference| of two equally long rows of log-probs, nats a token; infinite when the lengths differ."""
    if len(found) != len(expected) or not found:
        return float("inf")
    return sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(found)
