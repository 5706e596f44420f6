"""What a round trains on: its pairs, the chosen answers of its pairs, or groups of all judged answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from online_dpo.arms import Arm
from online_dpo.errors import TrainingError
from online_dpo.grouping import make_groups
from online_dpo.records import each_candidate, read_candidates, read_pairs, read_verdicts
from online_dpo.rounds import Pinned
from online_dpo.sources.round_data import RoundData
from online_dpo.store import RoundFolder
from online_dpo.types import Group, Pair

Trained = Literal["pairs", "chosen", "groups"]


def trained_on(arm: Arm) -> Trained:
    """What the arm's steps are made of."""
    if arm.settings.algorithm == "rloo":
        return "groups"
    return "chosen" if arm.settings.dpo.chosen_alone else "pairs"


@dataclass(frozen=True, slots=True)
class TrainingData:
    """`kind` says which of the two is trained on; the other is empty."""

    kind: Trained
    pairs: tuple[Pair, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def units(self) -> int:
        """What `dpo.batch_size` counts: pairs, chosen answers, or prompts."""
        return len(self.groups) if self.kind == "groups" else len(self.pairs)

    @property
    def unit(self) -> str:
        """The units' name."""
        return {"pairs": "pairs", "chosen": "answers", "groups": "prompts"}[self.kind]

    @property
    def answers(self) -> int:
        """Answers that an epoch trains on; one that stands in two pairs counts twice."""
        if self.kind == "groups":
            return sum(len(group.candidates) for group in self.groups)
        return len(self.pairs) * (2 if self.kind == "pairs" else 1)


def training_data(arm: Arm, folder: RoundFolder, pinned: Pinned, data: RoundData) -> TrainingData:
    """What the round trains on. `TrainingError` where there is nothing."""
    prompts = {prompt.id: prompt for prompt in pinned.prompts}
    kind, answers = trained_on(arm), folder.path / "candidates.parquet"
    if kind == "groups":
        found = TrainingData(
            kind, groups=make_groups(prompts, read_candidates(answers), read_verdicts(folder.path / "verdicts.parquet"))
        )
        if not found.groups:
            raise TrainingError(f"round {folder.index} has no prompt with two judged answers to train on")
        return found
    found = TrainingData(kind, tuple(read_pairs(folder.path / "pairs.parquet", prompts, each_candidate(answers))))
    if not found.pairs:
        raise TrainingError(f"round {folder.index} has no pairs to train on (dropped: {data.pair.info['dropped']})")
    return found
