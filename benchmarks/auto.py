"""`auto` against the peers on every table of `tables.py`: mean ranks by log score and by CRPS or Brier, and coverage.

    python benchmarks/auto.py [--tables NAME ...] [--repeats 5] [--fresh]

Everyone gets the same rows; peers that need numbers get one-hot categories and median imputation, fitted on the
training rows. Results are kept per table and repeat, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from record import record, write_json
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from tables import tables

from bayeslens.core.quantiles import quantile
from bayeslens.core.table import Target
from bayeslens.evaluation.scores import LEVELS, brier_loss, crps_loss_from_quantiles, log_score

RESULTS = Path(__file__).parent / "results"
FLOOR = 1e-3  # everyone's class probabilities are clipped alike
COVERAGE = 0.9


def encoder(frame: pd.DataFrame):
    """One-hot and imputed features for peers, standardized."""
    numeric = frame.select_dtypes("number").columns.tolist()
    other = [c for c in frame.columns if c not in numeric]
    return make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numeric),
        (OneHotEncoder(handle_unknown="ignore", max_categories=30, sparse_output=False), other),
    )


def ours(train, y, test, seed):
    from bayeslens.learners.auto import Auto

    predictive = Auto().fit(train, y, key=jax.random.key(seed))
    return predictive(test)


def ngboost_regression(train, y, test, seed):
    import numpyro.distributions as dist
    from ngboost import NGBRegressor

    model = NGBRegressor(verbose=False, random_state=seed).fit(train, y)
    found = model.pred_dist(test)
    return dist.Normal(np.asarray(found.loc), np.asarray(found.scale))


def gaussian_process(train, y, test, seed):
    import numpyro.distributions as dist
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel() * RBF(np.ones(train.shape[1])) + WhiteKernel()
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed).fit(train, y)
    mean, std = model.predict(test, return_std=True)
    return dist.Normal(mean, np.maximum(std, 1e-9))


def quantile_boosting(train, y, test, seed):
    from sklearn.ensemble import HistGradientBoostingRegressor

    levels = np.array([0.01, *np.arange(0.05, 0.96, 0.05), 0.99])
    found = [
        HistGradientBoostingRegressor(loss="quantile", quantile=q, early_stopping=False, random_state=seed)
        .fit(train, y)
        .predict(test)
        for q in levels
    ]
    ordered = np.sort(np.stack(found, 1), 1)
    return np.stack([np.interp(LEVELS, levels, row) for row in ordered])


class Forest:
    """A random forest whose leaves give conditional quantiles (Meinshausen 2006)."""

    def __init__(self, x, y, seed):
        from sklearn.ensemble import RandomForestRegressor

        self.forest = RandomForestRegressor(200, min_samples_leaf=5, random_state=seed).fit(x, y)
        self.leaves, self.order, self.known = self.forest.apply(x), np.argsort(y), {}
        self.y = y[self.order]

    def masses(self, x):
        """Cumulative leaf weights of each row over the sorted training targets, kept for the next level."""
        key = x.tobytes()
        if key not in self.known:
            found, weights = self.forest.apply(x), np.zeros((len(x), len(self.y)))
            for tree in range(found.shape[1]):
                same = found[:, tree][:, None] == self.leaves[:, tree]
                weights += same / np.maximum(same.sum(1, keepdims=True), 1)
            self.known[key] = np.cumsum(weights[:, self.order], 1) / weights.sum(1, keepdims=True)
        return self.known[key]


class ForestQuantile:
    """One quantile of a forest, in the form that MAPIE takes as an already fitted model."""

    def __init__(self, forest, q):
        self.forest, self.q, self.fitted_ = forest, q, True

    def fit(self, X, y):
        return self

    def predict(self, X):
        return self.forest.y[np.argmax(self.forest.masses(X) >= self.q - 1e-12, axis=1)]


def conformal_forest(train, y, test, seed):
    from mapie.regression import ConformalizedQuantileRegressor
    from sklearn.model_selection import train_test_split

    fit_x, cal_x, fit_y, cal_y = train_test_split(train, y, test_size=0.3, random_state=seed)
    forest = Forest(fit_x, fit_y, seed)
    result = np.empty((len(test), len(LEVELS)))
    for i, q in enumerate(LEVELS[:50]):
        parts = [ForestQuantile(forest, level) for level in (q, 1 - q, 0.5)]
        if q == 0.5:
            result[:, i] = parts[2].predict(test)
            continue
        model = ConformalizedQuantileRegressor(parts, confidence_level=1 - 2 * q, prefit=True)
        try:
            _, intervals = model.conformalize(cal_x, cal_y).predict_interval(test)
            result[:, i], result[:, 98 - i] = intervals[:, 0, 0], intervals[:, 1, 0]
        except ValueError:  # MAPIE refuses extreme levels for so few rows: the forest's own quantiles
            result[:, i], result[:, 98 - i] = parts[0].predict(test), parts[1].predict(test)
    return np.sort(result, 1)


def ngboost_classes(train, y, test, seed):
    from ngboost import NGBClassifier
    from ngboost.distns import k_categorical

    model = NGBClassifier(Dist=k_categorical(int(y.max()) + 1), verbose=False, random_state=seed)
    return model.fit(train, y.astype(int)).predict_proba(test)


def calibrated(make):
    def run(train, y, test, seed):
        from sklearn.calibration import CalibratedClassifierCV

        return CalibratedClassifierCV(make(seed), cv=5).fit(train, y).predict_proba(test)

    return run


def peers(task: str) -> dict:
    """Name -> function of (training features, target, test features, seed)."""
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    if task == "regression":
        return {
            "ngboost": ngboost_regression,
            "gaussian process": gaussian_process,
            "quantile boosting": quantile_boosting,
            "conformal forest": conformal_forest,
        }
    return {
        "ngboost": ngboost_classes,
        "boosting": calibrated(lambda seed: HistGradientBoostingClassifier(random_state=seed)),
        "forest": calibrated(lambda seed: RandomForestClassifier(300, random_state=seed)),
        "logistic": calibrated(lambda seed: LogisticRegression(max_iter=2000)),
    }


def scores(answer, target: Target, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Per row: log score (where there is a density), CRPS from 99 quantiles or Brier, and whether 90% covers."""
    y = target.values[rows]
    if target.classes is not None:
        probs = np.asarray(answer.probs if hasattr(answer, "probs") else answer)
        probs = np.clip(probs, FLOOR, 1)
        probs /= probs.sum(1, keepdims=True)
        return {"log_score": np.log(probs[np.arange(len(y)), y.astype(int)]), "loss": brier_loss(probs, y)}
    result = {}
    if isinstance(answer, np.ndarray):
        values = answer
        result["covered"] = (values[:, 4] <= y) & (y <= values[:, 94])
    else:
        result["log_score"] = np.maximum(log_score(answer, y, target.step), -50.0)
        values = quantile(answer, LEVELS)
        bounds = quantile(answer, [0.05, 0.95])
        result["covered"] = (bounds[:, 0] <= y) & (y <= bounds[:, 1])
    return result | {"loss": crps_loss_from_quantiles(values, LEVELS, y)}


