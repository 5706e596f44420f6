"""`online-dpo judge train`: a reward model from preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from online_dpo.commands.common import Debug, Quiet, errors_in_one_line

if TYPE_CHECKING:
    from rich.console import Console

Pairs = Annotated[str, typer.Argument(metavar="PAIRS", help="preference pairs: a file, a folder, or a hub dataset")]
Model = Annotated[str, typer.Option("--model", help="what to begin with: a folder, a packaged name or a hub id")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="where the reward model goes")]
Epochs = Annotated[int, typer.Option("--epochs", min=1)]
Rate = Annotated[float | None, typer.Option("--lr", help="learning rate; default 1e-5, with LoRA 2e-4")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="pairs of one optimiser step")]
Micro = Annotated[int, typer.Option("--micro-batch-size", min=1, help="pairs of one forward on one worker")]
Longest = Annotated[int | None, typer.Option("--max-length", min=1, help="tokens; longer pairs are left out")]
HeldOut = Annotated[float, typer.Option("--held-out", help="share of the prompts kept for measuring")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Ray workers that share each batch")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads a worker")]
Lora = Annotated[int | None, typer.Option("--lora-rank", min=1, help="train an adapter, merged on saving")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="use so many pairs, drawn by the seed")]
Centre = Annotated[float, typer.Option("--centre", min=0.0, help="weight of the penalty on rewards far from zero")]
Decay = Annotated[float, typer.Option("--weight-decay", min=0.0)]
Warmup = Annotated[float, typer.Option("--warmup", min=0.0, max=1.0, help="share of the steps")]


def judge_train(
    pairs: Pairs,
    model: Model,
    out: Out,
    epochs: Epochs = 1,
    lr: Rate = None,
    batch_size: Batch = 32,
    micro_batch_size: Micro = 4,
    max_length: Longest = None,
    held_out: HeldOut = 0.1,
    seed: Seed = 0,
    workers: Workers = 1,
    threads: Threads = None,
    lora_rank: Lora = None,
    limit: Limit = None,
    centre: Centre = 0.01,
    weight_decay: Decay = 0.0,
    warmup: Warmup = 0.1,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a reward model on preference pairs, and measure it on prompts that it never saw."""
    with errors_in_one_line(debug):
        from online_dpo.reward_spec import reward_spec

        spec = reward_spec(
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            held_out=held_out,
            seed=seed,
            workers=workers,
            threads=threads,
            lora_rank=lora_rank,
            centre=centre,
            weight_decay=weight_decay,
            warmup=warmup,
        )
        from online_dpo.display import make_console, make_progress
        from online_dpo.models import resolve_model
        from online_dpo.preferences import load_preferences
        from online_dpo.reward_training import check_free, train_reward_model

        check_free(out)
        found = load_preferences(pairs, limit=limit, seed=seed)
        with make_progress(quiet, make_console(stderr=True)) as progress:
            card = train_reward_model(resolve_model(model), found, spec, out, progress)
        _print(card, out, make_console())


def _print(card: dict[str, Any], out: Path, console: Console) -> None:
    from rich.text import Text

    from online_dpo.display import clean, number, share
    from online_dpo.reward_card import verdict

    figures = card["held_out"]
    gap = figures["difference"]
    lines = [
        f"held-out pairs: {figures['pairs']} of {figures['prompts']} prompts (95 % intervals over prompts)",
        f"right: {share(figures['accuracy'])}; 'the longer answer wins': {share(figures['longer_wins'])}; "
        f"difference {_points(gap['mean'])} points [{_points(gap['low'])}, {_points(gap['high'])}]",
        verdict(figures),
        f"Brier score: {number(figures['brier']['mean'])} (0.25: knows nothing)",
        f"speed: {number(card['training']['tokens_per_second'], places=0)} tokens/s "
        f"over {number(card['training']['seconds'], places=0)} s of training",
        f"reward model: {out}",
        f"judge: {{use: judges.reward_model:RewardModelJudge, model: {out}, "
        f"score_mean: {number(figures['score_mean'])}, score_std: {number(figures['score_std'])}}}",
    ]
    for line in lines:
        console.print(Text(clean(line)), soft_wrap=True)


def _points(value: float | None) -> str:
    from online_dpo.display import number

    return number(None if value is None else 100 * value, places=1, sign=True)
