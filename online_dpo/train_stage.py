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


def train_round(arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData) -> StageRecord:
    """The policy that the round's pairs, or groups, make of its starting policy."""
    seed = derive_seed(arm.seed, "train", folder.index)
    dpo = arm.settings.dpo
    checkpoint = folder.path / ".train.checkpoint"

    def job(work: TrainingData, out: Path) -> TrainJob:
        return TrainJob(
            policy=pinned.start,
            reference=pinned.reference,
            source=data.sampled_by,
            pairs=work.pairs,
            dpo=dpo,
            policy_id=f"{arm.name}/seed_{arm.seed}/round_{folder.index:02d}",
            out=out,
            seed=seed,
            folders=arm.run.judge_folders,
            cache=arm.run.store.root / "logps.sqlite",
            checkpoint=checkpoint,
            groups=work.groups,
            rloo=arm.settings.rloo if work.kind == "groups" else None,
        )

    def produce(out: Path) -> dict[str, Any]:
        work = training_data(arm, folder, pinned, data)
        arm.run.engine.rest()
        began = time.perf_counter()
        shown = Shown(arm.run.progress, f"{arm.label} · round {folder.index} train", work.units, work.unit)
        start, steps = train_shown(arm.run.learner, job(work, out / "policy"), shown)
        write_model_card(arm, folder.index, pinned, len(work.pairs), out / "policy")
        return {
            "loss": arm.settings.describe_objective(),
            "trained": work.kind,
            "answers": work.answers * dpo.epochs,
            **train_figures(start, steps, time.perf_counter() - began),
        }

    inputs = {
        "policy": pinned.start.digest,
        "reference": pinned.reference.digest,
        "source": "" if data.sampled_by is None else data.sampled_by.digest,
        "candidates": data.pair.inputs["candidates"],
        "dpo": digest_json(dpo.model_dump()),
        "seed": str(seed),
        **_own_inputs(arm, data),
    }
    record = folder.stage("train", inputs, ["policy"], produce)
    # And what a kill between two of its renames left beside it.
    for path in folder.path.glob(f"{checkpoint.name}*"):
        remove(path)
    return record


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
