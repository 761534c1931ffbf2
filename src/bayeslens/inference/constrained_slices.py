"""Slice sampling from the prior where the likelihood is above a level: how nested sampling finds new points.

Sources: R. Neal, "Slice sampling" (2003), for stepping out and shrinking; W. Handley, M. Hobson, A. Lasenby,
"PolyChord" (2015); J. Buchner, "Comparison of step samplers for nested sampling" (2022), for directions by
differences of live points; C. ter Braak, "A Markov chain Monte Carlo version of the genetic algorithm differential
evolution" (2006), for jumps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.inference.prior_population import evaluate

_STEP_OUT = 10  # brackets grow to so many times their first width
_SHRINKS = 100
_JUMPS = 0.2  # share of steps by the whole difference of two points, which lead from one mode to another


class Live(NamedTuple):
    """Live points.

    Attributes:
        points: unconstrained vectors.
        log_prior: their prior density.
        level: what orders them: the log likelihood, or a guess of it.
        label: decides between equal levels, uniform.
        log_likelihood: which the evidence is made of.
    """

    points: Float[Array, "live dimension"]
    log_prior: Float[Array, " live"]
    level: Float[Array, " live"]
    label: Float[Array, " live"]
    log_likelihood: Float[Array, " live"]


class Slices(NamedTuple):
    """Slice samplers side by side, each in a phase of its own so that none waits for another.

    In phases 0 and 1 the bracket grows to the left and to the right, in phase 2 a place in it is tried.
    """

    points: Float[Array, "batch dimension"]
    log_prior: Float[Array, " batch"]
    level: Float[Array, " batch"]
    direction: Float[Array, "batch dimension"]
    height: Float[Array, " batch"]
    left: Float[Array, " batch"]
    right: Float[Array, " batch"]
    room_left: Int[Array, " batch"]
    room_right: Int[Array, " batch"]
    phase: Int[Array, " batch"]
    tries: Int[Array, " batch"]
    made: Int[Array, " batch"]
    turns: Int[Array, ""]
    impossible: Int[Array, ""]


def slices_above(
    conditioned: ConditionedModel, guide: Callable | None, others: Live, parents: Array, level: Array, label: Array,
    key: Any, num_steps: Any,
) -> Slices:  # fmt: skip
    """Points of the prior above a level, by slices along differences of live points and by jumps of whole differences.

    Neither knows of a chain's own parent, so that each step leaves the prior above the level as it is.

    Args:
        conditioned: the model with its data.
        guide: what stands in for the log likelihood, or None.
        others: the live points that survive.
        parents: indices of those at which the chains begin.
        level: which the new points are to exceed, or to equal with a label above that of the last death.
        label: that one.
        key: a `jax.random.key`.
        num_steps: of each chain.
    """
    size, (count, dimension) = len(parents), others.points.shape
    dtype = others.points.dtype

    def terms(points: Array) -> tuple[Array, Array, Array]:
        if guide is None:
            return evaluate(conditioned, points)
        prior = jax.vmap(conditioned.log_prior)(points)
        guessed = jax.vmap(lambda p: guide(conditioned, p))(points).astype(dtype)
        guessed = jnp.where(jnp.isnan(guessed), -jnp.inf, guessed)
        return jnp.where(jnp.isnan(prior), -jnp.inf, prior), guessed, jnp.zeros((), int)

    def target(log_prior: Array, levels: Array) -> Array:
        # On the level itself a share of the prior's mass is left: that of labels above the last one's.
        inside = jnp.where(levels == level, jnp.log1p(-label), jnp.where(levels > level, 0.0, -jnp.inf))
        return log_prior + inside

    def fresh(slices: Slices, draws: Array, which: Array) -> Slices:
        """New directions, heights and brackets for the chains of `which`."""
        first = jnp.minimum((draws[0] * (count - 1)).astype(int), count - 2)
        first = first + (first >= parents)
        low, high = jnp.minimum(first, parents), jnp.maximum(first, parents)
        second = jnp.minimum((draws[1] * (count - 2)).astype(int), count - 3)
        second = second + (second >= low)
        second = second + (second >= high)
        # A difference is about the root of twice the dimension long in units of the spread; chords take a few units.
        jump = draws[6] < _JUMPS
        scale = jnp.where(jump, 1.0, 2.0 / np.sqrt(2.0 * dimension)).astype(dtype)
        direction = (others.points[first] - others.points[second]) * scale[:, None]
        # A jump is one try at one place: a Metropolis step.
        left = jnp.where(jump, 1.0, -draws[2])
        room = jnp.minimum((draws[3] * _STEP_OUT).astype(int), _STEP_OUT - 1)
        new = slices._replace(
            direction=direction,
            height=target(slices.log_prior, slices.level) + jnp.log1p(-draws[4]),
            left=left,
            right=jnp.where(jump, 1.0, left + 1),
            room_left=room,
            room_right=_STEP_OUT - 1 - room,
            phase=jnp.where(jump, 2, 0),
            tries=jnp.where(jump, _SHRINKS, 0),
        )
        return jax.tree.map(
            lambda a, b: a if jnp.ndim(a) == 0 else jnp.where(which.reshape(-1, *[1] * (jnp.ndim(a) - 1)), a, b),
            new,
            slices,
        )

    def turn(slices: Slices) -> Slices:
        """Every chain looks at one point."""
        draws = jax.random.uniform(jax.random.fold_in(key, slices.turns), (7, size), dtype)
        within = slices.left + draws[5] * (slices.right - slices.left)
        place = jnp.where(slices.phase == 0, slices.left, jnp.where(slices.phase == 1, slices.right, within))
        points = slices.points + place[:, None] * slices.direction
        log_prior, levels, impossible = terms(points)
        inside = target(log_prior, levels) > slices.height
        left_goes = (slices.phase == 0) & inside & (slices.room_left > 0)
        right_goes = (slices.phase == 1) & inside & (slices.room_right > 0)
        working = slices.made < num_steps
        trying = (slices.phase == 2) & working
        moved = trying & inside
        # A bracket that has shrunk to nothing, by rounding, leaves its chain in place.
        ended = moved | (trying & (slices.tries >= _SHRINKS))
        shrinks = trying & ~inside
        slices = slices._replace(
            points=jnp.where(moved[:, None], points, slices.points),
            log_prior=jnp.where(moved, log_prior, slices.log_prior),
            level=jnp.where(moved, levels, slices.level),
            left=jnp.where(left_goes, slices.left - 1, jnp.where(shrinks & (place < 0), place, slices.left)),
            right=jnp.where(right_goes, slices.right + 1, jnp.where(shrinks & (place >= 0), place, slices.right)),
            room_left=slices.room_left - left_goes,
            room_right=slices.room_right - right_goes,
            phase=jnp.minimum(
                slices.phase + ((slices.phase == 0) & ~left_goes) + ((slices.phase == 1) & ~right_goes), 2
            ),
            tries=slices.tries + trying,
            made=slices.made + ended,
            turns=slices.turns + 1,
            impossible=slices.impossible + impossible,
        )
        return fresh(slices, draws, ended)

    zeros = jnp.zeros(size, dtype)
    none = jnp.zeros(size, int)
    start = Slices(
        others.points[parents], others.log_prior[parents], others.level[parents], jnp.zeros((size, dimension), dtype),
        zeros, zeros, zeros, none, none, none, none, none, jnp.zeros((), int), jnp.zeros((), int),
    )  # fmt: skip
    draws = jax.random.uniform(jax.random.fold_in(key, 2**30), (7, size), dtype)
    start = fresh(start, draws, jnp.ones(size, bool))
    return jax.lax.while_loop(lambda s: jnp.any(s.made < num_steps), turn, start)
