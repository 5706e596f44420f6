"""Faults that a first training script often has, to be switched on on purpose: an arm each shows what each costs."""

from __future__ import annotations

from pydantic import Field

from online_dpo.spec import Spec

WORDS = {
    "score_prompt": "the prompt is scored",
    "score_padding": "padding is scored",
    "dropout": "dropout is on (plain layout, first step not held against the reference)",
}


class FaultsSpec(Spec):
    """All off. Whatever is on is said with the loss: by `check`, before each round, in figures and model cards."""

    score_prompt: bool = Field(
        default=False, description="the prompt's tokens, but for the first, are scored with the completion's"
    )
    score_padding: bool = Field(
        default=False, description="the shorter answer of a pair is filled up with padding, which is scored as text"
    )
    dropout: bool = Field(default=False, description="the model's own dropout is on while the policy trains")

    @property
    def on(self) -> tuple[str, ...]:
        """The keys that are switched on."""
        return tuple(key for key in WORDS if getattr(self, key))

    @property
    def of_text(self) -> bool:
        """Whether other tokens than the completions' are scored: log-probs stored at sampling are not of them."""
        return self.score_prompt or self.score_padding

    def describe(self) -> str:
        """What is wrong, in words; empty where nothing is."""
        return ", ".join(WORDS[key] for key in self.on)
