"""Averages of policies: the formula tensor by tensor, stacked adapters, and a learner that scores under one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from online_dpo.backends.averaging import average_policies
from online_dpo.backends.hf_model import load_causal_lm
from online_dpo.backends.policy_model import PolicyModel
from online_dpo.backends.weights import policy_tensors
from online_dpo.config import LoraSpec
from online_dpo.errors import ModelError
from online_dpo.logps import collate, token_logps
from online_dpo.models import check_folder
from online_dpo.packing import Item
from online_dpo.policies import read_policy
from online_dpo.types import Pair, Policy

LORA = LoraSpec(rank=4, alpha=8.0)
Moved = Callable[..., Policy]


@pytest.fixture(scope="module")
def items(pairs: list[Pair]) -> list[Item]:
    return [(p.prompt.token_ids, answer.token_ids) for p in pairs for answer in (p.chosen, p.rejected)]


def logps(model: PolicyModel, items: list[Item]) -> list[float]:
    return [value for row in model.per_token(items) for value in row]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def merged(initial: Policy, adapter: Policy) -> dict[str, Tensor]:
    """W₀ + s·B·A in float64, from the files."""
    base = {name: tensor.double() for name, tensor in weights(initial.path).items()}
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    matrices = {name: tensor.double() for name, tensor in weights(adapter.path).items()}
    for name, a in matrices.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            delta = config["lora_alpha"] / config["r"] * matrices[f"{stem}.lora_B.weight"] @ a
            base[stem.removeprefix("base_model.model.") + ".weight"] += delta
    return base


def three_averages(initial: Policy, policies: list[Policy], alpha: float, folder: Path) -> list[Policy]:
    """The references of rounds 2, 3 and 4."""
    found = [initial]
    for index, policy in enumerate(policies, start=2):
        out = folder / f"reference_{index}"
        found.append(average_policies(policy, found[-1], alpha, policy_id=f"reference_{index}", out=out))
    return found[1:]


# --- all weights ---


def test_three_rounds_of_all_weights(initial: Policy, moved: Moved, tmp_path: Path) -> None:
    """With α = ¼: ref₂ = ¾W₀ + ¼W₁, ref₃ = 9/16·W₀ + 3/16·W₁ + ¼W₂, ref₄ = 27/64·W₀ + 9/64·W₁ + 3/16·W₂ + ¼W₃, of
    float32 tensors in float64; three roundings of numbers of size |W| at most are 4·2⁻²⁴·|W|."""
    policies = [moved(seed) for seed in (1, 2, 3)]
    averages = three_averages(initial, policies, 0.25, tmp_path)
    shares = [
        (3 / 4, 1 / 4, 0.0, 0.0),
        (9 / 16, 3 / 16, 1 / 4, 0.0),
        (27 / 64, 9 / 64, 3 / 16, 1 / 4),
    ]
    parts = [weights(policy.path) for policy in (initial, *policies)]
    for averaged, share in zip(averages, shares, strict=True):
        found = weights(averaged.path)
        assert found.keys() == parts[1].keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            exact = sum(s * part[name].double() for s, part in zip(share, parts, strict=True))
            largest = max(float(part[name].abs().max()) for part in parts)
            torch.testing.assert_close(tensor.double(), exact, rtol=0, atol=4 * 2**-24 * largest)


def test_what_is_equal_stays_equal_bit_for_bit(moved: Moved, tmp_path: Path) -> None:
    """A tensor that training does not move must not creep, whatever α; α·W + (1 − α)·W rounds."""
    policy = moved()
    averaged = average_policies(policy, policy, 0.3, policy_id="same", out=tmp_path / "same")
    found, expected = weights(averaged.path), weights(policy.path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_average_is_a_policy_folder_that_loads(
    initial: Policy, moved: Moved, items: list[Item], tmp_path: Path
) -> None:
    """Read back as written, by plain transformers too; the log-probs are neither policy's."""
    policy = moved()
    averaged = average_policies(policy, initial, 0.5, policy_id="half", out=tmp_path / "half")
    check_folder(averaged.path)
    assert read_policy(averaged.path) == averaged
    assert {file.name for file in averaged.path.iterdir()} == {file.name for file in policy.path.iterdir()}
    model = PolicyModel(initial, model_name="small")
    first = logps(model, items)
    model.load(averaged)
    found = logps(model, items)
    model.load(policy)
    for other in (first, logps(model, items)):
        assert max(abs(a - b) for a, b in zip(found, other, strict=True)) > 0.01
    with torch.no_grad():
        plain = token_logps(load_causal_lm(averaged.path, torch.float32), collate(items)).tolist()
    assert found == pytest.approx(plain, abs=2e-5)


def test_the_same_inputs_give_the_same_bytes(initial: Policy, moved: Moved, tmp_path: Path) -> None:
    policy = moved()
    first, again = (
        average_policies(policy, initial, 0.5, policy_id="half", out=tmp_path / name) for name in ("first", "again")
    )
    assert first.digest == again.digest


