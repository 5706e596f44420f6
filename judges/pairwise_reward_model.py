"""Compares two answers by a reward model that reads the prompt and both of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import Formatter
from typing import Any, ClassVar

from judges._classifier import Classifier, plain, text_ids
from online_dpo.errors import JudgeError, nearest
from online_dpo.judging import Abstention, Comparison, PairwiseJudge, Score
from online_dpo.types import Candidate, Prompt

FIELDS = ("prompt", "first", "second", "sep", "cls")
PAIRRM_TOKENS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
PAIRRM_LAYOUT = "<|source|>{prompt}{sep}{cls}<|candidate1|>{first}{sep}{cls}<|candidate2|>{second}"
PLAIN_LAYOUT = "{prompt}{sep}{first}{sep}{second}"
Part = tuple[str, str | None]
"""Text of a layout, and the field that follows it."""


class PairwiseRewardModelJudge(PairwiseJudge):
    """P(first is better) by a sequence classifier that reads prompt, first and second answer in one text.

    One logit d: σ(d). Two logits: softmax, of which output `first_output` stands for "the first is better". Such
    models (Jiang et al. 2023, "LLM-Blender", sec. 3) need not give 1 − p for the other order: both are asked for.

    `layout` is the text that the model reads, with fields {prompt}, {first} and {second}, and {sep} and {cls} for the
    tokenizer's separator (its end token, else a newline, where it has none) and its classification token (empty where
    it has none); {{ and }} are braces. The tokenizer adds its own begin and end tokens. The default is PairRM's
    layout where the tokenizer has PairRM's three marks, else prompt, first and second with {sep} between them.
    A prompt of one message is its content; one of several is lines of "role: content".
    What is too long for the model, or for `max_length` tokens, abstains. Weights are loaded at the first comparison:
    float32 on CPU, the checkpoint's own dtype elsewhere.

    Constructing raises `JudgeError` when there is no such model, it has neither one nor two outputs, or the layout is
    wrong; the first comparison does when its weights are incomplete.
    """

    batch_comparisons = 32
    own_process = True
    file_params: ClassVar[tuple[str, ...]] = ("model",)
    # Not `device`: it decides the dtype, and with it the probabilities' last digits.
    neutral_params: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __init__(
        self,
        model: str,
        *,
        layout: str | None = None,
        first_output: int = 0,
        batch_size: int = 8,
        device: str = "auto",
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if isinstance(first_output, bool) or first_output not in {0, 1}:
            raise JudgeError(f"PairwiseRewardModelJudge: first_output must be 0 or 1, found {first_output!r}")
        self.first_output = first_output
        self.layout = None if layout is None else parse_layout(layout)
        self.classifier = Classifier(
            "PairwiseRewardModelJudge",
            model,
            batch_size=batch_size,
            device=device,
            max_length=max_length,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if self.classifier.outputs not in {1, 2}:
            raise JudgeError(
                f"PairwiseRewardModelJudge: '{model}' has {self.classifier.outputs} outputs; "
                "a model that compares has 1 or 2 (num_labels)"
            )

    def prefer_batch(self, comparisons: Sequence[Comparison]) -> list[Score]:
        """One probability per comparison; an `Abstention` for what is too long."""
        tokenizer = self.classifier.tokenizer
        layout = self.layout or default_layout(tokenizer)
        rows = [text_ids(tokenizer, render(layout, tokenizer, *comparison)) for comparison in comparisons]
        return [self._probability(logits) for logits in self.classifier.logits(rows)]

    def _probability(self, logits: list[float] | Abstention) -> Score:
        if isinstance(logits, Abstention):
            return logits
        if len(logits) == 1:
            return _sigmoid(logits[0])
        return _sigmoid(logits[self.first_output] - logits[1 - self.first_output])


def parse_layout(layout: str) -> list[Part]:
    """The parts of `layout`; raises `JudgeError` when it is no such text."""
    who = "PairwiseRewardModelJudge: layout"
    if not isinstance(layout, str):
        raise JudgeError(f"{who} must be text, found {layout!r}")
    try:
        parts = list(Formatter().parse(layout))
    except ValueError as error:
        raise JudgeError(f"{who} {layout!r}: {error}") from error
    for _, field, form, conversion in parts:
        if field is not None and (form or conversion):
            raise JudgeError(f"{who}: '{{{field}}}' stands alone, without conversion or format")
        if field is not None and field not in FIELDS:
            raise JudgeError(f"{who}: no field '{{{field}}}'{nearest(field, FIELDS)}; fields: {', '.join(FIELDS)}")
    missing = [field for field in FIELDS[:3] if field not in {part[1] for part in parts}]
    if missing:
        raise JudgeError(f"{who} lacks {{{missing[0]}}}")
    return [(text, field) for text, field, _, _ in parts]


def default_layout(tokenizer: Any) -> list[Part]:
    """PairRM's layout for a tokenizer that has its marks; the plain one else."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return parse_layout(PAIRRM_LAYOUT if known.issuperset(PAIRRM_TOKENS) else PLAIN_LAYOUT)


def render(layout: Sequence[Part], tokenizer: Any, prompt: Prompt, first: Candidate, second: Candidate) -> str:
    """The text that the model reads. In one pass: what an answer holds is never taken for a field or a token."""
    values = {
        "prompt": plain(tokenizer, _conversation(prompt)),
        "first": plain(tokenizer, first.text),
        "second": plain(tokenizer, second.text),
        "sep": tokenizer.sep_token or tokenizer.eos_token or "\n",
        "cls": tokenizer.cls_token or "",
    }
    return "".join(text + (values[field] if field is not None else "") for text, field in layout)


def _conversation(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return prompt.text
    return "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)


def _sigmoid(value: float) -> float:
    """σ(value) without overflow; NaN stays NaN, and becomes an abstention."""
    return 1.0 / (1.0 + math.exp(-value)) if value >= 0 else math.exp(value) / (1.0 + math.exp(value))
