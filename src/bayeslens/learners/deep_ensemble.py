"""Deep ensembles: independently initialized neural networks, whose disagreement is epistemic uncertainty."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Shaped
from numpyro.distributions import Distribution

from bayeslens.core.distribution import bucket, pad_rows
from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.randomness import host_generator
from bayeslens.core.table import Table, Target, take
from bayeslens.learners.linear import check_weights

_HELD_OUT_SHARE = 0.2
_MAX_HELD_OUT = 2048  # rows: a held-out log score is then known to about 0.02
_CHECK_EVERY = 25  # steps between two looks at the held-out score
_MAX_CHECKS = 200
_PATIENCE = 12  # looks without a better score before a member has finished
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.1
_MIN_SCALE = 1e-3  # of a prediction, in standard deviations of the target: keeps one point from owning the likelihood
_CHUNK = 65536  # rows predicted at once on the host
_HALF_LOG_TWO_PI = np.float32(0.5 * np.log(2 * np.pi))

Layers = tuple[tuple[Float[Array, "members inputs units"], Float[Array, "members units"]], ...]


class DeepEnsemble(Learner):
    """Deep ensemble (Lakshminarayanan, Pritzel and Blundell 2017): a mixture of independently trained networks.

    Every member is a multilayer perceptron with SiLU units and a Normal with its own mean and scale for each row
    (regression) or class probabilities (classification), trained by AdamW on the log score from its own random
    start, on its own random four fifths of the rows; the other fifth tells when to stop. All members train side by
    side in one compiled program, which tables of similar size share. Members start at the marginal distribution of
    the target, so that early stopping can return to it where the features tell nothing.

    Args:
        num_members: networks; 5, after which the paper finds little gain.
        width: units in each hidden layer; 64.
        depth: hidden layers; 2.

    >>> X = np.linspace(-2, 2, 64)[:, None]
    >>> predictive = DeepEnsemble(num_members=2, width=8).fit(X, 3 * X[:, 0], key=jax.random.key(0))
    >>> predictive.members(X)[0].batch_shape
    (2, 64)
    """

    num_members: int = 5
    width: int = 64
    depth: int = 2

    tasks: ClassVar[frozenset[str]] = frozenset({"regression", "classification"})
    takes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def fit(self, X: Any, y: Any, *, key: Any, weights: Any = None) -> DeepEnsemblePredictive:
        """See `Learner.fit`; weights multiply each row's log score.

        Raises:
            InputError: fewer than 4 rows, a target that cannot be used, or weights that do not fit.
        """
        target = Target.from_values(y)
        weights = check_weights(weights, len(target.values))
        used = np.flatnonzero(weights > 0)
        if len(used) < 4:
            raise InputError(f"a deep ensemble needs at least 4 rows with positive weight, got {len(used)}")
        if len(used) < len(weights):
            X, target, weights = take(X, used), target.rows(used), weights[used]
        table, size = Table.from_data(X, weights), bucket(len(used))
        features = table.dense(X)
        num_classes = None if target.classes is None else len(target.classes)
        values, location, scale, head = _standardize(target.values, weights, num_classes)
        rng = host_generator(key)
        rows = _Rows(
            x=pad_rows(_pad_columns(features), size),
            y=pad_rows(values, size),
            weight=pad_rows((weights / weights.mean()).astype(np.float32), size),
        )
        units = (rows.x.shape[1], *[self.width] * self.depth, len(head))
        start = _start(rng, units, self.num_members, features.shape[1], head)
        layers, scores = _train(rows, start, len(used), rng)
        (first, bias), *others = layers
        return DeepEnsemblePredictive(
            table=table,
            layers=((first[:, : features.shape[1]], bias), *others),
            location=location,
            scale=scale,
            held_out_scores=scores - np.log(scale),
            classes=target.classes,
        )


class _Rows(NamedTuple):
    """The table as the compiled program sees it: rows and columns padded; y is of integers for classes."""

    x: Float[Array, "padded inputs"]
    y: Shaped[Array, " padded"]
    weight: Float[Array, " padded"]


def _standardize(
    values: np.ndarray, weights: np.ndarray, num_classes: int | None
) -> tuple[np.ndarray, float, float, np.ndarray]:
    """Standardized targets (or class codes), their location and scale, and the outputs that give their marginal."""
    if num_classes is not None:
        shares = np.bincount(values.astype(int), weights, num_classes) + 1.0
        return values.astype(np.int32), 0.0, 1.0, np.log(shares / shares.sum())
    center = float(np.average(values, weights=weights))
    scale = float(np.sqrt(np.average((values - center) ** 2, weights=weights)))
    scale = max(scale, 1e-12 * max(1.0, abs(center)))
    return ((values - center) / scale).astype(np.float32), center, scale, np.zeros(2)


def _pad_columns(features: np.ndarray) -> np.ndarray:
    """Columns of zeros up to a multiple of 8, so that few programs serve every table."""
    columns = max(features.shape[1], 1)
    return np.pad(np.asarray(features, np.float32), ((0, 0), (0, -(-columns // 8) * 8 - features.shape[1])))


def _start(rng: np.random.Generator, units: tuple[int, ...], members: int, inputs: int, head: np.ndarray) -> Layers:
    """Random layers that preserve variance, with nearly constant outputs `head`: the target's marginal."""
    layers = []
    for number, (before, after) in enumerate(itertools.pairwise(units)):
        gain = np.sqrt(1 / max(inputs, 1) if number == 0 else 2 / before)
        last = number == len(units) - 2
        weights = rng.normal(size=(members, before, after)) * (0.1 * gain if last else gain)
        biases = np.tile(head, (members, 1)) if last else rng.normal(size=(members, after))
        layers.append((weights.astype(np.float32), biases.astype(np.float32)))
    return tuple(layers)


