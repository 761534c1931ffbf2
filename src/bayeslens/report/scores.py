"""The page of scores, or of an audit of predictions: a verdict first, then what it rests on."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.evaluation.predictions_audit import PredictionsAudit, judge_scores
from bayeslens.evaluation.scoring import Scores
from bayeslens.report import html
from bayeslens.report.pictures import ACCENT, ALERT, MUTED, Panel, lay_out
from bayeslens.report.score_pictures import plot_scores, score_panels
from bayeslens.report.tables import Cell, Grid, cell, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_EVENTS = 6
_BAND = 0.9
_CARDS = {
    "log_score": ("Log score", "nats per row; higher is better"),
    "crps": ("CRPS", "in the units of the target; lower is better"),
    "brier": ("Brier loss", "from 0 (perfect) to 2"),
    "coverage": ("Coverage", "of the {what} that the predictions imply; {coverage} asked for"),
    "width": ("Interval width", "average, in the units of the target"),
    "set_size": ("Set size", "classes in an average set"),
    "calibration_error": ("Calibration error", "0 is perfect; chance alone gives some"),
}


def render_scores(result: Scores | PredictionsAudit) -> str:
    """The page of scores or of an audit as text; every name and label in it is escaped."""
    return html.fill("scores_template.html", _context(result))


def _context(result: Scores | PredictionsAudit) -> dict[str, Any]:
    audit = result if isinstance(result, PredictionsAudit) else None
    scores = result if audit is None else audit.scores
    findings = judge_scores(scores) if audit is None else list(audit.findings)

    def pictures(kind: str) -> list[dict[str, Any]]:
        return html.drawings(score_panels(scores, kind), kind)

    is_classes = scores.reliability is not None
    levels = [] if audit is None else claim_panels(audit, "quantiles")
    return {
        "target": None if audit is None else audit.target,
        "source": "" if audit is None else audit.source,
        "rows": scores.rows,
        "is_good": all(found.is_good is not False for found in findings),
        "findings": findings,
        "advice": "" if audit is None else audit.advice,
        "cards": _cards(scores),
        "is_classes": is_classes,
        "event": scores.event,
        "calibration": pictures("reliability" if is_classes else "decomposition") + html.drawings(levels, "quantiles"),
        "has_levels": bool(levels),
        "decision": pictures("decision"),
        "comparison": pictures("comparison"),
        "events": [] if audit is None else html.drawings(claim_panels(audit, "events"), "events"),
        "more_events": 0 if audit is None else max(0, len(audit.events) - _MOST_EVENTS),
        "claims": None if audit is None or not audit.stated else _claims(audit),
        "scores": _scores(scores),
        "decomposition": _decomposition(scores),
        "coverage": None if audit is None else audit.coverage,
        "left_out": 0 if audit is None else audit.left_out,
        "version": importlib.metadata.version("bayeslens"),
        "date": datetime.date.today().isoformat(),
    }


def _cards(scores: Scores) -> list[dict[str, str]]:
    """The key figures: name, value, standard error, and how to read it."""
    near = next((row.better.removeprefix("near ") for row in scores.scores if row.name == "coverage"), "")
    texts = {"what": "sets" if "set_size" in scores else "intervals"}
    texts["coverage"] = html.percent(float(near)) if near else ""
    cards = []
    for name, (title, note) in _CARDS.items():
        if name not in scores:
            continue
        value, error = scores[name], scores[f"{name}_se"]
        if name == "coverage":
            shown, margin = f"{value:.1%}", f"{error:.1%}"
        else:
            decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else None  # two digits of the error
            shown, margin = number(value, decimals), number(error, decimals) if error > 0 else ""
        cards.append(
            {"title": title, "value": shown, "error": margin and f"± {margin}", "note": note.format_map(texts)}
        )
    return cards


# ---- tables --------------------------------------------------------------------------------------------------------


def _grid(head: tuple[str, ...], rows: list[list[Any]], words: int) -> Grid:
    """Cells whose first `words` columns are text."""
    cells = [[cell(value, i >= words) for i, value in enumerate(row)] for row in rows]
    return Grid([Cell(name, numeric=i >= words) for i, name in enumerate(head)], cells)


def _claims(audit: PredictionsAudit) -> Grid:
    rows = [
        [
            claim.name,
            f"{claim.promised:.1%}",
            f"{claim.observed:.1%}",
            f"{claim.standard_error:.1%}",
            f"{claim.p_value:.2g}",
            number(claim.size),
        ]
        for claim in audit.stated
    ]
    return _grid(("as written", "promised", "observed", "± standard error", "p-value", "width or size"), rows, 1)


def _scores(scores: Scores) -> Grid:
    head = ("score", "better", "value", "± standard error")
    rows = [[s.name.replace("_", " "), s.better, number(s.value), number(s.standard_error)] for s in scores.scores]
    return _grid(head, rows, 2)


def _decomposition(scores: Scores) -> Grid:
    columns = ("value", "standard_error", "share_of_uncertainty", "by_chance", "p_value")
    rows = [
        [row["score"], row["component"], *(number(row[name]) for name in columns)]
        for row in scores.decomposition.to_dict("records")
    ]
    head = ("of", "component", "value", "± standard error", "share of uncertainty", "by chance", "p-value")
    return _grid(head, rows, 2)


# ---- pictures ------------------------------------------------------------------------------------------------------


def plot_audit(audit: PredictionsAudit, kind: str | None = None) -> Figure:
    """One kind of picture of an audit as a figure: of its scores (see `plot_scores`), or `"quantiles"` or `"events"`.

    Raises:
        InputError: an unknown kind, or the audit lacks what the picture needs.
    """
    if kind not in ("quantiles", "events"):
        return plot_scores(audit.scores, kind)
    drawn = claim_panels(audit, kind)
    if not drawn:
        raise InputError(f"the table says nothing of {kind}: there is no picture of this kind")
    return lay_out(drawn, columns=3)


def claim_panels(audit: PredictionsAudit, kind: str) -> list[Panel]:
    """Panels of what a file says beside its distributions; empty where it says nothing of the kind.

    Args:
        audit: what `check` returned.
        kind: `"quantiles"` (how often outcomes lay below each) or `"events"` (a reliability diagram of each
            `probability_above_T`, of six at the most).
    """
    if kind == "quantiles":
        levels = [claim for claim in audit.claims if claim.kind == "quantile"]
        promised, observed = (np.array([getattr(c, name) for c in levels]) for name in ("promised", "observed"))
        draw = functools.partial(_levels, promised=promised, observed=observed, rows=audit.rows)
        return [Panel("Outcomes below each quantile", draw, (5.0, 4.2))] if levels else []
    drawn = []
    for name, diagram in list(audit.events.items())[:_MOST_EVENTS]:
        event = f"{audit.target} above {name.removeprefix('probability_above_')}"
        scores = dataclasses.replace(audit.scores, reliability=diagram, event=event)
        drawn += [dataclasses.replace(panel, title=name) for panel in score_panels(scores, "reliability")]
    return drawn


def _levels(axes: Axes, promised: np.ndarray, observed: np.ndarray, rows: int) -> None:
    """Share of outcomes below each quantile against its level, with what chance allows."""
    from scipy.stats import binom

    grid = np.linspace(0, 1, 101)
    low, high = (binom.ppf(q, rows, grid) / rows for q in ((1 - _BAND) / 2, (1 + _BAND) / 2))
    axes.fill_between(grid, low, high, color=MUTED, alpha=0.16, lw=0, zorder=0)
    axes.plot((0, 1), (0, 1), color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    at_low, at_high = (binom.ppf(q, rows, promised) / rows for q in ((1 - _BAND) / 2, (1 + _BAND) / 2))
    outside = (observed < at_low) | (observed > at_high)
    axes.plot(promised, observed, color=ACCENT, lw=1.4, alpha=0.6, zorder=2)
    axes.scatter(promised, observed, s=30, color=np.where(outside, ALERT, ACCENT), lw=0, zorder=3, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_xlabel("Level of the quantile")
    axes.set_ylabel("Outcomes below it")
