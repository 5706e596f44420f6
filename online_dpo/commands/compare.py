"""`online-dpo compare`: which arm of a run, or of several, is better, by how much, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from online_dpo.commands.common import Debug, errors_in_one_line, reading
from online_dpo.errors import ConfigError


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders with the same held-out prompts")],
    select: Annotated[
        Literal["last", "best", "best_gold"] | None,
        typer.Option("--select", help="the round that stands for an arm; default: as the experiment says"),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write everything as JSON, too")] = None,
    debug: Debug = False,
) -> None:
    """Say which arm is better: verdict, differences with intervals, win matrix, league."""
    with errors_in_one_line(debug):
        from online_dpo.compare import compare as compare_outcomes
        from online_dpo.compare import contrasts_of, open_runs, read_runs
        from online_dpo.compare.display import comparison_tables
        from online_dpo.display import clean, make_console
        from online_dpo.files import write_json

        with reading(*folders):
            stores, chosen = open_runs(folders, select)
            found = compare_outcomes(read_runs(stores), chosen, contrasts_of(stores))
        console = make_console()
        console.print(comparison_tables(found))
        if json is not None:
            try:
                write_json(json, found.as_dict())
            except OSError as error:
                raise ConfigError(f"cannot write {json}: {error}") from error
            console.print(clean(f"comparison: {json}"), markup=False, soft_wrap=True)
