import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.diagnostics import effective_sample_size
from scipy.stats import multivariate_normal, norm

from bayeslens.core.distribution import concatenate
from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import log_prob, mean_and_variance
from bayeslens.core.table import Table
from bayeslens.learners.gaussian_process import GaussianProcess, exact_posterior, input_groups
from bayeslens.learners.gaussian_process_evidence import (
    Covariance,
    Observations,
    cholesky,
    log_evidence,
    one_thread,
    traceable_log_evidence,
)
from bayeslens.learners.gaussian_process_hyperparameters import (
    draw_by_laplace,
    draw_by_nuts,
    hyperprior,
    optimize_hyperparameters,
)
from bayeslens.learners.sparse_gaussian_process import evidence_bound, fit_sparse, inducing_points, sparse_posterior

GROUPS = np.array([0, 1, 1])  # the last two inputs share a length scale
PARAMETERS = np.log([1.3, 0.8, 0.9, 0.4, 0.5])
COVARIANCE = Covariance(np.array([1.3, 0.8, 0.8]), 0.9, 0.4)
NOISE = 0.5


@pytest.fixture(autouse=True)
def _on_one_thread():
    with one_thread():
        yield


def rows(count, inputs=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, inputs))
    return x, np.sin(2 * x[:, 0]) + 0.5 * x[:, -1] + 0.3 * generator.normal(size=count)


def observe(x, y, weights=None):
    return Observations(GROUPS, x, y, np.ones(len(y)) if weights is None else weights)


def slow_covariance(x, z):
    """The formula, pair by pair."""
    r = np.sqrt(np.square((x[:, None] - z[None]) / COVARIANCE.lengths).sum(-1))
    smooth = 0.9**2 * (1 + np.sqrt(5) * r + 5 / 3 * r**2) * np.exp(-np.sqrt(5) * r)
    return smooth + 0.4**2 / 3 * x @ z.T + 1.0


def differences(function, at, step=1e-5):
    return np.array([(function(at + step * e)[0] - function(at - step * e)[0]) / 2 / step for e in np.eye(len(at))])


def mean_score(predictive, x, y):
    return log_prob(predictive(x), y).mean()


def test_posterior_and_evidence_equal_the_closed_form():
    x, y = rows(40)
    new = rows(7, seed=1)[0]
    latent = exact_posterior(PARAMETERS, observe(x, y))
    total = slow_covariance(x, x) + NOISE**2 * np.eye(40)
    cross = slow_covariance(new, x)
    mean, covariance = latent.joint(new, x)
    np.testing.assert_allclose(mean, cross @ np.linalg.solve(total, y), atol=1e-10)
    expected = slow_covariance(new, new) - cross @ np.linalg.solve(total, cross.T)
    np.testing.assert_allclose(covariance, expected, atol=1e-10)
    np.testing.assert_allclose(latent.moments(new, x)[1], np.sqrt(np.diag(expected)), atol=1e-9)
    value = log_evidence(PARAMETERS, observe(x, y))[0]
    assert value == pytest.approx(multivariate_normal(np.zeros(40), total).logpdf(y), abs=1e-8)


def test_posterior_equals_tinygp_in_float64():
    import tinygp

    x, y = rows(30)
    new = rows(5, seed=1)[0]
    latent = exact_posterior(PARAMETERS, observe(x, y))

    @jax.jit
    def condition(x, y, new):
        kernel = (
            0.9**2 * tinygp.transforms.Linear(jnp.asarray(1 / COVARIANCE.lengths), _matern(tinygp))
            + 0.4**2 / 3 * tinygp.kernels.DotProduct()
            + tinygp.kernels.Constant(1.0)
        )
        evidence, conditioned = tinygp.GaussianProcess(kernel, x, diag=NOISE**2).condition(y, new)
        return evidence, conditioned.loc, conditioned.variance

    with jax.enable_x64(True):
        evidence, mean, variance = map(np.asarray, condition(x, y, new))
    assert log_evidence(PARAMETERS, observe(x, y))[0] == pytest.approx(evidence, abs=1e-6)
    found_mean, found_deviation = latent.moments(new, x)
    np.testing.assert_allclose(found_mean, mean, atol=1e-6)
    np.testing.assert_allclose(found_deviation**2, variance, atol=1e-6)


