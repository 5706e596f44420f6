"""The stage that trains a round's policy on its pairs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.errors import TrainingError
from online_dpo.files import digest_json, remove
from online_dpo.judging.digests import source_digest
from online_dpo.model_card import write_model_card
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.records import read_pairs
from online_dpo.rounds import Pinned
from online_dpo.seeds import derive_seed
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Pair


def train_round(arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData) -> StageRecord:
    """The policy that the round's pairs make of its starting policy."""
    seed = derive_seed(arm.seed, "train", folder.index)
    dpo = arm.settings.dpo
    checkpoint = folder.path / ".train.checkpoint"

    def job(pairs: tuple[Pair, ...], out: Path) -> TrainJob:
        return TrainJob(
            policy=pinned.start,
            reference=pinned.reference,
            source=data.sampled_by,
            pairs=pairs,
            dpo=dpo,
            policy_id=f"{arm.name}/seed_{arm.seed}/round_{folder.index:02d}",
            out=out,
            seed=seed,
            folders=arm.run.judge_folders,
            cache=arm.run.store.root / "logps.sqlite",
            checkpoint=checkpoint,
        )

    def produce(out: Path) -> dict[str, Any]:
        prompts = {prompt.id: prompt for prompt in pinned.prompts}
        pairs = read_pairs(folder.path / "pairs.parquet", prompts, data.candidates)
        if not pairs:
            raise TrainingError(f"round {folder.index} has no pairs to train on (dropped: {data.pair.info['dropped']})")
        arm.run.engine.rest()
        began = time.perf_counter()
        starts: list[TrainStart] = []
        steps: list[TrainStep] = []
        arm.run.progress.start(f"{arm.label} · round {folder.index} train", len(pairs) * dpo.epochs, "pairs")
        for event in arm.run.learner.train(job(tuple(pairs), out / "policy")):
            if isinstance(event, TrainStart):
                starts.append(event)
            elif isinstance(event, TrainStep):
                steps.append(event)
                left = len(pairs) * dpo.epochs - (len(steps) - 1) * dpo.batch_size
                arm.run.progress.advance(min(dpo.batch_size, left), f"loss {event.loss:.3f}")
        arm.run.progress.finish()
        write_model_card(arm, folder.index, pinned, len(pairs), out / "policy")
        return {"loss": dpo.describe_loss(), **_train_figures(starts[0], steps, time.perf_counter() - began)}

    inputs = {
        "policy": pinned.start.digest,
        "reference": pinned.reference.digest,
        "source": "" if data.sampled_by is None else data.sampled_by.digest,
        "pairs": data.pair.outputs["pairs.parquet"],
        "candidates": data.pair.inputs["candidates"],
        "dpo": digest_json(dpo.model_dump()),
        "seed": str(seed),
        **_own_loss(arm),
    }
    record = folder.stage("train", inputs, ["policy"], produce)
    # And what a kill between two of its renames left beside it.
    for path in folder.path.glob(f"{checkpoint.name}*"):
        remove(path)
    return record


def _own_loss(arm: Arm) -> dict[str, str]:
    """The source of a loss of the user's own, as an input of the stage: its name alone would not tell a change."""
    loss = arm.settings.dpo.loss
    return {} if isinstance(loss, str) else {"loss": digest_json(source_digest(loss.use, arm.run.judge_folders))}


def _train_figures(start: TrainStart, steps: Sequence[TrainStep], seconds: float) -> dict[str, Any]:
    computing = sum(step.seconds for step in steps)
    tokens = sum(step.tokens for step in steps)
    return {
        "steps": len(steps),
        "loss_first": steps[0].loss,
        "loss_last": steps[-1].loss,
        "margin_last": steps[-1].margin,
        "accuracy_last": steps[-1].accuracy,
        "chosen_logp_change": steps[-1].r_w,
        "rejected_logp_change": steps[-1].r_l,
        "grad_norm_largest": max(step.grad_norm for step in steps),
        **asdict(start),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / computing, 1),
        "curve": [{"loss": step.loss, "margin": step.margin, "grad_norm": step.grad_norm} for step in steps],
    }
