"""A model's shape, from its config.json and, where there are weights, from their safetensors headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.errors import ModelError, nearest
from online_dpo.model_config import read_config
from online_dpo.models import PACKAGED, resolve_model
from online_dpo.places import places_of
from online_dpo.plan import tensor_shapes

KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocabulary": ("vocab_size",),
}
"""What architectures call the sizes without which there is no shape."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EMBEDDINGS = ("embed", "wte", "wpe", "lm_head")
"""Parts of the names of weights that are no matrix of a layer."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder. `parameters`: all of them; `layer_weights`: those outside embeddings and head, each of which
    a token meets once."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    parameters: int
    layer_weights: int

    @property
    def attention_width(self) -> int:
        """Heads × head size."""
        return self.heads * self.head_size

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.layer_weights // self.layers

    @property
    def outside(self) -> int:
        """Parameters of embeddings and head (once, where they are tied)."""
        return self.parameters - self.layer_weights


def folder_of(name: str, folders: Sequence[Path]) -> Path:
    """The folder of model `name` where no more than its config.json is needed: nothing is downloaded.

    Raises `ModelError` when there is none.
    """
    places = places_of(name, [*folders, Path.cwd()])
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is not None:
        return found
    if name in PACKAGED:
        return resolve_model(name).path
    raise ModelError(
        f"no folder '{name:.80}' with a config.json; a prediction on paper needs that one file of the model"
        f"{nearest(name, PACKAGED)}"
    )


def shape_of(folder: Path) -> ModelShape:
    """The shape of the model in `folder`; a bare config.json is enough for a Llama-like one.

    Raises `ModelError` where config.json does not say enough, or is of a mixture of experts.
    """
    whole = read_config(folder)
    inner = whole.get("text_config")
    config = inner if isinstance(inner, dict) else whole
    found = {name: _size(config, keys, folder) for name, keys in KEYS.items()}
    if any(isinstance(config.get(key), int) and config[key] > 1 for key in EXPERTS):
        raise ModelError(
            f"{folder / 'config.json'} is of a mixture of experts: the planner's formulas are of dense models"
        )
    heads, hidden = found["heads"], found["hidden"]
    kv_heads = _given(config, ("num_key_value_heads",)) or heads
    head_size = _given(config, ("head_dim",)) or hidden // heads
    intermediate = _given(config, ("intermediate_size", "n_inner")) or 4 * hidden
    counted = _counted(folder)
    if counted is None:
        layer_weights = found["layers"] * _llama_layer(hidden, heads, kv_heads, head_size, intermediate) + hidden
        embeddings = found["vocabulary"] * hidden * (1 if config.get("tie_word_embeddings", False) else 2)
        counted = layer_weights + embeddings, layer_weights
    return ModelShape(found["layers"], hidden, heads, kv_heads, head_size, intermediate, found["vocabulary"], *counted)


def _llama_layer(hidden: int, heads: int, kv_heads: int, head_size: int, intermediate: int) -> int:
    """Weights of one Llama layer: query and output, key and value, the gated MLP's three matrices, two norms."""
    return 2 * hidden * heads * head_size + 2 * hidden * kv_heads * head_size + 3 * hidden * intermediate + 2 * hidden


def _counted(folder: Path) -> tuple[int, int] | None:
    """(all parameters, those outside embeddings and head) by the headers; None where there are no weights."""
    sizes = {name: _product(shape) for name, shape in tensor_shapes(folder).items()}
    if not sizes:
        return None
    inside = sum(size for name, size in sizes.items() if not any(part in name for part in EMBEDDINGS))
    return sum(sizes.values()), inside


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _size(config: dict[str, Any], keys: tuple[str, ...], folder: Path) -> int:
    found = _given(config, keys)
    if found is None:
        raise ModelError(f"{folder / 'config.json'} does not say {keys[0]}, which the planner needs")
    return found


def _given(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
