"""Completion log-probs: equal to the plain computation, and deaf to prompts' scores and to padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from online_dpo.backends.hf_model import load_causal_lm
from online_dpo.logps import chunked_head, collate, sequence_logps, token_logps, token_scores
from online_dpo.packed_attention import NAME, packed_attention, register
from online_dpo.packing import pack

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2")
PAD, END = 0, 2
ITEMS = (
    ([1, 40, 41, 42, 43, 44, 45], [50, 51, END]),
    ([1], [60, 61, 62, 63, 64, 65, 66, 67, 68, END]),
    ([1, 70, 71], [END]),
    ([1, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90], [91, 92, 93, 94]),
)
"""Prompt and completion ids: short and long of both, 26 tokens apart at most; none is the pad id."""


@pytest.fixture(scope="module")
def models(
    tiny_model: Callable[[str, Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], nn.Module]:
    folder = tmp_path_factory.mktemp("architectures")
    loaded: dict[str, nn.Module] = {}

    def get(architecture: str) -> nn.Module:
        if architecture not in loaded:
            loaded[architecture] = load_causal_lm(tiny_model(architecture, folder / architecture), torch.float32)
        return loaded[architecture]

    return get


def plain(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """One unpadded sequence, all logits, log-softmax, and only then the completion's tokens."""
    ids = torch.tensor([prompt + completion])
    logits: Tensor = model(input_ids=ids).logits[0]
    scores = logits.log_softmax(-1)
    return torch.stack([scores[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


# --- equal to the plain computation ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_padded_batch_equals_each_sequence_alone(models: Callable[[str], nn.Module], architecture: str) -> None:
    """Per token, 1e-5 in float32: the batch against full logits of every sequence by itself."""
    model = models(architecture)
    expected = torch.cat([plain(model, *item) for item in ITEMS])
    # The random models are far from uniform (−ln 259 = −5.56 everywhere), or the test would see little.
    assert expected.std() > 0.4
    found = token_logps(model, collate(ITEMS))
    assert found.dtype == torch.float32
    assert found.shape == (3 + 10 + 1 + 4,)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    one_by_one = torch.cat([token_logps(model, collate([item])) for item in ITEMS])
    torch.testing.assert_close(found, one_by_one, atol=1e-5, rtol=0)


@torch.no_grad()
def test_soft_capping_after_the_head_is_kept(models: Callable[[str], nn.Module]) -> None:
    """Gemma-2 bends logits to c·tanh(z/c) after its head; log-probs of the bare head's logits are another model's."""
    model: Any = models("gemma2")
    [(prompt, completion)] = ITEMS[:1]
    hidden = model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
    logits = model.lm_head(hidden)[len(prompt) - 1 : -1]
    target = torch.tensor(completion).unsqueeze(-1)
    bare = logits.log_softmax(-1).gather(-1, target).squeeze(-1)
    capped = (2.0 * torch.tanh(logits / 2.0)).log_softmax(-1).gather(-1, target).squeeze(-1)
    found = token_logps(model, collate(ITEMS[:1]))
    torch.testing.assert_close(found, capped, atol=1e-5, rtol=0)
    assert (found - bare).abs().max() > 0.1


@torch.no_grad()
def test_trained_model(stories: Path, one_thread: None) -> None:
    """The same on stories260k, whose log-probs range from near 0 to −10 and below."""
    model = load_causal_lm(stories, torch.float32)
    expected = torch.cat([plain(model, *item) for item in ITEMS])
    torch.testing.assert_close(token_logps(model, collate(ITEMS)), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_head_is_as_before_afterwards(models: Callable[[str], nn.Module]) -> None:
    """Also after an error inside the forward: a hook left behind would cut every later forward's logits."""
    model = models("llama")
    ids = torch.tensor([[1, 5, 6, 7]])
    before = model(input_ids=ids).logits
    batch = collate(ITEMS)
    token_logps(model, batch)
    batch.token_ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        token_logps(model, batch)
    after = model(input_ids=ids).logits
    assert after.shape == (1, 4, 259)
    assert torch.equal(before, after)


# --- a chunk of the vocabulary's logits at a time ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_chunked_head_is_the_whole_one(models: Callable[[str], nn.Module], architecture: str) -> None:
    """Log-probs and log Σ p², here with Gemma-2's cap inside the chunks."""
    model = models(architecture)
    found, whole = (token_scores(model, collate(ITEMS), chunked=chunked) for chunked in (True, False))
    torch.testing.assert_close(found.logps, whole.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.collisions, whole.collisions, atol=1e-5, rtol=0)
    assert found.logps.dtype == found.collisions.dtype == torch.float32


@torch.no_grad()
def test_chunked_forms_no_logits(models: Callable[[str], nn.Module]) -> None:
    """What the head hands on is one number a scored token; asked for whole, it is the vocabulary."""
    model: Any = models("llama")
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    for chunked in (True, False):
        token_logps(model, collate(ITEMS), chunked=chunked)
    handle.remove()
    assert shapes == [(1, 18, 1), (1, 18, 259)]


def test_only_a_bare_linear_head_is_chunked(models: Callable[[str], nn.Module]) -> None:
    """Any other, and a class derived from it, may do more than its weights say: its own forward is run."""

    class Derived(nn.Linear):
        pass

    class Headed(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    bare = nn.Linear(2, 3)
    assert chunked_head(Headed(bare)) is bare
    assert chunked_head(Headed(Derived(2, 3))) is None
    assert chunked_head(Headed(nn.Identity())) is None
    logits = torch.full((1, 3, 11), 5.0)
    found = token_logps(Replay(logits), collate([([1], [2, 3])]), chunked=True)
    assert found.tolist() == pytest.approx([-2.397895] * 2, abs=1e-5)


# --- packed ---


@pytest.fixture(scope="module")
def packing(tiny_lm: Callable[[str], Any]) -> nn.Module:
    register(NAME, packed_attention)
    model: Any = tiny_lm("llama")
    model.set_attn_implementation(NAME)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_sums_of_a_packed_row(packing: nn.Module, chunked: bool) -> None:
    """A sum a completion of the row, in its order: two of the first prompt stand before the second's."""
    items = [ITEMS[0], ITEMS[1], (ITEMS[0][0], [60, END])]
    row, number = pack(items)
    assert number == (0, 2, 1)
    tokens = token_logps(packing, row, chunked=chunked).tolist()
    expected = [sum(tokens[0:3]), sum(tokens[3:5]), sum(tokens[5:15])]
    assert sequence_logps(packing, row, chunked=chunked).tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_probabilities_of_all_next_tokens_sum_to_one_packed(packing: nn.Module) -> None:
    """Σ_v π(v | x) = 1 over 259 completions that share one prompt in one row."""
    row, _ = pack([([1, 40, 41], [token]) for token in range(259)])
    assert row.token_ids.shape == (1, 3 + 259)
    assert token_logps(packing, row).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


# --- sums ---


@torch.no_grad()
def test_sums_are_each_completions_own(models: Callable[[str], nn.Module]) -> None:
    """Completions of 3, 10, 1 and 4 tokens: the sums of the per-token values cut at 3, 13 and 14."""
    model = models("llama")
    tokens = token_logps(model, collate(ITEMS)).tolist()
    expected = [sum(tokens[0:3]), sum(tokens[3:13]), sum(tokens[13:14]), sum(tokens[14:18])]
    assert sequence_logps(model, collate(ITEMS)).tolist() == pytest.approx(expected, abs=1e-4)


class Replay(nn.Module):
    """Gives recorded logits through an identity head, whatever the ids: the golden file holds logits, no model."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.head = nn.Identity()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.logits))


def test_sums_are_the_authors(golden: dict[str, Any]) -> None:
    """Their labels hold −100 on the prompt and on padding: what is left between is the completion."""
    recorded = golden["get_batch_logps"]
    items = []
    for labels in recorded["labels"]:
        start = next(i for i, label in enumerate(labels) if label != -100)
        items.append(([3] * start, [label for label in labels if label != -100]))
    batch = collate(items)
    logits = torch.tensor(recorded["logits"], dtype=torch.float32)
    assert batch.token_ids.shape == logits.shape[:2]
    sums = sequence_logps(Replay(logits), batch)
    assert sums.tolist() == pytest.approx(recorded["sum"], abs=1e-5)
    means = sums / torch.tensor(batch.lengths)
    assert means.tolist() == pytest.approx(recorded["mean"], abs=1e-5)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    """All logits equal 5: every log-prob is −ln 11 = −2.397895, which bfloat16 (8 bits) would round to −2.39."""
    logits = torch.full((1, 3, 11), 5.0, dtype=torch.bfloat16)
    found = token_logps(Replay(logits), collate([([1], [2, 3])]))
    assert found.tolist() == pytest.approx([-2.397895] * 2, abs=1e-5)


# --- positions ---


def test_layout_by_hand() -> None:
    """Width 5. Row 0: prompt 7 8, completion 9 2 — predicted at 1 and 2. Row 1 starts at 5: prompt 7, completion
    4 5 6 2 — predicted at 5, 6, 7 and 8."""
    batch = collate([([7, 8], [9, 2]), ([7], [4, 5, 6, 2])], pad_token_id=3)
    assert batch.token_ids.tolist() == [[7, 8, 9, 2, 3], [7, 4, 5, 6, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.predictors.tolist() == [1, 2, 5, 6, 7, 8]
    assert batch.targets.tolist() == [9, 2, 4, 5, 6, 2]
    assert batch.lengths == (2, 4)


def test_moving_a_batch_keeps_its_layout() -> None:
    """`to` returns the same five things in their places (CPU to CPU: what can be tried everywhere)."""
    batch = collate(ITEMS)
    moved = batch.to(torch.device("cpu"))
    for name in ("token_ids", "attention_mask", "predictors", "targets"):
        assert torch.equal(getattr(batch, name), getattr(moved, name))
    assert moved.lengths == batch.lengths


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_pad_id_changes_nothing(models: Callable[[str], nn.Module], architecture: str) -> None:
    """The padding's token is never attended to nor scored: bit for bit the same with any other."""
    model = models(architecture)
    assert torch.equal(token_logps(model, collate(ITEMS, 0)), token_logps(model, collate(ITEMS, 200)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_padding_width_changes_nothing(models: Callable[[str], nn.Module], architecture: str) -> None:
    """A neighbour of 40 tokens pads the first item by 30 positions more."""
    model = models(architecture)
    alone = token_logps(model, collate(ITEMS[:1]))
    beside = token_logps(model, collate([ITEMS[0], ([1], [30] * 39)]))[:3]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_padding_gets_no_gradient(models: Callable[[str], nn.Module], architecture: str) -> None:
    """The pad token's input embedding stays exactly where it is, the first prompt token's moves.

    The input is a copy of the embedding, so that a head tied to it adds nothing. transformers' own embedding drops
    the gradient of its `padding_idx`: the pad id here is another token's.
    """
    model: Any = models(architecture)
    pad = 250
    batch = collate(ITEMS, pad_token_id=pad)
    assert (batch.token_ids == pad).sum() > 10
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    sequence_logps(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    handle.remove()
    model.zero_grad()
    [gradient] = [inputs.grad for inputs in seen]
    assert gradient is not None
    assert gradient[batch.token_ids == pad].abs().max() == 0.0
    assert gradient[:, 0].abs().amax(-1).min() > 0.0


@torch.no_grad()
def test_prompt_is_not_scored(models: Callable[[str], nn.Module]) -> None:
    """log π(bc | a) = log π(b | a) + log π(c | ab): moving b from the completion into the prompt takes away exactly
    its own term."""
    model = models("llama")
    both = token_logps(model, collate([([1, 40], [41, 42])]))
    last = token_logps(model, collate([([1, 40, 41], [42])]))
    assert last.shape == (1,)
    torch.testing.assert_close(last[0], both[1], atol=1e-6, rtol=0)
    total = sequence_logps(model, collate([([1, 40, 41], [42])])).item()
    assert total == pytest.approx(both[1].item(), abs=1e-6)


@torch.no_grad()
def test_end_token_is_counted(models: Callable[[str], nn.Module]) -> None:
    """With the end token the sum changes by log π(end | x, y), which is not small."""
    model = models("llama")
    prompt, completion = [1, 40, 41], [50, 51]
    without, with_end = sequence_logps(model, collate([(prompt, completion), (prompt, [*completion, END])])).tolist()
    end = plain(model, prompt, [*completion, END])[-1].item()
    assert end < -1.0
    assert with_end - without == pytest.approx(end, abs=1e-5)


@torch.no_grad()
def test_probabilities_of_all_next_tokens_sum_to_one(models: Callable[[str], nn.Module]) -> None:
    """Σ_v π(v | x) = 1 over the 259 one-token completions."""
    scores = token_logps(models("gemma2"), collate([([1, 40, 41], [token]) for token in range(259)]))
    assert scores.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("item", [([], [5]), ([5], []), ([], [])])
def test_empty_prompt_or_completion_is_refused(item: tuple[list[int], list[int]]) -> None:
    """The first token of an empty prompt's completion has no logits that predict it."""
    with pytest.raises(ValueError, match="at least one token"):
        collate([([1], [2]), item])
