"""How far the policy that is trained was from what sampled its pairs, and what training did to these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group

from online_dpo.display.figures import get, interval, number, share
from online_dpo.display.tables import Column, Rows, figure_table, spaced


def off_policy_table(metrics: Rows) -> Group:
    """Two tables of the rounds whose pairs were measured; nothing where none were."""
    measured = [row for row in metrics if get(row, "off_policy") is not None]
    if not measured:
        return spaced()
    distance: list[Column] = [
        ("steps old", lambda row: number(get(row, "off_policy", "staleness"))),
        ("KL start", _figure("start", "kl_token_k3")),
        ("KL end", _figure("end", "kl_token_k3")),
        ("sample start", _share("start", "ess")),
        ("sample end", _share("end", "ess")),
        ("uncovered", _share("end", "coverage")),
    ]
    moved: list[Column] = [
        ("chosen", lambda row: interval(get(row, "off_policy", "displacement", "chosen"), sign=True)),
        ("rejected", lambda row: interval(get(row, "off_policy", "displacement", "rejected"), sign=True)),
        ("implicit accuracy", lambda row: share(get(row, "off_policy", "implicit_accuracy"))),
    ]
    return spaced(
        figure_table(
            "Off-policyness of the pairs, at the round's start and end",
            measured,
            distance,
            "KL: source to policy, nats a token; sample: effective sample size (100 % on-policy); uncovered: pairs' "
            "answers below the policy's own 5th percentile",
        ),
        figure_table("Change of the pairs' log-probs in the round (nats an answer)", measured, moved),
    )


def _figure(*path: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: number(get(row, "off_policy", *path))


def _share(*path: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: share(get(row, "off_policy", *path))
