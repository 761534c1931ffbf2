"""Isotonic fits against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from bayeslens.evaluation.isotonic import isotonic_mean, isotonic_quantile
from bayeslens.evaluation.scores import quantile_loss

RNG = np.random.default_rng(0)


def by_max_min(x, values, functional):
    """Isotonic fit by its formula: max over starts of the min over ends of the functional of the rows between."""
    order = np.unique(x)
    fit = [
        max(
            min(functional(values[(x >= low) & (x <= high)]) for high in order if high >= at)
            for low in order
            if low <= at
        )
        for at in order
    ]
    return np.array(fit)[np.searchsorted(order, x)]


def test_isotonic_mean_is_the_max_min_of_means():
    x, values = RNG.integers(0, 9, 25), RNG.normal(size=25)
    np.testing.assert_allclose(isotonic_mean(x, values), by_max_min(x, values, np.mean))


@pytest.mark.parametrize("level", [0.1, 0.5, 0.77])
def test_isotonic_quantile_is_best(level):
    """Its loss is that of the max-min of quantiles, it increases, and it takes the lowest where there is a choice."""
    for trial in range(8):
        rng = np.random.default_rng(trial)
        x, values = rng.integers(0, 9, 25), rng.integers(0, 12, 25).astype(float)
        fit = isotonic_quantile(x, values, level)
        expected = by_max_min(x, values, lambda v: np.quantile(v, level, method="inverted_cdf"))
        losses = [quantile_loss(f, level, values).sum() for f in (fit, expected)]
        np.testing.assert_allclose(*losses)
        assert (np.diff(fit[np.argsort(x, kind="stable")]) >= 0).all() and (fit <= expected).all()
        assert len({(a, b) for a, b in zip(x, fit, strict=True)}) == len(np.unique(x))  # equal forecasts stay equal
