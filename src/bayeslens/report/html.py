"""Reports of predictions and of posteriors as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.resources
import io
import math
import os
import re
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.report import tables
from bayeslens.report.pictures import ACCENT, ALERT, INK, MUTED, RULE, Panel, by_importance, lay_out, panels, shorten
from bayeslens.report.posterior_pictures import SERIES

if TYPE_CHECKING:
    from bayeslens.evaluation.predictions_audit import PredictionsAudit
    from bayeslens.evaluation.scoring import Scores
    from bayeslens.learners.result import Prediction

_COLORS = {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent", ALERT: "--alert"} | dict(
    zip(SERIES[1:], ("--second", "--third", "--fourth"), strict=True)
)
_MAX_BARS = 8
_NEGLIGIBLE = 0.015  # a difference in coverage that nobody would act on, however well it is measured
_MAX_WARNINGS = 30


def write_report(result: Prediction | Posterior | Scores | PredictionsAudit, path: str | os.PathLike[str]) -> Path:
    """Write the report of a prediction, a posterior, scores or an audit as one HTML file.

    The file holds its own style and pictures, so that it can be mailed; nothing is fetched when it is opened.

    Args:
        result: what `predict`, `infer`, `score` or `check` returned. What it lacks (held-out rows, a plan, evidence) is
            left out.
        path: the file to write; one that exists is replaced, all at once.

    Returns:
        The path of the file.

    Raises:
        InputError: a result of another kind; or the file cannot be written: then nothing is left behind,
            and an older report stays as it was.

    >>> write_report(posterior, "report.html")  # doctest: +SKIP
    PosixPath('report.html')
    """
    path = Path(path)
    text = render(result).encode("utf-8", "replace")
    part = path.with_name(f".{path.name[:80]}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(text)
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write the report to {str(path)!r} ({reason}): name a file in a folder that you may write to"
        ) from error
    finally:
        _remove(part)
    return path


def _remove(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:  # its folder is not one, so there is no such file
        return


def render(result: Prediction | Posterior | Scores | PredictionsAudit) -> str:
    """The report as the text of an HTML page; every name and label in it is escaped."""
    if isinstance(result, Posterior):
        from bayeslens.report.posterior import render_posterior

        return render_posterior(result)
    if hasattr(result, "leaderboard"):
        return fill("template.html", _context(result))
    from bayeslens.evaluation.predictions_audit import PredictionsAudit
    from bayeslens.evaluation.scoring import Scores

    if not isinstance(result, PredictionsAudit | Scores):
        raise InputError(
            "besides those of scores and audits, there are reports of predictions and of posteriors, got "
            f"{type(result).__name__}"
        )
    from bayeslens.report.scores import render_scores

    return render_scores(result)


def fill(template: str, context: dict[str, Any]) -> str:
    """A template of this package as text; whatever stands in the context is escaped unless it is markup."""
    import jinja2

    def source(name: str) -> str:
        return importlib.resources.files("bayeslens.report").joinpath(name).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": tables.number, "short": shorten, "percent": percent, "seconds": seconds}
    return environment.get_template(template).render(context)


def drawings(drawn: list[Panel], name: str) -> list[dict[str, Any]]:
    """Panels for the page: title and inline SVG. No other list of panels of the page has the same name."""
    from markupsafe import Markup

    return [{"title": panel.title, "svg": Markup(_svg(panel, f"{name}{i}"))} for i, panel in enumerate(drawn)]


def _context(prediction: Prediction) -> dict[str, Any]:
    def pictures(kind: str) -> list[dict[str, Any]]:
        return drawings(panels(prediction, kind), kind)

    ranked, skipped = tables.split_leaderboard(prediction.leaderboard)
    loss, size = ("crps", "width") if prediction.task == "regression" else ("brier", "set_size")
    return {
        "p": prediction,
        "classes": None if prediction.classes is None else [str(c) for c in prediction.classes],
        "held_out": 0 if prediction.audit is None else len(prediction.audit.y),
        "has_sets": prediction.audit is not None and prediction.audit.interval_coverage is not None,
        "stacked": prediction.learner.count(", ") + 1 if prediction.learner.startswith("stack of ") else 0,
        "promise": _promise(prediction),
        "cards": _cards(prediction),
        "warnings": prediction.warnings[:_MAX_WARNINGS],
        "more_warnings": max(0, len(prediction.warnings) - _MAX_WARNINGS),
        "ranked": ranked[: tables.MAX_LEARNERS],
        "more_learners": max(0, len(ranked) - tables.MAX_LEARNERS),
        "skipped": skipped[: tables.MAX_LEARNERS],
        "loss": loss,
        "size": size,
        "calibration": pictures("calibration"),
        "coverage": pictures("coverage"),
        "predictions": pictures("predictions"),
        "dependence": pictures("dependence"),
        "bars": _importance(prediction),
        "unfamiliar": tables.unfamiliar_rows(prediction),
        "rows": tables.first_rows(prediction),
        "version": importlib.metadata.version("bayeslens"),
        "date": datetime.date.today().isoformat(),
    }


def _svg(panel: Panel, name: str) -> str:
    """One panel as inline SVG whose colours and font are the page's."""
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": True, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser has glyphs that matplotlib's own font lacks
        figure = lay_out([panel], titles=False)
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine(None)  # saving would lay everything out twice more
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Text in the drawing is escaped, so none of these patterns can match a name.
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"xlink:href=", "href=", svg)
    svg = re.sub(r"font(?:-family)?: (?:([\d.]+px) )?'?(?:DejaVu Sans|sans-serif)[^;\"]*", _font, svg)
    for color, variable in _COLORS.items():
        svg = svg.replace(f": {color}", f": var({variable})")
    return re.sub(r"\n\s*", "\n", svg)


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[1]}" if match[1] else "font-style: normal"


