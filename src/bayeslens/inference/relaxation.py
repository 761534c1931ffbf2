"""Categorical choices that gradients pass through: relaxed one-hot draws, their density, and gradient estimators.

Source: E. Jang, S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax" (2017); found at the same time by
C. Maddison, A. Mnih, Y. W. Teh, "The concrete distribution" (2017).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import lazy_property, validate_sample

from bayeslens.core.distribution import build, register_family
from bayeslens.core.errors import InputError

ESTIMATORS = ("gumbel_softmax", "straight_through", "reinforce", "enumerated")
_ASSIGNMENTS_LIMIT = 2**16  # assignments that `enumerated` sums over


def gumbel_softmax(
    logits: Float[ArrayLike, "*batch categories"],
    *,
    key: Any,
    temperature: ArrayLike = 1.0,
    straight_through: bool = False,
) -> Float[Array, "*batch categories"]:
    """Draws that are nearly one-hot, with gradients in the logits: softmax((logits + Gumbel noise) / temperature).

    The largest entry falls on a category with exactly its probability, at any temperature. As the temperature falls,
    draws come near one-hot vectors, and gradients lose their bias and gain variance.

    Args:
        logits: log probabilities, up to a constant per row.
        key: a `jax.random.key`.
        temperature: positive, of shapes that broadcast to *batch; 1 by default, where trainings begin; lower it to
            about 0.5 as they go on.
        straight_through: one-hot vectors, with the gradient of the relaxed draw.

    Raises:
        InputError: logits that are no vectors of at least two categories, or a temperature that is not positive.

    Source: E. Jang, S. Gu, B. Poole (2017), equations 1, 2 and section 2.2.

    >>> y = gumbel_softmax(jnp.zeros((5, 3)), key=jax.random.key(0), temperature=0.5)
    >>> y.shape, bool(jnp.allclose(y.sum(-1), 1))
    ((5, 3), True)
    >>> sorted(gumbel_softmax(jnp.zeros(3), key=jax.random.key(0), straight_through=True).tolist())
    [0.0, 0.0, 1.0]
    """
    logits, temperature = _checked(logits, temperature)
    scaled = (logits + jax.random.gumbel(key, logits.shape, logits.dtype)) / temperature[..., None]
    soft = jax.nn.softmax(scaled)
    if not straight_through:
        return soft
    hard = jax.nn.one_hot(scaled.argmax(-1), logits.shape[-1], dtype=soft.dtype)
    # In this order the forward value is one-hot to the last bit.
    return hard + (soft - jax.lax.stop_gradient(soft))


def _checked(logits: Any, temperature: Any) -> tuple[Array, Array]:
    logits = jnp.asarray(logits, jnp.result_type(float, logits))
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise InputError(f"logits need a last axis of at least two categories, got shape {logits.shape}")
    temperature = jnp.asarray(temperature, logits.dtype)
    if not isinstance(temperature, jax.core.Tracer) and not (np.asarray(temperature) > 0).all():
        raise InputError(f"temperature must be positive, got {np.asarray(temperature).min()}")
    return logits, temperature


@register_family
class GumbelSoftmax(Distribution):
    """The distribution of relaxed one-hot draws, on the simplex, with its density.

    The density is with respect to the first categories - 1 entries, as a Dirichlet's is. Draws are differentiable in
    both parameters. Where an entry is smaller than the smallest number of the dtype, it is taken as that number.

    Args:
        temperature: positive, shape (*batch).
        logits: log probabilities up to a constant per row, shape (*batch, categories).

    Raises:
        InputError: as `gumbel_softmax`.

    Source: E. Jang, S. Gu, B. Poole (2017), appendix B. NumPyro has the two categories alone (`RelaxedBernoulli`).

    >>> d = GumbelSoftmax(1.0, jnp.zeros(2))  # uniform, at temperature 1
    >>> d.log_prob(jnp.array([[0.1, 0.9], [0.5, 0.5]])).round(4).tolist()
    [0.0, 0.0]
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real_vector}
    reparametrized_params = ["temperature", "logits"]
    support = constraints.simplex
    pytree_data_fields = ("temperature", "logits")

    def __init__(self, temperature: ArrayLike, logits: ArrayLike, *, validate_args: bool | None = None):
        self.logits, self.temperature = _checked(logits, temperature)
        batch = jnp.broadcast_shapes(self.temperature.shape, self.logits.shape[:-1])
        super().__init__(batch, self.logits.shape[-1:], validate_args=validate_args)

    @lazy_property
    def probs(self) -> Array:
        """Probabilities with which an entry is the largest."""
        return jax.nn.softmax(self.logits)

    def parts(self) -> tuple:
        """See `register_family`."""
        return {"temperature": (self.temperature, 0), "logits": (self.logits, 1)}, (), ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> GumbelSoftmax:
        """Rebuild from parts."""
        return build(cls, **arrays)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape categories"]:
        """Points inside the simplex."""
        logits = jnp.broadcast_to(self.logits, (*sample_shape, *self.batch_shape, *self.event_shape))
        temperature = jnp.broadcast_to(self.temperature, logits.shape[:-1])
        noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
        return jnp.maximum(jax.nn.softmax(noisy / temperature[..., None]), jnp.finfo(logits.dtype).tiny)

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Float[Array, "*shape"]:
        """Log density."""
        value = jnp.asarray(value, self.logits.dtype)
        log_value = jnp.log(jnp.maximum(value, jnp.finfo(value.dtype).tiny))
        temperature, count = self.temperature, self.event_shape[0]
        ratio = self.logits - temperature[..., None] * log_value
        constant = jax.scipy.special.gammaln(float(count)) + (count - 1) * jnp.log(temperature)
        return constant + (ratio - log_value).sum(-1) - count * jax.nn.logsumexp(ratio, axis=-1)


