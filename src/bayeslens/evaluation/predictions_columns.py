"""Which columns of a table are predictions, and of what: found by name as `predict` writes them, or mapped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpyro.distributions as dist
import pandas as pd

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import as_predictive
from bayeslens.core.learner import Predictive

_CLASS, _QUANTILE, _ABOVE = "probability_", "quantile_", "probability_above_"
_ROUNDED = 0.01  # by which rounded probabilities may miss a sum of one
_CROSSED = 1e-6  # of a row's values: quantiles that cross by less do so by rounding
_HOW = (
    "name them with --probability COLUMN, --probability LABEL=COLUMN for each class, --quantile LEVEL=COLUMN for each "
    "quantile, or --samples PREFIX (in Python probability=, quantiles=, samples=)"
)


@dataclasses.dataclass(frozen=True)
class ColumnMap:
    """What the user says about columns; see `audit`. At most one of them is given."""

    probability: str | Sequence[str] | Mapping[Any, str] = ()
    quantiles: Sequence[str] | Mapping[float, str] | None = None
    samples: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Predictions of a table, of the rows whose target is known.

    Attributes:
        rows: their positions in the table.
        left_out: how many rows have no target.
        y: what happened: numbers, or the labels of classes as text.
        predictive: the predictions.
        source: what was read, in words.
        levels: of quantiles, otherwise None.
        values: the quantiles, shape (rows, levels), otherwise empty.
        sets: prediction sets as written, as sets of labels; None without them.
        thresholds: T of each column `probability_above_T`, by its name.
        notes: what was mended, and whether that is all right (None) or not (False).
    """

    rows: np.ndarray
    left_out: int
    y: np.ndarray
    predictive: Predictive
    source: str
    levels: np.ndarray | None = None
    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))
    sets: list[set[str]] | None = None
    thresholds: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[tuple[str, bool | None], ...] = ()

    def numbers(self, frame: pd.DataFrame, name: str) -> np.ndarray:
        """A column of numbers of these rows; `frame` holds them alone."""
        return _numbers(frame, [name], self.rows)[:, 0]

    def refuse(self, wrong: np.ndarray, values: np.ndarray, what: str) -> None:
        """Refuse the first row that is wrong, by its position in the table."""
        _refuse(wrong, values, self.rows, what)


def read_predictions(frame: pd.DataFrame, target: str, mapping: ColumnMap) -> Reading:
    """The predictions that a table holds for a target.

    >>> frame = pd.DataFrame({"y": ["a", "b"], "probability_a": [0.9, 0.4], "probability_b": [0.1, 0.6]})
    >>> read_predictions(frame, "y", ColumnMap()).predictive.classes
    ('a', 'b')

    Raises:
        InputError: columns that are lacking or cannot be told apart, or rows that hold no prediction.
    """
    frame = _checked_frame(frame, target)
    known = frame[target].notna().to_numpy()
    rows = np.flatnonzero(known)
    if len(rows) < 2:
        raise InputError(
            f"the target {target!r} is known in {len(rows)} rows: an audit needs two at the least, and hundreds to say "
            "much; add what happened to the table of predictions"
        )
    left_out, kept = len(frame) - len(rows), frame.iloc[rows]
    kind = _kind(kept, target, mapping)
    if kind == "classes":
        return _read_classes(kept, target, mapping, rows, left_out)
    y = _outcomes(kept, target, rows)
    numeric = {"rows": rows, "left_out": left_out, "y": y, "thresholds": _thresholds(kept.columns)}
    if kind == "samples":
        names = [n for n in kept.columns if n.startswith(mapping.samples) and n != target]
        if len(names) < 2:
            raise InputError(
                f"{len(names)} columns begin with {mapping.samples!r}, and draws need two or more: the table has "
                f"{_listed(kept.columns)}"
            )
        draws = _numbers(kept, names, rows)
        return Reading(predictive=as_predictive(draws.T, samples=True), source=f"{len(names)} draws", **numeric)
    if kind == "quantiles":
        return _read_quantiles(kept, _quantile_columns(kept, mapping), numeric)
    mean, std = _numbers(kept, ["mean", "std"], rows).T
    _refuse(std <= 0, std[:, None], rows, "has a std that is not above zero: mend it, or give quantiles")
    return Reading(predictive=as_predictive(dist.Normal(mean, std)), source="mean and std, as a Normal", **numeric)


