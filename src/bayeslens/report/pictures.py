"""Pictures of a prediction: calibration, coverage, predictions against what was observed, partial dependence.

Those of a posterior are in `posterior_pictures`. A picture is a list of panels, each of which fills one set of axes.
`lay_out` puts them on one figure; the HTML report renders each by itself, so that they flow with the width of the page.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslens.core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayeslens.learners.result import Audit, Dependence, Prediction

INK, MUTED, RULE, ACCENT, ALERT = "#1c2733", "#65707e", "#d8dde4", "#1f6e8c", "#c4532b"
MAX_POINTS = 400  # dots that can still be told apart
MAX_ROWS = 120  # intervals that can still be told apart
MAX_CLASSES = 30
MAX_CATEGORIES = 10
MAX_DEPENDENCE = 9
_REASONS = {
    "calibration": "it kept no held-out rows with what is needed",
    "coverage": "it kept no coverage by nominal level, and two classes have no sets worth counting",
    "predictions": "it kept no held-out rows with what is needed",
    "dependence": "partial dependence was not computed",
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes: `draw(axes)` fills it, `title` is plain text, `size` is in inches."""

    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (5.0, 3.5)


def plot_prediction(prediction: Prediction, kind: str | None = None) -> Figure:
    """One kind of picture of a prediction as a figure, by default of its calibration: see `plot`.

    Raises:
        InputError: an unknown kind, or the prediction lacks what the picture needs.
    """
    kind = kind or "calibration"
    drawn = panels(prediction, kind)
    if not drawn:
        raise InputError(f"this prediction has no picture of kind {kind!r}: {_REASONS[kind]}")
    return lay_out(drawn, columns=3 if kind == "dependence" else 2)


