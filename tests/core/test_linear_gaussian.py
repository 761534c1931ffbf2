"""Linear-Gaussian kernels against textbook covariances, SciPy's densities and quadrature, singular ones included."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm

from bayeslens.core.errors import InputError
from bayeslens.core.linear_gaussian import LinearGaussianKernel, factor_of

TRIALS = 100
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
condition = jax.jit(lambda kernel, prior, value: kernel.condition(prior, value), compiler_options=QUICK)


def cases(seed=0):
    """Priors on 3 numbers, kernels 3 -> 4 and 4 -> 2, an output in the support. The first half are singular."""
    rng = np.random.default_rng(seed)

    def factor(size, rank):
        columns = rng.normal(size=(TRIALS, size, size))
        columns[: TRIALS // 2, :, rank:] = 0
        return columns

    prior = rng.normal(size=(TRIALS, 3)), factor(3, 2)
    f = rng.normal(size=(TRIALS, 4, 3)), rng.normal(size=(TRIALS, 4)), factor(4, 1)
    g = rng.normal(size=(TRIALS, 2, 4)), rng.normal(size=(TRIALS, 2)), factor(2, 0)
    x = prior[0] + np.einsum("nij,nj->ni", prior[1], rng.normal(size=(TRIALS, 3)))
    y = np.einsum("nij,nj->ni", f[0], x) + f[1] + np.einsum("nij,nj->ni", f[2], rng.normal(size=(TRIALS, 4)))
    return prior, f, g, y


def verbs(prior, f, g, y):
    """Everything that is compared, for one case."""
    prior = LinearGaussianKernel(jnp.zeros((3, 0)), *prior)
    f, g = LinearGaussianKernel(*f), LinearGaussianKernel(*g)
    both, middle, inverse = f >> g, f.push(prior), f.invert(prior)
    posterior, log_evidence = f.condition(prior, y)
    whole, piecewise = both.invert(prior), g.invert(middle) >> inverse
    marginal, conditional = f.disintegrate(2)
    z, root = g.given(y).mean, factor_of(middle.covariance)
    return {
        "compose": both.covariance,
        "joint": f.joint(prior).covariance,
        "inverse": inverse.given(y).mean,
        "inverse covariance": inverse.covariance,
        "posterior": posterior.mean,
        "posterior covariance": posterior.covariance,
        "log evidence": log_evidence,
        "whole": whole.given(z).mean,
        "whole covariance": whole.covariance,
        "piecewise": piecewise.given(z).mean,
        "piecewise covariance": piecewise.covariance,
        "marginal": marginal.covariance,
        "conditional": conditional.given(jnp.concatenate([prior.mean, y[:2]])).mean,
        "conditional covariance": conditional.covariance,
        "factor": root @ root.T,
        "tensor": (f @ g).covariance,
        "swapped": middle.marginal(3, 0).covariance,
    }


def textbook(prior, f, y):
    """Posterior mean, covariance and log evidence with covariances and pseudo-inverses, for one case."""
    (m, p), (a, b, r) = (prior[0], prior[1] @ prior[1].T), (f[0], f[1], f[2] @ f[2].T)
    s = a @ p @ a.T + r
    gain = p @ a.T @ np.linalg.pinv(s, rcond=1e-10, hermitian=True)
    density = multivariate_normal(a @ m + b, s, allow_singular=True)
    return m + gain @ (y - a @ m - b), p - gain @ a @ p, density.logpdf(y)


@pytest.fixture(scope="module", params=["float32", "float64"])
def results(request):
    data = cases()
    with jax.enable_x64(request.param == "float64"):
        arrays = jax.tree.map(lambda a: jnp.asarray(a, request.param), data)
        made = jax.jit(jax.vmap(verbs), compiler_options=QUICK)(*arrays)
        tolerance = 1e-8 if request.param == "float64" else 1e-2
        return data, {k: np.asarray(v, np.float64) for k, v in made.items()}, tolerance


def close(actual, exact, tolerance):
    """Equal relative to the size of the case, over all trials but none left out."""
    axes = tuple(range(1, np.ndim(exact)))
    size = 1 + np.abs(exact).max(axes, keepdims=True) if axes else 1 + np.abs(exact)
    np.testing.assert_array_less(np.abs(actual - exact) / size, tolerance)


def test_conditioning_agrees_with_the_textbook(results):
    (prior, f, _, y), made, tolerance = results
    for i in range(TRIALS):
        mean, covariance, log_evidence = textbook([a[i] for a in prior], [a[i] for a in f], y[i])
        close(made["posterior"][i][None], mean[None], tolerance)
        close(made["posterior covariance"][i][None], covariance[None], tolerance)
        close(made["inverse"][i][None], mean[None], tolerance)
        close(made["inverse covariance"][i][None], covariance[None], tolerance)
        close(made["log evidence"][i][None], log_evidence[None], tolerance)


def test_inverses_compose(results):
    _, made, tolerance = results
    close(made["piecewise"], made["whole"], tolerance)
    close(made["piecewise covariance"], made["whole covariance"], tolerance)


def test_composition_joint_and_products(results):
    (prior, f, g, _), made, tolerance = results
    t = lambda a: a.swapaxes(-1, -2)  # noqa: E731
    p, r, q = prior[1] @ t(prior[1]), f[2] @ t(f[2]), g[2] @ t(g[2])
    s = f[0] @ p @ t(f[0]) + r
    close(made["compose"], g[0] @ r @ t(g[0]) + q, tolerance)
    close(made["joint"], np.block([[p, p @ t(f[0])], [f[0] @ p, s]]), tolerance)
    close(made["factor"], s, tolerance)
    close(made["swapped"], s[:, [3, 0]][:, :, [3, 0]], tolerance)
    zero = np.zeros((TRIALS, 4, 2))
    close(made["tensor"], np.block([[r, zero], [t(zero), q]]), tolerance)


def test_disintegration_of_a_kernel_with_source(results):
    (prior, f, _, y), made, tolerance = results
    for i in range(TRIALS):
        mean, r = f[0][i] @ prior[0][i] + f[1][i], f[2][i] @ f[2][i].T
        gain = r[2:, :2] @ np.linalg.pinv(r[:2, :2], rcond=1e-10, hermitian=True)
        residual = y[i][:2] - mean[:2]
        if i < TRIALS // 2:  # the conditional is unique only where y is possible given the prior's mean
            continue
        close(made["conditional"][i][None], (mean[2:] + gain @ residual)[None], tolerance)
        close(made["conditional covariance"][i][None], (r[2:, 2:] - gain @ r[:2, 2:])[None], tolerance)
        close(made["marginal"][i][None], r[None, :2, :2], tolerance)


def test_units_do_not_matter():
    """In units from 1e-8 to 1e8 the posterior and the rank are the same, the density scales."""
    with jax.enable_x64(True):
        prior, f, _, y = (jax.tree.map(lambda a: a[0], part) for part in cases())
        start, unit = LinearGaussianKernel(np.zeros((3, 0)), *prior), np.array([1e-8, 1e8, 1.0, 1e-3])
        plain = condition(LinearGaussianKernel(*f), start, y)
        other = LinearGaussianKernel(unit[:, None] * f[0], unit * f[1], unit[:, None] * f[2])
        scaled = condition(other, start, unit * y)
        np.testing.assert_allclose(scaled[0].mean, plain[0].mean, atol=1e-8)
        np.testing.assert_allclose(scaled[0].covariance, plain[0].covariance, atol=1e-8)
        # the volume of the support's unit cell by Cauchy and Binet, over the three noises that are not zero
        rows = np.concatenate([f[0] @ prior[1], f[2]], axis=1)[:, [0, 1, 3]]
        log_volume = [
            np.log(sum(np.linalg.det((u[:, None] * rows)[list(i)]) ** 2 for i in itertools.combinations(range(4), 3)))
            / 2
            for u in (np.ones(4), unit)
        ]
        np.testing.assert_allclose(scaled[1] - plain[1], log_volume[0] - log_volume[1], atol=1e-7)
        moved = unit * (y + np.array([0, 0, 0, 1e-6]))
        assert condition(other, start, moved)[1] == -np.inf


def test_off_the_support_there_is_no_posterior():
    twice = LinearGaussianKernel.deterministic([[1.0], [1.0]])
    prior = LinearGaussianKernel.state([0.0], [[4.0]])
    posterior, log_evidence = condition(twice, prior, np.array([1.0, 1.0]))
    assert posterior.covariance.item() == 0 and posterior.mean.item() == pytest.approx(1)
    assert log_evidence == pytest.approx(norm(0, 8**0.5).logpdf(2**0.5), abs=1e-5)  # the line's own unit of length
    posterior, log_evidence = condition(twice, prior, np.array([1.0, 1.1]))
    assert np.isnan(posterior.mean).all() and log_evidence == -np.inf
    certain = LinearGaussianKernel.state([0.5], [[0.0]])
    assert certain.log_prob([0.5]) == 0 and certain.log_prob([0.6]) == -np.inf


def test_evidence_by_quadrature():
    kernel = LinearGaussianKernel([[2.0]], [0.5], [[0.7]])
    _, log_evidence = condition(kernel, LinearGaussianKernel.state([1.0], [[1.5]]), np.array([3.0]))
    exact, _ = quad(lambda x: norm(1, 1.5**0.5).pdf(x) * norm(2 * x + 0.5, 0.7).pdf(3.0), -10, 10)
    assert np.exp(log_evidence) == pytest.approx(exact, rel=1e-5)


def test_gradients_of_the_log_evidence():
    """Against the density of the marginal, noise with equal eigenvalues included."""
    with jax.enable_x64(True):
        design = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        y = jnp.array([0.1, 0.9, 2.1])

        def evidence(log_scales):
            prior = LinearGaussianKernel.state(jnp.zeros(2), jnp.exp(2 * log_scales[0]) * jnp.eye(2))
            noise = jnp.exp(2 * log_scales[1]) * jnp.eye(3)
            return LinearGaussianKernel.from_covariance(design, jnp.zeros(3), noise).condition(prior, y)[1]

        def marginal(log_scales):
            covariance = jnp.exp(2 * log_scales[0]) * design @ design.T + jnp.exp(2 * log_scales[1]) * jnp.eye(3)
            return jax.scipy.stats.multivariate_normal.logpdf(y, jnp.zeros(3), covariance)

        at, direction = jnp.array([0.3, -0.7]), jnp.array([1.0, 0.6])

        @functools.partial(jax.jit, compiler_options=QUICK, static_argnums=0)
        def derivatives(function, t):
            slope = lambda t: jax.jvp(lambda s: function(at + s * direction), (t,), (1.0,))  # noqa: E731
            return jax.jvp(slope, (t,), (1.0,))

        np.testing.assert_allclose(derivatives(evidence, 0.0), derivatives(marginal, 0.0), rtol=1e-8)


def test_float32_resolves_precise_measurements():
    """A covariance would lose a standard deviation of 1e-4 next to one of 1 in float32; a factor does not."""
    prior = LinearGaussianKernel.state([0.0, 0.0], jnp.eye(2))
    sharp = LinearGaussianKernel([[1.0, 1.0]], [0.0], [[1e-3]])
    posterior, _ = condition(sharp, prior, np.array([1.0]))
    again, _ = condition(LinearGaussianKernel([[1.0, -1.0]], [0.0], [[1e-3]]), posterior, np.array([0.2]))
    exact = np.linalg.inv(np.eye(2) + 1e6 * np.array([[2.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(again.covariance, exact, atol=1e-3 * exact[0, 0])
    np.testing.assert_allclose(again.mean, [0.6, 0.4], atol=1e-5)


def test_as_a_numpyro_kernel():
    kernel = LinearGaussianKernel([[1.0], [2.0]], [0.0, 1.0], [[1.0, 0.5, 0.0], [0.0, 1.0, 2.0]])
    x, y = np.array([[0.3], [-1.0]]), np.array([0.5, 2.0])
    ours = jax.jit(lambda x: kernel(x).log_prob(y), compiler_options=QUICK)(x)
    exact = [multivariate_normal([a[0], 2 * a[0] + 1], [[1.25, 0.5], [0.5, 5.0]]).logpdf(y) for a in x]
    np.testing.assert_allclose(ours, exact, rtol=1e-5)
    np.testing.assert_allclose(kernel.log_prob(y, x[0]), exact[0], rtol=1e-5)


line = LinearGaussianKernel.deterministic


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearGaussianKernel([[1.0]], [0.0, 1.0], [[1.0]]), "shapes"),
        (lambda: LinearGaussianKernel.state([0.0], [[-1.0]]), "positive semidefinite"),
        (lambda: LinearGaussianKernel.state([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "positive semidefinite"),
        (lambda: LinearGaussianKernel.state([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: LinearGaussianKernel.state([np.nan], [[1.0]]), "mean|offset"),
        (lambda: LinearGaussianKernel.state([0.0], [[np.inf]]), "covariance"),
        (lambda: factor_of([[1.0, 2.0]]), "square"),
        (lambda: line([[1.0]]) >> line([[1.0, 1.0]]), "cannot compose"),
        (lambda: line([[1.0]]).invert(line([[1.0]])), "prior"),
        (lambda: line([[1.0]]).condition(LinearGaussianKernel.state([0.0], [[1.0]]), [1.0, 2.0]), "value"),
        (lambda: line([[1.0]]).condition(LinearGaussianKernel.state([0.0], [[1.0]]), [np.nan]), "value"),
        (lambda: line([[1.0]])([[1.0]]), "singular"),
        (lambda: line([[1.0]]).marginal(1), "coordinates"),
        (lambda: line([[1.0]]).disintegrate(2), "condition on"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
