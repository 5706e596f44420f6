"""Judges an answer by a reward model: a Hugging Face sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.errors import JudgeError, one_line
from online_dpo.judging import Abstention, Item, PointwiseJudge, Score
from online_dpo.types import Candidate, Prompt

if TYPE_CHECKING:
    import torch


class RewardModelJudge(PointwiseJudge):
    """The reward model's single logit of prompt and answer, in the model's own units.

    `model` is a local folder or a hub id. Its own tokenizer's chat template is put around the prompt's messages and
    the answer; where it has none, the messages (joined by newlines) and the answer follow each other directly.
    An answer too long for the model, or for `max_length` tokens, abstains: a cut one would be another answer.
    Weights are loaded at the first score: float32 on CPU, the checkpoint's own dtype elsewhere.

    Constructing raises `JudgeError` when there is no such model or it does not have exactly one output; the first
    score does when its weights are incomplete.
    """

    batch_prompts = 32

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 8,
        device: str = "auto",
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        for key, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise JudgeError(f"RewardModelJudge: {key} must be a whole number from 1, found {value!r}")
        self.name = model
        self.folder = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
        self.batch_size = batch_size
        self.device = device
        self.max_length = max_length
        self.hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._check_outputs()
        self._loaded: tuple[Any, Any] | None = None

    def score_batch(self, items: Sequence[Item]) -> list[Sequence[Score]]:
        """One score per candidate of each item, in the model's units; an `Abstention` for what is too long."""
        model, tokenizer = self._load()
        texts = [self._token_ids(tokenizer, prompt, answer) for prompt, answers in items for answer in answers]
        limit = self._limit(model, tokenizer)
        scores: list[Score] = [Abstention(f"longer than the reward model's {limit} tokens")] * len(texts)
        # Like lengths together waste little padding; longest first, so that too little memory shows at once.
        order = sorted((i for i, ids in enumerate(texts) if len(ids) <= limit), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            for place, score in zip(places, _forward(model, tokenizer, [texts[i] for i in places]), strict=True):
                scores[place] = score
        rest = iter(scores)
        return [[next(rest) for _ in answers] for _, answers in items]

    def _check_outputs(self) -> None:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.folder, **self.hub)
        except Exception as error:  # remote code may raise anything
            raise self._unloadable(error) from error
        if config.num_labels != 1:
            raise JudgeError(
                f"RewardModelJudge: '{self.name}' has {config.num_labels} outputs; a reward model has 1 (num_labels)"
            )

    def _load(self) -> tuple[Any, Any]:
        """Model and tokenizer, loaded once."""
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = torch.float32 if device == "cpu" else "auto"  # half precision is many times slower on a CPU
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.hub)
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    self.folder, dtype=dtype, output_loading_info=True, **self.hub
                )
                model = model.to(device).eval()
            except Exception as error:  # every later score would fail alike: end the run instead of abstaining
                raise self._unloadable(error) from error
            if report["missing_keys"]:
                missing = ", ".join(sorted(report["missing_keys"])[:3])
                raise JudgeError(
                    f"RewardModelJudge: '{self.name}' lacks weights ({missing}): its scores would be random"
                )
            self._loaded = model, tokenizer
        return self._loaded

    def _unloadable(self, error: Exception) -> JudgeError:
        return JudgeError(f"RewardModelJudge: cannot load '{self.name}': {one_line(error)}")

    def _token_ids(self, tokenizer: Any, prompt: Prompt, answer: Candidate) -> list[int]:
        if tokenizer.chat_template:
            chat = [{"role": message.role, "content": message.content} for message in prompt.messages]
            chat.append({"role": "assistant", "content": answer.text})
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        else:
            text = "\n".join(message.content for message in prompt.messages) + answer.text
        # A template writes its special tokens itself; a second begin token would be noise.
        ids: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        return ids

    def _limit(self, model: Any, tokenizer: Any) -> int:
        """The most tokens that the model can read (tokenizers say 1e30 for "not known")."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        known = [n for n in (self.max_length, positions, tokenizer.model_max_length) if n is not None and n > 0]
        return int(min(known))


def _forward(model: Any, tokenizer: Any, texts: Sequence[Sequence[int]]) -> list[float]:
    """The model's logit of each text in one right-padded batch."""
    import torch

    config = model.config.get_text_config()
    own = config.pad_token_id
    # Decoder classifiers read the logit at the last token that differs from config.pad_token_id.
    pad = own if own is not None else _pad_id(tokenizer, texts)
    config.pad_token_id = pad
    ids, mask = _padded(texts, pad)
    try:
        with torch.no_grad():
            output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    finally:
        config.pad_token_id = own
    scores: list[float] = output.logits[:, 0].float().cpu().tolist()
    return scores


def _pad_id(tokenizer: Any, texts: Sequence[Sequence[int]]) -> int:
    """A padding id for a model that has none: the tokenizer's, else its end token, else any.

    A model without a padding id reads its logit at the very last token, so none of the texts may end in the id.
    """
    last = {ids[-1] for ids in texts if ids}
    wanted = [tokenizer.pad_token_id, tokenizer.eos_token_id, *range(len(last) + 1)]
    return next(int(token) for token in wanted if token is not None and token not in last)


def _padded(texts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (texts, longest), int64, padded on the right."""
    import torch

    longest = max(len(ids) for ids in texts)
    rows = [[*ids, *[pad] * (longest - len(ids))] for ids in texts]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts]
    return torch.tensor(rows), torch.tensor(mask)
