"""The command on real Ray: one worker, two workers, what it learns, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from judges.reward_model import RewardModelJudge
from online_dpo.commands.judge_train import judge_train
from online_dpo.types import Candidate, Message, Prompt

ROOT = Path(__file__).resolve().parents[1]
POLITENESS = ROOT.parent / "shared" / "data" / "pairs" / "politeness.json"
app = typer.Typer()
app.command()(judge_train)
FEW = ("--epochs", "2", "--batch-size", "4", "--held-out", "0.25", "--threads", "1", "--lr", "1e-3", "--quiet")


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs: the polite answer was chosen."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"Where is house {i}? ", "chosen": f"It is here, please, {i}." * (1 + i % 3), "rejected": "Go away."}
        for i in range(16)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def card(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return found


def score(folder: Path, text: str) -> Any:
    prompt = Prompt("p", (Message("user", "Where is house 3? "),), ())
    return RewardModelJudge(str(folder), device="cpu").score(prompt, [Candidate("p", 0, text, (), (), "stop", 0)])[0]


@pytest.mark.slow
def test_two_workers_train_what_one_does(few_pairs: Path, small_model: Path, tmp_path: Path) -> None:
    """Batches of four shared by two workers with micro-batches of one, and by one worker with its own of three."""
    import os

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        for workers, micro in ((1, 3), (2, 1)):
            done = run(
                few_pairs, "--model", small_model, "-o", tmp_path / str(workers), *FEW,
                "--workers", workers, "--micro-batch-size", micro,
            )  # fmt: skip
            assert done.exit_code == 0, done.output
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    one, two = card(tmp_path / "1"), card(tmp_path / "2")
    assert one["training"]["steps"] == two["training"]["steps"] == 6
    assert one["training"]["tokens"] == two["training"]["tokens"]
    for key in ("loss_first", "loss_last"):
        assert two["training"][key] == pytest.approx(one["training"][key], abs=1e-4)
    assert one["training"]["loss_last"] < one["training"]["loss_first"] - 0.05
    for key in ("score_mean", "score_std"):
        assert two["held_out"][key] == pytest.approx(one["held_out"][key], abs=2e-3)
    for text in ("It is here, please.", "Go away.", ""):
        assert score(tmp_path / "2", text) == pytest.approx(score(tmp_path / "1", text), abs=5e-3)
    assert one["data"] | {"train": 12, "held_out": 4} == one["data"]
    assert len(one["data"]["digest"]) == 64


@pytest.mark.slow
def test_it_learns_politeness_from_real_pairs(stories: Path, tmp_path: Path) -> None:
    """1100 pairs of which the polite answer was chosen; a tenth of the prompts held out.

    Wilson's lower bound above one half: the held-out accuracy is no luck.
    """
    if not POLITENESS.is_file():
        pytest.skip("politeness.json (../shared/data/pairs) is not on this machine")
    out = tmp_path / "polite"
    done = run(POLITENESS, "--model", stories, "-o", out, "--lr", "1e-3", "--threads", "1", "--limit", "600", "--quiet")
    assert done.exit_code == 0, done.output
    assert card(out)["held_out"]["accuracy"]["low"] > 0.5
    assert "right more often than 'the longer answer wins'" in done.output


def test_what_cannot_be_trained_is_one_line_and_leaves_nothing(
    few_pairs: Path, small_model: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    cases: list[tuple[list[object], str]] = [
        ([few_pairs, "--model", small_model, "-o", taken], "is there already"),
        ([few_pairs, "--model", "no-such-model", "-o", tmp_path / "new"], "no model 'no-such-model'"),
        ([tmp_path / "no.jsonl", "--model", small_model, "-o", tmp_path / "new"], "no.jsonl"),
        ([few_pairs, "--model", small_model, "-o", tmp_path / "new", "--max-length", "2"], "longer than 2 tokens"),
        ([few_pairs, "--model", small_model, "-o", tmp_path / "new", "--held-out", "1.5"], "held_out"),
    ]
    for arguments, message in cases:
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.output
        assert done.output.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_a_ray_that_does_not_start_is_one_line(
    few_pairs: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own exception for a machine that is too busy is a bare `Exception`."""
    import ray

    def busy(**_: object) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", busy)
    done = run(few_pairs, "--model", small_model, "-o", tmp_path / "new", *FEW)
    assert done.exit_code == 1, done.output
    assert done.output == "online-dpo: Ray does not start: Exception: The current node timed out during startup.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_that_fails_saves_nothing(few_pairs: Path, small_model: Path, tmp_path: Path) -> None:
    """A learning rate of 1e38 makes the second step's loss not finite."""
    done = run(few_pairs, "--model", small_model, "-o", tmp_path / "new", *FEW[:-3], "--lr", "1e38", "--quiet")
    assert done.exit_code == 1, done.output
    assert "nothing was saved" in done.output
    assert done.output.count("\n") == 1
    assert not list(tmp_path.iterdir())
