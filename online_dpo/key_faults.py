"""What is wrong with a mapping of keys, in one line: where, what, the nearest right key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from online_dpo.errors import nearest

UNION_MEMBERS = ("SourceSpec", "ReferenceSpec", "LossSpec")
"""Sections that are one of several forms of a key: pydantic names them where a fault lies, users do not."""
WORDS = {
    "model_type": "a mapping of keys is expected",
    "dict_type": "a mapping of keys is expected",
    "list_type": "a list is expected",
    "tuple_type": "a list is expected",
}
"""Kinds of faults that pydantic names in a programmer's words."""
SHOWN = 60
"""Characters of a value, or of a key."""


def describe(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first fault in one line: where, what, the nearest right key; and how many more there are.

    `prefix` stands before the key's place, and `model` is what was validated.
    """
    faults = error.errors(include_url=False, include_context=False)
    # An unknown key explains a missing one more often than the other way round.
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    # Of the members of a union, the one that got furthest into the value is the one that was meant.
    same_key = [fault for fault in faults if fault["loc"][:1] == first["loc"][:1]]
    first = first if first["type"] == "extra_forbidden" else max(same_key, key=_meant)
    rest = _places(faults) - 1
    return _told(first, model, prefix) + (f" (and {rest} more)" if rest else "")


def _told(fault: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    location = _location(fault)
    where = prefix + ".".join(_cut(part) for part in location)
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{where}'{_known(model, location, prefix)}"
    if fault["type"] == "missing":
        return f"key '{where}' is missing"
    if fault["type"] == "invalid_key" or location[-1:] == ["[key]"]:
        inside = ".".join(location[:-2] if location[-1:] == ["[key]"] else location[:-1])
        return f"{prefix}{inside}: a key is text, found {_shown(fault['input'])}: put it into quotes".removeprefix(": ")
    message = WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    shown = "" if isinstance(fault["input"], dict) else f" (found {_shown(fault['input'])})"
    return f"{where}: {message}{shown}" if where else message


def _known(model: type[BaseModel], location: Sequence[str], prefix: str) -> str:
    """What an unknown key may have been meant to be: one near it, the same one in another place, else all there are."""
    fields = _fields_at(model, location[:-1])
    key = location[-1]
    if key.replace("-", "_").lower() in fields:
        return nearest(key, fields) or f" (did you mean '{key.replace('-', '_').lower()}'?)"
    places = list(_all_places(model))
    if not prefix and len(location) == 1 and key in places:
        section, _, last = key.rpartition(".")
        return f": write it nested, {section.replace('.', ': {')}: {{{last}: …{'}' * key.count('.')}"
    elsewhere = [place for place in places if place.rpartition(".")[2] == key]
    if elsewhere:
        return f" (did you mean {' or '.join(repr(place) for place in elsewhere[:3])}?)"
    return nearest(key, fields) or (f"; known: {', '.join(fields)}" if fields else "")


def _places(faults: Sequence[ErrorDetails]) -> int:
    """At how many places there are faults; those of a union's several forms are at one."""
    found = {tuple(_location(fault)) for fault in faults}
    within = {place[:length] for place in found for length in range(len(place))}
    return len(found - within)


def _location(fault: ErrorDetails) -> list[str]:
    """The dotted place, without what a union adds: the member it tried, which is no key of the user's."""
    return [str(part) for part in fault["loc"] if part not in UNION_MEMBERS and not _is_union_tag(part)]


def _meant(fault: ErrorDetails) -> tuple[int, bool]:
    return len(fault["loc"]), fault["type"] == "value_error"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and (
        part.startswith(("literal[", "list[", "function-")) or part in ("str", "constrained-str")
    )


def _shown(value: Any) -> str:
    """A value as YAML would write it, cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _cut(str(value) if isinstance(value, date) else repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The known keys of the section at `location` under `model`."""
    current: type[BaseModel] = model
    for part in location:
        found = _section(current, part)
        if found is None:
            return []
        current = found
    return list(current.model_fields)


def _all_places(model: type[BaseModel], prefix: str = "", within: tuple[type[BaseModel], ...] = ()) -> Iterator[str]:
    """Every key of `model` and of its sections, dotted; the upper ones first."""
    sections = []
    for name in model.model_fields:
        yield prefix + name
        section = _section(model, name)
        if section is not None and section not in within:
            sections.append((name, section))
    for name, section in sections:
        yield from _all_places(section, f"{prefix}{name}.", (*within, model))


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section that stands at `key` of `model`, where there is one."""
    field = model.model_fields.get(key)
    annotation = field.annotation if field else None
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
