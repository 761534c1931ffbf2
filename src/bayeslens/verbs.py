"""The verbs: what users call at the top level of the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bayeslens.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from bayeslens.core.learner import Learner, Predictive
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


def score(predictive: Predictive, X: Any, y: Any, *, coverage: float = 0.9) -> dict[str, float]:
    """Log score, CRPS or Brier loss, coverage, width or set size, and calibration error of predictions for rows.

    Args:
        predictive: a predictive, or whatever `core.as_predictive` accepts.
        X: rows.
        y: what happened.
        coverage: nominal coverage of the intervals or sets.
    """
    import numpy as np

    from bayeslens.core.foreign import as_predictive
    from bayeslens.core.table import Target
    from bayeslens.learners.auto import metric_table

    predictive = as_predictive(predictive)
    target = Target.with_classes(y, predictive.classes)
    return metric_table(predictive(X), target, np.arange(len(target.values)), coverage)


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
