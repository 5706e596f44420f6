"""Pairs that others made: a fixed preference dataset, its own labels or the arm's judge's (offline)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from online_dpo.answer_blocks import AT_ONCE, count_candidates
from online_dpo.arms import Arm
from online_dpo.dataset_rows import Row
from online_dpo.judge_stage import audit_round, judge_round
from online_dpo.pair_stage import pair_round
from online_dpo.records import CANDIDATES, VERDICTS, candidate_table, verdict_table, write_prompts
from online_dpo.rounds import Pinned
from online_dpo.sample_stage import prompts_digest
from online_dpo.seeds import derive_seed
from online_dpo.sources.datasets import match_of, rows_of, source_of
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.tables import TableWriter, batched, each_row
from online_dpo.types import Prompt, Verdict


def gather_dataset(arm: Arm, folder: RoundFolder, pinned: Pinned) -> RoundData:
    """The rows of the round's prompts; judged anew where the source says `relabel`."""
    sample = _take_rows(arm, folder, pinned)
    audit = None
    if source_of(arm).relabel:
        judge = judge_round(arm, folder, pinned, sample)
        audit = audit_round(arm, folder, pinned, sample)
    else:
        judge = take_labels(folder, sample, "dataset")
    pair = pair_round(arm, folder, pinned, (sample, judge))
    return RoundData(sample, judge, audit, pair, sampled_by=None)


def _take_rows(arm: Arm, folder: RoundFolder, pinned: Pinned) -> StageRecord:
    """The stage 'sample' of a round that samples nothing."""
    rows, source = rows_of(arm), source_of(arm)

    def produce(out: Path) -> dict[str, Any]:
        chosen = row_of_prompts(arm, folder.index, pinned.prompts)
        with TableWriter(out / "candidates.parquet", CANDIDATES) as file:
            for part in batched(chosen.items(), AT_ONCE):
                file.add(candidate_table([answer for name, row in part for answer in row.candidates(name)]))
        write_own_prompts(arm, out, pinned.prompts)
        given, missing = count_candidates(out), len(pinned.prompts) - len(chosen)
        return {"candidates": given, "tokens": 0, "given": given, "without_row": missing}

    inputs = {
        "dataset": rows.digest,
        "match": match_of(rows, source, arm.run.train_prompts),
        "prompts": prompts_digest(pinned.prompts),
        "seed": f"{arm.seed}/{folder.index}",
    }
    return folder.stage("sample", inputs, given_files(arm), produce)


def given_files(arm: Arm) -> list[str]:
    """What the stage 'sample' writes: beside answers the prompts, where they are the dataset's own."""
    own = match_of(rows_of(arm), source_of(arm), arm.run.train_prompts) == "rows"
    return ["candidates.parquet", "prompts.parquet"] if own else ["candidates.parquet"]


def write_own_prompts(arm: Arm, out: Path, prompts: Sequence[Prompt]) -> None:
    """Write `prompts` into `out` where they are the dataset's own."""
    if "prompts.parquet" in given_files(arm):
        write_prompts(out / "prompts.parquet", {"train": prompts})


def row_of_prompts(arm: Arm, index: int, prompts: Sequence[Prompt]) -> dict[str, Row]:
    """The row of each prompt that has one, by the prompt's id. Where a prompt has several, the seed draws."""
    rows = rows_of(arm)
    if match_of(rows, source_of(arm), arm.run.train_prompts) == "rows":
        known = {row.prompt.id: row for row in rows.rows}
        return {prompt.id: known[prompt.id] for prompt in prompts}
    found = {}
    for prompt in prompts:
        own = rows.of_prompt.get(prompt.id, ())
        if own:
            found[prompt.id] = own[derive_seed(arm.seed, "dataset", index, prompt.id) % len(own)]
    return found


def take_labels(folder: RoundFolder, sample: StageRecord, label: str) -> StageRecord:
    """The stage 'judge' where no judge is asked: candidate 0 of each prompt has score 1, the others 0.

    `label` says in every verdict's details whose labels these are.
    """

    def produce(out: Path) -> dict[str, Any]:
        labels = 0
        with TableWriter(out / "verdicts.parquet", VERDICTS) as file:
            for part in batched(
                each_row(folder.path / "candidates.parquet", CANDIDATES, ("prompt_id", "index")), AT_ONCE
            ):
                given = [(row["prompt_id"], row["index"], 1.0 if row["index"] == 0 else 0.0) for row in part]
                file.add(verdict_table([Verdict(*one, {"label": label}) for one in given]))
                labels += len(given)
        # Nobody was asked: the budget counts judgements.
        return {"verdicts": 0, "abstained": 0, "reasons": {}, "details": {}, "ledger": {}, "labels": labels}

    inputs = {"candidates": sample.outputs["candidates.parquet"], "labels": label}
    return folder.stage("judge", inputs, ["verdicts.parquet"], produce)
