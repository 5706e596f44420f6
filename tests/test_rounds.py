"""Which policy samples a round and which is its reference; what is pinned stays pinned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_policy, fake_prompt
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.config import ArmSettings, validate_experiment
from online_dpo.errors import RunFolderError
from online_dpo.policies import read_policy
from online_dpo.rounds import ArmPolicies, averaging, pin, reference_index, source_index, still_needed
from online_dpo.store import RoundFolder, RunStore
from online_dpo.types import Policy

PROMPTS = tuple(fake_prompt(name) for name in ("p1", "p2"))


def settings(**changes: Any) -> ArmSettings:
    return ArmSettings.model_validate({"judge": {"use": "a:B"}, "rounds": 6} | changes)


@pytest.mark.parametrize(
    ("source", "rounds_1_to_6"),
    [
        ("current", [0, 1, 2, 3, 4, 5]),
        ("initial", [0, 0, 0, 0, 0, 0]),
        ({"every": 1}, [0, 1, 2, 3, 4, 5]),  # the current policy
        ({"every": 2}, [0, 0, 2, 2, 4, 4]),
        ({"every": 3}, [0, 0, 0, 3, 3, 3]),
        ({"every": 4}, [0, 0, 0, 0, 4, 4]),
        ({"every": 6}, [0, 0, 0, 0, 0, 0]),  # the initial one in all of these rounds
        # Round t by the policy after round t − 1 − k: none is older than the initial one.
        ({"lag": 0}, [0, 1, 2, 3, 4, 5]),  # the current policy
        ({"lag": 1}, [0, 0, 1, 2, 3, 4]),
        ({"lag": 3}, [0, 0, 0, 0, 1, 2]),
        ({"lag": 9}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_source(source: Any, rounds_1_to_6: list[int]) -> None:
    """Round t is sampled by the policy after round …: refreshed before rounds 1, k+1, 2k+1, …"""
    assert [source_index(settings(source=source), t) for t in range(1, 7)] == rounds_1_to_6


@pytest.mark.parametrize(
    ("reference", "rounds_1_to_6"),
    [
        ("prior", [0, 1, 2, 3, 4, 5]),
        ("initial", [0, 0, 0, 0, 0, 0]),
        ({"every": 1}, [0, 1, 2, 3, 4, 5]),  # the prior policy
        ({"every": 2}, [0, 0, 2, 2, 4, 4]),
        ({"every": 3}, [0, 0, 0, 3, 3, 3]),
        ({"every": 6}, [0, 0, 0, 0, 0, 0]),  # the initial one in all of these rounds
        ({"ema": 0.25}, [0, None, None, None, None, None]),  # no round's policy
        ({"ema": 1}, [0, 1, 2, 3, 4, 5]),  # 1·policy + 0·ref
    ],
)
def test_reference(reference: Any, rounds_1_to_6: list[int | None]) -> None:
    """The reference of round t is the policy after round …"""
    assert [reference_index(settings(reference=reference), t) for t in range(1, 7)] == rounds_1_to_6


def test_only_an_average_has_a_weight() -> None:
    assert averaging(settings(reference={"ema": 0.25})) == 0.25
    for reference in ("prior", "initial", {"every": 2}, {"ema": 1}):
        assert averaging(settings(reference=reference)) is None


@pytest.mark.parametrize(
    ("changes", "needed_after_0_to_6"),
    [
        # Round t+1 begins with, samples from and refers to policy t alone.
        ({}, [{0}, {1}, {2}, {3}, {4}, {5}, set()]),
        ({"source": "initial"}, [{0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}, {0, 5}, set()]),
        ({"reference": "initial"}, [{0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}, {0, 5}, set()]),
        # Sources 0 0 2 2 4 4: after round 3 policy 2 samples round 4 still; after round 4 no more.
        ({"source": {"every": 2}}, [{0}, {0, 1}, {2}, {2, 3}, {4}, {4, 5}, set()]),
        ({"source": {"every": 4}}, [{0}, {0, 1}, {0, 2}, {0, 3}, {4}, {4, 5}, set()]),
        ({"reference": {"every": 2}}, [{0}, {0, 1}, {2}, {2, 3}, {4}, {4, 5}, set()]),
        # Round t + 1 begins with policy t and is sampled by t − k; those between sample the rounds after it. The last
        # round, 6, is sampled by policy 3 where k = 2: policy 4 would sample a seventh.
        ({"source": {"lag": 1}}, [{0}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, set()]),
        ({"source": {"lag": 2}}, [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 5}, set()]),
        # Sources 0 0 2 2 4 4, references 0 0 0 3 3 3.
        (
            {"source": {"every": 2}, "reference": {"every": 3}},
            [{0}, {0, 1}, {0, 2}, {2, 3}, {3, 4}, {3, 4, 5}, set()],
        ),
        # Parts of a mixture: the current policy, and one that is refreshed every second round.
        (
            {"source": {"mixture": [{"share": 0.5, "source": "current"}, {"share": 0.5, "source": {"every": 2}}]}},
            [{0}, {0, 1}, {2}, {2, 3}, {4}, {4, 5}, set()],
        ),
        # These sample from the current policy, or not at all.
        *(
            ({"source": source}, [{0}, {1}, {2}, {3}, {4}, {5}, set()])
            for source in ({"history": 3}, {"stream": "other"}, {"refresh_when": {"kl_above": 1}}, {"every_steps": 2})
        ),
        # Round 1 refers to the initial policy; later ones to averages, made of the policy that they begin with.
        ({"reference": {"ema": 0.5}}, [{0}, {1}, {2}, {3}, {4}, {5}, set()]),
    ],
)
def test_still_needed(changes: dict[str, Any], needed_after_0_to_6: list[set[int]]) -> None:
    assert [still_needed(settings(**changes), after).policies for after in range(7)] == needed_after_0_to_6


def test_what_sampled_answers_that_may_be_trained_on_again_is_needed() -> None:
    """After round 4, which trained on round 2's answers: policy 1 sampled them. After the last round nothing is."""
    arm = settings(source={"refresh_when": {"kl_above": 1}})
    assert still_needed(arm, 4, sampled=2).policies == {1, 4}
    assert still_needed(arm, 4, sampled=4).policies == {3, 4}
    assert still_needed(arm, 6, sampled=2).policies == set()


