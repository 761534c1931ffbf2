"""The nouns of the library, tables, exact kernel algebra, the training loop, saving and loading."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "BayesianLens": "bayesian_lens",
    "ConditionalDensity": "density",
    "Density": "density",
    "Dequantized": "transformed",
    "FiniteKernel": "finite",
    "InputError": "errors",
    "Kernel": "learner",
    "Learner": "learner",
    "LinearGaussianKernel": "linear_gaussian",
    "Members": "mixture",
    "Mixture": "mixture",
    "Posterior": "posterior",
    "Predictive": "learner",
    "QuantileDistribution": "transformed",
    "Recalibrated": "transformed",
    "Structure": "structure",
    "Table": "table",
    "Target": "table",
    "as_predictive": "foreign",
    "load": "saving",
    "mix": "mixture",
    "quantile": "quantile",
    "register": "saving",
    "register_family": "distribution",
    "save": "saving",
    "show": "saving",
    "train": "training",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.core.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
