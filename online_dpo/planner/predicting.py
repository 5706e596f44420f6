"""The three ways to a prediction: on paper, by a finished run, by a rehearsal."""

from __future__ import annotations

import shutil
from pathlib import Path

from online_dpo.config import Experiment
from online_dpo.errors import ConfigError
from online_dpo.planner.disk import policy_bytes, text_bytes, trained_parameters
from online_dpo.planner.measured import MeasuredSpeeds, fit, fit_all
from online_dpo.planner.memory import LearnerMemory, decoding_bytes
from online_dpo.planner.observed import Observed, observe, passes_of
from online_dpo.planner.paper import Hardware, PaperSpeeds
from online_dpo.planner.prediction import Place, Prediction, ProcessNeed, predict_arms
from online_dpo.planner.rehearsal import Rehearsed, rehearse
from online_dpo.planner.shape import ModelShape, shape_of
from online_dpo.planner.work import Rates, round_work
from online_dpo.protocols import Progress
from online_dpo.runs import Resolved
from online_dpo.store import RunStore


def on_paper(experiment: Experiment, model: Path, there: Hardware) -> Prediction:
    """For GPUs that are not here: of the model its config.json is read alone. Prompts and answers are taken to be as
    long as they may be.

    Raises `ModelError` where config.json does not say the model's sizes.
    """
    shape = shape_of(model)
    speeds = PaperSpeeds(experiment, shape, there.gpu)
    rates = Rates(prompt=float(experiment.prompts.max_tokens))
    held_out = experiment.prompts.held_out
    beside = {name: text_bytes(round_work(experiment, name, held_out, rates)) for name in experiment.arms}
    engine = 2 * shape.parameters / experiment.engine.tensor_parallel_size
    wanted = speeds.gpus_wanted
    asked = f"engine.tensor_parallel_size {experiment.engine.tensor_parallel_size}, cluster.engines "
    asked += f"{experiment.cluster.engines}, learner.workers {experiment.learner.workers}"
    warnings = [f"GPUs: the experiment wants {wanted} ({asked}), there are {there.count}"] * (wanted > there.count)
    if not speeds.cache_bytes:
        warnings.append("memory: an engine's GPUs do not hold its weights; set engine.tensor_parallel_size higher")
    return Prediction(
        arms=predict_arms(experiment, held_out, rates, speeds, policy_bytes(experiment, shape), beside),
        seeds=len(experiment.seeds),
        needs=[
            ProcessNeed(
                "engine (bfloat16 weights, then its cache)",
                experiment.cluster.engines * experiment.engine.tensor_parallel_size,
                max(engine, there.gpu.memory * experiment.engine.gpu_memory_utilization),
            ),
            ProcessNeed("learner worker", experiment.learner.workers, speeds.learner.total),
        ],
        place=Place(there.gpu.memory, None, each=True),
        said=[
            f"on paper: {there.count} x {there.name}, {shape.parameters / 1e9:.2f} billion parameters; {asked}",
            *speeds.assumptions(),
            f"prompts of {experiment.prompts.max_tokens} tokens (prompts.max_tokens), answers as long as "
            "sampling.max_tokens lets them be, every pair that the rule can make",
        ],
        warnings=warnings,
    )


def like_run(resolved: Resolved, engine: str, run: Path) -> Prediction:
    """By what the stages of the run in folder `run` took, on whatever machine it ran.

    Raises `RunFolderError` where there is no such run, `ConfigError` where it has another model or no finished round.
    """
    store = RunStore.open(run)
    theirs = store.manifest["model"]
    if theirs["digest"] != resolved.model.digest:
        raise ConfigError(f"--like {run}: its model is {theirs['name']}, not {resolved.model.name}")
    found = observe(store)
    if not any(found.points.values()):
        raise ConfigError(f"--like {run}: no round of it is finished")
    said = [f"by what {run} took; a machine that is busier, or another one, takes another time"]
    if bool(store.experiment.lora) != bool(resolved.experiment.lora):
        what = "an adapter" if store.experiment.lora else "all weights"
        said.append(f"that run trained {what}, this one does not: its training takes another time")
    return measured(resolved, found, needs_by_formula(resolved, engine), said)


