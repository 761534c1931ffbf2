"""The page of scores and audits: one safe file with the verdict first, and every number of the result in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from bayeslens.core.errors import InputError
from bayeslens.evaluation.predictions_audit import audit
from bayeslens.evaluation.scoring import score_predictions
from bayeslens.report.html import render
from bayeslens.report.scores import claim_panels

HOSTILE = "<script>alert('x')</script> & $\\frac{$ {{ 7*7 }}"


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "path", "use", "rect", "image"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def of_numbers():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=30)
    frame = pd.DataFrame({HOSTILE: mean + rng.normal(size=30), "lower": mean - 0.5, "upper": mean + 0.5})
    for level, z in ((0.1, -1.28), (0.25, -0.67), (0.5, 0.0), (0.6, 0.25), (0.75, 0.67), (0.9, 1.28)):
        frame[f"quantile_{level}"] = mean + z
    return audit(frame.assign(probability_above_0=1 / (1 + np.exp(-1.7 * mean))), HOSTILE)


@pytest.fixture(scope="module")
def of_classes():
    chance = np.random.default_rng(1).random(40)
    labels = np.where(np.random.default_rng(2).random(40) < chance, HOSTILE, "other")
    return audit(pd.DataFrame({"y": labels, "p": chance}), "y", probability={HOSTILE: "p"})


def test_page_of_numbers(of_numbers):
    page = render(of_numbers)
    tags = Tags(page)
    assert not any(tag in ("script", "img", "iframe", "link") for tag, _ in tags.seen)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "7*7" in tags.text and "49" not in re.findall(r"<h1>.*?</h1>", page, re.S)[0]
    assert "They are not what they say." in tags.text  # intervals of half the width
    for sentence in of_numbers.verdict:
        assert " ".join(sentence.split()) in " ".join(tags.text.split())
    assert page.count("<svg") == 3  # CRPS taken apart, quantiles, one event
    assert "quantile 0.6" not in tags.text  # six quantiles are in the picture, not in the table
    assert f"{of_numbers.claims[0].observed:.1%}" in tags.text


def test_page_of_classes(of_classes):
    tags = Tags(render(of_classes))
    assert not any(tag == "script" for tag, _ in tags.seen)
    assert "Decision curve" in tags.text and "Reliability (CORP)" in tags.text
    assert "What the file promises" not in tags.text
    assert "nan" not in tags.text and "None" not in tags.text


def test_scores_alone_have_a_page():
    chance = np.random.default_rng(1).random(40)
    happened = (np.random.default_rng(2).random(40) < chance).astype(int)
    scores = score_predictions(np.stack([1 - chance, chance], 1), None, happened)
    tags = Tags(render(scores))
    assert "How good are these predictions?" in tags.text
    assert f"{scores['coverage']:.1%}" in tags.text


def test_panels(of_numbers, of_classes):
    assert [len(claim_panels(of_numbers, kind)) for kind in ("quantiles", "events")] == [1, 1]
    assert [len(claim_panels(of_classes, kind)) for kind in ("quantiles", "events")] == [0, 0]


def test_other_things_have_no_page():
    with pytest.raises(InputError, match="besides those of scores and audits"):
        render({})
