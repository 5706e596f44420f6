"""What a pairwise judge said of two candidates, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from online_dpo.judging.answers import Answer
from online_dpo.judging.interface import Abstention, Disagreement, Opinion


@dataclass(frozen=True, slots=True)
class Compared:
    """What a pairwise judge said of candidates `first` < `second` of one prompt, in both orders.

    `there` is its answer for (first, second), `back` for (second, first); `back` is None where one order is enough.
    """

    first: int
    second: int
    there: Answer
    back: Answer | None

    def swapped(self) -> bool | None:
        """Whether the verdict went with the place and not with the answer; None where that cannot be said."""
        if not isinstance(self.there, Opinion) or not isinstance(self.back, Opinion):
            return None
        return (self.there.value - 0.5) * (self.back.value - 0.5) > 0.0

    def outcome(self, disagreement: Disagreement) -> float | Abstention:
        """The probability that `first` is better: (p + 1 − q)/2, which cancels a preference for either place.

        One order alone would let that preference in: both were answered, or it is an abstention.
        """
        if isinstance(self.there, Abstention):
            return self.there
        if self.back is None:
            return self.there.value
        if isinstance(self.back, Abstention):
            return self.back
        if self.swapped() and disagreement != "average":
            return 0.5 if disagreement == "tie" else Abstention("the two orders disagree")
        # Written so that equal answers in both orders are ½ to the last bit: a tie, never a tiny preference.
        return 0.5 + (self.there.value - self.back.value) / 2.0
