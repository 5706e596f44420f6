"""Experiments that chance changed: each is right, or ends in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from case import Case
from mutations import RIGHT, mutated

from experiments import experiment

NUMBER = 120


def changed(seed: int) -> Callable[[Path], list[str]]:
    """`check` of the experiment that `seed` changed; its prompts and its model are there."""

    def arrange(folder: Path) -> list[str]:
        right = RIGHT | {"seeds": [0], "lora": None} | experiment(folder, arms=RIGHT["arms"])
        (folder / "experiment.yaml").write_bytes(mutated(right, Random(seed)))
        return ["check", "experiment.yaml"]

    return arrange


CASES: tuple[Case, ...] = tuple(Case(f"random: {seed}", changed(seed), r".", may_go_on=True) for seed in range(NUMBER))
