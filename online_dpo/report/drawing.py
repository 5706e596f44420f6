"""The sheet that every figure is drawn on: small enough that its text stays readable on a phone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from online_dpo.display import clean
from online_dpo.report.document import Plot
from online_dpo.report.palette import GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.2, 3.3
"""Inches. 302 points across: on a phone of 390 px, text of 9 points is about 11 px high."""
DPI = 150
LEGEND_COLUMNS = 2


def sheet(height: float = HEIGHT, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.add_subplot()


def finish(name: str, title: str, alt: str, figure: Figure, axes: Axes, *, legend: bool = True) -> Plot:
    """Title, legend below the axes, spare lines away; then the picture as SVG and PNG."""
    axes.set_title(plain(title), fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    handles, labels = axes.get_legend_handles_labels()
    if legend and len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower left", ncols=LEGEND_COLUMNS, fontsize=8, frameon=False)
    return _saved(name, title, alt, figure)


def plain(text: str) -> str:
    """`text` without control characters, and without what matplotlib takes for mathematics."""
    return clean(text).replace("$", r"\$")


def reference_line(axes: Axes, value: float) -> None:
    """A level to compare with: no change, or a coin."""
    axes.axhline(value, color=GREY, linewidth=0.8, linestyle=":", zorder=0)


def bars(means: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> list[list[float]]:
    """Lengths of error bars below and above; none where there is no interval."""
    below = [_length(mean - low) for mean, low in zip(means, lows, strict=True)]
    above = [_length(high - mean) for mean, high in zip(means, highs, strict=True)]
    return [below, above]


def _length(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0


def _saved(name: str, title: str, alt: str, figure: Figure) -> Plot:
    import matplotlib

    # Laid out once, not again for each of the two files.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    # Text stays text, and neither file holds the time: the same run gives the same files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=DPI)
    return Plot(name, title, alt, svg.getvalue(), png.getvalue())
