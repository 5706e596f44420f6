"""What a judge is. A user's judge imports this (by way of `online_dpo.judging`) and nothing else of the project.

A judge scores the candidates of one prompt (`PointwiseJudge`) or compares two of them (`PairwiseJudge`). What it
cannot judge becomes an abstention with a reason, never a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TypeAlias

from online_dpo.types import Candidate, Message, Prompt


@dataclass(frozen=True, slots=True)
class Abstention:
    """A judge's "I cannot judge this one", with the reason in a few constant words (reasons are counted).

    `passing`: asking again may go better (a lost connection, a time limit), so the cache does not keep it.
    """

    reason: str
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Opinion:
    """A score, or a probability, with what is worth keeping beside it (stored with the verdict as JSON)."""

    value: float
    details: Mapping[str, float | str | bool | None] = field(default_factory=dict)


Score: TypeAlias = float | Opinion | Abstention | None
Item: TypeAlias = tuple[Prompt, Sequence[Candidate]]
Comparison: TypeAlias = tuple[Prompt, Candidate, Candidate]
Disagreement: TypeAlias = Literal["average", "tie", "abstain"]


class LiveModel(Protocol):
    """The policy that sampled the round, in the engine that sampled it: what a self-judging policy is asked by."""

    def generate(
        self, chats: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[str | None]:
        """One answer a chat; `seeds[i]` is chat i's. None where the chat is too long for the engine."""

    def score(
        self, chats: Sequence[Sequence[Message]], continuations: Sequence[Sequence[str]]
    ) -> list[list[float] | None]:
        """log π(continuation | chat), summed over its tokens (nats): one list a chat, one value a continuation.

        None where the chat is too long for the engine.
        """


class BaseJudge:
    """What both kinds of judge tell the framework. All of it is optional."""

    concurrent: int = 1
    """How many calls may run at once, in threads: for judges that wait for a network. With `each_alone` and one prompt
    a call, each candidate is a call of its own."""

    cached: ClassVar[bool] = True
    """Whether answers are kept on disk. Turn it off where asking is as cheap as looking up, or where an answer depends
    on more than the prompt's id and messages and the candidates' texts, tokens and finish reasons (their log-probs)."""

    own_process: ClassVar[bool] = False
    """Whether a run gives the judge a Ray actor of its own (`actor:` in the experiment does so for any judge)."""

    uses_policy: ClassVar[bool] = False
    """Whether the round's source policy is part of the judge: `attach` gives it before every round."""

    uncounted: tuple[str, ...] = ()
    """What it spends and cannot count (a cost without prices): a budget for it would never hold, and is refused."""

    relative: ClassVar[bool] = False
    """Whether a candidate's score means something only beside the others of its prompt (a rank, a share of wins).
    Held-out answers are then compared with the initial policy's, as a `PairwiseJudge`'s always are."""

    code_params: ClassVar[tuple[str, ...]] = ()
    """Constructor keys whose value names code as "module:name": its source file is part of the judge's digest."""

    file_params: ClassVar[tuple[str, ...]] = ()
    """Constructor keys that name a file or folder, or a list of them. Each is searched beside the experiment first,
    the constructor gets the path that was found (else the value as it stands), and what lies there is part of the
    digest."""

    judge_params: ClassVar[tuple[str, ...]] = ()
    """Constructor keys that hold another judge, or a list of judges, as an experiment writes them. The constructor
    gets each as an `AskedJudge`: both orders, cache and abstentions are seen to."""

    neutral_params: ClassVar[tuple[str, ...]] = ()
    """Constructor keys that change no verdict (batch size, retries): not part of the digest."""

    data_files: ClassVar[tuple[Path, ...]] = ()
    """Files of the judge's own that decide verdicts (a prompt template): part of the digest."""

    def ledger(self) -> dict[str, float]:
        """What was spent since the last call of `ledger`, in amounts that add up: {"calls": 3, "cost": 0.002}."""
        return {}

    def attach(self, model: LiveModel) -> None:
        """Take the round's source policy (only called where `uses_policy`)."""
        raise NotImplementedError(f"{type(self).__name__} does not define attach")


class PointwiseJudge(BaseJudge):
    """Scores each candidate of a prompt; higher is better, in any unit that is the same for all prompts.

    Override `score`, or `score_batch` where many prompts at once are faster (then set `batch_prompts`); each has a
    default that calls the other. An exception makes what was asked abstain; raise `JudgeError` to end the run.
    """

    batch_prompts: int | None = 1
    """How many prompts one call of `score_batch` takes; None: all of the round."""

    each_alone: ClassVar[bool] = False
    """Whether a candidate's score is the same whatever other candidates stand beside it: cached one by one then."""

    def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Sequence[Score]:
        """One score per candidate, in their order; None or `Abstention` where it cannot judge one."""
        return self.score_batch([(prompt, candidates)])[0]

    def score_batch(self, items: Sequence[Item]) -> Sequence[Sequence[Score]]:
        """The scores of several prompts' candidates: one sequence per item, as `score` gives it."""
        return [self.score(prompt, candidates) for prompt, candidates in items]


class PairwiseJudge(BaseJudge):
    """Compares two candidates. Override `prefer`, or `prefer_batch` (then set `batch_comparisons`).

    The framework asks for both orders: with p = prefer(a, b) and q = prefer(b, a), a beats b with (p + 1 − q)/2.
    """

    batch_comparisons: int | None = 1
    """How many comparisons one call of `prefer_batch` takes; None: all that are known."""

    both_orders: ClassVar[bool] = True
    """False where prefer(b, a) = 1 − prefer(a, b) by construction: it is asked once then."""

    disagreement: Disagreement = "average"
    """When both orders prefer the first place, or both the second: the mean as above, a tie (½), or an abstention."""

    def prefer(self, prompt: Prompt, first: Candidate, second: Candidate) -> Score:
        """The probability in [0, 1] that `first` is better; None or `Abstention` where it cannot tell."""
        return self.prefer_batch([(prompt, first, second)])[0]

    def prefer_batch(self, comparisons: Sequence[Comparison]) -> Sequence[Score]:
        """One probability per comparison, as `prefer` gives it."""
        return [self.prefer(prompt, first, second) for prompt, first, second in comparisons]


Judge: TypeAlias = PointwiseJudge | PairwiseJudge
