"""The loop: each round samples, judges, pairs, trains and measures; an experiment runs it for every arm and seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from online_dpo.ahead import answers_ahead, round_ahead
from online_dpo.arms import Arm, Run
from online_dpo.block_round import make_in_blocks
from online_dpo.config import Experiment
from online_dpo.confounding import gold_in_training
from online_dpo.errors import TrainingError
from online_dpo.evaluate_stage import evaluate_policy, held_out_figures
from online_dpo.human_pairs_stage import rank_human_pairs
from online_dpo.lanes import run_side_by_side
from online_dpo.off_policy_stage import off_policy_figures, score_off_policy
from online_dpo.reference_stage import average_reference
from online_dpo.rounds import Pinned, pin, sampled_in, still_needed
from online_dpo.source_spec import source_kind
from online_dpo.sources import gather, refresh_figures, round_prompts
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder, RunStore, StageRecord
from online_dpo.train_stage import train_round
from online_dpo.types import Policy


def run_experiment(run: Run) -> dict[str, str]:
    """Run every arm at every seed; returns the arms that training stopped, with the reason (empty: none).

    A stopped arm keeps its last good policy and does not stop the others. All else that fails stops the run.
    """
    for line in gold_in_training(run.experiment, run.judge_digest):
        run.progress.say(f"warning: {line}")
    arms = arms_of(run)
    left = sum(not arm.folder(arm.settings.rounds).closed for arm in arms)
    lanes = min(run.experiment.cluster.lanes, left)
    reasons = run_side_by_side(run, arms, run_or_stop, lanes) if lanes > 1 else [run_or_stop(arm) for arm in arms]
    return {arm.label: reason for arm, reason in zip(arms, reasons, strict=True) if reason is not None}


def arms_of(run: Run) -> list[Arm]:
    """Every arm at every seed, in the order in which they are run."""
    experiment = run.experiment
    return [Arm(run, name, seed, experiment.arm(name)) for seed in experiment.seeds for name in experiment.run_order()]


def run_or_stop(arm: Arm) -> str | None:
    """`run_arm`; returns why training stopped the arm, None where it did not."""
    try:
        run_arm(arm)
    except TrainingError as error:
        arm.run.progress.say(f"{arm.label} stopped: {error}")
        return str(error)
    return None


def run_arm(arm: Arm) -> None:
    """Rounds 0 (the initial policy, measured) to `settings.rounds`; closed rounds are passed over."""
    start = arm.folder(0)
    if not start.closed:
        start.close(_measure_initial(arm, start))
    _track(arm, 0)
    for index in range(1, arm.settings.rounds + 1):
        folder = arm.folder(index)
        if not folder.closed:
            average_reference(arm, folder)
            run_round(arm, folder, pin(folder, arm.policies, arm.settings, round_prompts(arm, index)))
        # Closed rounds too: the process may have been killed after closing one and before this.
        _track(arm, index)
        _discard(arm, index)


def run_round(arm: Arm, folder: RoundFolder, pinned: Pinned) -> None:
    """One round, stage by stage; a stage that is done already is read, not done again."""
    data, train = _gather_and_train(arm, folder, pinned)
    policy = arm.policies.at(folder.index)
    off_policy = score_off_policy(arm, folder, pinned, data, policy)
    with answers_ahead(arm, folder.index + 1) as engine_is_free:
        evaluate = evaluate_policy(arm, folder, policy, pinned.reference, engine_is_free)
        human = rank_human_pairs(arm, folder, policy)
    done = [folder.done("reference"), folder.done("refresh"), *data.records, train, off_policy, evaluate, human]
    stages = [record for record in done if record is not None]
    folder.close(
        {
            **_identity(arm, folder.index, policy),
            "source": None if data.sampled_by is None else _ref(data.sampled_by),
            "reference": _ref(pinned.reference),
            "held_out": held_out_figures(arm, folder),
            "off_policy": off_policy_figures(arm, folder, pinned, data),
            "refresh": refresh_figures(folder),
            "sample": data.sample.info,
            "judge": data.judge.info,
            "audit": None if data.audit is None else data.audit.info,
            "pairs": data.pair.info,
            "train": train.info,
            "seconds": {record.stage: record.seconds for record in stages},
            "reused": [record.stage for record in stages if record.reused_from],
        }
    )


def _gather_and_train(arm: Arm, folder: RoundFolder, pinned: Pinned) -> tuple[RoundData, StageRecord]:
    if source_kind(arm.settings.source) == "every_steps":
        return make_in_blocks(arm, folder, pinned)
    data = gather(arm, folder, pinned)
    with round_ahead(arm, folder.index + 1):
        return data, train_round(arm, folder, pinned, data)


# --- figures ---


def _measure_initial(arm: Arm, folder: RoundFolder) -> Mapping[str, Any]:
    evaluate = evaluate_policy(arm, folder, arm.run.initial, None)
    human = rank_human_pairs(arm, folder, arm.run.initial)
    stages = [record for record in (evaluate, human) if record is not None]
    return {
        **_identity(arm, 0, arm.run.initial),
        "held_out": held_out_figures(arm, folder),
        "seconds": {record.stage: record.seconds for record in stages},
        "reused": [record.stage for record in stages if record.reused_from],
    }


def _identity(arm: Arm, index: int, policy: Policy) -> dict[str, Any]:
    return {"arm": arm.name, "seed": arm.seed, "round": index, "policy": _ref(policy)}


def _ref(policy: Policy) -> dict[str, str]:
    return {"id": policy.id, "digest": policy.digest}


def _track(arm: Arm, index: int) -> None:
    """Give the rounds up to `index` to the trackers; those that they have are not written again."""
    if arm.run.tracking is not None:
        arm.run.tracking.closed(arm.folder(past).metrics for past in range(index + 1))


def _discard(arm: Arm, index: int) -> None:
    """Give up the policies and averaged references that the experiment does not keep and no later round needs."""
    keep = arm.run.experiment.keep
    if keep == "all":
        return
    needed = still_needed(arm.settings, index, sampled_in(arm.folder(index)))
    policies = needed.policies | {index}
    if keep == "best":
        policies |= {_best_round(arm, index)}
    for past in range(1, index + 1):
        folder = arm.folder(past)
        for output, kept in (("policy", policies), ("reference", needed.references)):
            if past not in kept and (folder.path / output).exists():
                folder.prune(output)


def _best_round(arm: Arm, index: int) -> int:
    """The best round so far: the one that a comparison would choose by `select`; where that is the last, the one with
    the highest held-out mean reward (the earliest of equals)."""
    experiment = arm.run.experiment
    if experiment.select != "last":
        from online_dpo.compare.reading import read_round
        from online_dpo.compare.selecting import selected_round

        past_rounds = {
            past: read_round(experiment, arm.folder(past), arm.name, arm.seed) for past in range(1, index + 1)
        }
        return selected_round(past_rounds, experiment.select)

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
