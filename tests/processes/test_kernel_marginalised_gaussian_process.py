"""Choices of kernels, means and noises against quadrature over their hyperparameters; kernels against scikit-learn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import special, stats
from sklearn.gaussian_process import kernels as sklearn_kernels

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.processes import kernel_marginalised_gaussian_process as room
from bayeslens.processes.kernel_marginalised_gaussian_process import (
    choice,
    infer_marginalised,
    log_evidence_ratio,
    marginalised_gaussian_process,
    predict,
)

KEY = jax.random.key(0)
X = np.linspace(0.0, 2.0, 7)
Y = np.array([0.9, 0.2, -0.5, -0.6, 0.1, 0.4, 1.3])
NEW = np.array([-0.5, 0.6, 3.0])
ERRORS = 0.1


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def constant(x, level):
    return level * jnp.ones(len(x))


def white(x, scale):
    return scale * jnp.ones(len(x))


def two_of_each():
    scale = {"length_scale": dist.LogNormal(0.0, 1.0)}
    return marginalised_gaussian_process(
        {
            "rough": (lambda a, b, length_scale: room.exponential(a, b, 1.0, length_scale), scale),
            "smooth": (lambda a, b, length_scale: room.squared_exponential(a, b, 1.0, length_scale), scale),
        },
        {"zero": (lambda x: 0 * x, {}), "constant": (constant, {"level": dist.Normal(0.0, 1.0)})},
        {"none": (lambda x: 0 * x, {}), "white": (lambda x: white(x, 0.4), {})},
    )


MODEL = two_of_each()


@pytest.fixture(scope="module")
def found():
    with jax.enable_x64(True):
        data = {"x": X, "y": Y, "errors": ERRORS}
        return infer_marginalised(MODEL, data, key=KEY, num_live=400, num_steps=20)


@pytest.fixture(scope="module")
def exact():
    """Log evidences of the eight combinations, and their moments at new points; the constant is integrated exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    evidences, moments = np.zeros((2, 2, 2)), np.zeros((2, 2, 2, 2, len(NEW)))
    for k, m, s in itertools.product(range(2), repeat=3):
        terms = []
        for z in nodes:
            kernel = (room.exponential, room.squared_exponential)[k]

            def covariance(a, b, kernel=kernel, z=z, m=m):
                return np.asarray(kernel(a, b, 1.0, np.exp(z))) + m

            noise = ERRORS**2 + (0.4 * s) ** 2
            matrix = covariance(X, X) + noise * np.eye(7)
            gain = np.linalg.solve(matrix, covariance(X, NEW)).T
            variance = np.diag(covariance(NEW, NEW) - gain @ covariance(X, NEW)) + (0.4 * s) ** 2
            terms.append((stats.multivariate_normal(np.zeros(7), matrix).logpdf(Y), gain @ Y, variance))
        log_likelihood, center, variance = (np.array(t) for t in zip(*terms, strict=True))
        evidences[k, m, s] = special.logsumexp(log_likelihood, b=weights / weights.sum())
        share = special.softmax(log_likelihood + np.log(weights))
        moments[k, m, s] = share @ center, share @ (center**2 + variance)
    return evidences, moments


def test_kernels_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    plane, line = rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 5, 1))
    pairs = [
        (room.squared_exponential, {"length_scale": 0.7}, sklearn_kernels.RBF(0.7), plane),
        (room.squared_exponential, {"length_scale": np.array([0.7, 2.0])}, sklearn_kernels.RBF([0.7, 2.0]), plane),
        (room.exponential, {"length_scale": 0.7}, sklearn_kernels.Matern(0.7, nu=0.5), plane),
        (room.matern_32, {"length_scale": 0.7}, sklearn_kernels.Matern(0.7, nu=1.5), plane),
        (room.matern_52, {"length_scale": 0.7}, sklearn_kernels.Matern(0.7, nu=2.5), plane),
        (room.rational_quadratic, {"length_scale": 0.7, "power": 3}, sklearn_kernels.RationalQuadratic(0.7, 3), plane),
        (room.periodic, {"length_scale": 0.7, "period": 1.3}, sklearn_kernels.ExpSineSquared(0.7, 1.3), line),
        (room.linear, {"origin": 0.0}, sklearn_kernels.DotProduct(0.0), plane),
    ]  # fmt: skip
    for function, values, peer, (first, second) in pairs:
        points = (first[:, 0], second[:, 0]) if first.shape[1] == 1 else (first, second)
        np.testing.assert_allclose(function(*points, 2.0, **values), 4 * peer(first, second), rtol=1e-12)
    waves = room.cosine(line[0][:, 0], line[0][:, 0], 2.0, 1.3)
    angle = 2 * np.pi * line[0] / 1.3
    np.testing.assert_allclose(waves, 4 * (np.cos(angle) @ np.cos(angle).T + np.sin(angle) @ np.sin(angle).T))


