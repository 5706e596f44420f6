"""The stage that measures how off-policy a round's pairs were, and what training did to their log-probs."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.config import Experiment
from online_dpo.evaluate_stage import own_distribution
from online_dpo.measure import Logprobs
from online_dpo.off_policy import Distance, displacement, distance, margins, positive, staleness
from online_dpo.records import each_candidate, each_pair, read_held_out, read_pairs
from online_dpo.rounds import Pinned
from online_dpo.scored_records import ScoredAnswer, read_off_policy, write_off_policy
from online_dpo.scoring import score_answers
from online_dpo.seeds import derive_seed
from online_dpo.source_spec import SourceSpec, parts_of, source_kind
from online_dpo.sources.round_data import RoundData
from online_dpo.sources.streamed import find_streamed
from online_dpo.store import RoundFolder, StageRecord
from online_dpo.types import Candidate, Pair, Policy, Prompt

Key = tuple[str, int]
"""An answer: its prompt's id and its index."""


def score_off_policy(arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData, end: Policy) -> StageRecord | None:
    """Log-probs of some of the round's pairs under the policy that began the round, the one that it trained (`end`)
    and its reference: one pass of the learner for each that is another policy.

    Stored log-probs stand for none of them, not even where the source began the round. They are the engine's: set
    beside the learner's own at the same weights they give the engine gap, the zero point of all these figures, which
    would else be 0 by definition. And a change from one pass of the learner to another has no gap in it.
    None where the experiment wants none.
    """
    wanted = arm.run.experiment.evaluation.off_policy
    if not wanted:
        return None

    def produce(out: Path) -> dict[str, Any]:
        drawn = _drawn(arm, folder, pinned.prompts, wanted)
        items = {_key(answer): (pair.prompt, answer) for pair in drawn for answer in (pair.chosen, pair.rejected)}
        # The learner holds the trained policy still.
        scored = {
            policy.digest: _scores(arm, f"round {folder.index} off-policy, {role}", policy, items)
            for role, policy in _distinct({"end": end, "start": pinned.start, "reference": pinned.reference}).items()
        }
        columns = [scored[policy.digest] for policy in (pinned.start, end, pinned.reference)]
        write_off_policy(out / "off_policy.parquet", _rows(drawn, columns))
        return {"pairs": len(drawn), "answers": 2 * len(drawn)}

    inputs = {
        "start": pinned.start.digest,
        "end": end.digest,
        "reference": pinned.reference.digest,
        "pairs": data.pair.outputs["pairs.parquet"],
        "candidates": data.pair.inputs["candidates"],
        "most": str(wanted),
        "seed": f"{arm.seed}/{folder.index}",
    }
    return folder.stage("off_policy", inputs, ["off_policy.parquet"], produce)


def _drawn(arm: Arm, folder: RoundFolder, prompts: Sequence[Prompt], most: int) -> list[Pair]:
    """At most so many of the round's pairs, by the seed, in their own order."""

    def rank(numbered: tuple[int, tuple[Any, ...]]) -> int:
        return derive_seed(arm.seed, "off_policy", folder.index, *numbered[1])

    names = ("prompt_id", "chosen_index", "rejected_index")
    rows = (tuple(row[name] for name in names) for row in each_pair(folder.path / "pairs.parquet"))
    drawn = heapq.nsmallest(most, enumerate(rows), key=rank)
    of_pairs = {row[0] for _, row in drawn}
    return read_pairs(
        folder.path / "pairs.parquet",
        {prompt.id: prompt for prompt in prompts if prompt.id in of_pairs},
        each_candidate(folder.path / "candidates.parquet", of=of_pairs),
        only={place for place, _ in drawn},
    )


def _distinct(policies: Mapping[str, Policy]) -> dict[str, Policy]:
    """`policies` without those that an earlier one is already."""
    found: dict[str, tuple[str, Policy]] = {}
    for role, policy in policies.items():
        found.setdefault(policy.digest, (role, policy))
    return dict(found.values())


def _scores(
    arm: Arm, label: str, policy: Policy, items: Mapping[Key, tuple[Prompt, Candidate]]
) -> dict[Key, tuple[float, ...]]:
    scored = score_answers(arm, label, policy, list(items.values()))
    return {key: tuple(logprobs) for key, logprobs in zip(items, scored, strict=True)}


def _rows(pairs: Sequence[Pair], columns: Sequence[Mapping[Key, tuple[float, ...]]]) -> list[ScoredAnswer]:
    return [
        ScoredAnswer(
            answer.prompt_id,
            answer.index,
            "chosen" if answer is pair.chosen else "rejected",
            answer.logprobs or None,
            *(column[_key(answer)] for column in columns),
        )
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]


def _key(answer: Candidate) -> Key:
    return answer.prompt_id, answer.index


# --- figures ---


