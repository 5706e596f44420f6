"""What a judge spends: its ledger, and the budget that ends the asking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from online_dpo.errors import JudgeError, OnlineDPOError, one_line
from online_dpo.judging.answers import Answer
from online_dpo.judging.cache import VerdictCache
from online_dpo.judging.interface import BaseJudge, Judge


class Spending:
    """The ledger of one judge. `digest` names the judge in the file; `budget` is for all judges together."""

    def __init__(
        self, judge: Judge, name: str, digest: str, cache: VerdictCache | None, budget: Mapping[str, float]
    ) -> None:
        self.judge = judge
        self.name = name
        self.digest = digest
        self.cache = cache
        self.budget = budget
        self.amounts: Counter[str] = Counter()
        """Since the last `take`."""
        self.total: Counter[str] = Counter()
        """Of this process."""

    def count(self, asked: int, cached: int) -> None:
        """Count what the judge was asked for, and what was on disk."""
        self.amounts.update({"asked": asked, "cached": cached})

    def take(self) -> Counter[str]:
        """What was counted and spent since the last call."""
        amounts, self.amounts = self.amounts, Counter()
        return amounts

    def keep(self, rows: Sequence[tuple[bytes, Sequence[Answer]]]) -> None:
        """Write answers with what was spent, together or not at all."""
        spent = self._spent()
        self.amounts.update(spent)
        self.total.update(spent)
        if self.cache is not None:
            self.cache.keep(rows, self.digest, spent)

    def _spent(self) -> dict[str, float]:
        try:
            return {str(item): float(amount) for item, amount in self.judge.ledger().items()}
        except OnlineDPOError:
            raise
        except Exception as error:
            raise JudgeError(f"judge '{self.name}': its ledger cannot be read: {one_line(error)}") from error

    def check(self, prompt_id: str) -> None:
        """`JudgeError` when what all judges spent, in this and earlier processes, has reached the budget."""
        if not self.budget or type(self.judge).ledger is BaseJudge.ledger:
            return
        so_far = self.cache.spent() if self.cache is not None else self.total
        for item, most in self.budget.items():
            if so_far.get(item, 0.0) >= most:
                raise JudgeError(
                    f"judge '{self.name}' at prompt '{prompt_id}': the budget is used up: {item} {so_far[item]:g} of "
                    f"{most:g}; what was judged is kept: raise judge_budget.{item} and run again"
                )
