"""Models of posteriordb as NumPyro programs, with the names of parameters and data of their Stan definitions.

Every log density equals that of the Stan program up to a constant, in the same coordinates: no model is reparametrized,
so that engines meet the correlations and scales of the original. What Stan leaves out of a model block, a flat prior,
is an `ImproperUniform` on the same support; priors of single entries of an ordered vector are factors.

Source: https://github.com/stan-dev/posteriordb, posterior_database/models/stan.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from numpyro.distributions import constraints

# Of the Lotka-Volterra solver between two yearly observations. Over the reference draws its log populations are then
# within 1e-4 of the limit of small steps (Stan's solver asks for 1e-3 in populations of four and more), and the log
# likelihood varies by 0.0003 around that of the limit.
ODE_STEPS = 6


def _flat(name: str, support: constraints.Constraint, *event_shape: int) -> Array:
    return numpyro.sample(name, dist.ImproperUniform(support, (), event_shape))


def _regression(name: str, y: Array, *columns: Array, sigma: dist.Distribution | None = None) -> None:
    """A linear regression with intercept and flat coefficients; sigma is flat on positive numbers unless given."""
    beta = _flat("beta", constraints.real_vector, len(columns) + 1)
    sigma = _flat("sigma", constraints.positive) if sigma is None else numpyro.sample("sigma", sigma)
    design = jnp.stack(columns, axis=1)
    numpyro.sample(name, dist.Normal(beta[0] + design @ beta[1:], sigma), obs=y)


# Regressions


def kidscore_momhs(kid_score, mom_hs):
    _regression("kid_score", kid_score, mom_hs, sigma=dist.HalfCauchy(2.5))


def kidscore_momiq(kid_score, mom_iq):
    _regression("kid_score", kid_score, mom_iq, sigma=dist.HalfCauchy(2.5))


def kidscore_momhsiq(kid_score, mom_hs, mom_iq):
    _regression("kid_score", kid_score, mom_hs, mom_iq, sigma=dist.HalfCauchy(2.5))


def kidscore_interaction(kid_score, mom_hs, mom_iq):
    _regression("kid_score", kid_score, mom_hs, mom_iq, mom_hs * mom_iq, sigma=dist.HalfCauchy(2.5))


def earn_height(earn, height):
    _regression("earn", earn, height)


def logearn_height(earn, height):
    _regression("log_earn", jnp.log(earn), height)


def log10earn_height(earn, height):
    _regression("log10_earn", jnp.log10(earn), height)


def logearn_interaction(earn, height, male):
    _regression("log_earn", jnp.log(earn), height, male, height * male)


def logearn_logheight_male(earn, height, male):
    _regression("log_earn", jnp.log(earn), jnp.log(height), male)


def logmesquite_logvolume(weight, diam1, diam2, canopy_height):
    _regression("log_weight", jnp.log(weight), jnp.log(diam1 * diam2 * canopy_height))


def mesquite(weight, diam1, diam2, canopy_height, total_height, density, group):
    _regression("weight", weight, diam1, diam2, canopy_height, total_height, density, group)


def nes(partyid7, real_ideo, race_adj, educ1, gender, income, age_discrete):
    ages = [jnp.where(age_discrete == level, 1.0, 0.0) for level in (2, 3, 4)]
    _regression("partyid7", partyid7, real_ideo, race_adj, *ages, educ1, gender, income)


def blr(X, y):
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([X.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def kilpisjarvi(x, y, pmualpha, psalpha, pmubeta, psbeta):
    alpha = numpyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = numpyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = _flat("sigma", constraints.positive)
    numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


# `K` is a size: a Python integer


def arK(K, y):
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    y = jnp.asarray(y)
    lagged = jnp.stack([y[K - lag : len(y) - lag] for lag in range(1, K + 1)], axis=1)
    numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y[K:])


def eight_schools_noncentered(y, sigma):
    theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    theta = numpyro.deterministic("theta", theta_trans * tau + mu)
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gp_regr(x, y):
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    x = jnp.asarray(x)
    squared = (x[:, None] - x) ** 2
    # Sigma is a variance here, as in the original.
    covariance = alpha**2 * jnp.exp(-0.5 * squared / rho**2) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(0.0, covariance), obs=y)


def low_dim_gauss_mix(y):
    mu = _flat("mu", constraints.ordered_vector, 2)
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(probs=jnp.stack([theta, 1.0 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


# Hidden Markov models with two states, which are summed out


def _forward(emission: Float[Array, "steps 2"], transition: Float[Array, "2 2"]) -> Float[Array, ""]:
    """Log likelihood from log densities of each observation in each state; a first state has no probability."""
    log_transition = jnp.log(transition)
    # The larger density of each step is added at the end: a running sum of all of them would lose digits in float32.
    largest = jax.lax.stop_gradient(emission.max(axis=1, keepdims=True))
    emission = emission - largest

    def step(gamma: Array, now: Array) -> tuple[Array, None]:
        return jnp.logaddexp(gamma[0] + log_transition[0], gamma[1] + log_transition[1]) + now, None

    return logsumexp(jax.lax.scan(step, emission[0], emission[1:])[0]) + largest.sum()


def _transition(*priors: Array) -> Array:
    rows = [numpyro.sample(f"theta{i}", dist.Dirichlet(prior)) for i, prior in enumerate(priors, 1)]
    return jnp.stack(rows)


def _increasing(name: str, support: constraints.Constraint, low: float, high: float) -> Array:
    """Two ordered numbers with priors Normal(low, 1) and Normal(high, 1)."""
    value = _flat(name, support, 2)
    numpyro.factor(f"{name}_prior", dist.Normal(jnp.array([low, high]), 1.0).log_prob(value).sum())
    return value


def hmm_example(y):
    transition = _transition(jnp.ones(2), jnp.ones(2))
    mu = _increasing("mu", constraints.positive_ordered_vector, 3.0, 10.0)
    emission = dist.Normal(mu, 1.0).log_prob(jnp.asarray(y)[:, None])
    numpyro.factor("y", _forward(emission, transition))


def hmm_drive_0(u, v, alpha):
    transition = _transition(*jnp.asarray(alpha))
    phi = _increasing("phi", constraints.positive_ordered_vector, 0.0, 3.0)
    rate = _increasing("lambda", constraints.positive_ordered_vector, 0.0, 3.0)
    pairs = ((u, dist.Exponential(phi)), (v, dist.Exponential(rate)))
    emission = sum(of_state.log_prob(jnp.asarray(data)[:, None]) for data, of_state in pairs)
    numpyro.factor("u_and_v", _forward(emission, transition))


def hmm_drive_1(u, v, alpha, tau, rho):
    transition = _transition(*jnp.asarray(alpha))
    phi = _increasing("phi", constraints.ordered_vector, 0.0, 3.0)
    mean = _increasing("lambda", constraints.ordered_vector, 0.0, 3.0)
    pairs = ((u, dist.Normal(phi, tau)), (v, dist.Normal(mean, rho)))
    emission = sum(of_state.log_prob(jnp.asarray(data)[:, None]) for data, of_state in pairs)
    numpyro.factor("u_and_v", _forward(emission, transition))


# A differential equation


def _log_populations(theta: Float[Array, "4"], start: Float[Array, "2"], times: Float[Array, " times"]) -> Array:
    """Logarithms of prey and predators at increasing times after 0, by Runge-Kutta's fourth-order method.

    Logarithms keep populations positive whatever the step, and a fixed number of steps compiles and differentiates as
    one scan.
    """
    alpha, beta, gamma, delta = theta

    def slope(w: Array) -> Array:
        prey, predators = jnp.exp(w)
        return jnp.stack([alpha - beta * predators, delta * prey - gamma])

    def advance(w: Array, duration: Array) -> tuple[Array, Array]:
        h = duration / ODE_STEPS

        def step(w: Array, _: None) -> tuple[Array, None]:
            k1 = slope(w)
            k2 = slope(w + 0.5 * h * k1)
            k3 = slope(w + 0.5 * h * k2)
            k4 = slope(w + h * k3)
            return w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        w = jax.lax.scan(step, w, None, length=ODE_STEPS)[0]
        return w, w

    return jax.lax.scan(advance, jnp.log(start), jnp.diff(times, prepend=0.0))[1]


def lotka_volterra(ts, y_init, y):
    theta = numpyro.sample(
        "theta",
        dist.TruncatedNormal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]), low=0.0).to_event(1),
    )
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=y_init)
    numpyro.sample("y", dist.LogNormal(_log_populations(theta, z_init, ts), sigma), obs=y)


# Name of the Stan program -> the NumPyro program
MODELS: dict[str, Callable] = {
    model.__name__: model
    for model in (
        arK,
        blr,
        earn_height,
        eight_schools_noncentered,
        gp_regr,
        hmm_drive_0,
        hmm_drive_1,
        hmm_example,
        kidscore_interaction,
        kidscore_momhs,
        kidscore_momhsiq,
        kidscore_momiq,
        kilpisjarvi,
        log10earn_height,
        logearn_height,
        logearn_interaction,
        logearn_logheight_male,
        logmesquite_logvolume,
        lotka_volterra,
        low_dim_gauss_mix,
        mesquite,
        nes,
    )
}
