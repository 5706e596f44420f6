"""Keys and passwords: kept out of experiments, which are copied into run folders, cards and reports, and out of errors.

Nothing here finds every key: names and forms of the usual services are known, and what the environment itself calls
a key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

KEY_NAME = re.compile(
    r"(?:^|[_.-])(?:api_?key|secret(?:_?key)?|client_?secret|passw(?:or)?d|(?:access|auth|hf|api|bearer)_?token|"
    r"authorization|private_?key)$"
)
"""Keys of a mapping that hold a secret; matched in lower case, "-" read as "_"."""
ENVIRONMENT = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$")
"""Environment variables whose values are secrets."""
SHORTEST = 8
"""Characters: a shorter value of the environment would be found in ordinary words."""
_LONG = r"(?=[\w-]*\d)[\w-]*[A-Za-z0-9]{16}[\w-]*"
_FORMS = re.compile(
    rf"(?<![\w-])(?:sk-{_LONG}|(?:hf|ghp|gho|ghs|github_pat|glpat|xai|gsk)[_-]{_LONG}|xox[abprs]-[\w-]{{10,}}|"
    r"AKIA[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HIDDEN = "***"


def literal_key(data: Any) -> str | None:
    """The dotted place of a key that stands in `data` (nested mappings and lists) in plain text; None: there is none.

    It is a text under a name such as `api_key`, a text anywhere in the form of a known service's keys, or what stands
    in a key ending in `_env` and is no variable's name.
    """
    seen: set[int] = set()
    return next((place for place, name, text in _texts(data, "", "", seen) if _is_key(name, text)), None)


def without_keys(text: str) -> str:
    """`text` with "***" for keys of known forms and for the secrets of this process's environment."""
    for name, value in os.environ.items():
        if len(value.strip()) >= SHORTEST and ENVIRONMENT.search(name.upper()):
            text = text.replace(value.strip(), HIDDEN)
    return _FORMS.sub(HIDDEN, text)


def _is_key(name: str, text: str) -> bool:
    plain = name.lower().replace("-", "_")
    if _FORMS.search(text):
        return True
    if plain.endswith("_env"):
        return bool(text) and not _NAME.fullmatch(text)
    return bool(text.strip()) and KEY_NAME.search(plain) is not None


def _texts(data: Any, place: str, name: str, seen: set[int]) -> Iterator[tuple[str, str, str]]:
    """(dotted place, last key, text) of every text; a part that stands in several places (YAML's aliases) once."""
    if isinstance(data, str):
        yield place, name, data
    if not isinstance(data, dict | list) or id(data) in seen:
        return
    seen.add(id(data))
    entries = data.items() if isinstance(data, dict) else ((name, value) for value in data)
    for key, value in entries:
        inside = str(key) if isinstance(data, dict) else name
        yield from _texts(value, f"{place}.{inside}".lstrip(".") if isinstance(data, dict) else place, inside, seen)
