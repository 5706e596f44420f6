"""What was found, in plain English."""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.compare.comparison import Difference, Measure
from online_dpo.display import interval, number
from online_dpo.measure import Interval

UNITS: dict[Measure, str] = {"reward": "reward", "gold": "gold reward", "equal_kl": "reward at equal KL"}
NAMES: dict[Measure, str] = {
    "reward": "reward",
    "gold": "gold reward",
    "win_rate": "win rate",
    "length_controlled": "length-controlled win rate",
    "equal_kl": "reward at equal KL",
}
SHOWN = 3
"""Differences named in one sentence."""


def sentence_of(one: Difference) -> str:
    """One difference: the verdict, the figure with its interval, what it rests on, and what would decide it."""
    if one.prompts < 2:
        return f"inconclusive: {one.a} against {one.b} by {NAMES[one.measure]}: too few prompts were scored"
    if one.verdict == "inconclusive":
        return f"inconclusive: {one.a} against {one.b} {amount(one)} ({basis(one)}); {needed(one)}"
    return f"{one.a} is {one.verdict} than {one.b} {_by(one)} ({basis(one)})"


def verdict_sentence(differences: Sequence[Difference], measure: Measure) -> str:
    """The answer: of all differences by `measure`, which are decided, and who comes out first."""
    found = [one for one in differences if one.measure == measure]
    decided = [one for one in found if one.verdict != "inconclusive"]
    if len(found) == 1:
        return found[0].sentence
    if not decided:
        nearest = min(found, key=lambda one: (one.p, -abs(one.interval.mean)))
        rest = nearest.sentence.removeprefix("inconclusive: ")
        return f"inconclusive by {NAMES[measure]}: none of {len(found)} differences is decided; the clearest: {rest}"
    first = _first(found)
    if first is not None:
        ranked = sorted((one for one in found if first in (one.a, one.b)), key=lambda one: abs(_gap(one)))
        others = len(ranked)
        return f"{first} is better than all {others} others by {NAMES[measure]}; than the nearest: {ranked[0].sentence}"
    named = "; ".join(one.sentence for one in sorted(decided, key=lambda one: one.p)[:SHOWN])
    is_or_are = "is" if len(decided) == 1 else "are"
    more = f"; and {len(decided) - SHOWN} more" if len(decided) > SHOWN else ""
    return f"{len(decided)} of {len(found)} differences by {NAMES[measure]} {is_or_are} decided: {named}{more}"


def amount(one: Difference) -> str:
    """`0.120 [0.050, 0.190] reward`, or `wins on 62 % [55, 69] of prompts`."""
    if one.measure in UNITS:
        return f"{interval(one.interval.as_dict(), sign=True)} {_unit(one)}"
    return f"wins on {percent(one.interval)} of prompts{_controlled(one)}"


def basis(one: Difference) -> str:
    """The p-value and what it rests on."""
    name = "Holm p" if one.family > 1 else "p"
    size = f"{one.prompts} prompts × {one.seeds} seeds" if one.seeds > 1 else f"{one.prompts} prompts, this seed only"
    return f"{name} {p_value(one.p_corrected)}; {size}"


def needed(one: Difference) -> str:
    """What would decide it."""
    found = ways(one)
    if not found:
        alone = "prompts, or of seeds," if one.seeds > 1 else "prompts"
        return f"no number of {alone} alone would decide a difference of this size"
    return f"about {' or '.join(found)} would decide it, if the difference is what it seems (80 % power)"


def ways(one: Difference) -> list[str]:
    """`140 more prompts`, `1 more seed`: each of them alone."""
    counts = ((one.more_prompts, "prompt"), (one.more_seeds, "seed"))
    return [f"{rounded(count)} more {noun}{'' if count == 1 else 's'}" for count, noun in counts if count is not None]


def p_value(p: float) -> str:
    """`= 0.004`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {number(p, places=3 if p < 0.1 else 2)}"


def rounded(count: int) -> str:
    """A count rounded up to two digits: more would promise more than is known."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // step) * step:,}"


def percent(one: Interval) -> str:
    """`62 % [55, 69]`."""
    low, high = (number(100 * bound, places=0) for bound in (one.low, one.high))
    return f"{number(100 * one.mean, places=0)} % [{low}, {high}]"


def _by(one: Difference) -> str:
    if one.measure not in UNITS:
        return f"and {amount(one)}"
    found = one.interval
    if found.mean < 0:
        found = Interval(-found.mean, -found.high, -found.low, found.n)
    return f"by {interval(found.as_dict())} {_unit(one)}"


def _unit(one: Difference) -> str:
    """`gold reward`, `reward at equal KL (3.2 nats)`."""
    return UNITS[one.measure] + ("" if one.kl is None else f" ({number(one.kl, places=2)} nats)")


def _controlled(one: Difference) -> str:
    return " were answers equally long" if one.measure == "length_controlled" else ""


def _first(differences: Sequence[Difference]) -> str | None:
    """The arm that is better than every other one; None where there is none."""
    won = [one.a if one.verdict == "better" else one.b for one in differences if one.verdict != "inconclusive"]
    arms = {name for one in differences for name in (one.a, one.b)}
    return next((name for name in won if won.count(name) == len(arms) - 1), None)


def _gap(one: Difference) -> float:
    return one.interval.mean if one.measure in UNITS else one.interval.mean - 0.5
