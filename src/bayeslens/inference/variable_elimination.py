"""Sums over finite variables of products of factors: variable elimination with plates and Markov chains.

A factor is a table of logarithms whose axes are named, by variables and by plates. A plate is an axis along which
factors multiply and variables are copies. Variables are summed out one by one, the one with the smallest table first,
so that the cost is exponential in how entangled the factors are, not in the number of variables. The axis of a Markov
chain is a plate with factors between neighbours: it is summed from left to right in time linear in its length.

The same program gives marginals and draws: the gradient of the log of the sum, with respect to a logarithm that is
added to one value of one variable, is that value's posterior probability. If each sum passes back, instead of
probabilities, one value drawn with them, the gradient is an exact joint draw, one hot.

Sources: R. Dechter, "Bucket elimination" (1999); F. Obermeyer and others, "Tensor variable elimination for plated
factor graphs" (2019); A. Darwiche, "A differential approach to inference in Bayesian networks" (2003).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_TABLE = 2**27  # entries: half a gigabyte in float32


class Lagged(NamedTuple):
    """A chain's variable at the earlier of two neighbouring positions."""

    variable: Hashable


class Steps(NamedTuple):
    """The axis of a chain's pairs of neighbouring positions, one shorter than the chain."""

    chain: Hashable


class Link(NamedTuple):
    """Along the plate `rows` of a factor, variables of `plate` are taken at `index`, an array known by its number."""

    rows: Hashable
    plate: Hashable
    number: int
    index: Any
    size: int


class Factor(NamedTuple):
    """A table of logarithms.

    Attributes:
        dims: names of its axes: variables, `Lagged` variables, plates or `Steps`.
        table: one logarithm for each combination.
        links: plates of its variables that it does not have itself, but picks from.
    """

    dims: tuple[Hashable, ...]
    table: Any
    links: tuple[Link, ...] = ()


class Entangled(Exception):
    """No variable can be summed out exactly without taking a plate apart.

    Attributes:
        plates: between which the variables interact.
        variables: which are left.
    """

    def __init__(self, plates: Iterable[Hashable], variables: Iterable[Hashable]):
        self.plates, self.variables = tuple(plates), tuple(variables)
        super().__init__(f"variables {self.variables} interact across the plates {self.plates}")


class TooLarge(Exception):
    """A table that would not fit."""

    def __init__(self, entries: int, dims: Iterable[Hashable]):
        self.entries, self.dims = entries, tuple(dims)
        super().__init__(f"a table of {entries} entries over {self.dims}")


