"""What `predict` returns: predictions for every row, how good they are, and what made them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from bayeslens.core.learner import Predictive


@dataclasses.dataclass(frozen=True)
class Audit:
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
    audit: Audit | None = None
    dependence: tuple[Dependence, ...] = ()
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What `--json` prints: plain numbers and texts."""
        keys = ("task", "learner", "n_train", "n_test", "metrics", "metrics_from", "leaderboard", "seconds", "files")
        return {key: getattr(self, key) for key in keys} | {"warnings": list(self.warnings)}