def _checked_frame(frame: pd.DataFrame, target: str) -> pd.DataFrame:
    frame = frame.rename(columns=str)
    repeated = frame.columns[frame.columns.duplicated()].unique().tolist()
    if repeated:
        raise InputError(f"duplicate column names {repeated}: rename them so that each name stands once")
    if len(frame) == 0:
        raise InputError("the table of predictions has no rows")
    if target not in frame.columns:
        raise InputError(f"target column {target!r} is not in the table; it has {_listed(frame.columns)}")
    return frame


def _kind(frame: pd.DataFrame, target: str, mapping: ColumnMap) -> str:
    given = [
        kind
        for kind, value in (
            ("classes", mapping.probability),
            ("quantiles", mapping.quantiles),
            ("samples", mapping.samples),
        )
        if value is not None and len(value) > 0
    ]
    if len(given) > 1:
        raise InputError(f"both {given[0]} and {given[1]} were mapped: audit one kind of prediction at a time")
    if given:
        return given[0]
    labels = _class_columns(frame.columns)
    fits = labels and {_label(v) for v in frame[target].unique()} <= {_label(k) for k in labels}
    fits = fits or (len(labels) == 1 and frame[target].nunique() <= 2)
    found = ["classes"] if fits else []
    found += ["quantiles"] if _quantiles_by_name(frame.columns) else []
    found += ["moments"] if not found and {"mean", "std"} <= set(frame.columns) else []
    if len(found) > 1:
        raise InputError(
            f"both {_CLASS}LABEL and {_QUANTILE}Q columns fit the target {target!r}, so that it is not clear which are "
            f"its predictions: {_HOW}"
        )
    if found:
        return found[0]
    if labels:
        return "classes"  # whose labels do not fit: which one is said where they are read
    raise InputError(
        f"no column predicts {target!r}: there is neither {_CLASS}LABEL nor {_QUANTILE}Q, nor mean and std. The table "
        f"has {_listed(frame.columns)}: {_HOW}"
    )


# ---- classes -------------------------------------------------------------------------------------------------------


def _class_columns(names: Iterable[str]) -> dict[str, str]:
    """Columns of class probabilities by label."""
    names = list(names)
    above = _thresholds(names)
    return {n.removeprefix(_CLASS): n for n in names if n.startswith(_CLASS) and n != _CLASS and n not in above}


