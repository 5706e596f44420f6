"""What the first step of a round that begins at its reference must show."""

from __future__ import annotations

from online_dpo.config import DPOSpec
from online_dpo.errors import TrainingError
from online_dpo.protocols import TrainStart, TrainStep


def check_first_step(step: TrainStep, start: TrainStart, expected: float, dpo: DPOSpec, tolerance: float) -> None:
    """Policy = reference gives margin 0, and of the plain DPO loss ln 2 (Rafailov 2023 eq. 7 at Δ = 0).

    `expected`: the loss that this arm's objective has at policy = reference. Where the reference's log-probs are the
    engine's, Δ may be off by the gap between engine and learner, twice what a few pairs showed on each side; another
    packing moves float32 by less. The margin is β·Δ, and the plain loss is no steeper in Δ; other losses and some
    modifiers are, so the margin alone is looked at there. A policy whose dropout is on (`dpo.faults.dropout`) is not
    the reference even with its weights: its noise is then the first step's margin, and nothing can be told from it.
    Raises `TrainingError`.
    """
    if dpo.faults.dropout:
        return
    gap = (start.engine_gap_sequence or 0.0) if start.reference_from == "engine" else 0.0
    allowed = dpo.beta * max(4 * gap, 20 * tolerance)
    steeper = dpo.loss != "sigmoid" or dpo.dpop_lambda or dpo.wpo_weight or dpo.importance_clip
    off = not steeper and abs(step.loss - expected) > allowed
    margin = step.margin or 0.0
    if abs(margin) > allowed or off:
        raise TrainingError(
            f"the first step of a fresh round must have loss {expected:.4f} and margin 0, found loss "
            f"{step.loss:.4f} and margin {margin:.4f}: the reference's log-probs are not this policy's"
        )
