"""An audit of predictions in a table: exact on files small enough to compute by hand, and clear about bad ones."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pandas as pd
import pytest
from numpyro import distributions as dist
from scipy import stats

from bayeslens.core.errors import InputError
from bayeslens.evaluation import scores as proper
from bayeslens.evaluation.predictions_audit import audit, holm
from bayeslens.evaluation.score_comparison import mean_error

LEVELS = np.array([0.1, 0.25, 0.5, 0.75, 0.9])


def four() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "y": ["a", "b", "a", "b"],
            "probability_a": [0.8, 0.4, 0.6, 0.2],
            "probability_b": [0.2, 0.6, 0.4, 0.8],
            "prediction_set": ['["a"]', '["a", "b"]', '["b"]', '["b"]'],
        }
    )


def weather(rows: int, sharper: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Chances of rain that come true as said where `sharper` is 1, and are too sure where it is more."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 1.5, rows)
    rain = rng.random(rows) < 1 / (1 + np.exp(-logit))
    return pd.DataFrame({"rain": rain, "p": 1 / (1 + np.exp(-sharper * logit))})


def numbers(rows: int = 40, scale: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Normal outcomes of standard deviation 1, predicted with another, with all that a file may say of them."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=rows)
    frame = pd.DataFrame({"y": mean + rng.normal(size=rows), "mean": mean, "std": np.full(rows, scale)})
    frame["lower"], frame["upper"] = (mean + scale * stats.norm.ppf(q) for q in (0.05, 0.95))
    frame["probability_above_1"] = stats.norm.sf(1, mean, scale)
    frame["log_score"] = stats.norm.logpdf(frame["y"], mean, scale)
    return frame


def with_quantiles(frame: pd.DataFrame, levels: np.ndarray = LEVELS) -> pd.DataFrame:
    columns = {f"quantile_{q:.2f}": frame["mean"] + frame["std"] * stats.norm.ppf(q) for q in levels}
    return frame.assign(**columns).drop(columns=["mean", "std"])


@pytest.fixture(scope="module")
def normal():
    return numbers(), audit(numbers(), "y")


# ---- classes -------------------------------------------------------------------------------------------------------


def test_four_rows_by_hand():
    found = audit(four(), "y")
    assert found.scores["brier"] == pytest.approx((0.08 + 0.32 + 0.32 + 0.08) / 4)
    assert found.scores["log_score"] == pytest.approx(np.log(0.8 * 0.6 * 0.6 * 0.8) / 4)
    (claim,) = found.claims
    assert claim[:4] == ("prediction_set", "set", 0.9, 0.75)
    assert claim.size == 1.25
    assert claim.p_value == pytest.approx(1 - 0.9**4)  # three of four or fewer
    full = audit(four().assign(prediction_set='["a", "b"]'), "y", coverage=0.3)
    assert full.claims[0].p_value == 1  # a set may hold more than it promises
    assert found.scores.event == "b"
    assert found.rows == 4 and found.left_out == 0


@pytest.mark.parametrize(
    "mapping",
    [
        {"probability": "probability_b"},
        {"probability": ["b=probability_b"]},
        {"probability": {"a": "probability_a", "b": "probability_b"}},
        {"probability": ["a=probability_a", "b=probability_b"]},
    ],
)
def test_every_way_of_naming_classes_is_the_same(mapping):
    mapped, found = audit(four(), "y", **mapping), audit(four(), "y")
    assert mapped.scores.event == "b"
    pd.testing.assert_frame_equal(mapped.table, found.table)
    assert mapped.claims == ()  # prediction_set belongs to the columns found by name


@pytest.mark.parametrize("values", [[False, True], [0, 1], [-1.5, 2.0], ["no", "yes"]])
def test_one_column_is_of_the_second_value(values):
    frame = pd.DataFrame({"y": [values[1], values[0], values[1], values[1]], "p": [0.9, 0.2, 0.7, 0.4]})
    expected = 2 * np.mean((frame["p"] - [1, 0, 1, 1]) ** 2)
    assert audit(frame, "y", probability="p").scores["brier"] == pytest.approx(expected)


def test_an_event_is_named_by_its_label():
    frame = pd.DataFrame({"y": ["a", "b", "a"], "p": [0.9, 0.2, 0.7]})
    found = audit(frame, "y", probability=["a=p"])
    assert found.scores.event == "a"
    assert found.scores["brier"] == pytest.approx(2 * np.mean((frame["p"] - [1, 0, 1]) ** 2))


def test_labels_are_found_however_they_are_written():
    # A missing target makes floats of integers: 1.0 is still the class of probability_1.
    frame = pd.DataFrame({"y": [1.0, np.nan, 0.0, 1.0], "probability_0": [0.3, 0.5, 0.8, 0.1]})
    frame["probability_1"] = 1 - frame["probability_0"]
    frame["prediction_set"] = ["[1]", "[0]", "[0, 1]", "[0]"]
    found = audit(frame, "y")
    assert (found.rows, found.left_out) == (3, 1)
    assert found.scores["log_score"] == pytest.approx(np.log(0.7 * 0.8 * 0.9) / 3)
    assert found.claims[0].observed == pytest.approx(2 / 3)
    assert any("1 rows without a value of 'y'" in sentence for sentence in found.verdict)


def test_rounded_probabilities_are_divided_by_their_sum():
    frame = pd.DataFrame({"y": ["a", "b", "c"], "probability_a": 0.333, "probability_b": 0.333, "probability_c": 0.333})
    found = audit(frame, "y")
    assert found.scores["log_score"] == pytest.approx(np.log(1 / 3))
    assert any("3 rows sum to one only nearly (row 0: 0.999)" in sentence for sentence in found.verdict)


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_mean_and_std_are_a_normal(normal):
    frame, found = normal
    y = frame["y"].to_numpy()
    law = dist.Normal(frame["mean"].to_numpy(), 1.0)
    assert found.scores["crps"] == pytest.approx(proper.crps_loss(law, y).mean())
    assert found.scores["log_score"] == pytest.approx(frame["log_score"].mean())
    assert found.log_score.agrees and found.log_score.difference == pytest.approx(0, abs=1e-6)


def test_intervals_and_events_as_written(normal):
    frame, found = normal
    interval, event = found.claims
    inside = (frame["lower"] <= frame["y"]) & (frame["y"] <= frame["upper"])
    assert interval.observed == inside.mean()
    assert interval.p_value == stats.binomtest(int(inside.sum()), len(frame), 0.9).pvalue
    assert interval.size == pytest.approx(2 * stats.norm.ppf(0.95))
    assert event.promised == pytest.approx(frame["probability_above_1"].mean())
    assert event.observed == (frame["y"] > 1).mean()
    brier = ((frame["probability_above_1"] - (frame["y"] > 1)) ** 2).mean()
    assert found.events["probability_above_1"].decomposition.loss == pytest.approx(brier)


def test_quantiles_by_name_and_mapped():
    frame = with_quantiles(numbers(20)[["y", "mean", "std"]])
    y = frame["y"].to_numpy()
    found = audit(frame, "y")
    assert "quantile_loss_0.5" not in found.scores
    for claim, level in zip(found.claims, LEVELS, strict=True):
        below = int((y <= frame[f"quantile_{level:.2f}"]).sum())
        assert claim.kind == "quantile" and claim.observed == below / len(frame)
        one_sided = min(stats.binomtest(below, len(frame), level, side).pvalue for side in ("less", "greater"))
        assert claim.p_value == pytest.approx(min(1, 2 * one_sided))
    names = {q: f"q{i}" for i, q in enumerate(LEVELS)}
    renamed = frame.rename(columns={f"quantile_{q:.2f}": name for q, name in names.items()})
    for mapping in ([f"{q}={n}" for q, n in reversed(names.items())], names):
        mapped = audit(renamed, "y", quantiles=mapping)
        assert mapped.scores["crps"] == found.scores["crps"]
    expected = proper.quantile_loss(renamed["q0"].to_numpy(), 0.1, y).mean()
    assert mapped.scores["quantile_loss_0.1"] == pytest.approx(expected)


def test_an_outcome_that_equals_a_quantile_counts_as_is_kinder():
    y = np.repeat([0.0, 1.0, 2.0], 20)  # the median, 1, is reached by two thirds and exceeds one third
    frame = pd.DataFrame({"y": y, "quantile_0.25": 0.0, "quantile_0.5": 1.0, "quantile_0.75": 2.0})
    assert [claim.p_value for claim in audit(frame, "y").claims] == [1, 1, 1]


def test_draws():
    draws = np.random.default_rng(0).normal(size=(40, 30))
    frame = pd.DataFrame(draws, columns=[f"draw_{i}" for i in range(30)]).assign(y=np.linspace(-1, 1, 40))
    found = audit(frame, "y", samples="draw_")
    expected = proper.crps_loss_from_samples(draws.T, frame["y"].to_numpy()).mean()
    assert found.scores["crps"] == pytest.approx(expected)
    assert found.log_score is None and "log_score" not in found.scores


def test_groups_widen_the_margin():
    frame = pd.concat([numbers(30)] * 2, ignore_index=True).assign(site=np.tile(np.arange(30), 2))
    alone, grouped = (audit(frame, "y", groups=name).claims[0] for name in (None, "site"))
    inside = ((frame["lower"] <= frame["y"]) & (frame["y"] <= frame["upper"])).to_numpy(float)
    error = mean_error(inside, groups=frame["site"].to_numpy())
    assert grouped.standard_error == pytest.approx(error.standard_error) and error.standard_error > alone.standard_error
    expected = 2 * stats.t.sf(abs((inside.mean() - 0.9) / error.standard_error), 29)
    assert grouped.p_value == pytest.approx(expected)
    # Copies of a row in a group are one row.
    assert grouped.standard_error == pytest.approx(audit(frame[:30], "y").claims[0].standard_error)


def test_time_may_be_dates():
    frame = numbers(20)
    days = (pd.Timestamp("2024-03-01") + pd.to_timedelta(np.arange(20), "D")).strftime("%Y-%m-%d")
    by_date, by_number = (audit(frame.assign(t=t), "y", time="t") for t in (days, np.arange(20)))
    assert by_date.claims[0].standard_error == by_number.claims[0].standard_error


# ---- verdict -------------------------------------------------------------------------------------------------------


def test_holm_is_closed_testing_with_bonferroni():
    p_values = np.array([0.012, 0.04, 0.013, 0.3])
    closed = [
        max(
            min(1, len(subset) * min(p_values[list(subset)]))
            for size in range(1, 5)
            for subset in itertools.combinations(range(4), size)
            if i in subset
        )
        for i in range(4)
    ]
    np.testing.assert_allclose(holm(p_values), closed)


def test_calibrated_predictions_pass_and_overconfident_ones_do_not():
    good, bad = audit(weather(1500), "rain", probability="p"), audit(weather(1500, 3.0), "rain", probability="p")
    assert good.is_good and good.advice == "Nothing needs to be done."
    assert not bad.is_good and bad.advice.startswith("Recalibrate")
    assert bad.verdict[0].startswith("The predictions are miscalibrated")
    assert audit(weather(60, seed=1), "rain", probability="p").advice.startswith("Gather more rows")


def test_predictions_worse_than_a_constant_are_told():
    frame = weather(400)
    frame["p"] = 1 - frame["p"]
    assert "One forecast for all rows, their average, would do better" in str(audit(frame, "rain", probability="p"))


def test_a_broken_promise_is_found_beside_good_distributions(normal):
    frame, found = normal
    assert found.is_good
    narrow = frame.assign(lower=frame["mean"] - 1, upper=frame["mean"] + 1)
    told = audit(narrow, "y")
    assert not told.is_good and "less than the 90% they promise" in " ".join(told.verdict)
    assert "lower to upper" in told.advice
    # Levels within an event are wrong although the average is right.
    flat = frame.assign(probability_above_1=1 - frame["probability_above_1"])
    assert "probability_above_1 did not come true" in " ".join(audit(flat, "y").verdict)


def test_good_predictions_are_seldom_blamed():
    # At a level of 5%, six or more of 24 good files are blamed with probability 0.0011.
    blamed = 0
    for i in range(24):
        frame = weather(50, seed=i).rename(columns={"p": "probability_True"})
        frame["prediction_set"] = np.where(np.arange(50) % 10 == 0, "[]", "[true, false]")  # holds it 90% of the time
        blamed += not audit(frame, "rain", key=jax.random.key(i)).is_good
    assert blamed < 6


def test_log_scores_of_others_are_noticed(normal):
    frame, _ = normal
    shifted, negative = (audit(frame.assign(log_score=s), "y") for s in (frame["log_score"] + 2, -frame["log_score"]))
    assert shifted.log_score.difference == pytest.approx(2) and not shifted.is_good
    assert "its sign is that of a loss" in " ".join(negative.verdict)


def test_quantiles_that_cross_are_named_and_sorted():
    frame = with_quantiles(numbers(20)[["y", "mean", "std"]])
    crossed = frame.copy()
    crossed.loc[7, ["quantile_0.25", "quantile_0.75"]] = frame.loc[7, ["quantile_0.75", "quantile_0.25"]].to_numpy()
    found = audit(crossed, "y")
    assert any("cross in 1 rows, first in row 7" in sentence for sentence in found.verdict) and not found.is_good
    assert found.scores["crps"] == audit(frame, "y").scores["crps"]


def test_an_interval_for_another_coverage_is_noticed():
    frame = numbers()
    frame["lower"], frame["upper"] = (frame["mean"] + stats.norm.ppf(q) for q in (0.25, 0.75))
    sentences = audit(with_quantiles(frame), "y").verdict
    assert any("spans 50%" in sentence and "give the coverage 0.5" in sentence for sentence in sentences)
    assert not any("spans" in sentence for sentence in audit(with_quantiles(frame), "y", coverage=0.5).verdict)


def test_summary_is_plain(normal):
    answer = json.loads(json.dumps(normal[1].summary(), default=float))
    assert answer["scores"]["crps"]["value"] == normal[1].scores["crps"]
    assert answer["verdict"][-1] == answer["advice"]
    assert {row["component"] for row in answer["decomposition"]} >= {"miscalibration", "discrimination"}
    assert str(normal[1]).startswith("Nothing speaks against calibration")


# ---- bad input -----------------------------------------------------------------------------------------------------

CLASSES = {"y": ["a", "b", "a"], "probability_a": [0.9, 0.2, 0.5], "probability_b": [0.1, 0.8, 0.5]}


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"y": [1, 2, 3], "x": 0.5}, {}, "no column predicts 'y'.*'x'.*--probability COLUMN"),
        ({"x": [1.0]}, {}, "target column 'y' is not in the table; it has 'x'"),
        ({"y": []}, {}, "no rows"),
        ({"y": [1.0, np.nan], "mean": 0.0, "std": 1.0}, {}, "known in 1 rows"),
        (CLASSES | {"probability_b": [0.1, 0.8, 0.3]}, {}, r"row 2 \(0.5, 0.3\).*do not sum to one"),
        (CLASSES | {"y": [None, "b", "c"]}, {}, "row 2 has the target 'c', for which no column"),
        (CLASSES | {"probability_a": [1.9, 0.2, 0.5]}, {}, "row 0 .*outside"),
        (CLASSES | {"probability_a": [0.9, "?", 0.5]}, {}, r"row 1 has '\?' in 'probability_a'"),
        (CLASSES | {"prediction_set": ['["a"]', "a", "[]"]}, {}, "row 1 has the prediction_set 'a'.*JSON"),
        (CLASSES | {"probability_1": 0.5, "probability_1.0": 0.5, "y": [1, 1, 1]}, {}, "two columns"),
        (CLASSES, {"probability": "p"}, "'p' is not a column"),
        (CLASSES, {"probability": ["a=nothing", "b=probability_b"]}, "no column 'nothing'"),
        (CLASSES, {"probability": ["a=probability_a", "a=probability_b"]}, "mapped twice"),
        (CLASSES | {"y": ["a", "b", "c"]}, {"probability": "probability_a"}, "needs a target with two values"),
        (CLASSES | {"y": ["a", "b", "c"]}, {"probability": ["a=probability_a"]}, "also takes the values 'b', 'c'"),
        (CLASSES, {"probability": "probability_a", "samples": "probability_"}, "one kind of prediction at a time"),
        (CLASSES, {"quantiles": ["0.1=probability_a", "0.9=probability_b"]}, "row 0 has the target 'a'.*not a finite"),
        (CLASSES, {"coverage": 90}, "coverage"),
        (CLASSES, {"groups": "g"}, "groups column 'g'"),
        (CLASSES | {"g": [1, None, 2]}, {"groups": "g"}, "missing values"),
        (CLASSES | {"t": ["x", "y", "z"]}, {"time": "t"}, "neither number nor date"),
        (CLASSES | {"t": 1, "g": 1}, {"time": "t", "groups": "g"}, "not both"),
        (
            {"y": [0, 1, 0], "probability_0": 0.5, "probability_1": 0.5, "quantile_0.1": 0.0, "quantile_0.9": 1.0},
            {},
            "not clear which",
        ),
        ({"y": [1.0, 2.0, 3.0], "mean": 0.0, "std": [1, 0, 1]}, {}, r"row 1 \(0\) has a std"),
        ({"y": [1.0, 2.0, 3.0], "mean": [0, np.inf, 0], "std": 1.0}, {}, "row 1 has 'inf' in 'mean'"),
        ({"y": [1.0, 2.0, 3.0], "quantile_0.5": 0.0}, {}, "two quantiles at the least"),
        ({"y": [1.0, 2.0, 3.0], "a": 0.0, "b": 1.0}, {"quantiles": ["10=a", "90=b"]}, "strictly between 0 and 1"),
        ({"y": [1.0, 2.0, 3.0], "a": 0.0, "b": 1.0}, {"quantiles": ["low=a", "0.9=b"]}, "'low'.*is no number"),
        ({"y": [1.0, 2.0, 3.0], "a": 0.0, "b": 1.0}, {"quantiles": ["a", "b"]}, "'a' has no label.*LEVEL=COLUMN"),
        ({"y": [1.0, 2.0, 3.0], "s1": 0.0}, {"samples": "s"}, "1 columns begin with 's'"),
        ({"y": [1.0, 2.0], "mean": 0.0, "std": 1.0, "lower": [0, 5], "upper": 1.0}, {}, r"row 1 \(5, 1\)"),
        ({"y": [1.0, 2.0], "mean": 0.0, "std": 1.0, "probability_above_1": [0, 2]}, {}, r"row 1 \(2\) has no prob"),
    ],
)
def test_bad_tables(columns, settings, message):
    with pytest.raises(InputError, match=message):
        audit(pd.DataFrame(columns), "y", **settings)
