"""The plan's counts by hand, and the table of what arms differ in."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_prompt, write_weights
from rich.console import Console

from online_dpo.budget import most_pairs
from online_dpo.config import Experiment, LoraSpec, PairingSpec, validate_experiment
from online_dpo.models import ResolvedModel
from online_dpo.pairing import make_pairs
from online_dpo.plan import averages_kept, blocks_kept, differences, plan_arms, policy_size, tensor_shapes
from online_dpo.plan_display import plan_tables
from online_dpo.prompts import PromptSet
from online_dpo.runs import Resolved
from online_dpo.types import Candidate, Verdict

BASE = {
    "name": "t",
    "model": "m",
    "prompts": {"path": "p", "per_round": 10, "held_out": 6},
    "sampling": {"n": 4, "max_tokens": 20},
    "judge": {"use": "judges.length:LengthJudge"},
    "dpo": {"batch_size": 4, "epochs": 2},
    "rounds": 3,
}


def experiment(**changes: Any) -> Experiment:
    return validate_experiment(BASE | changes, "test")


def resolved(spec: Experiment, folder: Path) -> Resolved:
    """`spec` with a model of 8 weights and 6 held-out prompts."""
    digest = write_weights(folder / "model", "w")
    prompts = PromptSet(
        tuple(fake_prompt(f"t{i}") for i in range(20)), tuple(fake_prompt(f"h{i}") for i in range(6)), {}, chat=False
    )
    return Resolved(spec, folder, ResolvedModel("m", folder / "model", digest, "folder"), prompts, {})


def test_counts_by_hand(tmp_path: Path) -> None:
    """A round: 10 prompts × 4 = 40 answers, 10 pairs at most, 2 epochs of ⌈10/4⌉ = 3 steps, 40·20 + 6·20 = 920 tokens.

    Three rounds: 120 answers, 30 pairs, 18 steps, 2760 tokens and the initial policy's 6·20 held-out ones; judged
    3·(40 + 6) + 6. Disk: 3 policies of 8 float32 weights and 8 bytes a token of the rounds.
    """
    (plan,) = plan_arms(resolved(experiment(), tmp_path))
    assert (plan.arm, plan.rounds) == ("on_policy", 3)
    assert plan.candidates == 120
    assert plan.pairs == 30
    assert plan.steps == 18
    assert plan.sampled_tokens == 2880
    assert plan.judged == 144
    assert plan.disk == 3 * 32 + 2760 * 8


@pytest.mark.parametrize(
    ("changes", "pairs", "steps"),
    [
        ({"pairing": {"rule": "all_pairs"}}, 3 * 10 * 6, 3 * 2 * 15),
        ({"pairing": {"rule": "all_pairs", "max_pairs": 7}}, 3 * 7, 3 * 2 * 2),
        ({"pairing": {"rule": "top_k", "k": 9}}, 3 * 10 * 2, 3 * 2 * 5),
        ({"pairing": {"max_pairs": 100}}, 30, 18),
        ({"sampling": {"n": 1}}, 0, 0),
        ({"dpo": {"batch_size": 32}}, 30, 3),
        ({"rounds": 1}, 10, 6),
    ],
)
def test_pairs_and_steps_by_hand(tmp_path: Path, changes: dict[str, Any], pairs: int, steps: int) -> None:
    (plan,) = plan_arms(resolved(experiment(**changes), tmp_path))
    assert (plan.pairs, plan.steps) == (pairs, steps)


@pytest.mark.parametrize(("keep", "kept"), [("all", 3), ("last", 2), ("best", 2)])
def test_disk_holds_the_policies_that_stay(tmp_path: Path, keep: str, kept: int) -> None:
    """A policy is given up once the next is saved: two at a time."""
    (plan,) = plan_arms(resolved(experiment(keep=keep), tmp_path))
    assert plan.disk == kept * 32 + 2760 * 8


def test_held_out_answers_may_be_longer(tmp_path: Path) -> None:
    (plan,) = plan_arms(resolved(experiment(evaluation={"max_tokens": 100}), tmp_path))
    assert plan.sampled_tokens == 3 * (800 + 600) + 600


def test_every_arm_has_its_own_plan(tmp_path: Path) -> None:
    spec = experiment(arms={"short": {"rounds": 1}, "wide": {"sampling": {"n": 8}}})
    short, wide = plan_arms(resolved(spec, tmp_path))
    assert (short.arm, short.candidates) == ("short", 40)
    assert (wide.arm, wide.candidates) == ("wide", 240)


@pytest.mark.parametrize("rule", ["best_vs_worst", "best_vs_random", "random", "all_pairs", "top_k"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_bound_is_what_the_rule_makes_of_untied_answers(rule: str, n: int, k: int) -> None:
    pairing = PairingSpec.model_validate({"rule": rule, "k": k})
    prompt = fake_prompt("p")
    answers = [Candidate("p", i, f"text {i}", (i,), (-1.0,), "stop", i) for i in range(n)]
    verdicts = [Verdict("p", i, float(i)) for i in range(n)]
    assert make_pairs({"p": prompt}, answers, verdicts, pairing, seed=0).kept == most_pairs(pairing, n)


# --- disk ---


@pytest.mark.parametrize(
    ("changes", "policies"),
    [
        # Rounds 2, 3 and 4 have an average each; one of t − 1 adapters has t − 1 times their rank: 1 + 2 + 3.
        ({"reference": {"ema": 0.5}}, 3),
        ({"reference": {"ema": 0.5}, "lora": {}}, 6),
        # The one in use and the one that it is made of.
        ({"reference": {"ema": 0.5}, "keep": "last"}, 2),
        ({"reference": {"ema": 0.5}, "keep": "best", "lora": {}}, 5),
        ({"reference": {"ema": 0.5}, "rounds": 1}, 0),
        ({"reference": {"ema": 1}}, 0),
        ({"reference": {"every": 2}}, 0),
    ],
)
def test_averaged_references_take_disk(changes: dict[str, Any], policies: int) -> None:
    spec = experiment(**{"rounds": 4} | changes)
    assert averages_kept(spec, spec.arm("on_policy")) == policies


def test_a_round_in_blocks_takes_disk_while_it_is_made() -> None:
    """Weights and two moments, of the block that is trained and of the one before; one of the six is the policy."""
    online = {"source": {"every_steps": 1}, "dpo": {"epochs": 1}}
    spec = experiment(arms={"on_policy": {}, "online": online})
    assert [blocks_kept(spec.arm(name)) for name in spec.arms] == [0, 5]


def safetensors(file: Path, shapes: dict[str, list[int]], dtype: str) -> None:
    """A safetensors file's header; no tensor follows, since only the header may be read."""
    entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)


