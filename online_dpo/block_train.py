"""Training where a round is cut into blocks: each block goes on from the last one's weights and optimiser state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.errors import RunFolderError, TrainingError
from online_dpo.files import link_tree, remove
from online_dpo.model_card import write_model_card
from online_dpo.policies import read_policy, write_policy
from online_dpo.protocols import RoundPart
from online_dpo.rounds import Pinned
from online_dpo.seeds import derive_seed
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.saving import with_parts
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.train_stage import do_training, forget_checkpoint, policy_name, round_job, train_inputs
from online_dpo.training_data import training_data

POLICY, OPTIMISER = "policy", "optimiser"
"""What a block's training leaves; the second only where another block may go on from it."""

Trained = Sequence[tuple[RoundFolder, StageRecord]]
"""The blocks that made steps, in their order: folder and record of the stage 'train'."""


def train_block(
    arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData, part: RoundPart, number: int, *, last: bool
) -> StageRecord:
    """What block `number`'s pairs make of the policy that they were sampled from, `pinned.start`."""
    words = ("train", folder.index) if number == 1 else ("train", folder.index, "block", number)
    seed = derive_seed(arm.seed, *words)

    def produce(out: Path) -> dict[str, Any]:
        work = training_data(arm, folder, pinned, data)
        job = replace(
            round_job(arm, folder, pinned, data, work, out / POLICY, seed),
            policy_id=f"{policy_name(arm, folder.index)}/{folder.path.name}",
            part=part if last else replace(part, end=out / OPTIMISER),
        )
        return do_training(arm, folder, work, job)

    inputs = train_inputs(arm, pinned, data, seed)
    if not (last and part.first == 0):
        # All of a round in one block is the same work as a round that is not cut.
        inputs |= {"steps": f"{part.first} + {part.steps} of {part.total}", "last": str(last)}
    record = folder.stage("train", inputs, [POLICY] if last else [POLICY, OPTIMISER], produce)
    forget_checkpoint(folder)
    return record


def give_up(trained: Trained) -> None:
    """Delete what these blocks left: another has gone on from it."""
    for folder, _ in trained:
        for output in (POLICY, OPTIMISER):
            if (folder.path / output).exists():
                folder.prune(output)


def train_whole(arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData, trained: Trained) -> StageRecord:
    """The round's stage 'train': the policy that its last block left, under the round's own name."""
    if not trained:
        dropped = data.pair.info["dropped"]
        raise TrainingError(f"round {folder.index} has no pairs to train on (dropped: {dropped})")
    last, left = trained[-1]

    def produce(out: Path) -> dict[str, Any]:
        if last.pruned(POLICY):
            raise RunFolderError(
                f"{last.path / POLICY} was given up after the round's policy was made of it: delete stages/ and the "
                f"block folders in {folder.path} to do the round again"
            )
        link_tree(last.path / POLICY, out / POLICY)
        policy = read_policy(out / POLICY, verify=False)
        for named in ("policy.json", "README.md"):
            remove(out / POLICY / named)  # a link: writing into it would change the block's too
        write_policy(replace(policy, id=policy_name(arm, folder.index)))
        write_model_card(arm, folder.index, pinned, data.pair.info["kept"], out / POLICY)
        return whole_figures([record.info for _, record in trained])

    inputs = {
        "left": left.outputs[POLICY],
        "pairs": data.pair.outputs["pairs.parquet"],
    }
    record = folder.stage("train", inputs, [POLICY], produce)
    give_up(trained)
    return with_parts(record, [part for _, part in trained], {})


def whole_figures(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A round's figures of training from its blocks': sums, largest gaps, the curve end to end; else the last's."""
    seconds = sum(info["tokens"] / info["tokens_per_second"] for info in infos if info["tokens_per_second"])
    tokens = sum(info["tokens"] for info in infos)
    return {
        **infos[-1],
        "steps": sum(info["steps"] for info in infos),
        **{key: _over_steps(infos, key) for key in ("loss_mean", "accuracy_mean")},
        "answers": sum(info["answers"] for info in infos),
        "loss_first": infos[0]["loss_first"],
        "grad_norm_largest": max(info["grad_norm_largest"] for info in infos),
        "reference_from": ", ".join(dict.fromkeys(info["reference_from"] for info in infos)),
        **{gap: _largest([info[gap] for info in infos]) for gap in ("engine_gap_token", "engine_gap_sequence")},
        "tokens": tokens,
        "seconds": round(sum(info["seconds"] for info in infos), 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "curve": [point for info in infos for point in info["curve"]],
    }


def _over_steps(infos: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of `key` over all blocks' steps; None where a block has no such figure."""
    weighed = [info[key] * info["steps"] for info in infos if info.get(key) is not None]
    return sum(weighed) / sum(info["steps"] for info in infos) if len(weighed) == len(infos) else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
