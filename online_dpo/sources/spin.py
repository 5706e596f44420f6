"""SPIN (Chen et al. 2024, self-play fine-tuning): the dataset's answer is chosen, the policy's own sample rejected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.files import digest_json
from online_dpo.pair_stage import pair_round
from online_dpo.records import read_candidates, read_verdicts, write_candidates
from online_dpo.rounds import Pinned
from online_dpo.sample_stage import generate, prompts_digest
from online_dpo.seeds import derive_seed
from online_dpo.sources.dataset import given_files, row_of_prompts, take_labels, write_own_prompts
from online_dpo.sources.datasets import rows_of
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder, StageRecord


def gather_spin(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """Candidate 0 of a prompt is the dataset's answer, with score 1; 1 to n are the policy's samples, with score 0.

    No judge is asked. Of equal scores pairing takes the first: one pair a prompt, with sample 1; the rule `all_pairs`
    pairs the answer with every sample.
    """
    sample = _sample_against(arm, folder, pinned)
    candidates = read_candidates(folder.path / "candidates.parquet")
    judge = take_labels(folder, candidates, sample, "spin")
    verdicts = read_verdicts(folder.path / "verdicts.parquet")
    pair = pair_round(arm, folder, pinned, candidates, verdicts, (sample, judge))
    return RoundData(tuple(candidates), tuple(verdicts), sample, judge, None, pair, sampled_by=None)


def _sample_against(arm: Arm, folder: RoundFolder, pinned: Pinned) -> StageRecord:
    """The stage 'sample': `sampling.n` samples for every prompt that has an answer, behind that answer."""
    sampling = arm.settings.sampling

    def produce(out: Path) -> dict[str, Any]:
        rows = row_of_prompts(arm, folder.index, pinned.prompts)
        prompts = [prompt for prompt in pinned.prompts if prompt.id in rows]
        arm.run.rest_learner()
        probe_gap = arm.run.engine.load(pinned.source)
        seeds = [
            tuple(derive_seed(arm.seed, "sample", folder.index, prompt.id, i) for i in range(sampling.n))
            for prompt in prompts
        ]
        sampled, figures = generate(arm, f"round {folder.index} sample", prompts, seeds, sampling)
        given = [row.candidates(prompt_id)[0] for prompt_id, row in rows.items()]
        # The answer stands before its prompt's samples; a sort keeps their order.
        place = {prompt.id: number for number, prompt in enumerate(prompts)}
        moved = [replace(candidate, index=candidate.index + 1) for candidate in sampled]
        candidates = sorted([*given, *moved], key=lambda candidate: place[candidate.prompt_id])
        write_candidates(out / "candidates.parquet", candidates)
        write_own_prompts(arm, out, pinned.prompts)
        missing = len(pinned.prompts) - len(prompts)
        counts = {"candidates": len(candidates), "given": len(given), "without_row": missing}
        return {**figures, **counts, "probe_gap": probe_gap}

    inputs = {
        "dataset": rows_of(arm).digest,
        "source": pinned.source.digest,
        "prompts": prompts_digest(pinned.prompts),
        "sampling": digest_json(sampling.model_dump()),
        "seed": f"{arm.seed}/{folder.index}",
        "engine": arm.run.engine.kind,
    }
    return folder.stage("sample", inputs, given_files(arm), produce)
