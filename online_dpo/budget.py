"""What an arm may spend at most, by its settings alone: answers, judge calls, pairs, steps, tokens."""

from __future__ import annotations

from typing import NamedTuple

from online_dpo.config import ArmSettings, Experiment, PairingSpec
from online_dpo.evaluate_stage import held_out_sampling
from online_dpo.source_spec import Source, SourceSpec


class Budget(NamedTuple):
    """Upper bounds for one arm at one seed, over all its rounds: ties and margins leave fewer pairs.

    `candidates` are the answers sampled for training; `judged` and `sampled_tokens` (completion tokens) count the
    held-out answers too.
    """

    candidates: int
    judged: int
    pairs: int
    steps: int
    sampled_tokens: int


class _Gathered(NamedTuple):
    """What one round's source brings."""

    sampled: int
    judged: int
    pairs: int


def arm_budget(experiment: Experiment, name: str, held_out: int) -> Budget:
    """The budget of arm `name` where there are `held_out` held-out prompts."""
    arm = experiment.arm(name)
    prompts = experiment.prompts.per_round
    sampled, judged, pairs = _gathered(experiment, arm, arm.source, prompts)
    rows = prompts if arm.algorithm == "rloo" else pairs
    steps = arm.dpo.epochs * -(-rows // arm.dpo.batch_size)
    measured = (arm.rounds + 1) * held_out
    answers = measured * held_out_sampling(experiment, arm).max_tokens
    return Budget(
        candidates=arm.rounds * sampled,
        judged=arm.rounds * judged + measured * (1 if experiment.evaluation.gold is None else 2),
        pairs=arm.rounds * pairs,
        steps=arm.rounds * steps,
        sampled_tokens=arm.rounds * sampled * arm.sampling.max_tokens + answers,
    )


def _gathered(experiment: Experiment, arm: ArmSettings, source: Source, prompts: int) -> _Gathered:
    fresh = prompts * arm.sampling.n
    paired = _capped(prompts * most_pairs(arm.pairing, arm.sampling.n), arm.pairing)
    if not isinstance(source, SourceSpec):
        return _Gathered(fresh, fresh, paired)
    if source.mixture is not None:
        parts = [_gathered(experiment, arm, part.source, round(part.share * prompts)) for part in source.mixture]
        return _Gathered(*(sum(values) for values in zip(*parts, strict=True)))
    if source.dataset is not None:
        return _Gathered(0, 2 * prompts if source.relabel else 0, _capped(prompts, arm.pairing))
    if source.spin is not None:
        rivals = arm.sampling.n if arm.pairing.rule == "all_pairs" else 1
        return _Gathered(fresh, 0, _capped(prompts * rivals, arm.pairing))
    if source.stream is not None:
        return _streamed(experiment, arm, source, prompts)
    return _Gathered(fresh, fresh, paired)


def _capped(pairs: int, pairing: PairingSpec) -> int:
    return pairs if pairing.max_pairs is None else min(pairs, pairing.max_pairs)


def _streamed(experiment: Experiment, arm: ArmSettings, source: SourceSpec, prompts: int) -> _Gathered:
    """Another arm's pairs; of an arm of another run, whose settings are not here, this arm's own count."""
    other = experiment.arm(source.stream) if source.stream in experiment.arms else arm
    theirs = _gathered(experiment, other, "current" if other is arm else other.source, prompts)
    if source.take == "pairs":
        return _Gathered(0, 0, theirs.pairs)
    mine = _gathered(experiment, arm.model_copy(update={"sampling": other.sampling}), "current", prompts)
    return _Gathered(0, mine.judged, mine.pairs)


def most_pairs(pairing: PairingSpec, n: int) -> int:
    """The most pairs that a rule makes of n candidates of one prompt."""
    if pairing.rule == "all_pairs":
        return n * (n - 1) // 2
    if pairing.rule == "top_k":
        return min(pairing.k, n // 2)
    return min(1, n // 2)
