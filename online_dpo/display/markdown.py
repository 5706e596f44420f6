"""Text that goes into Markdown: what a model, a judge or a file wrote is read there as it is, never as markup."""

from __future__ import annotations

import re

from online_dpo.display.text import clean

_EVERYWHERE = re.compile(r"([\\`*_\[\]<>|~#&!])")
_IN_A_CELL = re.compile(r"([\\`<>|&]|\](?=\s*[(\[])|\[(?=[^\]]*\]\s*:)|!(?=\[))")
"""What could become code, HTML, a link, an image or another cell. Brackets and stars alone become nothing."""


def escaped(text: object) -> str:
    """`text` on one line, without control characters; every character that Markdown could take for markup escaped."""
    return _EVERYWHERE.sub(r"\\\1", clean(text))


def cell(text: object) -> str:
    """`text` for a cell of a table or a heading: as `escaped`, but names and intervals stay readable as source."""
    return _IN_A_CELL.sub(r"\\\1", clean(text))
