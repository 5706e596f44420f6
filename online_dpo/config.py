"""The experiment's schema. Imports nothing heavy: `check` and `--help` must be quick.

An experiment is one mapping; each arm is that mapping with some keys changed. `Experiment.arm(name)` gives an
arm's own resolved settings; `load_experiment` reads, overrides and validates a YAML file.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from online_dpo.cluster_spec import ClusterSpec
from online_dpo.dpo_spec import DPOSpec as DPOSpec  # noqa: PLC0414 - a section of the experiment like the others
from online_dpo.errors import ConfigError, nearest
from online_dpo.key_faults import describe
from online_dpo.keys import literal_key
from online_dpo.source_spec import DatasetSpec, Source, SourceSpec, parts_of, source_kind
from online_dpo.spec import DOTTED, Fraction, Positive, Spec
from online_dpo.yaml_file import parse_yaml, read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

MOST_ROUNDS = 100_000
"""More are a slip of the keyboard; each has a folder and is planned for."""


class PromptsSpec(Spec):
    """Where prompts come from. `path` is a file, a folder, or a hub dataset's id."""

    path: str
    split: str = "train"
    name: str | None = Field(default=None, description="a hub dataset's configuration")
    column: str = Field(default="prompt", description="plain text, or a list of {role, content} messages")
    id_column: str | None = None
    system: str | None = Field(default=None, description="system message put before plain-text prompts")
    per_round: Positive = 256
    held_out: Positive = 256
    max_tokens: Positive = Field(default=512, description="longer prompts are dropped and counted")
    template: str | None = Field(
        default=None, description="default: the tokenizer's own chat template; dialogue: HH-RLHF's turns; a Jinja file"
    )


class SamplingSpec(Spec):
    """How candidates are drawn. Log-probs are stored before temperature and top_p."""

    n: Positive = 4
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Positive = 64


class ActorSpec(Spec):
    """A Ray actor of the judge's own."""

    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    threads: Positive | None = Field(default=None, description="CPU threads; default: all cores")


class JudgeSpec(Spec):
    """`use` is "module:Class"; every other key, but for `actor`, goes to its constructor."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    use: str
    actor: ActorSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """`judge: "module:Class"` is short for `judge: {use: "module:Class"}`."""
        return {"use": value} if isinstance(value, str) else value

    @field_validator("use")
    @classmethod
    def _dotted(cls, value: str) -> str:
        if not re.fullmatch(DOTTED, value):
            raise ValueError('a judge is named as "module:Class", for example "judges.length:LengthJudge"')
        return value

    @property
    def params(self) -> dict[str, Any]:
        """The constructor's keyword arguments."""
        return dict(self.model_extra or {})


class ComparingSpec(Spec):
    """How a pairwise judge's comparisons of n candidates become scores."""

    schedule: Literal["all_pairs", "swiss", "knock_out"] = "all_pairs"
    waves: Positive | None = Field(default=None, description="swiss: default ⌈log₂ n⌉ + 1")
    rank_by: Literal["bradley_terry", "mean_win"] = Field(
        default="bradley_terry", description="strengths in log-odds, or the mean probability of winning"
    )
    precision: Annotated[float, Field(gt=0.0)] = Field(
        default=0.1, description="bradley_terry: of the normal prior on strengths"
    )


class PairingSpec(Spec):
    """How verdicts become pairs. Margins are in the judge's units."""

    rule: Literal["best_vs_worst", "best_vs_random", "random", "all_pairs", "top_k"] = "best_vs_worst"
    min_margin: Annotated[float, Field(ge=0.0)] = 0.0
    k: Positive = Field(default=2, description="top_k: the k best against the k worst, rank by rank")
    max_pairs: Positive | None = Field(default=None, description="a round's budget; more pairs are dropped, counted")


