"""A pair as three rows of token ids, and how they travel to contenders in other processes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flops import Lengths


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def lengths(self) -> Lengths:
        """Tokens of the three parts."""
        return len(self.prompt), len(self.chosen), len(self.rejected)


def random_rows(count: int, prompt: int, completion: int, vocabulary: int) -> list[Row]:
    """Random tokens, for models with random weights: neither time nor memory depends on which they are."""
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    return [Row(tokens(prompt), tokens(completion), tokens(completion)) for _ in range(count)]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON."""
    path.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
