"""What the tests of security share: a small real run to be made hostile, and the commands that read run folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from typer.testing import CliRunner
from word_model import run_words

from online_dpo.cli import app
from online_dpo.experiment_seal import sealed

TEXTS = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "a | b `code` [link](https://example.com) ![image](https://example.com/x.png) <b>bold</b> &amp;",
    "\x1b[2J\x1b]0;title\x07\x1b]8;;https://example.com\x1b\\link\x9b31m\x90q\x9c\x00\x07\u202ereversed",
    "{{ 7 * 7 }} {% for x in range(9) %}x{% endfor %} ${HOME} $(id) `id` %s {0} {answer_b}",
    "[bold red]markup[/] [link=https://example.com]x[/link]",
    "../../../../etc/passwd",
)
"""Texts as a model, a judge or a dataset could write them."""
UNSEEN = tuple(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202A, 0x202B, 0x202D, 0x202E, 0x2066, 0x2067]))
"""Characters that a terminal or a reader's eye obeys; a line break is none."""


@dataclass(frozen=True)
class Told:
    """What a command said, and how it ended."""

    status: int
    out: str
    err: str

    @property
    def refused(self) -> str:
        """The one line with which it ended."""
        assert self.status == 2, (self.status, self.out, self.err)
        assert self.err.startswith("online-dpo: ") and len(self.err.splitlines()) == 1, self.err
        return self.err


def cli(*arguments: str | Path) -> Told:
    """`online-dpo` with `arguments`, in this process; an exception that nothing turned into a line is raised."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Told(done.exit_code, done.stdout, done.stderr)


def reading(root: Path, out: Path, *, slow: bool = False) -> dict[str, Told]:
    """What every command that reads a run folder, and starts nothing, says of `root`; files go to `out`."""
    out.mkdir(exist_ok=True)
    commands: dict[str, Sequence[str | Path]] = {
        "show": ["show", root],
        "watch": ["watch", root],
        "compare": ["compare", root, "--json", out / "compare.json"],
        "export": ["export", root, "--format", "parquet", "--out", out / "stages"],
    }
    if slow:
        commands |= {
            "report": ["report", root, "--out", out / "report"],
            "export trl": ["export", root, "--format", "jsonl", "--out", out / "trl"],
        }
    return {name: cli(*arguments) for name, arguments in commands.items()}


def small_run(root: Path) -> Path:
    """Two arms, one round, 24 prompts to measure on: a folder that the commands read without a word of complaint."""
    return run_words(root, 4, 24, rounds=1, audit={"prompts": 0}).root


def copied(run: Path, to: Path) -> Path:
    """The run in a folder of its own."""
    return Path(shutil.copytree(run, to / run.name))


def round_of(root: Path, index: int = 1) -> Path:
    return root / "arms" / "on_policy" / "seed_0" / f"round_{index:02d}"


def edited_yaml(root: Path, **changes: Any) -> None:
    """Change keys of the run's experiment.yaml, with the digest that whoever made the folder would write below."""
    file = root / "experiment.yaml"
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(sealed(yaml.safe_dump(data | changes, allow_unicode=True)), encoding="utf-8")


def edited_json(file: Path, change: dict[str, Any]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(data | change), encoding="utf-8")


def holding(folder: Path, secret: str) -> list[Path]:
    """The files under `folder` that hold `secret`, in their bytes or in what their compressed columns say."""
    wanted = secret.encode()
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and _holds(path, wanted)]


def _holds(path: Path, wanted: bytes) -> bool:
    try:
        if wanted in path.read_bytes():
            return True
    except OSError:  # gone meanwhile
        return False
    return path.suffix == ".parquet" and wanted.decode() in str(pq.read_table(path).to_pydict())
