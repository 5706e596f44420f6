"""FlexAttention's mask says what the rectangles of `packed_attention` say. Values alone: no way back on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from online_dpo import flex_attention, packed_attention
from online_dpo.backends.hf_model import load_causal_lm
from online_dpo.flex_attention import sees
from online_dpo.logps import token_logps
from online_dpo.packing import pack

ITEMS = (
    ([1, 40, 41, 42, 43, 44, 45], [50, 51, 2]),
    ([1, 40, 41, 42, 43, 44, 45], [60, 61, 62, 63, 64, 65, 66]),
    ([1], [70, 71]),
    ([1, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90], [91, 92, 93, 94]),
)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma2"])
@torch.no_grad()
def test_same_log_probs_as_rectangles(
    tiny_model: Callable[[str, Path], Path], tmp_path: Path, architecture: str
) -> None:
    """Grouped heads, sliding windows and soft-capped scores included, as the architectures have them."""
    model: Any = load_causal_lm(tiny_model(architecture, tmp_path), torch.float32)
    row, _ = pack(ITEMS)
    found = []
    for name, attention in (
        (packed_attention.NAME, packed_attention.packed_attention),
        (flex_attention.NAME, flex_attention.packed_flex_attention),
    ):
        packed_attention.register(name, attention)
        model.set_attn_implementation(name)
        found.append(token_logps(model, row))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_who_sees_whom_by_hand() -> None:
    """Prompt [a b], answers [c d] and [e]: packed a b c d e. With a window of 2 nobody sees further back than one."""
    row, _ = pack([([5, 6], [7, 8]), ([5, 6], [9])])
    places = torch.arange(5)
    rule = sees(row.layout, None)
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1],
        ]
    )
    assert torch.equal(rule(None, None, places[:, None], places[None, :]).long(), expected)
    narrow = sees(row.layout, 2)(None, None, places[:, None], places[None, :]).long()
    assert narrow.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_two_prompts_do_not_see_each_other() -> None:
    """Prompts [a] and [b c] with an answer each: a block diagonal, but for the places of the answers behind both."""
    row, _ = pack([([5], [7]), ([6, 8], [9])])
    places = torch.arange(5)
    seen = sees(row.layout, None)(None, None, places[:, None], places[None, :]).long()
    assert seen.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 1, 0, 1]]
