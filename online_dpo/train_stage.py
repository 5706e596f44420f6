"""The stage that trains a round's policy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.files import digest_json, remove
from online_dpo.judging.digests import source_digest
from online_dpo.model_card import write_model_card
from online_dpo.protocols import TrainJob
from online_dpo.rounds import Pinned
from online_dpo.seeds import derive_seed
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.training import Shown, train_figures, train_shown
from online_dpo.training_data import TrainingData, trained_on, training_data

CHECKPOINT = ".train.checkpoint"
"""The folder in a round's that a long training keeps its state in."""


def train_round(arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData) -> StageRecord:
    """The policy that the round's pairs, or groups, make of its starting policy."""
    seed = derive_seed(arm.seed, "train", folder.index)

    def produce(out: Path) -> dict[str, Any]:
        work = training_data(arm, folder, pinned, data)
        faults = arm.settings.dpo.faults
        if faults.on:
            arm.run.progress.say(f"{arm.label} · {folder.title}: faults are switched on: {faults.describe()}")
        info = do_training(arm, folder, work, round_job(arm, folder, pinned, data, work, out / "policy", seed))
        write_model_card(arm, folder.index, pinned, len(work.pairs), out / "policy")
        return info

    record = folder.stage("train", train_inputs(arm, pinned, data, seed), ["policy"], produce)
    forget_checkpoint(folder)
    return record


def policy_name(arm: Arm, index: int) -> str:
    """The id of the policy that round `index` trains."""
    return f"{arm.name}/seed_{arm.seed}/round_{index:02d}"


def round_job(
    arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData, work: TrainingData, out: Path, seed: int
) -> TrainJob:
    """What the learner is asked for: `work` on the round's starting policy, into folder `out`."""
    return TrainJob(
        policy=pinned.start,
        reference=pinned.reference,
        source=data.sampled_by,
        pairs=work.pairs,
        dpo=arm.settings.dpo,
        policy_id=policy_name(arm, folder.index),
        out=out,
        seed=seed,
        folders=arm.run.judge_folders,
        cache=arm.run.store.root / "logps.sqlite",
        checkpoint=folder.path / CHECKPOINT,
        groups=work.groups,
        rloo=arm.settings.rloo if work.kind == "groups" else None,
    )


def do_training(arm: Arm, folder: RoundFolder, work: TrainingData, job: TrainJob) -> dict[str, Any]:
    """Do `job`; returns the stage's figures."""
    arm.run.rest_engine()
    began = time.perf_counter()
    shown = Shown(arm.run.progress, f"{arm.label} · {folder.title} train", work.units, work.unit)
    start, steps = train_shown(arm.run.learner, job, shown)
    return {
        "loss": arm.settings.describe_objective(),
        "trained": work.kind,
        "answers": work.answers * job.dpo.epochs,
        **train_figures(start, steps, time.perf_counter() - began),
    }


def forget_checkpoint(folder: RoundFolder) -> None:
    """Once the training is done: its checkpoint, and what a kill between two of its renames left beside it."""
    for path in folder.path.glob(f"{CHECKPOINT}*"):
        remove(path)


def train_inputs(arm: Arm, pinned: Pinned, data: RoundData, seed: int) -> dict[str, str]:
    """What decides the trained policy."""
    return {
        "policy": pinned.start.digest,
        "reference": pinned.reference.digest,
        "source": "" if data.sampled_by is None else data.sampled_by.digest,
        "candidates": data.pair.inputs["candidates"],
        "dpo": digest_json(_dpo_settings(arm)),
        "seed": str(seed),
        **_own_inputs(arm, data),
    }


def _dpo_settings(arm: Arm) -> dict[str, Any]:
    """Without faults, where none is on: runs that began before there were such keys go on."""
    dpo = arm.settings.dpo
    return dpo.model_dump(exclude=None if dpo.faults.on else {"faults"})


def _own_inputs(arm: Arm, data: RoundData) -> dict[str, str]:
    """What pairs or groups are made of; the source of a loss of the user's own, whose name would not tell a change."""
    if trained_on(arm) == "groups":
        return {
            "verdicts": data.judge.outputs["verdicts.parquet"],
            "rloo": digest_json(arm.settings.rloo.model_dump()),
        }
    loss = arm.settings.dpo.loss
    own = {} if isinstance(loss, str) else {"loss": digest_json(source_digest(loss.use, arm.run.judge_folders))}
    return {"pairs": data.pair.outputs["pairs.parquet"], **own}
