"""The nouns of the library, tables, exact kernel algebra, the training loop, saving and loading."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "InputError": "errors",
    "Kernel": "learner",
    "Learner": "learner",
    "Mixture": "mixture",
    "Predictive": "learner",
    "Recalibrated": "transformed",
    "Dequantized": "transformed",
    "QuantileDistribution": "transformed",
    "Table": "table",
    "Target": "table",
    "mix": "mixture",
    "quantile": "quantile",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.core.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
