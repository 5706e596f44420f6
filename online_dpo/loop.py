"""The loop: each round samples, judges, pairs, trains and measures; an experiment runs it for every arm and seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from online_dpo.config import ArmSettings, ComparingSpec, Experiment, JudgeSpec, SamplingSpec
from online_dpo.errors import JudgeError, TrainingError
from online_dpo.files import digest_json
from online_dpo.judging import (
    AskedJudge,
    Asking,
    LiveModel,
    Place,
    VerdictCache,
    abstain_reasons,
    asks_policy,
    judge_all,
    judge_digest,
    mean_details,
    open_judge,
)
from online_dpo.measure import summarise_held_out
from online_dpo.pairing import make_pairs
from online_dpo.prompts import prompts_for_round
from online_dpo.protocols import Engine, Learner, Progress, SampleRequest, TrainStart, TrainStep
from online_dpo.records import (
    HeldOutAnswer,
    read_candidates,
    read_held_out,
    read_pairs,
    read_verdicts,
    write_candidates,
    write_held_out,
    write_pairs,
    write_verdicts,
)
from online_dpo.rounds import ArmPolicies, Pinned, pin, still_needed
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, RunStore, StageRecord
from online_dpo.types import Abstain, Candidate, Policy, Prompt, Verdict

SCORED_AT_ONCE = 32
"""Answers a call when the learner scores held-out answers: enough to batch well, few enough to show progress."""


@dataclass
class Run:
    """One run's live parts: what every arm shares."""

    store: RunStore
    experiment: Experiment
    initial: Policy
    train_prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    engine: Engine
    learner: Learner
    progress: Progress
    judge_folders: tuple[Path, ...] = ()
    cache: VerdictCache | None = None
    place_judge: Place | None = None
    live_model: Callable[[], LiveModel] | None = None
    """The engine as something to talk to, for judges that ask the policy."""
    _judges: dict[str, AskedJudge] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)

    def judge(self, spec: JudgeSpec, comparing: ComparingSpec) -> AskedJudge:
        """The judge of `spec`, opened once a run."""
        key = digest_json([spec.model_dump(mode="json"), comparing.model_dump()])
        if key not in self._judges:
            asking = Asking(
                cache=self.cache,
                comparing=comparing,
                limit_s=self.experiment.judge_timeout,
                budget=self.experiment.judge_budget.model_dump(exclude_none=True),
            )
            self._judges[key] = open_judge(spec, self.judge_folders, asking, self.place_judge)
        return self._judges[key]

    def judge_digest(self, spec: JudgeSpec) -> str:
        """`judging.judge_digest`, computed once a run: a reward model's weights are part of it."""
        key = digest_json(spec.model_dump(mode="json"))
        if key not in self._digests:
            self._digests[key] = judge_digest(spec, self.judge_folders)
        return self._digests[key]


@dataclass(frozen=True)
class Arm:
    """One arm at one seed."""

    run: Run
    name: str
    seed: int
    settings: ArmSettings

    @property
    def label(self) -> str:
        """How the arm is called on the screen."""
        return f"{self.name} · seed {self.seed}"

    @property
    def policies(self) -> ArmPolicies:
        """The arm's policies by round."""
        return ArmPolicies(self.run.store, self.name, self.seed, self.run.initial)

    def folder(self, index: int) -> RoundFolder:
        """The folder of round `index`."""
        return self.run.store.round(self.name, self.seed, index)


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
            prompts = prompts_for_round(arm.run.train_prompts, arm.seed, index, arm.run.experiment.prompts.per_round)
            run_round(arm, folder, pin(folder, arm.policies, arm.settings, prompts))
        # Closed rounds too: the process may have been killed after closing one and before this.
        _discard(arm, index)


