"""Nested sampling in which a network, trained on the way, stands in for a slow likelihood where it is accurate."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.core.randomness import host_generator
from bayeslens.inference.nested_sampling import Run, begin, check_settings, finish
from bayeslens.inference.prior_population import until_interrupted

_WIDTH, _DEPTH = 32, 3  # the largest network
_WIDTHS = (16, 24, 32)
_WAVES = (0.0, 1.0, 2.0, 3.0)  # how many radians a first weight turns; 0 for hyperbolic tangents
_RATES = (-2.3, -1.5)  # powers of ten between which learning rates lie
_POPULATION, _ELITE, _FIRST_GENERATIONS = 6, 2, 2
_CHECKS, _STEPS, _ROWS = 25, 60, 200  # training is checked so often, after so many steps on so many points each
_HELD_OUT = 0.2


class NeuralNestedSampling(Engine):
    """Nested sampling for slow likelihoods: a network learns the likelihood from the live points and stands in for it.

    It begins as plain nested sampling. Whenever the volume has shrunk e-fold, small networks are trained on the live
    points; their widths, depths and learning rates evolve by a genetic algorithm. A network that orders held-out
    points accurately enough then guides the slices, which need a hundred likelihoods for a new point. The new points
    themselves get their true likelihoods. These check the network after every block, so that one that fails is trained
    anew at once or, failing again, replaced by the likelihood for half an e-fold, and the block is thrown away.

    Unlike in the paper, evidence and weights are made of true likelihoods alone: the network only chooses the contours
    of the prior's volume. `statistics` holds `num_evaluations` of the likelihood and `num_guesses` by the network, per
    draw, as `NestedSampling` counts them; thrown away ones are included.

    Args:
        num_live: live points, which are also what networks learn from: in more than a few dimensions or with several
            modes they want more than the 500 of `NestedSampling`.
        num_steps: slices before a copy counts as a new point; None takes five per dimension.
        tolerance: log evidence that the live points may still add when the run ends.
        accuracy: the mean share of the live points by which a network may misplace a point. It bounds the share of
            the volume that is wrongly counted where networks are exchanged: a few percent are below the error of the
            evidence.

    Source: I. Gomez-Vargas, J. A. Vazquez, "Deep learning and genetic algorithms for cosmological Bayesian inference
    speed-up" (2024).

    >>> import numpyro, numpyro.distributions as dist
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 0.1), obs=y)
    >>> engine = NeuralNestedSampling(num_live=100)
    >>> found = engine(conditioned_model(model, {"y": 1.0}), key=jax.random.key(0))  # doctest: +SKIP
    >>> exact = dist.Normal(0.0, 1.01**0.5).log_prob(1.0)
    >>> bool(abs(found.log_evidence - exact) < 4 * found.log_evidence_error)  # doctest: +SKIP
    True
    """

    name: ClassVar[str] = "neural_nested"

    num_live: int = 500
    num_steps: int | None = None
    tolerance: float = 0.01
    accuracy: float = 0.05

    def __check_init__(self):
        check_settings(self)
        if not 0 < self.accuracy < 1:
            raise InputError(f"accuracy must lie between 0 and 1, got {self.accuracy}")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        run = begin(conditioned, self, "neural nested sampling", key)
        breeding = Breeding(jax.random.fold_in(key, 3))
        guide, attempt, wasted, retry = None, run.size + self.num_live, (0, 0), False
        with until_interrupted(), ProgressBar("neural nested sampling", 100) as bar:
            while not run.finished:
                if guide is None and run.size >= attempt:
                    guide, breeding = breeding.train(conditioned, run, self.accuracy)
                    attempt = run.size + self.num_live
                    run = _guided(conditioned, run, guide)
                further = run.advance(conditioned, guide, self.tolerance, attempt)
                if guide is None or misplaced(guide, run, further) <= self.accuracy:
                    retry = retry or guide is not None
                    run = further
                else:
                    wasted = (wasted[0] + further.evaluations[-1], wasted[1] + further.guided[-1])
                    # A network that was right up to here is out of date; one that never was is no use.
                    attempt = run.size if retry else run.size + self.num_live // 2
                    guide, retry = None, False
                    run = dataclasses.replace(_guided(conditioned, run, None), key=jax.random.fold_in(run.key, 0))
                judge = "likelihood" if guide is None else "network"
                bar(100 * run.done(self.tolerance), f"{run.said()}, {judge}")
        # Charged to the points that live at the end, as the prior draws are.
        evaluations, guided = (run.evaluations[0] + wasted[0], *run.evaluations[1:]), (wasted[1], *run.guided[1:])
        return finish(self, conditioned, dataclasses.replace(run, evaluations=evaluations, guided=guided), key)


def _guided(conditioned: ConditionedModel, run: Run, guide: Network | None) -> Run:
    """The run with its live points ordered by a network, or by their likelihoods again."""
    live = run.live
    level = live.log_likelihood if guide is None else _levels(conditioned, guide, live.points)
    return dataclasses.replace(run, live=live._replace(level=level.astype(live.level.dtype)))


@eqx.filter_jit
def _levels(conditioned: ConditionedModel, guide: Network, points: Array) -> Float[Array, " live"]:
    return jax.vmap(lambda p: guide(conditioned, p))(points)


@eqx.filter_jit
def _values(conditioned: ConditionedModel, points: Float[Array, "points dimension"]) -> Float[Array, "points inputs"]:
    return jax.vmap(lambda p: _inputs(conditioned, p))(points)


def _inputs(conditioned: ConditionedModel, point: Float[Array, " dimension"]) -> Float[Array, " inputs"]:
    """What a network sees: the latents as the model means them, in which likelihoods are smoother than stretched."""
    values = conditioned.constrain(point)
    return jnp.concatenate([jnp.ravel(values[n]) for n in conditioned.structure.names]).astype(point.dtype)


class Network(eqx.Module):
    """A perceptron of a point, which approximates a monotone function of the log likelihood.

    That function, minus the log of one plus the distance from the highest live log likelihood in units of the median
    distance, is smooth at a peak and tames the far tails.

    As a guide it is called with the conditioned model and an unconstrained vector.
    """

    center: Float[Array, " inputs"]
    whitening: Float[Array, "inputs inputs"]
    first: Float[Array, "inputs_and_two width"]
    hidden: Float[Array, "layers width_and_one width"]
    last: Float[Array, " width_and_one"]
    units: Float[Array, " width"]  # 1 for those in use
    layers: Float[Array, " layers"]
    wave: Float[Array, ""]
    top: Float[Array, ""]
    spread: Float[Array, ""]

    def __call__(self, conditioned: ConditionedModel, point: Float[Array, " dimension"]) -> Float[Array, ""]:
        return self.guess(_inputs(conditioned, point))

    def guess(self, values: Float[Array, " inputs"]) -> Float[Array, ""]:
        """The function of the log likelihood at values of the latents."""
        place = self.whitening @ (values - self.center)
        # The squared distance helps: contours near a peak are ellipses.
        place = jnp.concatenate([place, jnp.mean(place**2, keepdims=True)])
        value = _affine(self.first, place)
        # Sines see many modes at once (Sitzmann and others 2020).
        value = self.units * jnp.where(self.wave > 0, jnp.sin(value), jnp.tanh(value))
        for weights, used in zip(self.hidden, self.layers, strict=True):
            value = jnp.where(used > 0, self.units * jnp.tanh(_affine(weights, value)), value)
        return _affine(self.last, value)

    def scaled(self, log_likelihood: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """The function of log likelihoods that the network approximates."""
        distance = (float(self.top) - np.asarray(log_likelihood, np.float64)) / float(self.spread)
        return -np.log1p(np.maximum(distance, -1 + 1e-6))


def _affine(weights: Array, value: Array) -> Array:
    return value @ weights[:-1] + weights[-1]


class Genes(NamedTuple):
    """Architectures of a population: units in use, hidden layers after the first, waves, and learning rates."""

    width: Int[np.ndarray, " population"]
    depth: Int[np.ndarray, " population"]
    wave: Float[np.ndarray, " population"]
    learning_rate: Float[np.ndarray, " population"]


class Breeding(NamedTuple):
    """A population of architectures, which evolves by a generation with every training."""

    key: Any
    genes: Genes | None = None

    def train(self, conditioned: ConditionedModel, run: Run, accuracy: float) -> tuple[Network | None, Breeding]:
        """The best network for the live points of a run, if it is accurate enough, and the next generation."""
        live_values = np.asarray(run.live.log_likelihood, np.float64)
        # The last dead, whose likelihoods are known as well, show where the live points' region ends.
        dead = np.concatenate([d.points for d in run.dead])[-len(live_values) :]
        dead_values = np.concatenate([d.log_likelihood for d in run.dead])[-len(live_values) :]
        live, dead = (np.asarray(_values(conditioned, jnp.asarray(p))) for p in (run.live.points, dead))
        key, breeding = jax.random.split(self.key)
        lowest = min(live_values.min(), dead_values.min())
        if not np.isfinite(lowest) or np.median(live_values) == live_values.max():
            return None, self._replace(key=key)
        rng = host_generator(breeding)
        genes = random_genes(rng) if self.genes is None else self.genes
        for generation in range(_FIRST_GENERATIONS if self.genes is None else 1):
            used = jax.random.fold_in(breeding, generation)
            networks, errors = fit(live, live_values, genes, key=used, more=(dead, dead_values))
            genes = offspring(genes, errors, rng)
        best = int(np.argmin(errors))
        guide = networks[best] if errors[best] <= accuracy else None
        return guide, Breeding(key, genes)


def random_genes(rng: np.random.Generator) -> Genes:
    """A first generation."""
    return Genes(
        rng.choice(_WIDTHS, _POPULATION),
        rng.integers(1, _DEPTH, _POPULATION),
        # Every kind is there at first.
        rng.permutation(np.resize(_WAVES, _POPULATION)),
        10 ** rng.uniform(*_RATES, _POPULATION),
    )


def offspring(genes: Genes, errors: Float[np.ndarray, " population"], rng: np.random.Generator) -> Genes:
    """The best as they are, and children who take each gene from one of two of the better half, or a new one.

    >>> rng = np.random.default_rng(0)
    >>> genes = random_genes(rng)
    >>> after = offspring(genes, np.arange(6.0)[::-1], rng)
    >>> bool((after.width[:2] == genes.width[[5, 4]]).all())
    True
    """
    order = np.argsort(errors, kind="stable")
    children = _POPULATION - _ELITE
    new = random_genes(rng)
    bred = []
    for gene, other in zip(genes, new, strict=True):
        parents = gene[order[rng.integers(0, _POPULATION // 2, children)]]
        bred.append(
            np.concatenate([gene[order[:_ELITE]], np.where(rng.random(children) < 0.2, other[_ELITE:], parents)])
        )
    return Genes(*bred)


def fit(
    points: Float[np.ndarray, "live inputs"],
    log_likelihood: Float[np.ndarray, " live"],
    genes: Genes,
    *,
    key: Any,
    more: tuple[Float[np.ndarray, "others inputs"], Float[np.ndarray, " others"]] | None = None,
) -> tuple[list[Network], Float[np.ndarray, " population"]]:
    """Networks of all architectures, trained at once on four fifths of the points, and their errors on the rest.

    Args:
        points: values of the latents at the live points.
        log_likelihood: at them.
        genes: the architectures.
        key: a `jax.random.key`.
        more: further points with their log likelihoods to learn from, on which errors are not measured.

    Returns:
        The networks, and the mean shares of the live points by which each misplaces one.
    """
    rng = host_generator(key)
    order = rng.permutation(len(points))
    held, kept = np.split(order, [max(1, round(_HELD_OUT * len(points)))])
    top, dtype = log_likelihood.max(), points.dtype
    covariance = np.atleast_2d(np.cov(points, rowvar=False)) + 1e-12 * np.eye(points.shape[1])
    # A little of the diagonal, for few points in many dimensions.
    covariance = 0.99 * covariance + 0.01 * np.diag(np.diag(covariance))
    whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    scale = (points.mean(0), whitening, *[np.zeros(())] * 6, top, top - np.median(log_likelihood))
    blank = Network(*(jnp.asarray(a, dtype) for a in scale))
    others = more if more is not None else (points[:0], log_likelihood[:0])
    rows = np.concatenate([points[kept], others[0]]), blank.scaled(np.concatenate([log_likelihood[kept], others[1]]))
    target = blank.scaled(log_likelihood)
    data = [jnp.asarray(a, dtype) for a in (*rows, points[held], target[held])]
    keys = jax.random.split(key, _POPULATION)
    trained, guesses = _train(blank, *data, jax.tree.map(jnp.asarray, genes), keys)
    networks = [jax.tree.map(lambda a, i=i: a[i], trained) for i in range(_POPULATION)]
    return networks, np.array([_misplaced(np.asarray(g), target[held], target) for g in guesses])


@eqx.filter_jit
def _train(
    blank: Network, points: Array, target: Array, held_points: Array, held_target: Array, genes: Genes, keys: Any
) -> tuple[Network, Array]:
    """A population trained side by side by Adam, each in the state that did best on what is held out."""
    import optax

    dimension, dtype = points.shape[1], points.dtype

    def one(genes: Genes, key: Any) -> tuple[tuple, Array]:
        units = (jnp.arange(_WIDTH) < genes.width).astype(dtype)
        layers = (jnp.arange(_DEPTH - 1) < genes.depth).astype(dtype)
        keys = jax.random.split(key, 4)

        def network(parameters: tuple) -> Network:
            first, hidden, last = parameters
            used = {"units": units, "layers": layers, "wave": genes.wave.astype(dtype)}
            return dataclasses.replace(blank, first=first, hidden=hidden, last=last, **used)

        def error(parameters: tuple, points: Array, target: Array) -> Array:
            return jnp.mean((jax.vmap(network(parameters).guess)(points) - target) ** 2)

        adam = optax.scale_by_adam()

        def step(i: Array, carry: tuple) -> tuple:
            parameters, state = carry
            rows = jax.random.randint(jax.random.fold_in(keys[3], i), (_ROWS,), 0, len(points))
            gradient = jax.grad(error)(parameters, points[rows], target[rows])
            updates, state = adam.update(gradient, state)
            rate = genes.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * i / (_CHECKS * _STEPS)))
            return jax.tree.map(lambda p, u: p - (rate * u).astype(dtype), parameters, updates), state

        def stretch(i: Array, carry: tuple) -> tuple:
            parameters, state, best, least = carry
            parameters, state = jax.lax.fori_loop(i * _STEPS, (i + 1) * _STEPS, step, (parameters, state))
            now = error(parameters, held_points, held_target)
            best = jax.tree.map(lambda a, b: jnp.where(now < least, a, b), parameters, best)
            return parameters, state, best, jnp.minimum(now, least)

        shapes = ((dimension + 2, _WIDTH), (_DEPTH - 1, _WIDTH + 1, _WIDTH), (_WIDTH + 1,))
        first, hidden, last = (jax.random.normal(k, s, dtype) for k, s in zip(keys[:3], shapes, strict=True))
        inputs, width = np.sqrt(dimension + 1), jnp.sqrt(genes.width).astype(dtype)
        first = first * jnp.where(genes.wave > 0, genes.wave, 1.0).astype(dtype) / inputs
        turned = jax.random.uniform(keys[3], (_WIDTH,), dtype, maxval=2 * np.pi)
        first = first.at[-1].set(jnp.where(genes.wave > 0, turned, first[-1]))
        start = (first, (hidden / width).at[:, -1].set(0.0), (last / width).at[-1].set(jnp.mean(target)))
        begun = (start, adam.init(start), start, jnp.asarray(jnp.inf, dtype))
        best = jax.lax.fori_loop(0, _CHECKS, stretch, begun)[2]
        return best, jax.vmap(network(best).guess)(held_points)

    (first, hidden, last), guesses = jax.vmap(one)(genes, keys)
    count = len(genes.width)
    shared = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), blank)
    units = (jnp.arange(_WIDTH) < genes.width[:, None]).astype(dtype)
    layers = (jnp.arange(_DEPTH - 1) < genes.depth[:, None]).astype(dtype)
    used = {"units": units, "layers": layers, "wave": genes.wave.astype(dtype)}
    return dataclasses.replace(shared, first=first, hidden=hidden, last=last, **used), guesses


def misplaced(guide: Network, before: Run, after: Run) -> float:
    """The mean share of the live points by which a network misplaced those that were born under it in one block."""
    born = after.dead[-1]
    return _misplaced(born.born, guide.scaled(born.born_true), guide.scaled(np.asarray(before.live.log_likelihood)))


def _misplaced(guessed: np.ndarray, true: np.ndarray, live: np.ndarray) -> float:
    live = np.sort(live)
    return float(np.abs(np.searchsorted(live, guessed) - np.searchsorted(live, true)).mean() / len(live))
