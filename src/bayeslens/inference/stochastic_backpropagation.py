"""Deep latent Gaussian models: generative and recognition networks fitted jointly by gradients through random numbers.

Source: D. Rezende, S. Mohamed, D. Wierstra, "Stochastic backpropagation and approximate inference in deep generative
models" (2014).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from numpyro.distributions import Bernoulli, Distribution, Independent, Normal, constraints
from numpyro.distributions.util import validate_sample

from bayeslens.core.density import over_leading_axes
from bayeslens.core.distribution import build, register_family
from bayeslens.core.errors import InputError
from bayeslens.core.training import History, train

IDENTITIES = ("bonnet_price", "reparameterization")
LIKELIHOODS = ("bernoulli", "normal")
_LOG_TWO_PI = float(np.log(2 * np.pi))
_ROWS_AT_ONCE = 64  # whose importance samples are held in memory together


class GaussianGradient(NamedTuple):
    """The gradient of the mean of a function of a normal vector.

    Attributes:
        mean: in the mean.
        covariance: in the covariance, whose entries are taken as independent; symmetric.
        root: in the root, where the covariance is root @ root.T.
    """

    mean: Float[Array, " dimension"]
    covariance: Float[Array, "dimension dimension"]
    root: Float[Array, "dimension dimension"]


def gaussian_gradient(
    function: Callable[[Float[Array, " dimension"]], Float[Array, ""]],
    mean: Float[ArrayLike, " dimension"],
    root: Float[ArrayLike, "dimension dimension"],
    *,
    key: Any,
    num_samples: int = 1000,
    identity: str = "bonnet_price",
) -> GaussianGradient:
    """An unbiased estimate of the gradient of E f(x), where x is normal with this mean and covariance root @ root.T.

    "bonnet_price" takes the mean gradient and half the mean Hessian of f (Bonnet 1964, Price 1958): exact, without any
    noise, for the mean of linear and the covariance of quadratic functions. "reparameterization" needs the gradient
    alone: it is cheaper in many dimensions, and noisier in the covariance.

    Args:
        function: differentiable; twice, for "bonnet_price".
        mean: of x.
        root: a square, invertible root of the covariance, triangular or not.
        key: a `jax.random.key`.
        num_samples: draws that are averaged; 1,000 make errors of about a thirtieth of the spread.
        identity: one of the two.

    Raises:
        InputError: an unknown identity, shapes that do not fit, or no draws.

    Source: D. Rezende, S. Mohamed, D. Wierstra (2014).

    >>> square = lambda x: x @ x
    >>> found = gaussian_gradient(square, jnp.zeros(2), 3 * jnp.eye(2), key=jax.random.key(0), num_samples=2)
    >>> found.covariance.tolist(), found.root.tolist()  # E x'x is the trace of the covariance
    ([[1.0, 0.0], [0.0, 1.0]], [[6.0, 0.0], [0.0, 6.0]])
    """
    mean, root = jnp.asarray(mean, float), jnp.asarray(root, float)
    if identity not in IDENTITIES:
        raise InputError(f"unknown identity {identity!r}: use one of {', '.join(IDENTITIES)}")
    if mean.ndim != 1 or root.shape != (mean.size, mean.size):
        raise InputError(f"mean must be a vector and root a square of its size, got {mean.shape} and {root.shape}")
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    noise = jax.random.normal(key, (num_samples, mean.size), mean.dtype)
    points = mean + noise @ root.T
    slopes = jax.vmap(jax.grad(function))(points)
    if identity == "bonnet_price":
        hessian = jax.lax.map(jax.hessian(function), points, batch_size=min(num_samples, 256)).mean(0)
        return GaussianGradient(slopes.mean(0), hessian / 2, hessian @ root)
    by_root = slopes.T @ noise / num_samples
    covariance = jnp.linalg.solve(root.T, by_root.T).T / 2
    return GaussianGradient(slopes.mean(0), (covariance + covariance.T) / 2, by_root)


@register_family
class StructuredGaussian(Distribution):
    """A normal vector whose precision is diagonal plus a rank of one: drawn and evaluated in linear time.

    It knows correlations along one direction, at the price of independent dimensions.

    Args:
        loc: mean, shape (*batch, dimension).
        diagonal: of the precision, positive, shape (*batch, dimension).
        direction: u in the precision diag(diagonal) + u u', shape (*batch, dimension).

    Source: D. Rezende, S. Mohamed, D. Wierstra (2014).

    >>> d = StructuredGaussian(jnp.zeros(2), jnp.ones(2), jnp.array([1.0, 1.0]))
    >>> d.variance.round(4).tolist() == jnp.diag(jnp.linalg.inv(jnp.eye(2) + 1)).round(4).tolist()
    True
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "diagonal": constraints.independent(constraints.positive, 1),
        "direction": constraints.real_vector,
    }
    reparametrized_params = ["loc", "diagonal", "direction"]
    support = constraints.real_vector
    pytree_data_fields = ("loc", "diagonal", "direction")

    def __init__(self, loc: ArrayLike, diagonal: ArrayLike, direction: ArrayLike, *, validate_args: bool | None = None):
        self.loc, self.diagonal, self.direction = (jnp.asarray(a, float) for a in (loc, diagonal, direction))
        sizes = {a.shape[-1:] for a in (self.loc, self.diagonal, self.direction)}
        if len(sizes) > 1 or () in sizes:
            raise InputError(f"loc, diagonal and direction must have equally many entries, got last axes {sizes}")
        shapes = [a.shape[:-1] for a in (self.loc, self.diagonal, self.direction)]
        super().__init__(jnp.broadcast_shapes(*shapes), self.loc.shape[-1:], validate_args=validate_args)

    def parts(self) -> tuple:
        """See `register_family`."""
        return {name: (getattr(self, name), 1) for name in self.pytree_data_fields}, (), ()

    @classmethod
    def from_parts(cls, arrays: dict, children: list, settings: tuple) -> StructuredGaussian:
        """Rebuild from parts."""
        return build(cls, **arrays)

    @property
    def _stretch(self) -> Array:
        """u' D^-1 u: by one more than this, the direction adds to the precision's determinant."""
        return (self.direction**2 / self.diagonal).sum(-1)

    @property
    def log_det_covariance(self) -> Float[Array, "*batch"]:
        """Log determinant of the covariance."""
        return -jnp.log(self.diagonal).sum(-1) - jnp.log1p(self._stretch)

    @property
    def mean(self) -> Float[Array, "*batch dimension"]:
        """Mean."""
        return jnp.broadcast_to(self.loc, (*self.batch_shape, *self.event_shape))

    @property
    def variance(self) -> Float[Array, "*batch dimension"]:
        """Variances, in linear time."""
        return 1 / self.diagonal - (self.direction / self.diagonal) ** 2 / (1 + self._stretch[..., None])

    def entropy(self) -> Float[Array, "*batch"]:
        """Differential entropy in nats."""
        return 0.5 * (self.event_shape[0] * (1 + _LOG_TWO_PI) + self.log_det_covariance)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape dimension"]:
        """Draws, differentiable in the parameters."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        white = jax.random.normal(key, shape, self.loc.dtype) / jnp.sqrt(self.diagonal)
        shrunk = jax.lax.rsqrt(1 + self._stretch)
        # (1 - shrunk) / stretch, in a form that is fine where the direction is zero.
        along = (self.direction * white).sum(-1) * shrunk**2 / (1 + shrunk)
        return self.loc + white - along[..., None] * self.direction / self.diagonal

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Float[Array, "*shape"]:
        """Log density."""
        away = jnp.asarray(value) - self.loc
        squared = (self.diagonal * away**2).sum(-1) + (self.direction * away).sum(-1) ** 2
        return -0.5 * (squared + self.event_shape[0] * _LOG_TWO_PI + self.log_det_covariance)


def _divergence_from_standard(q: StructuredGaussian) -> Float[Array, "*batch"]:
    """Kullback-Leibler divergence of the standard normal distribution from q."""
    return 0.5 * ((q.variance + q.loc**2 - 1).sum(-1) - q.log_det_covariance)


class DeepLatentGaussian(eqx.Module):
    """A deep latent Gaussian model, with its recognition network.

    Noise xi of every layer is standard normal. Layers go down by h = network(h of the layer above) + root xi, the top
    one by h = root xi, and a last network gives the observation's mean (normal) or logits (bernoulli). The recognition
    network gives a `StructuredGaussian` for the noise of each layer, independent between layers. It is a pytree whose
    networks, roots and noise scale are trained by `train` with `free_energy`; `deep_latent_gaussian` does both.

    Attributes:
        recognition: from standardized features to location, log diagonal and direction of all layers.
        generator: networks, the one to the features first.
        roots: of each layer's noise, the bottom layer first.
        log_scale: log standard deviation of the features given h, one for all; None for bernoulli features.
        center, spread: of the features, by which they are standardized; NumPy arrays, which are not trained.
        latents: dimensions of the layers, the bottom layer first.

    Source: D. Rezende, S. Mohamed, D. Wierstra (2014).
    """

    recognition: eqx.nn.MLP
    generator: tuple[eqx.nn.MLP, ...]
    roots: tuple[Float[Array, "latent latent"], ...]
    log_scale: Float[Array, ""] | None
    center: Float[np.ndarray, " features"]
    spread: Float[np.ndarray, " features"]
    latents: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def initial(
        cls, x: Float[ArrayLike, "rows features"], *, key: Any, latents: int | tuple[int, ...] = 2,
        likelihood: str = "normal", width: int = 64, depth: int = 1,
    ) -> DeepLatentGaussian:  # fmt: skip
        """An untrained model whose decoder begins at the features' means; arguments as for `deep_latent_gaussian`."""
        latents = (latents,) if isinstance(latents, int) else tuple(latents)
        if not latents or min(latents) < 1 or width < 1 or depth < 0:
            raise InputError(f"latents {latents} and width {width} must be at least 1, depth {depth} at least 0")
        if likelihood not in LIKELIHOODS:
            raise InputError(f"unknown likelihood {likelihood!r}: use one of {', '.join(LIKELIHOODS)}")
        x = np.asarray(_rows(x), float)
        if likelihood == "bernoulli" and not ((x >= 0) & (x <= 1)).all():
            raise InputError(f"bernoulli features lie in 0 to 1, got {x.min()} to {x.max()}: use likelihood='normal'")
        keys = jax.random.split(_fast(key), len(latents) + 1)
        network = functools.partial(eqx.nn.MLP, width_size=width, depth=depth, activation=jnp.tanh)
        recognition = network(x.shape[1], 3 * sum(latents), key=keys[0])
        sizes = (x.shape[1], *latents)
        generator = [network(b, a, key=k) for (a, b), k in zip(itertools.pairwise(sizes), keys[1:], strict=True)]
        center, spread = x.mean(0), np.full(x.shape[1], max(x.std(), 1e-6))
        start = center
        if likelihood == "bernoulli":
            start = np.log(np.clip(center, 0.01, 0.99) / np.clip(1 - center, 0.01, 0.99))
        generator[0] = eqx.tree_at(lambda net: net.layers[-1].bias, generator[0], jnp.asarray(start, float))
        return cls(
            recognition,
            tuple(generator),
            tuple(jnp.eye(size) for size in latents),
            jnp.log(jnp.asarray(spread[0], float)) if likelihood == "normal" else None,
            np.asarray(center, jnp.zeros(()).dtype),
            np.asarray(spread, jnp.zeros(()).dtype),
            latents,
        )

    def posterior(self, x: Float[ArrayLike, "*batch features"]) -> tuple[StructuredGaussian, ...]:
        """What the recognition network believes of each layer's noise, the bottom layer first; means are embeddings."""
        standardized = (jnp.asarray(x, self.roots[0].dtype) - self.center) / self.spread
        found = over_leading_axes(self.recognition, 1, result_ndim=1)(standardized)
        loc, log_diagonal, direction = jnp.split(found, 3, axis=-1)
        ends = [0, *itertools.accumulate(self.latents)]
        parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        return tuple(
            build(StructuredGaussian, loc=loc[..., p], diagonal=jnp.exp(log_diagonal[..., p]),
                  direction=direction[..., p]) for p in parts
        )  # fmt: skip

    def decode(self, noise: tuple[Float[Array, "*batch latent"], ...]) -> Distribution:
        """The distribution of the features given the noise of each layer; batch shape *batch."""
        hidden = None
        for layer in reversed(range(len(self.latents))):
            moved = noise[layer] @ self.roots[layer].T
            if hidden is not None:
                moved = moved + over_leading_axes(self.generator[layer + 1], 1, result_ndim=1)(hidden)
            hidden = moved
        found = over_leading_axes(self.generator[0], 1, result_ndim=1)(hidden)
        if self.log_scale is None:
            return Independent(Bernoulli(logits=found, validate_args=False), 1)
        return Independent(Normal(found, jnp.exp(self.log_scale), validate_args=False), 1)

    def elbo(self, x: Float[ArrayLike, "rows features"], *, key: Any, num_samples: int = 1) -> Float[Array, " rows"]:
        """An unbiased estimate of the evidence lower bound of each row, in nats.

        Args:
            x: rows of features.
            key: a `jax.random.key`.
            num_samples: draws of the noise; the divergence from the prior is exact.
        """
        return _elbo(self, _rows(x), _fast(key), _positive("num_samples", num_samples))

    def log_likelihood_bound(
        self, x: Float[ArrayLike, "rows features"], num_samples: int, *, key: Any
    ) -> Float[Array, " rows"]:
        """The importance weighted bound of each row's log likelihood, in nats: the tighter, the more samples.

        Args:
            x: rows of features.
            num_samples: of the noise, whose importance weights are averaged.
            key: a `jax.random.key`.

        Source: Y. Burda, R. Grosse, R. Salakhutdinov, "Importance weighted autoencoders" (2016).
        """
        return _importance_bound(self, _rows(x), _fast(key), _positive("num_samples", num_samples))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*shape features"]:
        """New rows: noise from the prior, features from their distribution."""
        return _sample(self, _fast(key), tuple(sample_shape))

    def impute(
        self, x: Float[ArrayLike, "rows features"], *, key: Any, num_samples: int = 100, burn_in: int = 100
    ) -> Float[Array, "num_samples rows features"]:
        """Completed rows, where NaN stands for what is missing: states of a Markov chain.

        In turns, noise is drawn by the recognition network from the completed row, and what is missing from the
        decoder. Were the recognition exact, this would be Gibbs sampling of the joint distribution. Where little noise
        is left to the features, a chain hardly leaves what it once filled in: repeat a row for several chains.

        Args:
            x: rows of features; NaN is missing.
            key: a `jax.random.key`.
            num_samples: states that are kept.
            burn_in: steps before, which are forgotten.

        Raises:
            InputError: a row without any feature that is known, or numbers that are not positive.

        Source: D. Rezende, S. Mohamed, D. Wierstra (2014).
        """
        x = _rows(x, missing=True)
        empty = np.isnan(np.asarray(x)).all(1)
        if empty.any():
            raise InputError(f"row {int(np.argmax(empty))} has no known feature: use sample for rows from nothing")
        _positive("burn_in", burn_in)
        return _impute(self, x, _fast(key), _positive("num_samples", num_samples), burn_in)


