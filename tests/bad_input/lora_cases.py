"""Adapters that cannot be trained, merged or served, and adapters given where a model is wanted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import Case
from tiny_models import adapter, copy, edit_json, gpt2, kept, llama

from experiments import written


def lora(**settings: Any) -> Callable[[Path], list[str]]:
    """`check` with this section `lora`."""
    return lambda folder: written(folder, lora=settings)


def of_gpt2(**settings: Any) -> Callable[[Path], list[str]]:
    return lambda folder: written(folder, model=str(kept(gpt2)), lora=settings)


def adapter_as_model(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """`check` with an adapter's folder, changed, as the model."""

    def arrange(folder: Path) -> list[str]:
        change(copy(adapter, folder / "adapter"))
        return written(folder, model="adapter")

    return arrange


def more_tokens(model: Path) -> None:
    """A tokenizer with a token that the base has not, as adapters that taught one are published."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(kept(llama))
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(model)
    edit_json(model / "adapter_config.json", modules_to_save=["embed_tokens", "lm_head"])


def beside_its_base(model: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(kept(llama) / name, model)


CASES: tuple[Case, ...] = (
    Case("lora: rank 0", lora(rank=0), r"lora\.rank: .*greater than or equal to 1.*found 0"),
    Case("lora: a negative rank", lora(rank=-4), r"lora\.rank"),
    Case("lora: a rank of one half", lora(rank=0.5), r"lora\.rank: .*integer"),
    Case("lora: alpha 0", lora(alpha=0), r"lora\.alpha: .*greater than 0"),
    Case("lora: alpha NaN", lora(alpha=float("nan")), r"lora\.alpha"),
    Case("lora: dropout", lora(dropout=0.1), r"lora\.dropout"),
    Case("lora: a misspelt key", lora(rnak=8), r"unknown key 'lora\.rnak' \(did you mean 'rank'\?\)"),
    Case("lora: peft's name of the rank", lora(r=8), r"unknown key 'lora\.r'"),
    Case("lora: DoRA", lora(use_dora=True), r"unknown key 'lora\.use_dora'; known: rank, alpha"),
    Case(
        "lora: whole modules beside the adapter",
        lora(modules_to_save=["lm_head"]),
        r"unknown key 'lora\.modules_to_save'",
    ),
    Case("lora: served in no known way", lora(serve="megred"), r"lora\.serve: .*'merged' or 'adapter'"),
    Case(
        "lora: a module that is not there",
        lora(target_modules=["q_porj"]),
        r"no module 'q_porj' \(did you mean 'q_proj'\?\)",
    ),
    Case(
        "lora: one module of two is not there",
        lora(target_modules=["q_proj", "v_porj"]),
        r"no module 'v_porj' \(did you mean 'v_proj'\?\)",
    ),
    Case(
        "lora: modules of another architecture",
        lora(target_modules=["c_attn"]),
        r"no module 'c_attn'; its linear layers: q_proj",
    ),
    Case("lora: no modules", lora(target_modules=[]), r"no module is named; write 'all-linear'"),
    Case("lora: an empty name", lora(target_modules=""), r"no module is named"),
    Case("lora: a pattern that matches nothing", lora(target_modules=r".*\.qq_proj"), r"no module"),
    Case("lora: a pattern that is none", lora(target_modules="(q_proj"), r"is no regular expression"),
    Case("lora: all-linear misspelt", lora(target_modules="all_linear"), r"did you mean 'all-linear'\?"),
    Case(
        "lora: on the embedding",
        lora(target_modules=["q_proj", "embed_tokens"]),
        r"'model\.embed_tokens' is the model's embedding or output head",
    ),
    Case(
        "lora: on the output head",
        lora(target_modules=["lm_head"]),
        r"'lm_head' is the model's embedding or output head",
    ),
    Case("lora: on every module by a pattern", lora(target_modules=".*"), r"target_modules"),
    Case("lora: on a norm", lora(target_modules=["input_layernorm"]), r"lora\.target_modules"),
    Case("lora: on a whole attention block", lora(target_modules=["self_attn"]), r"lora\.target_modules"),
    Case("lora: on GPT-2's tied head", of_gpt2(target_modules=["lm_head"]), r"embedding or output head"),
    Case("lora: on GPT-2's own kind of linear layer", of_gpt2(target_modules=["c_attn"]), r"model: ", goes_on=True),
    Case("lora: modules that are a number", lora(target_modules=7), r"lora\.target_modules"),
    Case(
        "lora: a truth value in place of the section",
        lambda f: written(f, lora=True),
        r"lora: ",
    ),
    Case(
        "adapter: a LoRA adapter as the model",
        adapter_as_model(lambda m: None),
        r"is a LoRA adapter of '.*': merge it into its base model first",
    ),
    Case(
        "adapter: of a base by its hub's name",
        adapter_as_model(lambda m: edit_json(m / "adapter_config.json", base_model_name_or_path="org/base")),
        r"is a LoRA adapter of 'org/base'",
    ),
    Case(
        "adapter: DoRA as the model",
        adapter_as_model(lambda m: edit_json(m / "adapter_config.json", use_dora=True)),
        r"is a LoRA adapter",
    ),
    Case("adapter: a vocabulary that differs from the base's", adapter_as_model(more_tokens), r"is a LoRA adapter"),
    Case(
        "adapter: a broken adapter_config.json",
        adapter_as_model(lambda m: (m / "adapter_config.json").write_text("{")),
        r"adapter_config.json is not valid JSON",
    ),
    Case("adapter: beside its base", adapter_as_model(beside_its_base), r"holds a model and a LoRA adapter beside it"),
)
