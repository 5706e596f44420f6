"""The kinds of figures: lines by round, points in a plane with error bars, rows of intervals, a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from online_dpo.display.figures import number
from online_dpo.measure import Interval
from online_dpo.report.document import Plot
from online_dpo.report.drawing import HEIGHT, WIDTH, bars, finish, plain, reference_line, sheet
from online_dpo.report.palette import GREY, INK, Style

Curve = Sequence[tuple[int, Interval]]
"""Round and figure, in the order of the rounds."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart. `key`: whose style it has; `faint`: drawn hollow and dashed (the rejected beside the
    chosen)."""

    label: str
    key: str
    curve: Curve
    faint: bool = False


def line_chart(
    name: str, title: str, axis: str, lines: Sequence[Line], look: Mapping[str, Style], level: float | None = None
) -> Plot | None:
    """Curves by round with their bands; None where no curve has a point."""
    drawn = [line for line in lines if line.curve]
    if not drawn:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = sheet(_height(len(drawn)))
    if level is not None:
        reference_line(axes, level)
    for line in drawn:
        style = look[line.key]
        rounds = [place for place, _ in line.curve]
        mean, low, high = (
            np.array([getattr(value, key) for _, value in line.curve]) for key in ("mean", "low", "high")
        )
        banded = np.isfinite(low) & np.isfinite(high)
        axes.fill_between(rounds, low, high, where=banded, color=style.colour, alpha=0.15, linewidth=0)
        axes.plot(
            rounds, mean, color=style.colour, marker=style.marker, markersize=5, linewidth=1.4,
            linestyle="--" if line.faint else style.dashes, markerfacecolor="none" if line.faint else style.colour,
            label=plain(line.label),
        )  # fmt: skip
    axes.set(xlabel="round", ylabel=axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(name, title, _said(title, drawn), figure, axes)


@dataclass(frozen=True, slots=True)
class Spot:
    """A point with error bars both ways. `note` stands beside it."""

    x: Interval
    y: Interval
    note: str = ""


def frontier_chart(
    name: str, title: str, axis: str, paths: Mapping[str, Sequence[Spot]], look: Mapping[str, Style]
) -> Plot | None:
    """Reward against KL, one path an arm from round to round; KL on a √ axis, where gains are near to straight lines
    (Gao, Schulman and Hilton 2023). None where no round has both."""
    drawn = {label: spots for label, spots in paths.items() if spots}
    if not drawn:
        return None
    figure, axes = sheet(_height(len(drawn)))
    axes.set_xscale("function", functions=(_root, np.square))
    for label, spots in drawn.items():
        style = look[label]
        # An estimate of KL may fall below 0, where there is no root: such a point stands at 0.
        x = [max(0.0, spot.x.mean) for spot in spots]
        y = [spot.y.mean for spot in spots]
        axes.errorbar(
            x, y,
            xerr=bars(x, [max(0.0, spot.x.low) for spot in spots], [spot.x.high for spot in spots]),
            yerr=bars(y, [spot.y.low for spot in spots], [spot.y.high for spot in spots]),
            color=style.colour, marker=style.marker, markersize=5, linewidth=1.2, linestyle=style.dashes,
            elinewidth=0.8, capsize=0, label=plain(label),
        )  # fmt: skip
        axes.annotate(spots[-1].note, (x[-1], y[-1]), xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK)
    means = max(spot.x.mean for spots in drawn.values() for spot in spots)
    highs = max(
        (spot.x.high for spots in drawn.values() for spot in spots if math.isfinite(spot.x.high)), default=means
    )
    # A bar of few seeds may be far longer than all paths: it is cut off, not they squeezed.
    axes.set_xlim(0, 1.08 * max(min(highs, 2 * means), 1e-3))
    axes.set(xlabel="KL to the initial policy, nats an answer (√ axis)", ylabel=axis)
    ends = "; ".join(
        f"{label} ends at {axis} {number(s[-1].y.mean)} with KL {number(s[-1].x.mean)}" for label, s in drawn.items()
    )
    return finish(name, title, f"{title}, by arm and round. {ends}.", figure, axes)


def plane_chart(
    name: str, title: str, axes_names: tuple[str, str], spots: Mapping[str, Sequence[Spot]], look: Mapping[str, Style],
    level: float | None = None,
) -> Plot | None:  # fmt: skip
    """Points of each arm, the first filled, the next hollow, joined; None where there is no point."""
    drawn = {label: own for label, own in spots.items() if own}
    if not drawn:
        return None
    figure, axes = sheet(_height(len(drawn)))
    if level is not None:
        reference_line(axes, level)
    for label, own in drawn.items():
        style = look[label]
        axes.plot([one.x.mean for one in own], [one.y.mean for one in own], color=style.colour, linewidth=0.8)
        for place, one in enumerate(own):
            axes.errorbar(
                [one.x.mean], [one.y.mean],
                xerr=bars([one.x.mean], [one.x.low], [one.x.high]), yerr=bars([one.y.mean], [one.y.low], [one.y.high]),
                color=style.colour, marker=style.marker, markersize=6, linestyle="none", elinewidth=0.8,
                markerfacecolor="none" if place else style.colour, label="_" if place else plain(label),
            )  # fmt: skip
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    said = "; ".join(
        f"{label}: {', '.join(f'{number(one.x.mean)} and {number(one.y.mean)} {one.note}'.strip() for one in own)}"
        for label, own in drawn.items()
    )
    return finish(name, title, f"{title}: {axes_names[0]} and {axes_names[1]}. {said}.", figure, axes)


def row_chart(
    name: str, title: str, axis: str, rows: Sequence[tuple[str, str, Interval]], look: Mapping[str, Style]
) -> Plot | None:
    """One interval a row, in the order given: (name, whose style, figure). None where there is no row."""
    if not rows:
        return None
    figure, axes = sheet(0.9 + 0.24 * len(rows))
    axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    for place, (_, key, value) in enumerate(rows):
        style = look.get(key)
        axes.errorbar(
            [value.mean], [place], xerr=bars([value.mean], [value.low], [value.high]),
            color=style.colour if style else INK, marker=style.marker if style else "o", markersize=5, elinewidth=1,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [plain(label) for label, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=axis)
    said = "; ".join(f"{label} {number(value.mean)}" for label, _, value in rows)
    return finish(name, title, f"{title}. {said}.", figure, axes, legend=False)


def matrix_chart(
    name: str, title: str, rows: Sequence[str], columns: Sequence[str], share: Mapping[str, Mapping[str, Interval]]
) -> Plot | None:
    """Shares of row against column as coloured squares with their figures; None for fewer than two names."""
    from matplotlib.colors import LinearSegmentedColormap

    values = np.array([[share.get(a, {}).get(b, _NOTHING).mean for b in columns] for a in rows], dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).any():
        return None
    side = max(WIDTH, 1.6 + 0.5 * len(columns))
    figure, axes = sheet(max(2.6, 1.5 + 0.42 * len(rows)), side)
    colours = LinearSegmentedColormap.from_list("shares", ["#f0b27a", "#f7f7f7", "#85c1e9"])
    axes.pcolormesh(values, cmap=colours, vmin=0, vmax=1, edgecolors="#ffffff", linewidth=1)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if math.isfinite(value):
                # The squares are light on a dark page too: their figures are no ink of the page's.
                axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5,
                          color="#111111")  # fmt: skip
    axes.set_xticks(np.arange(len(columns)) + 0.5, [plain(one) for one in columns], rotation=30, ha="right")
    axes.set_yticks(np.arange(len(rows)) + 0.5, [plain(one) for one in rows])
    axes.set_ylim(len(rows), 0)
    axes.set(xlabel="against")
    said = "; ".join(
        f"{a} wins {100 * values[i][j]:.0f} % against {b}"
        for i, a in enumerate(rows)
        for j, b in enumerate(columns)
        if math.isfinite(values[i][j])
    )
    return finish(name, title, f"{title}. {said}.", figure, axes, legend=False)


_NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def _root(x: object) -> object:
    return np.sqrt(np.clip(np.asarray(x, dtype=np.float64), 0.0, None))


def _height(labels: int) -> float:
    """Room for the legend below the axes."""
    return HEIGHT + 0.17 * max(0, -(-labels // 2) - 2)


def _said(title: str, lines: Sequence[Line]) -> str:
    """A chart of lines in words."""
    parts = [
        f"{line.label} goes from {number(line.curve[0][1].mean)} in round {line.curve[0][0]} to "
        f"{number(line.curve[-1][1].mean)} in round {line.curve[-1][0]}"
        for line in lines
    ]
    return f"{title}, by round. {'; '.join(parts)}."
