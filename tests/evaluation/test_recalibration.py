"""Recalibration: each map finds the distortion it is made for, by exact optimality conditions where there are any."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import expit, logit, softmax
from sklearn.isotonic import IsotonicRegression

from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.evaluation.calibrating import METHODS
from bayeslens.evaluation.recalibration import (
    BetaCalibration,
    DirichletCalibration,
    HistogramBinning,
    Isotonic,
    Platt,
    VectorScaling,
)

RNG = np.random.default_rng(0)
P = RNG.beta(1, 1, 20_000)
BINARY = (RNG.random(20_000) < P).astype(int)
MANY = RNG.dirichlet(np.ones(3), 20_000)
LABELS = (RNG.random((20_000, 1)) > np.cumsum(MANY, 1)).sum(1).clip(max=2)


def two(second: np.ndarray) -> np.ndarray:
    return np.stack([1 - second, second], 1)


def mapped(fitted, probs: np.ndarray) -> np.ndarray:
    return np.asarray(fitted(dist.CategoricalProbs(probs)).probs)


def test_platt_undoes_a_logistic_distortion():
    """Four standard errors of 20,000 rows are 0.1 in the slope."""
    rough = expit(2 * logit(P) - 1)
    fitted = Platt.fit(two(rough), BINARY)
    assert float(fitted.slope) == pytest.approx(0.5, abs=0.03) and float(fitted.intercept) == pytest.approx(
        0.5, abs=0.1
    )
    np.testing.assert_allclose(mapped(fitted, two(rough))[:, 1], P, atol=0.03)


def test_beta_undoes_what_platt_cannot():
    rough = expit(3 * np.log(P) - 1.0 * np.log1p(-P) + 0.5)
    a, b = (
        mapped(Platt.fit(two(rough), BINARY), two(rough)),
        mapped(BetaCalibration.fit(two(rough), BINARY), two(rough)),
    )
    assert np.square(b[:, 1] - P).mean() < np.square(a[:, 1] - P).mean() / 2


def test_beta_is_increasing():
    fitted = BetaCalibration.fit(two(P), 1 - BINARY)  # the very opposite of what was said
    assert (fitted.slopes >= 0).all() and fitted.slopes.max() < 0.05


def test_vector_and_dirichlet_undo_their_distortions():
    """Labels drawn from a map of what was said: the map is found."""
    rng = np.random.default_rng(1)
    matrix = np.array([[1.0, 0.3, 0.0], [0.0, 0.7, 0.3], [-0.4, 0.0, 1.2]])
    for method, weights in ((VectorScaling, np.diag([0.5, 1.0, 1.5])), (DirichletCalibration, matrix)):
        truth = softmax(np.log(MANY) @ weights.T + np.array([0.5, 0.0, -0.5]), axis=1)
        labels = (rng.random((len(truth), 1)) > np.cumsum(truth, 1)).sum(1).clip(max=2)
        assert np.square(mapped(method.fit(MANY, labels), MANY) - truth).sum(1).mean() < 2e-3
        if method is DirichletCalibration:
            assert np.square(mapped(VectorScaling.fit(MANY, labels), MANY) - truth).sum(1).mean() > 5e-3


def test_first_order_conditions():
    """At the optimum of the penalized likelihood the residual's moments equal the pull of the prior."""
    fitted = VectorScaling.fit(MANY[:500], LABELS[:500], prior_rows=1e-9)
    residual = mapped(fitted, MANY[:500]) - np.eye(3)[LABELS[:500]]
    features = np.log(np.maximum(MANY[:500], fitted.floor))
    np.testing.assert_allclose(residual.sum(0), 0, atol=0.05)
    np.testing.assert_allclose((residual * features).sum(0), 0, atol=0.2)


@pytest.mark.parametrize("method", [Platt, BetaCalibration, VectorScaling, DirichletCalibration])
def test_few_rows_change_little(method):
    before = np.array([[0.8, 0.2], [0.3, 0.7]])
    assert np.abs(mapped(method.fit(before, [1, 0]), before) - before).max() < 0.12


def test_isotonic_is_that_of_scikit_learn():
    """On many rows the half rows at the ends do not matter: within 1% away from them."""
    rough = np.round(P**2, 3)  # with ties
    fitted = Isotonic.fit(two(rough), BINARY)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(rough, BINARY)
    grid = np.linspace(0.001, 0.99, 300)
    np.testing.assert_allclose(mapped(fitted, two(grid))[:, 1], theirs.predict(grid), atol=0.01)


def test_isotonic_never_says_never():
    probs = two(np.array([0.1, 0.2, 0.8, 0.9]))
    fitted = Isotonic.fit(probs, [0, 0, 1, 1])
    new = mapped(fitted, two(np.array([0.0, 0.15, 0.5, 1.0])))
    assert (new > 0).all() and (np.diff(new[:, 1]) >= 0).all()
    np.testing.assert_allclose(new[[0, -1], 1], [0.2, 0.8])  # half a row of the other kind against two


def test_isotonic_and_histogram_of_many_classes():
    for method in (Isotonic, HistogramBinning):
        new = mapped(method.fit(MANY, LABELS), MANY)
        np.testing.assert_allclose(new.sum(1), 1.0)
        assert (new > 0).all() and np.abs(new - MANY).mean() < 0.03


def test_histogram_counts():
    fitted = HistogramBinning.fit(two(P), BINARY, bins=5)
    edges = np.quantile(P, [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high, frequency in zip(edges[:-1], edges[1:], fitted.frequencies[0], strict=True):
        inside = BINARY[(low < P) & (high >= P)]
        assert frequency == pytest.approx(inside.mean(), abs=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_ones_and_round_trip(name, tmp_path):
    """A forest's certainties, sometimes wrong: the log score stays finite, and the map survives saving."""
    probs, labels = np.repeat([[1.0, 0.0], [0.3, 0.7]], 50, axis=0), np.tile([0, 0, 0, 0, 1], 20)
    fitted = METHODS[name].fit(probs, labels)
    new = mapped(fitted, probs)
    assert np.isfinite(new).all() and (name == "temperature" or (new > 0).all())
    np.testing.assert_allclose(new.sum(1), 1.0, rtol=1e-6)
    save(fitted, tmp_path / "map.bayes")
    np.testing.assert_array_equal(mapped(load(tmp_path / "map.bayes"), probs), new)


@pytest.mark.parametrize("method", [Platt, BetaCalibration])
def test_two_classes_only(method):
    with pytest.raises(InputError, match="two classes, got 3"):
        method.fit(MANY, LABELS)


@pytest.mark.parametrize("method", [Platt, VectorScaling, Isotonic, HistogramBinning])
def test_bad_rows_are_named(method):
    with pytest.raises(InputError, match="row 1"):
        method.fit(np.array([[0.5, 0.5], [0.9, 0.3]]), [0, 1])
