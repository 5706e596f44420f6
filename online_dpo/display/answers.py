"""Answers before and after, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from online_dpo.display.figures import number
from online_dpo.display.tables import spaced
from online_dpo.display.text import clean

SHOWN_CHARACTERS = 1200


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """An answer and who gave it, for example "initial" or "on_policy, round 3"."""

    label: str
    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """A prompt with the answers to show, the earliest first."""

    prompt: str
    answers: tuple[ShownAnswer, ...]


def sample_answers(shown: Sequence[ShownPrompt]) -> Group:
    """Each prompt with its answers below it, the scores before them."""
    return spaced(*(_answers(item) for item in shown))


def _answers(item: ShownPrompt) -> Table:
    table = Table(
        title=Text(f"Prompt: {_short(clean(item.prompt))}", style="bold"),
        title_justify="left",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column(overflow="fold", max_width=24)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for answer in item.answers:
        text = _short(clean(answer.text, lines=True)) or "(empty)"
        table.add_row(Text(clean(answer.label)), Text(number(answer.score, places=3)), Text(text))
    return table


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
