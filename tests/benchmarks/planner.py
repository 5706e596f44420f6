"""Figure `planner`: what `check --predict` says of an experiment beside what then happens, stage by stage.

Each run rehearses in a process of its own, as `check` does, then really runs the same experiment through the command
line with another seed. `predicted` and `happened` are seconds of a round's stage: the median over runs, and over rounds
from the second on. `start` is all else: programs that are loaded, processes that start and end, and what the first
round takes more. Seconds of single runs are printed too: on a machine that does something else besides they say how far
apart two equal runs are. Peak memory is the largest that engine, learner and driver reached.

`--planner-like RUN` runs nothing: the first seed of a finished run predicts each stage of the others, as `check --like`
would.

stories260k (transformers engine) where `../shared/data` has it, and `--model` (vLLM where it is installed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from figures import Report
from texts import SHARED, single_turn_questions
from turns import ROOT

from online_dpo.backends.factory import choose_engine
from online_dpo.config import load_experiment
from online_dpo.display.progress import QuietProgress
from online_dpo.planner.measured import fit_all
from online_dpo.planner.observed import observe
from online_dpo.planner.predicting import by_rehearsal
from online_dpo.planner.processes import age, peaks
from online_dpo.planner.work import INITIAL, STAGES
from online_dpo.runs import resolve
from online_dpo.store import RunStore

WORTH_SECONDS = 0.2
"""A stage that takes less, both ways, has no ratio: it is clock and file system."""
LOOK_S = 0.5
"""Between two looks at the processes' memory."""


