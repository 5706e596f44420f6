"""Which weights an engine holds, told by a probe: by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from online_dpo.backends.probe import TOLERANCE, check_probe, mean_gap
from online_dpo.errors import EngineError
from online_dpo.types import Policy, Probe

OLD = (-1.0, -2.0, -3.0)


def policy(name: str, *logprobs: float) -> Policy:
    return Policy(name, Path(name), digest=name, probe=Probe(tuple(range(len(logprobs) + 1)), logprobs))


def shifted(by: float) -> tuple[float, ...]:
    return tuple(value + by for value in OLD)


def test_mean_gap_by_hand() -> None:
    """|−1 + 1.5| = 0.5, |−2 + 2| = 0, |−3 + 2| = 1: 1.5 / 3 = 0.5."""
    assert mean_gap([-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0]) == pytest.approx(0.5)


@pytest.mark.parametrize(("found", "expected"), [((), ()), ((-1.0,), ()), ((-1.0, -2.0), (-1.0,))])
def test_rows_of_different_lengths_are_infinitely_apart(found: tuple[float, ...], expected: tuple[float, ...]) -> None:
    """An empty row says nothing of any weights."""
    assert mean_gap(found, expected) == float("inf")


def test_right_weights_pass_and_the_largest_difference_is_told() -> None:
    """Differences 1e-5, 0 and 4e-5: the largest is 4e-5, the mean far below 5e-4."""
    found = (OLD[0] + 1e-5, OLD[1], OLD[2] - 4e-5)
    assert check_probe(policy("a", *OLD), found, "float32") == pytest.approx(4e-5, rel=1e-6)


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_tolerance_of_each_dtype(dtype: str) -> None:
    """All tokens off by 0.9 of the tolerance pass, by 1.1 do not."""
    wanted = policy("a", *OLD)
    assert check_probe(wanted, shifted(0.9 * TOLERANCE[dtype]), dtype) > 0
    with pytest.raises(EngineError, match="does not hold the weights of a"):
        check_probe(wanted, shifted(1.1 * TOLERANCE[dtype]), dtype)


@pytest.mark.parametrize("found", [(), OLD[:2], (float("nan"), *OLD[1:])])
def test_missing_or_undefined_values_do_not_pass(found: tuple[float, ...]) -> None:
    """A comparison with NaN is false both ways: the check must not read that as "within"."""
    with pytest.raises(EngineError, match="does not hold"):
        check_probe(policy("a", *OLD), found, "float32")


def test_policy_without_probe_cannot_be_checked() -> None:
    with pytest.raises(EngineError, match="carries no probe"):
        check_probe(Policy("bare", Path("bare"), "d"), OLD, "float32")


def test_engine_that_still_holds_the_policy_before() -> None:
    """A round at a small rate moved the probe by 1e-4 a token, a fifth of the tolerance: the old weights' values
    are "within", yet nearer to the old policy (0) than to the new (1e-4)."""
    before, after = policy("round-1", *OLD), policy("round-2", *shifted(1e-4))
    with pytest.raises(EngineError, match="still holds round-1, not round-2"):
        check_probe(after, OLD, "float32", before)
    assert check_probe(after, shifted(1e-4), "float32", before) == 0.0
    # Nearer to the new by rounding alone: 0.6e-4 of the way.
    assert check_probe(after, shifted(0.6e-4), "float32", before) == pytest.approx(0.4e-4, rel=1e-6)


def test_policies_that_the_probe_cannot_tell_apart() -> None:
    """Two policies 1e-6 apart on the probe: rounding decides which is nearer, so neither is an error."""
    assert check_probe(policy("b", *shifted(1e-6)), OLD, "float32", policy("a", *OLD)) == pytest.approx(1e-6, rel=1e-3)


def test_same_policy_again() -> None:
    """Loaded twice: the policy before is the policy itself."""
    same = policy("a", *OLD)
    assert check_probe(same, shifted(2e-5), "float32", same) == pytest.approx(2e-5, rel=1e-6)


def test_policy_before_without_probe() -> None:
    before = Policy("bare", Path("bare"), "d")
    assert check_probe(policy("a", *OLD), OLD, "float32", before) == 0.0