def _matern(tinygp):
    return tinygp.kernels.Matern52(distance=tinygp.kernels.distance.L2Distance())


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_finite_differences(seed):
    x, y = rows(30, seed=seed)
    weights = np.random.default_rng(seed).uniform(0.3, 3, 30)
    at = PARAMETERS + 0.3 * np.random.default_rng(seed).normal(size=5)
    exact = lambda p: log_evidence(p, observe(x, y, weights))  # noqa: E731
    np.testing.assert_allclose(exact(at)[1], differences(exact, at), rtol=1e-6, atol=1e-6)
    bound = lambda p: evidence_bound(p, observe(x, y, weights), x[:9] + 0.1)  # noqa: E731
    np.testing.assert_allclose(bound(at)[1], differences(bound, at), rtol=1e-4, atol=1e-4)


def test_sparse_with_every_row_as_inducing_point_is_exact():
    x, y = rows(50)
    weights = np.random.default_rng(0).uniform(0.3, 3, 50)
    new = rows(9, seed=1)[0]
    exact = exact_posterior(PARAMETERS, observe(x, y, weights)).moments(new, x)
    latent, bound = sparse_posterior(PARAMETERS, observe(x, y, weights), x)
    np.testing.assert_allclose(latent.moments(new, x), exact, atol=1e-5)
    value = log_evidence(PARAMETERS, observe(x, y, weights))[0]
    assert bound == pytest.approx(value, abs=1e-3)
    assert evidence_bound(PARAMETERS, observe(x, y, weights), x)[0] == pytest.approx(bound, abs=1e-6)


def test_the_bound_is_below_the_evidence_and_rises_with_inducing_points():
    x, y = rows(80)
    data = (PARAMETERS, observe(x, y))
    bounds = [evidence_bound(*data, inducing_points(COVARIANCE, x, count))[0] for count in (5, 20, 60)]
    assert bounds[0] < bounds[1] < bounds[2] < log_evidence(*data)[0]


def test_large_tables_use_inducing_points_and_predict_as_well():
    x, y = rows(900)
    new, y_new = rows(300, seed=1)
    exact = GaussianProcess().fit(x, y)
    sparse = GaussianProcess(max_exact_rows=500, num_inducing=80).fit(x, y)
    assert sparse.points.shape == (80, 3)
    assert sparse.log_evidence < exact.log_evidence + 1e-6
    scores = [mean_score(p, new, y_new) for p in (exact, sparse)]
    assert scores[1] > scores[0] - 0.02


def test_sparse_bound_streams_over_chunks(monkeypatch):
    from bayeslens.learners import sparse_gaussian_process as module

    x, y = rows(60)
    data = (PARAMETERS, observe(x, y), x[:10])
    whole = module.sparse_posterior(*data)
    monkeypatch.setattr(module, "_CHUNK", 7)
    parts = module.sparse_posterior(*data)
    assert parts[1] == pytest.approx(whole[1], abs=1e-8)
    np.testing.assert_allclose(parts[0].coefficients, whole[0].coefficients, rtol=1e-4, atol=1e-4)


def test_recovers_hyperparameters():
    generator = np.random.default_rng(3)
    x = generator.uniform(-3, 3, (400, 2))
    covariance = Covariance(np.array([0.8, 6.0]), 1.0, 0.0)
    function = np.linalg.cholesky(covariance(x, x) + 1e-9 * np.eye(400)) @ generator.normal(size=400)
    y = 10 + 5 * (function + 0.2 * generator.normal(size=400))
    predictive = GaussianProcess(hyperparameters="map").fit(x, y)
    latent = predictive.latents[0]
    lengths = latent.covariance.lengths * x.std(0)  # the table standardizes
    assert 0.5 < lengths[0] < 1.3
    assert lengths[1] > 3
    assert predictive.scale * latent.noise == pytest.approx(1.0, rel=0.2)
    d = predictive(x)
    assert np.sqrt(np.square(d.mean - 10 - 5 * function).mean()) < 0.6


