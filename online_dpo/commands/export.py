"""`online-dpo export`: a run's data for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from online_dpo.commands.common import Debug, errors_in_one_line, reading

if TYPE_CHECKING:
    from online_dpo.export import Selection
    from online_dpo.store import RunStore


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder, finished or not")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="a folder that is empty or not there")],
    form: Annotated[
        Literal["trl", "jsonl", "parquet"],
        typer.Option(
            "--format", help="trl: pairs that its DPOTrainer trains on; jsonl: the same as lines; parquet: all stages"
        ),
    ] = "trl",
    arm: Annotated[str | None, typer.Option("--arm", help="this arm alone")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="this seed alone")] = None,
    rounds: Annotated[str | None, typer.Option("--rounds", metavar="1-3", help="these rounds alone")] = None,
    trust: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the tokenizer's own code, whatever the run says")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a run's pairs, or all of its stages, for `datasets` and TRL."""
    with errors_in_one_line(debug):
        from online_dpo.display import clean, make_console
        from online_dpo.export import Selection, check_selection, export_stages, parse_rounds
        from online_dpo.store import RunStore

        with reading(folder):
            store = RunStore.open(folder)
            selection = Selection(arm, seed, None if rounds is None else parse_rounds(rounds))
            check_selection(store, selection)
            if form == "parquet":
                said = f"{export_stages(store, selection, out)} files"
            else:
                said = f"{_pairs(store, selection, out, form == 'jsonl', trust)} pairs"
        make_console().print(clean(f"{said} in {out}"), markup=False, soft_wrap=True)


def _pairs(store: RunStore, selection: Selection, out: Path, jsonl: bool, trust: bool) -> int:
    """`trust`: the user's word of now; a run folder that was received may say what it likes."""
    from online_dpo.export.trl import decoding, export_trl
    from online_dpo.models import load_tokenizer, resolve_model

    experiment = store.experiment
    model = resolve_model(
        experiment.model,
        revision=experiment.revision,
        folders=[store.folder],
        trust_remote_code=trust,
    )
    tokenizer = load_tokenizer(model.path, trust)
    return export_trl(store, selection, out, decoding(tokenizer), "jsonl" if jsonl else "parquet")
