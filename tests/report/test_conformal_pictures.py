"""Pictures of conformal prediction are drawn for intervals, sets, groups, infinite widths and series."""

from __future__ import annotations

import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.evaluation.adaptive_conformal import adaptive_conformal_inference
from bayeslens.evaluation.conformal_calibration import conformal
from bayeslens.report.conformal_pictures import adaptive_panels, conformal_panels
from bayeslens.report.pictures import lay_out
from bayeslens.report.plotting import plot

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("known", [True, False])
def test_intervals(known):
    y = RNG.normal(size=100)
    calibrated = conformal(np.zeros(60), None, y[:60], groups=["m$^2$", "b"] * 30)
    result = calibrated(np.zeros(40), y[60:] if known else None, groups=["m$^2$", "b"] * 20)
    drawn = conformal_panels(result)
    assert [p.title for p in drawn] == (["Coverage", "Sizes", "Intervals, by their middle"] if known else ["Sizes"])
    lay_out(drawn, columns=3).canvas.draw()


def test_sets_and_infinite_widths():
    probs = RNG.dirichlet(np.ones(4), 80)
    result = conformal(probs[:40], None, np.arange(40) % 4)(probs[40:], np.arange(40) % 4)
    lay_out(conformal_panels(result)).canvas.draw()
    heavy = conformal(np.zeros(20), None, np.arange(20.0), weights=np.ones(20))
    result = heavy(np.zeros(4), np.zeros(4), weights=np.array([1.0, 1.0, 9.0, 9.0]))
    figure = lay_out(conformal_panels(result))
    assert "2 infinite" in figure.axes[1].get_xlabel()
    figure.canvas.draw()


def test_series():
    found = adaptive_conformal_inference(RNG.exponential(size=50), 0.9)
    assert len(adaptive_panels(found)) == 2
    plot(found).canvas.draw()
    with pytest.raises(InputError, match="one kind"):
        plot(found, "pie")
