"""What a source gives a round: its answers, their verdicts and the pairs, each a finished stage."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.store import StageRecord
from online_dpo.types import Policy


@dataclass(frozen=True, slots=True)
class RoundData:
    """The records of the stages that made the round's candidates, verdicts and pairs, which lie in its folder."""

    sample: StageRecord
    judge: StageRecord
    audit: StageRecord | None
    pair: StageRecord
    sampled_by: Policy | None
    """The one policy that sampled all answers, with stored log-probs; None where there is no such policy."""

    @property
    def records(self) -> list[StageRecord | None]:
        """The stages in their order; None for one that the experiment does not want."""
        return [self.sample, self.judge, self.audit, self.pair]
