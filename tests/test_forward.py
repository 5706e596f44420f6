"""Choosing the forward: the fastest that gives the model's own log-probs, and one line on what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from online_dpo.backends.forward import Forward, choose_forward
from online_dpo.errors import ModelError
from online_dpo.packed_attention import NAME
from online_dpo.packing import Item

CPU = torch.device("cpu")
BOTH = ("llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "gemma2_capped", "gemma3_text", "mistral",
        "qwen2_window", "phi", "olmo2", "gpt_neox", "opt")  # fmt: skip
A, B = [1, 40, 41, 42, 43, 44, 45, 46, 47], [1, 70]
ITEMS: list[Item] = [
    (A, [50, 51, 2]),
    (B, [60, 61, 62, 63, 2]),
    (A, [80, 2]),
    (A, [50, 51, 2]),
    (B, [50, 51, 2]),
]
"""Two prompts taking turns; the first item twice, and its completion once behind the other prompt."""
WAYS = [Forward(packed, chunked) for packed in (False, True) for chunked in (False, True)]


def alone(model: nn.Module, item: Item) -> Tensor:
    prompt, completion = item
    logits: Tensor = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


def chosen(model: Any, wanted: str = "auto") -> Forward:
    return choose_forward(model, wanted, CPU, nullcontext)


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


# --- scores ---


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_items_come_back_in_their_order(tiny_lm: Callable[[str], Any], way: Forward) -> None:
    """Any order, some twice: log-probs, collisions and lengths are each item's own."""
    model = tiny_lm("llama")
    expected = [alone(model, item) for item in ITEMS]
    assert chosen(model, "packed" if way.packed else "plain").packed == way.packed
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3], [1, 1, 1], [2, 0, 0, 2]):
        found = way.scores(model, [ITEMS[i] for i in order], CPU)
        torch.testing.assert_close(found.logps, torch.cat([expected[i] for i in order]), atol=1e-5, rtol=0)
        assert found.lengths.tolist() == [len(ITEMS[i][1]) for i in order]
        parts = found.collisions.split_with_sizes(found.lengths.tolist())
        for number, i in zip(parts, order, strict=True):
            one = way.scores(model, [ITEMS[i]], CPU)
            torch.testing.assert_close(number, one.collisions, atol=1e-5, rtol=0)
        assert [len(part) for part in found.each()] == found.lengths.tolist()
        assert [x for part in found.each() for x in part] == found.logps.tolist()


@torch.no_grad()
def test_collisions_are_those_of_all_logits(tiny_lm: Callable[[str], Any]) -> None:
    """log Σ_v p_v² at every scored position, from the model's full logits."""
    model = tiny_lm("gemma2_capped")
    way = chosen(model)
    assert way.packed
    found = way.scores(model, ITEMS[:2], CPU).collisions
    model.set_attn_implementation("eager")
    expected = []
    for prompt, completion in ITEMS[:2]:
        p = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].softmax(-1)
        expected.append(p[len(prompt) - 1 : -1].square().sum(-1).log())
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


def test_repeated_item_counts_as_often_as_it_stands(tiny_lm: Callable[[str], Any]) -> None:
    """Computed once, but its gradient is that of both."""
    grads = []
    for wanted in ("plain", "packed"):
        model = tiny_lm("llama")
        logps = chosen(model, wanted).scores(model, ITEMS, CPU).logps
        logps.sum().backward()  # type: ignore[no-untyped-call]
        grads.append([p.grad for p in model.parameters()])
    for plain, packed in zip(*grads, strict=True):
        torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)


# --- choosing ---


