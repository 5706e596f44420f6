"""Losses of the user's own: found beside the experiment, tried early, their faults named in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from online_dpo.custom_loss import CustomLoss
from online_dpo.dpo_spec import LossSpec
from online_dpo.errors import ConfigError, OnlineDPOError, TrainingError
from online_dpo.losses import LogRatios, sigmoid

CAUTIOUS = """
import torch
import torch.nn.functional as F


def cautious(ratios, beta, margin=1.0, *, power: float = 1.0):
    return -F.logsigmoid(beta * ratios.delta - margin) ** 1 * power


def needy(ratios, beta, strength):
    return strength * beta * ratios.delta


def plain(ratios, beta):
    return -F.logsigmoid(beta * ratios.delta)


def open_ended(ratios, beta, **params):
    return params["scale"] * beta * ratios.delta


def mean(ratios, beta):
    return plain(ratios, beta).mean()


def cut(ratios, beta):
    return plain(ratios, beta).detach()


def constant(ratios, beta):
    return torch.ones_like(ratios.r_w).requires_grad_()


def undefined(ratios, beta):
    return torch.log(ratios.delta)


def number(ratios, beta):
    return 0.5


def broken(ratios, beta):
    return ratios.nothing


def centred(ratios, beta):
    return F.softplus(-beta * (ratios.delta - ratios.delta.mean()))


def steep(ratios, beta):
    return torch.sqrt(ratios.delta.abs())


def one_argument(ratios):
    return ratios.delta


def later(ratios, beta):
    return torch.where(ratios.delta > 50, torch.nan, plain(ratios, beta))


value = 3
"""

Make = Callable[..., CustomLoss]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Make:
    """`make("cautious", margin=2)`: that function of a module beside the experiment, a new module in each test."""
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    module = f"own_loss_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{module}.py").write_text(CAUTIOUS, encoding="utf-8")

    def load(name: str, **params: Any) -> CustomLoss:
        return CustomLoss(LossSpec.model_validate({"use": f"{module}:{name}", **params}), 0.5, [tmp_path])

    return load


def test_a_loss_beside_the_experiment(make: Make) -> None:
    """−log σ(βΔ − margin): by `sigmoid` at r_w − margin/β."""
    r = LogRatios(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0]))
    expected = sigmoid(LogRatios(r.r_w - 2.0 / 0.5, r.r_l), 0.5)
    assert torch.allclose(make("cautious", margin=2.0)(r), expected)
    assert torch.allclose(make("plain")(r), sigmoid(r, 0.5))
    assert torch.allclose(make("open_ended", scale=2.0)(r), r.delta)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("cautius", {}, "has no 'cautius' (did you mean 'cautious'?)"),
        ("cautious", {"margn": 2}, "unknown key 'margn' (did you mean 'margin'?)"),
        ("cautious", {"zzz": 2}, "unknown key 'zzz'; known: margin, power"),
        ("cautious", {"beta": 2}, "unknown key 'beta'; known: margin, power"),
        ("plain", {"margin": 2}, "unknown key 'margin'; it takes no keys"),
        ("needy", {}, "key 'strength' is missing"),
        ("one_argument", {}, "must take the log-ratios and beta: def name(ratios, beta, ...)"),
        ("value", {}, "is a int, not a function"),
    ],
)
def test_wrong_names_and_keys_are_one_line(make: Make, name: str, params: dict[str, Any], says: str) -> None:
    assert says in fault(ConfigError, lambda: make(name, **params))


def test_no_such_module(tmp_path: Path) -> None:
    (tmp_path / "my_own_loss.py").write_text(CAUTIOUS, encoding="utf-8")
    text = fault(ConfigError, lambda: CustomLoss(LossSpec(use="my_own_los:plain"), 0.1, [tmp_path]))
    assert text == "loss 'my_own_los:plain': no module 'my_own_los' (did you mean 'my_own_loss'?)"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mean", "returned shape [] for 3 pairs: one loss a pair is expected"),
        ("cut", "has no gradient: it must be computed from the log-ratios by torch"),
        ("constant", "has no gradient: it does not depend on the log-ratios"),
        ("undefined", "returned a value that is not finite"),
        ("number", "returned a float, not a tensor [pairs]"),
        ("broken", "failed: AttributeError: 'LogRatios' object has no attribute 'nothing'"),
        # d√|Δ|/dΔ is infinite where policy = reference, where every run begins
        ("steep", "has a gradient that is not finite"),
        ("centred", "of a pair depends on the other pairs"),
    ],
)
def test_a_loss_that_is_none_is_named_before_anything_is_trained(make: Make, name: str, says: str) -> None:
    assert says in fault(TrainingError, lambda: make(name))


def test_a_loss_that_fails_only_later_is_named_then(make: Make) -> None:
    loss = make("later")
    far = LogRatios(torch.tensor([60.0, 0.0]), torch.zeros(2))
    assert "returned a value that is not finite" in fault(TrainingError, lambda: loss(far))


def test_no_gradient_is_asked_for_where_none_is_taken(make: Make) -> None:
    """Figures are computed without gradients too."""
    r = LogRatios(torch.tensor([1.0], requires_grad=True), torch.zeros(1))
    with torch.no_grad():
        assert make("plain")(r).item() == pytest.approx(sigmoid(r, 0.5).item())


def test_the_trial_needs_no_gradients_switched_on(make: Make) -> None:
    with torch.no_grad():
        assert "has no gradient" in fault(TrainingError, lambda: make("cut"))


def test_digest_follows_the_source_and_not_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is gone on with must have the loss it began with."""
    import sys

    digests = []
    for folder, text in (("a", CAUTIOUS), ("b", CAUTIOUS), ("c", CAUTIOUS + "\n# another\n")):
        place = tmp_path / folder
        place.mkdir()
        (place / "digested_loss.py").write_text(text, encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr("sys.path", list(sys.path))
            patch.delitem(sys.modules, "digested_loss", raising=False)
            digests.append(CustomLoss(LossSpec(use="digested_loss:plain"), 0.1, [place]).digest)
            patch.delitem(sys.modules, "digested_loss")
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 64


def fault(kind: type[OnlineDPOError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_readmes_example_runs_as_it_stands(tmp_path: Path) -> None:
    """max(0, 2 − 0.1·Δ): 2 at Δ = 0, 0 beyond Δ = 20."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [snippet] = [block.partition("```")[0] for block in text.split("```python\n")[1:] if "def cautious" in block]
    (tmp_path / "my_loss.py").write_text(snippet, encoding="utf-8")
    loss = CustomLoss(LossSpec.model_validate({"use": "my_loss:cautious", "margin": 2.0}), 0.1, [tmp_path])
    ratios = LogRatios(torch.tensor([0.0, 15.0], requires_grad=True), torch.tensor([0.0, -6.0]))
    assert loss(ratios).tolist() == pytest.approx([2.0, 0.0])
