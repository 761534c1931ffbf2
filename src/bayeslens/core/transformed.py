"""Distributions made from others: recalibrated through the cdf, spread over rounding cells, given by quantiles."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array
from numpyro.distributions import Distribution, constraints

from bayeslens.core.distribution import register_family
from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import backend, cumulative, invert_cdf, log_density, moments


def _piecewise_linear(x: Any, knots: Any, values: Any) -> tuple[Any, Any]:
    """Value and slope of the increasing piecewise linear function through (knots, values), for batched knots."""
    xp = backend(x, knots, values)
    x, knots, values = xp.asarray(x), xp.asarray(knots), xp.asarray(values)
    shape = np.broadcast_shapes(x.shape, knots.shape[:-1], values.shape[:-1])
    x = xp.broadcast_to(x, shape)
    index = xp.clip((x[..., None] >= knots).sum(-1) - 1, 0, knots.shape[-1] - 2)
    left, right, bottom, top = (
        xp.take_along_axis(xp.broadcast_to(a, (*shape, a.shape[-1])), (index + step)[..., None], axis=-1)[..., 0]
        for a, step in ((knots, 0), (knots, 1), (values, 0), (values, 1))
    )
    slope = (top - bottom) / (right - left)
    return bottom + slope * (x - left), slope


@register_family
class Recalibrated(Distribution):
    """A continuous distribution with its cdf F replaced by G(F), for an increasing piecewise linear G on [0, 1].

    Density, quantiles and intervals all follow from the one recalibrated cdf.

    Args:
        base: batch shape `batch`.
        knots: probabilities under `base`, increasing from 0 to 1, shape (*batch, knots) or (knots,).
        levels: the calibrated probabilities G(knots), same shape.

    >>> import numpyro.distributions as dist
    >>> d = Recalibrated(dist.Normal(0.0, 1.0), np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.25, 1.0]))
    >>> round(float(d.cdf(0.0)), 3)
    0.25
    """

    arg_constraints = {"knots": constraints.real_vector, "levels": constraints.real_vector}
    pytree_data_fields = ("base", "knots", "levels")
    support = constraints.real

    def __init__(self, base: Distribution, knots: Any, levels: Any, *, validate_args: bool | None = None):
        self.base, self.knots, self.levels = base, knots, levels
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def parts(self) -> tuple:
        """See `register_family`."""
        return {"knots": (self.knots, 1), "levels": (self.levels, 1)}, (self.base,), ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> Recalibrated:
        """Rebuild from parts."""
        return cls(children[0], **arrays)

    def log_prob(self, value: Any) -> Array:
        _, slope = _piecewise_linear(cumulative(self.base, value), self.knots, self.levels)
        return log_density(self.base, value) + backend(slope).log(slope)

    def cdf(self, value: Any) -> Any:
        result = _piecewise_linear(cumulative(self.base, value), self.knots, self.levels)[0]
        return backend(result).clip(result, 0.0, 1.0)

    def quantile(self, q: Any) -> Array:
        """Quantiles: the base's, at the probabilities that G maps to `q`."""
        inner = _piecewise_linear(q, self.levels, self.knots)[0]
        return invert_cdf(self.base, backend(inner).clip(inner, 1e-6, 1 - 1e-6))

    def icdf(self, q: Any) -> Array:
        return self.quantile(q)

    def moments(self) -> tuple[Any, Any]:
        """Mean and variance, by quadrature over the quantiles."""
        return _moments_from_quantiles(self.quantile, self.batch_shape, backend(self.knots, self.levels))

    @property
    def mean(self) -> Any:
        return self.moments()[0]

    @property
    def variance(self) -> Any:
        return self.moments()[1]

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.quantile(_uniform(key, (*sample_shape, *self.batch_shape)))


@register_family
class Dequantized(Distribution):
    """An integer-valued distribution spread evenly over the cells [k - 1/2, k + 1/2], so that it has a density.

    The probability of a cell is that of its integer, so that counts and densities can be mixed and compared.

    >>> import numpyro.distributions as dist
    >>> d = Dequantized(dist.Poisson(2.0))
    >>> round(float(d.cdf(1.5) - d.cdf(0.5)), 4), round(float(np.exp(dist.Poisson(2.0).log_prob(1))), 4)
    (0.2707, 0.2707)
    """

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("base",)
    support = constraints.real

    def __init__(self, base: Distribution, *, validate_args: bool | None = None):
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def parts(self) -> tuple:
        """See `register_family`."""
        return {}, (self.base,), ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> Dequantized:
        """Rebuild from parts."""
        return cls(children[0])

    def _mass(self, k: Any) -> Any:
        xp = backend(k)
        return xp.where(k >= 0, xp.exp(log_density(self.base, xp.maximum(k, 0.0))), 0.0)

    def _below(self, k: Any) -> Any:
        xp = backend(k)
        return xp.where(k >= 1, cumulative(self.base, xp.maximum(k - 1, 0.0)), 0.0)

    def log_prob(self, value: Any) -> Any:
        xp = backend(value)
        k = xp.floor(value + 0.5)
        return xp.where(k >= 0, log_density(self.base, xp.maximum(k, 0.0)), -xp.inf)

    def cdf(self, value: Any) -> Any:
        xp = backend(value)
        k = xp.floor(value + 0.5)
        return xp.clip(self._below(k) + (value + 0.5 - k) * self._mass(k), 0.0, 1.0)

    def quantile(self, q: Any) -> Any:
        """Quantiles, inside the cell of the base's quantile."""
        xp = backend(q)
        k = xp.maximum(invert_cdf(self.base, xp.asarray(q)), 0.0)
        return k - 0.5 + xp.clip((q - self._below(k)) / xp.maximum(self._mass(k), 1e-12), 0.0, 1.0)

    def moments(self) -> tuple[Any, Any]:
        """Mean and variance: the base's, and that of the cell."""
        mean, variance = moments(self.base)
        return mean, variance + 1 / 12

    @property
    def mean(self) -> Any:
        return self.moments()[0]

    @property
    def variance(self) -> Any:
        return self.moments()[1]

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        first, second = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        return self.base.sample(first, sample_shape) + jax.random.uniform(second, shape, minval=-0.5, maxval=0.5)


