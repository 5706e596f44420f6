"""A saved policy says what it is, and saying so changes none of its digests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_loop import Killed, World, experiment, results

from online_dpo.files import digest
from online_dpo.models import digest_folder
from online_dpo.store import RunStore


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def card_of(world: World, arm: str, index: int) -> str:
    return (world.folder(arm, index).path / "policy" / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


def table(card: str) -> dict[str, str]:
    cells = [line.strip("|").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1].strip() for row in cells if len(row) == 2}


def started(root: Path, origin: str = "hub", **changes: Any) -> World:
    RunStore.create(root, experiment(**changes), {"model": {"origin": origin}})
    return World(root, experiment(**changes))


def test_the_card_says_what_the_policy_was_trained_on(tmp_path: Path) -> None:
    world = started(tmp_path / "run", model="org/name").go()
    card = card_of(world, "self_offline", 2)
    assert front_matter(card) == {
        "base_model": "org/name",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "online-dpo"],
    }
    metrics = world.metrics()["self_offline", 2]
    before = world.metrics()["self_offline", 1]
    rows = table(card)
    assert (rows["arm"], rows["seed"], rows["round"]) == ("self_offline", "0", "2 of 2")
    assert rows["loss"] == "sigmoid, beta 0.1, summed log-probs"
    assert rows["pairs of this round"] == str(metrics["pairs"]["kept"])
    assert rows["judge"] == "judges.length:LengthJudge"
    assert rows["digest of these files"] == metrics["policy"]["digest"]
    assert rows["began with"] == f"{before['policy']['id']} ({before['policy']['digest'][:12]})"
    assert rows["initial model"] == f"org/name ({world.run.initial.digest[:12]})"
    divergence = before["held_out"]["kl_initial"]["mean"]
    assert rows["KL of what it began with to the initial model"].startswith(f"{divergence:.1f}"[:3])
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_what_round_one_began_with_has_no_divergence(tmp_path: Path) -> None:
    world = started(tmp_path / "run").go()
    assert "KL of what it began with to the initial model" not in table(card_of(world, "on_policy", 1))


def test_an_adapter_names_peft(tmp_path: Path) -> None:
    world = started(tmp_path / "run", lora={}).go()
    card = card_of(world, "on_policy", 1)
    assert front_matter(card)["library_name"] == "peft"
    assert "lora" in front_matter(card)["tags"]
    assert "AutoPeftModelForCausalLM" in card


def test_a_model_folder_is_known_by_its_last_name(tmp_path: Path) -> None:
    """Where it lies on this machine is nobody's business."""
    world = started(tmp_path / "run", "folder", model=str(tmp_path / "models" / "mine")).go()
    card = card_of(world, "on_policy", 1)
    assert front_matter(card)["base_model"] == "mine"
    assert str(tmp_path) not in card


def test_the_card_changes_no_policy_digest(tmp_path: Path) -> None:
    world = started(tmp_path / "run").go()
    folder = world.folder("on_policy", 1).path / "policy"
    before = digest_folder(folder)
    (folder / "README.md").unlink()
    assert digest_folder(folder) == before == world.metrics()["on_policy", 1]["policy"]["digest"]


def test_a_killed_run_has_the_cards_of_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the first card is written, before its stage is recorded."""
    whole = started(tmp_path / "whole" / "run").go()
    world = started(tmp_path / "killed" / "run")

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("online_dpo.store.sync_tree", die)
        with pytest.raises(Killed):
            world.go()
    world.reopen().go()
    assert results(world.root) == results(whole.root)
    for card in sorted((whole.root / "arms").rglob("README.md")):
        assert digest(card) == digest(world.root / card.relative_to(whole.root))


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_a_saved_policy_loads_by_its_librarys_own_door(
    lora: dict[str, Any] | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With the card in its folder, and the same weights as the learner's: the same log-probs of the probe."""
    import torch
    from transformers import AutoModelForCausalLM

    from online_dpo.config import LoraSpec

    moved = request.getfixturevalue("moved")
    policy = moved(seed=3, lora=None if lora is None else LoraSpec.model_validate(lora))
    if lora is not None:
        from peft import AutoPeftModelForCausalLM

        config = policy.path / "adapter_config.json"
        base = str(request.getfixturevalue("small_model"))
        text = config.read_text(encoding="utf-8").replace(
            '"base_model_name_or_path": "small"', f'"base_model_name_or_path": "{base}"'
        )
        config.write_text(text, encoding="utf-8")
        model: Any = AutoPeftModelForCausalLM.from_pretrained(policy.path)
    else:
        model = AutoModelForCausalLM.from_pretrained(policy.path)
    assert policy.probe is not None
    ids = torch.tensor([policy.probe.token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    found = torch.log_softmax(logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(found, torch.tensor(policy.probe.logprobs), atol=1e-4)
