"""A transformer with a scalar head, in training: a fresh head or the folder's own, all weights or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from online_dpo.backends.hf_model import torch_dtype
from online_dpo.errors import ModelError, one_line
from online_dpo.judging import import_object
from online_dpo.models import load_tokenizer

HEADS = ("score", "classifier")
"""What transformers calls the layers that give a sequence its outputs."""


class RewardNetwork:
    """Float32 weights; the training forward runs in bfloat16 on a GPU that has it.

    Dropout stays off: it would make the result depend on how a batch is cut up.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        lora_rank: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Raises `ModelError` when `folder` cannot be loaded as a sequence classifier with one output."""
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch_dtype("auto", self.device)
        self.tokenizer: Any = load_tokenizer(folder)
        self.lora = lora_rank is not None
        self._forward = import_object("judges._classifier:forward")
        model = load_scalar_model(folder, seed)
        if lora_rank is not None:
            model = _with_adapter(model, lora_rank, seed)
        self.model: Any = model.to(self.device).eval()

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training moves."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def rewards(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The reward of each row of token ids, shape [rows], float32, with gradients."""
        with nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype):
            logits: Tensor = self._forward(self.model, self.tokenizer, rows)
        return logits[:, 0].float()

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        """The same without gradients and in float32, as a judge reads what `save` writes; batched by length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        found = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            values = self._forward(self.model, self.tokenizer, [rows[i] for i in places])[:, 0].cpu().tolist()
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

    def merge(self) -> None:
        """Put the adapter, if there is one, into the weights. Training is over then."""
        if self.lora:
            self.model = self.model.merge_and_unload()
            self.lora = False

    def save(self, out: Path) -> None:
        """An ordinary folder in `out`: safetensors, configuration with one output, tokenizer."""
        self.merge()
        self.model.save_pretrained(out, safe_serialization=True)
        self.tokenizer.save_pretrained(out)


def load_scalar_model(folder: Path, seed: int) -> Any:
    """The model in `folder` as a sequence classifier with one output.

    A head that the folder lacks is drawn with `seed`: weights from N(0, 1/(d + 1)), d their inputs, biases zero
    (Stiennon et al. 2020, "Learning to summarize from human feedback", app. B.1): one reward is then about as large as
    one number of the last layer.
    Raises `ModelError` when it does not load, or lacks more than a head.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that the head is new is meant
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load a reward model from {folder}: {one_line(error, 300)}") from error
    finally:
        logging.set_verbosity(level)
    missing = set(report["missing_keys"])
    body = sorted(name for name in missing if name.startswith(f"{model.base_model_prefix}.") and "pooler" not in name)
    if body:
        raise ModelError(f"{folder} lacks weights ({', '.join(body[:3])})")
    _draw({name: p for name, p in model.named_parameters() if name in missing}, seed)
    return model


def _draw(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            if parameter.dim() < 2:
                parameter.zero_()
            else:
                parameter.normal_(0.0, (parameter.shape[-1] + 1) ** -0.5, generator=generator)


def _with_adapter(model: Any, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    heads = [name for name in HEADS if hasattr(model, name)]
    if not heads:
        raise ModelError(f"no LoRA adapter for {type(model).__name__}: its head is not called {' or '.join(HEADS)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=heads,
        task_type="SEQ_CLS",
    )
    torch.manual_seed(seed)  # of the adapter's A matrices
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"no LoRA adapter for this model: {one_line(error)}") from error
