"""Sequence classifiers for judges, and for training them: loading, token ids, one padded forward."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.errors import JudgeError, one_line
from online_dpo.judging import Abstention
from online_dpo.types import Message

if TYPE_CHECKING:
    import torch

EMPTY = Abstention("nothing to read for the reward model")
HUB_TIMEOUT_S = 5.0
"""Seconds the hub has to answer."""
_SURROGATES = re.compile("[\ud800-\udfff]")


class Classifier:
    """A classifier's folder or hub id `model`, checked at once and loaded at the first forward.

    Weights are float32 on a CPU (half precision is many times slower there), in the checkpoint's own dtype elsewhere;
    safetensors alone, since unpickling runs code. `judge` is the name that errors begin with.
    """

    def __init__(
        self,
        judge: str,
        model: str,
        *,
        batch_size: int,
        device: str,
        max_length: int | None,
        revision: str | None,
        trust_remote_code: bool,
    ) -> None:
        """Raises `JudgeError` for a size below 1, or when there is no such model."""
        for key, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise JudgeError(f"{judge}: {key} must be a whole number from 1, found {value!r}")
        self.judge = judge
        self.name = model
        self.folder = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
        self.batch_size = batch_size
        self.device = device
        self.max_length = max_length
        self.away: str | None = None
        self.hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        if not Path(self.folder).is_dir():
            self._look_for(model, revision)
        self.outputs = self._outputs()
        self._loaded: tuple[Any, Any] | None = None

    @property
    def model(self) -> Any:
        """The model, in evaluation mode on its device."""
        return self._load()[0]

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        return self._load()[1]

    @property
    def limit(self) -> int:
        """The most tokens that are read."""
        return token_limit(self.model.config, self.tokenizer, self.max_length)

    def logits(self, rows: Sequence[Sequence[int]]) -> list[list[float] | Abstention]:
        """All outputs of each row of token ids; an `Abstention` for a row that is too long, or empty.

        A cut text would be another text. Like lengths together waste little padding; longest first, so that too
        little memory shows at once.
        """
        import torch

        long = Abstention(f"longer than the reward model's {self.limit} tokens")
        found: list[list[float] | Abstention] = [long if row else EMPTY for row in rows]
        readable = (i for i, row in enumerate(rows) if 0 < len(row) <= self.limit)
        order = sorted(readable, key=lambda i: len(rows[i]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            with torch.no_grad():
                values = forward(self.model, self.tokenizer, [rows[i] for i in places]).cpu().tolist()
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

    def _look_for(self, model: str, revision: str | None) -> None:
        """Of a model that is no folder here: whether the hub gives it; else its cache on this machine may have it."""
        from huggingface_hub import HfApi

        try:
            # Asked first and with a limit: loading waits, and tries again for half a minute.
            HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S)
        except ValueError as error:  # of the name's form
            raise JudgeError(
                f"{self.judge}: cannot load '{model:.200}': no such folder, and no hub id (org/name)"
            ) from error
        except Exception as error:  # the hub's client raises its HTTP library's errors, which differ between versions
            self.away = one_line(error)
            self.hub["local_files_only"] = True

    def _outputs(self) -> int:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.folder, **self.hub)
        except Exception as error:  # remote code may raise anything
            raise self._unloadable(error) from error
        return int(config.num_labels)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            device = self.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = torch.float32 if device == "cpu" else "auto"
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.hub)
                with _without_report():
                    model, report = AutoModelForSequenceClassification.from_pretrained(
                        self.folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **self.hub
                    )
                model = model.to(device).eval()
            except Exception as error:  # every later score would fail alike: end the run instead of abstaining
                raise self._unloadable(error) from error
            if report["missing_keys"]:
                missing = ", ".join(sorted(report["missing_keys"])[:3])
                raise JudgeError(f"{self.judge}: '{self.name}' lacks weights ({missing}): its scores would be random")
            self._loaded = model, tokenizer
        return self._loaded

    def _unloadable(self, error: Exception) -> JudgeError:
        if self.away is not None and isinstance(error, OSError):
            return JudgeError(
                f"{self.judge}: '{self.name}' is no folder here, and the hub does not give it ({self.away}): download "
                "it on another machine and give the folder's path"
            )
        return JudgeError(f"{self.judge}: cannot load '{self.name}': {one_line(error)}")


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers without its table of missing weights, which are an error here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def token_limit(config: Any, tokenizer: Any, most: int | None = None) -> int:
    """The most tokens that a model of `config` can read (tokenizers say 1e30 for "not known"), `most` at the most."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    known = [n for n in (most, positions, tokenizer.model_max_length) if n is not None and n > 0]
    return int(min(known))


def chat_ids(tokenizer: Any, messages: Sequence[Message], answer: str) -> list[int]:
    """Token ids of a prompt's messages and an answer to it.

    The tokenizer's chat template is put around them; where it has none, the messages (joined by newlines) and the
    answer follow each other directly.
    """
    if not tokenizer.chat_template:
        text = "\n".join(message.content for message in messages) + answer
        return text_ids(tokenizer, plain(tokenizer, text))
    chat = [*messages, Message("assistant", answer)]
    turns = [{"role": turn.role, "content": plain(tokenizer, turn.content)} for turn in chat]
    # A template writes its special tokens itself; a second begin token would be noise.
    return text_ids(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False), special=False)


def text_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of `text`, with the tokenizer's own begin and end tokens where `special`. Never cut."""
    # verbose=False: a text above the model's length is no error here, whoever asked looks at the length.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def plain(tokenizer: Any, text: str) -> str:
    """`text` as ordinary text: special tokens that it spells out get a space inside, half characters become U+FFFD.

    An answer that spells an end of turn would otherwise end its turn and write the next one.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelled = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
    if spelled:
        text = re.sub("|".join(map(re.escape, spelled)), lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return _SURROGATES.sub("\ufffd", text)


def forward(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The model's logits of `rows` as one right-padded batch: (rows, outputs), float32."""
    config = model.config.get_text_config()
    own = config.pad_token_id
    # Decoder classifiers read the logit at the last token that differs from config.pad_token_id.
    pad = own if own is not None else _pad_id(tokenizer, rows)
    config.pad_token_id = pad
    ids, mask = _padded(rows, pad)
    try:
        output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    finally:
        config.pad_token_id = own
    logits: torch.Tensor = output.logits.float()
    return logits


def _pad_id(tokenizer: Any, rows: Sequence[Sequence[int]]) -> int:
    """A padding id for a model that has none: the tokenizer's, else its end token, else any.

    A model without a padding id reads its logit at the very last token, so none of the rows may end in the id.
    """
    last = {row[-1] for row in rows}
    wanted = [tokenizer.pad_token_id, tokenizer.eos_token_id, *range(len(last) + 1)]
    return next(int(token) for token in wanted if token is not None and token not in last)


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest), int64, padded on the right."""
    import torch

    longest = max(len(row) for row in rows)
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
