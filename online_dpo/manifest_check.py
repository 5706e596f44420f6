"""What a resumed run reads of its manifest and its rounds' plans is of the form that was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from online_dpo.errors import RunFolderError

MANIFEST: dict[str, type] = {
    "folder": str,
    "judges": dict,
    "model": dict,
    "model.digest": str,
    "prompts": dict,
    "prompts.digest": str,
    "datasets": dict,
}
ROLES = ("start", "source", "reference")


def check_manifest(manifest: Mapping[str, Any], file: Path) -> None:
    """Raise `RunFolderError` where a key that resuming needs is not there, or is no value of its kind."""
    written = {"datasets": {}, **manifest}  # a run without any need not say so
    for key, kind in MANIFEST.items():
        section, _, name = key.partition(".")
        value = written.get(section)
        value = value.get(name) if name and isinstance(value, dict) else value
        if not isinstance(value, kind):
            raise RunFolderError(f"{file} is damaged: '{key}' is not what online-dpo wrote there (found {value!r:.40})")


def check_initial(record: Mapping[str, Any], file: Path) -> None:
    """The same of the initial policy's record, initial.json: its digest and its probe."""
    tokens, logprobs = record.get("token_ids"), record.get("logprobs")
    numbers = [*tokens, *logprobs] if isinstance(tokens, list) and isinstance(logprobs, list) else [None]
    if not isinstance(record.get("digest"), str) or not all(isinstance(number, int | float) for number in numbers):
        raise RunFolderError(f"{file} is damaged: it is no digest and probe; delete it, to have it measured again")


def check_pinned(pinned: Mapping[str, Any], file: Path) -> None:
    """The same of a round's plan, round.json: its prompts' ids, and three policies."""
    prompts = pinned.get("prompts")
    if not isinstance(prompts, list):
        raise RunFolderError(f"{file} is damaged: 'prompts' is no list (found {prompts!r:.40})")
    for role in ROLES:
        entry = pinned.get(role)
        whole = isinstance(entry, dict) and isinstance(entry.get("id"), str) and isinstance(entry.get("digest"), str)
        places = [entry.get(name) for name in ("after_round", "averaged_for_round")] if isinstance(entry, dict) else []
        if not whole or not any(isinstance(place, int) and place >= 0 for place in places):
            raise RunFolderError(f"{file} is damaged: '{role}' names no policy (found {entry!r:.40})")