def off_policy_figures(arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData) -> dict[str, Any] | None:
    """The round's figures, from its files and the held-out answers of the policies that began and ended it.

    `exact`: whether answers were drawn from the policy itself. At another temperature or with top-p the stored
    log-probs are the policy's own all the same, but not those of the distribution that answers were drawn from: there
    is no KL and no effective sample size then, nor where none was stored. None where nothing was measured.
    """
    if folder.done("off_policy") is None:
        return None
    answers = read_off_policy(folder.path / "off_policy.parquet")
    exact = drawn_exactly(arm.run.experiment, arm.name, arm.seed, arm.run.judge_folders)
    prompts = [answer.prompt_id for answer in answers]
    stored = [answer.behaviour_logprobs for answer in answers]
    start, end = ([answer.start_logprobs for answer in answers], [answer.end_logprobs for answer in answers])
    behaviour = stored if exact else [None] * len(answers)
    return {
        "answers": len(answers),
        "with_behaviour": sum(row is not None for row in behaviour),
        "exact": exact,
        "staleness": _staleness(arm, folder.index, data.sampled_by),
        "start": distance(start, behaviour, prompts, _fresh(arm, folder.index - 1)).as_dict(),
        "end": distance(end, behaviour, prompts, _fresh(arm, folder.index)).as_dict(),
        "engine_gap": _engine_gap(pinned, data.sampled_by, answers),
        "displacement": {role: _displaced(answers, role) for role in ("chosen", "rejected")},
        "implicit_accuracy": _implicit_accuracy(answers),
    }


def drawn_exactly(experiment: Experiment, name: str, seed: int, folders: Sequence[Path]) -> bool:
    """Whether all answers of an arm that a policy sampled were drawn from that policy itself.

    Those of a stream by the settings of the arm that made them, which may be another run's, found in `folders`.
    """
    settings = experiment.arm(name)
    for part in parts_of(settings.source):
        stream = part.stream if isinstance(part, SourceSpec) else None
        if stream is None:
            exact = source_kind(part) == "dataset" or own_distribution(settings.sampling)
        elif ":" in stream:
            other = find_streamed(stream, seed, folders, model=None)
            found = [other.store.folder]
            exact = drawn_exactly(other.store.experiment, other.name, seed, found)
        else:
            exact = drawn_exactly(experiment, stream, seed, folders)
        if not exact:
            return False
    return True


def _staleness(arm: Arm, index: int, sampled_by: Policy | None) -> int | None:
    """Optimiser steps from the weights that sampled to those that began the round; None where they were no policy of
    this arm's, or several."""
    past = [arm.folder(earlier).metrics for earlier in range(index)]
    digest = None if sampled_by is None else sampled_by.digest
    sampled_after = [round for round, row in enumerate(past) if row["policy"]["digest"] == digest]
    if not sampled_after:
        return None
    return staleness([row["train"]["steps"] for row in past[1:]], sampled_after[-1], index - 1)


def _fresh(arm: Arm, index: int) -> Logprobs | None:
    """Log-probs of the held-out answers of round `index`'s policy under itself; None where they are not its own."""
    if not own_distribution(arm.run.experiment.evaluation):
        return None
    folder = arm.folder(index)
    folder.trust("evaluate")
    return [answer.candidate.logprobs for answer in read_held_out(folder.path / "held_out.parquet")]


def _engine_gap(pinned: Pinned, sampled_by: Policy | None, answers: Sequence[ScoredAnswer]) -> dict[str, Any] | None:
    """The same figures between engine and learner at identical weights; None where the learner did not score the
    answers under the policy that sampled them."""
    if sampled_by is None:
        return None
    stored = [answer.behaviour_logprobs for answer in answers]
    prompts = [answer.prompt_id for answer in answers]
    for policy, own in (
        (pinned.start, [answer.start_logprobs for answer in answers]),
        (pinned.reference, [answer.reference_logprobs for answer in answers]),
    ):
        if policy.digest == sampled_by.digest:
            found: Distance = distance(own, stored, prompts)
            return found.as_dict()
    return None


def _displaced(answers: Sequence[ScoredAnswer], role: str) -> dict[str, float | None]:
    own = [answer for answer in answers if answer.role == role]
    end, start = [answer.end_logprobs for answer in own], [answer.start_logprobs for answer in own]
    return displacement(end, start, [answer.prompt_id for answer in own]).as_dict()


def _implicit_accuracy(answers: Sequence[ScoredAnswer]) -> dict[str, float | None]:
    """How often log π/π_ref of the trained policy is larger for the chosen answer than for the rejected one."""
    chosen, rejected = answers[::2], answers[1::2]
    found = margins(
        [sum(answer.end_logprobs) for answer in chosen],
        [sum(answer.end_logprobs) for answer in rejected],
        [sum(answer.reference_logprobs) for answer in chosen],
        [sum(answer.reference_logprobs) for answer in rejected],
    )
    return positive(found, [answer.prompt_id for answer in chosen]).as_dict()
