"""The prediction: every arm's stages, their sum over arms, seeds and rounds, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich.filesize import decimal

from online_dpo.config import Experiment
from online_dpo.planner.disk import ArmDisk, arm_disk
from online_dpo.planner.work import INITIAL, STAGES, Rates, RoundWork, round_work


class Speeds(Protocol):
    """Where seconds come from."""

    def seconds(self, stage: str, work: RoundWork) -> float | None:
        """Of `stage` in a round like `work`; None: not known."""


@dataclass(frozen=True, slots=True)
class ArmPrediction:
    """One arm at one seed. `stages`: seconds of each stage of a round (None: not known), the initial policy's
    evaluation too, which comes once. Tokens are a round's."""

    arm: str
    rounds: int
    stages: Mapping[str, float | None]
    work: RoundWork
    disk: ArmDisk

    @property
    def round_seconds(self) -> float:
        """All stages of a round that are known."""
        return sum(self.stages[stage] or 0.0 for stage in STAGES)

    @property
    def seconds(self) -> float:
        """All rounds, and the evaluation before them."""
        return (self.stages[INITIAL] or 0.0) + self.rounds * self.round_seconds

    @property
    def sampled_tokens(self) -> float:
        """All rounds, and the initial policy's held-out answers."""
        return self.rounds * self.work.sampled_tokens + self.work.held_out * self.work.reply

    @property
    def trained_tokens(self) -> float:
        """All rounds."""
        return self.rounds * self.work.trained_tokens


@dataclass(frozen=True, slots=True)
class ProcessNeed:
    """`count` processes that need so many bytes each at their peak."""

    process: str
    count: int
    bytes: float


@dataclass(frozen=True)
class Place:
    """Where it runs: bytes of memory (of each GPU, or of the machine) and of disk; None: not known."""

    memory: float | None
    disk: float | None
    each: bool = False
    """Whether `memory` is each process's own."""


@dataclass(frozen=True)
class Prediction:
    """`said`: where the figures come from, lines for the screen. `start_s`: of no stage (programs are
    loaded, processes started and ended), and what the first round takes more than others."""

    arms: Sequence[ArmPrediction]
    seeds: int
    needs: Sequence[ProcessNeed]
    place: Place
    said: Sequence[str]
    start_s: float = 0.0
    warnings: Sequence[str] = field(default_factory=tuple)

    @property
    def seconds(self) -> float:
        """Arms × seeds × rounds, one after the other; the evaluation of the initial policy is all arms' at a seed."""
        first = max((arm.stages[INITIAL] or 0.0 for arm in self.arms), default=0.0)
        rounds = sum(arm.rounds * arm.round_seconds for arm in self.arms)
        return self.start_s + self.seeds * (first + rounds)

    @property
    def kept_bytes(self) -> float:
        """On disk at the end."""
        return self.seeds * sum(arm.disk.kept for arm in self.arms)

    @property
    def most_bytes(self) -> float:
        """On disk at most: the last arm at work, the others done."""
        extra = max((arm.disk.most - arm.disk.kept for arm in self.arms), default=0.0)
        return self.kept_bytes + max(0.0, extra)

    def does_not_fit(self) -> list[str]:
        """A line for each thing that there is too little of."""
        lines = list(self.warnings)
        memory, disk = self.place.memory, self.place.disk
        if memory is not None:
            lines += self._memory_lines(memory)
        if disk is not None and self.most_bytes > disk:
            lines.append(
                f"disk: {decimal(int(self.most_bytes))} at most, {decimal(int(disk))} are free; "
                "keep: last keeps one policy an arm"
            )
        return lines

    def _memory_lines(self, memory: float) -> list[str]:
        if self.place.each:
            return [
                f"memory: the {need.process} needs {decimal(int(need.bytes))}, a GPU has {decimal(int(memory))}"
                for need in self.needs
                if need.bytes > memory
            ]
        wanted = sum(need.count * need.bytes for need in self.needs)
        if wanted <= memory:
            return []
        return [f"memory: {decimal(int(wanted))} in all, the machine has {decimal(int(memory))}"]


def predict_arms(
    experiment: Experiment, held_out: int, rates: Rates, speeds: Speeds, policy: int, beside: Mapping[str, float]
) -> list[ArmPrediction]:
    """Every arm. `policy`: bytes of one; `beside`: by arm, what a round writes beside it."""
    found = []
    for name in experiment.arms:
        work = round_work(experiment, name, held_out, rates)
        found.append(
            ArmPrediction(
                arm=name,
                rounds=experiment.arm(name).rounds,
                stages={stage: speeds.seconds(stage, work) for stage in (INITIAL, *STAGES)},
                work=work,
                disk=arm_disk(experiment, name, policy, beside[name]),
            )
        )
    return found
