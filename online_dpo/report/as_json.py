"""The report as JSON: the same tables with the numbers behind their text, and the comparison's own records."""

from __future__ import annotations

from typing import Any

from online_dpo.compare import Comparison
from online_dpo.report.document import Report, Section, Table

FORMAT = 1


def as_json(report: Report, comparison: Comparison) -> dict[str, Any]:
    """`sections`: sentences, tables (one mapping a row, column -> value) and the names of figures; `comparison`."""
    return {
        "format": FORMAT,
        "title": report.title,
        "verdict": report.verdict,
        "sections": [_section(section) for section in report.sections],
        "comparison": comparison.as_dict(),
    }


def _section(section: Section) -> dict[str, Any]:
    return {
        "name": section.name,
        "title": section.title,
        "text": list(section.text),
        "items": list(section.items),
        "figures": [plot.name for plot in section.plots],
        "tables": [_table(table) for table in section.tables],
    }


def _table(table: Table) -> dict[str, Any]:
    rows = [{column: cell.value for column, cell in zip(table.columns, row, strict=True)} for row in table.rows]
    return {"name": table.name, "caption": table.caption, "note": table.note, "rows": rows}
