"""Conformal prediction over many resplits of real tables: coverage against each theorem, sizes, and time against peers.

For each table a base model is fitted once, on a third of the rows; the others are split anew into calibration and test
rows, which makes calibration and test rows exchangeable, so that the theorems hold for the mean over resplits exactly
and what deviates is chance (two standard errors are allowed) or a fault. Refitting methods fit ridge regression anew.
The tables are the first four for regression and the first two for classification of `benchmarks/tables.py`.

Run: python -m benchmarks.evaluation_conformal [--resplits 1000] [--tables 6]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import jax
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge

from bayeslens.core.table import Table, Target
from bayeslens.evaluation.conformal import (
    class_scores,
    conformal_threshold,
    cqr_scores,
    mondrian_thresholds,
    prediction_sets,
)
from bayeslens.evaluation.conformal_calibration import conformal
from bayeslens.evaluation.conformal_resampling import (
    cross_conformal_guarantee,
    cross_conformal_intervals,
    full_conformal_ridge,
)
from bayeslens.evaluation.likelihood_ratio_quantile_regression import LikelihoodRatioQuantileRegression
from benchmarks.record import record
from benchmarks.tables import tables

COVERAGE, FOLDS = 0.9, 10
TIMED_ROWS, TIMED_RUNS = 2000, 9
SLOW_SHARE = 20  # methods that refit for every row run on one of so many resplits


class Stored(RegressorMixin, BaseEstimator):
    """An estimator without cost: it predicts the first column."""

    def fit(self, X: Any, y: Any) -> Stored:
        """Nothing."""
        self.is_fitted_ = True
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The first column."""
        return X[:, 0]


def ridge_fold_predictions(x: np.ndarray, y: np.ndarray, new: np.ndarray, folds: np.ndarray) -> tuple:
    """Predictions of the models of all folds at new rows, and absolute errors at the rows that each left out."""
    predictions, residuals = np.empty((folds.max() + 1, len(new))), np.empty(len(y))
    for k in range(len(predictions)):
        held = folds == k
        model = Ridge().fit(x[~held], y[~held])
        predictions[k], residuals[held] = model.predict(new), np.abs(y[held] - model.predict(x[held]))
    return predictions, residuals


