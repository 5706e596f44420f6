"""The stage that holds a policy's log-probs of both answers of held-out human pairs against what people chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.human_pairs import pairs_digest
from online_dpo.off_policy import margins, positive
from online_dpo.scored_records import RankedPair, read_human_pairs, write_human_pairs
from online_dpo.scoring import score_answers
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Policy

Sums = tuple[list[float], list[float]]
"""Summed log-probs of all chosen and of all rejected answers."""


def rank_human_pairs(arm: Arm, folder: RoundFolder, policy: Policy) -> StageRecord | None:
    """The summed log-probs of both answers of every pair, by the learner; the initial policy's are round 0's.

    None where the experiment has no such pairs.
    """
    pairs = arm.run.human_pairs
    if not pairs:
        return None

    def produce(out: Path) -> dict[str, Any]:
        own = _sums(arm, folder.index, policy)
        initial = own if policy.digest == arm.run.initial.digest else _initial_sums(arm)
        columns = zip(*own, *initial, strict=True)
        rows = [RankedPair(pair.prompt.id, *sums) for pair, sums in zip(pairs, columns, strict=True)]
        write_human_pairs(out / "human_pairs.parquet", rows)
        return {"pairs": len(rows)}

    inputs = {"policy": policy.digest, "initial": arm.run.initial.digest, "pairs": pairs_digest(pairs)}
    return folder.stage("human_pairs", inputs, ["human_pairs.parquet"], produce)


def _sums(arm: Arm, index: int, policy: Policy) -> Sums:
    pairs = arm.run.human_pairs
    # A pair's answers side by side: where the learner packs, their prompt is computed once.
    items = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    sums = [math.fsum(row) for row in score_answers(arm, f"round {index} human pairs", policy, items)]
    return sums[::2], sums[1::2]


def _initial_sums(arm: Arm) -> Sums:
    rows = _rows(arm.folder(0))
    return [row.chosen_logprob for row in rows], [row.rejected_logprob for row in rows]


def _rows(folder: RoundFolder) -> Sequence[RankedPair]:
    folder.trust("human_pairs")
    return read_human_pairs(folder.path / "human_pairs.parquet")


def human_pair_figures(folder: RoundFolder) -> dict[str, Any] | None:
    """How often the round's policy ranks held-out pairs as people did, with Wilson's intervals, ties one half.

    `implicit_accuracy`: log π/π₀ is larger for the chosen answer, the accuracy of DPO's implicit reward; none at round
    0, where it is ½ by definition. `ranking_accuracy`: log π itself is larger, so that the policy would sooner write
    the chosen answer; the two can differ widely (Chen et al. 2024, Preference learning algorithms do not learn
    preference rankings). None where the experiment has no such pairs.
    """
    if folder.done("human_pairs") is None:
        return None
    rows = _rows(folder)
    prompts = [row.prompt_id for row in rows]
    chosen, rejected = [row.chosen_logprob for row in rows], [row.rejected_logprob for row in rows]
    first, second = [row.initial_chosen_logprob for row in rows], [row.initial_rejected_logprob for row in rows]
    zero = [0.0] * len(rows)
    implicit = positive(margins(chosen, rejected, first, second), prompts).as_dict()
    return {
        "n": len(rows),
        "implicit_accuracy": implicit if folder.index else None,
        "ranking_accuracy": positive(margins(chosen, rejected, zero, zero), prompts).as_dict(),
    }
