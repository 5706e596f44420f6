"""The report's files."""

from __future__ import annotations

from pathlib import Path

from online_dpo.compare import Comparison
from online_dpo.errors import RunFolderError
from online_dpo.files import write_json, write_text
from online_dpo.report.as_json import as_json
from online_dpo.report.document import Report
from online_dpo.report.markdown import as_markdown
from online_dpo.report.page import as_html

FIGURES = "figures"


def write_report(report: Report, comparison: Comparison, folder: Path) -> list[Path]:
    """Write report.html, report.md, report.json and the figures (PNG and SVG) into `folder`; the first three.

    Raises `RunFolderError` where that cannot be written to.
    """
    html, markdown, data = (folder / f"report.{kind}" for kind in ("html", "md", "json"))
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        for plot in (plot for section in report.sections for plot in section.plots):
            (folder / FIGURES / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            (folder / FIGURES / f"{plot.name}.png").write_bytes(plot.png)
        write_text(markdown, as_markdown(report, FIGURES))
        write_json(data, as_json(report, comparison))
        write_text(html, as_html(report))
    except OSError as error:
        raise RunFolderError(f"cannot write the report to {folder}: {error}") from error
    return [html, markdown, data]
