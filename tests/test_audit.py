"""The audit's figures against numbers derived by hand, its symmetries, and the known figures of real pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.length import LengthJudge
from online_dpo.audit.auditing import Audit, audit_candidates, audit_labelled
from online_dpo.config import ComparingSpec
from online_dpo.judging import (
    Abstention,
    AskedJudge,
    Asking,
    Item,
    Judge,
    PairwiseJudge,
    PointwiseJudge,
    Score,
    VerdictCache,
)
from online_dpo.preferences import Preference, load_preferences, longer_wins
from online_dpo.types import Candidate, Message, Prompt


class Says(PairwiseJudge):
    """prefer(first, second) from a table of texts."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.table = table

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        value: Score = self.table[f"{first.text} {second.text}"]
        return value


class Scores(PointwiseJudge):
    """A score a text; None where there is none."""

    def __init__(self, table: dict[str, float]) -> None:
        self.table = table

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        return [self.table.get(candidate.text) for candidate in candidates]


class FirstPlace(PointwiseJudge):
    """Likes whatever stands first, and says so by place or by index."""

    def __init__(self, by_index: bool) -> None:
        self.by_index = by_index

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        return [-float(one.index if self.by_index else place) for place, one in enumerate(candidates)]


def asked(judge: Judge, name: str = "judge", **asking: Any) -> AskedJudge:
    return AskedJudge(judge, name, digest="d" if asking else "", asking=Asking(**asking))


def pair(name: str, chosen: str, rejected: str, prompt: str | None = None) -> Preference:
    return Preference(name, (Message("user", prompt or f"prompt {name}"),), chosen, rejected)


def item(name: str, *texts: str) -> Item:
    return Prompt(name, (Message("user", name),), (1,)), [
        Candidate(name, i, text, tuple(range(len(text))), (), "stop", i) for i, text in enumerate(texts)
    ]


def both(a: str, b: str, there: Any, back: Any) -> dict[str, Any]:
    return {f"{a} {b}": there, f"{b} {a}": back}


PAIRS = [
    pair("1", "aaaa", "bb"),
    pair("2", "c", "ddd"),
    pair("3", "e", "fff"),
    pair("4", "g", "h"),
    pair("5", "i", "j"),
]
TABLE = {
    **both("aaaa", "bb", 0.9, 0.2),
    **both("c", "ddd", 0.8, 0.7),
    **both("e", "fff", 0.3, 0.5),
    **both("g", "h", 0.5, 0.5),
    **both("i", "j", 0.9, Abstention("busy")),
}


@pytest.fixture(scope="module")
def five() -> Audit:
    return audit_labelled(asked(Says(TABLE)), PAIRS)


# --- labelled pairs ---


def test_accuracy_ties_and_abstentions_by_hand(five: Audit) -> None:
    """P(chosen) is (0.9 + 1 − 0.2)/2 = 0.85, (0.8 + 1 − 0.7)/2 = 0.55, (0.3 + 1 − 0.5)/2 = 0.4, ½, and an abstention:
    right, right, wrong, a tie: (1 + 1 + 0 + ½)/4."""
    assert five.accuracy is not None
    assert (five.accuracy.mean, five.accuracy.n) == (0.625, 4)
    assert (five.ties.mean, five.ties.n) == (0.25, 4)
    assert (five.abstained.mean, five.abstained.n) == (0.2, 5)
    assert five.abstain_reasons == {"busy": 1}
    assert (five.pairs, five.prompts) == (5, 5)


def test_flips_by_hand(five: Audit) -> None:
    """Of the four pairs with both orders only (c, ddd) was won by the same place twice, the first."""
    assert five.flips is not None
    assert five.flips_to_first is not None
    assert (five.flips.mean, five.flips.n) == (0.25, 4)
    assert (five.flips_to_first.mean, five.flips_to_first.n) == (1.0, 1)


def test_stated_probabilities_are_scored_by_hand(five: Audit) -> None:
    """(0.15² + 0.45² + 0.6² + 0.5²)/4 = 0.20875."""
    assert five.calibration is not None
    assert five.calibration.source == "stated"
    assert five.calibration.brier.mean == pytest.approx(0.20875)
    assert five.calibration_log_odds is None


