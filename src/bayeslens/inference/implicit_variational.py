"""Implicit variational inference: a neural sampler without a density, whose entropy is taken from its linearization."""

from __future__ import annotations

import functools
import itertools
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.posterior import Posterior
from bayeslens.core.randomness import fast_key, host_generator
from bayeslens.core.training import train
from bayeslens.inference.laplace import Whitening, whitening
from bayeslens.inference.pathfinder import standard_normal

_LOG_TWO_PI_E = float(np.log(2 * np.pi * np.e))
_BATCH = 64
_WIDTH = 64
_LEARNING_RATE = 3e-3
_NOISE = 0.05  # standard deviation around the sampler's value, in whitened coordinates
_EXACT_LIMIT = 32  # latent dimensions up to which the whole Jacobian is made for every draw
_MATRIX_LIMIT = 500  # dimensions above which the sampler multiplies matrices
_DENSE_LIMIT = 300
_LANCZOS_STEPS = 12


class NeuralSampler(eqx.Module):
    """theta = linear z + network(z), with latent z of any size: it begins as the linear map alone.

    Attributes:
        linear: shape (dimension, latent).
        weights: of the network's layers.
    """

    linear: Float[Array, "dimension latent"]
    weights: tuple[Array, ...]

    @classmethod
    def identity(cls, dimension: int, latent: int, rng: np.random.Generator, width: int = _WIDTH) -> NeuralSampler:
        """A sampler whose values are standard normal in as many directions as it has latent dimensions."""
        linear = np.linalg.qr(rng.normal(size=(max(dimension, latent), min(dimension, latent))))[0]
        linear = linear if dimension >= latent else linear.T
        hidden = [rng.normal(size=(width, latent)) / np.sqrt(latent), rng.normal(size=width) / 2,
                  rng.normal(size=(width, width)) / np.sqrt(width), np.zeros(width)]  # fmt: skip
        outer = [np.zeros((dimension, width)), np.zeros(dimension)]
        weights = tuple(jnp.asarray(w, float) for w in (*hidden, *outer))
        return cls(jnp.asarray(np.eye(dimension) if dimension == latent else linear, float), weights)

    @property
    def latent(self) -> int:
        """Size of z."""
        return self.linear.shape[1]

    def __call__(self, z: Float[Array, " latent"]) -> Float[Array, " dimension"]:
        first, first_bias, second, second_bias, outer, outer_bias = self.weights
        hidden = jnp.tanh(first @ z + first_bias)
        hidden = jnp.tanh(second @ hidden + second_bias)
        return self.linear @ z + outer @ hidden + outer_bias


class MatrixSampler(eqx.Module):
    """A sampler for very many dimensions: z is a matrix that is multiplied from both sides, layer by layer.

    A dense last layer would hold `width` times as many weights as there are dimensions; this one holds about four
    times the root of the dimensions, times the width.

    Attributes:
        left: of each layer, shape (rows of its result, rows of its input).
        right: of each layer, shape (columns of its input, columns of its result).
        bias: of each layer but the last, as large as its result.
        location: added at the end, shape (dimension,).
        side: rows and columns of z.
    """

    left: tuple[Array, ...]
    right: tuple[Array, ...]
    bias: tuple[Array, ...]
    location: Float[Array, " dimension"]
    side: int = eqx.field(static=True)

    @classmethod
    def random(cls, dimension: int, latent: int, rng: np.random.Generator, width: int = _WIDTH) -> MatrixSampler:
        """A sampler whose values have variances near one."""
        side, edge = max(1, int(np.sqrt(latent))), int(np.ceil(np.sqrt(dimension)))
        sizes = [side, width, edge]
        made = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), float)  # noqa: E731
        left = tuple(made(b, a) for a, b in itertools.pairwise(sizes))
        right = tuple(made(b, a).T for a, b in itertools.pairwise(sizes))
        return cls(left, right, (jnp.zeros((width, width)),), jnp.zeros(dimension), side)

    @property
    def latent(self) -> int:
        """Size of z."""
        return self.side**2

    def __call__(self, z: Float[Array, " latent"]) -> Float[Array, " dimension"]:
        x = z.reshape(self.side, self.side)
        for left, right, bias in zip(self.left, self.right, self.bias, strict=False):
            # The linear part keeps the map from folding at the start.
            x = left @ x @ right
            x = x + jnp.tanh(x + bias)
        x = self.left[-1] @ x @ self.right[-1]
        return x.reshape(-1)[: self.location.shape[0]] + self.location


