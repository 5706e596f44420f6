"""The stage that turns a round's verdicts into pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.files import digest_json
from online_dpo.pairing import make_pairs
from online_dpo.records import write_pairs
from online_dpo.rounds import Sampled
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Abstain, Candidate, Verdict


def pair_round(
    arm: Arm,
    folder: RoundFolder,
    pinned: Sampled,
    candidates: Sequence[Candidate],
    verdicts: Sequence[Verdict | Abstain],
    before: tuple[StageRecord, StageRecord],
) -> StageRecord:
    pairing = arm.settings.pairing
    sample, judge = before
    seed = derive_seed(arm.seed, "pair", folder.index)

    def produce(out: Path) -> dict[str, Any]:
        prompts = {prompt.id: prompt for prompt in pinned.prompts}
        arm.run.progress.start(f"{arm.label} · {folder.title} pair", len(prompts), "prompts")
        result = make_pairs(prompts, candidates, verdicts, pairing, seed)
        arm.run.progress.advance(len(prompts), f"{result.kept} pairs")
        arm.run.progress.finish()
        write_pairs(out / "pairs.parquet", result.pairs)
        margin = sum(pair.margin for pair in result.pairs) / result.kept if result.kept else None
        return {"kept": result.kept, "dropped": result.dropped, "margin": margin}

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        "verdicts": judge.outputs["verdicts.parquet"],
        "pairing": digest_json(pairing.model_dump()),
        "seed": str(seed),
    }
    return folder.stage("pair", inputs, ["pairs.parquet"], produce)