@pytest.mark.parametrize("hyperparameters, num_draws", [("map", 1), ("auto", 4)])
def test_joint_has_the_marginals_and_members_mix_to_them(hyperparameters, num_draws):
    x, y = rows(60)
    new = rows(6, seed=1)[0]
    predictive = GaussianProcess(hyperparameters=hyperparameters, num_draws=max(num_draws, 2)).fit(x, y)
    marginal, joint = predictive(new), predictive.joint(new)
    assert isinstance(marginal, dist.Normal if num_draws == 1 else dist.MixtureSameFamily)
    assert marginal.batch_shape == (6,) and joint.event_shape == (6,) and joint.batch_shape == ()
    mean, variance = mean_and_variance(marginal)
    np.testing.assert_allclose(joint.mean, mean, atol=1e-5)
    np.testing.assert_allclose(joint.variance, variance, rtol=1e-4)
    members, weights = predictive.members(new)
    assert members.batch_shape == (5 * num_draws, 6) and weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights @ members.loc, mean, atol=1e-6)
    np.testing.assert_allclose(weights @ (members.scale**2 + members.loc**2) - mean**2, variance, rtol=1e-5)


def test_draws_have_the_laplace_covariance():
    means, deviations, _ = hyperprior(1)
    precision = np.diag([4.0, 9.0, 1.0, 2.0]) + 0.5
    draws = draw_by_laplace(means, lambda p: (0.0, -precision @ (p - means)), 40_000)
    np.testing.assert_allclose(draws.mean(0), means, atol=1e-10)
    expected = np.linalg.inv(precision + np.diag(1 / deviations**2))
    np.testing.assert_allclose(np.cov(draws.T), expected, atol=0.01)


def test_the_traceable_evidence_is_the_closed_form_up_to_a_constant():
    x, y = rows(30)
    observations = observe(x, y, np.random.default_rng(0).uniform(0.3, 3, 30))
    points = PARAMETERS + 0.3 * np.random.default_rng(1).normal(size=(4, 5))
    host = [log_evidence(p, observations) for p in points]
    with jax.enable_x64(True):
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(lambda p: traceable_log_evidence(p, observations))))(
            points
        )
    np.testing.assert_allclose(np.diff(values), np.diff([value for value, _ in host]), atol=1e-8)
    np.testing.assert_allclose(gradients, [gradient for _, gradient in host], atol=1e-8)


