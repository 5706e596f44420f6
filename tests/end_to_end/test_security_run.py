"""A real run with a judge behind a server, looked at from outside: where its key goes, and who could reach it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile_runs import cli, holding
from llm_double import Double, Step, said
from stories import Started, write_experiment
from watched_run import beyond_loopback, listening

pytestmark = pytest.mark.slow

KEY = "sk-proj-Zx81mQ0vTr5Yb2Nw7Lk4Hd9Gf3JcPs6AbCdEf"
"""Opens nothing."""
OTHER = "hunter2-hunter2-hunter2"
"""A secret of no known form, under a name that says what it is."""
REFUSED = 5
"""The request that is refused for good, with a message that repeats the key; the one before it fails for a while."""
RAISING = """
import os
def score(prompt, answer):
    if "Max" in prompt:  # two of the eight held-out prompts
        raise ValueError("refused: " + os.environ["OPENAI_API_KEY"] + os.environ["MY_SERVICE_TOKEN"])
    return len(answer)
"""


def says(request: dict[str, Any], number: int) -> Step | dict[str, Any]:
    """Grades; twice the text of an error repeats the key, as some servers do."""
    if number == REFUSED - 1:
        return Step({"error": {"message": f"upstream: Authorization: Bearer {KEY}"}}, 500)
    if number == REFUSED:
        return Step({"error": {"message": f"bad request with key {KEY}", "code": None}}, 400)
    return said("12345678"[number % 8])


@dataclass(frozen=True)
class Lived:
    """A finished run: its folder of everything, the run folder in it, Ray's folder, and what listened."""

    folder: Path
    root: Path
    ray: Path
    listened: set[tuple[str, str]]
    requests: int


@pytest.fixture(scope="module")
def lived(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    """Two workers that learn together, a judge in an actor of its own, another in the driver; then every command."""
    folder = tmp_path_factory.mktemp("key")
    # A socket's path has at most 107 characters, so Ray's folder cannot lie below pytest's.
    ray = Path(tempfile.mkdtemp(prefix="r"))
    try:
        with Double(says) as server, pytest.MonkeyPatch.context() as patch:
            for name, value in {"OPENAI_API_KEY": KEY, "MY_SERVICE_TOKEN": OTHER, "RAY_TMPDIR": str(ray)}.items():
                patch.setenv(name, value)
            (folder / "raising.py").write_text(RAISING, encoding="utf-8")
            judge = {"use": "judges.llm:LLMScoreJudge", "model": "m", "base_url": server.url, "high": 8}
            root = write_experiment(
                folder,
                small_model,
                "key",
                judge={**judge, "logprobs": "no", "actor": {"threads": 1}, "concurrency": 2},
                evaluation={
                    "gold": {"use": "judges.function:FunctionJudge", "function": "raising:score"},
                    "off_policy": 4,
                },
                max_abstain=0.5,
                rounds=1,
                arms={"on_policy": {}},
                audit={"prompts": 2},
                learner={"threads": 1, "workers": 2},
                tracking={"tensorboard": True},
            )
            started = Started(folder, "run", "experiment.yaml")
            listened: set[tuple[str, str]] = set()

            def looked() -> bool:
                nonlocal listened
                time.sleep(0.2)
                listened |= listening(started.process.pid)
                return (root / "arms" / "on_policy" / "seed_0" / "round_01" / "metrics.json").exists()

            try:
                started.wait_for(looked, 400)
            finally:
                status = started.end(120)
            assert status == 0, started.err.read_text(encoding="utf-8")
            after(folder, root)
            yield Lived(folder, root, ray, listened, len(server.requests))
    finally:
        shutil.rmtree(ray, ignore_errors=True)


def after(folder: Path, root: Path) -> None:
    """Everything that is made of a run afterwards; what is said goes into files, too."""
    commands: tuple[list[str | Path], ...] = (
        ["show", root], ["report", root], ["compare", root, "--json", folder / "compare.json"], ["watch", root],
        ["export", root, "--out", folder / "trl"], ["export", root, "--format", "parquet", "--out", folder / "all"],
        ["check", folder / "experiment.yaml", "--set", f"output={root.parent}"], ["resume", root],
    )  # fmt: skip
    for number, command in enumerate(commands):
        told = cli(*command)
        assert told.status == 0, (command, told)
        (folder / f"said_{number}.txt").write_text(told.out + told.err, encoding="utf-8")


def test_the_key_was_used_and_is_nowhere(lived: Lived) -> None:
    """Every byte of the run folder, of what was printed, of reports and exports, and of Ray's own logs."""
    assert lived.requests > REFUSED + 1
    assert len(list(lived.folder.rglob("*"))) > 60
    assert any(path.is_file() for path in lived.ray.rglob("*.out"))
    for secret in (KEY, OTHER):
        assert holding(lived.folder, secret) == []
        assert holding(lived.ray, secret) == []


def test_the_search_finds_what_is_there(lived: Lived) -> None:
    """A text that was written to a compressed table, to logs and to SQLite."""
    found = {path.suffix for path in holding(lived.folder, "Once upon a time, ")}
    assert {".parquet", ".html", ".jsonl"} <= found
    assert "held_out.parquet" in {path.name for path in holding(lived.root, "refused: ***")}
    assert holding(lived.ray, "raylet") != []


def test_nothing_listens_beyond_loopback(lived: Lived) -> None:
    assert len(lived.listened) > 3, "the search for sockets finds none"
    assert beyond_loopback(lived.listened) == set()


def test_a_refused_key_is_not_repeated_with_a_trace_either(
    lived: Lived, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says 401 and the key; --debug prints the whole chain of causes, from the judge's own process too."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("RAY_TMPDIR", str(lived.ray))
    os.makedirs(lived.ray, exist_ok=True)
    with Double(lambda request, number: Step({"error": {"message": f"wrong: {KEY}"}}, 401)) as server:
        judge = {"use": "judges.llm:LLMScoreJudge", "model": "m", "base_url": server.url, "actor": {"threads": 1}}
        write_experiment(tmp_path, small_model, "refused", judge=judge, rounds=1, arms={"on_policy": {}})
        started = Started(tmp_path, "run", "experiment.yaml", "--debug")
        assert started.end() != 0
    said_then = started.err.read_text(encoding="utf-8")
    assert "Traceback" in said_then and "status 401" in said_then
    assert holding(tmp_path, KEY) == []
    assert holding(lived.ray, KEY) == []
