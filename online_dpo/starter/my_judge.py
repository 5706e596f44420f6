"""A judge of your own. Change what it likes, and the policy will learn something else.

The experiment names it as "my_judge:PlainAnswer"; its constructor's keys stand beside `use`.
"""

from __future__ import annotations

from collections.abc import Sequence

from online_dpo.judging import Abstention, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt


class PlainAnswer(PointwiseJudge):
    """Likes an answer of about `words` words that comes to an end and does not say the same thing again.

    The score is at most 2: 1 for the length, less for each word too many or too few (never below 0), and 1 for a
    finished sentence; minus the share of words that the answer has used before.
    """

    def __init__(self, words: int = 20) -> None:
        self.words = words

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """One score for each candidate, in their order; higher is better."""
        # All candidates answer the same prompt, whose last message is `prompt.text`: a judge may compare them, too.
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> Score:
        words = [word.strip(".,;:!?\"'()*").lower() for word in candidate.text.split()]
        if not words:
            # What cannot be judged gets no score. Abstentions are counted; too many of them end the run.
            return Abstention("empty answer")
        length = max(0.0, 1.0 - abs(len(words) - self.words) / self.words)
        # "stop": the policy ended the answer itself. "length": it was cut off at sampling.max_tokens.
        finished = candidate.finish_reason == "stop" and candidate.text.rstrip().endswith((".", "!", "?"))
        repeated = 1.0 - len(set(words)) / len(words)
        return length + float(finished) - repeated
