"""Colours and marks that people with any colour vision can tell apart, on white paper and on a dark screen.

The hues are Okabe and Ito's (Color Universal Design, 2008). No figure tells arms apart by colour alone: each has its
own marker, and its own dashes once the colours are used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
INK, PAPER, GREY = "#000000", "#ffffff", "#6e6e6e"


@dataclass(frozen=True, slots=True)
class Style:
    """How one arm is drawn in every figure."""

    colour: str
    marker: str
    dashes: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style a label; 24 labels have different colour and dashes, 8 in a row different markers."""
    return {
        label: Style(
            COLOURS[place % len(COLOURS)],
            MARKERS[place % len(MARKERS)],
            DASHES[place // len(COLOURS) % len(DASHES)],
        )
        for place, label in enumerate(labels)
    }
