"""The stages that judge a round's candidates and measure the judge itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.errors import JudgeError
from online_dpo.files import digest_json
from online_dpo.judging import AskedJudge, abstain_reasons, asks_policy, judge_all, mean_details
from online_dpo.records import write_verdicts
from online_dpo.rounds import Pinned
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Candidate, Policy


def judge_round(
    arm: Arm, folder: RoundFolder, pinned: Pinned, candidates: Sequence[Candidate], sample: StageRecord
) -> StageRecord:
    def produce(out: Path) -> dict[str, Any]:
        prompts = {prompt.id: prompt for prompt in pinned.prompts}
        asked = _ready_judge(arm, pinned.source)
        arm.run.progress.start(f"{arm.label} · round {folder.index} judge", len(candidates), "answers")
        verdicts = judge_all(
            asked,
            prompts,
            candidates,
            max_abstain=arm.settings.max_abstain,
            on_progress=arm.run.progress.advance,
        )
        arm.run.progress.finish()
        write_verdicts(out / "verdicts.parquet", verdicts)
        reasons = abstain_reasons(verdicts)
        abstained = sum(reasons.values())
        return {
            "verdicts": len(verdicts) - abstained,
            "abstained": abstained,
            "reasons": reasons,
            "details": mean_details(verdicts),
            "ledger": asked.take_ledger(),
        }

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        **_judge_inputs(arm, pinned.source),
        "max_abstain": str(arm.settings.max_abstain),
    }
    return folder.stage("judge", inputs, ["verdicts.parquet"], produce)


def _judge_inputs(arm: Arm, source: Policy) -> dict[str, str]:
    """What decides a verdict, beside the candidates."""
    spec = arm.settings.judge
    inputs = {"judge": arm.run.judge_digest(spec), "comparing": digest_json(arm.settings.comparing.model_dump())}
    return inputs | ({"policy": source.digest} if asks_policy(spec, arm.run.judge_folders) else {})


def _ready_judge(arm: Arm, source: Policy) -> AskedJudge:
    """The arm's judge; the engine holds the round's source policy where the judge asks it."""
    asked = arm.run.judge(arm.settings.judge, arm.settings.comparing)
    asked.take_ledger()  # what an earlier stage that failed has spent is not this one's
    if asked.uses_policy:
        if arm.run.live_model is None:
            raise JudgeError(f"judge '{asked.name}' asks the policy, and there is no engine here to ask it by")
        arm.run.learner.rest()
        arm.run.engine.load(source)
        asked.attach(arm.run.live_model(), source.digest)
    return asked