def test_length_figures_by_hand(five: Audit) -> None:
    """P − ½ of the chosen answer is d = (0.35, 0.05, −0.1, 0), its length less the other's l = (2, −2, −2, 0).

    r = Σdl/√(Σd² Σl²) = 0.8/√(0.135·12). Mid-ranks in both orders, less their mean: of d (3.5, 1.5, −2.5, 0), of l
    (2.5, −2.5, −2.5, 0): ρ = 11.25/√(20.75·18.75). "Longer wins" is right on 1, 0, 0, ½ of the four: 0.375.
    """
    length = five.length
    assert length.pearson.mean == pytest.approx(0.8 / math.sqrt(0.135 * 12))
    assert length.spearman.mean == pytest.approx(11.25 / math.sqrt(20.75 * 18.75))
    assert (length.longer_preferred.mean, length.longer_preferred.n) == pytest.approx((2 / 3, 3))
    assert length.longer_accuracy is not None
    assert length.judge_minus_longer is not None
    assert (length.longer_accuracy.mean, length.judge_minus_longer.mean) == (0.375, 0.25)
    assert length.accuracy_longer_worse is not None
    assert length.accuracy_longer_better is not None
    assert (length.accuracy_longer_worse.mean, length.accuracy_longer_worse.n) == (0.5, 2)
    assert (length.accuracy_longer_better.mean, length.accuracy_longer_better.n) == (1.0, 1)


def test_agreement_by_hand() -> None:
    """Another judge, by scores: right, wrong, wrong, a tie, none. Verdicts by chosen answer: this one (+, +, −, 0),
    the other (+, −, −, 0): the same on 3 of 4, κ as in the test of `kappa`: 13/21; accuracies 0.625 and 0.375."""
    scores = {"aaaa": 2.0, "bb": 1.0, "c": 0.0, "ddd": 5.0, "e": 0.0, "fff": 1.0, "g": 3.0, "h": 3.0, "i": 1.0}
    found = audit_labelled(asked(Says(TABLE)), PAIRS, against=asked(Scores(scores), "other")).agreement
    assert found is not None
    assert found.judge == "other"
    assert (found.same.mean, found.same.n) == (0.75, 4)
    assert found.kappa.mean == pytest.approx(13 / 21)
    assert found.accuracy_difference is not None
    assert found.accuracy_difference.mean == pytest.approx(0.25)


def test_scores_have_no_order_and_get_a_temperature() -> None:
    scores = {"aaaa": 2.0, "bb": 1.0, "c": 0.0, "ddd": 5.0, "e": 0.0, "fff": 1.0, "g": 3.0, "h": 3.0}
    found = audit_labelled(asked(Scores(scores)), PAIRS)
    assert found.flips is found.flips_to_first is found.intransitive is None
    assert found.abstain_reasons == {"judge declined": 1}
    assert found.calibration is not None
    assert found.calibration_log_odds is not None
    assert found.calibration.source == "temperature"
    odds = [1.0, -5.0, -1.0, 0.0]
    assert found.calibration_log_odds.brier.mean == pytest.approx(np.mean([1 / (1 + math.exp(x)) ** 2 for x in odds]))


@pytest.mark.parametrize("by_index", [False, True], ids=["place", "index"])
def test_nothing_tells_the_judge_which_answer_was_chosen(by_index: bool) -> None:
    """A judge that always takes the first of 400 is right on about half: 4 standard errors are 0.1."""
    pairs = [pair(str(number), f"chosen {number}", f"rejected {number}") for number in range(400)]
    found = audit_labelled(asked(FirstPlace(by_index)), pairs)
    assert found.accuracy is not None
    assert 0.4 < found.accuracy.mean < 0.6


def test_judge_that_always_abstains_and_no_pairs_at_all() -> None:
    silent = audit_labelled(asked(Scores({})), PAIRS)
    assert silent.abstained.mean == 1.0
    empty = audit_labelled(asked(Scores({})), [])
    for found in (silent, empty):
        assert found.calibration is None
        text = found.as_dict()
        assert text["accuracy"] == {"mean": None, "low": None, "high": None, "n": 0}
        json.dumps(text, allow_nan=False)


class Hashed(PointwiseJudge):
    """A score that follows from the text, with many ties."""

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        return [float(sum(one.text.encode()) % 5) for one in candidates]


rows = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=4), st.text("abc", min_size=1, max_size=4), st.integers(0, 3)),
    min_size=2,
    max_size=15,
)


