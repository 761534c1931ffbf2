"""The joint density of finite variables as factors: each term is tabulated over the variables that it depends on.

A term is an array of logarithms, an output of a program whose inputs hold the variables. Its dependence on them is
proved (`Dependences`), so that it is evaluated only at the values of these: where a term's entries depend on one entry
of a variable each, that variable is constant; where they depend on neighbours, the values alternate along the axis.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.errors import InputError
from bayeslens.inference.dependence import Along, Dependences, Picked
from bayeslens.inference.variable_elimination import (
    LARGEST_TABLE,
    Entangled,
    Factor,
    Lagged,
    Link,
    Noise,
    Steps,
    TooLarge,
    settled,
    total,
    with_noise,
)


class Offset(NamedTuple):
    """The entry of a variable this far from the term's own, along an axis of the term."""

    axis: int
    by: int


class Parent(NamedTuple):
    """A group of a variable's entries, of which each entry of a term depends on one.

    For each axis: a position, an `Offset`, or None for the entry at the plate's own position.
    """

    site: int
    where: tuple[int | Offset | None, ...]


class Part(NamedTuple):
    """A table of a term while its axes are named: by `Parent`s, numbers of axes of the term, then plates."""

    names: tuple[Hashable, ...]
    table: Any
    links: tuple[Link, ...] = ()

    def at(self, name: Hashable, position: int) -> Part:
        axis = self.names.index(name)
        return self._replace(
            names=self.names[:axis] + self.names[axis + 1 :], table=jnp.take(self.table, position, axis)
        )

    def named(self, names: dict[Hashable, Hashable]) -> Part:
        return self._replace(names=tuple(names.get(n, n) for n in self.names))

    def cut(self, name: Hashable, start: int, stop: int) -> Part:
        axis = self.names.index(name)
        return self._replace(table=jax.lax.slice_in_dim(self.table, start, stop, axis=axis))

    def padded(self, name: Hashable, before: int, after: int) -> Part:
        widths = [(before, after) if n == name else (0, 0) for n in self.names]
        return self._replace(table=jnp.pad(self.table, widths))

    def widened(self, name: Hashable, position: int, size: int) -> Part:
        """A new axis along which the table is zero but at one position."""
        part = self._replace(names=(name, *self.names), table=self.table[None])
        return part.padded(name, position, size - 1 - position)


class Apart(Exception):
    """A plate must be taken apart, so that each of its copies is a variable of its own."""

    def __init__(self, plate: Hashable):
        self.plate = plate


