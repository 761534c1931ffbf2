"""Proved dependence against what changes when an entry of the input does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayeslens.inference.dependence import Along, At, Dependences, Picked

TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
GROUP = np.array([0, 3, 3, 1])


def states(z):
    """A scan whose carry holds the last entry."""
    return jax.lax.scan(lambda last, now: (now, TABLE[last, now]), 0, z)


def longer_memory(z):
    def step(carry, now):
        total, before, last = carry
        return (total + now, last, now), (before * now, total)

    return jax.lax.scan(step, (0, 0, 0), z)


def backwards(z):
    return jax.lax.scan(lambda last, now: (now + 0 * last, last - now), 2, z, reverse=True)


def branches(z):
    return jax.lax.cond(z[0] > 1, lambda v: v * 2, lambda v: v[::-1], z)


def counting(z):
    return jax.lax.while_loop(lambda v: v[0] < 5, lambda v: v + 1, z)


def nested(z):
    def outer(carry, now):
        total, _ = jax.lax.scan(lambda a, b: (a + b, a), carry, jnp.stack([now, 2 * now]))
        return now, total

    return jax.lax.scan(outer, 0, z)[1]


PROGRAMS = {
    "elementwise": lambda z: jnp.where(z > 1, jnp.exp(z), z * 2.0 + 1),
    "slices": lambda z: (z[1:] * z[:-1], z[2], z[::2], z[1:3], z[:1] + z),
    "shapes": lambda z: (z[None].T, z.reshape(2, 2), jnp.broadcast_to(z[:, None], (4, 3)).reshape(12), jnp.flip(z)),
    "reductions": lambda z: (z.sum(), jnp.cumsum(z), (z[:, None] + z[None]).max(0), z.argmax(), jnp.sort(z)),
    "tables": lambda z: (
        TABLE[z],
        TABLE[z, 1],
        jax.nn.one_hot(z, 3) @ TABLE,
        jnp.take_along_axis(TABLE[z], z[:, None], 1),
    ),
    "picked": lambda z: (z[GROUP] + 1, z[GROUP] * jnp.arange(4), z[GROUP] - z, z[jnp.array(2)]),
    "joined": lambda z: (jnp.concatenate([z[:1] * 0, z[:-1]]), jnp.pad(z, (1, 2)), jnp.stack([z, z[::-1]])),
    "products": lambda z: (jnp.outer(z, z), z @ z, jnp.einsum("i,ij->ij", z, TABLE[jnp.array([0, 1, 2, 0])])),
    "updates": lambda z: (z.at[1].set(0), jnp.roll(z, 1), jax.lax.dynamic_slice(z, (z[0],), (2,))),
    "scan": states,
    "longer memory": longer_memory,
    "reverse scan": backwards,
    "branches": branches,
    "loop": counting,
    "scan in scan": nested,
    "mapped": lambda z: (jax.vmap(lambda v: TABLE[v].sum())(z), jax.lax.map(lambda v: v + 1, z)),
    "nested calls": lambda z: jax.jit(lambda a: jax.nn.softplus(a * 1.0) + jax.jit(jnp.sin)(a * 0.5))(z),
}


def claimed(entries, shape, size):
    """Whether each entry of an output is said to depend on each entry of the input."""
    result = np.zeros((*shape, size), bool)
    for place in np.ndindex(*shape):
        (entry,) = entries
        if isinstance(entry, At):
            positions = range(size) if entry.positions is None else entry.positions
        elif isinstance(entry, Along):
            positions = [place[entry.axis] + o for o in entry.offsets]
        else:
            positions = [GROUP[place[entry.axis]]]
        result[place][[p for p in positions if 0 <= p < size]] = True
    return result


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_missed(name):
    program, rng = PROGRAMS[name], np.random.default_rng(1)
    closed = jax.make_jaxpr(program)(jnp.zeros(4, int))
    found = Dependences(closed, {0: 1}).outputs
    run = jax.jit(lambda z: [jnp.asarray(v, float) for v in jax.tree.leaves(program(z))])
    changed = None
    for _ in range(20):
        z = rng.integers(0, 3, 4)
        base = [np.asarray(v) for v in run(z)]
        changed = changed or [np.zeros((*v.shape, 4), bool) for v in base]
        for i in range(4):
            for value in range(3):
                other = z.copy()
                other[i] = value
                for c, b, v in zip(changed, base, run(other), strict=True):
                    c[..., i] |= b != np.asarray(v)
    for dependence, c in zip(found, changed, strict=True):
        says = claimed(dependence[0], c.shape[:-1], 4) if dependence else np.zeros_like(c)
        assert (says | ~c).all()


def entry(function):
    return Dependences(jax.make_jaxpr(function)(jnp.zeros(4, int)), {0: 1}).outputs


def test_what_is_proved_is_not_more_than_needed():
    def here(axis, *offsets):
        return {0: (Along(axis, frozenset(offsets)),)}

    assert entry(lambda z: TABLE[z].sum(1) * 2) == [here(0, 0)]
    assert entry(lambda z: z[1:] - z[:-1]) == [here(0, 0, 1)]
    assert entry(lambda z: (z[2], z[0] + z[3])) == [{0: (At(frozenset({2})),)}, {0: (At(frozenset({0, 3})),)}]
    assert entry(lambda z: z[:, None] * jnp.ones((4, 4))) == [here(0, 0)]
    assert entry(lambda z: z[:, None] * z) == [{0: (At(None),)}]
    assert entry(lambda z: jnp.ones(4)) == [{}]
    assert entry(lambda z: jax.nn.one_hot(z, 3) @ TABLE) == [here(0, 0)]
    first, second = entry(lambda z: (z[GROUP] + 1, TABLE[z[GROUP]]))
    assert isinstance(first[0][0], Picked) and first == second  # the same index array, found twice
    assert isinstance(entry(lambda z: z[GROUP] * z[GROUP[::-1].copy()])[0][0][0], At)
    # A chain: the first step by itself, then pairs of neighbours.
    last, made = entry(lambda z: jax.lax.scan(lambda a, b: (b, a - b), z[0], z[1:]))
    assert made == here(0, 0, 1) and last == {0: (At(frozenset({3})),)}
    # The start of a scan is kept apart from its later steps.
    assert entry(lambda z: jax.lax.scan(lambda a, b: (b * 0, a - b), z[0], jnp.ones(3, int)))[1] == {
        0: (At(frozenset({0})),)
    }


def test_index_arrays_can_be_evaluated():
    closed = jax.make_jaxpr(lambda z, index: z[index[::-1]])(jnp.zeros(4, int), jnp.zeros(2, int))
    dependences = Dependences(closed, {0: 1})
    (picked,) = dependences.outputs[0][0]
    assert dependences.index(picked.index, [None, jnp.array([3, -1])]).ravel().tolist() == [3, 3]
