"""NGBoost: gradients against automatic differentiation, metrics against quadrature, and what boosting recovers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.table import Table
from bayeslens.learners.boosted_trees import export_trees
from bayeslens.learners.natural_gradient import marginal_parameters, natural_gradient
from bayeslens.learners.ngboost import NGBoost
from bayeslens.learners.ngboost_families import NAMES, family_of

KEY = jax.random.key(0)
# Each family's log density as NumPyro has it, of unconstrained parameters.
DENSITIES = {
    "normal": lambda t: dist.Normal(t[0], jnp.exp(t[1])),
    "lognormal": lambda t: dist.LogNormal(t[0], jnp.exp(t[1])),
    "student_t": lambda t: dist.StudentT(jnp.exp(t[2]), t[0], jnp.exp(t[1])),
    "laplace": lambda t: dist.Laplace(t[0], jnp.exp(t[1])),
    "poisson": lambda t: dist.Poisson(jnp.exp(t[0])),
    "negative_binomial": lambda t: dist.NegativeBinomial2(jnp.exp(t[0]), jnp.exp(t[1])),
}
POINTS = {
    "normal": ([0.3, -0.2], [1.1, -2.0]),
    "lognormal": ([0.3, -0.2], [1.1, 0.4]),
    "student_t": ([0.3, -0.2, 1.3], [1.1, -4.0]),
    "laplace": ([0.3, -0.2], [1.1, -2.0]),
    "poisson": ([0.7], [0.0, 5.0]),
    "negative_binomial": ([0.7, 0.4], [0.0, 9.0]),
}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_log_density(name):
    theta, values = POINTS[name]
    y, rows = np.array(values), np.tile(theta, (2, 1)).astype(float)
    family = family_of(name)
    with jax.enable_x64(True):
        loss = lambda t, v: -DENSITIES[name](t).log_prob(v)  # noqa: E731
        exact = [loss(jnp.array(theta), v) for v in values]
        slopes = [jax.grad(loss)(jnp.array(theta), v) for v in values]
    np.testing.assert_allclose(family.loss(y, rows, None), exact, rtol=1e-6)
    np.testing.assert_allclose(family.gradient(y, rows, None)[0], slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_the_fisher_information(name):
    theta = np.array(POINTS[name][0], float)
    family = family_of(name)
    if name in ("poisson", "negative_binomial"):
        y, weights = np.arange(2000.0), 1.0
    else:
        # Substitute y = sinh(s), so that heavy tails are reached.
        s, weights = np.linspace(-14, 14, 200_001), 28 / 200_000
        y, weights = np.sinh(s), weights * np.cosh(s)
        keep = y > 0 if name == "lognormal" else np.isfinite(y)
        y, weights = y[keep], weights[keep]
    rows = np.broadcast_to(theta, (len(y), len(theta)))
    mass = np.exp(-family.loss(y, rows, None)) * weights
    assert mass.sum() == pytest.approx(1, abs=1e-4)
    slope, metric = family.gradient(y, rows, None)
    information = np.einsum("n,ni,nj->ij", mass, slope, slope)
    found = np.diag(metric[0]) if metric.ndim == 2 else metric[0]
    # The negative binomial's is interpolated in a table.
    np.testing.assert_allclose(found, information, rtol=0.02 if name == "negative_binomial" else 1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["normal", "lognormal", "student_t", "laplace"])
def test_censored_gradient(name):
    family, theta = family_of(name), np.array(POINTS[name][0], float)
    y, censored = np.array([1.4, 0.6]), np.array([True, True])
    found = family.gradient(y, np.tile(theta, (2, 1)), censored)[0]
    for j in range(len(theta)):
        up, down = (np.tile(theta + s * 1e-5 * np.eye(len(theta))[j], (2, 1)) for s in (1, -1))
        difference = (family.loss(y, up, censored) - family.loss(y, down, censored)) / 2e-5
        np.testing.assert_allclose(found[:, j], difference, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_multivariate_normal_gradient_and_metric():
    rng = np.random.default_rng(0)
    family, theta = family_of("auto", targets=2), np.array([0.5, -1.0, 0.2, 0.7, -0.3])

    def log_density(t, y):
        factor = jnp.array([[jnp.exp(t[2]), 0.0], [t[3], jnp.exp(t[4])]])
        return dist.MultivariateNormal(t[:2], precision_matrix=factor @ factor.T).log_prob(y)

    draws = np.asarray(family.distribution(theta[None]).sample(KEY, (200_000,)), np.float64)[:, 0]
    rows = np.broadcast_to(theta, (len(draws), 5))
    slope, metric = family.gradient(draws, rows, None)
    with jax.enable_x64(True):
        exact = jax.grad(lambda t: -log_density(t, jnp.asarray(draws[0])))(jnp.asarray(theta))
    np.testing.assert_allclose(slope[0], exact, rtol=1e-6)
    # 200,000 draws: entries of the information have standard errors of about 0.01.
    np.testing.assert_allclose(metric[0], np.einsum("ni,nj->ij", slope, slope) / len(draws), atol=0.08)
    predictive = NGBoost(num_trees=20).fit(rng.normal(size=(100, 2)), rng.normal(size=(100, 2)), key=KEY)
    assert predictive(rng.normal(size=(3, 2))).event_shape == (2,)


def test_classes_gradients():
    y, theta = np.array([2.0, 0.0]), np.array([[0.3, -0.5, 0.1], [1.0, 0.0, -1.0]])
    slope, _ = family_of("auto", classes=3).gradient(y, theta, None)
    exact = jax.vmap(jax.grad(lambda t, v: -jax.nn.log_softmax(t)[v]))(jnp.asarray(theta), jnp.array([2, 0]))
    np.testing.assert_allclose(slope, exact, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_marginal_fit_is_stationary(name):
    rng = np.random.default_rng(1)
    y = rng.poisson(rng.gamma(2, 2, 3000)) if "o" in name and name in ("poisson", "negative_binomial") else None
    y = (rng.standard_t(4, 3000) * 2 + 1 if y is None else y).astype(float)
    y = np.abs(y) + 0.1 if name == "lognormal" else y
    family = family_of(name)
    theta = marginal_parameters(family, y, np.ones(len(y)))
    slope = family.gradient(y, np.tile(theta, (len(y), 1)), None)[0].mean(0)
    np.testing.assert_allclose(slope, 0, atol=2e-3)


def test_student_t_and_censoring_recover_simulated_parameters():
    # 10,000 rows: location within 0.15, scale within 20%, degrees of freedom between 3 and 6 (true values 0.5 and 4).
    rng = np.random.default_rng(2)
    x = rng.uniform(-2, 2, (10_000, 1))
    y = np.sin(2 * x[:, 0]) + 0.5 * rng.standard_t(4, 10_000)
    found = NGBoost(distribution="student_t").fit(x, y, key=KEY)(x)
    assert np.abs(np.asarray(found.loc) - np.sin(2 * x[:, 0])).mean() < 0.15
    assert np.median(found.scale) == pytest.approx(0.5, rel=0.2)
    assert 3 < np.median(found.df) < 6
    true = x[:, 0]
    lifetime, limit = true + rng.normal(size=10_000) * 0.5, 0.5
    censored = lifetime > limit
    seen = np.minimum(lifetime, limit)
    honest = NGBoost(distribution="normal").fit(x, seen, key=KEY, censored=censored)(x)
    naive = NGBoost(distribution="normal").fit(x, seen, key=KEY)(x)
    inside = (true > 0) & (true < 1.0)  # where half and more are censored
    error = np.abs(np.asarray(honest.loc) - true)[inside].mean()
    assert error < 0.15
    assert error < 0.6 * np.abs(np.asarray(naive.loc) - true)[inside].mean()


def test_exported_trees_equal_lightgbm():
    import lightgbm as lgb

    rng = np.random.default_rng(3)
    x = rng.normal(size=(2000, 3)).astype(np.float32)
    x[rng.random(2000) < 0.2, 0] = np.nan
    code = rng.integers(0, 12, 2000).astype(np.float32)
    y = np.nan_to_num(x[:, 0]) + (code % 3) + x[:, 1] ** 2
    features = np.c_[x, code]
    data = lgb.Dataset(features, y, categorical_feature=[3])
    booster = lgb.train({"objective": "regression", "boost_from_average": False, "verbose": -1}, data, 40)
    trees = export_trees([booster], [40])
    new = features.copy()
    new[:50, 3] = 40  # unseen categories
    new[50:100, 3] = np.nan
    new[100:150, 1] = np.nan  # missing only at prediction
    np.testing.assert_allclose(trees(new)[:, 0], booster.predict(new), atol=2e-5)
    np.testing.assert_allclose(jax.jit(trees.__call__)(jnp.asarray(new))[:, 0], booster.predict(new), atol=2e-5)


def test_missing_values_categories_and_unseen_ones():
    rng = np.random.default_rng(4)
    frame = pd.DataFrame({"a": rng.normal(size=300), "b": rng.choice(["u", "v", "w"], 300)})
    y = np.where(frame["b"] == "u", 3.0, 0.0) + frame["a"] + 0.1 * rng.normal(size=300)
    frame.loc[::7, "a"] = np.nan
    predictive = NGBoost().fit(frame, y, key=KEY)
    found = predictive(pd.DataFrame({"a": [0.0, 0.0, np.nan], "b": ["u", "v", "never"]}))
    assert np.asarray(found.loc)[0] > np.asarray(found.loc)[1] + 2
    assert np.isfinite(found.loc).all()


def test_offset_is_exposure():
    rng = np.random.default_rng(5)
    x, exposure = rng.normal(size=(3000, 1)), rng.uniform(0.5, 5, 3000)
    rate = np.exp(0.5 * x[:, 0])
    predictive = NGBoost(distribution="poisson").fit(x, rng.poisson(rate * exposure), key=KEY, offset=np.log(exposure))
    # Rates per unit of exposure, within 10% on average.
    assert np.abs(np.log(np.asarray(predictive(x).rate) / rate)).mean() < 0.1


def test_weights_are_repetitions():
    rng = np.random.default_rng(6)
    x, y, w = rng.normal(size=(60, 1)), rng.normal(size=60), rng.integers(1, 4, 60)
    plain = dict(num_trees=20, early_stopping_rounds=0, row_fraction=1.0, column_fraction=1.0, num_leaves=2)
    learner = NGBoost(**plain, min_rows_per_leaf=1)
    weighted = learner.fit(x, y, key=KEY, weights=w)(x)
    repeated = learner.fit(np.repeat(x, w, 0), np.repeat(y, w), key=KEY)(x)
    np.testing.assert_allclose(weighted.loc, repeated.loc, atol=1e-4)


def test_natural_gradient_beats_the_ordinary_one():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(1500, 2))
    y = 100 * (x[:, 0] + np.exp(0.7 * x[:, 1]) * rng.normal(size=1500))
    scores = [
        NGBoost(natural_gradient=flag).fit(x[:1000], y[:1000], key=KEY)(x[1000:]).log_prob(y[1000:]).mean()
        for flag in (True, False)
    ]
    assert scores[0] > scores[1] + 0.2


def test_small_tables_and_traced_calls():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(20, 2)).astype(np.float32), rng.normal(size=20)
    predictive = NGBoost().fit(x, y, key=KEY)
    assert np.isfinite(predictive(x).scale).all()
    traced = jax.jit(lambda a: predictive.parameters(a))(jnp.asarray(x))
    np.testing.assert_allclose(traced, predictive.parameters(x), atol=1e-5)
    labels = NGBoost().fit(x, np.where(y > 0, "up", "down"), key=KEY)
    assert labels.classes == ("down", "up")
    np.testing.assert_allclose(labels(x).probs.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "y", "arguments", "message"),
    [
        ({"distribution": "magic"}, [1.0, 2.0, 3.0], {}, "magic"),
        ({"distribution": "poisson"}, [1.0, -2.0, 3.0], {}, "whole"),
        ({"distribution": "poisson"}, [1.0, 2.5, 3.0], {}, "whole"),
        ({"distribution": "lognormal"}, [1.0, 0.0, 3.0], {}, "positive"),
        ({"scoring_rule": "crps"}, np.eye(3), {}, "3 targets"),
        (
            {"scoring_rule": "crps", "distribution": "laplace"},
            [1.0, 2.0, 3.0],
            {"censored": [True, False, False]},
            "log score",
        ),
        ({"scoring_rule": "brier"}, [1.0, 2.0, 3.0], {}, "brier"),
        ({}, [1.0, np.nan, 3.0], {}, "NaN"),
        ({}, [1.0, 2.0, 3.0], {"offset": [0.0, 0.0, 0.0]}, "exposure"),
        ({"distribution": "poisson"}, [1.0, 2.0, 3.0], {"censored": [True, False, False]}, "censored"),
        ({"distribution": "bernoulli"}, ["a", "b", "c"], {}, "3 classes"),
        ({}, [1.0, 2.0, 3.0], {"weights": [1.0, -1.0, 1.0]}, "negative"),
    ],
)
def test_bad_input(settings, y, arguments, message):
    with pytest.raises(InputError, match=message):
        NGBoost(**settings).fit(np.arange(3.0)[:, None], y, key=KEY, **arguments)


def test_table_is_what_trees_see():
    assert Table.from_data(np.zeros((3, 1)) + np.arange(3)[:, None]).trees(np.ones((2, 1))).tolist() == [[1.0], [1.0]]
    assert natural_gradient(family_of("laplace"), np.array([1.0]), np.zeros((1, 2))).tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("name", [*NAMES, "bernoulli", "categorical", "multivariate_normal"])
def test_traced_calls_equal_those_on_the_host(name):
    rng = np.random.default_rng(10)
    x = rng.normal(size=(60, 2)).astype(np.float32)
    y = {
        "poisson": rng.poisson(3, 60), "negative_binomial": rng.poisson(3, 60), "bernoulli": rng.integers(0, 2, 60),
        "categorical": rng.integers(0, 3, 60).astype(str), "multivariate_normal": rng.normal(size=(60, 2)),
    }.get(name, np.exp(rng.normal(size=60)))  # fmt: skip
    predictive = NGBoost(distribution=name, num_trees=15, early_stopping_rounds=0).fit(x, y, key=KEY)
    value = np.ones(2) if name == "multivariate_normal" else 1
    traced = jax.jit(lambda a: predictive(a).log_prob(value))(jnp.asarray(x))
    np.testing.assert_allclose(traced, predictive(x).log_prob(value), rtol=1e-3, atol=1e-3)


def test_small_tables_do_not_overfit():
    # 20 rows of noise: five-fold cross-validation must not let the scale collapse, in any of ten tables.
    rng = np.random.default_rng(11)
    for _ in range(10):
        found = NGBoost().fit(rng.normal(size=(20, 3)), rng.normal(size=20), key=KEY)(rng.normal(size=(50, 3)))
        assert np.asarray(found.scale).min() > 0.2


def test_features_without_a_split_leave_the_marginal():
    y = np.random.default_rng(12).normal(3, 2, 60)
    found = NGBoost().fit(np.ones((60, 2)), y, key=KEY)(np.zeros((2, 2)))
    np.testing.assert_allclose(found.loc, y.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.scale, y.std(), rtol=0.2)


def test_one_outlier_keeps_numbers_finite():
    rng = np.random.default_rng(13)
    x, y = rng.normal(size=(200, 2)), np.r_[rng.normal(size=199), 1e7]
    found = NGBoost().fit(x, y, key=KEY)(x)
    # Between the bulk and a few times the spread of all rows together.
    assert np.isfinite(found.loc).all() and np.asarray(found.scale).max() < 20 * y.std()


def test_members_are_bootstrap_fits():
    rng = np.random.default_rng(14)
    x = rng.normal(size=(150, 2))
    predictive = NGBoost(num_members=3, num_trees=30).fit(x, x[:, 0] + rng.normal(size=150), key=KEY)
    members, weights = predictive.members(x)
    assert members.batch_shape == (3, 150) and weights.sum() == pytest.approx(1)
    assert np.asarray(members.loc).std(0).max() > 0
    assert predictive(x).batch_shape == (150,)


def test_zero_weights_are_rows_left_out():
    rng = np.random.default_rng(15)
    x, y, w = rng.normal(size=(120, 2)), rng.normal(size=120), np.repeat([1.0, 0.0], 60)
    found, alone = NGBoost().fit(x, y, key=KEY, weights=w)(x), NGBoost().fit(x[:60], y[:60], key=KEY)(x)
    np.testing.assert_allclose(found.loc, alone.loc, rtol=1e-6)


def test_groups_are_held_out_together(monkeypatch):
    from bayeslens.learners import ngboost

    seen, real = [], ngboost.folds
    monkeypatch.setattr(ngboost, "folds", lambda *a, **s: seen.extend(real(*a, **s)) or seen)
    x, groups = np.random.default_rng(16).normal(size=(100, 1)), np.arange(100) // 10
    NGBoost(num_trees=3).fit(x, x[:, 0], key=KEY, groups=groups)
    assert all(not set(groups[train]) & set(groups[held]) for train, held in seen)


def test_offset_at_prediction_is_exposure():
    x = np.random.default_rng(17).normal(size=(80, 1))
    predictive = NGBoost(distribution="poisson", num_trees=5).fit(x, np.arange(80.0) % 4, key=KEY)
    doubled = predictive(x, offset=np.full(80, np.log(2)))
    np.testing.assert_allclose(doubled.rate, 2 * predictive(x).rate, rtol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{"num_trees": 0}, {"num_leaves": 1}, {"learning_rate": 0.0}, {"row_fraction": 1.5}, {"num_members": 0}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        NGBoost(**settings).fit(np.arange(9.0)[:, None], np.arange(9.0), key=KEY)
