"""Training a reward model on one worker: the gradient, the micro-batch, what is saved and what it has learned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import save_classifier
from torch import Tensor

from judges.reward_model import RewardModelJudge
from online_dpo.backends.reward_network import RewardNetwork, load_scalar_model
from online_dpo.backends.reward_trainer import LocalRewardTrainer, RewardStep
from online_dpo.errors import ModelError, TrainingError
from online_dpo.models import load_tokenizer
from online_dpo.preferences import Preference, as_comparison
from online_dpo.reward_pairs import TokenPair, encode
from online_dpo.reward_spec import RewardSpec
from online_dpo.types import Message

SPEC = RewardSpec(lr=1e-3, batch_size=4, micro_batch_size=2, epochs=2, warmup=0.25, centre=0.01)
"""Six pairs in batches of 4 and 2, twice: four steps."""
WORDS = ("The dog ran.", "A bird sang and then it flew away.", "Yes.", "Tom", "It was a cold night", "No, said Mum.")


def preferences(count: int = 6) -> list[Preference]:
    """Pairs of different lengths; no two are padded alike."""
    return [
        Preference(str(i), (Message("user", f"Say {i}: "),), WORDS[i % 6] * (1 + i // 6), WORDS[(i + 2) % 6])
        for i in range(count)
    ]


def token_pairs(folder: Path, count: int = 6) -> tuple[TokenPair, ...]:
    return encode(preferences(count), load_tokenizer(folder), 128).pairs


def trained(
    network: RewardNetwork, pairs: Sequence[TokenPair], spec: RewardSpec = SPEC
) -> tuple[list[RewardStep], list[Tensor]]:
    weights = network.trainable
    return list(LocalRewardTrainer(network).train(pairs, spec)), [p.detach().clone() for p in weights]


def apart(first: Sequence[Tensor], second: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """How far two trainings from `before` ended from each other, over how far the first went (Euclidean)."""
    between = sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True))
    went = sum(float((a - b).square().sum()) for a, b in zip(first, before, strict=True))
    return math.sqrt(between / went)


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
def test_micro_batch_size_changes_nothing(small_model: Path, one_thread: None, rank: int | None) -> None:
    """Micro-batches of 1, 2 and more than the batch, on batches of 4 and of 2 pairs: the same four steps."""
    results = {}
    for size in (1, 2, 64):
        network = RewardNetwork(small_model, seed=3, lora_rank=rank)
        before = [p.detach().clone() for p in network.trainable]
        spec = SPEC.model_copy(update={"micro_batch_size": size})
        results[size] = *trained(network, token_pairs(small_model), spec), before
    reference, weights, before = results[1]
    assert len(reference) == 4
    for size in (2, 64):
        steps, found, _ = results[size]
        assert apart(weights, found, before) < 5e-3
        for step, expected in zip(steps, reference, strict=True):
            assert step.loss == pytest.approx(expected.loss, abs=1e-5)
            assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
            assert (step.pairs, step.lr, step.tokens) == (expected.pairs, expected.lr, expected.tokens)


def test_gradient_is_that_of_the_mean_loss_over_pairs(small_model: Path, one_thread: None) -> None:
    """Against one text at a time by transformers itself, and the loss written out: ln(1 + e^−d) + λ(r_w + r_l)²."""
    pairs = token_pairs(small_model)
    model = load_scalar_model(small_model, seed=3).eval()
    losses = []
    for pair in pairs:
        r_w, r_l = (model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in (pair.chosen, pair.rejected))
        losses.append(torch.log1p(torch.exp(-(r_w - r_l))) + 0.5 * (r_w + r_l) ** 2)
    loss = torch.stack(losses).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    spec = SPEC.model_copy(update={"batch_size": 6, "epochs": 1, "centre": 0.5})
    [step], _ = trained(RewardNetwork(small_model, seed=3), pairs, spec)
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    assert step.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert step.tokens == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)


def test_workers_shares_add_up_to_one_worker_s_gradient(small_model: Path, one_thread: None) -> None:
    """Three workers' shares of five pairs, added by hand as a group adds them; the third has one pair alone."""
    pairs = token_pairs(small_model)[:5]
    whole, shared = RewardNetwork(small_model, seed=3), RewardNetwork(small_model, seed=3)
    stats = LocalRewardTrainer(whole)._backward(pairs, SPEC)
    parts = []
    for rank in range(3):
        trainer = LocalRewardTrainer(shared)
        trainer.rank, trainer.world = rank, 3
        parts.append(trainer._backward(pairs, SPEC))  # adds to the gradients that the ranks before left
    assert torch.stack(parts).sum(0).tolist() == pytest.approx(stats.tolist(), rel=1e-5)
    ours, theirs = ([p.grad for p in network.trainable if p.grad is not None] for network in (shared, whole))
    assert apart(theirs, ours, [torch.zeros_like(grad) for grad in theirs]) < 1e-5


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_saved_is_what_the_judge_reads(
    tiny_model: Callable[[str, Path], Path], tmp_path: Path, architecture: str, rank: int | None
) -> None:
    """The judge's scores from the saved folder are the trainer's own; an adapter and its head are in the weights."""
    folder = tiny_model(architecture, tmp_path / "base")
    network = RewardNetwork(folder, seed=1, lora_rank=rank)
    trainer = LocalRewardTrainer(network)
    rows = [row for pair in token_pairs(folder) for row in (pair.chosen, pair.rejected)]
    before = trainer.scores(rows, 4)
    list(trainer.train(token_pairs(folder), SPEC.model_copy(update={"lr": 1e-2})))
    scores = trainer.scores(rows, 4)
    (tmp_path / "out").mkdir()
    trainer.save(tmp_path / "out")
    judge = RewardModelJudge(str(tmp_path / "out"), device="cpu")
    found = [s for p in preferences() for s in judge.score(as_comparison(p)[0], as_comparison(p)[1:])]
    assert found == pytest.approx(scores, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(before, scores, strict=True)) > 0.05, "training moved nothing"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0].endswith("Classification")
    assert not list((tmp_path / "out").glob("adapter*"))


