"""The packed row: every token once, at the position that it would have alone, seeing its own prompt and itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from online_dpo.backends.forward import choose_forward
from online_dpo.logps import token_logps
from online_dpo.packing import Item, Layout, pack

CPU = torch.device("cpu")
TOKENS = st.integers(3, 250)


@st.composite
def batches(draw: st.DrawFn, longest: int = 9) -> list[Item]:
    """1 to 6 items of a few prompts: some share a prompt, some are equal, some prompts begin alike."""
    prompts = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=longest), min_size=1, max_size=4))
    if draw(st.booleans()):
        # A prompt that goes on from another shares no packed token with it.
        prompts.append([*prompts[0], *draw(st.lists(TOKENS, min_size=1, max_size=2))])
    items: list[Item] = draw(
        st.lists(
            st.tuples(st.sampled_from(prompts), st.lists(TOKENS, min_size=1, max_size=longest)), min_size=1, max_size=5
        )
    )
    repeated = draw(st.lists(st.sampled_from(items), max_size=2))
    return draw(st.permutations([*items, *repeated]))


# --- by hand ---


def test_layout_by_hand() -> None:
    """Prompts 7 8 and 5; completions 9 and 4 6 of the first, 3 of the second; the first pair twice.

    Packed: places 0-1 and 2 are the prompts, 3, 4-5 and 6 the completions. 9 and 4 are predicted by 8 at place 1, 6 by
    4 at place 4, 3 by 5 at place 2. Positions of completions go on at 2, 2 and 1.
    """
    row, number = pack([([7, 8], [9]), ([5], [3]), ([7, 8], [4, 6]), ([7, 8], [9])])
    assert number == (0, 2, 1, 0)
    assert row.token_ids.tolist() == [[7, 8, 5, 9, 4, 6, 3]]
    assert row.position_ids.tolist() == [[0, 1, 0, 2, 2, 3, 1]]
    assert row.predictors.tolist() == [1, 1, 4, 2]
    assert row.targets.tolist() == [9, 4, 6, 3]
    assert row.lengths == (1, 2, 1)
    layout = row.layout
    assert layout.prompts.tolist() == [[0, 1], [2, 0]]
    assert layout.completions.tolist() == [[3, 0], [4, 5], [6, 0]]
    assert layout.prompt_lengths.tolist() == [2, 1]
    assert layout.completion_lengths.tolist() == [1, 2, 1]
    assert layout.owner.tolist() == [0, 0, 1]
    # The rectangles hold 2·2 + 3·2 places: prompt 1's second and the ends of completions 0 and 2 are empty.
    assert layout.back.tolist() == [0, 1, 2, 4, 6, 7, 8]
    assert layout.filled.flatten().tolist() == [True, True, True, False, True, False, True, True, True, False]


@pytest.mark.parametrize(
    ("items", "each"),
    [
        ([([7], [1]), ([7], [2]), ([8], [1]), ([8], [3])], 2),
        ([([7], [1])], 1),
        ([([7], [1]), ([7], [2]), ([7], [3])], 3),
        ([([7], [1]), ([7], [2]), ([8], [1])], None),
        # As many as 2 a prompt, but 3 and 1.
        ([([7], [1]), ([7], [2]), ([7], [3]), ([8], [3])], None),
    ],
)
def test_equal_shares_are_recognised(items: list[Item], each: int | None) -> None:
    """`each` lets prompts be repeated instead of gathered: it must be None wherever the shares differ."""
    assert pack(items)[0].layout.each == each


def test_masks_by_hand() -> None:
    """Prompts of 3 and 1 tokens, one completion of 2 each, a window of 2: a token sees itself and the one before."""
    row, _ = pack([([7, 8, 9], [4, 5]), ([6], [2, 3])])
    layout = row.layout
    t, f = True, False
    assert layout.prompt_mask(None) is None
    # Three tokens never reach further back than a window of 3.
    assert layout.prompt_mask(3) is None
    window = layout.prompt_mask(2)
    assert window is not None
    assert window.tolist() == [[[[t, f, f], [t, t, f], [f, t, t]]]]
    # Keys: three places of the prompt, two of the completion. The second prompt fills one place of its three.
    assert layout.completion_mask(None).tolist() == [
        [[[t, t, t, t, f], [t, t, t, t, t]]],
        [[[t, f, f, t, f], [t, f, f, t, t]]],
    ]
    assert layout.completion_mask(2).tolist() == [
        [[[f, f, t, t, f], [f, f, f, t, t]]],
        [[[t, f, f, t, f], [f, f, f, t, t]]],
    ]


@pytest.mark.parametrize("item", [([], [5]), ([5], []), ([], [])])
def test_empty_prompt_or_completion_is_refused(item: Item) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack([([1], [2]), item])


def test_lists_and_tuples_are_the_same_tokens() -> None:
    row, number = pack([([7, 8], (9,)), ((7, 8), [9])])
    assert number == (0, 0)
    assert row.lengths == (1,)


def test_moving_a_row_keeps_all_of_it() -> None:
    """`to` returns the same things in their places; "meta" is the second device that every machine has."""
    row, _ = pack([([7, 8], [9]), ([5], [3, 4])])
    moved, back = row.to(torch.device("meta")), row.to(CPU)
    for name in ("token_ids", "position_ids", "predictors", "targets"):
        assert getattr(moved, name).device.type == "meta"
        assert torch.equal(getattr(back, name), getattr(row, name))
    row.layout.masks["made on"] = "cpu"
    assert row.to(torch.device("meta")).layout.masks == {}
    for name in ("prompts", "completions", "prompt_lengths", "completion_lengths", "owner", "back"):
        assert getattr(moved.layout, name).device.type == "meta"
        assert torch.equal(getattr(back.layout, name), getattr(row.layout, name))
    assert moved.lengths == row.lengths


# --- whatever the shapes ---


@settings(max_examples=150, deadline=None)
@given(items=batches())
def test_every_token_stands_once_and_as_if_alone(items: list[Item]) -> None:
    """Rebuilt from the layout's rectangles alone: each distinct prompt and completion, its tokens and positions."""
    row, number = pack(items)
    layout, tokens, positions = row.layout, row.token_ids[0], row.position_ids[0]
    distinct = {(tuple(prompt), tuple(completion)) for prompt, completion in items}
    prompts = {prompt for prompt, _ in distinct}
    assert tokens.shape[0] == sum(map(len, prompts)) + sum(len(completion) for _, completion in distinct)
    rebuilt = [_rebuilt(layout, tokens, positions, n) for n in range(len(row.lengths))]
    assert set(rebuilt) == distinct
    assert len(rebuilt) == len(distinct)
    for i, (prompt, completion) in zip(number, items, strict=True):
        assert rebuilt[i] == (tuple(prompt), tuple(completion))
    # Both ways between packed row and rectangles: every packed token has exactly one place, and it leads back.
    assert torch.equal(layout.places[layout.back], torch.arange(tokens.shape[0]))
    assert layout.filled.sum() == tokens.shape[0]
    assert layout.filled.flatten().nonzero().squeeze(-1).tolist() == layout.back.tolist()
    group, answer, at = layout.seats
    assert torch.equal(at, positions)
    for n, prompt in enumerate(layout.prompts):
        where = prompt[: int(layout.prompt_lengths[n])]
        assert group[where].tolist() == [n] * len(where)
        assert answer[where].tolist() == [-1] * len(where)
    for n, completion in enumerate(layout.completions):
        where = completion[: row.lengths[n]]
        assert group[where].tolist() == [int(layout.owner[n])] * len(where)
        assert answer[where].tolist() == [n] * len(where)


