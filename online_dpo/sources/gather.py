"""Which module gives an arm's round its prompts and pairs."""

from __future__ import annotations

from online_dpo.arms import Arm
from online_dpo.prompts import prompts_for_round
from online_dpo.rounds import Pinned
from online_dpo.sources.fresh import gather_fresh
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder
from online_dpo.types import Prompt


def round_prompts(arm: Arm, index: int) -> tuple[Prompt, ...]:
    """The prompts of round `index` (1-based) of `arm`."""
    return prompts_for_round(arm.run.train_prompts, arm.seed, index, arm.run.experiment.prompts.per_round)


def gather(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """The round's pairs, by the arm's source."""
    return gather_fresh(arm, folder, pinned)
