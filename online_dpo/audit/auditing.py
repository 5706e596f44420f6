"""How far a judge can be trusted: its agreement with people, its calibration, and what it is swayed by.

`audit_labelled` asks the judge about pairs that people have judged; `audit_candidates` about a round's sample, where
nobody knows the truth but much can be seen all the same. Intervals are 95 %, over prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from online_dpo.audit import calibration, intervals
from online_dpo.audit.asking import Advance, Cost, Said, ask, pairs_of
from online_dpo.audit.calibration import Calibration
from online_dpo.audit.intervals import Floats, Groups
from online_dpo.judging import AskedJudge, Item
from online_dpo.measure import Interval, mean_interval
from online_dpo.preferences import Preference, as_comparison, group_of
from online_dpo.types import Candidate

LengthUnit = Literal["characters", "words", "tokens"]
Rows = Sequence[Sequence[float | None]]
FORMAT = 1


@dataclass(frozen=True, slots=True)
class LengthBias:
    """What length has to do with the judge's verdicts, on the pairs that it judged.

    `spearman`, `pearson`: correlation of score with length; on labelled pairs, of the differences of the two answers,
    each pair in both orders; on candidates, within each prompt, then averaged over prompts.
    `longer_preferred`: how often the judge prefers the longer of two answers of different length, ties one half.
    The others need labels. `longer_accuracy`: "the longer answer wins" as a judge, on the same pairs;
    `judge_minus_longer`: the judge's accuracy less that, paired; `accuracy_longer_worse` and `accuracy_longer_better`:
    the judge's accuracy where people chose the shorter and the longer answer.
    `longest_first`: how often the longest candidate of a prompt is ranked first (equals share the place), beside
    `longest_first_by_chance`, one over the number of candidates.
    """

    unit: LengthUnit
    spearman: Interval
    pearson: Interval
    longer_preferred: Interval
    longer_accuracy: Interval | None = None
    judge_minus_longer: Interval | None = None
    accuracy_longer_worse: Interval | None = None
    accuracy_longer_better: Interval | None = None
    longest_first: Interval | None = None
    longest_first_by_chance: float | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two judges on the pairs that both judged: better, worse or tie.

    `kappa`: Cohen's κ, agreement beyond chance; `same`: the share of equal verdicts; `spearman`: correlation of
    their scores as in `LengthBias`; `accuracy_difference`: this judge's accuracy less the other's (labels only).
    """

    judge: str
    kappa: Interval
    same: Interval
    spearman: Interval
    accuracy_difference: Interval | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """All that was found. None stands for what does not exist: a judge that scores has no order to be swayed by.

    `accuracy`: share of judged pairs on which the judge prefers the chosen answer, ties one half; abstentions are
    left out and counted in `abstained`, a share of all pairs. `ties`: share of judged pairs. `flips`: share of pairs
    answered in both orders in which the verdict went with the place; `flips_to_first`: of these, to the first place.
    `intransitive`: share of cycles (a over b over c over a) among triples of one prompt's candidates without a tie;
    chance is ¼. `points`: of each judged pair, in the order longer less shorter: difference in length, difference in
    score, and whether the judge was right (NaN: tie, or no label); they are drawn, not stored.
    """

    kind: Literal["labelled", "candidates"]
    judge: str
    source: str
    compares: bool
    pairs: int
    prompts: int
    accuracy: Interval | None
    calibration: Calibration | None
    calibration_log_odds: Calibration | None
    ties: Interval
    abstained: Interval
    abstain_reasons: dict[str, int]
    flips: Interval | None
    flips_to_first: Interval | None
    intransitive: Interval | None
    length: LengthBias
    agreement: Agreement | None
    cost: Cost
    seed: int
    points: Floats = field(repr=False, compare=False)
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: intervals as {mean, low, high, n}, None for what does not exist."""
        found: dict[str, Any] = _plain(self)
        del found["points"]
        return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """Pairs as they were asked, one row a pair: their prompt as a number, lengths, and where the label points.

    `label`: 1 where people chose the first, −1 where the second; 0 without labels.
    """

    items: Sequence[Item]
    groups: Groups
    length: Floats
    label: Floats


def audit_labelled(
    asked: AskedJudge,
    preferences: Sequence[Preference],
    *,
    against: AskedJudge | None = None,
    unit: LengthUnit = "characters",
    source: str = "",
    seed: int = 0,
    advance: Advance | None = None,
) -> Audit:
    """Audit on pairs of which people chose one; figures are the same whatever the order of `preferences`.

    The judge sees the two answers in an order that follows from their texts, with indices to match: nothing tells it
    which one was chosen. `advance` gets the number of pairs just done, for each judge. `seed` is the bootstrap's.
    Raises `JudgeError` where asking does.
    """
    rows = sorted((_row(preference) for preference in preferences), key=lambda row: row[0])
    items = [item for _, item, _ in rows]
    names = np.array([key[0] for key, _, _ in rows], dtype=np.str_)
    pairs = _Asked(
        items,
        np.unique(names, return_inverse=True)[1],
        _length_differences(items, unit),
        np.array([label for _, _, label in rows], dtype=np.float64),
    )
    return _audit("labelled", asked, pairs, against, unit, source, seed, advance)


def audit_candidates(
    asked: AskedJudge,
    items: Sequence[Item],
    *,
    against: AskedJudge | None = None,
    unit: LengthUnit = "tokens",
    source: str = "",
    seed: int = 0,
    advance: Advance | None = None,
) -> Audit:
    """Audit on prompts with their candidates, all of whose pairs are looked at; one item a prompt.

    A judge that compares is asked for all pairs whatever its schedule; its scores are the strengths that follow.
    `advance` gets the number of pairs just done, for each judge. Raises `JudgeError` where asking does.
    """
    ordered = sorted(items, key=lambda item: item[0].id)
    groups = np.array([number for number, _, _ in pairs_of(ordered)], dtype=np.int64)
    pairs = _Asked(ordered, groups, _length_differences(ordered, unit), np.zeros(groups.size))
    return _audit("candidates", asked, pairs, against, unit, source, seed, advance)


def _audit(
    kind: Literal["labelled", "candidates"],
    asked: AskedJudge,
    pairs: _Asked,
    against: AskedJudge | None,
    unit: LengthUnit,
    source: str,
    seed: int,
    advance: Advance | None,
) -> Audit:
    said = ask(asked, pairs.items, advance)
    other = None if against is None else ask(against, pairs.items, advance)
    labelled = kind == "labelled"
    judged, groups = said.judged, pairs.groups
    stated, log_odds = _calibrations(asked, pairs, said, seed) if labelled else (None, None)
    return Audit(
        kind=kind,
        judge=asked.name,
        source=source,
        compares=asked.pairwise,
        pairs=groups.size,
        prompts=intervals.prompts_of(groups),
        accuracy=intervals.rate(_right(pairs, said)[judged], groups[judged]) if labelled else None,
        calibration=stated,
        calibration_log_odds=log_odds,
        ties=intervals.rate(said.difference[judged] == 0, groups[judged]),
        abstained=intervals.rate(~judged, groups),
        abstain_reasons=said.reasons,
        flips=_share_of(said.swapped, groups),
        flips_to_first=_share_of(said.to_first, groups),
        intransitive=_cycles(pairs, said) if asked.pairwise else None,
        length=_labelled_length(pairs, said, unit, seed) if labelled else _candidates_length(pairs, said, unit, seed),
        agreement=None
        if against is None or other is None
        else _agreement(against.name, pairs, said, other, labelled, seed),
        cost=said.cost,
        seed=seed,
        points=_points(pairs, said),
    )


# --- the pairs ---


def _row(preference: Preference) -> tuple[tuple[str, ...], Item, float]:
    """Sort key, the question, and the label. Key and question are the same if chosen and rejected change places."""
    prompt, chosen, rejected = as_comparison(preference)
    answers = sorted((chosen, rejected), key=lambda answer: _order_key(answer.text))
    label = 1.0 if answers[0] is chosen else -1.0
    placed = [dataclasses.replace(answer, index=index) for index, answer in enumerate(answers)]
    return (group_of(preference), *(answer.text for answer in placed), preference.id), (prompt, placed), label


def _order_key(text: str) -> bytes:
    """Sorts by nothing that a judge could make use of."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def length_in(unit: LengthUnit, candidate: Candidate) -> int:
    """A candidate's length: characters without white space at the ends, words between white space, or tokens."""
    if unit == "tokens":
        return len(candidate.token_ids)
    text = candidate.text.strip()
    return len(text.split()) if unit == "words" else len(text)


