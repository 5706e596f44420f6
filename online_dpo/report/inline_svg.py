"""A saved SVG as a part of a page: no name clashes with another figure, and its colours are the page's.

What matplotlib names (clip paths, markers) is unique within one file only. Ink and paper become the page's own, and
each colour of the palette a CSS variable, so that a dark page shows lighter ones.
"""

from __future__ import annotations

import re

from online_dpo.report.palette import COLOURS, GREY, INK, PAPER

_VARIABLES = {
    INK: "var(--ink, #000000)",
    PAPER: "var(--paper, #ffffff)",
    GREY: f"var(--grey, {GREY})",
    **{colour: f"var(--series-{place}, {colour})" for place, colour in enumerate(COLOURS)},
}
_HEAD = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style .*?</style>", re.DOTALL)


def inline(svg: str, name: str) -> str:
    """`svg` for a page, with `name` before each of its ids; size and text alternative are the page's to say."""
    start = svg.index("<svg")
    body = _HEAD.sub("", svg[start:])
    body = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'\b(xlink:href|href)="#([^"]*)"', rf'\1="#{name}-\2"', body)
    body = re.sub(r"#[0-9a-fA-F]{6}\b", lambda match: _VARIABLES.get(match[0].lower(), match[0]), body)
    opening = body[: body.index(">")]
    viewbox = re.search(r'viewBox="[^"]*"', opening)
    kept = viewbox[0] if viewbox else ""
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {kept} aria-hidden="true" focusable="false"{body[len(opening) :]}'
