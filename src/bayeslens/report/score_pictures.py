"""Pictures of scores: CORP reliability diagram, decision curve, what a CRPS is made of, differences from a rival."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.report.pictures import ACCENT, ALERT, INK, MUTED, Panel, lay_out, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayeslens.evaluation.decision_curves import DecisionCurve
    from bayeslens.evaluation.score_decomposition import ReliabilityDiagram, ScoreDecomposition
    from bayeslens.evaluation.scoring import Scores

_AMBER = "#a8741a"
_REASONS = {
    "reliability": "it is of a regression; use 'decomposition'",
    "decision": "decisions are drawn for two classes",
    "decomposition": "it is of classes; use 'reliability'",
    "comparison": "nothing was given to compare with (against=...)",
}


def plot_scores(scores: Scores, kind: str | None = None) -> Figure:
    """One kind of picture of scores as a figure.

    Args:
        scores: what `score_predictions` returned.
        kind: `"reliability"` (of classes, the default: do probabilities come true), `"decomposition"` (of regression,
            the default: at which values the forecasts are miscalibrated, and where they tell rows apart),
            `"decision"` (what two-class predictions are worth to who acts on them), or `"comparison"` (differences
            from a rival).

    Raises:
        InputError: an unknown kind, or the scores lack what the picture needs.
    """
    kind = kind or ("decomposition" if scores.reliability is None else "reliability")
    drawn = score_panels(scores, kind)
    if not drawn:
        raise InputError(f"these scores have no picture of kind {kind!r}: {_REASONS[kind]}")
    return lay_out(drawn, columns=2)


def score_panels(scores: Scores, kind: str) -> list[Panel]:
    """The panels of one kind of picture; empty where the scores lack what they need.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in _REASONS:
        raise InputError(f"unknown kind {kind!r}: use one of {', '.join(_REASONS)}")
    if kind == "reliability" and scores.reliability is not None:
        draw = functools.partial(_reliability, diagram=scores.reliability, event=scores.event)
        return [Panel("Reliability (CORP)", draw, (5.0, 4.2))]
    if kind == "decision" and scores.decision_curve is not None:
        return [Panel("Decision curve", functools.partial(_decision, curve=scores.decision_curve, event=scores.event))]
    if kind == "decomposition":
        cut = [d for d in scores.decompositions if d.thresholds is not None]
        return [Panel("What the CRPS is made of", functools.partial(_by_threshold, found=d)) for d in cut]
    if kind == "comparison" and scores.comparisons:
        height = 1.3 + 0.32 * len(scores.comparisons)
        return [Panel("Differences in standard errors", functools.partial(_differences, scores=scores), (6.0, height))]
    return []


