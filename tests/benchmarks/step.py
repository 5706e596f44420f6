"""Figure `step`: what one optimiser step takes, in seconds and memory, against TRL's DPOTrainer and our plain layout.

On both sides the same pairs in the same batches of 4, AdamW, the same rate, gradients clipped at norm 1, float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import race
from figures import Report
from rows import Row
from texts import exact_rows, natural_rows

from online_dpo.models import load_tokenizer, resolve_model

BATCH = 4
"""Pairs a step."""

TRL_TOKENS = 2200
"""Tokens that TRL's side computes together, at most, unless its variant says how many pairs.

On 2 cores it is no faster with more than about 1000, and at prompts of 800 tokens 4 pairs together want 15 GB.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this figure."""
    parser.add_argument("--prompts", default="40,200,800,natural", help="prompt lengths, or 'natural', with commas")
    parser.add_argument("--completion", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--layouts", default="packed,plain", help="ours first, then what it is also held against")
    parser.add_argument(
        "--trl",
        default="eager",
        help="TRL's variants with commas: eager, checkpointing or compiled, with :PAIRS that are computed together "
        "(default: by length, see TRL_TOKENS); 'none' leaves it out",
    )
    parser.add_argument("--tokens-per-pass", type=int, help="tokens that our side computes together; default: its own")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest sequence of 'natural'")


def run(options: argparse.Namespace, report: Report) -> None:
    """All prompt lengths, one after the other."""
    folder = resolve_model(options.model).path
    tokenizer = load_tokenizer(folder)
    for kind in options.prompts.split(","):
        count = (options.runs + 1) * BATCH
        if kind == "natural":
            rows = natural_rows(tokenizer, count, options.longest)
            label = f"step, lengths as people wrote them (sequences of {options.longest} tokens at most)"
        else:
            rows = exact_rows(tokenizer, count, int(kind), options.completion)
            label = f"step, prompts of {kind} tokens"
        contest = race.Race(
            label,
            folder,
            rows,
            batch=BATCH,
            layouts=options.layouts.split(","),
            variants=race.asked_variants(options.trl),
            trl_micro=trl_micro(rows),
            tokens_per_pass=options.tokens_per_pass,
        )
        before = race.cpu_peak()
        measured = race.run(contest)
        # A machine that others share is not as fast at every moment.
        race.say(report, contest, measured, max(before, race.cpu_peak()))
        if len(contest.layouts) > 1:
            token, norm = race.apart(measured, contest.layouts)
            print(f"# {label}: our layouts differ by at most {token:.2g} nats a token, gradient norms by {norm:.2g}")


def trl_micro(rows: Sequence[Row]) -> int:
    """Pairs that TRL computes together: as many of 4, 2 or 1 as `TRL_TOKENS` holds."""
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in (row.lengths for row in rows))
    return next((pairs for pairs in (4, 2) if 2 * pairs * longest <= TRL_TOKENS), 1)
