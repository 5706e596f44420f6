"""Self-BLEU: how much the answers to different prompts repeat each other (Zhu et al. 2018, Texygen)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = 4
"""BLEU-4: n-grams of one to four words."""
SMOOTHING = 0.1
"""What an order without a single match counts as, in matches (method 1 of Chen and Cherry 2014)."""
AT_MOST = 100
"""Answers compared with each other: more would make figures of runs of different size differ by size alone."""

Grams = Counter[tuple[str, ...]]


def self_bleu(texts: Sequence[str], seed: int = 0) -> float:
    """The mean BLEU-4 of each text against all others as its references: 1 = every text is in the others, 0 = no word.

    Words are what white space separates, in lower case. Of more than `AT_MOST` texts so many are drawn; equal numbers
    of texts and equal seeds draw the same places. Texts without a word are left out. NaN with fewer than two texts.
    """
    drawn = np.random.default_rng(seed).permutation(len(texts))[:AT_MOST]
    words = [found for place in drawn.tolist() if (found := texts[place].lower().split())]
    if len(words) < 2:
        return math.nan
    grams = [[_grams(one, n) for one in words] for n in range(1, ORDERS + 1)]
    matched = [_matches(own) for own in grams]
    lengths = [len(one) for one in words]
    scores = []
    for place, length in enumerate(lengths):
        # A text shorter than four words has no longer n-grams to be judged by.
        precisions = [(matched[n][place], length - n) for n in range(min(ORDERS, length))]
        others = lengths[:place] + lengths[place + 1 :]
        scores.append(_bleu(precisions, length, min(others, key=lambda other: (abs(other - length), other))))
    return math.fsum(scores) / len(scores)


def _bleu(precisions: Sequence[tuple[int, int]], length: int, reference: int) -> float:
    """BLEU of (matches, n-grams) by order, and of a text's length beside that of the reference nearest in length.

    Papineni et al. 2002: exp(min(0, 1 − reference/length)) · the geometric mean of the precisions. Without a word in
    common 0; orders above that without a match count `SMOOTHING` matches.
    """
    if not precisions[0][0]:
        return 0.0
    logs = [math.log((matches or SMOOTHING) / grams) for matches, grams in precisions]
    return math.exp(min(0.0, 1 - reference / length) + math.fsum(logs) / len(logs))


def _matches(texts: Sequence[Grams]) -> list[int]:
    """How many of each text's n-grams the others have: each counted as often as it is in one of them at most.

    The two largest counts of an n-gram are enough: what others have at most is the largest, or the second for the text
    that has the largest itself.
    """
    largest: Counter[tuple[str, ...]] = Counter()
    second: Counter[tuple[str, ...]] = Counter()
    for own in texts:
        for gram, count in own.items():
            second[gram] = max(second[gram], min(count, largest[gram]))
            largest[gram] = max(largest[gram], count)
    return [
        sum(min(count, second[gram] if count == largest[gram] else largest[gram]) for gram, count in own.items())
        for own in texts
    ]


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
