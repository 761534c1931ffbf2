"""The No-U-Turn sampler: chains that advance by a leaf of their trees at a time, in one compiled loop."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.inference.hamiltonian import check_settings, sampled
from bayeslens.inference.leapfrog import (
    MOMENTUM,
    Controls,
    Machine,
    Noise,
    Scale,
    leapfrog,
    next_momentum,
    packed,
    weight_of,
)

_DEPTH = 10  # doublings that checkpoints have room for


class Scalars(NamedTuple):
    """What a chain remembers in numbers. Truth values are 0 and 1.

    Attributes:
        finished: this leaf ends the transition.
        take: the leaf is the sample of its subtree.
        complete: the leaf completes a subtree without a U-turn, which joins the tree.
        accept: the sample of the subtree is that of the tree.
        right: the next leaf is to the right.
        was_right: this leaf is.
        diverging: it has diverged.
        row: of the momentum to be used next.
        initial_energy: of the transition.
        size: leaves of the tree, and of the subtree that is being grown.
        weight: of the tree.
        potential, energy: at its sample.
        sub_weight, sub_potential, sub_energy: of the subtree.
        leaf: how many leaves the subtree has.
        accept_sum: sum of acceptance probabilities over all leaves but the first.
        num_steps: their number.
        step: of the transition.
    """

    finished: Any
    take: Any
    complete: Any
    accept: Any
    right: Any
    was_right: Any
    diverging: Any
    row: Any
    initial_energy: Any
    size: Any
    weight: Any
    potential: Any
    energy: Any
    sub_weight: Any
    sub_potential: Any
    sub_energy: Any
    leaf: Any
    accept_sum: Any
    num_steps: Any
    step: Any


class Tree(NamedTuple):
    """State of all chains: points (three rows: position, momentum, gradient), sums and scalars.

    Attributes:
        leaf: the last one; the decisions about it, in `scalars`, are carried out in the next iteration.
        left, right: ends of the tree.
        proposal: its sample.
        sub: sample of the subtree.
        sums: of momenta, in the tree and in the subtree without its last leaf.
        checkpoints: first momenta of the unfinished parts of the subtree, and sums of momenta up to them.
        scalars: packed `Scalars`.
    """

    leaf: Float[Array, "3 chains dimension"]
    left: Float[Array, "3 chains dimension"]
    right: Float[Array, "3 chains dimension"]
    proposal: Float[Array, "3 chains dimension"]
    sub: Float[Array, "3 chains dimension"]
    sums: Float[Array, "2 chains dimension"]
    checkpoints: Float[Array, "2 depth chains dimension"]
    scalars: Float[Array, "names chains"]


def _blank(num_chains: int, dimension: int, dtype: Any) -> Tree:
    points = (np.zeros((3, num_chains, dimension), dtype) for _ in range(5))
    sums = np.zeros((2, num_chains, dimension), dtype)
    checkpoints = np.zeros((2, _DEPTH, num_chains, dimension), dtype)
    return Tree(*points, sums, checkpoints, np.zeros((len(Scalars._fields), num_chains), dtype))


def _iterate(value_and_grad, tree: Tree, index, scale: Scale, controls: Controls, uniforms, noise: Noise) -> Tree:
    s, select = Scalars(*tree.scalars), jnp.where
    # What was decided at the last leaf.
    finished, take, complete, accept, right, was_right = (
        (flag != 0)[:, None] for flag in (s.finished, s.take, s.complete, s.accept, s.right, s.was_right)
    )
    momentum, kinetic = next_momentum(noise, s.row)
    sub = select(take, tree.leaf, tree.sub)
    proposal = select(accept, sub, tree.proposal)
    first = select((jnp.arange(3) == MOMENTUM)[:, None, None], momentum, proposal)
    right_end = select(finished, first, select(complete & was_right, tree.leaf, tree.right))
    left_end = select(finished, first, select(complete & ~was_right, tree.leaf, tree.left))
    front = select(complete | finished, select(right, right_end, left_end), tree.leaf)
    tree_sum, sub_sum = tree.sums
    sub_sum = sub_sum + tree.leaf[MOMENTUM]
    tree_sum = select(finished, momentum, tree_sum + select(complete, sub_sum, 0.0))
    sub_sum = select(complete | finished, 0.0, sub_sum)
    finished, anew = s.finished != 0, (s.finished != 0) | (s.complete != 0)
    initial_energy = select(finished, s.potential + kinetic, s.initial_energy)
    size, weight = select(finished, 1.0, s.size), select(finished, 1.0, s.weight)
    sub_weight, count = select(anew, 0.0, s.sub_weight), select(anew, 0.0, s.leaf)
    step = select(finished, controls.step, s.step)

    sign = select(controls.begin, 0.0, select(s.right != 0, 1.0, -1.0))
    leaf = leapfrog(value_and_grad, front, sign * step, scale)
    momentum, total = leaf.point[MOMENTUM], sub_sum + leaf.point[MOMENTUM]

    turned, checkpoints = _turned(tree.checkpoints, momentum, total, count)
    ends = select(right, left_end[MOMENTUM], momentum), select(right, momentum, right_end[MOMENTUM])
    turned_at_all = _is_turn(*ends, tree_sum + total)

    leaf_weight, diverging = weight_of(leaf.energy - initial_energy)
    sub_weight, count = sub_weight + leaf_weight, count + 1
    take = (uniforms[0] * sub_weight < leaf_weight) | controls.begin
    sub_potential = select(take, leaf.potential, s.sub_potential)
    sub_energy = select(take, leaf.energy, s.sub_energy)
    bad = turned | diverging
    complete = (count == size) & ~bad
    accept = (complete & (uniforms[1] * weight < sub_weight)) | controls.begin
    size = select(complete, 2 * size, size)
    finished_now = bad | (complete & (turned_at_all | (size >= controls.limit))) | controls.begin
    scalars = Scalars(
        finished=finished_now,
        take=take,
        complete=complete,
        accept=accept,
        right=select(complete | finished_now, uniforms[2] < 0.5, s.right != 0),
        was_right=s.right,
        diverging=diverging,
        row=s.row + s.finished,
        initial_energy=initial_energy,
        size=size,
        weight=weight + select(complete, sub_weight, 0.0),
        potential=select(accept, sub_potential, s.potential),
        energy=select(accept, sub_energy, select(finished, initial_energy, s.energy)),
        sub_weight=sub_weight,
        sub_potential=sub_potential,
        sub_energy=sub_energy,
        leaf=count,
        accept_sum=select(finished, 0.0, s.accept_sum) + jnp.minimum(leaf_weight, 1.0),
        num_steps=select(finished, 0.0, s.num_steps) + 1,
        step=step,
    )
    sums = jnp.stack([tree_sum, sub_sum])
    return Tree(leaf.point, left_end, right_end, proposal, sub, sums, checkpoints, packed(scalars, index))


def _is_turn(first: Array, last: Array, total: Array) -> Array:
    """Whether a trajectory turns back, from its first and last momentum and the sum of all."""
    inner = total - 0.5 * (first + last)
    return ((first * inner).sum(-1) <= 0) | ((last * inner).sum(-1) <= 0)


def _turned(checkpoints: Array, momentum: Array, total: Array, count: Array) -> tuple[Array, Array]:
    """Whether a part of the subtree that ends with this leaf turns back; and the checkpoints with this leaf.

    Leaf n begins parts if n is even; it is kept at the place whose number is that of the ones in the binary digits
    of n without the last. It ends as many parts as its digits have ones at their end, and their first leaves are kept
    at as many places up to the same.
    """
    number = count.astype(jnp.int32)
    place = lax.population_count(number >> 1)
    parts = lax.population_count((~number & (number + 1)) - 1)
    places = jnp.arange(checkpoints.shape[1], dtype=jnp.int32)[:, None]
    starts, sums = checkpoints
    turned = _is_turn(starts, momentum, total - sums + starts) & (places > place - parts) & (places <= place)
    here = ((places == place) & (number % 2 == 0))[:, :, None]
    return turned.any(0), jnp.where(here, jnp.stack([momentum, total])[:, None], checkpoints)


TREES = Machine(Scalars._fields, _blank, _iterate)


class NUTS(Engine):
    """The No-U-Turn sampler, which needs no tuning: for continuous latents of up to thousands of dimensions.

    Warm-up ends by itself when the scale of the posterior and the step are known, often after a hundred transitions.

    Args:
        num_chains: run at once, in one compiled program; 4 are needed to trust R-hat.
        num_warmup: transitions per chain of warm-up at most.
        num_samples: draws kept per chain; at most, if `effective` is given.
        mass_matrix: `"low_rank"` scales every dimension and stretches along up to 16 directions, which costs little
            more than `"diagonal"` and saves most steps where latents correlate; `"dense"` stretches along all.
        target_acceptance: mean acceptance probability that the step is made for; more where transitions diverge.
        max_tree_depth: a transition takes at most 2 to this power leapfrog steps; at most 10.
        effective: draw until every scalar of every site has this bulk and tail effective sample size; None draws
            `num_samples`.

    Source: M. Hoffman, A. Gelman, "The No-U-Turn sampler" (2014); M. Betancourt, "A conceptual introduction to
    Hamiltonian Monte Carlo" (2017), for the weights and the criterion; D. Phan, N. Pradhan, M. Jankowiak, "Composable
    effects for flexible and accelerated probabilistic programming in NumPyro" (2019), for trees without recursion.
    """

    name: ClassVar[str] = "nuts"

    num_chains: int = 4
    num_warmup: int = 1000
    num_samples: int = 1000
    mass_matrix: str = "low_rank"
    target_acceptance: float = 0.8
    max_tree_depth: int = _DEPTH
    effective: float | None = None

    def __check_init__(self):
        check_settings(self)
        if not 1 <= self.max_tree_depth <= _DEPTH:
            raise InputError(f"max_tree_depth must be from 1 to {_DEPTH}, got {self.max_tree_depth}")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        return sampled(self, conditioned, TREES, 2.0**self.max_tree_depth, _tree_depth, key)


def _tree_depth(scalars: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"tree_depth": np.log2(scalars["size"]).astype(int)}
