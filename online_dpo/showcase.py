"""Held-out answers before and after, for people to read."""

from __future__ import annotations

from online_dpo.config import Experiment
from online_dpo.display import ShownAnswer, ShownPrompt
from online_dpo.records import HeldOutAnswer, read_held_out, read_prompts
from online_dpo.store import RunStore


def before_and_after(store: RunStore, experiment: Experiment) -> list[ShownPrompt]:
    """The first `evaluation.show` held-out prompts at the first seed: the initial policy's answer, then each arm's
    latest one."""
    seed = experiment.seeds[0]
    prompts = read_prompts(store.root / "prompts.parquet")["held_out"][: experiment.evaluation.show]
    columns: list[tuple[str, list[HeldOutAnswer]]] = []
    for name in experiment.arms:
        for index in _first_and_last(store, experiment, name, seed):
            label = "initial" if index == 0 else f"{name}, round {index}"
            if label not in [known for known, _ in columns]:
                columns.append((label, read_held_out(store.round(name, seed, index).path / "held_out.parquet")))
    return [
        ShownPrompt(
            prompt.text,
            tuple(ShownAnswer(label, rows[i].candidate.text, rows[i].score) for label, rows in columns),
        )
        for i, prompt in enumerate(prompts)
    ]


def _first_and_last(store: RunStore, experiment: Experiment, arm: str, seed: int) -> list[int]:
    closed = [i for i in range(experiment.arm(arm).rounds + 1) if store.round(arm, seed, i).closed]
    return sorted({closed[0], closed[-1]}) if closed else []
