"""The nouns of the loop as frozen records. Everything that a stage saves is made of these.

Token ids are the sampled ones, end to end: text is for judges and people and is never tokenised again.
Log-probs are natural logarithms, one per completion token, of the model's own distribution
(before temperature and top-p), in the dtype that the engine computed them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat prompt."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, tokenised once.

    `token_ids` are what the engine receives (chat template applied, begin token at most once).
    A plain-text prompt (no chat template) has one `user` message holding its text.
    """

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]

    @property
    def text(self) -> str:
        """The last message's content: what a judge or a reader wants to see first."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer. `token_ids` and `logprobs` have equal length; the end token is included when sampled."""

    prompt_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's finite score of one candidate; higher is better. `details`: what the judge says beside it."""

    prompt_id: str
    index: int
    score: float
    details: Mapping[str, float | str | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Abstain:
    """A judge declined, or failed, on one candidate. Never turned into a score."""

    prompt_id: str
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two candidates of one prompt: `chosen` scored higher than `rejected` by `margin` > 0."""

    prompt: Prompt
    chosen: Candidate
    rejected: Candidate
    chosen_score: float
    rejected_score: float

    @property
    def margin(self) -> float:
        """Score difference chosen − rejected, in the judge's units."""
        return self.chosen_score - self.rejected_score


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt's answers that have a score, two or more: what a policy gradient compares with each other."""

    prompt: Prompt
    candidates: tuple[Candidate, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed token sequence and its log-probs under a policy: tells which weights an engine holds.

    `logprobs[i]` is log π(token_ids[i+1] | token_ids[:i+1]); one shorter than `token_ids`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """Weights with an id and a digest.

    `path` is a Hugging Face folder: a whole model, or a LoRA adapter when `adapter` is true, in which
    case the weights are those of the run's initial model with that adapter.
    `digest` is the SHA-256 over the folder's weight and configuration files (`online_dpo.models.digest_folder`).
    """

    id: str
    path: Path
    digest: str
    adapter: bool = False
    probe: Probe | None = None
