"""What a round works with: its starting policy, its source and its reference, pinned on disk before it samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from online_dpo.config import ArmSettings, EverySpec
from online_dpo.errors import RunFolderError
from online_dpo.policies import read_policy
from online_dpo.store import RoundFolder, RunStore
from online_dpo.types import Policy, Prompt


@dataclass(frozen=True, slots=True)
class Pinned:
    """A round's policies and prompts. `start` is where training begins: the policy of the round before."""

    start: Policy
    source: Policy
    reference: Policy
    prompts: tuple[Prompt, ...]


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


def source_index(settings: ArmSettings, index: int) -> int:
    """The round whose policy samples round `index` (1-based): current t−1, initial 0, every k: the last refresh."""
    if settings.source == "initial":
        return 0
    if isinstance(settings.source, EverySpec):
        return (index - 1) // settings.source.every * settings.source.every
    return index - 1


def reference_index(settings: ArmSettings, index: int) -> int:
    """The round whose policy is the reference of round `index`: prior t−1 (what the round began with), initial 0."""
    return 0 if settings.reference == "initial" else index - 1


def pin(folder: RoundFolder, policies: ArmPolicies, settings: ArmSettings, prompts: tuple[Prompt, ...]) -> Pinned:
    """The round's policies and prompts: decided and written once; a resumed round reads what was decided.

    Raises `RunFolderError` when a pinned policy or prompt is no longer what it was.
    """
    index = folder.index
    chosen = {
        "start": index - 1,
        "source": source_index(settings, index),
        "reference": reference_index(settings, index),
    }

    def decide() -> dict[str, Any]:
        return {
            "round": index,
            "prompts": [prompt.id for prompt in prompts],
            **{
                role: {"after_round": at, "id": policies.at(at).id, "digest": policies.at(at).digest}
                for role, at in chosen.items()
            },
        }

    pinned = folder.pin(decide)
    found = {role: policies.at(pinned[role]["after_round"]) for role in chosen}
    for role, policy in found.items():
        if policy.digest != pinned[role]["digest"]:
            raise RunFolderError(f"{folder.path}: its {role} is pinned as {pinned[role]['id']}, whose digest differs")
    by_id = {prompt.id: prompt for prompt in prompts}
    if list(by_id) != pinned["prompts"]:
        raise RunFolderError(f"{folder.path}: the prompts pinned in round.json are not this round's")
    return Pinned(found["start"], found["source"], found["reference"], prompts)


def still_needed(settings: ArmSettings, after: int) -> set[int]:
    """Indices of policies that rounds after round `after` begin with, sample from or refer to."""
    later = range(after + 1, settings.rounds + 1)
    return {i for t in later for i in (t - 1, source_index(settings, t), reference_index(settings, t)) if i <= after}
