"""Pictures of conformal prediction: coverage and its promise, sizes, intervals with outcomes, adaptation online."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from bayeslens.report.pictures import ACCENT, ALERT, INK, MAX_POINTS, MUTED, Panel, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bayeslens.evaluation.adaptive_conformal import AdaptiveConformal
    from bayeslens.evaluation.conformal_sets import ConformalPrediction

_MOST_GROUPS, _MOST_LABELLED = 30, 120
_WINDOW = 100  # steps that the running coverage looks back


def conformal_panels(result: ConformalPrediction) -> list[Panel]:
    """How often new outcomes were inside, against the promise; how large the sets are; and intervals row by row.

    Coverage and outcomes are drawn where outcomes are known.
    """
    drawn = []
    if result.covered is not None and len(result.covered):
        groups = min(len(result.table), _MOST_GROUPS)
        drawn.append(
            Panel("Coverage", functools.partial(_coverage, result=result), (5.0, max(2.2, 0.35 * groups + 1.4)))
        )
    if len(result.size):
        drawn.append(Panel("Sizes", functools.partial(_sizes, result=result)))
    if result.sets is None and result.y is not None and len(result.y):
        drawn.append(Panel("Intervals, by their middle", functools.partial(_intervals, result=result)))
    return drawn


def adaptive_panels(result: AdaptiveConformal) -> list[Panel]:
    """Coverage over the latest 100 steps, and the miscoverage level that was asked to get there."""
    coverage = result.coverage
    return [
        Panel(
            "Running coverage", functools.partial(_running, covered=result.covered, coverage=coverage, window=_WINDOW)
        ),
        Panel("Level asked of earlier scores", functools.partial(_levels, level=result.level, coverage=coverage)),
    ]


def _coverage(axes: Axes, result: ConformalPrediction) -> None:
    """Observed coverage in all and by group, with 95% intervals, and the promise as a line."""
    table = result.table.head(_MOST_GROUPS)
    place = np.arange(len(table))[::-1]
    missed = table.upper.to_numpy() < result.coverage
    colors = np.where(missed, ALERT, ACCENT)
    axes.axvline(result.coverage, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    if result.guarantee < result.coverage - 1e-9 and result.guarantee > 0:
        axes.axvline(result.guarantee, color=MUTED, lw=1, ls=(0, (1, 2)), zorder=1)
    axes.hlines(place, table.lower, table.upper, color=colors, lw=3, alpha=0.35, zorder=2)
    axes.scatter(table.observed, place, s=32, color=colors, lw=0, zorder=3, clip_on=False)
    axes.set_yticks(place, [plain(f"{name} ({rows:,})") for name, rows in zip(table.index, table["rows"], strict=True)])
    axes.set_ylim(-0.7, len(table) - 0.3)
    low = min(table.lower.min(), result.coverage, result.guarantee or 1.0)
    axes.set_xlim(max(0.0, low - 0.05), 1.0)
    axes.set_xlabel("Share of outcomes inside; dashed: promised, bars: 95%")


def _sizes(axes: Axes, result: ConformalPrediction) -> None:
    """Histogram of interval widths, or of the number of classes in a set."""
    size = result.size
    finite = size[np.isfinite(size)]
    if result.sets is not None:
        counts = np.bincount(finite.astype(int), minlength=2)
        axes.bar(np.arange(len(counts)), counts, 0.8, color=ACCENT, alpha=0.85, lw=0)
        axes.set_xlabel("Classes in a set")
        axes.locator_params(axis="x", integer=True)
    else:
        spread = np.ptp(finite) if len(finite) else 0.0
        if spread > 1e-9 * max(1.0, np.abs(finite).max(initial=0.0)):
            axes.hist(finite, min(30, max(5, len(finite) // 10)), color=ACCENT, alpha=0.85, lw=0)
        elif len(finite):
            axes.bar(finite[:1], [len(finite)], 0.02 * max(abs(finite[0]), 1e-9), color=ACCENT, lw=0)
        infinite = len(size) - len(finite)
        axes.set_xlabel(f"Width of the interval ({infinite:,} infinite)" if infinite else "Width of the interval")
    axes.set_ylabel("Rows")


def _intervals(axes: Axes, result: ConformalPrediction) -> None:
    """Rows in the order of their intervals' middles, with what was observed."""
    values = np.stack([result.lower, result.upper, result.y])
    values = values[:, np.isfinite(values).all(0)]
    values = values[:, np.argsort(values[0] + values[1], kind="stable")]
    if values.shape[1] > _MOST_LABELLED:
        values = values[:, np.linspace(0, values.shape[1] - 1, _MOST_LABELLED).round().astype(int)]
    lower, upper, y = values
    rank, outside = np.arange(1, len(y) + 1), (y < lower) | (y > upper)
    axes.vlines(rank, lower, upper, color=ACCENT, alpha=0.25, lw=float(np.clip(300 / max(len(y), 1), 1.6, 9)), zorder=1)
    axes.scatter(rank[~outside], y[~outside], s=11, color=INK, lw=0, zorder=2, label="inside")
    axes.scatter(rank[outside], y[outside], s=22, color=ALERT, lw=0, zorder=3, label="outside")
    axes.tick_params(labelbottom=False)
    axes.set_xlabel(f"{len(y)} of {len(result.y):,} rows")
    axes.set_ylabel("Outcome")
    axes.legend(frameon=False, fontsize=9)


def _running(axes: Axes, covered: np.ndarray, coverage: float, window: int) -> None:
    """Share covered among the latest steps, with the spread that independent hits would have."""
    window = min(window, len(covered))
    total = np.concatenate([[0], np.cumsum(covered)])
    share = (total[window:] - total[:-window]) / window
    time = np.arange(window, len(covered) + 1)
    error = 2 * np.sqrt(coverage * (1 - coverage) / window)
    axes.axhspan(coverage - error, min(1, coverage + error), color=MUTED, alpha=0.16, lw=0)
    axes.axhline(coverage, color=MUTED, lw=1, ls=(0, (4, 3)))
    thin = np.linspace(0, len(time) - 1, min(len(time), 5 * MAX_POINTS)).round().astype(int)
    axes.plot(time[thin], share[thin], color=ACCENT, lw=1.4)
    axes.set(xlabel="Step", ylabel=f"Coverage of the latest {window}")


def _levels(axes: Axes, level: np.ndarray, coverage: float) -> None:
    thin = np.linspace(0, len(level) - 1, min(len(level), 5 * MAX_POINTS)).round().astype(int)
    axes.axhline(1 - coverage, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.plot(thin + 1, level[thin], color=ACCENT, lw=1.2)
    axes.set(xlabel="Step", ylabel="Miscoverage level")
