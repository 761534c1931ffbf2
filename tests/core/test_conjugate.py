"""Conjugate pairs: the channel equation, evidence by quadrature and by SciPy, sequential against batch updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from numpyro.distributions import biject_to
from scipy.integrate import quad
from scipy.special import gammaln

from bayeslens.core.conjugate import (
    CONJUGATE_PAIRS,
    NormalInverseGamma,
    certify,
    conjugate_pair,
    hyperparameters_of,
    log_marginal_likelihood,
)
from bayeslens.core.errors import InputError

ROWS = 3
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
rng = np.random.default_rng(0)
X = rng.normal(size=(ROWS, 2))
# For every pair: hyperparameters, observations, what is known.
CASES = {
    (dist.Beta, dist.BernoulliProbs): (
        {"concentration1": 0.7, "concentration0": 2.5},
        np.array([1, 0, 0]),
        {},
    ),
    (dist.Beta, dist.BinomialProbs): (
        {"concentration1": 1.5, "concentration0": 0.5},
        np.array([3, 0, 5]),
        {"total_count": np.array([5, 1, 7])},
    ),
    (dist.Dirichlet, dist.CategoricalProbs): (
        {"concentration": np.array([0.5, 1.0, 2.0])},
        np.array([2, 0, 2]),
        {},
    ),
    (dist.Dirichlet, dist.MultinomialProbs): (
        {"concentration": np.array([0.5, 1.0, 2.0])},
        np.array([[1, 2, 0], [0, 0, 3], [1, 1, 1]]),
        {"total_count": np.full(ROWS, 3)},
    ),
    (dist.Gamma, dist.Poisson): ({"concentration": 2.0, "rate": 0.5}, np.array([3, 0, 7]), {}),
    (dist.Gamma, dist.Exponential): ({"concentration": 1.5, "rate": 2.0}, rng.gamma(1.0, size=ROWS), {}),
    (dist.Normal, dist.Normal): (
        {"loc": 100.0, "scale": 3.0},
        101 + rng.normal(size=ROWS),
        {"scale": np.full(ROWS, 0.7)},
    ),
    (NormalInverseGamma, dist.Normal): (
        {
            "loc": np.array([0.5, -1.0]),
            "precision": np.array([[2.0, 0.3], [0.3, 1.0]]),
            "concentration": 0.8,
            "rate": 1.2,
        },
        rng.normal(size=ROWS),
        {"features": X},
    ),
}
NAMES = [f"{a.__name__}-{b.__name__}" for a, b in CASES]
every_pair = pytest.mark.parametrize("key", CASES, ids=NAMES)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def case(key):
    p, y, known = CASES[key]
    return CONJUGATE_PAIRS[key], {k: jnp.asarray(v, float) for k, v in p.items()}, jnp.asarray(y), known


def rows(known, index):
    return {name: value[index] for name, value in known.items()}


def parameters(key):
    """Twenty parameters inside the prior's support."""
    draw = np.random.default_rng(1)
    if key[0] is dist.Beta:
        return draw.uniform(0.05, 0.95, 20)
    if key[0] is dist.Dirichlet:
        return draw.dirichlet([2.0, 2.0, 2.0], 20)
    if key[0] is NormalInverseGamma:
        return np.column_stack([draw.normal(size=(20, 2)), draw.gamma(2.0, size=20)])
    return draw.gamma(2.0, size=20) + (97 if key[0] is dist.Normal else 0)


@functools.cache
def measured(key):
    """Everything that is compared for a pair, in one compiled program."""
    pair, p, y, known = case(key)

    def greedy(p, y, **known):  # counts every observation twice
        return pair.update(p, jnp.concatenate([y, y]), **{k: jnp.concatenate([v, v]) for k, v in known.items()})

    def measure(p, y, known, parameters):
        one_by_one, chain = p, 0.0
        for i in np.random.default_rng(2).permutation(ROWS):
            chain += pair.predictive(one_by_one, **rows(known, i)).log_prob(y[i]).sum()
            one_by_one = pair.update(one_by_one, y[i : i + 1], **rows(known, slice(i, i + 1)))
        return {
            "right": certify(pair, p, y[1], parameters, **rows(known, 1)),
            "wrong": certify(pair._replace(update=greedy), p, y[1], parameters, **rows(known, 1)),
            "together": pair.update(p, y, **known),
            "one by one": one_by_one,
            "chain": chain,
            "evidence": log_marginal_likelihood(pair, p, y, **known),
        }

    return jax.jit(measure, compiler_options=QUICK)(p, y, known, parameters(key))


def test_every_pair_has_a_case():
    assert set(CASES) == set(CONJUGATE_PAIRS)


@every_pair
def test_channel_equation_holds_and_a_wrong_update_fails(key):
    right, wrong = measured(key)["right"], measured(key)["wrong"]
    assert right.holds, right
    assert not wrong.holds and wrong.residual > 0.01, wrong


@every_pair
def test_sequential_equals_batch_in_any_order(key):
    made = measured(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), made["together"], made["one by one"])


@every_pair
def test_log_marginal_likelihood_is_the_chain_of_predictives(key):
    # JAX's log-beta function, which is in some predictives, errs by up to 1e-6 in float64
    assert float(measured(key)["evidence"]) == pytest.approx(float(measured(key)["chain"]), abs=6e-6)


