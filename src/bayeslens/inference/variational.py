"""Variational inference: the member of a family of densities that is closest to the posterior, by gradients.

Families are normal with independent or dependent dimensions, and normalizing flows. They live in coordinates that a
quick approximation (Laplace's or Pathfinder's) has whitened, so that one learning rate serves all models.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.randomness import fast_key
from bayeslens.core.training import train
from bayeslens.inference.diagnostics import (
    K_HAT_LIMIT,
    doubts_of_weights,
    importance_evidence,
    pareto_k,
    pareto_smoothed,
)
from bayeslens.inference.laplace import Whitening, whitening
from bayeslens.inference.pathfinder import standard_normal

BATCH = 256  # draws per step
CHECK_EVERY = 50
PATIENCE = 8  # checks without a better bound; the learning rate falls to a quarter after every second
_DENSE_LIMIT = 2000  # dimensions up to which a matrix of them is kept
_GOOD_K_HAT = 0.5  # below, importance weights have finite variance and nothing is left to mend
_LARGEST_LOG_SCALE = 4.0
_MASS_COVERING = 0.7  # share of the inclusive divergence in the second stage
_LOG_TWO_PI = float(np.log(2 * np.pi))


class AffineLayer(eqx.Module):
    """u = location + lower z, where `lower` is triangular, or diagonal if `below` is None.

    Attributes:
        location: shape (dimension,).
        log_diagonal: of the triangular matrix, shape (dimension,).
        below: entries below the diagonal, shape (dimension, dimension); what is not below is not looked at.
    """

    location: Float[Array, " dimension"]
    log_diagonal: Float[Array, " dimension"]
    below: Float[Array, "dimension dimension"] | None

    def transform(self, z: Array) -> tuple[Array, Array]:
        """u and the log determinant."""
        mixed = 0.0 if self.below is None else jnp.tril(self.below, -1) @ z
        return self.location + jnp.exp(self.log_diagonal) * z + mixed, self.log_diagonal.sum()

    def invert(self, u: Array) -> tuple[Array, Array]:
        """z and the log determinant of the map from u to z."""
        u = u - self.location
        if self.below is None:
            z = u * jnp.exp(-self.log_diagonal)
        else:
            lower = jnp.tril(self.below, -1) + jnp.diag(jnp.exp(self.log_diagonal))
            # The inverse is made once for all draws: many small solves take far longer.
            z = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(u), dtype=u.dtype), lower=True) @ u
        return z, -self.log_diagonal.sum()


class CouplingLayers(eqx.Module):
    """Some dimensions are bent in dependence on the others, in turns.

    A bend is x -> shift + exp(log_scale) sinh(exp(log_tail) arcsinh(x) + skew): it can lean, and has lighter or
    heavier tails than what it is given (M. Jones, A. Pewsey, "Sinh-arcsinh distributions", 2009), and has no bounded
    region outside of which tails stay as they are. All start as the identity.

    Attributes:
        masks: ones where a dimension is looked at, zeros where it is bent, shape (layers, dimension).
        weights: of each layer's network, each with a leading axis of layers.
    """

    masks: Float[np.ndarray, "layers dimension"]
    weights: tuple[Array, ...]

    @classmethod
    def identity(cls, dimension: int, layers: int, width: int, seed: Any) -> CouplingLayers:
        """Layers that do nothing yet, looking at random halves of the dimensions in turns."""
        rng = np.random.default_rng(seed)
        masks = []
        for _ in range(-(-layers // 2)):
            seen = np.isin(np.arange(dimension), rng.permutation(dimension)[: dimension // 2])
            masks += [seen, ~seen if dimension > 1 else seen]
        shapes = [(width, dimension), (width,), (width, width), (width,)]
        hidden = [rng.normal(size=(layers, *s)) / np.sqrt(s[-1]) * (len(s) > 1) for s in shapes]
        outer = [np.zeros((layers, 4 * dimension, width)), np.zeros((layers, 4 * dimension))]
        return cls(np.asarray(masks[:layers], float), tuple(jnp.asarray(w, float) for w in (*hidden, *outer)))

    def _bend(self, mask: Array, weights: tuple[Array, ...], x: Array) -> Array:
        """shift, log_scale, log_tail and skew of every dimension, shape (4, dimension); zeros where it is seen."""
        first, first_bias, second, second_bias, outer, outer_bias = weights
        hidden = jax.nn.silu(first @ (mask * x) + first_bias)
        hidden = jax.nn.silu(second @ hidden + second_bias)
        found = (outer @ hidden + outer_bias).reshape(4, -1) * (1 - mask)
        limits = jnp.array([jnp.inf, _LARGEST_LOG_SCALE, 1.0, 2.0], x.dtype)[1:, None]
        return jnp.concatenate([found[:1], limits * jnp.tanh(found[1:] / limits)])

    def transform(self, z: Array) -> tuple[Array, Array]:
        """u and the log determinant."""

        def layer(carry: tuple[Array, Array], parts: tuple) -> tuple[tuple[Array, Array], None]:
            x, log_det = carry
            shift, log_scale, log_tail, skew = self._bend(*parts, x)
            inner = jnp.exp(log_tail) * jnp.arcsinh(x) + skew
            slope = log_scale + log_tail + _log_cosh(inner) - 0.5 * jnp.log1p(x**2)
            return (shift + jnp.exp(log_scale) * jnp.sinh(inner), log_det + (slope * (1 - parts[0])).sum()), None

        return jax.lax.scan(layer, (z, jnp.zeros((), z.dtype)), (self.masks, self.weights))[0]

    def invert(self, u: Array) -> tuple[Array, Array]:
        """z and the log determinant of the map from u to z."""

        def layer(carry: tuple[Array, Array], parts: tuple) -> tuple[tuple[Array, Array], None]:
            y, log_det = carry
            shift, log_scale, log_tail, skew = self._bend(*parts, y)
            y = (y - shift) * jnp.exp(-log_scale)
            inner = jnp.arcsinh(y)
            outer = (inner - skew) * jnp.exp(-log_tail)
            slope = -log_scale - log_tail + _log_cosh(outer) - 0.5 * jnp.log1p(y**2)
            return (jnp.sinh(outer), log_det + (slope * (1 - parts[0])).sum()), None

        return jax.lax.scan(layer, (u, jnp.zeros((), u.dtype)), (self.masks, self.weights), reverse=True)[0]


def _log_cosh(x: Array) -> Array:
    return jnp.logaddexp(x, -x) - jnp.log(2.0).astype(x.dtype)


class Guide(eqx.Module):
    """A density by change of variables: standard normal numbers through layers, then out of whitened coordinates."""

    layers: tuple[Any, ...]
    white: Whitening

    def transform(self, z: Float[Array, " dimension"]) -> tuple[Float[Array, " dimension"], Float[Array, ""]]:
        """Whitened coordinates u of standard normal numbers, and the log density of u."""
        log_q = -0.5 * (z**2).sum() - 0.5 * z.shape[0] * _LOG_TWO_PI
        for layer in self.layers:
            z, log_det = layer.transform(z)
            log_q = log_q - log_det
        return z, log_q

    def log_prob(self, u: Float[Array, " dimension"]) -> Float[Array, ""]:
        """Log density of whitened coordinates."""
        total = jnp.zeros((), u.dtype)
        for layer in reversed(self.layers):
            u, log_det = layer.invert(u)
            total = total + log_det
        return total - 0.5 * (u**2).sum() - 0.5 * u.shape[0] * _LOG_TWO_PI


class _Problem(NamedTuple):
    """What is trained: the guide's layers. NumPy arrays stay as they are, the data and `covering` among them."""

    guide: Guide
    conditioned: ConditionedModel
    covering: np.ndarray  # share of the inclusive divergence