SHAPES = {"model.embed_tokens.weight": [100, 8], "model.layers.0.q_proj.weight": [16, 8], "model.norm.weight": [8]}


def test_size_of_a_whole_policy(tmp_path: Path) -> None:
    """Saved in float32 whatever the model came in, from all shards: (800 + 128 + 8 + 24) weights of 4 bytes."""
    safetensors(tmp_path / "model-00001-of-00002.safetensors", SHAPES, "BF16")
    safetensors(tmp_path / "model-00002-of-00002.safetensors", {"model.layers.1.o_proj.weight": [3, 8]}, "BF16")
    assert tensor_shapes(tmp_path) == SHAPES | {"model.layers.1.o_proj.weight": [3, 8]}
    assert policy_size(experiment(), tmp_path) == 4 * (800 + 128 + 8 + 24)


def test_size_of_an_adapter(tmp_path: Path) -> None:
    """Of W [16, 8] at rank 4: A [4, 8] and B [16, 4], 96 numbers; embeddings and vectors get none."""
    safetensors(tmp_path / "model.safetensors", SHAPES, "F32")
    assert policy_size(experiment(lora=LoraSpec(rank=4).model_dump()), tmp_path) == 4 * (4 * 8 + 16 * 4)


# --- differences ---


def test_arms_differ_in(tmp_path: Path) -> None:
    spec = experiment(
        arms={
            "on_policy": {},
            "semi": {"source": {"every": 2}},
            "bold": {"dpo": {"beta": 0.05}, "judge": {"use": "a:B", "k": 1}},
        }
    )
    assert differences(spec) == {
        "source": {"on_policy": "current", "semi": None, "bold": "current"},
        "judge.use": {"on_policy": "judges.length:LengthJudge", "semi": "judges.length:LengthJudge", "bold": "a:B"},
        "dpo.beta": {"on_policy": 0.1, "semi": 0.1, "bold": 0.05},
        "source.every": {"on_policy": None, "semi": 2, "bold": None},
        "judge.k": {"on_policy": None, "semi": None, "bold": 1},
    }


def test_a_setting_written_out_is_no_difference() -> None:
    assert differences(experiment(arms={"a": {}, "b": {"dpo": {"beta": 0.1}, "source": "current"}, "c": None})) == {}


# --- the tables ---


def printed(spec: Experiment, folder: Path) -> str:
    stream = io.StringIO()
    plans = plan_arms(resolved(spec, folder))
    Console(file=stream, width=100).print(plan_tables(plans, differences(spec), len(spec.seeds)))
    return stream.getvalue()


def test_tables(tmp_path: Path) -> None:
    text = printed(experiment(seeds=[0, 1], arms={"a": {}, "b": {"rounds": 1000}}), tmp_path)
    assert "for each of 2 seed(s)" in text
    assert "40,000" in text  # 1000 rounds of 40 answers
    row = next(line for line in text.splitlines() if line.split()[:1] == ["a"])
    assert row.split() == ["a", "3", "120", "144", "30", "18", "2,880", "22.2", "kB"]
    assert next(line for line in text.splitlines() if line.split()[:1] == ["rounds"]).split() == ["rounds", "3", "1000"]
    assert max(map(len, text.splitlines())) <= 100


def test_tables_say_when_nothing_is_compared(tmp_path: Path) -> None:
    assert "one arm: nothing is compared" in printed(experiment(), tmp_path)
    assert "the arms do not differ in any setting" in printed(experiment(arms={"a": {}, "b": {}}), tmp_path)
