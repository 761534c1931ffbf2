"""One battery for all univariate families, whoever wrote them; then what is particular to taking apart.

Oracles are SciPy's frozen distributions where there are any, and quadrature of the density everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from bayeslens.core import quantiles as core_quantile
from bayeslens.core.conjugate import NormalInverseGamma
from bayeslens.core.distribution import (
    _NUMPYRO,
    FAMILIES,
    bucket,
    concatenate,
    put_together,
    rowwise,
    take_apart,
    take_rows,
)
from bayeslens.core.errors import InputError
from bayeslens.core.foreign import Empirical
from bayeslens.core.mixture import Members, Mixture
from bayeslens.core.transformed import Dequantized, QuantileDistribution, Recalibrated


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A distribution with three rows; `kinks` are points per row where its density is not smooth."""

    distribution: Any
    scipy: Any = None
    kinks: Any = ((), (), ())
    moments_rtol: float = 1e-6  # looser where the moments are themselves a quadrature


LOC, SCALE = np.array([-1.0, 0.0, 40.0]), np.array([0.5, 1.0, 3.0])
SHAPE, RATE = np.array([1.5, 4.0, 30.0]), np.array([0.5, 2.0, 1.0])
LEVELS = np.array([0.05, 0.3, 0.5, 0.9])
VALUES = np.array([[-2.0, -1.0, 0.0, 3.0], [0.0, 0.1, 0.2, 0.3], [10.0, 20.0, 50.0, 51.0]])
KNOTS = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
BENT = np.array([[0.0, 0.2, 0.6, 0.8, 1.0], [0.0, 0.1, 0.5, 0.9, 1.0], [0.0, 0.03, 0.3, 0.95, 1.0]])
WEIGHTS = np.array([[0.2, 0.8], [0.5, 0.5], [0.999, 0.001]])


def cells(*centers: int) -> tuple:
    return tuple(np.arange(0, top) + 0.5 for top in centers)


