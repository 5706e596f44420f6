"""An audit as one figure of panels: is it calibrated, does length sway it, and the rates with their intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from online_dpo.audit.auditing import Audit
from online_dpo.audit.calibration import EDGES, Calibration
from online_dpo.display import clean
from online_dpo.measure import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#6E6E6E"
DPI = 150
LENGTH = '"longer wins"'
SLICES = 8
"""Groups of equally many pairs, by length, whose mean score difference is drawn."""


def draw_audit(audit: Audit, folder: Path) -> list[Path]:
    """Draw `audit` into `folder` as audit.png and audit.svg; the two files."""
    import matplotlib

    figure = _figure(audit)
    files = [folder / "audit.png", folder / "audit.svg"]
    # Text stays text in the SVG, and neither file holds the time: the same audit gives the same files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "audit"}):
        figure.savefig(files[0], dpi=DPI)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def _figure(audit: Audit) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    panels = 2 if audit.calibration is None else 3
    figure = Figure(figsize=(5.0 * panels, 4.8), layout="constrained")
    title = f"{audit.judge} on {audit.source}" if audit.source else audit.judge
    lines = textwrap.wrap(_plain(title), width=40 * panels, max_lines=2, placeholder=" …")
    lines.append(f"{audit.pairs} pairs of {audit.prompts} prompts, 95 % intervals over prompts")
    figure.suptitle("\n".join(lines), fontsize=11)
    grid = figure.add_gridspec(1, panels)
    if audit.calibration is not None:
        inner = grid[0].subgridspec(2, 1, height_ratios=(4, 1), hspace=0.02)
        top = figure.add_subplot(inner[0])
        _reliability(top, figure.add_subplot(inner[1], sharex=top), audit.calibration)
    _length(figure.add_subplot(grid[panels - 2]), audit)
    _rates(figure.add_subplot(grid[panels - 1]), audit)
    return figure


def _reliability(axes: Axes, below: Axes, one: Calibration) -> None:
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    x = [part.certainty for part in one.bins]
    low, mean, high = (np.array([getattr(part.accuracy, key) for part in one.bins]) for key in ("low", "mean", "high"))
    axes.errorbar(
        x, mean, yerr=_bars(low, mean, high), color=BLUE, fmt="o", markersize=5, elinewidth=1, capsize=2,
        label=f"judge: ECE {one.error:.3f}, Brier {one.brier.mean:.3f}",
    )  # fmt: skip
    source = {"stated": "as stated", "temperature": "fitted T", "log_odds": "T = 1"}[one.source]
    axes.set(title=f"Calibration ({source})", ylabel="share of pairs right", ylim=(0, 1.02), xlim=(0.49, 1.01))
    axes.tick_params(labelbottom=False)
    below.bar(
        [part.low for part in one.bins], [part.accuracy.n for part in one.bins], width=float(EDGES[1] - EDGES[0]),
        align="edge", color=BLUE, edgecolor="white", linewidth=0.5,
    )  # fmt: skip
    below.set(xlabel="certainty: the larger of P and 1 − P", ylabel="pairs")
    _legend(below, *axes.get_legend_handles_labels())
    for part in (axes, below):
        _bare(part)


def _length(axes: Axes, audit: Audit) -> None:
    length, score, right = audit.points.T
    kinds = [(np.isnan(right), GREY, "tie" if audit.accuracy else "pair", ".")]
    if audit.accuracy is not None:
        kinds += [(right == 1, BLUE, "right", "."), (right == 0, ORANGE, "wrong", "x")]
    for chosen, colour, label, marker in kinds:
        if chosen.any():
            axes.scatter(
                length[chosen], score[chosen], s=9, marker=marker, color=colour, alpha=0.35, linewidths=0.6,
                label=f"{label} ({int(chosen.sum())})", rasterized=True,
            )  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.8)
    if length.size >= 2 * SLICES:
        parts = np.array_split(np.argsort(length, kind="stable"), SLICES)
        axes.plot(
            [length[part].mean() for part in parts], [score[part].mean() for part in parts], color="black",
            marker="s", markersize=4, linewidth=1.4, label="mean of an eighth of the pairs",
        )  # fmt: skip
    if length.size:
        # A few very long answers, or extreme scores, would press all others into a corner.
        axes.set_xlim(-0.02 * _most(length), 1.02 * _most(length))
        axes.set_ylim(-1.05 * _most(score), 1.05 * _most(score))
    rho = audit.length.spearman.mean
    axes.set(
        title="Does length sway it?" + (f" (ρ = {rho:+.2f})" if math.isfinite(rho) else ""),
        xlabel=f"longer − shorter answer, {audit.length.unit}",
        ylabel="P(longer is better) − ½" if audit.compares else "score of longer − score of shorter",
    )
    _legend(axes, *axes.get_legend_handles_labels())
    _bare(axes)


def _rates(axes: Axes, audit: Audit) -> None:
    rows = [(name, value) for name, value in _shares(audit) if value is not None and value.n]
    places = np.arange(len(rows))
    mean, low, high = (100 * np.array([getattr(value, key) for _, value in rows]) for key in ("mean", "low", "high"))
    colours = [GREY if name == LENGTH else BLUE for name, _ in rows]  # the baseline stands apart
    axes.barh(
        places, mean, xerr=_bars(low, mean, high), color=colours, alpha=0.85, height=0.6,
        error_kw={"ecolor": "black", "capsize": 2, "linewidth": 1},
    )  # fmt: skip
    for place, (value, top) in enumerate(zip(mean, np.fmax(high, mean), strict=True)):
        axes.text(top + 2, place, f"{value:.1f}", va="center", fontsize=8)
    axes.axvline(50, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Rates", xlabel="per cent; dashed: 50 %", xlim=(0, 114))
    axes.set_xticks(range(0, 101, 25))
    _bare(axes)


def _shares(audit: Audit) -> list[tuple[str, Interval | None]]:
    length = audit.length
    return [
        ("accuracy", audit.accuracy),
        (LENGTH, length.longer_accuracy),
        ("right where longer\nis worse", length.accuracy_longer_worse),
        ("right where longer\nis better", length.accuracy_longer_better),
        ("prefers the longer", length.longer_preferred),
        ("longest ranked first", length.longest_first),
        ("flips when swapped", audit.flips),
        ("intransitive triples", audit.intransitive),
        ("ties", audit.ties),
        ("abstained", audit.abstained),
        ("same as other judge", audit.agreement.same if audit.agreement else None),
    ]


def _bars(low: Any, mean: Any, high: Any) -> Any:
    """Error bars below and above, none where there is no interval."""
    return np.nan_to_num(np.maximum(0.0, np.stack([mean - low, high - mean]))).tolist()


def _most(values: Any) -> float:
    """The 99th percentile of the sizes: the end of the axis. 1 where all are 0."""
    return float(np.quantile(np.abs(values), 0.99)) or float(np.abs(values).max()) or 1.0


def _plain(text: str) -> str:
    """`text` without control characters, and without what matplotlib takes for mathematics."""
    return clean(text).replace("$", r"\$")


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the axis, where it hides nothing; faint marks are shown in full colour."""
    if handles:
        where = {
            "loc": "upper center",
            "bbox_to_anchor": (0.5, 0.0),
            "borderaxespad": 3.6 if axes.get_xlabel() else 1.0,
        }
        legend = axes.legend(
            handles, labels, ncols=2, fontsize=8, frameon=False, markerscale=1.5, columnspacing=1.2, **where
        )
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