def log_sum_exp(table: Float[Array, "... values"]) -> Float[Array, "..."]:
    """Log of the sum of exponentials over the last axis; sums of nothing have gradient zero, not NaN.

    >>> log_sum_exp(jnp.array([-jnp.inf, -jnp.inf])).item(), jax.grad(log_sum_exp)(jnp.full(2, -jnp.inf)).tolist()
    (-inf, [0.0, 0.0])
    """
    largest = jax.lax.stop_gradient(table.max(-1, keepdims=True))
    largest = jnp.where(jnp.isneginf(largest), 0.0, largest)
    total = jnp.exp(table - largest).sum(-1)
    return jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1.0, total)) + largest[..., 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drawing_sum(table: Array, noise: Array, independent: tuple[int, ...]) -> Array:
    """Log of the sum over the last axis; its gradient is one entry, drawn by its share.

    Draws are independent along some axes. The others are variables whose values are drawn already: the slope is one
    at these and zero elsewhere, so that only one row of the table counts.
    """
    return log_sum_exp(table)


def _drawing_forward(table: Array, noise: Array, independent: tuple[int, ...]) -> tuple[Array, Any]:
    return log_sum_exp(table), (table, noise)


def _drawing_backward(independent: tuple[int, ...], saved: Any, slope: Array) -> tuple[Array, Array]:
    table, noise = saved
    decided = tuple(a for a in range(table.ndim - 1) if a not in independent)
    row = jnp.where(slope[..., None] == 1, table, 0.0).sum(decided, keepdims=True)
    drawn = jax.nn.one_hot((row + noise).argmax(-1), table.shape[-1], dtype=table.dtype)
    return drawn * slope[..., None], jnp.zeros_like(noise)


_drawing_sum.defvjp(_drawing_forward, _drawing_backward)


class Noise:
    """Gumbel noise, taken piece by piece from one array: generators of their own would take long to compile.

    Without an array it counts how much is taken.
    """

    def __init__(self, values: Array | None = None):
        self.values, self.used = values, 0

    def take(self, shape: Sequence[int]) -> Array:
        start, self.used = self.used, self.used + math.prod(shape)
        return jnp.zeros(shape) if self.values is None else self.values[start : self.used].reshape(shape)


def log_sum(factors: Sequence[Factor], variables: dict[Hashable, frozenset], *, key: Any = None) -> Float[Array, ""]:
    """Log of the sum over all variables of the product of factors.

    Args:
        factors: at least one for each variable.
        variables: the plates of each.
        key: a `jax.random.key`, with which the gradient becomes an exact draw.

    Raises:
        Entangled: variables of different plates interact so that no plate can be summed as a whole.
        TooLarge: an intermediate table of more than 2^27 entries.

    Two coins in a plate of three rows, and their common parent:

    >>> parent = Factor(("a",), jnp.log(jnp.array([0.4, 0.6])))
    >>> child = Factor(("rows", "a", "b"), jnp.log(jnp.full((3, 2, 2), 0.5)))
    >>> seen = Factor(("rows", "b"), jnp.log(jnp.array([[0.2, 0.6]] * 3)))
    >>> total = log_sum([parent, child, seen], {"a": frozenset(), "b": frozenset({"rows"})})
    >>> round(float(jnp.exp(total)), 6)  # 0.4 cubed
    0.064
    """
    return with_noise(lambda noise: total(factors, variables, noise), key)


def total(factors: Sequence[Factor], variables: dict[Hashable, frozenset], noise: Noise | None) -> Array:
    """`log_sum` with noise at hand."""
    left = _Elimination(dict(variables), list(factors), noise).run(set(variables))
    return jnp.asarray(sum(f.table for f in left))


def with_noise(function: Callable[[Noise | None], Array], key: Any) -> Array:
    """A function of as much noise as it takes, or of none without a key."""
    if key is None:
        return function(None)
    needed = Noise()
    kind = jax.eval_shape(lambda: function(needed)).dtype
    return function(Noise(jax.random.gumbel(key, (needed.used,), kind)))


def settled(factors: Sequence[Factor], wanted: set, placed: set, noise: Noise | None) -> list[Factor]:
    """The factors without those variables that can be summed out before others are put at their places in plates.

    Else they would be carried along the whole of a chain of which they touch one end.

    Args:
        factors: without plates.
        wanted: variables in no other factors.
        placed: variables at positions of plates; those that no factor holds together are not joined.
        noise: for draws.
    """
    names = {d for f in factors for d in f.dims}
    left = _Elimination(dict.fromkeys(names, frozenset()), list(factors), noise)
    while wanted := wanted & {d for f in left.factors for d in f.dims}:
        found = []
        for variable in wanted:
            touched = [f for f in left.factors if variable in f.dims]
            joined = {d for f in touched for d in f.dims} & placed
            if any(joined <= set(f.dims) for f in touched) and left._size(touched) <= LARGEST_TABLE:
                found.append((left._size(touched), str(variable), variable, touched))
        if not found:
            break
        *_, variable, touched = min(found, key=lambda c: c[:2])
        rest = [f for f in left.factors if not any(f is t for t in touched)]
        left.factors = [*rest, *left._summed(variable, touched)]
    return left.factors


class _Elimination:
    """The factors that are left while variables are summed out."""

    def __init__(self, variables: dict[Hashable, frozenset], factors: list[Factor], noise: Noise | None):
        self.plates = variables
        self.noise = noise  # with which gradients are draws
        self.factors = [self._multiplied(f) for f in factors]

    def run(self, wanted: set[Hashable]) -> list[Factor]:
        """Sum out these variables; the factors that remain."""
        wanted = set(wanted)
        while wanted:
            best = min(self._candidates(wanted), default=None, key=lambda c: c[0])
            if best is None:
                plates = {d for f in self.factors for d in f.dims if not self._is_variable(d)}
                raise Entangled(sorted(plates, key=str), sorted(wanted, key=str))
            size, gone, touched, chain = best
            if size > LARGEST_TABLE:
                raise TooLarge(size, {d for f in touched for d in f.dims})
            rest = [f for f in self.factors if not any(f is t for t in touched)]
            made = self._summed(gone[0], touched) if chain is None else self._chained(chain, gone, touched)
            self.factors = [*rest, *(self._multiplied(f) for f in made)]
            wanted -= set(gone)
        return self.factors

    def _is_variable(self, dim: Hashable) -> bool:
        return dim in self.plates or isinstance(dim, Lagged)

    def _plates_of(self, dim: Hashable) -> frozenset:
        """The plates of a variable, or of what its axis stands for within a pair of neighbours."""
        return self.plates[dim.variable if isinstance(dim, Lagged) and dim not in self.plates else dim]

    def _multiplied(self, factor: Factor) -> Factor:
        """The product over plates that no variable of the factor has, and links that can be followed."""
        needed = set()
        steps = {d.chain for d in factor.dims if isinstance(d, Steps)}
        for dim in factor.dims:
            if self._is_variable(dim):
                needed |= {Steps(p) if p in steps else p for p in self._plates_of(dim)}
        dims, table, links = list(factor.dims), factor.table, list(factor.links)
        for link in list(links):
            if link.plate not in needed:  # its variables are summed out
                links.remove(link)
        for dim in [d for d in dims if not self._is_variable(d) and d not in needed]:
            axis, here = dims.index(dim), [k for k in links if k.rows == dim]
            if not here:
                table = table.sum(axis)
                dims.remove(dim)
            elif len(here) == 1 and here[0].plate not in dims:
                rows = jnp.moveaxis(table, axis, 0)
                table = jax.ops.segment_sum(rows, jnp.clip(here[0].index, 0, here[0].size - 1), here[0].size)
                dims = [here[0].plate, *(d for d in dims if d != dim)]
                links.remove(here[0])
        return Factor(tuple(dims), table, tuple(links))

    # What can be summed out next

    def _candidates(self, wanted: set[Hashable]) -> Iterable[tuple[int, list, list[Factor], Hashable]]:
        """Size of the table, variables, factors that have them, and their chain if they form one."""
        holders: dict[Hashable, list[Factor]] = {}
        chained: dict[Hashable, set] = {}  # chain -> variables that are neighbours along it
        for factor in self.factors:
            steps = [d.chain for d in factor.dims if isinstance(d, Steps)]
            for dim in factor.dims:
                if self._is_variable(dim):
                    name = dim.variable if isinstance(dim, Lagged) and dim not in self.plates else dim
                    holders.setdefault(name, []).append(factor)
                    for chain in steps:
                        if chain in self._plates_of(dim):
                            chained.setdefault(chain, set()).add(name)
        neighbours = {v for group in chained.values() for v in group}
        for variable in wanted - neighbours:
            touched, own = holders.get(variable, []), self.plates[variable]
            if all(self._within(f, own) for f in touched):
                yield self._size(touched), [variable], touched, None
        for chain, group in chained.items():
            for members in _components(group, self.factors):
                touched = _unique(f for v in members for f in holders[v])
                if members <= wanted and self._is_chain(chain, members, touched):
                    yield self._chain_size(chain, touched), sorted(members, key=str), touched, chain

    def _within(self, factor: Factor, plates: frozenset) -> bool:
        own = {d for d in factor.dims if not self._is_variable(d)}
        return own <= plates and not any(k.plate in plates for k in factor.links)

    def _is_chain(self, chain: Hashable, members: set, touched: list[Factor]) -> bool:
        """Whether these variables can be summed from left to right: all else about them must be settled."""
        plates = {self.plates[v] for v in members}
        if len(plates) != 1:
            return False
        own = next(iter(plates)) - {chain}
        allowed = own | {chain, Steps(chain)}
        for factor in touched:
            if factor.links or not {d for d in factor.dims if not self._is_variable(d)} <= allowed:
                return False
            others = {d for d in factor.dims if self._is_variable(d)}
            others -= members | {Lagged(v) for v in members}
            if any(not self._plates_of(d) <= own for d in others):
                return False
        return True

    def _size(self, factors: list[Factor]) -> int:
        return math.prod(_sizes(factors).values())

    def _chain_size(self, chain: Hashable, factors: list[Factor]) -> int:
        sizes = _sizes(factors)
        inside = [n for d, n in sizes.items() if d not in (chain, Steps(chain)) and not isinstance(d, Lagged)]
        return math.prod(inside) * max([n for d, n in sizes.items() if isinstance(d, Lagged)], default=1)

    # Sums

    def _sum(self, table: Array, dims: list[Hashable]) -> Array:
        """Over the last axis; the others have these names."""
        if self.noise is None:
            return log_sum_exp(table)
        plates = tuple(a for a, d in enumerate(dims) if not self._is_variable(d))
        noise = self.noise.take([n if a in (*plates, table.ndim - 1) else 1 for a, n in enumerate(table.shape)])
        return _drawing_sum(table, noise.astype(table.dtype), plates)

    def _summed(self, variable: Hashable, touched: list[Factor]) -> list[Factor]:
        links: dict[tuple, Link] = {}
        for link in (k for f in touched for k in f.links):
            if links.setdefault((link.rows, link.plate), link).number != link.number:
                raise Entangled([link.rows, link.plate], [variable])
        dims = [d for d in _sizes(touched) if d != variable]
        table = sum(_aligned(f, [*dims, variable]) for f in touched)
        return [Factor(tuple(dims), self._sum(jnp.asarray(table), dims), tuple(links.values()))]

    def _chained(self, chain: Hashable, members: list, touched: list[Factor]) -> list[Factor]:
        """Sum out a chain from left to right; the message is a table over its variables at one position."""
        sizes = _sizes(touched)
        batch = [d for d in sizes if not isinstance(d, Lagged | Steps) and d != chain and d not in members]
        dims = [*batch, *members]
        shape = tuple(next(n for d, n in sizes.items() if d in (v, Lagged(v))) for v in dims)
        leading = [_leading(f, chain) for f in touched]
        single = [f for f, is_pair in leading if not is_pair]
        pairs = [f for f, is_pair in leading if is_pair]
        length = 1 + pairs[0].table.shape[0]
        own = {v: self.plates[v] - {chain} for v in members}
        plates = {**self.plates, **own, **{Lagged(v): p for v, p in own.items()}}

        def message(factors: list[Factor]) -> Array:
            table = sum((_aligned(f, dims) for f in factors), jnp.zeros(()))
            return jnp.broadcast_to(table, shape).astype(dtype)

        def step(before: Array, inputs: Any, needed: Noise | None = None) -> tuple[Array, None]:
            singles, steps, values = inputs
            renamed = Factor(tuple(Lagged(d) if d in own else d for d in dims), before)
            now = [Factor(f.dims[1:], t) for f, t in zip([*single, *pairs], [*singles, *steps], strict=True)]
            noise = None if self.noise is None else needed or Noise(values)
            inner = _Elimination(plates, [renamed, *now], noise)
            return message(inner.run({Lagged(v) for v in members})), None

        dtype = jnp.result_type(*(f.table for f in touched))
        start = message([Factor(f.dims[1:], f.table[0]) for f in single])
        inputs, values = ([f.table[1:] for f in single], [f.table for f in pairs]), None
        if self.noise is not None:
            needed = Noise()
            jax.eval_shape(lambda: step(start, (*jax.tree.map(lambda t: t[0], inputs), None), needed))
            values = self.noise.take([length - 1, needed.used])
        final, _ = jax.lax.scan(step, start, (*inputs, values))
        last = _Elimination(plates, [Factor(tuple(dims), final)], self.noise)
        return last.run(set(members))


def _sizes(factors: Iterable[Factor]) -> dict[Hashable, int]:
    return {d: n for f in factors for d, n in zip(f.dims, jnp.shape(f.table), strict=True)}


def _aligned(factor: Factor, dims: list[Hashable]) -> Array:
    """The table with its axes in this order, of length one where it has none."""
    order = sorted(range(len(factor.dims)), key=lambda a: dims.index(factor.dims[a]))
    table = jnp.transpose(factor.table, order)
    sizes = dict(zip((factor.dims[a] for a in order), table.shape, strict=True))
    return table.reshape([sizes.get(d, 1) for d in dims])


def _leading(factor: Factor, chain: Hashable) -> tuple[Factor, bool]:
    """The factor with the chain's axis first, and whether that is of pairs."""
    axis = next(d for d in factor.dims if d in (chain, Steps(chain)))
    rest = [d for d in factor.dims if d != axis]
    return Factor((axis, *rest), _aligned(factor, [axis, *rest])), isinstance(axis, Steps)


def _unique(factors: Iterable[Factor]) -> list[Factor]:
    return list({id(f): f for f in factors}.values())


def _components(members: set, factors: list[Factor]) -> list[set]:
    """Variables that share factors, grouped."""
    groups = [{v} for v in members]
    for factor in factors:
        names = {d.variable if isinstance(d, Lagged) else d for d in factor.dims} & members
        joined = [g for g in groups if g & names]
        if len(joined) > 1:
            groups = [g for g in groups if not g & names] + [set().union(*joined)]
    return groups
