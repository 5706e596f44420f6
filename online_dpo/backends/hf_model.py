"""Loading a Hugging Face causal language model the same way in the learner and in the transformers engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from online_dpo.dropout_rates import is_rate
from online_dpo.errors import ModelError, one_line


def load_causal_lm(path: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model in folder `path`, in evaluation mode, every dropout at zero, soft-capped scores capped.

    DPO compares log-probs of one text under two policies: dropout noise in either would be taken for preference.
    Raises `ModelError` when transformers cannot load the folder.
    """
    model = read_causal_lm(path, dtype, trust_remote_code)
    silence_dropout(model)
    return model


def read_causal_lm(path: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """`load_causal_lm` with the model's own dropout rates, which `silence_dropout` returns."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model: nn.Module
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a causal language model from {path}: {one_line(error, 300)}") from error
    if report["missing_keys"]:
        lacking = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"{path} lacks weights ({lacking}): they would be random")
    if getattr(model.config, "attn_logit_softcapping", None):
        # transformers' default attention leaves the cap out: other log-probs than the model was trained to.
        model.set_attn_implementation("eager")  # type: ignore[operator]
    return model.eval()


class DropoutRate(NamedTuple):
    """`holder`.`name` (of a layer, or of a configuration) was `value` > 0."""

    holder: Any
    name: str
    value: float


def silence_dropout(model: nn.Module) -> list[DropoutRate]:
    """Set every dropout rate to zero: layers, and rates that modules or their configuration keep as plain numbers.

    "drop" alone is looked for, since whole layers are skipped by a rate called `layerdrop`. Returns the rates above
    zero that the model reads, for `set_dropout`.
    """
    found = []
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                layer = isinstance(holder, _DropoutNd) and name == "p"
                if isinstance(value, float) and (layer or "drop" in name):
                    found.append(DropoutRate(holder, name, value))
                    setattr(holder, name, 0.0)
    return [rate for rate in found if rate.value > 0 and (rate.name == "p" or is_rate(rate.name))]


def set_dropout(rates: Iterable[DropoutRate], *, on: bool) -> None:
    """Put `rates` back as they were, or to zero."""
    for holder, name, value in rates:
        setattr(holder, name, value if on else 0.0)


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """`name` as a dtype; "auto" is bfloat16 on a GPU that has it and float32 on a CPU.

    On CPUs without bfloat16 units, bfloat16 matrix products run several times slower than float32.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
