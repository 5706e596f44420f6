"""How many bytes a run leaves: policies, and the texts beside them."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.config import Experiment
from online_dpo.plan import averages_kept, blocks_kept
from online_dpo.planner.shape import ModelShape
from online_dpo.planner.work import RoundWork

TOKEN_BYTES = 16
"""Of a token: its number and log-prob (8), its text, and as much again for what evaluation stores beside."""


@dataclass(frozen=True, slots=True)
class ArmDisk:
    """Of one arm at one seed: bytes that a round writes, that are kept in all, and the most that is there at once."""

    round: float
    kept: float
    most: float


def arm_disk(experiment: Experiment, name: str, policy: int, beside: float) -> ArmDisk:
    """`policy`: bytes of a saved policy. `beside`: what a round writes beside it.

    A policy that is given up goes when its round is closed: one more than is kept is there for a while.
    """
    arm = experiment.arm(name)
    policies = arm.rounds if experiment.keep == "all" else 1
    kept = policies + averages_kept(experiment, arm)
    most = kept + blocks_kept(arm) + (0 if experiment.keep == "all" else 2)
    return ArmDisk(policy + beside, kept * policy + arm.rounds * beside, most * policy + arm.rounds * beside)


def policy_bytes(experiment: Experiment, shape: ModelShape) -> int:
    """A saved policy: all parameters in float32, or an adapter's."""
    return 4 * trained_parameters(experiment, shape)


def trained_parameters(experiment: Experiment, shape: ModelShape) -> int:
    """All of them; with LoRA, rank · (rows + columns) of each layer's seven matrices."""
    if experiment.lora is None:
        return shape.parameters
    heads, keys = shape.attention_width, shape.kv_heads * shape.head_size
    sides = 2 * (shape.hidden + heads) + 2 * (shape.hidden + keys) + 3 * (shape.hidden + shape.intermediate)
    return shape.layers * experiment.lora.rank * sides


def text_bytes(work: RoundWork) -> float:
    """What a round writes beside its policy, where it was not measured."""
    return TOKEN_BYTES * (work.sampled_tokens + work.trained_tokens)
