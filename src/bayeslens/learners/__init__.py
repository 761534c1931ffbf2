"""Learners for tables, and the scikit-learn face."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "Auto": "auto",
    "BayesianLinearRegression": "linear",
    "BayesianLogisticRegression": "linear",
    "ConformalizedQuantiles": "conformalized_quantiles",
    "DEUP": "deup",
    "DeepEnsemble": "deep_ensemble",
    "GaussianProcess": "gaussian_process",
    "NGBoost": "ngboost",
    "Stacking": "stacking",
    "AutoClassifier": "scikit",
    "AutoRegressor": "scikit",
    "BayesianLinearRegressor": "scikit",
    "BayesianLogisticClassifier": "scikit",
    "ConformalizedQuantilesRegressor": "scikit",
    "DEUPClassifier": "scikit",
    "DEUPRegressor": "scikit",
    "DeepEnsembleClassifier": "scikit",
    "DeepEnsembleRegressor": "scikit",
    "GaussianProcessRegressor": "scikit",
    "NGBoostClassifier": "scikit",
    "NGBoostRegressor": "scikit",
    "StackingClassifier": "scikit",
    "StackingRegressor": "scikit",
    "make_estimator": "scikit",
}
# Names for `--learner`: the class for each task, and its settings.
LEARNERS: dict[str, dict[str, tuple[str, dict]]] = {
    "linear": {"regression": ("BayesianLinearRegression", {}), "classification": ("BayesianLogisticRegression", {})},
    "conformalized_quantiles": {"regression": ("ConformalizedQuantiles", {})},
    "deep_ensemble": {"regression": ("DeepEnsemble", {}), "classification": ("DeepEnsemble", {})},
    "gaussian_process": {"regression": ("GaussianProcess", {})},
    "ngboost": {"regression": ("NGBoost", {}), "classification": ("NGBoost", {})},
}
__all__ = sorted(_PUBLIC)


def make(name: str, task: str) -> object:
    """The learner of a name in `LEARNERS`, for a task."""
    from bayeslens.core.errors import InputError

    if task not in LEARNERS[name]:
        raise InputError(f"{name} cannot do {task}: use auto, {', '.join(n for n in LEARNERS if task in LEARNERS[n])}")
    class_name, settings = LEARNERS[name][task]
    return __getattr__(class_name)(**settings)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.learners.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
