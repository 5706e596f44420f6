"""Supervised fine-tuning before the first round: what comes of it is the initial policy of every arm.

Always of all weights, also where the arms train adapters: the adapters then sit on the fine-tuned model. It lies in
RUN/sft/: `policy/`, a model folder as a round's policy is, and `stages/sft.json`, what it was made of and how it went.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import DPOSpec, Experiment, SftSpec
from online_dpo.dataset_rows import DatasetRows
from online_dpo.errors import RunFolderError
from online_dpo.files import digest_json, remove
from online_dpo.policies import read_policy
from online_dpo.protocols import Progress, TrainJob
from online_dpo.sources.datasets import SFT
from online_dpo.store import RoundFolder, RunStore
from online_dpo.training import Shown, train_figures, train_shown
from online_dpo.types import Policy

Answers = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""Token ids of prompts and their answers."""


def initial_model(
    store: RunStore,
    model: Policy,
    datasets: Mapping[str, DatasetRows],
    probe_token_ids: Sequence[int],
    progress: Progress,
) -> Policy:
    """What every arm begins with: `model`, or what the experiment's `sft` makes of it, done once.

    Raises `RunFolderError` when it was made of something else, or its files were changed.
    """
    experiment = store.experiment
    spec = experiment.sft
    if spec is None:
        return model
    if SFT not in datasets:
        raise RunFolderError(f"{store.root}: the dataset of sft was not read before the run began")
    rows = datasets[SFT]
    folder = RoundFolder(store, store.root / "sft", 0)
    checkpoint = folder.path / ".sft.checkpoint"

    def produce(out: Path) -> dict[str, Any]:
        from online_dpo.backends.factory import start_learner

        job = sft_job(spec, model, answers_of(rows, spec), out / "policy", checkpoint)
        shown = Shown(progress, "sft", len(job.answers), "answers")
        with start_learner(experiment, model, probe_token_ids=probe_token_ids, say=progress.say) as learner:
            began = time.perf_counter()
            start, steps = train_shown(learner, job, shown)
        figures = train_figures(start, steps, time.perf_counter() - began)
        return {"loss": job.dpo.describe_loss(), "rows": len(rows.rows), "answers": len(job.answers), **figures}

    inputs = {"model": model.digest, "dataset": rows.digest, "sft": digest_json(spec.model_dump(exclude={"dataset"}))}
    folder.stage("sft", inputs, ["policy"], produce)
    for path in folder.path.glob(f"{checkpoint.name}*"):
        remove(path)
    return read_policy(folder.path / "policy", verify=False)


def sft_job(spec: SftSpec, model: Policy, answers: Answers, out: Path, checkpoint: Path | None = None) -> TrainJob:
    """Supervised fine-tuning as the learner takes it."""
    dpo = DPOSpec(loss="sft", lr=spec.lr, batch_size=spec.batch_size, epochs=spec.epochs, warmup=spec.warmup)
    return TrainJob(
        policy=model,
        reference=model,
        source=None,
        pairs=(),
        dpo=dpo,
        policy_id=model.id,
        out=out,
        seed=spec.seed,
        checkpoint=checkpoint,
        answers=answers,
    )


def answers_of(rows: DatasetRows, spec: SftSpec) -> Answers:
    """What is trained on, in the dataset's order: the chosen answers, or with `on: both` the rejected ones too."""
    found = []
    for row in rows.rows:
        both = [row.chosen] if spec.on == "chosen" or row.rejected is None else [row.chosen, row.rejected]
        found += [(row.prompt.token_ids, tuple(answer.token_ids)) for answer in both]
    return tuple(found)


def describe_sft(experiment: Experiment, datasets: Mapping[str, DatasetRows]) -> list[str]:
    """The plan in one line; none where there is no such stage."""
    spec = experiment.sft
    if spec is None:
        return []
    answers = len(answers_of(datasets[SFT], spec))
    steps = spec.epochs * -(-answers // spec.batch_size)
    return [
        f"sft: {answers} answers ({spec.on}), {steps} steps of {spec.batch_size} in {spec.epochs} epoch(s), "
        "all weights, before round 0"
    ]
