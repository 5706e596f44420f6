"""The README.md beside exported data: what it is, where it comes from, how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import online_dpo
from online_dpo.display.markdown import cell
from online_dpo.export.selection import ChosenRound
from online_dpo.model_card import base_name
from online_dpo.store import RunStore


def write_pairs_card(store: RunStore, rounds: Iterable[ChosenRound], file: Path, pairs: int, chat: bool) -> None:
    """`README.md` in the folder of `file`, which holds `pairs` pairs of `rounds`."""
    experiment = store.experiment
    by_arm: dict[str, list[ChosenRound]] = {}
    for one in rounds:
        by_arm.setdefault(one.arm, []).append(one)
    text = _front_matter(
        {
            "tags": ["trl", "dpo", "preference", "online-dpo"],
            "configs": [{"config_name": "default", "data_files": file.name}],
        }
    )
    form = "chat messages (prompt, chosen and rejected are lists of turns)" if chat else "plain text"
    text += (
        f"# Preference pairs of {cell(experiment.name)}\n\n"
        f"{pairs} pairs in `{file.name}`: {form}, with an explicit prompt, as TRL's `DPOTrainer` takes them.\n\n"
        "```python\n"
        "from datasets import load_dataset\n"
        f'pairs = load_dataset("{file.suffix[1:].replace("jsonl", "json")}", data_files="{file.name}", split="train")\n'
        "```\n\n"
        "| column | what |\n| --- | --- |\n"
        "| `prompt`, `chosen`, `rejected` | the pair |\n"
        "| `chosen_score`, `rejected_score` | what the judge said, in its own units |\n"
        "| `chosen_ended`, `rejected_ended` | whether the answer ended by itself; a trainer that adds an end token "
        "adds it to answers that were cut off, too |\n"
        "| `prompt_id`, `arm`, `seed`, `round` | where the pair comes from |\n\n"
    )
    for arm, found in by_arm.items():
        text += _arm_line(arm, found, experiment.arm(arm).judge.use)
    (file.parent / "README.md").write_text(text + _origin(store), encoding="utf-8")


def write_stages_card(store: RunStore, out: Path, files: Sequence[Path]) -> None:
    """`README.md` in `out`, which holds copies of `files`."""
    kinds = sorted({file.stem for file in files})
    text = _front_matter(
        {
            "tags": ["preference", "online-dpo"],
            # Each kind of file has columns of its own: one configuration a kind.
            "configs": [{"config_name": kind, "data_files": f"**/{kind}.parquet"} for kind in kinds],
        }
    )
    text += (
        f"# Stages of {cell(store.experiment.name)}\n\n"
        f"{len(files)} parquet files, laid out as in the run folder: prompts.parquet with all prompts, and of every "
        "round what its stages wrote.\n\n"
        "```python\n"
        "from datasets import load_dataset\n"
        'rows = load_dataset("parquet", data_files="arms/*/seed_*/round_*/candidates.parquet", split="train")\n'
        "```\n\n"
    )
    (out / "README.md").write_text(text + _origin(store), encoding="utf-8")


def _front_matter(data: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)}---\n\n"


def _arm_line(arm: str, rounds: Sequence[ChosenRound], judge: str) -> str:
    seeds = ", ".join(map(str, sorted({one.seed for one in rounds})))
    indices = [one.folder.index for one in rounds if one.folder.index]
    span = f"{min(indices)} to {max(indices)}" if indices else "none"
    return f"- arm {cell(arm)}: seed {seeds}, rounds {span}, judge `{judge}`\n"


def _origin(store: RunStore) -> str:
    return (
        f"\nMade by online-dpo {online_dpo.__version__}; the policies began as {cell(base_name(store))} "
        f"(digest {cell(store.manifest['model']['digest'])[:12]}).\n"
    )
