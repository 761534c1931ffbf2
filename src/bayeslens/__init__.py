"""Turns your table, model or simulator into probabilities you can check and act on."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# The whole top-level API: verbs, loaded when first used so that importing is quick.
__all__ = [
    "InputError",
    "calibrate",
    "check",
    "compare",
    "conformal",
    "fit",
    "infer",
    "load",
    "plan",
    "predict",
    "save",
    "score",
    "show",
]


def __getattr__(name: str) -> object:
    if name == "InputError":
        from bayeslens.core.errors import InputError

        return InputError
    if name in __all__:
        return getattr(importlib.import_module("bayeslens.verbs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
