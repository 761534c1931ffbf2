"""Parametric kernels with Gaussian noise: their composite likelihoods, and learners that compose as they do.

A `ParametricKernel` is a chain of layers y = f(p, x) + scale * e with standard normal noise e. Composing two stacks
their parameters and their noises, and the likelihood of the composite is the integral of one likelihood against
the other. (Were the noise shared between the layers instead, the integral would be wrong.)

`maximum_likelihood_learner` sends a kernel to a learner: an update of the parameters and a request, what the layer
would have liked to see as its input. Learners compose by sending requests backwards, and the learner of a composite
is the composite of the learners: gradient descent on likelihoods is a functor, and backpropagation its composition.

Sources: D. Shiebler, "Categorical stochastic processes and likelihood" (2021); B. Fong, D. Spivak, R. Tuyéras,
"Backprop as functor" (2019), for learners.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.errors import InputError


class Layer(NamedTuple):
    """One map with noise: y = mean(parameters, x) + scale * e, for x and y vectors; y has length `size`."""

    mean: Callable[[Any, Array], Array]
    size: int
    scale: float = 1.0


class ParametricKernel(eqx.Module):
    """p(y given x, parameters) as a chain of layers. Parameters are a tuple with an entry for each layer.

    >>> double = ParametricKernel((Layer(lambda p, x: p * x, 1, 3.0),))
    >>> both = double >> ParametricKernel((Layer(lambda p, x: x + p, 1, 4.0),))
    >>> p, x, y = (jnp.array(2.0), jnp.array(1.0)), jnp.array([1.0]), jnp.array([3.0])
    >>> round(float(both.log_prob(p, x, y)), 4)  # the density of N(3, 25) at its mean
    -2.5284
    """

    layers: tuple[Layer, ...] = eqx.field(static=True)

    def __check_init__(self):
        if not self.layers or any(layer.scale <= 0 for layer in self.layers):
            raise InputError("a parametric kernel needs at least one layer, and layers need a positive noise scale")

    def then(self, other: ParametricKernel) -> ParametricKernel:
        """First this kernel, then `other`, with parameters and noises of both. Also written `>>`.

        >>> layer = ParametricKernel((Layer(lambda p, x: p * x, 1),))
        >>> len((layer >> layer).layers)
        2
        """
        return ParametricKernel(self.layers + other.layers)

    __rshift__ = then

    def apply(self, parameters: tuple, noise: tuple, x: Float[Array, " source"]) -> Float[Array, " target"]:
        """The output for given noises, one standard normal vector for each layer.

        >>> layer = ParametricKernel((Layer(lambda p, x: p * x, 1, 0.5),))
        >>> layer.apply((2.0,), (jnp.array([1.0]),), jnp.array([3.0])).tolist()
        [6.5]
        """
        self._check(parameters)
        for layer, p, e in zip(self.layers, parameters, noise, strict=True):
            x = layer.mean(p, x) + layer.scale * e
        return x

    def log_prob(
        self, parameters: tuple, x: Float[Array, " source"], y: Float[Array, " target"], nodes: int = 32
    ) -> Float[Array, ""]:
        """Log density of y: the likelihoods of the layers, integrated over what passes between them.

        The integrals use Gauss-Hermite quadrature in the noise of the inner layers. It converges fast where the next
        layers change slowly over one standard deviation of noise; raise `nodes` until nothing changes.

        Args:
            parameters: a tuple with an entry for each layer.
            x: input.
            y: output.
            nodes: quadrature nodes in each inner dimension; the cost is their product.

        Raises:
            InputError: wrong number of parameters, or too many inner dimensions for quadrature.
        """
        self._check(parameters)
        *inner, last = self.layers
        sizes = [layer.size for layer in inner]
        if nodes ** sum(sizes) > 1_000_000:
            raise InputError(
                f"{sum(sizes)} inner dimensions with {nodes} nodes each: use fewer nodes or smaller layers"
            )
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        grid = np.array(list(itertools.product(points, repeat=sum(sizes)))).reshape(-1, sum(sizes))
        shares = np.log(np.array(list(itertools.product(weights, repeat=sum(sizes))))).reshape(len(grid), -1).sum(1)

        def inside(noise: Array) -> Array:
            # The last noise is integrated in closed form.
            parts = (
                (*jnp.split(noise, np.cumsum(sizes)[:-1]), jnp.zeros(last.size)) if inner else (jnp.zeros(last.size),)
            )
            white = (y - self.apply(parameters, parts, x)) / last.scale
            return -(white @ white) / 2 - last.size * (jnp.log(last.scale) + jnp.log(2 * jnp.pi) / 2)

        constant = sum(sizes) * np.log(2 * np.pi) / 2
        return jax.nn.logsumexp(jax.vmap(inside)(jnp.asarray(grid, y.dtype)) + shares - constant)

    def _check(self, parameters: tuple) -> None:
        if len(parameters) != len(self.layers):
            raise InputError(f"{len(parameters)} parameters for {len(self.layers)} layers: give a tuple, one for each")


class CompositionalLearner(NamedTuple):
    """A supervised learning algorithm that composes: `predict`, `update` and `request`, all of (parameters, x, ...).

    Args:
        predict: (parameters, x) to y.
        update: (parameters, x, wanted y) to better parameters.
        request: (parameters, x, wanted y) to the x that it would rather have had.
        count: number of entries in the tuple of parameters.
    """

    predict: Callable[[tuple, Array], Array]
    update: Callable[[tuple, Array, Array], tuple]
    request: Callable[[tuple, Array, Array], Array]
    count: int

    def then(self, other: CompositionalLearner) -> CompositionalLearner:
        """First this learner, then `other`: the other's request is what this one is trained on. Also written `>>`."""

        def predict(p, x):
            return other.predict(p[self.count :], self.predict(p[: self.count], x))

        def update(p, x, y):
            mine, theirs = p[: self.count], p[self.count :]
            between = self.predict(mine, x)
            return self.update(mine, x, other.request(theirs, between, y)) + other.update(theirs, between, y)

        def request(p, x, y):
            mine, theirs = p[: self.count], p[self.count :]
            return self.request(mine, x, other.request(theirs, self.predict(mine, x), y))

        return CompositionalLearner(predict, update, request, self.count + other.count)

    __rshift__ = then


