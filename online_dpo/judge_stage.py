"""The stages that judge a round's candidates and measure the judge itself."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo import judge_ahead
from online_dpo.answer_blocks import answer_blocks, count_candidates, prompts_at_once
from online_dpo.arms import Arm
from online_dpo.errors import JudgeError
from online_dpo.files import digest_json, write_json
from online_dpo.judging import Ahead, AskedJudge, Item, Judging, Means, asks_policy, chunk_size
from online_dpo.records import VERDICTS, each_candidate, verdict_table
from online_dpo.rounds import Sampled
from online_dpo.seeds import derive_seed
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.tables import TableWriter
from online_dpo.types import Abstain, Candidate, Policy, Prompt, Verdict

if TYPE_CHECKING:
    from online_dpo.audit.auditing import Audit


def judge_round(arm: Arm, folder: RoundFolder, pinned: Sampled, sample: StageRecord) -> StageRecord:
    """Every candidate's verdict, or why there is none."""

    def produce(out: Path) -> dict[str, Any]:
        ahead = judge_ahead.finish(arm, folder)
        asked = _ready_judge(arm, pinned.source)
        arm.run.progress.start(f"{arm.label} · {folder.title} judge", count_candidates(folder.path), "answers")
        reasons: Counter[str] = Counter()
        details, verdicts = Means(), 0
        with TableWriter(out / "verdicts.parquet", VERDICTS) as file:
            for part in _judged(arm, folder, pinned, asked, ahead):
                file.add(verdict_table(part))
                reasons.update(verdict.reason for verdict in part if isinstance(verdict, Abstain))
                for verdict in part:
                    if isinstance(verdict, Verdict):
                        details.add(verdict.details)
                verdicts += len(part)
        arm.run.progress.finish()
        abstained = reasons.total()
        return {
            "verdicts": verdicts - abstained,
            "abstained": abstained,
            "reasons": dict(reasons.most_common()),
            "details": details.as_dict(),
            "ledger": ahead.with_ledger(asked.take_ledger()),
        }

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        **_judge_inputs(arm, pinned.source),
        "max_abstain": str(arm.settings.max_abstain),
    }
    try:
        return folder.stage("judge", inputs, ["verdicts.parquet"], produce)
    finally:
        judge_ahead.forget(arm, folder)


def _judged(
    arm: Arm, folder: RoundFolder, pinned: Sampled, asked: AskedJudge, ahead: Ahead
) -> Iterator[list[Verdict | Abstain]]:
    """The verdicts, some prompts at a time: whole chunks of those that the judge is asked for together, or all."""
    n = arm.settings.sampling.n
    chunk = chunk_size(asked, n)
    size = max(1, len(pinned.prompts)) if chunk is None else prompts_at_once(n, max(1, chunk))
    judging = Judging(
        asked,
        count_candidates(folder.path),
        max_abstain=arm.settings.max_abstain,
        on_progress=arm.run.progress.advance,
        known=ahead.said,
    )
    for block in answer_blocks(folder.path / "candidates.parquet", pinned.prompts, size):
        yield judging.judge({prompt.id: prompt for prompt in block.prompts}, block.candidates)


def audit_round(arm: Arm, folder: RoundFolder, pinned: Sampled, sample: StageRecord) -> StageRecord | None:
    """The judge audited on some of the round's prompts (audit.json, drawn); None where the experiment wants none."""
    spec = arm.run.experiment.audit
    if not spec.prompts:
        return None

    def produce(out: Path) -> dict[str, Any]:
        from online_dpo.audit.auditing import audit_candidates
        from online_dpo.audit.figures import draw_audit

        asked = _ready_judge(arm, pinned.source)
        other = None if spec.against is None else arm.run.judge(spec.against, arm.settings.comparing)
        items = _audit_sample(arm, folder, pinned.prompts)
        pairs = sum(len(own) * (len(own) - 1) // 2 for _, own in items) * (1 if other is None else 2)
        arm.run.progress.start(f"{arm.label} · round {folder.index} audit", pairs, "pairs")
        audit = audit_candidates(
            asked,
            items,
            against=other,
            source=f"round {folder.index} of {arm.label}",
            seed=arm.seed,
            advance=arm.run.progress.advance,
        )
        arm.run.progress.finish()
        write_json(out / "audit.json", audit.as_dict())
        draw_audit(audit, out)
        return {**_audit_figures(audit), "ledger": audit.cost.ledger}

    inputs = {
        "candidates": sample.outputs["candidates.parquet"],
        **_judge_inputs(arm, pinned.source),
        "prompts": str(spec.prompts),
        "seed": f"{arm.seed}/{folder.index}",
        "against": "" if spec.against is None else arm.run.judge_digest(spec.against),
    }
    return folder.stage("audit", inputs, ["audit.json", "audit.png", "audit.svg"], produce)


def _audit_sample(arm: Arm, folder: RoundFolder, prompts: Sequence[Prompt]) -> list[Item]:
    """`audit.prompts` of the round's prompts, drawn by the seed, with their candidates."""
    drawn = heapq.nsmallest(
        arm.run.experiment.audit.prompts,
        prompts,
        key=lambda prompt: derive_seed(arm.seed, "audit", folder.index, prompt.id),
    )
    own: dict[str, list[Candidate]] = {prompt.id: [] for prompt in drawn}
    for candidate in each_candidate(folder.path / "candidates.parquet", of=own):
        own[candidate.prompt_id].append(candidate)
    return [(prompt, own[prompt.id]) for prompt in drawn if own[prompt.id]]


def _audit_figures(audit: Audit) -> dict[str, Any]:
    """The figures that a table of rounds shows; all of them are in audit.json."""
    shown = {
        "ties": audit.ties,
        "flips": audit.flips,
        "intransitive": audit.intransitive,
        "length_correlation": audit.length.spearman,
        "longest_first": audit.length.longest_first,
        "kappa": None if audit.agreement is None else audit.agreement.kappa,
    }
    figures = {key: None if value is None else value.as_dict() for key, value in shown.items()}
    return {"prompts": audit.prompts, "longest_first_by_chance": audit.length.longest_first_by_chance, **figures}


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
        arm.run.rest_learner()
        arm.run.engine.load(source)
        asked.attach(arm.run.live_model(), source.digest)
    return asked
