"""The command line. Loads nothing heavy before a command needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import online_dpo
from online_dpo.commands.check import check
from online_dpo.commands.common import Debug, Quiet, errors_in_one_line, reading, tell_own_code
from online_dpo.commands.compare import compare
from online_dpo.commands.export import export
from online_dpo.commands.fork import fork
from online_dpo.commands.going import go, print_tables
from online_dpo.commands.init import init
from online_dpo.commands.judge_ask import judge_ask
from online_dpo.commands.judge_audit import judge_audit
from online_dpo.commands.judge_fit import judge_fit
from online_dpo.commands.judge_train import judge_train
from online_dpo.commands.program import Program
from online_dpo.commands.report import report
from online_dpo.commands.watch import watch
from online_dpo.config import load_experiment

app = typer.Typer(
    name="online-dpo",
    cls=Program,
    help="Multi-round DPO with fresh on-policy pairs: sample, judge, pair, train, measure, repeat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

judge_app = typer.Typer(
    help="Judges: audit one, fit or train one, be one.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(judge_app, name="judge")
judge_app.command("audit")(judge_audit)
judge_app.command("fit")(judge_fit)
judge_app.command("train")(judge_train)
judge_app.command("ask")(judge_ask)

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="the experiment")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, for example runs/quickstart")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key; may be repeated")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="run this seed instead; may be repeated")]


app.command("init")(init)
app.command("check")(check)
app.command("compare")(compare)
app.command("fork")(fork)
app.command("report")(report)
app.command("watch")(watch)
app.command("export")(export)


@app.command()
def run(
    experiment: ExperimentFile, sets: Sets = None, seeds: Seeds = None, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Run an experiment, or go on with it where its run folder exists already."""
    with errors_in_one_line(debug):
        spec = load_experiment(experiment, sets, seeds)
        from online_dpo.backends.factory import check_place
        from online_dpo.run_lock import hold
        from online_dpo.runs import open_or_create, resolve

        tell_own_code(spec, experiment.parent)
        resolved = resolve(spec, experiment.parent)
        check_place(spec, resolved.model.path)
        with hold(resolved.root, new=True):
            go(open_or_create(resolved), resolved.model, quiet, resolved.datasets)


@app.command()
def resume(folder: RunFolder, quiet: Quiet = False, debug: Debug = False) -> None:
    """Go on with a run that was stopped; a finished run only prints its tables."""
    with errors_in_one_line(debug):
        from online_dpo.run_lock import hold
        from online_dpo.runs import reopen

        with hold(folder):
            with reading(folder):
                store, model = reopen(folder, tell_own_code)
            go(store, model, quiet)


@app.command()
def show(folder: RunFolder, debug: Debug = False) -> None:
    """Print the tables of a run, finished or not."""
    with errors_in_one_line(debug):
        from online_dpo.display import make_console
        from online_dpo.store import RunStore

        with reading(folder):
            store = RunStore.open(folder)
            print_tables(store, store.experiment, make_console())


def main() -> None:
    """Entry point."""
    # Progress bars of libraries (loading, converting) would run through ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    app()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(online_dpo.__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
