"""What the stages of a run took and how much work they were: from the records in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from online_dpo.config import Experiment
from online_dpo.evaluate_stage import held_out_sampling
from online_dpo.planner.measured import Point
from online_dpo.planner.work import INITIAL, STAGES, Rates, round_work, training_passes
from online_dpo.records import read_prompts
from online_dpo.store import RoundFolder, RunStore, StageRecord

WEIGHTS = ("policy", "reference", "blocks")
"""Folders in a round's folder that hold weights."""


@dataclass
class Observed:
    """Of a run: (units, seconds) by stage, what `Rates` are made of, and bytes of a round beside its weights with the
    answers in it."""

    points: dict[str, list[Point]] = field(default_factory=lambda: {stage: [] for stage in (INITIAL, *STAGES)})
    prompt: float = 0.0
    answers: list[float] = field(default_factory=list)
    replies: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    round_bytes: list[Point] = field(default_factory=list)

    @property
    def rates(self) -> Rates:
        """Means over the rounds; 1 where there is nothing to go by."""
        shares = [mean(values) if values else 1.0 for values in (self.answers, self.replies, self.kept)]
        return Rates(self.prompt, *shares)

    def add(self, other: Observed) -> None:
        """Take what was seen of another run of the same prompts and model."""
        for stage, points in other.points.items():
            self.points[stage] += points
        self.prompt = self.prompt or other.prompt
        self.answers += other.answers
        self.replies += other.replies
        self.kept += other.kept
        self.round_bytes += other.round_bytes


def observe(store: RunStore, *, first_round: int = 1, seeds: Sequence[int] | None = None) -> Observed:
    """What the run in `store` took, stage by stage, from round `first_round` on, at all seeds or `seeds`. Stages taken
    over from another arm took no time."""
    experiment = store.experiment
    found = Observed()
    prompts = read_prompts(store.root / "prompts.parquet")
    found.prompt = mean(len(prompt.token_ids) for prompt in prompts["train"])
    for name in experiment.arms:
        for seed in experiment.seeds if seeds is None else seeds:
            for index in range(experiment.arm(name).rounds + 1):
                folder = store.round(name, seed, index)
                if folder.closed and (index == 0 or index >= first_round):
                    _observe_round(found, experiment, name, folder)
    return found


def _observe_round(found: Observed, experiment: Experiment, name: str, folder: RoundFolder) -> None:
    arm = experiment.arm(name)
    records = dict(_records(folder))
    units = _units(experiment, name, folder, records, found.prompt)
    for stage, record in records.items():
        if record.reused_from is None and stage in units:
            row = INITIAL if folder.index == 0 else stage
            found.points[row].append((units[stage], record.seconds))
    reply = records["evaluate"].info
    longest = held_out_sampling(experiment, arm).max_tokens
    found.replies.append(reply["tokens"] / reply["candidates"] / longest)
    if folder.index == 0:
        return
    sample = records["sample"].info
    if sample["tokens"]:
        found.answers.append(sample["tokens"] / sample["candidates"] / arm.sampling.max_tokens)
        most = round_work(experiment, name, reply["candidates"], Rates(found.prompt)).units
        if "pair" in records and most:
            found.kept.append(min(1.0, records["pair"].info["kept"] / most))
    if not any(record.reused_from for record in records.values()):
        found.round_bytes.append((sample["candidates"] + reply["candidates"], _bytes_beside_weights(folder.path)))


def _records(folder: RoundFolder) -> Iterator[tuple[str, StageRecord]]:
    for stage in STAGES:
        record = folder.done(stage)
        if record is not None:
            yield stage, record


def _units(
    experiment: Experiment, name: str, folder: RoundFolder, records: Mapping[str, StageRecord], prompt: float
) -> dict[str, float]:
    """`work.stage_units` of what was done."""
    arm = experiment.arm(name)
    info: dict[str, Any] = {stage: record.info for stage, record in records.items()}
    units = {"evaluate": float(info["evaluate"]["tokens"])}
    if folder.index == 0:
        return units
    units["sample"] = float(info["sample"]["tokens"])
    units["judge"] = units["pair"] = float(info["judge"]["verdicts"] + info["judge"]["abstained"])
    if "audit" in info:
        units["audit"] = float(info["audit"]["prompts"] * arm.sampling.n)
    if "train" in info:
        tokens = info["train"]["tokens"]
        once = tokens / arm.dpo.epochs
        reference = once if info["train"]["reference_from"] == "learner" else 0.0
        units["train"] = passes_of(experiment) * tokens + reference
        if "off_policy" in info and info["pair"].get("kept"):
            policies = 2 if arm.reference == "prior" or folder.index == 1 else 3
            units["off_policy"] = info["off_policy"]["pairs"] * policies * once / info["pair"]["kept"]
    return units


def passes_of(experiment: Experiment) -> int:
    """`work.training_passes` of an experiment."""
    return training_passes(lora=experiment.lora is not None, checkpointing=experiment.learner.activation_checkpointing)


def _bytes_beside_weights(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if path.relative_to(folder).parts[0] not in WEIGHTS)