def regression(x: np.ndarray, y: np.ndarray, resplits: int, rng: np.random.Generator) -> dict:
    """Coverage and width of every method over resplits of one table."""
    order = rng.permutation(len(y))
    base, rest = order[: len(y) // 3], order[len(y) // 3 :]
    center = Ridge().fit(x[base], y[base]).predict(x)
    low, high = (
        HistGradientBoostingRegressor(loss="quantile", quantile=q, max_iter=50, random_state=0)
        .fit(x[base], y[base])
        .predict(x)
        for q in (0.05, 0.95)
    )
    spread = x[rest].std(0)
    group = (x[:, spread.argmax()] > np.median(x[rest][:, spread.argmax()])).astype(int)
    found: dict[str, list] = {}

    def keep(name: str, inside: np.ndarray, width: np.ndarray, bound: float = COVERAGE) -> None:
        found.setdefault(name, []).append((inside.mean(), width.mean(), bound))

    for i in range(resplits):
        mixed = rng.permutation(rest)
        calibration, test = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
        scores = np.abs(y - center)
        edge = conformal_threshold(scores[calibration], COVERAGE)
        keep("split", scores[test] <= edge, np.full(len(test), 2 * edge))
        outside = cqr_scores(low, high, y)
        edge = conformal_threshold(outside[calibration], COVERAGE)
        keep("cqr", outside[test] <= edge, np.maximum(high[test] - low[test] + 2 * edge, 0))
        edges = mondrian_thresholds(scores[calibration], group[calibration], COVERAGE)
        for g, edge in edges.items():
            of_group = test[group[test] == g]
            keep(f"mondrian, group {g}", scores[of_group] <= edge, np.full(len(of_group), 2 * edge))
        few = calibration[: max(30, len(calibration) // 2)]
        bounds = full_conformal_ridge(x[few], y[few], x[test], COVERAGE)
        keep("full", (bounds[0] <= y[test]) & (y[test] <= bounds[1]), bounds[1] - bounds[0])
        refits = [("cv+", FOLDS)] + ([("jackknife+", len(few))] if i % SLOW_SHARE == 0 else [])
        for name, num_folds in refits:
            rows = few if name == "jackknife+" else calibration
            folds = rng.permutation(np.arange(len(rows)) % num_folds)
            predictions, residuals = ridge_fold_predictions(x[rows], y[rows], x[test], folds)
            bounds = cross_conformal_intervals(predictions, residuals, folds, COVERAGE)
            bound = cross_conformal_guarantee(len(rows), num_folds, COVERAGE)
            keep(name, (bounds[0] <= y[test]) & (y[test] <= bounds[1]), bounds[1] - bounds[0], bound)
        if i % SLOW_SHARE == 0:
            for name, share in shifted(x[rest], scores[rest], rng).items():
                keep(f"shifted, {name}", np.array([share]), np.zeros(1), 0.0)
    return {name: summary(np.array(v), len(rest) // 2, name) for name, v in found.items()}


def shifted(x: np.ndarray, scores: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Target coverage where the feature that the scores depend on most is above its median in the target."""
    ranks = np.argsort(np.argsort(scores))
    dependence = [abs(np.corrcoef(column, ranks)[0, 1]) if column.std() > 0 else 0.0 for column in x.T]
    column = x[:, int(np.nanargmax(dependence))]
    inside = rng.random(len(x)) < 1 / (1 + np.exp(1.5 * (column - column.mean()) / column.std()))
    target = rng.permutation(np.flatnonzero(~inside))
    unlabelled, test = target[: len(target) // 2], target[len(target) // 2 :]
    fitted = LikelihoodRatioQuantileRegression.fit(x[inside], scores[inside], x[unlabelled], COVERAGE)
    return {
        "split": float((scores[test] <= conformal_threshold(scores[inside], COVERAGE)).mean()),
        "LR-QR": float((scores[test] <= fitted(x[test])).mean()),
    }


def classification(x: np.ndarray, labels: np.ndarray, resplits: int, rng: np.random.Generator) -> dict:
    """Coverage and size of the sets over resplits of one table."""
    order = rng.permutation(len(labels))
    base, rest = order[: len(labels) // 3], order[len(labels) // 3 :]
    probs = LogisticRegression(C=0.1, max_iter=2000).fit(x[base], labels[base]).predict_proba(x)
    own = np.arange(len(labels)), labels
    adaptive, penalized = class_scores(probs), class_scores(probs, rank_penalty=0.1)
    found: dict[str, list] = {}
    for _ in range(resplits):
        mixed = rng.permutation(rest)
        calibration, test = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
        for name, scores in (("aps", adaptive), ("raps", penalized), ("lac", 1 - probs)):
            edge = conformal_threshold(scores[own][calibration], COVERAGE)
            sets = prediction_sets(probs[test], edge) if name == "aps" else scores[test] <= edge
            inside = sets[np.arange(len(test)), labels[test]]
            found.setdefault(name, []).append((inside.mean(), sets.sum(1).mean(), COVERAGE))
    return {name: summary(np.array(v), len(rest) // 2, name) for name, v in found.items()}


def summary(values: np.ndarray, rows: int, name: str) -> dict:
    """Mean coverage with its standard error over resplits, and whether the theorem's bounds hold within two of them."""
    coverage, size, bound = values.T
    error = coverage.std(ddof=1) / np.sqrt(len(coverage)) if len(coverage) > 1 else np.inf
    result = {
        "coverage": round(float(coverage.mean()), 4),
        "standard_error": round(float(error), 5),
        "size": round(float(size.mean()), 4),
        "bound": round(float(bound.mean()), 4),
        "at_least_bound": bool(coverage.mean() >= bound.mean() - 2 * error),
        "resplits": len(coverage),
    }
    if name == "split":  # wants scores without ties, which plain errors of a regression are
        result["at_most_bound"] = bool(coverage.mean() <= COVERAGE + 1 / (rows + 1) + 2 * error)
    return result


def timed(contestants: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of each, in turns: median, least and largest of the runs after one to warm up."""
    seconds: dict[str, list] = {name: [] for name in contestants}
    for run in range(TIMED_RUNS + 1):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            if run:
                seconds[name].append(1e3 * (time.perf_counter() - began))
    return {n: {"median": float(np.median(s)), "least": min(s), "largest": max(s)} for n, s in seconds.items()}


def speed(rng: np.random.Generator) -> dict:
    """Time without the base model, and sizes, against MAPIE and crepes."""
    from mapie.regression import CrossConformalRegressor, SplitConformalRegressor

    n = TIMED_ROWS
    x, new = rng.normal(size=(n, 1)), rng.normal(size=(n, 1))
    y = x[:, 0] + rng.normal(size=n)
    widths = {}

    def ours_split() -> None:
        found = conformal(x[:, 0], None, y)(new[:, 0])
        widths["ours, split"] = float((found.upper - found.lower).mean())

    def ours_arrays() -> None:
        edge = conformal_threshold(np.abs(y - x[:, 0]), COVERAGE)
        widths["ours on arrays, split"] = float((new[:, 0] + edge - (new[:, 0] - edge)).mean())

    def mapie_split() -> None:
        model = SplitConformalRegressor(Stored().fit(x, y), confidence_level=COVERAGE, prefit=True).conformalize(x, y)
        _, bounds = model.predict_interval(new)
        widths["mapie, split"] = float((bounds[:, 1, 0] - bounds[:, 0, 0]).mean())

    model = conformal(Stored(), x, y, method="cv+", num_folds=FOLDS, key=jax.random.key(0))
    theirs = CrossConformalRegressor(Stored(), confidence_level=COVERAGE, method="plus", cv=FOLDS)
    theirs.fit_conformalize(x, y)

    def ours_cross() -> None:
        found = model(new)
        widths["ours, cv+"] = float((found.upper - found.lower).mean())

    def mapie_cross() -> None:
        _, bounds = theirs.predict_interval(new)
        widths["mapie, cv+"] = float((bounds[:, 1, 0] - bounds[:, 0, 0]).mean())

    contestants = {"ours, split": ours_split, "ours on arrays, split": ours_arrays, "mapie, split": mapie_split}
    contestants |= {"ours, cv+": ours_cross, "mapie, cv+": mapie_cross}
    try:
        from crepes import ConformalRegressor
    except ImportError:
        print("crepes is not installed: its time is not compared")
    else:

        def crepes_split() -> None:
            bounds = ConformalRegressor().fit(y - x[:, 0]).predict_int(new[:, 0], confidence=COVERAGE)
            widths["crepes, split"] = float((bounds[:, 1] - bounds[:, 0]).mean())

        contestants["crepes, split"] = crepes_split
    taken = timed(contestants)
    result: dict[str, Any] = {"milliseconds": taken, "width": widths, "ratio": {}}
    for name in contestants:
        peer, kind = name.split(", ")
        if not peer.startswith("ours"):
            ours = taken[f"ours, {kind}"]
            ratio = taken[name]["median"] / ours["median"]
            least, largest = taken[name]["least"] / ours["largest"], taken[name]["largest"] / ours["least"]
            found = {"time over ours": ratio, "least": least, "largest": largest}
            result["ratio"][name] = {k: round(v, 2) for k, v in found.items()}
    return result


def main(argv: list[str] | None = None) -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resplits", type=int, default=1000)
    parser.add_argument("--tables", type=int, default=6)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    rng = np.random.default_rng(0)
    of_task = {"regression": [], "classification": []}
    for name, (_, _, task) in tables().items():
        of_task[task].append(name)
    names = (of_task["regression"][:4] + of_task["classification"][:2])[: arguments.tables]
    results: dict[str, Any] = {"tables": {}, "speed": speed(rng)}
    print(json.dumps(results["speed"], indent=1), flush=True)
    for name in names:
        frame, column, task = tables()[name]
        target = Target.from_values(frame[column], task)
        features = frame.drop(columns=column)
        x = np.asarray(Table.from_data(features).dense(features), np.float64)
        run = regression if task == "regression" else classification
        y = target.values if task == "regression" else target.values.astype(int)
        results["tables"][name] = run(x, y, arguments.resplits, rng)
        print(name, json.dumps(results["tables"][name], indent=1), flush=True)
    lines = [line for table in results["tables"].values() for line in table.values()]
    results["theorems hold"] = all(line["at_least_bound"] and line.get("at_most_bound", True) for line in lines)
    pairs = [(t["shifted, split"], t["shifted, LR-QR"]) for t in results["tables"].values() if "shifted, split" in t]
    broken = [(s, q) for s, q in pairs if abs(s["coverage"] - COVERAGE) > 0.03]
    results["LR-QR nearer, in points, where the shift breaks split"] = [
        round(100 * (abs(s["coverage"] - COVERAGE) - abs(q["coverage"] - COVERAGE)), 2) for s, q in broken
    ]
    for key in ("theorems hold", "LR-QR nearer, in points, where the shift breaks split"):
        print(f"{key}: {results[key]}")
    if not arguments.no_record:
        record("evaluation_conformal", results)


if __name__ == "__main__":
    main()
