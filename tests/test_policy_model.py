"""The one model in memory: it becomes any policy exactly, saves what it computes, and never drops out."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from online_dpo.backends.hf_model import load_causal_lm, silence_dropout
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.weights import policy_tensors
from online_dpo.config import LoraSpec
from online_dpo.errors import ModelError, RunFolderError
from online_dpo.logps import collate, token_logps
from online_dpo.models import digest_folder
from online_dpo.packing import Item
from online_dpo.passes import fill
from online_dpo.policies import read_policy, write_policy
from online_dpo.types import Pair, Policy

LORA = LoraSpec(rank=4, alpha=8.0)
Moved = Callable[..., Policy]


def flat(values: list[list[float]]) -> list[float]:
    return [value for row in values for value in row]


@pytest.fixture(scope="module")
def items(pairs: list[Pair]) -> list[Item]:
    return [(p.prompt.token_ids, answer.token_ids) for p in pairs for answer in (p.chosen, p.rejected)]


def model_of(initial: Policy, **settings: Any) -> PolicyModel:
    return PolicyModel(initial, model_name="small", **settings)


def logps(model: PolicyModel, items: list[Item]) -> list[float]:
    return flat(model.per_token(items))


def loaded_logps(folder: Path, items: list[Item]) -> list[float]:
    """What plain transformers computes from a saved folder."""
    with torch.no_grad():
        return token_logps(load_causal_lm(folder, torch.float32), collate(items)).tolist()


# --- log-probs ---


@pytest.mark.parametrize("layout", ["packed", "plain"])
def test_per_token_keeps_the_items_order(initial: Policy, items: list[Item], layout: str) -> None:
    """Put into passes by length, whatever the budget: item by item what each gives alone, asked for twice too."""
    model = model_of(initial, layout=layout)
    assert model.forward.packed == (layout == "packed")
    alone = [model.per_token([item])[0] for item in items]
    assert [len(row) for row in alone] == [len(completion) for _, completion in items]
    asked = [*items, *items[3:5]]
    passes = set()
    for budget in (1, 60, 10_000):
        model.tokens_per_pass = budget
        found = model.per_token(asked)
        passes.add(len(fill([[item] for item in asked], budget)))
        for row, expected in zip(found, [*alone, *alone[3:5]], strict=True):
            assert row == pytest.approx(expected, abs=2e-5)
    assert len(passes) == 3


def test_scores_are_those_of_per_token_with_a_gradient(initial: Policy, items: list[Item]) -> None:
    model = model_of(initial)
    found = model.scores(items)
    assert found.logps.requires_grad
    assert not found.collisions.requires_grad
    for row, expected in zip(found.each(), model.per_token(items), strict=True):
        assert row == pytest.approx(expected, abs=2e-5)


def test_nothing_to_score(initial: Policy) -> None:
    """A worker whose share is empty."""
    assert model_of(initial).per_token([]) == []


def test_bfloat16_forward_keeps_float32_weights(initial: Policy, items: list[Item]) -> None:
    """8 bits in the products move a log-prob by some 0.01; were the option ignored, by nothing."""
    exact = model_of(initial)
    rounded = model_of(initial, dtype="bfloat16")
    assert {p.dtype for p in rounded.trainable} == {torch.float32}
    off = max(abs(a - b) for a, b in zip(logps(exact, items), logps(rounded, items), strict=True))
    assert 1e-4 < off < 0.5
    rounded.scores(items[:2]).logps.sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in rounded.trainable)


# --- full fine-tuning ---


def test_all_weights_are_trained_without_lora(initial: Policy) -> None:
    model = model_of(initial)
    assert sum(p.numel() for p in model.trainable) == sum(p.numel() for p in model.model.parameters())


def test_saved_policy_loads_to_the_same_log_probs(initial: Policy, moved: Moved, items: list[Item]) -> None:
    """Saved by one model; loaded by a fresh one, and by plain transformers from the folder: bit for bit."""
    policy = moved()
    model = model_of(initial)
    before = logps(model, items)
    model.load(policy)
    after = logps(model, items)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.05
    other = PolicyModel(policy, model_name="small")
    assert logps(other, items) == after
    assert loaded_logps(policy.path, items) == pytest.approx(after, abs=2e-5)


def test_switching_back_and_forth_is_exact(initial: Policy, moved: Moved, items: list[Item]) -> None:
    model = model_of(initial)
    policies = [initial, moved(1), moved(2)]
    first = []
    for policy in policies:
        model.load(policy)
        first.append(logps(model, items))
    assert len({tuple(values) for values in first}) == 3
    for index in (0, 2, 1, 1, 0):
        model.load(policies[index])
        assert logps(model, items) == first[index]


def test_probe_is_of_the_saved_weights(initial: Policy, moved: Moved) -> None:
    """logprobs[i] is of token i + 1, so one fewer than tokens; by plain transformers from the saved folder."""
    policy = moved()
    assert initial.probe is not None and policy.probe is not None
    ids = initial.probe.token_ids
    assert policy.probe.token_ids == ids
    assert len(policy.probe.logprobs) == len(ids) - 1
    assert list(policy.probe.logprobs) == pytest.approx(loaded_logps(policy.path, [(ids[:1], ids[1:])]), abs=2e-5)


def test_saved_folder_serves_by_itself(initial: Policy, moved: Moved) -> None:
    """Weights, configuration, tokenizer; safetensors alone, and the end token that the engine stops at."""
    from online_dpo.model_config import end_token_ids
    from online_dpo.models import check_folder

    policy = moved()
    check_folder(policy.path)
    assert not [file for file in policy.path.iterdir() if file.suffix in (".bin", ".pt")]
    assert end_token_ids(policy.path) == end_token_ids(initial.path) == (2,)


def test_model_that_names_a_temperature_but_does_not_sample(tiny_llama: Path, tmp_path: Path) -> None:
    """As Llama-2-chat's: transformers loads such a generation_config.json and refuses to save it. A round's training
    must not be lost to that."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "temperature": 0.6, "top_p": 0.9}))
    model = PolicyModel(Policy("initial", folder, digest_folder(folder)), model_name="base")
    policy = model.save("next", tmp_path / "next", [1, 40, 41])
    saved = json.loads((policy.path / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["eos_token_id"]) == (0.6, 0.9, 2)


# --- LoRA ---


def test_adapter_alone_is_trained(initial: Policy) -> None:
    names = [name for name, p in model_of(initial, lora=LORA).model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)


@pytest.mark.parametrize("seed", [0, 1])
def test_initial_policy_under_lora_is_the_base_exactly(initial: Policy, items: list[Item], seed: int) -> None:
    """B = 0 adds exact zeros, whatever the seed of A."""
    model = model_of(initial, lora=LORA)
    model.load(initial, seed)
    assert logps(model, items) == logps(model_of(initial), items)


def test_fresh_adapter_depends_on_the_seed_alone(initial: Policy) -> None:
    """The same A for the same seed in another process' model, another for another."""

    def matrices(seed: int) -> list[torch.Tensor]:
        model = model_of(initial, lora=LORA)
        torch.manual_seed(torch.seed())
        model.load(initial, seed)
        return [p.detach().clone() for p in model.trainable]

    first, again, other = matrices(3), matrices(3), matrices(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_saved_adapter_reloads_to_the_same_log_probs(initial: Policy, moved: Moved, items: list[Item]) -> None:
    policy = moved(lora=LORA)
    assert policy.adapter
    fresh = model_of(initial, lora=LORA)
    base = logps(fresh, items)
    fresh.load(policy)
    found = logps(fresh, items)
    assert max(abs(a - b) for a, b in zip(base, found, strict=True)) > 0.01
    other = model_of(initial, lora=LORA)
    other.load(policy)
    assert logps(other, items) == found
    fresh.load(initial)
    assert logps(fresh, items) == base
    fresh.load(policy)
    assert logps(fresh, items) == found


def merged_folder(base: Path, adapter: Path, out: Path) -> Path:
    """`base` with the adapter merged by `policy_tensors`, as a folder that plain transformers loads."""
    from safetensors.torch import save_file

    shutil.copytree(base, out)
    tensors = dict(policy_tensors(base, adapter))
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def test_merged_weights_answer_as_the_adapter(initial: Policy, moved: Moved, items: list[Item], tmp_path: Path) -> None:
    """W + s·B·A in one product or in two differ by rounding: 1e-5 nats a token."""
    policy = moved(lora=LORA)
    model = model_of(initial, lora=LORA)
    model.load(policy)
    merged = merged_folder(initial.path, policy.path, tmp_path / "merged")
    assert loaded_logps(merged, items) == pytest.approx(logps(model, items), abs=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen2"])
def test_merged_weights_of_other_architectures(
    tiny_model: Callable[[str, Path], Path], tmp_path: Path, architecture: str
) -> None:
    """GPT-2 stores its matrices transposed, Gemma-2 and Qwen2 tie the head to the embedding, Qwen2 has biases."""
    base = tiny_model(architecture, tmp_path / "base")
    initial = Policy("initial", base, digest_folder(base))
    items: list[Item] = [([1, 40, 41], [50, 51, 2]), ([1, 60], [61, 62, 63, 64, 65])]
    with warnings.catch_warnings():
        # peft says that it corrects fan_in_fan_out for GPT-2.
        warnings.simplefilter("ignore")
        model = model_of(initial, lora=LORA)
    start = logps(model, items)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    policy = model.save("next", tmp_path / "next", [1, 40, 41])
    found = logps(model, items)
    assert max(abs(a - b) for a, b in zip(start, found, strict=True)) > 0.01
    assert loaded_logps(merged_folder(base, policy.path, tmp_path / "merged"), items) == pytest.approx(found, abs=1e-5)


def test_saving_an_adapter_asks_no_hub(initial: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft looks the base's name up on the hub, which need not be there, or holds another model of that name."""
    from peft.utils import save_and_load

    asked: list[object] = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *args, **_: asked.append(args))
    model = PolicyModel(initial, model_name="org/name", lora=LORA)
    policy = model.save("next", tmp_path / "next", [1, 40, 41])
    assert asked == []
    assert json.loads((policy.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"


def test_target_modules_that_do_not_exist(initial: Policy) -> None:
    with pytest.raises(ModelError, match=r"lora\.target_modules: the model has no module 'no_such'"):
        model_of(initial, lora=LoraSpec(target_modules=["no_such"]))


def test_adapter_that_does_not_fit(initial: Policy, moved: Moved) -> None:
    """An adapter over all linear layers, a model that adapts q_proj alone."""
    policy = moved(lora=LORA)
    narrow = model_of(initial, lora=LoraSpec(rank=4, alpha=8.0, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="does not fit"):
        narrow.load(policy)


def test_soft_capped_scores_are_capped(tiny_model: Callable[[str, Path], Path], tmp_path: Path) -> None:
    """Gemma 2 was trained with attention scores capped; transformers' default attention leaves the cap out."""
    folder = tiny_model("gemma2_capped", tmp_path / "model")
    items: list[Item] = [([1, 40, 41], [50, 51, 2]), ([1, 60], [61, 62, 63, 64, 65])]
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        by_default = token_logps(model, collate(items))
        model.set_attn_implementation("eager")
        capped = token_logps(model, collate(items))
    assert float((by_default - capped).abs().max()) > 0.05
    assert loaded_logps(folder, items) == pytest.approx(capped.tolist(), abs=1e-5)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_causal_lm(tmp_path, torch.float32)


# --- activation checkpointing and dropout ---


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_activation_checkpointing_gives_the_same_gradients(
    initial: Policy, items: list[Item], lora: LoraSpec | None
) -> None:
    """Recomputed by the same operations in the same order; that layers were run twice is seen by a counter."""
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = model_of(initial, lora=lora, activation_checkpointing=checkpointing)
        model.load(initial, seed=5)
        count: list[int] = []
        layer = next(m for m in model.model.modules() if type(m).__name__ == "LlamaMLP")
        handle = layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model.scores(items[:4]).logps.sum().backward()  # type: ignore[no-untyped-call]
        handle.remove()
        runs.append(len(count))
        gradients.append([p.grad for p in model.trainable])
    assert runs == [1, 2]
    moving = 0.0
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)
        moving = max(moving, plain.abs().max().item())
    assert moving > 0.01


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "falcon"])
def test_dropout_is_off_even_in_training_mode(
    tiny_model: Callable[[str, Path], Path], tmp_path: Path, architecture: str
) -> None:
    """Rates of 0.1 in GPT-2's layers, OPT's plain numbers (and layers skipped half the time) and Falcon's
    configuration. As transformers loads it, two forwards in training mode differ; silenced, they equal evaluation."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model(architecture, tmp_path / "model")
    batch = collate([([1, 40, 41], [50, 51, 2]), ([1, 60], [61, 62, 63, 64, 65])])
    with torch.no_grad():
        noisy: Any = AutoModelForCausalLM.from_pretrained(folder).train()
        torch.manual_seed(0)
        assert not torch.equal(token_logps(noisy, batch), token_logps(noisy, batch))
        calm = token_logps(noisy.eval(), batch)
        silence_dropout(noisy)
        noisy.train()
        for _ in range(4):
            torch.testing.assert_close(token_logps(noisy, batch), calm, atol=1e-5, rtol=0)


def test_checkpointed_model_scores_the_same_twice(tiny_model: Callable[[str, Path], Path], tmp_path: Path) -> None:
    """Activation checkpointing keeps the model in training mode: a GPT-2 with dropout 0.1 must not show it."""
    folder = tiny_model("gpt2", tmp_path / "model")
    initial = Policy("initial", folder, digest_folder(folder))
    items: list[Item] = [([1, 40, 41], [50, 51, 2])]
    model = model_of(initial, activation_checkpointing=True)
    assert model.model.training
    first = logps(model, items)
    assert logps(model, items) == first
    assert first == pytest.approx(logps(model_of(initial), items), abs=1e-5)


# --- the policy's folder ---


def test_policy_read_back_is_the_policy_written(moved: Moved) -> None:
    policy = moved()
    assert policy.probe is not None
    assert read_policy(policy.path) == policy


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_truncated_weights_are_noticed(moved: Moved, lora: LoraSpec | None) -> None:
    policy = moved(lora=lora)
    [file] = policy.path.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(RunFolderError, match="damaged"):
        read_policy(policy.path)
    assert read_policy(policy.path, verify=False).id == policy.id
    file.write_bytes(content)
    assert read_policy(policy.path) == policy


def test_changed_configuration_is_noticed(moved: Moved) -> None:
    policy = moved()
    file = policy.path / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-0', '"rms_norm_eps": 2e-0'))
    with pytest.raises(RunFolderError, match="no longer have the recorded digest"):
        read_policy(policy.path)


@pytest.mark.parametrize("content", [None, "", "[]", '{"id": "a"}', '{"id": "a", "digest": "d", "adapter": false}'])
def test_damaged_policy_file(moved: Moved, content: str | None) -> None:
    policy = moved()
    file = policy.path / "policy.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(RunFolderError, match=r"policy\.json is missing or damaged"):
        read_policy(policy.path)


def test_policy_without_probe_is_read_without(moved: Moved) -> None:
    bare = replace(moved(), probe=None)
    write_policy(bare)
    assert read_policy(bare.path) == bare
