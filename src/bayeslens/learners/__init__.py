"""Learners for tables, and the scikit-learn face."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "Auto": "auto",
    "BayesianLinearRegression": "linear",
    "BayesianLogisticRegression": "linear",
    "NGBoost": "ngboost",
    "Stacking": "stacking",
}
# Names for `--learner`: the class for each task, and its settings.
LEARNERS: dict[str, dict[str, tuple[str, dict]]] = {
    "linear": {"regression": ("BayesianLinearRegression", {}), "classification": ("BayesianLogisticRegression", {})},
    "ngboost": {"regression": ("NGBoost", {}), "classification": ("NGBoost", {})},
}
__all__ = sorted(_PUBLIC)


def make(name: str, task: str) -> object:
    """The learner of a name in `LEARNERS`, for a task."""
    class_name, settings = LEARNERS[name][task]
    return __getattr__(class_name)(**settings)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.learners.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