class LoraSpec(Spec):
    """Train an adapter instead of all weights (`dpo.lr` then wants to be 10 to 100 times larger)."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    dropout: Literal[0] = Field(default=0, description="DPO compares log-probs: dropout stays off")
    target_modules: str | list[str] = "all-linear"
    serve: Literal["merged", "adapter"] = "merged"


class RlooSpec(Spec):
    """REINFORCE leave-one-out: the policy-gradient baseline beside DPO."""

    kl: Annotated[float, Field(ge=0.0)] = Field(
        default=0.05, description="β: the reward is score − β·log(π/π_ref) of the whole answer"
    )
    clip: Annotated[float, Field(gt=0.0)] | None = Field(
        default=10.0,
        description="an answer weighs π/μ, at most this: later steps of a round are off-policy; null: all weigh 1",
    )
    standardise: bool = Field(default=False, description="scores are divided by their standard deviation in the round")

    def describe(self) -> str:
        """One line, as `DPOSpec.describe_loss`."""
        weights = "answers not weighed" if self.clip is None else f"clip {self.clip:g}"
        return f"rloo, kl {self.kl:g}, summed log-probs, {weights}{', standardised scores' * self.standardise}"


class ReferenceSpec(Spec):
    """A reference that moves in its own time: refreshed every k rounds, or an average of policies. One of the two."""

    every: Positive | None = None
    ema: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="α in ref ← α·policy + (1 − α)·ref after every round; 1 is prior"
    )


class ArmSettings(Spec):
    """All that may differ between arms."""

    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 1
    algorithm: Literal["dpo", "rloo"] = Field(
        default="dpo",
        description="rloo: REINFORCE leave-one-out on the judge's scores (Ahmadian et al. 2024), by the same engine, "
        "judge and prompts; optimiser keys are those of `dpo`, whose batch_size then counts prompts",
    )
    rloo: RlooSpec = RlooSpec()
    source: Source = Field(default="current", description="where pairs come from; README lists the forms")
    reference: Literal["prior", "initial"] | ReferenceSpec = Field(
        default="prior", description="prior: the policy that the round began with"
    )
    sampling: SamplingSpec = SamplingSpec()
    judge: JudgeSpec
    max_abstain: Fraction = Field(default=0.2, description="largest share of abstentions in a round")
    comparing: ComparingSpec = ComparingSpec()
    pairing: PairingSpec = PairingSpec()
    dpo: DPOSpec = DPOSpec()

    @model_validator(mode="after")
    def _behaviour_is_known(self) -> ArmSettings:
        if self.dpo.importance_clip is not None and (self.sampling.temperature, self.sampling.top_p) != (1.0, 1.0):
            raise ValueError(
                "dpo.importance_clip weighs by the probability with which answers were sampled: stored log-probs are "
                "that at sampling.temperature 1 and top_p 1 alone"
            )
        kinds = [source_kind(part) for part in parts_of(self.source)]
        if self.dpo.importance_clip is not None and {"dataset", "spin"} & set(kinds):
            raise ValueError(
                "dpo.importance_clip weighs by the probability with which answers were sampled: a dataset's have none"
            )
        return self

    @model_validator(mode="after")
    def _rloo_has_groups(self) -> ArmSettings:
        if self.algorithm != "rloo":
            return self
        if source_kind(self.source) not in ("current", "initial", "every"):
            raise ValueError(
                "algorithm: rloo learns from all answers of a policy's sample: source current, initial or every"
            )
        if self.dpo.faults.on:
            raise ValueError("dpo.faults are those of losses of pairs, and algorithm: rloo has none: leave them out")
        if self.sampling.n < 2:
            raise ValueError(
                "algorithm: rloo compares an answer with the others of its prompt: sampling.n of 2 or more"
            )
        if self.rloo.clip is not None and (self.sampling.temperature, self.sampling.top_p) != (1.0, 1.0):
            raise ValueError(
                "rloo.clip weighs by the probability with which answers were sampled: stored log-probs are that at "
                "sampling.temperature 1 and top_p 1 alone (rloo.clip: null weighs all answers 1)"
            )
        return self

    def describe_objective(self) -> str:
        """One line: what training minimises, with every key that changes it."""
        return self.rloo.describe() if self.algorithm == "rloo" else self.dpo.describe_loss()

    @model_validator(mode="after")
    def _blocks_are_trained_once(self) -> ArmSettings:
        if source_kind(self.source) != "every_steps":
            return self
        if self.dpo.epochs != 1:
            raise ValueError(
                "source: every_steps trains on each answer as soon as it is sampled, once: dpo.epochs must be 1 "
                f"(found {self.dpo.epochs})"
            )
        if self.dpo.xpo_alpha:
            raise ValueError(
                "dpo.xpo_alpha needs answers drawn from the reference, which source: every_steps leaves behind within "
                "a round: leave it out"
            )
        return self

    @field_validator("reference")
    @classmethod
    def _one_rule(cls, value: str | ReferenceSpec) -> str | ReferenceSpec:
        if isinstance(value, ReferenceSpec) and (value.every is None) == (value.ema is None):
            raise ValueError("either every or ema is needed, and not both")
        return value


class EvaluationSpec(Spec):
    """Held-out measuring after every round; one answer a prompt, the same seeds in every round and arm."""

    judge: JudgeSpec | None = Field(default=None, description="default: each arm's own judge")
    gold: JudgeSpec | None = Field(
        default=None, description="a judge that training never sees, scored beside the first"
    )
    pairs: DatasetSpec | None = Field(
        default=None, description="preference pairs by people: how often the policy ranks them as they did"
    )
    off_policy: Annotated[int, Field(ge=0)] = Field(
        default=32, description="pairs of a round on which off-policyness and displacement are measured; 0: none"
    )
    against: Literal["initial"] = "initial"
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_tokens: Positive | None = Field(default=None, description="default: sampling.max_tokens")
    show: Annotated[int, Field(ge=0)] = Field(default=3, description="answers printed before and after")


class SftSpec(Spec):
    """Supervised fine-tuning before the first round: its result is the initial policy of every arm."""

    dataset: DatasetSpec
    on: Literal["chosen", "both"] = Field(default="chosen", description="both: the rejected answers too")
    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    batch_size: Positive = 32
    epochs: Positive = 1
    warmup: Fraction = 0.1
    seed: Annotated[int, Field(ge=0)] = 0


class TrackingSpec(Spec):
    """Where figures are written beside the run folder."""

    tensorboard: bool = Field(default=False, description="event files in RUN/tensorboard")
    wandb: str | None = Field(default=None, description="a Weights & Biases project")
    mlflow: str | None = Field(default=None, description="an MLflow experiment; its server by MLFLOW_TRACKING_URI")


class BudgetSpec(Spec):
    """What all judges of a run may spend in sum; the run stops there, and goes on when the budget is raised."""

    cost: Annotated[float, Field(gt=0.0)] | None = Field(default=None, description="in the judge's currency")
    tokens: Positive | None = None
    calls: Positive | None = None


class AuditSpec(Spec):
    """What is measured of the judge itself in every round, on a sample of the round's prompts."""

    prompts: Annotated[int, Field(ge=0)] = Field(default=32, description="0: no audit")
    against: JudgeSpec | None = Field(default=None, description="a second judge, for agreement")