def _length_differences(items: Sequence[Item], unit: LengthUnit) -> Floats:
    lengths = [[length_in(unit, candidate) for candidate in candidates] for _, candidates in items]
    return np.array([lengths[number][i] - lengths[number][j] for number, i, j in pairs_of(items)], dtype=np.float64)


def _right(pairs: _Asked, said: Said) -> Floats:
    """1 where the judge prefers the chosen answer, ½ at a tie, 0 else, NaN where it abstained."""
    found: Floats = (1 + np.sign(said.difference) * pairs.label) / 2
    return found


def _points(pairs: _Asked, said: Said) -> Floats:
    """(length, score, right) of each judged pair, longer less shorter (shape (judged, 3))."""
    turn = np.where(pairs.length < 0, -1.0, 1.0)
    right = np.sign(said.difference) * pairs.label
    found: Floats = np.stack(
        [turn * pairs.length, turn * said.difference, np.where(right == 0, math.nan, right > 0)], axis=1
    )[said.judged]
    return found


# --- the figures ---


def _share_of(values: Floats, groups: Groups) -> Interval | None:
    """The rate of what is not NaN; None where everything is."""
    there = ~np.isnan(values)
    return intervals.rate(values[there], groups[there]) if there.any() else None


def _calibrations(
    asked: AskedJudge, pairs: _Asked, said: Said, seed: int
) -> tuple[Calibration | None, Calibration | None]:
    """(as the judge states it, or by a fitted temperature; scores taken as log-odds)."""
    chosen = (said.difference * pairs.label)[said.judged]
    groups = pairs.groups[said.judged]
    if asked.pairwise:
        return calibration.stated(0.5 + chosen, groups, seed), None
    return calibration.with_temperature(chosen, groups, seed), calibration.as_log_odds(chosen, groups, seed)


