"""Whether the arms of an experiment can make pairs of what they sample."""

from __future__ import annotations

from online_dpo.config import Experiment
from online_dpo.errors import ConfigError
from online_dpo.source_spec import parts_of, source_kind

OTHERS = ("dataset", "spin", "stream")
"""Sources whose pairs need no two answers of the arm's own policy."""


def check_candidates(experiment: Experiment) -> None:
    """Raise `ConfigError` where an arm pairs its own answers and has one a prompt, or answers that are all alike."""
    for name in experiment.arms:
        arm = experiment.arm(name)
        if all(source_kind(part) in OTHERS for part in parts_of(arm.source)):
            continue
        if arm.sampling.n < 2:
            raise ConfigError(
                f"arm {name}: sampling.n is 1, and a pair is made of two answers to one prompt: set it to 2 or more"
            )
        if arm.sampling.temperature == 0:
            raise ConfigError(
                f"arm {name}: sampling.temperature is 0, so that all {arm.sampling.n} answers to a prompt are alike "
                "and none is chosen over another: set it above 0"
            )