@settings(max_examples=15, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_neither_order_of_rows_nor_naming_matters(found: list[tuple[str, str, int]], random: Any) -> None:
    """Rows in another order change nothing; chosen and rejected in each other's place turn accuracy around alone."""
    pairs = [pair(str(number), a, b, f"prompt {group}") for number, (a, b, group) in enumerate(found) if a != b]
    plain = audit_labelled(asked(Hashed()), pairs)
    mixed = audit_labelled(asked(Hashed()), random.sample(pairs, len(pairs)))
    assert _figures(mixed) == _figures(plain)
    turned = audit_labelled(
        asked(Hashed()), [pair(one.id, one.rejected, one.chosen, one.messages[0].content) for one in pairs]
    )
    assert plain.accuracy is not None
    assert turned.accuracy is not None
    if pairs:
        expected = [1 - plain.accuracy.mean, 1 - plain.accuracy.high, 1 - plain.accuracy.low]
        assert [turned.accuracy.mean, turned.accuracy.low, turned.accuracy.high] == pytest.approx(expected)
    for key in ("ties", "abstained"):
        assert turned.as_dict()[key] == plain.as_dict()[key]
    for key in ("spearman", "pearson", "longer_preferred"):
        assert turned.as_dict()["length"][key] == plain.as_dict()["length"][key]


def _figures(audit: Audit) -> dict[str, Any]:
    """All but the seconds, rounded: sums in another order differ in the last digit."""
    found = audit.as_dict()
    del found["cost"]
    text: dict[str, Any] = json.loads(json.dumps(found), parse_float=lambda number: round(float(number), 9))
    return text


def test_cache_is_asked_first_and_counted(tmp_path: Path) -> None:
    with VerdictCache(tmp_path / "verdicts.sqlite") as cache:
        fresh = audit_labelled(asked(Says(TABLE), cache=cache), PAIRS)
        again = audit_labelled(asked(Says(TABLE), cache=cache), PAIRS)
    assert fresh.cost.ledger == {"asked": 10}
    assert fresh.cost.seconds_per_pair is not None
    assert again.cost.ledger == {"cached": 10}
    assert again.cost.seconds_per_pair is None
    assert _figures(again) == _figures(fresh)


def test_what_was_asked_before_is_not_the_audits() -> None:
    judge = asked(Says(TABLE))
    judge.comparisons([item("p", "g", "h")])
    assert audit_labelled(judge, PAIRS).cost.ledger == {"asked": 10}


def test_progress_counts_every_pair() -> None:
    steps: list[int] = []
    audit_labelled(asked(Says(TABLE)), PAIRS, advance=steps.append)
    assert sum(steps) == 5
    steps.clear()
    audit_candidates(asked(Scores({})), [item("p", "a", "b", "c"), item("q", "a", "b")], advance=steps.append)
    assert sum(steps) == 4


# --- candidates ---


def wins(*order: str) -> dict[str, Any]:
    """ "a>b" and "a=b" as a table of probabilities."""
    table: dict[str, Any] = {}
    for text in order:
        a, sign, b = tuple(text)
        table |= both(a, b, 0.9, 0.1) if sign == ">" else both(a, b, 0.5, 0.5)
    return table


@pytest.mark.parametrize("cycle", [("a>b", "b>c", "c>a"), ("b>a", "c>b", "a>c")])
def test_intransitive_triples_by_hand(cycle: tuple[str, ...]) -> None:
    """a, b, c go round, d beats a and b and ties with c: abc is a cycle, abd is none, acd and bcd are undecided."""
    table = wins(*cycle, "d>a", "d>b", "d=c")
    found = audit_candidates(asked(Says(table)), [item("p", "a", "b", "c", "d")])
    assert found.intransitive is not None
    assert (found.intransitive.mean, found.intransitive.n) == (0.5, 2)
    assert (found.ties.mean, found.pairs, found.prompts) == pytest.approx((1 / 6, 6, 1))
    assert found.accuracy is None
    assert found.calibration is None


def test_all_pairs_are_compared_whatever_the_schedule() -> None:
    table = wins("a>b", "b>c", "c>a", "d>a", "d>b", "d=c")
    found = audit_candidates(
        asked(Says(table), comparing=ComparingSpec(schedule="knock_out")), [item("p", "a", "b", "c", "d")]
    )
    assert found.cost.ledger["asked"] == 12


def test_no_decided_triple_is_no_share() -> None:
    assert audit_candidates(asked(Says(wins("a>b"))), [item("p", "a", "b")]).intransitive is None


def test_longest_first_and_correlation_within_prompts_by_hand() -> None:
    """p: scores 1, 2, 3 of lengths 1, 2, 3: ρ = r = 1, the longest first. q: scores 5, 4 of lengths 1, 4: −1, not
    first. r: both of length 2: no correlation, the place is theirs. s: one is scored, nothing to rank.
    By chance (1/3 + 1/2 + 1)/3. Longer preferred: three of three in p, none in q, no pair in r: 3/4.
    """
    scores = {"a": 1.0, "bb": 2.0, "ccc": 3.0, "d": 5.0, "eeee": 4.0, "ff": 1.0, "gg": 2.0, "h": 1.0}
    items = [item("p", "a", "bb", "ccc"), item("q", "d", "eeee"), item("r", "ff", "gg"), item("s", "h", "silent")]
    length = audit_candidates(asked(Scores(scores)), items).length
    assert (length.spearman.mean, length.spearman.n) == pytest.approx((0.0, 2))
    assert (length.pearson.mean, length.pearson.n) == pytest.approx((0.0, 2))
    assert length.longest_first is not None
    assert (length.longest_first.mean, length.longest_first.n) == pytest.approx((2 / 3, 3))
    assert length.longest_first_by_chance == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)
    assert (length.longer_preferred.mean, length.longer_preferred.n) == (0.75, 4)


