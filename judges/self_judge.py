"""The policy judges its own answers (Yuan et al. 2024, "Self-Rewarding Language Models"): no other model is needed.

The round's source policy is asked in the engine that sampled the round, with its own weights. Verdicts are read from
the probabilities of the options and not from sampled text: P(A) against P(B), or the expected grade.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from judges.llm_base import CRITERIA
from judges.llm_prompts import Chat, Filled, Template, conversation, own_template
from judges.llm_slots import Slots
from online_dpo.errors import JudgeError
from online_dpo.judging import (
    Abstention,
    Comparison,
    Disagreement,
    Item,
    LiveModel,
    Opinion,
    PairwiseJudge,
    PointwiseJudge,
    Score,
)
from online_dpo.types import Candidate, Message, Prompt

TOO_LONG = Abstention("too long for the engine")
TOO_LITTLE = Abstention("verdict not among the options")


class _SelfAsking:
    """What both kinds share: the template, the live model, and how options become an expectation."""

    def __init__(self, template: Template, criteria: str, reasoning: int, min_mass: float) -> None:
        if isinstance(reasoning, bool) or not isinstance(reasoning, int) or reasoning < 0:
            raise JudgeError(f"SelfJudge: reasoning is a number of tokens, from 0 (none), found {reasoning!r}")
        if not 0.0 <= min_mass < 1.0:
            raise JudgeError(f"SelfJudge: min_mass must lie in [0, 1), found {min_mass!r}")
        self.template = template
        self.criteria = criteria
        self.reasoning = reasoning
        self.min_mass = min_mass
        self.slots = Slots()
        self.model: LiveModel | None = None

    def fill(self, texts: Mapping[str, tuple[str, str]], plain: Mapping[str, str]) -> Filled:
        """One question, strangers' texts fenced."""
        return self.template.fill(self.slots.fence(texts), {"criteria": self.criteria, **plain})

    def expect(self, questions: Sequence[Filled], options: Mapping[str, float]) -> list[Score]:
        """The expected value of `options` under the policy, one for each question."""
        if self.model is None:
            raise JudgeError("a judge that asks the policy works inside a run alone: there is no policy here to ask")
        chats, details = self._chats(self.model, questions)
        asked = [(place, chat) for place, chat in enumerate(chats) if chat is not None]
        rows = self.model.score([chat for _, chat in asked], [list(options)] * len(asked))
        scores: list[Score] = [TOO_LONG] * len(questions)
        for (place, _), row in zip(asked, rows, strict=True):
            if row is not None:
                scores[place] = self._expectation(row, options, details[place])
        return scores

    def _chats(
        self, model: LiveModel, questions: Sequence[Filled]
    ) -> tuple[list[list[Message] | None], list[dict[str, str]]]:
        """What is asked for the verdict, after the reasoning where there is any; None where that was too long."""
        first = [_messages(question.first(reasoning=self.reasoning > 0)) for question in questions]
        if not self.reasoning:
            return list(first), [{} for _ in questions]
        said = model.generate(first, max_tokens=self.reasoning, temperature=0.0, seeds=[0] * len(first))
        chats = [
            None if text is None else _messages(question.second(self.slots.neutral(text)))
            for question, text in zip(questions, said, strict=True)
        ]
        return chats, [{"reasoning": text or ""} for text in said]

    def _expectation(self, logps: Sequence[float], options: Mapping[str, float], details: Mapping[str, str]) -> Score:
        """Σ v·p / Σ p over the options' probabilities p and values v; an abstention where Σ p < `min_mass`."""
        chances = [math.exp(logp) for logp in logps]
        mass = math.fsum(chances)
        if mass < self.min_mass or mass == 0.0:
            return TOO_LITTLE
        value = math.fsum(v * p for v, p in zip(options.values(), chances, strict=True)) / mass
        low, high = min(options.values()), max(options.values())
        return Opinion(min(max(value, low), high), {**details, "mass": min(mass, 1.0)})


