"""Whether the model has what the faults of `dpo.faults` are about; before anything is sampled."""

from __future__ import annotations

from pathlib import Path

from online_dpo.config import Experiment
from online_dpo.dropout_rates import has_dropout
from online_dpo.errors import ConfigError
from online_dpo.models import load_tokenizer
from online_dpo.scored_text import padding_token


def check_faults(experiment: Experiment, model: Path) -> None:
    """Raise `ConfigError` where an arm leaves dropout on and the model in folder `model` has none, or scores padding
    and there is no token to fill up with."""
    noisy = experiment.with_dropout
    if noisy and not has_dropout(model, experiment.trust_remote_code):
        raise ConfigError(
            f"arms.{noisy[0]}: dpo.faults.dropout leaves the model's own dropout on, and every rate in the "
            f"configuration of {experiment.model} is 0: leave it out"
        )
    if any(experiment.arm(name).dpo.faults.score_padding for name in experiment.arms):
        padding_token(load_tokenizer(model, experiment.trust_remote_code))