class Factorization:
    """The terms of a program as factors of its finite variables.

    Args:
        closed: jaxpr of the program; its outputs are terms.
        supports: for each input that is a variable, the values that an entry can take.
        sites: names of these inputs, for messages.
        terms: names of the outputs, for messages.
    """

    def __init__(self, closed: Any, supports: dict[int, np.ndarray], sites: dict[int, str], terms: Sequence[str]):
        self.closed, self.supports, self.sites, self.names = closed, supports, sites, tuple(terms)
        self.shapes = {i: closed.jaxpr.invars[i].aval.shape for i in supports}
        self.dependences = Dependences(closed, {i: len(s) for i, s in self.shapes.items()})
        self.tied = self.dependences.outputs
        self._plates = self._find_plates()
        self._anything = {i: np.broadcast_to(v[0], self.shapes[i]) for i, v in supports.items()}  # where not needed
        # Which equation makes a variable: the program is evaluated in parts.
        self._makers: dict[Any, int | None] = dict.fromkeys((*closed.jaxpr.constvars, *closed.jaxpr.invars))
        self._makers |= {v: n for n, equation in enumerate(closed.jaxpr.eqns) for v in equation.outvars}

    def depends(self, output: int) -> bool:
        """Whether an output depends on a variable."""
        return bool(self.tied[output])

    def evaluated(self, outputs: Sequence[int], inputs: Sequence[Any]) -> list[Array]:
        """Outputs at given inputs; inputs that they do not need may be None."""
        jaxpr = self.closed.jaxpr
        wanted = [jaxpr.outvars[o] for o in outputs]
        variables, equations = {v for v in wanted if not hasattr(v, "val")}, set()
        left = list(variables)
        while left:  # only what the outputs need
            if (maker := self._makers[left.pop()]) is not None and maker not in equations:
                equations.add(maker)
                needed = {v for v in jaxpr.eqns[maker].invars if not hasattr(v, "val")}
                left += needed - variables
                variables |= needed
        constants = {v: c for v, c in zip(jaxpr.constvars, self.closed.consts, strict=True) if v in variables}
        arguments = {v: x for v, x in zip(jaxpr.invars, inputs, strict=True) if v in variables}
        part = jaxpr.replace(
            constvars=list(constants),
            invars=list(arguments),
            outvars=wanted,
            eqns=[jaxpr.eqns[n] for n in sorted(equations)],
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )
        return jax.core.eval_jaxpr(part, list(constants.values()), *arguments.values())

    # Plates: axes of variables and terms that are walked along together

    def _find_plates(self) -> dict[tuple, tuple]:
        """The plate of each axis of a variable, ("variable", i, axis), and of a term, ("term", n, axis)."""
        parent: dict[tuple, tuple] = {}

        def find(node: tuple) -> tuple:
            parent.setdefault(node, node)
            while parent[node] != node:
                node = parent[node]
            return node

        for i, shape in self.shapes.items():
            for b in range(len(shape)):
                find(("variable", i, b))
        for t, dependence in enumerate(self.tied):
            for i, entries in dependence.items():
                for b, entry in enumerate(entries):
                    if isinstance(entry, Along):
                        parent[find(("term", t, entry.axis))] = find(("variable", i, b))
        return {node: find(node) for node in list(parent)}

    def _plate(self, *node: Any) -> tuple:
        return self._plates.get(node, node)

    def _lengths(self, plate: tuple) -> set[int]:
        return {self.shapes[n[1]][n[2]] for n, root in self._plates.items() if root == plate and n[0] == "variable"}

    def _variables_of(self, plates: Sequence[tuple]) -> list[str]:
        return sorted({self.sites[n[1]] for n, p in self._plates.items() if p in plates and n[0] == "variable"})

    # Tables

    def tables(self, inputs: Sequence[Any], terms: Sequence[int]) -> dict[int, Part]:
        """Each term over its parents.

        Args:
            inputs: values of the program's inputs; those of variables are not used.
            terms: outputs that depend on a variable.
        """
        return {t: self._table(t, inputs) for t in terms}

    def _table(self, term: int, inputs: Sequence[Any]) -> Part:
        dependence, shape = self.tied[term], self.closed.jaxpr.outvars[term].aval.shape
        patterns = {i: self._pattern(i, entries) for i, entries in dependence.items()}
        axes = {w.axis for parents, _ in patterns.values() for p in parents for w in p.where if isinstance(w, Offset)}
        waves = [a for a in axes if any(s[a] > 1 for _, s in patterns.values() if a in s)]
        if len(waves) > 1:
            raise self._refused(term, "depends on neighbours along more than one axis")
        counts = {p: len(self.supports[p.site]) for parents, _ in patterns.values() for p in parents}
        entries = math.prod(counts.values()) * math.prod(shape)
        if entries > LARGEST_TABLE:
            raise self._refused(term, f"depends on {len(counts)} discrete entries at once, {entries:.2g} combinations")

        def evaluate(*choices: Any) -> Array:
            chosen = dict(zip(counts, choices, strict=True))
            full = [self._anything.get(i, v) for i, v in enumerate(inputs)]
            for i, pattern in patterns.items():
                full[i] = self._value(i, pattern, chosen)
            return self.evaluated([term], full)[0]

        function = evaluate
        for n in reversed(range(len(counts))):
            function = jax.vmap(function, in_axes=[0 if m == n else None for m in range(len(counts))])
        table = function(*(jnp.asarray(self.supports[p.site]) for p in counts))
        part = Part((*counts, *range(len(shape))), table)
        for axis in waves:
            part = self._sorted_by_offset(part, axis, patterns)
        return part

    def _pattern(self, site: int, entries: tuple) -> tuple[list[Parent], dict[int, int]]:
        """Parents of a term among one variable's entries, and the period of their values by axis of the term."""
        choices, periods = [], {}
        for b, entry in enumerate(entries):
            if isinstance(entry, Along):
                low, high = min(entry.offsets), max(entry.offsets)
                periods[entry.axis] = high - low + 1
                choices.append([Offset(entry.axis, o) for o in range(low, high + 1)])
            elif isinstance(entry, Picked):
                choices.append([None])
            else:
                size = self.shapes[site][b]
                choices.append(sorted(range(size) if entry.positions is None else entry.positions))
                if len(choices[-1]) > 64:
                    choices[-1] = choices[-1][:64]  # refused for its size, without listing all
        return [Parent(site, where) for where in itertools.product(*choices)], periods

    def _value(self, site: int, pattern: Any, chosen: dict[Parent, Any]) -> Array:
        """An array of the variable in which each group of entries has its own value."""
        shape = self.shapes[site]
        parents, periods = pattern
        value = jnp.broadcast_to(chosen[parents[0]], shape)
        for p in parents[1:]:
            mask = np.ones(shape, bool)
            for b, where in enumerate(p.where):
                position = np.arange(shape[b]).reshape([-1 if a == b else 1 for a in range(len(shape))])
                if isinstance(where, Offset):
                    mask = mask & ((position - where.by) % periods[where.axis] == 0)
                elif where is not None:
                    mask = mask & (position == where)
            value = jnp.where(mask, chosen[p], value)
        return value

    def _sorted_by_offset(self, part: Part, axis: int, patterns: dict) -> Part:
        """Rows of a term saw the value for offset o at (row + o) modulo the period: undo that."""
        groups: dict[tuple, list[Parent]] = {}
        for p in part.names:
            if isinstance(p, Parent):
                for b, w in enumerate(p.where):
                    if isinstance(w, Offset) and w.axis == axis and patterns[p.site][1][axis] > 1:
                        groups.setdefault((p.site, b, p.where[:b] + p.where[b + 1 :]), []).append(p)
        cycle = math.lcm(*(len(g) for g in groups.values()))
        place = part.names.index(axis)
        rows = []
        for r in range(min(cycle, part.table.shape[place])):
            table = jax.lax.slice_in_dim(part.table, r, None, stride=cycle, axis=place)
            order = list(range(len(part.names)))
            for (_, b, _), group in groups.items():
                for p in group:  # what row r sees at offset o is the value given to offset o + r
                    by = (p.where[b].by + r - group[0].where[b].by) % len(group)
                    order[part.names.index(p)] = part.names.index(group[by])
            rows.append(jnp.transpose(table, order))
        joined = jnp.concatenate(rows, place)
        count = part.table.shape[place]
        position = np.concatenate([np.arange(r, count, cycle) for r in range(len(rows))])
        return part._replace(table=jnp.take(joined, np.argsort(position), axis=place))

    def _refused(self, term: int, why: str) -> InputError:
        sites = sorted(self.sites[i] for i in self.tied[term])
        return InputError(
            f"the discrete sites {sites} cannot be summed out: {self.names[term]!r} {why}; give each entry that "
            "matters a sample statement of its own, put independent entries in a plate, or use a sampler for them"
        )

    # Factors

    def log_sum(
        self, tables: dict[int, Part], inputs: Sequence[Any], *, potentials: dict[int, Array] | None = None,
        key: Any = None,
    ) -> Float[Array, ""]:  # fmt: skip
        """Log of the sum over all variables of the product of tabulated terms.

        Args:
            tables: from `tables`.
            inputs: values of the program's inputs.
            potentials: variable -> logarithms of shape (values, *shape) that are added to its values.
            key: with it, gradients are draws: see `variable_elimination`.
        """
        potentials = potentials or {
            i: jnp.zeros((len(s), *self.shapes[i])) for i, s in self.supports.items() if self._has(i, tables)
        }
        apart: set[Hashable] = set()
        while True:
            try:
                parts = [p for t, part in tables.items() for p in self._parts(t, part, inputs, apart)]
                for i, table in potentials.items():
                    own = Parent(i, tuple(Offset(a, 0) for a in range(len(self.shapes[i]))))
                    part = Part((own, *range(len(self.shapes[i]))), table)
                    nodes = {a: self._plate("variable", i, a) for a in range(len(self.shapes[i]))}
                    parts += self._converted(part, nodes, apart, len(self.shapes[i]))
                return with_noise(functools.partial(self._total, parts, apart), key)
            except Apart as need:
                apart.add(self._can_take_apart(need.plate, apart))
            except Entangled as error:
                plates = {p.chain if isinstance(p, Steps) else p for p in error.plates}
                plates = [p for p in plates if self._lengths(p) and p not in apart]
                if not plates:
                    names = sorted({self.sites[v.site] for v in error.variables})
                    raise InputError(
                        f"the discrete sites {names} cannot be summed out exactly: their entries depend on each "
                        "other across plates; use a sampler for them"
                    ) from None
                apart.add(self._can_take_apart(min(plates, key=lambda p: max(self._lengths(p))), apart))
            except TooLarge as error:
                names = sorted({self.sites[d.site] for d in error.dims if isinstance(d, Parent)})
                raise InputError(
                    f"the discrete sites {names} depend on each other so closely that summing them out needs a table "
                    f"of {error.entries:.2g} entries: use a sampler for them"
                ) from None

    def _total(self, parts: list[Part], apart: set, noise: Noise | None) -> Array:
        factors = [self._embedded(p, apart) for p in self._settled(parts, apart, noise)]
        names = {n.variable if isinstance(n, Lagged) else n for f in factors for n in f.dims}
        return total(factors, {n: self._plates_in(n) for n in names if isinstance(n, Parent)}, noise)

    def _settled(self, parts: list[Part], apart: set, noise: Noise | None) -> list[Part]:
        """Without the variables of their own that touch plates at fixed positions only."""

        def is_fixed(name: Hashable) -> bool:
            return isinstance(name, Parent) and all(isinstance(w, int) for w in name.where)

        def is_placed(name: Parent) -> bool:
            return any(self._plate("variable", name.site, b) not in apart for b in range(len(name.where)))

        fixed = [p for p in parts if not p.links and all(is_fixed(n) for n in p.names)]
        names = {n for p in fixed for n in p.names}
        placed = {n for n in names if is_placed(n)}
        others = [p for p in parts if p.links or not all(is_fixed(n) for n in p.names)]
        wanted = names - placed - {n for p in others for n in p.names}
        if not placed or not wanted:
            return parts
        made = settled([Factor(p.names, p.table) for p in fixed], wanted, placed, noise)
        return [*others, *(Part(f.dims, f.table) for f in made)]

    def _has(self, site: int, tables: dict[int, Part]) -> bool:
        return any(site in self.tied[t] for t in tables)

    def _can_take_apart(self, plate: Hashable, apart: set) -> Hashable:
        length = max(self._lengths(plate), default=0)
        picked = any(
            isinstance(e, Picked) and self._plate("variable", i, b) == plate
            for d in self.tied for i, es in d.items() for b, e in enumerate(es)
        )  # fmt: skip
        if plate in apart or picked or length > 64:
            raise InputError(
                f"the entries of the discrete sites {self._variables_of([plate])} depend on each other along an axis "
                f"of length {length} in a way that cannot be summed out exactly: use a sampler for them, or write "
                "them as a Markov chain with numpyro.contrib.control_flow.scan"
            )
        return plate

    def _plates_in(self, variable: Parent) -> frozenset:
        return frozenset(self._plate("variable", variable.site, b) for b, w in enumerate(variable.where) if w is None)

    def _parts(self, term: int, part: Part, inputs: Sequence[Any], apart: set) -> list[Part]:
        count = sum(isinstance(n, int) for n in part.names)
        nodes = {a: self._plate("term", term, a) for a in range(count)}
        links = []
        for i, entries in self.tied[term].items():
            for b, entry in enumerate(entries):
                if isinstance(entry, Picked):
                    plate, size = self._plate("variable", i, b), self.shapes[i][b]
                    index = self.dependences.index(entry.index, inputs).reshape(-1)
                    links.append(Link(nodes[entry.axis], plate, entry.index, index, size))
        part = part._replace(links=tuple({(k.rows, k.plate): k for k in links}.values()))
        return self._converted(part, nodes, apart, count)

    def _converted(self, part: Part, nodes: dict, apart: set, count: int) -> list[Part]:
        """Parts of a table: its axes become plates, pairs of neighbours along them, or separate parts."""
        if len(set(nodes.values())) < len(nodes):
            twice = [p for p in nodes.values() if list(nodes.values()).count(p) > 1 and p not in apart]
            if twice:
                raise Apart(twice[0])
        parts = [part]
        for axis in range(count):
            parts = [p for q in parts for p in self._along(q, axis, nodes[axis], apart)]
        return parts

    def _along(self, part: Part, axis: int, plate: Hashable, apart: set) -> list[Part]:
        rows, lengths = part.table.shape[part.names.index(axis)], self._lengths(plate)
        moving = [
            (n, b, w)
            for n in part.names
            if not isinstance(n, int)
            for b, w in enumerate(_where(n))
            if isinstance(w, Offset) and w.axis == axis
        ]
        if not moving:
            return [part.named({axis: plate})]
        low, high = min(w.by for _, _, w in moving), max(w.by for _, _, w in moving)
        if plate in apart:
            return [self._row(part, axis, i, moving) for i in range(rows)]
        twice = len({n for n, _, _ in moving}) < len(moving) or any(
            isinstance(n, Lagged) and high > low for n, _, _ in moving
        )
        if len(lengths) > 1 or high - low > 1 or twice:
            raise Apart(plate)
        length = next(iter(lengths))
        found = [self._row(part, axis, i, moving) for i in range(rows) if not 0 <= i + low <= i + high < length]
        first, last = max(0, -low), min(rows, length - high)
        if first < last:
            inside = part.cut(axis, first, last).padded(axis, first + low, length - high - last)
            names: dict[Hashable, Hashable] = {axis: plate if low == high else Steps(plate)}
            for n, b, offset in moving:
                lifted = _placed(n, b, None)
                names[n] = lifted if offset.by == high else Lagged(lifted)
            found.append(inside.named(names))
        return found

    def _row(self, part: Part, axis: int, i: int, moving: list) -> Part:
        """One row of a term, whose parents have fixed positions."""
        part, current = part.at(axis, i), {n: n for n, _, _ in moving}
        for n, b, offset in moving:
            if (now := current[n]) is None:
                continue
            if 0 <= i + offset.by < self.shapes[_site(n)][b]:
                current[n] = _placed(now, b, i + offset.by)
                part = part.named({now: current[n]})
            else:  # there is no such entry, nothing depends on it
                part, current[n] = part.at(now, 0), None
        return part

    def _embedded(self, part: Part, apart: set) -> Factor:
        """The factor of a part. Positions in a plate that stays whole become a table that is zero elsewhere."""
        fixed: dict[Hashable, list[tuple]] = {}
        for n in part.names:
            for b, w in enumerate(_where(n)):
                if isinstance(w, int) and (plate := self._plate("variable", _site(n), b)) not in apart:
                    fixed.setdefault(plate, []).append((n, b, w))
        for plate in list(fixed):
            places = fixed[plate]
            low, high, lengths = min(w for *_, w in places), max(w for *_, w in places), self._lengths(plate)
            pair = high > low
            twice = len({n for n, *_ in places}) < len(places) or any(
                isinstance(n, Lagged) and pair for n, *_ in places
            )
            if high - low > 1 or len(lengths) > 1 or twice or plate in part.names or Steps(plate) in part.names:
                raise Apart(plate)
            names = {}
            for n, b, w in places:
                lifted = _placed(n, b, None)
                names[n] = Lagged(lifted) if pair and w == low else lifted
            part = part.named(names).widened(Steps(plate) if pair else plate, low, next(iter(lengths)) - pair)
            fixed = {q: [(names.get(n, n), b, w) for n, b, w in others] for q, others in fixed.items()}
        for link in part.links:
            if link.plate in part.names or Steps(link.plate) in part.names:
                raise Apart(link.plate)
        return Factor(*part)


def _where(name: Hashable) -> tuple:
    """Where a parent, perhaps lagged, is; nothing for other axes."""
    inner = name.variable if isinstance(name, Lagged) else name
    return inner.where if isinstance(inner, Parent) else ()


def _site(name: Any) -> int:
    return name.variable.site if isinstance(name, Lagged) else name.site


def _placed(name: Any, axis: int, place: int | None) -> Hashable:
    """The same parent at another place along one of its axes."""
    if isinstance(name, Lagged):
        return Lagged(_placed(name.variable, axis, place))
    return Parent(name.site, (*name.where[:axis], place, *name.where[axis + 1 :]))
