"""Judges that ask a language model: which of two answers is better, how good one is, or how several rank."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import ClassVar, get_args

from judges.llm_base import Details, LLMBase
from judges.llm_faults import NoAnswerError
from judges.llm_prompts import conversation, own_template
from judges.llm_verdicts import read_ranking
from online_dpo.errors import nearest
from online_dpo.judging import Abstention, Disagreement, Opinion, PairwiseJudge, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt

LABELS = string.ascii_uppercase


@dataclass(kw_only=True, eq=False)
class LLMJudge(LLMBase, PairwiseJudge):
    """Which of two answers is better: P(A) / (P(A) + P(B)) over the tokens of the verdict; see `LLMBase` for the keys.

    Without log-probs it is 1 or 0. Both orders are asked; `disagreement` says what comes of it when the verdict
    follows the place and not the answer: average, tie or abstain (see `PairwiseJudge.disagreement`).
    """

    disagreement: Disagreement = "average"

    data_files: ClassVar[tuple[Path, ...]] = (own_template("pairwise"),)
    template_name: ClassVar[str] = "pairwise"
    slot_fields: ClassVar[tuple[str, ...]] = ("prompt", "answer_a", "answer_b")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = get_args(Disagreement)
        if self.disagreement not in known:
            raise self._wrong(f"disagreement must be one of {', '.join(known)}{nearest(self.disagreement, known)}")

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        """The probability that `first` is better."""
        texts = {
            "prompt": ("request", conversation(prompt)),
            "answer_a": ("answer A", first.text),
            "answer_b": ("answer B", second.text),
        }
        fenced = self.slots.fence(texts)
        return self.verdict(self.filled_in.fill(fenced, {"criteria": self.criteria}), {"A": 1.0, "B": 0.0})


@dataclass(kw_only=True, eq=False)
class LLMScoreJudge(LLMBase, PointwiseJudge):
    """A grade from `low` to `high`, the expected one over the tokens of the verdict; see `LLMBase` for the keys.

    What the grades mean can stand in `criteria`, one line each (a rubric). With a tokenizer that splits 10 into two
    tokens the probability of 1 is sometimes not to be told from that of 10: then the grade is the one in the text.
    Scales whose numbers have one digit, such as 1 to 5, have no such cases.
    """

    low: int = 1
    high: int = 10

    each_alone: ClassVar[bool] = True
    data_files: ClassVar[tuple[Path, ...]] = (own_template("score"),)
    template_name: ClassVar[str] = "score"
    slot_fields: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    plain_fields: ClassVar[tuple[str, ...]] = ("low", "high")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (self.low, self.high))
        if not whole or not 0 <= self.low < self.high <= 1000:
            raise self._wrong(f"low and high must be whole numbers from 0 to 1000, found {self.low!r}, {self.high!r}")

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """The grade of each candidate."""
        return [self._grade(prompt, candidate) for candidate in candidates]

    def _grade(self, prompt: Prompt, candidate: Candidate) -> Score:
        texts = {"prompt": ("request", conversation(prompt)), "answer": ("answer", candidate.text)}
        fenced = self.slots.fence(texts)
        plain = {"criteria": self.criteria, "low": str(self.low), "high": str(self.high)}
        options = {str(grade): float(grade) for grade in range(self.low, self.high + 1)}
        return self.verdict(self.filled_in.fill(fenced, plain), options)


@dataclass(kw_only=True, eq=False)
class LLMRankingJudge(LLMBase, PointwiseJudge):
    """Ranks all candidates of a prompt in one request, `orders` times in different orders; see `LLMBase` for the keys.

    A candidate's score is the mean, over these, of the share of the others that it stands above: 0 to 1. Every second
    order is the one before it backwards, so that a liking for the first or last place cancels. One reply that is no
    ranking makes the prompt's candidates abstain: without it that liking would come in. Scores say nothing across
    prompts; a lone candidate abstains. Log-probs are not used.
    """

    orders: int = 2

    relative: ClassVar[bool] = True
    data_files: ClassVar[tuple[Path, ...]] = (own_template("ranking"),)
    template_name: ClassVar[str] = "ranking"
    slot_fields: ClassVar[tuple[str, ...]] = ("prompt", "answers")
    plain_fields: ClassVar[tuple[str, ...]] = ("labels",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.orders, bool) or not isinstance(self.orders, int) or self.orders < 1:
            raise self._wrong(f"orders must be a whole number from 1, found {self.orders!r:.60}")

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Score]:
        """The share of the other candidates that each stands above, over all orders."""
        n = len(candidates)
        if n < 2:
            return [Abstention("no other candidate to compare with")] * n
        if n > len(LABELS):
            raise self._wrong(f"prompt '{prompt.id}' has {n} candidates; at most {len(LABELS)} can be ranked at once")
        details = Details()
        shares: list[list[float]] = [[] for _ in candidates]
        for order in self._orders(candidates):
            places = self._rank(prompt, [candidates[i] for i in order], details)
            if isinstance(places, Abstention):
                return [places] * n
            for i, place in zip(order, places, strict=True):
                shares[i].append((n - 1 - place) / (n - 1))
        # What the request cost is a candidate's in equal parts.
        own: Details = {key: value / n if isinstance(value, float | int) else value for key, value in details.items()}
        return [Opinion(fmean(row), {**own, "spread": pstdev(row)}) for row in shares]

    def _orders(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        """`orders` orders of the candidates' numbers; the same texts give the same ones."""
        texts = "\n".join(hashlib.sha256(c.text.encode("utf-8", "surrogatepass")).hexdigest() for c in candidates)
        draw = random.Random(texts)
        orders: list[list[int]] = []
        while len(orders) < self.orders:
            order = list(range(len(candidates)))
            draw.shuffle(order)
            orders += [order, order[::-1]]
        return orders[: self.orders]

    def _rank(self, prompt: Prompt, shown: Sequence[Candidate], details: Details) -> list[int] | Abstention:
        labels = LABELS[: len(shown)]
        texts = {label: (f"answer {label}", candidate.text) for label, candidate in zip(labels, shown, strict=True)}
        fenced = self.slots.fence({"prompt": ("request", conversation(prompt)), **texts})
        slots = {"prompt": fenced["prompt"], "answers": "\n\n".join(fenced[label] for label in labels)}
        plain = {"criteria": self.criteria, "labels": ", ".join(labels)}
        request = self.filled_in.fill(slots, plain)
        try:
            # A letter and its separator are two tokens or three.
            tokens = self.verdict_tokens + 4 * len(shown)
            reply = self._last_reply(request, tokens, details, logprobs=False)
        except NoAnswerError as error:
            return Abstention(error.reason, error.passing)
        return read_ranking(reply, labels)
