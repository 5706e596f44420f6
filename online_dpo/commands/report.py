"""`online-dpo report`: what was compared and what came of it, as one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from online_dpo.commands.common import Debug, errors_in_one_line, reading


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="run folders with the same held-out prompts")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="default: the folder report in the first RUN")
    ] = None,
    select: Annotated[
        Literal["last", "best", "best_gold"] | None,
        typer.Option("--select", help="the round that stands for an arm; default: the experiment's"),
    ] = None,
    answers: Annotated[
        int, typer.Option("--answers", min=1, help="at most so many answers in the page; later prompts are left out")
    ] = 20_000,
    debug: Debug = False,
) -> None:
    """Write report.html (one file, works offline), report.md, report.json and figures of one run or several."""
    with errors_in_one_line(debug):
        from online_dpo.display import clean, make_console
        from online_dpo.report.reporting import report_runs

        with reading(*folders):
            verdict, files = report_runs(folders, out or folders[0] / "report", select, answers)
        console = make_console()
        for line in (verdict, f"report: {', '.join(map(str, files))}"):
            console.print(clean(line), markup=False, soft_wrap=True)
