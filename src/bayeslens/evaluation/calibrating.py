"""Is a predictive calibrated, and which recalibration mends it best? Measured on rows that the map did not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import concatenate, take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.foreign import as_predictive
from bayeslens.core.learner import Predictive
from bayeslens.core.table import Table, Target
from bayeslens.core.transformed import through_rounding_cells
from bayeslens.evaluation.calibration import (
    ConfidenceBand,
    QuantileMap,
    Temperature,
    classwise_calibration_error,
    confidence_band,
    debiased_calibration_error,
    expected_calibration_error,
    kolmogorov_smirnov_calibration_error,
    pit_calibration_error,
    smooth_calibration_error,
)
from bayeslens.evaluation.h_calibration import HCalibration
from bayeslens.evaluation.recalibration import (
    BetaCalibration,
    DirichletCalibration,
    HistogramBinning,
    Isotonic,
    Platt,
    VectorScaling,
)
from bayeslens.evaluation.score_decomposition import ReliabilityDiagram, reliability_diagram
from bayeslens.evaluation.scores import log_score, pit

if TYPE_CHECKING:
    import pandas as pd

METHODS = {
    "temperature": Temperature,
    "platt": Platt,
    "beta": BetaCalibration,
    "vector": VectorScaling,
    "dirichlet": DirichletCalibration,
    "isotonic": Isotonic,
    "histogram": HistogramBinning,
    "h_calibration": HCalibration,
}
_AUTO = {
    "two": ("none", "temperature", "platt", "beta", "isotonic", "h_calibration"),
    "many": ("none", "temperature", "vector", "dirichlet", "isotonic", "h_calibration"),
    "regression": ("none", "quantile_map"),
}


class RecalibratedPredictive(Predictive):
    """A predictive whose marginal distributions go through a recalibration; None leaves them as they are."""

    predictive: Predictive
    recalibration: Any
    table: Table | None
    classes: tuple | None
    method: str = eqx.field(static=True)

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """The members of the predictive, before recalibration."""
        return self.predictive.members(x)

    def __call__(self, x: Any) -> Distribution:
        """The recalibrated marginal distribution of every row."""
        return _moved(self.recalibration, self.predictive(x))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How calibrated a predictive is before and after recalibration.

    Attributes:
        predictive: the recalibrated one, fitted on all rows.
        method: the recalibration that was chosen.
        table: a row per measure and state (`before`, `after`), with value, standard error and p-value where there
            is one. `after` is cross-validated: each row was mapped by what the other folds taught. (That the best
            of several was taken by these same rows flatters it a little.)
        candidates: a row per recalibration tried: cross-validated log score, its gain over no change, and the gain's
            standard error.
        diagrams: of classes, reliability before and after: of the second of two classes, or of the likeliest of more.
        bands: their confidence bands.
        pits: of regression, PIT values before and after, each of shape (rows,).
    """

    predictive: RecalibratedPredictive
    method: str
    table: pd.DataFrame
    candidates: pd.DataFrame
    diagrams: tuple[ReliabilityDiagram, ReliabilityDiagram] | None = None
    bands: tuple[ConfidenceBand, ConfidenceBand] | None = None
    pits: tuple[np.ndarray, np.ndarray] | None = None

    def __str__(self) -> str:
        def shown(frame: pd.DataFrame) -> str:
            return frame.to_string(index=False, float_format="%.4g", na_rep="")

        return f"{shown(self.table)}\n\nrecalibration: {self.method}\n{shown(self.candidates)}"