CASES = {
    "Normal": Case(dist.Normal(LOC, SCALE), st.norm(LOC, SCALE)),
    "LogNormal": Case(dist.LogNormal(LOC / 10, SCALE / 9), st.lognorm(SCALE / 9, scale=np.exp(LOC / 10))),
    "StudentT": Case(dist.StudentT(SHAPE + 4, LOC, SCALE), st.t(SHAPE + 4, LOC, SCALE)),
    "Laplace": Case(dist.Laplace(LOC, SCALE), st.laplace(LOC, SCALE), LOC[:, None]),
    "Logistic": Case(dist.Logistic(LOC, SCALE), st.logistic(LOC, SCALE)),
    "Cauchy": Case(dist.Cauchy(LOC, SCALE), st.cauchy(LOC, SCALE)),
    "Gumbel": Case(dist.Gumbel(LOC, SCALE), st.gumbel_r(LOC, SCALE)),
    "HalfNormal": Case(dist.HalfNormal(SCALE), st.halfnorm(scale=SCALE)),
    "Gamma": Case(dist.Gamma(SHAPE, RATE), st.gamma(SHAPE, scale=1 / RATE)),
    "InverseGamma": Case(dist.InverseGamma(SHAPE + 9, RATE), st.invgamma(SHAPE + 9, scale=RATE)),
    "Beta": Case(dist.Beta(SHAPE, RATE + 1), st.beta(SHAPE, RATE + 1)),
    "Exponential": Case(dist.Exponential(RATE), st.expon(scale=1 / RATE)),
    "Uniform": Case(dist.Uniform(LOC, LOC + SCALE), st.uniform(LOC, SCALE)),
    "Weibull": Case(dist.Weibull(SCALE, np.array([1.2, 2.0, 5.0])), st.weibull_min([1.2, 2.0, 5.0], scale=SCALE)),
    "Poisson": Case(dist.Poisson(SHAPE), st.poisson(SHAPE)),
    "NegativeBinomial2": Case(
        dist.NegativeBinomial2(SHAPE, RATE), st.nbinom(RATE, RATE / (SHAPE + RATE))
    ),
    "GammaPoisson": Case(dist.GammaPoisson(SHAPE, RATE), st.nbinom(SHAPE, RATE / (1 + RATE))),
    "MixtureSameFamily": Case(
        dist.MixtureSameFamily(
            dist.CategoricalProbs(WEIGHTS), dist.Normal(LOC[:, None] + np.array([0.0, 9.0]), SCALE[:, None])
        )
    ),
    "Mixture": Case(
        Mixture(WEIGHTS, [dist.Normal(LOC, SCALE), dist.Laplace(LOC + 2, 1.0)]), None, LOC[:, None] + 2
    ),
    "Mixture of mixtures": Case(
        Mixture(
            WEIGHTS,
            [
                dist.MixtureSameFamily(
                    dist.CategoricalProbs(WEIGHTS),
                    dist.StudentT(9.0, LOC[:, None] + np.array([0.0, 2.0]), SCALE[:, None]),
                ),
                dist.LogNormal(LOC / 20, 0.5),
            ],
        ),
        None,
        np.zeros((3, 1)),
    ),
    "Mixture of counts": Case(Mixture(WEIGHTS, [dist.Poisson(SHAPE), dist.GammaPoisson(SHAPE, RATE)])),
    "Dequantized": Case(Dequantized(dist.Poisson(SHAPE)), None, cells(20, 30, 90), 1e-5),
    "Dequantized mixture": Case(
        Dequantized(Mixture(WEIGHTS, [dist.Poisson(SHAPE), dist.Poisson(SHAPE * 2)])), None, cells(30, 40, 150), 1e-5
    ),
    "QuantileDistribution": Case(QuantileDistribution(LEVELS, VALUES), None, VALUES, 2e-2),
    "Recalibrated": Case(
        Recalibrated(dist.Normal(LOC, SCALE), KNOTS, BENT),
        None,
        st.norm(LOC[:, None], SCALE[:, None]).ppf(KNOTS[1:-1]),
        2e-2,
    ),
}  # fmt: skip
# Closed forms that NumPyro lacks and SciPy has are what these are tested against; the rest is quadrature.
INTERIOR = np.array([0.001, 0.01, 0.25, 0.55, 0.85, 0.99, 0.999])
DRAWS = 2000
QUICKLY = {"xla_backend_optimization_level": 0}  # compile in half the time: each program runs once


# Programs that take seconds to compile: incomplete gamma and beta functions, and nested mixtures.
HEAVY = {"Gamma", "InverseGamma", "Beta", "NegativeBinomial2", "GammaPoisson", "Weibull", "Mixture of mixtures"}
HEAVY |= {"Mixture of counts", "Dequantized mixture", "StudentT", "Poisson", "Dequantized"}
HEAVY |= {"Logistic", "Cauchy", "Gumbel", "HalfNormal", "Exponential", "Laplace"}  # quick, but many
COMPILED = [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in CASES]


# Its constructor compiles for every number of rows, and its functions are those of GammaPoisson.
HOST = [pytest.param(name, marks=pytest.mark.slow) if name == "NegativeBinomial2" else name for name in CASES]


@pytest.fixture(params=HOST, scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(params=COMPILED, scope="module")
def compiled_case(request):
    return CASES[request.param]


def on_rows(function, distribution, grid):
    """Evaluate at a grid of shape (rows, points), by repeating every row."""
    rows, points = grid.shape
    repeated = take_rows(distribution, np.repeat(np.arange(rows), points))
    return np.asarray(function(repeated, grid.ravel())).reshape(rows, points)


def to_jax(distribution):
    """The same distribution with traceable parameters."""
    return put_together(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), take_apart(distribution)))


