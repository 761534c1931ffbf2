"""The automatic learner: candidates that fit the table and the time, stacked, recalibrated and conformalized."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import concatenate, take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive, fit_rows
from bayeslens.core.mixture import mix
from bayeslens.core.quantiles import quantile
from bayeslens.core.table import Table, Target
from bayeslens.evaluation.calibration import QuantileMap, Temperature, expected_calibration_error, pit_calibration_error
from bayeslens.evaluation.conformal import class_scores, conformal_threshold, prediction_sets
from bayeslens.evaluation.familiarity import Familiarity
from bayeslens.evaluation.scores import LEVELS, brier_loss, crps_loss_from_quantiles, log_score, pit
from bayeslens.learners.result import Audit, audit
from bayeslens.learners.splits import folds, seed_from
from bayeslens.learners.stacking import StackedPredictive, out_of_fold, stacking_weights

_CRPS_ROWS = 2000  # rows on which a cross-validated CRPS is computed: enough for two digits
_REFIT_ROWS = 100_000  # above this, the learner trained on the larger part is kept
_PILOT_ROWS = 20_000


def candidates(target: Target, rows: int) -> list[tuple[str, Learner]]:
    """Learners that suit a target and a number of rows, quickest first.

    >>> [name for name, _ in candidates(Target.from_values(np.arange(50.0) ** 1.5), 50)][0]
    'linear'
    """
    from bayeslens.learners import make
    from bayeslens.learners.ngboost import NGBoost

    y = target.values
    if target.classes is not None:
        names = ["logistic", "ngboost", "deep_ensemble"]
        if rows > _REFIT_ROWS or len(target.classes) > 30:
            names.remove("logistic")
        return [(name, make("linear" if name == "logistic" else name, "classification")) for name in names]
    found = [("linear", make("linear", "regression")), ("ngboost", make("ngboost", "regression"))]
    counts = target.step == 1.0 and y.min() >= 0 and (y.max() <= 300 or (y == 0).mean() > 0.02)
    if counts:
        found.append(("ngboost_negative_binomial", NGBoost(distribution="negative_binomial")))
    if y.min() > 0 and np.log(y).std() > 0.1 and _skewness(y) > 0.5:
        found.append(("ngboost_lognormal", NGBoost(distribution="lognormal")))
    found.append(("gaussian_process", make("gaussian_process", "regression")))
    found.append(("ngboost_student_t", NGBoost(distribution="student_t")))
    found.append(("deep_ensemble", make("deep_ensemble", "regression")))
    return found


def _skewness(y: np.ndarray) -> float:
    return float((((y - y.mean()) / y.std()) ** 3).mean())


def metric_table(
    distribution: Distribution, target: Target, rows: np.ndarray, coverage: float, threshold: float | None = None
) -> dict[str, float]:
    """Log score, CRPS or Brier loss, coverage and width or set size, of predictions for some rows.

    Args:
        distribution: predictions, batch shape (len(rows),).
        target: of all rows.
        rows: which rows were predicted.
        coverage: nominal coverage of the intervals or sets.
        threshold: conformal threshold of sets; None calibrates on these rows themselves.
    """
    y = target.values[rows]
    result = {"log_score": float(log_score(distribution, y, target.step).mean())}
    if target.classes is not None:
        probs = np.asarray(distribution.probs)
        scores = class_scores(probs)[np.arange(len(y)), y.astype(int)]
        edge = conformal_threshold(scores, coverage) if threshold is None else threshold
        sets = prediction_sets(probs, edge)
        error = expected_calibration_error(probs, y)
        return result | {
            "brier": float(brier_loss(probs, y).mean()),
            "coverage": float(sets[np.arange(len(y)), y.astype(int)].mean()),
            "set_size": float(sets.sum(1).mean()),
            "calibration_error": error.value,
            "calibration_error_se": error.standard_error,
        }
    kept = np.linspace(0, len(y) - 1, min(len(y), _CRPS_ROWS)).round().astype(int)
    tail = (1 - coverage) / 2
    values = quantile(take_rows(distribution, kept), np.concatenate([LEVELS, [tail, 1 - tail]]))
    transform = pit(distribution, y)
    error = pit_calibration_error(transform)
    return result | {
        "crps": float(crps_loss_from_quantiles(values[:, :-2], LEVELS, y[kept]).mean()),
        "coverage": float(((transform >= tail) & (transform <= 1 - tail)).mean()),
        "width": float((values[:, -1] - values[:, -2]).mean()),
        "calibration_error": error.value,
        "calibration_error_se": error.standard_error,
    }


class Auto(Learner):
    """Picks candidates, cross-validates, stacks, recalibrates, and keeps what is needed for sets and warnings.

    Args:
        learners: pairs of name and learner; None (default) chooses by table size and target.
        num_folds: of the cross-validation; 5.
        time_budget: seconds after which no further candidate is begun; the two quickest always run.
        coverage: nominal coverage of the leaderboard's intervals and sets.
        task: `"auto"`, `"regression"` or `"classification"`.
    """

    learners: tuple[tuple[str, Learner], ...] | None = None
    num_folds: int = 5
    time_budget: float = 60.0
    coverage: float = 0.9
    task: str = "auto"

    tasks: ClassVar[frozenset[str]] = frozenset({"regression", "classification"})
    takes: ClassVar[frozenset[str]] = frozenset({"weights", "groups", "time"})

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        key: Any,
        weights: Any = None,
        groups: Any = None,
        time: Any = None,
        progress: Callable[[str], None] = lambda message: None,
    ) -> AutoPredictive:
        """See `Learner.fit`; splits respect `groups` and the order of `time`; `progress` is told what runs.

        Raises:
            InputError: no candidate could be fitted.
        """
        target = Target.from_values(y, self.task)
        seed = seed_from(key)
        splits = folds(target, num_folds=self.num_folds, seed=seed, groups=groups, time=time)
        chosen = self.learners or candidates(target, len(target.values))
        tried = _try_all(chosen, X, target, splits, key, weights, self.time_budget, progress)
        done = [t for t in tried if "distribution" in t]
        if not done:
            raise InputError("no learner could be fitted: " + "; ".join(f"{t['learner']}: {t['note']}" for t in tried))
        rows = done[0]["rows"]
        row_weights = None if weights is None else weights[rows]
        matrix, distributions = np.stack([t["scores"] for t in done], 1), [t["distribution"] for t in done]
        mixed = stacking_weights(matrix, row_weights)
        crossfit, held_out = _calibrate_across_folds(distributions, matrix, row_weights, splits, target, rows)
        recalibration, set_scores = _calibrate(mix(distributions, mixed), target, rows)
        heavy = np.flatnonzero((mixed >= 0.005) | (mixed == mixed.max()))
        share = mixed[heavy]
        refit = len(target.values) <= _REFIT_ROWS
        fitted = []
        for number, t in enumerate(done[i] for i in heavy):
            progress(f"fitting {t['learner']} on all rows")
            again = jax.random.fold_in(key, 1000 + number)
            fitted.append(t["refit"](again) if refit else t["fitted"][0])
        board = _leaderboard(tried, done, mixed, crossfit, held_out, target, rows, self.coverage)
        return AutoPredictive(
            table=fitted[0].table,
            stack=StackedPredictive(fitted[0].table, tuple(fitted), share / share.sum(), target.classes),
            recalibration=recalibration,
            set_scores=set_scores,
            familiarity=Familiarity.fit(X, weights=weights),
            leaderboard=tuple(board),
            audit=audit(crossfit, target.values[rows], self.coverage, target.classes),
            n_train=len(target.values),
            target=target.name,
            classes=target.classes,
            step=target.step,
        )


def _try_all(
    chosen: Any, X: Any, target: Target, splits: list, key: Any, weights: Any, budget: float, progress: Callable
) -> list[dict[str, Any]]:
    """Cross-validate every candidate that the time allows; one dict each, with a note where it was left out."""
    start, tried = time.perf_counter(), []
    for number, (name, model) in enumerate(chosen):
        began, entry = time.perf_counter(), {"learner": name, "model": model, "note": ""}
        tried.append(entry)
        remaining = budget - (began - start)
        if number >= 2 and remaining <= 0:
            entry["note"] = f"skipped: the time budget of {budget:.0f} s was used up"
            continue
        progress(f"cross-validating {name}")
        try:
            if number >= 2:
                pilot = _pilot_seconds(model, X, target, splits, key, weights)
                if pilot > remaining:
                    entry["note"] = f"skipped: it would take about {pilot:.0f} s, with {remaining:.0f} s left"
                    continue
            found = out_of_fold(model, X, target, splits, jax.random.fold_in(key, number), weights)
        except InputError as error:
            entry["note"] = f"skipped: {error}"
            continue
        entry |= found._asdict() | {"scores": log_score(found.distribution, target.values[found.rows], target.step)}
        entry["seconds"] = time.perf_counter() - began
    return tried


def _pilot_seconds(model: Learner, X: Any, target: Target, splits: list, key: Any, weights: Any) -> float:
    """What the whole cross-validation would take, from one fit on at most 20,000 rows."""
    train = splits[0][0]
    part = train[:: max(1, len(train) // _PILOT_ROWS)]
    began = time.perf_counter()
    if len(part) < len(train):
        fit_rows(model, X, target, part, key, weights)
        return (time.perf_counter() - began) * len(train) / len(part)
    if len(train) < 1000:
        return 0.0  # too small to be worth a fit of its own
    fit_rows(model, X, target, train, key, weights)
    return (time.perf_counter() - began) * len(splits)


def _calibrate(distribution: Distribution, target: Target, rows: np.ndarray) -> tuple[Any, np.ndarray]:
    """The recalibration learned on held-out rows, and the sorted conformal scores of recalibrated classes."""
    y = target.values[rows]
    if target.classes is None:
        return QuantileMap.fit(np.clip(pit(distribution, y), 0, 1)), np.zeros(0)
    recalibration = Temperature.fit(distribution.probs, y)
    scores = class_scores(recalibration(distribution).probs)[np.arange(len(y)), y.astype(int)]
    return recalibration, np.sort(scores)


def _calibrate_across_folds(
    distributions: list, scores: np.ndarray, row_weights: Any, splits: list, target: Target, rows: np.ndarray
) -> tuple[Distribution, np.ndarray]:
    """What stacking and recalibration predict for rows they did not see: learned on all other folds.

    With a single split, the held-out rows are halved at random. Returns the distributions in the order of `rows`,
    and for classes the sorted conformal scores of all parts.
    """
    part = np.concatenate([np.full(len(test), i) for i, (_, test) in enumerate(splits)])
    if len(splits) == 1:
        part = np.random.default_rng(0).permutation(np.arange(len(rows)) % 2)
    pieces, order, thresholds = [], [], []
    for number in np.unique(part):
        inside, outside = np.flatnonzero(part == number), np.flatnonzero(part != number)
        weights = stacking_weights(scores[outside], None if row_weights is None else row_weights[outside])
        others = mix([take_rows(d, outside) for d in distributions], weights)
        recalibration, set_scores = _calibrate(others, target, rows[outside])
        mixed = mix([take_rows(d, inside) for d in distributions], weights)
        pieces.append(recalibration(mixed))
        order.append(inside)
        thresholds.append(set_scores)
    back = np.argsort(np.concatenate(order))
    return take_rows(concatenate(pieces), back), np.sort(np.concatenate(thresholds))


def _leaderboard(
    tried: list,
    done: list,
    mixed: np.ndarray,
    crossfit: Any,
    set_scores: Any,
    target: Target,
    rows: Any,
    coverage: float,
) -> list[dict[str, Any]]:
    stacked = metric_table(crossfit, target, rows, coverage, _threshold(set_scores, target, coverage))
    total = sum(t["seconds"] for t in done)
    if len(tried) == 1:  # nothing was stacked, but it was recalibrated
        return [{"learner": done[0]["learner"], **stacked, "seconds": round(total, 2), "weight": 1.0, "note": ""}]
    board = [{"learner": "stack", **stacked, "seconds": round(total, 2), "weight": 1.0, "note": ""}]
    shares = {id(t): float(w) for t, w in zip(done, mixed, strict=True)}
    for t in tried:
        entry: dict[str, Any] = {"learner": t["learner"]}
        if id(t) in shares:
            entry |= metric_table(t["distribution"], target, rows, coverage)
            entry |= {"seconds": round(t["seconds"], 2), "weight": round(shares[id(t)], 4)}
        board.append(entry | {"note": t["note"]})
    return sorted(board, key=lambda e: -e.get("log_score", -np.inf))


def _threshold(set_scores: np.ndarray, target: Target, coverage: float) -> float | None:
    return None if target.classes is None else conformal_threshold(set_scores, coverage)


class AutoPredictive(Predictive):
    """A stack of predictives, recalibrated as one distribution, with what `predict` needs beside it."""

    table: Table
    stack: StackedPredictive
    recalibration: QuantileMap | Temperature
    set_scores: Float[np.ndarray, " scores"]
    familiarity: Familiarity
    leaderboard: tuple
    audit: Audit
    n_train: int
    target: str
    classes: tuple | None = None
    step: float | None = None

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """The stack's members, before recalibration."""
        return self.stack.members(x)

    def __call__(self, x: Any) -> Distribution:
        """The recalibrated mixture."""
        return self.recalibration(self.stack(x))

    def prediction_sets(self, distribution: Distribution, coverage: float) -> Bool[np.ndarray, "rows classes"]:
        """Conformal sets of classes for predictions of this model."""
        return prediction_sets(np.asarray(distribution.probs), conformal_threshold(self.set_scores, coverage))