class SelfJudge(PairwiseJudge):
    """P(the policy says A) / P(it says A or B), for its own answers as A and B; both orders are asked.

    `reasoning`: tokens that the policy may think before each verdict (greedy); 0 for none. `min_mass`: a verdict is
    read only where A and B together have at least this probability.
    """

    uses_policy = True
    batch_comparisons = 64
    file_params: ClassVar[tuple[str, ...]] = ("template",)
    data_files: ClassVar[tuple[Path, ...]] = (own_template("pairwise"),)

    def __init__(
        self,
        template: str | None = None,
        criteria: str = CRITERIA,
        reasoning: int = 0,
        min_mass: float = 0.01,
        disagreement: Disagreement = "average",
    ) -> None:
        if disagreement not in ("average", "tie", "abstain"):
            raise JudgeError(f"SelfJudge: disagreement is average, tie or abstain, found {disagreement!r}")
        self.disagreement = disagreement
        path = Path(template) if template is not None else own_template("pairwise")
        slots = ("prompt", "answer_a", "answer_b")
        text = Template(path, slots=slots, plain=("criteria",), reasoning=reasoning > 0)
        self.asking = _SelfAsking(text, criteria, reasoning, min_mass)

    def attach(self, model: LiveModel) -> None:
        """See `judging.BaseJudge`."""
        self.asking.model = model

    def prefer_batch(self, comparisons: Sequence[Comparison]) -> Sequence[Score]:
        """The probability that the first is better, one a comparison."""
        return self.asking.expect([self._question(*one) for one in comparisons], {"A": 1.0, "B": 0.0})

    def _question(self, prompt: Prompt, first: Candidate, second: Candidate) -> Filled:
        texts = {
            "prompt": ("request", conversation(prompt)),
            "answer_a": ("answer A", first.text),
            "answer_b": ("answer B", second.text),
        }
        return self.asking.fill(texts, {})


class SelfScoreJudge(PointwiseJudge):
    """The grade from `low` to `high` that the policy gives its own answer: Σ grade·P(grade) / Σ P(grade).

    The other keys are `SelfJudge`'s.
    """

    uses_policy = True
    each_alone = True
    batch_prompts = 16
    file_params: ClassVar[tuple[str, ...]] = ("template",)
    data_files: ClassVar[tuple[Path, ...]] = (own_template("score"),)

    def __init__(
        self,
        template: str | None = None,
        criteria: str = CRITERIA,
        reasoning: int = 0,
        min_mass: float = 0.01,
        low: int = 1,
        high: int = 5,
    ) -> None:
        # A grade of two digits could not be told from the beginning of a longer one.
        if not 0 <= low < high <= 9:
            raise JudgeError(f"SelfScoreJudge: low and high are digits with low < high, found {low!r} and {high!r}")
        path = Path(template) if template is not None else own_template("score")
        plain = ("criteria", "low", "high")
        text = Template(path, slots=("prompt", "answer"), plain=plain, reasoning=reasoning > 0)
        self.asking = _SelfAsking(text, criteria, reasoning, min_mass)
        self.low, self.high = low, high

    def attach(self, model: LiveModel) -> None:
        """See `judging.BaseJudge`."""
        self.asking.model = model

    def score_batch(self, items: Sequence[Item]) -> Sequence[Sequence[Score]]:
        """The expected grades, one row an item."""
        questions = [self._question(prompt, answer) for prompt, answers in items for answer in answers]
        grades = {str(grade): float(grade) for grade in range(self.low, self.high + 1)}
        scores = iter(self.asking.expect(questions, grades))
        return [[next(scores) for _ in answers] for _, answers in items]

    def _question(self, prompt: Prompt, answer: Candidate) -> Filled:
        texts = {"prompt": ("request", conversation(prompt)), "answer": ("answer", answer.text)}
        return self.asking.fill(texts, {"low": str(self.low), "high": str(self.high)})


def _messages(chat: Chat) -> list[Message]:
    return [Message(turn["role"], turn["content"]) for turn in chat]
