"""Markov processes on trees, conditioned on their leaves: filter backward, then guide forward.

A model is a directed tree. Every edge is a Markov kernel, the leaves are observed. If h is the likelihood of all leaves
below a vertex, then sampling each edge from h(y) kappa(x, dy), normalized, gives exact posterior draws; but h is rarely
known. So a tractable function g is pulled back from the leaves to the root, through simplified kernels where the real
ones are intractable; at a branching the functions of the branches are multiplied. Then draws go forward by kernels
proportional to g(y) kappa(x, dy), and what was wrong with g is made up for by importance weights, the product over
edges of (kappa g)(x) / (simplified kappa g)(x). The mean weight, times g at the root, is an unbiased estimate of the
likelihood; where no kernel was simplified all weights are equal and it is exact.

Both passes are rules for kinds of kernels (`guiding_rules.py`), which compose along the edges as derivatives do.

Source: F. van der Meulen, M. Schauer, S. Sommer, "Automatic Backward Filtering Forward Guiding for Markov processes and
graphical models" (2020), later "Backward Filtering Forward Guiding" (2025).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from bayeslens.core.errors import InputError
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.core.posterior import Posterior, current_versions
from bayeslens.processes.guiding_rules import (
    FiniteMessage,
    GaussianMessage,
    Message,
    guide,
    log_density,
    log_sum,
    observe,
    pull_back,
    spaces,
)

_FEW = 100  # effective draws; below that, the tails of a posterior are hardly seen


class DirectedTree(eqx.Module):
    """A directed tree of Markov kernels.

    Args:
        vertices: name -> (name of the parent, kernel from the parent), parents before their children. The first is
            the root; its parent is None and its kernel a state: `FiniteKernel.state`, `LinearGaussianKernel.state`,
            or, for a root that is known, `LinearGaussianKernel.deterministic(jnp.zeros((n, 0)), x)`.

    Raises:
        InputError: an unknown or missing parent, kernels that do not fit together, or kernels without rules.

    >>> from bayeslens.core.finite import FiniteKernel
    >>> flip = FiniteKernel([[0.9, 0.1], [0.1, 0.9]])
    >>> tree = DirectedTree({"ancestor": (None, FiniteKernel.state([0.5, 0.5])),
    ...                      "one": ("ancestor", flip), "other": ("ancestor", flip)})
    >>> tree.names, tree.parents
    (('ancestor', 'one', 'other'), (-1, 0, 0))
    """

    names: tuple[str, ...] = eqx.field(static=True)
    parents: tuple[int, ...] = eqx.field(static=True)
    kernels: tuple[Any, ...]

    def __init__(self, vertices: dict[str, tuple[str | None, Any]]):
        names: list[str] = []
        for name, (parent, kernel) in vertices.items():
            source, _ = spaces(kernel)
            if (parent is None) != (not names):
                raise InputError(f"vertex {name!r} has parent {parent!r}: the first vertex, and no other, has None")
            if parent is not None and parent not in names:
                raise InputError(f"the parent {parent!r} of {name!r} is not a vertex before it: list parents first")
            ends = (source[0], 0) if parent is None else spaces(vertices[parent][1])[1]
            if ends != source:
                raise InputError(
                    f"the kernel of {name!r} starts from {source[0]} of size {source[1]}, but its parent "
                    f"{'(none)' if parent is None else repr(parent)} is {ends[0]} of size {ends[1]}"
                )
            names.append(name)
        if not names:
            raise InputError("a tree needs at least a root")
        self.names = tuple(names)
        self.parents = tuple(-1 if p is None else names.index(p) for p, _ in vertices.values())
        self.kernels = tuple(kernel for _, kernel in vertices.values())


class _Run(NamedTuple):
    """Edges that follow each other and whose kernels differ in numbers only, stacked: they are compiled once."""

    names: list[str]
    source: tuple[str, int]
    target: tuple[str, int]
    parents: np.ndarray  # where the two ends of each edge are among the latent vertices of their space
    children: np.ndarray
    kernels: Any
    values: Any  # what was observed, for leaves

    def over(self, function: Callable) -> Callable:
        """The function with its first argument, a kernel, made from arrays: for `vmap` and `scan`."""
        static = eqx.filter(self.kernels, _is_array, inverse=True)
        return lambda arrays, *rest: function(eqx.combine(arrays, static), *rest)

    @property
    def arrays(self) -> Any:
        return eqx.filter(self.kernels, _is_array)


class _Plan(NamedTuple):
    count: dict[tuple[str, int], int]  # latent vertices of each space; one for the unit
    latent: list[_Run]
    leaves: list[_Run]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray))


def _stack(*arrays: Any) -> Any:
    # NumPy does not compile; it cannot look at traced arrays.
    return (jnp if any(isinstance(a, jax.core.Tracer) for a in arrays) else np).stack(arrays)


def _plan(tree: DirectedTree, observed: dict[str, Any]) -> _Plan:
    """Check what is observed, and arrange the edges in runs."""
    if not observed:
        raise InputError("nothing is observed: give values of leaves by name")
    place, inner = {name: i for i, name in enumerate(tree.names)}, set(tree.parents)
    for name, value in observed.items():
        if name not in place:
            raise InputError(f"the tree has no vertex {name!r}; it has {', '.join(tree.names)}")
        if place[name] in inner or place[name] == 0:
            raise InputError(f"{name!r} is not a leaf: observe it through a leaf of its own")
        _check_value(name, tree.kernels[place[name]], value)
    count, at = {spaces(tree.kernels[0])[0]: 1}, {-1: 0}
    for vertex, name in enumerate(tree.names):
        if name not in observed:
            space = spaces(tree.kernels[vertex])[1]
            at[vertex] = count.get(space, 0)
            count[space] = at[vertex] + 1

    def form(vertex):
        arrays, others = eqx.partition(tree.kernels[vertex], _is_array)
        leaves, shape = jax.tree.flatten(arrays)
        functions, static = jax.tree.flatten(others)  # the same if they are one object
        return shape, static, [(np.shape(a), a.dtype) for a in leaves], [id(f) for f in functions]

    def runs(vertices):
        for _, group in itertools.groupby(vertices, form):
            some = list(group)
            names, first = [tree.names[v] for v in some], tree.kernels[some[0]]
            stacked = jax.tree.map(lambda *a: _stack(*a) if _is_array(a[0]) else a[0], *[tree.kernels[v] for v in some])
            ends = np.array([at[tree.parents[v]] for v in some]), np.array([at.get(v, 0) for v in some])
            values = _stack(*(observed[n] for n in names)) if names[0] in observed else None
            yield _Run(names, *spaces(first), *ends, stacked, values)

    seen = [name in observed for name in tree.names]
    return _Plan(count, *([*runs(v for v, s in enumerate(seen) if s == leaf)] for leaf in (False, True)))


def _check_value(name: str, kernel: Any, value: Any) -> None:
    kind, size = spaces(kernel)[1]
    if np.shape(value) != (() if kind == "finite" else (size,)):
        raise InputError(f"the value of {name!r} has shape {np.shape(value)}; one {kind} of size {size} is needed")
    factor = kernel.factor if isinstance(kernel, LinearGaussianKernel) else None
    if factor is not None and not isinstance(factor, jax.core.Tracer) and np.linalg.matrix_rank(factor) < size:
        raise InputError(f"{name!r} is observed without noise in some direction: give its kernel a full factor")
    if isinstance(value, jax.core.Tracer):
        return
    if not np.isfinite(np.asarray(value, float)).all():
        raise InputError(f"the value of {name!r} is missing or infinite: leave out leaves that were not observed")
    if kind == "finite" and not 0 <= value < size:
        raise InputError(f"the value of {name!r} is {value}, but its states are 0 to {size - 1}")


class Guide(eqx.Module):
    """The functions g on a tree, as `backward_filter` makes them.

    Any functions give unbiased estimates; all zeros, `jax.tree.map(jnp.zeros_like, guide)`, give forward simulation
    weighted by the observations, which is what a bootstrap particle filter does.

    Attributes:
        log_evidence: log of g at the root: the log likelihood, exact where no kernel was simplified; it can be
            differentiated, so that it may stand as `numpyro.factor`.
        trails: what `guide` needs on the latent edges.
        leaves: functions pulled back from the leaves to their parents.
    """

    log_evidence: Float[Array, ""]
    trails: Any
    leaves: Any


def backward_filter(tree: DirectedTree, observed: dict[str, Any]) -> Guide:
    """Pull the likelihoods of observed leaves back to the root.

    Edges whose kernels differ in numbers only are compiled once, however large the tree.

    Args:
        tree: the model. To guide by a tree of other, simpler kernels, filter that one.
        observed: values of leaves by name: an integer for finite kernels, otherwise a vector. Leaves without a value
            are drawn like other vertices.

    Raises:
        InputError: values that are missing, of a wrong shape, or of vertices that are not leaves.

    >>> from bayeslens.core.finite import FiniteKernel
    >>> flip = FiniteKernel([[0.9, 0.1], [0.1, 0.9]])
    >>> tree = DirectedTree({"ancestor": (None, FiniteKernel.state([0.5, 0.5])),
    ...                      "one": ("ancestor", flip), "other": ("ancestor", flip)})
    >>> round(float(jnp.exp(backward_filter(tree, {"one": 0, "other": 1}).log_evidence)), 4)
    0.09
    """
    return _backward(_plan(tree, observed))


@eqx.filter_jit
def _backward(plan: _Plan) -> Guide:
    runs = [*plan.latent, *plan.leaves]
    dtype = jnp.result_type(float, *(a.dtype for a in jax.tree.leaves([run.arrays for run in runs])))
    messages: dict[tuple[str, int], Any] = {}
    for (kind, n), many in plan.count.items():  # g = 1 everywhere
        shapes = [(n,) if n else ()] if kind == "finite" else [(n, n), (n,), ()]
        form = FiniteMessage if kind == "finite" else GaussianMessage
        messages[kind, n] = form(*(jnp.zeros((many, *shape), dtype) for shape in shapes))
    pulled, trails = [], []
    for run in plan.leaves:
        pulled.append(jax.vmap(run.over(observe))(run.arrays, run.values))
        messages[run.source] = _add(messages[run.source], run.parents, pulled[-1])
    for run in reversed(plan.latent):

        def step(messages, now, run=run):
            child, parent, arrays = now
            before, trail = run.over(pull_back)(arrays, jax.tree.map(lambda a: a[child], messages[run.target]))
            return messages | {run.source: _add(messages[run.source], parent, before)}, trail

        messages, trail = jax.lax.scan(step, messages, (run.children, run.parents, run.arrays), reverse=True)
        trails.append(trail)
    unit = jax.tree.map(lambda a: a[0], messages[plan.latent[0].source])
    return Guide(unit(jnp.zeros(0, dtype)), trails[::-1], pulled)


def _add(messages: Message, where: Any, more: Message) -> Message:
    """Functions multiply at a branching, their logarithms add."""
    return jax.tree.map(lambda a, b: a.at[where].add(b), messages, more)


class GuidedDraws(NamedTuple):
    """What `forward_guide` draws: `values` by vertex, each of shape (particles, ...), `log_weights` of shape
    (particles,), and the log of the unbiased estimate of the likelihood, `log_evidence`."""

    values: dict[str, Array]
    log_weights: Float[Array, " particles"]
    log_evidence: Float[Array, ""]


def forward_guide(
    tree: DirectedTree, observed: dict[str, Any], functions: Guide, *, key: PRNGKeyArray, num_particles: int
) -> GuidedDraws:
    """Draw the latent vertices from the kernels guided by g, with importance weights.

    The weights times exp(log g at the root) have the likelihood of the observations as their mean, whatever g is.
    Under a fixed key the estimate can be differentiated with respect to the parameters of vector kernels.

    Args:
        tree: the model.
        observed: values of leaves, as for `backward_filter`.
        functions: what `backward_filter` made of the same tree, or of a simpler one of the same form.
        key: a `jax.random.key`.
        num_particles: how many weighted draws.

    Returns:
        see `GuidedDraws`. Edges that are stochastic differential equations have a second value, `name_path`, of shape
        (particles, steps, n), of which the vertex is the last.
    """
    return _forward(_plan(tree, observed), functions, key, num_particles)


@eqx.filter_jit
def _forward(plan: _Plan, functions: Guide, key: PRNGKeyArray, num_particles: int) -> GuidedDraws:
    dtype = functions.log_evidence.dtype

    def draw(key):
        drawn = {
            (kind, n): jnp.zeros((many, n), dtype) if kind == "vector" else jnp.zeros(many, int)
            for (kind, n), many in plan.count.items()
        }
        log_weight, named = jnp.zeros((), dtype), {}
        for run, trail, own in zip(plan.latent, functions.trails, jax.random.split(key, len(plan.latent)), strict=True):

            def step(drawn, now, run=run):
                child, parent, arrays, trail, key = now
                value, path, more = run.over(guide)(arrays, trail, drawn[run.source][parent], key)
                return drawn | {run.target: drawn[run.target].at[child].set(value)}, (path, more)

            edges = (run.children, run.parents, run.arrays, trail, jax.random.split(own, len(run.names)))
            drawn, (path, more) = jax.lax.scan(step, drawn, edges)
            log_weight += more.sum()
            for i, name in enumerate(run.names):
                named[name] = drawn[run.target][run.children[i]]
                named |= {} if path is None else {f"{name}_path": path[i]}
        for run, pulled in zip(plan.leaves, functions.leaves, strict=True):
            above = drawn[run.source][run.parents]
            exact = jax.vmap(run.over(log_density))(run.arrays, above, run.values)
            guess = jax.vmap(lambda message, x: message(x))(pulled, above)
            log_weight += jnp.where(exact == guess, 0, exact - guess).sum()  # no NaN where both are minus infinity
        return named, log_weight

    drawn, log_weights = jax.vmap(draw)(jax.random.split(key, num_particles))
    log_mean = log_sum(log_weights) - jnp.log(num_particles)
    return GuidedDraws(drawn, log_weights, functions.log_evidence + log_mean)


def infer_tree(
    tree: DirectedTree, observed: dict[str, Any], *, key: PRNGKeyArray, num_particles: int = 1000
) -> Posterior:
    """The posterior of a tree given its leaves: weighted draws of all latent vertices, and the log evidence.

    Args:
        tree: the model.
        observed: values of leaves by name.
        key: a `jax.random.key`.
        num_particles: how many weighted draws; the default gives an error of 3% of a standard deviation in means,
            where weights are equal.

    Returns:
        a `Posterior` with a site for each latent vertex. It warns where the weights are so uneven that few draws
        count.

    Raises:
        InputError: as `backward_filter`.

    >>> from bayeslens.core.linear_gaussian import LinearGaussianKernel
    >>> walk = LinearGaussianKernel([[1.0]], [0.0], [[1.0]])
    >>> tree = DirectedTree({"x": (None, LinearGaussianKernel.state([0.0], [[1.0]])), "y": ("x", walk)})
    >>> posterior = infer_tree(tree, {"y": [2.0]}, key=jax.random.key(0))
    >>> bool(abs(posterior["x"].mean() - 1) < 0.1), round(float(posterior.log_evidence), 3)
    (True, -2.266)
    """
    functions = backward_filter(tree, observed)
    draws = forward_guide(tree, observed, functions, key=key, num_particles=num_particles)
    weights = np.exp(np.asarray(draws.log_weights, float) - float(draws.log_weights.max()))
    effective = weights.sum() ** 2 / (weights**2).sum()
    warnings = ()
    if not effective >= min(_FEW, num_particles / 2):
        warnings = (
            f"the {num_particles} weighted draws count as {effective:.0f}: bring the auxiliary kernels closer to the "
            "real ones, or take more particles",
        )
    return Posterior(
        {name: value[None] for name, value in draws.values.items()},
        draws.log_weights[None],
        draws.log_evidence,
        engine="backward filtering, forward guiding",
        settings={"num_particles": num_particles, "key": np.asarray(jax.random.key_data(key)).tolist()},
        warnings=warnings,
        versions=current_versions(),
    )
