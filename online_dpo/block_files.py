"""A round's own files where it was made in blocks: all answers, verdicts and pairs together, and their figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.files import digest_json
from online_dpo.judging import abstain_reasons, mean_details
from online_dpo.pairing import DROP_REASONS
from online_dpo.records import read_candidates, read_pairs, read_verdicts, write_candidates, write_pairs, write_verdicts
from online_dpo.rounds import Pinned
from online_dpo.sources.saving import mean_margin, with_parts
from online_dpo.store import RoundFolder, StageRecord


@dataclass(frozen=True, slots=True)
class DoneBlock:
    """A block that is done: its folder and its stages' records. `train` is None where it had no pairs."""

    folder: RoundFolder
    sample: StageRecord
    judge: StageRecord
    pair: StageRecord
    train: StageRecord | None


def sample_whole(folder: RoundFolder, blocks: Sequence[DoneBlock]) -> StageRecord:
    """The round's stage 'sample'."""
    records = [block.sample for block in blocks]

    def produce(out: Path) -> dict[str, Any]:
        found = [read_candidates(block.folder.path / "candidates.parquet") for block in blocks]
        write_candidates(out / "candidates.parquet", [candidate for own in found for candidate in own])
        return _sampled([record.info for record in records])

    record = folder.stage("sample", _made_of(records), ["candidates.parquet"], produce)
    return with_parts(record, records, {})


def judge_whole(folder: RoundFolder, blocks: Sequence[DoneBlock], sample: StageRecord) -> StageRecord:
    """The round's stage 'judge'."""
    records = [block.judge for block in blocks]

    def produce(out: Path) -> dict[str, Any]:
        found = [read_verdicts(block.folder.path / "verdicts.parquet") for block in blocks]
        verdicts = [verdict for own in found for verdict in own]
        write_verdicts(out / "verdicts.parquet", verdicts)
        return {
            **records[-1].info,
            "verdicts": _sum(records, "verdicts"),
            "abstained": _sum(records, "abstained"),
            "reasons": abstain_reasons(verdicts),
            "details": mean_details(verdicts),
            "ledger": _added([record.info["ledger"] for record in records]),
        }

    inputs = {"candidates": sample.outputs["candidates.parquet"], **_made_of(records)}
    return with_parts(folder.stage("judge", inputs, ["verdicts.parquet"], produce), records, {})


def pair_whole(
    folder: RoundFolder, pinned: Pinned, blocks: Sequence[DoneBlock], before: tuple[StageRecord, StageRecord]
) -> StageRecord:
    """The round's stage 'pair', behind its stages sample and judge."""
    records = [block.pair for block in blocks]
    sample, judge = before

    def produce(out: Path) -> dict[str, Any]:
        prompts = {prompt.id: prompt for prompt in pinned.prompts}
        candidates = read_candidates(folder.path / "candidates.parquet")
        found = [read_pairs(block.folder.path / "pairs.parquet", prompts, candidates) for block in blocks]
        pairs = [pair for own in found for pair in own]
        write_pairs(out / "pairs.parquet", pairs)
        dropped = _added([record.info["dropped"] for record in records])
        named = {reason: dropped[reason] for reason in DROP_REASONS if reason in dropped}
        return {**records[-1].info, "kept": len(pairs), "dropped": named, "margin": mean_margin(pairs)}

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        "verdicts": judge.outputs["verdicts.parquet"],
        **_made_of(records),
    }
    return with_parts(folder.stage("pair", inputs, ["pairs.parquet"], produce), records, {})


def _made_of(records: Sequence[StageRecord]) -> dict[str, str]:
    return {"blocks": digest_json([record.outputs for record in records])}


def _sampled(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens, seconds = (sum(info[key] for info in infos) for key in ("tokens", "seconds"))
    return {
        **infos[-1],
        "candidates": sum(info["candidates"] for info in infos),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "probe_gap": max(info["probe_gap"] for info in infos),
    }


def _sum(records: Sequence[StageRecord], key: str) -> int:
    return sum(int(record.info[key]) for record in records)


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
