"""Reward-model training on Ray workers that live until it is over."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.actor import ActorHandle

from online_dpo.backends.ray_cluster import free_address, in_step, start_learner_actors, start_ray, stop_ray, wait
from online_dpo.backends.reward_trainer import LocalRewardTrainer, RewardStep
from online_dpo.backends.sharing import share
from online_dpo.config import LearnerSpec
from online_dpo.errors import ConfigError, TrainingError
from online_dpo.reward_pairs import TokenPair
from online_dpo.reward_spec import RewardSpec

WORKER = "a reward-model worker"


class RewardActor:
    """One worker."""

    def address(self) -> str:
        """See `free_address`."""
        return free_address()

    def build(self, rank: int, world: int, address: str, folder: Path, spec: RewardSpec) -> None:
        """Join the group and load the model in `folder`."""
        import torch

        from online_dpo.backends.distributed import join
        from online_dpo.backends.reward_network import RewardNetwork

        if not torch.cuda.is_available():
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        join(rank, world, address)
        self.trainer = LocalRewardTrainer(RewardNetwork(folder, seed=spec.seed, lora_rank=spec.lora_rank))

    def train(self, pairs: Sequence[TokenPair], spec: RewardSpec) -> Iterator[RewardStep]:
        """`LocalRewardTrainer.train`, streamed."""
        yield from self.trainer.train(pairs, spec)

    def scores(self, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        """`LocalRewardTrainer.scores`."""
        return self.trainer.scores(rows, batch_size)

    def save(self, out: Path) -> None:
        """`LocalRewardTrainer.save`."""
        self.trainer.save(out)


class RayRewardTrainer:
    """`LocalRewardTrainer` over a group of `RewardActor`s."""

    def __init__(self, workers: Sequence[ActorHandle]) -> None:
        self.workers = list(workers)

    def train(self, pairs: Sequence[TokenPair], spec: RewardSpec) -> Iterator[RewardStep]:
        """Worker 0's steps, as each is done by all."""
        shared = share(list(pairs), TrainingError)
        streams = [worker.train.options(num_returns="streaming").remote(shared, spec) for worker in self.workers]
        yield from in_step(streams)

    def scores(self, rows: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        """The reward of each row of token ids."""
        shared = share(list(rows), TrainingError)
        found: list[list[float]] = wait(
            [w.scores.remote(shared, batch_size) for w in self.workers], TrainingError, WORKER
        )
        return found[0]

    def save(self, out: Path) -> None:
        """Save the model in the empty folder `out`."""
        wait([worker.save.remote(out) for worker in self.workers], TrainingError, WORKER)


@contextmanager
def reward_workers(folder: Path, spec: RewardSpec) -> Iterator[RayRewardTrainer]:
    """Start Ray and `spec.workers` workers with the model in `folder`; stop them on leaving.

    Where there are GPUs each worker gets one. Raises `ConfigError` for more workers than GPUs, and the workers' own
    errors.
    """
    start_ray()
    try:
        gpus = float(ray.cluster_resources().get("GPU", 0))
        if gpus and spec.workers > gpus:
            raise ConfigError(f"{spec.workers} workers ask for a GPU each, there are {gpus:g}")
        learner = LearnerSpec(workers=spec.workers, threads=spec.threads)
        workers = start_learner_actors(learner, 1.0 if gpus else 0.0, RewardActor)
        world = len(workers)
        address = wait(workers[0].address.remote(), TrainingError, WORKER) if world > 1 else ""
        building = [worker.build.remote(rank, world, address, folder, spec) for rank, worker in enumerate(workers)]
        wait(building, TrainingError, WORKER)
        yield RayRewardTrainer(workers)
    finally:
        stop_ray()
