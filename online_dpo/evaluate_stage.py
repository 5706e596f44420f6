"""The stage that measures a policy on the held-out prompts, and the figures that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.config import ArmSettings, EvaluationSpec, Experiment, JudgeSpec, SamplingSpec
from online_dpo.errors import RunFolderError
from online_dpo.files import digest_json
from online_dpo.human_pairs_stage import human_pair_figures
from online_dpo.judging import AskedJudge, compares, judge_against, judge_all
from online_dpo.measure import summarise_held_out
from online_dpo.records import HeldOutAnswer, read_held_out, write_held_out
from online_dpo.sample_stage import generate, prompts_digest
from online_dpo.scoring import score_answers
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Abstain, Candidate, Policy, Verdict


def evaluate_policy(
    arm: Arm,
    folder: RoundFolder,
    policy: Policy,
    reference: Policy | None,
    drawn: Callable[[], None] | None = None,
) -> StageRecord:
    """One answer to every held-out prompt, its score and the gold judge's, and its log-probs under the initial policy
    and under the reference of the round that trained `policy` (None: no round did).

    `drawn` is called once the engine is free: all answers are there. Not called where the stage is done already.
    """
    experiment = arm.run.experiment
    spec, gold = experiment.evaluation_judge(arm.name), experiment.evaluation.gold
    sampling = held_out_sampling(experiment, arm.settings)

    def produce(out: Path) -> dict[str, Any]:
        arm.run.rest_learner()
        arm.run.engine.load(policy)
        # The same seeds in every round and arm: differences are the policies', not the dice's.
        label = f"round {folder.index} evaluate"
        answers, figures = generate(
            arm, label, arm.run.held_out, lambda prompt: (derive_seed(arm.seed, "held_out", prompt.id),), sampling
        )
        if drawn is not None:
            drawn()
        verdicts, ledger = _judged(arm, folder, spec, answers)
        golden, gold_ledger = (None, None) if gold is None else _judged(arm, folder, gold, answers)
        initial = _logprobs(arm, f"{label}, KL", arm.run.initial, policy, answers)
        referred = initial
        if reference is not None and reference.digest != arm.run.initial.digest:
            referred = _logprobs(arm, f"{label}, KL to the reference", reference, policy, answers)
        rows = _rows(answers, verdicts, golden, initial, None if reference is None else referred)
        write_held_out(out / "held_out.parquet", rows)
        return {**figures, "ledger": ledger, **({} if gold_ledger is None else {"gold_ledger": gold_ledger})}

    inputs = {
        "policy": policy.digest,
        "prompts": prompts_digest(arm.run.held_out),
        "sampling": digest_json(sampling.model_dump()),
        "max_abstain": str(arm.settings.max_abstain),
        "seed": str(arm.seed),
        "engine": arm.run.engine.kind,
        **_judge_inputs(arm, folder, spec, gold),
    }
    if reference is not None:
        inputs["reference"] = reference.digest
    return folder.stage("evaluate", inputs, ["held_out.parquet"], produce)


def _judge_inputs(arm: Arm, folder: RoundFolder, spec: JudgeSpec, gold: JudgeSpec | None) -> dict[str, str]:
    """What decides the scores, beside the answers."""
    inputs = {"judge": arm.run.judge_digest(spec)}
    if gold is not None:
        inputs["gold"] = arm.run.judge_digest(gold)
    judges = [one for one in (spec, gold) if one is not None]
    if folder.index and any(compares(one, arm.run.judge_folders) for one in judges):
        inputs["against"] = _initial_record(arm).outputs["held_out.parquet"]
    return inputs


def _judged(
    arm: Arm, folder: RoundFolder, spec: JudgeSpec, answers: Sequence[Candidate]
) -> tuple[list[Verdict | Abstain], dict[str, float]]:
    """The verdicts of a judge, and what they cost."""
    asked = arm.run.judge(spec, arm.settings.comparing)
    asked.take_ledger()
    verdicts = _held_out_verdicts(arm, folder, asked, answers)
    return verdicts, asked.take_ledger()


def _held_out_verdicts(
    arm: Arm, folder: RoundFolder, asked: AskedJudge, answers: Sequence[Candidate]
) -> list[Verdict | Abstain]:
    """The answers' scores. One that says something only of two gives the chance of beating the initial's."""
    prompts = {prompt.id: prompt for prompt in arm.run.held_out}
    most = arm.settings.max_abstain
    if not asked.relative:
        return judge_all(asked, prompts, answers, max_abstain=most)
    initial: Sequence[Candidate] = answers
    if folder.index:
        _initial_record(arm)
        initial = [row.candidate for row in read_held_out(arm.folder(0).path / "held_out.parquet")]
    return judge_against(asked, prompts, answers, initial, max_abstain=most)


def _initial_record(arm: Arm) -> StageRecord:
    """The record of round 0's held-out answers, its files held against it."""
    arm.folder(0).trust("evaluate")
    record = arm.folder(0).done("evaluate")
    if record is None:
        raise RunFolderError(f"{arm.folder(0).path}: stage 'evaluate' has no record")
    return record


