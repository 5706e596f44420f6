"""The loss's settings: what each loss reads, what must be said, how it is described."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from online_dpo.config import Experiment, validate_experiment
from online_dpo.dpo_spec import LOSS_NAMES, READ_BY, DPOSpec, LossSpec
from online_dpo.errors import ConfigError

MINIMAL: dict[str, Any] = {"name": "tiny", "model": "m", "judge": "a:B", "prompts": {"path": "p"}}
NEEDED: dict[str, dict[str, Any]] = {"ipo": {"length_normalize": True}, "exo_pair": {"label_smoothing": 0.01}}
OTHER = {"label_smoothing": 0.2, "simpo_gamma": 1.5, "discopop_tau": 0.1, "bco_running_mean": True}


def experiment(**dpo: Any) -> Experiment:
    return validate_experiment({**MINIMAL, "dpo": dpo}, "x.yaml")


def fault(**dpo: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        experiment(**dpo)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_loss_can_be_named(name: str) -> None:
    assert experiment(loss=name, **NEEDED.get(name, {})).dpo.loss_name == name


@pytest.mark.parametrize("key", READ_BY)
@pytest.mark.parametrize("name", [*LOSS_NAMES, "my_loss:cautious"])
def test_a_key_that_the_loss_does_not_read_is_an_error(name: str, key: str) -> None:
    """`label_smoothing` beside a loss that ignores it is a mistake that public code lets pass."""
    settings = {"loss": name, **NEEDED.get(name, {}), key: OTHER[key]}
    if name in READ_BY[key]:
        assert getattr(experiment(**settings).dpo, key) == OTHER[key]
    else:
        assert f"dpo: loss '{name}' does not read '{key}': leave it out (it is read by {READ_BY[key][0]}" in fault(
            **settings
        )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "sigmod"}, "dpo.loss: no loss of this name (did you mean 'sigmoid'?); losses: sigmoid, robust,"),
        ({"loss": 3}, "dpo.loss: a loss's name or a mapping with `use` is expected"),
        ({"loss": True}, "dpo.loss: a loss's name or a mapping with `use` is expected"),
        ({"loss": {"margin": 2}}, "key 'dpo.loss.use' is missing"),
        ({"loss": {"use": "Mine"}}, 'dpo.loss.use: a loss of your own is named as "module:function"'),
        ({"loss": "my loss:f"}, 'dpo.loss.use: a loss of your own is named as "module:function"'),
        ({"loss": "ipo"}, "dpo: loss 'ipo' needs 'length_normalize' said: under this name two trainers of one library"),
        ({"loss": "sigmoid_norm", "length_normalize": False}, "loss 'sigmoid_norm' is defined on averaged log-probs"),
        ({"loss": "simpo", "length_normalize": False}, "loss 'simpo' is defined on averaged log-probs"),
        ({"loss": "simpo", "dpop_lambda": 5}, "'dpop_lambda' compares with the reference; loss 'simpo' has none"),
        ({"loss": "exo_pair"}, "loss 'exo_pair' takes the logarithm of 'label_smoothing': give one above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "dpo.label_smoothing: Input should be less than 0.5"),
        ({"ld_alpha": 1.5}, "dpo.ld_alpha: Input should be less than or equal to 1"),
        ({"importance_clip": 0}, "dpo.importance_clip: Input should be greater than 0"),
        ({"nll_weight": -1}, "dpo.nll_weight: Input should be greater than or equal to 0"),
        ({"wpo_weight": 2}, "dpo.wpo_weight: Input should be a valid boolean"),
        ({"lenght_penalty": 1}, "unknown key 'dpo.lenght_penalty' (did you mean 'length_penalty'?)"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], says: str) -> None:
    assert says in fault(**settings)


@pytest.mark.parametrize(
    ("key", "value", "away"),
    [
        ("beta", 0.2, "leave it out, or at its default 0.1"),
        ("nll_weight", 0.1, "leave it out, or at its default 0.0"),
        ("dpop_lambda", 1.0, ""),
        ("length_penalty", 0.1, ""),
        ("ld_alpha", 0.5, "leave it out"),
        ("wpo_weight", True, "leave it out, or at its default False"),
        ("importance_clip", 2.0, "leave it out"),
        ("xpo_alpha", 0.1, ""),
    ],
)
def test_a_loss_of_chosen_answers_reads_nothing_that_compares(key: str, value: Any, away: str) -> None:
    """Any of these would be ignored."""
    said = fault(loss="sft", **{key: value})
    assert away in said
    assert f"'{key}'" in said


def test_an_arm_of_chosen_answers_among_arms_of_pairs() -> None:
    """The experiment's β, at its default, is no fault of the arm's."""
    arms = {"dpo": {}, "best_of_n": {"dpo": {"loss": "sft"}}}
    found = validate_experiment({**MINIMAL, "dpo": {"beta": 0.1}, "arms": arms}, "x.yaml")
    assert found.arm("best_of_n").dpo.chosen_alone
    assert not found.arm("dpo").dpo.chosen_alone


def test_summed_or_averaged() -> None:
    """Averaged by definition, by the user's word, and not otherwise."""
    for name in set(LOSS_NAMES) - {"ipo"}:
        assert experiment(loss=name, **NEEDED.get(name, {})).dpo.averaged == (name in ("sigmoid_norm", "simpo", "sft"))
    assert experiment(loss="sigmoid", length_normalize=True).dpo.averaged
    assert experiment(loss="ipo", length_normalize=True).dpo.averaged
    assert not experiment(loss="ipo", length_normalize=False).dpo.averaged


