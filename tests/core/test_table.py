"""Tables: every kind of column, in training and at prediction, and targets of every kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.table import MAX_CATEGORIES, MAX_INDICATORS, Table, Target, as_frame, guess_task, rounding_step


def column(values, **frame):
    """The one column of a table, as it was understood."""
    return Table.from_data(pd.DataFrame({"a": values, **frame})).columns[0]


def repeated(values, rows=40):
    return (values * rows)[:rows]


KINDS = [
    ("numbers", [1.5, 2.0, 3.0], "numeric"),
    ("whole numbers", [1, 2, 3], "numeric"),
    ("numbers and missing", [1.5, None, 3.0], "numeric"),
    ("numeric text", ["1.5", "2", "3e2"], "numeric"),
    ("numeric text with missing", ["1.5", None, "3e2"], "numeric"),
    ("nullable integers", pd.array(repeated([1, None, 3]), dtype="Int64"), "numeric"),
    ("nullable floats", pd.array(repeated([1.0, None, 3.0]), dtype="Float64"), "numeric"),
    ("text", ["red", "green", "blue"], "categorical"),
    ("text with missing", ["red", None, "blue"], "categorical"),
    ("booleans", [True, False, True], "categorical"),
    ("nullable booleans", pd.array(repeated([True, None, False]), dtype="boolean"), "categorical"),
    ("nullable strings", pd.array(repeated(["a", None, "b"]), dtype="string"), "categorical"),
    ("pandas categories", pd.Categorical(repeated(["lo", "hi", None])), "categorical"),
    ("numeric categories", pd.Categorical(repeated([3, 1, 2])), "categorical"),
    ("mixed types", ["red", 1, 2.5], "categorical"),
    ("ISO dates", ["2024-01-05", "2024-02-06", "2023-12-31"], "date"),
    ("ISO times", ["2024-01-05T10:20:00", "2024-02-06 11:00", "2023-12-31 23:59:59"], "date"),
    ("day first dates", ["05.01.2024", "06.02.2024", "31.12.2023"], "date"),
    ("timestamps", pd.to_datetime(repeated(["2024-01-05", None, "2023-12-31"])), "date"),
    ("zoned timestamps", pd.to_datetime(repeated(["2024-01-05", "2023-12-31"])).tz_localize("Asia/Tokyo"), "date"),
    ("all missing", [None, None, None], "dropped"),
    ("constant number", [2.0, 2.0, 2.0], "dropped"),
    ("constant text", ["a", "a", "a"], "dropped"),
    ("text identifiers", [f"customer-{i}" for i in range(40)], "dropped"),
]


@pytest.mark.parametrize(("values", "kind"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_kinds(values, kind):
    values = repeated(values) if isinstance(values, list) else values
    frame = pd.DataFrame({"a": values})
    table = Table.from_data(frame)
    assert table.columns[0].kind == kind
    assert bool(table.warnings) == (kind == "dropped")
    trees, dense = table.trees(frame), table.dense(frame)
    assert trees.shape == (len(frame), len(table.feature_names)) and trees.dtype == np.float32
    assert np.isfinite(dense).all() and dense.dtype == np.float32
    missing = frame["a"].isna().to_numpy()
    if kind != "dropped":
        assert (np.isnan(trees).any(1) == missing).all()
        assert table.columns[0].has_missing == missing.any()
        # One row alone gives the same features as all rows together.
        for row in (0, 1, 2):
            np.testing.assert_array_equal(table.trees(frame.iloc[[row]])[0], trees[row])
            np.testing.assert_array_equal(table.dense(frame.iloc[[row]])[0], dense[row])


def test_standardized_and_imputed():
    frame = pd.DataFrame({"a": [1.0, np.nan, 3.0, 8.0]})
    dense = Table.from_data(frame).dense(frame)
    present = np.array([1.0, 3.0, 8.0])
    np.testing.assert_allclose(dense[[0, 2, 3], 0], (present - present.mean()) / present.std(), rtol=1e-6)
    np.testing.assert_array_equal(dense[1], [0.0, 1.0])
    np.testing.assert_array_equal(dense[:, 1], [0, 1, 0, 0])


def test_weights_are_repetitions():
    days = pd.to_datetime(["2024-01-01", "2024-01-01", "2024-01-01", "2024-06-01"])
    frame = pd.DataFrame({"a": [1.0, 2.0, np.nan, 5.0], "b": ["x", "y", "y", "z"], "c": days})
    weights = np.array([3, 1, 0, 2])
    weighted, whole = Table.from_data(frame, weights), Table.from_data(frame.loc[frame.index.repeat(weights)])
    for one, other in zip(weighted.columns, whole.columns, strict=True):
        assert (one.kind, one.categories, one.has_missing) == (other.kind, other.categories, other.has_missing)
        np.testing.assert_allclose(one.centers, other.centers)
        np.testing.assert_allclose(one.scales, other.scales)


def test_array_and_frame_agree_and_arrays_are_traceable():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    x[4, 1] = np.nan
    table = Table.from_data(x)
    assert table.names == ("x0", "x1", "x2")
    np.testing.assert_array_equal(table.dense(x), table.dense(as_frame(x)))
    traced = jax.jit(lambda v: table.dense(v))(jnp.asarray(x))
    np.testing.assert_allclose(traced, table.dense(x), atol=1e-5)
    with pytest.raises(InputError, match="numeric columns only"):
        Table.from_data(as_frame(x)).dense(jnp.asarray(x))
    with pytest.raises(InputError, match="X has 2 features, but this model was fitted with 3"):
        table.trees(x[:, :2])


def test_array_of_text_is_read_like_a_frame():
    table = Table.from_data(np.array([["a", "1.5"], ["b", "2"], ["a", "7"]], object))
    assert [c.kind for c in table.columns] == ["categorical", "numeric"]


def test_large_numbers_keep_their_digits():
    # Seconds since 1970, a second apart: float32 would see 128-second steps.
    seconds = 1.7e9 + np.arange(100.0)
    dense = Table.from_data(seconds[:, None]).dense(seconds[:, None])[:, 0]
    np.testing.assert_allclose(np.diff(dense), np.diff(dense).mean(), rtol=1e-3)


def test_dates_become_parts():
    frame = pd.DataFrame({"when": pd.to_datetime(["2024-03-01 06:00", "1969-12-31 00:00", "2024-12-31 00:00"])})
    table = Table.from_data(frame)
    assert table.feature_names == ("when.days", "when.day_of_year", "when.weekday", "when.hour")
    np.testing.assert_allclose(table.trees(frame)[0], [19783.25, 61, 4, 6])
    np.testing.assert_allclose(table.trees(frame)[1:, :2], [[-1, 365], [20088, 366]])
    # Text, other precision and time zones are read as the same moment.
    same = table.trees(pd.DataFrame({"when": ["2024-03-01 06:00"]}))
    np.testing.assert_array_equal(same, table.trees(frame.iloc[:1].astype("datetime64[s]")))
    zoned = frame["when"].dt.tz_localize("UTC").to_frame()
    np.testing.assert_array_equal(Table.from_data(zoned).trees(zoned), table.trees(frame))


@pytest.mark.parametrize(
    ("texts", "months"),
    [
        (["05.01.2024", "06.02.2024"], [1, 2]),
        (["05/01/2024", "31/12/2023"], [1, 12]),
        (["05/01/2024", "12/31/2023"], [5, 12]),
        (["2024-01-05", "2023/12/31"], [1, 12]),
    ],
)
def test_day_and_month_are_told_apart_by_the_whole_column(texts, months):
    table = Table.from_data(pd.DataFrame({"d": texts}))
    first = [pd.Timestamp(2024 if m < 12 else 2023, m, 1).day_of_year for m in months]
    days = [table.trees(pd.DataFrame({"d": [t]}))[0, 1] for t in texts]
    assert all(start <= day < start + 31 for start, day in zip(first, days, strict=True))


def test_unreadable_dates_are_missing():
    table = Table.from_data(pd.DataFrame({"d": repeated(["2024-01-05", "2024-02-06", "2023-12-31"])}))
    assert np.isnan(table.trees(pd.DataFrame({"d": ["soon"]}))).all()


def test_categories():
    frame = pd.DataFrame({"c": ["b", "a", "b", "c", "b", "c"]})
    table = Table.from_data(frame)
    assert table.columns[0].categories == ("b", "c", "a")  # most frequent first, then by name
    np.testing.assert_array_equal(table.trees(frame)[:, 0], [0, 2, 0, 1, 0, 1])
    assert table.categorical_features == (0,)
    new = pd.DataFrame({"c": ["new", None, "a"]})
    np.testing.assert_array_equal(table.trees(new)[:, 0], [np.nan, np.nan, 2])
    np.testing.assert_array_equal(table.dense(new), [[0, 0, 0], [0, 0, 0], [0, 0, 1]])
    assert table.unseen_categories(new).tolist() == [True, False, False]


def test_whole_numbers_are_one_category_in_any_type():
    kinds = [pd.Categorical([1, 2, 1, 2]), pd.Categorical([1.0, 2.0, 1.0, 2.0])]
    tables = [Table.from_data(pd.DataFrame({"c": k})) for k in kinds]
    assert tables[0].columns[0].categories == tables[1].columns[0].categories == ("1", "2")
    later = [pd.Series([2, 1]), pd.Series([2.0, 1.0]), pd.Series(["2", "1"]), pd.Series([2, 1], dtype="Int64")]
    for series in later:
        assert tables[0].trees(series.to_frame("c"))[:, 0].tolist() == [1.0, 0.0]


def test_booleans_are_one_category_in_any_type():
    table = Table.from_data(pd.DataFrame({"c": [True, False, True]}))
    for series in (pd.Series([False]), pd.Series([False], dtype="boolean"), pd.Series([False], dtype=object)):
        assert table.trees(series.to_frame("c")).tolist() == [[1.0]]
        assert table.unseen_categories(series.to_frame("c")).tolist() == [False]


def test_many_categories_are_capped():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"c": rng.integers(0, 400, 5000).astype(str)})
    frame["c"] = "k" + frame["c"]
    table = Table.from_data(frame)
    assert len(table.columns[0].categories) == MAX_CATEGORIES
    assert table.dense(frame).shape[1] == MAX_INDICATORS
    assert not table.unseen_categories(frame).any()  # rare is not unseen


def test_identifiers_are_warned_about():
    rows = np.arange(50)
    noise = np.random.default_rng(0).normal(size=50)
    table = Table.from_data(pd.DataFrame({"customer_id": rows * 3, "visits": rows, "x": noise}))
    assert [c.kind for c in table.columns] == ["dropped", "numeric", "numeric"]
    assert "identifier" in table.warnings[0] and "row number" in table.warnings[1] and len(table.warnings) == 2
    # Not for arrays, whose columns have no names, nor for repeated values.
    assert Table.from_data(np.stack([rows, noise], 1)).warnings == ()
    assert Table.from_data(pd.DataFrame({"store_id": rows % 10})).columns[0].kind == "numeric"


def test_infinities_are_refused():
    for bad in (np.inf, -np.inf):
        with pytest.raises(InputError, match="column 'a' holds 1 infinity value"):
            Table.from_data(pd.DataFrame({"a": [1.0, bad]}))
        table = Table.from_data(pd.DataFrame({"a": [1.0, 2.0]}))
        with pytest.raises(InputError, match="infinity"):
            table.trees(pd.DataFrame({"a": [bad]}))
        with pytest.raises(InputError, match="infinity"):
            table.dense(pd.DataFrame({"a": [bad]}))
    array = Table.from_data(np.arange(4.0)[:, None])
    for view in (array.trees, array.dense):
        with pytest.raises(InputError, match="infinity"):
            view(np.array([[np.inf]]))


def test_order_of_columns_and_further_columns_do_not_matter():
    frame = pd.DataFrame({"a": [1.0, 2.0, 4.0], "b": ["x", "y", "x"], "c": [0.1, 0.2, 0.4]})
    table = Table.from_data(frame)
    shuffled = frame[["c", "b", "a"]].assign(extra=1)
    np.testing.assert_array_equal(table.dense(shuffled), table.dense(frame))
    with pytest.raises(InputError, match=r"lacks the columns \['b'\]"):
        table.dense(frame.drop(columns="b"))
    # A column that is not used may be absent.
    table = Table.from_data(frame.assign(empty=None))
    np.testing.assert_array_equal(table.dense(frame), Table.from_data(frame).dense(frame))


def test_names_that_are_not_text():
    frame = pd.DataFrame({0: [1.0, 2.0], 1: ["x", "y"]})
    assert Table.from_data(frame).names == ("0", "1")
    assert Table.from_data(frame).trees(frame).shape == (2, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pd.DataFrame({"a": []}), "no rows"),
        (pd.DataFrame(index=range(3)), "no columns"),
        (np.zeros((0, 2)), "no rows"),
        (np.zeros((2, 0)), "no columns"),
        (np.zeros(3), "expected 2D array"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), r"duplicate column names \['a'\]"),
        (pd.DataFrame([[1, 2]], columns=[1, "1"]), "duplicate column names"),
    ],
)
def test_unusable_tables_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        Table.from_data(data)


def test_table_without_any_usable_column():
    table = Table.from_data(np.ones((3, 2)))
    assert table.trees(np.ones((5, 2))).shape == table.dense(np.ones((5, 2))).shape == (5, 0)


TARGETS = [
    (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
    ([True, False, True], (False, True), [1, 0, 1]),
    ([3, 1, 3], (1, 3), [1, 0, 1]),
    (pd.Series([3.5, 1.0, 3.5]), (1.0, 3.5), [1, 0, 1]),
    (pd.Series(["x", "y", "x"], dtype="category"), ("x", "y"), [0, 1, 0]),
    (pd.Series([True, False], dtype="boolean"), (False, True), [1, 0]),
    (pd.Series([2, 1], dtype="Int64"), (1, 2), [1, 0]),
    ([1.5, 2.5, 7.0], None, [1.5, 2.5, 7.0]),
    (pd.Series([1, 2, 3], dtype="Int64"), None, [1, 2, 3]),
    (np.array([[1.0], [2.0], [4.0]]), None, [1, 2, 4]),
    (["low", "mid", "high", "low"], ("high", "low", "mid"), [1, 2, 0, 1]),
]


@pytest.mark.parametrize(("y", "classes", "values"), TARGETS)
def test_targets(y, classes, values):
    target = Target.from_values(y)
    assert target.classes == classes and target.values.tolist() == values
    again = Target.with_classes(y, classes)
    assert again.values.tolist() == values and again.classes == classes
    assert Target.from_values(target) is target
    assert target.rows(np.array([1])).values.tolist() == values[1:2]


def test_task_given():
    assert Target.from_values([0, 1, 0], "regression").values.tolist() == [0, 1, 0]
    assert Target.from_values([True, False, True], "regression").values.tolist() == [1, 0, 1]
    assert Target.from_values([1, 2, 3], "classification").classes == (1, 2, 3)
    assert Target.from_values(["1.5", "2.5", "3"], "regression").values.tolist() == [1.5, 2.5, 3.0]


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        ([], "auto", "no rows"),
        ([None, None], "auto", "only missing"),
        ([1.0, np.nan, 2.0], "auto", "1 rows"),
        ([1.0, np.inf, 2.0], "regression", "infinity"),
        ([1.0, np.inf, 2.0], "classification", "infinity"),
        (["a", "b"], "regression", "not numeric: 'a'"),
        (["a", "a"], "auto", "one class only, 'a'"),
        (np.zeros((3, 2)), "auto", r"shape \(rows,\), got \(3, 2\)"),
    ],
)
def test_unusable_targets_are_refused(y, task, message):
    with pytest.raises(InputError, match=message):
        Target.from_values(y, task)


def test_unseen_label_is_refused():
    with pytest.raises(InputError, match="label 'c' was not seen"):
        Target.with_classes(["a", "c"], ("a", "b"))


def test_guessing():
    guesses = {s: guess_task(pd.Series(v)) for s, v in {
        "two": [1, 2, 1], "three": [1, 2, 3], "text": ["1", "2", "3"], "bool": [True, False], "floats": [0.1, 0.2, 0.3],
    }.items()}  # fmt: skip
    regression = {s for s, g in guesses.items() if g == "regression"}
    assert regression == {"three", "floats"}


@pytest.mark.parametrize(
    ("values", "step"),
    [
        (np.arange(20), 1.0),
        (np.arange(20) % 7, 1.0),
        (np.arange(60) % 7 / 2, 0.5),
        (np.arange(60) % 20 / 10, 0.1),
        (np.arange(60) % 20 * 5.0, 1.0),
        (np.arange(60) % 20 / 1000, 0.001),
        (np.random.default_rng(0).normal(size=100), None),
        (np.round(np.random.default_rng(0).normal(size=500), 1), 0.1),
        (np.round(np.random.default_rng(0).normal(size=20), 3), None),
        (np.repeat(np.random.default_rng(0).normal(size=30), 3), None),
        (np.ones(5), None),
        (1e6 + np.arange(60) % 20 / 10, 0.1),
    ],
)
def test_rounding_step(values, step):
    assert rounding_step(values) == step
