"""A run's engine and learner in this process: what a judge does to a run is the same, and Ray takes ten seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from online_dpo.backends import factory
from online_dpo.config import Experiment, JudgeSpec
from online_dpo.judging import Judge, load_judge
from online_dpo.types import Policy


@contextmanager
def one_process() -> Iterator[None]:
    """Inside, runs start no Ray."""
    session = SimpleNamespace(end_sets=lambda: None)
    with (
        patch.object(factory, "ray_session", lambda _: nullcontext(session)),
        patch.object(factory, "start_set", _start_set),
    ):
        yield


@contextmanager
def _start_set(
    _: Any,
    experiment: Experiment,
    initial: Policy,
    *,
    probe_token_ids: Sequence[int],
    max_model_len: int,
    say: Callable[[str], None],
) -> Iterator[factory.Backends]:
    """As `factory.start_set`, of the transformers engine and one learner."""
    from online_dpo.backends.hf_engine import TransformersEngine
    from online_dpo.backends.learner import LocalLearner
    from online_dpo.backends.policy_model import PolicyModel

    model = PolicyModel(initial, model_name=experiment.model, lora=experiment.lora)
    engine = TransformersEngine(initial, experiment.engine)
    yield factory.Backends(engine, LocalLearner(model, probe_token_ids), _here)


def _here(spec: JudgeSpec, folders: Sequence[Path]) -> Judge:
    return load_judge(spec, folders)