def by_rehearsal(resolved: Resolved, engine: str, progress: Progress, before_s: float) -> Prediction:
    """By a short real run here. `before_s`: seconds that this process has spent so far, which a run spends, too.
    Raises what a run raises."""
    experiment = resolved.experiment
    shape = shape_of(resolved.model.path)
    found = rehearse(resolved, engine, progress)
    arm = experiment.run_order()[0]
    said = [f"rehearsed here, with arm {arm} sampling from its current policy; another load takes another time"]
    if experiment.sft is not None:
        said.append("not counted: the stage sft")
    unit = round_work(experiment, arm, 1, found.observed.rates).unit_tokens
    # The rehearsal's steps were smaller where the experiment's are large.
    most = experiment.learner.tokens_per_pass or CPU_TOKENS_PER_PASS
    passes = [min(most, round(size * unit)) for size in (experiment.arm(arm).dpo.batch_size, found.batch)]
    real, rehearsed = (learner_memory(experiment, shape, max(1, tokens)).activations for tokens in passes)
    held = {name: float(peak) for name, peak in found.peaks.items()}
    if "learner" in held:
        held["learner"] += real - rehearsed
    counts = {"engine": experiment.cluster.engines, "learner": experiment.learner.workers}
    needs = [ProcessNeed(name, counts.get(name, 1), peak) for name, peak in held.items()]
    return measured(resolved, found.observed, needs, said, before_s + start_seconds(found))


def start_seconds(found: Rehearsed) -> float:
    """Of processes that start and end, and what the first round's stages took more than later ones of their size."""
    lines = fit_all(found.observed.points)
    more = [seconds - lines[stage].at(units) for stage, (units, seconds) in found.first.items() if stage in lines]
    return found.start_s + sum(max(0.0, seconds) for seconds in more)


def measured(
    resolved: Resolved, found: Observed, needs: list[ProcessNeed], said: list[str], start_s: float = 0.0
) -> Prediction:
    """By lines through what was observed."""
    experiment = resolved.experiment
    held_out, rates = len(resolved.prompts.held_out), found.rates
    speeds = MeasuredSpeeds(fit_all(found.points), passes_of(experiment))
    beside = {}
    for name in experiment.arms:
        work = round_work(experiment, name, held_out, rates)
        answers = work.sampled + work.held_out
        beside[name] = fit(found.round_bytes).at(answers) if found.round_bytes else text_bytes(work)
    policy = policy_bytes(experiment, shape_of(resolved.model.path))
    arms = predict_arms(experiment, held_out, rates, speeds, policy, beside)
    unknown = sorted({stage for arm in arms for stage, seconds in arm.stages.items() if seconds is None})
    mean = f"prompts of {rates.prompt:.0f} tokens; answers fill {rates.answer:.0%} of sampling.max_tokens, held-out "
    mean += f"ones {rates.held_out:.0%} of theirs; {rates.kept:.0%} of the pairs that can be are made"
    warnings = [f"seconds of {', '.join(unknown)} are not known: none were measured"] if unknown else []
    return Prediction(arms, len(experiment.seeds), needs, this_machine(resolved.root), [*said, mean], start_s, warnings)


def needs_by_formula(resolved: Resolved, engine: str) -> list[ProcessNeed]:
    """Engine and learner on a CPU, without what Python and torch take by themselves."""
    experiment = resolved.experiment
    shape = shape_of(resolved.model.path)
    longest = max(experiment.arm(name).sampling.max_tokens for name in experiment.arms)
    if engine == "transformers":
        prompt = max(len(prompt.token_ids) for prompt in (*resolved.prompts.train, *resolved.prompts.held_out))
        decoding = decoding_bytes(shape, experiment.engine.batch_size, prompt + longest, 4)
    else:
        decoding = 4 * shape.parameters + experiment.engine.kv_cache_gb * 2**30
    learner = learner_memory(experiment, shape).total
    return [
        ProcessNeed("engine, beside Python and torch", experiment.cluster.engines, decoding),
        ProcessNeed("learner, beside Python and torch", experiment.learner.workers, learner),
    ]


def learner_memory(experiment: Experiment, shape: ModelShape, tokens: int | None = None) -> LearnerMemory:
    """Of one worker on a CPU, in passes of so many tokens."""
    spec = experiment.learner
    return LearnerMemory(
        shape,
        trained_parameters(experiment, shape),
        shards=spec.workers if spec.parallel == "fsdp" else 1,
        tokens=tokens or spec.tokens_per_pass or CPU_TOKENS_PER_PASS,
        value_bytes=2 if spec.dtype == "bfloat16" else 4,
        checkpointing=spec.activation_checkpointing,
    )


CPU_TOKENS_PER_PASS = 1024
"""Default of `learner.tokens_per_pass` on a CPU."""


def this_machine(root: Path) -> Place:
    """Memory of this machine and room on the disk where the run folder `root` will be."""
    there = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    return Place(_memory(), float(shutil.disk_usage(there).free))


def _memory() -> float | None:
    """Bytes that are free for new processes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return float(found[0]) if found else None
