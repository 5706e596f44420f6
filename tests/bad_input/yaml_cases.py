"""Experiments that are no YAML, no mapping, or not what an experiment is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import Case

from experiments import written


def with_text(text: str | bytes) -> Callable[[Path], list[str]]:
    """`check` of a file with `text` alone."""

    def arrange(folder: Path) -> list[str]:
        file = folder / "experiment.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["check", file.name]

    return arrange


def changed(**changes: Any) -> Callable[[Path], list[str]]:
    """`check` of an experiment that is right but for `changes`."""
    return lambda folder: written(folder, **changes)


CASES: tuple[Case, ...] = (
    Case("yaml: an empty file", with_text(""), r"experiment\.yaml"),
    Case("yaml: an unknown key", changed(betta=1), r"unknown key 'betta'"),
)
