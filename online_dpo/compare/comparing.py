"""From outcomes to a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from online_dpo.compare.comparison import Comparison, Difference
from online_dpo.compare.curves import curves
from online_dpo.compare.differences import Field, differences, make_field, win_matrix
from online_dpo.compare.grid import Grid, make_grid
from online_dpo.compare.league import league
from online_dpo.compare.outcomes import Outcomes
from online_dpo.compare.over_optimisation import over_optimised
from online_dpo.compare.reading import read_outcomes
from online_dpo.compare.selecting import Select
from online_dpo.compare.sentences import verdict_sentence
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.store import RunStore

FEW_PROMPTS = 20
"""With fewer, no interval is to be relied on where scores are coarse or skewed."""


def open_runs(folders: Sequence[Path], select: Select | None = None) -> tuple[list[RunStore], Select]:
    """The runs in `folders`, and how they choose the round that stands for an arm unless `select` says.

    Raises `ConfigError` when they do not agree on that, and `RunFolderError` for a folder twice or without a run.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunFolderError("the same run is given twice")
    stores = [RunStore.open(folder) for folder in folders]
    if select is not None:
        return stores, select
    found = {store.experiment.select for store in stores}
    if len(found) > 1:
        raise ConfigError(f"the runs differ in select ({', '.join(sorted(found))}): choose one with --select")
    return stores, found.pop()


def contrasts_of(stores: Sequence[RunStore]) -> Sequence[tuple[str, str]]:
    """The differences that a run was made for. Several runs are set side by side for others: then there are none."""
    return (stores[0].experiment.contrasts or ()) if len(stores) == 1 else ()


def compare(
    outcomes: Sequence[Outcomes], select: Select = "last", contrasts: Sequence[tuple[str, str]] = ()
) -> Comparison:
    """Everything that `outcomes` (one for each closed round, all on the same prompts) say of the arms; differences are
    those of `contrasts`, by default of every two arms.

    Raises `RunFolderError` when no arm has a round after 0, and `ConfigError` for `best_gold` without a gold judge.
    """
    grid, field, found = _decide(outcomes, select, contrasts)
    return Comparison(
        selected=field.selected,
        differences=found,
        win_matrix=win_matrix(field),
        curves=curves(grid),
        over_optimised=over_optimised(grid),
        league=league(grid),
        verdict=verdict_sentence(found, grid.deciding),
        warnings=tuple(_warnings(grid, field, found, select)),
        measure=grid.deciding,
        select=select,
        prompts=int(field.judged.size),
    )


def closing_lines(store: RunStore) -> list[str]:
    """What a run ends with: the verdict and what a reader of it must know. None where fewer than two arms got far
    enough to be compared."""
    outcomes = read_outcomes(store)
    if len({one.arm for one in outcomes if one.round}) < 2:
        return []
    select = store.experiment.select
    grid, field, found = _decide(outcomes, select, contrasts_of([store]))
    notes = [f"note: {warning}" for warning in _warnings(grid, field, found, select)]
    return [f"verdict: {verdict_sentence(found, grid.deciding)}", *notes, "more: online-dpo compare RUN"]


def _decide(
    outcomes: Sequence[Outcomes], select: Select, contrasts: Sequence[tuple[str, str]]
) -> tuple[Grid, Field, tuple[Difference, ...]]:
    grid = make_grid(outcomes)
    if select == "best_gold" and not grid.has_gold:
        raise ConfigError("select: best_gold needs a gold judge (evaluation.gold) in every run")
    field = make_field(grid, select)
    return grid, field, differences(field, contrasts)


def _warnings(grid: Grid, field: Field, found: Sequence[Difference], select: Select) -> list[str]:
    """What the figures do not say of themselves."""
    said = list(grid.warnings)
    first = [rounds[0] for columns in grid.arms.values() for rounds in columns]
    for name, digests in (
        ("measured by different judges: their rewards are not on one scale", {one.judge for one in first}),
        ("measured with different sampling", {one.sampling for one in first}),
        ("not begun from one model: 'initial' is each arm's own", {one.model for one in first}),
    ):
        if len(digests) > 1:
            said.append(f"the arms are {name}")
    if select != "last":
        said.append(
            f"rounds are chosen (select: {select}) on half of the {len(grid.prompt_ids)} held-out prompts and compared "
            "on the other half: a round looks better on the prompts that it was chosen on"
        )
    seeds = found[0].seeds
    if seeds == 1:
        said.append("one seed: intervals are over prompts, and say nothing of how another seed would turn out")
    elif seeds == 2:
        said.append("two seeds say very little of how seeds differ: intervals are wide; three or more help much")
    if field.judged.size < FEW_PROMPTS:
        said.append(f"{field.judged.size} prompts are few: intervals are rough")
    lost = max(one.abstained for one in found)
    if lost:
        said.append(
            f"up to {lost} prompts are left out of a difference because a judge abstained on one of their answers"
        )
    return said
