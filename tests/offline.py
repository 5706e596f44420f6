"""A run with fakes whose arms read datasets, and the datasets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import byte_tokenizer
from test_loop import HELD_OUT, TRAIN, World

from online_dpo.answers import AnswerEncoder
from online_dpo.config import Experiment
from online_dpo.dataset_rows import Reading
from online_dpo.sources.datasets import read_datasets
from online_dpo.types import Prompt

ENDS = (2,)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_of(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """A pair for each prompt, whose texts follow from its id; the rejected answer is the longer one."""
    return [
        {"prompt": prompt.text, "chosen": f"Yes, {prompt.id}.", "rejected": f"No, never {prompt.id}."}
        for prompt in prompts
    ]


def reading(folder: Path, **changes: Any) -> Reading:
    """Of the loop tests' prompts, by a tokenizer of one token a byte."""
    kept: dict[str, Any] = {
        "encoder": AnswerEncoder(byte_tokenizer(), ENDS),
        "train": TRAIN,
        "held_out": HELD_OUT,
        "longest_prompt": 100,
        "longest": None,
        "folders": (folder,),
    }
    return Reading(**kept | changes)


class Offline(World):
    """Reads the datasets as a new process would, each time it is opened."""

    def __init__(self, root: Path, spec: Experiment, **parts: Any) -> None:
        super().__init__(root, spec, **parts)
        self.run.datasets = read_datasets(spec, reading(root.parent))

    def reopen(self) -> Offline:
        return Offline(self.root, self.run.experiment, **self.parts)
