"""The step on a GPU, in one go: models are made, the packed layout is held against the plain one, and both are timed.

    python tests/benchmarks/gpu_step.py [--shapes smollm2,1b] [--runs 5]
    python tests/benchmarks/gpu_step.py --device cpu --small     the same code on a CPU, on very small models

Needs torch, transformers, peft and pydantic; TRL's side where trl and datasets are there too. Models are random, in the
shape of SmolLM2-135M and of a Llama of 1.2 billion weights; weights and optimiser are float32 and products bfloat16,
on both sides. Prints a JSON line a figure and a table. Ends with 2 where there is no GPU, and with 1 where the layouts
differ by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import race
import torch
from figures import Report
from flops import matmul_peak
from random_models import LLAMA_1B_SHAPE, SMOLLM2_SHAPE, TINY_SHAPE, save_byte_tokenizer, save_llama
from rows import random_rows

TOKEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
"""Nats a token between the two layouts. bfloat16 rounds a logit of 16 by up to 0.06."""
NORM_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Relative difference of the first step's gradient norm."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to make, and the pairs that it trains on."""

    widths: dict[str, int]
    layers: int
    vocabulary: int
    batch: int
    trl_micro: int
    prompts: tuple[int, ...]
    completion: int


SHAPES = {
    "smollm2": Shape(SMOLLM2_SHAPE, 30, 49152, batch=64, trl_micro=16, prompts=(200, 800), completion=256),
    "1b": Shape(LLAMA_1B_SHAPE, 16, 128256, batch=32, trl_micro=8, prompts=(200, 800), completion=256),
}
SMALL = {"tiny": Shape(TINY_SHAPE, 2, 512, batch=4, trl_micro=2, prompts=(40,), completion=16)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="very small models, on a CPU")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="models to make, with commas")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layouts", default="packed,plain")
    parser.add_argument("--trl", default="eager", help="TRL's variants with commas; 'none' leaves it out")
    parser.add_argument("--tokens-per-pass", type=int, help="tokens that our side computes together; default: its own")
    options = parser.parse_args()
    unknown = [name for name in options.shapes.split(",") if name not in SHAPES]
    if unknown:
        parser.error(f"no shape '{unknown[0]}'; there are {', '.join(SHAPES)}")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu is for --small alone: the models are made for a GPU")
    return options


def main() -> int:
    """The exit code."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_step: torch finds no GPU on this machine: not measured", file=sys.stderr)
        return 2
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    peak = matmul_peak(8192, torch.bfloat16, "cuda", repeats=10) if options.device == "cuda" else race.cpu_peak()
    report = Report()
    faults = []
    for name, shape in SMALL.items() if options.small else [(n, SHAPES[n]) for n in options.shapes.split(",")]:
        with tempfile.TemporaryDirectory() as place:
            folder = save_llama(Path(place), shape.widths, shape.layers, shape.vocabulary)
            save_byte_tokenizer(folder)
            for prompt in shape.prompts:
                faults += measure(options, report, (name, shape, folder), prompt, (dtype, peak))
    print(f"\n{report.table()}")
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def measure(
    options: argparse.Namespace,
    report: Report,
    model: tuple[str, Shape, Path],
    prompt: int,
    machine: tuple[str, float],
) -> list[str]:
    """One model and prompt length; what is wrong with the packed layout."""
    name, shape, folder = model
    dtype, peak = machine
    contest = race.Race(
        f"{dtype} step of {name}, {shape.batch} pairs, {prompt} + {shape.completion} tokens",
        folder,
        random_rows((options.runs + 1) * shape.batch, prompt, shape.completion, shape.vocabulary),
        batch=shape.batch,
        layouts=options.layouts.split(","),
        variants=race.asked_variants(options.trl),
        trl_micro=shape.trl_micro,
        tokens_per_pass=options.tokens_per_pass,
        dtype=dtype,
    )
    measured = race.run(contest)
    race.say(report, contest, measured, peak)
    if len(contest.layouts) < 2:
        return []
    token, norm = race.apart(measured, contest.layouts)
    print(f"# {contest.label}: layouts differ by at most {token:.2g} nats a token, gradient norms by {norm:.2g}")
    wrong = token > TOKEN_TOLERANCE[dtype] or norm > NORM_TOLERANCE[dtype]
    return [f"{contest.label}: the layouts differ by more than rounding"] if wrong else []


if __name__ == "__main__":
    sys.exit(main())
