"""The card's figures and the split, by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.errors import ConfigError, DataError
from online_dpo.preferences import Preference, group_of
from online_dpo.reward_card import held_out_figures, verdict
from online_dpo.reward_pairs import encode, split_by_prompt
from online_dpo.reward_spec import reward_spec
from online_dpo.types import Message


def preference(number: int, chosen: str = "yes", rejected: str = "no", prompt: str | None = None) -> Preference:
    return Preference(str(number), (Message("user", prompt or f"Question {number}"),), chosen, rejected)


def test_figures_by_hand() -> None:
    """Four prompts, r_w − r_l = ln 3, 0, −ln 3, ln 3: right 1, ½, 0, 1, mean 0.625.

    The longer answer was chosen on the first, the second's lengths are equal, it was rejected on the others: mean
    (1 + ½ + 0 + 0)/4 = 0.375, difference 0.25. P of the chosen: ¾, ½, ¼, ¾, Brier (1/16 + 1/4 + 9/16 + 1/16)/4.
    Scores: ln 3, 0, 0, 0, 0, ln 3, ln 3, 0: mean 3·ln 3/8, variance ln² 3 · (3/8)(5/8). Wilson's bounds at p = 0.625,
    n = 4, z = 1.96: centre (p + z²/8)/(1 + z²/4), half width z·√(p(1 − p)/4 + z²/64)/(1 + z²/4).
    """
    preferences = [
        preference(0, "longer", "short "),
        preference(1, "same", " same\n"),
        preference(2, "a", "bb"),
        preference(3, "", "bb"),
    ]
    log3 = math.log(3)
    figures = held_out_figures(preferences, [log3, 0.0, 0.0, log3], [0.0, 0.0, log3, 0.0], seed=0)
    z2 = 1.959964**2
    centre, scale = (0.625 + z2 / 8) / (1 + z2 / 4), 1 + z2 / 4
    half = math.sqrt(z2 * (0.625 * 0.375 / 4 + z2 / 64)) / scale
    assert figures["accuracy"] == pytest.approx({"mean": 0.625, "low": centre - half, "high": centre + half}, abs=1e-5)
    assert figures["longer_wins"]["mean"] == 0.375
    assert figures["difference"]["mean"] == pytest.approx(0.25)
    assert figures["brier"]["mean"] == pytest.approx((1 / 16 + 1 / 4 + 9 / 16 + 1 / 16) / 4)
    assert figures["score_mean"] == pytest.approx(3 * log3 / 8)
    assert figures["score_std"] == pytest.approx(log3 * math.sqrt(15) / 8)
    assert sum(one["pairs"] for one in figures["bins"]) == 4
    assert (figures["pairs"], figures["prompts"]) == (4, 4)
    json.dumps(figures, allow_nan=False)


def test_pairs_of_one_prompt_are_one_value_to_the_intervals() -> None:
    """Twenty copies of two prompts' pairs are no more evidence than two prompts."""
    pairs = [preference(i, prompt=f"q{i % 2}") for i in range(40)]
    rewards = [1.0 if i % 2 else -1.0 for i in range(40)]
    figures = held_out_figures(pairs, rewards, [0.0] * 40, seed=0)
    assert figures["prompts"] == 2
    assert figures["accuracy"]["high"] - figures["accuracy"]["low"] > 0.5


@pytest.mark.parametrize("count", [1, 3])
def test_constant_scores_have_no_deviation(count: int) -> None:
    figures = held_out_figures([preference(i) for i in range(count)], [2.0] * count, [2.0] * count, seed=0)
    assert figures["score_std"] is None
    assert figures["accuracy"]["mean"] == 0.5
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.2, "right more often"),
        (-0.2, -0.01, "right LESS often"),
        (-0.1, 0.1, "not shown to be better"),
        (0.0, 0.2, "not shown to be better"),
        (None, None, "too few held-out pairs"),
    ],
)
def test_the_verdict_says_plainly_whether_length_was_beaten(low: Any, high: Any, said: str) -> None:
    assert verdict({"difference": {"mean": 0.0, "low": low, "high": high}}).startswith(said)


@given(st.lists(st.integers(0, 8), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(prompts: list[int], share: float, seed: int) -> None:
    pairs = [preference(i, prompt=f"q{p}") for i, p in enumerate(prompts)]
    if len(set(prompts)) < 2:
        with pytest.raises(DataError, match="nothing could be held out"):
            split_by_prompt(pairs, share, seed)
        return
    train, held_out = split_by_prompt(pairs, share, seed)
    assert sorted([*train, *held_out]) == list(range(len(pairs)))
    groups = [{group_of(pairs[i]) for i in part} for part in (train, held_out)]
    assert not groups[0] & groups[1]
    assert all(groups)
    assert abs(len(groups[1]) - share * len(set(prompts))) <= 1.0


def test_the_split_follows_the_seed_and_not_the_order_of_the_file() -> None:
    pairs = [preference(i) for i in range(30)]
    _, held_out = split_by_prompt(pairs, 0.2, 1)
    _, other = split_by_prompt(pairs, 0.2, 2)
    assert len(held_out) == 6
    assert held_out != other
    _, backwards = split_by_prompt(pairs[::-1], 0.2, 1)
    assert sorted(29 - place for place in backwards) == held_out


class Letters:
    """A tokenizer of letters whose template refuses "bad"."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 - read only
    chat_template = "there"

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool) -> str:
        if any(turn["content"] == "bad" for turn in turns):
            raise RuntimeError("roles must\nalternate")
        return "".join(turn["content"] for turn in turns)

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_long_pairs_are_left_out_and_counted() -> None:
    """ "ab" + "yes" are 5 letters, + "no" 4; one text of 7 puts its whole pair out."""
    pairs = [preference(0, prompt="ab"), preference(1, "yes!!", "no", prompt="ab")]
    found = encode(pairs, Letters(), 5)
    assert found.too_long == 1
    assert found.preferences == (pairs[0],)
    assert found.pairs[0].chosen == tuple(map(ord, "abyes"))
    assert found.pairs[0].rejected == tuple(map(ord, "abno"))
    with pytest.raises(DataError, match="all 2 pairs are longer than 3 tokens"):
        encode(pairs, Letters(), 3)


def test_a_template_that_fails_names_the_pair() -> None:
    with pytest.raises(DataError, match="pair '7': the chat template fails: RuntimeError: roles must alternate"):
        encode([preference(7, prompt="bad")], Letters(), 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 0.0}, "lr: .*greater than 0"), ({"held_out": 1.0}, "held_out: "), ({"epoch": 2}, "did you mean 'epochs'")],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        reward_spec(**settings)
    assert "\n" not in str(caught.value)


def test_the_learning_rate_s_default_depends_on_what_is_trained() -> None:
    assert (reward_spec().rate, reward_spec(lora_rank=4).rate, reward_spec(lr=3.0).rate) == (1e-5, 2e-4, 3.0)