def quadrature(x, y, weights):
    """Means and standard deviations of the four log hyperparameters of a table with one input, on a dense grid."""
    means, deviations, bounds = hyperprior(1)
    axes = [np.linspace(m - 5 * d, m + 5 * d, 25) for m, d in zip(means, deviations, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)
    logs = []
    for part in np.array_split(points, 200):
        length, smooth, linear, noise = np.exp(np.clip(part, *bounds.T)).T[..., None, None]
        a = np.sqrt(5) * np.abs(x - x.T) / length
        total = (
            smooth**2 * (1 + a + a**2 / 3) * np.exp(-a) + linear**2 * (x @ x.T) + 1 + noise**2 * np.diag(1 / weights)
        )
        square = (y * np.linalg.solve(total, np.broadcast_to(y[:, None], (len(part), len(y), 1)))[..., 0]).sum(-1)
        repeats = (weights.sum() - len(y)) * np.log(noise[:, 0, 0])
        log_prior = -0.5 * np.square((part - means) / deviations).sum(1)
        logs.append(log_prior - 0.5 * square - 0.5 * np.linalg.slogdet(total)[1] - repeats)
    share = np.exp(np.concatenate(logs) - np.max(np.concatenate(logs)))
    share /= share.sum()
    center = share @ points
    return center, np.sqrt(share @ np.square(points - center))


def test_nuts_draws_from_the_posterior_of_the_hyperparameters():
    # Eight z-scores of at most 4.5: a correct sampler fails for one key in 20,000.
    x = np.array([-1.5, -0.8, -0.2, 0.4, 0.9, 1.6])[:, None]
    y, weights = np.array([-1.0, 0.7, 1.2, 0.3, -0.9, -0.4]), np.array([1.0, 2, 1, 1, 0.5, 1])
    center, deviation = quadrature(x, y, weights)
    observations = Observations(np.zeros(1, int), x, y, weights)
    best = optimize_hyperparameters(observations)
    draws = draw_by_nuts(best, observations, 2000, key=jax.random.key(0)).reshape(2, 1000, 4)
    for values, expected in ((draws, center), (np.square(draws - center), deviation**2)):
        error = values.std((0, 1)) / np.sqrt(effective_sample_size(values))
        assert np.abs((values.mean((0, 1)) - expected) / error).max() < 4.5
    # Laplace's approximation is not that posterior: the same check refuses it.
    laplace = draw_by_laplace(best, lambda p: log_evidence(p, observations), 4000)
    assert np.abs((laplace.mean(0) - center) / (laplace.std(0) / np.sqrt(4000))).max() > 4.5


def test_each_draw_of_nuts_is_a_member():
    x, y = rows(15, inputs=1)
    new = rows(6, inputs=1, seed=1)[0]
    learner = GaussianProcess(hyperparameters="nuts", num_draws=12)
    predictive = learner.fit(x, y, key=jax.random.key(0))
    assert len({latent.noise for latent in predictive.latents}) == 12
    members, weights = predictive.members(new)
    assert members.batch_shape == (60, 6) and weights.sum() == pytest.approx(1)
    mean, variance = mean_and_variance(predictive(new))
    np.testing.assert_allclose(weights @ members.loc, mean, atol=1e-6)
    np.testing.assert_allclose(weights @ (members.scale**2 + members.loc**2) - mean**2, variance, rtol=1e-5)
    # How much wider than the mode's answer is the posterior's affair (15 rows say little); where it lies is not.
    mode_mean, mode_variance = mean_and_variance(GaussianProcess(hyperparameters="map").fit(x, y)(new))
    assert (np.abs(mean - mode_mean) < np.sqrt(mode_variance)).all()


def test_averaging_over_hyperparameters_helps_small_tables():
    x, y = rows(400, inputs=8)
    new, y_new = rows(300, inputs=8, seed=1)
    scores = {}
    for choice in ("map", "auto"):
        learner = GaussianProcess(hyperparameters=choice)
        fits = [learner.fit(x[i : i + 25], y[i : i + 25]) for i in range(0, 400, 25)]
        scores[choice] = np.mean([mean_score(fit, new, y_new) for fit in fits])
    assert scores["auto"] > scores["map"]


def test_predictions_of_folds_can_be_joined_whatever_their_size():
    x, y = rows(520)
    learner = GaussianProcess(num_draws=3)
    joined = concatenate([learner.fit(x[:count], y[:count])(x[:4]) for count in (30, 520)])
    assert joined.batch_shape == (8,)


def test_a_weight_of_two_is_a_repeated_row_and_zero_is_none():
    x, y = rows(40)
    weights = np.ones(40)
    weights[:10], weights[10:15] = 2, 0
    repeated = np.concatenate([np.arange(10), np.arange(10), np.arange(15, 40)])
    new = rows(6, seed=1)[0]
    ones = exact_posterior(PARAMETERS, observe(x[repeated], y[repeated]))
    kept = weights > 0
    weighted = exact_posterior(PARAMETERS, observe(x[kept], y[kept], weights[kept]))
    np.testing.assert_allclose(weighted.moments(new, x[kept]), ones.moments(new, x[repeated]), atol=1e-8)
    values = [
        log_evidence(PARAMETERS, observe(x[repeated], y[repeated]))[0],
        log_evidence(PARAMETERS, observe(x[kept], y[kept], weights[kept]))[0],
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-8)


@pytest.mark.parametrize("hyperparameters", ["map", "auto"])
def test_a_fit_takes_a_weight_of_two_as_a_repeated_row_and_zero_as_none(hyperparameters):
    x, y = rows(40)
    x[15:, 0] += 3  # means and scales of the columns depend on the weights, too
    weights = np.ones(40)
    weights[:10], weights[10:15] = 2, 0
    repeated = np.concatenate([np.arange(10), np.arange(10), np.arange(15, 40)])
    learner = GaussianProcess(hyperparameters=hyperparameters)
    heavy, doubled = learner.fit(x, y, weights=weights), learner.fit(x[repeated], y[repeated])
    new = rows(6, seed=1)[0]
    np.testing.assert_allclose(mean_and_variance(heavy(new)), mean_and_variance(doubled(new)), rtol=1e-6, atol=1e-6)
    assert heavy.log_evidence == pytest.approx(doubled.log_evidence, abs=1e-6)


def test_not_worse_than_scikit_learn_on_diabetes():
    from sklearn.datasets import load_diabetes
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    X, y = load_diabetes(return_X_y=True)
    rest, test = np.arange(442) % 2 == 0, np.arange(442) % 2 == 1
    ours = mean_score(GaussianProcess().fit(X[rest], y[rest]), X[test], y[test])
    center, scale = X[rest].mean(0), X[rest].std(0)
    kernel = ConstantKernel() * Matern(np.full(10, 3.0), nu=2.5) + WhiteKernel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        theirs.fit((X[rest] - center) / scale, y[rest])
        mean, deviation = theirs.predict((X[test] - center) / scale, return_std=True)
    assert ours > norm.logpdf(y[test], mean, deviation).mean() - 0.02


def test_calls_on_jax_arrays_are_traceable_and_differentiable():
    x, y = rows(60)
    predictive = GaussianProcess(num_draws=2).fit(x, y)
    new = jnp.asarray(x[:5], jnp.float32)  # rows of the training table, where distances are zero

    def moments(a):
        d = predictive(a)
        assert predictive.members(a)[0].batch_shape == (10, 5)
        return d.mean, d.variance

    traced = jax.jit(moments)(new)
    host = mean_and_variance(predictive(np.asarray(new)))
    np.testing.assert_allclose(traced[0], host[0], atol=1e-3)
    np.testing.assert_allclose(traced[1], host[1], rtol=1e-3)
    slope, wider = jax.jit(jax.jacfwd(lambda a: jnp.stack(moments(new + a * jnp.eye(3)[0]))))(0.0)
    ends = [mean_and_variance(predictive(np.asarray(new) + sign * 1e-3 * np.eye(3)[0]))[0] for sign in (1, -1)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-3, atol=2e-2)
    assert np.isfinite(wider).all()
    gradient = jax.jit(jax.grad(lambda a: predictive(a).log_prob(jnp.zeros(5)).sum()))(new)
    assert np.isfinite(gradient).all() and (np.asarray(gradient) != 0).any()
    assert jax.jit(lambda a: jnp.isfinite(predictive.joint(a).log_prob(jnp.zeros(5))))(new)


def test_categories_share_a_length_scale():
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "number": generator.normal(size=120),
            "missing": np.where(generator.random(120) < 0.2, np.nan, generator.normal(size=120)),
            "kind": generator.choice(["a", "b", "c"], 120),
            "two": generator.choice(["x", "y"], 120),
            "when": pd.date_range("2020-01-01", periods=120, freq="13h"),
        }
    )
    table = Table.from_data(frame)
    groups = input_groups(table)
    assert len(groups) == table.dense(frame).shape[1]
    assert groups.tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8]
    y = frame["kind"].map({"a": 0.0, "b": 3.0, "c": -2.0}) + frame["number"] + 0.1 * generator.normal(size=120)
    predictive = GaussianProcess().fit(frame, y)
    assert np.abs(mean_and_variance(predictive(frame))[0] - y).mean() < 0.2
    unseen = frame.assign(kind="new", number=np.nan)
    variances = [mean_and_variance(predictive(f))[1] for f in (unseen, frame)]
    assert np.isfinite(variances).all() and variances[0].mean() > 4 * variances[1].mean()


