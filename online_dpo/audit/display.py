"""An audit as a table for a terminal, and as a row of a Markdown table that sets judges side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from online_dpo.audit.auditing import Audit
from online_dpo.audit.calibration import Calibration
from online_dpo.display import ABSENT, clean, number
from online_dpo.display.markdown import cell as as_cell
from online_dpo.measure import Interval

Line = tuple[str, str, int | None, str]
"""Name, value, pairs, and what it means."""


def audit_table(audit: Audit) -> Group:
    """All figures of `audit`, one a line; fits 100 columns."""
    table = Table(
        title=Text(clean(f"Audit of {audit.judge}" + (f" on {audit.source}" if audit.source else "")), style="bold"),
        caption=Text("in brackets: 95 % intervals over prompts"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("figure", overflow="fold", max_width=24)
    table.add_column("value", justify="right", overflow="fold", min_width=9)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for name, value, n, meaning in _lines(audit):
        table.add_row(*(Text(clean(cell)) for cell in (name, value, number(n), meaning)))
    return Group(table, *(Text(clean(f"note: {note}")) for note in notes(audit)), Text())


def notes(audit: Audit) -> list[str]:
    """What a reader of the figures must know, in a sentence each."""
    found = []
    if audit.ties.n and audit.ties.mean == 1.0:
        found.append(
            "every pair is a tie: the judge sees no difference. Pairs from a file have no token ids, so a judge that "
            "counts tokens scores them all alike (LengthJudge: --set unit=words)"
            if audit.kind == "labelled"
            else "every pair is a tie: the judge sees no difference"
        )
    if not audit.ties.n:
        found.append("the judge abstained on every pair")
    fitted = audit.calibration
    if fitted is not None and fitted.source == "temperature" and fitted.temperature is None:
        found.append("no T > 0 fits: a larger score difference does not go with being right more often")
    if audit.abstain_reasons:
        shown = list(audit.abstain_reasons.items())[:3]
        more = len(audit.abstain_reasons) - len(shown)
        reasons = "; ".join(f"{reason} ({count})" for reason, count in shown)
        found.append(f"abstained: {reasons}" + (f"; and {more} other reasons" if more else ""))
    return found


def markdown_header() -> str:
    """The two lines above `markdown_row`'s rows."""
    names = [name for name, _ in _COLUMNS]
    return f"| {' | '.join(names)} |\n|{'|'.join(['---'] * 2 + ['---:'] * (len(names) - 2))}|"


def markdown_row(audit: Audit) -> str:
    """The audit as one row. Shares in per cent with their intervals; a dash for what does not exist."""
    return f"| {' | '.join(as_cell(read(audit)) for _, read in _COLUMNS)} |"


# --- the lines ---


def _lines(audit: Audit) -> list[Line]:
    return [
        ("pairs", number(audit.pairs), audit.prompts, "asked about; n: their prompts"),
        *_labelled_lines(audit),
        _share("ties", audit.ties, "judged pairs without a winner"),
        _share("abstained", audit.abstained, "pairs without a verdict"),
        *_order_lines(audit),
        *_length_lines(audit),
        *_agreement_lines(audit),
        *_cost_lines(audit),
    ]


def _labelled_lines(audit: Audit) -> list[Line]:
    one, log_odds = audit.calibration, audit.calibration_log_odds
    return [
        *([_share("accuracy", audit.accuracy, "as people chose; ties one half")] if audit.accuracy else []),
        *(_calibration_lines(one) if one else []),
        *([_figure("Brier score, T = 1", log_odds.brier, "of scores taken as log-odds")] if log_odds else []),
    ]


def _calibration_lines(one: Calibration) -> list[Line]:
    of = "of P as stated" if one.source == "stated" else f"of P = σ(difference/T), T ≈ {number(one.temperature)}"
    return [
        _figure("Brier score", one.brier, f"{of}; 0.25 knows nothing"),
        _figure("log loss, nats", one.log_loss, "0.693 knows nothing"),
        (
            "calibration error",
            number(one.error, places=3),
            one.brier.n,
            f"ECE; a calibrated judge: below {number(one.error_by_chance, places=3)}",
        ),
    ]


def _order_lines(audit: Audit) -> list[Line]:
    found = []
    if audit.flips is not None:
        found.append(_share("flips", audit.flips, "swapped order, verdict kept its place"))
    if audit.flips_to_first is not None:
        found.append(_share("flips to the first", audit.flips_to_first, "of these, to what stood first"))
    if audit.intransitive is not None:
        found.append(_share("intransitive triples", audit.intransitive, "a > b > c > a; 25 % by chance"))
    return found


