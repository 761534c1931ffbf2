"""The scikit-learn face: a regressor and a classifier for every learner, generated from the learner's fields.

`NGBoost` gives `NGBoostRegressor` and `NGBoostClassifier`. Their parameters are the learner's fields and
`random_state`; they pass scikit-learn's own estimator checks, so that pipelines, searches and `cross_val_score` work.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpyro.distributions import Distribution
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    assert_all_finite,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import mean_and_variance, quantile
from bayeslens.core.table import Target
from bayeslens.evaluation.conformal import highest_probability_sets
from bayeslens.learners.linear import check_weights
from bayeslens.learners.stacking import take

# Public name: module in this room, learner, task. A module is imported when its name is first asked for.
ESTIMATORS: dict[str, tuple[str, str, str]] = {
    "AutoClassifier": ("auto", "Auto", "classification"),
    "AutoRegressor": ("auto", "Auto", "regression"),
    "BayesianLinearRegressor": ("linear", "BayesianLinearRegression", "regression"),
    "BayesianLogisticClassifier": ("linear", "BayesianLogisticRegression", "classification"),
    "ConformalizedQuantilesRegressor": ("conformalized_quantiles", "ConformalizedQuantiles", "regression"),
    "DEUPClassifier": ("deup", "DEUP", "classification"),
    "DEUPRegressor": ("deup", "DEUP", "regression"),
    "DeepEnsembleClassifier": ("deep_ensemble", "DeepEnsemble", "classification"),
    "DeepEnsembleRegressor": ("deep_ensemble", "DeepEnsemble", "regression"),
    "GaussianProcessRegressor": ("gaussian_process", "GaussianProcess", "regression"),
    "NGBoostClassifier": ("ngboost", "NGBoost", "classification"),
    "NGBoostRegressor": ("ngboost", "NGBoost", "regression"),
    "StackingClassifier": ("stacking", "Stacking", "classification"),
    "StackingRegressor": ("stacking", "Stacking", "regression"),
}
__all__ = [*sorted(ESTIMATORS), "make_estimator"]


def __getattr__(name: str) -> Any:
    if name not in ESTIMATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, learner, task = ESTIMATORS[name]
    learner_class = getattr(importlib.import_module(f"bayeslens.learners.{module}"), learner)
    # Kept, so that pickle finds the class under its name.
    globals()[name] = make_estimator(learner_class, task, name, module=__name__)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *ESTIMATORS})


def make_estimator(learner_class: type, task: str, name: str, *, module: str | None = None) -> type:
    """A scikit-learn estimator class for a learner.

    Args:
        learner_class: a `Learner`; its dataclass fields become the keyword-only parameters, without `task`.
        task: `"regression"` or `"classification"`.
        name: of the new class.
        module: where the class can be imported from, which pickle needs; the caller's module by default.

    Returns:
        A class with `fit`, `predict`, `predict_dist`, `predict_interval` and `predict_quantile` (regression),
        `predict_proba` and `predict_set` (classification), `score`, and after fitting `predictive_`,
        `n_features_in_`, `feature_names_in_` and `classes_`.

    Raises:
        InputError: the learner cannot do the task.

    >>> from bayeslens.learners.linear import BayesianLinearRegression
    >>> Regressor = make_estimator(BayesianLinearRegression, "regression", "Regressor")
    >>> model = Regressor(prior_precision=1.0).fit(np.arange(8.0)[:, None], np.arange(8.0))
    >>> model.predict_interval([[3.5]]).shape, sorted(model.get_params())
    ((1, 2), ['prior_precision', 'random_state'])
    """
    tasks, takes = learner_class.tasks, learner_class.takes
    # Of a learner made of learners, tasks are known only when it is made.
    if not isinstance(tasks, property) and task not in tasks:
        raise InputError(f"{learner_class.__name__} cannot do {task}; it does {', '.join(sorted(tasks))}")
    mixin = {"regression": RegressorMixin, "classification": ClassifierMixin}[task]

    def __sklearn_tags__(self: Any) -> Any:
        tags = super(estimator, self).__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.target_tags.required = True
        return tags

    weighted = isinstance(takes, property) or "weights" in takes
    namespace = {
        "__module__": module or inspect.currentframe().f_back.f_globals["__name__"],
        "__doc__": _documentation(learner_class, task),
        "__init__": _constructor(learner_class),
        "__sklearn_tags__": __sklearn_tags__,
        "_learner_class": learner_class,
        "_task": task,
        **_METHODS["weighted" if weighted else "unweighted"],
        **_METHODS[task],
    }
    estimator = type(name, (mixin, BaseEstimator), namespace)
    return estimator


def _constructor(learner_class: type) -> Any:
    """An `__init__` whose signature is the learner's fields and `random_state`, which only stores them."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for field in dataclasses.fields(learner_class):
        if not field.init or field.name == "task":
            continue
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default))
    parameters.append(inspect.Parameter("random_state", inspect.Parameter.KEYWORD_ONLY, default=None))
    signature = inspect.Signature(parameters)

    def __init__(self: Any, **settings: Any) -> None:
        bound = signature.bind(self, **settings)
        bound.apply_defaults()
        for name, value in list(bound.arguments.items())[1:]:
            setattr(self, name, value)

    __init__.__signature__ = signature
    return __init__