def oracle(key):
    """The evidence from SciPy: quadrature over the parameter, or a closed form."""
    p, y, known = CASES[key]
    if key[0] is dist.Beta:
        n = known.get("total_count", 1)
        prior = st.beta(p["concentration1"], p["concentration0"])
        inside, ends = lambda t: prior.pdf(t) * st.binom(n, t).pmf(y).prod(), (0, 1)
    elif key[0] is dist.Gamma:
        prior = st.gamma(p["concentration"], scale=1 / p["rate"])
        likelihood = (
            (lambda t: st.poisson(t).pmf(y)) if key[1] is dist.Poisson else (lambda t: st.expon(0, 1 / t).pdf(y))
        )
        inside, ends = lambda t: prior.pdf(t) * likelihood(t).prod(), (1e-12, 30)
    elif key[0] is dist.Normal:
        inside = lambda t: st.norm(p["loc"], p["scale"]).pdf(t) * st.norm(t, known["scale"]).pdf(y).prod()  # noqa: E731
        ends = (90, 112)
    elif key[0] is dist.Dirichlet:
        a = p["concentration"]
        counts = np.eye(3)[y].sum(0) if y.ndim == 1 else y.sum(0)
        coefficients = 0 if y.ndim == 1 else (gammaln(y.sum(1) + 1) - gammaln(y + 1).sum(1)).sum()
        ratio = gammaln(a + counts).sum() - gammaln(a).sum() + gammaln(a.sum()) - gammaln(a.sum() + counts.sum())
        return ratio + coefficients
    else:
        spread = np.eye(ROWS) + X @ np.linalg.solve(p["precision"], X.T)
        return st.multivariate_t(X @ p["loc"], p["rate"] / p["concentration"] * spread, 2 * p["concentration"]).logpdf(
            y
        )
    return np.log(quad(inside, *ends, epsabs=0, epsrel=1e-10, limit=200)[0])


@every_pair
def test_log_marginal_likelihood_against_scipy(key):
    assert float(measured(key)["evidence"]) == pytest.approx(oracle(key), abs=1e-8)


def test_float32_keeps_its_digits_far_from_zero():
    """Textbook updates subtract squares of the data, which here are 10^8 times their variance."""
    with jax.enable_x64(False):
        pair = conjugate_pair(NormalInverseGamma, dist.Normal)
        y = (10_000 + np.random.default_rng(3).normal(size=50)).astype(np.float32)
        p = {"loc": jnp.array([10_000.0]), "precision": jnp.array([[0.1]]), "concentration": 1.0, "rate": 1.0}
        exact = np.float64(y) - 10_000
        shift = exact.sum() / 50.1
        rate = 1 + (np.square(exact - shift).sum() + 0.1 * shift**2) / 2
        assert float(pair.update(p, jnp.asarray(y))["rate"]) == pytest.approx(rate, rel=2e-3)


def test_normal_inverse_gamma_is_a_numpyro_distribution():
    precision = np.array([[2.0, 0.3], [0.3, 1.0]])
    d = NormalInverseGamma(np.array([1.0, -2.0]), precision, 6.0, 10.0)
    draws = np.asarray(jax.jit(lambda key: d.sample(key, (10_000,)), compiler_options=QUICK)(jax.random.key(0)))
    # five standard errors: false alarms under one in a hundred thousand
    np.testing.assert_allclose(draws.mean(0), [1.0, -2.0, 2.0], atol=0.08)
    np.testing.assert_allclose(np.cov(draws[:, :2].T), 2.0 * np.linalg.inv(precision), atol=0.3)
    weights, variance = np.array([0.4, -1.0]), 1.7
    exact = st.multivariate_normal([1.0, -2.0], variance * np.linalg.inv(precision)).logpdf(weights)
    exact += st.invgamma(6.0, scale=10.0).logpdf(variance)
    assert float(d.log_prob(np.append(weights, variance))) == pytest.approx(exact)
    assert biject_to(d.support)(jnp.array([-3.0, 4.0, -5.0]))[2] > 0

    def model():
        value = numpyro.sample("value", d)
        numpyro.sample("y", dist.Normal(value[0], jnp.sqrt(value[2])), obs=0.3)

    value = jnp.append(weights, variance)
    density, _ = numpyro.infer.util.log_density(model, (), {}, {"value": value})
    assert float(density) == pytest.approx(exact + st.norm(0.4, 1.7**0.5).logpdf(0.3))


@every_pair
def test_hyperparameters_can_be_read_off_the_prior(key):
    pair, p, _, _ = case(key)
    prior = pair.prior(**p)
    assert conjugate_pair(prior, key[1]) is pair
    jax.tree.map(np.testing.assert_array_equal, hyperparameters_of(pair, prior), p)


def test_updates_are_traceable():
    pair, p, y, _ = case((dist.Gamma, dist.Poisson))
    evidence = jax.jit(lambda rate: log_marginal_likelihood(pair, {**p, "rate": rate}, y))
    slope = jax.jit(jax.grad(evidence))(p["rate"])
    difference = evidence(p["rate"] + 1e-5) - evidence(p["rate"] - 1e-5)
    assert float(slope) == pytest.approx(float(difference) / 2e-5, rel=1e-6)


def test_bad_input():
    with pytest.raises(InputError, match="Beta is not known as conjugate to Poisson"):
        conjugate_pair(dist.Beta, dist.Poisson)
