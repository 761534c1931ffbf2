"""h-calibration: the loss by definition and by finite differences, order kept, and distortions undone."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import softmax

from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.evaluation.calibration import Temperature
from bayeslens.evaluation.h_calibration import HCalibration, h_calibration_loss

RNG = np.random.default_rng(0)


def distorted(rows: int, rng: np.random.Generator):
    """True probabilities, what an over-confident classifier says, and labels: no temperature undoes this."""
    probs = np.maximum(rng.dirichlet(np.full(4, 0.5), rows), 1e-5)
    probs /= probs.sum(1, keepdims=True)
    labels = (rng.random((rows, 1)) > np.cumsum(probs, 1)).sum(1).clip(max=3)
    return probs, softmax(-((-np.log(probs)) ** 1.6), axis=1), labels


TRUTH, ROUGH, LABELS = distorted(3000, RNG)
FITTED = HCalibration.fit(ROUGH, LABELS)


def test_loss_is_its_definition():
    """Moving means over the window in order of probability, averaged by hand (one cluster: equal probabilities)."""
    probs = np.array([[0.1, 0.9], [0.3, 0.7], [0.45, 0.55]])
    outcome = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    flat, hit = probs.ravel(), outcome.ravel()
    order = np.argsort(flat)
    residual = np.concatenate([[0.0], (flat - hit)[order], [0.0]])
    gaps = np.abs(residual[:-2] + residual[1:-1] + residual[2:]) / 3
    # Six probabilities far apart are clusters of their own.
    loss, _ = h_calibration_loss(probs, outcome, window=2)
    assert loss == pytest.approx(gaps.mean())
    loss, _ = h_calibration_loss(probs, outcome, window=2, error_bound=0.1)
    assert loss == pytest.approx(np.maximum(gaps - 0.1, 0).mean())


def test_gradient_is_that_of_finite_differences():
    probs, labels = RNG.dirichlet(np.ones(3), 60), RNG.integers(0, 3, 60)
    outcome = np.eye(3)[labels]
    _, gradient = h_calibration_loss(probs, outcome, window=10, error_bound=0.01)
    direction = RNG.normal(size=probs.shape)
    step = 1e-8  # small enough to leave the order and the clusters as they are
    ends = [h_calibration_loss(probs + s * step * direction, outcome, window=10, error_bound=0.01)[0] for s in (1, -1)]
    assert (gradient * direction).sum() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_calibrated_predictions_cost_less():
    outcome = np.eye(4)[LABELS]
    losses = [h_calibration_loss(p, outcome)[0] for p in (TRUTH, ROUGH)]
    assert losses[0] < losses[1] / 2
    mapped = np.asarray(FITTED(dist.CategoricalProbs(ROUGH)).probs)
    assert h_calibration_loss(mapped, outcome)[0] < losses[1] / 2


def test_distortion_is_undone_better_than_by_a_temperature():
    """Mean squared distance from the true probabilities, of new rows."""
    truth, rough, _ = distorted(4000, np.random.default_rng(1))
    error = {
        name: np.square(np.asarray(fitted(dist.CategoricalProbs(rough)).probs) - truth).sum(1).mean()
        for name, fitted in (("h", FITTED), ("temperature", Temperature.fit(ROUGH, LABELS)))
    }
    assert error["h"] < error["temperature"] / 3
    assert error["h"] < np.square(rough - truth).sum(1).mean() / 10


def test_order_of_classes_never_changes():
    """Within a row all stay in order; the first also where probabilities differ by a rounding error or are 0."""
    mapped = np.asarray(FITTED(dist.CategoricalProbs(ROUGH)).probs)
    np.testing.assert_array_equal(np.argsort(mapped, 1), np.argsort(ROUGH, 1))
    close = np.array([[0.25, 0.25 + 1e-16, 0.25, 0.25 - 1e-16], [0.5, 0.5, 0.0, 0.0], [0.0, 0.5 - 2**-54, 0.5, 0.0]])
    close = np.concatenate([close, np.nextafter(np.full((1, 4), 0.25), [[0, 1, 0, 1]])])
    extreme = HCalibration(FITTED.knots, np.geomspace(0.02, 50, len(FITTED.knots)), FITTED.floor)
    flat = HCalibration(np.zeros(1), np.full(1, 0.02), 1e-30)
    for fitted in (FITTED, extreme, flat):
        moved = np.asarray(fitted(dist.CategoricalProbs(close)).probs)
        np.testing.assert_array_equal(moved.argmax(1), close.argmax(1))
        np.testing.assert_allclose(moved.sum(1), 1.0)


def test_certainty_of_trees_is_softened():
    probs = np.repeat([[1.0, 0.0], [0.1, 0.9]], 100, axis=0)
    labels = np.concatenate([np.arange(100) % 4 == 0, np.ones(100)]).astype(int)
    mapped = np.asarray(HCalibration.fit(probs, labels)(dist.CategoricalProbs(probs)).probs)
    assert (mapped > 0).all() and mapped[0, 0] < 0.95


def test_tiny_tables_and_round_trip(tmp_path):
    fitted = HCalibration.fit(np.array([[0.9, 0.1], [0.2, 0.8]]), [0, 1])
    assert np.isfinite(fitted.slopes).all()
    save(fitted, tmp_path / "map.bayes")
    again, new = load(tmp_path / "map.bayes"), dist.CategoricalProbs(RNG.dirichlet(np.ones(2), 5))
    np.testing.assert_array_equal(again(new).probs, fitted(new).probs)


@pytest.mark.parametrize("setting", [{"window": 0}, {"segments": 0}, {"error_bound": -0.1}])
def test_bad_settings(setting):
    with pytest.raises(InputError, match="at least"):
        HCalibration.fit(ROUGH, LABELS, **setting)
