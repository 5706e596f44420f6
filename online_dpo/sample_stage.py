"""The stage that samples a round's candidates, and the sampling that evaluation shares with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from online_dpo import judge_ahead
from online_dpo.arms import Arm
from online_dpo.config import SamplingSpec
from online_dpo.files import digest_json
from online_dpo.protocols import SampleRequest
from online_dpo.records import write_candidates
from online_dpo.rounds import Sampled
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Candidate, Prompt


def sample_round(arm: Arm, folder: RoundFolder, pinned: Sampled) -> StageRecord:
    sampling = arm.settings.sampling

    def produce(out: Path) -> dict[str, Any]:
        # Before the engine takes its memory back, where the two share a GPU.
        arm.run.rest_learner()
        probe_gap = arm.run.engine.load(pinned.source)
        seeds = [
            tuple(derive_seed(arm.seed, "sample", folder.index, prompt.id, i) for i in range(sampling.n))
            for prompt in pinned.prompts
        ]
        candidates, figures = _generate_judged(arm, folder, pinned.prompts, seeds)
        write_candidates(out / "candidates.parquet", candidates)
        return {**figures, "probe_gap": probe_gap}

    inputs = {
        "source": pinned.source.digest,
        "prompts": prompts_digest(pinned.prompts),
        "sampling": digest_json(sampling.model_dump()),
        "seed": f"{arm.seed}/{folder.index}",
        "engine": arm.run.engine.kind,
    }
    return folder.stage("sample", inputs, ["candidates.parquet"], produce)


def _generate_judged(
    arm: Arm, folder: RoundFolder, prompts: Sequence[Prompt], seeds: Sequence[tuple[int, ...]]
) -> tuple[list[Candidate], dict[str, Any]]:
    """As `generate`; the judge, where it can, judges what has come while the rest is sampled."""
    ahead = judge_ahead.begin(arm, folder, prompts)
    taken = None if ahead is None else ahead.add
    try:
        return generate(arm, f"{folder.title} sample", prompts, seeds, arm.settings.sampling, taken)
    except BaseException:
        judge_ahead.forget(arm, folder)
        raise


def generate(
    arm: Arm,
    label: str,
    prompts: Sequence[Prompt],
    seeds: Sequence[tuple[int, ...]],
    sampling: SamplingSpec,
    taken: Callable[[list[Candidate]], None] | None = None,
) -> tuple[list[Candidate], dict[str, Any]]:
    """Candidates in the prompts' order, and what the sampling took. `taken` gets each prompt's as they come."""
    progress = arm.run.progress
    requests = [SampleRequest(prompt, own) for prompt, own in zip(prompts, seeds, strict=True)]
    answers: dict[str, list[Candidate]] = {}
    began = time.perf_counter()
    tokens = 0
    progress.start(f"{arm.label} · {label}", sum(len(own) for own in seeds), "answers")
    for group in arm.run.engine.sample(requests, sampling):
        answers[group[0].prompt_id] = group
        if taken is not None:
            taken(group)
        tokens += sum(len(candidate.token_ids) for candidate in group)
        progress.advance(len(group), f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
    progress.finish()
    seconds = time.perf_counter() - began
    for line in arm.run.engine.notes():
        progress.say(f"{arm.label}: {line}")
    candidates = [candidate for prompt in prompts for candidate in answers[prompt.id]]
    return candidates, {
        "candidates": len(candidates),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """What tells the prompts of a round from others: their ids and tokens."""
    return digest_json([[prompt.id, list(prompt.token_ids)] for prompt in prompts])
