"""The main job: a probability for every row of a table."""

from __future__ import annotations

import json
import time as clock
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf, mean_and_variance, quantile
from bayeslens.core.table import Target, guess_task
from bayeslens.evaluation.scores import log_score
from bayeslens.evaluation.uncertainty import entropy_split, variance_split
from bayeslens.learners.auto import Auto, AutoPredictive, metric_table
from bayeslens.learners.dependence import partial_dependence
from bayeslens.learners.result import Prediction, audit
from bayeslens.learners.splits import holdout_rows

QUANTILE_LEVELS = np.round(np.arange(0.05, 0.96, 0.05), 2)


def predict_table(
    frame: pd.DataFrame | None,
    target: str,
    *,
    test: pd.DataFrame | None = None,
    task: str = "auto",
    learner: Any = "auto",
    coverage: float = 0.9,
    above: Sequence[float] = (),
    groups: str | None = None,
    time: str | None = None,
    weights: str | None = None,
    model: AutoPredictive | None = None,
    time_budget: float = 60.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> Prediction:
    """Fit on a table and predict every row of another, or of a held-out fifth. See `bayeslens.predict`."""
    started = clock.perf_counter()
    _check_options(coverage, above, task)
    warnings: list[str] = []
    if model is None:
        frame, test, warnings = _prepare(frame, target, test, task, groups, time, weights, seed)
        model, rows = _fit(frame, target, task, learner, coverage, groups, time, weights, time_budget, seed, progress)
        warnings += model.table.warnings
        if task == "auto" and model.classes is None and frame[target].nunique() <= 10:
            warnings.append(
                f"target {target!r} has {frame[target].nunique()} different numbers and is treated as a quantity; "
                "for classes use task='classification'"
            )
    else:
        if test is None:
            raise InputError("a loaded model needs a test table: give --test NEW.csv")
        rows = 0
    progress("predicting")
    return _answer(model, test, target, coverage, above, seed, rows, warnings, started)


def _check_options(coverage: float, above: Sequence[float], task: str) -> None:
    if not 0 < coverage < 1:
        raise InputError(f"coverage must lie strictly between 0 and 1, got {coverage}")
    if not all(np.isfinite(above)):
        raise InputError(f"thresholds of `above` must be finite numbers, got {list(above)}")
    if task not in ("auto", "regression", "classification"):
        raise InputError(f"unknown task {task!r}: use auto, regression or classification")


def _prepare(
    frame: pd.DataFrame, target: str, test: Any, task: str, groups: Any, time: Any, weights: Any, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The training rows with a known target, and the test rows."""
    warnings = []
    frame = frame.rename(columns=str)
    repeated = frame.columns[frame.columns.duplicated()].unique().tolist()
    if repeated:
        raise InputError(f"duplicate column names {repeated}: rename them so that each name stands once")
    if len(frame) == 0:
        raise InputError("the table has no rows")
    for role, name in (("target", target), ("groups", groups), ("time", time), ("weights", weights)):
        if name is not None and name not in frame.columns:
            raise InputError(f"{role} column {name!r} is not in the table; it has {_listed(frame.columns)}")
    unknown = frame[target].isna()
    if unknown.all():
        raise InputError(f"target {target!r} has only missing values")
    if unknown.any():
        warnings.append(f"{int(unknown.sum())} rows without a value of {target!r} were left out of training")
        frame = frame[~unknown]
    if frame[target].nunique() < 2:
        raise InputError(
            f"target {target!r} has one value only, {frame[target].iloc[0]!r}: there is nothing to predict"
        )
    if len(frame.columns) == 1:
        raise InputError(f"the table has no column besides the target {target!r}: is the delimiter right?")
    if test is None:
        kind = guess_task(frame[target]) if task == "auto" else task
        encoded = Target.from_values(frame[target], kind)
        labels, moments = _column(frame, groups, "groups"), _column(frame, time, "time")
        train, held = holdout_rows(len(frame), seed=seed, target=encoded, groups=labels, time=moments)
        return frame.iloc[train], frame.iloc[held], warnings
    if len(test) == 0:
        raise InputError("the test table has no rows")
    return frame, test.rename(columns=str), warnings


def _listed(names: Any) -> str:
    names = [repr(str(n)) for n in names]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def _column(frame: pd.DataFrame, name: str | None, role: str) -> np.ndarray | None:
    """A grouping or time column as sortable codes."""
    if name is None:
        return None
    if frame[name].isna().any():
        raise InputError(f"{role} column {name!r} has missing values: fill or drop those rows")
    if role == "groups":
        return pd.factorize(frame[name])[0]
    series = frame[name]
    if not pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_datetime64_any_dtype(series):
        parsed = pd.to_datetime(series, errors="coerce", format="mixed")
        if parsed.isna().any():
            raise InputError(
                f"time column {name!r} holds {series[parsed.isna()].iloc[0]!r}, which is neither number nor date"
            )
        series = parsed
    return series.rank(method="dense").to_numpy()


def _fit(
    frame: pd.DataFrame,
    target: str,
    task: str,
    learner: Any,
    coverage: float,
    groups: Any,
    time: Any,
    weights: Any,
    time_budget: float,
    seed: int,
    progress: Callable,
) -> tuple[AutoPredictive, int]:
    encoded = Target.from_values(frame[target], guess_task(frame[target]) if task == "auto" else task)
    features = frame.drop(columns=[c for c in (target, groups, weights) if c is not None])
    automatic = Auto(learners=_named(learner, encoded), time_budget=time_budget, coverage=coverage)
    row_weights = None
    if weights is not None:
        from bayeslens.learners.linear import check_weights

        row_weights = check_weights(pd.to_numeric(frame[weights], errors="coerce").to_numpy(float), len(frame))
    model = automatic.fit(
        features,
        encoded,
        key=jax.random.key(seed),
        weights=row_weights,
        groups=_column(frame, groups, "groups"),
        time=_column(frame, time, "time"),
        progress=progress,
    )
    return model, len(frame)


def _named(learner: Any, target: Target) -> tuple | None:
    """The learners that a name or an instance stands for; None is automatic."""
    from bayeslens.learners import LEARNERS, make

    if not isinstance(learner, str):
        return ((type(learner).__name__, learner),)
    if learner == "auto":
        return None
    task = "regression" if target.classes is None else "classification"
    if learner not in LEARNERS:
        raise InputError(f"unknown learner {learner!r}: use auto, {', '.join(sorted(LEARNERS))}")
    return ((learner, make(learner, task)),)


def _answer(
    model: AutoPredictive,
    test: pd.DataFrame,
    target: str,
    coverage: float,
    above: Sequence[float],
    seed: int,
    rows: int,
    warnings: list[str],
    started: float,
) -> Prediction:
    table = model.familiarity.table
    distribution = model(test)
    known = None
    if target in test.columns and not test[target].isna().all():
        known = _known_target(test[target], model)
    if model.classes is None:
        added = _regression_columns(model, test, distribution, coverage, above, known)
    else:
        added = _class_columns(model, test, distribution, coverage)
    distance = model.familiarity.distance(test)
    added["unfamiliar"] = model.familiarity.unfamiliar(test, distance)
    clash = [c for c in added if c in test.columns]
    if clash:
        warnings.append(f"the columns {clash} of the test table were replaced by predictions of the same name")
    frame = pd.concat([test.drop(columns=clash), pd.DataFrame(added, index=test.index)], axis=1)
    metrics, metrics_from, checked = _metrics(model, distribution, known, coverage)
    return Prediction(
        task=model.task,
        target=target,
        learner=_learner_name(model),
        coverage=coverage,
        frame=frame,
        predictive=model,
        metrics=metrics,
        metrics_from=metrics_from,
        leaderboard=list(model.leaderboard),
        n_train=rows or int(model.n_train),
        n_test=len(test),
        seconds=round(clock.perf_counter() - started, 2),
        classes=model.classes,
        warnings=tuple(dict.fromkeys(warnings)),
        unfamiliarity=distance,
        audit=checked,
        dependence=partial_dependence(model, test[[n for n in table.names if n in test.columns]], seed=seed),
    )


def _learner_name(model: AutoPredictive) -> str:
    used = [e["learner"] for e in model.leaderboard if e.get("weight", 0) >= 0.005 and e["learner"] != "stack"]
    return used[0] if len(used) == 1 else "stack of " + ", ".join(used)


def _known_target(series: pd.Series, model: AutoPredictive) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers whose target is known, and its encoded values."""
    rows = np.flatnonzero(series.notna().to_numpy())
    present = series.iloc[rows]
    if model.classes is None:
        values = pd.to_numeric(present, errors="coerce").to_numpy(float)
        if not np.isfinite(values).all():
            raise InputError(f"target {series.name!r} of the test table holds values that are not finite numbers")
        return rows, values
    return rows, Target.with_classes(present, model.classes).values


def _regression_columns(
    model: AutoPredictive, test: pd.DataFrame, distribution: Distribution, coverage: float, above: Any, known: Any
) -> dict[str, np.ndarray]:
    tail = (1 - coverage) / 2
    levels = np.concatenate([[tail, 0.5, 1 - tail], QUANTILE_LEVELS])
    values = quantile(distribution, levels)
    mean, variance = mean_and_variance(distribution)
    std = np.sqrt(np.maximum(variance, 0.0))
    split = variance_split(*model.members(test))
    # The members' share of variance, carried over to the recalibrated spread.
    share = np.sqrt(split.epistemic / np.maximum(split.total, 1e-30))
    columns = {
        "mean": mean,
        "median": values[:, 1],
        "lower": values[:, 0],
        "upper": values[:, 2],
        "std": std,
        "epistemic_std": std * share,
    }
    columns |= {f"quantile_{q:.2f}": values[:, 3 + i] for i, q in enumerate(QUANTILE_LEVELS)}
    for threshold in above:
        columns[f"probability_above_{threshold:g}"] = 1 - cdf(distribution, np.full(len(test), threshold))
    if known is not None:
        from bayeslens.core.distribution import take_rows

        rows, y = known
        scores = np.full(len(test), np.nan)
        scores[rows] = log_score(take_rows(distribution, rows), y, model.step)
        columns["log_score"] = scores
    return columns


def _class_columns(
    model: AutoPredictive, test: pd.DataFrame, distribution: Distribution, coverage: float
) -> dict[str, Any]:
    probs = np.asarray(distribution.probs)
    labels = np.asarray(model.classes, object)
    members, weights = model.members(test)
    sets = model.prediction_sets(distribution, coverage)
    columns: dict[str, Any] = {"prediction": labels[probs.argmax(1)]}
    columns |= {f"probability_{label}": probs[:, i] for i, label in enumerate(labels)}
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    columns["prediction_set"] = [json.dumps([plain[i] for i in np.flatnonzero(row)], default=str) for row in sets]
    columns["epistemic"] = entropy_split(members.probs, weights).epistemic
    return columns


def _metrics(model: AutoPredictive, distribution: Distribution, known: Any, coverage: float) -> tuple:
    """Metrics and audit from test rows with a known target, otherwise from cross-validation."""
    if known is None:
        stacked = next(e for e in model.leaderboard if e["learner"] == "stack" or len(model.leaderboard) == 1)
        kept = {k: v for k, v in stacked.items() if k not in ("learner", "seconds", "weight", "note")}
        return kept, "cross-validation", model.audit
    from bayeslens.core.distribution import take_rows
    from bayeslens.evaluation.conformal import conformal_threshold

    rows, y = known
    predicted = take_rows(distribution, rows)
    target = Target(y, model.classes, model.step)
    edge = None if model.classes is None else conformal_threshold(model.set_scores, coverage)
    metrics = metric_table(predicted, target, np.arange(len(y)), coverage, edge)
    return metrics, "test", audit(predicted, y, coverage, model.classes, model.set_scores)
