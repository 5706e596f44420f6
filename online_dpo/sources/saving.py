"""The round's stages where nothing was sampled, judged or paired for it: files taken over, or put together from others.

The stages keep their names, so that a round looks the same whatever its source. Their inputs begin with what decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from online_dpo.errors import RunFolderError
from online_dpo.files import digest_json, link_tree
from online_dpo.judging import mean_details
from online_dpo.records import mean_margin, write_candidates, write_pairs, write_prompts, write_verdicts
from online_dpo.sources.batch import Batch
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Prompt

FILES = {"sample": ["candidates.parquet"], "judge": ["verdicts.parquet"], "pair": ["pairs.parquet"]}
"""What the stages that a source stands for write."""

Records = tuple[StageRecord, StageRecord, StageRecord]
"""sample, judge, pair."""


def record_of(folder: RoundFolder, stage: str) -> StageRecord:
    """The record of a finished stage, its files held against it once in a process."""
    folder.trust(stage)
    record = folder.done(stage)
    if record is None:
        raise RunFolderError(f"{folder.path}: stage '{stage}' has no record in stages/{stage}.json")
    return record


@dataclass(frozen=True)
class Given:
    """What was made elsewhere and is given to a round. `decided`: what it follows from, as inputs of the stages;
    `place`: where it comes from, for the figures.

    `origin`: the round folder whose files are this round's as they are; None where there is none, and `make` makes the
    batch. It is called only where a stage is still to be done.
    """

    decided: Mapping[str, str]
    place: str
    make: Callable[[], Batch]
    origin: RoundFolder | None = None
    figures: Callable[[], Mapping[str, Any]] = dict
    """Figures of the pairs beside those that all have."""
    own_prompts: tuple[Prompt, ...] = ()
    """Prompts that are not the run's: written beside the answers, so that the round can be read by itself."""


def give_answers(folder: RoundFolder, given: Given) -> StageRecord:
    """The stage `sample` of `folder`."""
    outputs = [*FILES["sample"], *(["prompts.parquet"] if given.own_prompts else [])]

    def produce(out: Path) -> dict[str, Any]:
        if given.own_prompts:
            write_prompts(out / "prompts.parquet", {"train": given.own_prompts})
        if given.origin is not None:
            link_tree(given.origin.path / "candidates.parquet", out / "candidates.parquet")
            return _sampled(record_of(given.origin, "sample").info.get("candidates"), given.place)
        candidates = given.make().candidates
        write_candidates(out / "candidates.parquet", candidates)
        return _sampled(len(candidates), given.place)

    return folder.stage("sample", given.decided, outputs, produce)


def give_batch(folder: RoundFolder, given: Given) -> Records:
    """The stages `sample`, `judge` and `pair` of `folder`."""
    given = replace(given, make=cache(given.make))
    sample = give_answers(folder, given)
    answered = {**given.decided, "candidates": sample.outputs["candidates.parquet"]}
    judge = _give_verdicts(folder, given, answered)
    judged = {**answered, "verdicts": judge.outputs["verdicts.parquet"]}
    return sample, judge, _give_pairs(folder, given, judged)


def _give_verdicts(folder: RoundFolder, given: Given, decided: Mapping[str, str]) -> StageRecord:
    if given.origin is not None:
        info = record_of(given.origin, "judge").info
        count = info.get("labels", info["verdicts"] + info["abstained"])
        return take_over(folder, "judge", decided, given.origin, _judged(count, info["details"], given.place))

    def produce(out: Path) -> dict[str, Any]:
        verdicts = given.make().verdicts
        write_verdicts(out / "verdicts.parquet", verdicts)
        return _judged(len(verdicts), mean_details(verdicts), given.place)

    return folder.stage("judge", decided, FILES["judge"], produce)


def _give_pairs(folder: RoundFolder, given: Given, decided: Mapping[str, str]) -> StageRecord:
    if given.origin is not None:
        return take_over(folder, "pair", decided, given.origin, record_of(given.origin, "pair").info)

    def produce(out: Path) -> dict[str, Any]:
        pairs = given.make().pairs
        write_pairs(out / "pairs.parquet", pairs)
        return {"kept": len(pairs), "dropped": {}, "margin": mean_margin(out / "pairs.parquet"), **given.figures()}

    return folder.stage("pair", decided, FILES["pair"], produce)


def take_over(
    folder: RoundFolder, stage: str, decided: Mapping[str, str], origin: RoundFolder, info: Mapping[str, Any]
) -> StageRecord:
    """Stage `stage` of `folder` with the files that `origin` has of it, hard-linked (copied where that cannot be)."""
    outputs = list(record_of(origin, stage).outputs)

    def produce(out: Path) -> Mapping[str, Any]:
        for output in outputs:
            link_tree(origin.path / output, out / output)
        return info

    return folder.stage(stage, decided, outputs, produce)


def with_parts(whole: StageRecord, parts: Sequence[StageRecord], info: Mapping[str, Any]) -> StageRecord:
    """`whole` as the round tells of it: with the parts' time, with `info` on top, reused where all that it is made of
    was. The record on disk stays as it is."""
    reused = parts[0].reused_from if parts and all(part.reused_from for part in parts) else None
    seconds = round(whole.seconds + sum(part.seconds for part in parts), 3)
    return replace(whole, seconds=seconds, reused_from=whole.reused_from or reused, info={**whole.info, **info})


def audit_of(folder: RoundFolder, parts: Sequence[tuple[RoundFolder, StageRecord | None]]) -> StageRecord | None:
    """The first audit of the parts of a round as the round's own; None where no part has one."""
    for part, audit in parts:
        if audit is not None:
            decided = {"part": part.path.name, "audit": digest_json(audit.outputs)}
            return with_parts(take_over(folder, "audit", decided, part, audit.info), [audit], audit.info)
    return None


def _sampled(candidates: int | None, place: str) -> dict[str, Any]:
    """The figures of answers that were sampled elsewhere: they cost nothing here."""
    return {"candidates": candidates, "tokens": 0, "from": place}


def _judged(verdicts: int, details: Mapping[str, float], place: str) -> dict[str, Any]:
    """The figures of verdicts that were given elsewhere: nobody was asked, and the budget counts judgements."""
    none = {"verdicts": 0, "abstained": 0, "reasons": {}, "ledger": {}}
    return {**none, "details": details, "labels": verdicts, "from": place}
