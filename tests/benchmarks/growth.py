"""Figure `growth`: what a round costs and holds as it grows, 1,000 prompts to `--most`, 8 answers each.

Each size is a process of its own, `growth_round.py`: an engine that makes rows of a real one's shape and a judge that
costs nothing to ask, and everything that a real round does with them but training. Seconds are CPU seconds of the
process: another's work on the same machine counts little. `--most 1000000` takes about half an hour of one quiet core
and 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import Report

HERE = Path(__file__).resolve().parent
SIZES = [1_000, 10_000, 100_000, 1_000_000]
OFTEN = 10_000
"""Sizes up to this are measured `--runs` times; larger ones once."""
STAGES = {
    "sample": "sampled and written",
    "judge": "judged, kept in the cache and written",
    "found": "judged again, found in the cache",
    "pair": "paired",
}
"""Stages whose work is of every row. `audit` and `off_policy` draw from all rows, but work on some alone."""


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = `fixed` + `each` · rows. `off`: the largest share by which a measured size is off the line."""

    fixed: float
    each: float
    off: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this figure."""
    parser.add_argument("--most", type=int, default=100_000, help="prompts of the largest round of figure 'growth'")


def run(options: argparse.Namespace, report: Report) -> None:
    """Every size, the rates of each stage, memory, and the line through the costs."""
    sizes = [size for size in SIZES if size <= options.most] or [options.most]
    found: dict[int, list[dict[str, Any]]] = {}
    for size in sizes:
        found[size] = [_measure(size) for _ in range(options.runs if size <= OFTEN else 1)]
        _report(report, size, found[size])
    medians = {size: median_of(own) for size, own in found.items()}
    print(f"\n{table(medians)}\n", flush=True)
    for stage in [*STAGES, "round"]:
        _say_line(stage, {rows_of(own[0]): medians[size][stage] for size, own in found.items()})
    for stage, tenths in found[sizes[-1]][-1]["tenths"].items():
        if stage in STAGES and len(tenths) == 10:
            print(f"# {stage}, {sizes[-1]} prompts, CPU s of each tenth: {' '.join(f'{own:.3g}' for own in tenths)}")


def rows_of(measured: Mapping[str, Any]) -> int:
    """The answers of a measured round."""
    return int(measured["rows"])


def cpu_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """CPU seconds by stage. `round`: all of the first time, from its prompts to what is measured of it."""
    seconds = {stage: float(cpu) for stage, (_, cpu) in measured["seconds"].items()}
    return {**seconds, "round": sum(seconds[stage] for stage in seconds.keys() - {"prompts", "found", "verify"})}


def median_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over runs of one size: CPU seconds by stage, and memory (`mib`)."""
    costs = [{**cpu_of(own), "rows": rows_of(own), **own["mib"]} for own in runs]
    return {key: statistics.median(cost[key] for cost in costs) for key in costs[0]}


def fit(costs: Mapping[int, float]) -> Line:
    """The line through `costs` (CPU seconds by rows) with the least squares of relative errors, nothing below 0.

    Not of absolute ones: the largest size would be met alone.
    """
    rows, seconds = np.array(list(costs), dtype=float), np.array(list(costs.values()))
    terms = np.stack([1 / seconds, rows / seconds], axis=1)
    fixed, each = np.linalg.lstsq(terms, np.ones(len(rows)), rcond=None)[0] if len(rows) > 1 else (0.0, -1.0)
    if min(fixed, each) < 0:
        only = terms[:, 1]
        fixed, each = 0.0, float(only.sum() / (only @ only))
    return Line(float(fixed), float(each), float(np.abs((fixed + each * rows) / seconds - 1).max()))


def table(medians: Mapping[int, Mapping[str, float]]) -> str:
    """Rows a CPU second by stage and MiB, a size a line."""
    heads = ["prompts", "rows", *STAGES, "round", "MiB of prompts", "MiB over that"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for size, own in medians.items():
        rates = [own["rows"] / own[stage] for stage in [*STAGES, "round"]]
        cells = [size, own["rows"], *rates, own["prompts_mib"], own["round_mib"]]
        lines.append(f"| {' | '.join(f'{cell:,.0f}' for cell in cells)} |")
    return "\n".join(lines)


def _measure(size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        paths = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, str(HERE / "growth_round.py"), str(size), place],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"# {json.dumps(measured)}", flush=True)
    return {**measured, "mib": {f"{name}_mib": value for name, value in measured["mib"].items()}}


def _report(report: Report, size: int, runs: Sequence[Mapping[str, Any]]) -> None:
    for stage, name in STAGES.items():
        rates = [rows_of(own) / cpu_of(own)[stage] for own in runs]
        report.add(f"rows of {size} prompts, {name}", rates, [], "rows/CPU s", "more")
    report.add(
        f"peak memory of a round of {size} prompts, over them",
        [own["mib"]["round_mib"] for own in runs],
        [],
        "MiB",
        "less",
    )


def _say_line(stage: str, costs: Mapping[int, float]) -> None:
    line = fit(costs)
    each = [seconds / rows for rows, seconds in costs.items()]
    print(
        f"# {stage}: {line.fixed:.3g} s + {line.each * 1e6:.4g} µs a row, no size more than {line.off:.1%} off; "
        f"rows/s at the slowest size {min(each) / max(each):.0%} of those at the fastest",
        flush=True,
    )
