"""A round whose source is refreshed within it (`source: {every_steps: k}`): block by block sample, judge, pair, train.

Each block is a folder of the round's with its own stages; the round's own files are then put together from them. A
block's policy and optimiser state go as soon as another block has been trained from them. What is done is read: blocks
up to the last one that was trained by their records alone, since the weights that they sampled from may be gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from online_dpo.arms import Arm
from online_dpo.block_files import DoneBlock, judge_whole, pair_whole, sample_whole
from online_dpo.block_train import OPTIMISER, POLICY, Trained, give_up, train_block, train_whole
from online_dpo.judge_stage import audit_round, judge_round
from online_dpo.pair_stage import pair_round
from online_dpo.policies import read_policy
from online_dpo.protocols import RoundPart
from online_dpo.rounds import Pinned
from online_dpo.sample_stage import sample_round
from online_dpo.sources.blocks import Block, cut_round
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.saving import record_of
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Policy


def make_in_blocks(arm: Arm, folder: RoundFolder, pinned: Pinned) -> tuple[RoundData, StageRecord]:
    """The round's pairs and the record of its training."""
    blocks = cut_round(pinned.prompts, arm.settings)
    folders = [folder.inside(f"block_{block.number:03d}", f"block {block.number} of {len(blocks)}") for block in blocks]
    known = len(blocks) if folder.done("train") else _last_trained(folders)
    done: list[DoneBlock] = []
    for place, own in enumerate(folders):
        done.append(_read(own) if place < known else _make(arm, own, pinned, blocks[place:], done))
        if done[-1].train is not None:
            give_up(_trained(done)[-2:-1])
    data = _put_together(arm, folder, pinned, done)
    return data, train_whole(arm, folder, pinned, data, _trained(done))


def _last_trained(folders: Sequence[RoundFolder]) -> int:
    """The number of the last block that was trained, 0 for none."""
    return max((number for number, own in enumerate(folders, 1) if own.done("train")), default=0)


def _trained(done: Sequence[DoneBlock]) -> Trained:
    return [(block.folder, block.train) for block in done if block.train is not None]


def _read(folder: RoundFolder) -> DoneBlock:
    """A block that a later one, or the round, was made from."""
    train = record_of(folder, "train") if folder.done("train") else None
    sample, judge, pair = (record_of(folder, stage) for stage in ("sample", "judge", "pair"))
    return DoneBlock(folder, sample, judge, pair, train)


def _make(
    arm: Arm, folder: RoundFolder, pinned: Pinned, blocks: Sequence[Block], done: Sequence[DoneBlock]
) -> DoneBlock:
    """The first of `blocks`, which are the round's from here on; `done` are those before."""
    block, *later = blocks
    reached = _reached(pinned, _trained(done))
    own = replace(pinned, start=reached.policy, source=reached.policy, prompts=block.prompts)
    data = _gather(_bounded(arm, len(pinned.prompts), block, done), folder, own)
    kept = int(data.pair.info["kept"])
    train = None
    if kept:
        steps = min(block.steps, -(-kept // arm.settings.dpo.batch_size))
        # The schedule's length is what is made, what this block makes, and the most that the later ones can make.
        total = reached.steps + steps + sum(one.steps for one in later)
        part = RoundPart(reached.steps, steps, total, begin=reached.optimiser)
        train = train_block(arm, folder, own, data, part, block.number, last=not later)
    return DoneBlock(folder, data.sample, data.judge, data.pair, train)


@dataclass(frozen=True, slots=True)
class _Reached:
    """Where a round is between two blocks: its policy, the optimiser's state (None: fresh), the steps made."""

    policy: Policy
    optimiser: Path | None
    steps: int


def _reached(pinned: Pinned, trained: Trained) -> _Reached:
    if not trained:
        return _Reached(pinned.start, None, 0)
    folder, _ = trained[-1]
    folder.trust("train")
    steps = sum(int(record.info["steps"]) for _, record in trained)
    return _Reached(read_policy(folder.path / POLICY, verify=False), folder.path / OPTIMISER, steps)


def _bounded(arm: Arm, prompts: int, block: Block, done: Sequence[DoneBlock]) -> Arm:
    """The arm with what is left for the block of the round's `pairing.max_pairs` and of its abstentions.

    `max_abstain` is a share of all the round's answers: a block's share is what of that is not used up.
    """
    settings = arm.settings
    pairing = settings.pairing
    if block.pairs is not None:
        kept = sum(int(one.pair.info["kept"]) for one in done)
        pairing = pairing.model_copy(update={"max_pairs": block.pairs - kept})
    answers = len(block.prompts) * settings.sampling.n
    used = sum(int(one.judge.info["abstained"]) for one in done) / answers
    share = min(1.0, max(0.0, settings.max_abstain * (prompts / len(block.prompts)) - used))
    return replace(arm, settings=settings.model_copy(update={"pairing": pairing, "max_abstain": share}))


def _gather(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """Sample, judge, pair; the judge is audited once a round."""
    sample = sample_round(arm, folder, pinned)
    judge = judge_round(arm, folder, pinned, sample)
    pair = pair_round(arm, folder, pinned, (sample, judge))
    return RoundData(sample, judge, None, pair, pinned.source)


def _put_together(arm: Arm, folder: RoundFolder, pinned: Pinned, done: Sequence[DoneBlock]) -> RoundData:
    """The round's own files. A judge that asks the policy is audited with the one that began the round."""
    sample = sample_whole(folder, done)
    judge = judge_whole(folder, done, sample)
    pair = pair_whole(folder, done, (sample, judge))
    audit = audit_round(arm, folder, pinned, sample)
    one = pinned.source if len(done) == 1 else None
    return RoundData(sample, judge, audit, pair, one)
