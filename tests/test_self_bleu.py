"""Self-BLEU by hand: Papineni's BLEU-4 of each text against the others, smoothed and averaged."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.self_bleu import AT_MOST, self_bleu


def test_texts_that_are_all_the_same_and_texts_without_a_common_word() -> None:
    assert self_bleu(["the cat sat down"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0


def test_two_texts_by_hand() -> None:
    """`a b c d` against `a b c e`: precisions 3/4, 2/3, 1/2 and none of one, which counts as 0.1: the fourth root of
    0.025. The other way round it is the same."""
    assert self_bleu(["a b c d", "A B C e"]) == pytest.approx(0.025**0.25)


def test_a_shorter_text_is_penalised_by_the_reference_nearest_in_length() -> None:
    """`a b`, `a b c d e f`, `a b c`. Of `a b`: precisions 1 and 1, nearest length 3: e^(1 − 3/2). Of `a b c`: 1, 1, 1
    (it is in the long one), nearest length 2, so no penalty. Of the long one: 3/6, 2/5, 1/4 and 0.1/3; nearest is 3,
    shorter, so no penalty."""
    long = (3 / 6 * 2 / 5 * 1 / 4 * 0.1 / 3) ** 0.25
    assert self_bleu(["a b", "a b c d e f", "a b c"]) == pytest.approx((math.exp(-0.5) + 1 + long) / 3)


def test_a_repeated_word_counts_as_often_as_one_reference_has_it() -> None:
    """`a a a a` against `a a b`: 2 of 4 words, 1 of 3 pairs, none of two or of one longer: no penalty. `a a b` against
    it: 2 of 3, 1 of 2, 0.1 of 1, length 3 beside 4. Had the others' counts been added up, a third text `a` would let
    a third word match: it does not."""
    first = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    second = math.exp(1 - 4 / 3) * (2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 3)
    assert self_bleu(["a a a a", "a a b"]) == pytest.approx((first + second) / 2)
    third = 1.0 * math.exp(1 - 3 / 1)
    # The nearest in length to `a a b` stays `a a a a`; to `a` it is `a a b`.
    assert self_bleu(["a a a a", "a a b", "a"]) == pytest.approx((first + second + third) / 3)


def test_of_two_references_equally_near_the_shorter_counts() -> None:
    """`a b c` between `a b` and `a b c d`: no penalty; all of its n-grams are in the longer one."""
    low = math.exp(1 - 3 / 2)
    high = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert self_bleu(["a b", "a b c", "a b c d"]) == pytest.approx((low + 1 + high) / 3)


def test_texts_without_a_word_are_left_out() -> None:
    assert math.isnan(self_bleu([]))
    assert math.isnan(self_bleu(["a b", "", "  \n"]))
    assert self_bleu(["a b", " ", "a b"]) == pytest.approx(1.0)


def test_of_many_texts_equal_places_are_drawn_for_equal_seeds() -> None:
    """Of 250 texts the first half is all alike: a draw of a hundred sees about fifty of them, another seed others."""
    texts = ["the very same words"] * 125 + [f"w{i} x{i} y{i} z{i}" for i in range(125)]
    assert self_bleu(texts) == self_bleu(texts)
    found = [self_bleu(texts, seed) for seed in range(5)]
    assert len(set(found)) > 1
    assert all(0.3 < one < 0.7 for one in found)
    # A text counts as 1 or 0 here, so the figure says that a hundred were drawn.
    assert all(one * AT_MOST == pytest.approx(round(one * AT_MOST)) for one in found)


@given(st.lists(st.text("ab \n", max_size=12), max_size=6))
def test_it_lies_between_0_and_1_whatever_the_order(texts: list[str]) -> None:
    found = self_bleu(texts)
    assert math.isnan(found) == (sum(bool(text.split()) for text in texts) < 2)
    assert math.isnan(found) or 0 <= found <= 1 + 1e-12
    assert self_bleu(texts[::-1]) == pytest.approx(found, nan_ok=True)
