"""Figure `round`: one whole on-policy round, through the command line, against TRL's OnlineDPOTrainer.

Ours: `online-dpo run` of an experiment of one round, seed by seed, each in processes of its own: sample four answers a
prompt, judge them by length, pair the best with the worst, train in batches of 4 pairs, hand the weights over. A
round's seconds are those of all its stages in metrics.json, evaluation (one held-out prompt, and the hand-over)
included. What is left of the process's time is starting: Ray, the engine, the learner, the initial measurement.

Theirs: the same prompts, model, reward and batches of pairs, two answers a prompt as the trainer is made. A turn is a
few of its steps; a step samples, judges and trains one batch. Loading is left out on both sides.

The two do not sample as many answers for a pair (4 and 2), so end to end is said in two ways: for the same number of
generated tokens, and for a trained pair; then sampling and training by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from figures import Report
from race import asked_variants
from step import BATCH
from texts import single_turn_questions
from turns import ROOT, Contender, Said

from online_dpo.models import resolve_model

LR = 1e-6


@dataclass(frozen=True, slots=True)
class Round:
    """One round: what it made, its seconds by stage, and the seconds to start."""

    tokens: float
    pairs: float
    stages: dict[str, float]
    starting: float

    @property
    def seconds(self) -> float:
        """All stages."""
        return sum(self.stages.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this figure beside those of `sampling`."""
    parser.add_argument("--trl-steps", type=int, default=4, help="steps of TRL's trainer after each of our rounds")
    parser.add_argument("--trl-round-batch", type=int, default=BATCH, help="prompts in one step of TRL's trainer")


def run(options: argparse.Namespace, report: Report) -> None:
    """One of our rounds, a few steps of theirs, and again."""
    ours: list[Round] = []
    theirs: list[Said] = []
    questions = single_turn_questions(options.questions + 1)
    with tempfile.TemporaryDirectory() as place, trl(options, Path(place), questions) as contender:
        experiment = write_experiment(options, Path(place), questions)
        for seed in range(options.runs):
            ours.append(our_round(experiment, Path(place), seed))
            if contender is not None:
                # A turn's first step follows a pause of minutes: it is part of the warm-up the first time alone.
                steps = [contender.turn() for _ in range(options.trl_steps)]
                theirs += steps[1:] if seed == 0 and len(steps) > 1 else steps
    say(report, ours, theirs)


def write_experiment(options: argparse.Namespace, place: Path, questions: list[str]) -> Path:
    """The experiment's YAML; one of the questions is held out."""
    rows = [json.dumps({"prompt": question}) for question in questions]
    (place / "questions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    experiment = {
        "name": "benchmark",
        "model": options.model,
        "prompts": {"path": "questions.jsonl", "per_round": options.questions, "held_out": 1},
        "sampling": {"n": 4, "max_tokens": options.new_tokens},
        "judge": {"use": "judges.length:LengthJudge", "unit": "characters"},
        "dpo": {"lr": LR, "batch_size": BATCH, "warmup": 0.0},
        "audit": {"prompts": 0},
        "engine": "vllm",
        "output": str(place / "runs"),
    }
    file = place / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return file


def our_round(experiment: Path, place: Path, seed: int) -> Round:
    """Run the experiment with `seed` and read its round's figures."""
    command = [sys.executable, "-m", "online_dpo.cli", "run", str(experiment), "--quiet", "--seed", str(seed)]
    command += ["--set", f"name=seed-{seed}"]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"online-dpo ended with {done.returncode}: {done.stderr[-2000:]}")
    folder = place / "runs" / f"seed-{seed}" / "arms" / "on_policy" / f"seed_{seed}" / "round_01"
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    seconds = metrics["seconds"]
    return Round(metrics["sample"]["tokens"], metrics["pairs"]["kept"], seconds, took - sum(seconds.values()))


@contextlib.contextmanager
def trl(options: argparse.Namespace, place: Path, questions: list[str]) -> Iterator[Contender | None]:
    """TRL's trainer, loaded; None where it is not installed or not wanted."""
    if not asked_variants(options.trl):
        yield None
        return
    settings = {
        "model": str(resolve_model(options.model).path),
        "questions": questions[: options.questions],
        "new_tokens": options.new_tokens,
        "batch": options.trl_round_batch,
        "steps": options.runs * options.trl_steps,
        "lr": LR,
    }
    with Contender("trl-online", "trl_round.py", settings) as contender:
        began = time.perf_counter()
        contender.turn()
        print(f"# round: TRL's start takes {time.perf_counter() - began:.3g} s", flush=True)
        yield contender


def say(report: Report, ours: list[Round], theirs: list[Said]) -> None:
    """The ratios, and where our seconds went."""
    label = "on-policy round"
    tokens = statistics.median(round_.tokens for round_ in ours)
    a_token = [said["seconds"] / said["tokens"] for said in theirs]
    report.add(
        f"{label}: end to end, for {tokens:g} generated tokens",
        [round_.seconds / round_.tokens * tokens for round_ in ours],
        [tokens * value for value in a_token],
        "s",
        "less",
    )
    report.add(
        f"{label}: a trained pair",
        [round_.seconds / round_.pairs for round_ in ours],
        [said["seconds"] / said["pairs"] for said in theirs],
        "s",
        "less",
    )
    report.add(
        f"{label}: sampling alone",
        [round_.tokens / round_.stages["sample"] for round_ in ours],
        [said["tokens"] / said["sampling"] for said in theirs],
        "tokens/s",
        "more",
    )
    report.add(
        f"{label}: training alone, a pair",
        [round_.stages["train"] / round_.pairs for round_ in ours],
        [(said["seconds"] - said["sampling"]) / said["pairs"] for said in theirs],
        "s",
        "less",
    )
    stages = {stage: statistics.median(round_.stages[stage] for round_ in ours) for stage in ours[0].stages}
    starting = statistics.median(round_.starting for round_ in ours)
    parts = ", ".join(f"{name} {value:.3g} s" for name, value in stages.items())
    print(f"# {label}: ours: {parts}; start {starting:.3g} s")
    pairs = statistics.median(round_.pairs for round_ in ours)
    print(f"# {label}: ours: {tokens:g} tokens and {pairs:g} pairs a round", flush=True)