def _thresholds(names: Iterable[str]) -> dict[str, float]:
    found = {}
    for name in names:
        value = _number(name.removeprefix(_ABOVE)) if name.startswith(_ABOVE) else None
        if value is not None:
            found[name] = value
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _label(value: Any) -> str:
    """One text for a label, however it is written: 1, 1.0 and "1" are the same, and so are True and "True"."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    number = _number(str(value))
    return str(value) if number is None else f"{number:.15g}"


def _read_classes(frame: pd.DataFrame, target: str, mapping: ColumnMap, rows: np.ndarray, left_out: int) -> Reading:
    y = np.array([_label(v) for v in frame[target]], object)
    seen = sorted(frame[target].unique().tolist(), key=lambda v: (str(type(v)), v))
    labels, names = _labelled(frame, target, mapping, [_label(v) for v in seen])
    said = _numbers(frame, names, rows)
    _refuse(
        ((said < -1e-9) | (said > 1 + 1e-9)).any(1), said, rows, "holds probabilities outside [0, 1]: mend or map them"
    )
    said, notes = np.clip(said, 0, 1), []
    if len(names) == 1:
        said = np.concatenate([1 - said, said], 1)
    total = said.sum(1)
    _refuse(
        np.abs(total - 1) > _ROUNDED,
        said,
        rows,
        f"has class probabilities that do not sum to one: give a column for every class (read were {_listed(names)})",
    )
    rounded = np.abs(total - 1) > 1e-6
    if (np.abs(total - 1) > 1e-4).any():
        worst = int(np.abs(total - 1).argmax())
        notes.append(
            (
                f"Class probabilities of {int(rounded.sum())} rows sum to one only nearly (row {rows[worst]}: "
                f"{total[worst]:.6g}), as rounded ones do; they were divided by their sum.",
                None,
            )
        )
    unknown = ~np.isin(y, labels)
    if unknown.any():
        row = int(unknown.argmax())
        raise InputError(
            f"row {rows[row]} has the target {y[row]!r}, for which no column gives a probability (there are "
            f"{_listed(labels)}): {_HOW}"
        )
    predictive = as_predictive(said / total[:, None], classes=tuple(labels))
    source = f"probabilities of {len(labels)} classes, from {_listed(names)}"
    sets = _sets(frame, rows) if "prediction_set" in frame.columns and not len(mapping.probability) else None
    return Reading(rows, left_out, y, predictive, source, sets=sets, notes=tuple(notes))


def _labelled(frame: pd.DataFrame, target: str, mapping: ColumnMap, seen: list[str]) -> tuple[list[str], list[str]]:
    """Labels of the classes, and their columns; two labels and one column where that is of the second."""
    given = mapping.probability
    if isinstance(given, Mapping):
        found = {_label(k): v for k, v in given.items()}
    elif len(given) == 0:
        columns = _class_columns(frame.columns)
        found = {_label(k): v for k, v in columns.items()}
        if len(found) < len(columns):
            raise InputError(f"two columns give the probability of one class: {_listed(columns.values())}")
    else:
        texts = [given] if isinstance(given, str) else list(given)
        if len(texts) == 1 and texts[0] in frame.columns:
            if len(seen) != 2:
                raise InputError(
                    f"one column of probabilities, {texts[0]!r}, needs a target with two values, and {target!r} has "
                    f"{len(seen)}: write --probability LABEL=COLUMN"
                )
            return seen, texts
        found = {}
        for text in texts:
            label, column = _split(text, frame.columns, "--probability LABEL=COLUMN")
            if _label(label) in found:
                raise InputError(f"the class {label!r} is mapped twice: give each class one column")
            found[_label(label)] = column
    _require(frame, found.values())
    if len(found) > 1:
        return list(found), list(found.values())
    (event,) = found
    others = [label for label in seen if label != event]
    if len(others) > 1:
        raise InputError(
            f"only the class {event!r} has a column of probabilities, and {target!r} also takes the values "
            f"{_listed(others)}: {_HOW}"
        )
    return [others[0] if others else f"not {event}", event], list(found.values())


def _split(text: str, columns: Iterable[str], form: str) -> tuple[str, str]:
    """The two sides of an equals sign; either may hold others, of which the column's name tells."""
    columns = set(columns)
    cuts = [i for i, character in enumerate(text) if character == "=" and i > 0]
    known = [i for i in cuts if text[i + 1 :] in columns]
    if not cuts:
        known_as = "is not a column of the table" if text not in columns else "has no label"
        raise InputError(f"{text!r} {known_as}: write {form}; the table has {_listed(columns)}")
    cut = known[0] if known else cuts[0]
    return text[:cut], text[cut + 1 :]


def _sets(frame: pd.DataFrame, rows: np.ndarray) -> list[set[str]]:
    found = []
    for row, text in zip(rows, frame["prediction_set"], strict=True):
        try:
            members = json.loads(text) if isinstance(text, str) else text
        except json.JSONDecodeError:
            members = None
        if not isinstance(members, list):
            raise InputError(
                f'row {row} has the prediction_set {text!r}: write it as a JSON list, such as ["a", "b"], or drop the '
                "column"
            )
        found.append({_label(member) for member in members})
    return found


# ---- numbers -------------------------------------------------------------------------------------------------------


def _outcomes(frame: pd.DataFrame, target: str, rows: np.ndarray) -> np.ndarray:
    y = pd.to_numeric(frame[target], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = ~np.isfinite(y)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"row {rows[row]} has the target {str(frame[target].iloc[row])!r}, which is not a finite number, while the "
            f"predictions are of numbers; for classes, {_HOW}"
        )
    return y


def _quantiles_by_name(names: Iterable[str]) -> dict[float, str]:
    found = {}
    for name in names:
        level = _number(name.removeprefix(_QUANTILE)) if name.startswith(_QUANTILE) else None
        if level is not None and 0 < level < 1:
            found[level] = name
    return found