def linearized_entropy(sampler: Any, z: Float[Array, " latent"], noise: Any) -> Float[Array, ""]:
    """The entropy of `sampler(z) + noise e` where the sampler is replaced by its tangent at z; e is standard normal.

    Its mean over z is exact for a linear sampler. Where a sampler folds, so that several z give one value, it is too
    large.

    Args:
        sampler: maps z to a vector.
        z: where to linearize.
        noise: standard deviation of what is added.

    >>> double = lambda z: 2 * z
    >>> round(float(linearized_entropy(double, jnp.zeros(3), 1e-3)), 3)  # 3 (log 2 + log(2 pi e) / 2)
    6.336
    """
    jacobian = jax.jacfwd(sampler)(z)
    size, latent = jacobian.shape
    gram = jacobian @ jacobian.T if size <= latent else jacobian.T @ jacobian
    small = len(gram)
    root = jnp.linalg.cholesky(gram + noise**2 * jnp.eye(small, dtype=gram.dtype))
    log_det = 2 * jnp.log(jnp.diag(root)).sum() + (size - small) * jnp.log(noise**2)
    return 0.5 * (size * _LOG_TWO_PI_E + log_det)


def entropy_bound(sampler: Any, z: Float[Array, " latent"], noise: Any) -> Float[Array, ""]:
    """A lower bound on `linearized_entropy` that needs the Jacobian's smallest singular value alone.

    It is found by Lanczos iterations on products with the Jacobian and its transpose, and differentiated along its
    singular vector. With as many iterations as latent dimensions it is exact; with fewer, an estimate from above.

    Args:
        sampler: maps z to a vector at least as long.
        z: where to linearize.
        noise: standard deviation of what is added.

    >>> stretched = lambda z: jnp.array([2.0, 3.0]) * z  # both singular values are taken as 2
    >>> round(float(entropy_bound(stretched, jnp.zeros(2), 1e-3)), 3)  # 2 (log 2 + log(2 pi e) / 2)
    4.224
    """
    value, pull = jax.vjp(sampler, z)
    push = lambda v: jax.jvp(sampler, (z,), (v,))[1]  # noqa: E731
    direction = jax.lax.stop_gradient(_smallest_direction(lambda v: pull(push(v))[0], z))
    squared = (push(direction) ** 2).sum()
    size, latent = value.shape[0], z.shape[0]
    log_det = latent * jnp.log(squared + noise**2) + (size - latent) * jnp.log(noise**2)
    return 0.5 * (size * _LOG_TWO_PI_E + log_det)


def _smallest_direction(multiply: Any, z: Array) -> Array:
    """The eigenvector of the smallest eigenvalue of a symmetric matrix, by Lanczos with full orthogonalization."""
    size = z.shape[0]
    steps = min(size, _LANCZOS_STEPS)
    # Some fixed vector without symmetry, that no eigenvector is likely to be orthogonal to.
    start = jnp.asarray(np.random.default_rng(0).normal(size=size), z.dtype)
    basis = jnp.zeros((steps, size), z.dtype).at[0].set(start / jnp.linalg.norm(start))

    def extend(i: Array, basis: Array) -> Array:
        new = multiply(basis[i])
        for _ in range(2):
            new = new - basis.T @ (basis @ new)
        length = jnp.linalg.norm(new)
        return basis.at[i + 1].set(jnp.where(length > 1e-6, new / jnp.maximum(length, 1e-30), 0.0))

    basis = jax.lax.fori_loop(0, steps - 1, extend, basis)
    projected = basis @ jax.lax.map(multiply, basis).T
    # Directions that were not found must not look small; those that were have length one but for rounding.
    lost = jnp.diag(jnp.where((basis**2).sum(1) < 0.5, 1e6 * (1 + jnp.abs(projected).max()), 0.0))
    return jnp.linalg.eigh((projected + projected.T) / 2 + lost)[1][:, 0] @ basis


class _Problem(NamedTuple):
    """What is trained: the sampler. NumPy arrays stay as they are."""

    sampler: Any
    conditioned: ConditionedModel
    white: Whitening
    noise: np.ndarray


