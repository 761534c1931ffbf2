"""Variable elimination against sums over all assignments of the factor graph written out."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayeslens.inference import variable_elimination
from bayeslens.inference.variable_elimination import Entangled, Factor, Lagged, Link, Steps, TooLarge, log_sum

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
PLATES = {"i": 2, "j": 3, "t": 3}


def written_out(factors, plates, sizes):
    """Log joint of every assignment of all copies of the variables: copies are (variable, {plate: position})."""
    copies = [
        (v, position)
        for v in plates
        for position in itertools.product(*([(p, n) for n in range(PLATES[p])] for p in sorted(plates[v])))
    ]
    column = {c: n for n, c in enumerate(copies)}
    states = np.array(list(itertools.product(*(range(sizes[v]) for v, _ in copies))))
    total = np.zeros(len(states))
    for dims, table, links in factors:
        axes = [d for d in dims if d not in plates and not isinstance(d, Lagged)]
        for place in itertools.product(*(range(np.shape(table)[dims.index(a)]) for a in axes)):
            where = {}
            for axis, n in zip(axes, place, strict=True):
                where[axis] = n
            index = []
            for d in dims:
                if d in where:
                    index.append(np.full(len(states), where[d]))
                    continue
                positions = {}
                for p in plates[d.variable if isinstance(d, Lagged) else d]:
                    if Steps(p) in where:
                        positions[p] = where[Steps(p)] + (not isinstance(d, Lagged))
                    elif p in where:
                        positions[p] = where[p]
                    else:
                        link = next(k for k in links if k.plate == p)
                        positions[p] = int(link.index[where[link.rows]])
                name = d.variable if isinstance(d, Lagged) else d
                index.append(states[:, column[name, tuple(sorted(positions.items()))]])
            total += np.asarray(table)[tuple(index)]
    return total, states, column


def graph(seed, shapes, plates, sizes, links=()):
    rng = np.random.default_rng(seed)
    lengths = {
        **sizes,
        **PLATES,
        **{Lagged(v): n for v, n in sizes.items()},
        **{Steps(p): n - 1 for p, n in PLATES.items()},
    }
    lengths["rows"] = 4
    factors = []
    for dims in shapes:
        table = rng.normal(size=[lengths[d] for d in dims])
        if not set(sizes).isdisjoint(dims):  # elsewhere it would make everything impossible
            table[rng.random(table.shape) < 0.1] = -np.inf
        own = tuple(k for k in links if k.rows in dims)
        factors.append(Factor(dims, table, own))
    return factors


NONE, ROWS, COLUMNS, BOTH, TIME = frozenset(), frozenset("i"), frozenset("j"), frozenset("ij"), frozenset("t")
GRAPHS = {
    "loops": (
        [("a",), ("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("e", "b", "d")],
        {"a": NONE, "b": NONE, "c": NONE, "d": NONE, "e": NONE}, (),
    ),
    "nested plates": (
        [("a",), ("a", "i", "b"), ("i", "j", "b", "c"), ("j", "a"), ("j", "d", "a"), ("i", "j"), ("j", "i", "c")],
        {"a": NONE, "b": ROWS, "c": BOTH, "d": COLUMNS}, (),
    ),
    "chain": (
        [("t", "x"), (Lagged("x"), "x", Steps("t")), ("t", "x", "a"), ("t", "w", "x"), ("a", "b")],
        {"x": TIME, "w": TIME, "a": NONE, "b": NONE}, (),
    ),
    "two chains": (
        [(Steps("t"), "x", Lagged("x"), Lagged("y")), ("y", Lagged("y"), "x", Steps("t"), "a"), ("t", "x", "y")],
        {"x": TIME, "y": TIME, "a": NONE}, (),
    ),
    "chains in a plate": (
        [("i", Steps("t"), Lagged("x"), "x", "b"), ("t", "i", "x"), ("i", "b", "a"), ("t", "a")],
        {"x": TIME | ROWS, "b": ROWS, "a": NONE}, (),
    ),
    "links": (
        [("rows", "w", "z"), ("rows", "w"), ("j", "z"), ("rows", "z")],
        {"w": frozenset({"rows"}), "z": COLUMNS}, (Link("rows", "j", 0, np.array([0, 2, 2, 0]), 3),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_sums_marginals_and_draws(name):
    shapes, plates, links = GRAPHS[name]
    sizes = {v: 2 + (n % 2) for n, v in enumerate(plates)}
    with jax.enable_x64(True):
        PLATES["rows"] = 4
        factors = graph(3, shapes, plates, sizes, links)
        exact, states, column = written_out(factors, plates, sizes)
        weights = np.exp(exact - np.logaddexp.reduce(exact))
        zeros = {v: np.zeros([PLATES[p] for p in sorted(plates[v])] + [sizes[v]]) for v in plates}

        def total(potentials, key=None):
            own = [Factor((*sorted(plates[v]), v), potentials[v]) for v in plates]
            return log_sum([*factors, *own], plates, key=key)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def run(keys):
            return jax.value_and_grad(total)(zeros), jax.vmap(lambda k: jax.grad(total)(zeros, k))(keys)

        (found, marginals), draws = run(jax.random.split(jax.random.key(0), 3000))
        np.testing.assert_allclose(found, np.logaddexp.reduce(exact), rtol=1e-12)
        drawn = np.zeros((3000, len(column)), int)
        for (v, position), n in column.items():
            place = tuple(k for _, k in position)
            hits = states[:, n, None] == np.arange(sizes[v])
            np.testing.assert_allclose(marginals[v][place], weights @ hits, atol=1e-12)
            chosen = np.asarray(draws[v][(slice(None), *place)])
            assert ((chosen == 0) | (chosen == 1)).all() and (chosen.sum(-1) == 1).all()
            drawn[:, n] = chosen.argmax(-1)
        # The joint log density of the draws: its mean within five standard errors, and no impossible draw.
        code = {tuple(s): n for n, s in enumerate(states)}
        logs = exact[[code[tuple(d)] for d in drawn]]
        possible = weights > 0
        mean = weights[possible] @ exact[possible]
        spread = weights[possible] @ (exact[possible] - mean) ** 2
        assert np.isfinite(logs).all() and abs(logs.mean() - mean) < 5 * np.sqrt(spread / 3000)
        # Agreement of all pairs of copies: within five standard errors each (false alarms below 1e-3 in all).
        pairs = (states[:, :, None] == states[:, None, :]).astype(float)
        share = np.tensordot(weights, pairs, 1).clip(0, 1)
        seen = (drawn[:, :, None] == drawn[:, None, :]).mean(0)
        assert (np.abs(seen - share) <= 5 * np.sqrt(share * (1 - share) / 3000) + 1e-3).all()


def test_cost_is_that_of_the_width_not_of_the_number_of_variables(monkeypatch):
    monkeypatch.setattr(variable_elimination, "LARGEST_TABLE", 8)
    n = 60
    table = np.random.default_rng(0).normal(size=(n - 1, 2, 2))
    factors = [Factor((i // 2, i + 1), table[i]) for i in range(n - 1)]  # a binary tree
    found = jax.jit(lambda: log_sum(factors, dict.fromkeys(range(n), NONE)), compiler_options=QUICK)()
    messages = np.zeros((n, 2))
    for i in reversed(range(n - 1)):
        messages[i // 2] += np.logaddexp.reduce(table[i] + messages[i + 1], axis=1)
    np.testing.assert_allclose(found, np.logaddexp.reduce(messages[0]), rtol=1e-5)
    with pytest.raises(TooLarge, match="16 entries"):
        pairs = itertools.combinations(range(4), 2)
        log_sum([Factor(p, jnp.zeros((2, 2))) for p in pairs], dict.fromkeys(range(4), NONE))


def test_crossed_plates_are_refused():
    with pytest.raises(Entangled) as caught:
        log_sum([Factor(("i", "j", "v", "h"), jnp.zeros((2, 3, 2, 2)))], {"v": ROWS, "h": COLUMNS})
    assert caught.value.plates == ("i", "j") and caught.value.variables == ("h", "v")
    crossed = (Link("rows", "i", 0, np.zeros(4, int), 2), Link("rows", "j", 1, np.zeros(4, int), 3))
    with pytest.raises(Entangled):
        log_sum([Factor(("rows", "v", "h"), jnp.zeros((4, 2, 2)), crossed)], {"v": ROWS, "h": COLUMNS})


def test_impossible_sums_have_no_gradient():
    table = jnp.array([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf]])
    slope = jax.grad(lambda t: log_sum([Factor(("a", "b"), t)], {"a": NONE, "b": NONE}))(table)
    assert slope.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    slope = jax.grad(lambda t: log_sum([Factor(("a",), t)], {"a": NONE}))(jnp.full(2, -jnp.inf))
    assert slope.tolist() == [0.0, 0.0]
    assert jnp.isnan(log_sum([Factor(("a",), jnp.array([0.0, jnp.nan]))], {"a": NONE}))  # never hidden