class EngineSpec(Spec):
    """What generates. `engine: vllm` is short for `engine: {kind: vllm}`."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    kind: Literal["auto", "vllm", "transformers"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: Positive | None = Field(default=None, description="default: longest prompt + max_tokens")
    kv_cache_gb: Annotated[float, Field(gt=0.0)] = Field(default=2.0, description="CPU only")
    threads: Positive | None = Field(default=None, description="CPU threads; default: all cores")
    gpus: Annotated[float, Field(ge=0.0)] | None = Field(default=None, description="default: 1 where there is a GPU")
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.85
    enforce_eager: bool | None = Field(default=None, description="default: true on CPU, false on GPU")
    share_gpu: bool = Field(default=False, description="engine sleeps while the learner works on the same GPU")
    batch_size: Positive = Field(default=32, description="transformers engine: sequences decoded together")


class LearnerSpec(Spec):
    """Where training runs."""

    workers: Positive = 1
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="ddp: each worker holds the whole model; fsdp: a share of every weight and of its optimiser state "
        "(with bfloat16, activation_checkpointing too: a pass would otherwise keep a narrow copy of all weights)",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the forward; weights and optimiser stay float32"
    )
    layout: Literal["auto", "packed", "plain"] = Field(
        default="auto", description="packed: a pair's prompt is computed once; auto: where the model's attention can"
    )
    tokens_per_pass: Positive | None = Field(
        default=None, description="tokens of one forward pass on one worker; default 1024 on a CPU, 16384 on a GPU"
    )
    activation_checkpointing: bool = False
    save_every: Positive | None = Field(default=None, description="optimiser steps between checkpoints in a round")
    threads: Positive | None = Field(default=None, description="CPU threads a worker; default: cores / workers")
    gpus_per_worker: Annotated[float, Field(ge=0.0)] | None = None


def _one_arm() -> dict[str, dict[str, Any] | None]:
    return {"on_policy": {}}


class Experiment(ArmSettings):
    """One whole experiment."""

    name: str
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0]
    )
    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    prompts: PromptsSpec
    lora: LoraSpec | None = None
    sft: SftSpec | None = None
    arms: dict[str, dict[str, Any] | None] = Field(default_factory=_one_arm)
    evaluation: EvaluationSpec = EvaluationSpec()
    audit: AuditSpec = AuditSpec()
    judge_cache: str | None = Field(default=None, description="default: verdicts.sqlite in the run folder")
    judge_budget: BudgetSpec = BudgetSpec()
    judge_timeout: Annotated[float, Field(gt=0.0)] | None = Field(
        default=600.0, description="seconds one call of a judge may take; null: no limit, and no thread of its own"
    )
    engine: EngineSpec = EngineSpec()
    learner: LearnerSpec = LearnerSpec()
    cluster: ClusterSpec = ClusterSpec()
    keep: Literal["all", "last", "best"] = Field(default="all", description="which policies stay on disk")
    select: Literal["last", "best", "best_gold"] = Field(
        default="last", description="the round that stands for an arm: the last, or the best held-out or gold reward"
    )
    contrasts: list[tuple[str, str]] | None = Field(
        default=None,
        description="the differences that the experiment is made for, two arms each; default: every two arms. Fewer "
        "are less corrected for each other",
    )
    tracking: TrackingSpec = TrackingSpec()
    output: str = Field(default="runs", description="the run folder is output/name")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("letters, digits, '.', '_' and '-' only, at most 64")
        return value

    @model_validator(mode="after")
    def _shares(self) -> Experiment:
        if self.engine.share_gpu and self.learner.parallel == "fsdp" and self.learner.workers > 1:
            raise ValueError(
                "engine.share_gpu: a learner with parallel: fsdp keeps its shares on the GPUs between rounds; "
                "give the engine its own GPU, or set learner.parallel: ddp"
            )
        return self

    @model_validator(mode="after")
    def _dropout_has_a_layout(self) -> Experiment:
        if self.learner.layout == "packed" and self.with_dropout:
            raise ValueError(
                f"learner.layout: packed attention has no dropout, and arms.{self.with_dropout[0]} trains with it "
                "(dpo.faults.dropout): leave 'layout' out"
            )
        return self

    @model_validator(mode="after")
    def _gold_is_there(self) -> Experiment:
        if self.select == "best_gold" and self.evaluation.gold is None:
            raise ValueError("select: best_gold needs a judge at evaluation.gold")
        return self

    @model_validator(mode="after")
    def _arms(self) -> Experiment:
        if not self.arms:
            raise ValueError("arms: at least one arm is needed")
        for name in self.arms:
            if not NAME.fullmatch(name):
                raise ValueError(f"arms.{name}: letters, digits, '.', '_' and '-' only, at most 64")
            self.arm(name)
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: the same seed twice")
        self._streams()
        return self

    @model_validator(mode="after")
    def _contrasts(self) -> Experiment:
        """Each names two arms, and no two the same ones."""
        if self.contrasts is not None and not self.contrasts:
            raise ValueError("contrasts: at least one is needed; leave the key out to compare every two arms")
        seen: set[frozenset[str]] = set()
        for a, b in self.contrasts or ():
            for name in (a, b):
                if name not in self.arms:
                    raise ValueError(f"contrasts: no arm '{name}'{nearest(name, self.arms)}")
            if a == b or frozenset((a, b)) in seen:
                raise ValueError(f"contrasts: {a} against {b} " + ("is no comparison" if a == b else "stands twice"))
            seen.add(frozenset((a, b)))
        return self

    def _streams(self) -> None:
        """A stream of this run names another arm with rounds enough, and no two arms wait for each other."""
        for name in self.arms:
            for other in self.streamed(name):
                if other not in self.arms:
                    raise ValueError(f"arms.{name}.source.stream: no arm '{other}'{nearest(other, self.arms)}")
                has, wanted = self.arm(other).rounds, self.arm(name).rounds
                if has < wanted:
                    raise ValueError(f"arms.{name}.source.stream: arm '{other}' has {has} rounds, '{name}' {wanted}")
            self._check_waits([name])

    def _check_waits(self, waiting: list[str]) -> None:
        for other in self.streamed(waiting[-1]):
            if other in waiting:
                raise ValueError(f"arms.{waiting[0]}.source.stream: {' waits for '.join([*waiting, other])}")
            if other in self.arms:
                self._check_waits([*waiting, other])

    @property
    def with_dropout(self) -> list[str]:
        """The arms that train with dropout (`dpo.faults.dropout`)."""
        return [name for name in self.arms if self.arm(name).dpo.faults.dropout]

    def streamed(self, name: str) -> list[str]:
        """The arms of this run whose pairs or answers arm `name` trains on."""
        parts = [part for part in parts_of(self.arm(name).source) if isinstance(part, SourceSpec)]
        return [part.stream for part in parts if part.stream is not None and ":" not in part.stream]

    def run_order(self) -> list[str]:
        """The arms in their order, but one whose pairs another one streams before that one."""
        order: list[str] = []

        def add(name: str) -> None:
            for other in self.streamed(name):
                add(other)
            if name not in order:
                order.append(name)

        for name in self.arms:
            add(name)
        return order

    def arm(self, name: str) -> ArmSettings:
        """The settings of arm `name`: this experiment's, with the arm's keys changed (mappings merge)."""
        if name not in self.arms:
            raise ConfigError(f"no arm '{name}'{nearest(name, self.arms)}; arms: {', '.join(self.arms)}")
        change = self.arms[name] or {}
        for key in change:
            if key in Experiment.model_fields and key not in ArmSettings.model_fields:
                may = ", ".join(ArmSettings.model_fields)
                raise ConfigError(f"arms.{name}.{key}: '{key}' is one for all arms; an arm may change {may}")
        base = self.model_dump(include=set(ArmSettings.model_fields))
        for key in ("reference", "source"):
            if key in change:
                # One rule replaces another: they do not merge.
                del base[key]
        try:
            return ArmSettings.model_validate(merge(base, change))
        except ValidationError as error:
            raise ConfigError(describe(error, ArmSettings, prefix=f"arms.{name}.")) from error

    def evaluation_judge(self, name: str) -> JudgeSpec:
        """The judge that measures arm `name` on the held-out prompts."""
        return self.evaluation.judge or self.arm(name).judge


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` on top; nested mappings merge, all else replaces.

    A judge, and a loss of one's own, is replaced whole when its `use` is named: the other keys are its own.
    """
    result = copy.deepcopy(base)
    for key, value in change.items():
        whole = key in ("judge", "loss") and isinstance(value, dict) and "use" in value
        if isinstance(value, dict) and isinstance(result.get(key), dict) and not whole:
            result[key] = merge(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; an empty mapping stays a value."""
    if isinstance(data, dict) and data:
        return {k: v for key, value in data.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): data}


def apply_override(data: dict[str, Any], assignment: str) -> None:
    """Apply one `--set key.sub=value` to `data` in place; the value is read as YAML."""
    key, sign, text = assignment.partition("=")
    if not sign or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {assignment:.80}: write key=value, for example --set dpo.beta=0.2")
    value = parse_yaml(text, f"--set {key}: {text!r:.80}")
    *parents, last = key.strip().split(".")
    here = data
    for parent in parents:
        child = here.get(parent)
        if child is None:
            child = here[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: '{parent}' holds a value, not a mapping")
        here = child
    here[last] = value


def validate_experiment(data: dict[str, Any], where: str) -> Experiment:
    """`data` as an `Experiment`; `ConfigError` names the file, the key and the nearest right one."""
    refuse_literal_keys(data, where)
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error, Experiment)}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def refuse_literal_keys(data: Any, where: str) -> None:
    """Raise `ConfigError`, without saying it, where a key to a service stands in `data` in plain text."""
    place = literal_key(data)
    if place is not None:
        raise ConfigError(
            f"{where}: {place} looks like a key in plain text. Experiments are copied into run folders and reports: "
            "put it into an environment variable and name that one (judges that ask a language model: api_key_env)"
        )


def load_experiment(path: Path, overrides: list[str] | None = None, seeds: list[int] | None = None) -> Experiment:
    """Read `path`, apply `--set` overrides and `--seed`, validate."""
    data = read_yaml(path)
    for assignment in overrides or []:
        apply_override(data, assignment)
    if seeds:
        data["seeds"] = list(seeds)
    return validate_experiment(data, str(path))