def _fast(key: Any) -> Any:
    """The same key for a generator that is quick to compile."""
    return jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2)[:4], impl="rbg")


def _rows(x: Any, missing: bool = False) -> Array:
    x = jnp.asarray(x, float)
    if x.ndim != 2 or not x.size:
        raise InputError(f"x must have shape (rows, features), got {x.shape}")
    if not isinstance(x, jax.core.Tracer):
        bad = ~np.isfinite(np.asarray(x)) & ~(np.isnan(np.asarray(x)) & missing)
        if bad.any():
            raise InputError(
                f"x holds {int(bad.sum())} NaN or infinite values: drop these rows, or impute with a model"
            )
    return x


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
    return value


def free_energy(model: DeepLatentGaussian, x: Float[Array, "rows features"], key: Any) -> Float[Array, ""]:
    """The mean negative evidence bound of rows, from one draw each: what `train` minimizes."""
    layers = model.posterior(x)
    noise = tuple(q.sample(k) for q, k in zip(layers, jax.random.split(key, len(layers)), strict=True))
    return (sum(_divergence_from_standard(q) for q in layers) - model.decode(noise).log_prob(x)).mean()


@eqx.filter_jit
def _elbo(model: DeepLatentGaussian, x: Array, key: Any, num_samples: int) -> Array:
    layers = model.posterior(x)
    divergence = sum(_divergence_from_standard(q) for q in layers)

    def one(key: Any) -> Array:
        noise = tuple(q.sample(k) for q, k in zip(layers, jax.random.split(key, len(layers)), strict=True))
        return model.decode(noise).log_prob(x)

    return jax.lax.map(one, jax.random.split(key, num_samples)).mean(0) - divergence