def _reliability(axes: Axes, diagram: ReliabilityDiagram, event: str) -> None:
    """Conditional event frequency against predicted probability, with what calibrated predictions would show."""
    predicted, observed = diagram.predicted, diagram.observed
    axes.fill_between(predicted, diagram.lower, diagram.upper, color=MUTED, alpha=0.2, lw=0, zorder=0)
    axes.plot((0, 1), (0, 1), color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.plot(predicted, observed, color=ACCENT, lw=1.8, zorder=3, drawstyle="default")
    outside = (observed < diagram.lower - 1e-12) | (observed > diagram.upper + 1e-12)
    shown = np.where(outside, observed, np.nan)
    axes.plot(predicted, shown, color=ALERT, lw=2.4, zorder=4, marker="." if len(predicted) < 40 else None)
    heights, edges = np.histogram(predicted, 25, (0, 1), weights=diagram.rows)
    bars = 0.13 * heights / heights.max()
    axes.bar(edges[:-1], bars, 0.04, align="edge", color=MUTED, alpha=0.3, lw=0, zorder=0)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_xlabel(f"Predicted probability of {plain(event, 30)}")
    axes.set_ylabel("Observed frequency")
    found = diagram.decomposition
    lines = [
        f"miscalibration {found.miscalibration:.4f}",
        f"  by chance {found.expected_miscalibration:.4f}, p = {found.p_value:.2g}",
        f"discrimination {found.discrimination:.4f}",
        f"uncertainty {found.uncertainty:.4f}",
        f"Brier loss of the event {found.loss:.4f}",
    ]
    axes.text(0.03, 0.97, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=8, color=INK, zorder=5)


def _decision(axes: Axes, curve: DecisionCurve, event: str) -> None:
    """Net benefit by threshold probability, with its 95% interval, beside always and never acting."""
    at, benefit = curve.thresholds, curve.net_benefit
    reach = 1.96 * curve.standard_error
    axes.fill_between(at, benefit - reach, benefit + reach, color=ACCENT, alpha=0.2, lw=0)
    axes.plot(at, benefit, color=ACCENT, lw=1.8, label="act on the predictions")
    axes.plot(at, curve.treat_all, color=_AMBER, lw=1.3, label="always act")
    axes.axhline(0, color=MUTED, lw=1, ls=(0, (4, 3)), label="never act")
    top = max(float((benefit + reach).max()), float(curve.treat_all.max()), 1e-3)
    axes.set(xlim=(0, 1), ylim=(-0.25 * top, 1.3 * top))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_xlabel(f"Threshold probability of {plain(event, 30)}")
    axes.set_ylabel("Net benefit, true positives per row")
    axes.legend(loc="upper right", fontsize=8, frameon=False, labelcolor=MUTED)


def _by_threshold(axes: Axes, found: ScoreDecomposition) -> None:
    """Components of the Brier loss of the events y <= threshold; the areas are those of the CRPS."""
    _, miscalibration, discrimination, uncertainty = found.by_threshold.T
    at = found.thresholds
    for values, color, name, number in (
        (uncertainty, MUTED, "uncertainty", found.uncertainty),
        (discrimination, ACCENT, "discrimination", found.discrimination),
        (miscalibration, ALERT, "miscalibration", found.miscalibration),
    ):
        chance = "" if name != "miscalibration" or found.p_value is None else _chance(found)
        axes.fill_between(at, 0, values, color=color, alpha=0.15, lw=0)
        axes.plot(at, values, color=color, lw=1.6, label=f"{name} {number:.3g}{chance}")
    weight = np.cumsum(uncertainty * np.gradient(at))
    inside = (weight > 1e-3 * weight[-1]) & (weight < (1 - 1e-3) * weight[-1]) if weight[-1] > 0 else at == at
    axes.set(xlim=(at[inside].min(), at[inside].max()), ylim=(0, 1.45 * uncertainty.max() or 1.0))
    axes.set_xlabel("Threshold, in the units of the target")
    axes.set_ylabel("Brier loss of being below")
    axes.legend(loc="upper left", fontsize=8, frameon=False, labelcolor=MUTED)


def _chance(found: ScoreDecomposition) -> str:
    return f" (by chance {found.expected_miscalibration:.3g}, p = {found.p_value:.2g})"


def _differences(axes: Axes, scores: Scores) -> None:
    """Each score's difference with its 95% interval, in standard errors; right of zero the first is better."""
    from bayeslens.evaluation.scoring import is_loss

    names = list(scores.comparisons)
    for i, name in enumerate(names):
        found = scores.comparisons[name]
        unit = found.standard_error or 1.0
        sign = -1 if is_loss(name) else 1
        middle, reach = sign * found.difference / unit, (found.upper - found.lower) / 2 / unit
        color = MUTED if found.p_value > 0.05 else ACCENT if middle > 0 else ALERT
        axes.hlines(i, middle - reach, middle + reach, color=color, lw=2.2)
        axes.plot(middle, i, "o", ms=6, color=color)
        text = f"{found.difference:+.3g}" if found.difference else "0"
        axes.annotate(text, (middle, i), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=INK)
    axes.axvline(0, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.set_yticks(range(len(names)), [plain(name.replace("_", " "), 30) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -2.5), max(high, 2.5))
    axes.set_xlabel("Second is better  ←  standard errors  →  first is better")
