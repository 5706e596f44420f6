"""What a run would do, before it does anything: pairs, steps, tokens and disk an arm, and how the arms differ."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.budget import arm_budget
from online_dpo.config import ArmSettings, Experiment, flatten
from online_dpo.evaluate_stage import held_out_sampling
from online_dpo.rounds import averaging
from online_dpo.runs import Resolved
from online_dpo.source_spec import source_kind

BYTES_A_STORED_TOKEN = 8
"""A token id (int32) and its log-prob (float32), before compression."""


@dataclass(frozen=True, slots=True)
class ArmPlan:
    """Upper bounds for one arm at one seed, over all its rounds. Tokens are completion tokens, disk is bytes."""

    arm: str
    rounds: int
    candidates: int
    pairs: int
    steps: int
    sampled_tokens: int
    judged: int
    disk: int
    loss: str


def plan_arms(resolved: Resolved) -> list[ArmPlan]:
    """The plan of every arm. Pairs are the most that the rule can make: ties and margins leave fewer."""
    experiment = resolved.experiment
    policy_bytes = policy_size(experiment, resolved.model.path)
    return [_plan_arm(experiment, name, len(resolved.prompts.held_out), policy_bytes) for name in experiment.arms]


def _plan_arm(experiment: Experiment, name: str, held_out: int, policy_bytes: int) -> ArmPlan:
    arm = experiment.arm(name)
    budget = arm_budget(experiment, name, held_out)
    initial_tokens = held_out * held_out_sampling(experiment, arm).max_tokens
    kept = arm.rounds if experiment.keep == "all" else min(arm.rounds, 2)
    kept += averages_kept(experiment, arm) + blocks_kept(arm)
    return ArmPlan(
        arm=name,
        rounds=arm.rounds,
        **budget._asdict(),
        disk=kept * policy_bytes + (budget.sampled_tokens - initial_tokens) * BYTES_A_STORED_TOKEN,
        loss=arm.describe_objective(),
    )


def averages_kept(experiment: Experiment, arm: ArmSettings) -> int:
    """What averaged references take at most on disk, in policies: round t's holds the t − 1 adapters it is made of."""
    if averaging(arm) is None:
        return 0
    sizes = [1 if experiment.lora is None else t - 1 for t in range(2, arm.rounds + 1)]
    return sum(sizes if experiment.keep == "all" else sizes[-2:])


def blocks_kept(arm: ArmSettings) -> int:
    """What a round that is made in blocks holds for a while beside its policy, in policies: two blocks' weights with
    AdamW's two moments of each, the one that is trained and the one that it goes on from."""
    return 5 if source_kind(arm.source) == "every_steps" else 0


def policy_size(experiment: Experiment, path: Path) -> int:
    """Bytes of one saved policy: all parameters in float32, or a LoRA adapter's matrices (bounded by two-dimensional
    weights other than embeddings and head)."""
    shapes = tensor_shapes(path)
    if experiment.lora is None:
        return 4 * sum(_count(shape) for shape in shapes.values())
    rank = experiment.lora.rank
    adapted = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and not any(part in name for part in ("embed", "head", "wte", "wpe"))
    ]
    return 4 * sum(rank * sum(shape) for shape in adapted)


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a folder's safetensors files, from their headers alone."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(length))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def differences(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Dotted key -> arm -> value, for every setting that is not the same in all arms."""
    flat = {name: flatten(experiment.arm(name).model_dump(mode="json")) for name in experiment.arms}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    table = {key: {name: settings.get(key) for name, settings in flat.items()} for key in keys}
    return {key: values for key, values in table.items() if len({repr(value) for value in values.values()}) > 1}
