"""A round whose prompts are shared out: each part of them has its pairs from a source of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from online_dpo.arms import Arm
from online_dpo.files import digest_json
from online_dpo.pairing import within_budget
from online_dpo.rounds import Pinned, source_index
from online_dpo.seeds import derive_seed
from online_dpo.source_spec import ShareSpec, SourceSpec, source_kind
from online_dpo.sources.batch import Batch, put_together, read_batch
from online_dpo.sources.drawing import divide
from online_dpo.sources.fresh import fresh_prompts
from online_dpo.sources.history import ages, gather_history
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.saving import Given, audit_of, give_batch, with_parts
from online_dpo.store import RoundFolder
from online_dpo.types import Policy, Prompt

RoundPrompts = Callable[[Arm, int], tuple[Prompt, ...]]
"""`gather.round_prompts`."""
Gather = Callable[[Arm, RoundFolder, Pinned], RoundData]
"""`gather.gather`."""


def mixture_prompts(arm: Arm, index: int, round_prompts: RoundPrompts) -> tuple[Prompt, ...]:
    """All prompts of all parts of round `index`, each once."""
    prompts: dict[str, Prompt] = {}
    for number in range(len(_parts(arm))):
        prompts |= {prompt.id: prompt for prompt in _known(arm, number, index, round_prompts)}
    return tuple(prompts.values())


def gather_mixture(
    arm: Arm, folder: RoundFolder, pinned: Pinned, gather: Gather, round_prompts: RoundPrompts
) -> RoundData:
    """Each part gathered into a folder of its own, `part_1` and so on; all of them together are the round's.

    A part without prompts is left out. `pairing.max_pairs` is what the parts together may have.
    """
    parts: dict[RoundFolder, RoundData] = {}
    for number in range(len(_parts(arm))):
        own = _own(arm, number, folder.index, round_prompts)
        if own:
            inside = folder.inside(f"part_{number + 1}")
            parts[inside] = _gather_part(arm, inside, pinned, (number, own), gather, round_prompts)
    given = _given(arm, folder, pinned, parts)
    sample, judge, pair = give_batch(folder, given)
    found = list(parts.values())
    return RoundData(
        with_parts(sample, [part.sample for part in found], _summed([part.sample.info for part in found])),
        with_parts(judge, [part.judge for part in found], _summed([part.judge.info for part in found])),
        audit_of(folder, [(inside, part.audit) for inside, part in parts.items()]),
        with_parts(pair, [part.pair for part in found], {}),
        _common([part.sampled_by for part in found]),
    )


def _gather_part(
    arm: Arm,
    inside: RoundFolder,
    pinned: Pinned,
    part: tuple[int, tuple[Prompt, ...]],
    gather: Gather,
    round_prompts: RoundPrompts,
) -> RoundData:
    """What part `number`'s source makes of its `own` prompts."""
    number, own = part
    one = _as_arm(arm, number)
    known = _known(arm, number, inside.index, round_prompts)
    source = arm.policies.at(source_index(one.settings, inside.index))
    its = replace(pinned, source=source, prompts=known)
    if source_kind(one.settings.source) == "history":
        return gather_history(one, inside, its, own)
    return gather(one, inside, its)


def _given(arm: Arm, folder: RoundFolder, pinned: Pinned, parts: dict[RoundFolder, RoundData]) -> Given:
    known = {prompt.id: prompt for prompt in pinned.prompts}
    budget, seed = arm.settings.pairing.max_pairs, derive_seed(arm.seed, "pair", folder.index)

    def make() -> Batch:
        whole = put_together([read_batch(inside, known) for inside in parts])
        return replace(whole, pairs=tuple(within_budget(list(whole.pairs), budget, seed)))

    def figures() -> dict[str, Any]:
        dropped: Counter[str] = Counter()
        kept = [part.pair.info["kept"] for part in parts.values()]
        for part in parts.values():
            dropped.update(part.pair.info["dropped"])
        if budget is not None and sum(kept) > budget:
            dropped["over_budget"] += sum(kept) - budget
        return {
            "dropped": dict(dropped),
            "by_part": {inside.path.name: n for inside, n in zip(parts, kept, strict=True)},
        }

    digests = [[inside.path.name, *_outputs(part)] for inside, part in parts.items()]
    decided = {"parts": digest_json(digests), "max_pairs": str(budget), "seed": str(seed)}
    return Given(decided, ", ".join(inside.path.name for inside in parts), make, figures=figures)


def _outputs(part: RoundData) -> list[dict[str, str]]:
    return [record.outputs for record in (part.sample, part.judge, part.pair)]


def _summed(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, tokens, seconds and ledgers of the parts added up; the largest probe gap; figures that only some have
    (means, for instance) are theirs alone and stay in the parts' records."""
    total: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos for key in info):
        values = [info[key] for info in infos if info.get(key) is not None]
        if key == "probe_gap":
            total[key] = max(values)
        elif key in ("reasons", "ledger"):
            amounts: Counter[str] = Counter()
            for value in values:
                amounts.update(value)
            total[key] = dict(amounts)
        elif key not in ("tokens_per_second", "details", "from") and values:
            total[key] = sum(values)
    if total.get("seconds"):
        total["tokens_per_second"] = round(total["tokens"] / total["seconds"], 1)
    return total


def _common(policies: Sequence[Policy | None]) -> Policy | None:
    """The policy that all parts were sampled by; None where there is no such one."""
    first, *others = policies
    same = first is not None and all(other is not None and other.digest == first.digest for other in others)
    return first if same else None


# --- parts ---


def _parts(arm: Arm) -> list[ShareSpec]:
    source = arm.settings.source
    if not isinstance(source, SourceSpec) or source.mixture is None:
        raise ValueError(f"{arm.label}: source {source} is no mixture")
    return source.mixture


def _as_arm(arm: Arm, number: int) -> Arm:
    """An arm whose source is the part's. Its pairs are not limited: the round's are."""
    pairing = arm.settings.pairing.model_copy(update={"max_pairs": None})
    change = {"source": _parts(arm)[number].source, "pairing": pairing}
    return replace(arm, settings=arm.settings.model_copy(update=change))


def _own(arm: Arm, number: int, index: int, round_prompts: RoundPrompts) -> tuple[Prompt, ...]:
    """The part's share of what its source has for round `index`.

    Sources with the round's own prompts share these out: no prompt is in two such parts. One that brings prompts of its
    own (a stream, rows of a dataset) gives its share of them.
    """
    one = _as_arm(arm, number)
    history = source_kind(one.settings.source) == "history"
    all_of_it = fresh_prompts(one, index) if history else round_prompts(one, index)
    shares = [part.share for part in _parts(arm)]
    kept = set(divide([prompt.id for prompt in all_of_it], shares, f"{arm.seed}/{index}")[number])
    return tuple(prompt for prompt in all_of_it if prompt.id in kept)


def _known(arm: Arm, number: int, index: int, round_prompts: RoundPrompts) -> tuple[Prompt, ...]:
    """The part's own prompts, and those of older rounds that it may draw pairs of."""
    one = _as_arm(arm, number)
    window = ages(one, index) if source_kind(one.settings.source) == "history" else range(1)
    found = [prompt for age in window for prompt in _own(arm, number, index - age, round_prompts)]
    return tuple({prompt.id: prompt for prompt in found}.values())