@pytest.mark.parametrize(
    "x, y",
    [
        (np.arange(5.0)[:, None], np.arange(5.0) ** 2),
        (np.array([[1.0]]), np.array([2.0])),
        (np.array([[1.0], [1.0], [2.0]]), np.array([2.0, 3.0, 5.0])),
        (np.zeros((10, 2)), np.arange(10.0)),  # nothing but constant columns
        (np.arange(10.0)[:, None], np.full(10, 3.0)),  # a constant target
        (np.repeat(np.arange(4.0), 20)[:, None], np.tile(np.arange(4.0), 20)),
        (np.arange(30.0)[:, None], np.arange(30.0) * 2),  # no noise at all
        (np.arange(30.0)[:, None] * 1e8, np.r_[np.arange(29.0), 1e9]),  # an outlier
        (np.random.default_rng(0).normal(size=(100, 200)), np.random.default_rng(1).normal(size=100)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_odd_tables(x, y):
    predictive = GaussianProcess(num_draws=3).fit(x, y)
    mean, variance = mean_and_variance(predictive(np.concatenate([x, 100 * x + 7])))
    assert np.isfinite(mean).all() and np.isfinite(variance).all() and (variance > 0).all()
    assert np.isfinite(predictive.log_evidence)
    factors = np.asarray(predictive.joint(x).component_distribution.scale_tril)
    assert np.isfinite(factors).all()
    groups = input_groups(predictive.table)
    inputs = predictive.table.dense(x).astype(float)
    latent = fit_sparse(Observations(groups, inputs, y - y.mean(), np.ones(len(y))), 4)[1]
    assert np.isfinite(latent.root).all()


def test_many_rows_are_predicted_in_chunks(monkeypatch):
    from bayeslens.learners import gaussian_process as module

    x, y = rows(40)
    predictive = GaussianProcess().fit(x, y)
    whole = predictive(x).component_distribution.loc
    monkeypatch.setattr(module, "_CHUNK", 7)
    np.testing.assert_allclose(predictive(x).component_distribution.loc, whole, atol=1e-10)
    assert predictive(x[:0]).batch_shape == (0,)


def test_bad_input_is_refused():
    x, y = rows(10)
    with pytest.raises(InputError, match="weights"):
        GaussianProcess().fit(x, y, weights=np.ones(3))
    with pytest.raises(InputError, match="not numeric"):
        GaussianProcess().fit(x, ["a", "b"] * 5)
    with pytest.raises(InputError, match="use auto, map or nuts"):
        GaussianProcess(hyperparameters="mcmc").fit(x, y)
    with pytest.raises(InputError, match="hyperparameters='map'"):
        GaussianProcess(num_draws=1).fit(x, y)
    with pytest.raises(InputError, match="give fit a key"):
        GaussianProcess(hyperparameters="nuts").fit(x, y)
    with pytest.raises(InputError, match="at most 5 rows, got 10"):
        GaussianProcess(hyperparameters="nuts", max_exact_rows=5).fit(x, y, key=jax.random.key(0))
    with pytest.raises(InputError, match="not finite"):
        cholesky(np.full((2, 2), np.nan))
    means, _, bounds = hyperprior(3)
    assert ((bounds[:, 0] < means) & (means < bounds[:, 1])).all()
