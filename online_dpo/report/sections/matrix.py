"""Who wins against whom on the held-out prompts."""

from __future__ import annotations

from online_dpo.compare.sentences import NAMES
from online_dpo.report.charts import matrix_chart
from online_dpo.report.document import Section, Table, percent, words
from online_dpo.report.subject import Subject


def win_matrix(subject: Subject) -> Section:
    """The matrix of win rates, drawn and as a table."""
    share = subject.comparison.win_matrix
    columns = list(dict.fromkeys([name for row in share.values() for name in row] + list(share)))
    order = [name for name in [*subject.arms, *columns] if name in columns]
    names = list(dict.fromkeys(order))
    plot = matrix_chart("win_matrix", "Wins of row against column, %", [n for n in names if n in share], names, share)
    rows = tuple(
        (words(name), *(percent(share[name].get(other)) for other in names)) for name in names if name in share
    )
    by = NAMES[subject.comparison.measure]
    note = f"share of prompts on which the row's answer has the higher {by}, ties half; each arm at its selected round"
    table = Table("win_matrix", "Win rate of row against column", ("arm", *names), rows, note, folded=plot is not None)
    return Section("wins", "Win-rate matrix", plots=(plot,) if plot else (), tables=(table,) if rows else ())
