"""Which rounds of a run are exported, and the folder that they are exported into."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from online_dpo.errors import ConfigError, RunFolderError, nearest
from online_dpo.store import RoundFolder, RunStore


@dataclass(frozen=True, slots=True)
class Selection:
    """Some rounds of a run; None: all."""

    arm: str | None = None
    seed: int | None = None
    rounds: range | None = None


@dataclass(frozen=True, slots=True)
class ChosenRound:
    """A round of `arm` at `seed`."""

    arm: str
    seed: int
    folder: RoundFolder


def parse_rounds(text: str) -> range:
    """`3` or `1-3` (both ends count) as a range; `ConfigError` for anything else."""
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text.strip())
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise ConfigError(f"--rounds {text}: write a round or a first and a last one, for example 2 or 1-3")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def check_selection(store: RunStore, selection: Selection) -> None:
    """Raise `ConfigError` for an arm or seed that is not there."""
    experiment = store.experiment
    if selection.arm is not None and selection.arm not in experiment.arms:
        raise ConfigError(
            f"--arm {selection.arm}: no such arm{nearest(selection.arm, experiment.arms)}; "
            f"arms: {', '.join(experiment.arms)}"
        )
    if selection.seed is not None and selection.seed not in experiment.seeds:
        raise ConfigError(f"--seed {selection.seed}: the run has {', '.join(map(str, experiment.seeds))}")


def chosen_rounds(store: RunStore, selection: Selection) -> Iterator[ChosenRound]:
    """The closed rounds of `selection`, by arm, seed and round. Raises what `check_selection` raises."""
    check_selection(store, selection)
    experiment = store.experiment
    for arm in [selection.arm] if selection.arm is not None else experiment.arms:
        for seed in [selection.seed] if selection.seed is not None else experiment.seeds:
            for index in range(experiment.arm(arm).rounds + 1):
                folder = store.round(arm, seed, index)
                if folder.closed and (selection.rounds is None or index in selection.rounds):
                    yield ChosenRound(arm, seed, folder)


def trusted_file(folder: RoundFolder, name: str) -> Path | None:
    """The file `name` of a round, held against the record of the stage that wrote it; None where no stage did."""
    for record in sorted((folder.path / "stages").glob("*.json")):
        found = folder.done(record.stem)
        if found is not None and name in found.outputs:
            folder.trust(record.stem)
            return folder.path / name
    return None


def new_folder(out: Path) -> None:
    """Make folder `out`; `RunFolderError` where something is in it already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is there already and not an empty folder: name another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"the folder {out} cannot be made: {error}") from error