def recalibrate(predictive: Any, X: Any, y: Any, *, method: str = "auto", num_folds: int = 5) -> RecalibratedPredictive:
    """Learn on held-out rows how to mend the probabilities of a predictive.

    Args:
        predictive: whatever `core.as_predictive` accepts, of classes or numbers, fitted on other rows.
        X: rows that it was not fitted on; None for an array of predictions.
        y: what happened.
        method: `"auto"` takes the best of several by cross-validated log score, no change among them. Of classes:
            `"temperature"`, `"platt"` and `"beta"` (two classes only), `"vector"`, `"dirichlet"`, `"isotonic"`,
            `"histogram"`, or `"h_calibration"`, which never changes the likeliest class. Of numbers:
            `"quantile_map"`. `"none"` changes nothing.
        num_folds: of the cross-validation.

    Raises:
        InputError: an unknown method, one for other targets, or fewer than two rows.

    >>> rough = np.tile([[0.99, 0.01], [0.01, 0.99]], (100, 1))
    >>> better = recalibrate(rough, None, np.tile([0, 1, 1, 1], 50))
    >>> better(None).probs[0].round(1).tolist()
    [0.5, 0.5]
    """
    held_out = _HeldOut(predictive, X, y, num_folds)
    tried = held_out.methods(method)
    if len(tried) == 1:
        return held_out.refitted(tried[0])
    return held_out.refitted(max(tried, key=lambda name: held_out.scores(held_out.crossfitted(name)).mean()))


def calibrate(predictive: Any, X: Any, y: Any, *, key: Any, method: str = "auto", num_folds: int = 5) -> Calibration:
    """How calibrated a predictive is, and its recalibration, with both measured on rows that it did not see.

    Args:
        predictive, X, y, method, num_folds: see `recalibrate`.
        key: a `jax.random.key`, for the bands of the reliability curves.

    >>> import jax
    >>> rough = np.tile([[0.99, 0.01], [0.01, 0.99]], (100, 1))
    >>> found = calibrate(rough, None, np.tile([0, 1, 1, 1], 50), key=jax.random.key(0), method="platt")
    >>> found.candidates["recalibration"].tolist(), bool(found.candidates["gain"][1] > 0.5)
    (['none', 'platt'], True)
    """
    import pandas as pd

    held_out = _HeldOut(predictive, X, y, num_folds)
    tried = held_out.methods(method)
    crossfitted = {name: held_out.crossfitted(name) for name in dict.fromkeys(("none", *tried))}
    scores = {name: held_out.scores(d) for name, d in crossfitted.items()}
    best = max(tried, key=lambda name: scores[name].mean())
    rows = []
    for name, score in scores.items():
        gain = score - scores["none"]
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        rows.append({"recalibration": name, "log_score": score.mean(), "gain": gain.mean(), "standard_error": error})
    candidates = pd.DataFrame(rows).sort_values("log_score", ascending=False, ignore_index=True)
    candidates = candidates if len(tried) > 1 else pd.DataFrame(rows)
    states = {"before": crossfitted["none"], "after": crossfitted[best]}
    table = pd.DataFrame([r | {"state": s} for s, d in states.items() for r in held_out.measures(d)])
    table = table[["measure", "state", "value", "standard_error", "p_value"]].sort_values(
        "measure", kind="stable", ignore_index=True, key=lambda c: c.map({m: i for i, m in enumerate(c.unique())})
    )
    fitted = held_out.refitted(best)
    if held_out.target.classes is None:
        pits = tuple(np.clip(pit(d, held_out.target.values), 0, 1) for d in states.values())
        return Calibration(fitted, best, table, candidates, pits=pits)
    events = [held_out.event(d) for d in states.values()]
    diagrams = tuple(reliability_diagram(*e, key=key) for e in events)
    bands = tuple(confidence_band(*e, key=key) for e in events)
    return Calibration(fitted, best, table, candidates, diagrams, bands)


