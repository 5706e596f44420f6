"""The last line of a run's experiment.yaml: a digest of the lines above it.

Whoever edits the file by hand would have rounds of two experiments in one run, and nothing else would tell them so.
The digest is in the file itself, so that both are written at once. A file without the line (a run of an earlier
version) is taken as it is, so long as it has every key: one that was cut off has not.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from online_dpo.config import Experiment, flatten
from online_dpo.errors import ConfigError, RunFolderError
from online_dpo.yaml_file import read_yaml

SEAL = re.compile(r"^# sha256 of the lines above: ([0-9a-f]{64})\n", re.MULTILINE)


def sealed(text: str) -> str:
    """`text` with its digest below."""
    return f"{text}# sha256 of the lines above: {_digest(text)}\n"


def check_seal(file: Path, experiment: Experiment) -> None:
    """Raise `RunFolderError` where `file`, read as `experiment`, is not what was written: edited, or cut off."""
    how = "to change a key of the run, use 'online-dpo run' with an experiment of your own, or 'online-dpo fork'"
    try:
        text = file.read_text(encoding="utf-8")
        given = flatten(read_yaml(file))
    except (OSError, ConfigError) as error:
        raise RunFolderError(f"{file} cannot be read: {error}") from error
    seal = SEAL.search(text)
    if seal is not None and _digest(text[: seal.start()]) != seal[1]:
        raise RunFolderError(f"{file} was edited after the run began (its digest differs): restore it; {how}")
    lost = [key for key in flatten(experiment.model_dump(mode="json")) if seal is None and key not in given]
    if lost:
        raise RunFolderError(f"{file} is not whole (no '{lost[0]}' in it): restore it; {how}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
