"""What a round works with: its starting policy, its source and its reference, pinned on disk before it samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from online_dpo.config import ArmSettings, ReferenceSpec
from online_dpo.errors import RunFolderError
from online_dpo.manifest_check import check_pinned
from online_dpo.policies import read_policy
from online_dpo.source_spec import SourceSpec, parts_of, source_kind
from online_dpo.store import RoundFolder, RunStore
from online_dpo.types import Policy, Prompt


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a round's answers are sampled with, which may be known before the round's start is."""

    source: Policy
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Pinned(Sampled):
    """A round's policies and prompts. `start` is where training begins: the policy of the round before."""

    start: Policy
    reference: Policy


@dataclass(frozen=True, slots=True)
class ArmPolicies:
    """The policies of one arm and seed: 0 is the initial one, t the one that round t trained."""

    store: RunStore
    arm: str
    seed: int
    initial: Policy

    def at(self, index: int) -> Policy:
        """The policy after round `index`."""
        if index == 0:
            return self.initial
        folder = self.store.round(self.arm, self.seed, index)
        folder.trust("train")
        return read_policy(folder.path / "policy", verify=False)

    def averaged(self, index: int) -> Policy:
        """The average of policies that is round `index`'s reference; round 1's is the initial policy."""
        if index == 1:
            return self.initial
        folder = self.store.round(self.arm, self.seed, index)
        folder.trust("reference")
        return read_policy(folder.path / "reference", verify=False)


def source_index(settings: ArmSettings, index: int) -> int:
    """The round whose policy samples round `index` (1-based): current t−1, initial 0, every k: the last refresh,
    lag k: t−1−k, or 0 where there is no such round.

    t−1 too for what samples nothing, where it is the policy that a judge may ask; for `refresh_when` in a round that
    samples; for a mixture, whose parts have their own (`part_indices`).
    """
    if settings.source == "initial":
        return 0
    if isinstance(settings.source, SourceSpec) and settings.source.every is not None:
        return _last_refresh(settings.source.every, index)
    if isinstance(settings.source, SourceSpec) and settings.source.lag is not None:
        return max(0, index - 1 - settings.source.lag)
    return index - 1


def part_indices(settings: ArmSettings, index: int) -> list[int]:
    """`source_index` of each part of a mixture; of any other source alone."""
    parts = parts_of(settings.source)
    return [source_index(settings.model_copy(update={"source": part}), index) for part in parts]


def sampled_in(folder: RoundFolder) -> int:
    """The round whose answers the round of `folder` trains on: another one where `refresh_when` refreshed nothing."""
    refresh = folder.done("refresh")
    return folder.index if refresh is None else int(refresh.info["sampled_in_round"])


def averaging(settings: ArmSettings) -> float | None:
    """α of an arm whose reference is an average of policies; None where it is one policy of the arm's (so at α = 1)."""
    alpha = settings.reference.ema if isinstance(settings.reference, ReferenceSpec) else None
    return None if alpha == 1 else alpha


def reference_index(settings: ArmSettings, index: int) -> int | None:
    """The round whose policy is the reference of round `index`: prior t−1 (what the round began with), initial 0, every
    k: the last refresh. None where the reference is an average: no round's policy (but for round 1's, the initial)."""
    if settings.reference == "initial" or index == 1:
        return 0
    if averaging(settings) is not None:
        return None
    if isinstance(settings.reference, ReferenceSpec) and settings.reference.every is not None:
        return _last_refresh(settings.reference.every, index)
    return index - 1


def _last_refresh(every: int, index: int) -> int:
    """Refreshed before rounds 1, k+1, 2k+1, …"""
    return (index - 1) // every * every


def pin(folder: RoundFolder, policies: ArmPolicies, settings: ArmSettings, prompts: tuple[Prompt, ...]) -> Pinned:
    """The round's policies and prompts: decided and written once; a resumed round reads what was decided.

    Raises `RunFolderError` when a pinned policy or prompt is no longer what it was.
    """
    index = folder.index
    chosen = {
        "start": index - 1,
        "source": source_index(settings, sampled_in(folder)),
        "reference": reference_index(settings, index),
    }

    def decide() -> dict[str, Any]:
        roles = {role: _entry(policies, index, at) for role, at in chosen.items()}
        return {"round": index, "prompts": [prompt.id for prompt in prompts], **roles}

    pinned = folder.pin(decide)
    check_pinned(pinned, folder.path / "round.json")
    found = {role: _find(policies, pinned[role]) for role in chosen}
    for role, policy in found.items():
        if policy.digest != pinned[role]["digest"]:
            raise RunFolderError(f"{folder.path}: its {role} is pinned as {pinned[role]['id']}, whose digest differs")
    by_id = {prompt.id: prompt for prompt in prompts}
    if list(by_id) != pinned["prompts"]:
        raise RunFolderError(f"{folder.path}: the prompts pinned in round.json are not this round's")
    return Pinned(prompts=prompts, **found)


def _entry(policies: ArmPolicies, index: int, at: int | None) -> dict[str, Any]:
    """What is pinned of a policy: where it lies (after which round, or averaged for which), its id and digest."""
    place = {"averaged_for_round": index} if at is None else {"after_round": at}
    policy = _find(policies, place)
    return {**place, "id": policy.id, "digest": policy.digest}


def _find(policies: ArmPolicies, entry: Mapping[str, Any]) -> Policy:
    if "averaged_for_round" in entry:
        return policies.averaged(entry["averaged_for_round"])
    return policies.at(entry["after_round"])


class Needed(NamedTuple):
    """Rounds whose trained policy, and rounds whose averaged reference, later rounds need."""

    policies: set[int]
    references: set[int]


def still_needed(settings: ArmSettings, after: int, sampled: int | None = None) -> Needed:
    """What rounds after round `after` begin with, sample from, refer to, or average into their references.

    `sampled`: the round whose answers round `after` trained on (`sampled_in`). Where later rounds may train on them
    again, the policy that sampled them is needed too.
    """
    later = range(after + 1, settings.rounds + 1)
    wanted = {at for t in later for at in (t - 1, *part_indices(settings, t), reference_index(settings, t))}
    if later and sampled is not None and source_kind(settings.source) == "refresh_when":
        wanted.add(source_index(settings, sampled))
    averages = averaging(settings) is not None
    # Round t's average is made of round t−1's; round 1 refers to the initial policy, and has none of its own.
    references = {t - 1 for t in later if averages and 1 < t - 1 <= after}
    return Needed({at for at in wanted if at is not None and at <= after}, references)