def plain(folder: Path, files: dict[str, dict[str, Tensor]], **extra: str) -> Policy:
    """A bare policy folder; `extra`: other files by stem."""
    folder.mkdir()
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    for stem, text in extra.items():
        (folder / f"{stem}.json").write_text(text)
    return Policy(folder.name, folder, folder.name)


def test_shards_dtypes_prefixes_and_integers(tmp_path: Path) -> None:
    """The policy has two shards and a counter; the initial checkpoint one file, in bfloat16, without the prefix, and
    a tensor more. ½·(1, 3) + ½·(3, 4) = (2, 3.5): exact, where bfloat16 would do as well; ½·1.0078125 + ½·2 is not."""
    policy = plain(
        tmp_path / "policy",
        {
            "model-00001-of-00002.safetensors": {"model.a.weight": torch.tensor([1.0, 3.0, 2.0])},
            "model-00002-of-00002.safetensors": {"model.b.weight": torch.ones(1), "model.steps": torch.tensor([7])},
        },
        **{"model.safetensors.index": "the index", "config": "the configuration", "policy": "the policy's own"},
    )
    initial = plain(
        tmp_path / "initial",
        {
            "model.safetensors": {
                "a.weight": torch.tensor([3.0, 4.0, 1.0078125], dtype=torch.bfloat16),
                "b.weight": torch.zeros(1),
                "steps": torch.tensor([5]),
                "rotary": torch.zeros(1),
            }
        },
    )
    averaged = average_policies(policy, initial, 0.5, policy_id="half", out=tmp_path / "half")
    first = load_file(averaged.path / "model-00001-of-00002.safetensors")
    second = load_file(averaged.path / "model-00002-of-00002.safetensors")
    assert first.keys() == {"model.a.weight"}
    assert first["model.a.weight"].tolist() == [2.0, 3.5, 1.50390625]
    assert first["model.a.weight"].dtype == torch.float32
    assert (second["model.b.weight"].tolist(), second["model.steps"].tolist()) == ([0.5], [7])
    assert (averaged.path / "model.safetensors.index.json").read_text() == "the index"
    assert json.loads((averaged.path / "policy.json").read_text())["id"] == "half"


@pytest.mark.parametrize(
    ("theirs", "fault"),
    [
        ({"b": torch.ones(2)}, "have no 'a' to average with"),
        ({"a": torch.ones(3)}, r"'a' has shapes \[2\] and \[3\]"),
        (None, "no safetensors weights"),
    ],
)
def test_weights_that_do_not_belong_together(tmp_path: Path, theirs: dict[str, Tensor] | None, fault: str) -> None:
    policy = plain(tmp_path / "policy", {"model.safetensors": {"a": torch.ones(2)}})
    other = plain(tmp_path / "other", {} if theirs is None else {"model.safetensors": theirs})
    with pytest.raises(ModelError, match=fault) as caught:
        average_policies(policy, other, 0.5, policy_id="half", out=tmp_path / "half")
    assert "\n" not in str(caught.value)


# --- adapters ---