@pytest.mark.parametrize(
    ("reference", "needed_after_0_to_6"),
    [
        # Round 2 makes the first average, of the initial policy; round t + 1 needs round t's; nothing needs round 6's.
        ({"ema": 0.5}, [set(), set(), {2}, {3}, {4}, {5}, set()]),
        ({"ema": 1}, [set()] * 7),
        ({"every": 2}, [set()] * 7),
        ("prior", [set()] * 7),
    ],
)
def test_averages_still_needed(reference: Any, needed_after_0_to_6: list[set[int]]) -> None:
    arm = settings(reference=reference)
    assert [still_needed(arm, after).references for after in range(7)] == needed_after_0_to_6


@given(
    source=st.sampled_from(["current", "initial"]) | st.integers(1, 9).map(lambda k: {"every": k}),
    reference=st.sampled_from(["prior", "initial", {"ema": 0.5}]) | st.integers(1, 9).map(lambda k: {"every": k}),
    rounds=st.integers(1, 9),
)
def test_what_is_given_up_is_never_asked_for(source: Any, reference: Any, rounds: int) -> None:
    """Give up after every round what is not needed and not the newest: every later round finds its policies, and the
    average that its own is made of."""
    arm = settings(source=source, reference=reference, rounds=rounds)
    there, averages = {0}, {1}
    for t in range(1, rounds + 1):
        referred = reference_index(arm, t)
        assert {t - 1, source_index(arm, t), t - 1 if referred is None else referred} <= there
        if referred is None:
            assert t - 1 in averages
            averages.add(t)
        needed = still_needed(arm, t)
        there = {i for i in there | {t} if i in (0, t) or i in needed.policies}
        averages = {i for i in averages if i == 1 or i in needed.references}


# --- pinning ---


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    data = {"name": "t", "model": "m", "prompts": {"path": "p"}, "judge": {"use": "a:B"}}
    return RunStore.create(tmp_path / "run", validate_experiment(data, "test"), {})


@pytest.fixture
def policies(store: RunStore, tmp_path: Path) -> ArmPolicies:
    """The initial policy and two trained ones."""
    for index in (1, 2):

        def produce(out: Path, index: int = index) -> dict[str, Any]:
            fake_policy(out / "policy", f"on_policy/seed_0/round_{index:02d}", "weights", index)
            return {}

        store.round("on_policy", 0, index).stage("train", {"n": str(index)}, ["policy"], produce)
    return ArmPolicies(store, "on_policy", 0, fake_policy(tmp_path / "initial", "initial", "initial"))


def third(store: RunStore) -> RoundFolder:
    return store.round("on_policy", 0, 3)


