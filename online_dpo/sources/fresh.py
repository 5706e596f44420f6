"""Pairs from answers that a policy of the arm samples for the round: the current one, the initial one, an older one."""

from __future__ import annotations

from online_dpo.arms import Arm
from online_dpo.judge_stage import audit_round, judge_round
from online_dpo.pair_stage import pair_round
from online_dpo.prompts import prompts_for_round
from online_dpo.rounds import Sampled
from online_dpo.sample_stage import sample_round
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder
from online_dpo.types import Prompt


def fresh_prompts(arm: Arm, index: int) -> tuple[Prompt, ...]:
    """The experiment's training prompts that round `index` (1-based) of the arm's seed is dealt."""
    return prompts_for_round(arm.run.train_prompts, arm.seed, index, arm.run.experiment.prompts.per_round)


def gather_fresh(arm: Arm, folder: RoundFolder, pinned: Sampled) -> RoundData:
    """Sample from the round's source, judge, audit the judge, pair."""
    sample = sample_round(arm, folder, pinned)
    judge = judge_round(arm, folder, pinned, sample)
    audit = audit_round(arm, folder, pinned, sample)
    pair = pair_round(arm, folder, pinned, (sample, judge))
    return RoundData(sample, judge, audit, pair, pinned.source)