def test_three_rounds_of_adapters(initial: Policy, moved: Moved, tmp_path: Path) -> None:
    """A stacked adapter merged is the average of the merged weights, and not what averaged A and B would give.

    Ranks 4, 8, 12 at the scale 2 of the policies' own (lora_alpha 8, 16, 24).
    """
    policies = [moved(seed, lora=LORA) for seed in (1, 2, 3)]
    averages = three_averages(initial, policies, 0.25, tmp_path)
    parts = [{name: tensor.double() for name, tensor in weights(initial.path).items()}]
    parts += [merged(initial, policy) for policy in policies]
    expected = parts[0]
    for index, averaged in enumerate(averages, start=1):
        expected = {name: 0.25 * parts[index][name] + 0.75 * expected[name] for name in expected}
        config = json.loads((averaged.path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4 * index, 8.0 * index)
        for name, tensor in merged(initial, averaged).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        assert dict(policy_tensors(initial.path, averaged.path)).keys() == parts[0].keys()
    moved_by = max(float((expected[name] - parts[0][name]).abs().max()) for name in expected)
    assert moved_by > 0.01
    assert read_policy(averages[2].path) == averages[2]
    assert averages[2].adapter
    assert not [file for file in averages[2].path.iterdir() if file.suffix in (".bin", ".pt")]


def test_an_adapters_configuration_is_written_in_one_order(initial: Policy, moved: Moved, tmp_path: Path) -> None:
    """Module names are a set to peft: written as it comes, each process would give the same adapter another digest."""
    policy = moved(1, lora=LORA)
    averaged = average_policies(policy, initial, 0.5, policy_id="half", out=tmp_path / "half")
    for folder in (policy.path, averaged.path):
        named = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert len(named) > 3
        assert named == sorted(named)


def full_folder(initial: Policy, adapter: Policy, out: Path) -> Path:
    """The merged model as a folder that plain transformers loads."""
    shutil.copytree(initial.path, out)
    for file in out.glob("*.safetensors"):
        file.unlink()
    tensors = {name: tensor.float().contiguous() for name, tensor in merged(initial, adapter).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture
def stacked(initial: Policy, moved: Moved, tmp_path: Path) -> Policy:
    """Round 3's reference: rank 8."""
    return three_averages(initial, [moved(1, lora=LORA), moved(2, lora=LORA)], 0.5, tmp_path)[-1]


def test_learner_scores_under_a_stacked_reference_as_the_merged_model_does(
    initial: Policy, stacked: Policy, items: list[Item], tmp_path: Path
) -> None:
    """To 1e-5 where float32's own rounding of sums is out of the way; 2e-5 as the learner computes."""
    model = PolicyModel(initial, model_name="small", lora=LORA)
    before = logps(model, items)
    model.load(stacked)
    found = logps(model, items)
    assert max(abs(a - b) for a, b in zip(found, before, strict=True)) > 0.01
    folder = full_folder(initial, stacked, tmp_path / "merged")
    with torch.no_grad():
        expected = token_logps(load_causal_lm(folder, torch.float32).double(), collate(items)).tolist()
    assert found == pytest.approx(expected, abs=2e-5)
    model.model.double()
    assert logps(model, items) == pytest.approx(expected, abs=1e-5)


def test_the_first_average_is_of_the_trained_rank(
    initial: Policy, moved: Moved, items: list[Item], tmp_path: Path
) -> None:
    """½·W₁ + ½·W₀ = W₀ + s·(½B₁)·A₁."""
    policy = moved(1, lora=LORA)
    averaged = average_policies(policy, initial, 0.5, policy_id="half", out=tmp_path / "half")
    model = PolicyModel(initial, model_name="small", lora=LORA)
    model.load(averaged)
    found = logps(model, items)
    model.load(policy)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    assert logps(model, items) == found


def everything(model: PolicyModel) -> dict[str, Any]:
    """Every weight, and whether training moves it."""
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.model.named_parameters()}


def test_nothing_is_left_of_a_stacked_reference(
    initial: Policy, stacked: Policy, moved: Moved, items: list[Item], tmp_path: Path
) -> None:
    """Every weight bit for bit, what is trained, the log-probs, and the bytes that are saved."""
    policy = moved(1, lora=LORA)
    assert initial.probe is not None
    ids = initial.probe.token_ids
    model = PolicyModel(initial, model_name="small", lora=LORA)
    model.load(initial, seed=7)
    fresh, fresh_logps = everything(model), logps(model, items)
    model.load(policy)
    before, before_logps = everything(model), logps(model, items)
    untouched = model.save("a", tmp_path / "a", ids)

    def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
        pairs = [(found[name], expected[name]) for name in expected]
        return list(found) == list(expected) and all(torch.equal(a, b) and x == y for (a, x), (b, y) in pairs)

    model.load(stacked)
    assert not same(everything(model), before)
    model.load(stacked)  # twice the same: here already
    model.load(policy)
    assert same(everything(model), before)
    assert logps(model, items) == before_logps
    assert model.save("a", tmp_path / "again", ids).digest == untouched.digest
    model.load(stacked)
    model.load(initial, seed=7)
    assert same(everything(model), fresh)
    assert logps(model, items) == fresh_logps


def test_gradients_after_a_stacked_reference_are_the_policys(
    initial: Policy, stacked: Policy, moved: Moved, items: list[Item]
) -> None:
    policy = moved(1, lora=LORA)
    gradients = []
    for references in ([], [stacked]):
        model = PolicyModel(initial, model_name="small", lora=LORA)
        for reference in references:
            model.load(reference)
            model.scores(items[:2])
        model.load(policy)
        model.scores(items[:2]).logps.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in model.trainable])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert max(float(g.abs().max()) for g in gradients[0] if g is not None) > 0


def test_a_stacked_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    initial: Policy, stacked: Policy, items: list[Item]
) -> None:
    narrow = PolicyModel(initial, model_name="small", lora=LoraSpec(rank=4, alpha=8.0, target_modules=["q_proj"]))
    before = logps(narrow, items)
    with pytest.raises(ModelError, match="does not fit"):
        narrow.load(stacked)
    assert logps(narrow, items) == before
    assert all("default" in name for name, p in narrow.model.named_parameters() if p.requires_grad)


def test_adapters_over_other_modules_are_not_averaged(
    initial: Policy, stacked: Policy, moved: Moved, tmp_path: Path
) -> None:
    narrow = moved(3, lora=LoraSpec(rank=4, alpha=8.0, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="adapt different modules"):
        average_policies(narrow, stacked, 0.5, policy_id="half", out=tmp_path / "half")