def categorical_expectation(
    function: Callable[[Float[Array, "*sites categories"]], Float[Array, ""]],
    logits: Float[ArrayLike, "*sites categories"],
    *,
    key: Any = None,
    estimator: str = "straight_through",
    temperature: ArrayLike = 1.0,
    num_samples: int = 1,
) -> Float[Array, ""]:
    """An estimate of the mean of a function of independent categorical choices, made to be differentiated.

    Its gradient, in the logits and in all that the function closes over, estimates that of the mean:

    - "gumbel_softmax": the function is evaluated at relaxed draws. Value and gradient are biased, less so the lower
      the temperature, where the gradient gets noisier. The function must take what lies between one-hot vectors.
    - "straight_through": evaluated at one-hot draws, so that the value has no bias; the gradient in the logits is that
      of relaxed draws.
    - "reinforce": the score function with the mean of the other draws as baseline (W. Kool, H. van Hoof, M. Welling,
      2019); no bias at all, and no need for a derivative of the function, but the most noise.
    - "enumerated": the exact mean, over all assignments of the sites.

    Args:
        function: of one-hot vectors, one per site.
        logits: of each site, up to a constant.
        key: a `jax.random.key`; "enumerated" needs none.
        estimator: one of the four; by default the one whose value has no bias at the price of one evaluation.
        temperature: of the relaxed draws.
        num_samples: evaluations that are averaged; "reinforce" needs two.

    Raises:
        InputError: an unknown estimator, no key, a single draw for "reinforce", more than 65,536 assignments to
            enumerate; and as `gumbel_softmax`.

    >>> cost = lambda y: (y * jnp.array([1.0, 2.0, 4.0])).sum()
    >>> round(float(categorical_expectation(cost, jnp.zeros(3), estimator="enumerated")), 4)
    2.3333
    """
    logits, temperature = _checked(logits, temperature)
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}: use one of {', '.join(ESTIMATORS)}")
    if estimator == "enumerated":
        return _enumerated(function, logits)
    if key is None:
        raise InputError(f"the estimator {estimator!r} draws: give key=jax.random.key(0)")
    if num_samples < 1 + (estimator == "reinforce"):
        raise InputError(f"num_samples={num_samples} is too few for {estimator!r}: give at least "
                         f"{1 + (estimator == 'reinforce')}")  # fmt: skip
    repeated = jnp.broadcast_to(logits, (num_samples, *logits.shape))
    if estimator != "reinforce":
        hard = estimator == "straight_through"
        draws = gumbel_softmax(repeated, key=key, temperature=temperature, straight_through=hard)
        return jax.vmap(function)(draws).mean()
    draws = jax.nn.one_hot(jax.random.categorical(key, repeated), logits.shape[-1], dtype=logits.dtype)
    values = jax.vmap(function)(draws)
    # Less the mean of the others is what is left of the mean of all, times n / (n - 1).
    advantage = jax.lax.stop_gradient(values - values.mean()) * num_samples / (num_samples - 1)
    score = (draws * jax.nn.log_softmax(repeated)).reshape(num_samples, -1).sum(-1)
    return (values + advantage * (score - jax.lax.stop_gradient(score))).mean()


def _enumerated(function: Callable, logits: Array) -> Array:
    """The exact mean, over all assignments."""
    *sites, categories = logits.shape
    count = int(np.prod(sites, dtype=int))
    if categories**count > _ASSIGNMENTS_LIMIT:
        raise InputError(
            f"{count} sites of {categories} categories have more than {_ASSIGNMENTS_LIMIT} assignments: use another "
            "estimator"
        )
    every = np.array(list(itertools.product(range(categories), repeat=count)), int).reshape(-1, *sites)
    one_hot = jnp.asarray(np.eye(categories)[every], logits.dtype)
    weights = jnp.exp((one_hot * jax.nn.log_softmax(logits)).reshape(len(every), -1).sum(-1))
    return weights @ jax.vmap(function)(one_hot)


def categorical_gradient(
    function: Callable[[Float[Array, "*sites categories"]], Float[Array, ""]],
    logits: Float[ArrayLike, "*sites categories"],
    *,
    key: Any = None,
    estimator: str = "straight_through",
    temperature: ArrayLike = 1.0,
    num_samples: int = 1,
) -> Float[Array, "*sites categories"]:
    """An estimate of the gradient, in the logits, of the mean of a function of independent categorical choices.

    Args:
        function, key, estimator, temperature, num_samples: as for `categorical_expectation`.
        logits: of each site, up to a constant.

    Raises:
        InputError: as `categorical_expectation`.

    >>> cost = lambda y: (y * jnp.array([1.0, 2.0, 4.0])).sum()
    >>> [round(float(g), 3) for g in categorical_gradient(cost, jnp.zeros(3), estimator="enumerated")]
    [-0.444, -0.111, 0.556]
    """
    logits, _ = _checked(logits, temperature)
    settings = {"key": key, "estimator": estimator, "temperature": temperature, "num_samples": num_samples}
    return jax.grad(lambda logits: categorical_expectation(function, logits, **settings))(logits)