def _documentation(learner_class: type, task: str) -> str:
    """The learner's docstring without its example, and what is added here."""
    text = inspect.getdoc(learner_class).split(">>>")[0].rstrip()
    heading = "" if "Args:" in text else "\n\nArgs:"
    return (
        f"{text}{heading}\n    random_state: seed, `RandomState` or None, as everywhere in scikit-learn.\n\n"
        f"This is the scikit-learn {task.replace('ion', 'or').replace('classificator', 'classifier')} of "
        f"`{learner_class.__name__}`. X may be an array of numbers, or a DataFrame that also has missing values, text, "
        "dates and categories."
    )


def _check_rows(estimator: Any, X: Any, *, reset: bool) -> Any:
    """`X` as float64, or as the DataFrame that it is: `Table` reads its columns."""
    if isinstance(X, pd.DataFrame):
        for kind, count, least in (("sample", len(X), 1 + reset), ("feature", X.shape[1], 1)):
            if count < least:
                raise InputError(f"Found a table with {count} {kind}(s) while a minimum of {least} is required.")
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        return X
    # Nothing can be learned from one row.
    settings = {"dtype": np.float64, "ensure_all_finite": "allow-nan", "ensure_min_samples": 1 + reset}
    return validate_data(estimator, X, reset=reset, **settings)


def _check_target(estimator: Any, y: Any) -> np.ndarray:
    """`y` as a vector without missing values."""
    name = type(estimator).__name__
    if y is None:
        raise InputError(f"This {name} estimator requires y to be passed, but the target y is None.")
    y = column_or_1d(y, warn=True)
    assert_all_finite(y, estimator_name=name, input_name="y")
    return y


def _encode(estimator: Any, y: np.ndarray) -> Target:
    if estimator._task == "regression":
        return Target.from_values(y, "regression")
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"the target has one class only, {classes[0]!r}: there is nothing to predict")
    estimator.classes_ = classes
    return Target(codes.astype(np.float64), tuple(classes.tolist()))


def _learn(estimator: Any, X: Any, y: Any, weights: Any) -> Any:
    y = _check_target(estimator, y)
    X = _check_rows(estimator, X, reset=True)
    check_consistent_length(X, y)
    arguments = {}
    if weights is not None:
        weights = check_weights(weights, len(y))
        used = np.flatnonzero(weights > 0)  # a row that counts for nothing is not there
        X, y, arguments["weights"] = take(X, used), y[used], weights[used]
    settings = estimator.get_params(deep=False)
    del settings["random_state"]
    if any(f.name == "task" for f in dataclasses.fields(estimator._learner_class)):
        settings["task"] = estimator._task
    key = jax.random.key(check_random_state(estimator.random_state).randint(2**31 - 1))
    learner = estimator._learner_class(**settings)
    estimator.predictive_ = learner.fit(X, _encode(estimator, y), key=key, **arguments)
    return estimator


