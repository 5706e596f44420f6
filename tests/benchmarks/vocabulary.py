"""Figure `vocabulary`: what a step holds beyond weights, gradients and optimiser states, as the vocabulary grows.

Two random Llamas that differ in their vocabulary alone, in SmolLM2's layer shape, with tied embeddings. A step's peak
is measured in a process of its own; subtracted are what the process held beside the model as it was loaded (Python and
its libraries), and 16 bytes a weight by count: the weight, its gradient and AdamW's two moments, each float32. What is
left are activations, logits and temporary copies.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import race
from figures import Report
from random_models import SMOLLM2_SHAPE, save_llama
from rows import random_rows

from online_dpo.models import resolve_model

PAIRS = 2
"""Pairs of a step."""
LAYERS = 8
BYTES_A_WEIGHT = 16
Over = dict[str, list[float]]
"""MiB over the counted need in each step, by contender."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this figure."""
    parser.add_argument("--vocabularies", default="50000,150000", help="the smaller and the larger, with a comma")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence: half prompt, half completion")


def run(options: argparse.Namespace, report: Report) -> None:
    """Each vocabulary by itself, and the larger over the smaller."""
    sizes = [int(size) for size in options.vocabularies.split(",")]
    over = {size: measure(options, size) for size in sizes}
    first, *others = over[sizes[0]]
    for name in others or [""]:
        for size in sizes:
            label = f"memory of a step over weights, gradients, optimiser; vocabulary {size}, length {options.length}"
            theirs = over[size].get(name, [])
            report.add(f"{label}: {race.versus(first, name)}", over[size][first], theirs, "MiB", "less")
        ours, theirs = (_growth(over[sizes[0]], over[sizes[-1]], side) for side in (first, name))
        label = f"the same, vocabulary {sizes[-1]} over {sizes[0]}"
        report.add(f"{label}: {race.versus(first, name)}", ours, theirs, "×", "less")


def measure(options: argparse.Namespace, vocabulary: int) -> Over:
    """What each contender holds over its counted need."""
    half = options.length // 2
    with tempfile.TemporaryDirectory() as place:
        tokenizer_of = resolve_model(options.model).path
        contest = race.Race(
            f"vocabulary {vocabulary}",
            save_llama(Path(place) / "model", SMOLLM2_SHAPE, LAYERS, vocabulary, tokenizer_of=tokenizer_of),
            random_rows((options.runs + 1) * PAIRS, half, half, vocabulary),
            batch=PAIRS,
            layouts=options.layouts.split(","),
            variants=race.asked_variants(options.trl),
            trl_micro=PAIRS,
            tokens_per_pass=options.tokens_per_pass,
        )
        measured = race.run(contest)
    return {name: _over(contest.label, name, side) for name, side in measured.items()}


def _over(label: str, name: str, side: race.Measured) -> list[float]:
    counted = side.loaded["weights"] * BYTES_A_WEIGHT / 2**20
    beside, peaks = side.loaded["beside_mib"], side.of("peak_mib")
    print(
        f"# {label}: {name}: peak {statistics.median(peaks):.0f} MiB, of which {counted:.0f} weights, gradients and "
        f"optimiser by count, and {beside:.0f} held beside the loaded model",
        flush=True,
    )
    return [peak - beside - counted for peak in peaks]


def _growth(small: Over, large: Over, name: str) -> list[float]:
    return [b / a for a, b in zip(small.get(name, []), large.get(name, []), strict=True)]
