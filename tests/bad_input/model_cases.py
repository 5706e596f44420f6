"""Models that are not there, not whole, or not what can be trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from case import Case
from tiny_models import adapter, bert, copy, edit_json, llama, reward_model, sharded, t5

from experiments import written

Change = Callable[[Path], object]


def with_model(make: Callable[[Path], None], change: Change, **settings: Any) -> Callable[[Path], list[str]]:
    """`check` with a copy of a model, changed."""

    def arrange(folder: Path) -> list[str]:
        change(copy(make, folder / "model"))
        return written(folder, model="model", **settings)

    return arrange


def named(name: str, **settings: Any) -> Callable[[Path], list[str]]:
    """`check` with a model of this name."""
    return lambda folder: written(folder, model=name, **settings)


def beside(folder: Path) -> list[str]:
    copy(llama, folder / "models" / "my-llama")
    return written(folder, model="models/my-lama")


def a_file(folder: Path) -> list[str]:
    copy(llama, folder / "model")
    return written(folder, model="model/model.safetensors")


def a_gguf(folder: Path) -> list[str]:
    (folder / "llama.gguf").write_bytes(b"GGUF\x03\0\0\0")
    return written(folder, model="llama.gguf")


def a_gguf_in_a_folder(folder: Path) -> list[str]:
    (folder / "model").mkdir()
    (folder / "model" / "llama.Q4.gguf").write_bytes(b"GGUF\x03\0\0\0")
    return written(folder, model="model")


def empty_folder(folder: Path) -> list[str]:
    (folder / "model").mkdir()
    return written(folder, model="model")


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lose_a_shard(model: Path) -> None:
    next(iter(sorted(model.glob("model-*.safetensors")))).unlink()


def pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")


def noise(model: Path) -> None:
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 40)


def own_code(model: Path) -> None:
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(model / "config.json", model_type="own_llama", auto_map=names, architectures=["OwnModel"])
    (model / "own.py").write_text("raise RuntimeError('this code must not run')\n", encoding="utf-8")


def lost_code(model: Path) -> None:
    own_code(model)
    (model / "own.py").unlink()


def other_weights(model: Path) -> None:
    """Those of a classifier behind the configuration of a language model."""
    import tiny_models

    shutil.copy(tiny_models.kept(reward_model) / "model.safetensors", model)


def nan_weights(model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def no_end(model: Path) -> None:
    """As base models are published that never learned to end."""
    for file in (model / "config.json", model / "generation_config.json"):
        edit_json(file, eos_token_id=None)


def text(name: str, content: str) -> Change:
    return lambda model: (model / name).write_text(content, encoding="utf-8")


CASES: tuple[Case, ...] = (
    Case("model: no name", named(""), r"the model's name is empty"),
    Case("model: spaces alone", named("   "), r"the model's name is empty"),
    Case(
        "model: no such folder, a like-named one beside",
        beside,
        r"model 'models/my-lama' \(did you mean 'models/my-llama'\?\)",
    ),
    Case("model: no such absolute folder", named("/nowhere/at/all"), r"no model '/nowhere/at/all'"),
    Case("model: a packaged name misspelt", named("smollm2-135m-instuct"), r"did you mean 'smollm2-135m-instruct'\?"),
    Case("model: a null character in its name", named("mo\0del"), r"no model 'model'"),
    Case("model: a name longer than file systems take", named("x" * 5000), r"no model 'x{80}'"),
    Case("model: a home folder of nobody", named("~nobody-of-this-name/model"), r"no model '~nobody"),
    Case("model: a file of weights in place of the folder", a_file, r"is a file: give the folder"),
    Case("model: a GGUF file", a_gguf, r"is a file: its weights are rounded"),
    Case("model: a folder that holds a GGUF file", a_gguf_in_a_folder, r"holds a GGUF file alone"),
    Case("model: an empty folder", empty_folder, r"the folder has no config.json"),
    Case(
        "model: a hub id without the hub",
        named("some-org/some-model"),
        r"is not on this machine and the hub does not give it",
    ),
    Case(
        "model: a revision of a folder",
        with_model(llama, lambda m: None, revision="main"),
        r"`revision` is for hub ids only",
    ),
    Case(
        "model: no config.json",
        with_model(llama, lambda m: (m / "config.json").unlink()),
        r"the folder has no config.json",
    ),
    Case("model: config.json is no JSON", with_model(llama, text("config.json", "{'model_type': ")), r"config.json"),
    Case("model: config.json is a list", with_model(llama, text("config.json", "[1, 2]")), r"config.json"),
    Case(
        "model: config.json names no architecture",
        with_model(llama, lambda m: edit_json(m / "config.json", model_type=None, architectures=None)),
        r"names no model_type",
    ),
    Case(
        "model: an unknown architecture",
        with_model(llama, lambda m: edit_json(m / "config.json", model_type="lama", architectures=["LamaForCausalLM"])),
        r"knows no model_type 'lama' \(did you mean 'llama'\?\)",
    ),
    Case(
        "model: sizes that do not fit each other",
        with_model(llama, lambda m: edit_json(m / "config.json", num_attention_heads=5)),
        r"hidden size \(32\) is not a multiple",
    ),
    Case(
        "model: a size that is a text",
        with_model(llama, lambda m: edit_json(m / "config.json", hidden_size="wide")),
        r"hidden_size",
    ),
    Case(
        "model: sizes of other weights",
        with_model(llama, lambda m: edit_json(m / "config.json", hidden_size=64)),
        r"is 259 × 32 there and should be 259 × 64",
    ),
    Case(
        "model: more layers than weights",
        with_model(llama, lambda m: edit_json(m / "config.json", num_hidden_layers=4)),
        r"lacks weights that its config.json asks for \(model.layers.2",
    ),
    Case("model: weights of another kind of model", with_model(llama, other_weights), r"lm_head"),
    Case(
        "model: no weights",
        with_model(llama, lambda m: (m / "model.safetensors").unlink()),
        r"has no \*.safetensors weights",
    ),
    Case("model: pickled weights alone", with_model(llama, pickled), r"only pickled weights"),
    Case("model: truncated weights", with_model(llama, truncate), r"model.safetensors is damaged or incomplete"),
    Case(
        "model: weights of no bytes", with_model(llama, text("model.safetensors", "")), r"model.safetensors is damaged"
    ),
    Case("model: noise for weights", with_model(llama, noise), r"model.safetensors is damaged"),
    Case("model: a Git LFS pointer for weights", with_model(llama, pointer), r"Git LFS pointer"),
    Case("model: a shard is missing", with_model(sharded, lose_a_shard), r"is incomplete"),
    Case(
        "model: a shard's index is no JSON",
        with_model(sharded, text("model.safetensors.index.json", "{")),
        r"is not a weight index",
    ),
    Case(
        "model: a shard's index is a list",
        with_model(sharded, text("model.safetensors.index.json", "[]")),
        r"is not a weight index",
    ),
    Case(
        "model: a shard's index names what is no name",
        with_model(sharded, text("model.safetensors.index.json", json.dumps({"weight_map": {"a": ["b"]}}))),
        r"is not a weight index",
    ),
    Case("model: an encoder", with_model(bert, lambda m: None), r"BertForMaskedLM"),
    Case("model: an encoder with a decoder", with_model(t5, lambda m: None), r"T5ForConditionalGeneration"),
    Case("model: a reward model", with_model(reward_model, lambda m: None), r"LlamaForSequenceClassification"),
    Case("model: a LoRA adapter", with_model(adapter, lambda m: None), r"is a LoRA adapter"),
    Case("model: one whose code is its own", with_model(llama, own_code), r"trust_remote_code"),
    Case(
        "model: code of its own that is not there",
        with_model(llama, lost_code, trust_remote_code=True),
        r"own.py",
    ),
    Case(
        "model: code of its own that fails",
        with_model(llama, own_code, trust_remote_code=True),
        r"this code must not run",
    ),
    Case(
        "model: NaN among its weights",
        with_model(llama, nan_weights),
        r"holds NaN or infinity in model\.layers\.0\.mlp\.down_proj",
    ),
    Case("model: no end-of-text habit", with_model(llama, no_end), r"names no end", goes_on=True),
    Case(
        "model: an end that is a text",
        with_model(llama, lambda m: edit_json(m / "generation_config.json", eos_token_id="</s>")),  # noqa: S106 - a token
        r"eos_token_id",
    ),
    Case(
        "model: an end beyond the vocabulary",
        with_model(llama, lambda m: edit_json(m / "generation_config.json", eos_token_id=999)),
        r"eos_token_id",
    ),
    Case(
        "model: generation_config.json is no JSON",
        with_model(llama, text("generation_config.json", "{")),
        r"generation_config.json",
    ),
    Case(
        "model: context shorter than prompt and answer",
        with_model(llama, lambda m: None, sampling={"n": 2, "max_tokens": 500}),
        r"128",
    ),
    Case(
        "model: context shorter than prompts.max_tokens alone is no fault",
        with_model(
            llama, lambda m: None, prompts={"path": "prompts.jsonl", "per_round": 2, "held_out": 2, "max_tokens": 4000}
        ),
        r"model",
        goes_on=True,
    ),
)
