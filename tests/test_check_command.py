"""`bayeslens check`: the table that `predict` writes, or anybody's, in; a verdict, JSON and a page out."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import bayeslens
from bayeslens import cli
from bayeslens.core.errors import InputError


def check(*arguments):
    return CliRunner().invoke(cli.app, ["check", *map(str, arguments)])


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Chances of rain as another program may write them: a semicolon, its own names."""
    rng = np.random.default_rng(0)
    chance = rng.random(60).round(3)
    frame = pd.DataFrame({"rained": np.where(rng.random(60) < chance, "yes", "no"), "chance": chance})
    path = tmp_path_factory.mktemp("check") / "others.csv"
    frame.to_csv(path, index=False, sep=";")
    return path, frame


def test_json_has_the_verdict_and_every_score(others):
    path, frame = others
    done = check(path, "--target", "rained", "--probability", "chance", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["rows"] == 60 and answer["files"] == {}
    brier = 2 * ((frame["chance"] - (frame["rained"] == "yes")) ** 2).mean()
    assert answer["scores"]["brier"]["value"] == pytest.approx(brier)
    assert answer["scores"]["brier"]["standard_error"] > 0
    assert answer["verdict"] and answer["decomposition"][0]["component"] == "loss"
    # The columns by class, and the verb, say the same.
    assert bayeslens.check(frame, "rained", probability={"yes": "chance"}).scores["brier"] == pytest.approx(brier)


def test_tables_and_a_report(others, tmp_path):
    path, _ = others
    report = tmp_path / "report.html"
    done = check(path, "--target", "rained", "--probability", "yes=chance", "--report", report)
    assert done.exit_code == 0, done.output
    for words in ("calibration", "brier", f"report: {report}"):
        assert words in done.stdout.replace("\n", "")
    page = report.read_text()
    assert "Predictions of" in page and "<svg" in page and "Decision curve" in page


def test_quantiles_and_draws_are_mapped(tmp_path):
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(12, 8))
    frame = pd.DataFrame(draws, columns=[f"s{i}" for i in range(8)]).assign(y=rng.normal(size=12), low=-1.3, high=1.3)
    frame.to_csv(tmp_path / "p.csv", index=False)
    mapped = check(tmp_path / "p.csv", "--target", "y", "--quantile", "0.1=low", "--quantile", "0.9=high", "--json")
    claims = json.loads(mapped.stdout)["claims"]
    assert [claim["promised"] for claim in claims] == [0.1, 0.9]
    assert claims[1]["observed"] == pytest.approx((frame["y"] <= 1.3).mean())
    assert (
        json.loads(check(tmp_path / "p.csv", "--target", "y", "--samples", "s", "--json").stdout)["source"] == "8 draws"
    )


def test_what_predict_writes_is_scored_as_predict_does(tmp_path):
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({"x": rng.normal(size=120)})
    frame["y"] = frame["x"] + rng.normal(size=120)
    frame["kind"] = np.where(frame["x"] + rng.normal(size=120) > 0, "up", "down")
    out = str(tmp_path / "p.csv")
    numbers, classes = frame[["x", "y"]], frame[["x", "kind"]]
    predicted = bayeslens.predict(numbers[:80], "y", test=numbers[80:], learner="linear", above=[0.5], out=out)
    found = bayeslens.check(out, "y")
    interval, event, *quantiles = found.claims
    assert interval.observed == pytest.approx(predicted.metrics["coverage"])
    assert event.name == "probability_above_0.5" and len(quantiles) == 19
    assert found.log_score.written == pytest.approx(predicted.metrics["log_score"])
    assert found.log_score.agrees
    # 19 quantiles tell the CRPS of the whole distribution to a few percent.
    assert found.scores["crps"] == pytest.approx(predicted.metrics["crps"], rel=0.03)
    predicted = bayeslens.predict(classes[:80], "kind", test=classes[80:], learner="linear", out=out)
    found = bayeslens.check(out, "kind")
    for name in ("log_score", "brier", "calibration_error"):
        assert found.scores[name] == pytest.approx(predicted.metrics[name], rel=1e-5)
    assert found.claims[0].observed == pytest.approx(predicted.metrics["coverage"])
    assert found.claims[0].size == pytest.approx(predicted.metrics["set_size"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.csv", "--target", "y"], "no file no.csv"),
        (["{path}"], "--target COLUMN"),
        (["{path}", "--target", "rained"], "no column predicts 'rained'.*'chance'.*--probability"),
        (["{path}", "--target", "rained", "--probability", "p"], "'p' is not a column"),
        (["{path}", "--target", "rained", "--probability", "chance", "--report", "nowhere/r.html"], "nowhere"),
    ],
)
def test_bad_input(others, arguments, message):
    done = check(*(str(others[0]) if a == "{path}" else a for a in arguments))
    assert isinstance(done.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise done.exception


def test_exit_code_two_and_one_sentence(others, tmp_path):
    command = [sys.executable, "-m", "bayeslens.cli", "check", str(others[0]), "--target", "chance"]
    done = subprocess.run([*command, "--report", "r.html"], capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "no column predicts 'chance'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_takes_tables_only():
    with pytest.raises(InputError, match=r"check takes a table of predictions.*got dict"):
        bayeslens.check({}, "y")
