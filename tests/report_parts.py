"""What the tests of the report share: real run folders of the word model, with answers as hostile as they come."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from word_model import run_words

from online_dpo.files import digest, write_json
from online_dpo.records import HeldOutAnswer, read_held_out, write_held_out
from online_dpo.store import RunStore, StageRecord

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "<!-- <script> ' \" & &lt; {{ 7 * 7 }} {% raw %}",
    "line\u2028separator\u2029and \x1b[31mred\x1b[0m, \x00null, \u202ereversed\u202c",
    "<svg onload=window.hacked=1><a href='javascript:window.hacked=1'>a</a>",
    "**bold** | `code` [link](https://example.com) # heading",
)
"""Answers that must be shown as they are, and do nothing."""


def run_of_two_arms(root: Path, **changes: Any) -> RunStore:
    """Two arms, two seeds, 12 prompts to measure on, 2 rounds, no audit of the judge (it draws a figure a round)."""
    return run_words(root, 8, 12, **{"seeds": [0, 1], "audit": {"prompts": 0}, **changes})


def with_hostile_answers(store: RunStore) -> None:
    """Put `HOSTILE` into the texts of every held-out answer and into reasons of abstentions, records kept true."""
    for path in sorted(store.root.glob("arms/*/seed_*/round_*")):
        rows = read_held_out(path / "held_out.parquet")
        changed = [_changed(row, HOSTILE[place % len(HOSTILE)], place == 1) for place, row in enumerate(rows)]
        (path / "held_out.parquet").unlink()  # another round may share the file
        write_held_out(path / "held_out.parquet", changed)
        folder = store.round(path.parent.parent.name, int(path.parent.name[5:]), int(path.name[6:]))
        record = folder.done("evaluate")
        assert isinstance(record, StageRecord)
        outputs = {**record.outputs, "held_out.parquet": digest(path / "held_out.parquet")}
        write_json(path / "stages" / "evaluate.json", dataclasses.asdict(dataclasses.replace(record, outputs=outputs)))


def _changed(row: HeldOutAnswer, text: str, abstains: bool) -> HeldOutAnswer:
    changed = dataclasses.replace(row, candidate=dataclasses.replace(row.candidate, text=text))
    return dataclasses.replace(changed, score=None, abstain_reason=text) if abstains else changed
