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
    """What one round's source brings: `answers` are those that are paired, sampled or given."""

    answers: int
    sampled: int
    judged: int
    pairs: int


def arm_budget(experiment: Experiment, name: str, held_out: int) -> Budget:
    """The budget of arm `name` where there are `held_out` held-out prompts."""
    arm = experiment.arm(name)
    prompts = experiment.prompts.per_round
    _, sampled, judged, pairs = _gathered(experiment, arm, arm.source, prompts)
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
    n = arm.sampling.n
    if not isinstance(source, SourceSpec) or source.kind not in ("mixture", "dataset", "spin", "stream"):
        return _Gathered(prompts * n, prompts * n, prompts * n, _paired(arm, prompts, n))
    if source.mixture is not None:
        parts = [_gathered(experiment, arm, part.source, round(part.share * prompts)) for part in source.mixture]
        whole = _Gathered(*(sum(values) for values in zip(*parts, strict=True)))
        return whole._replace(pairs=_within(arm, whole.pairs))
    if source.stream is not None:
        return _streamed(experiment, arm, source, prompts)
    if source.spin is not None:
        # The answer beats every sample; samples tie with each other.
        beaten = n if arm.pairing.rule == "all_pairs" else 1
        return _Gathered(prompts * (n + 1), prompts * n, 0, _within(arm, prompts * beaten))
    return _Gathered(2 * prompts, 0, 2 * prompts if source.relabel else 0, _paired(arm, prompts, 2))


def _streamed(experiment: Experiment, arm: ArmSettings, source: SourceSpec, prompts: int) -> _Gathered:
    """Another arm's pairs or answers; of an arm of another run, whose settings are not here, this arm's count."""
    if source.stream in experiment.arms:
        other = experiment.arm(source.stream)
        theirs = _gathered(experiment, other, other.source, prompts)
    else:
        theirs = _gathered(experiment, arm, "current", prompts)
    if source.take == "pairs":
        return theirs._replace(sampled=0, judged=0)
    pairs = _paired(arm, prompts, theirs.answers // prompts if prompts else 0)
    return _Gathered(theirs.answers, 0, theirs.answers, pairs)


def _paired(arm: ArmSettings, prompts: int, answers: int) -> int:
    """The most pairs of so many answers to each prompt."""
    return _within(arm, prompts * most_pairs(arm.pairing, answers))


def _within(arm: ArmSettings, pairs: int) -> int:
    return pairs if arm.pairing.max_pairs is None else min(pairs, arm.pairing.max_pairs)


def most_pairs(pairing: PairingSpec, n: int) -> int:
    """The most pairs that a rule makes of n candidates of one prompt."""
    if pairing.rule == "all_pairs":
        return n * (n - 1) // 2
    if pairing.rule == "top_k":
        return min(pairing.k, n // 2)
    return min(1, n // 2)
