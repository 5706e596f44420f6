"""SPIN (Chen et al. 2024, self-play fine-tuning): the dataset's answer is chosen, the policy's own sample rejected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.dataset_rows import Row
from online_dpo.files import digest_json
from online_dpo.pair_stage import pair_round
from online_dpo.records import CANDIDATES, candidate_table
from online_dpo.rounds import Pinned
from online_dpo.sample_stage import Generation, prompts_digest, round_seeds
from online_dpo.sources.dataset import given_files, row_of_prompts, take_labels, write_own_prompts
from online_dpo.sources.datasets import rows_of
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.tables import TableWriter
from online_dpo.types import Candidate


def gather_spin(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """Candidate 0 of a prompt is the dataset's answer, with score 1; 1 to n are the policy's samples, with score 0.

    No judge is asked. Of equal scores pairing takes the first: one pair a prompt, with sample 1; the rule `all_pairs`
    pairs the answer with every sample.
    """
    sample = _sample_against(arm, folder, pinned)
    judge = take_labels(folder, sample, "spin")
    pair = pair_round(arm, folder, pinned, (sample, judge))
    return RoundData(sample, judge, None, pair, sampled_by=None)


def _sample_against(arm: Arm, folder: RoundFolder, pinned: Pinned) -> StageRecord:
    """The stage 'sample': `sampling.n` samples for every prompt that has an answer, behind that answer."""
    sampling = arm.settings.sampling

    def produce(out: Path) -> dict[str, Any]:
        rows = row_of_prompts(arm, folder.index, pinned.prompts)
        prompts = [prompt for prompt in pinned.prompts if prompt.id in rows]
        arm.run.rest_learner()
        probe_gap = arm.run.engine.load(pinned.source)
        asked = Generation(
            arm, f"round {folder.index} sample", prompts, round_seeds(arm, folder.index), arm.settings.sampling
        )
        given = 0
        with TableWriter(out / "candidates.parquet", CANDIDATES) as file:
            for sampled in asked.blocks():
                behind = [*_behind_answers(sampled, rows)]
                given += len(behind) - len(sampled)
                file.add(candidate_table(behind))
        write_own_prompts(arm, out, pinned.prompts)
        missing = len(pinned.prompts) - len(prompts)
        figures = asked.figures()
        counts = {"candidates": asked.candidates + given, "given": given, "without_row": missing}
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


def _behind_answers(sampled: Sequence[Candidate], rows: Mapping[str, Row]) -> Iterator[Candidate]:
    """Each prompt's samples, counted from 1, behind the answer of its row."""
    for candidate in sampled:
        if candidate.index == 0:
            yield rows[candidate.prompt_id].candidates(candidate.prompt_id)[0]
        yield replace(candidate, index=candidate.index + 1)
