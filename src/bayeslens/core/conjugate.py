"""Conjugate pairs: priors whose posterior is of their own family, updated by arithmetic on hyperparameters.

A prior is a channel c from hyperparameters to distributions of a parameter, a likelihood a channel d from the
parameter to observations. They are conjugate by h when, for all hyperparameters p, parameters t and observations y,

    c(p)(t) d(t)(y) = predictive(p)(y) c(h(p, y))(t),

that is when h followed by c is the Bayesian inverse of d at c(p). `certify` measures by how much the two sides
differ; a pair that fails has no exact posterior. h needs sums over the observations only, so that many observations
are one update, in any order and any grouping.

Source: B. Jacobs, "A channel-based perspective on conjugate priors" (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.transforms import AffineTransform

from bayeslens.core.distribution import build, register_family
from bayeslens.core.errors import InputError

Hyperparameters = dict[str, ArrayLike]


class ConjugatePair(NamedTuple):
    """A prior channel, a likelihood channel, and the update that inverts the second at the first.

    Args:
        prior: c, makes the prior from hyperparameters, which are named as its arguments: `prior(**p)`.
        likelihood: d, makes the distribution of an observation from the parameter and from what is known.
        update: h, makes new hyperparameters from hyperparameters, observations of shape (n, *event), and what is
            known: `update(p, y, **known)`.
        predictive: the distribution of a new observation, `predictive(p, **known)`.
        hyperparameters: names of the hyperparameters.
        known: names of the numbers that the likelihood takes as known, each of shape () or (n,).
        point: a parameter well inside the prior, `point(p)`.

    >>> pair = conjugate_pair(dist.Gamma, dist.Poisson)
    >>> posterior = pair.update({"concentration": 2.0, "rate": 1.0}, jnp.array([3, 4, 2]))
    >>> float(posterior["concentration"]), float(posterior["rate"])
    (11.0, 4.0)
    """

    prior: Callable[..., Distribution]
    likelihood: Callable[..., Distribution]
    update: Callable[..., Hyperparameters]
    predictive: Callable[..., Distribution]
    hyperparameters: tuple[str, ...]
    known: tuple[str, ...] = ()
    point: Callable[..., Array] | None = None


@register_family
class NormalInverseGamma(Distribution):
    """Normal weights given an inverse-gamma variance: the conjugate prior of linear regression with unknown noise.

    variance ~ InverseGamma(concentration, rate), weights ~ N(loc, variance * inverse(precision)). A value is the
    vector (weights, variance), event shape (weights + 1,).

    Args:
        loc: shape (*batch, weights).
        precision: shape (*batch, weights, weights), positive definite.
        concentration, rate: shape (*batch,).

    >>> d = NormalInverseGamma(jnp.zeros(1), jnp.eye(1), 1.0, 1.0)
    >>> round(float(d.log_prob(jnp.array([0.0, 1.0]))), 4)
    -1.9189
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "precision": constraints.positive_definite,
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }
    pytree_data_fields = ("loc", "precision", "concentration", "rate")

    def __init__(self, loc, precision, concentration, rate, *, validate_args=None):
        self.loc, self.precision = jnp.asarray(loc), jnp.asarray(precision)
        self.concentration, self.rate = jnp.asarray(concentration), jnp.asarray(rate)
        batch = jnp.broadcast_shapes(
            self.loc.shape[:-1], self.precision.shape[:-2], self.concentration.shape, self.rate.shape
        )
        super().__init__(batch, (self.loc.shape[-1] + 1,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:
        """Real weights, positive variance."""
        parts = constraints.cat([constraints.real, constraints.positive], dim=-1, lengths=(self.loc.shape[-1], 1))
        return constraints.independent(parts, 1)

    def parts(self) -> tuple:
        """See `register_family`."""
        arrays = {"loc": (self.loc, 1), "precision": (self.precision, 2)}
        return arrays | {"concentration": (self.concentration, 0), "rate": (self.rate, 0)}, (), ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> NormalInverseGamma:
        """Rebuild from parts."""
        return build(cls, **arrays)

    def log_prob(self, value: Float[ArrayLike, "*batch weights_and_variance"]) -> Float[Array, "*batch"]:
        """Log density of (weights, variance)."""
        weights, variance = value[..., :-1], value[..., -1]
        triangle = jnp.linalg.cholesky(self.precision)
        white = jnp.einsum("...ij,...i->...j", triangle, weights - self.loc)
        log_det = jnp.log(jnp.diagonal(triangle, axis1=-2, axis2=-1)).sum(-1)
        inside = -jnp.square(white).sum(-1) / (2 * variance) + log_det
        inside -= weights.shape[-1] * jnp.log(2 * jnp.pi * variance) / 2
        return inside + dist.InverseGamma(self.concentration, self.rate).log_prob(variance)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Float[Array, ...]:
        """Draws of (weights, variance)."""
        for_variance, for_weights = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        variance = self.rate / jax.random.gamma(for_variance, self.concentration, shape, dtype=self.loc.dtype)
        white = jax.random.normal(for_weights, (*shape, self.loc.shape[-1]), self.loc.dtype)
        triangle = jnp.linalg.cholesky(self.precision)
        spread = jnp.linalg.solve(jnp.swapaxes(triangle, -1, -2), white[..., None])[..., 0]
        weights = self.loc + jnp.sqrt(variance)[..., None] * spread
        return jnp.concatenate([weights, variance[..., None]], axis=-1)


def _update_beta(p: Hyperparameters, y: ArrayLike, total_count: ArrayLike = 1) -> Hyperparameters:
    y = jnp.asarray(y)
    trials = jnp.broadcast_to(total_count, y.shape)
    return {
        "concentration1": p["concentration1"] + y.sum(0),
        "concentration0": p["concentration0"] + (trials - y).sum(0),
    }


def _update_gamma(p: Hyperparameters, events: ArrayLike, exposure: ArrayLike) -> Hyperparameters:
    return {"concentration": p["concentration"] + events, "rate": p["rate"] + exposure}


def _update_normal(p: Hyperparameters, y: ArrayLike, scale: ArrayLike) -> Hyperparameters:
    y = jnp.asarray(y)
    weight = jnp.broadcast_to(1 / jnp.square(scale), y.shape)
    # Deviations from the prior mean, not raw sums: these would lose digits when the mean is far from zero.
    variance = 1 / (1 / jnp.square(p["scale"]) + weight.sum(0))
    return {"loc": p["loc"] + variance * (weight * (y - p["loc"])).sum(0), "scale": jnp.sqrt(variance)}


def _features(features: ArrayLike | None, rows: int) -> Array:
    return jnp.ones((rows, 1)) if features is None else jnp.asarray(features)


def _update_normal_inverse_gamma(
    p: Hyperparameters, y: ArrayLike, features: ArrayLike | None = None
) -> Hyperparameters:
    y = jnp.asarray(y)
    x, loc, precision = _features(features, y.shape[0]), jnp.asarray(p["loc"]), jnp.asarray(p["precision"])
    total = precision + x.T @ x
    shift = jnp.linalg.solve(total, x.T @ (y - x @ loc))
    error = y - x @ (loc + shift)
    return {
        "loc": loc + shift,
        "precision": total,
        "concentration": p["concentration"] + y.shape[0] / 2,
        # A sum of squares, where the textbook's difference of large numbers could turn negative.
        "rate": p["rate"] + (error @ error + shift @ precision @ shift) / 2,
    }


def _normal_regression(parameter: ArrayLike, features: ArrayLike | None = None) -> Distribution:
    x = jnp.ones(1) if features is None else jnp.asarray(features)
    return dist.Normal((x * parameter[..., :-1]).sum(-1), jnp.sqrt(parameter[..., -1]))


def _predict_regression(p: Hyperparameters, features: ArrayLike | None = None) -> Distribution:
    x = jnp.ones(1) if features is None else jnp.asarray(features)
    spread = 1 + (x * jnp.linalg.solve(p["precision"], x.T).T).sum(-1)
    scale = jnp.sqrt(p["rate"] / p["concentration"] * spread)
    return dist.StudentT(2 * jnp.asarray(p["concentration"]), x @ p["loc"], scale)


def _lomax(concentration: ArrayLike, rate: ArrayLike) -> Distribution:
    pareto = dist.Pareto(scale=rate, alpha=concentration)
    return dist.TransformedDistribution(pareto, AffineTransform(-rate, 1.0, domain=constraints.greater_than(rate)))


def _mean(p: Hyperparameters) -> Array:
    return p["concentration"] / p["concentration"].sum(-1, keepdims=True)


CONJUGATE_PAIRS: dict[tuple[type, type], ConjugatePair] = {
    (dist.Beta, dist.BernoulliProbs): ConjugatePair(
        prior=dist.Beta,
        likelihood=lambda probs: dist.Bernoulli(probs=probs),
        update=_update_beta,
        predictive=lambda p: dist.Bernoulli(probs=p["concentration1"] / (p["concentration1"] + p["concentration0"])),
        hyperparameters=("concentration1", "concentration0"),
    ),
    (dist.Beta, dist.BinomialProbs): ConjugatePair(
        prior=dist.Beta,
        likelihood=lambda probs, total_count: dist.Binomial(total_count, probs=probs),
        update=_update_beta,
        predictive=lambda p, total_count: dist.BetaBinomial(p["concentration1"], p["concentration0"], total_count),
        hyperparameters=("concentration1", "concentration0"),
        known=("total_count",),
    ),
    (dist.Dirichlet, dist.CategoricalProbs): ConjugatePair(
        prior=dist.Dirichlet,
        likelihood=lambda probs: dist.Categorical(probs=probs),
        update=lambda p, y: {
            "concentration": p["concentration"] + jax.nn.one_hot(y, p["concentration"].shape[-1]).sum(0)
        },
        predictive=lambda p: dist.Categorical(probs=_mean(p)),
        hyperparameters=("concentration",),
    ),
    (dist.Dirichlet, dist.MultinomialProbs): ConjugatePair(
        prior=dist.Dirichlet,
        likelihood=lambda probs, total_count: dist.Multinomial(total_count, probs=probs),
        update=lambda p, y, total_count: {"concentration": p["concentration"] + jnp.asarray(y).sum(0)},
        predictive=lambda p, total_count: dist.DirichletMultinomial(p["concentration"], total_count),
        hyperparameters=("concentration",),
        known=("total_count",),
    ),
    (dist.Gamma, dist.Poisson): ConjugatePair(
        prior=dist.Gamma,
        likelihood=lambda rate: dist.Poisson(rate),
        update=lambda p, y: _update_gamma(p, jnp.asarray(y).sum(0), jnp.shape(y)[0]),
        predictive=lambda p: dist.GammaPoisson(p["concentration"], p["rate"]),
        hyperparameters=("concentration", "rate"),
    ),
    (dist.Gamma, dist.Exponential): ConjugatePair(
        prior=dist.Gamma,
        likelihood=lambda rate: dist.Exponential(rate),
        update=lambda p, y: _update_gamma(p, jnp.shape(y)[0], jnp.asarray(y).sum(0)),
        predictive=lambda p: _lomax(p["concentration"], p["rate"]),
        hyperparameters=("concentration", "rate"),
    ),
    (dist.Normal, dist.Normal): ConjugatePair(
        prior=dist.Normal,
        likelihood=lambda loc, scale: dist.Normal(loc, scale),
        update=_update_normal,
        predictive=lambda p, scale: dist.Normal(p["loc"], jnp.hypot(p["scale"], scale)),
        hyperparameters=("loc", "scale"),
        known=("scale",),
    ),
    (NormalInverseGamma, dist.Normal): ConjugatePair(
        prior=NormalInverseGamma,
        likelihood=_normal_regression,
        update=_update_normal_inverse_gamma,
        predictive=_predict_regression,
        hyperparameters=("loc", "precision", "concentration", "rate"),
        known=("features",),
        point=lambda p: jnp.append(p["loc"], p["rate"] / (p["concentration"] + 1)),  # the mean may be infinite
    ),
}


def conjugate_pair(prior: type | Distribution, likelihood: type | Distribution) -> ConjugatePair:
    """Look up the conjugate pair of a prior and a likelihood, given as NumPyro distributions or their classes.

    >>> conjugate_pair(dist.Beta(1.0, 1.0), dist.Bernoulli(probs=0.5)).hyperparameters
    ('concentration1', 'concentration0')

    Raises:
        InputError: no such pair.
    """
    key = tuple(d if isinstance(d, type) else type(d) for d in (prior, likelihood))
    if key not in CONJUGATE_PAIRS:
        pairs = ", ".join(f"{a.__name__} with {b.__name__}" for a, b in CONJUGATE_PAIRS)
        raise InputError(f"{key[0].__name__} is not known as conjugate to {key[1].__name__}; known are {pairs}")
    return CONJUGATE_PAIRS[key]


def hyperparameters_of(pair: ConjugatePair, prior: Distribution) -> Hyperparameters:
    """Read the hyperparameters off a prior distribution: the inverse of `pair.prior(**hyperparameters)`.

    >>> prior = dist.Gamma(2.0, 3.0)
    >>> hyperparameters_of(conjugate_pair(prior, dist.Poisson), prior)
    {'concentration': 2.0, 'rate': 3.0}
    """
    return {name: getattr(prior, name) for name in pair.hyperparameters}


def log_marginal_likelihood(
    pair: ConjugatePair, hyperparameters: Hyperparameters, observations: ArrayLike, **known: Any
) -> Float[Array, ""]:
    """The log evidence of all observations together, parameter integrated out.

    The channel equation for a batch, solved for the predictive: prior times likelihood over posterior is the same at
    every parameter, so one is enough.

    Args:
        pair: a conjugate pair.
        hyperparameters: of the prior.
        observations: shape (n, *event).
        known: what the likelihood takes as known.

    >>> pair = conjugate_pair(dist.Beta, dist.BernoulliProbs)
    >>> p = {"concentration1": jnp.array(1.0), "concentration0": jnp.array(1.0)}
    >>> round(float(jnp.exp(log_marginal_likelihood(pair, p, jnp.array([1, 1])))), 4)
    0.3333
    """
    posterior = pair.update(hyperparameters, observations, **known)
    after = pair.prior(**posterior)
    parameter = after.mean if pair.point is None else pair.point(posterior)
    before = pair.prior(**hyperparameters).log_prob(parameter)
    inside = pair.likelihood(parameter, **known).log_prob(observations).sum()
    return before + inside - after.log_prob(parameter)


class Certificate(NamedTuple):
    """What `certify` found: whether the equation `holds`, its largest `residual`, and what rounding is `allowed`."""

    holds: Bool[Array, ""]
    residual: Float[Array, ""]
    allowed: Float[Array, ""]


def certify(
    pair: ConjugatePair,
    hyperparameters: Hyperparameters,
    observation: ArrayLike,
    parameters: Float[ArrayLike, "tried ..."],
    **known: Any,
) -> Certificate:
    """Check the channel equation, in logarithms, at one observation and some parameters.

    A certificate that fails proves that the pair is not conjugate by its update, or that its predictive is wrong; one
    that holds is evidence at what was tried.

    Args:
        pair: the pair to check, from the registry or your own.
        hyperparameters: of the prior.
        observation: one observation, without an axis of observations.
        parameters: where to compare the two sides; all inside the support of the prior.
        known: what the likelihood takes as known, for this one observation.

    >>> pair = conjugate_pair(dist.Gamma, dist.Poisson)
    >>> p, rates = {"concentration": jnp.array(2.0), "rate": jnp.array(1.0)}, jnp.array([0.5, 1.0, 4.0])
    >>> bool(certify(pair, p, 3, rates).holds)
    True
    >>> wrong = pair._replace(update=lambda p, y: {**p, "concentration": p["concentration"] + y.sum(0)})
    >>> bool(certify(wrong, p, 3, rates).holds)
    False
    """
    parameters = jnp.asarray(parameters)
    many = {name: jnp.asarray(value)[None] for name, value in known.items()}
    prior = pair.prior(**hyperparameters)
    posterior = pair.prior(**pair.update(hyperparameters, jnp.asarray(observation)[None], **many))
    terms = jnp.stack(
        jnp.broadcast_arrays(
            prior.log_prob(parameters),
            pair.likelihood(parameters, **known).log_prob(observation),
            -pair.predictive(hyperparameters, **known).log_prob(observation),
            -posterior.log_prob(parameters),
        )
    )
    residual = jnp.abs(terms.sum(0))
    # JAX's log-beta function errs by up to 1e-6 even in float64.
    allowed = (1e-6 + 1024 * jnp.finfo(terms.dtype).eps) * (1 + jnp.abs(terms).sum(0))
    worst = jnp.argmax(residual - allowed)
    return Certificate((residual <= allowed).all(), residual[worst], allowed[worst])
