"""Figure `handover`: seconds until a live vLLM engine holds a new policy, against starting an engine with it.

Both end with the check that the engine's log-probs of the probe are the policy's. Two policies of other weights take
turns, so that each load is a real one. Starting is timed with Ray up and the model's files in the page cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import ray
import torch
from figures import Report
from live import Live, live

from online_dpo.backends import ray_cluster as cluster
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.vllm_engine import vllm_environment
from online_dpo.errors import EngineError
from online_dpo.gpus import gpu_shares
from online_dpo.types import Policy

MODEL_LENGTH = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This figure has no options of its own."""


def run(options: argparse.Namespace, report: Report) -> None:
    """Load, start, load, start."""
    loads: list[float] = []
    starts: list[float] = []
    with tempfile.TemporaryDirectory() as place, live(options.model, MODEL_LENGTH) as found:
        policies = [moved(found.initial, Path(place) / str(seed), seed) for seed in (1, 2)]
        for policy in policies:  # the first load of all warms up
            found.backends.engine.load(policy)
        for number in range(options.runs):
            policy = policies[number % 2]
            began = time.perf_counter()
            found.backends.engine.load(policy)
            loads.append(time.perf_counter() - began)
            starts.append(start_engine(found, policy))
    report.add("hand-over of new weights to a live engine, against starting it with them", loads, starts, "s", "less")


def moved(initial: Policy, folder: Path, seed: int) -> Policy:
    """Another policy: the initial one with every weight moved by seeded noise, saved, with its probe."""
    assert initial.probe is not None
    model = PolicyModel(initial, model_name="benchmark")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable:
            parameter.add_(0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model.save(f"moved-{seed}", folder, initial.probe.token_ids)


def start_engine(found: Live, policy: Policy) -> float:
    """Seconds that an engine of its own takes, from its process's start until it is known to hold `policy`."""
    experiment = found.experiment
    settings = cluster.ModelSettings(policy, experiment.model, None, False)
    gpus, _ = gpu_shares(experiment.engine, experiment.learner, cluster.gpus_there())
    began = time.perf_counter()
    actor = cluster.start_engine_actor(vllm_environment(experiment.engine, cluster.cores()), gpus)
    kind = found.backends.engine.kind
    cluster.wait(actor.build.remote(kind, settings, experiment.engine, found.max_model_len), EngineError, "the engine")
    cluster.RayEngine(actor, kind).load(policy)
    took = time.perf_counter() - began
    ray.kill(actor)
    return took