def test_equals_share_the_first_place() -> None:
    """Two of three share the first place, one of them the longest: ½."""
    length = audit_candidates(asked(Scores({"a": 1.0, "bb": 2.0, "ccc": 2.0})), [item("p", "a", "bb", "ccc")]).length
    assert length.longest_first is not None
    assert length.longest_first.mean == 0.5


def test_agreement_of_two_judges_on_candidates_by_hand() -> None:
    """Orders a > b > c and a > c > b: the same on 2 of 3 pairs, ρ = ½; without ties chance is ½: κ = 2·(2/3) − 1."""
    one, other = Scores({"a": 3.0, "b": 2.0, "c": 1.0}), Scores({"a": 30.0, "b": 10.0, "c": 20.0})
    found = audit_candidates(asked(one), [item("p", "a", "b", "c")], against=asked(other, "other")).agreement
    assert found is not None
    assert found.same.mean == pytest.approx(2 / 3)
    assert found.kappa.mean == pytest.approx(1 / 3)
    assert (found.spearman.mean, found.spearman.n) == pytest.approx((0.5, 1))
    assert found.accuracy_difference is None


def test_strengths_rank_what_a_pairwise_judge_compared() -> None:
    """a over b over c, of which c is the longest and b the shortest: ranks (3, 2, 1) against (2, 1, 3), ρ = −½."""
    (prompt, candidates) = item("p", "a", "b", "c")
    sized = [replace(one, token_ids=(0,) * size) for one, size in zip(candidates, (2, 1, 3), strict=True)]
    length = audit_candidates(asked(Says(wins("a>b", "a>c", "b>c"))), [(prompt, sized)]).length
    assert length.unit == "tokens"
    assert length.longest_first is not None
    assert length.longest_first.mean == 0.0
    assert length.spearman.mean == pytest.approx(-0.5)


# --- real pairs ---


@pytest.mark.parametrize(
    ("file", "known"),
    [
        ("tldr-batch13.jsonl", 0.709),
        pytest.param("helpful-base.test.jsonl.gz", 0.600, marks=pytest.mark.slow),
        pytest.param("harmless-base.test.jsonl.gz", 0.445, marks=pytest.mark.slow),
    ],
)
def test_length_alone_reaches_what_is_known_of_real_pairs(file: str, known: float) -> None:
    """The known figures are of the raw rows; a few of these hold no pair, so the third digit may differ."""
    path = SHARED / "pairs" / file
    if not path.is_file():
        pytest.skip("the preference pairs (../shared/data/pairs) are not on this machine")
    pairs = load_preferences(str(path)).pairs
    found = audit_labelled(asked(LengthJudge(unit="characters")), pairs)
    assert found.accuracy is not None
    assert found.accuracy.mean == pytest.approx(longer_wins(pairs).mean)
    assert found.accuracy.mean == pytest.approx(known, abs=0.005)
    assert found.length.judge_minus_longer is not None
    assert (found.length.judge_minus_longer.low, found.length.judge_minus_longer.high) == (0.0, 0.0)
    assert found.length.spearman.mean == pytest.approx(1.0)
    assert found.prompts <= found.pairs
