"""Passes by tokens: within the budget, every pair once, what shares a prompt together; workers evenly loaded."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from online_dpo.packing import Item, pack
from online_dpo.passes import deal, fill, tokens_of

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@st.composite
def some_units(draw: st.DrawFn) -> list[list[Item]]:
    """Pairs and single items of a few prompts; with four kinds of token, prompts and answers often coincide."""
    prompts = draw(st.lists(TOKENS, min_size=1, max_size=4))
    units: list[list[Item]] = []
    for _ in range(draw(st.integers(1, 10))):
        prompt = draw(st.sampled_from(prompts))
        units.append([(prompt, draw(TOKENS)) for _ in range(draw(st.integers(1, 2)))])
    return units


# --- counting ---


def test_shared_prompt_is_counted_once() -> None:
    """A prompt of 3 with answers of 2 and 1: 6, not 9. The same pair again adds nothing; the prompt alone of another
    pair, 3 more; the same answer to another prompt is another answer."""
    pair: list[Item] = [([7, 8, 9], [1, 2]), ([7, 8, 9], [3])]
    assert tokens_of(pair) == 6
    assert tokens_of([*pair, *pair]) == 6
    assert tokens_of([*pair, ([7, 8], [1, 2])]) == 10
    assert tokens_of([]) == 0


def test_plain_rows_count_every_prompt() -> None:
    """Two items behind one prompt of two tokens, answers of 3 and 1: 6 packed, 5 + 3 plain; a budget of 6 splits."""
    pair = [([7, 8], [1, 2, 3]), ([7, 8], [4])]
    assert (tokens_of(pair), tokens_of(pair, packed=False)) == (6, 8)
    units = [[item] for item in pair]
    assert fill(units, 6) == [[0, 1]] or fill(units, 6) == [[1, 0]]
    assert sorted(map(len, fill(units, 6, packed=False))) == [1, 1]


@given(units=some_units())
def test_count_is_what_a_packed_row_holds(units: list[list[Item]]) -> None:
    items = [item for unit in units for item in unit]
    assert tokens_of(items) == pack(items)[0].token_ids.shape[1]


# --- filling ---


@given(units=some_units(), budget=st.integers(1, 60))
def test_passes_keep_the_budget_and_cover_all_once(units: list[list[Item]], budget: int) -> None:
    """Only a unit that is too large by itself goes beyond, alone."""
    passes = fill(units, budget)
    assert sorted(index for chosen in passes for index in chosen) == list(range(len(units)))
    for chosen in passes:
        assert chosen
        assert tokens_of([item for index in chosen for item in units[index]]) <= budget or len(chosen) == 1


@given(units=some_units(), budget=st.integers(1, 60))
def test_no_two_neighbouring_passes_would_fit_together(units: list[list[Item]], budget: int) -> None:
    """A pass ends only where the next unit would not fit."""
    passes = fill(units, budget)
    for chosen, after in pairwise(passes):
        both = [item for index in (*chosen, after[0]) for item in units[index]]
        assert tokens_of(both) > budget


@given(units=some_units(), budget=st.integers(1, 60))
def test_units_of_one_prompt_stand_together(units: list[list[Item]], budget: int) -> None:
    """In the order of the passes no other prompt stands between two of one prompt."""
    order = [tuple(units[index][0][0]) for chosen in fill(units, budget) for index in chosen]
    runs = [prompt for place, prompt in enumerate(order) if place == 0 or order[place - 1] != prompt]
    assert len(runs) == len(set(runs))


def test_passes_by_hand() -> None:
    """Prompts A (2 tokens) and B (4). Pairs: A with 1 + 1, B with 2 + 2, A with 3 + 3, budget 10.

    A's pairs cost 4 and 8, together 2 + 2 + 6 = 10: one pass. B's costs 8: another, as 10 + 8 > 10."""
    a, b = [1, 2], [1, 2, 3, 4]
    units: list[list[Item]] = [
        [(a, [5]), (a, [6])],
        [(b, [5, 5]), (b, [6, 6])],
        [(a, [5, 5, 5]), (a, [6, 6, 6])],
    ]
    assert fill(units, 10) == [[0, 2], [1]]
    assert fill(units, 9) == [[0], [2], [1]]
    assert fill(units, 18) == [[0, 2, 1]]
    # Each is too large: each has a pass of its own.
    assert fill(units, 3) == [[0], [2], [1]]
    assert fill([], 10) == []


# --- dealing ---


@given(costs=st.lists(st.integers(1, 100), max_size=30), workers=st.integers(1, 6))
def test_dealing_covers_all_and_balances(costs: list[int], workers: int) -> None:
    """Every index once. No worker has more than another by over one unit's cost: moving any unit from the most loaded
    to the least would not help (Graham 1969: within 4/3 of the best)."""
    hands = deal(costs, workers)
    assert len(hands) == workers
    assert sorted(index for hand in hands for index in hand) == list(range(len(costs)))
    loads = [sum(costs[index] for index in hand) for hand in hands]
    most = hands[loads.index(max(loads))]
    if most:
        assert max(loads) - min(loads) <= min(costs[index] for index in most)
    if len(costs) >= workers:
        assert all(hands)


def test_dealing_by_hand() -> None:
    """7, 5, 4, 4, 2 on two workers: 7 | 5, then 4 to 5 (9), 4 to 7 (11), 2 to 9 (11). Indices in rising order."""
    assert deal([4, 5, 7, 2, 4], 2) == [[2, 4], [0, 1, 3]]
    assert deal([3, 3, 3], 2) == [[0, 2], [1]]
    assert deal([1], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]
