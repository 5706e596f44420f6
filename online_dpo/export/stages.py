"""The stages' parquet files as they lie in the run, checked and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

from online_dpo.errors import RunFolderError
from online_dpo.export.card import write_stages_card
from online_dpo.export.selection import Selection, chosen_rounds, new_folder
from online_dpo.store import RunStore


def export_stages(store: RunStore, selection: Selection, out: Path) -> int:
    """Copy prompts.parquet and every parquet file of the rounds of `selection` to `out`, laid out as in the run, with
    a card; returns how many files. Raises `RunFolderError` when one is not what its stage wrote."""
    copies: list[Path] = []
    for one in chosen_rounds(store, selection):
        for record in sorted((one.folder.path / "stages").glob("*.json")):
            one.folder.trust(record.stem)
        copies += sorted(one.folder.path.glob("*.parquet"))
    if not copies:
        raise RunFolderError(f"{store.root}: no closed rounds of those that were asked for")
    new_folder(out)
    copies.insert(0, store.root / "prompts.parquet")
    for file in copies:
        target = out / file.relative_to(store.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    write_stages_card(store, out, copies)
    return len(copies)
