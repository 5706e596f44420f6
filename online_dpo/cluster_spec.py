"""Where a run's processes are: the section `cluster`. What it says may change when a run goes on elsewhere."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from online_dpo.spec import Positive, Spec

HOST_AND_PORT = re.compile(r"[^\s:/]+:\d{1,5}|\[[0-9A-Fa-f:.]+\]:\d{1,5}")


class ClusterSpec(Spec):
    """On which Ray the run's processes are, and how many engines. `cluster: auto` is short for `{address: auto}`."""

    address: str | None = Field(
        default=None,
        description="null: a Ray of the run's own, on loopback; auto: the cluster that this machine is part of; "
        "host:port: the head of a running cluster",
    )
    engines: Positive = Field(default=1, description="engine replicas; each prompt goes to one that has room for it")
    lanes: Positive = Field(
        default=1,
        description="arms and seeds at work side by side, each with engines, learner workers and judges of its own",
    )
    strategy: Literal["pack", "spread"] = Field(
        default="pack", description="the run's processes on as few nodes as hold them, or over as many as there are"
    )
    wait_s: Annotated[float, Field(gt=0.0, le=86400.0)] = Field(
        default=20.0, description="seconds that a cluster has to find room for the run"
    )
    copy_weights: bool = Field(
        default=False,
        description="weights are copied to each node's own disk once a node, also where it sees the run folder",
    )
    judge_while_sampling: bool | None = Field(
        default=None,
        description="answers are judged as they come; default: by judges that wait for a server, or have a GPU",
    )
    sample_while_evaluating: bool | None = Field(
        default=None,
        description="a round is sampled while judge and learner evaluate the one before; default: where engine and "
        "learner have a GPU each",
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"address": value} if isinstance(value, str) else value

    @field_validator("address")
    @classmethod
    def _reachable(cls, value: str | None) -> str | None:
        if value is None or value == "auto" or HOST_AND_PORT.fullmatch(value):
            return value
        if value.startswith("ray://"):
            raise ValueError("a run is a driver inside the cluster, not a Ray client: give auto or host:port")
        raise ValueError("null, auto or host:port is expected, for example 10.0.0.1:6379")
