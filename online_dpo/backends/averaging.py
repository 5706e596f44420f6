"""The average of two policies' weights, from folder to folder: no model is built, and no device is needed.

ref ← α·policy + (1 − α)·ref: the soft update of Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good
Alignment" (TR-DPO), sec. 3; here once a round, not every τ steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from online_dpo.backends.weights import adapter_matrices
from online_dpo.errors import ModelError
from online_dpo.models import NOT_DIGESTED, digest_folder
from online_dpo.policies import write_policy
from online_dpo.types import Policy

FORMAT = {"format": "pt"}


def average_policies(policy: Policy, reference: Policy, alpha: float, *, policy_id: str, out: Path) -> Policy:
    """Write α·`policy` + (1 − α)·`reference` as policy `policy_id` into folder `out`, which is made; 0 < α < 1.

    `reference` is the initial policy or an earlier average. It has no probe: nothing samples from it.
    Raises `ModelError` when the two folders' weights do not belong together.
    """
    out.mkdir()
    for file in sorted(policy.path.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name not in NOT_DIGESTED:
            shutil.copyfile(file, out / file.name)
    if policy.adapter:
        _stack(policy.path, reference.path if reference.adapter else None, alpha, out)
    else:
        _average(policy.path, reference.path, alpha, out)
    averaged = Policy(policy_id, out, digest_folder(out), adapter=policy.adapter)
    write_policy(averaged)
    return averaged


def _average(policy: Path, reference: Path, alpha: float, out: Path) -> None:
    """Tensor by tensor in float32, file by file: one file of the result is the most that is in memory.

    Names, shards and tied weights stay as `policy` has them.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with ExitStack() as stack:
        theirs: dict[str, Any] = {}
        for file in _weight_files(reference):
            handle = stack.enter_context(safe_open(file, framework="pt"))
            theirs |= dict.fromkeys(handle.keys(), handle)
        for file in _weight_files(policy):
            with safe_open(file, framework="pt") as mine:
                averaged = {
                    name: _between(_same_tensor(name, theirs, reference), mine.get_tensor(name), alpha, name)
                    for name in mine.keys()  # noqa: SIM118 - not a mapping
                }
            save_file(averaged, out / file.name, FORMAT)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no safetensors weights in {folder}: they cannot be averaged")
    return files


def _same_tensor(name: str, files: dict[str, Any], folder: Path) -> Tensor:
    """The tensor of that name. Some published checkpoints leave the outermost prefix away."""
    found = name if name in files else next((other for other in files if name.endswith("." + other)), None)
    if found is None:
        raise ModelError(f"the weights in {folder} have no '{name}' to average with")
    tensor: Tensor = files[found].get_tensor(found)
    return tensor


def _between(reference: Tensor, policy: Tensor, alpha: float, name: str) -> Tensor:
    """ref + α·(policy − ref), float32: where the two are equal, exactly that. What is no number stays the policy's."""
    if reference.shape != policy.shape:
        raise ModelError(f"'{name}' has shapes {list(policy.shape)} and {list(reference.shape)}: no average")
    if not policy.is_floating_point():
        return policy
    return torch.lerp(reference.float(), policy.float(), alpha)


def _stack(policy: Path, reference: Path | None, alpha: float, out: Path) -> None:
    """The average of W₀ + s·B·A and of the reference's weights as one adapter: exact, unlike averaged A and B.

    α·s·B₁A₁ + (1 − α)·s·B₂A₂ = s·[αB₁, (1 − α)B₂]·[A₁; A₂], shapes A [r₁ + r₂, in], B [out, r₁ + r₂]; s = lora_alpha/r
    stays, so lora_alpha grows with the rank. No `reference`: the initial policy, whose adapter is zero.
    The rank grows by the policy's every round.
    """
    from safetensors.torch import save_file

    terms = [(alpha, adapter_matrices(policy))]
    if reference is not None:
        terms.append((1 - alpha, adapter_matrices(reference)))
    modules = terms[0][1]
    if any(matrices.keys() != modules.keys() for _, matrices in terms):
        raise ModelError(f"the adapters in {policy} and {reference} adapt different modules: no average")
    tensors: dict[str, Tensor] = {}
    rank = 0
    for module, (_, _, scale, _) in modules.items():
        stem = f"base_model.model.{module}"
        a, b = _stacked([(weight, *matrices[module][:3]) for weight, matrices in terms], scale)
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        rank = a.shape[0]
    save_file(tensors, out / "adapter_model.safetensors", FORMAT)
    config = json.loads((policy / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"r": rank, "lora_alpha": config["lora_alpha"] / config["r"] * rank}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _stacked(terms: Sequence[tuple[float, Tensor, Tensor, float]], scale: float) -> tuple[Tensor, Tensor]:
    """A and B of Σ weight·s·B·A over `terms` (weight, A, B, s), at scale `scale`."""
    a = torch.cat([a.float() for _, a, _, _ in terms], dim=0)
    b = torch.cat([b.float() * (weight * s / scale) for weight, _, b, s in terms], dim=1)
    return a, b
