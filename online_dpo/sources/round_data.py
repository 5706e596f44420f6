"""What a source gives a round: its answers, their verdicts and the pairs, each a finished stage."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.store import StageRecord
from online_dpo.types import Abstain, Candidate, Policy, Verdict


@dataclass(frozen=True, slots=True)
class RoundData:
    """The round's candidates and verdicts, and the records of the stages that made them.

    The pairs lie in the round's folder.
    """

    candidates: tuple[Candidate, ...]
    verdicts: tuple[Verdict | Abstain, ...]
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
