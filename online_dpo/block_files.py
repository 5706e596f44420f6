"""A round's own files where it was made in blocks: all answers, verdicts and pairs together, and their figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from online_dpo.files import digest_json
from online_dpo.judging import abstain_reasons, mean_details
from online_dpo.pairing import DROP_REASONS
from online_dpo.records import CANDIDATES, PAIRS, VERDICTS, mean_margin, read_verdicts
from online_dpo.sources.saving import with_parts
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.tables import TableReader, TableWriter


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
        _join(blocks, out, "candidates.parquet", CANDIDATES)
        return _sampled([record.info for record in records])

    record = folder.stage("sample", _made_of(records), ["candidates.parquet"], produce)
    return with_parts(record, records, {})


def judge_whole(folder: RoundFolder, blocks: Sequence[DoneBlock], sample: StageRecord) -> StageRecord:
    """The round's stage 'judge'."""
    records = [block.judge for block in blocks]

    def produce(out: Path) -> dict[str, Any]:
        _join(blocks, out, "verdicts.parquet", VERDICTS)
        verdicts = read_verdicts(out / "verdicts.parquet")
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
    folder: RoundFolder, blocks: Sequence[DoneBlock], before: tuple[StageRecord, StageRecord]
) -> StageRecord:
    """The round's stage 'pair', behind its stages sample and judge."""
    records = [block.pair for block in blocks]
    sample, judge = before

    def produce(out: Path) -> dict[str, Any]:
        _join(blocks, out, "pairs.parquet", PAIRS)
        dropped = _added([record.info["dropped"] for record in records])
        named = {reason: dropped[reason] for reason in DROP_REASONS if reason in dropped}
        return {
            **records[-1].info,
            "kept": _sum(records, "kept"),
            "dropped": named,
            "margin": mean_margin(out / "pairs.parquet"),
        }

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        "verdicts": judge.outputs["verdicts.parquet"],
        **_made_of(records),
    }
    return with_parts(folder.stage("pair", inputs, ["pairs.parquet"], produce), records, {})


def _join(blocks: Sequence[DoneBlock], out: Path, name: str, schema: pa.Schema) -> None:
    """The file `name` of `out`: the rows of the blocks' own."""
    with TableWriter(out / name, schema) as file:
        for block in blocks:
            with TableReader(block.folder.path / name, schema) as own:
                for batch in own.batches():
                    file.add(pa.Table.from_batches([batch]))


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
