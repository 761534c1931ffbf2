"""What `predict` returns: predictions for every row, how good they are, and what made them."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import numpy as np
import pandas as pd
from numpyro.distributions import Distribution

from bayeslens.core.distribution import take_rows
from bayeslens.core.learner import Predictive
from bayeslens.core.quantiles import mean_and_variance, quantile
from bayeslens.evaluation.conformal import class_scores, conformal_threshold, prediction_sets
from bayeslens.evaluation.scores import pit

_AUDIT_ROWS = 5000
_NOMINAL = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])


class Audit(eqx.Module):
    """Held-out rows: what was predicted for them and what happened.

    The rows are the test rows where their target is known, otherwise out-of-fold training rows.
    For regression `mean, lower, upper, pit` have shape (rows,) and `probabilities` is None; for classification
    `probabilities` has shape (rows, classes), `y` holds class codes and the others are None.
    `interval_coverage` has one row per nominal level: `(nominal, observed, standard error)`.
    """

    y: np.ndarray
    mean: np.ndarray | None = None
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    pit: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    interval_coverage: np.ndarray | None = None


def audit(
    distribution: Distribution, y: np.ndarray, coverage: float, classes: tuple | None, set_scores: Any = None
) -> Audit:
    """What was predicted for at most 5,000 held-out rows, and how often intervals or sets of each level held.

    Class sets come from the conformal `set_scores` of other rows; without these by leave-one-out, each row against
    the scores of all others, which is near nominal by construction.
    """
    kept = np.linspace(0, len(y) - 1, min(len(y), _AUDIT_ROWS)).round().astype(int)
    y, distribution = np.asarray(y)[kept], take_rows(distribution, kept)
    if classes is not None:
        probs = np.asarray(distribution.probs)
        scores = class_scores(probs)[np.arange(len(y)), y.astype(int)]
        if set_scores is not None:
            edges = [conformal_threshold(set_scores, level) for level in _NOMINAL]
        else:  # the corrected quantile of all other scores holds a score just where the plain quantile of all does
            edges = [np.quantile(scores, level, method="inverted_cdf") for level in _NOMINAL]
        sets = [prediction_sets(probs, edge) for edge in edges]
        observed = np.array([s[np.arange(len(y)), y.astype(int)].mean() for s in sets])
        return Audit(y, probabilities=probs, interval_coverage=_with_errors(observed, len(y)))
    tail = (1 - coverage) / 2
    bounds = quantile(distribution, [tail, 1 - tail])
    transform = pit(distribution, y)
    observed = np.array([(np.abs(transform - 0.5) <= level / 2).mean() for level in _NOMINAL])
    mean, _ = mean_and_variance(distribution)
    return Audit(y, mean, bounds[:, 0], bounds[:, 1], transform, None, _with_errors(observed, len(y)))


def _with_errors(observed: np.ndarray, rows: int) -> np.ndarray:
    return np.stack([_NOMINAL, observed, np.sqrt(_NOMINAL * (1 - _NOMINAL) / rows)], 1)


@dataclasses.dataclass(frozen=True)
class Dependence:
    """Partial dependence of the prediction on one column, with a band from the members' disagreement.

    `grid` holds numbers or category texts; `mean`, `lower`, `upper` the average prediction (for classes the
    probability of `label`) and its 90% band; `importance` is the spread of `mean` over the column's own values.
    """

    column: str
    grid: list
    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    importance: float
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer of `predict`.

    Attributes:
        frame: the test table with the predicted columns added, in its own order and index.
        predictive: the fitted predictive, callable on new rows, and what `save` stores.
        metrics: log_score, crps or brier, coverage, width or set_size, calibration_error (and its standard error).
        metrics_from: `"test"` or `"cross-validation"`.
        leaderboard: one dict per learner: learner, log_score, crps|brier, coverage, width|set_size, seconds, weight,
            note (why it was skipped, or empty).
        warnings: sentences about the table.
        unfamiliarity: distance of each test row from the nearest training rows, shape (rows,).
    """

    task: str
    target: str
    learner: str
    coverage: float
    frame: pd.DataFrame
    predictive: Predictive
    metrics: dict[str, float]
    metrics_from: str
    leaderboard: list[dict[str, Any]]
    n_train: int
    n_test: int
    seconds: float
    classes: tuple | None = None
    warnings: tuple[str, ...] = ()
    unfamiliarity: np.ndarray | None = None
    audit: Audit | None = None
    dependence: tuple[Dependence, ...] = ()
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What `--json` prints: plain numbers and texts."""
        keys = ("task", "learner", "n_train", "n_test", "metrics", "metrics_from", "leaderboard", "seconds", "files")
        return {key: getattr(self, key) for key in keys} | {"warnings": list(self.warnings)}