def _logprobs(
    arm: Arm, label: str, scoring: Policy, sampling: Policy, answers: Sequence[Candidate]
) -> Sequence[Sequence[float]]:
    """`scoring`'s log-probs of the answers: the stored ones where it sampled them, else one pass of the learner."""
    if scoring.digest == sampling.digest:
        return [answer.logprobs for answer in answers]
    return score_answers(arm, label, scoring, list(zip(arm.run.held_out, answers, strict=True)))


def _rows(
    answers: Sequence[Candidate],
    verdicts: Sequence[Verdict | Abstain],
    golden: Sequence[Verdict | Abstain] | None,
    initial: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None,
) -> list[HeldOutAnswer]:
    return [
        HeldOutAnswer(
            answer,
            *_said(verdicts[place]),
            tuple(initial[place]),
            None if reference is None else tuple(reference[place]),
            *((None, None) if golden is None else _said(golden[place])),
        )
        for place, answer in enumerate(answers)
    ]


def _said(verdict: Verdict | Abstain) -> tuple[float | None, str | None]:
    """The score, or the reason why there is none."""
    return (verdict.score, None) if isinstance(verdict, Verdict) else (None, verdict.reason)


def held_out_sampling(experiment: Experiment, settings: ArmSettings) -> SamplingSpec:
    """How held-out answers are drawn: one a prompt."""
    evaluation = experiment.evaluation
    return SamplingSpec(
        n=1,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_tokens=evaluation.max_tokens or settings.sampling.max_tokens,
    )


def held_out_figures(arm: Arm, folder: RoundFolder) -> dict[str, Any]:
    """The round's held-out figures; comparisons are with round 0 of the same arm and seed."""
    current = read_held_out(folder.path / "held_out.parquet")
    arm.folder(0).trust("evaluate")
    initial = read_held_out(arm.folder(0).path / "held_out.parquet")
    reference = [answer.reference_logprobs for answer in current if answer.reference_logprobs is not None]
    evaluation = arm.run.experiment.evaluation
    golden = None
    if evaluation.gold is not None:
        golden = ([answer.gold_score for answer in current], [answer.gold_score for answer in initial])
    figures = summarise_held_out(
        [answer.candidate for answer in current],
        [answer.score for answer in current],
        [answer.score for answer in initial],
        [answer.initial_logprobs for answer in current],
        reference or None,
        golden,
    )
    divergences = {"kl_initial", "kl_initial_token", "kl_reference"}
    changes = {"reward_change", "win_rate", "gold_change", "gold_win_rate"}
    unreal = changes | divergences if folder.index == 0 else set()
    if not own_distribution(evaluation):
        # KL(θ‖π₀) and entropy are means over samples of θ itself; these are samples of another distribution.
        unreal |= divergences | {"entropy"}
    real = {key: None if key in unreal else value for key, value in figures.items()}
    return real | {"human_pairs": human_pair_figures(folder)}


def own_distribution(sampling: SamplingSpec | EvaluationSpec) -> bool:
    """Whether answers are drawn from the policy itself: its log-probs are then those of their own distribution."""
    return (sampling.temperature, sampling.top_p) == (1.0, 1.0)
