"""What held-out answers say of each round."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from online_dpo.display.figures import get, interval, number, share
from online_dpo.display.tables import Column, Rows, figure_table, mean, spaced


def round_table(metrics: Rows) -> Group:
    """Tables of all arms, seeds and rounds: what the judge says, and the gold judge; how far the policy has gone for
    it; what its answers look like; how it ranks people's pairs."""
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
        ("self-BLEU", lambda row: number(get(row, "held_out", "self_bleu"), places=3)),
        ("entropy", lambda row: number(get(row, "held_out", "entropy"), places=3)),
    ]
    count = max((get(row, "held_out", "n") or 0 for row in metrics), default=0)
    return spaced(
        figure_table(
            f"Held-out reward ({number(count)} prompts; change and win rate against the initial policy)",
            metrics,
            reward,
            "in brackets: 95 % intervals over prompts, of this seed alone",
        ),
        *_gold(metrics),
        figure_table("KL from the initial policy and from the round's reference (nats a sequence)", metrics, drift),
        figure_table("Held-out answers (length in tokens, entropy in nats a token)", metrics, answers),
        *_human_pairs(metrics),
    )


def _gold(metrics: Rows) -> list[Table]:
    """What the gold judge says, where there is one."""
    columns: list[Column] = [
        ("gold", lambda row: interval(get(row, "held_out", "gold"))),
        ("change", lambda row: interval(get(row, "held_out", "gold_change"), sign=True)),
        ("win rate", lambda row: share(get(row, "held_out", "gold_win_rate"))),
    ]
    scored = any(get(row, "held_out", "gold") is not None for row in metrics)
    return [figure_table("Held-out gold reward (a judge that training never sees)", metrics, columns)] if scored else []


def _human_pairs(metrics: Rows) -> list[Table]:
    """How policies rank pairs of people's, where the experiment has some."""
    columns: list[Column] = [
        ("pairs", lambda row: number(get(row, "held_out", "human_pairs", "n"))),
        ("by log π/π₀", lambda row: share(get(row, "held_out", "human_pairs", "implicit_accuracy"))),
        ("by log π", lambda row: share(get(row, "held_out", "human_pairs", "ranking_accuracy"))),
    ]
    title = "Human pairs: how often the chosen answer ranks higher (implicit reward; probability)"
    ranked = any(get(row, "held_out", "human_pairs") is not None for row in metrics)
    return [figure_table(title, metrics, columns)] if ranked else []
