"""Figure `sampling`: tokens a second through the engine's actor, against bare vLLM on the same requests."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Report
from live import live, prompts_of
from texts import single_turn_questions
from turns import Contender, cores

from online_dpo.backends.vllm_engine import vllm_environment
from online_dpo.config import EngineSpec, SamplingSpec
from online_dpo.models import resolve_model
from online_dpo.protocols import Engine, SampleRequest
from online_dpo.types import Prompt

CANDIDATES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this figure; the questions and tokens are those of `round` too."""
    parser.add_argument("--questions", type=int, default=64, help="prompts that are sampled")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--requests", type=int, default=24, help="sampling: of the questions, four answers each")


def run(options: argparse.Namespace, report: Report) -> None:
    """Both sides in turn; the seeds differ from run to run, and are the same on both sides."""
    folder = resolve_model(options.model).path
    prompts = prompts_of(single_turn_questions(options.requests), folder)
    length = -(-(max(len(prompt.token_ids) for prompt in prompts) + options.new_tokens + 1) // 32) * 32
    sampling = SamplingSpec(n=CANDIDATES, max_tokens=options.new_tokens)
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as place, live(options.model, length) as found:
        file = Path(place) / "prompts.json"
        file.write_text(json.dumps([prompt.token_ids for prompt in prompts]), encoding="utf-8")
        settings: dict[str, Any] = {"model": str(folder), "prompts": str(file), "length": length}
        settings |= {"sampling": sampling.model_dump()}
        with Contender("vllm", "vllm_sample.py", settings, vllm_environment(EngineSpec(), cores())) as bare:
            bare.turn()  # starts
            for number in range(options.runs + 1):
                ours.append(sample(found.backends.engine, prompts, sampling, number))
                said = bare.turn()
                theirs.append(said["tokens"] / said["seconds"])
    label = f"sampling {len(prompts)} × {CANDIDATES} answers of {options.new_tokens} tokens, against bare vLLM"
    # The first run of each side warms up.
    report.add(label, ours[1:], theirs[1:], "tokens/s", "more")


def sample(engine: Engine, prompts: list[Prompt], sampling: SamplingSpec, run_number: int) -> float:
    """Tokens a second through the engine's actor."""
    requests = [SampleRequest(prompt, seeds_of(run_number, place)) for place, prompt in enumerate(prompts)]
    began = time.perf_counter()
    tokens = sum(len(candidate.token_ids) for group in engine.sample(requests, sampling) for candidate in group)
    return tokens / (time.perf_counter() - began)


def seeds_of(run_number: int, place: int) -> tuple[int, ...]:
    """The seeds of the prompt at `place`: others in each run."""
    return tuple(1000 * run_number + CANDIDATES * place + index for index in range(CANDIDATES))