@register_family
class QuantileDistribution(Distribution):
    """A continuous distribution given by its quantiles: linear cdf between them, exponential tails beyond.

    The tails' rates continue the density of the outermost intervals.

    Args:
        levels: probabilities, increasing, shape (*batch, quantiles) or (quantiles,), at least two.
        values: strictly increasing quantiles, shape (*batch, quantiles).

    >>> d = QuantileDistribution(np.array([0.25, 0.75]), np.array([-1.0, 1.0]))
    >>> round(float(d.cdf(0.0)), 3), round(float(d.quantile(0.5)), 3)
    (0.5, 0.0)
    """

    arg_constraints = {"levels": constraints.real_vector, "values": constraints.real_vector}
    support = constraints.real

    def __init__(self, levels: Any, values: Any, *, validate_args: bool | None = None):
        if np.shape(levels)[-1] != np.shape(values)[-1] or np.shape(values)[-1] < 2:
            raise InputError(
                f"need at least two quantiles, one per level; got {np.shape(values)} for {np.shape(levels)}"
            )
        self.levels, self.values = levels, values
        super().__init__(
            np.broadcast_shapes(np.shape(levels)[:-1], np.shape(values)[:-1]), (), validate_args=validate_args
        )

    def parts(self) -> tuple:
        """See `register_family`."""
        return {"levels": (self.levels, 1), "values": (self.values, 1)}, (), ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> QuantileDistribution:
        """Rebuild from parts."""
        return cls(**arrays)

    def _tails(self, xp: Any) -> tuple[Any, ...]:
        """Outermost levels and quantiles, and each tail's scale: its mass over the neighbouring density."""
        p, v = xp.asarray(self.levels), xp.asarray(self.values)
        low = p[..., 0] * (v[..., 1] - v[..., 0]) / (p[..., 1] - p[..., 0])
        high = (1 - p[..., -1]) * (v[..., -1] - v[..., -2]) / (p[..., -1] - p[..., -2])
        return p[..., 0], p[..., -1], v[..., 0], v[..., -1], low, high

    def cdf(self, value: Any) -> Any:
        xp = backend(value, self.values)
        low_p, high_p, low_v, high_v, low_scale, high_scale = self._tails(xp)
        inside, _ = _piecewise_linear(value, self.values, self.levels)
        below = low_p * xp.exp(xp.minimum(value - low_v, 0.0) / low_scale)
        above = 1 - (1 - high_p) * xp.exp(-xp.maximum(value - high_v, 0.0) / high_scale)
        return xp.where(value < low_v, below, xp.where(value > high_v, above, inside))

    def log_prob(self, value: Any) -> Any:
        xp = backend(value, self.values)
        low_p, high_p, low_v, high_v, low_scale, high_scale = self._tails(xp)
        _, slope = _piecewise_linear(value, self.values, self.levels)
        below = xp.log(low_p / low_scale) + xp.minimum(value - low_v, 0.0) / low_scale
        above = xp.log((1 - high_p) / high_scale) - xp.maximum(value - high_v, 0.0) / high_scale
        return xp.where(value < low_v, below, xp.where(value > high_v, above, xp.log(slope)))

    def quantile(self, q: Any) -> Any:
        """Quantiles in closed form."""
        xp = backend(q, self.values)
        low_p, high_p, low_v, high_v, low_scale, high_scale = self._tails(xp)
        inside, _ = _piecewise_linear(q, self.levels, self.values)
        below = low_v + low_scale * xp.log(xp.minimum(q / low_p, 1.0))
        above = high_v - high_scale * xp.log(xp.minimum((1 - q) / (1 - high_p), 1.0))
        return xp.where(q < low_p, below, xp.where(q > high_p, above, inside))

    def icdf(self, q: Any) -> Any:
        return self.quantile(q)

    def moments(self) -> tuple[Any, Any]:
        """Mean and variance, by quadrature over the quantiles."""
        return _moments_from_quantiles(self.quantile, self.batch_shape, backend(self.values))

    @property
    def mean(self) -> Any:
        return self.moments()[0]

    @property
    def variance(self) -> Any:
        return self.moments()[1]

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        return self.quantile(_uniform(key, (*sample_shape, *self.batch_shape)))


def _uniform(key: Any, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=1e-6, maxval=1 - 1e-6)


def _moments_from_quantiles(quantile: Any, batch: tuple[int, ...], xp: Any, nodes: int = 64) -> tuple[Any, Any]:
    """Mean and variance by Gauss-Legendre quadrature of the quantile function over (0, 1)."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    levels = xp.asarray((x + 1) / 2).reshape(-1, *[1] * len(batch))
    weights = xp.asarray(w / 2).reshape(levels.shape)
    values = quantile(levels)
    mean = (weights * values).sum(0)
    return mean, (weights * (values - mean) ** 2).sum(0)


def through_rounding_cells(distribution: Distribution) -> Distribution:
    """A discrete distribution spread over its cells; a continuous one as it is."""
    return Dequantized(distribution) if distribution.is_discrete else distribution
