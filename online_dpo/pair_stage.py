"""The stage that turns a round's verdicts into pairs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from online_dpo.answer_blocks import judged_blocks, prompts_at_once
from online_dpo.arms import Arm
from online_dpo.files import digest_json
from online_dpo.pairing import Budget, named_drops, propose_pairs
from online_dpo.records import PAIRS, mean_margin, pair_table
from online_dpo.rounds import Sampled
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.tables import TableWriter, keep_rows


def pair_round(arm: Arm, folder: RoundFolder, pinned: Sampled, before: tuple[StageRecord, StageRecord]) -> StageRecord:
    """The pairs of the answers and verdicts in `folder`, whose stages' records are `before`."""
    pairing = arm.settings.pairing
    sample, judge = before
    seed = derive_seed(arm.seed, "pair", folder.index)

    def produce(out: Path) -> dict[str, Any]:
        budget = Budget(pairing.max_pairs, seed)
        drops: Counter[str] = Counter()
        arm.run.progress.start(f"{arm.label} · {folder.title} pair", len(pinned.prompts), "prompts")
        with TableWriter(out / "pairs.parquet", PAIRS) as file:
            for block, verdicts in judged_blocks(folder.path, pinned.prompts, prompts_at_once(arm.settings.sampling.n)):
                prompts = {prompt.id: prompt for prompt in block.prompts}
                pairs, dropped = propose_pairs(prompts, block.candidates, verdicts, pairing, seed)
                file.add(pair_table(pairs))
                for pair in pairs:
                    budget.add(pair)
                drops.update(dropped)
                arm.run.progress.advance(len(prompts), f"{budget.count - budget.over} pairs")
        arm.run.progress.finish()
        if budget.over:
            keep_rows(out / "pairs.parquet", PAIRS, budget.places())
            drops["over_budget"] = budget.over
        kept = budget.count - budget.over
        return {"kept": kept, "dropped": named_drops(drops), "margin": mean_margin(out / "pairs.parquet")}

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        "verdicts": judge.outputs["verdicts.parquet"],
        "pairing": digest_json(pairing.model_dump()),
        "seed": str(seed),
    }
    return folder.stage("pair", inputs, ["pairs.parquet"], produce)