def _labelled_length(pairs: _Asked, said: Said, unit: LengthUnit, seed: int) -> LengthBias:
    judged = said.judged
    groups, length, right = pairs.groups[judged], pairs.length[judged], _right(pairs, said)[judged]
    longer_right = (1 + np.sign(length) * pairs.label[judged]) / 2
    worse, better = longer_right == 0, longer_right == 1
    return LengthBias(
        unit=unit,
        spearman=intervals.spearman(said.difference[judged], length, groups, seed),
        pearson=intervals.pearson(said.difference[judged], length, groups, seed),
        longer_preferred=_longer_preferred(pairs, said),
        longer_accuracy=intervals.rate(longer_right, groups),
        judge_minus_longer=intervals.mean(right - longer_right, groups, seed),
        accuracy_longer_worse=intervals.rate(right[worse], groups[worse]),
        accuracy_longer_better=intervals.rate(right[better], groups[better]),
    )


def _candidates_length(pairs: _Asked, said: Said, unit: LengthUnit, seed: int) -> LengthBias:
    lengths = [[float(length_in(unit, one)) for one in candidates] for _, candidates in pairs.items]
    longest, chance = _longest_first(said.scores, lengths)
    return LengthBias(
        unit=unit,
        spearman=_within_prompts(said.scores, lengths, seed, ranks=True),
        pearson=_within_prompts(said.scores, lengths, seed, ranks=False),
        longer_preferred=_longer_preferred(pairs, said),
        longest_first=intervals.rate(longest, np.arange(len(longest))),
        longest_first_by_chance=float(np.mean(chance)) if chance else None,
    )


def _longer_preferred(pairs: _Asked, said: Said) -> Interval:
    some = said.judged & (pairs.length != 0)
    return intervals.rate((1 + np.sign(said.difference * pairs.length)[some]) / 2, pairs.groups[some])


def _within_prompts(one: Rows, other: Rows, seed: int, *, ranks: bool) -> Interval:
    """The mean over prompts of the correlation of two lists of scores; prompts where one does not vary have none."""
    from scipy.stats import rankdata

    found = []
    for left, right in zip(one, other, strict=True):
        both = np.array([(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None])
        if len(both) < 2 or (both == both[0]).all(axis=0).any():
            continue
        columns = rankdata(both, axis=0) if ranks else both
        found.append(float(np.corrcoef(columns, rowvar=False)[0, 1]))
    return mean_interval(found, seed=seed)


def _longest_first(scores: Rows, lengths: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Of each prompt with two scored candidates: the share of the first place that the longest hold, and by chance."""
    held, chance = [], []
    for row, length in zip(scores, lengths, strict=True):
        known = [(score, size) for score, size in zip(row, length, strict=True) if score is not None]
        if len(known) < 2:
            continue
        best, most = max(score for score, _ in known), max(size for _, size in known)
        first = [size == most for score, size in known if score == best]
        held.append(sum(first) / len(first))
        chance.append(sum(size == most for _, size in known) / len(known))
    return held, chance


def _cycles(pairs: _Asked, said: Said) -> Interval | None:
    """The share of cycles among triples whose three comparisons are decided; None without such a triple."""
    wins: dict[tuple[int, int, int], bool] = {
        place: bool(difference > 0)
        for place, difference in zip(pairs_of(pairs.items), said.difference, strict=True)
        if not math.isnan(difference) and difference != 0
    }
    found, groups = [], []
    for number, (_, candidates) in enumerate(pairs.items):
        for i, j, k in itertools.combinations(range(len(candidates)), 3):
            sides = [wins.get((number, *place)) for place in ((i, j), (j, k), (i, k))]
            if None not in sides:
                # i over j over k over i, or the same backwards: (i, k) goes the other way than the other two.
                found.append(sides[0] == sides[1] != sides[2])
                groups.append(number)
    return intervals.rate(found, groups) if found else None


def _agreement(name: str, pairs: _Asked, said: Said, other: Said, labelled: bool, seed: int) -> Agreement:
    both = said.judged & other.judged
    groups, one, two = pairs.groups[both], said.verdicts[both], other.verdicts[both]
    spearman, accuracy = None, None
    if labelled:
        spearman = intervals.spearman(said.difference[both], other.difference[both], groups, seed)
        accuracy = intervals.mean((_right(pairs, said) - _right(pairs, other))[both], groups, seed)
    return Agreement(
        judge=name,
        kappa=intervals.kappa(one, two, groups, seed),
        same=intervals.rate(one == two, groups),
        spearman=spearman or _within_prompts(said.scores, other.scores, seed, ranks=True),
        accuracy_difference=accuracy,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {**value.as_dict(), "n": value.n}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
