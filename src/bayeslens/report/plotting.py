"""`plot`: pictures of any result of the library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bayeslens.core.errors import InputError
from bayeslens.report.pictures import lay_out, plot_prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Results with kinds of pictures of their own, and such with panels that belong together: who draws them.
_WITH_KINDS = {
    "Posterior": ("posterior_pictures", "plot_posterior"),
    "PredictionsAudit": ("scores", "plot_audit"),
    "Scores": ("score_pictures", "plot_scores"),
}
_WITH_PANELS = {
    "AdaptiveConformal": ("conformal_pictures", "adaptive_panels"),
    "Calibration": ("calibration_pictures", "calibration_panels"),
    "CalibrationChecks": ("check_pictures", "calibration_checks_panels"),
    "ConformalPrediction": ("conformal_pictures", "conformal_panels"),
    "ExpectedCoverage": ("check_pictures", "coverage_panels"),
    "LocalClassifierTwoSampleTest": ("check_pictures", "local_test_panels"),
    "PosteriorChecks": ("check_pictures", "posterior_checks_panels"),
    "PosteriorPredictiveCheck": ("check_pictures", "predictive_panels"),
    "PowerScaling": ("check_pictures", "power_scaling_panels"),
    "SimulationBasedCalibration": ("check_pictures", "calibration_check_panels"),
}


def plot(result: Any, kind: str | None = None) -> Figure:
    """Draw one kind of picture of a result.

    Args:
        result: what `predict`, `infer`, `score`, `check`, `calibrate` or a call of what `conformal` made returned.
        kind: of a prediction:
            `"calibration"` (the default; do probabilities come true: PIT histogram, or reliability curve for classes),
            `"coverage"` (how often intervals or sets hold the truth, against what they promise),
            `"predictions"` (held-out predictions against what was observed), or
            `"dependence"` (how the prediction moves along each column).
            Of a posterior:
            `"marginals"` (the default; what is believed about each number, with its 90% interval),
            `"trace"` and `"rank"` (did the chains mix, for the numbers for which they did worst),
            `"pairs"` (the numbers most closely tied, with divergent transitions), or
            `"energy"` (how well Hamiltonian chains move between energies).
            Of scores: `"reliability"`, `"decomposition"`, `"decision"` or `"comparison"`; of an audit by `check` also
            `"quantiles"` or `"events"`; other results have one kind.

    Returns:
        A matplotlib figure that belongs to no window: `figure.savefig("calibration.png")`; notebooks show it.

    Raises:
        InputError: an unknown kind, or the result lacks what the picture needs.

    >>> plot(None, kind="pie")
    Traceback (most recent call last):
    bayeslens.core.errors.InputError: unknown kind 'pie': use one of calibration, coverage, predictions, dependence
    """
    name = type(result).__name__
    if name in _WITH_KINDS or name in _WITH_PANELS:
        module, function = _WITH_KINDS.get(name) or _WITH_PANELS[name]
        draw = getattr(importlib.import_module(f"bayeslens.report.{module}"), function)
        if name in _WITH_KINDS:
            return draw(result, kind)
        if kind is not None:
            raise InputError(f"there is one kind of picture of a {name}: leave out kind={kind!r}")
        return lay_out(draw(result), columns=2)
    return plot_prediction(result, kind)
