"""What a chat endpoint sends back, checked: nothing of it is trusted to have the form that it should have."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class TopToken(_Part):
    """A token that could have come, with its log-probability (nats). NaN passes: whoever reads it must look."""

    token: str
    logprob: float


class Token(TopToken):
    """The token that came, and the likeliest at its place."""

    top_logprobs: list[TopToken] = []


class _Message(_Part):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Part):
    message: _Message
    finish_reason: str | None = None
    logprobs: Any = None


class _Usage(_Part):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class Reply(_Part):
    """One answer. `usage` is None where the server does not count tokens, `model` is what it says that it served."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
    model: str | None = None

    @property
    def text(self) -> str:
        """The model's text; empty where there is none."""
        return self.choices[0].message.content or ""

    @property
    def stop(self) -> str:
        """Why it ended: "stop", "length", "content_filter", "refusal", or a word of the server's own."""
        refused = self.choices[0].message.refusal
        return "refusal" if refused else self.choices[0].finish_reason or ""

    @property
    def tokens(self) -> list[Token] | None:
        """The tokens with their log-probs; None where there are none, or not in the form of this interface.

        The log-prob of the token that came tells nothing of the others: without `top_logprobs` there are none.
        """
        raw = self.choices[0].logprobs
        content = raw.get("content") if isinstance(raw, dict) else None
        try:
            tokens = [Token.model_validate(token) for token in content] if isinstance(content, list) else []
        except ValidationError:
            return None
        return tokens if any(token.top_logprobs for token in tokens) else None


def parse_reply(body: str) -> Reply | None:
    """The reply in `body`; None where it is not one (an error page, cut-off JSON)."""
    try:
        return Reply.model_validate_json(body)
    except ValidationError:
        return None
