"""Every figure against what people use, side by side in one run: one JSON line each, and a Markdown table at the end.

    make bench ARGS="step --prompts 40,200"
    python tests/benchmarks/bench.py [FIGURE ...] [options]

Figures (none: all) and what they take on 2 cores with SmolLM2-135M and 5 runs: see tests/benchmarks/README.md.
`--small` runs all of the code on a very small random model; its figures say nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import growth
import handover
import on_policy_round
import planner
import sampling
import step
import texts
import vocabulary
from figures import Report
from random_models import TINY_SHAPE, save_llama

FIGURES: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "step": step.run,
    "vocabulary": vocabulary.run,
    "handover": handover.run,
    "sampling": sampling.run,
    "round": on_policy_round.run,
    "planner": planner.run,
    "growth": growth.run,
}
SMALL = {
    "prompts": "40,natural",
    "completion": 16,
    "longest": 200,
    "vocabularies": "5000,15000",
    "length": 128,
    "questions": 8,
    "requests": 4,
    "new_tokens": 16,
    "planner_prompts": 8,
    "most": 100,
}
"""What `--small` sets."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Ends the program with one line where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; none: all")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side, after one that warms up")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--small", action="store_true", help="try the code on a very small model")
    for module in (step, vocabulary, handover, sampling, on_policy_round, planner, growth):
        module.add_arguments(parser)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.figures if name not in FIGURES]
    if unknown:
        parser.error(f"no figure '{unknown[0]}'; there are {', '.join(FIGURES)}")
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.small:
        vars(options).update(SMALL)
    return options


def main() -> None:
    options = parse()
    report = Report()
    with tempfile.TemporaryDirectory() as place:
        if options.small:
            stories = texts.SHARED / "models" / "stories260k"
            options.model = str(save_llama(Path(place) / "tiny", TINY_SHAPE, 2, 512, tokenizer_of=stories))
        try:
            for name in options.figures or FIGURES:
                FIGURES[name](options, report)
        finally:
            # What was measured before a figure failed is still worth reading.
            if report.figures:
                print(f"\n{report.table()}", flush=True)


if __name__ == "__main__":
    main()