def run_round(arm: Arm, folder: RoundFolder, pinned: Pinned) -> None:
    """One round, stage by stage; a stage that is done already is read, not done again."""
    sample = _sample(arm, folder, pinned)
    candidates = read_candidates(folder.path / "candidates.parquet")
    judge = _judge(arm, folder, pinned, candidates, sample)
    verdicts = read_verdicts(folder.path / "verdicts.parquet")
    pair = _pair(arm, folder, pinned, candidates, verdicts, (sample, judge))
    train = _train(arm, folder, pinned, candidates, pair)
    policy = arm.policies.at(folder.index)
    evaluate = _evaluate(arm, folder, policy)
    stages = [sample, judge, pair, train, evaluate]
    folder.close(
        {
            **_identity(arm, folder.index, policy),
            "source": _ref(pinned.source),
            "reference": _ref(pinned.reference),
            "held_out": _held_out_figures(arm, folder),
            "sample": sample.info,
            "judge": judge.info,
            "pairs": pair.info,
            "train": train.info,
            "seconds": {record.stage: record.seconds for record in stages},
            "reused": [record.stage for record in stages if record.reused_from],
        }
    )


# --- stages ---


def _sample(arm: Arm, folder: RoundFolder, pinned: Pinned) -> StageRecord:
    sampling = arm.settings.sampling

    def produce(out: Path) -> dict[str, Any]:
        # Before the engine takes its memory back, where the two share a GPU.
        arm.run.learner.rest()
        probe_gap = arm.run.engine.load(pinned.source)
        seeds = [
            tuple(derive_seed(arm.seed, "sample", folder.index, prompt.id, i) for i in range(sampling.n))
            for prompt in pinned.prompts
        ]
        candidates, figures = _generate(arm, f"round {folder.index} sample", pinned.prompts, seeds, sampling)
        write_candidates(out / "candidates.parquet", candidates)
        return {**figures, "probe_gap": probe_gap}

    inputs = {
        "source": pinned.source.digest,
        "prompts": _prompts_digest(pinned.prompts),
        "sampling": digest_json(sampling.model_dump()),
        "seed": f"{arm.seed}/{folder.index}",
        "engine": arm.run.engine.kind,
    }
    return folder.stage("sample", inputs, ["candidates.parquet"], produce)


