"""The stage that makes a round's reference where it is an average of policies. Done before the round is pinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from online_dpo.arms import Arm
from online_dpo.rounds import averaging
from online_dpo.store import RoundFolder, StageRecord


def average_reference(arm: Arm, folder: RoundFolder) -> StageRecord | None:
    """Make round t's reference, α·(policy of round t−1) + (1 − α)·(reference of round t−1), as a policy folder.

    None where there is nothing to make: another rule, or round 1, whose reference is the initial policy.
    """
    alpha = averaging(arm.settings)
    if alpha is None or folder.index == 1:
        return None
    policy = arm.policies.at(folder.index - 1)
    previous = arm.policies.averaged(folder.index - 1)

    def produce(out: Path) -> dict[str, Any]:
        from online_dpo.backends.averaging import average_policies

        arm.run.progress.start(f"{arm.label} · round {folder.index} reference", 1, "policies")
        policy_id = f"{arm.name}/seed_{arm.seed}/reference_{folder.index:02d}"
        average_policies(policy, previous, alpha, policy_id=policy_id, out=out / "reference")
        arm.run.progress.advance(1)
        arm.run.progress.finish()
        return {"alpha": alpha}

    inputs = {"policy": policy.digest, "reference": previous.digest, "alpha": repr(alpha)}
    return folder.stage("reference", inputs, ["reference"], produce)