@eqx.filter_jit
def _importance_bound(model: DeepLatentGaussian, x: Array, key: Any, num_samples: int) -> Array:
    def row(pair: tuple[Array, Any]) -> Array:
        row, key = pair
        layers = model.posterior(row)
        keys = jax.random.split(key, len(layers))
        noise = tuple(q.sample(k, (num_samples,)) for q, k in zip(layers, keys, strict=True))
        ratios = [-0.5 * ((z**2).sum(-1) + z.shape[-1] * _LOG_TWO_PI) - q.log_prob(z)
                  for q, z in zip(layers, noise, strict=True)]  # fmt: skip
        return jax.nn.logsumexp(model.decode(noise).log_prob(row) + sum(ratios)) - jnp.log(1.0 * num_samples)

    return jax.lax.map(row, (x, jax.random.split(key, len(x))), batch_size=min(len(x), _ROWS_AT_ONCE))


@eqx.filter_jit
def _sample(model: DeepLatentGaussian, key: Any, shape: tuple[int, ...]) -> Array:
    keys = jax.random.split(key, len(model.latents) + 1)
    pairs = zip(keys[1:], model.latents, strict=True)
    noise = tuple(jax.random.normal(k, (*shape, size), model.roots[0].dtype) for k, size in pairs)
    return jnp.asarray(model.decode(noise).sample(keys[0]), model.roots[0].dtype)


