"""Attention over a packed row: the plain computation of every architecture, and nothing of a neighbour."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from online_dpo.backends.forward import Forward
from online_dpo.packed_attention import NAME, attend, packed_attention, register
from online_dpo.packing import Item, Layout, pack

CPU = torch.device("cpu")
ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2_capped", "gemma3_text", "mistral", "qwen2_window", "phi",
    "olmo2", "gpt_neox", "opt", "cohere", "granite",
)  # fmt: skip
SCALED_AFTER_THE_HEAD = ("cohere", "granite")
WINDOWED = ("gemma2_capped", "gemma3_text", "mistral", "qwen2_window")
PACKED = Forward(packed=True, chunked=False)


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


X = [_tokens(9, 1), _tokens(1, 2), _tokens(17, 3)]
ITEMS: list[Item] = [
    (X[0], _tokens(4, 4)), (X[2], _tokens(6, 5)), (X[0], _tokens(11, 6)), (X[1], _tokens(10, 7)), (X[1], _tokens(1, 8)),
    *((X[0], _tokens(n, 10 + n)) for n in (1, 2, 3)), (X[0], _tokens(11, 6)),
]  # fmt: skip
"""Prompts of 9, 1 and 17 tokens with 5, 2 and 1 completions of 1 to 11, out of order, one pair twice: windows of 3 to 5
end inside of prompts, of completions, and between them."""
SIGNS = torch.linspace(-1, 1, len(ITEMS))
"""A weight an item for gradients: neighbours must not cancel, and one pair counts twice."""


def exact(model: Any) -> Any:
    """With the attention that is the truth: transformers' sdpa leaves Gemma-2's capping of scores out."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner.config, "attn_logit_softcapping", None):
        inner.set_attn_implementation("eager")
    return model


def packing(model: Any) -> Any:
    register(NAME, packed_attention)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.set_attn_implementation(NAME)
    return model


def alone(model: nn.Module, items: Sequence[Item]) -> list[Tensor]:
    """Every sequence by itself, unpadded, all logits, log-softmax, and only then the completion's tokens."""
    found = []
    for prompt, completion in items:
        scores = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].float().log_softmax(-1)
        found.append(scores[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1))
    return found


def together(model: nn.Module, items: Sequence[Item], way: Forward = PACKED) -> list[Tensor]:
    found = way.scores(model, items, CPU)
    return list(found.logps.split_with_sizes(found.lengths.tolist()))


def gradients(model: nn.Module, logps: Sequence[Tensor], weights: Tensor = SIGNS) -> dict[str, Tensor]:
    """Of Σ w_i · log π(y_i|x_i), by parameter."""
    model.zero_grad()
    sums = torch.stack([part.sum() for part in logps])
    (sums * weights).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each parameter's gradient within 1e-5 of the largest there is, and all of them within 1e-5 of their norm."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * largest, rtol=1e-4, msg=f"{name} differs")
    a, b = (torch.cat([g.flatten() for g in side.values()]) for side in (found, expected))
    assert (a - b).norm() <= 1e-5 * b.norm()


