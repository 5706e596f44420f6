"""Faults that are switched on: what may be asked for, what is refused, and that it is said wherever the loss is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from online_dpo.config import Experiment, load_experiment, validate_experiment
from online_dpo.confounding import confounded, differing_things
from online_dpo.dpo_spec import DPOSpec
from online_dpo.dropout_rates import has_dropout
from online_dpo.errors import ConfigError
from online_dpo.fault_checks import check_faults
from online_dpo.faults_spec import WORDS
from online_dpo.files import digest_json
from online_dpo.scored_text import padding_token
from online_dpo.train_stage import train_inputs

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {"name": "t", "model": "m", "seeds": [0, 1], "prompts": {"path": "p"}, "judge": "a:B"}
SCORES_PADDING = {"faults": {"score_padding": True}}


def experiment(**changes: Any) -> Experiment:
    return validate_experiment(BASE | changes, "t.yaml")


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        experiment(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is said ---


def test_nothing_is_on_by_default() -> None:
    assert DPOSpec().faults.on == ()
    assert DPOSpec().describe_loss() == "sigmoid, beta 0.1, summed log-probs"


@pytest.mark.parametrize("key", WORDS)
def test_a_fault_that_is_on_is_said_with_the_loss(key: str) -> None:
    dpo = experiment(dpo={"faults": {key: True}}).dpo
    assert dpo.describe_loss() == f"sigmoid, beta 0.1, summed log-probs, FAULTS SWITCHED ON: {WORDS[key]}"


def test_plan_report_and_comparison_are_told_of_arms_with_faults() -> None:
    arms = {"right": {}, "one": {"dpo": SCORES_PADDING}, "two": {"dpo": {"faults": {"score_prompt": True}}}}
    assert confounded(experiment(arms=arms)) == [
        "arm one trains with faults switched on (dpo.faults): padding is scored",
        "arm two trains with faults switched on (dpo.faults): the prompt is scored",
    ]


def test_each_fault_is_one_thing_that_arms_differ_in() -> None:
    spec = experiment(arms={"right": {}, "one": {"dpo": SCORES_PADDING}})
    assert differing_things(spec, "right", "one") == ["dpo.faults.score_padding"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dpo": {"faults": {"score_promt": True}}}, "'dpo.faults.score_promt' (did you mean 'score_prompt'?"),
        ({"dpo": {"faults": {"dropout": 0.1}}}, "dpo.faults.dropout: "),
        ({"arms": {"a": {"dpo": {"faults": {"forgets": True}}}}}, "'arms.a.dpo.faults.forgets'; known: score_prompt"),
        ({"arms": {"a": {"dpo": {"faults": {"beta": True}}}}}, "'arms.a.dpo.faults.beta' (did you mean 'dpo.beta'?)"),
        ({"dpo": {"loss": "sft", "faults": {"dropout": True}}}, "dpo.faults are those of losses of pairs; loss 'sft'"),
        ({"algorithm": "rloo", "dpo": {"faults": {"dropout": True}}}, "dpo.faults are those of losses of pairs, and"),
        ({"dpo": {"importance_clip": 2.0, **SCORES_PADDING}}, "'importance_clip' weighs by log-probs that were stored"),
        ({"dpo": {"ld_alpha": 0.5, **SCORES_PADDING}}, "'ld_alpha' compares lengths, and faults.score_padding makes"),
        ({"dpo": {"length_penalty": 0.5, **SCORES_PADDING}}, "'length_penalty' compares lengths, and faults.score"),
        (
            {"learner": {"layout": "packed"}, "arms": {"a": {}, "b": {"dpo": {"faults": {"dropout": True}}}}},
            "learner.layout: packed attention has no dropout, and arms.b trains with it",
        ),
    ],
)  # fmt: skip
def test_what_would_mean_nothing_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    assert says in refused(**changes)


def test_what_goes_with_a_fault_is_allowed() -> None:
    """Dropout scores the completions alone, and the prompt is as long in both texts."""
    experiment(dpo={"importance_clip": 2.0, "ld_alpha": 0.5, "faults": {"dropout": True}}, learner={"layout": "plain"})
    experiment(dpo={"ld_alpha": 0.5, "length_penalty": 0.1, "faults": {"score_prompt": True}})


# --- what the model has ---


def model_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "has"),
    [
        ({"model_type": "gpt2"}, True),  # not said: GPT-2's own default is 0.1
        ({"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, False),
        ({"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.2}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "attention_dropout": 0.1}, True),
        ({"model_type": "gpt_neox"}, False),  # the rate of 0.1 in its configuration is a classifier's
    ],
)
def test_dropout_is_the_models_own(tmp_path: Path, config: dict[str, Any], has: bool) -> None:
    """A summary's or a classifier's rate is none of a language model's."""
    folder = model_folder(tmp_path / "model", **config)
    assert has_dropout(folder) == has
    arms = {"right": {}, "noisy": {"dpo": {"faults": {"dropout": True}}}}
    check_faults(experiment(arms={"right": {}}), folder)
    if has:
        check_faults(experiment(arms=arms), folder)
    else:
        with pytest.raises(ConfigError, match=r"^arms\.noisy: dpo\.faults\.dropout .*every rate .*of m is 0") as caught:
            check_faults(experiment(arms=arms), folder)
        assert "\n" not in str(caught.value)


def test_padding_is_the_padding_token_else_the_end_token() -> None:
    assert padding_token(SimpleNamespace(pad_token_id=0, eos_token_id=2)) == 0
    assert padding_token(SimpleNamespace(pad_token_id=None, eos_token_id=2)) == 2
    with pytest.raises(ConfigError, match="neither a padding nor an end token"):
        padding_token(SimpleNamespace(pad_token_id=None, eos_token_id=None))


# --- what a stage is named by ---


def test_a_fault_makes_another_policy_and_none_leaves_old_runs_as_they_were() -> None:
    """A run that was begun before there were faults goes on: its training's inputs are those it had."""

    def named(**dpo: Any) -> str:
        settings = SimpleNamespace(algorithm="dpo", dpo=DPOSpec(**dpo))
        policy = SimpleNamespace(digest="d")
        pinned: Any = SimpleNamespace(start=policy, reference=policy)
        pair = SimpleNamespace(inputs={"candidates": "c"}, outputs={"pairs.parquet": "p"})
        data: Any = SimpleNamespace(sampled_by=None, pair=pair)
        arm: Any = SimpleNamespace(settings=settings, run=SimpleNamespace(judge_folders=()))
        return train_inputs(arm, pinned, data, seed=0)["dpo"]

    before = DPOSpec().model_dump()
    del before["faults"]
    assert named() == digest_json(before)
    assert len({named(), *(named(faults={key: True}) for key in WORDS)}) == 4


# --- the experiment that ships ---


def test_every_arm_of_the_first_notebook_switches_one_thing_off() -> None:
    spec = load_experiment(ROOT / "experiments" / "gpt2_hh.yaml")
    others = {name: differing_things(spec, "offline", name) for name in spec.arms if name != "offline"}
    assert others == {
        "on_policy": ["source"],
        "no_beta": ["dpo.beta"],
        "prompt_scored": ["dpo.faults.score_prompt"],
        "padding_scored": ["dpo.faults.score_padding"],
        "dropout_on": ["dpo.faults.dropout"],
        "notebook": ["dpo.beta", "dpo.faults.score_prompt", "dpo.faults.score_padding", "dpo.faults.dropout"],
    }
