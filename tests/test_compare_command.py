"""`online-dpo compare`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_loop import World, experiment
from typer.testing import CliRunner, Result

from online_dpo.cli import app


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, two seeds, with a gold judge."""
    root = tmp_path_factory.mktemp("compare") / "run"
    evaluation = {"gold": {"use": "judges.length:LengthJudge", "unit": "words"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        World(root, experiment(seeds=[0, 1], evaluation=evaluation)).go()
    return root


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_tables_fit_and_say_what_matters(run: Path) -> None:
    done = call(run)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[0].startswith("verdict: ")
    for title in (
        "Difference of reward", "Difference of gold reward", "Win rate of the first",
        "Length-controlled win rate of the first", "Win rate of the row against the column, in per cent",
        "Rounds, over all seeds", "League: strength in Elo points, the initial policy at 0",
    ):  # fmt: skip
        assert sum(line.rstrip() == title for line in lines) == 1, title
    assert "…" not in done.output
    assert "note: two seeds" in done.output


def test_json_holds_everything(run: Path, tmp_path: Path) -> None:
    done = call(run, "--json", tmp_path / "comparison.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert {one["measure"] for one in found["differences"]} == {"reward", "gold", "win_rate", "length_controlled"}
    assert set(found["win_matrix"]) == {"on_policy", "self_offline", "initial"}
    assert len(found["curves"]) == 6 and len(found["league"]) == 5
    assert found["measure"] == "gold"


def test_select_can_be_said(run: Path) -> None:
    done = call(run, "--select", "best_gold")
    assert done.exit_code == 0, done.output
    assert "chosen rounds: on_policy seed 0: round " in done.output
    assert "on half of the 3 held-out prompts" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "is no run folder"),
        (["RUN", "RUN"], "given twice"),
        (["RUN", "--json", "no/such/folder/file.json"], "cannot write no/such/folder/file.json"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*[str(run) if argument == "RUN" else argument for argument in arguments])
    assert done.exit_code == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_names_of_folders_cannot_command_the_terminal(run: Path, tmp_path: Path) -> None:
    """Two runs with an arm of the same name: the folders' names are shown."""
    import shutil

    other = tmp_path / "evil\x1b]0;title\x07[red]"
    shutil.copytree(run, other)
    done = call(run, other)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output and "\x07" not in done.output
    assert "[red]/on_policy" in "".join(done.output.split())