class _HeldOut:
    """Predictions for held-out rows, and what recalibrations do to them."""

    def __init__(self, predictive: Any, X: Any, y: Any, num_folds: int):
        self.predictive = as_predictive(predictive)
        self.target = Target.with_classes(y, self.predictive.classes)
        self.rows = len(self.target.values)
        if self.rows < 2 or num_folds < 2:
            raise InputError(f"recalibration needs two rows and two folds, got {self.rows} and {num_folds}")
        self.distribution = self.predictive(X)
        if self.distribution.batch_shape != (self.rows,):
            raise InputError(f"{self.rows} outcomes for {self.distribution.batch_shape[0]} predictions: give one each")
        if self.target.classes is None:
            self.distribution = through_rounding_cells(self.distribution)
            ranking = self.target.values
        else:
            # Dealt out like cards in order of label and probability, so that all folds are alike.
            probs = np.asarray(self.distribution.probs, np.float64)
            ranking = probs.max(1) + 2 * self.target.values
        self.fold = np.empty(self.rows, int)
        self.fold[np.argsort(ranking, kind="stable")] = np.arange(self.rows) % min(num_folds, self.rows)

    def methods(self, method: str) -> tuple[str, ...]:
        """What is tried: one, or those of `auto`."""
        classes = self.target.classes
        kind = "regression" if classes is None else "two" if len(classes) == 2 else "many"
        known = _AUTO["regression"] if classes is None else ("none", *METHODS)
        if method == "auto":
            return _AUTO[kind]
        if method not in known or (kind == "many" and method in ("platt", "beta")):
            left = [m for m in known if kind != "many" or m not in ("platt", "beta")]
            raise InputError(f"no recalibration {method!r} for these predictions: use auto, {', '.join(left)}")
        return (method,)

    def fitted(self, method: str, rows: Any) -> Any:
        """The map learned on some rows."""
        y = self.target.values[rows]
        if method == "none":
            return None
        if method == "quantile_map":
            return QuantileMap.fit(np.clip(pit(take_rows(self.distribution, rows), y), 0, 1))
        return METHODS[method].fit(np.asarray(self.distribution.probs)[rows], y.astype(int))

    def refitted(self, method: str) -> RecalibratedPredictive:
        """The predictive with the map learned on all rows."""
        inner = self.predictive
        return RecalibratedPredictive(
            inner, self.fitted(method, np.arange(self.rows)), inner.table, inner.classes, method
        )

    def crossfitted(self, method: str) -> Distribution:
        """All rows, each mapped by what the other folds taught."""
        if method == "none":
            return self.distribution
        parts = [np.flatnonzero(self.fold == f) for f in np.unique(self.fold)]
        maps = [self.fitted(method, np.flatnonzero(self.fold != f)) for f in np.unique(self.fold)]
        pieces = [_moved(m, take_rows(self.distribution, p)) for m, p in zip(maps, parts, strict=True)]
        return take_rows(concatenate(pieces), np.argsort(np.concatenate(parts)))

    def scores(self, distribution: Distribution) -> Float[np.ndarray, " rows"]:
        """Log scores; certainty that was wrong counts as a probability of 1e-12, lest a mean be infinite."""
        return np.maximum(log_score(distribution, self.target.values, self.target.step), np.log(1e-12))

    def event(self, distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and outcomes of one event: the second of two classes, or being right about the likeliest."""
        probs, labels = np.asarray(distribution.probs, np.float64), self.target.values.astype(int)
        if probs.shape[1] == 2:
            return np.clip(probs[:, 1], 0, 1), (labels == 1).astype(float)
        return np.clip(probs.max(1), 0, 1), (probs.argmax(1) == labels).astype(float)

    def measures(self, distribution: Distribution) -> list[dict[str, Any]]:
        """Calibration errors and the mean log score, with standard errors, as rows of a table."""
        score, found = self.scores(distribution), {}
        found["log_score"] = (score.mean(), score.std(ddof=1) / np.sqrt(len(score)), np.nan)
        if self.target.classes is None:
            found["pit_error"] = (*pit_calibration_error(np.clip(pit(distribution, self.target.values), 0, 1)), np.nan)
        else:
            probs, labels = np.asarray(distribution.probs, np.float64), self.target.values.astype(int)
            test = kolmogorov_smirnov_calibration_error(probs, labels)
            found["kolmogorov_smirnov_error"] = test
            for name, measure in _MEASURES.items():
                error = measure(probs, labels)
                found[name] = (error.value, error.standard_error, np.nan)
        names = ("value", "standard_error", "p_value")
        return [{"measure": m, **dict(zip(names, v, strict=True))} for m, v in found.items()]


_MEASURES: dict[str, Callable] = {
    "debiased_error": debiased_calibration_error,
    "classwise_error": classwise_calibration_error,
    "expected_error": expected_calibration_error,
    "smooth_error": smooth_calibration_error,
}


def _moved(recalibration: Any, distribution: Distribution) -> Distribution:
    if recalibration is None:
        return distribution
    if isinstance(recalibration, QuantileMap):
        distribution = through_rounding_cells(distribution)
    return recalibration(distribution)
