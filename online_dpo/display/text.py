"""Hostile text made harmless.

Everything that a model, a judge or a file wrote passes through `clean` and is put into `rich.text.Text`, so that
neither control sequences nor rich's markup in it reach the terminal as commands.
"""

from __future__ import annotations

import re
import unicodedata

# CSI (colours, cursor), OSC and the other string sequences (titles, links, clipboard), then two-character escapes.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_KEPT = "\n\u200c\u200d"
"""The line break, and two format characters that scripts and emoji need; the others can reorder or hide text."""


def clean(text: object, *, lines: bool = False) -> str:
    """`text` without escape sequences and control, format or surrogate characters.

    Tabs become spaces; so do line breaks, unless `lines` keeps them (several in a row as one).
    """
    unified = re.sub(r"\r\n?|[\v\f\x85\u2028\u2029]", "\n", _ESCAPES.sub("", str(text)))
    unified = re.sub(r"\n\s*", "\n" if lines else " ", unified.replace("\t", " ")).strip()
    return "".join(char for char in unified if char in _KEPT or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))
