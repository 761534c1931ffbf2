"""The verbs: what users call at the top level of the library."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bayeslens.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from bayeslens.core.learner import Learner, Predictive
    from bayeslens.evaluation.checking import CalibrationChecks, PosteriorChecks
    from bayeslens.evaluation.predictions_audit import PredictionsAudit
    from bayeslens.learners.result import Prediction


def predict(
    frame: pd.DataFrame | str | None = None,
    target: str | None = None,
    *,
    test: pd.DataFrame | str | None = None,
    task: str = "auto",
    learner: str | Learner = "auto",
    coverage: float = 0.9,
    above: Sequence[float] = (),
    groups: str | None = None,
    time: str | None = None,
    weights: str | None = None,
    out: str | None = None,
    report: str | None = None,
    save: str | None = None,
    load: str | None = None,
    time_budget: float = 60.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> Prediction:
    """An honest probability for every row of a table.

    Args:
        frame: the training table: a DataFrame, or the path of a CSV or Parquet file. None takes the penguins that
            ship with the package, unless `load` is given.
        target: the column to predict. Rows where it is missing are not trained on.
        test: the rows to predict, with or without the target; None holds out a fifth of the table.
        task: `"regression"`, `"classification"`, or `"auto"`: text, boolean and two-valued targets are classes.
        learner: `"auto"` stacks several; or a name (`linear`, `ngboost`, …); or a `Learner`.
        coverage: nominal coverage of `lower`, `upper` and of prediction sets.
        above: thresholds T for which `probability_above_T` is added.
        groups: a column; rows of one group are never split between training and held-out rows.
        time: a column; held-out rows always come later than the rows they are predicted from.
        weights: a column of row weights (a weight of 2 counts as two equal rows).
        out: write the predictions to this CSV file.
        report: write a self-contained HTML report to this file.
        save: write the fitted model to this `.bayes` file.
        load: predict with the model in this file instead of training one.
        time_budget: seconds after which no further learner is tried.
        seed: of every random choice.
        progress: called with a sentence when something new begins.

    Returns:
        A `Prediction`: the test table with predictions added, metrics, leaderboard and the fitted model.

    Raises:
        InputError: input that cannot be used, with what to do about it.
    """
    import dataclasses

    from bayeslens.core.files import check_writable, read_table, write_csv
    from bayeslens.learners.prediction import predict_table

    outputs = {"out": out, "report": report, "save": save}
    for path in outputs.values():
        if path is not None:
            check_writable(path)
    model = None
    if load is not None:
        from bayeslens.core.saving import load as read_model
        from bayeslens.learners.auto import AutoPredictive

        model = read_model(load)
        if not isinstance(model, AutoPredictive):
            raise InputError(f"{load} holds a {type(model).__name__}, not a model saved by predict")
        target = target if target is not None else model.target
    elif frame is None:
        from bayeslens.datasets import penguins

        frame, target = penguins(), "body_mass_g" if target is None else target
    elif target is None:
        raise InputError("which column is to be predicted? Give its name as target (--target COLUMN)")
    prediction = predict_table(
        read_table(frame) if frame is not None else None,
        target,
        test=read_table(test) if test is not None else None,
        task=task,
        learner=learner,
        coverage=coverage,
        above=above,
        groups=groups,
        time=time,
        weights=weights,
        model=model,
        time_budget=time_budget,
        seed=seed,
        progress=progress,
    )
    prediction = dataclasses.replace(prediction, files={k: str(v) for k, v in outputs.items() if v is not None})
    if out is not None:
        write_csv(prediction.frame, out)
    if save is not None:
        progress(f"saving {save}")
        from bayeslens.core.saving import save as write_model

        write_model(prediction.predictive, save)
    if report is not None:
        progress(f"writing {report}")
        from bayeslens.report import write_report

        write_report(prediction, report)
    return prediction


def fit(learner: Learner, X: Any, y: Any, *, key: Any, **arguments: Any) -> Predictive:
    """Fit a learner to rows `X` and targets `y`; see `Learner.fit` for the arguments.

    >>> import numpy as np
    >>> from bayeslens.learners import BayesianLinearRegression
    >>> predictive = fit(BayesianLinearRegression(), np.arange(9.0)[:, None], np.arange(9.0), key=None)
    >>> round(float(predictive(np.array([[4.0]])).mean[0]), 2)
    4.0

    Raises:
        InputError: something that is not a learner, or data that cannot be used.
    """
    from bayeslens.core.learner import Learner

    if not isinstance(learner, Learner):
        raise InputError(f"fit needs a learner such as NGBoost(), got {type(learner).__name__}")
    return learner.fit(X, y, key=key, **arguments)


def score(source: Any, X: Any, y: Any, **settings: Any) -> Any:
    """Every proper score of predictions for rows, with standard errors; see `evaluation.scoring.score_predictions`.

    Args:
        source: a predictive, or whatever `core.as_predictive` accepts.
        X: rows; None where `source` is predictions already.
        y: what happened.
        settings: such as `coverage=0.8`, `against=another`, `time=`, `groups=`.
    """
    from bayeslens.evaluation.scoring import score_predictions

    return score_predictions(source, X, y, **settings)


def calibrate(predictive: Any, X: Any, y: Any, *, key: Any, method: str = "auto", num_folds: int = 5) -> Any:
    """Recalibrated probabilities, and how far they were off before and after; see `evaluation.calibrating.calibrate`.

    Args:
        predictive: a predictive, or whatever `core.as_predictive` accepts, that has not seen these rows.
        X: rows.
        y: what happened.
        key: a `jax.random.key`.
        method: `"auto"` takes what has the best cross-validated log score, no change among it; or a name.
        num_folds: of that cross-validation.
    """
    from bayeslens.evaluation.calibrating import calibrate as run

    return run(predictive, X, y, key=key, method=method, num_folds=num_folds)


def conformal(source: Any, X: Any, y: Any, **settings: Any) -> Any:
    """Intervals or sets that hold the outcome with a promised probability; see `evaluation.conformal_calibration`.

    Args:
        source: a fitted predictor with rows that it has not seen, predictions of these rows, or a learner.
        X: rows; None where `source` is predictions already.
        y: what happened.
        settings: such as `coverage=0.8`, `method="cv+"`, `groups=`, `weights=`, `shifted=`, `key=`.
    """
    from bayeslens.evaluation.conformal_calibration import conformal as run

    return run(source, X, y, **settings)


def check(
    source: Any,
    target: str | None = None,
    *,
    probability: str | Sequence[str] | Mapping[Any, str] = (),
    quantiles: Sequence[str] | Mapping[float, str] | None = None,
    samples: str | None = None,
    coverage: float = 0.9,
    groups: str | None = None,
    time: str | None = None,
    report: str | None = None,
    data: Any = None,
    draws: Any = None,
    engine: Any = "auto",
    count: int = 200,
    key: Any = None,
) -> PredictionsAudit | PosteriorChecks | CalibrationChecks:
    """Whether probabilities are what they say: those of a table, of a posterior, of an engine, of draws made elsewhere.

    Args:
        source: a table that holds predictions beside what happened: a DataFrame, or the path of a CSV or Parquet file,
            such as the one that `predict` writes (see `evaluation.audit`). Or a `Posterior`: posterior predictive
            checks and prior sensitivity. Or a NumPyro program with example `data`: simulation-based calibration and
            TARP of an engine. Or parameters, shape (simulations, parameters), with `draws` of their posteriors: the
            same.
        target: the column with what happened.
        probability: a column, or columns by class (a mapping, or texts `LABEL=COLUMN`).
        quantiles: columns by level (a mapping, or texts `LEVEL=COLUMN`).
        samples: how the names of columns of draws begin.
        coverage: what intervals and sets in the table promise.
        groups: a column; rows of one group may depend on each other.
        time: a column; rows are a series in its order.
        report: write a self-contained HTML report of a table's audit to this file.
        data: the program's arguments by name, of which what is observed is simulated; or, with draws, numbers that
            describe each data set, shape (simulations, features).
        draws: of the posteriors of parameters, shape (simulations, draws, parameters).
        engine: what inverts the program, see `evaluation.simulate_posteriors`.
        count: how many data sets are simulated.
        key: a `jax.random.key`, needed for all but tables.

    Raises:
        InputError: something that cannot be checked, or columns that cannot be used, with what to do about it.
    """
    import dataclasses

    from bayeslens.core.files import check_writable, read_table
    from bayeslens.core.posterior import Posterior

    if not isinstance(source, str | os.PathLike) and not hasattr(source, "columns"):
        from bayeslens.evaluation import checking

        if not (isinstance(source, Posterior) or callable(source) or draws is not None):
            raise InputError(
                "check takes a table of predictions (a DataFrame or the path of a CSV or Parquet file) and the name of "
                "its target column, a posterior, a model with example data, or parameters with draws; got "
                f"{type(source).__name__}"
            )
        if key is None:
            raise InputError("simulations and replications are random: give a key, such as jax.random.key(0)")
        if isinstance(source, Posterior):
            return checking.checks_of_posterior(source, key=key)
        if draws is not None:
            return checking.checks_of_draws(source, draws, data, key=key)
        return checking.checks_of_engine(source, data or {}, key=key, engine=engine, count=count)
    if target is None:
        raise InputError("which column holds what happened? Give its name as target (--target COLUMN)")
    if report is not None:
        check_writable(report)
    table = read_table(source)
    from bayeslens.evaluation.predictions_audit import audit

    settings = {"probability": probability, "quantiles": quantiles, "samples": samples}
    found = audit(table, target, **settings, coverage=coverage, groups=groups, time=time)
    if report is None:
        return found
    from bayeslens.report import write_report

    found = dataclasses.replace(found, files={"report": str(report)})
    write_report(found, report)
    return found


def save(noun: Any, path: str) -> None:
    """Save anything of the library to a `.bayes` file; see `core.saving.save`."""
    from bayeslens.core.saving import save as write

    write(noun, path)


def load(path: str, model: Any = None) -> Any:
    """Load a `.bayes` file; see `core.saving.load`."""
    from bayeslens.core.saving import load as read

    return read(path, model)


def show(noun: Any) -> str:
    """What a noun, or a `.bayes` file, holds; see `core.saving.show`."""
    from bayeslens.core.saving import show as describe

    return describe(noun)


def infer(
    model: Callable, data: dict[str, Any] | None = None, *, key: Any, engine: Any = "auto", **settings: Any
) -> Any:
    """The posterior of a NumPyro or PyMC model given data; see `inference.infer`."""
    from bayeslens.inference.infer import infer as run

    return run(model, data, key=key, engine=engine, **settings)


def plan(model: Callable, data: dict[str, Any] | None = None) -> Any:
    """What `infer` will do with each site of a model, and why; see `inference.planning.plan`."""
    from bayeslens.inference.planning import plan as make

    return make(model, data)


def compare(posteriors: dict[str, Any]) -> Any:
    """Posteriors of several models by what they predict; see `evaluation.model_comparison.compare`."""
    from bayeslens.evaluation.model_comparison import compare as run

    return run(posteriors)
