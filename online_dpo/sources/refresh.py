"""Answers are sampled anew only when those of before have become too off-policy: `source: {refresh_when: …}`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.files import digest_json
from online_dpo.off_policy import ess, kl_token_k3
from online_dpo.rounds import Pinned, sampled_in
from online_dpo.scoring import score_answers
from online_dpo.seeds import derive_seed
from online_dpo.source_spec import RefreshSpec, SourceSpec
from online_dpo.sources.batch import Batch, read_batch
from online_dpo.sources.fresh import fresh_prompts, gather_fresh
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.saving import Given, give_batch, record_of
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Pair, Policy, Prompt

MEASURED = 32
"""Pairs on whose two answers off-policyness is measured: 64 answers."""


def refreshed_prompts(arm: Arm, index: int) -> tuple[Prompt, ...]:
    """The prompts of round `index`: its own, or those of the last one that sampled. Decides which, if that is open."""
    decide(arm, index)
    return fresh_prompts(arm, sampled_in(arm.folder(index)))


def gather_refreshed(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """Fresh pairs, or those that the last sampling round trained on."""
    last = sampled_in(folder)
    if last == folder.index:
        return gather_fresh(arm, folder, pinned)
    origin = arm.folder(last)
    known = {prompt.id: prompt for prompt in pinned.prompts}
    digests = [record_of(origin, stage).outputs for stage in ("sample", "judge", "pair")]
    decided = {"kept_from": digest_json(digests)}
    place = f"{arm.name}/seed_{arm.seed}/round_{last:02d}"
    sample, judge, pair = give_batch(folder, Given(decided, place, lambda: read_batch(origin, known), origin))
    return RoundData(sample, judge, None, pair, pinned.source)


def decide(arm: Arm, index: int) -> StageRecord:
    """Whether round `index` samples: the stage `refresh`, before anything else of the round. Decided once."""
    folder = arm.folder(index)
    record = folder.done("refresh")
    if record is not None:
        return record
    limits = _limits(arm)
    decided = {"limits": digest_json(limits.model_dump()), "seed": f"{arm.seed}/{index}"}
    if index == 1:
        return folder.stage("refresh", decided, [], lambda out: _decision(limits, 1, 1, None, None))
    last = sampled_in(arm.folder(index - 1))
    origin, policy = arm.folder(last), arm.policies.at(index - 1)
    sampled = [record_of(origin, stage).outputs for stage in ("sample", "pair")]

    def produce(out: Path) -> dict[str, Any]:
        return _decision(limits, index, last, *_off_policyness(arm, index, origin, policy))

    decided |= {"policy": policy.digest, "pairs": digest_json(sampled), "sampled_in_round": str(last)}
    return folder.stage("refresh", decided, [], produce)


def refresh_figures(folder: RoundFolder) -> dict[str, Any] | None:
    """What was decided and from which figures; None for an arm that does not decide."""
    record = folder.done("refresh")
    return None if record is None else record.info


def _decision(limits: RefreshSpec, index: int, last: int, ess: float | None, kl: float | None) -> dict[str, Any]:
    """`ess`: share of the answers; `kl`: KL(source‖policy), nats a token. None: without bound, or not measured."""
    too_old = limits.most_rounds is not None and index - last >= limits.most_rounds
    unlike = limits.ess_below is not None and (ess is None or ess < limits.ess_below)
    far = limits.kl_above is not None and (kl is None or kl > limits.kl_above)
    refreshed = index == last or too_old or unlike or far
    return {"refreshed": refreshed, "ess": ess, "kl_token": kl, "sampled_in_round": index if refreshed else last}


def _off_policyness(arm: Arm, index: int, origin: RoundFolder, policy: Policy) -> tuple[float | None, float | None]:
    """Effective sample size and KL a token of the trained answers of the round in `origin` under `policy`.

    The stored log-probs are the source's own, before temperature and top-p: with these other than 1 the figures say how
    far the policy is from its source, not from what the answers were drawn from.
    """
    prompts = {prompt.id: prompt for prompt in fresh_prompts(arm, origin.index)}
    pairs = _measured(arm, index, read_batch(origin, prompts))
    answers = {
        (answer.prompt_id, answer.index): (pair.prompt, answer)
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    }
    items = list(answers.values())
    theta = score_answers(arm, f"round {index} refresh", policy, items)
    behaviour = [answer.logprobs for _, answer in items]
    groups = [prompt.id for prompt, _ in items]
    return _finite(ess(theta, behaviour, groups).mean), _finite(kl_token_k3(theta, behaviour, groups).mean)


def _measured(arm: Arm, index: int, batch: Batch) -> Sequence[Pair]:
    """At most `MEASURED` of the pairs, drawn by the seed."""

    def lot(pair: Pair) -> int:
        return derive_seed(arm.seed, "refresh", index, pair.prompt.id, pair.chosen.index, pair.rejected.index)

    return sorted(batch.pairs, key=lot)[:MEASURED]


def _limits(arm: Arm) -> RefreshSpec:
    source = arm.settings.source
    if not isinstance(source, SourceSpec) or source.refresh_when is None:
        raise ValueError(f"{arm.label}: source {source} has no limits")
    return source.refresh_when


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
