"""What a report is made of, whatever it is written as: sections of sentences, tables, figures and listings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.display import ABSENT, clean, interval, number, share
from online_dpo.measure import Interval

JSON = Any


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell as people read it, and the value behind it as `report.json` holds it."""

    text: str
    value: JSON
    figure: bool = False
    """Whether it is a number: kept on one line."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns. The first cell of a row names it. `note` stands below."""

    name: str
    """A key, unique in the report."""
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    folded: bool = False
    """Shown on demand: a figure says the same at a glance."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn figure: its title, what it shows in words, and the SVG as it is saved. `png` is the same picture."""

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Listing:
    """Text to be copied as it is."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """One heading and what stands below it, in this order."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    """A list of sentences."""
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    listings: tuple[Listing, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """The whole document. `answers`: what the answer browser shows (`report.answers`)."""

    title: str
    subtitle: str
    verdict: str
    sections: tuple[Section, ...]
    answers: JSON


# --- cells ---


def words(value: object) -> Cell:
    """A cell of text; nothing stands as a dash."""
    text = clean(ABSENT if value is None or value == "" else value)
    return Cell(text, None if value is None else text)


def figure(value: object, *, places: int | None = None, sign: bool = False) -> Cell:
    """A cell with one number."""
    text = number(value, places=places, sign=sign)
    return Cell(text, _plain(value), figure=True)


def chance(p: float) -> Cell:
    """A cell with a p-value."""
    return Cell("< 0.0001" if p < 1e-4 else f"{p:.4f}", _plain(p), figure=True)


def count(value: object) -> Cell:
    """A cell with a whole number, its thousands apart."""
    text = number(value, places=0)
    return Cell(text if text == ABSENT else f"{int(text):,}", _plain(value), figure=True)


def bounds(value: Interval | Mapping[str, Any] | None, *, places: int | None = None, sign: bool = False) -> Cell:
    """A cell with a mean and its interval."""
    found = _mapping(value)
    return Cell(interval(found, places=places, sign=sign), found, figure=True)


def percent(value: Interval | Mapping[str, Any] | float | None) -> Cell:
    """A cell with a share in per cent, with its interval where it has one."""
    found = _mapping(value) if isinstance(value, Interval | Mapping) else value
    return Cell(share(found), _plain(found) if not isinstance(found, Mapping) else found, figure=True)


def setting(value: object) -> Cell:
    """A cell with a key's value, as YAML would have it on one line."""
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {setting(one).text}" for key, one in value.items()) + "}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        text = "[" + ", ".join(setting(one).text for one in value) + "]"
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return Cell(clean(text), value)


def _mapping(value: Interval | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(value, Interval):
        return {**value.as_dict(), "n": value.n}
    return None if value is None else dict(value)


def _plain(value: object) -> JSON:
    """`value` as JSON can hold it: NaN and infinity become null."""
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value
