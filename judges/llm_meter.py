"""What requests to a model have cost."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from judges.llm_reply import Reply
from online_dpo.errors import JudgeError


@dataclass(frozen=True, slots=True)
class Prices:
    """Per million tokens, in one currency; None: nothing is counted as cost."""

    price_in: float | None = None
    price_out: float | None = None

    def amounts(self, reply: Reply) -> dict[str, float]:
        """The tokens of one reply, and their cost; `JudgeError` where there are prices and no count of tokens."""
        if reply.usage is None:
            if self.price_in is not None or self.price_out is not None:
                raise JudgeError(
                    "the server does not count tokens: the cost cannot be known; leave out price_in and price_out"
                )
            return {}
        there, back = reply.usage.prompt_tokens, reply.usage.completion_tokens
        amounts: dict[str, float] = {"prompt_tokens": there, "completion_tokens": back, "tokens": there + back}
        if self.price_in is not None or self.price_out is not None:
            amounts["cost"] = (there * (self.price_in or 0.0) + back * (self.price_out or 0.0)) / 1e6
        return amounts


class Meter:
    """Adds up amounts from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._amounts: dict[str, float] = {}

    def add(self, amounts: dict[str, float]) -> None:
        """Count `amounts`."""
        with self._lock:
            for item, amount in amounts.items():
                self._amounts[item] = self._amounts.get(item, 0.0) + amount

    def take(self) -> dict[str, float]:
        """What was counted since the last call; items of zero are left out."""
        with self._lock:
            taken = {item: amount for item, amount in self._amounts.items() if amount}
            self._amounts.clear()
        return taken
