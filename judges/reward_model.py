"""Judges an answer by a reward model: a Hugging Face sequence classifier with one output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from judges._classifier import Classifier, chat_ids
from online_dpo.errors import JudgeError
from online_dpo.judging import Abstention, Item, PointwiseJudge, Score
from online_dpo.types import Candidate


class RewardModelJudge(PointwiseJudge):
    """The reward model's single logit of prompt and answer, in the model's own units.

    `model` is a local folder or a hub id. Its own tokenizer's chat template is put around the prompt's messages and
    the answer; where it has none, the messages (joined by newlines) and the answer follow each other directly.
    An answer too long for the model, or for `max_length` tokens, abstains: a cut one would be another answer.
    Weights are loaded at the first score: float32 on CPU, the checkpoint's own dtype elsewhere.

    Scores are (logit − `score_mean`) / `score_std`, less `no_end_penalty` where the answer did not end by itself
    (`finish_reason` is not "stop"). The penalty is in the units of the score, after the division. It is the "EOS
    trick" of Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO": a reward model was trained on whole
    answers and says little of one that was cut off. `online-dpo judge train` writes a mean and a deviation to use.

    Constructing raises `JudgeError` when there is no such model or it does not have exactly one output; the first
    score does when its weights are incomplete.
    """

    batch_prompts = 32
    each_alone = True
    own_process = True
    file_params: ClassVar[tuple[str, ...]] = ("model",)
    # Not `device`: it decides the dtype, and with it the scores' last digits.
    neutral_params: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __init__(
        self,
        model: str,
        *,
        score_mean: float = 0.0,
        score_std: float = 1.0,
        no_end_penalty: float = 0.0,
        batch_size: int = 8,
        device: str = "auto",
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.mean = _number("score_mean", score_mean)
        self.std = _number("score_std", score_std)
        self.penalty = _number("no_end_penalty", no_end_penalty)
        if self.std <= 0.0 or self.penalty < 0.0:
            raise JudgeError("RewardModelJudge: score_std must be above 0 and no_end_penalty at least 0")
        self.classifier = Classifier(
            "RewardModelJudge",
            model,
            batch_size=batch_size,
            device=device,
            max_length=max_length,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if self.classifier.outputs != 1:
            raise JudgeError(
                f"RewardModelJudge: '{model}' has {self.classifier.outputs} outputs; a reward model has 1 (num_labels)"
            )

    def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
        """One score per candidate of each item; an `Abstention` for what is too long."""
        tokenizer = self.classifier.tokenizer
        texts = [chat_ids(tokenizer, prompt.messages, answer.text) for prompt, answers in items for answer in answers]
        logits = iter(self.classifier.logits(texts))
        return [[self._score(next(logits), answer) for answer in answers] for _, answers in items]

    def _score(self, logits: list[float] | Abstention, answer: Candidate) -> Score:
        if isinstance(logits, Abstention):
            return logits
        score = (logits[0] - self.mean) / self.std
        return score if answer.finish_reason == "stop" else score - self.penalty


def _number(key: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise JudgeError(f"RewardModelJudge: {key} must be a number, found {value!r}")
    return float(value)