def _length_lines(audit: Audit) -> list[Line]:
    length = audit.length
    within = "of differences" if audit.kind == "labelled" else "within prompts"
    found = [
        _figure("ρ with length", length.spearman, f"Spearman {within}, {length.unit}"),
        _figure("r with length", length.pearson, f"Pearson {within}"),
        _share("prefers the longer", length.longer_preferred, "of unequal lengths"),
    ]
    if length.longer_accuracy is not None:
        found.append(_share('"longer wins"', length.longer_accuracy, "right by length alone, same pairs"))
    if length.judge_minus_longer is not None:
        found.append(_points("judge − longer", length.judge_minus_longer, "accuracy less that, paired"))
    if length.accuracy_longer_worse is not None:
        found.append(_share("right: longer is worse", length.accuracy_longer_worse, "people chose the shorter"))
    if length.accuracy_longer_better is not None:
        found.append(_share("right: longer is better", length.accuracy_longer_better, "people chose the longer"))
    if length.longest_first is not None:
        chance = length.longest_first_by_chance
        by_chance = number(None if chance is None else 100 * chance, places=1)
        found.append(_share("longest ranked first", length.longest_first, f"of prompts; {by_chance} % by chance"))
    return found


def _agreement_lines(audit: Audit) -> list[Line]:
    one = audit.agreement
    if one is None:
        return []
    found = [
        _figure("Cohen's κ", one.kappa, f"beyond chance, with {one.judge}"),
        _share("same verdict", one.same, "better, worse or tie"),
        _figure("ρ of the two judges", one.spearman, "Spearman of their scores"),
    ]
    if one.accuracy_difference is not None:
        found.append(_points("accuracy − the other's", one.accuracy_difference, "paired"))
    return found


def _cost_lines(audit: Audit) -> list[Line]:
    cost = audit.cost
    spent = ", ".join(f"{item} {number(amount)}" for item, amount in cost.ledger.items() if amount)
    orders = "both orders; " if audit.flips is not None else ""
    return [
        ("seconds a pair", number(cost.seconds_per_pair), None, f"{orders}not the first, not the cached"),
        ("seconds", number(cost.seconds, places=1), None, f"in all; the first took {cost.first_seconds:.1f}"),
        ("ledger", spent or ABSENT, None, "asked, cached, and what was spent"),
    ]


def _share(name: str, value: Interval, meaning: str) -> Line:
    text = _percent(value)
    return name, text if text == ABSENT else f"{text} %", value.n, meaning


def _points(name: str, value: Interval, meaning: str) -> Line:
    text = _percent(value, sign=True)
    return name, text if text == ABSENT else f"{text} points", value.n, meaning


def _figure(name: str, value: Interval, meaning: str) -> Line:
    return name, _fixed(value, places=3), value.n, meaning


def _percent(value: Interval | None, *, sign: bool = False) -> str:
    """In per cent, without the sign for it: `60.0 [58.0, 62.0]`."""
    if value is None:
        return ABSENT
    return _fixed(Interval(100 * value.mean, 100 * value.low, 100 * value.high, value.n), places=1, sign=sign)


def _fixed(value: Interval, *, places: int, sign: bool = False) -> str:
    mean, low, high = (number(x, places=places, sign=sign) for x in (value.mean, value.low, value.high))
    return mean if ABSENT in {low, high} else f"{mean} [{low}, {high}]"


# --- the Markdown row ---


def _calibrated(audit: Audit) -> tuple[str, str]:
    one = audit.calibration
    return (ABSENT, ABSENT) if one is None else (number(one.brier.mean, places=3), number(one.error, places=3))


_COLUMNS: Sequence[tuple[str, Callable[[Audit], str]]] = (
    ("judge", lambda audit: audit.judge),
    ("on", lambda audit: audit.source or ABSENT),
    ("pairs", lambda audit: number(audit.pairs)),
    ("accuracy %", lambda audit: _percent(audit.accuracy)),
    ("longer wins %", lambda audit: _percent(audit.length.longer_accuracy)),
    ("judge − longer, points", lambda audit: _percent(audit.length.judge_minus_longer, sign=True)),
    ("right where longer is worse %", lambda audit: _percent(audit.length.accuracy_longer_worse)),
    ("ρ with length", lambda audit: _fixed(audit.length.spearman, places=2)),
    ("Brier", lambda audit: _calibrated(audit)[0]),
    ("ECE", lambda audit: _calibrated(audit)[1]),
    ("flips %", lambda audit: _percent(audit.flips)),
    ("intransitive %", lambda audit: _percent(audit.intransitive)),
    ("ties %", lambda audit: _percent(audit.ties)),
    ("abstained %", lambda audit: _percent(audit.abstained)),
    ("κ", lambda audit: _fixed(audit.agreement.kappa, places=2) if audit.agreement else ABSENT),
    ("s a pair", lambda audit: number(audit.cost.seconds_per_pair)),
)
