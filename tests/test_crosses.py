"""Parts of different rooms together: any learner with any score, any check, any other way to the same answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.core.table import Target
from bayeslens.evaluation.uncertainty import variance_split
from bayeslens.learners import LEARNERS, make
from bayeslens.learners.auto import metric_table
from bayeslens.learners.linear import BayesianLinearRegression


def test_linear_regression_is_the_algebra_s_conditional():
    """Mean and spread of the learner's regression function equal exact conditioning of a linear-Gaussian kernel."""
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(30, 3)), rng.normal(size=(5, 3))
    y = X @ [1.0, -2.0, 0.5] + rng.normal(size=30)
    predictive = BayesianLinearRegression(prior_precision=3.0).fit(X, y, key=None)
    with jax.enable_x64(True):
        # In units of the noise: weights have variance 1/3, the intercept is all but flat.
        z, z_new = (predictive.table.dense(a).astype(np.float64) for a in (X, new))
        center = z.mean(0)
        design, design_new = (np.c_[np.ones(len(a)), a - center] for a in (z, z_new))
        prior = LinearGaussianKernel.from_covariance(
            jnp.zeros((4, 0)), jnp.zeros(4), jnp.diag(jnp.array([1e10, 1 / 3, 1 / 3, 1 / 3]))
        )
        likelihood = LinearGaussianKernel.from_covariance(jnp.asarray(design), jnp.zeros(30), jnp.eye(30))
        posterior = likelihood.invert(prior).given(jnp.asarray(y))
        predicted = LinearGaussianKernel.deterministic(jnp.asarray(design_new)).push(posterior)
        mean, variance = np.asarray(predicted.mean), np.diag(np.asarray(predicted.covariance))
    exact = predictive(new)
    np.testing.assert_allclose(np.asarray(exact.loc), mean, atol=2e-5)
    ratio = np.asarray(exact.scale) ** 2 / predictive.noise_scale**2
    np.testing.assert_allclose(ratio, 1 + variance, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(n for n in LEARNERS if "regression" in LEARNERS[n]))
def test_every_regressor_with_scores_and_splits(name):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(120, 2)).astype(np.float32)
    y = X[:, 0] + rng.normal(size=120) * 0.5
    predictive = make(name, "regression").fit(X, y, key=jax.random.key(0))
    distribution = predictive(X)
    assert distribution.batch_shape == (120,)
    metrics = metric_table(distribution, Target.from_values(y), np.arange(120), 0.9)
    # Better than the best constant: the entropy of N(0, 1.25) is 1.53 nats.
    assert metrics["log_score"] > -1.5
    members, weights = predictive.members(X)
    assert members.batch_shape == (len(weights), 120)
    assert np.isclose(np.sum(weights), 1, atol=1e-5)
    split = variance_split(members, weights)
    np.testing.assert_allclose(split.total, split.aleatoric + split.epistemic, rtol=1e-6)
    joint = predictive.joint(X[:3])
    assert joint.event_shape == (3,)
    assert np.isfinite(joint.log_prob(jnp.asarray(y[:3])))


@pytest.mark.parametrize("name", sorted(n for n in LEARNERS if "classification" in LEARNERS[n]))
def test_every_classifier_with_scores(name):
    rng = np.random.default_rng(2)
    X = rng.normal(size=(150, 2)).astype(np.float32)
    y = np.array(["a", "b", "c"])[(X[:, 0] > 0).astype(int) + (X[:, 1] > 0.5)]
    predictive = make(name, "classification").fit(X, y, key=jax.random.key(0))
    distribution = predictive(X)
    assert predictive.classes == ("a", "b", "c")
    assert isinstance(distribution, dist.CategoricalProbs)
    np.testing.assert_allclose(np.asarray(distribution.probs).sum(1), 1, rtol=1e-5)
    metrics = metric_table(distribution, Target.with_classes(y, predictive.classes), np.arange(150), 0.9)
    assert metrics["log_score"] > -0.7  # uniform is -1.1


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_every_learner_is_saved_and_loaded(name, tmp_path):
    import bayeslens

    task = next(iter(LEARNERS[name]))
    X = np.random.default_rng(3).normal(size=(60, 2)).astype(np.float32)
    y = X[:, 0] * 2 if task == "regression" else X[:, 0] > 0
    predictive = make(name, task).fit(X, y, key=jax.random.key(0))
    bayeslens.save(predictive, tmp_path / "m.bayes")
    again = bayeslens.load(tmp_path / "m.bayes")
    first, second = predictive(X), again(X)
    assert type(first) is type(second)
    if task == "regression":
        np.testing.assert_array_equal(np.asarray(first.mean), np.asarray(second.mean))
    else:
        np.testing.assert_array_equal(np.asarray(first.probs), np.asarray(second.probs))