def with_adapter(model: Any) -> Any:
    """LoRA on every linear layer but the head, B moved off zero: at zero it would not be seen at all."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    transposed = model.config.model_type == "gpt2"
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=transposed)
    wrapped: Any = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


# --- the plain computation ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_is_each_sequence_alone(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """Log-probs per token to 1e-5, gradients of every parameter; chunked too where the head's logits are the end."""
    model = exact(tiny_lm(architecture))
    expected = alone(model, ITEMS)
    assert torch.cat(expected).std() > 0.2
    of_expected = gradients(model, expected)
    packing(model)
    for chunked in (False, True)[: 1 if architecture in SCALED_AFTER_THE_HEAD else 2]:
        found = together(model, ITEMS, Forward(packed=True, chunked=chunked))
        torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=0)
        assert_same(gradients(model, found), of_expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen2_window", "gemma2_capped", "gpt2"])
def test_with_an_adapter(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """The same with LoRA, whose matrices alone have gradients; and it does change the model."""
    base = exact(tiny_lm(architecture))
    before = torch.cat(alone(base, ITEMS)).detach()
    model = with_adapter(base)
    expected = alone(model, ITEMS)
    assert (torch.cat(expected) - before).abs().max() > 0.1
    of_expected = gradients(model, expected)
    assert all("lora" in name for name in of_expected)
    packing(model)
    found = together(model, ITEMS, Forward(packed=True, chunked=True))
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=0)
    assert_same(gradients(model, found), of_expected)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_with_activations_computed_again(tiny_lm: Callable[[str], Any], architecture: str, adapter: bool) -> None:
    """Layers run a second time on the way back, with the same layout."""
    model = tiny_lm(architecture)
    model = with_adapter(model) if adapter else model
    of_expected = gradients(model, alone(model, ITEMS))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter:
        model.enable_input_require_grads()
    packing(model).train()
    with _calls(model) as calls:
        found = together(model, ITEMS, Forward(packed=True, chunked=True))
        there = len(calls)
        of_found = gradients(model, found)
    assert len(calls) == 2 * there
    assert_same(of_found, of_expected)


@contextmanager
def _calls(model: Any) -> Iterator[list[None]]:
    """One entry for each time that a layer's attention projects its queries."""
    calls: list[None] = []
    handles = [
        module.register_forward_hook(lambda *_: calls.append(None))
        for name, module in model.named_modules()
        if name.endswith("q_proj")
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("completions", [1, 2, 5])
def test_any_number_of_completions_of_one_prompt(tiny_lm: Callable[[str], Any], completions: int) -> None:
    """One prompt, and two with equally many (repeated, not gathered)."""
    model = tiny_lm("mistral")
    one = [(X[0], _tokens(3 + n, 40 + n)) for n in range(completions)]
    two = [*one, *((X[2], _tokens(9 - n, 50 + n)) for n in range(completions))]
    expected = {len(items): alone(model, items) for items in (one, two)}
    of_expected = {len(items): gradients(model, alone(model, items), torch.arange(1.0, len(items) + 1))
                   for items in (one, two)}  # fmt: skip
    packing(model)
    for items in (one, two):
        assert pack(items)[0].layout.each == completions
        found = together(model, items)
        torch.testing.assert_close(torch.cat(found), torch.cat(expected[len(items)]), atol=1e-5, rtol=0)
        assert_same(gradients(model, found, torch.arange(1.0, len(items) + 1)), of_expected[len(items)])


@torch.no_grad()
def test_trained_model(stories: Any, one_thread: None) -> None:
    """stories260k, whose log-probs range from near 0 to −10 and below."""
    from online_dpo.backends.hf_model import load_causal_lm

    model = load_causal_lm(stories, torch.float32)
    expected = torch.cat(alone(model, ITEMS))
    found = torch.cat(together(packing(model), ITEMS, Forward(packed=True, chunked=True)))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


# --- the test's own sharpness ---


@pytest.mark.parametrize("architecture", WINDOWED)
@torch.no_grad()
def test_windows_bite(tiny_lm: Callable[[str], Any], architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the window of prompts, of completions, or with one longer by 1, log-probs are another model's: what the
    tests above allow is a thousandth of that."""
    model = packing(tiny_lm(architecture))
    right = torch.cat(together(model, ITEMS))
    of_prompt, of_completion = Layout.prompt_mask, Layout.completion_mask

    def off(part: Callable[[Layout, int | None], Any], change: Callable[[int | None], int | None]) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(Layout, part.__name__, lambda layout, window: part(layout, change(window)))
            return float((torch.cat(together(model, ITEMS)) - right).abs().max())

    assert off(of_prompt, lambda window: window) == 0.0
    for part in (of_prompt, of_completion):
        assert off(part, lambda _: None) > 0.01
        assert off(part, lambda window: None if window is None else window + 1) > 0.01


# --- no leak ---


def changed(items: Sequence[Item], number: int, *, prompt: bool = False) -> list[Item]:
    """`items` with another middle token in the completion, or in the prompt (its other completions keep theirs)."""
    part = list(items[number][0] if prompt else items[number][1])
    part[len(part) // 2] = 251
    new = (part, items[number][1]) if prompt else (items[number][0], part)
    return [new if i == number else item for i, item in enumerate(items)]


DISTINCT = ITEMS[:-1]


@pytest.mark.parametrize("architecture", ["llama", "gemma2_capped", "gpt2", "qwen2_window"])
def test_completion_is_deaf_to_the_others(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """A token of one completion changed: the others' log-probs are the same, bit for bit, its own are not.

    Lengths are as before, so every sum is carried out in the same order; gradients of weights add over places.
    """
    model = packing(tiny_lm(architecture))
    before = together(model, DISTINCT)
    for number in range(len(DISTINCT)):
        after = together(model, changed(DISTINCT, number))
        for i, (a, b) in enumerate(zip(after, before, strict=True)):
            assert torch.equal(a, b) == (i != number)
    for number, other in ((2, 0), (0, 2), (1, 3)):
        only = torch.zeros(len(DISTINCT))
        only[other] = 1.0
        found = gradients(model, together(model, changed(DISTINCT, number)), only)
        for name, gradient in gradients(model, together(model, DISTINCT), only).items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma2_capped", "gpt2"])
def test_prompt_changes_its_own_completions_alone(tiny_lm: Callable[[str], Any], architecture: str) -> None:
    """A token of a prompt changed for all of its completions."""
    model = packing(tiny_lm(architecture))
    before = together(model, DISTINCT)
    for x in X:
        items = list(DISTINCT)
        other = [*x[: len(x) // 2], 251, *x[len(x) // 2 + 1 :]]
        items = [(other if prompt is x else prompt, completion) for prompt, completion in items]
        after = together(model, items)
        for (prompt, _), a, b in zip(DISTINCT, after, before, strict=True):
            assert torch.equal(a, b) == (prompt is not x)


def test_no_input_of_another_sequence_has_a_gradient(tiny_lm: Callable[[str], Any]) -> None:
    """∂ log π(y_i|x_i) / ∂ (every token's embedding) is zero but at x_i and y_i, and not zero there (the last token of
    y_i predicts nothing)."""
    model = packing(tiny_lm("llama"))
    row, at = pack(DISTINCT)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.get_input_embeddings().register_forward_hook(keep)
    for number, logps in enumerate(together(model, DISTINCT)):
        [gradient] = torch.autograd.grad(logps.sum(), seen[0], retain_graph=True)
        n = at[number]
        owner = int(row.layout.owner[n])
        prompt = row.layout.prompts[owner, : int(row.layout.prompt_lengths[owner])].tolist()
        own = row.layout.completions[n, : row.lengths[n]].tolist()
        felt = gradient[0].abs().amax(-1).nonzero().squeeze(-1).tolist()
        assert sorted(felt) == sorted([*prompt, *own[:-1]])


# --- attention itself ---


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_by_its_formula(cap: float | None, masked: bool, kv_heads: int) -> None:
    """One query and one head at a time: softmax over the allowed keys of c·tanh(s·qk/c), in float64."""
    torch.manual_seed(0)
    rows, heads, length, size, scale = 2, 4, 5, 8, 0.7
    q = 2 * torch.randn(rows, heads, length, size, dtype=torch.float64)
    k, v = (2 * torch.randn(rows, kv_heads, length, size, dtype=torch.float64) for _ in range(2))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = None
    allowed = causal.expand(rows, length, length)
    if masked:
        allowed = allowed & ((torch.rand(rows, length, length) > 0.5) | torch.eye(length, dtype=torch.bool))
        mask = allowed.unsqueeze(1)
    found = attend(q, k, v, mask, scale, cap)
    for b in range(rows):
        for h in range(heads):
            group = h * kv_heads // heads
            for t in range(length):
                keys = allowed[b, t].nonzero().squeeze(-1)
                scores = scale * (k[b, group, keys] @ q[b, h, t])
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                expected = scores.softmax(0) @ v[b, group, keys]
                # The capped softmax is in float32, as in the models that cap.
                torch.testing.assert_close(found[b, h, t], expected, atol=1e-6 if cap else 1e-12, rtol=0)


def test_default_scale_is_one_over_the_root_of_the_size() -> None:
    """16 numbers a head: 1/4, capped or not (a cap of 1e6 bends nothing)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 16) for _ in range(3))
    expected = attend(q, k, v, None, 0.25, None)
    torch.testing.assert_close(attend(q, k, v, None, None, None), expected)
    torch.testing.assert_close(attend(q, k, v, None, None, 1e6), expected, atol=1e-5, rtol=0)


# --- what it refuses ---


def called(**others: Any) -> None:
    row, _ = pack(ITEMS[:2])
    length = row.token_ids.shape[1]
    q, k = torch.randn(1, 2, length, 4), torch.randn(1, 1, length, 4)
    given = {"attention_mask": None, "packed": row.layout, **others}
    packed_attention(nn.Identity(), q, k, k, **given)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"packed": None}, "does not hand the packed layout on"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "no place for this model's mask"),
        ({"s_aux": torch.ones(2)}, "sinks"),
        ({"position_bias": torch.ones(1, 2, 3, 3)}, "position bias"),
        ({"attention_mask": 7}, "mask has a window of 7, its attention one of None"),
        ({"sliding_window": 7}, "mask has a window of None, its attention one of 7"),
    ],
)
def test_what_would_change_the_result_is_refused(others: dict[str, Any], said: str) -> None:
    called()
    called(attention_mask=7, sliding_window=7)
    called(dropout=0.0, is_causal=True, position_bias=None)
    with pytest.raises(ValueError, match=said):
        called(**others)
