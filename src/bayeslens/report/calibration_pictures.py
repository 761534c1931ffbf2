"""Pictures of a calibration: reliability or PIT values before and after, and what each recalibration gains."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from bayeslens.report.pictures import ACCENT, ALERT, INK, MUTED, Panel, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bayeslens.evaluation.calibrating import Calibration
    from bayeslens.evaluation.calibration import ConfidenceBand
    from bayeslens.evaluation.score_decomposition import ReliabilityDiagram

_STATES = ("Before", "After, cross-validated")


def calibration_panels(found: Calibration) -> list[Panel]:
    """Reliability of classes, or PIT values of numbers, before and after recalibration, and the gains of all tried."""
    drawn = []
    if found.diagrams is not None:
        classes = found.predictive.classes
        of = (
            f"Predicted probability of {plain(classes[1])}"
            if len(classes) == 2
            else "Probability of the likeliest class"
        )
        for state, diagram, band in zip(_STATES, found.diagrams, found.bands, strict=True):
            drawn.append(Panel(state, functools.partial(_reliability, diagram=diagram, band=band, label=of)))
    if found.pits is not None:
        # Both on one scale, so that the eye can compare them.
        top = max(np.histogram(p, _bins(len(p)), (0, 1))[0].max() for p in found.pits)
        for state, pit in zip(_STATES, found.pits, strict=True):
            drawn.append(Panel(state, functools.partial(_pit, pit=pit, top=top)))
    if len(found.candidates) > 1:
        drawn.append(Panel("Gain in log score", functools.partial(_gains, found=found)))
    return drawn


def _reliability(axes: Axes, diagram: ReliabilityDiagram, band: ConfidenceBand, label: str) -> None:
    """The CORP curve with its confidence band, on the consistency band of the calibrated around the diagonal."""
    axes.fill_between(
        diagram.predicted, diagram.lower, diagram.upper, color=MUTED, alpha=0.22, lw=0, label="if calibrated, 90%"
    )
    axes.fill_between(band.predicted, band.lower, band.upper, color=ACCENT, alpha=0.2, lw=0, label="confidence, 90%")
    axes.plot((0, 1), (0, 1), color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.plot(diagram.predicted, diagram.observed, color=ACCENT, lw=1.8, label="observed")
    heights, edges = np.histogram(diagram.predicted, 40, (0, 1), weights=diagram.rows)
    axes.bar(edges[:-1], 0.12 * heights / heights.max(), 0.025, align="edge", color=MUTED, alpha=0.35, lw=0)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=label, ylabel="Observed frequency")
    axes.text(0.98, 0.18, f"p = {diagram.p_value:.2g}", transform=axes.transAxes, ha="right", color=INK, fontsize=9)
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def _bins(rows: int) -> int:
    return int(np.clip(rows // 10, 5, 20))


def _pit(axes: Axes, pit: np.ndarray, top: int) -> None:
    """Flat within the grey band if the forecasts are calibrated."""
    from scipy.stats import binom

    bins = _bins(len(pit))
    counts, edges = np.histogram(pit, bins, (0, 1))
    low, high = binom.ppf((0.05, 0.95), len(pit), 1 / bins)
    axes.axhspan(low, high, color=MUTED, alpha=0.18, lw=0, zorder=0)
    colors = np.where((counts >= low) & (counts <= high), ACCENT, ALERT)
    axes.bar(edges[:-1], counts, 0.94 / bins, align="edge", color=colors, alpha=0.85, lw=0, zorder=2)
    axes.set(xlim=(0, 1), ylim=(0, 1.1 * max(top, high)), ylabel="Rows")
    axes.set_xlabel("Predicted probability of a value below the observed one")


def _gains(axes: Axes, found: Calibration) -> None:
    """Cross-validated gain of each recalibration over no change, with 90% intervals."""
    tried = found.candidates.sort_values("gain", kind="stable", ignore_index=True)
    at = np.arange(len(tried))
    chosen = tried["recalibration"] == found.method
    axes.axvline(0, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.hlines(
        at,
        tried["gain"] - 1.645 * tried["standard_error"],
        tried["gain"] + 1.645 * tried["standard_error"],
        color=ACCENT,
        alpha=0.35,
        lw=5,
    )
    axes.scatter(tried["gain"], at, s=34, color=np.where(chosen, ALERT, ACCENT), lw=0, zorder=3)
    axes.set_yticks(at, [name.replace("_", " ") for name in tried["recalibration"]], fontsize=9)
    axes.set(ylim=(-0.6, len(tried) - 0.4))
    axes.set_xlabel("Log score over no change, nats per row, 90% interval")
