"""Pairs, or answers, that another arm made: the swap test (Tang et al. 2024, arXiv:2405.08448).

In order, round t has that arm's round t: the same prompts, answers and labels, without this arm's policy having any
part in them. Shuffled, it has as many, drawn from all of that arm's rounds: the same data, but not when the policy is
where they were made. Answers alone, judged anew: fresh labels of stored samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from online_dpo.arms import Arm
from online_dpo.errors import RunFolderError
from online_dpo.files import digest_json
from online_dpo.judge_stage import audit_round, judge_round
from online_dpo.pair_stage import pair_round
from online_dpo.records import read_round_prompts
from online_dpo.rounds import Pinned
from online_dpo.sample_stage import prompts_digest
from online_dpo.sources.batch import Batch, read_batch
from online_dpo.sources.dealing import answers_of, dealt, pairs_of
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.saving import Given, give_answers, give_batch, record_of
from online_dpo.sources.streamed import StreamedArm, stored_prompts, stream_of, streamed_arm
from online_dpo.store import RoundFolder
from online_dpo.types import Policy, Prompt

RoundPrompts = Callable[[Arm, int], tuple[Prompt, ...]]
"""`gather.round_prompts`."""


def stream_prompts(arm: Arm, index: int, round_prompts: RoundPrompts) -> tuple[Prompt, ...]:
    """The prompts of round `index`: those of the other arm's, or of what is dealt to the round."""
    streamed, source = streamed_arm(arm), stream_of(arm)
    prompts = _prompts_of(arm, streamed, _rounds(arm, streamed, index), round_prompts)
    if source.order == "in_order":
        found = list(prompts.values())
    else:
        cards = dealt(streamed, index, source.take, arm.seed)
        found = [prompts[prompt_id] for prompt_id in dict.fromkeys(card[1] for card in cards)]
    _check_prompts(arm, streamed, found)
    return tuple(found)


def gather_stream(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """The other arm's pairs as they are, or its answers, judged and paired by this arm.

    Of a round that is part of a mixture, what belongs to its prompts.
    """
    streamed = streamed_arm(arm)
    given = _given(arm, streamed, folder.index, pinned.prompts)
    sampled_by = _sampler(arm, streamed, folder.index, pinned)
    if stream_of(arm).take == "pairs":
        sample, judge, pair = give_batch(folder, given)
        return RoundData(sample, judge, None, pair, sampled_by)
    sample = give_answers(folder, given)
    judge = judge_round(arm, folder, pinned, sample)
    audit = audit_round(arm, folder, pinned, sample)
    pair = pair_round(arm, folder, pinned, (sample, judge))
    return RoundData(sample, judge, audit, pair, sampled_by)


def _rounds(arm: Arm, streamed: StreamedArm, index: int) -> list[int]:
    """The rounds of the other arm that this arm's round `index` depends on."""
    return [index] if stream_of(arm).order == "in_order" else list(range(1, streamed.rounds + 1))


def _given(arm: Arm, streamed: StreamedArm, index: int, prompts: Sequence[Prompt]) -> Given:
    """What the stream gives round `index` of these prompts."""
    source, rounds = stream_of(arm), _rounds(arm, streamed, index)
    wanted = {prompt.id: prompt for prompt in prompts}
    known = {prompt.id for prompt in arm.run.train_prompts}
    others = tuple(prompt for prompt in prompts if prompt.id not in known)
    decided = {
        "stream": digest_json([_digests(streamed.folder(number)) for number in rounds]),
        "prompts": prompts_digest(prompts),
        "take": source.take,
        "order": source.order,
    }
    if source.order == "in_order":
        origin = streamed.folder(index)
        whole = origin if set(origin.pinned["prompts"]) <= wanted.keys() else None
        make = partial(read_batch, origin, wanted)
        return Given(decided, streamed.place(index), make, whole, own_prompts=others)

    def deal() -> Batch:
        cards = dealt(streamed, index, source.take, arm.seed)
        return pairs_of(streamed, cards, wanted) if source.take == "pairs" else answers_of(streamed, cards, wanted)

    place = f"{streamed.place(1)} to {rounds[-1]:02d}"
    return Given({**decided, "seed": f"{arm.seed}/{index}"}, place, deal, own_prompts=others)


def _digests(folder: RoundFolder) -> list[str]:
    """What tells a finished round's answers, verdicts and pairs from others."""
    return [digest for stage in ("sample", "judge", "pair") for digest in record_of(folder, stage).outputs.values()]


def _sampler(arm: Arm, streamed: StreamedArm, index: int, pinned: Pinned) -> Policy | None:
    """The one policy that sampled all that the round depends on; None where there is none or it was not kept."""
    samplers = [streamed.sampler(number) for number in _rounds(arm, streamed, index)]
    first = samplers[0]
    if first is None or any(other is None or other["digest"] != first["digest"] for other in samplers):
        return None
    for own in (pinned.start, pinned.reference, arm.run.initial):
        if own.digest == first["digest"]:
            return own
    if first["after_round"] is None:
        return None
    kept = streamed.policy(first["after_round"], arm.run.initial)
    return kept if kept is not None and kept.digest == first["digest"] else None


# --- prompts ---


def _prompts_of(
    arm: Arm, streamed: StreamedArm, rounds: Iterable[int], round_prompts: RoundPrompts
) -> dict[str, Prompt]:
    """The prompts of those rounds by id, in their order."""
    folders = {index: streamed.folder(index) for index in rounds}
    if not streamed.elsewhere:
        other = Arm(arm.run, streamed.name, streamed.seed, arm.run.experiment.arm(streamed.name))
        return {prompt.id: prompt for index in folders for prompt in round_prompts(other, index)}
    stored = stored_prompts(streamed)
    for folder in folders.values():
        record_of(folder, "sample")
        stored |= read_round_prompts(folder.path)
    return {
        prompt_id: _stored(stored, prompt_id, folder)
        for folder in folders.values()
        for prompt_id in folder.pinned["prompts"]
    }


def _stored(stored: Mapping[str, Prompt], prompt_id: str, folder: RoundFolder) -> Prompt:
    if prompt_id not in stored:
        raise RunFolderError(f"{folder.path}: no prompts.parquet has its prompt '{prompt_id}'")
    return stored[prompt_id]


def _check_prompts(arm: Arm, streamed: StreamedArm, prompts: Sequence[Prompt]) -> None:
    """None is a held-out prompt of this run, or another than this run's of the same id."""
    held_out = {prompt.token_ids for prompt in arm.run.held_out}
    own = {prompt.id: prompt for prompt in arm.run.train_prompts}
    for prompt in prompts:
        if prompt.token_ids in held_out:
            raise RunFolderError(f"{streamed.label} trained on '{prompt.id}', which is held out here: take its prompts")
        if prompt.token_ids != own.get(prompt.id, prompt).token_ids:
            raise RunFolderError(f"{streamed.label}: its prompt '{prompt.id}' is another one than this run's")