def _fit(self: Any, X: Any, y: Any) -> Any:
    """Learn from rows `X`, shape (rows, columns), and targets `y`, shape (rows,); returns the estimator itself.

    Raises:
        InputError: data that cannot be used; the message says why.
    """
    return _learn(self, X, y, None)


def _fit_with_weights(self: Any, X: Any, y: Any, sample_weight: Any = None) -> Any:
    """Learn from rows `X`, shape (rows, columns), and targets `y`, shape (rows,); returns the estimator itself.

    A row with `sample_weight` 2 counts as two equal rows, one with 0 not at all.

    Raises:
        InputError: data or weights that cannot be used; the message says why.
    """
    return _learn(self, X, y, sample_weight)


def _predict_dist(self: Any, X: Any) -> Distribution:
    """The NumPyro distribution of every row's target, batch shape (rows,)."""
    check_is_fitted(self)
    return self.predictive_(_check_rows(self, X, reset=False))


def _predict(self: Any, X: Any) -> np.ndarray:
    """The mean, or the likeliest label, of every row, shape (rows,)."""
    distribution = _predict_dist(self, X)
    if self._task == "regression":
        return np.asarray(mean_and_variance(distribution)[0], np.float64)
    return self.classes_[np.asarray(distribution.probs).argmax(1)]


def _predict_proba(self: Any, X: Any) -> Float[np.ndarray, "rows classes"]:
    """The probability of every class in `classes_`, shape (rows, classes)."""
    probs = np.asarray(_predict_dist(self, X).probs, np.float64)
    return probs / probs.sum(1, keepdims=True)


def _predict_set(self: Any, X: Any, coverage: float = 0.9) -> Bool[np.ndarray, "rows classes"]:
    """Which classes belong to the prediction set of every row, shape (rows, classes).

    Conformal where the fitted model kept held-out rows, otherwise the fewest classes whose probability is `coverage`.
    """
    _check_coverage(coverage)
    distribution = _predict_dist(self, X)
    if hasattr(self.predictive_, "prediction_sets"):
        return self.predictive_.prediction_sets(distribution, coverage)
    return highest_probability_sets(distribution.probs, coverage)


def _predict_quantile(self: Any, X: Any, q: Any) -> Float[np.ndarray, rows * levels]:
    """Quantiles at probability `q`: shape (rows,) for a number, (rows, levels) for several."""
    values = quantile(_predict_dist(self, X), q)
    return values[:, 0] if np.ndim(q) == 0 else values


def _predict_interval(self: Any, X: Any, coverage: float = 0.9) -> Float[np.ndarray, "rows 2"]:
    """Central intervals that hold `coverage` of the probability, shape (rows, 2)."""
    _check_coverage(coverage)
    return _predict_quantile(self, X, [(1 - coverage) / 2, (1 + coverage) / 2])


def _check_coverage(coverage: float) -> None:
    if not 0 < coverage < 1:
        raise InputError(f"coverage must lie strictly between 0 and 1, got {coverage}")


def _methods(**functions: Any) -> dict[str, Any]:
    """The functions under their public names, by which scikit-learn's scorers and pickle look them up."""
    for name, function in functions.items():
        function.__name__ = function.__qualname__ = name
    return functions


_COMMON = _methods(predict=_predict, predict_dist=_predict_dist)
_METHODS = {
    "weighted": _methods(fit=_fit_with_weights) | _COMMON,
    "unweighted": _methods(fit=_fit) | _COMMON,
    "regression": _methods(predict_interval=_predict_interval, predict_quantile=_predict_quantile),
    "classification": _methods(predict_proba=_predict_proba, predict_set=_predict_set),
}
