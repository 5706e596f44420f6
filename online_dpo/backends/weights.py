"""A policy's tensors under their checkpoint names, an adapter merged on the way; one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from online_dpo.errors import EngineError


def policy_tensors(base: Path, adapter: Path | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in folder `base`; with `adapter`, W + s·B·A (Hu et al. 2021, eq. 3).

    Raises `EngineError` when the adapter has a matrix that no tensor of `base` takes.
    """
    from safetensors import safe_open

    deltas = {} if adapter is None else adapter_matrices(adapter)
    used: set[str] = set()
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise EngineError(f"no safetensors weights in {base}")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                tensor = handle.get_tensor(name)
                module = _module_of(name, deltas)
                if module is not None:
                    used.add(module)
                    tensor = _merged(tensor, *deltas[module])
                yield name, tensor
    if used != set(deltas):
        missing = sorted(set(deltas) - used)
        raise EngineError(f"the adapter in {adapter} does not fit {base}: no weight for {missing[0]}")


def adapter_matrices(adapter: Path) -> dict[str, tuple[Tensor, Tensor, float, bool]]:
    """Module name -> (A [rank, in], B [out, rank], scale s, whether W is stored transposed)."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    unsupported = [key for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if unsupported:
        raise EngineError(f"the adapter in {adapter} uses {unsupported[0]}, which cannot be merged here")
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    strange = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange:
        raise EngineError(f"the adapter in {adapter} holds {strange[0]}, which cannot be merged here")
    matrices: dict[str, Any] = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            b = tensors[f"{stem}.lora_B.weight"]
            module = stem.removeprefix("base_model.model.")
            matrices[module] = (a, b, scale, bool(config.get("fan_in_fan_out")))
    return matrices


def _module_of(tensor_name: str, deltas: dict[str, Any]) -> str | None:
    """The adapted module whose weight `tensor_name` is. Some checkpoints leave the outermost prefix away."""
    if not tensor_name.endswith(".weight"):
        return None
    name = tensor_name.removesuffix(".weight")
    if name in deltas:
        return name
    return next((module for module in deltas if module.endswith("." + name)), None)


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool) -> Tensor:
    delta = (b.float() @ a.float()) * scale
    return (weight.float() + (delta.T if transposed else delta)).to(torch.promote_types(weight.dtype, torch.float32))
