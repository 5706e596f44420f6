"""The LoRA adapter that an experiment asks for, put on a model; what the engine could not take is refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from online_dpo.backends.hf_model import silence_dropout
from online_dpo.config import LoraSpec
from online_dpo.errors import ModelError, nearest, one_line

ALL = "all-linear"


def with_adapter(model: Any, lora: LoraSpec, model_name: str) -> Any:
    """`model` with a fresh adapter, in evaluation mode; `model_name` is what the adapter says it sits on.

    Raises `ModelError`: a name in `lora.target_modules` that no module has, or one of an embedding or the output head.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # GPT-2's linear layers hold their matrix the other way round: peft says that it sees to it.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            wrapped: Any = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.target_modules {lora.target_modules!r}: {one_line(error)}") from error
    # Where the base lies differs from machine to machine; the run's manifest names it by digest.
    wrapped.peft_config["default"].base_model_name_or_path = model_name
    # peft holds the names as a set, which another process would write in another order: another digest.
    named = wrapped.peft_config["default"].target_modules
    wrapped.peft_config["default"].target_modules = named if isinstance(named, str) else sorted(named)
    silence_dropout(wrapped)
    return wrapped.eval()


def _check_targets(model: Any, targets: str | list[str]) -> None:
    """As peft reads them: a list of modules' names or ends of names, or one regular expression of whole names.

    peft passes over a name in the list that no module has, as long as another one is there.
    """
    if targets == ALL:
        return
    modules = dict(model.named_modules())
    if not targets:
        raise ModelError(f"lora.target_modules: no module is named; write '{ALL}' for all linear layers")
    for target in [targets] if isinstance(targets, str) else targets:
        found = [name for name in modules if _matches(target, name, whole=isinstance(targets, str))]
        if not found:
            linear = [name for name, m in modules.items() if _is_linear(m) and m is not model.get_output_embeddings()]
            ends = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise ModelError(
                f"lora.target_modules: the model has no module '{target}'{nearest(target, [*ends, ALL])}; its linear "
                f"layers: {', '.join(ends)}"
            )
        for name in found:
            _check_inside(model, modules[name], name)


def _check_inside(model: Any, module: nn.Module, name: str) -> None:
    if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
        raise ModelError(
            f"lora.target_modules: '{name}' is the model's embedding or output head, which an adapter is not put on "
            "here (an engine could not take it): name layers between them, or train without lora"
        )
    if not _is_linear(module):
        raise ModelError(f"lora.target_modules: '{name}' is a {type(module).__name__}, not a linear layer")


def _is_linear(module: nn.Module) -> bool:
    """Whether it is one matrix, or one convolution, and nothing else: what an adapter can stand beside."""
    weight = getattr(module, "weight", None)
    alone = not isinstance(module, nn.Embedding) and not any(True for _ in module.children())
    return alone and isinstance(weight, nn.Parameter) and weight.dim() > 1


def _matches(target: str, name: str, *, whole: bool) -> bool:
    if not whole:
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise ModelError(f"lora.target_modules: '{target}' is no regular expression: {error}") from error
