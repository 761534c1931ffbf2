"""Pictures of results, and the report of a prediction or a posterior as one HTML file."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "plot": "plotting",
    "write_report": "html",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.report.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
