"""Whether the answers that an arm trains on are drawn from its reference, where its loss needs that."""

from __future__ import annotations

from online_dpo.config import ArmSettings, Experiment
from online_dpo.errors import ConfigError
from online_dpo.rounds import reference_index, source_index
from online_dpo.source_spec import parts_of, source_kind

GIVEN = ("dataset", "spin")
"""Sources of answers that no policy of the run has written."""
SAMPLED = ("current", "initial", "every", "lag")
"""Sources whose policy is known for every round beforehand."""


def check_origin(experiment: Experiment) -> None:
    """Raise `ConfigError` where `dpo.xpo_alpha` will not find, in some round, answers drawn from the reference.

    What cannot be known beforehand (streams, history, a refresh) is left to training, which looks at every round.
    """
    for name in experiment.arms:
        settings = experiment.arm(name)
        if settings.algorithm != "rloo" and settings.dpo.xpo_alpha > 0:
            fault = _fault(settings)
            if fault is not None:
                raise ConfigError(
                    f"arms.{name}: dpo.xpo_alpha needs answers drawn from the reference, and {fault}: take source: "
                    "current with reference: prior, or source: initial with reference: initial"
                )


def _fault(settings: ArmSettings) -> str | None:
    kinds = [source_kind(part) for part in parts_of(settings.source)]
    given = next((kind for kind in kinds if kind in GIVEN), None)
    if given is not None:
        return f"source: {given} has others"
    if kinds[0] not in SAMPLED or len(kinds) > 1:
        return None
    apart = (t for t in range(1, settings.rounds + 1) if source_index(settings, t) != reference_index(settings, t))
    first = next(apart, None)
    return None if first is None else f"those of round {first} are another policy's"
