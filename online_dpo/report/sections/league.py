"""All rounds of all arms on one scale."""

from __future__ import annotations

from online_dpo.compare.sentences import NAMES
from online_dpo.report.charts import row_chart
from online_dpo.report.document import Section, Table, bounds, count, words
from online_dpo.report.subject import Subject

DRAWN = 30
"""Rows in the figure: the strongest ones. The table has all."""


def league(subject: Subject) -> Section:
    """Bradley–Terry strengths, the strongest first."""
    ratings = sorted(subject.comparison.league, key=lambda one: -one.strength.mean)
    if not ratings:
        return Section("league", "League", ("There are no pairwise judgements to rate policies by.",))
    rows = [(f"{one.arm} {one.round}", one.arm, one.strength) for one in ratings[:DRAWN]]
    axis = "Elo points above the initial policy"
    plot = row_chart("league", "Strength of each policy (arm and round)", axis, rows, subject.look)
    table = Table(
        "league",
        "League of all policies",
        ("arm", "place", "round", "Elo points"),
        tuple(
            (words(one.arm), count(place), count(one.round), bounds(one.strength, places=0, sign=True))
            for place, one in enumerate(ratings, 1)
        ),
        f"Bradley–Terry strengths, by the higher {NAMES[subject.comparison.measure]} on each prompt; 95 % intervals",
        folded=True,
    )
    text = ("A policy of 100 points more wins about 64 % of the prompts.",)
    return Section("league", "League", text, plots=(plot,) if plot else (), tables=(table,))
