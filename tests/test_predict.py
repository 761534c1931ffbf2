"""The main job from the outside: files in, files out, and one clear sentence for every kind of bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import bayeslens
from bayeslens.core.errors import InputError
from bayeslens.datasets import penguins


def simulate(rows: int, seed: int = 0) -> pd.DataFrame:
    """A linear signal with every kind of column."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(["red", "green", "blue"], rows)
    frame = pd.DataFrame(
        {
            "size": rng.normal(size=rows),
            "kind": kind,
            "flag": rng.random(rows) < 0.5,
            "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 700, rows), "D"),
            "gaps": np.where(rng.random(rows) < 0.3, np.nan, rng.normal(size=rows)),
            "empty": np.full(rows, np.nan),
            "constant": np.ones(rows),
            "code": [f"row-{i}" for i in range(rows)],
        }
    )
    frame["y"] = 2 * frame["size"] + (kind == "red") + rng.normal(size=rows) * 0.5
    frame["label"] = np.where(frame["size"] + rng.normal(size=rows) * 0.3 > 0, "high", "low")
    return frame


def run(frame, target, **arguments):
    return bayeslens.predict(frame, target, learner="linear", **arguments)


def test_regression_columns_and_identities():
    frame = simulate(200).drop(columns="label")
    test = simulate(50, seed=1).drop(columns="label").set_index(np.arange(100, 150))
    prediction = run(frame, "y", test=test, above=[0.0, 1.5], coverage=0.8)
    out = prediction.frame
    assert list(out.columns[: len(test.columns)]) == list(test.columns)
    assert (out.index == test.index).all()
    expected = {"mean", "median", "lower", "upper", "std", "epistemic_std", "unfamiliar", "log_score"}
    expected |= {f"quantile_{q:.2f}" for q in np.arange(0.05, 0.96, 0.05)} | {
        "probability_above_0",
        "probability_above_1.5",
    }
    assert set(out.columns) - set(test.columns) == expected
    # Interval, quantiles and probabilities come from one distribution.
    np.testing.assert_allclose(out["lower"], out["quantile_0.10"])
    np.testing.assert_allclose(out["median"], out["quantile_0.50"])
    assert (out["epistemic_std"] < out["std"]).all()
    distribution = prediction.predictive(test)
    np.testing.assert_allclose(distribution.cdf(out["quantile_0.30"].to_numpy()), 0.3, atol=1e-6)
    np.testing.assert_allclose(out["log_score"], distribution.log_prob(out["y"].to_numpy()), rtol=1e-6)
    assert prediction.metrics_from == "test"
    assert prediction.metrics["log_score"] == pytest.approx(out["log_score"].mean())


def test_classification_columns():
    frame = simulate(200).drop(columns="y")
    prediction = run(frame, "label", test=simulate(50, seed=1).drop(columns=["y", "label"]))
    out = prediction.frame
    assert {"prediction", "probability_high", "probability_low", "prediction_set", "epistemic", "unfamiliar"} <= set(
        out
    )
    np.testing.assert_allclose(out["probability_high"] + out["probability_low"], 1, rtol=1e-6)
    assert all(set(json.loads(s)) <= {"high", "low"} and json.loads(s) for s in out["prediction_set"])
    assert prediction.metrics_from == "cross-validation"
    assert {"log_score", "brier", "coverage", "set_size", "calibration_error"} <= set(prediction.metrics)


def test_coverage_of_intervals_on_new_rows():
    # 2,000 new rows: a 90% interval covers between 87% and 93% unless calibration is off (4.5 standard errors).
    prediction = run(simulate(400).drop(columns="label"), "y", test=simulate(2000, seed=1).drop(columns="label"))
    assert 0.87 < prediction.metrics["coverage"] < 0.93


def test_twenty_rows():
    prediction = run(simulate(20).drop(columns="label"), "y")
    assert prediction.n_test == 4
    assert np.isfinite(prediction.frame["mean"]).all()
    assert run(simulate(20).drop(columns="y"), "label").n_test == 4


def test_warns_of_unusable_columns():
    warnings = " ".join(run(simulate(100).drop(columns="label"), "y").warnings)
    for column in ("empty", "constant", "code"):
        assert f"'{column}'" in warnings


def test_groups_and_time_are_respected():
    frame = simulate(120).drop(columns="label")
    frame["house"] = np.repeat(np.arange(24), 5)
    grouped = run(frame, "y", groups="house")
    held = set(grouped.frame["house"])
    assert grouped.n_test == 5 * len(held)
    ordered = run(frame, "y", time="day")
    assert ordered.frame["day"].min() >= frame["day"].sort_values().iloc[95]


