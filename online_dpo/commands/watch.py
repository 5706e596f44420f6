"""`online-dpo watch`: how far a run is, live, from its folder alone."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from online_dpo.commands.common import Debug, errors_in_one_line, reading

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_SECONDS = 2.0


def watch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")],
    debug: Debug = False,
) -> None:
    """Show how far a run is while another process works on it; on no terminal, once. Ctrl-C ends it, not the run."""
    with errors_in_one_line(debug):
        from online_dpo.display import make_console
        from online_dpo.display.watched import watched
        from online_dpo.watching import read_snapshot

        console = make_console()
        # Ctrl-C is how one leaves.
        with reading(folder), suppress(KeyboardInterrupt):
            if console.is_terminal:
                _live(folder, console)
            else:
                console.print(watched(read_snapshot(folder), time.time()))


def _live(folder: Path, console: Console) -> None:
    """Until the run is finished, or its process has gone."""
    from rich.live import Live

    from online_dpo.display import clean
    from online_dpo.display.watched import watched
    from online_dpo.watching import read_snapshot

    seen_working = False
    with Live(console=console, auto_refresh=False) as live:
        while True:
            run = read_snapshot(folder)
            live.update(watched(run, time.time(), console.height), refresh=True)
            if run.finished or (seen_working and not run.working):
                break
            seen_working = run.working
            time.sleep(REFRESH_SECONDS)
    if not run.finished:
        line = f"its process has ended; go on with: online-dpo resume {folder}"
        console.print(clean(line), markup=False, soft_wrap=True)
