"""Tables: how a frame with missing values, text, dates and categories becomes arrays, and back for the target."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Bool, Float

from bayeslens.core.errors import InputError

MAX_CATEGORIES = 254  # most frequent categories kept for trees
MAX_INDICATORS = 30  # most frequent categories with an indicator column of their own
_IDENTIFIER_NAME = re.compile(
    r"(^|[_\s.])(id|ids|uuid|guid|index|key|rownames?|row|no|nr|number|unnamed:?\s*0?)$", re.I
)
_DATE_TEXT = re.compile(
    r"^\s*\d{4}[-/]\d{1,2}[-/]\d{1,2}([T\s]\d{1,2}:\d{2}.*)?\s*$|^\s*\d{1,2}[-/.]\d{1,2}[-/.]\d{4}\s*$"
)
_DAY_OR_MONTH_FIRST = re.compile(r"^\s*(\d{1,2})([-/.])\d{1,2}[-/.]\d{4}")
_DATE_PARTS = ("days", "day_of_year", "weekday", "hour")


class Column(eqx.Module):
    """One column of a table as it was seen in training.

    `kind` is `numeric`, `categorical`, `date` or `dropped` (then `reason` says why). `centers` and `scales` have
    one entry per numeric feature; `categories` are the texts of known categories, most frequent first; `day_first`
    says how 05/01/2024 is read.
    """

    name: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    reason: str = eqx.field(static=True, default="")
    categories: tuple[str, ...] = eqx.field(static=True, default=())
    has_missing: bool = eqx.field(static=True, default=False)
    centers: tuple[float, ...] = eqx.field(static=True, default=())
    scales: tuple[float, ...] = eqx.field(static=True, default=())
    day_first: bool = eqx.field(static=True, default=False)

    @property
    def num_features(self) -> int:
        """Features in the tree view."""
        return {"numeric": 1, "categorical": 1, "date": len(_DATE_PARTS)}.get(self.kind, 0)


class Table(eqx.Module):
    """How the columns of a table become features, learned from the training rows.

    Two views: `trees(x)` keeps missing values and category codes for learners that split; `dense(x)` is
    standardized, imputed and one-hot for learners that multiply.

    >>> table = Table.from_data(pd.DataFrame({"a": [1.0, None, 3.0], "b": ["x", "y", "x"]}))
    >>> table.trees(pd.DataFrame({"a": [2.0], "b": ["new"]})).tolist()
    [[2.0, nan]]
    """

    columns: tuple[Column, ...] = eqx.field(static=True)
    is_array: bool = eqx.field(static=True, default=False)

    @classmethod
    def from_data(cls, data: Any, weights: Any = None) -> Table:
        """Look at the training rows.

        Args:
            data: a DataFrame, or an array of shape (rows, columns).
            weights: how much each row counts in means, scales and the order of categories, shape (rows,); a row of
                weight 2 is as good as two rows, and one of weight 0 is not looked at.

        Raises:
            InputError: no rows, no columns, duplicate names or infinite values.
        """
        frame = as_frame(data)
        # An array of text is read like a frame.
        is_array = not isinstance(data, pd.DataFrame | pd.Series) and all(d.kind in "fiub" for d in frame.dtypes)
        weights = np.ones(len(frame)) if weights is None else np.asarray(weights, np.float64)
        if (weights == 0).any():
            frame, weights = frame[weights > 0], weights[weights > 0]
        if 0 in frame.shape:
            raise InputError(f"the table has no {'rows' if frame.shape[0] == 0 else 'columns'}")
        names = frame.columns.map(str)
        repeated = names[names.duplicated()].unique().tolist()
        if repeated:
            raise InputError(f"duplicate column names {repeated}: rename them so that each name stands once")
        columns = tuple(_look_at(str(name), frame[name], weights, is_array) for name in frame.columns)
        return cls(columns, is_array)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns seen in training."""
        return tuple(c.name for c in self.columns)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each column that is not used, or that looks like an identifier."""
        return tuple(f"column {c.name!r}: {c.reason}" for c in self.columns if c.reason)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features of the tree view."""
        names: list[str] = []
        for c in self.columns:
            names += [f"{c.name}.{part}" for part in _DATE_PARTS] if c.kind == "date" else [c.name] * c.num_features
        return tuple(names)

    @property
    def categorical_features(self) -> tuple[int, ...]:
        """Positions of the category codes in the tree view."""
        kinds = [c.kind for c in self.columns for _ in range(c.num_features)]
        return tuple(i for i, kind in enumerate(kinds) if kind == "categorical")

    def check(self, data: Any) -> pd.DataFrame:
        """The needed columns of `data`, in training order.

        Raises:
            InputError: a column is lacking, or an array has another number of columns.
        """
        frame = as_frame(data)
        if self.is_array and not isinstance(data, pd.DataFrame):
            if frame.shape[1] != len(self.columns):
                raise InputError(
                    f"X has {frame.shape[1]} features, but this model was fitted with {len(self.columns)} features "
                    "as input"
                )
            frame.columns = list(self.names)
            return frame
        frame = frame.rename(columns=str)
        lacking = [c.name for c in self.columns if c.name not in frame.columns and c.kind != "dropped"]
        if lacking:
            raise InputError(f"the table lacks the columns {lacking}, which the model was trained on")
        return frame

    def trees(self, data: Any) -> Float[np.ndarray, "rows features"]:
        """Features for trees: numbers with NaN where missing, category codes with NaN where missing or unseen."""
        with np.errstate(over="ignore"):
            return self._features(data).astype(np.float32)

    def unseen_categories(self, data: Any) -> Bool[np.ndarray, " rows"]:
        """Rows with a category that no training row had (missing values are not categories)."""
        frame = self.check(data)
        unseen = np.zeros(len(frame), bool)
        for c in self.columns:
            if c.kind == "categorical" and len(c.categories) < MAX_CATEGORIES:
                texts = _texts(frame[c.name])
                unseen |= ~texts.isin(c.categories).to_numpy() & texts.notna().to_numpy()
        return unseen

    def dense(self, data: Any) -> Float[Array, "rows inputs"]:
        """Standardized features, imputed by the mean with an indicator of missingness, categories one-hot.

        A `jax.Array` may be traced, when every column is numeric.
        """
        if isinstance(data, jax.Array):
            if not self.is_array:
                raise InputError("a traced array needs a table of numeric columns only")
            return self._standardize(data, jnp)
        return self._standardize(self._features(data), np)

    def _features(self, data: Any) -> Float[np.ndarray, "rows features"]:
        """The tree view in float64: seconds since 1970 lose their minutes in float32."""
        if self.is_array and not isinstance(data, pd.DataFrame):
            array = np.asarray(data, np.float64)
            if array.ndim != 2 or array.shape[1] != len(self.columns):
                self.check(data)
            if np.isinf(array).any():
                number = int(np.isinf(array).any(0).argmax())
                raise InputError(f"column {number} holds infinity values: replace them by missing values")
            return array[:, [i for i, c in enumerate(self.columns) if c.num_features]]
        frame = self.check(data)
        blocks = [_tree_features(c, frame[c.name]) for c in self.columns if c.num_features]
        return np.concatenate(blocks, 1) if blocks else np.zeros((len(frame), 0))

    def _standardize(self, x: Any, xp: Any) -> Any:
        if xp is jnp:
            x = x[:, np.array([i for i, c in enumerate(self.columns) if c.num_features], int)]
        blocks, position = [], 0
        for c in self.columns:
            part = x[:, position : position + c.num_features]
            position += c.num_features
            if c.kind in ("numeric", "date"):
                missing = xp.isnan(part)
                scaled = (part - np.asarray(c.centers, part.dtype)) / np.asarray(c.scales, part.dtype)
                blocks.append(xp.clip(xp.where(missing, 0.0, scaled), -20.0, 20.0))
                if c.has_missing:
                    blocks.append(missing[:, :1].astype(part.dtype))
            elif c.kind == "categorical":
                kept = min(len(c.categories), MAX_INDICATORS)
                # Two categories need one indicator; unseen and missing get none.
                codes = np.arange(1 if kept == 2 and not c.has_missing else kept)
                blocks.append((part == codes).astype(part.dtype))
        if not blocks:
            return xp.zeros((x.shape[0], 0), np.float32)
        return xp.concatenate(blocks, 1) if xp is jnp else np.concatenate(blocks, 1, dtype=np.float32)