def _gains(problem: _Problem, key: Any) -> tuple[Array, Array]:
    """For a batch, log joint densities whose gradients are cleaned, and linearized entropies."""
    sampler, conditioned, white, noise = problem
    size = conditioned.dimension
    numbers = jax.random.normal(key, (_BATCH, sampler.latent + size), white.center.dtype)
    z, shift = numbers[:, : sampler.latent], noise * numbers[:, sampler.latent :]
    u = jax.vmap(sampler)(z) + shift
    fixed = jax.lax.stop_gradient(u)
    value, slope = jax.vmap(jax.value_and_grad(lambda u: conditioned.log_prob(white.vector(u))))(fixed)
    fine = jnp.isfinite(value) & jnp.isfinite(slope).all(-1)
    value = jnp.where(fine, value, jnp.min(jnp.where(fine, value, jnp.inf)) - 10)
    slope = jnp.where(fine[:, None], slope, 0.0)
    # One draw far out must not undo what many have learned.
    limit = 10 * jnp.sqrt(jnp.asarray(size, u.dtype))
    slope = slope * jnp.minimum(1.0, limit / jnp.maximum(jnp.linalg.norm(slope, axis=1, keepdims=True), 1e-30))
    along = (slope * u).sum(-1)
    exact = min(size, sampler.latent) <= _EXACT_LIMIT or sampler.latent > size
    entropy = jax.vmap(lambda z: (linearized_entropy if exact else entropy_bound)(sampler, z, noise))(z)
    return value + along - jax.lax.stop_gradient(along), entropy


def _loss(problem: _Problem, batch: None, key: Any) -> Float[Array, ""]:
    log_joint, entropy = _gains(problem, key)
    return -(log_joint + entropy).mean()


@eqx.filter_jit
def _draw(problem: _Problem, numbers: Array) -> Array:
    sampler, _, white, noise = problem

    def one(numbers: Array) -> Array:
        return white.vector(sampler(numbers[: sampler.latent]) + noise * numbers[sampler.latent :])

    return jax.lax.map(one, numbers, batch_size=min(len(numbers), 250))


class ImplicitVariational(Engine):
    """Implicit variational inference: draws are a network's values plus a little noise.

    The network takes any shape that its draws need: curved, with several modes, on thin ridges. It has no density, so
    that there is no k-hat; its entropy is that of its local linearization, exact in up to 32 latent dimensions and
    bounded by the Jacobian's smallest singular value above. Above 500 dimensions the sampler multiplies matrices, so
    that it has far fewer weights than the posterior has dimensions.

    `log_evidence_bound` holds for the linearized sampler: where the network folds, it can be too large.

    Args:
        num_samples: independent draws.
        num_steps: of training, at a learning rate that falls to zero.
        latent: dimensions of the network's input; by default those of the posterior, at most 32.

    Source: A. Uppal, K. Stensbo-Smidt, W. Boomsma, J. Frellsen, "Implicit variational inference for high-dimensional
    posteriors" (2023).
    """

    name: ClassVar[str] = "implicit"

    num_samples: int = 4000
    num_steps: int = 3000
    latent: int | None = None

    def __check_init__(self):
        check_counts(self, "num_samples", "num_steps", "latent")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("implicit variational inference")
        problem = self._problem(conditioned, key)
        rate = _schedule(self.num_steps)
        fast = fast_key(key)
        trained, history = train(
            _loss, problem, None, key=fast, num_steps=self.num_steps, learning_rate=rate, check_every=100
        )
        shape = (self.num_samples, trained.sampler.latent + conditioned.dimension)
        vectors = _draw(trained, standard_normal(jax.random.fold_in(key, 2), shape))
        bound = problem.white.log_det - float(history.checks.min())
        posterior = posterior_of(self, conditioned, np.asarray(vectors)[None], key=key, log_evidence_bound=bound)
        early = ("training was interrupted: the approximation is the best so far",)
        return posterior.doubted(early if history.stopped == "interrupted" else ())

    def _problem(self, conditioned: ConditionedModel, key: Any) -> _Problem:
        size = conditioned.dimension
        white = whitening(conditioned, jax.random.fold_in(key, 0), dense=size <= _DENSE_LIMIT)
        rng = host_generator(jax.random.fold_in(key, 1))
        latent = min(size, _EXACT_LIMIT) if self.latent is None else self.latent
        kind = NeuralSampler.identity if size <= _MATRIX_LIMIT else MatrixSampler.random
        conditioned = jax.tree.map(np.asarray, conditioned)  # NumPy arrays are not trained
        return _Problem(kind(size, latent, rng), conditioned, white, np.asarray(_NOISE, white.center.dtype))


@functools.lru_cache
def _schedule(num_steps: int) -> Any:
    """One schedule per length, so that later trainings find their program compiled."""
    import optax

    return optax.cosine_decay_schedule(_LEARNING_RATE, num_steps)
