"""A policy as a folder: Hugging Face files plus `policy.json` (id, digest, probe)."""

from __future__ import annotations

import json
from pathlib import Path

from online_dpo.errors import RunFolderError
from online_dpo.models import digest_folder
from online_dpo.types import Policy, Probe


def write_policy(policy: Policy) -> None:
    """Write `policy.json` into the policy's folder."""
    record = {
        "id": policy.id,
        "digest": policy.digest,
        "adapter": policy.adapter,
        "probe": None
        if policy.probe is None
        else {"token_ids": list(policy.probe.token_ids), "logprobs": list(policy.probe.logprobs)},
    }
    (policy.path / "policy.json").write_text(json.dumps(record), encoding="utf-8")


def read_policy(path: Path, *, verify: bool = True) -> Policy:
    """The policy in folder `path`.

    Raises `RunFolderError` when the folder is no policy or, with `verify`, when its files do not have the digest
    that was recorded (truncated, edited).
    """
    file = path / "policy.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        probe = record["probe"]
        policy = Policy(
            id=record["id"],
            path=path,
            digest=record["digest"],
            adapter=record["adapter"],
            probe=None if probe is None else Probe(tuple(probe["token_ids"]), tuple(probe["logprobs"])),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunFolderError(f"{file} is missing or damaged: {error}") from error
    if not any(path.glob("*.safetensors")):
        raise RunFolderError(
            f"{path} holds no *.safetensors weights; others, such as .bin, are not read: pickles run code"
        )
    if verify and digest_folder(path) != policy.digest:
        raise RunFolderError(f"the policy in {path} is damaged: its files no longer have the recorded digest")
    return policy