@functools.cache
def traced(case):
    """Log density and cdf at inner quantiles, inner quantiles, and draws, by one compiled program."""

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def everything(distribution, y, q, key):
        log_prob, cdf = core_quantile.log_density(distribution, y), core_quantile.cumulative(distribution, y)
        return log_prob.T, cdf.T, core_quantile._quantile_rows(distribution, q), distribution.sample(key, (DRAWS,))

    y, q = core_quantile.quantile(case.distribution, INTERIOR).T, INTERIOR
    distribution = to_jax(case.distribution)
    return everything(distribution, jnp.asarray(y, jnp.float32), jnp.asarray(q, jnp.float32), jax.random.key(0))


def quadrature(edges, kinks, panels=60, nodes=20):
    """Gauss-Legendre nodes and weights between two edges, with panels broken at the kinks."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    inside = [k for k in kinks if edges[0] < k < edges[1]]
    breaks = np.unique(np.concatenate([np.linspace(*edges, panels + 1), inside]))
    half = np.diff(breaks)[:, None] / 2
    return ((breaks[:-1, None] + half) + half * x).ravel(), (half * w).ravel()


def integrate(case, row, low, high, power=0, center=0.0):
    """Integral (or sum) of (y - center)^power times the density of a row over (low, high]."""
    if case.distribution.is_discrete:
        points = np.arange(np.floor(low) + 1, np.floor(high) + 1)
        weights = np.ones(len(points))
    else:
        points, weights = quadrature((low, high), case.kinks[row])
    one = take_rows(case.distribution, np.full(len(points), row))
    return (weights * (points - center) ** power * np.exp(core_quantile.log_prob(one, points))).sum()


def test_density_integrates_to_cdf(case):
    # Between quantiles, so that the tails beyond are covered by the next test.
    levels = core_quantile.quantile(case.distribution, INTERIOR)
    below = on_rows(core_quantile.cdf, case.distribution, levels)
    for row in range(3):
        got = [integrate(case, row, a, b) for a, b in zip(levels[row, :-1], levels[row, 1:], strict=True)]
        np.testing.assert_allclose(got, np.diff(below[row]), rtol=1e-5, atol=2e-6)


def test_cdf_goes_from_zero_to_one(case):
    far = core_quantile.quantile(case.distribution, [0.001, 0.999])
    width = far[:, 1:] - far[:, :1]
    ends = np.concatenate([far[:, :1] - 1e6 * width, far[:, 1:] + 1e6 * width], 1)
    np.testing.assert_allclose(on_rows(core_quantile.cdf, case.distribution, ends), [[0.0, 1.0]] * 3, atol=1e-6)


def test_quantile_inverts_cdf(case):
    q = np.concatenate([[1e-4], INTERIOR, [1 - 1e-4]])
    values = core_quantile.quantile(case.distribution, q)
    assert (np.diff(values, axis=1) >= 0).all()
    at = on_rows(core_quantile.cdf, case.distribution, values)
    if case.distribution.is_discrete:
        before = on_rows(core_quantile.cdf, case.distribution, values - 1)
        assert (at >= q - 1e-6).all() and (before < q + 1e-6).all()
    else:
        np.testing.assert_allclose(at, np.broadcast_to(q, at.shape), rtol=1e-4, atol=3e-6)


def test_agrees_with_scipy(case):
    if case.scipy is None:
        pytest.skip("no counterpart")
    d, frozen = case.distribution, case.scipy
    y = frozen.ppf(INTERIOR[:, None]).T
    log_prob = frozen.logpmf if d.is_discrete else frozen.logpdf
    np.testing.assert_allclose(on_rows(core_quantile.log_prob, d, y), log_prob(y.T).T, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(on_rows(core_quantile.cdf, d, y), frozen.cdf(y.T).T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(core_quantile.quantile(d, INTERIOR), y, rtol=1e-4, atol=1e-5)
    if np.isfinite(frozen.var()).all():
        mean, variance = core_quantile.mean_and_variance(d)
        np.testing.assert_allclose(mean, frozen.mean(), rtol=1e-5)
        np.testing.assert_allclose(variance, frozen.var(), rtol=1e-5)


def test_moments_are_integrals(case):
    mean, variance = core_quantile.mean_and_variance(case.distribution)
    if not np.isfinite(variance).all():
        pytest.skip("no variance")
    ends = core_quantile.quantile(case.distribution, [1e-6, 1 - 1e-6])
    for row in range(3):
        # The tails beyond are worth less than the tolerance for these cases.
        low, high = ends[row, 0] - 1 * case.distribution.is_discrete, ends[row, 1]
        first, second = (integrate(case, row, low, high, power, mean[row]) for power in (1, 2))
        assert abs(first) < (1e-4 + case.moments_rtol) * np.sqrt(second)
        np.testing.assert_allclose(variance[row], second, rtol=3e-3 + case.moments_rtol * 2)


def test_host_and_traced_agree(compiled_case):
    """The same numbers from NumPy in float64 and from JAX under jit in float32, the distribution being an argument."""
    case, d = compiled_case, compiled_case.distribution
    y = core_quantile.quantile(d, INTERIOR)

    log_prob, cdf, got, _ = traced(case)
    # Float32 arguments of size |y| move a density by |y| / scale rounding errors.
    np.testing.assert_allclose(log_prob, on_rows(core_quantile.log_prob, d, y), rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(cdf, on_rows(core_quantile.cdf, d, y), rtol=1e-3, atol=1e-5)
    spread = y[:, -1:] - y[:, :1]
    if d.is_discrete:
        assert (np.asarray(got) == y).mean() > 0.95  # a level on the edge of a cell may fall to either side
    np.testing.assert_allclose(got / spread, y / spread, atol=2e-3 if not d.is_discrete else 0.2)


def test_draws_follow_cdf(compiled_case):
    """Kolmogorov-Smirnov of 2,000 draws per row with a fixed key; false alarm rate 1e-4 per row, 1% in all."""
    case = compiled_case
    draws = np.asarray(traced(case)[3], np.float64)
    assert draws.shape == (DRAWS, 3)
    for row in range(3):
        one = take_rows(case.distribution, np.full(DRAWS, row))
        # For a discrete distribution compare at the atoms from the right, where the test is conservative.
        ordered = np.sort(draws[:, row])
        below = core_quantile.cdf(one, ordered)
        if case.distribution.is_discrete:
            empirical = np.searchsorted(ordered, ordered, side="right") / DRAWS
            statistic = np.abs(empirical - below).max()
        else:
            steps = np.arange(DRAWS + 1) / DRAWS
            statistic = max((steps[1:] - below).max(), (below - steps[:-1]).max())
        assert st.kstwo.sf(statistic, DRAWS) > 1e-4


def test_gradients_are_finite(compiled_case):
    """Of log density and cdf, in the value and in every parameter."""
    case = compiled_case
    parts = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), take_apart(case.distribution))
    y = jnp.asarray(core_quantile.quantile(case.distribution, [1e-3, 0.4, 0.999]).T, jnp.float32)
    # JAX has no derivative of the incomplete beta function in its parameters, and that of the gamma's is slow.
    with_cdf = not any(f in str(jax.tree.structure(parts)) for f in ("Beta", "Gamma", "Poisson", "NegativeBinomial"))

    def total(parts, y):
        d = put_together(parts)
        return core_quantile.log_density(d, y).sum() + (core_quantile.cumulative(d, y).sum() if with_cdf else 0.0)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=QUICKLY)(parts, y)):
        assert jnp.isfinite(leaf).all()


def test_round_trips(case):
    d = case.distribution
    y = core_quantile.quantile(d, [0.3])[:, 0]
    expected = core_quantile.log_prob(d, y)
    again = put_together(take_apart(d))
    assert type(again) is type(d) and again.batch_shape == d.batch_shape and again.event_shape == d.event_shape
    np.testing.assert_allclose(core_quantile.log_prob(again, y), expected, rtol=1e-6)
    turned = take_rows(d, np.array([2, 0]))
    assert turned.batch_shape == (2,)
    np.testing.assert_allclose(core_quantile.log_prob(turned, y[[2, 0]]), expected[[2, 0]], rtol=1e-6)
    joined = concatenate([turned, take_rows(d, slice(1, 2))])
    np.testing.assert_allclose(core_quantile.log_prob(joined, y[[2, 0, 1]]), expected[[2, 0, 1]], rtol=1e-6)
    leaves, structure = jax.tree.flatten(take_apart(d))
    assert all(np.shape(leaf)[0] == 3 for leaf in leaves)
    assert structure == jax.tree.structure(take_apart(take_rows(d, np.array([2, 0]))))


def test_every_family_of_numpyro_is_in_a_battery():
    listed = {"BernoulliProbs", "BernoulliLogits", "CategoricalProbs", "CategoricalLogits", "Delta"}
    listed |= {"Dirichlet", "MultivariateNormal", "MultivariateStudentT"}
    assert set(_NUMPYRO) == (set(CASES) & set(_NUMPYRO)) | listed
    # Members have a test of their own below (their first axis is not one of rows), `Density` has a battery, and
    # `Empirical` has no density: its tests stand beside `as_predictive`.
    own = {name for name, family in FAMILIES.items() if family.__module__.startswith("bayeslens.core.")}
    assert own - {"Density"} == (set(CASES) & own) | {"NormalInverseGamma", "Members", Empirical.__name__}


ROOT = np.linalg.cholesky(np.array([[2.0, 0.5], [0.5, 1.0]]))
OTHERS = [
    (dist.BernoulliProbs(np.array([0.2, 0.5, 1.0])), np.array([1, 0, 1])),
    (dist.BernoulliLogits(np.array([0.2, 0.5, 1.0])), np.array([1, 0, 1])),
    (dist.CategoricalProbs(np.array([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])), np.array([1, 0, 0])),
    (dist.CategoricalLogits(np.array([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]])), np.array([1, 0, 0])),
    (dist.Delta(np.array([1.0, 2.0, 3.0])), np.array([1.0, 2.5, 3.0])),
    (dist.Dirichlet(np.array([[1.0, 2.0], [3.0, 3.0], [0.5, 9.0]])), np.array([[0.2, 0.8]] * 3)),
    (dist.MultivariateNormal(np.ones((3, 2)), scale_tril=ROOT), np.zeros((3, 2))),
    (dist.MultivariateStudentT(4.0, np.ones((3, 2)), ROOT), np.zeros((3, 2))),
    (dist.Normal(np.ones((3, 2)), 2.0).to_event(1), np.zeros((3, 2))),
    (
        NormalInverseGamma(np.ones(2), np.eye(2), SHAPE, RATE),
        np.array([[0.0, 1.0, 0.5], [1.0, 1.0, 2.0], [3.0, 0.0, 9.0]]),
    ),
]


@pytest.mark.parametrize(("d", "y"), OTHERS, ids=[type(d).__name__ for d, _ in OTHERS])
def test_other_families_round_trip(d, y):
    evaluate = jax.jit(lambda parts, y: put_together(parts).log_prob(y), compiler_options=QUICKLY)
    expected = np.asarray(jax.jit(d.log_prob, compiler_options=QUICKLY)(y))
    again = put_together(take_apart(d))
    assert type(again) is type(d) and again.batch_shape == (3,) and again.event_shape == d.event_shape
    np.testing.assert_allclose(evaluate(take_apart(again), y), expected, rtol=1e-5)
    turned = concatenate([take_rows(d, np.array([2])), take_rows(d, np.array([0, 1]))])
    np.testing.assert_allclose(evaluate(take_apart(turned), y[[2, 0, 1]]), expected[[2, 0, 1]], rtol=1e-5)


def test_members_are_their_groups_side_by_side():
    groups = [dist.Normal(np.stack([LOC, LOC + 1]), SCALE), dist.Gamma(SHAPE[None], RATE)]
    members, key = Members(groups), jax.random.key(0)
    evaluate = jax.jit(lambda parts, y: put_together(parts).log_prob(y), compiler_options=QUICKLY)
    # A value for every member, and one that all members share.
    own, shared = jnp.array([[-1.0, 0.5, 39.0], [0.0, 2.0, 41.0], [2.0, 3.0, 29.0]]), jnp.array([1.0, 2.0, 30.0])
    gamma = st.gamma(SHAPE, scale=1 / RATE).logpdf
    normal = [st.norm(LOC + m, SCALE).logpdf for m in (0, 1)]
    expected = np.stack([normal[0](own[0]), normal[1](own[1]), gamma(own[2])])
    np.testing.assert_allclose(evaluate(take_apart(members), own), expected, rtol=1e-4)
    np.testing.assert_allclose(members.to_event(1).log_prob(own), expected.sum(1), rtol=1e-4)
    everywhere = np.stack([normal[0](shared), normal[1](shared), gamma(shared)])
    np.testing.assert_allclose(evaluate(take_apart(members), shared), everywhere, rtol=1e-4)
    again = put_together(take_apart(members))
    assert type(again) is Members and again.batch_shape == (3, 3) and again.event_shape == ()
    mapped = jax.vmap(lambda y: members.log_prob(y))(jnp.stack([own, own + 1]))
    np.testing.assert_allclose(mapped, members.log_prob(jnp.stack([own, own + 1])), rtol=1e-5)
    assert members.to_event(1).support.event_dim == 1 and not members.is_discrete
    assert Members([dist.Poisson(SHAPE[None]), dist.GammaPoisson(SHAPE[None], RATE)]).is_discrete
    # Kolmogorov-Smirnov of 9 columns with a fixed key: false alarm rate 1e-4 each.
    draws = np.asarray(jax.jit(lambda k: members.sample(k, (DRAWS,)), compiler_options=QUICKLY)(key), np.float64)
    assert draws.shape == (DRAWS, 3, 3)
    for member, frozen in enumerate([st.norm(LOC, SCALE), st.norm(LOC + 1, SCALE), st.gamma(SHAPE, scale=1 / RATE)]):
        for row, below in enumerate(frozen.cdf(draws[:, member]).T):
            assert st.kstest(below, "uniform").pvalue > 1e-4, (member, row)


def test_scalar_parameters_are_broadcast_over_rows():
    parts = take_apart(dist.StudentT(4.0, np.zeros(5), 1.0))
    assert {a.shape for a in parts.arrays.values()} == {(5,)}
    shared = dist.MixtureSameFamily(dist.CategoricalProbs(np.array([0.3, 0.7])), dist.Normal(np.zeros((5, 2)), 1.0))
    assert take_apart(shared).arrays["probs"].shape == (5, 2)
    both = dist.MixtureSameFamily(dist.CategoricalProbs(WEIGHTS), dist.Normal(np.array([0.0, 1.0]), 1.0))
    again = take_rows(both, np.array([2, 1]))
    expected = core_quantile.log_prob(both, np.zeros(3))[[2, 1]]
    np.testing.assert_allclose(core_quantile.log_prob(again, np.zeros(2)), expected, rtol=1e-6)


def test_padding_and_chunks_do_not_show():
    d = dist.Laplace(np.linspace(2, 9, 70), 1.0)
    y = np.linspace(0.1, 9, 70)
    whole = rowwise(core_quantile.cumulative, d, y)
    np.testing.assert_allclose(rowwise(core_quantile.cumulative, d, y, chunk=33), whole, rtol=1e-6)
    np.testing.assert_allclose(whole, st.laplace(np.linspace(2, 9, 70)).cdf(y), atol=1e-5)
    assert all(bucket(n) >= n and bucket(n) <= max(32, 1.5 * n) for n in range(1, 500))


def test_refused():
    with pytest.raises(InputError, match="cannot be taken apart"):
        take_apart(dist.Pareto(1.0, np.ones(3)))
    with pytest.raises(InputError, match="different families"):
        concatenate([dist.Normal(np.zeros(2), 1.0), dist.Laplace(np.zeros(2), 1.0)])

    class Normal(dist.Normal):  # a subclass of the same name is another family
        pass

    with pytest.raises(InputError, match="cannot be taken apart"):
        take_apart(Normal(np.zeros(2), 1.0))