def test_a_fresh_head_is_small_and_follows_the_seed(small_model: Path, one_thread: None) -> None:
    """d = 64 or 32 inputs: the standard deviation of its weights is near 1/√(d + 1)."""
    first, again, other = (load_scalar_model(small_model, seed).score.weight.detach() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx((first.shape[1] + 1) ** -0.5, rel=0.3)


def test_a_head_that_the_folder_has_is_kept(tmp_path: Path, one_thread: None) -> None:
    from safetensors.torch import load_file

    folder = save_classifier(tmp_path)
    stored = load_file(folder / "model.safetensors")["classifier.weight"]
    assert torch.equal(load_scalar_model(folder, seed=5).classifier.weight, stored)


def test_non_finite_rewards_end_training(small_model: Path, one_thread: None) -> None:
    network = RewardNetwork(small_model)
    with torch.no_grad():
        network.trainable[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1 of 4: loss nan, .*nothing was saved"):
        trained(network, token_pairs(small_model))


def test_no_pairs_and_folders_that_are_no_model_are_refused(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no pairs"):
        trained(RewardNetwork(small_model), [])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError) as caught:
        load_scalar_model(tmp_path, 0)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_a_head_that_peft_knows_is_refused(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that stayed random would be saved as if it had been trained."""
    monkeypatch.setattr("online_dpo.backends.reward_network.HEADS", ("other",))
    with pytest.raises(ModelError, match="its head is not called other"):
        RewardNetwork(small_model, lora_rank=4)


def test_missing_weights_of_the_body_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights \(model.layers.1.mlp.up_proj.weight\)"):
        load_scalar_model(folder, 0)
