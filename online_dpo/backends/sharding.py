"""A model whose weights, gradients and optimiser state are shared out over the workers, row by row.

Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023, "PyTorch FSDP"; by torch's `fully_shard`. A layer's weights
are gathered as its turn comes and let go after it, so every forward and every backward is the work of all workers:
each must make as many as the others. In the forward the weights are plain tensors, at any other time DTensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from online_dpo.errors import ModelError, one_line


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Leave each of `world` workers its share of `model`, on `device`, in place: layer by layer, then what is left.

    What is left (embeddings and head, which may be one tied weight) is one unit. Every worker must hold the same
    weights. Raises `ModelError` for a model that cannot be shared out.
    """
    mesh = init_device_mesh(device.type, (world,))
    try:
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        # Embeddings and head are needed at both ends of the way back: they stay gathered until its end.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"learner.parallel is fsdp, and this model cannot: {one_line(error, 200)}") from error
    for unit in _units(model):
        # A worker's loss is already divided by the whole batch's size: gradients are added, not averaged.
        unit.set_gradient_divide_factor(1.0)
        # gloo cannot multiply as it adds.
        unit.set_force_sum_reduction_for_comms(True)


def layers(model: Any) -> list[nn.Module]:
    """The decoder's layers, by the names that transformers keeps together on one device, inner before outer; none that
    holds a tied weight, which must not be in two units. A model without such names is one unit."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(inner, "_no_split_modules", None) or ())
    ends = {id(end.weight) for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end is not None}
    found = [module for module in reversed(list(inner.modules())) if type(module).__name__ in names]
    return [layer for layer in found if not any(id(p) in ends for p in layer.parameters())]


def let_go(model: nn.Module) -> None:
    """Keep the shares alone. After a forward without a backward the embeddings and the head would stay gathered, and
    the next forward would not see new shares."""
    for unit in _units(model):
        unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of `tensor`, on the host; of a share it is gathered, which all workers must do together."""
    found = tensor.detach()
    return (found.full_tensor() if isinstance(found, DTensor) else found).cpu().contiguous()


def whole_state(model: nn.Module, *, trainable_only: bool, keep: bool) -> dict[str, Tensor]:
    """The model's state dict, gathered tensor by tensor, tied ones once; empty at workers that do not `keep` it.

    All workers must call it together.
    """
    gathered: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trainable_only and not tensor.requires_grad:
            continue
        if id(tensor) not in gathered:
            found = whole(tensor)
            gathered[id(tensor)] = found if keep else found.new_empty(0)
        if keep:
            state[name] = gathered[id(tensor)]
    return state


@torch.no_grad()
def fill(into: Tensor, source: Tensor) -> None:
    """Copy the whole tensor `source` into `into`, or into this worker's share of it."""
    if isinstance(into, DTensor):
        into.to_local().copy_(source[_rows(into)])
    else:
        into.copy_(source)


@torch.no_grad()
def read(into: Tensor, file: Any, name: str) -> None:
    """Fill `into` with tensor `name` of an open safetensors file; of a share its own rows alone are read.

    Raises `ValueError` when the shapes differ.
    """
    there = tuple(file.get_slice(name).get_shape())
    if there != tuple(into.shape):
        raise ValueError(f"'{name}' has shape {list(there)}, the model has {list(into.shape)}")
    if not isinstance(into, DTensor):
        into.copy_(file.get_tensor(name))
    elif into.to_local().numel():
        into.to_local().copy_(file.get_slice(name)[_rows(into)])


def read_shares(model: Any, folder: Path) -> bool:
    """Fill the model's shares from the safetensors in `folder`, never holding a whole tensor.

    False, and nothing changed, where the files' names or shapes are not the model's own: transformers has to load them.
    """
    from safetensors import safe_open

    if getattr(model, "_weight_conversions", None):
        return False
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            files |= dict.fromkeys(file.keys(), file)
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        found = {p: next((name for name in tied if name in files), None) for p, tied in names.items()}
        wanted = [(p, files[name], name) for p, name in found.items() if name is not None]
        if len(wanted) < len(found) or any(list(f.get_slice(n).get_shape()) != list(p.shape) for p, f, n in wanted):
            return False
        for parameter, file, name in wanted:
            read(parameter, file, name)
    return True


def shared_out(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """This worker's shares of whole `tensors`, as `model` has them; they themselves where it is not shared out."""
    share = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if share is None:
        return tensors
    mesh, placements = share.device_mesh, share.placements
    return {
        name: distribute_tensor(tensor.to(share.device), mesh, placements, src_data_rank=None)
        for name, tensor in tensors.items()
    }


@contextmanager
def trainable_whole(model: nn.Module) -> Iterator[None]:
    """Inside, every trainable share is a whole plain parameter, for code that draws whole matrices; on leaving, the
    shares take their rows of it. For adapters, which are small. Where nothing is shared out, nothing is done."""
    held: list[tuple[nn.Module, str, Any, nn.Parameter]] = []
    for module in model.modules():
        for name, share in module._parameters.items():
            tensor: Any = share
            if isinstance(tensor, DTensor) and tensor.requires_grad:
                held.append((module, name, tensor, nn.Parameter(tensor.full_tensor().detach())))
    for module, name, _, plain in held:
        module._parameters[name] = plain
    try:
        yield
    finally:
        for module, name, share, plain in held:
            fill(share, plain.detach())
            module._parameters[name] = share


def _units(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _rows(share: DTensor) -> slice:
    """The rows of the whole tensor that this worker holds: like `torch.chunk`, the last workers may have fewer."""
    each = -(-share.shape[0] // share.device_mesh.size())
    start = min(share.device_mesh.get_local_rank() * each, share.shape[0])
    return slice(start, start + share.to_local().shape[0])