def _loss(problem: _Problem, batch: None, key: Any) -> Float[Array, ""]:
    """A Monte Carlo estimate of the divergence, whose gradient takes the path through the draws alone.

    The exclusive divergence has the gradient -E[(grad log p - grad log q) du], the inclusive one the same weighted by
    the importance weights (G. Roeder, Y. Wu, D. Duvenaud 2017; L. Vaitl, K. Nicoli, S. Nakajima, P. Kessel 2022);
    both vanish draw by draw where guide and posterior agree.
    """
    guide, conditioned, covering = problem
    dtype = guide.white.center.dtype
    z = jax.random.normal(key, (BATCH, conditioned.dimension), dtype)
    u, _ = jax.vmap(guide.transform)(z)
    fixed, still = jax.lax.stop_gradient((u, guide))
    log_p, slope_p = jax.vmap(jax.value_and_grad(lambda u: conditioned.log_prob(guide.white.vector(u))))(fixed)
    log_q, slope_q = jax.vmap(jax.value_and_grad(still.log_prob))(fixed)
    ratio, pull = log_p - log_q, slope_p - slope_q
    fine = jnp.isfinite(ratio) & jnp.isfinite(pull).all(-1)
    ratio = jnp.where(fine, ratio, jnp.min(jnp.where(fine, ratio, jnp.inf)) - 10)
    pull = jnp.where(fine[:, None], pull, 0.0)
    # One draw far out must not undo what many have learned.
    limit = 10 * jnp.sqrt(jnp.asarray(z.shape[1], dtype))
    pull = pull * jnp.minimum(1.0, limit / jnp.maximum(jnp.linalg.norm(pull, axis=1, keepdims=True), 1e-30))
    weights = jax.nn.softmax(ratio)
    weights = jnp.minimum(weights, 1 / jnp.sqrt(1.0 * BATCH))
    share = (1 - covering) / BATCH + covering * weights / weights.sum()
    along = -(share[:, None] * jax.lax.stop_gradient(pull) * u).sum()
    log_inverse_size = jnp.log(BATCH * (weights**2).sum())
    value = jnp.where(covering > 0, log_inverse_size, -ratio.mean())
    return jax.lax.stop_gradient(value) + along - jax.lax.stop_gradient(along)


