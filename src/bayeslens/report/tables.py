"""The tables of the report: any frame or list of dicts as cells of short text, ready for the page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bayeslens.report.pictures import by_importance, shorten

if TYPE_CHECKING:
    from bayeslens.learners.result import Prediction

MAX_ROWS = 12
MAX_LEARNERS = 20
MAX_UNFAMILIAR = 10
MAX_PREDICTED = 5  # predicted columns side by side; 30 classes have one each
MAX_FEATURES = 3
_LENGTH = 32
_FLAG = "unfamiliar"


@dataclasses.dataclass(frozen=True)
class Cell:
    """Text of a table's cell; `full` is the whole text where `text` is cut, otherwise empty."""

    text: str
    full: str = ""
    numeric: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table for the page; `note` says what was left out."""

    head: list[Cell]
    rows: list[list[Cell]]
    note: str = ""


def cell(value: Any, numeric: bool = False) -> Cell:
    """One line of text; the whole text goes along where it is cut."""
    text = shorten(value, _LENGTH)
    return Cell(text, shorten(value, 400) if len(str(value)) > _LENGTH else "", numeric)


def number(value: Any, decimals: int | None = None) -> str:
    """A number for people: four significant digits or `decimals` places, a dash where there is none.

    >>> [number(v) for v in (0.91234, 12.3456, 15230, -3, float("nan"), None, True)]
    ['0.912', '12.35', '15,230', '−3', '–', '–', 'yes']
    """
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    try:
        value = float(value)
    except (TypeError, ValueError):
        return "–"
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if abs(value) >= 1e9 or (decimals is None and 0 < abs(value) < 1e-4):
        return f"{value:.3g}".replace("-", "−")
    decimals = _decimals(abs(value)) if decimals is None else decimals
    return f"{value:,.{decimals}f}".replace("-", "−")


def _decimals(largest: float) -> int:
    if largest == int(largest):
        return 0
    exponent = math.floor(math.log10(largest))
    return max(0, 3 - exponent) if exponent >= 0 else min(2 - exponent, 6)


def grid(frame: pd.DataFrame, note: str = "") -> Grid:
    """The cells of a small frame, its index first; numbers of a column share their decimals."""
    columns = [frame.iloc[:, i] for i in range(frame.shape[1])]
    numeric = [pd.api.types.is_numeric_dtype(c) and not pd.api.types.is_bool_dtype(c) for c in columns]
    head = [Cell("row")] + [cell(name, n) for name, n in zip(frame.columns, numeric, strict=True)]
    texts = [_numbers(c) if n else [_value(v) for v in c] for c, n in zip(columns, numeric, strict=True)]
    rows = [
        [cell(index)] + [cell(text[i], n) for text, n in zip(texts, numeric, strict=True)]
        for i, index in enumerate(frame.index)
    ]
    return Grid(head, rows, note)


def _numbers(column: pd.Series) -> list[str]:
    values = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
    finite = values[np.isfinite(values)]
    if (finite == np.round(finite)).all():  # years and identifiers: no thousands separators
        return [f"{v:.0f}".replace("-", "−") if np.isfinite(v) and abs(v) < 1e15 else number(v) for v in values]
    largest = float(np.abs(finite).max())
    decimals = 3 if 0.01 <= largest < 1 else (_decimals(largest) or 1) if largest >= 1e-4 else None
    return [number(v, decimals).replace(",", "") for v in values]


def _value(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, pd.Timestamp):
        return value.isoformat(" ").removesuffix(" 00:00:00")
    return "–" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def first_rows(prediction: Prediction) -> Grid:
    """The first rows of the predictions: predicted columns, the target where known, the most important columns."""
    frame, shown, left_out = _columns(prediction)
    rows = min(len(frame), MAX_ROWS)
    notes = [f"{len(frame) - rows:,} more rows"] if len(frame) > rows else []
    notes += [f"{left_out} more columns"] if left_out else []
    return grid(frame.iloc[:rows, shown], " and ".join(notes))


def unfamiliar_rows(prediction: Prediction) -> Grid | None:
    """The rows least like the training table, least familiar first; None if it is not known which they are.

    Rows are ordered by their distance from the training table, where the prediction has it; otherwise only the rows
    whose `unfamiliar` says yes are listed, and there may be none.
    """
    frame, shown, _ = _columns(prediction)
    if prediction.unfamiliarity is not None:
        order = np.argsort(-np.asarray(prediction.unfamiliarity), kind="stable")[:MAX_UNFAMILIAR]
        picked = frame.iloc[order, shown].copy()
        picked.insert(0, "distance", np.asarray(prediction.unfamiliarity)[order], allow_duplicates=True)
        if "unfamiliar" in frame.columns:
            picked.insert(0, "flagged", frame["unfamiliar"].to_numpy()[order], allow_duplicates=True)
        return grid(picked)
    if "unfamiliar" not in frame.columns:
        return None
    order = np.flatnonzero(frame["unfamiliar"].to_numpy(bool))
    note = f"{len(order) - MAX_UNFAMILIAR:,} more such rows" if len(order) > MAX_UNFAMILIAR else ""
    return grid(frame.iloc[order[:MAX_UNFAMILIAR], shown], note)


def _columns(prediction: Prediction) -> tuple[pd.DataFrame, list[int], int]:
    """The frame, positions of the columns worth showing, and how many are left out."""
    frame = prediction.frame.rename(columns=str)
    names = list(frame.columns)
    known = [str(n) for n in getattr(getattr(prediction.predictive, "table", None), "names", ())]
    ranked = list(dict.fromkeys([d.column for d in by_importance(prediction.dependence)] + known))
    given = set(ranked) | {prediction.target, _FLAG}
    target = [names.index(prediction.target)] if prediction.target in names else []
    predicted = [i for i, name in enumerate(names) if name not in given]
    features = [names.index(name) for name in ranked if name in names and name != prediction.target]
    shown = target + predicted[:MAX_PREDICTED] + features[:MAX_FEATURES]
    return frame, shown, len(set(predicted + features) - set(shown))


def split_leaderboard(leaderboard: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Learners with a held-out log score, best first, and those without, which were skipped.

    >>> ranked, skipped = split_leaderboard([{"learner": "a", "log_score": -2.0}, {"learner": "b", "note": "slow"}])
    >>> ranked[0]["learner"], skipped[0]["learner"]
    ('a', 'b')
    """

    def score(entry: dict[str, Any]) -> float:
        value = entry.get("log_score")
        return math.nan if value is None else float(value)

    ranked = sorted((e for e in leaderboard if not math.isnan(score(e))), key=score, reverse=True)
    return ranked, [e for e in leaderboard if math.isnan(score(e))]