def _promise(prediction: Prediction) -> dict[str, Any] | None:
    """Observed coverage, its standard error, and whether that is what was promised."""
    observed = _metric(prediction, "coverage")
    if observed is None:
        return None
    nominal, rows = prediction.coverage, 0 if prediction.audit is None else len(prediction.audit.y)
    error = _standard_error(prediction, "coverage")
    chance = math.sqrt(nominal * (1 - nominal) / rows) if rows else 0.01
    off = abs(observed - nominal)
    is_chance = off <= 2 * max(chance, error or 0.0)
    is_kept = is_chance or off <= _NEGLIGIBLE
    verdict = "kept" if is_kept else "too low" if observed < nominal else "too high"
    return {"text": _with_error(observed, error), "verdict": verdict, "is_chance": is_chance and off > 0}


def _cards(prediction: Prediction) -> list[dict[str, str]]:
    """The key figures: name, value, standard error where known, and how to read it."""
    percentage = percent(prediction.coverage)
    notes = {
        "log_score": ("Log score", "nats per row; higher is better"),
        "crps": ("CRPS", f"in units of {shorten(prediction.target, 20)}; lower is better"),
        "brier": ("Brier loss", "from 0 (perfect) to 2"),
        "coverage": ("Coverage", f"of held-out rows; {percentage} promised"),
        "width": ("Interval width", f"average of the {percentage} intervals"),
        "set_size": ("Set size", f"classes in an average {percentage} set"),
        "calibration_error": ("Calibration error", "0 is perfect; chance alone gives some"),
    }
    known = [name for name in notes if name in prediction.metrics]
    cards = []
    for name in known:
        value, error = _metric(prediction, name), _standard_error(prediction, name)
        if name == "coverage":
            shown = "–" if value is None else _with_error(value, error)
        else:
            decimals = max(0, 1 - math.floor(math.log10(error))) if error else None  # two digits of the error
            shown = tables.number(value, decimals) + (f" ± {tables.number(error, decimals)}" if error else "")
        figure, _, margin = shown.partition(" ± ")
        title, note = notes[name]
        cards.append({"title": title, "value": figure, "error": margin and f"± {margin}", "note": note})
    return cards


def _with_error(share: float, error: float | None) -> str:
    """`91% ± 3%`, with a decimal where the error is that small."""
    if error is None:
        return percent(share)
    return f"{100 * share:.1f}% ± {100 * error:.1f}%" if error < 0.0095 else f"{100 * share:.0f}% ± {100 * error:.0f}%"


def _metric(prediction: Prediction, name: str) -> float | None:
    value = prediction.metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def _standard_error(prediction: Prediction, name: str) -> float | None:
    error = _metric(prediction, f"{name}_se")
    if error is not None:
        return error
    audit = prediction.audit
    if name != "coverage" or audit is None:
        return None
    if audit.interval_coverage is not None:
        table = np.atleast_2d(np.asarray(audit.interval_coverage, float))
        match = np.isclose(table[:, 0], prediction.coverage) & np.isfinite(table[:, 2])
        if match.any():
            return float(table[match, 2][0])
    observed = _metric(prediction, name)
    return math.sqrt(observed * (1 - observed) / len(audit.y)) if observed is not None and len(audit.y) else None


def _importance(prediction: Prediction) -> list[dict[str, Any]]:
    """Columns by importance, with the length of their bar in percent of the longest."""
    known = [d for d in by_importance(prediction.dependence) if math.isfinite(d.importance)]
    largest = max((abs(d.importance) for d in known), default=0.0) or 1.0
    return [
        {"column": d.column, "label": d.label, "value": d.importance, "length": 100 * abs(d.importance) / largest}
        for d in known[:_MAX_BARS]
    ]


def percent(value: float | None) -> str:
    """A share as a percentage: whole, or with one decimal where that says more.

    >>> [percent(v) for v in (0.91, 0.9112, 0.004, None)]
    ['91%', '91%', '0.4%', '–']
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}%" if 0 < value < 0.01 or 0.99 < value < 1 else f"{100 * value:.0f}%"


def seconds(value: Any) -> str:
    """A duration for people.

    >>> [seconds(v) for v in (0.42, 7.3, 95, None)]
    ['0.4 s', '7 s', '1 min 35 s', '–']
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 5 else f"{value:.0f} s"
    return f"{int(value // 60)} min {int(value % 60)} s"