def maximum_likelihood_learner(kernel: ParametricKernel, learning_rate: float) -> CompositionalLearner:
    """The learner that climbs the log likelihood of the wanted output, given what the layers before pass on average.

    It predicts the noise-free output m(p, x). It updates p by `learning_rate` times the gradient of log N(y; m(p, x),
    scale^2), and requests x plus scale^2 times the gradient in x: for that step size the learner of a composite is
    the composite of the learners. All layers must share one noise scale, because this makes what one layer requests
    a deviation in units that the layer before understands.

    >>> learner = maximum_likelihood_learner(ParametricKernel((Layer(lambda p, x: p * x, 1),)), 0.1)
    >>> [round(float(p), 4) for p in learner.update((jnp.array(1.0),), jnp.array([2.0]), jnp.array([3.0]))]
    [1.2]

    Raises:
        InputError: layers of different noise scales.
    """
    scales = {layer.scale for layer in kernel.layers}
    if len(scales) > 1:
        raise InputError(f"the layers have noise scales {sorted(scales)}; learners compose only if all are equal")
    variance = scales.pop() ** 2

    def predict(p, x):
        return kernel.apply(p, tuple(jnp.zeros(layer.size) for layer in kernel.layers), x)

    def log_likelihood(p, x, y):
        return -jnp.square(y - predict(p, x)).sum() / (2 * variance)

    def update(p, x, y):
        gradient = jax.grad(log_likelihood)(p, x, y)
        return jax.tree.map(lambda a, g: a + learning_rate * g, tuple(p), gradient)

    def request(p, x, y):
        return x + variance * jax.grad(log_likelihood, argnums=1)(p, x, y)

    return CompositionalLearner(predict, update, request, len(kernel.layers))