def _forward(layers: Layers, x: Array) -> Float[Array, "members rows outputs"]:
    """Outputs of all members for rows that they share, or for each member's own (members, rows, inputs)."""
    xp = jnp if isinstance(x, jax.Array) else np
    hidden = x
    for number, (weights, biases) in enumerate(layers):
        hidden = hidden @ weights + biases[:, None]
        if number < len(layers) - 1:
            hidden = 0.5 * hidden * (1 + xp.tanh(0.5 * hidden))  # SiLU without overflow
    return hidden


def _positive(output: Any) -> Any:
    """Softplus, shifted so that 0 gives 1, plus the smallest scale."""
    xp = jnp if isinstance(output, jax.Array) else np
    return _MIN_SCALE + xp.logaddexp(output + np.float32(np.log(np.e - 1)), np.float32(0.0))


def _mean_log_scores(layers: Layers, rows: _Rows, index: Array, mask: Any) -> Float[Array, " members"]:
    """Weighted mean log score of each member on its own rows `index` (members, batch), where `mask` is 1."""
    outputs, y, weight = _forward(layers, rows.x[index]), rows.y[index], rows.weight[index] * mask
    if jnp.issubdtype(y.dtype, jnp.integer):
        scores = jnp.take_along_axis(jax.nn.log_softmax(outputs), y[..., None], -1)[..., 0]
    else:
        scale = _positive(outputs[..., 1])
        scores = -0.5 * jnp.square((y - outputs[..., 0]) / scale) - jnp.log(scale) - _HALF_LOG_TWO_PI
    return (weight * scores).sum(-1) / weight.sum(-1)


def _optimizer() -> Any:
    import optax

    return optax.adamw(_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)


@jax.jit
def _advance(rows: _Rows, layers: Layers, state: Any, batches: Array, held_out: Array, mask: Array) -> tuple:
    """One AdamW step per batch (steps, members, batch) for all members, then their held-out scores."""
    import optax

    optimizer = _optimizer()

    def step(carry: tuple, index: Array) -> tuple[tuple, None]:
        layers, state = carry
        # Members share no parameter, so that the gradient of the sum is every member's own.
        gradient = jax.grad(lambda p: -_mean_log_scores(p, rows, index, 1.0).sum())(layers)
        updates, state = optimizer.update(gradient, state, layers)
        return (optax.apply_updates(layers, updates), state), None

    score = _mean_log_scores(layers, rows, held_out, mask)
    (layers, state), _ = jax.lax.scan(step, (layers, state), batches)
    return layers, state, score


def _train(rows: _Rows, layers: Layers, count: int, rng: np.random.Generator) -> tuple[Layers, np.ndarray]:
    """Train until no member gets better on the rows it holds out; each member's best layers and their score.

    Batches are drawn on the host: inside the program, random numbers would cost more to compile than all the rest.
    """
    members, padded = layers[0][0].shape[0], len(rows.x)
    batch = int(np.clip(padded // 8, 16, 256))
    order = np.stack([rng.permutation(count) for _ in range(members)]).astype(np.int32)
    num_held_out = int(np.clip(round(_HELD_OUT_SHARE * count), 1, _MAX_HELD_OUT))
    size = min(padded // 4, _MAX_HELD_OUT)  # static, so that tables of similar size share the program
    held_out, train = np.resize(order[:, :num_held_out].T, (size, members)).T, order[:, num_held_out:]
    mask = (np.arange(size) < num_held_out).astype(np.float32)
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(_optimizer().init, layers))
    best, best_score, since = layers, np.full(members, -np.inf), np.zeros(members, int)
    for _ in range(_MAX_CHECKS):
        drawn = rng.integers(train.shape[1], size=(_CHECK_EVERY, members, batch))
        batches = np.take_along_axis(train[None], drawn, 2)
        advanced, state, score = _advance(rows, layers, state, batches, held_out, mask)
        better = np.asarray(score) > best_score
        if better.any():
            keep = lambda new, old: np.where(better[(..., *[None] * (old.ndim - 1))], new, old)  # noqa: B023, E731
            best, best_score = jax.tree.map(keep, layers, best), np.where(better, score, best_score)
        since = np.where(better, 0, since + 1)
        if (since >= _PATIENCE).all():
            break
        layers = advanced
    return best, best_score


class DeepEnsemblePredictive(Predictive):
    """Predictions of a trained deep ensemble: one Normal or Categorical per member and row.

    `layers` are the (weights, biases) of each layer, with members as first axis; `location` and `scale` undo the
    standardization of the target; `held_out_scores` are the members' mean log scores on the rows they held out.
    """

    table: Table
    layers: Layers
    location: float
    scale: float
    held_out_scores: Float[np.ndarray, " members"]
    classes: tuple | None = None

    traceable: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """One Normal or Categorical per network, with equal weights."""
        xp = jnp if isinstance(x, jax.Array) else np
        outputs = self._outputs(self.table.dense(x))
        weights = np.full(outputs.shape[0], 1 / outputs.shape[0], np.float32)
        if self.classes is not None:
            probs = xp.exp(outputs - outputs.max(-1, keepdims=True))
            return dist.CategoricalProbs(probs / probs.sum(-1, keepdims=True)), weights
        location = self.location + self.scale * outputs[..., 0]
        return dist.Normal(location, self.scale * _positive(outputs[..., 1])), weights

    def _outputs(self, features: Any) -> Float[Array, "members rows outputs"]:
        if isinstance(features, jax.Array) or len(features) <= _CHUNK:
            return _forward(self.layers, features)
        parts = [features[start : start + _CHUNK] for start in range(0, len(features), _CHUNK)]
        return np.concatenate([_forward(self.layers, part) for part in parts], 1)
