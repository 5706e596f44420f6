"""The project's own prompts: enough of them, well formed, and no two alike."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

PATH = Path(__file__).parents[1] / "experiments" / "prompts" / "reviews.jsonl"
ROWS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def grams(text: str) -> set[tuple[str, ...]]:
    """The word 3-grams of `text`."""
    words = re.findall(r"[\w'-]+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def test_rows_are_well_formed() -> None:
    for row in ROWS:
        assert set(row) == {"id", "prompt"}
        assert re.fullmatch(r"(film|product|travel)-\d{3}", row["id"])
        assert row["prompt"] == row["prompt"].strip()
        assert 12 <= len(row["prompt"].split()) <= 40, row
        assert "sentence" in row["prompt"], row


def test_there_are_enough_of_each_kind() -> None:
    kinds = Counter(row["id"].split("-")[0] for row in ROWS)
    assert len(ROWS) >= 240
    assert min(kinds.values()) >= 80


def test_no_two_are_the_same() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert len({row["prompt"].lower() for row in ROWS}) == len(ROWS)


def test_no_two_are_nearly_the_same() -> None:
    """The overlap is shared 3-grams over those of the shorter prompt; a template with one noun changed is above ½."""
    named = [(row["id"], grams(row["prompt"])) for row in ROWS]
    overlaps = {
        (first, second): len(a & b) / min(len(a), len(b))
        for (first, a), (second, b) in itertools.combinations(named, 2)
    }
    worst = max(overlaps, key=overlaps.__getitem__)
    assert overlaps[worst] < 0.5, worst


def test_openings_vary() -> None:
    """No opening of three words begins more than one prompt in ten."""
    openings = Counter(" ".join(row["prompt"].lower().split()[:3]) for row in ROWS)
    assert openings.most_common(1)[0][1] <= len(ROWS) / 10
