"""Steps of several contenders in turn, and the figures they make: tokens a second, peak memory, utilisation.

Tokens are counted as the plain layout computes them (the prompt twice) on every side, so that rates compare seconds a
step. The reference is counted in: TRL's pass over the step's pairs, and our check of the engine's log-probs, which is
made once a round and spread over a round's steps. Utilisation is that of the step alone, by the operations that the
contender's own layout needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from figures import Report
from flops import Lengths, matmul_peak, plain_tokens, shape_of, step_flops
from rows import Row, write_rows
from turns import Contender, Said, cores

from online_dpo.backends.allocator import learner_environment

ROUND_PAIRS = 64
"""Pairs of a round, over whose steps the learner's check of the engine's log-probs is spread."""


@dataclass(frozen=True)
class Race:
    """What runs. `layouts`: ours first, then what it is also held against.

    `variants`: TRL's (see `trl_step.py`), as KIND or KIND:PAIRS, the pairs computed together, else `trl_micro`.
    """

    label: str
    folder: Path
    rows: Sequence[Row]
    batch: int
    layouts: Sequence[str]
    variants: Sequence[str]
    trl_micro: int
    tokens_per_pass: int | None = None
    dtype: str = "float32"
    lr: float = 1e-6

    @property
    def steps(self) -> list[list[Lengths]]:
        """The pairs' lengths by step; the first step warms up."""
        lengths = [row.lengths for row in self.rows]
        return [lengths[start : start + self.batch] for start in range(0, len(lengths), self.batch)]


@dataclass
class Measured:
    """What one contender took, step by step: the step, and beside it the seconds that its reference took."""

    loaded: Said = field(default_factory=dict)
    checked: Said = field(default_factory=dict)
    reference: list[float] = field(default_factory=list)
    steps: list[Said] = field(default_factory=list)

    def of(self, key: str) -> list[float]:
        """`key` of each step; the first one warms up and is left out."""
        return [said[key] for said in self.steps[1:]]

    def rates(self, tokens: Sequence[int]) -> list[float]:
        """Tokens a second of each step, the reference's cost included."""
        spent = zip(tokens, self.of("seconds"), self.reference[1:], strict=True) if self.steps else []
        return [count / (step + reference) for count, step, reference in spent]


def run(race: Race) -> dict[str, Measured]:
    """Every contender's steps, in turn: ours, theirs, ours, theirs."""
    results: dict[str, Measured] = {}
    number = len(race.steps)
    with contenders(race) as (ours, theirs):
        for name, contender in [*ours.items(), *theirs.items()]:
            results[name] = Measured(loaded=contender.turn())
        for name, contender in ours.items():
            results[name].checked = contender.turn()
            share = results[name].checked["seconds"] * race.batch / ROUND_PAIRS
            results[name].reference = [share] * number
        for name, contender in theirs.items():
            results[name].reference = [contender.turn()["seconds"] for _ in range(number)]
        for _ in range(number):
            for name, contender in [*ours.items(), *theirs.items()]:
                results[name].steps.append(contender.turn())
    return results


@contextlib.contextmanager
def contenders(race: Race) -> Iterator[tuple[dict[str, Contender], dict[str, Contender]]]:
    """Our layouts and TRL's variants, by name, each in a process of its own."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        write_rows(Path(place) / "rows.json", race.rows)
        common: dict[str, Any] = {"model": str(race.folder), "batch": race.batch, "lr": race.lr, "dtype": race.dtype}
        common |= {"rows": f"{place}/rows.json", "logps": f"{place}/logps.json"}
        ours, theirs = {}, {}
        for layout in race.layouts:
            settings = common | {"layout": layout, "tokens_per_pass": race.tokens_per_pass}
            # As the product starts a learner's process.
            environment = {} if torch.cuda.is_available() else learner_environment()
            ours[our_name(layout)] = stack.enter_context(Contender(layout, "our_step.py", settings, environment))
        for variant in race.variants:
            kind, _, micro = variant.partition(":")
            settings = common | {"variant": kind, "micro": int(micro or race.trl_micro)}
            theirs[f"TRL {variant}"] = stack.enter_context(Contender(f"trl-{kind}", "trl_step.py", settings))
        yield ours, theirs


def our_name(layout: str) -> str:
    """How one of our layouts is called in figures."""
    return f"our {layout} layout"


def asked_variants(given: str) -> list[str]:
    """TRL's variants of a command line, by commas: none where TRL is not installed, or "none" is asked for."""
    return [] if given == "none" or importlib.util.find_spec("trl") is None else given.split(",")


def say(report: Report, race: Race, measured: dict[str, Measured], peak: float) -> None:
    """The figures of our first layout against each other contender; `peak`: the machine's operations a second."""
    first, *others = measured
    tokens = [plain_tokens(step) for step in race.steps[1:]]
    mine, nothing = measured[first], Measured()
    for name in others or [""]:
        other = measured.get(name, nothing)
        label = f"{race.label}: {versus(first, name)}"
        report.add(label, mine.rates(tokens), other.rates(tokens), "tokens/s", "more")
        report.add(f"{label}, peak memory", mine.of("peak_mib"), other.of("peak_mib"), "MiB", "less")
        ours, theirs = (utilisation(race, who, side, peak) for who, side in ((first, mine), (name, other)))
        unit = f"% of {peak / 1e9:.0f} GFLOP/s"
        report.add(f"{label}, model FLOPs utilisation", ours, theirs, unit, "more")
    for name, side in measured.items():
        seconds, reference = statistics.median(side.of("seconds")), statistics.median(side.reference[1:])
        print(f"# {race.label}: {name}: {seconds:.3g} s a step and {reference:.3g} s for its reference", flush=True)


def utilisation(race: Race, name: str, side: Measured, peak: float) -> list[float]:
    """Per cent of `peak` that each step reached."""
    if not side.steps:
        return []
    shape = shape_of(race.folder)
    needed = [step_flops(shape, step, shared_prompt=name == our_name("packed")) for step in race.steps[1:]]
    return [100 * flops / (seconds * peak) for flops, seconds in zip(needed, side.of("seconds"), strict=True)]


def apart(measured: dict[str, Measured], layouts: Sequence[str]) -> tuple[float, float]:
    """How far our first two layouts are from each other at the same weights.

    The largest difference of a token's log-prob, on the pairs that the second one's check looks at (the log-probs it
    is given as the engine's are the first one's), and the relative difference of the first step's gradient norm.
    """
    first, second = (measured[our_name(layout)] for layout in layouts[:2])
    norms = [side.steps[0]["grad_norm"] for side in (first, second)]
    return second.checked["engine_gap_token"], abs(norms[0] - norms[1]) / norms[1]


def cpu_peak(repeats: int = 5) -> float:
    """This machine's float32 product of 2048 × 2048 matrices on all cores, operations a second."""
    torch.set_num_threads(cores())
    return matmul_peak(repeats=repeats)


def versus(first: str, other: str) -> str:
    """Whose figure it is."""
    return f"{first} against {other}" if other else first
