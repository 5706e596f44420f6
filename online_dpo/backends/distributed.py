"""Sums and gathers over the learner's workers; with one worker, nothing."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from online_dpo.backends.cluster_address import on_loopback

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This worker's rank and the number of workers."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join(rank: int, world: int, address: str) -> None:
    """Enter the group of `world` workers at `address` (tcp://host:port): nccl on GPUs, gloo on CPUs."""
    if world > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            # Ray shows each worker its own GPU alone; torch would otherwise guess one by the rank.
            torch.cuda.set_device(0)
        dist.init_process_group(backend, store=_meeting_place(rank, world, address), rank=rank, world_size=world)


def _meeting_place(rank: int, world: int, address: str) -> Any:
    """The store at `address`, which worker 0 serves on that address alone: torch's own socket would be open on all of
    the machine's, to whoever reaches it."""
    place = address.removeprefix("tcp://")
    host, _, port = place.rpartition(":")
    if on_loopback(place):
        _gloo_on_loopback()
    handle = None
    if rank == 0:
        handle = socket.create_server((host, int(port)), backlog=max(world, 128)).detach()
    kept: Any = dist  # whose stubs name no store
    return kept.TCPStore(host, int(port), world, is_master=rank == 0, master_listen_fd=handle)


def be_alone() -> None:
    """Make this process a group of its own, which nobody can join; what needs a group finds one, and opens none."""
    if not dist.is_initialized():
        _gloo_on_loopback()
        kept: Any = dist  # whose stubs name no store
        dist.init_process_group("gloo", store=kept.HashStore(), rank=0, world_size=1)


def _gloo_on_loopback() -> None:
    """Else gloo takes the interface that the machine's name stands for."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add every worker's gradients, in place. A worker without any share of the batch adds zeros."""
    if rank_and_world()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def summed(values: Tensor) -> Tensor:
    """`values` added over all workers."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(values)
    return values


def largest(number: int) -> int:
    """The largest of all workers' numbers."""
    world = rank_and_world()[1]
    if world == 1:
        return number
    numbers = [0] * world
    dist.all_gather_object(numbers, number)
    return max(numbers)


def gathered(mine: list[T]) -> list[T]:
    """Shards `items[rank::world]` of every worker, put back into the order of `items`."""
    world = rank_and_world()[1]
    if world == 1:
        return mine
    shards: list[list[T]] = [[] for _ in range(world)]
    dist.all_gather_object(shards, mine)
    merged: list[T] = []
    for position in range(max(len(shard) for shard in shards)):
        merged.extend(shard[position] for shard in shards if position < len(shard))
    return merged


def gathered_by_index(mine: dict[int, T]) -> dict[int, T]:
    """Every worker's entries in one mapping, at every worker."""
    world = rank_and_world()[1]
    if world == 1:
        return mine
    shards: list[dict[int, T]] = [{} for _ in range(world)]
    dist.all_gather_object(shards, mine)
    return {index: value for shard in shards for index, value in shard.items()}


def from_first(value: T) -> T:
    """Worker 0's `value`, at every worker."""
    if rank_and_world()[1] == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
