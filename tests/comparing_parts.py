"""Simulated experiments whose truth is known: outcomes with effects of prompts, seeds and arms, and heavy tails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from online_dpo.compare.outcomes import Outcomes, Values


def ids(prompts: int) -> tuple[str, ...]:
    """Ids of so many prompts."""
    return tuple(f"p{index:03d}" for index in range(prompts))


def outcome(arm: str, seed: int, index: int, reward: Sequence[float] | Values, **columns: Values | str) -> Outcomes:
    """One policy's outcomes with these rewards; answers of ten tokens, no divergence."""
    values = np.asarray(reward, dtype=np.float64)
    plain = {"gold": None, "tokens": np.full(values.size, 10.0), "log_ratio": np.zeros(values.size), "run": "run"}
    parts = {**plain, **columns}
    return Outcomes(arm=arm, seed=seed, round=index, prompt_ids=ids(values.size), reward=values, **parts)  # type: ignore[arg-type]


def experiment(
    random: np.random.Generator,
    *,
    shifts: Sequence[float] = (0.0, 0.0),
    prompts: int = 60,
    seeds: int = 3,
    spread_of_seeds: float = 0.15,
    heavy: bool = True,
) -> list[Outcomes]:
    """Arms `a`, `b`, … of one round, whose true mean rewards are `shifts`, and the round 0 that they share.

    A reward is the prompt's own level, the arm's effect on the prompt, the training run's luck (arm × seed), and the
    answer's: Student's t with 3 degrees of freedom where `heavy`, scaled to a standard deviation of 1.
    """
    found: list[Outcomes] = []
    level = _draw(random, prompts, heavy)
    taste = [0.3 * random.normal(size=prompts) for _ in shifts]
    for seed in range(seeds):
        start = outcome("a", seed, 0, level + _draw(random, prompts, heavy))
        for place, shift in enumerate(shifts):
            name = chr(ord("a") + place)
            luck = spread_of_seeds * random.normal()
            trained = level + taste[place] - taste[place].mean() + shift + luck + _draw(random, prompts, heavy)
            found.append(outcome(name, seed, 0, start.reward))
            found.append(outcome(name, seed, 1, trained, tokens=random.poisson(20, prompts).astype(np.float64)))
    return found


def _draw(random: np.random.Generator, size: int, heavy: bool) -> Values:
    return random.standard_t(3, size) / np.sqrt(3) if heavy else random.normal(size=size)
