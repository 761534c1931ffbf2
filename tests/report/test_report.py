"""The report: one safe file with the numbers in it, or nothing at all."""

from __future__ import annotations

import dataclasses
import os
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bayeslens import report
from bayeslens.core.errors import InputError
from bayeslens.learners.result import Audit, Dependence, Prediction

HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1) & $\\frac{$ \ud800 \u202e http://evil.example {{ 7*7 }}"


def board(task: str) -> list[dict]:
    loss, size = ("crps", "width") if task == "regression" else ("brier", "set_size")
    return [
        {
            "learner": "Linear",
            "log_score": -3.08,
            loss: 2.61,
            "coverage": 0.92,
            size: 15.8,
            "seconds": 0.21,
            "weight": 0.07,
        },
        {
            "learner": "NGBoost",
            "log_score": -2.41,
            loss: 1.48,
            "coverage": 0.91,
            size: 9.1,
            "seconds": 6.2,
            "weight": 0.93,
        },
        {
            "learner": "GaussianProcess",
            "log_score": float("nan"),
            "seconds": None,
            "weight": None,
            "note": "417 rows are too many",
        },
    ]


def regression(rows: int = 89, **changes) -> Prediction:
    rng = np.random.default_rng(0)
    rooms, status = rng.normal(6.3, 0.7, rows), rng.gamma(3, 4, rows)
    mean = 12 + 5 * (rooms - 5) - 0.4 * status + 6
    scale = 1.5 + 0.1 * np.abs(mean - 15)
    y = mean + scale * rng.normal(size=rows)
    levels = np.array([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
    observed = np.clip(levels + rng.normal(0, 0.02, 7), 0, 1)
    z = (y - mean) / scale
    frame = pd.DataFrame(
        {
            "rm": rooms,
            "lstat": status,
            "river": rng.choice(["bounds", "away"], rows),
            "year": 1970 + np.arange(rows) % 9,
            "medv": y,
            "predicted": mean,
            "lower": mean - 1.645 * scale,
            "upper": mean + 1.645 * scale,
            "unfamiliar": status > np.quantile(status, 0.95),
        },
        index=[f"tract {i}" for i in range(rows)],
    )
    grid = np.linspace(4, 8.5, 30)
    fields = {
        "task": "regression",
        "target": "medv",
        "learner": "NGBoost",
        "coverage": 0.9,
        "frame": frame,
        "predictive": SimpleNamespace(table=SimpleNamespace(names=("rm", "lstat", "river", "year"))),
        "metrics": {
            "log_score": -2.4123,
            "crps": 1.483,
            "coverage": 0.91,
            "width": 9.127,
            "calibration_error": 0.052,
            "calibration_error_se": 0.021,
        },
        "metrics_from": "test",
        "leaderboard": board("regression"),
        "n_train": 417,
        "n_test": rows,
        "seconds": 12.4,
        "unfamiliarity": status / 40,
        "warnings": ("column 'id': looks like an identifier and is not used", "12 rows of 'lstat' are missing"),
        "audit": Audit(
            y,
            mean,
            frame["lower"].to_numpy(),
            frame["upper"].to_numpy(),
            0.5 * (1 + np.tanh(0.8 * z)),
            None,
            np.stack([levels, observed, np.sqrt(levels * (1 - levels) / rows)], 1),
        ),
        "dependence": (
            Dependence(
                "lstat",
                list(np.linspace(2, 35, 30)),
                30 - np.linspace(2, 20, 30),
                28 - np.linspace(2, 20, 30) * 1.1,
                32 - np.linspace(2, 20, 30) * 0.9,
                5.2,
            ),
            Dependence(
                "rm", list(grid), 15 + 1.2 * (grid - 4) ** 2, 14 + (grid - 4) ** 2, 16 + 1.4 * (grid - 4) ** 2, 4.1
            ),
            Dependence(
                "river", ["away", "bounds"], np.array([21.0, 23.5]), np.array([20.0, 21.9]), np.array([22, 25.0]), 1.1
            ),
            Dependence(
                "year",
                [1970, 1974, 1978],
                np.array([22, 22.1, 22.3]),
                np.array([21, 21.1, 21.3]),
                np.array([23, 23.1, 23.3]),
                0.1,
            ),
        ),
    }
    return Prediction(**(fields | changes))


def classification(classes: tuple, rows: int = 150, **changes) -> Prediction:
    rng = np.random.default_rng(1)
    k = len(classes)
    logits = 2.2 * rng.normal(size=(rows, k))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = np.array([rng.choice(k, p=p) for p in probabilities])
    frame = pd.DataFrame({"length": rng.normal(5, 1, rows), "width": rng.normal(3, 0.5, rows)})
    frame["predicted"] = [classes[i] for i in probabilities.argmax(1)]
    for i, label in enumerate(classes):
        frame[f"p_{label}"] = probabilities[:, i]
    frame["unfamiliar"] = np.arange(rows) % 40 == 7
    fields = {
        "task": "classification",
        "target": "species",
        "learner": "NGBoost",
        "coverage": 0.9,
        "frame": frame,
        "predictive": SimpleNamespace(table=SimpleNamespace(names=("length", "width"))),
        "metrics": {
            "log_score": -0.612,
            "brier": 0.341,
            "coverage": 0.953,
            "set_size": 1.62,
            "calibration_error": 0.04,
        },
        "metrics_from": "cross-validation",
        "leaderboard": board("classification"),
        "n_train": 600,
        "n_test": rows,
        "seconds": 75.0,
        "classes": classes,
        "audit": Audit(y.astype(float), probabilities=probabilities),
        "dependence": (
            Dependence(
                "length",
                list(range(9)),
                np.linspace(0.2, 0.8, 9),
                np.linspace(0.1, 0.7, 9),
                np.linspace(0.3, 0.9, 9),
                0.21,
                classes[0],
            ),
        ),
    }
    return Prediction(**(fields | changes))


CASES = {
    "regression": regression,
    "two classes": lambda: classification(("no", "yes")),
    "twelve classes": lambda: classification(tuple(range(12))),
    "thirty classes with long names": lambda: classification(
        tuple(f"a class with a long name, number {i}" for i in range(30))
    ),
    "three rows": lambda: regression(3),
    "without audit and dependence": lambda: regression(audit=None, dependence=(), warnings=()),
    "metrics unknown": lambda: regression(
        metrics={"log_score": float("nan"), "coverage": float("nan"), "crps": float("nan")}, dependence=()
    ),
}


STORABLE = HOSTILE.replace("\ud800", "")  # pandas refuses halves of surrogate pairs, labels and targets may have them


class Page(HTMLParser):
    """Collects tags, attributes that could load or run something, and text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta", "path", "use", "rect", "clippath"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "path", "use", "rect", "clippath"):
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def written(prediction: Prediction, folder) -> tuple[str, Page]:
    path = report.write_report(prediction, folder / "report.html")
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    html = path.read_text("utf-8")
    page = Page(html)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "img", "form", "base"}
    assert not [n for n, _ in page.attributes if n.startswith("on") or n in ("src", "srcset", "action")]
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert not page._open
    return html, page


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_self_contained(case, tmp_path):
    html, _ = written(CASES[case](), tmp_path)
    assert "http://" not in html and "https://" not in html
    assert "nan" not in re.sub(r"<[^>]*>", "", html).lower().split()
    assert len(html) < 1_500_000


def test_regression_report_holds_the_numbers(tmp_path):
    html, page = written(regression(), tmp_path)
    text = " ".join(" ".join(page.text).split())
    for part in ("−2.412", "1.483", "9.127", "0.052", "± 0.021", "91%", "± 3%", "89 rows", "417", "what they promise"):
        assert part in text, part
    assert text.index("NGBoost −2.410") < text.index("Linear −3.080") < text.index("417 rows are too many")
    assert "looks like an identifier" in text and "89 of these held-out rows" in text
    assert html.count("<figure>") == 2 + 2 + 4


def test_too_little_coverage_is_said_so(tmp_path):
    _, page = written(regression(metrics={"coverage": 0.7}, dependence=()), tmp_path)
    assert "less than they promise" in " ".join(page.text)


def test_least_familiar_rows_come_first(tmp_path):
    prediction = regression(audit=None, dependence=())
    _, page = written(prediction, tmp_path)
    text = " ".join(page.text)
    worst = prediction.frame.index[np.argmax(prediction.unfamiliarity)]
    after = text[text.index("Rows least like") :]
    assert re.search(r"tract \d+", after).group() == worst


def test_hostile_names_are_only_text(tmp_path):
    base = classification(("a", "b", "c"))
    frame = base.frame.rename(columns={"length": STORABLE}).assign(predicted=STORABLE)
    prediction = dataclasses.replace(
        base,
        classes=(HOSTILE, "b", HOSTILE * 20),
        frame=frame,
        target=HOSTILE,
        learner=HOSTILE,
        warnings=(HOSTILE,),
        files={HOSTILE: HOSTILE},
        dependence=(
            Dependence(STORABLE, [HOSTILE, "b"], np.ones(2), np.zeros(2), np.full(2, 2.0), 1.0, HOSTILE),
            Dependence("$", [1, 2], np.ones(2), np.zeros(2), np.full(2, 2.0), 1.0, "$$"),
        ),
        leaderboard=[{"learner": HOSTILE, "log_score": 1.0}, {"learner": HOSTILE, "note": HOSTILE}],
    )
    html, page = written(prediction, tmp_path)
    assert "<script" not in html.lower() and "\u202e" not in html and "49" not in page.text
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize("kind", ["calibration", "coverage", "predictions", "dependence"])
@pytest.mark.parametrize("make", [regression, lambda: classification(("a", "b", "c"))])
def test_plot_gives_a_figure_without_a_window(kind, make, tmp_path):
    figure = report.plot(make(), kind=kind)
    figure.savefig(tmp_path / "picture.png", dpi=30)
    assert all(axes.get_title(loc="left") for axes in figure.axes)


def test_plot_thins_long_tables():
    figure = report.plot(regression(10_000), kind="predictions")
    drawn = [len(c.get_offsets()) for axes in figure.axes for c in axes.collections if len(c.get_offsets()) > 1]
    assert 0 < sum(drawn) < 1_000


def test_plot_says_what_is_lacking():
    with pytest.raises(InputError, match="held-out rows"):
        report.plot(regression(audit=None), kind="calibration")
    with pytest.raises(InputError, match="use one of calibration"):
        report.plot(regression(), kind="pie")


@pytest.mark.parametrize("where", ["absent/report.html", "file/report.html", "folder"])
def test_a_path_that_cannot_be_written_leaves_nothing(where, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write the report"):
        report.write_report(regression(3, audit=None, dependence=()), tmp_path / where)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_interrupted_write_keeps_the_older_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(regression(3, audit=None, dependence=()), path)
    assert path.read_text() == "older" and len(list(tmp_path.iterdir())) == 1
