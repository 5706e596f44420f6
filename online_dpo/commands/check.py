"""`online-dpo check`: what an experiment would do, and what it would take, before it does anything."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from online_dpo.commands.common import Debug, Quiet, errors_in_one_line, reading, tell_own_code
from online_dpo.config import Experiment, load_experiment
from online_dpo.errors import ConfigError

TERMINATED = 128 + signal.SIGTERM
"""The exit status that shells give to what SIGTERM ended."""

if TYPE_CHECKING:
    from rich.console import Console

    from online_dpo.runs import Resolved


def check(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="the experiment")],
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a key")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="this seed instead; may be repeated")] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="rehearse it here for a minute or two, and predict what it takes")
    ] = False,
    like: Annotated[
        Path | None, typer.Option("--like", metavar="RUN", help="predict by what the stages of a run took")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option("--hardware", metavar="GPU:COUNT", help="predict for GPUs that are not here, h100:8; on paper"),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Validate an experiment, find its model, prompts and judges, and print the plan; predict what it would take."""
    with errors_in_one_line(debug):
        spec = load_experiment(experiment, sets, seeds)
        if sum((predict, like is not None, hardware is not None)) > 1:
            raise ConfigError("--predict, --like and --hardware are three ways to predict: give one of them")
        if hardware is not None:
            _on_paper(spec, experiment.parent, hardware)
            return
        from online_dpo.display import make_console

        resolved, engine = _plan(spec, experiment.parent, make_console())
        if predict:
            _rehearsed(resolved, engine, quiet)
        if like is not None:
            with reading(like):
                _like(resolved, engine, like)


def _on_paper(spec: Experiment, folder: Path, said: str) -> None:
    """Of the model no more than config.json is needed, and no prompts."""
    from online_dpo.display import make_console
    from online_dpo.planner.display import prediction_tables
    from online_dpo.planner.paper import hardware
    from online_dpo.planner.predicting import on_paper
    from online_dpo.planner.shape import folder_of

    there = hardware(said)
    make_console().print(prediction_tables(on_paper(spec, folder_of(spec.model, [folder]), there)))


def _like(resolved: Resolved, engine: str, run: Path) -> None:
    from online_dpo.display import make_console
    from online_dpo.planner.display import prediction_tables
    from online_dpo.planner.predicting import like_run

    make_console().print(prediction_tables(like_run(resolved, engine, run)))


def _rehearsed(resolved: Resolved, engine: str, quiet: bool) -> None:
    from online_dpo.display import make_console, make_progress
    from online_dpo.planner.display import prediction_tables
    from online_dpo.planner.predicting import by_rehearsal
    from online_dpo.planner.processes import age
    from online_dpo.planner.rehearsal import described

    shown = make_console(stderr=True)
    with _sigterm_unwinds(), make_progress(quiet, shown) as progress:
        progress.say(described(resolved, engine))
        prediction = by_rehearsal(resolved, engine, progress, age())
    make_console().print(prediction_tables(prediction))


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: the rehearsal's folder, which holds weights, goes with it."""

    def leave(*_: object) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plan(spec: Experiment, folder: Path, console: Console) -> tuple[Resolved, str]:
    """Print what was found and the plan; returns it, and the engine's kind."""
    from online_dpo.backends.factory import choose_engine
    from online_dpo.confounding import confounded
    from online_dpo.display import clean
    from online_dpo.judging import judge_digest
    from online_dpo.model_check import describe_end
    from online_dpo.plan import differences, plan_arms
    from online_dpo.plan_display import plan_tables, warning_lines
    from online_dpo.run_lock import check_room
    from online_dpo.runs import resolve
    from online_dpo.sft_stage import describe_sft
    from online_dpo.sources.datasets import describe_datasets, with_own_prompts

    tell_own_code(spec, folder)
    resolved = resolve(spec, folder)
    check_room(resolved.root)
    kind, engine = choose_engine(spec, resolved.model.path)
    lines = [
        f"model: {resolved.model.name} ({resolved.model.origin}, digest {resolved.model.digest[:12]})",
        *describe_end(resolved.model.path),
        f"prompts: {len(resolved.prompts.train)} to train, {len(resolved.prompts.held_out)} held out, "
        f"dropped {resolved.prompts.dropped}",
        *describe_datasets(resolved.datasets),
        *describe_sft(spec, resolved.datasets),
        engine,
        f"run folder: {resolved.root}",
    ]
    console.print("\n".join(map(clean, lines)), markup=False, soft_wrap=True)
    console.print(plan_tables(plan_arms(resolved), differences(spec), len(spec.seeds)))
    own_prompts = with_own_prompts(spec, resolved.datasets, resolved.prompts.train)
    if warnings := confounded(spec, lambda judge: judge_digest(judge, [resolved.folder]), own_prompts):
        console.print(warning_lines(warnings))
    return resolved, kind
