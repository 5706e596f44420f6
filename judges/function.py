"""Judges an answer by a Python function of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from online_dpo.errors import JudgeError, one_line
from online_dpo.judging import Abstention, PointwiseJudge, Score, import_object
from online_dpo.types import Candidate, Prompt


class FunctionJudge(PointwiseJudge):
    """The score is `function(prompt_text, answer)`; None abstains. `function` is named as "module:name".

    The module is looked up on the Python path and beside the experiment, as judges are. `prompt_text` is the
    prompt's last message.
    """

    code_params: ClassVar[tuple[str, ...]] = ("function",)

    def __init__(self, function: str) -> None:
        self.function = import_object(str(function), what="function")
        if not callable(self.function):
            raise JudgeError(f"FunctionJudge: '{function}' is a {type(self.function).__name__}, not a function")

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """One score per candidate, in the function's own units."""
        return [self._value(prompt.text, candidate.text) for candidate in candidates]

    def _value(self, prompt_text: str, answer: str) -> Score:
        try:
            value: Score = self.function(prompt_text, answer)
        except Exception as error:  # this answer's fault alone: the prompt's other answers keep their scores
            return Abstention(one_line(error))
        return value