@dataclass
class Beside:
    """By stage, or process: what was predicted and what happened, one value a run."""

    predicted: dict[str, list[float]] = field(default_factory=dict)
    happened: dict[str, list[float]] = field(default_factory=dict)

    def add(self, predicted: dict[str, float], happened: dict[str, float]) -> None:
        """One run's."""
        for said, values in ((self.predicted, predicted), (self.happened, happened)):
            for name, value in values.items():
                said.setdefault(name, []).append(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this figure beside `--model` and `--runs`."""
    parser.add_argument("--planner-rounds", type=int, default=4, help="rounds of the experiment that is predicted")
    parser.add_argument("--planner-prompts", type=int, default=32, help="prompts a round, with --model")
    parser.add_argument("--planner-like", type=Path, metavar="RUN", help="a finished run of several seeds")
    parser.add_argument("--planner-only", choices=("stories260k", "model"), help="one of the two models")


def run(options: argparse.Namespace, report: Report) -> None:
    """Each model's experiment in turn. Prints its own lines: a ratio here is not how many times better ours is."""
    if options.planner_like is not None:
        across_seeds(options.planner_like)
        return
    stories = SHARED / "models" / "stories260k"
    with tempfile.TemporaryDirectory() as place:
        if options.planner_only != "model" and stories.is_dir():
            engine: dict[str, Any] = {"kind": "transformers", "batch_size": 128}
            file = write_experiment(Path(place), "stories260k", str(stories), 64, options.planner_rounds, engine)
            say("stories260k", *measure(file, options.runs))
        if options.planner_only != "stories260k":
            prompts = options.planner_prompts
            file = write_experiment(Path(place), "model", options.model, prompts, options.planner_rounds, {})
            say(Path(options.model).name, *measure(file, options.runs))


def across_seeds(run: Path) -> None:
    """How near the lines of the first seed's stages are to those of the others: one JSON line a stage."""
    store = RunStore.open(run)
    first, *others = store.experiment.seeds
    lines = fit_all(observe(store, seeds=[first]).points)
    for stage, points in observe(store, seeds=others).points.items():
        known = [(lines[stage].at(units), seconds) for units, seconds in points if units and stage in lines]
        ratios = [seconds / said for said, seconds in known if said > 0]
        if ratios:
            figure = {
                "figure": f"planner: {store.experiment.name}, {stage}, the other seeds by the first",
                "happened/predicted": float(f"{statistics.median(ratios):.3g}"),
                "of the sum": float(f"{sum(y for _, y in known) / sum(x for x, _ in known):.3g}"),
                "median seconds": float(f"{statistics.median(y for _, y in known):.3g}"),
                "stages": len(ratios),
            }
            print(json.dumps(figure), flush=True)


def write_experiment(place: Path, name: str, model: str, prompts: int, rounds: int, engine: dict[str, Any]) -> Path:
    """The experiment's YAML: all weights are trained, all stages are there."""
    questions = single_turn_questions(rounds * prompts + 64)
    rows = [json.dumps({"prompt": question}) for question in questions]
    (place / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    experiment = {
        "name": name,
        "model": model,
        "prompts": {"path": f"{name}.jsonl", "per_round": prompts, "held_out": prompts, "max_tokens": 200},
        "sampling": {"n": 4, "max_tokens": 48},
        "judge": {"use": "judges.length:LengthJudge", "unit": "characters"},
        "dpo": {"lr": 1e-6, "batch_size": 4, "warmup": 0.0},
        "rounds": rounds,
        "keep": "last",
        "engine": engine,
        "output": str(place / "runs"),
    }
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return file


def measure(file: Path, runs: int) -> tuple[Beside, Beside]:
    """Predict, run, and again: seconds by stage, bytes by process."""
    seconds, memory = Beside(), Beside()
    for seed in range(runs):
        predicted, needs = predict(file)
        happened, peak = really(file, seed)
        seconds.add(predicted, happened)
        memory.add(needs, peak)
        each = ", ".join(
            f"{stage} {predicted[stage]:.3g} / {happened[stage]:.3g}" for stage in happened if stage in predicted
        )
        print(f"# planner: {file.stem}, run {seed + 1}, predicted / happened: {each}", flush=True)
    return seconds, memory


def predict(file: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by stage and bytes by process that a rehearsal gives, in a process that does nothing else."""
    command = [sys.executable, str(Path(__file__).resolve()), str(file)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the rehearsal ended with {done.returncode}: {done.stderr[-2000:].decode()}")
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory


def rehearsed(file: Path) -> tuple[dict[str, float], dict[str, float]]:
    """What `check --predict` does, as figures."""
    spec = load_experiment(file)
    resolved = resolve(spec, file.parent)
    engine, _ = choose_engine(spec, resolved.model.path)
    found = by_rehearsal(resolved, engine, QuietProgress(), age())
    (arm,) = found.arms
    stages = {stage: value for stage, value in arm.stages.items() if value is not None}
    whole = {"start": found.start_s, "all": found.seconds}
    return stages | whole, {need.process: need.bytes for need in found.needs}


def really(file: Path, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """The same of a run in processes of its own."""
    command = [sys.executable, "-m", "online_dpo.cli", "run", str(file), "--quiet", "--seed", str(seed)]
    command += ["--set", f"name=seed-{seed}"]
    began = time.perf_counter()
    peak: dict[str, float] = {}
    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for name, size in peaks(process.pid).items():
                peak[name] = max(peak.get(name, 0.0), float(size))
            time.sleep(LOOK_S)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"online-dpo ended with {process.returncode}: {said.read()[-2000:].decode()}")
    took = time.perf_counter() - began
    rounds = sorted((file.parent / "runs" / f"seed-{seed}" / "arms" / "on_policy" / f"seed_{seed}").glob("round_*"))
    rows = [json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["seconds"] for folder in rounds]
    stages = {
        stage: statistics.median(row[stage] for row in rows[min(2, len(rows) - 1) :] if stage in row)
        for stage in STAGES
    }
    worked = rows[0]["evaluate"] + (len(rows) - 1) * sum(stages.values())
    return {INITIAL: rows[0]["evaluate"], **stages, "start": took - worked, "all": took}, peak


def say(model: str, seconds: Beside, memory: Beside) -> None:
    """One JSON line a stage and a process: medians, and what happened over what was predicted."""
    for what, unit, found in (("", "s", seconds), ("peak of ", "MB", memory)):
        for name, happened in found.happened.items():
            if name not in found.predicted:
                continue
            scale = 1e6 if unit == "MB" else 1.0
            said, was = (statistics.median(values) / scale for values in (found.predicted[name], happened))
            small = unit == "s" and max(said, was) < WORTH_SECONDS
            figure = {
                "figure": f"planner: {model}, {what}{name}",
                "predicted": float(f"{said:.3g}"),
                "happened": float(f"{was:.3g}"),
                "happened/predicted": None if small or not said else float(f"{was / said:.3g}"),
                "unit": unit,
                "runs": len(happened),
            }
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    print(json.dumps(rehearsed(Path(sys.argv[1]))))
