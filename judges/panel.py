"""A judge made of several: their scores combined, and how far they disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, get_args

import numpy as np

from judges.combining import Table, disagreements, majorities, ranks, round_units
from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import Abstention, AskedJudge, Item, Opinion, PointwiseJudge, Score

Combine: TypeAlias = Literal["mean", "minimum", "majority"]
Scale: TypeAlias = Literal["round", "rank", "raw"]
Abstain: TypeAlias = Literal["any", "all"]
Answers: TypeAlias = Sequence[Opinion | Abstention]
ALONE = Abstention("no other candidate to compare with")
CALLS_AHEAD = 8


class PanelJudge(PointwiseJudge):
    """Several judges' scores of a candidate as one.

    combine: mean — weighted. minimum — the lowest: no judge may be content at the cost of another. majority — of each
    two candidates the weighted majority of the judges prefers one or neither; a candidate's score is its wins minus
    its defeats over its comparisons, in [−1, 1] (Copeland's count).

    scale: judges speak in different units, so mean and minimum bring them to one. round (the default) — less the
    judge's mean on the prompt, over its standard deviation within prompts, pooled over the round: a judge that hardly
    distinguishes a prompt's candidates has little say on that prompt. The whole round is judged at once. rank — the
    place among the prompt's candidates, in [0, 1], equals sharing theirs: all judges have the same say on each
    prompt. raw — as they are: for judges of one unit, or weights that make it one. Majority takes no scale.

    A score tells the prompt's candidates apart and nothing else: held-out answers are judged beside the initial
    policy's. But for raw, a candidate alone abstains.

    abstain: any — a candidate abstains where one judge does, so that all are scored by the same judges; all — only
    where all judges do; the others' weights then stand alone.

    Details: `judge_0`, `judge_1`, … each judge's own score, in their order; `disagreement`: with what share of the
    other candidates some judges prefer this one and some the other.
    """

    cached: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    judge_params: ClassVar[tuple[str, ...]] = ("judges",)

    def __init__(
        self,
        judges: Sequence[AskedJudge],
        weights: Sequence[float] | None = None,
        combine: Combine = "mean",
        scale: Scale | None = None,
        abstain: Abstain = "any",
    ) -> None:
        if not isinstance(judges, list | tuple) or len(judges) < 2:
            raise JudgeError("PanelJudge: judges must be a list of two judges or more")
        for key, value, known in (
            ("combine", combine, Combine),
            ("scale", scale, Scale),
            ("abstain", abstain, Abstain),
        ):
            if value is not None and value not in get_args(known):
                hint = nearest(str(value), get_args(known)) or f"; known: {', '.join(get_args(known))}"
                raise JudgeError(f"PanelJudge: no {key} '{value}'{hint}")
        if scale is not None and combine == "majority":
            raise JudgeError("PanelJudge: majority takes no scale: each judge compares in its own unit")
        self.judges = tuple(judges)
        self.weights = np.array(_weights(weights, len(judges), combine))
        self.combine = combine
        self.scale = scale or "round"
        self.abstain = abstain
        pooled = combine != "majority" and self.scale == "round"
        self.batch_prompts = None if pooled else prompts_at_once(self.judges)

    def score_batch(self, items: Sequence[Item]) -> list[list[Score]]:
        """One combined score per candidate of each item."""
        said = [judge.scores(items) for judge in self.judges]
        rows = [[judge[place] for judge in said] for place in range(len(items))]
        tables = [self._table(row) for row in rows]
        return [self._scores(*one) for one in zip(rows, tables, self._scaled(tables), strict=True)]

    def _table(self, said: Sequence[Answers]) -> Table:
        """Scores, (judges, candidates); NaN where a judge abstained, and for candidates that will abstain."""
        table = np.array([[a.value if isinstance(a, Opinion) else math.nan for a in row] for row in said])
        if self.abstain == "any":
            table[:, np.isnan(table).any(axis=0)] = math.nan
        return table

    def _scaled(self, tables: Sequence[Table]) -> list[Table]:
        if self.combine == "majority" or self.scale == "raw":
            return list(tables)
        return [ranks(table) for table in tables] if self.scale == "rank" else round_units(tables)

    def _scores(self, said: Sequence[Answers], table: Table, scaled: Table) -> list[Score]:
        """The scores of one prompt's candidates."""
        there = ~np.isnan(table)
        relative = self.combine == "majority" or self.scale != "raw"
        alone = relative and there.any(axis=0).sum() < 2
        if self.combine == "majority":
            values = majorities(table, self.weights)
        elif self.combine == "minimum":
            values = np.where(there, scaled, math.inf).min(axis=0)  # one that no judge scored abstains below
        else:
            weights = there * self.weights[:, None]
            values = (weights * np.where(there, scaled, 0.0)).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-300)
        apart = disagreements(table)
        return [
            _faults(said, i) if not there[:, i].any()
            else ALONE if alone or math.isnan(values[i])
            else Opinion(float(values[i]), _details(table[:, i], apart[i]))
            for i in range(table.shape[1])
        ]  # fmt: skip


def prompts_at_once(judges: Sequence[AskedJudge]) -> int | None:
    """How many prompts keep the threads of all of `judges` busy for some calls; None: all."""
    sizes = [None if judge.batch is None else judge.batch * judge.concurrent for judge in judges]
    known = [size for size in sizes if size is not None]
    most = max(known, default=1)
    return None if len(known) < len(sizes) else most * (CALLS_AHEAD if most > 1 else 1)


def _weights(weights: Sequence[float] | None, n: int, combine: str) -> list[float]:
    if weights is None:
        return [1.0] * n
    if combine == "minimum":
        raise JudgeError("PanelJudge: minimum takes no weights")
    numbers = isinstance(weights, list | tuple) and all(
        isinstance(w, int | float) and not isinstance(w, bool) and 0.0 < w < math.inf for w in weights
    )
    if not numbers or len(weights) != n:
        raise JudgeError(f"PanelJudge: weights must be {n} numbers above 0, one a judge, found {weights!r:.60}")
    return [float(weight) for weight in weights]


def _faults(said: Sequence[Answers], i: int) -> Abstention:
    """Why candidate `i` has no score: the first judge's reason."""
    return next(answer for row in said if isinstance(answer := row[i], Abstention))


def _details(scores: Table, disagreement: float) -> dict[str, float | None]:
    own = {f"judge_{m}": None if math.isnan(score) else float(score) for m, score in enumerate(scores)}
    return {**own, "disagreement": None if math.isnan(disagreement) else float(disagreement)}
