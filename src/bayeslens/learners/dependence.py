"""Partial dependence: how the average prediction moves with one column, with the members' disagreement as a band."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bayeslens.core.learner import Predictive
from bayeslens.core.mixture import member_moments
from bayeslens.core.table import Table
from bayeslens.learners.result import Dependence

_ROWS = 100
_GRID = 16
_COLUMNS = 12


def partial_dependence(predictive: Predictive, frame: pd.DataFrame, *, seed: int = 0) -> tuple[Dependence, ...]:
    """Partial dependence on at most twelve columns, most important first (Friedman 2001).

    The band is between the members' 5% and 95% weighted quantiles of the average prediction. One call predicts all
    grid points of all columns.

    Args:
        predictive: any predictive.
        frame: rows over which the prediction is averaged; at most 100 are used.
    """
    table = Table.from_data(frame)
    usable = [c for c in table.columns if c.kind != "dropped"][: 4 * _COLUMNS]
    rows = frame.iloc[np.random.default_rng(seed).permutation(len(frame))[:_ROWS]]
    grids = {c.name: _grid(c, frame[c.name]) for c in usable}
    blocks, places = [], []
    for name, grid in grids.items():
        for value in grid:
            block = rows.copy()
            block[name] = pd.Series([value] * len(rows), index=rows.index, dtype=_dtype(frame[name]))
            blocks.append(block)
            places.append(name)
    if not blocks:
        return ()
    averages, weights = _average_predictions(predictive, pd.concat(blocks), len(rows))
    result = []
    for name, grid in grids.items():
        inside = np.flatnonzero([p == name for p in places])
        values = averages[:, inside]
        mean = weights @ values
        lower, upper = _weighted_band(values, weights)
        label = "" if predictive.classes is None else str(predictive.classes[-1])
        shown = [v.item() if hasattr(v, "item") else v for v in grid]
        result.append(Dependence(name, shown, mean, lower, upper, float(mean.std()), label))
    return tuple(sorted(result, key=lambda d: -d.importance)[:_COLUMNS])


def _dtype(series: pd.Series) -> Any:
    # A whole-number column takes fractional grid points.
    return (
        "float64" if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series) else series.dtype
    )


def _grid(column: Any, series: pd.Series) -> list:
    present = series.dropna()
    if column.kind == "categorical":
        return list(present.value_counts().index[:_GRID])
    if column.kind == "numeric" and pd.api.types.is_numeric_dtype(present):
        levels = np.linspace(0.02, 0.98, _GRID)
        return list(np.unique(np.quantile(present.to_numpy(float), levels)))
    ordered = present.sort_values()
    return list(ordered.iloc[np.linspace(0, len(ordered) - 1, min(_GRID, len(ordered))).round().astype(int)].unique())


def _average_predictions(predictive: Predictive, frame: pd.DataFrame, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Each member's prediction averaged over every consecutive block of rows, shape (members, blocks)."""
    members, weights = predictive.members(frame)
    if predictive.classes is None:
        predicted, _ = member_moments(members)
    else:
        predicted = np.asarray(members.probs)[..., -1]
    return predicted.reshape(len(predicted), -1, rows).mean(-1), np.asarray(weights, np.float64)


def _weighted_band(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(values, axis=0)
    mass = np.cumsum(weights[order], axis=0) / weights.sum()
    low, high = (np.argmax(mass >= q - 1e-9, axis=0) for q in (0.05, 0.95))
    ordered = np.take_along_axis(values, order, 0)
    columns = np.arange(values.shape[1])
    return ordered[low, columns], ordered[high, columns]
