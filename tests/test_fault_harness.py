"""The script that does faults: what it counts as lost, so that "0 lost" means something."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FAULTS = Path(__file__).resolve().parent / "faults"


@pytest.fixture
def ground(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FAULTS))
    import ground

    return ground


def judged(root: Path, lines: str, kept: int, calls: float) -> Path:
    """A run folder whose judge was asked about the answers `lines`, of which `kept` are in the cache."""
    root.mkdir(parents=True)
    (root.parents[1] / "calls.txt").write_text("\n".join(lines), encoding="utf-8")
    with sqlite3.connect(root / "verdicts.sqlite") as connection:
        connection.execute("CREATE TABLE answers (key BLOB)")
        connection.execute("CREATE TABLE ledger (judge TEXT, item TEXT, amount REAL)")
        connection.executemany("INSERT INTO answers VALUES (?)", [(str(i),) for i in range(kept)])
        connection.execute("INSERT INTO ledger VALUES ('j', 'calls', ?)", (calls,))
    connection.close()
    return root


@pytest.mark.parametrize(
    ("lines", "kept", "calls", "kills", "said"),
    [
        ("abcd", 4, 4, [], ""),
        ("abcbd", 4, 4, [(3, 1)], ""),  # killed with b and c under way, of which b is asked again
        ("abcbcd", 4, 4, [(3, 1)], ""),
        ("abcbd", 4, 4, [(3, 3)], "1 answers were asked again, 0 were under way at kills"),
        ("abcbd", 4, 4, [], "1 answers were asked again, 0 were under way at kills"),
        ("abc", 3, 4, [], "3 answers were judged and 3 kept, of 4"),
        ("abcd", 3, 4, [], "4 answers were judged and 3 kept, of 4"),
        ("abcbd", 4, 5, [(3, 1)], ""),  # the call that the kill cut off was paid for, and so was its repetition
        ("abcbd", 4, 6, [(3, 1)], "the ledger counts 2 calls more, 1 were asked again"),
        ("abcd", 4, 5, [], "the ledger counts 1 calls more, 0 were asked again"),
        ("abcd", 4, 3, [], "the ledger counts -1 calls more, 0 were asked again"),
        ("abcd", 4, 4, [(2, 3)], "kill 1 lost -1 answers"),
    ],
)
def test_what_counts_as_judged_twice(
    ground: ModuleType, tmp_path: Path, lines: str, kept: int, calls: float, kills: list[tuple[int, int]], said: str
) -> None:
    root = judged(tmp_path / "x" / "runs" / "run", lines, kept, calls)
    reference = ground.Reference(root, {}, list("abcd"), 4.0, 1.0, [])
    assert ground.paid_twice(root, reference, kills) == said


def test_what_counts_as_another_result(ground: ModuleType, tmp_path: Path) -> None:
    """A byte, a file too many, a file too few, a figure; but no clock."""
    roots = [judged(tmp_path / name / "runs" / "run", "", 0, 0) for name in "ab"]
    for root in roots:
        (root / "arms").mkdir()
        (root / "arms" / "pairs.parquet").write_text("pairs")
        (root / "arms" / "metrics.json").write_text(json.dumps({"reward": 1.0, "seconds": {"sample": len(root.name)}}))
    whole = ground.Reference(roots[0], ground.results(roots[0]), [], 0.0, 1.0, [])
    made = ground.Ground(tmp_path, tmp_path, argparse.Namespace())
    (roots[1] / "arms" / "metrics.json").write_text(json.dumps({"reward": 1.0, "seconds": {"sample": 99}}))
    assert made.same(roots[1], whole) == ""
    for name, text in (("pairs.parquet", "pears"), ("more.parquet", "x"), ("metrics.json", '{"reward": 2.0}')):
        file = roots[1] / "arms" / name
        before = file.read_text() if file.exists() else None
        file.write_text(text)
        assert made.same(roots[1], whole) == f"differs in {name}"
        file.unlink() if before is None else file.write_text(before)
    (roots[1] / "arms" / "pairs.parquet").unlink()
    assert made.same(roots[1], whole) == "differs in pairs.parquet"


def test_the_last_line_counts_and_the_status_tells(
    ground: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_model: Path
) -> None:
    import faults

    def inject(_: Any) -> Iterator[Any]:
        yield ground.Outcome("one", True, "same")
        yield ground.Outcome("two", False, "differs")

    for kind in faults.KINDS:
        monkeypatch.setattr(f"kinds.{kind}.inject", lambda _: iter(()))
    arguments = ["--model", str(small_model)]
    assert faults.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 injected, 0 survived, 0 lost"
    monkeypatch.setattr("kinds.nan.inject", inject)
    assert faults.main(arguments) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["survived nan: one: same", "LOST     nan: two: differs"]
    assert out[-1] == "2 injected, 1 survived, 1 lost"
    with pytest.raises(SystemExit):
        faults.main(["nan", "dirver", *arguments])
    assert "no kind 'dirver'" in capsys.readouterr().err


def test_a_line_is_fitted_with_its_interval(ground: ModuleType) -> None:
    """Seconds 1, 2, 3, 5 at rounds 1 to 4: slope Σ(x−x̄)(y−ȳ)/Σ(x−x̄)² = 6.5/5 = 1.3, residuals .2, −.1, −.4, .3 with
    squares .30 in sum, so its error is √(.30/2/5) = 0.17321, and t(0.975, 2) = 4.30265."""
    import soak

    rows = [soak.Seen(x, y, *[0.0] * 8) for x, y in enumerate((1.0, 2.0, 3.0, 5.0), 1)]
    line = soak.fitted(rows, "seconds")
    assert (line.slope, line.mean) == pytest.approx((1.3, 2.75))
    assert (line.low, line.high) == pytest.approx((1.3 - 4.30265 * 0.173205, 1.3 + 4.30265 * 0.173205), abs=1e-4)
    assert soak.table(rows).splitlines()[1].split()[:4] == ["1", "–", "4", "2.75"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_a_process_that_is_left_is_seen(ground: ModuleType, tmp_path: Path) -> None:
    """Of a command that ends at once, and leaves a child that listens in a session of its own."""
    import socket
    import subprocess

    import victim

    code = (
        "import socket, subprocess, sys, time\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True)\n"
        "time.sleep(100)"
    )
    one = victim.Victim(tmp_path, "--version")
    one.process.wait()
    environment = {victim.MARK: one.mark}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, start_new_session=True, text=True
    ) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        one.note()
        assert f"port {port}" in one.left()
        assert any("-c" in line for line in one.left())
        assert one.gone(0.2)[0] != []
        child.kill()
    assert one.gone(5.0)[0] == []
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))
