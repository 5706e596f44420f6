"""How much work a round of an arm is, by the experiment alone."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.budget import arm_budget, most_pairs
from online_dpo.config import ArmSettings, Experiment
from online_dpo.evaluate_stage import held_out_sampling
from online_dpo.source_spec import source_kind

GIVEN = ("dataset", "stream")
"""Sources that sample nothing."""
STAGES = ("sample", "judge", "audit", "pair", "train", "off_policy", "evaluate")
"""A round's stages in their order. `INITIAL` stands for the initial policy's evaluation, before the first round."""
INITIAL = "initial"


@dataclass(frozen=True, slots=True)
class Rates:
    """What is not known before answers are there. `prompt`: mean tokens of a prompt. `answer`, `held_out`: how much of
    its most tokens a mean answer fills. `kept`: pairs made, of the most that the rule can make."""

    prompt: float
    answer: float = 1.0
    held_out: float = 1.0
    kept: float = 1.0


@dataclass(frozen=True, slots=True)
class RoundWork:
    """One round. `prompts` are sampled from, `n` answers each, of `answer` tokens on average and `longest` at most.

    `judged` answers are shown to the judge, `audited` again. `units` (pairs, or groups) of `unit_answers` answers each
    are trained on `epochs` times, `batch` a step. `own_reference`: what the engine stored is the reference's.
    `scored` pairs are scored by `scorers` policies afterwards. `held_out` prompts have one answer each, of `reply`
    tokens on average and `longest_reply` at most, scored by `readers` policies that did not write it.
    """

    prompts: int
    n: int
    prompt: float
    answer: float
    longest: int
    judged: int
    audited: int
    units: int
    unit_answers: int
    epochs: int
    batch: int
    own_reference: bool
    scored: int
    scorers: int
    held_out: int
    reply: float
    longest_reply: int
    readers: int

    @property
    def sampled(self) -> int:
        """Answers sampled for training."""
        return self.prompts * self.n

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.epochs * -(-self.units // self.batch)

    @property
    def unit_tokens(self) -> float:
        """Tokens computed of a pair: its prompt once, its answers."""
        return self.prompt + self.unit_answers * self.answer

    @property
    def trained_tokens(self) -> float:
        """Tokens that training computes, over all epochs."""
        return self.epochs * self.units * self.unit_tokens

    @property
    def sampled_tokens(self) -> float:
        """Tokens of all answers of the round, held-out ones too."""
        return self.sampled * self.answer + self.held_out * self.reply


def round_work(experiment: Experiment, name: str, held_out: int, rates: Rates) -> RoundWork:
    """A round of arm `name` with `held_out` held-out prompts: one of its later ones, since the first may be less."""
    arm = experiment.arm(name)
    kind = source_kind(arm.source)
    budget = arm_budget(experiment, name, held_out)
    judges = 1 if experiment.evaluation.gold is None else 2
    grouped, moving = arm.algorithm == "rloo", arm.reference == "prior"
    units = experiment.prompts.per_round if grouped else _pairs(experiment, arm, budget.pairs // arm.rounds, rates.kept)
    longest_reply = held_out_sampling(experiment, arm).max_tokens
    return RoundWork(
        prompts=budget.candidates // arm.rounds // arm.sampling.n,
        n=arm.sampling.n,
        prompt=rates.prompt,
        answer=rates.answer * arm.sampling.max_tokens,
        longest=arm.sampling.max_tokens,
        judged=(budget.judged - (arm.rounds + 1) * held_out * judges) // arm.rounds,
        audited=min(experiment.audit.prompts, experiment.prompts.per_round) * arm.sampling.n if kind != "stream" else 0,
        units=units,
        unit_answers=arm.sampling.n if grouped else 1 if arm.dpo.chosen_alone else 2,
        epochs=arm.dpo.epochs,
        batch=arm.dpo.batch_size,
        own_reference=moving and kind in ("current", "refresh_when"),
        scored=min(experiment.evaluation.off_policy, units),
        scorers=2 if moving else 3,
        held_out=held_out,
        reply=rates.held_out * longest_reply,
        longest_reply=longest_reply,
        readers=2 if moving else 1,
    )


def _pairs(experiment: Experiment, arm: ArmSettings, most: int, kept: float) -> int:
    """Ties and margins leave the share `kept` of what prompts could give; then `pairing.max_pairs` cuts."""
    if source_kind(arm.source) != "current":
        return round(most * kept)
    possible = experiment.prompts.per_round * most_pairs(arm.pairing, arm.sampling.n)
    return min(most, round(possible * kept))


def training_passes(*, lora: bool, checkpointing: bool) -> int:
    """What a trained token costs, in forwards: one forward, two back, of which frozen weights (LoRA) need one; and one
    more where activations are computed again."""
    return (2 if lora else 3) + checkpointing


def stage_units(work: RoundWork, passes: int) -> dict[str, float]:
    """What each stage's seconds grow with: tokens sampled, answers judged, tokens computed by the learner, and so on.

    `observed` counts the same of what was done.
    """
    reference = 0.0 if work.own_reference else work.units * work.unit_tokens
    return {
        "sample": work.sampled * work.answer,
        "judge": float(work.judged),
        "audit": float(work.audited),
        "pair": float(work.judged),
        "train": passes * work.trained_tokens + reference,
        "off_policy": work.scored * work.scorers * (work.prompt + 2 * work.answer),
        "evaluate": work.held_out * work.reply,
        INITIAL: work.held_out * work.reply,
    }
