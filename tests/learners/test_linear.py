"""Bayesian linear and logistic regression against closed forms, numerical integration and scikit-learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats as st
from scipy.integrate import quad
from sklearn.linear_model import LogisticRegression

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import log_prob, mean_and_variance
from bayeslens.core.table import Target
from bayeslens.learners import linear
from bayeslens.learners.linear import BayesianLinearRegression, BayesianLogisticRegression, check_weights

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 3)) * [1.0, 10.0, 0.1]
Y = 5.0 + X @ [1.0, 0.2, 0.0] + RNG.normal(size=30)
NEW = RNG.normal(size=(8, 3)) * [1.0, 10.0, 0.1]
KEY = jax.random.key(0)


def standardized(X):
    return (X - X.mean(0)) / X.std(0)


def evidence_by_formula(X, y, precision):
    """Log evidence with a flat intercept: the multivariate t of the n - 1 contrasts of y, s2 ~ InverseGamma(1/2, 1/2).

    y is in units of its standard deviation, as the prior of the noise is.
    """
    scale = y.std()
    contrasts = np.linalg.svd(np.eye(len(y)) - 1 / len(y))[0][:, : len(y) - 1].T
    z, u = contrasts @ y / scale, contrasts @ standardized(X)
    shape = np.eye(len(z)) + u @ u.T / precision
    return st.multivariate_t(np.zeros(len(z)), shape, df=1).logpdf(z) - len(z) * np.log(scale)


@pytest.mark.parametrize("precision", [1e-3, 1.0, 50.0])
def test_evidence_is_a_multivariate_t(precision):
    fitted = BayesianLinearRegression(prior_precision=precision).fit(X, Y)
    assert fitted.log_evidence == pytest.approx(evidence_by_formula(X, Y, precision), rel=1e-5)


def test_evidence_by_numerical_integration():
    """One column, integrated over the slope and the noise variance (the intercept's flat prior done by contrasts)."""
    x, y = X[:6, :1], Y[:6]
    scale, a = y.std(), 2.0
    u, z = standardized(x)[:, 0], (y - y.mean()) / y.std()

    def inside(variance):
        # Gaussian in the slope: done by quadrature too, around its mode.
        mode, width = u @ z / (u @ u + a), np.sqrt(variance / (u @ u + a))

        def joint(w):
            square = ((z - w * u) ** 2).sum()
            density = np.exp(-square / (2 * variance)) / (2 * np.pi * variance) ** (5 / 2)
            return density * st.norm.pdf(w, 0, np.sqrt(variance / a))

        slope = quad(joint, mode - 12 * width, mode + 12 * width, points=[mode])[0]
        return slope * st.invgamma(0.5, scale=0.5).pdf(variance)

    value = quad(lambda t: inside(np.exp(t)) * np.exp(t), -10, 12, limit=200)[0]
    fitted = BayesianLinearRegression(prior_precision=a).fit(x, y)
    assert fitted.log_evidence == pytest.approx(np.log(value) - 5 * np.log(scale), rel=1e-5)


def test_posterior_is_normal_inverse_gamma():
    precision = 3.0
    fitted = BayesianLinearRegression(prior_precision=precision).fit(X, Y)
    u, scale = standardized(X), Y.std()
    z = (Y - Y.mean()) / scale
    covariance = np.linalg.inv(u.T @ u + precision * np.eye(3))
    w = covariance @ u.T @ z
    shape, rate = 0.5 + 29 / 2, 0.5 + (z @ z - w @ np.linalg.inv(covariance) @ w) / 2
    new = (NEW - X.mean(0)) / X.std(0)
    spread = 1 + 1 / 30 + np.einsum("ij,jk,ik->i", new, covariance, new)
    exact = st.t(2 * shape, Y.mean() + scale * new @ w, scale * np.sqrt(rate / shape * spread))
    predicted = fitted(NEW)
    np.testing.assert_allclose(predicted.df, 2 * shape)
    for y in (0.0, 5.0, 9.0):
        np.testing.assert_allclose(log_prob(predicted, np.full(8, y)), exact.logpdf(y), rtol=1e-5)
    # Marginals of the joint are the marginals; its off-diagonal is the shared uncertainty.
    joint = fitted.joint(NEW)
    covariance_of_rows = scale**2 * rate / shape * (np.eye(8) + 1 / 30 + new @ covariance @ new.T)
    got = np.asarray(joint.scale_tril) @ np.asarray(joint.scale_tril).T
    np.testing.assert_allclose(got, covariance_of_rows, rtol=1e-4, atol=1e-4)


def test_members_mix_to_the_marginal():
    fitted = BayesianLinearRegression().fit(X, Y)
    members, weights = fitted.members(NEW)
    mean, variance = mean_and_variance(members)
    center, total = mean_and_variance(fitted(NEW))
    np.testing.assert_allclose(weights @ mean, center, rtol=1e-6)
    np.testing.assert_allclose(weights @ (variance + (mean - center) ** 2), total, rtol=1e-5)


def test_default_precision_maximizes_the_evidence():
    best = BayesianLinearRegression().fit(X, Y)
    for factor in (0.5, 0.9, 1.1, 2.0):
        other = BayesianLinearRegression(prior_precision=best.prior_precision * factor).fit(X, Y)
        assert other.log_evidence < best.log_evidence
    grid = [BayesianLinearRegression(prior_precision=a).fit(X, Y).log_evidence for a in np.geomspace(1e-5, 1e5, 41)]
    assert max(grid) <= best.log_evidence + 1e-6


WEIGHTS = np.array([3, 1, 2] * 10)


def same_predictions(one, other, new=NEW, tolerance=1e-5):
    a, b = one(new), other(new)
    if one.classes is not None:
        np.testing.assert_allclose(a.probs, b.probs, atol=tolerance)
        return
    for x, y in zip(mean_and_variance(a), mean_and_variance(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance)


def test_weights_are_repetitions():
    weighted = BayesianLinearRegression().fit(X, Y, weights=WEIGHTS)
    repeated = BayesianLinearRegression().fit(np.repeat(X, WEIGHTS, 0), np.repeat(Y, WEIGHTS))
    same_predictions(weighted, repeated, tolerance=1e-4)
    assert weighted.log_evidence == pytest.approx(repeated.log_evidence, rel=1e-6)
    zero = BayesianLinearRegression().fit(
        np.r_[X, NEW], np.r_[Y, np.full(8, 99.0)], weights=np.r_[WEIGHTS, np.zeros(8)]
    )
    same_predictions(weighted, zero)


def test_weights_are_repetitions_for_classes():
    labels = (Y > 5).astype(int)
    weighted = BayesianLogisticRegression().fit(X, labels, key=KEY, weights=WEIGHTS)
    repeated = BayesianLogisticRegression().fit(np.repeat(X, WEIGHTS, 0), np.repeat(labels, WEIGHTS), key=KEY)
    same_predictions(weighted, repeated, tolerance=1e-4)


def test_chunks_are_one(monkeypatch):
    whole = BayesianLinearRegression().fit(X, Y)
    monkeypatch.setattr(linear, "_CHUNK", 7)
    parts = BayesianLinearRegression().fit(X, Y)
    same_predictions(whole, parts)
    assert parts.log_evidence == pytest.approx(whole.log_evidence, rel=1e-9)


def test_units_do_not_matter():
    plain = BayesianLinearRegression().fit(X, Y)
    other = BayesianLinearRegression().fit(X * [1e-3, 1e4, 2] + [5, -1e3, 0], Y * 1e4 - 7)
    a, b = mean_and_variance(plain(NEW)), mean_and_variance(other(NEW * [1e-3, 1e4, 2] + [5, -1e3, 0]))
    np.testing.assert_allclose(b[0], a[0] * 1e4 - 7, rtol=1e-3)
    np.testing.assert_allclose(b[1], a[1] * 1e8, rtol=1e-3)


def test_traced_agrees_and_has_gradients():
    fitted = BayesianLinearRegression().fit(X, Y)
    traced = jax.jit(lambda x: (fitted(x).loc, fitted(x).scale))(jnp.asarray(NEW))
    np.testing.assert_allclose(traced[0], fitted(NEW).loc, rtol=1e-4)
    np.testing.assert_allclose(traced[1], fitted(NEW).scale, rtol=1e-4)
    slope = jax.jit(jax.grad(lambda x: fitted(x).loc.sum()))(jnp.asarray(NEW))
    np.testing.assert_allclose(slope, np.tile(fitted.coefficients / X.std(0), (8, 1)), rtol=1e-4)
    labels = np.where(Y > 5, "b", "a")
    fitted = BayesianLogisticRegression().fit(X, labels, key=KEY)
    np.testing.assert_allclose(jax.jit(lambda x: fitted(x).probs)(jnp.asarray(NEW)), fitted(NEW).probs, atol=1e-5)


def test_difficult_tables():
    # More columns than rows, repeated columns, no usable column, one row repeated, a perfect fit.
    wide = RNG.normal(size=(10, 40))
    for x, y in (
        (wide, Y[:10]),
        (np.repeat(X, 3, 1), Y),
        (np.ones((30, 2)), Y),
        (np.repeat(X[:2], 5, 0), np.repeat(Y[:2], 5)),
        (X, X[:, 0]),
        (X, np.zeros(30)),
        (X, Y * 1e-12),
        (X, Y + 1e9),
    ):
        mean, variance = mean_and_variance(BayesianLinearRegression().fit(x, y)(x))
        assert np.isfinite(mean).all() and np.isfinite(variance).all() and (variance > 0).all()
    flat = BayesianLinearRegression().fit(np.ones((30, 2)), Y)
    np.testing.assert_allclose(mean_and_variance(flat(np.ones((1, 2))))[0], Y.mean(), rtol=1e-6)


def test_calibrated_on_its_own_model():
    """Coverage of 90% intervals over 200 small data sets drawn from the model; false alarm rate 1e-6, exact."""
    inside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(13, 2))
        y = 3 + x @ rng.normal(size=2) + rng.normal(size=13)
        d = BayesianLinearRegression(prior_precision=1.0).fit(x[:12], y[:12])(x[12:])
        low, high = st.t(d.df, d.loc, d.scale).interval(0.9)
        inside += int(low[0] <= y[12] <= high[0])
    # The noise prior is worth one row of the data's own scale, which widens the intervals a little.
    assert st.binom.ppf(5e-7, 200, 0.9) <= inside <= st.binom.isf(5e-7, 200, 0.92)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_mode_is_that_of_scikit_learn(classes):
    """At a fixed prior precision the mode is the ridge-penalized softmax fit."""
    rng = np.random.default_rng(classes)
    x = rng.normal(size=(300, 2))
    labels = (x @ rng.normal(size=(2, classes)) + rng.gumbel(size=(300, classes))).argmax(1)
    u, precision = standardized(x), 2.0
    features = np.concatenate([np.ones((300, 1)), u], 1)
    mode, hessian = linear._logistic_mode(
        features, np.eye(classes)[labels], np.ones(300), np.zeros((3, classes)), precision
    )
    if classes == 2:
        # Two columns of softmax share the penalty: the difference has half the precision.
        peer = LogisticRegression(C=2 / precision, tol=1e-10, max_iter=10_000).fit(u, labels)
        np.testing.assert_allclose(mode[1:, 1] - mode[1:, 0], peer.coef_[0], atol=2e-3)
    else:
        peer = LogisticRegression(C=1 / precision, tol=1e-10, max_iter=10_000).fit(u, labels)
        np.testing.assert_allclose(mode[1:].T, peer.coef_, atol=2e-3)
        np.testing.assert_allclose(mode[0] - mode[0].mean(), peer.intercept_ - peer.intercept_.mean(), atol=2e-3)
    np.testing.assert_allclose(hessian, hessian.T)
    assert np.linalg.eigvalsh(hessian).min() > 0


def test_logistic_hessian_and_gradient():
    rng = np.random.default_rng(0)
    features, labels = np.c_[np.ones(40), rng.normal(size=(40, 2))], np.eye(3)[rng.integers(0, 3, 40)]
    weights = rng.gamma(1, size=40)
    mode, hessian = linear._logistic_mode(features, labels, weights, np.zeros((3, 3)), 0.7)
    penalty = np.full((3, 3), 0.7)
    penalty[0] = linear._INTERCEPT_PRECISION

    def objective(w):
        return -(weights * (labels * jax.nn.log_softmax(features @ w)).sum(1)).sum() + 0.5 * (penalty * w * w).sum()

    with jax.enable_x64(True):
        w = jnp.asarray(mode)
        gradient, exact = jax.jit(lambda w: (jax.grad(objective)(w), jax.hessian(objective)(w)))(w)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-3)
    np.testing.assert_allclose(hessian, np.asarray(exact).reshape(9, 9), rtol=1e-3, atol=1e-3)