@functools.lru_cache
def adam_until_plateau(learning_rate: float) -> Any:
    """Adam whose learning rate falls to a quarter whenever the bound stops to improve."""
    import optax

    plateau = optax.contrib.reduce_on_plateau(
        factor=0.25, patience=PATIENCE // 4, rtol=0.0, atol=1e-3, accumulation_size=CHECK_EVERY
    )
    return optax.chain(optax.adam(learning_rate), plateau)


@eqx.filter_jit
def _draw(
    conditioned: ConditionedModel, guide: Guide, noise: Float[Array, "draws dimension"]
) -> tuple[Float[Array, "draws dimension"], Float[Array, " draws"]]:
    """Unconstrained vectors of a guide and their log importance ratios, but for a constant."""

    def one(z: Array) -> tuple[Array, Array]:
        u, log_q = guide.transform(z)
        vector = guide.white.vector(u)
        return vector, conditioned.log_prob(vector) - log_q

    vectors, ratios = jax.lax.map(one, noise, batch_size=min(len(noise), 250))
    return vectors, jnp.where(jnp.isnan(ratios), -jnp.inf, ratios)


class _Fit(NamedTuple):
    guide: Guide
    vectors: np.ndarray
    ratios: np.ndarray
    interrupted: bool

    @property
    def k_hat(self) -> float:
        return pareto_k(self.ratios)


def _fit(
    conditioned: ConditionedModel, guide: Guide, key: Any, num_steps: int, learning_rate: float, num_samples: int,
    mend: bool,
) -> _Fit:  # fmt: skip
    """Train a guide by the exclusive divergence, and where tails are missed and `mend`, by the inclusive one after."""
    conditioned = jax.tree.map(np.asarray, conditioned)  # NumPy arrays are not trained
    noise = standard_normal(jax.random.fold_in(key, 1), (num_samples, conditioned.dimension))
    fast = fast_key(key)
    best = None
    for stage, covering in enumerate((0.0, _MASS_COVERING) if mend else (0.0,)):
        problem = _Problem(guide if best is None else best.guide, conditioned, np.asarray(covering, noise.dtype))
        trained, history = train(
            _loss, problem, None, key=jax.random.fold_in(fast, stage), num_steps=num_steps,
            optimizer=adam_until_plateau(learning_rate), patience=PATIENCE, check_every=CHECK_EVERY,
        )  # fmt: skip
        vectors, ratios = (np.asarray(a) for a in _draw(conditioned, trained.guide, noise))
        ratios = ratios.astype(np.float64) + guide.white.log_det
        found = _Fit(trained.guide, vectors, ratios, history.stopped == "interrupted")
        best = found if best is None or found.k_hat < best.k_hat else best._replace(interrupted=found.interrupted)
        if found.interrupted or best.k_hat < _GOOD_K_HAT:
            break
    return best


def posterior_of_ratios(
    engine: Engine, conditioned: ConditionedModel, draws: Any, ratios: np.ndarray, key: Any, interrupted: bool,
    weigh: bool = False,
) -> Posterior:  # fmt: skip
    """A posterior of independent draws and their log importance ratios, with what the ratios tell.

    Args:
        engine: that made it.
        conditioned: the model with its data.
        draws: as for `posterior_of`.
        ratios: log joint density less log density of the approximation, shape (draws,).
        key: of the run.
        interrupted: whether training was.
        weigh: whether draws get their weights, where these can be trusted.
    """
    k_hat, doubts = doubts_of_weights(ratios)
    found = {"log_evidence_bound": float(np.mean(ratios)) if np.isfinite(ratios).all() else -np.inf}
    if weigh and k_hat <= K_HAT_LIMIT:
        smoothed = pareto_smoothed(ratios)
        log_evidence, error = importance_evidence(smoothed)
        found |= {"log_weights": smoothed[None], "log_evidence": log_evidence, "log_evidence_error": error}
    posterior = posterior_of(engine, conditioned, draws, key=key, k_hat=k_hat, **found)
    early = ("training was interrupted: the approximation is the best so far",) if interrupted else ()
    return posterior.doubted((*early, *doubts))


