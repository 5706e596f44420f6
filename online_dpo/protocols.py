"""What the loop needs of an engine, a learner and a progress display. The backends implement these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from online_dpo.config import DPOSpec, RlooSpec, SamplingSpec
from online_dpo.types import Candidate, Group, Pair, Policy, Probe, Prompt


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """`sampling.n` candidates are asked of the engine for `prompt`; candidate i uses `seeds[i]`."""

    prompt: Prompt
    seeds: tuple[int, ...]


class Engine(Protocol):
    """Generates. Holds exactly one policy at a time; changes it in place."""

    kind: str

    def load(self, policy: Policy) -> float:
        """Take `policy`'s weights and check them against its probe.

        Returns the largest absolute difference (nats per token) on the probe.
        Raises `EngineError` when the engine does not hold the weights it should.
        """

    def sample(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Iterator[list[Candidate]]:
        """Yield the candidates of one prompt at a time, in any order of prompts."""

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Per-token log-probs of each (context token ids, continuation token ids) under the policy it holds.

        One value a continuation token, nats. Neither part may be empty.
        """

    def rest(self) -> None:
        """Leave the accelerator to the learner until the next call (nothing to do where they share none)."""

    def notes(self) -> list[str]:
        """What a person should know of the work since the last call: lines, mostly none."""


@dataclass(frozen=True, slots=True)
class RoundPart:
    """A block of a round that is trained on by itself: the job's units in `steps` optimiser steps.

    The round has made `first` steps before. The learning rate is that of the steps `first`, `first` + 1, … of `total`.
    `begin`: the folder with the optimiser's state that the last block left; None: a fresh optimiser. `end`: the folder
    that this block's is left in; None: no other block goes on from it.
    """

    first: int
    steps: int
    total: int
    begin: Path | None = None
    end: Path | None = None


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One round's training: `policy` on `pairs` against `reference`.

    With `rloo` it is on `groups` instead; of `dpo` the optimiser's keys are read, `batch_size` counting prompts.
    With `answers` (token ids of prompts and answers) it is supervised fine-tuning on these, and nothing else is read.
    `source` sampled all answers of the pairs, and their stored log-probs are its own; None where several policies did,
    or people: then the stored ones serve nothing that needs the reference's.

    The trained policy is saved into the folder `out` as `policy_id`. `seed`: of the order of the pairs and of fresh
    adapters. `folders`: where a loss of the user's own lies. `cache`: the file with log-probs of references.
    `checkpoint`: the folder that a long round's state is kept in, None for none. `part`: which part of a round it is;
    None: all of it.
    """

    policy: Policy
    reference: Policy
    source: Policy | None
    pairs: tuple[Pair, ...]
    dpo: DPOSpec
    policy_id: str
    out: Path
    seed: int
    folders: tuple[Path, ...] = ()
    cache: Path | None = None
    checkpoint: Path | None = None
    groups: tuple[Group, ...] = ()
    rloo: RlooSpec | None = None
    answers: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    part: RoundPart | None = None

    @property
    def drawn_from_reference(self) -> bool:
        """Whether the answers' stored log-probs are the reference's."""
        return self.source is not None and self.source.digest == self.reference.digest


@dataclass(frozen=True, slots=True)
class TrainStep:
    """What one optimiser step reports, before its update: means over the step's pairs, answers or prompts.

    Of pairs: `margin` is β(r_w − r_l), `accuracy` the share with margin > 0 (ties half), `r_w` and `r_l` the log-ratios
    against the reference (nats a sequence): chosen falling is the sign of off-policy pairs. Of groups: `reward`, the
    judge's mean score, and `kl`, an estimate of KL(π‖π_ref): the mean of log(π/π_ref) over their answers by their
    weights (nats a sequence). None where a step has no such figure. `tokens` counts what was computed, with prompts.
    """

    step: int
    steps: int
    loss: float
    margin: float | None
    accuracy: float | None
    grad_norm: float
    lr: float
    r_w: float | None
    r_l: float | None
    tokens: int
    seconds: float
    reward: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class TrainStart:
    """What is known before the first step.

    `engine_gap_token`/`engine_gap_sequence`: largest |stored − learner| log-prob difference per token and per sequence
    on a sample of the pairs, at the source's own weights; None where no one policy sampled them. `reference_from` says
    where the reference's log-probs came from: "engine" (stored at sampling), "cache" (computed before), "learner" (one
    pass without gradients) or "none" (a loss without a reference).
    """

    reference_from: str
    engine_gap_token: float | None
    engine_gap_sequence: float | None


class Learner(Protocol):
    """Trains. Keeps one model in memory and its workers alive between rounds."""

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        """Do `job`.

        Yields one `TrainStart`, a `TrainStep` per optimiser step, and last the saved `Policy`. A job that a checkpoint
        has the beginning of yields the steps that were done again, as they were.
        Raises `TrainingError` on a non-finite loss or gradient; nothing is saved then.
        """

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        """Per-token log-probs of each completion under `policy`, completion tokens only."""

    def probe(self, policy: Policy, token_ids: Sequence[int]) -> Probe:
        """The probe of `policy` on `token_ids`, by the learner's own forward."""

    def rest(self) -> None:
        """Leave the accelerator to the engine until the next call (nothing to do where they share none)."""


class Progress(Protocol):
    """Where the loop tells how far it is. Implemented by `online_dpo.display`."""

    def start(self, label: str, total: int, unit: str) -> None:
        """A stage of `total` units begins."""

    def advance(self, amount: int, note: str = "") -> None:
        """`amount` more units of the current stage are done."""

    def finish(self) -> None:
        """The current stage is done."""

    def say(self, line: str) -> None:
        """One line for the person who watches."""

    def beside(self) -> Progress:
        """Where another thread tells of stages that go on at the same time. What it shows ends with this display."""