def test_logistic_probabilities_are_averages():
    """Against the integral over the one-dimensional Gaussian posterior: within the stated 0.01 for 32 members."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1))
    labels = (x[:, 0] + rng.logistic(size=60) > 0).astype(int)
    few = BayesianLogisticRegression(prior_precision=1.0).fit(x, labels, key=KEY)
    many = BayesianLogisticRegression(prior_precision=1.0, num_members=20_000).fit(x, labels, key=jax.random.key(1))
    new = np.linspace(-3, 3, 9)[:, None]
    np.testing.assert_allclose(few(new).probs, many(new).probs, atol=0.01)
    members, weights = few.members(new)
    assert members.batch_shape == (32, 9)
    np.testing.assert_allclose(np.einsum("m,mrc->rc", weights, members.probs), few(new).probs, rtol=1e-5)


def test_separable_classes_keep_finite_probabilities():
    fitted = BayesianLogisticRegression().fit(X, X[:, 0] > 0, key=KEY)
    probs = np.asarray(fitted(np.array([[100.0, 0, 0], [-100.0, 0, 0]])).probs)
    assert np.isfinite(probs).all() and probs[0, 1] > 0.9 and probs[1, 1] < 0.1
    assert fitted.classes == (False, True)


def test_frames_with_text_and_missing_values():
    frame = pd.DataFrame({"a": X[:, 0], "kind": np.where(X[:, 1] > 0, "big", "small")})
    frame.loc[3, "a"] = np.nan
    fitted = BayesianLinearRegression().fit(frame, Y)
    assert np.isfinite(mean_and_variance(fitted(frame.assign(kind="new")))[0]).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0, 1.0], "not negative"),
        ([1.0, np.nan, 1.0], "finite"),
        ([0.0, 0.0, 0.0], "all weights are zero"),
        ([1.0, 1.0], "one per row"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(InputError, match=message):
        check_weights(weights, 3)


def test_target_given_as_a_target():
    target = Target.from_values(Y)
    same_predictions(BayesianLinearRegression().fit(X, target), BayesianLinearRegression().fit(X, Y))
