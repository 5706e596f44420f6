"""W + s·B·A by hand, and what does not fit. That merged weights answer as the adapter: test_policy_model.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from online_dpo.backends.weights import policy_tensors
from online_dpo.errors import EngineError

W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
A = torch.tensor([[5.0, 7.0]])
B = torch.tensor([[1.0], [10.0]])
"""Rank 1. B·A = [[5, 7], [50, 70]]."""


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses two names of one memory."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_base(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    save_file(separate(tensors), folder / "model.safetensors")
    return folder


def write_adapter(folder: Path, module: str = "model.layers.0.q", extra: Any = None, **config: Any) -> Path:
    """An adapter as peft writes it, r = 1 and lora_alpha = 2 (so s = 2) unless `config` says otherwise."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 2, **config}))
    stem = f"base_model.model.{module}"
    tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B, **(extra or {})}
    save_file(separate(tensors), folder / "adapter_model.safetensors")
    return folder


def merged(base: Path, adapter: Path | None) -> dict[str, Tensor]:
    found = list(policy_tensors(base, adapter))
    assert len(found) == len(dict(found))
    return dict(found)


def base_of(folder: Path) -> Path:
    tensors = {
        "model.layers.0.q.weight": W,
        "model.layers.0.q.bias": torch.tensor([1.0, 1.0]),
        "model.layers.10.q.weight": W,
        "model.norm.weight": torch.ones(2),
    }
    return write_base(folder, **tensors)


def test_without_adapter_the_tensors_are_the_files(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    found = merged(base, None)
    assert sorted(found) == [
        "model.layers.0.q.bias",
        "model.layers.0.q.weight",
        "model.layers.10.q.weight",
        "model.norm.weight",
    ]
    assert torch.equal(found["model.layers.0.q.weight"], W)


def test_merge_by_hand(tmp_path: Path) -> None:
    """s = 2/1: [[1, 2], [3, 4]] + 2·[[5, 7], [50, 70]] = [[11, 16], [103, 144]]; all other tensors as they were."""
    found = merged(base_of(tmp_path / "base"), write_adapter(tmp_path / "adapter"))
    assert found["model.layers.0.q.weight"].tolist() == [[11.0, 16.0], [103.0, 144.0]]
    assert found["model.layers.0.q.bias"].tolist() == [1.0, 1.0]
    assert torch.equal(found["model.layers.10.q.weight"], W)
    assert found["model.norm.weight"].tolist() == [1.0, 1.0]


def test_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    """r = 4, alpha = 2: s = ½, [[1 + 2.5, 2 + 3.5], [3 + 25, 4 + 35]]."""
    found = merged(base_of(tmp_path / "base"), write_adapter(tmp_path / "adapter", r=4))
    assert found["model.layers.0.q.weight"].tolist() == [[3.5, 5.5], [28.0, 39.0]]


def test_weights_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps [in, out]: [[1, 2], [3, 4]] + 2·[[5, 50], [7, 70]] = [[11, 102], [17, 144]]."""
    found = merged(base_of(tmp_path / "base"), write_adapter(tmp_path / "adapter", fan_in_fan_out=True))
    assert found["model.layers.0.q.weight"].tolist() == [[11.0, 102.0], [17.0, 144.0]]


def test_checkpoint_that_leaves_the_outermost_prefix_away(tmp_path: Path) -> None:
    """GPT-2's own checkpoint says h.1.attn, the model transformer.h.1.attn. Whole names are compared: 1.attn is the
    end of h.11.attn's letters, and another module."""
    base = write_base(tmp_path / "base", **{"h.1.attn.weight": W, "h.11.attn.weight": W})
    found = merged(base, write_adapter(tmp_path / "adapter", module="transformer.h.1.attn"))
    assert found["h.1.attn.weight"].tolist() == [[11.0, 16.0], [103.0, 144.0]]
    assert torch.equal(found["h.11.attn.weight"], W)

    shorter = write_base(tmp_path / "shorter", **{"1.attn.weight": W, "11.attn.weight": W})
    found = merged(shorter, write_adapter(tmp_path / "second", module="h.11.attn"))
    assert found["11.attn.weight"].tolist() == [[11.0, 16.0], [103.0, 144.0]]
    assert torch.equal(found["1.attn.weight"], W)


def test_weights_in_several_files(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", **{"model.layers.0.q.weight": W})
    save_file({"model.norm.weight": torch.ones(2)}, base / "model-2.safetensors")
    found = merged(base, write_adapter(tmp_path / "adapter"))
    assert sorted(found) == ["model.layers.0.q.weight", "model.norm.weight"]
    assert found["model.layers.0.q.weight"].tolist() == [[11.0, 16.0], [103.0, 144.0]]


def test_half_precision_base_is_merged_in_float32(tmp_path: Path) -> None:
    """256 + 1/256 needs 17 bits: in bfloat16 (8 bits) a small adapter would vanish."""
    base = write_base(tmp_path / "base", **{"model.layers.0.q.weight": torch.full((2, 2), 256.0, dtype=torch.bfloat16)})
    found = merged(base, write_adapter(tmp_path / "adapter", lora_alpha=1 / 1280))["model.layers.0.q.weight"]
    assert found.dtype == torch.float32
    assert found[0, 0].item() == 256.0 + 1 / 256


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", module="model.layers.7.q")
    with pytest.raises(EngineError, match=r"does not fit .*no weight for model\.layers\.7\.q"):
        merged(base_of(tmp_path / "base"), adapter)


@pytest.mark.parametrize(
    "config", [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q": 2}}, {"alpha_pattern": {"q": 2}}]
)
def test_other_kinds_of_adapter_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """Each changes s or the formula: merging them as plain LoRA would give other weights."""
    adapter = write_adapter(tmp_path / "adapter", **config)
    with pytest.raises(EngineError, match=f"uses {next(iter(config))}"):
        merged(base_of(tmp_path / "base"), adapter)


def test_adapter_with_embeddings_is_refused(tmp_path: Path) -> None:
    """peft keeps an embedding's matrices under other names: skipping them would serve half a policy."""
    extra = {"base_model.model.model.embed.lora_embedding_A": A, "base_model.model.model.embed.lora_embedding_B": B}
    adapter = write_adapter(tmp_path / "adapter", extra=extra)
    with pytest.raises(EngineError, match="lora_embedding_A, which cannot be merged"):
        merged(base_of(tmp_path / "base"), adapter)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no safetensors weights"):
        merged(tmp_path, None)
