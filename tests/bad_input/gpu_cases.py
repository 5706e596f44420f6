"""Engines, learners and clusters that are asked for where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from case import Case

from experiments import written

LENGTH = {"use": "judges.length:LengthJudge", "unit": "characters"}
CLOSED = "127.0.0.1:9"
"""The port that nobody uses."""


def asked(command: str = "check", **settings: Any) -> Callable[[Path], list[str]]:
    return lambda folder: [*written(folder, command, **settings), *(["--quiet"] if command == "run" else [])]


@contextmanager
def no_gpu() -> Iterator[None]:
    """Inside, this machine has none, whatever it has."""
    import torch

    with patch.object(torch.cuda, "device_count", lambda: 0), patch.object(torch.cuda, "is_available", lambda: False):
        yield


@contextmanager
def no_vllm() -> Iterator[None]:
    """Inside, vLLM is not installed."""
    import importlib.util

    find = importlib.util.find_spec
    with patch.object(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest)):
        yield


@contextmanager
def no_cluster() -> Iterator[None]:
    """Inside, this machine is part of no Ray cluster."""
    with patch.dict("os.environ", {"RAY_TMPDIR": "/nowhere/at/all"}):
        sys.modules["os"].environ.pop("RAY_ADDRESS", None)
        yield


def without_gpu(name: str, says: str, **settings: Any) -> Case:
    return Case(f"gpu: {name}", asked(**settings), says, around=no_gpu)


CASES: tuple[Case, ...] = (
    without_gpu(
        "one for the engine",
        r"the engine \(1\) and 1 learner worker\(s\) \(0 each\) ask for 1 GPUs, there are 0",
        engine={"kind": "transformers", "gpus": 1},
    ),
    without_gpu(
        "one for each worker",
        r"2 learner worker\(s\) \(1 each\) ask for 2 GPUs, there are 0",
        learner={"workers": 2, "gpus_per_worker": 1},
    ),
    without_gpu(
        "half a one",
        r"the engine \(0\.5\) .* ask for 0\.5 GPUs, there are 0",
        engine={"kind": "transformers", "gpus": 0.5},
    ),
    without_gpu(
        "one for each of two engines",
        r"2 engines \(1 each\)",
        engine={"kind": "transformers", "gpus": 1},
        cluster={"engines": 2},
    ),
    without_gpu(
        "one for the judge",
        r"judge 'judges\.length:LengthJudge': actor\.gpus asks for 1 GPUs, there are 0",
        judge={**LENGTH, "actor": {"gpus": 1}},
    ),
    without_gpu(
        "one for the gold judge",
        r"actor\.gpus asks for 1 GPUs, there are 0",
        evaluation={"gold": {**LENGTH, "actor": {"gpus": 1}}},
    ),
    without_gpu(
        "parts of a model for transformers",
        r"engine\.tensor_parallel_size is 4, which the engine transformers cannot do: .*vllm",
        engine={"kind": "transformers", "tensor_parallel_size": 4},
    ),
    Case(
        "gpu: fewer than none",
        asked(engine={"kind": "transformers", "gpus": -1}),
        r"engine\.gpus: .*greater than or equal to 0",
    ),
    Case(
        "gpu: memory of more than all",
        asked(engine={"kind": "vllm", "gpu_memory_utilization": 1.5}),
        r"engine\.gpu_memory_utilization: .*less than or equal to 1",
    ),
    Case(
        "gpu: no parts of a model",
        asked(engine={"kind": "vllm", "tensor_parallel_size": 0}),
        r"engine\.tensor_parallel_size: .*greater than or equal to 1",
    ),
    Case(
        "gpu: shared by an engine and shares of weights",
        asked(engine={"kind": "vllm", "share_gpu": True}, learner={"workers": 2, "parallel": "fsdp"}),
        r"engine\.share_gpu: a learner with parallel: fsdp",
    ),
    Case("engine: a misspelt one", asked(engine="vlm"), r"engine\.kind: .*'auto', 'vllm' or 'transformers'"),
    Case(
        "engine: vLLM where it is not installed",
        asked(engine="vllm"),
        r"engine\.kind is vllm, and vllm is not installed here",
        around=no_vllm,
    ),
    Case(
        "engine: a dtype that nobody has",
        asked(engine={"kind": "transformers", "dtype": "float8"}),
        r"engine\.dtype: .*'float32', 'bfloat16' or 'float16'",
    ),
    Case(
        "engine: a key of the learner",
        asked(engine={"kind": "transformers", "workers": 2}),
        r"unknown key 'engine\.workers'",
    ),
    Case(
        "engine: room for fewer tokens than the prompts",
        asked(engine={"kind": "transformers", "max_model_len": 16}),
        r"engine\.max_model_len is 16, but the longest prompt \(\d+ tokens\) and answer \(8\) need \d+",
    ),
    Case(
        "engine: more room than the model has",
        asked(engine={"kind": "transformers", "max_model_len": 4096}),
        r"engine\.max_model_len is 4096, and model .* takes 128",
    ),
    Case(
        "engine: no sequences at once", asked(engine={"kind": "transformers", "batch_size": 0}), r"engine\.batch_size"
    ),
    Case(
        "learner: half precision",
        asked(learner={"dtype": "float16"}),
        r"learner\.dtype: .*'auto', 'float32' or 'bfloat16'",
    ),
    Case("learner: no workers", asked(learner={"workers": 0}), r"learner\.workers: .*greater than or equal to 1"),
    Case(
        "learner: a way of sharing that nobody knows",
        asked(learner={"parallel": "deepspeed"}),
        r"learner\.parallel: .*'ddp' or 'fsdp'",
    ),
    Case("learner: a misspelt key", asked(learner={"gpus_per_workers": 1}), r"did you mean 'gpus_per_worker'\?"),
    Case("cluster: no address", asked(cluster="somewhere"), r"cluster\.address: .*null, auto or host:port is expected"),
    Case(
        "cluster: a Ray client's address",
        asked(cluster="ray://10.0.0.1:10001"),
        r"a run is a driver inside the cluster, not a Ray client",
    ),
    Case(
        "cluster: a port that is none", asked("run", cluster="127.0.0.1:99999"), r"cluster\.address 127\.0\.0\.1:99999"
    ),
    Case(
        "cluster: nobody answers",
        asked("run", cluster=CLOSED),
        r"cluster\.address 127\.0\.0\.1:9: nothing answers there .*is the cluster's head up\?",
    ),
    Case(
        "cluster: a host of no name",
        asked("run", cluster="no-such-host.invalid:6379"),
        r"cluster\.address no-such-host\.invalid:6379: nothing answers there",
    ),
    Case(
        "cluster: auto where there is none",
        asked("run", cluster="auto"),
        r"cluster\.address auto: this machine is part of no Ray cluster",
        around=no_cluster,
    ),
    Case("cluster: no engines", asked(cluster={"engines": 0}), r"cluster\.engines: .*greater than or equal to 1"),
    Case("cluster: no lanes", asked(cluster={"lanes": 0}), r"cluster\.lanes: .*greater than or equal to 1"),
    Case("cluster: a negative patience", asked(cluster={"wait_s": -5}), r"cluster\.wait_s: .*greater than 0"),
    Case(
        "cluster: a misspelt key",
        asked(cluster={"adress": "auto"}),
        r"unknown key 'cluster\.adress' \(did you mean 'address'\?\)",
    ),
)
