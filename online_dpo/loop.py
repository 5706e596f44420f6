"""The loop: each round samples, judges, pairs, trains and measures; an experiment runs it for every arm and seed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm, Run
from online_dpo.config import Experiment
from online_dpo.errors import TrainingError
from online_dpo.evaluate_stage import evaluate_policy, held_out_figures
from online_dpo.files import digest_json, remove
from online_dpo.judge_stage import audit_round, judge_round
from online_dpo.judging.digests import source_digest
from online_dpo.pairing import make_pairs
from online_dpo.prompts import prompts_for_round
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.records import (
    read_candidates,
    read_pairs,
    read_verdicts,
    write_pairs,
)
from online_dpo.reference_stage import average_reference
from online_dpo.rounds import Pinned, pin, still_needed
from online_dpo.sample_stage import sample_round
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, RunStore, StageRecord
from online_dpo.types import Abstain, Candidate, Pair, Policy, Verdict


def run_experiment(run: Run) -> dict[str, str]:
    """Run every arm at every seed; returns the arms that training stopped, with the reason (empty: none).

    A stopped arm keeps its last good policy and does not stop the others. All else that fails stops the run.
    """
    stopped: dict[str, str] = {}
    for seed in run.experiment.seeds:
        for name in run.experiment.arms:
            arm = Arm(run, name, seed, run.experiment.arm(name))
            try:
                run_arm(arm)
            except TrainingError as error:
                stopped[arm.label] = str(error)
                run.progress.say(f"{arm.label} stopped: {error}")
    return stopped


def run_arm(arm: Arm) -> None:
    """Rounds 0 (the initial policy, measured) to `settings.rounds`; closed rounds are passed over."""
    start = arm.folder(0)
    if not start.closed:
        start.close(_measure_initial(arm, start))
    for index in range(1, arm.settings.rounds + 1):
        folder = arm.folder(index)
        if not folder.closed:
            average_reference(arm, folder)
            prompts = prompts_for_round(arm.run.train_prompts, arm.seed, index, arm.run.experiment.prompts.per_round)
            run_round(arm, folder, pin(folder, arm.policies, arm.settings, prompts))
        # Closed rounds too: the process may have been killed after closing one and before this.
        _discard(arm, index)


def run_round(arm: Arm, folder: RoundFolder, pinned: Pinned) -> None:
    """One round, stage by stage; a stage that is done already is read, not done again."""
    sample = sample_round(arm, folder, pinned)
    candidates = read_candidates(folder.path / "candidates.parquet")
    judge = judge_round(arm, folder, pinned, candidates, sample)
    verdicts = read_verdicts(folder.path / "verdicts.parquet")
    audit = audit_round(arm, folder, pinned, candidates, sample)
    pair = _pair(arm, folder, pinned, candidates, verdicts, (sample, judge))
    train = _train(arm, folder, pinned, candidates, pair)
    policy = arm.policies.at(folder.index)
    evaluate = evaluate_policy(arm, folder, policy, pinned.reference)
    done = [folder.done("reference"), sample, judge, audit, pair, train, evaluate]
    stages = [record for record in done if record is not None]
    folder.close(
        {
            **_identity(arm, folder.index, policy),
            "source": _ref(pinned.source),
            "reference": _ref(pinned.reference),
            "held_out": held_out_figures(arm, folder),
            "sample": sample.info,
            "judge": judge.info,
            "audit": None if audit is None else audit.info,
            "pairs": pair.info,
            "train": train.info,
            "seconds": {record.stage: record.seconds for record in stages},
            "reused": [record.stage for record in stages if record.reused_from],
        }
    )


# --- stages ---


def _pair(
    arm: Arm,
    folder: RoundFolder,
    pinned: Pinned,
    candidates: Sequence[Candidate],
    verdicts: Sequence[Verdict | Abstain],
    before: tuple[StageRecord, StageRecord],
) -> StageRecord:
    pairing = arm.settings.pairing
    sample, judge = before
    seed = derive_seed(arm.seed, "pair", folder.index)

    def produce(out: Path) -> dict[str, Any]:
        prompts = {prompt.id: prompt for prompt in pinned.prompts}
        arm.run.progress.start(f"{arm.label} · round {folder.index} pair", len(prompts), "prompts")
        result = make_pairs(prompts, candidates, verdicts, pairing, seed)
        arm.run.progress.advance(len(prompts), f"{result.kept} pairs")
        arm.run.progress.finish()
        write_pairs(out / "pairs.parquet", result.pairs)
        margin = sum(pair.margin for pair in result.pairs) / result.kept if result.kept else None
        return {"kept": result.kept, "dropped": result.dropped, "margin": margin}

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        "verdicts": judge.outputs["verdicts.parquet"],
        "pairing": digest_json(pairing.model_dump()),
        "seed": str(seed),
    }
    return folder.stage("pair", inputs, ["pairs.parquet"], produce)


def _train(
    arm: Arm, folder: RoundFolder, pinned: Pinned, candidates: Sequence[Candidate], pair: StageRecord
) -> StageRecord:
    seed = derive_seed(arm.seed, "train", folder.index)
    dpo = arm.settings.dpo
    checkpoint = folder.path / ".train.checkpoint"

    def job(pairs: tuple[Pair, ...], out: Path) -> TrainJob:
        return TrainJob(
            policy=pinned.start,
            reference=pinned.reference,
            source=pinned.source,
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
        pairs = read_pairs(folder.path / "pairs.parquet", prompts, candidates)
        if not pairs:
            raise TrainingError(f"round {folder.index} has no pairs to train on (dropped: {pair.info['dropped']})")
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
        return {"loss": dpo.describe_loss(), **_train_figures(starts[0], steps, time.perf_counter() - began)}

    inputs = {
        "policy": pinned.start.digest,
        "reference": pinned.reference.digest,
        "source": pinned.source.digest,
        "pairs": pair.outputs["pairs.parquet"],
        "candidates": pair.inputs["candidates"],
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


# --- figures ---


def _measure_initial(arm: Arm, folder: RoundFolder) -> Mapping[str, Any]:
    record = evaluate_policy(arm, folder, arm.run.initial, None)
    return {
        **_identity(arm, 0, arm.run.initial),
        "held_out": held_out_figures(arm, folder),
        "seconds": {record.stage: record.seconds},
        "reused": [record.stage] if record.reused_from else [],
    }


def _identity(arm: Arm, index: int, policy: Policy) -> dict[str, Any]:
    return {"arm": arm.name, "seed": arm.seed, "round": index, "policy": _ref(policy)}


def _ref(policy: Policy) -> dict[str, str]:
    return {"id": policy.id, "digest": policy.digest}


def _discard(arm: Arm, index: int) -> None:
    """Give up the policies and averaged references that the experiment does not keep and no later round needs."""
    keep = arm.run.experiment.keep
    if keep == "all":
        return
    needed = still_needed(arm.settings, index)
    policies = needed.policies | {index}
    if keep == "best":
        policies |= {_best_round(arm, index)}
    for past in range(1, index + 1):
        folder = arm.folder(past)
        for output, kept in (("policy", policies), ("reference", needed.references)):
            if past not in kept and (folder.path / output).exists():
                folder.prune(output)


def _best_round(arm: Arm, index: int) -> int:
    """The round with the highest held-out mean reward so far (the earliest of equals)."""

    def reward(past: int) -> float:
        mean = arm.folder(past).metrics["held_out"]["reward"]["mean"]
        return float("-inf") if mean is None else float(mean)

    return max(range(1, index + 1), key=reward)


def collect_metrics(store: RunStore, experiment: Experiment) -> list[dict[str, Any]]:
    """The figures of all closed rounds, by seed, arm and round."""
    rows = []
    for seed in experiment.seeds:
        for name in experiment.arms:
            for index in range(experiment.arm(name).rounds + 1):
                folder = store.round(name, seed, index)
                if folder.closed:
                    rows.append(folder.metrics)
    return rows
