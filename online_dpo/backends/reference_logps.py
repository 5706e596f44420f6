"""Where a round's reference log-probs come from: the engine that sampled, the cache, or one pass without gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from online_dpo.backends.distributed import from_first, gathered
from online_dpo.backends.logp_cache import LogpCache, cache_key
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.faults_spec import FaultsSpec
from online_dpo.packing import Item
from online_dpo.protocols import TrainJob, TrainStart
from online_dpo.scored_text import scored_texts
from online_dpo.types import Pair, Policy

GAP_SAMPLE = 4
"""Pairs, or groups, on which the engine's stored log-probs are held against the learner's own, every round."""

PairLogps = tuple[Sequence[float], Sequence[float]]
"""Per-token log-probs of a pair's chosen and rejected completion."""


def items_of(pairs: Sequence[Pair]) -> list[Item]:
    """All chosen completions behind their prompts, then all rejected ones; tokens as sampled."""
    return side_by_side([scored_texts(pair, FaultsSpec(), padding=0) for pair in pairs])


def scored_items(model: PolicyModel, job: TrainJob) -> list[tuple[Item, Item]]:
    """What the loss scores of each pair, chosen and rejected: the completions, and what `dpo.faults` add."""
    faults = job.dpo.faults
    padding = model.padding if faults.score_padding else 0
    return [scored_texts(pair, faults, padding) for pair in job.pairs]


def side_by_side(pairs: Sequence[tuple[Item, Item]]) -> list[Item]:
    """All first items, then all second ones."""
    return [pair[side] for side in (0, 1) for pair in pairs]


def stored_logps(pairs: Sequence[Pair]) -> list[PairLogps]:
    """What the engine stored as it sampled."""
    return [(pair.chosen.logprobs, pair.rejected.logprobs) for pair in pairs]


def reference_logps(
    model: PolicyModel, job: TrainJob, tolerance: float, *, needed: bool
) -> tuple[list[PairLogps], TrainStart]:
    """The reference's log-probs of all pairs, and how they were come by: `_known`.

    Where `dpo.faults` score other tokens than the completions, these are computed: no engine stored them.
    """
    half = len(job.pairs)
    stored = stored_logps(job.pairs)
    flat = [logps for side in (0, 1) for logps in (pair[side] for pair in stored)]
    few = _spread(half)
    sample = [*few, *(half + i for i in few)]
    others = job.dpo.faults.of_text
    values, start = _known(model, job, items_of(job.pairs), flat, sample, tolerance, needed=needed and not others)
    if needed and others:
        values, origin = _computed(model, job, side_by_side(scored_items(model, job)))
        start = replace(start, reference_from=origin)
    return list(zip(values[:half], values[half:], strict=True)), start


def group_logps(
    model: PolicyModel, job: TrainJob, tolerance: float, *, needed: bool
) -> tuple[list[list[Sequence[float]]], TrainStart]:
    """The reference's log-probs of all answers of each group, and how they were come by: `_known`."""
    items = [(group.prompt.token_ids, answer.token_ids) for group in job.groups for answer in group.candidates]
    stored = [answer.logprobs for group in job.groups for answer in group.candidates]
    sizes = [len(group.candidates) for group in job.groups]
    starts = list(accumulate(sizes, initial=0))
    # The first and the last answer of a few groups.
    sample = [place for i in _spread(len(sizes)) for place in (starts[i], starts[i + 1] - 1)]
    values, start = _known(model, job, items, stored, sample, tolerance, needed=needed)
    return [list(values[starts[i] : starts[i + 1]]) for i in range(len(sizes))] if values else [], start


def _known(
    model: PolicyModel,
    job: TrainJob,
    items: Sequence[Item],
    stored: Sequence[Sequence[float]],
    sample: Sequence[int],
    tolerance: float,
    *,
    needed: bool,
) -> tuple[list[Sequence[float]], TrainStart]:
    """The reference's log-probs of `items`.

    The engine's `stored` ones, where it sampled with the reference's very weights and agrees with the learner to
    `tolerance` nats a token on the items `sample`. Without `needed` (a loss without a reference) there are none.
    """
    # Every worker must take the same branch: beside the tolerance, their rounding could differ.
    gap_token, gap_sequence = from_first(
        _engine_gap(model, job.source, [items[i] for i in sample], [stored[i] for i in sample])
    )
    if not needed:
        return [], TrainStart("none", gap_token, gap_sequence)
    if job.drawn_from_reference and gap_token is not None and gap_token <= tolerance:
        return list(stored), TrainStart("engine", gap_token, gap_sequence)
    values, origin = _computed(model, job, items)
    return values, TrainStart(origin, gap_token, gap_sequence)


def _spread(count: int) -> list[int]:
    """`GAP_SAMPLE` places, or as many as there are, spread over `count`."""
    sample = min(GAP_SAMPLE, count)
    return [i * count // sample for i in range(sample)]


def _engine_gap(
    model: PolicyModel, source: Policy | None, items: Sequence[Item], stored: Sequence[Sequence[float]]
) -> tuple[float, float] | tuple[None, None]:
    """Largest |engine − learner| log-prob at the source's own weights, a token and a sequence, on a few answers.

    None where no one policy sampled them.
    """
    if source is None:
        return None, None
    model.load(source)
    own = model.per_token(items)
    tokens = [a - b for mine, theirs in zip(own, stored, strict=True) for a, b in zip(mine, theirs, strict=True)]
    return _largest(tokens), _largest([sum(a) - sum(b) for a, b in zip(own, stored, strict=True)])


def _computed(model: PolicyModel, job: TrainJob, items: Sequence[Item]) -> tuple[list[Sequence[float]], str]:
    """The reference's log-probs of `items`; "cache" where all of them were in it, else "learner"."""
    precision = str(model.dtype).removeprefix("torch.")
    keys = [cache_key(job.reference.digest, precision, item) for item in items]
    cache = LogpCache(job.cache) if job.cache is not None else None
    # Worker 0 alone opens the file: all must miss the same ones.
    known = from_first(cache.find(list(dict.fromkeys(keys))) if cache is not None and model.rank == 0 else {})
    missing = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
    if missing:
        model.load(job.reference)
        fresh = dict(zip(missing, shared_logps(model, list(missing.values())), strict=True))
        if cache is not None and model.rank == 0:
            cache.keep(fresh)
    else:
        fresh = {}
    return [known[key] if key in known else fresh[key] for key in keys], "learner" if missing else "cache"


@torch.no_grad()
def shared_logps(model: PolicyModel, items: Sequence[Item]) -> list[list[float]]:
    """Per-token log-probs under the weights that are loaded; the workers share the items."""
    return gathered(model.per_token(items[model.rank :: model.world]))


def _largest(differences: Sequence[float]) -> float:
    """The largest absolute value; infinite when one is undefined (`max` would pass over a NaN)."""
    return max(math.inf if math.isnan(value) else abs(value) for value in differences)
