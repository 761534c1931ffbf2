"""Engines: ways to invert a model."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "ENGINES": "infer",
    "Exact": "exact",
    "Gibbs": "numpyro_kernel",
    "NUTS": "nuts",
    "NumPyroKernel": "numpyro_kernel",
    "convergence": "diagnostics",
    "engine_named": "infer",
    "infer": "infer",
    "pareto_k": "diagnostics",
    "plan": "planning",
    "solve_exactly": "exact",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.inference.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