def test_a_loss_of_ones_own_and_its_shorthand() -> None:
    loss = experiment(loss={"use": "my_loss:cautious", "margin": 2.0}).dpo.loss
    assert isinstance(loss, LossSpec)
    assert (loss.use, loss.params) == ("my_loss:cautious", {"margin": 2.0})
    short = experiment(loss="my_loss:cautious").dpo
    assert (short.loss_name, short.loss) == ("my_loss:cautious", LossSpec(use="my_loss:cautious"))


def test_arms_change_a_loss_key_by_key_or_whole() -> None:
    """A key alone is changed; another `use` brings its own keys and none of the first one's."""
    arms = {
        "key": {"dpo": {"loss": {"margin": 3.0}}},
        "whole": {"dpo": {"loss": {"use": "my_loss:bold"}}},
        "named": {"dpo": {"loss": "hinge"}},
    }
    data = {**MINIMAL, "dpo": {"loss": {"use": "my_loss:cautious", "margin": 2.0}}, "arms": arms}
    found = validate_experiment(data, "x.yaml")
    assert found.arm("key").dpo.loss == LossSpec.model_validate({"use": "my_loss:cautious", "margin": 3.0})
    assert found.arm("whole").dpo.loss == LossSpec(use="my_loss:bold")
    assert found.arm("named").dpo.loss == "hinge"


def test_settings_survive_being_written_and_read_again() -> None:
    """A run folder holds them as JSON."""
    for dpo in (experiment(loss={"use": "a:b", "margin": 2.0}).dpo, experiment(loss="ipo", length_normalize=False).dpo):
        assert DPOSpec.model_validate_json(dpo.model_dump_json()) == dpo


def test_params_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValidationError):
        DPOSpec(nll_weight=math.inf)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "sigmoid, beta 0.1, summed log-probs"),
        ({"label_smoothing": 0.1}, "sigmoid, beta 0.1, summed log-probs, label_smoothing 0.1"),
        ({"loss": "ipo", "length_normalize": True}, "ipo, beta 0.1, averaged log-probs"),
        ({"loss": "simpo", "beta": 2}, "simpo, beta 2, averaged log-probs, simpo_gamma 0.5"),
        ({"loss": "discopop"}, "discopop, beta 0.1, summed log-probs, discopop_tau 0.05"),
        ({"loss": "bco_pair", "bco_running_mean": True}, "bco_pair, beta 0.1, summed log-probs, bco_running_mean"),
        (
            {"loss": {"use": "my_loss:cautious", "margin": 2.0}, "nll_weight": 1},
            "my_loss:cautious (margin 2.0), beta 0.1, summed log-probs, nll_weight 1",
        ),
        (
            {"dpop_lambda": 5, "length_penalty": 0.01, "ld_alpha": 0, "wpo_weight": True, "importance_clip": 2},
            "sigmoid, beta 0.1, summed log-probs, dpop_lambda 5, length_penalty 0.01, ld_alpha 0, wpo_weight, "
            "importance_clip 2",
        ),
        ({"xpo_alpha": 1e-5}, "sigmoid, beta 0.1, summed log-probs, xpo_alpha 1e-05"),
        ({"loss": "sft"}, "sft on the chosen answers, averaged log-probs"),
    ],
)
def test_the_loss_in_one_line(settings: dict[str, Any], text: str) -> None:
    assert experiment(**settings).dpo.describe_loss() == text
