"""The report as Markdown: the same sentences and tables, its figures by their files."""

from __future__ import annotations

import re

from online_dpo.display.markdown import escaped
from online_dpo.report.build import ANSWERS
from online_dpo.report.document import Listing, Report, Section, Table


def as_markdown(report: Report, figures: str) -> str:
    """The whole report; `figures` is the folder of its figures, relative to the Markdown file."""
    parts = [f"# {escaped(report.title)}", escaped(report.subtitle)]
    for section in report.sections:
        if section.name != ANSWERS:
            parts += _section(section, figures)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, figures: str) -> list[str]:
    parts = [f"## {escaped(section.title)}", *(escaped(text) for text in section.text)]
    if section.items:
        parts.append("\n".join(f"- {escaped(item)}" for item in section.items))
    parts += [f"![{escaped(plot.alt)}]({figures}/{plot.name}.png)" for plot in section.plots]
    parts += [_table(table) for table in section.tables]
    parts += [_listing(listing) for listing in section.listings]
    return parts


def _table(table: Table) -> str:
    figures = [all(row[place].figure for row in table.rows) for place in range(len(table.columns))]
    head = f"| {' | '.join(escaped(column) for column in table.columns)} |"
    rule = f"|{'|'.join('---:' if figure else '---' for figure in figures)}|"
    rows = [f"| {' | '.join(escaped(cell.text) for cell in row)} |" for row in table.rows]
    lines = [f"**{escaped(table.caption)}**", "", head, rule, *rows]
    return "\n".join([*lines, "", escaped(table.note)] if table.note else lines)


def _listing(listing: Listing) -> str:
    longest = max((len(run) for run in re.findall(r"`+", listing.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"**{escaped(listing.title)}**\n\n{fence}\n{listing.text.rstrip()}\n{fence}"
