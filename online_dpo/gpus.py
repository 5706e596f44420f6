"""How many GPUs an experiment asks for, and whether they are there."""

from __future__ import annotations

from online_dpo.config import EngineSpec, Experiment, LearnerSpec
from online_dpo.errors import ConfigError


def gpu_shares(engine: EngineSpec, learner: LearnerSpec, there: float, engines: int = 1) -> tuple[float, float]:
    """GPUs for each of `engines` engines and for each learner worker; zeros where `there` are none.

    Raises `ConfigError` when more are asked for than there are.
    """
    share = 0.5 if engine.share_gpu else 1.0
    default_engine = share * engine.tensor_parallel_size if there else 0.0
    for_engine = engine.gpus if engine.gpus is not None else default_engine
    for_worker = learner.gpus_per_worker if learner.gpus_per_worker is not None else (share if there else 0.0)
    wanted = for_engine * engines + for_worker * learner.workers
    if wanted > there:
        who = f"the engine ({for_engine:g})" if engines == 1 else f"{engines} engines ({for_engine:g} each)"
        raise ConfigError(
            f"{who} and {learner.workers} learner worker(s) ({for_worker:g} each) ask for "
            f"{wanted:g} GPUs, there are {there:g}; set engine.gpus and learner.gpus_per_worker, "
            "or engine.share_gpu: true"
        )
    return for_engine, for_worker


def check_gpus(experiment: Experiment) -> None:
    """Raise `ConfigError` where more GPUs are asked for than this machine has. A cluster is asked once it is joined."""
    if experiment.cluster.address is not None:
        return
    judges = [spec for name in experiment.arms for spec in (experiment.arm(name).judge, experiment.evaluation.judge)]
    judges += [experiment.evaluation.gold, experiment.audit.against]
    actors = {spec.use: spec.actor.gpus for spec in judges if spec is not None and spec.actor is not None}
    if not any((experiment.engine.gpus, experiment.learner.gpus_per_worker, *actors.values())):
        return  # what is not said is what there is
    import torch

    there = float(torch.cuda.device_count())
    gpu_shares(experiment.engine, experiment.learner, there, experiment.cluster.engines)
    for use, gpus in actors.items():
        if gpus > there:
            raise ConfigError(f"judge '{use}': actor.gpus asks for {gpus:g} GPUs, there are {there:g}")
