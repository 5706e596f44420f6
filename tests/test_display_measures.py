"""Tables of off-policyness, the gold judge and human pairs: figures in place, widths kept, absent where absent."""

from __future__ import annotations

from typing import Any

import pytest
from test_display import around, metrics_row, rendered

from online_dpo.display import off_policy_table, round_table, stage_table

LINE = 100


def measured(**changes: Any) -> dict[str, Any]:
    """A round with all measures."""
    row = metrics_row()
    row["held_out"] |= {
        "gold": around(0.512, 0.11),
        "gold_change": around(-0.034, 0.12),
        "gold_win_rate": around(0.48, 0.09),
        "entropy": 2.3456,
        "self_bleu": 0.1234,
        "human_pairs": {"n": 512, "implicit_accuracy": around(0.61, 0.04), "ranking_accuracy": around(0.52, 0.04)},
    }
    row["off_policy"] = {
        "answers": 64,
        "staleness": 12,
        "start": {"kl_token": 0.011, "kl_token_k3": 0.0123, "ess": 0.871, "ess_token": 0.99, "coverage": 0.06},
        "end": {"kl_token": 0.04, "kl_token_k3": 0.0456, "ess": 0.312, "ess_token": 0.95, "coverage": 0.25},
        "displacement": {"chosen": around(-1.25, 0.5), "rejected": around(-4.5, 0.75)},
        "implicit_accuracy": around(0.84, 0.1),
    }
    row["seconds"] |= {"off_policy": 3.0, "human_pairs": 4.0}
    return row | changes


def test_off_policyness_by_round() -> None:
    text = rendered(off_policy_table([measured(), measured(arm="a_longer_name_", round=2)]))
    assert max(map(len, text.splitlines())) <= LINE
    row = next(line for line in text.splitlines() if line.startswith("on_policy"))
    assert row.split() == ["on_policy", "1", "12", "0.012", "0.046", "87", "%", "31", "%", "25", "%"]
    assert "-1.250 [-1.750, -0.750]" in text
    assert "-4.500 [-5.250, -3.750]" in text
    assert "84 % [74, 94]" in text


def test_rounds_that_were_not_measured_have_no_table() -> None:
    assert rendered(off_policy_table([metrics_row(index=0), measured(off_policy=None)])).strip() == ""
    text = rendered(off_policy_table([measured(off_policy=None, round=1), measured(round=2)]))
    assert [line.split()[1] for line in text.splitlines() if line.startswith("on_policy")] == ["2", "2"]


def test_what_an_offline_round_lacks_is_a_dash() -> None:
    row = measured()
    nothing = {"kl_token": None, "kl_token_k3": None, "ess": None, "ess_token": None, "coverage": 0.9}
    row["off_policy"] |= {"staleness": None, "start": nothing, "end": nothing}
    text = rendered(off_policy_table([row]))
    found = next(line for line in text.splitlines() if line.startswith("on_policy"))
    assert found.split() == ["on_policy", "1", "–", "–", "–", "–", "–", "90", "%"]


def test_gold_stands_beside_reward_and_people_below() -> None:
    text = rendered(round_table([measured()]))
    assert max(map(len, text.splitlines())) <= LINE
    assert text.index("Held-out reward") < text.index("Held-out gold reward") < text.index("KL from")
    assert "-0.034 [-0.154, +0.086]" in text
    assert "48 % [39, 57]" in text
    assert "61 % [57, 65]" in text
    assert "52 % [48, 56]" in text
    for figure in ("0.123", "2.346"):
        assert figure in text
    without = rendered(round_table([metrics_row()]))
    assert "gold" not in without
    assert "Human pairs" not in without


def test_the_measuring_counts_with_the_evaluation() -> None:
    """21.24 s and 3 and 4: 28.2 s."""
    assert "28.2" in rendered(stage_table([measured()]))


@pytest.mark.parametrize("figures", [{}, {"start": None, "end": []}, {"displacement": {"chosen": 3}}])
def test_odd_figures_do_not_break_it(figures: dict[str, Any]) -> None:
    assert "on_policy" in rendered(off_policy_table([measured(off_policy=figures)]))
