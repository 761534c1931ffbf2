"""TARP: identities, the level, power against wrong posteriors, and what references can see."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import stats

from bayeslens.core.errors import InputError
from bayeslens.evaluation.random_points import references_from_data, tarp

KEY = jax.random.key(0)


def conjugate(seed, rows=300, draws=60, dimension=3, factor=1.0):
    """Standard normal parameters seen with unit noise: posteriors are N(data / 2, 1 / 2)."""
    rng = np.random.default_rng(seed)
    parameters = rng.normal(size=(rows, dimension))
    data = parameters + rng.normal(size=parameters.shape)
    noise = rng.normal(size=(rows, draws, dimension)) * np.sqrt(0.5)
    return parameters, data, data[:, None] / 2 + factor * noise


def test_coverage_is_the_share_of_draws_that_are_closer():
    parameters, _, draws = conjugate(0)
    references = np.random.default_rng(1).normal(size=parameters.shape)
    scale = parameters.std(0)
    for metric, norm in (("euclidean", 2), ("manhattan", 1)):
        truth = np.linalg.norm((parameters - references) / scale, norm, axis=1)
        closer = (np.linalg.norm((draws - references[:, None]) / scale, norm, axis=2) < truth[:, None]).sum(1)
        found = tarp(parameters, draws, key=KEY, references=references, metric=metric)
        np.testing.assert_array_equal(found.ranks, closer)
        cut = found.credibility[25]
        np.testing.assert_allclose(found.coverage[25], (closer / (found.draws + 1) < cut - 1e-9).mean())


def test_the_level_holds():
    p_values = []
    for repeat in range(60):
        parameters, data, draws = conjugate(repeat, 80, 40)
        p_values.append(tarp(parameters, draws, key=jax.random.key(repeat), data=data).p_value)
    # exact level but for cross-fitting; binomial(60), false alarms 1e-3 on either side
    assert stats.binom.ppf(1e-3, 60, 0.2) <= sum(p <= 0.2 for p in p_values) <= stats.binom.ppf(1 - 1e-3, 60, 0.2)


@pytest.mark.parametrize(("factor", "kind"), [(0.85, "too seldom"), (1.2, "too often")])
def test_wrong_widths_are_found(factor, kind):
    parameters, data, draws = conjugate(0, 400, factor=factor)
    found = tarp(parameters, draws, key=KEY, data=data)
    assert found.p_value < 0.01 and kind in found.verdict
    assert found.table.standard_error.between(0, 0.03).all()


def test_only_references_that_depend_on_data_see_a_posterior_that_ignores_them():
    parameters, data, _ = conjugate(0)
    prior = np.random.default_rng(9).normal(size=(300, 60, 3))
    blind, seeing = tarp(parameters, prior, key=KEY), tarp(parameters, prior, key=KEY, data=data)
    assert blind.p_value > 0.05 and "prior" in str(blind)
    assert seeing.p_value < 0.01 and not seeing.note


def test_the_unit_of_parameters_does_not_matter():
    parameters, data, draws = conjugate(0)
    unit = np.array([1e-6, 1.0, 1e6])
    plain, scaled = (tarp(parameters * u, draws * u, key=KEY, data=data) for u in (1.0, unit))
    assert np.abs(plain.ranks - scaled.ranks).max() <= 1  # rounding


def test_references_lie_near_what_data_suggest():
    parameters, data, _ = conjugate(0, 2000)
    references = references_from_data(parameters, data, np.random.default_rng(0))
    # prediction of residual variance 1/2 plus noise of variance 1/2
    np.testing.assert_allclose((references - parameters).var(0), 1.0, rtol=0.2)
    useless = references_from_data(parameters, np.zeros((2000, 4)), np.random.default_rng(0))
    np.testing.assert_allclose((useless - parameters).var(0), 2.0, rtol=0.2)
    wide = references_from_data(
        parameters[:50], np.random.default_rng(1).normal(size=(50, 200)), np.random.default_rng(0)
    )
    assert np.isfinite(wide).all() and np.abs(wide).max() < 10


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metric": "cosine"}, "unknown metric"),
        ({"references": np.zeros((300, 2))}, "references need shape"),
        ({"references": np.zeros((300, 3)), "data": np.zeros((300, 1))}, "one of the two"),
        ({"data": np.zeros((299, 1))}, "one row for each"),
        ({"data": np.full((300, 1), np.nan)}, "simulation 0"),
        ({"references": np.full((300, 3), np.inf)}, "simulation 0"),
    ],
)
def test_bad_input_is_named(more, message):
    parameters, _, draws = conjugate(0)
    with pytest.raises(InputError, match=message):
        tarp(parameters, draws, key=KEY, **more)