def test_weights_change_the_answer():
    frame = simulate(100).drop(columns="label")
    frame["w"] = np.where(frame["size"] > 0, 5.0, 0.1)
    test = frame.drop(columns="w")
    weighted = run(frame, "y", weights="w", test=test)
    assert "w" not in weighted.predictive.table.names
    assert not np.allclose(weighted.frame["mean"], run(frame.drop(columns="w"), "y", test=test).frame["mean"])


def test_unseen_categories_and_far_rows_are_flagged():
    test = simulate(4, seed=2).drop(columns=["y", "label"])
    test["kind"] = ["red", "violet", "red", "green"]
    test["size"] = [0.0, 0.0, 400.0, 0.1]
    flagged = run(simulate(300).drop(columns="label"), "y", test=test).frame["unfamiliar"]
    assert flagged.tolist()[1:3] == [True, True]


def test_save_and_load_predict_the_same(tmp_path):
    path = str(tmp_path / "m.bayes")
    frame, test = simulate(100).drop(columns="label"), simulate(10, seed=3).drop(columns=["y", "label"])
    first = run(frame, "y", test=test, save=path)
    again = bayeslens.predict(load=path, test=test)
    pd.testing.assert_frame_equal(first.frame, again.frame)
    assert again.metrics_from == "cross-validation"
    assert again.target == "y"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f, "nothing"), "nothing"),
        (lambda f: (f.assign(y=1.0), "y"), "one value"),
        (lambda f: (f.assign(y=np.nan), "y"), "missing"),
        (lambda f: (f.iloc[:0], "y"), "no rows"),
        (lambda f: (pd.concat([f, f[["size"]]], axis=1), "y"), "duplicate"),
        (lambda f: (f.assign(size=np.inf), "y"), "infinity"),
        (lambda f: (f.assign(y=np.where(f.index == 3, np.inf, f.y)), "y"), "infinity"),
        (lambda f: (f[["y"]], "y"), "no column besides"),
        (lambda f: ("missing.csv", "y"), "missing.csv"),
        (lambda f: (f, None), "--target"),
    ],
)
def test_bad_tables(change, message):
    frame, target = change(simulate(40).drop(columns="label"))
    with pytest.raises(InputError, match=message):
        run(frame, target)


def test_bad_tests():
    frame = simulate(40).drop(columns="label")
    with pytest.raises(InputError, match="kind"):
        run(frame, "y", test=frame.drop(columns="kind"))
    with pytest.raises(InputError, match="no rows"):
        run(frame, "y", test=frame.iloc[:0])
    with pytest.raises(InputError, match="coverage"):
        run(frame, "y", coverage=90)
    with pytest.raises(InputError, match="unknown learner"):
        bayeslens.predict(frame, "y", learner="magic")
    with pytest.raises(InputError, match="not seen"):
        labelled = simulate(40).drop(columns="y")
        run(labelled, "label", test=labelled.assign(label="other"))


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "bayeslens.cli", *arguments], capture_output=True, text=True, cwd=cwd, timeout=250
    )


def test_command_line_json_and_files(tmp_path):
    simulate(100).drop(columns="label").to_csv(tmp_path / "t.csv", index=False)
    done = command("predict", "t.csv", "--target", "y", "--learner", "linear", "--json", "--out", "p.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) >= {"task", "learner", "n_train", "n_test", "metrics", "metrics_from", "leaderboard", "seconds"}
    assert answer["files"]["out"] == "p.csv"
    assert len(pd.read_csv(tmp_path / "p.csv")) == 20


def test_command_line_reports_bad_input(tmp_path):
    penguins().to_csv(tmp_path / "t.csv", index=False, sep="#")
    (tmp_path / "bad.bayes").write_bytes(b"not a model")
    for arguments, culprit in (
        (["t.csv", "--target", "body_mass_g"], "body_mass_g"),
        (["--load", "bad.bayes", "--test", "t.csv"], "bad.bayes"),
    ):
        done = command("predict", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and culprit in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert "Traceback" not in done.stderr
    with pytest.raises(InputError, match=r"no\.csv"):
        bayeslens.predict(str(tmp_path / "no.csv"), "y")
    with pytest.raises(InputError, match="nowhere"):
        bayeslens.predict(str(tmp_path / "t.csv"), "y", out=str(tmp_path / "nowhere" / "p.csv"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.bayes", "t.csv"]


def test_importing_is_quick():
    code = "import sys, bayeslens; sys.exit(any(m in sys.modules for m in ('jax', 'pandas', 'numpy', 'numpyro')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