@pytest.mark.parametrize("kernel", [room.exponential, room.matern_32, room.matern_52, room.squared_exponential])
def test_kernels_have_gradients_where_points_coincide(kernel):
    def total(length_scale):
        return jnp.sum(kernel(X, X, 1.0, length_scale))

    step = (total(1.0 + 1e-6) - total(1.0 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(total)(1.0), step, rtol=1e-6)


@pytest.mark.slow
def test_compiled_covariances_of_any_batch_are_positive_definite():
    scales = {"amplitude": dist.LogNormal(0.0, 0.5), "length_scale": dist.LogNormal(-1.2, 0.7)}
    names = ("exponential", "matern_32", "matern_52", "squared_exponential")
    model = marginalised_gaussian_process({n: (getattr(room, n), scales) for n in names})
    conditioned = conditioned_model(model, {"x": np.linspace(-1, 1, 24), "y": np.zeros(24), "errors": 0.1})
    points = jax.random.normal(KEY, (50, conditioned.dimension))
    compiled = jax.jit(jax.vmap(conditioned.log_likelihood))(points)
    exact = []
    for values in (conditioned.constrain(p) for p in points[:12]):
        name = names[int(values["kernel"])]
        scales = (values[f"kernel/{name}/{s}"] for s in ("amplitude", "length_scale"))
        matrix = getattr(room, name)(np.linspace(-1, 1, 24), np.linspace(-1, 1, 24), *scales) + 0.01 * np.eye(24)
        exact.append(stats.multivariate_normal(np.zeros(24), matrix).logpdf(np.zeros(24)))
    assert np.isfinite(compiled).all()
    np.testing.assert_allclose(compiled[:12], exact, rtol=1e-9)


@pytest.mark.slow
def test_the_likelihood_is_that_of_the_chosen_combination():
    conditioned = conditioned_model(MODEL, {"x": X, "y": Y, "errors": ERRORS})
    values = {"kernel/rough/length_scale": 0.5, "kernel/smooth/length_scale": 0.8, "mean/constant/level": 0.3}
    vectors, exact = [], []
    for k, m, s in itertools.product(range(2), repeat=3):
        coordinates = zip(("kernel", "mean", "noise"), (k, m, s), strict=True)
        vectors.append(conditioned.unconstrain(values | {f"{r}_coordinate": 0.1 + 0.5 * i for r, i in coordinates}))
        matrix = room.squared_exponential(X, X, 1.0, 0.8) if k else room.exponential(X, X, 1.0, 0.5)
        matrix = matrix + (ERRORS**2 + (0.4 * s) ** 2) * np.eye(7)
        exact.append(stats.multivariate_normal(np.full(7, 0.3 * m), matrix).logpdf(Y))
    np.testing.assert_allclose(jax.jit(jax.vmap(conditioned.log_likelihood))(jnp.stack(vectors)), exact, rtol=1e-9)


@pytest.mark.slow
def test_probabilities_and_evidences_match_quadrature(found, exact):
    evidences = exact[0] - np.log(8)
    total, posterior = special.logsumexp(evidences), found.posterior
    # Four standard errors each: false alarm 6e-5, for ten numbers 6e-4.
    assert abs(posterior.log_evidence - total) < 4 * posterior.log_evidence_error
    for axis, role in enumerate((found.kernels, found.means, found.noises)):
        alone = special.logsumexp(evidences, axis=tuple({0, 1, 2} - {axis})) + np.log(2)
        for value, name in zip(alone, role.probabilities, strict=True):
            assert abs(role.probabilities[name] - np.exp(value - np.log(2) - total)) < 4 * role.errors[name] < 0.4
            allowed = 4 * (role.log_evidence_errors[name] + posterior.log_evidence_error)
            assert abs(role.log_evidences[name] - value) < allowed


@pytest.mark.slow
def test_hyperparameters_that_are_not_used_keep_their_priors(found):
    draws = found.posterior.sample(jax.random.key(1), (4000,))
    unused = np.log(draws["kernel/smooth/length_scale"][draws["kernel"] == 0])
    used = np.log(draws["kernel/smooth/length_scale"][draws["kernel"] == 1])
    # Weights leave some hundreds of independent draws: a distance of 0.15 is beyond a p value of 1e-4 for 250.
    assert stats.kstest(unused, "norm").statistic < 0.15 < stats.kstest(used, "norm").statistic


@pytest.mark.slow
def test_predictions_average_over_choices_and_hyperparameters(found, exact):
    shares = special.softmax(exact[0])
    center, square = np.einsum("kms,kmsij->ij", shares, exact[1])
    predicted = predict(found.posterior, NEW, key=KEY, num_draws=1000, noisy=True)
    spread = np.sqrt(square - center**2)
    assert predicted.batch_shape == (3,)
    # A few hundred independent draws: five standard errors are at most 0.25 spreads, and less where draws agree.
    np.testing.assert_allclose((predicted.mean - center) / spread, 0, atol=0.15)
    np.testing.assert_allclose(np.sqrt(predicted.variance) / spread, 1, atol=0.15)
    assert np.all(predict(found.posterior, NEW, key=KEY, num_draws=1000).variance < predicted.variance)


def test_single_candidates_need_no_coordinate_and_are_certain():
    smooth = (
        room.squared_exponential,
        {"amplitude": dist.LogNormal(0.0, 1.0), "length_scale": dist.LogNormal(0.0, 1.0)},
    )
    model = marginalised_gaussian_process({"smooth": smooth})
    conditioned = conditioned_model(model, {"x": np.stack([X, X**2], 1), "y": Y, "errors": np.full(7, 0.1)})
    assert [s.name for s in conditioned.latents] == ["kernel/smooth/amplitude", "kernel/smooth/length_scale"]


@pytest.mark.slow
def test_bad_input_is_refused(found):
    scales = {"amplitude": dist.LogNormal(0.0, 1.0), "length_scale": dist.LogNormal(0.0, 1.0)}
    for kernels, said in (
        ({}, "at least one kernel"),
        ({"a": room.matern_32}, "'a' must be a pair"),
        ({"a": (room.matern_32, {"amplitude": dist.LogNormal(0.0, 1.0)})}, "'a' do not fit"),
    ):
        with pytest.raises(InputError, match=said):
            marginalised_gaussian_process(kernels)
    model = marginalised_gaussian_process({"a": (room.matern_32, scales)}, {"wrong": (lambda x: 0.0, {})})
    for data, said in (
        ({"x": X, "y": Y[:3]}, "shape"),
        ({"x": X, "y": Y, "errors": np.ones(3)}, "errors"),
        ({"x": X, "y": Y}, "mean functions"),
    ):
        with pytest.raises(InputError, match=said):
            conditioned_model(model, data)
    with pytest.raises(InputError, match="on a line"):
        room.cosine(np.zeros((3, 2)), np.zeros((3, 2)), 1.0, 1.0)
    other = Posterior({"kernel": np.zeros((1, 3))})
    for call, said in (
        (lambda: choice(other, "kernel"), "engine nested"),
        (lambda: choice(found.posterior, "colour"), "role"),
        (lambda: predict(other, NEW, key=KEY), "predict"),
        (lambda: log_evidence_ratio(found.posterior, found.posterior), "two"),
        (lambda: log_evidence_ratio(found.posterior, other, other), "no log evidence"),
    ):
        with pytest.raises(InputError, match=said):
            call()


@pytest.mark.slow
def test_stated_errors_of_probabilities_are_not_too_small():
    data, probabilities, errors = {"x": X, "y": Y, "errors": ERRORS}, [], []
    for seed in range(20):
        kernels = infer_marginalised(MODEL, data, key=jax.random.key(seed), num_live=100, num_steps=20).kernels
        probabilities.append(kernels.probabilities["smooth"])
        errors.append(kernels.errors["smooth"])
    # A standard deviation from 20 runs is within 60% of the true one but for one in a thousand.
    assert np.std(probabilities) < 1.6 * np.mean(errors)
