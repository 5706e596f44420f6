"""The report as one HTML file that asks for nothing: no request leaves it, and no text in it can become code.

jinja2 escapes every value. The answers lie in a JSON block whose every `<`, `>` and `&` is an escape of JSON's, and
the script writes them by `textContent` alone. Beyond that the page's own policy (Content-Security-Policy) allows one
script, by its digest, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from online_dpo.report.answers import readable
from online_dpo.report.build import ANSWERS
from online_dpo.report.document import Plot, Report
from online_dpo.report.inline_svg import inline

_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def as_html(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("online_dpo.report"),
        autoescape=True,
        finalize=_seen,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _static("report.js")
    return environment.get_template("report.html.j2").render(
        report=report,
        answers_section=ANSWERS,
        data=Markup(json_block(report.answers)),  # noqa: S704 - escaped by json_block
        style=Markup(_static("report.css")),  # noqa: S704 - ours
        script=Markup(script),  # noqa: S704 - ours
        digest=_digest(script),
        drawn=_drawn,
    )


def json_block(data: Any) -> str:
    """`data` as JSON that ends no script element and starts no comment or entity, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate is no UTF-8: what a file cannot hold is shown as a question mark.
    return text.translate(_ESCAPES).encode("utf-8", "replace").decode()


def _seen(value: object) -> object:
    """A text without characters that turn or hide what stands beside them; lines stay. Markup is ours alone."""
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _drawn(plot: Plot) -> Markup:
    """matplotlib escapes the names that it writes."""
    return Markup(inline(plot.svg, plot.name))  # noqa: S704


def _static(name: str) -> str:
    return (files("online_dpo.report") / "static" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """As Content-Security-Policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