def _generate(
    arm: Arm, label: str, prompts: Sequence[Prompt], seeds: Sequence[tuple[int, ...]], sampling: SamplingSpec
) -> tuple[list[Candidate], dict[str, Any]]:
    """Candidates in the prompts' order, and what the sampling took."""
    progress = arm.run.progress
    requests = [SampleRequest(prompt, own) for prompt, own in zip(prompts, seeds, strict=True)]
    answers: dict[str, list[Candidate]] = {}
    began = time.perf_counter()
    tokens = 0
    progress.start(f"{arm.label} · {label}", sum(len(own) for own in seeds), "answers")
    for group in arm.run.engine.sample(requests, sampling):
        answers[group[0].prompt_id] = group
        tokens += sum(len(candidate.token_ids) for candidate in group)
        progress.advance(len(group), f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
    progress.finish()
    seconds = time.perf_counter() - began
    candidates = [candidate for prompt in prompts for candidate in answers[prompt.id]]
    return candidates, {
        "candidates": len(candidates),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def _judge(
    arm: Arm, folder: RoundFolder, pinned: Pinned, candidates: Sequence[Candidate], sample: StageRecord
) -> StageRecord:
    def produce(out: Path) -> dict[str, Any]:
        prompts = {prompt.id: prompt for prompt in pinned.prompts}
        asked = _ready_judge(arm, pinned.source)
        arm.run.progress.start(f"{arm.label} · round {folder.index} judge", len(candidates), "answers")
        verdicts = judge_all(
            asked,
            prompts,
            candidates,
            max_abstain=arm.settings.max_abstain,
            on_progress=arm.run.progress.advance,
        )
        arm.run.progress.finish()
        write_verdicts(out / "verdicts.parquet", verdicts)
        reasons = abstain_reasons(verdicts)
        abstained = sum(reasons.values())
        return {
            "verdicts": len(verdicts) - abstained,
            "abstained": abstained,
            "reasons": reasons,
            "details": mean_details(verdicts),
            "ledger": asked.take_ledger(),
        }

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        **_judge_inputs(arm, pinned.source),
        "max_abstain": str(arm.settings.max_abstain),
    }
    return folder.stage("judge", inputs, ["verdicts.parquet"], produce)


def _judge_inputs(arm: Arm, source: Policy) -> dict[str, str]:
    """What decides a verdict, beside the candidates."""
    spec = arm.settings.judge
    inputs = {"judge": arm.run.judge_digest(spec), "comparing": digest_json(arm.settings.comparing.model_dump())}
    return inputs | ({"policy": source.digest} if asks_policy(spec, arm.run.judge_folders) else {})


def _ready_judge(arm: Arm, source: Policy) -> AskedJudge:
    """The arm's judge; the engine holds the round's source policy where the judge asks it."""
    asked = arm.run.judge(arm.settings.judge, arm.settings.comparing)
    asked.take_ledger()  # what an earlier stage that failed has spent is not this one's
    if asked.uses_policy:
        if arm.run.live_model is None:
            raise JudgeError(f"judge '{asked.name}' asks the policy, and there is no engine here to ask it by")
        arm.run.learner.rest()
        arm.run.engine.load(source)
        asked.attach(arm.run.live_model(), source.digest)
    return asked


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
        for event in arm.run.learner.train(
            pinned.start,
            pinned.reference,
            pinned.source,
            pairs,
            dpo,
            policy_id=f"{arm.name}/seed_{arm.seed}/round_{folder.index:02d}",
            out=out / "policy",
            seed=seed,
        ):
            if isinstance(event, TrainStart):
                starts.append(event)
            elif isinstance(event, TrainStep):
                steps.append(event)
                left = len(pairs) * dpo.epochs - (len(steps) - 1) * dpo.batch_size
                arm.run.progress.advance(min(dpo.batch_size, left), f"loss {event.loss:.3f}")
        arm.run.progress.finish()
        return _train_figures(starts[0], steps, time.perf_counter() - began)

    inputs = {
        "policy": pinned.start.digest,
        "reference": pinned.reference.digest,
        "source": pinned.source.digest,
        "pairs": pair.outputs["pairs.parquet"],
        "candidates": pair.inputs["candidates"],
        "dpo": digest_json(dpo.model_dump()),
        "seed": str(seed),
    }
    return folder.stage("train", inputs, ["policy"], produce)


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


def _evaluate(arm: Arm, folder: RoundFolder, policy: Policy) -> StageRecord:
    """One answer to every held-out prompt, its score, and the initial policy's log-probs of it."""
    experiment = arm.run.experiment
    spec = experiment.evaluation_judge(arm.name)
    sampling = held_out_sampling(experiment, arm.settings)

    def produce(out: Path) -> dict[str, Any]:
        arm.run.learner.rest()
        arm.run.engine.load(policy)
        # The same seeds in every round and arm: differences are the policies', not the dice's.
        seeds = [(derive_seed(arm.seed, "held_out", prompt.id),) for prompt in arm.run.held_out]
        label = f"round {folder.index} evaluate"
        answers, figures = _generate(arm, label, arm.run.held_out, seeds, sampling)
        prompts = {prompt.id: prompt for prompt in arm.run.held_out}
        asked = arm.run.judge(spec, arm.settings.comparing)
        verdicts = judge_all(asked, prompts, answers, max_abstain=arm.settings.max_abstain)
        initial = _initial_logprobs(arm, folder.index, policy, answers)
        rows = [
            HeldOutAnswer(
                candidate,
                verdict.score if isinstance(verdict, Verdict) else None,
                verdict.reason if isinstance(verdict, Abstain) else None,
                tuple(logprobs),
            )
            for candidate, verdict, logprobs in zip(answers, verdicts, initial, strict=True)
        ]
        write_held_out(out / "held_out.parquet", rows)
        return figures

    inputs = {
        "policy": policy.digest,
        "prompts": _prompts_digest(arm.run.held_out),
        "sampling": digest_json(sampling.model_dump()),
        "judge": arm.run.judge_digest(spec),
        "max_abstain": str(arm.settings.max_abstain),
        "seed": str(arm.seed),
        "engine": arm.run.engine.kind,
    }
    return folder.stage("evaluate", inputs, ["held_out.parquet"], produce)


def _initial_logprobs(arm: Arm, index: int, policy: Policy, answers: Sequence[Candidate]) -> Sequence[Sequence[float]]:
    """π₀'s log-probs of the answers: the stored ones where π₀ sampled them, else one pass of the learner."""
    if policy.digest == arm.run.initial.digest:
        return [answer.logprobs for answer in answers]
    arm.run.engine.rest()
    items = list(zip(arm.run.held_out, answers, strict=True))
    logprobs: list[list[float]] = []
    arm.run.progress.start(f"{arm.label} · round {index} evaluate, KL", len(items), "answers")
    for start in range(0, len(items), SCORED_AT_ONCE):
        scored = arm.run.learner.score(arm.run.initial, items[start : start + SCORED_AT_ONCE])
        logprobs.extend(scored)
        arm.run.progress.advance(len(scored))
    arm.run.progress.finish()
    return logprobs


# --- figures ---


def held_out_sampling(experiment: Experiment, settings: ArmSettings) -> SamplingSpec:
    """How held-out answers are drawn: one a prompt."""
    evaluation = experiment.evaluation
    return SamplingSpec(
        n=1,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_tokens=evaluation.max_tokens or settings.sampling.max_tokens,
    )


def _measure_initial(arm: Arm, folder: RoundFolder) -> Mapping[str, Any]:
    record = _evaluate(arm, folder, arm.run.initial)
    return {
        **_identity(arm, 0, arm.run.initial),
        "held_out": _held_out_figures(arm, folder),
        "seconds": {record.stage: record.seconds},
        "reused": [record.stage] if record.reused_from else [],
    }


def _held_out_figures(arm: Arm, folder: RoundFolder) -> dict[str, Any]:
    """The round's held-out figures; comparisons are with round 0 of the same arm and seed."""
    current = read_held_out(folder.path / "held_out.parquet")
    arm.folder(0).trust("evaluate")
    initial = read_held_out(arm.folder(0).path / "held_out.parquet")
    figures = summarise_held_out(
        [answer.candidate for answer in current],
        [answer.score for answer in current],
        [answer.score for answer in initial],
        [answer.initial_logprobs for answer in current],
    )
    evaluation = arm.run.experiment.evaluation
    unreal = {"reward_change", "win_rate", "kl_initial", "kl_initial_token"} if folder.index == 0 else set()
    if (evaluation.temperature, evaluation.top_p) != (1.0, 1.0):
        # KL(θ‖π₀) is a mean over samples of θ itself; these are samples of another distribution.
        unreal |= {"kl_initial", "kl_initial_token"}
    return {key: None if key in unreal else value for key, value in figures.items()}


def _identity(arm: Arm, index: int, policy: Policy) -> dict[str, Any]:
    return {"arm": arm.name, "seed": arm.seed, "round": index, "policy": _ref(policy)}


def _ref(policy: Policy) -> dict[str, str]:
    return {"id": policy.id, "digest": policy.digest}


def _prompts_digest(prompts: Sequence[Prompt]) -> str:
    return digest_json([[prompt.id, list(prompt.token_ids)] for prompt in prompts])


def _discard(arm: Arm, index: int) -> None:
    """Give up the policies that the experiment does not keep and no later round needs."""
    keep = arm.run.experiment.keep
    if keep == "all":
        return
    kept = still_needed(arm.settings, index) | {index}
    if keep == "best":
        kept |= {_best_round(arm, index)}
    for past in range(1, index + 1):
        folder = arm.folder(past)
        if past not in kept and (folder.path / "policy").exists():
            folder.prune("policy")


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
