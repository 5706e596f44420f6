"""A judge that writes down each answer that it is asked about, before it says anything."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from online_dpo.judging import PointwiseJudge
from online_dpo.types import Candidate, Prompt

PAUSE_S = 0.02
"""Long enough for the stage to be hit."""


class CountingJudge(PointwiseJudge):
    """The length of an answer in characters. One line a candidate goes to the file that the environment names."""

    each_alone: ClassVar[bool] = True

    def __init__(self) -> None:
        self.calls = 0

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
        """The lengths."""
        with Path(os.environ["ONLINE_DPO_FAULTS_CALLS"]).open("a", encoding="utf-8") as file:
            for candidate in candidates:
                answer = repr((prompt.id, candidate.text, candidate.token_ids, candidate.finish_reason))
                file.write(hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest() + "\n")
        self.calls += len(candidates)
        time.sleep(PAUSE_S * len(candidates))
        return [float(len(candidate.text)) for candidate in candidates]

    def ledger(self) -> dict[str, float]:
        """One call a candidate."""
        calls, self.calls = self.calls, 0
        return {"calls": float(calls)} if calls else {}
