"""Predictions made elsewhere."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import BayesianRidge, LinearRegression, LogisticRegression

from bayeslens.core.errors import InputError
from bayeslens.core.foreign import as_predictive
from bayeslens.core.quantile import cdf, quantile

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
    values = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0], [3.0, 1.0, 2.0]])  # tied, and crossing
    d = as_predictive(values, quantile_levels=levels)(None)
    np.testing.assert_allclose(quantile(d, levels), np.sort(values, 1), atol=1e-4)
    np.testing.assert_allclose(cdf(d, np.array([1.0, 6.0, 2.0])), [0.5, 1.0, 0.5], atol=1e-4)


def test_distributions():
    d = dist.Normal(np.arange(3.0), 1.0)
    predictive = as_predictive(d)
    np.testing.assert_allclose(predictive(None).loc, d.loc)
    assert predictive.classes is None and as_predictive(predictive) is predictive
    assert as_predictive(dist.CategoricalProbs(np.full((3, 2), 0.5))).classes == (0, 1)
    joint = predictive.joint(None)
    assert joint.batch_shape == () and joint.event_shape == (3,)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LinearRegression(), "without uncertainty"),
        (np.array([0.2, 0.8]), "shape"),
        (np.array([[0.2, 0.9]]), "sum to 1"),
        (np.array([[-0.2, 1.2]]), "sum to 1"),
    ],
)
def test_refused(source, message):
    with pytest.raises(InputError, match=message):
        as_predictive(source)
