"""Linear layers through oneDNN: torch's products and gradients, and otherwise the layers that they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from online_dpo import matmul
from online_dpo.logps import collate, token_logps
from online_dpo.matmul import has_onednn, quicken, times, times_transposed

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")
IN, OUT = 256, 320
"""Large enough for oneDNN: 256·320 ≥ 256²."""


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the first factors that oneDNN was handed; it computes all the same."""
    seen: list[tuple[int, ...]] = []
    real = matmul._onednn

    def seeing(a: Tensor, b: Tensor) -> Tensor:
        seen.append(tuple(a.shape))
        return real(a, b)

    monkeypatch.setattr(matmul, "_onednn", seeing)
    return seen


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding of sums of some hundred products."""
    torch.testing.assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


# --- products ---

STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: torch.stack([x, -x], dim=-1).flatten(-2)[:, ::2],
    "one row for all": lambda x: x[:1].expand(7, -1),
    "none": lambda x: x[:0],
    "two dimensions before": lambda x: x[:6].view(2, 3, -1),
}
"""Of [7, k]: how gradients and hidden states really lie in memory."""


@pytest.mark.parametrize("kind", STRIDED)
def test_products_are_torchs(products: list[tuple[int, ...]], kind: str) -> None:
    """a·bᵀ and a·b, whatever the strides; in float64 as the judge."""
    b = random(OUT, IN, seed=1)
    a, c = STRIDED[kind](random(7, IN)), STRIDED[kind](random(7, OUT))
    found = times_transposed(a, b), times(c, b)
    assert len(products) == 2
    expected = (a.double() @ b.double().t()).float(), (c.double() @ b.double()).float()
    for mine, exact in zip(found, expected, strict=True):
        assert mine.shape == exact.shape
        if exact.numel():
            close(mine, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(products: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    a, b = random(3, IN).to(dtype), random(OUT, IN, seed=1).to(dtype)
    assert torch.equal(times_transposed(a, b), a @ b.t())
    assert torch.equal(times(a @ b.t(), b), (a @ b.t()) @ b)
    assert products == []


def test_small_products_stay_with_torch(products: list[tuple[int, ...]]) -> None:
    """255·256 numbers are one row too few."""
    times_transposed(random(3, 256), random(255, 256))
    times(random(3, 255), random(255, 256))
    assert products == []
    times_transposed(random(3, 256), random(256, 256))
    assert len(products) == 1


# --- layers ---


def layer_and_twin(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """Two layers of the same weights; the first is quickened."""
    torch.manual_seed(0)
    twin = nn.Linear(IN, OUT, bias=bias)
    quick = copy.deepcopy(twin)
    assert quicken(quick) == 1
    return quick, twin


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_layer_and_its_gradients_are_torchs(
    products: list[tuple[int, ...]], bias: bool, shape: tuple[int, ...]
) -> None:
    quick, twin = layer_and_twin(bias)
    x = random(*shape, IN).requires_grad_()
    x_twin = x.detach().clone().requires_grad_()
    g = random(*shape, OUT, seed=2)
    y, y_twin = quick(x), twin(x_twin)
    close(y, y_twin)
    y.backward(g)
    y_twin.backward(g)
    # Forward and the input's gradient; the weight's gradient is torch's own product.
    assert products == [(*shape, IN), (*shape, OUT)]
    for mine, theirs in ((x, x_twin), (quick.weight, twin.weight), *(((quick.bias, twin.bias),) if bias else ())):
        assert mine.grad is not None
        assert theirs.grad is not None
        close(mine.grad, theirs.grad)


def test_gradient_of_a_plain_sum(products: list[tuple[int, ...]]) -> None:
    """The gradient that comes in is one number, expanded: no strides at all."""
    quick, twin = layer_and_twin(False)
    x = random(5, IN)
    quick(x).sum().backward()
    twin(x).sum().backward()
    assert quick.weight.grad is not None
    assert twin.weight.grad is not None
    close(quick.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(products: list[tuple[int, ...]], frozen: str) -> None:
    quick, twin = layer_and_twin(False)
    x = random(5, IN).requires_grad_(frozen == "weight")
    for layer in (quick, twin):
        layer.weight.requires_grad_(frozen == "input")
    y = quick(x)
    saved = [part for part in y.grad_fn.saved_tensors if part is not None]
    y.sum().backward()
    assert len(products) == (2 if frozen == "weight" else 1)
    if frozen == "weight":
        # What came in is not held for a weight that does not move.
        assert [tuple(part.shape) for part in saved] == [(OUT, IN)]
        assert quick.weight.grad is None
        assert x.grad is not None
        close(x.grad, torch.ones(5, OUT) @ twin.weight)
    else:
        assert x.grad is None
        assert quick.weight.grad is not None
        close(quick.weight.grad, torch.ones(OUT, 5) @ x)


def test_nothing_to_train_gives_no_graph() -> None:
    quick, _ = layer_and_twin(False)
    with torch.no_grad():
        assert quick(random(5, IN)).grad_fn is None
    quick.weight.requires_grad_(False)
    assert not quick(random(5, IN)).requires_grad


def test_autocast_is_left_to_torch(products: list[tuple[int, ...]]) -> None:
    quick, twin = layer_and_twin(True)
    x = random(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = quick(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, twin(x))
    assert products == []


def test_another_dtype_later_is_left_to_torch(products: list[tuple[int, ...]]) -> None:
    quick, twin = layer_and_twin(True)
    assert torch.equal(quick.double()(random(5, IN).double()), twin.double()(random(5, IN).double()))
    assert products == []


def test_which_layers_are_quickened() -> None:
    """Large float32 `nn.Linear`s; no small one, no other dtype, no subclass (its forward is its own)."""

    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "large": nn.Linear(256, 256),
            "small": nn.Linear(256, 255),
            "narrow": nn.Linear(256, 256, dtype=torch.bfloat16),
            "own": Own(256, 256),
            "table": nn.Embedding(256, 256),
            "inner": nn.Sequential(nn.Linear(512, 256)),
        }
    )
    assert quicken(model) == 2
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["large", "inner.0"]
    # Once more changes nothing: not a second layer of wrapping.
    assert quicken(model) == 2
    close(model["large"](random(2, 256)), nn.functional.linear(random(2, 256), *model["large"].parameters()))


# --- whole models ---


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "LARGE", 1)


ITEMS = [([1, 40, 41, 42], [50, 51, 2]), ([1], [60, 61, 62, 63, 2])]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi"])
def test_model_is_the_same(
    tiny_lm: Callable[[str], Any],
    everything_is_large: None,
    products: list[tuple[int, ...]],
    architecture: str,
    chunked: bool,
) -> None:
    """Log-probs and every gradient; Qwen2's head is tied to its embedding, Phi's layers and head have a bias."""
    model, quick = tiny_lm(architecture), tiny_lm(architecture)
    linear = sum(type(module) is nn.Linear for module in quick.modules())
    assert quicken(quick) == linear
    found, expected = (token_logps(m, collate(ITEMS), chunked=c) for m, c in ((quick, chunked), (model, False)))
    assert len(products) == linear
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for logps in (found, expected):
        logps.sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(quick.parameters(), model.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_state_is_as_before(tiny_lm: Callable[[str], Any], everything_is_large: None, tmp_path: Path) -> None:
    """Names and tensors of the state; a copy has weights of its own; what is saved loads as the same model."""
    from transformers import AutoModelForCausalLM

    model = tiny_lm("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert quicken(model) > 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    ids = torch.tensor([[1, 5, 6, 7]])
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path, safe_serialization=True)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, logits)

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(input_ids=ids).logits.abs().max() == 0.0
    assert torch.equal(model(input_ids=ids).logits, logits)


@pytest.mark.parametrize("quickened", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_head_is_as_before_after_scoring(
    tiny_lm: Callable[[str], Any], everything_is_large: None, architecture: str, quickened: bool
) -> None:
    """The head's own forward, quick or not, and the model's cap: afterwards, and after an error inside."""
    model = tiny_lm(architecture)
    if quickened:
        quicken(model)
    ids = torch.tensor([[1, 5, 6, 7]])
    before, cap = model(input_ids=ids).logits, getattr(model.config, "final_logit_softcapping", None)
    batch = collate(ITEMS)
    token_logps(model, batch, chunked=True)
    batch.token_ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        token_logps(model, batch, chunked=True)
    assert ("forward" in vars(model.lm_head)) == quickened
    assert getattr(model.config, "final_logit_softcapping", None) == cap
    after = model(input_ids=ids).logits
    assert after.shape == (1, 4, 259)
    assert torch.equal(before, after)


def test_adapter_on_quickened_layers(tiny_lm: Callable[[str], Any], everything_is_large: None) -> None:
    """peft holds the layer inside its own; the frozen layer is quickened and the adapter trains."""
    from peft import LoraConfig, get_peft_model

    grads = []
    for quick in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        if quick:
            assert quicken(model) > 0
        token_logps(model.eval(), collate(ITEMS), chunked=quick).sum().backward()  # type: ignore[no-untyped-call]
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all("lora" in name for name in grads[0])
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, atol=1e-4, rtol=1e-4)