@pytest.mark.parametrize("architecture", BOTH)
def test_packed_and_chunked_where_both_are_exact(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    model = tiny_lm(architecture)
    way = chosen(model)
    assert way == Forward(packed=True, chunked=True, why="")
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("architecture", ["cohere", "granite"])
@torch.no_grad()
def test_logits_scaled_after_the_head_are_not_chunked(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """Packed all the same; and what comes out is the model's own."""
    model = tiny_lm(architecture)
    expected = torch.cat([alone(model, item) for item in ITEMS])
    way = chosen(model)
    assert (way.packed, way.chunked) == (True, False)
    assert way.why.startswith("all logits of scored positions at once (its log-probs differ by ")
    torch.testing.assert_close(way.scores(model, ITEMS, CPU).logps, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_head_that_is_no_bare_linear_layer_is_not_chunked(tiny_lm: Callable[[str], Any]) -> None:
    """A head of one's own class may do more than its weights say."""

    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny_lm("llama")
    louder = Louder(32, 259, bias=False)
    louder.weight = model.lm_head.weight
    model.lm_head = louder
    expected = torch.cat([alone(model, item) for item in ITEMS])
    way = chosen(model)
    assert way == Forward(True, False, "all logits of scored positions at once (its head is no bare linear layer)")
    torch.testing.assert_close(way.scores(model, ITEMS, CPU).logps, expected, atol=1e-5, rtol=0)


FALLS_BACK = {
    "bloom": "its log-probs differ by",
    "mamba": "its log-probs differ by",
    "gpt_oss": "sinks",
    "phimoe": "the model's mask has a window of 64, its attention one of None",
    "falcon": "its log-probs differ by",
}


@pytest.mark.parametrize("architecture", FALLS_BACK)
@torch.no_grad()
def test_what_cannot_be_packed_is_plain_and_says_why(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """The window of PhiMoE (64) is longer than the trial's texts: it is seen though it makes no difference there. The
    attention is afterwards what it was."""
    model = tiny_lm(architecture)
    own = model.config._attn_implementation
    expected = torch.cat([alone(model, item) for item in ITEMS])
    way = chosen(model)
    assert (way.packed, way.chunked) == (False, True)
    assert way.why.startswith("a prompt is computed again for each completion (")
    assert FALLS_BACK[architecture] in way.why
    assert "\n" not in way.why
    assert len(way.why) < 250
    assert model.config._attn_implementation == own
    torch.testing.assert_close(way.scores(model, ITEMS, CPU).logps, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["bloom", "phimoe"])
def test_packed_on_a_model_that_cannot_is_one_line(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    model = tiny_lm(architecture)
    with pytest.raises(ModelError, match=r"^learner\.layout is packed, and this model cannot: .*: auto$") as raised:
        chosen(model, "packed")
    assert "\n" not in str(raised.value)


@torch.no_grad()
def test_plain_is_plain(tiny_lm: Callable[[str], Any]) -> None:
    """Nothing of packing is tried, and attention stays as it was."""
    model = tiny_lm("llama")
    own = model.config._attn_implementation
    assert chosen(model, "plain") == Forward(packed=False, chunked=True, why="")
    assert model.config._attn_implementation == own
    scaled = chosen(tiny_lm("cohere"), "plain")
    assert (scaled.packed, scaled.chunked) == (False, False)
    assert scaled.why.startswith("all logits of scored positions at once")


@pytest.mark.parametrize("wanted", ["auto", "plain"])
@torch.no_grad()
def test_capped_attention_scores_are_not_left_out(tiny_lm: Callable[[str], Any], wanted: str) -> None:
    """Gemma-2 under transformers' sdpa is another model, by far more than rounding; "eager" is the truth."""
    model = tiny_lm("gemma2_capped")
    model.set_attn_implementation("sdpa")
    without = torch.cat([alone(model, item) for item in ITEMS])
    model.set_attn_implementation("eager")
    expected = torch.cat([alone(model, item) for item in ITEMS])
    assert (without - expected).abs().max() > 0.05
    model.set_attn_implementation("sdpa")
    way = chosen(model, wanted)
    torch.testing.assert_close(way.scores(model, ITEMS, CPU).logps, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_adapter_is_seen_through(tiny_lm: Callable[[str], Any]) -> None:
    """The model inside peft's is the one whose attention and head are looked at."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_lm("cohere"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    way = chosen(model.eval())
    assert (way.packed, way.chunked) == (True, False)
    assert model.get_base_model().config._attn_implementation == NAME
    assert chosen(get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules="all-linear"))).chunked


@pytest.mark.parametrize("architecture", ["llama", "gemma2_capped", "gpt2"])
@torch.no_grad()
def test_in_bfloat16(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """Under autocast both are still found, and differ from float32 by bfloat16's rounding."""
    model, same = tiny_lm(architecture), tiny_lm(architecture)
    exact = chosen(same).scores(same, ITEMS, CPU).logps
    way = choose_forward(model, "auto", CPU, bfloat16)
    assert way == Forward(packed=True, chunked=True, why="")
    with bfloat16():
        found = way.scores(model, ITEMS, CPU).logps
    assert found.dtype == torch.float32
    assert 1e-4 < (found - exact).abs().max() < 0.3


@pytest.mark.parametrize("architecture", ["cohere", "bloom"])
def test_what_is_not_exact_is_found_in_bfloat16_too(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """The tolerance is wider there, and still narrower than a forgotten scale or bias."""
    way = choose_forward(tiny_lm(architecture), "auto", CPU, bfloat16)
    assert (way.packed, way.chunked) == ((True, False) if architecture == "cohere" else (False, True))


def test_model_whose_forward_fails_is_one_line(tiny_lm: Callable[[str], Any]) -> None:
    """Whatever it raises; the message's own lines are joined."""
    model = tiny_lm("llama")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(ModelError, match=r"^the model's forward fails on a few random tokens: .*first line") as raised:
        chosen(model)
    assert "\n" not in str(raised.value)


def test_trial_leaves_no_gradient_and_no_hook(tiny_lm: Callable[[str], Any]) -> None:
    model = tiny_lm("llama")
    chosen(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model.lm_head)
