"""`online-dpo fork`: a new run that branches off a finished or stopped one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from online_dpo.commands.common import Debug, Quiet, errors_in_one_line, reading, tell_own_code
from online_dpo.commands.going import go


def fork(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder to branch off")],
    arm: Annotated[str, typer.Option("--arm", help="the arm that the new run goes on with")],
    index: Annotated[int, typer.Option("--round", help="the first round that is done anew")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="what changes from there on; may be repeated")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="this seed alone; default: all of the run's")] = None,
    name: Annotated[str | None, typer.Option("--name", help="the new run's; default: RUN-ARM-ROUND")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Branch a run: rounds before --round are taken over, and of that round the stages that the change leaves as they
    were (with another judge its answers, for instance); then go on as `run` does."""
    with errors_in_one_line(debug):
        from online_dpo.forking import plan_fork
        from online_dpo.run_lock import hold
        from online_dpo.runs import fork_run, reopen
        from online_dpo.store import RunStore

        with reading(folder):
            planned = plan_fork(RunStore.open(folder), arm, index, sets or [], seed, name)
            tell_own_code(planned.experiment, planned.store.folder)
            root = fork_run(planned)
        with hold(root):
            store, model = reopen(root)
            go(store, model, quiet)
