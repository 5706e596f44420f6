"""How many GPUs a run asks for, by hand, and what is said where they are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from online_dpo.config import EngineSpec, Experiment, LearnerSpec
from online_dpo.errors import ConfigError
from online_dpo.gpus import check_gpus, gpu_shares


def test_none_asked_for_where_there_are_none() -> None:
    assert gpu_shares(EngineSpec(), LearnerSpec(workers=2), 0) == (0.0, 0.0)
    assert gpu_shares(EngineSpec(share_gpu=True), LearnerSpec(), 0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("engine_gpus", "worker_gpus", "line"),
    [
        (1000, None, r"the engine \(1000\) and 2 learner worker\(s\) \(1 each\) ask for 1002 GPUs, there are 4"),
        (0, 500, r"the engine \(0\) and 2 learner worker\(s\) \(500 each\) ask for 1000 GPUs, there are 4"),
    ],
)
def test_more_than_there_are(engine_gpus: float, worker_gpus: float | None, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        gpu_shares(EngineSpec(gpus=engine_gpus), LearnerSpec(workers=2, gpus_per_worker=worker_gpus), 4)


@pytest.mark.parametrize(
    ("there", "engine", "learner", "expected"),
    [
        (1, {"share_gpu": True}, {}, (0.5, 0.5)),
        (2, {}, {}, (1.0, 1.0)),
        (4, {"tensor_parallel_size": 2}, {"workers": 2}, (2.0, 1.0)),
        (1, {}, {}, None),
        (1, {"share_gpu": True}, {"workers": 2}, None),
        (1, {"gpus": 0}, {}, (0.0, 1.0)),
    ],
)
def test_shares_by_hand(
    there: int, engine: dict[str, Any], learner: dict[str, Any], expected: tuple[float, float] | None
) -> None:
    """One each; half each when shared; tensor parallelism takes one a part."""
    specs = EngineSpec.model_validate(engine), LearnerSpec.model_validate(learner)
    if expected is None:
        with pytest.raises(ConfigError, match="ask for"):
            gpu_shares(*specs, there)
    else:
        assert gpu_shares(*specs, there) == expected


def experiment(**changes: Any) -> Experiment:
    given = {"name": "x", "model": "m", "prompts": {"path": "p"}, "judge": "judges.length:LengthJudge"}
    return Experiment.model_validate(given | changes)


def test_this_machine_is_asked_for_what_an_experiment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_gpus(experiment())
    check_gpus(experiment(engine={"gpus": 0.5}, learner={"gpus_per_worker": 0.5}))
    with pytest.raises(ConfigError, match=r"ask for 3 GPUs, there are 1"):
        check_gpus(experiment(engine={"gpus": 2}))
    judge = {"use": "judges.length:LengthJudge", "actor": {"gpus": 2}}
    for changes in ({"judge": judge}, {"evaluation": {"gold": judge}}, {"arms": {"a": {"judge": judge}}}):
        with pytest.raises(ConfigError, match=r"actor.gpus asks for 2 GPUs, there are 1"):
            check_gpus(experiment(**changes, engine={"gpus": 0}, learner={"gpus_per_worker": 0}))


def test_a_clusters_gpus_are_not_this_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus(experiment(engine={"gpus": 8}, cluster="10.0.0.1:6379"))