def panels(result: Prediction, kind: str) -> list[Panel]:
    """The panels of one kind of picture, most telling first; empty where the prediction lacks what they need.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in _KINDS:
        raise InputError(f"unknown kind {kind!r}: use one of {', '.join(_KINDS)}")
    return _KINDS[kind](result)


def lay_out(drawn: list[Panel], columns: int = 1, titles: bool = True) -> Figure:
    """One figure with the panels in rows of at most `columns`, with or without their titles."""
    from matplotlib.figure import Figure

    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    width, height = max(p.size[0] for p in drawn), max(p.size[1] for p in drawn)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    for i, panel in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, i + 1)
        _dress(axes)
        panel.draw(axes)
        if titles:
            axes.set_title(plain(panel.title, 60), loc="left", fontsize=11, color=INK)
    return figure


def plain(text: Any, length: int = 24) -> str:
    """A name as one short line that matplotlib does not take for mathematics.

    >>> plain("m$^2$") == r"m\\$^2\\$"
    True
    """
    return shorten(text, length).replace("$", r"\$")


def shorten(text: Any, length: int) -> str:
    """One line of at most `length` characters, without control characters, reading direction marks and halves of
    surrogate pairs, which a column name may hold and a page must not.

    What is left out is in the middle, since names that are long often differ at their ends.

    >>> shorten("a\\nrather long name", 12)
    'a rathe…name'
    """
    text = str(text)
    head = (length - 1) * 2 // 3
    text = text if len(text) <= length else text[:head] + "…" + text[head + 1 - length :]
    return "".join(
        " " if c.isspace() else "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTIONS else c
        for c in text
    )


_DIRECTIONS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# ---- calibration -------------------------------------------------------------------------------------------------


def _calibration(result: Prediction) -> list[Panel]:
    audit = result.audit
    if audit is None:
        return []
    if audit.probabilities is not None:
        y, probabilities = labelled(audit)
        if not len(y):
            return []
        if probabilities.shape[1] == 2:
            label = f"Predicted probability of {plain(_label(result, 1))}"
            return [
                Panel("Reliability", functools.partial(_reliability, p=probabilities[:, 1], hit=y == 1, label=label))
            ]
        top = probabilities.argmax(1)
        label = "Predicted probability of the most probable class"
        return [
            Panel("Reliability", functools.partial(_reliability, p=probabilities.max(1), hit=y == top, label=label))
        ]
    if audit.pit is None:
        return []
    pit = np.asarray(audit.pit, float)
    pit = np.clip(pit[np.isfinite(pit)], 0, 1)
    return [Panel("PIT histogram", functools.partial(_pit, pit=pit))] if len(pit) else []


def _pit(axes: Axes, pit: np.ndarray) -> None:
    """Shares of rows by the quantile at which the truth fell: flat if the forecasts are calibrated."""
    from scipy.stats import binom

    bins = int(np.clip(len(pit) // 10, 5, 20))
    counts, edges = np.histogram(pit, bins, (0, 1))
    low, high = binom.ppf((0.05, 0.95), len(pit), 1 / bins)
    inside = (counts >= low) & (counts <= high)
    axes.axhspan(low, high, color=MUTED, alpha=0.16, lw=0, zorder=0)
    axes.axhline(len(pit) / bins, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    colors = np.where(inside, ACCENT, ALERT)
    axes.bar(edges[:-1], counts, 1 / bins, align="edge", color=colors, alpha=0.85, lw=0, zorder=2, rasterized=False)
    axes.bar(edges[:-1], counts, 1 / bins, align="edge", fill=False, edgecolor="white", lw=1.2, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, max(counts.max(), high) * 1.12))
    axes.set_xlabel("Predicted probability of a value below the observed one")
    _count(axes)


def _reliability(axes: Axes, p: np.ndarray, hit: np.ndarray, label: str) -> None:
    """Observed frequency against predicted probability in groups of equal size, with consistency bars."""
    from scipy.stats import binom

    from bayeslens.evaluation.calibration import reliability

    predicted, observed, _, size = reliability(p, hit, bins=int(np.clip(len(p) // 15, 1, 10)))
    low, high = (binom.ppf(q, size, np.clip(predicted, 0, 1)) / size for q in (0.05, 0.95))
    outside = (observed < low) | (observed > high)
    axes.plot((0, 1), (0, 1), color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.vlines(predicted, low, high, color=MUTED, alpha=0.22, lw=8, zorder=0)
    axes.plot(predicted, observed, color=ACCENT, lw=1.4, alpha=0.6, zorder=2)
    axes.scatter(predicted, observed, s=34, color=np.where(outside, ALERT, ACCENT), lw=0, zorder=3, clip_on=False)
    heights, bounds = np.histogram(p, 25, (0, 1))
    axes.bar(bounds[:-1], 0.13 * heights / heights.max(), 0.04, align="edge", color=MUTED, alpha=0.3, lw=0, zorder=0)
    _unit_square(axes)
    axes.set_xlabel(label)
    axes.set_ylabel("Observed frequency")


# ---- coverage ----------------------------------------------------------------------------------------------------


def _coverage(result: Prediction) -> list[Panel]:
    audit = result.audit
    if audit is None:
        return []
    if audit.interval_coverage is not None and len(audit.interval_coverage):
        table = np.atleast_2d(np.asarray(audit.interval_coverage, float))
        names = ("Promised coverage", f"Observed coverage{'' if audit.probabilities is None else ' of the sets'}")
        rows = len(audit.y)
    else:
        if audit.probabilities is None or np.shape(audit.probabilities)[1] < 3:
            return []
        table, rows = _top_classes(audit)
        names = ("Predicted probability of the k most probable classes", "Truth among them")
    table = table[np.isfinite(table[:, :2]).all(1)]
    if not len(table):
        return []
    return [Panel("Coverage", functools.partial(_covered, table=table, rows=rows, names=names))]


def _top_classes(audit: Audit) -> tuple[np.ndarray, int]:
    """Predicted and observed share of rows whose class is among the k most probable, k = 1, …, and its error."""
    y, probabilities = labelled(audit)
    order = np.argsort(-probabilities, 1)
    promised = np.cumsum(np.take_along_axis(probabilities, order, 1), 1).mean(0) if len(y) else np.zeros(0)
    hits = np.cumsum(order == y[:, None], 1).mean(0) if len(y) else np.zeros(0)
    error = np.sqrt(hits * (1 - hits) / max(len(y), 1))
    return np.stack([promised, hits, error], 1)[: min(probabilities.shape[1] - 1, 10)], len(y)


def _covered(axes: Axes, table: np.ndarray, rows: int, names: tuple[str, str]) -> None:
    """Observed against promised coverage, with what chance does to an exactly calibrated forecaster."""
    from scipy.stats import binom

    promised, observed = table[:, 0], table[:, 1]
    error = np.nan_to_num(table[:, 2]) if table.shape[1] > 2 else np.zeros(len(table))
    grid = np.linspace(0, 1, 101)
    low, high = (binom.ppf(q, rows, grid) / rows for q in (0.05, 0.95))
    axes.fill_between(grid, low, high, color=MUTED, alpha=0.16, lw=0, zorder=0)
    axes.plot((0, 1), (0, 1), color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.errorbar(promised, observed, error, fmt="none", color=ACCENT, elinewidth=1.4, zorder=2)
    axes.scatter(promised, observed, s=34, color=ACCENT, lw=0, zorder=3, clip_on=False)
    _unit_square(axes)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])


# ---- predictions against what was observed -----------------------------------------------------------------------


def _predictions(result: Prediction) -> list[Panel]:
    audit = result.audit
    if audit is None:
        return []
    if audit.probabilities is not None:
        return _class_predictions(result)
    if audit.mean is None or audit.lower is None or audit.upper is None:
        return []
    values = np.stack([np.asarray(v, float) for v in (audit.y, audit.mean, audit.lower, audit.upper)])
    values = values[:, np.isfinite(values).all(0)]
    if not values.shape[1]:
        return []
    values = values[:, np.argsort(values[1], kind="stable")]
    return [
        Panel("Row by row, with intervals", functools.partial(_intervals, values=values)),
        Panel("Observed against predicted", functools.partial(_scatter, values=values)),
    ]


def _intervals(axes: Axes, values: np.ndarray) -> None:
    """Rows in the order of their prediction: interval, prediction, and what was observed."""
    y, mean, lower, upper = _thin(values, MAX_ROWS)
    rank = np.arange(1, len(y) + 1)
    outside = (y < lower) | (y > upper)
    width = float(np.clip(300 / len(y), 1.6, 9))
    axes.vlines(rank, lower, upper, color=ACCENT, alpha=0.25, lw=width, zorder=1)
    axes.plot(rank, mean, color=ACCENT, lw=1.5, zorder=2) if len(y) > 1 else None
    axes.scatter(rank[~outside], y[~outside], s=11, color=INK, lw=0, zorder=3, label="observed, inside")
    axes.scatter(rank[outside], y[outside], s=22, color=ALERT, lw=0, zorder=4, label="observed, outside")
    axes.set(xlim=(0.2, len(y) + 0.8), ylim=_range(y, lower, upper))
    axes.tick_params(labelbottom=False)
    shown = f"{len(y)} of {values.shape[1]:,} held-out rows" if len(y) < values.shape[1] else f"{len(y)} held-out rows"
    axes.set_xlabel(f"{shown}, by predicted value")
    axes.set_ylabel("Value")
    _legend(axes)


def _scatter(axes: Axes, values: np.ndarray) -> None:
    """Observed against predicted: near the diagonal if the prediction is sharp and unbiased."""
    y, mean, lower, upper = _thin(values, MAX_POINTS)
    outside = (y < lower) | (y > upper)
    span = _range(y, mean)
    axes.plot(span, span, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.scatter(mean[~outside], y[~outside], s=16, color=ACCENT, alpha=0.6, lw=0, zorder=2)
    axes.scatter(mean[outside], y[outside], s=18, color=ALERT, alpha=0.9, lw=0, zorder=3)
    axes.set(xlim=_range(mean), ylim=_range(y))
    axes.set_xlabel("Predicted")
    axes.set_ylabel("Observed")


def _class_predictions(result: Prediction) -> list[Panel]:
    y, probabilities = labelled(result.audit)
    if not len(y):
        return []
    names = [_label(result, k) for k in range(probabilities.shape[1])]
    if len(names) == 2:
        return [Panel("By observed class", functools.partial(_two_classes, y=y, p=probabilities[:, 1], names=names))]
    size = (5.0, float(np.clip(0.2 * min(len(names), MAX_CLASSES), 3.5, 5.0)))
    draw = functools.partial(_confusion, y=y, probabilities=probabilities, names=names)
    truth = probabilities[np.arange(len(y)), y]
    return [
        Panel("Average probabilities by observed class", draw, size),
        Panel("Probability given to the truth", functools.partial(_truth, p=truth), size),
    ]


def _two_classes(axes: Axes, y: np.ndarray, p: np.ndarray, names: list[str]) -> None:
    """How the predicted probability is spread where one class was observed (up), and the other (down)."""
    for code, sign, color in ((1, 1, ACCENT), (0, -1, MUTED)):
        counts, edges = np.histogram(p[y == code], 20, (0, 1))
        name = f"observed {plain(names[code], 20)}"
        axes.bar(edges[:-1], sign * counts, 0.046, align="edge", color=color, alpha=0.8, lw=0, label=name)
    axes.axhline(0, color=INK, lw=0.8)
    low, high = axes.get_ylim()
    axes.set(xlim=(0, 1), ylim=(low, high + 0.2 * (high - low)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_xlabel(f"Predicted probability of {plain(names[1])}")
    _count(axes)
    _legend(axes)


def _confusion(axes: Axes, y: np.ndarray, probabilities: np.ndarray, names: list[str]) -> None:
    """For each observed class, the average probability of every class: dark on the diagonal if told apart."""
    counts = np.bincount(y, minlength=len(names))
    shown = np.sort(np.argsort(-counts, kind="stable")[:MAX_CLASSES])
    average = np.array([probabilities[y == k].mean(0)[shown] if counts[k] else np.zeros(len(shown)) for k in shown])
    size = len(shown)
    for i, row in enumerate(average):
        for j, value in enumerate(row):
            if value < 0.005:
                continue
            axes.add_patch(_cell(j, i, ACCENT, float(np.clip(value, 0, 1)) ** 0.8))
            if size <= 12 and value >= 0.01:
                color = "white" if value > 0.5 else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9 if size < 8 else 7, color=color)
    font = 9 if size <= 12 else 6.5
    labels = [plain(names[k], 14) for k in shown]
    turned = {"rotation": 90} if size > 5 else {}
    axes.set_xticks(range(size), labels, fontsize=font, **turned)
    axes.set_yticks(range(size), labels, fontsize=font)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    axes.grid(False)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("Observed")


def _cell(x: float, y: float, color: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, color=color, alpha=alpha, lw=0)


def _truth(axes: Axes, p: np.ndarray) -> None:
    counts, edges = np.histogram(p, 20, (0, 1))
    axes.bar(edges[:-1], counts, 0.046, align="edge", color=ACCENT, alpha=0.85, lw=0)
    axes.set(xlim=(0, 1))
    axes.set_xlabel("Probability that was given to the class observed")
    _count(axes)


# ---- partial dependence ------------------------------------------------------------------------------------------


def _dependence(result: Prediction) -> list[Panel]:
    shown = by_importance(result.dependence)[:MAX_DEPENDENCE]
    if not shown:
        return []
    span = _range(*(np.concatenate([d.mean, d.lower, d.upper]).astype(float) for d in shown), trim=0)
    what = plain(result.target, 22)
    return [
        Panel(
            f"{d.column}",
            functools.partial(_numeric if _is_numeric(d.grid) else _categorical, one=d, span=span, what=what),
            (5.0, 3.5) if len(shown) in (1, 2, 4) else (3.5, 2.7),
        )
        for d in shown
    ]


def _numeric(axes: Axes, one: Dependence, span: tuple[float, float], what: str) -> None:
    grid = np.asarray(one.grid, float)
    axes.fill_between(grid, np.asarray(one.lower, float), np.asarray(one.upper, float), color=ACCENT, alpha=0.2, lw=0)
    axes.plot(grid, one.mean, color=ACCENT, lw=1.8)
    axes.set(ylim=span)
    axes.margins(x=0.02)
    axes.locator_params(axis="x", nbins=5, integer=bool((grid == np.round(grid)).all()))
    axes.set_ylabel(f"P({plain(one.label, 18)})" if one.label != "" else what)


def _categorical(axes: Axes, one: Dependence, span: tuple[float, float], what: str) -> None:
    kept = np.arange(len(one.grid))[:MAX_CATEGORIES]
    mean, lower, upper = (np.asarray(v, float)[kept] for v in (one.mean, one.lower, one.upper))
    axes.hlines(kept, lower, upper, color=ACCENT, alpha=0.3, lw=6)
    axes.scatter(mean, kept, s=30, color=ACCENT, lw=0, zorder=3)
    more = len(one.grid) - len(kept)
    axes.set_yticks(kept, [plain(one.grid[i], 14) for i in kept], fontsize=9 if len(kept) <= 7 else 7.5)
    axes.set(xlim=span, ylim=(len(kept) - 0.4, -0.6))
    axes.locator_params(axis="x", nbins=5)
    name = f"P({plain(one.label, 18)})" if one.label != "" else what
    axes.set_xlabel(f"{name}; {more} more not shown" if more else name)


_KINDS = {"calibration": _calibration, "coverage": _coverage, "predictions": _predictions, "dependence": _dependence}


# ---- what panels share -------------------------------------------------------------------------------------------


def by_importance(dependence: tuple[Dependence, ...]) -> list[Dependence]:
    """Largest importance first, unknown importance last; without those that have nothing to draw."""
    drawable = [d for d in dependence if len(d.grid) and np.isfinite(np.asarray(d.mean, float)).any()]
    return sorted(drawable, key=lambda d: -np.nan_to_num(float(d.importance), nan=-np.inf))


def labelled(audit: Audit) -> tuple[np.ndarray, np.ndarray]:
    """Class codes and probabilities of the held-out rows for which both are known."""
    probabilities = np.asarray(audit.probabilities, float)
    y = np.asarray(audit.y, float)
    known = np.isfinite(y) & (y >= 0) & (y < probabilities.shape[1]) & np.isfinite(probabilities).all(1)
    return y[known].astype(int), probabilities[known]


def _label(result: Prediction, code: int) -> str:
    return str(result.classes[code]) if result.classes is not None and code < len(result.classes) else f"class {code}"


def _is_numeric(grid: list) -> bool:
    return all(isinstance(v, int | float | np.number) and not isinstance(v, bool | np.bool_) for v in grid)


def _thin(values: np.ndarray, most: int) -> np.ndarray:
    """Evenly spaced rows of sorted ones: what is dropped looks like what is kept."""
    rows = values.shape[1]
    return values if rows <= most else values[:, np.linspace(0, rows - 1, most).round().astype(int)]


def _range(*arrays: np.ndarray, trim: float = 0.01) -> tuple[float, float]:
    """Limits that hold almost everything: one interval of enormous width must not flatten the rest."""
    finite = [a[np.isfinite(a)] for a in arrays]
    finite = [a for a in finite if len(a)] or [np.zeros(1)]
    low = min(np.quantile(a, trim if len(a) > 50 else 0) for a in finite)
    high = max(np.quantile(a, 1 - trim if len(a) > 50 else 1) for a in finite)
    pad = 0.06 * (high - low) or 0.5 * abs(low) or 1.0
    return float(low - pad), float(high + pad)


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def _count(axes: Axes) -> None:
    axes.locator_params(axis="y", nbins=6, integer=True)
    axes.set_ylabel("Held-out rows")


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", ncols=2, fontsize=9, frameon=False, handletextpad=0.3, labelcolor=MUTED)


def _dress(axes: Axes) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=5)
    axes.grid(True, color=RULE, lw=0.7, alpha=0.7)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=MUTED, fontsize=10)