def _rebuilt(
    layout: Layout, tokens: Tensor, positions: Tensor, completion: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    owner = int(layout.owner[completion])
    prompt = layout.prompts[owner, : int(layout.prompt_lengths[owner])]
    answer = layout.completions[completion, : int(layout.completion_lengths[completion])]
    where = torch.cat([prompt, answer])
    assert positions[where].tolist() == list(range(len(where)))
    return tuple(tokens[prompt].tolist()), tuple(tokens[answer].tolist())


@settings(max_examples=150, deadline=None)
@given(items=batches())
def test_predictor_is_the_token_before(items: list[Item]) -> None:
    """Of each completion's token t, the place of the token at t − 1: its own, or the last of its own prompt."""
    row, _ = pack(items)
    layout = row.layout
    expected, targets = [], []
    for n, length in enumerate(row.lengths):
        owner = int(layout.owner[n])
        own = layout.completions[n, :length].tolist()
        expected += [int(layout.prompts[owner, int(layout.prompt_lengths[owner]) - 1]), *own[:-1]]
        targets += row.token_ids[0, own].tolist()
    assert row.predictors.tolist() == expected
    assert row.targets.tolist() == targets


@settings(max_examples=100, deadline=None)
@given(items=batches(), window=st.one_of(st.none(), st.integers(1, 20)))
def test_masks_say_who_sees_whom(items: list[Item], window: int | None) -> None:
    """Told one place at a time: a key of one's own prompt or of oneself, not later, fewer than `window` back."""
    row, _ = pack(items)
    layout = row.layout
    wide, long = layout.prompts.shape[1], layout.completions.shape[1]
    within = float("inf") if window is None else window
    mask = layout.prompt_mask(window)
    causal = torch.ones(wide, wide, dtype=torch.bool).tril() if mask is None else mask[0, 0]
    assert causal.tolist() == [[0 <= q - k < within for k in range(wide)] for q in range(wide)]
    found = layout.completion_mask(window)
    assert found.shape == (len(row.lengths), 1, long, wide + long)
    for n in range(len(row.lengths)):
        before = int(layout.prompt_lengths[layout.owner[n]])
        for q in range(long):
            to_prompt = [k < before and before + q - k < within for k in range(wide)]
            to_own = [0 <= q - k < within for k in range(long)]
            assert found[n, 0, q].tolist() == to_prompt + to_own


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2_capped"])
def plain_and_packed(tiny_lm: Callable[[str], Any], request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same weights twice: one attends plainly, one packed. Without, and with, windows and capped scores."""
    plain, packed = tiny_lm(request.param), tiny_lm(request.param)
    plain.set_attn_implementation("eager")
    assert choose_forward(packed, "packed", CPU, nullcontext).packed
    return plain, packed


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=batches())
@torch.no_grad()
def test_logps_are_those_of_each_sequence_alone(plain_and_packed: tuple[Any, Any], items: list[Item]) -> None:
    """Any prompts, completions and sharing, per token, against one unpadded forward a sequence."""
    plain, packed = plain_and_packed
    row, number = pack(items)
    parts = token_logps(packed, row).split_with_sizes(list(row.lengths))
    for i, (prompt, completion) in zip(number, items, strict=True):
        logits = plain(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        expected = logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(parts[i], expected, atol=1e-5, rtol=0)