def _quantile_columns(frame: pd.DataFrame, mapping: ColumnMap) -> dict[float, str]:
    """Columns of quantiles by level, in increasing order."""
    if not mapping.quantiles:
        found = _quantiles_by_name(frame.columns)
    elif isinstance(mapping.quantiles, Mapping):
        found = {float(level): name for level, name in mapping.quantiles.items()}
    else:
        found = {}
        for text in mapping.quantiles:
            level, column = _split(text, frame.columns, "--quantile LEVEL=COLUMN, such as 0.1=low")
            value = _number(level)
            if value is None or value in found:
                reason = "is no number" if value is None else "is mapped twice"
                raise InputError(
                    f"the level {level!r} of --quantile {text!r} {reason}: write LEVEL=COLUMN once for each"
                )
            found[value] = column
    wrong = [level for level in found if not 0 < level < 1]
    if wrong:
        raise InputError(f"a quantile level must lie strictly between 0 and 1, got {wrong[0]:g}: 0.9 stands for 90%")
    if len(found) < 2:
        raise InputError(
            f"a distribution needs two quantiles at the least, and there is {_listed(found.values())}: map more with "
            "--quantile LEVEL=COLUMN"
        )
    _require(frame, found.values())
    return dict(sorted(found.items()))


def _read_quantiles(frame: pd.DataFrame, columns: dict[float, str], numeric: dict[str, Any]) -> Reading:
    rows, levels = numeric["rows"], np.array(list(columns))
    values, notes = _numbers(frame, list(columns.values()), rows), []
    crossing = (np.diff(values, axis=1) < -_CROSSED * (1 + np.abs(values).max(1, keepdims=True))).any(1)
    if crossing.any():
        row = int(crossing.argmax())
        notes.append(
            (
                f"Quantiles cross in {int(crossing.sum())} rows, first in row {rows[row]} ({_shown(values[row])}): "
                "sort them within each row, as was done here before they were scored.",
                False,
            )
        )
    values = np.sort(values, axis=1)
    source = f"{len(levels)} quantiles, from {levels[0]:g} to {levels[-1]:g}"
    predictive = as_predictive(values, quantile_levels=levels)
    return Reading(predictive=predictive, source=source, levels=levels, values=values, notes=tuple(notes), **numeric)


def _require(frame: pd.DataFrame, names: Iterable[str]) -> None:
    lacking = [name for name in names if name not in frame.columns]
    if lacking:
        raise InputError(f"there is no column {lacking[0]!r}; the table has {_listed(frame.columns)}")


def _numbers(frame: pd.DataFrame, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Columns of finite numbers, shape (rows, columns)."""
    columns = [pd.to_numeric(frame[n], errors="coerce").to_numpy(np.float64, na_value=np.nan) for n in names]
    values = np.stack(columns, 1)
    wrong = ~np.isfinite(values)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"row {rows[row]} has {str(frame[names[column]].iloc[row])!r} in {names[column]!r}, which is not a finite "
            "number: mend the prediction or drop the row"
        )
    return values


def _refuse(wrong: np.ndarray, values: np.ndarray, rows: np.ndarray, what: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"row {rows[row]} ({_shown(values[row])}) {what}")


def _shown(values: np.ndarray) -> str:
    return ", ".join(f"{v:.6g}" for v in values[:8]) + (", …" if len(values) > 8 else "")


def _listed(names: Iterable[Any]) -> str:
    names = [repr(str(n)) for n in names]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


# ---- rows that depend on each other --------------------------------------------------------------------------------


def dependence_of(frame: pd.DataFrame, groups: str | None, time: str | None) -> dict[str, np.ndarray | None]:
    """The columns of groups or of time as arguments of `mean_error`, by name.

    >>> dependence_of(pd.DataFrame({"day": ["2024-02-01", "2024-01-01"]}), None, "day")["time"].tolist()
    [2.0, 1.0]

    Raises:
        InputError: both of them, a column that is lacking or has gaps, or times that are neither numbers nor dates.
    """
    if groups is not None and time is not None:
        raise InputError("give groups or time, not both: time already takes the rows of one time together")
    return {"groups": _labels(frame, groups, "groups"), "time": _labels(frame, time, "time")}


def _labels(frame: pd.DataFrame, name: str | None, role: str) -> np.ndarray | None:
    """A grouping column as codes, or a time column as ranks."""
    if name is None:
        return None
    if name not in frame.columns:
        raise InputError(f"{role} column {name!r} is not in the table; it has {_listed(frame.columns)}")
    series = frame[name]
    if series.isna().any():
        raise InputError(f"{role} column {name!r} has missing values: fill or drop those rows")
    if role == "groups":
        return pd.factorize(series)[0]
    if not pd.api.types.is_numeric_dtype(series):
        moments = pd.to_datetime(series, errors="coerce", format="mixed")
        if moments.isna().any():
            first = series[moments.isna()].iloc[0]
            raise InputError(f"time column {name!r} holds {first!r}, which is neither number nor date")
        series = moments
    return series.rank(method="dense").to_numpy()
