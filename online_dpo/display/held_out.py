"""What held-out answers say of each round."""

from __future__ import annotations

from rich.console import Group

from online_dpo.display.figures import get, interval, number, share
from online_dpo.display.tables import Column, Rows, figure_table, mean, spaced


def round_table(metrics: Rows) -> Group:
    """Three tables of all arms, seeds and rounds: what the judge says, how far the policy has gone for it, and what
    its answers look like."""
    reward: list[Column] = [
        ("reward", lambda row: interval(get(row, "held_out", "reward"))),
        ("change", lambda row: interval(get(row, "held_out", "reward_change"), sign=True)),
        ("win rate", lambda row: share(get(row, "held_out", "win_rate"))),
    ]
    drift: list[Column] = [
        ("KL to initial", lambda row: interval(get(row, "held_out", "kl_initial"))),
        ("a token", lambda row: number(mean(get(row, "held_out", "kl_initial_token")))),
        ("to reference", lambda row: interval(get(row, "held_out", "kl_reference"))),
    ]
    answers: list[Column] = [
        ("length", lambda row: number(mean(get(row, "held_out", "length")), places=1)),
        ("ended", lambda row: share(mean(get(row, "held_out", "ended")))),
        ("distinct-2", lambda row: number(mean(get(row, "held_out", "distinct_2")), places=3)),
        ("abstained", lambda row: number(get(row, "held_out", "abstained"))),
    ]
    count = max((get(row, "held_out", "n") or 0 for row in metrics), default=0)
    return spaced(
        figure_table(
            f"Held-out reward ({number(count)} prompts; change and win rate against the initial policy)",
            metrics,
            reward,
            "in brackets: 95 % intervals over prompts, of this seed alone",
        ),
        figure_table("KL from the initial policy and from the round's reference (nats a sequence)", metrics, drift),
        figure_table("Held-out answers (length in tokens)", metrics, answers),
    )
