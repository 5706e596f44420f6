"""`online-dpo init`: what it writes runs as it stands, and its judge judges what it says."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from online_dpo.cli import app as online_dpo
from online_dpo.commands.init import STARTER, init
from online_dpo.config import load_experiment
from online_dpo.judging import Abstention, Score
from online_dpo.models import PACKAGED
from online_dpo.types import Candidate, Message, Prompt


@pytest.fixture(autouse=True)
def fresh_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a `my_judge` of its own in a folder of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_judge", None)
    yield
    sys.modules.pop("my_judge", None)


def write(folder: Path, *arguments: object) -> Result:
    """The command."""
    app = typer.Typer()
    app.command()(init)
    return CliRunner().invoke(app, [str(one) for one in (folder, *arguments)])


def test_it_says_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "first try"
    result = write(folder)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(STARTER)
    wrote = [f"wrote {folder / name}" for name in STARTER]
    assert result.stdout.splitlines() == [*wrote, f"next: online-dpo check '{folder / 'experiment.yaml'}'"]


@pytest.mark.parametrize(("called", "name"), [("first", "first"), ("first try", "my-experiment"), ("1e5", "1e5")])
def test_the_experiment_is_named_after_its_folder(tmp_path: Path, called: str, name: str) -> None:
    write(tmp_path / called)
    assert load_experiment(tmp_path / called / "experiment.yaml").name == name
    assert f"online-dpo show runs/{name} " in (tmp_path / called / "README.md").read_text(encoding="utf-8")


def test_the_model_is_the_packaged_one_unless_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(called: str, *arguments: str) -> str:
        write(tmp_path / called, *arguments)
        return load_experiment(tmp_path / called / "experiment.yaml").model

    assert model("a") in PACKAGED
    assert model("b", "--model", "org/name") == "org/name"
    assert model("c", "--model", 'odd: "name" # no comment') == 'odd: "name" # no comment'
    # A folder is meant from here, not from where the experiment will lie.
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model("d", "--model", "weights") == str(tmp_path / "weights")


@pytest.mark.parametrize("there", [["my_judge.py"], ["experiment.yaml", "README.md"]])
def test_nothing_is_overwritten(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    result = write(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        f"online-dpo: {tmp_path} has {', '.join(there)} already; nothing was written: choose another folder\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(there)
    assert all((tmp_path / name).read_text(encoding="utf-8") == "mine" for name in there)


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").symlink_to(tmp_path / "elsewhere")
    assert write(tmp_path / "new").exit_code == 2
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = write(tmp_path / "file" / "below")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert write(tmp_path).exit_code == 0
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


# --- what was written ---


def test_check_passes_on_it(tmp_path: Path, small_model: Path) -> None:
    write(tmp_path / "first", "--model", small_model)
    result = CliRunner().invoke(online_dpo, ["check", str(tmp_path / "first" / "experiment.yaml")])
    assert result.exit_code == 0, result.stderr
    assert "prompts: 42 to train, 24 held out" in result.stdout
    assert "run folder: runs/first" in result.stdout


def test_a_mistake_in_the_judges_keys_is_told(tmp_path: Path, small_model: Path) -> None:
    write(tmp_path / "first", "--model", small_model)
    file = str(tmp_path / "first" / "experiment.yaml")
    result = CliRunner().invoke(online_dpo, ["check", file, "--set", "judge.leters=3"])
    assert result.exit_code == 2
    assert "unknown key 'leters' (did you mean 'letters'?)" in result.stderr


def test_every_key_of_the_experiment_is_one_and_no_prompt_comes_twice(tmp_path: Path) -> None:
    write(tmp_path)
    experiment = load_experiment(tmp_path / "experiment.yaml")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {experiment.prompts.column} for row in rows)
    assert len({row["prompt"].lower() for row in rows}) == len(rows) >= 60
    assert all(4 <= len(row["prompt"].split()) <= 20 for row in rows)
    # Every round gets prompts that no earlier one had.
    assert experiment.prompts.per_round * experiment.rounds + experiment.prompts.held_out <= len(rows)
    used = yaml.safe_load((tmp_path / "experiment.yaml").read_text(encoding="utf-8"))
    assert used["judge"]["use"] == "my_judge:PlainWords"


def starter_judge(folder: Path) -> ModuleType:
    write(folder)
    spec = importlib.util.spec_from_file_location("starter_judge", folder / "my_judge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_judge_likes_what_it_says_it_likes(tmp_path: Path) -> None:
    """With words of at most 4 letters: 4 of 5 ("isn't" has five); 3 of 5 (but "makes" and "rivers"); of words in
    another script none; "no" five times: 5 of 5, and of its 4 pairs 3 were there before, 1 − ¾; then too few."""

    def scores(*answers: str) -> list[Score]:
        candidates = [Candidate("p", i, text, (), (), "stop", 0) for i, text in enumerate(answers)]
        judge: Any = starter_judge(tmp_path / "new").PlainWords(letters=4)
        found: list[Score] = judge.score(Prompt("p", (Message("user", "Why?"),), ()), candidates)
        return found

    assert scores(
        "The **sea** isn't so far!",
        "Rain makes the rivers rise.",
        "море и небо и дом тут",
        "No, no: no (no) no.",
        "Four words - at most.",
        " \n",
    ) == [0.8, 0.6, 0.0, 0.25, Abstention("fewer than 5 words"), Abstention("fewer than 5 words")]


def test_the_readme_names_the_files_and_the_run_folder_that_there_will_be(tmp_path: Path) -> None:
    write(tmp_path / "first")
    readme = (tmp_path / "first" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^online-dpo ([a-z ]+) (\S+)", readme, re.MULTILINE)
    assert commands == [
        ("check", "experiment.yaml"),
        ("run", "experiment.yaml"),
        ("show", "runs/first"),
        ("judge ask", "runs/first"),
    ]
    assert set(re.findall(r"`(\w+\.\w+)`", readme)) - {"PlainWords.score"} == set(STARTER) - {"README.md"}