def run_table(name, frame, column, task, repeat, num_folds, only_ours):
    """Out-of-fold means of everyone on one table."""
    target = Target.from_values(frame[column], task)
    features = frame.drop(columns=column)
    splitter = (StratifiedKFold if target.classes else KFold)(num_folds, shuffle=True, random_state=repeat)
    methods = {"auto": ours} | ({} if only_ours else peers(task))
    collected = {m: [] for m in methods}
    seconds = dict.fromkeys(methods, 0.0)
    for train, test in splitter.split(features, target.values):
        encode = encoder(features.iloc[train])
        dense = encode.fit_transform(features.iloc[train]), encode.transform(features.iloc[test])
        for method, run in methods.items():
            began = time.perf_counter()
            if method == "auto":
                answer = run(features.iloc[train], target.rows(train), features.iloc[test], repeat)
            else:
                answer = run(dense[0], target.values[train], dense[1], repeat)
            seconds[method] += time.perf_counter() - began
            collected[method].append(scores(answer, target, test))
    result = {}
    for method, parts in collected.items():
        means = {k: float(np.concatenate([p[k] for p in parts]).mean()) for k in parts[0]}
        result[method] = means | {"seconds": round(seconds[method], 2)}
    print(
        f"{name:24s} repeat {repeat}: "
        + "  ".join(f"{m} {r.get('log_score', float('nan')):.3f}/{r['loss']:.4g}" for m, r in result.items()),
        flush=True,
    )
    return result


def mean_ranks(by_table: dict, key: str, larger_is_better: bool) -> dict[str, float]:
    """Mean rank of each method over tables, separately where tasks have other methods."""
    ranks: dict[str, list] = {}
    for methods in by_table.values():
        values = pd.Series({m: r[key] for m, r in methods.items() if key in r})
        for method, rank in values.rank(ascending=not larger_is_better).items():
            ranks.setdefault(method, []).append(rank)
    return {m: round(float(np.mean(r)), 3) for m, r in sorted(ranks.items(), key=lambda kv: np.mean(kv[1]))}


def summarize(kept: dict) -> dict:
    """Ranks from the first repeat; coverage pooled over all."""
    found, summary = tables(), {}
    for task in ("regression", "classification"):
        first = {n: kept[f"{n}#0"] for n, (_, _, t) in found.items() if t == task and f"{n}#0" in kept}
        if not first:
            continue
        summary[task] = {
            "tables": len(first),
            "mean_rank_log_score": mean_ranks(first, "log_score", True),
            "mean_rank_loss": mean_ranks(first, "loss", False),
        }
        if task == "regression":
            names = {k.split("#")[0] for k in kept} & set(first)
            cover = {n: np.mean([v["auto"]["covered"] for k, v in kept.items() if k.split("#")[0] == n]) for n in names}
            summary[task]["coverage_mean"] = round(float(np.mean(list(cover.values()))), 4)
            summary[task]["coverage_least"] = min((round(float(v), 4), n) for n, v in cover.items())
            summary[task]["repeats"] = min(sum(k.split("#")[0] == n for k in kept) for n in names)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="*")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of auto alone after the first, for coverage")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run kept")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    progress_file = RESULTS / "auto_by_table.json"
    if arguments.fresh:
        progress_file.unlink(missing_ok=True)
    kept = json.loads(progress_file.read_text()) if progress_file.exists() else {}
    for repeat in range(arguments.repeats):
        for name, (frame, column, task) in tables().items():
            if (arguments.tables and name not in arguments.tables) or f"{name}#{repeat}" in kept:
                continue
            if repeat and task == "classification":
                continue
            found = run_table(name, frame, column, task, repeat, arguments.folds, repeat > 0)
            # Another process may have worked on other tables meanwhile.
            kept |= json.loads(progress_file.read_text()) if progress_file.exists() else {}
            kept[f"{name}#{repeat}"] = found
            write_json(progress_file, kept)
    summary = summarize(kept)
    print(json.dumps(summary, indent=1))
    record("auto", summary)


if __name__ == "__main__":
    main()
