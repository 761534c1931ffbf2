"""Predictions made elsewhere."""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import BayesianRidge, LinearRegression, LogisticRegression

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import as_predictive
from bayeslens.core.quantiles import cdf, quantile
from bayeslens.core.saving import load, save

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 2))
Y = X[:, 0] + RNG.normal(size=40) / 4


def test_classifier():
    model = LogisticRegression().fit(X, np.where(Y > 0, "up", "down"))
    predictive = as_predictive(model)
    assert predictive.classes == ("down", "up") and predictive.task == "classification"
    np.testing.assert_allclose(predictive(X).probs, model.predict_proba(X), rtol=1e-6)
    members, weights = predictive.members(X)
    assert members.batch_shape == (1, 40) and weights.tolist() == [1.0]


@pytest.mark.parametrize("model", [BayesianRidge(), GaussianProcessRegressor(alpha=0.1)])
def test_regressor_with_standard_deviations(model):
    predictive = as_predictive(model.fit(X, Y))
    mean, std = model.predict(X, return_std=True)
    assert predictive.classes is None
    np.testing.assert_allclose(predictive(X).loc, mean)
    np.testing.assert_allclose(predictive(X).scale, std)


def test_probabilities():
    predictive = as_predictive(np.array([[0.2, 0.8], [1.0, 0.0]]), classes=("no", "yes"))
    assert predictive.classes == ("no", "yes") and predictive(np.zeros((2, 1))).batch_shape == (2,)
    with pytest.raises(InputError, match="given for 2 rows, not for 3"):
        predictive(np.zeros((3, 1)))


def test_quantiles():
    levels = np.array([0.1, 0.5, 0.9])
    values = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0], [1.0, 2.0, 2.0 - 1e-7]])  # tied, and crossing by rounding
    d = as_predictive(values, quantile_levels=levels)(None)
    np.testing.assert_allclose(quantile(d, levels), np.sort(values, 1), atol=1e-4)
    np.testing.assert_allclose(cdf(d, np.array([1.0, 6.0, 1.5])), [0.5, 1.0, 0.3], atol=1e-4)


def test_samples():
    draws = RNG.normal(size=(11, 3))
    predictive = as_predictive(draws, samples=True)
    d = predictive(None)
    assert d.batch_shape == (3,) and predictive.classes is None and predictive.task == "regression"
    np.testing.assert_allclose(d.mean, draws.mean(0))
    np.testing.assert_allclose(d.variance, draws.var(0, ddof=1))
    levels = np.array([0.05, 1 / 11, 0.5, 10 / 11, 0.99])
    np.testing.assert_array_equal(quantile(d, levels), np.quantile(draws, levels, axis=0, method="inverted_cdf").T)
    y = np.array([0.0, draws[4, 1], 9.0])
    np.testing.assert_allclose(cdf(d, y), (draws <= y).mean(0))
    assert np.isin(np.asarray(d.sample(jax.random.key(0), (5,)))[:, 0], draws[:, 0].astype(np.float32)).all()
    with pytest.raises(InputError, match="no density"):
        d.log_prob(y)


def test_samples_are_saved(tmp_path):
    predictive = as_predictive(RNG.normal(size=(4, 3)), samples=True)
    save(predictive, tmp_path / "draws.bayes")
    np.testing.assert_array_equal(load(tmp_path / "draws.bayes")(None).values, predictive(None).values)


def test_distributions():
    d = dist.Normal(np.arange(3.0), 1.0)
    predictive = as_predictive(d)
    np.testing.assert_allclose(predictive(None).loc, d.loc)
    assert predictive.classes is None and as_predictive(predictive) is predictive
    assert as_predictive(dist.CategoricalProbs(np.full((3, 2), 0.5))).classes == (0, 1)
    joint = predictive.joint(None)
    assert joint.batch_shape == () and joint.event_shape == (3,)


LEVELS = {"quantile_levels": [0.1, 0.5, 0.9]}


@pytest.mark.parametrize(
    ("source", "message", "arguments"),
    [
        (LinearRegression(), "without uncertainty", {}),
        (np.array([0.2, 0.8]), "shape", {}),
        (np.array([[0.5, 0.5], [0.2, 0.9]]), r"row 1 \(0.2, 0.9\) .*sum to 1", {}),
        (np.array([[-0.2, 1.2]]), "row 0 .*at least 0", {}),
        (np.array([[0.5, 0.5], [np.nan, 1.0]]), "row 1 .*not finite", {}),
        (np.array([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), r"row 1 \(3, 1, 2\) has quantiles that cross", LEVELS),
        (np.zeros((2, 2)), "3 columns|2 increasing", LEVELS),
        (np.zeros((2, 3)), "increasing probabilities", {"quantile_levels": [0.5, 0.1, 0.9]}),
        (np.zeros((1, 3)), "at least two draws", {"samples": True}),
        (np.array([[0.0, 1.0], [0.0, np.inf]]), "row 1 .*not finite", {"samples": True}),
        (np.zeros((2, 3)), "not both", {"samples": True} | LEVELS),
    ],
)
def test_refused(source, message, arguments):
    with pytest.raises(InputError, match=message):
        as_predictive(source, **arguments)