def test_pinned_by_role(store: RunStore, policies: ArmPolicies) -> None:
    pinned = pin(third(store), policies, settings(source={"every": 2}, reference="initial"), PROMPTS)
    assert pinned.start.id == "on_policy/seed_0/round_02"
    assert pinned.source == pinned.start  # refreshed before round 3
    assert pinned.reference == policies.initial
    assert pinned.prompts == PROMPTS
    written = json.loads((third(store).path / "round.json").read_text(encoding="utf-8"))
    assert written == {
        "round": 3,
        "prompts": ["p1", "p2"],
        "start": {"after_round": 2, "id": pinned.start.id, "digest": pinned.start.digest},
        "source": {"after_round": 2, "id": pinned.start.id, "digest": pinned.start.digest},
        "reference": {"after_round": 0, "id": "initial", "digest": policies.initial.digest},
    }


def average(store: RunStore) -> Policy:
    """What stands in for round 3's averaged reference."""

    def produce(out: Path) -> dict[str, Any]:
        fake_policy(out / "reference", "on_policy/seed_0/reference_03", "average")
        return {}

    third(store).stage("reference", {}, ["reference"], produce)
    return read_policy(third(store).path / "reference")


def test_an_average_is_pinned_as_the_rounds_own(store: RunStore, policies: ArmPolicies) -> None:
    made = average(store)
    pinned = pin(third(store), policies, settings(reference={"ema": 0.5}), PROMPTS)
    assert pinned.reference == made
    written = json.loads((third(store).path / "round.json").read_text(encoding="utf-8"))
    assert written["reference"] == {
        "averaged_for_round": 3,
        "id": "on_policy/seed_0/reference_03",
        "digest": made.digest,
    }
    assert policies.averaged(1) == policies.initial


def test_an_average_edited_after_it_was_made_is_refused_when_resumed(store: RunStore, policies: ArmPolicies) -> None:
    file = average(store).path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    reopened = RunStore.open(store.root)
    mine = ArmPolicies(reopened, "on_policy", 0, policies.initial)
    with pytest.raises(RunFolderError, match="round_03/reference was changed after stage 'reference' wrote it"):
        pin(third(reopened), mine, settings(reference={"ema": 0.5}), PROMPTS)


def test_a_resumed_round_reads_what_was_decided(store: RunStore, policies: ArmPolicies) -> None:
    """Even where the rule would now decide otherwise: a round is never half of one rule and half of another."""
    first = pin(third(store), policies, settings(source="initial"), PROMPTS)
    again = pin(third(RunStore.open(store.root)), policies, settings(source="current"), PROMPTS)
    assert again == first
    assert again.source == policies.initial


def test_another_initial_policy_than_the_pinned_one(store: RunStore, policies: ArmPolicies) -> None:
    pin(third(store), policies, settings(source="initial"), PROMPTS)
    other = ArmPolicies(store, "on_policy", 0, Policy("initial", policies.initial.path, "0" * 64))
    with pytest.raises(RunFolderError, match="its source is pinned as initial, whose digest differs"):
        pin(third(store), other, settings(source="initial"), PROMPTS)


def test_another_trained_policy_than_the_pinned_one(store: RunStore, policies: ArmPolicies) -> None:
    pin(third(store), policies, settings(), PROMPTS)
    file = third(store).path / "round.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"after_round": 2', '"after_round": 1', 1), encoding="utf-8")
    with pytest.raises(RunFolderError, match="its start is pinned as on_policy/seed_0/round_02, whose digest differs"):
        pin(third(store), policies, settings(), PROMPTS)


def test_other_prompts_are_refused(store: RunStore, policies: ArmPolicies) -> None:
    pin(third(store), policies, settings(), PROMPTS)
    with pytest.raises(RunFolderError, match=r"prompts pinned in round\.json are not this round's"):
        pin(third(store), policies, settings(), PROMPTS[::-1])


@pytest.mark.parametrize("file", ["model.safetensors", "policy.json", "config.json"])
def test_weights_edited_after_their_round_are_refused_when_resumed(
    store: RunStore, policies: ArmPolicies, file: str
) -> None:
    """Round 2 is closed and would be passed over; its policy begins round 3 all the same."""
    path = store.round("on_policy", 0, 2).path / "policy" / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    reopened = RunStore.open(store.root)
    with pytest.raises(RunFolderError, match="round_02/policy was changed after stage 'train' wrote it"):
        pin(third(reopened), ArmPolicies(reopened, "on_policy", 0, policies.initial), settings(), PROMPTS)


def test_a_missing_policy_is_named(store: RunStore, policies: ArmPolicies) -> None:
    store.round("on_policy", 0, 2).prune("policy")
    with pytest.raises(RunFolderError, match=r"round_02/policy/policy\.json is missing or damaged"):
        pin(third(store), policies, settings(), PROMPTS)
