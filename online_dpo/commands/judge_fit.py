"""`online-dpo judge fit`: a linear judge from preference pairs, with its figures on pairs that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from online_dpo.commands.common import Debug, Quiet, errors_in_one_line
from online_dpo.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from online_dpo.preferences import PreferenceSet

FIT = "judges.bradley_terry_fit:fit"
WAYS = (("without length", "controlled"), ("with length", "with_length"))
INTERVALS = (
    ("right, over pairs", "accuracy", False),
    ("right, over folds", "over_folds", False),
    ("minus 'the longer wins'", "gain", True),
)
NUMBERS = (
    ("Brier (½ always: 0.2500)", "brier"),
    ("log loss (½ always: 0.6931)", "log_loss"),
    ("prefers the longer", "prefers_longer"),
)


def judge_fit(
    pairs: Annotated[str, typer.Argument(metavar="PAIRS", help="a file, a folder or a hub dataset of judged pairs")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="the judge's folder")],
    folds: Annotated[int, typer.Option("--folds", min=2, help="of the cross-validation")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="of the drawn pairs and of the folds")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="at most this many pairs")] = None,
    split: Annotated[str, typer.Option("--split", help="of a dataset that has several")] = "train",
    strength: Annotated[
        float | None, typer.Option("--c", help="inverse of the penalty on the weights; default: chosen inside")
    ] = None,
    min_df: Annotated[int, typer.Option("--min-df", min=1, help="answers that a term must be in")] = 2,
    letters: Annotated[bool, typer.Option(help="2 to 4 neighbouring characters as terms too; slower")] = True,
    encoder: Annotated[
        str | None, typer.Option("--encoder", metavar="FOLDER", help="a model whose embeddings are features too")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit a judge to preference pairs and measure it on pairs that it has not seen. A former fit is replaced."""
    with errors_in_one_line(debug):
        from online_dpo.display import make_console, make_progress
        from online_dpo.judging import import_object
        from online_dpo.preferences import load_preferences

        fit = import_object(FIT)
        found = load_preferences(pairs, split=split, limit=limit, seed=seed)
        with make_progress(quiet, make_console(stderr=True)) as progress:
            progress.start(f"fitting {len(found.pairs)} pairs", folds + 1, "fits")
            try:
                card = fit(
                    found.pairs,
                    output,
                    folds=folds,
                    seed=seed,
                    c=strength,
                    min_df=min_df,
                    letters=letters,
                    encoder=encoder,
                    source=Path(found.source).name,
                    advance=progress.advance,
                )
            except OSError as error:
                raise ConfigError(f"cannot write to {output}: {error}") from error
            progress.finish()
        _print(card.as_dict(), found, output)


def _print(card: Mapping[str, Any], found: PreferenceSet, output: Path) -> None:
    from online_dpo.display import clean, interval, make_console, number

    console = make_console()
    for part in (_figures(card), _reliability(card)):
        console.print(part)
        console.print()
    lines = [
        card["verdict"],
        f"'The longer answer wins' is right on {interval(card['longer_wins'])} of these pairs, "
        f"'the shorter wins' on {number(1 - card['longer_wins']['mean'], places=3)}; intervals are 95 %.",
        f"{card['pairs']} pairs on {card['prompts']} prompts; fitted in {card['fit_seconds']:.1f} s, "
        f"cross-validated in {card['validation_seconds']:.1f} s",
    ]
    lost = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in found.dropped.items() if count)
    if lost:
        lines.append(f"rows left out of {found.source}: {lost}")
    lines.append(f"judge: {{use: judges.bradley_terry:BradleyTerryJudge, model: {output}}}")
    for line in lines:
        console.print(clean(line), markup=False, soft_wrap=True)


def _figures(card: Mapping[str, Any]) -> Table:
    from online_dpo.display import clean, interval, number

    table = _table(clean(f"{card['source']}: pairs held out in {card['folds']} folds, no prompt in two"), "figure")
    for name, _ in WAYS:
        table.add_column(name, justify="right")
    without, with_length = (card[key] for _, key in WAYS)
    for name, key, sign in INTERVALS:
        table.add_row(name, interval(without[key], sign=sign), interval(with_length[key], sign=sign))
    for name, key in NUMBERS:
        table.add_row(name, number(without[key], places=4), number(with_length[key], places=4))
    return table


def _reliability(card: Mapping[str, Any]) -> Table:
    from online_dpo.display import number

    table = _table("how sure, and how often right then", "score")
    for header in ("pairs", "mean probability", "right"):
        table.add_column(header, justify="right")
    for name, key in WAYS:
        for one in card[key]["reliability"]:
            table.add_row(
                name, number(one["n"]), number(one["confidence"], places=3), number(one["accuracy"], places=3)
            )
    return table


def _table(title: str, first: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False
    )
    table.add_column(first)
    return table