def as_frame(data: Any) -> pd.DataFrame:
    """A DataFrame view of a frame, a Series, or an array of shape (rows, columns) with columns x0, x1, …

    Raises:
        InputError: the array is not two-dimensional.
    """
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, pd.Series):
        return data.to_frame()
    array = np.asarray(data)
    if array.ndim != 2:
        raise InputError(f"expected 2D array (rows, columns), got shape {array.shape}. Reshape your data.")
    return pd.DataFrame(array, columns=[f"x{i}" for i in range(array.shape[1])])


def _numbers(series: pd.Series) -> np.ndarray:
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "fiub":
        return series.to_numpy(np.float64)
    return pd.to_numeric(series, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def _dates(series: pd.Series, day_first: bool) -> pd.Series:
    if not pd.api.types.is_datetime64_any_dtype(series):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            series = pd.to_datetime(series, errors="coerce", utc=True, format="mixed", dayfirst=day_first)
    return series.dt.tz_localize(None) if getattr(series.dt, "tz", None) is not None else series


def _is_day_first(present: pd.Series) -> bool:
    """Whether dates such as 05.01.2024 start with the day: with points they do, else if a first number exceeds 12."""
    if pd.api.types.is_datetime64_any_dtype(present):
        return False
    parts = present.astype(str).str.extract(_DAY_OR_MONTH_FIRST)
    return bool((parts[1] == ".").any() or (pd.to_numeric(parts[0]) > 12).any())


def _texts(series: pd.Series) -> pd.Series:
    """Categories as text; whole numbers lose their decimal point, so that 1 and 1.0 are one category."""
    missing = series.isna()
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = pd.Series(np.asarray(series), series.index)
    if pd.api.types.is_float_dtype(series) and (series.dropna() == series.dropna().round()).all():
        series = series.astype("Int64")
    return series.astype(str).where(~missing, None)


def _look_at(name: str, series: pd.Series, weights: np.ndarray, is_array: bool) -> Column:
    """Decide what a column is, from its training values."""
    present = series.dropna()
    if len(present) == 0:
        return Column(name, "dropped", "all values are missing; not used")
    kind = "numeric"
    is_boolean = pd.api.types.is_bool_dtype(series)
    if not (is_array or (pd.api.types.is_numeric_dtype(series) and not is_boolean)):
        kind = _kind_of_text(present) if not is_boolean else "categorical"
    if kind == "numeric":
        return _look_at_numbers(name, series, weights, is_array)
    if kind == "date":
        day_first = _is_day_first(present)
        features = _date_features(_dates(series, day_first))
        if not np.isfinite(features[:, 0]).any():
            return Column(name, "dropped", "no date could be read; not used")
        has_missing = bool(np.isnan(features[:, 0]).any())
        moments = _centers_and_scales(features, weights)
        return Column(name, "date", has_missing=has_missing, day_first=day_first, **moments)
    texts = _texts(series)
    counts = pd.Series(weights).groupby(texts.to_numpy()).sum()
    if len(counts) == 1 and not texts.isna().any():
        return Column(name, "dropped", "constant; not used")
    if len(counts) > 20 and len(counts) > 0.9 * len(present) and not isinstance(series.dtype, pd.CategoricalDtype):
        return Column(name, "dropped", "looks like an identifier (nearly every value is different); not used")
    counts = counts.sort_index().sort_values(ascending=False, kind="stable")
    kept = tuple(str(c) for c in counts.index[:MAX_CATEGORIES])
    return Column(name, "categorical", categories=kept, has_missing=bool(texts.isna().any()))


def _kind_of_text(present: pd.Series) -> str:
    if pd.api.types.is_datetime64_any_dtype(present):
        return "date"
    if isinstance(present.dtype, pd.CategoricalDtype):
        return "categorical"
    sample = present.iloc[:: max(1, len(present) // 1000)].astype(str)
    if pd.to_numeric(sample, errors="coerce").notna().mean() > 0.95:
        return "numeric"
    if sample.str.match(_DATE_TEXT).mean() > 0.95:
        return "date"
    return "categorical"


def _look_at_numbers(name: str, series: pd.Series, weights: np.ndarray, is_array: bool) -> Column:
    values = _numbers(series)
    infinite = int(np.isinf(values).sum())
    if infinite:
        raise InputError(
            f"column {name!r} holds {infinite} infinity value{'s' * (infinite > 1)}: "
            "replace them by missing values or by finite numbers"
        )
    finite = values[~np.isnan(values)]
    if len(finite) == 0:
        return Column(name, "dropped", "all values are missing; not used")
    if finite.min() == finite.max() and len(finite) == len(values):
        return Column(name, "dropped", "constant; not used")
    reason = ""
    if (
        not is_array
        and len(finite) > 20
        and (finite == np.round(finite)).all()
        and len(np.unique(finite)) == len(values)
    ):
        steps = np.diff(finite)
        if _IDENTIFIER_NAME.search(name) and (abs(steps) >= 1).all():
            return Column(name, "dropped", "looks like an identifier (all different, and named like one); not used")
        if (steps == 1).all():
            reason = (
                "looks like an identifier or a row number (1 apart, all different); used, but check that it should be"
            )
    moments = _centers_and_scales(values[:, None], weights)
    return Column(name, "numeric", reason, has_missing=len(finite) < len(values), **moments)


def _centers_and_scales(features: np.ndarray, weights: np.ndarray) -> dict[str, tuple[float, ...]]:
    present = np.where(np.isnan(features), 0.0, weights[:, None])
    share = present / present.sum(0)
    with np.errstate(over="ignore", invalid="ignore"):
        centers = (share * np.nan_to_num(features)).sum(0)
        scales = np.sqrt((share * np.square(np.nan_to_num(features - centers))).sum(0))
    scales = np.where((scales > 0) & np.isfinite(scales), scales, 1.0)
    return {"centers": tuple(centers.tolist()), "scales": tuple(scales.tolist())}


def _date_features(dates: pd.Series) -> np.ndarray:
    """Days since 1970, day of the year, weekday, hour."""
    days = (dates - pd.Timestamp("1970-01-01")) / pd.Timedelta(days=1)
    parts = (days, dates.dt.day_of_year, dates.dt.day_of_week, dates.dt.hour)
    return np.stack([p.to_numpy(np.float64, na_value=np.nan) for p in parts], 1)


def _tree_features(column: Column, series: pd.Series) -> np.ndarray:
    if column.kind == "numeric":
        values = _numbers(series)
        infinite = int(np.isinf(values).sum())
        if infinite:
            raise InputError(f"column {column.name!r} holds {infinite} infinity values: replace them by missing values")
        return values[:, None]
    if column.kind == "date":
        return _date_features(_dates(series, column.day_first))
    codes = pd.Index(column.categories).get_indexer(_texts(series)).astype(np.float64)
    return np.where(codes < 0, np.nan, codes)[:, None]


class Target(eqx.Module):
    """An encoded target: numbers for regression, class codes for classification.

    `classes` are the labels in sorted order (None for regression). `step` is the spacing of a rounded or
    integer-valued target, whose scores are probabilities of rounding cells (None when it is continuous).
    """

    values: Float[np.ndarray, " rows"]
    classes: tuple | None = eqx.field(static=True, default=None)
    step: float | None = eqx.field(static=True, default=None)
    name: str = eqx.field(static=True, default="y")

    @classmethod
    def from_values(cls, y: Any, task: str = "auto") -> Target:
        """Encode target values.

        With `task="auto"`, text, boolean and two-valued targets are classes; other numbers are regression.

        Raises:
            InputError: no rows, missing or infinite values, a single value, or text with `task="regression"`.

        >>> Target.from_values(["b", "a", "b"]).values.tolist()
        [1.0, 0.0, 1.0]
        """
        if isinstance(y, Target):
            return y
        series = y if isinstance(y, pd.Series) else pd.Series(_flat(y))
        name = str(series.name) if series.name is not None else "y"
        if len(series) == 0:
            raise InputError(f"target {name!r} has no rows")
        if series.isna().all():
            raise InputError(f"target {name!r} has only missing values")
        if series.isna().any():
            raise InputError(
                f"target {name!r} contains NaN or missing values in {int(series.isna().sum())} rows: drop them first"
            )
        if task == "auto":
            task = guess_task(series)
        if task == "classification":
            return cls._from_labels(series, name)
        values = _numbers(series)
        if np.isnan(values).any():
            raise InputError(
                f"target {name!r} is not numeric: {series[np.isnan(values)].iloc[0]!r}; use task='classification'"
            )
        if np.isinf(values).any():
            raise InputError(
                f"target {name!r} contains infinity in {int(np.isinf(values).sum())} rows: replace or drop them"
            )
        return cls(values, None, rounding_step(values), name)

    @classmethod
    def with_classes(cls, y: Any, classes: tuple | None) -> Target:
        """Encode outcomes for a model whose classes are known (None for regression).

        Raises:
            InputError: a label that the model has not seen.

        >>> Target.with_classes(["b", "a"], ("a", "b", "c")).values.tolist()
        [1.0, 0.0]
        """
        if classes is None:
            return cls.from_values(y, "regression")
        labels = _flat(y).astype(object)
        codes = pd.Index(classes, dtype=object).get_indexer(labels)
        if (codes < 0).any():
            raise InputError(
                f"the label {labels[codes < 0][0]!r} was not seen in training; known: {list(classes)[:12]}"
            )
        return cls(codes.astype(np.float64), classes)

    def rows(self, index: Any) -> Target:
        """The target of some rows, with the same classes and step."""
        return Target(self.values[index], self.classes, self.step, self.name)

    @classmethod
    def _from_labels(cls, series: pd.Series, name: str) -> Target:
        if pd.api.types.is_float_dtype(series) and np.isinf(series.to_numpy(float)).any():
            raise InputError(f"target {name!r} contains infinity")
        labels = sorted(series.unique().tolist(), key=lambda v: (str(type(v)), v))
        if len(labels) < 2:
            raise InputError(f"target {name!r} has one class only, {labels[0]!r}: there is nothing to predict")
        codes = pd.Index(labels, dtype=object).get_indexer(series.astype(object))
        return cls(codes.astype(np.float64), tuple(labels), None, name)


def _flat(y: Any) -> np.ndarray:
    array = np.asarray(y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise InputError(f"the target must have shape (rows,), got {array.shape}")
    return array


def guess_task(series: pd.Series) -> str:
    """`"classification"` for text, boolean, categorical and two-valued targets, otherwise `"regression"`."""
    numeric = pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series)
    return "regression" if numeric and series.nunique() > 2 else "classification"


def rounding_step(values: Sequence[float]) -> float | None:
    """The spacing of values that lie on a lattice and repeat, or None for a continuous target.

    >>> rounding_step(np.arange(50) % 7), rounding_step(np.linspace(0, 1, 50) ** 2)
    (1.0, None)
    """
    distinct = np.unique(np.asarray(values, float))
    if len(distinct) < 2 or len(distinct) == len(values):
        # All different integers are still integers.
        return 1.0 if len(distinct) > 1 and (distinct == np.round(distinct)).all() else None
    for step in (1.0, 0.5, 0.25, 0.1, 0.05, 0.01, 0.005, 0.001):
        scaled = distinct / step
        # Room for float32, but for no more than a hundredth of a step.
        if np.allclose(scaled, np.round(scaled), rtol=0, atol=min(1e-6 * max(1.0, abs(scaled).max()), 0.01)):
            # A lattice matters only when values share cells: few repeats on a fine lattice are chance.
            return step if step == 1.0 or len(distinct) < 0.9 * len(values) else None
    return None


def take(X: Any, rows: np.ndarray) -> Any:
    """Some rows of a frame or an array.

    >>> take(np.arange(6).reshape(3, 2), np.array([2, 0])).tolist()
    [[4, 5], [0, 1]]
    """
    return X.iloc[rows] if hasattr(X, "iloc") else np.asarray(X)[rows]