@eqx.filter_jit
def _impute(model: DeepLatentGaussian, x: Array, key: Any, num_samples: int, burn_in: int) -> Array:
    missing = jnp.isnan(x)

    def step(completed: Array, key: Any) -> Array:
        keys = jax.random.split(key, len(model.latents) + 1)
        noise = tuple(q.sample(k) for q, k in zip(model.posterior(completed), keys[1:], strict=True))
        return jnp.where(missing, model.decode(noise).sample(keys[0]), x)

    first, *keys = jax.random.split(key, 3)
    completed = jnp.where(missing, _sample(model, first, x.shape[:1]), x)
    take = lambda carry, key: (step(carry, key), None)  # noqa: E731
    completed, _ = jax.lax.scan(take, completed, jax.random.split(keys[0], burn_in))
    keep = lambda carry, key: (new := step(carry, key), new)  # noqa: E731
    return jax.lax.scan(keep, completed, jax.random.split(keys[1], num_samples))[1]


def deep_latent_gaussian(
    x: Float[ArrayLike, "rows features"],
    *,
    key: Any,
    latents: int | tuple[int, ...] = 2,
    likelihood: str = "normal",
    width: int = 64,
    depth: int = 1,
    num_steps: int = 3000,
    batch_size: int | None = 128,
    learning_rate: float | Callable = 2e-3,
    validation: float | None = None,
    patience: int | None = None,
) -> tuple[DeepLatentGaussian, History]:
    """Fit a deep latent Gaussian model and its recognition network together, by stochastic backpropagation.

    Args:
        x: rows of features, without NaN; in 0 to 1 for "bernoulli". Those of a "normal" likelihood share one noise
            scale, so that they should be in one unit, or standardized.
        key: a `jax.random.key`.
        latents: dimensions of the stochastic layers, the bottom one first; two by default, for pictures.
        likelihood: "normal" or "bernoulli" features, independent given the latents.
        width: of each network's hidden layers.
        depth: hidden layers of each network; 0 makes all linear: with "normal", probabilistic principal components.
        num_steps, batch_size, learning_rate, validation, patience: as for `train`.

    Returns:
        the model, and how the training went.

    Raises:
        InputError: features that do not fit the likelihood, NaN, or settings below 1; and as `train`.

    Source: D. Rezende, S. Mohamed, D. Wierstra (2014).

    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> model, history = deep_latent_gaussian(x, key=jax.random.key(0), num_steps=2, depth=0)
    >>> model.posterior(x)[0].mean.shape, history.losses.shape
    ((50, 2), (2,))
    """
    for_weights, for_steps = jax.random.split(key)
    sizes = {"latents": latents, "likelihood": likelihood, "width": width, "depth": depth}
    model = DeepLatentGaussian.initial(x, key=for_weights, **sizes)
    return train(
        free_energy, model, _rows(x), key=_fast(for_steps), num_steps=num_steps, batch_size=batch_size,
        learning_rate=learning_rate, validation=validation, patience=patience,
    )  # fmt: skip
