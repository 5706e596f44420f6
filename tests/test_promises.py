"""The page of promises names tests and files that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "promises.md"
TEXT = PAGE.read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`((?:tests|online_dpo|experiments|docs|requirements)/[\w./-]+(?:::\w+)?)`", TEXT)))
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| (?!promised|---)", line)]


@pytest.mark.parametrize("name", NAMED)
def test_what_the_page_names_is_there(name: str) -> None:
    path, _, function = name.partition("::")
    file = ROOT / path
    assert file.exists(), name
    if function:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_every_promise_names_what_holds_it(row: str) -> None:
    held_by = row.strip("| ").rpartition(" | ")[2]
    assert re.search(r"`tests/[\w/]+\.py(::\w+)?`|`make [\w-]+", held_by), row


def test_every_make_target_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)", TEXT))
    assert named and named <= targets, named - targets


def test_every_area_says_what_is_not_promised_or_is_all_measured() -> None:
    areas = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert [area.splitlines()[0] for area in areas] == ["Results", "Faults", "Input", "Security", "Growth", "Cluster"]
    assert all("Not promised" in area or "not measured" in area for area in areas)


def test_the_page_is_found_from_the_readme() -> None:
    assert "docs/promises.md" in (ROOT / "README.md").read_text(encoding="utf-8")