def _run(
    engine: Engine, conditioned: ConditionedModel, key: Any, layers: tuple[Any, ...], learning_rate: float,
    *, dense: bool, mend: bool = False,
) -> Posterior:  # fmt: skip
    white = whitening(conditioned, jax.random.fold_in(key, 0), dense=dense)
    found = _fit(
        conditioned, Guide(layers, white), jax.random.fold_in(key, 1), engine.num_steps, learning_rate,
        engine.num_samples, mend,
    )  # fmt: skip
    return posterior_of_ratios(
        engine, conditioned, found.vectors[None], found.ratios, key, found.interrupted, weigh=mend
    )


def _affine(conditioned: ConditionedModel, dense: bool) -> AffineLayer:
    size = conditioned.dimension
    if dense and size > _DENSE_LIMIT:
        raise InputError(
            f"the model has {size} dimensions, and a matrix of them is too large above {_DENSE_LIMIT}: use engine "
            "mean_field or pathfinder"
        )
    return AffineLayer(jnp.zeros(size), jnp.zeros(size), jnp.zeros((size, size)) if dense else None)


class MeanField(Engine):
    """The closest normal distribution with independent unconstrained dimensions; cheap in thousands of them.

    It knows no correlations, and its variances are too small where there are some: for a normal posterior they are the
    inverses of the diagonal of its precision.

    Args:
        num_samples: independent draws.
        num_steps: at most; training stops when the evidence bound no longer improves.

    Source: A. Kucukelbir, D. Tran, R. Ranganath, A. Gelman, D. Blei, "Automatic differentiation variational inference"
    (2017); gradients of the path alone by G. Roeder, Y. Wu, D. Duvenaud, "Sticking the landing" (2017).
    """

    name: ClassVar[str] = "mean_field"

    num_samples: int = 4000
    num_steps: int = 5000

    def __check_init__(self):
        check_counts(self, "num_samples", "num_steps")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("mean-field inference")
        return _run(self, conditioned, key, (_affine(conditioned, False),), 0.02, dense=False)


class FullRank(Engine):
    """The closest normal distribution of the unconstrained vector, with all correlations.

    Args:
        num_samples: independent draws.
        num_steps: at most; training stops when the evidence bound no longer improves.

    Source: A. Kucukelbir, D. Tran, R. Ranganath, A. Gelman, D. Blei, "Automatic differentiation variational inference"
    (2017); gradients of the path alone by G. Roeder, Y. Wu, D. Duvenaud, "Sticking the landing" (2017).
    """

    name: ClassVar[str] = "full_rank"

    num_samples: int = 4000
    num_steps: int = 5000

    def __check_init__(self):
        check_counts(self, "num_samples", "num_steps")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("full-rank inference")
        return _run(self, conditioned, key, (_affine(conditioned, True),), 0.01, dense=True)


class Flow(Engine):
    """A normalizing flow: a normal distribution bent by coupling layers into the shape of the posterior.

    It begins as a quick normal approximation and learns what that misses: skewness, tails, funnels, curved ridges.
    Where importance weights show that tails are missed, it is trained on by a divergence that punishes this. Where
    k-hat is fine, draws carry their Pareto smoothed weights, which make up for what the flow missed, and give the
    evidence with its standard error.

    Args:
        num_samples: independent draws.
        num_steps: at most, in each of the two stages; each stops when it no longer improves.
        num_layers: each bends half of the dimensions in dependence on the others; 4 let each bend twice.
        width: of the two hidden layers of each network.

    Source: D. Rezende, S. Mohamed, "Variational inference with normalizing flows" (2015); L. Dinh, J. Sohl-Dickstein,
    S. Bengio, "Density estimation using real NVP" (2017) for coupling; L. Vaitl, K. Nicoli, S. Nakajima, P. Kessel,
    "Gradients should stay on path" (2022) for both stages' gradients.
    """

    name: ClassVar[str] = "flow"

    num_samples: int = 4000
    num_steps: int = 2000
    num_layers: int = 4
    width: int = 32

    def __check_init__(self):
        check_counts(self, "num_samples", "num_steps", "num_layers", "width")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("a normalizing flow")
        seed = np.asarray(jax.random.key_data(jax.random.fold_in(key, 2))).ravel()
        affine = _affine(conditioned, True)
        coupling = CouplingLayers.identity(conditioned.dimension, self.num_layers, self.width, seed)
        return _run(self, conditioned, key, (coupling, affine), 5e-3, dense=True, mend=True)
