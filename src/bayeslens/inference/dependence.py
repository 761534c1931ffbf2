"""Which entries of an array program's inputs each entry of its outputs depends on, proved from its jaxpr.

An entry of an intermediate array may depend on an input along an axis of both (as elementwise operations do), on
neighbours along that axis (slices, a scan whose carry holds the last state), on entries picked by an index array
(`z[group]`), or on entries at fixed positions. Operations that are not known here are taken to mix everything: what
is found is always a superset of the true dependence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_MOST_POSITIONS = 4096  # longer axes are not followed position by position
_FARTHEST = 2  # offsets that are followed through a scan's carry


class Along(NamedTuple):
    """Entry i of an axis depends on the input's entries i + offset; a negative axis is the time of a scan."""

    axis: int
    offsets: frozenset[int]


class Picked(NamedTuple):
    """Entry i of an axis depends on the input's entry index[i], where the index array is known by its number."""

    axis: int
    index: int


class At(NamedTuple):
    """Every entry depends on the input's entries at these positions; None stands for all."""

    positions: frozenset[int] | None


Entry = Along | Picked | At
Dependence = dict[int, tuple[Entry, ...]]  # input -> an entry for each of its axes

_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp convert_element_type
copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or polygamma population_count pow real
reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
_ELEMENTWISE = frozenset(_NAMES.split())
_REDUCTIONS = frozenset({"sum", "max", "min", "prod", "and", "or"})
_CUMULATIVE = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
# Index arrays made by these are told equal when their inputs are.
_INDEX_ARITHMETIC = frozenset(
    {"lt", "add", "sub", "select_n", "broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "copy"}
)


class Dependences:
    """The dependence of each output of a jaxpr on some of its inputs.

    Args:
        closed: the jaxpr with its constants.
        tracked: how many leading axes of each input are followed; an input that is not named is taken as fixed.

    Attributes:
        outputs: for each output, input -> an entry per followed axis.

    >>> import jax, jax.numpy as jnp
    >>> closed = jax.make_jaxpr(lambda z: (jnp.exp(z[1:] - z[:-1]), z.sum()))(jnp.zeros(4))
    >>> first, second = Dependences(closed, {0: 1}).outputs
    >>> first[0][0].axis, sorted(first[0][0].offsets), second[0][0].positions is None
    (0, [0, 1], True)
    """

    def __init__(self, closed: Any, tracked: dict[int, int]):
        self._shapes = {i: closed.jaxpr.invars[i].aval.shape[:count] for i, count in tracked.items()}
        self._jaxpr = closed.jaxpr
        self._times: list[int] = []  # lengths of the scans around
        self._depth = 0  # how many loops and branches are around
        self._nodes: list[tuple] = []  # how arrays without dependence are made
        self._numbers: dict[tuple, int] = {}
        values = []
        for i in range(len(closed.jaxpr.invars)):
            if i in tracked:
                values.append({i: tuple(Along(a, frozenset({0})) for a in range(tracked[i]))})
            else:
                values.append(self._node(("input", i)))
        consts = [self._constant(c) for c in closed.consts]
        self.outputs = [v if isinstance(v, dict) else {} for v in self._run(closed.jaxpr, consts, values)]

    def index(self, number: int, inputs: Sequence[Any]) -> Any:
        """The values of an index array, one row per entry, given those of all inputs."""
        kind, *rest = self._nodes[number]
        if kind == "input":
            return inputs[rest[0]]
        if kind == "constant":
            return rest[-1]
        equation, position, parents = rest
        values = [self.index(p, inputs) for p in parents]
        atoms = {a: v for a, v in zip(equation.invars, values, strict=True) if not hasattr(a, "val")}
        alone = self._jaxpr.replace(constvars=[], invars=list(atoms), outvars=list(equation.outvars), eqns=[equation])
        return jax.core.eval_jaxpr(alone, (), *atoms.values())[position]

    # Values of variables are a Dependence, or the number of a node where there is none.

    def _node(self, key: tuple, *payload: Any) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self._nodes)
            self._nodes.append((*key, *payload))
        return self._numbers[key]

    def _constant(self, value: Any) -> int:
        """A constant; indices that are equal are the same."""
        kind = np.dtype(getattr(value, "dtype", type(value))) if not _is_key(value) else None
        if isinstance(value, jax.core.Tracer) or kind is None or kind.kind not in "iub":
            return self._node(("constant", id(value)), value)
        plain = np.asarray(value)
        return self._node(("constant", str(plain.dtype), plain.shape, plain.tobytes()), value)

    def _run(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

        def read(atom: Any) -> Any:
            if hasattr(atom, "val"):
                return self._constant(atom.val)
            return known[atom]

        for equation in jaxpr.eqns:
            inputs = [read(a) for a in equation.invars]
            known.update(zip(equation.outvars, self._apply(equation, inputs), strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _apply(self, equation: Any, inputs: list[Any]) -> list[Any]:
        name = equation.primitive.name
        if name in _CALLS and _CALLS[name] in equation.params:
            inner = equation.params[_CALLS[name]]
            return self._run(*_opened(inner, self), inputs)
        if not any(isinstance(v, dict) for v in inputs):
            return [self._known(equation, i, inputs) for i in range(len(equation.outvars))]
        shapes = [a.aval.shape for a in equation.invars]
        if name == "gather":
            index = inputs[1] if isinstance(inputs[1], int) else None
            pair = [v if isinstance(v, dict) else {} for v in inputs]
            return [self._gather(equation.params, pair, shapes, equation.outvars[0].aval.shape, index)]
        inputs = [v if isinstance(v, dict) else {} for v in inputs]
        if name == "scan":
            return self._scan(equation.params, inputs, shapes)
        if name == "cond":
            return self._cond(equation.params, inputs, shapes)
        out = equation.outvars[0].aval.shape
        rule = getattr(self, f"_rule_{name}", None)
        if name in _ELEMENTWISE and len(equation.outvars) == 1:
            return [self._elementwise(inputs, shapes, out)]
        if (name.removeprefix("reduce_") in _REDUCTIONS and "axes" in equation.params) or name in ("argmax", "argmin"):
            kept = [a for a in range(len(shapes[0])) if a not in equation.params["axes"]]
            return [self._moved(inputs[0], shapes[0], {a: i for i, a in enumerate(kept)})]
        if name in _CUMULATIVE or name == "rev":
            axes = equation.params["dimensions"] if name == "rev" else (equation.params["axis"],)
            return [self._moved(inputs[0], shapes[0], {a: a for a in range(len(out)) if a not in axes})]
        if rule is not None:
            return [rule(equation.params, inputs, shapes, out)]
        mixed = self._joined([self._moved(v, s, {}) for v, s in zip(inputs, shapes, strict=True)])
        return [mixed] * len(equation.outvars)

    def _known(self, equation: Any, position: int, parents: list[int]) -> int:
        simple = equation.primitive.name in _INDEX_ARITHMETIC
        key = str(sorted((k, str(v)) for k, v in equation.params.items())) if simple else id(equation)
        number = self._node(("made", equation.primitive.name, key, position, tuple(parents)))
        self._nodes[number] = ("made", equation, position, tuple(parents))
        return number

    # How entries move

    def _collapsed(self, entry: Entry, shape: tuple[int, ...], size: int) -> At:
        """What an entry says when its axis of an array of this shape is mixed."""
        if isinstance(entry, Along) and size <= _MOST_POSITIONS:
            length = self._times[-entry.axis - 1] if entry.axis < 0 else shape[entry.axis]
            found = frozenset(i + o for i in range(length) for o in entry.offsets if 0 <= i + o < size)
            return At(None if len(found) == size else found)
        return entry if isinstance(entry, At) else At(None)

    def _moved(self, value: Dependence, shape: tuple[int, ...], axes: dict[int, Any]) -> Dependence:
        """The same with axes renamed, or picked from; those without a new name are mixed."""

        def move(entry: Entry, size: int) -> Entry:
            if isinstance(entry, At):
                return entry
            to = axes.get(entry.axis, entry.axis if entry.axis < 0 else None)
            if isinstance(to, Picked):
                exact = entry == Along(entry.axis, frozenset({0})) and shape[entry.axis] == size
                return to if exact else At(None)
            return self._collapsed(entry, shape, size) if to is None else entry._replace(axis=to)

        return {i: tuple(move(e, n) for e, n in zip(es, self._shapes[i], strict=True)) for i, es in value.items()}

    def _joined(self, values: list[Dependence], shape: tuple[int, ...] = ()) -> Dependence:
        """What depends on all that any of these does; axes have the lengths of `shape`."""
        result: Dependence = {}
        for value in values:
            for i, entries in value.items():
                before = result.get(i)
                result[i] = entries if before is None else tuple(
                    self._joined_entry(a, b, shape, n) for a, b, n in zip(before, entries, self._shapes[i], strict=True)
                )  # fmt: skip
        return result

    def _joined_entry(self, first: Entry, second: Entry, shape: tuple[int, ...], size: int) -> Entry:
        if first == second:
            return first
        if isinstance(first, Along) and isinstance(second, Along) and first.axis == second.axis:
            return Along(first.axis, first.offsets | second.offsets)
        first, second = (self._collapsed(e, shape, size) for e in (first, second))
        if first.positions is None or second.positions is None:
            return At(None)
        union = first.positions | second.positions
        return At(None if len(union) == size else union)

    def _elementwise(self, values: list[Dependence], shapes: list[tuple], out: tuple[int, ...]) -> Dependence:
        # Operands of one length along an axis are repeated along it; scalars along all.
        kept = [{a: a for a, n in enumerate(s) if n == out[a]} for s in shapes]
        return self._joined([self._moved(v, s, k) for v, s, k in zip(values, shapes, kept, strict=True)], out)

    # Operations that move axes

    def _rule_broadcast_in_dim(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        to = params["broadcast_dimensions"]
        return self._moved(inputs[0], shapes[0], {a: t for a, t in enumerate(to) if shapes[0][a] == out[t]})

    def _rule_reshape(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        # An axis is kept when it has the same length and as many entries stand before it.
        before = {(math.prod(out[:a]), n): a for a, n in enumerate(out) if n != 1}
        source = {a: before.get((math.prod(shapes[0][:a]), n)) for a, n in enumerate(shapes[0]) if n != 1}
        return self._moved(inputs[0], shapes[0], {a: t for a, t in source.items() if t is not None})

    def _rule_squeeze(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        kept = [a for a in range(len(shapes[0])) if a not in params["dimensions"]]
        return self._moved(inputs[0], shapes[0], {a: i for i, a in enumerate(kept)})

    def _rule_transpose(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        return self._moved(inputs[0], shapes[0], {a: i for i, a in enumerate(params["permutation"])})

    def _shifted(self, value: Dependence, axis: int, by: int) -> Dependence:
        def shift(entry: Entry) -> Entry:
            if isinstance(entry, Along) and entry.axis == axis:
                return Along(axis, frozenset(o + by for o in entry.offsets))
            return At(None) if isinstance(entry, Picked) and entry.axis == axis else entry

        return value if by == 0 else {i: tuple(shift(e) for e in entries) for i, entries in value.items()}

    def _rule_slice(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        strides = params["strides"] or (1,) * len(out)
        value = self._moved(inputs[0], shapes[0], {a: a for a in range(len(out)) if strides[a] == 1})
        for axis, start in enumerate(params["start_indices"]):
            value = self._cut(value, axis, start, out[axis] != shapes[0][axis])
        return value

    def _cut(self, value: Dependence, axis: int, start: int, cut: bool) -> Dependence:
        picked = {
            i: tuple(At(None) if cut and isinstance(e, Picked) and e.axis == axis else e for e in entries)
            for i, entries in value.items()
        }
        return self._shifted(picked, axis, start)

    def _rule_pad(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        plain = {a for a, (_, _, interior) in enumerate(params["padding_config"]) if interior == 0}
        value = self._moved(inputs[0], shapes[0], {a: a for a in plain})
        for axis, (low, high, _) in enumerate(params["padding_config"]):
            value = self._cut(value, axis, -low, low != 0 or high != 0)
        return self._joined([value, self._moved(inputs[1], (), {})], out)

    def _rule_concatenate(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        axis, start, parts = params["dimension"], 0, []
        for value, shape in zip(inputs, shapes, strict=True):
            parts.append(self._cut(value, axis, -start, shape[axis] != out[axis]))
            start += shape[axis]
        return self._joined(parts, out)

    def _rule_dynamic_slice(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        whole = {a: a for a in range(len(out)) if out[a] == shapes[0][a]}
        rest = [self._moved(v, s, {}) for v, s in zip(inputs[1:], shapes[1:], strict=True)]
        return self._joined([self._moved(inputs[0], shapes[0], whole), *rest], out)

    def _rule_dot_general(self, params: dict, inputs: list, shapes: list, out: tuple) -> Dependence:
        contracted, batched = params["dimension_numbers"]
        parts, start = [], len(batched[0])
        for side in (0, 1):
            axes = {a: i for i, a in enumerate(batched[side])}
            for a in range(len(shapes[side])):
                if a not in batched[side] and a not in contracted[side]:
                    axes[a], start = start, start + 1
            parts.append(self._moved(inputs[side], shapes[side], axes))
        return self._joined(parts, out)

    def _gather(self, params: dict, inputs: list, shapes: list, out: tuple, index: int | None) -> Dependence:
        numbers, (operand, indices) = params["dimension_numbers"], shapes
        batch = [a for a in range(len(out)) if a not in numbers.offset_dims]  # axes that come from the indices
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        whole = [a for a in range(len(operand)) if a not in gone]
        axes: dict[int, Any] = {
            a: t for a, t in zip(whole, numbers.offset_dims, strict=True) if params["slice_sizes"][a] == operand[a]
        }
        for a, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            axes[a] = batch[i]
        if index is not None and not self._depth and len(batch) == 1 and len(numbers.collapsed_slice_dims) == 1:
            axes[numbers.collapsed_slice_dims[0]] = Picked(batch[0], index)
        moved = self._moved(inputs[0], operand, axes)
        return self._joined([moved, self._moved(inputs[1], indices, dict(enumerate(batch)))], out)

    # Control flow

    def _cond(self, params: dict, inputs: list, shapes: list) -> list[Dependence]:
        choice, operands = self._moved(inputs[0], shapes[0], {}), inputs[1:]
        made = [self._inside(branch, operands) for branch in params["branches"]]
        avals = params["branches"][0].out_avals
        return [self._joined([choice, *parts], a.shape) for a, *parts in zip(avals, *made, strict=True)]

    def _inside(self, inner: Any, values: list[Dependence]) -> list[Dependence]:
        """Dependences of the outputs of a program whose other values are not known."""
        self._depth += 1
        opaque = [v or self._node(("opaque", len(self._nodes))) for v in values]
        found = self._run(*_opened(inner, self), opaque)
        self._depth -= 1
        return [v if isinstance(v, dict) else {} for v in found]

    def _scan(self, params: dict, inputs: list, shapes: list) -> list[Dependence]:
        """Outputs of a scan. `time` is an axis of its own, along which the carry lags one step behind."""
        body, length = params["jaxpr"], params["length"]
        constants, count = params["num_consts"], params["num_carry"]
        consts, start, xs = inputs[:constants], inputs[constants : constants + count], inputs[constants + count :]
        if length == 0:
            return [*start, *[{}] * (len(body.out_avals) - count)]
        self._times.append(length)
        time = -len(self._times)
        lag, first = (1, length - 1) if params["reverse"] else (-1, 0)
        carried = [a.shape for a in body.out_avals[:count]]

        def step(carry: list[Dependence], rows: list[Dependence]) -> tuple[list[Dependence], list[Dependence]]:
            made = self._inside(body, [*consts, *carry, *rows])
            return made[:count], made[count:]

        def lagged(carry: list[Dependence]) -> list[Dependence]:
            shifted = [self._shifted(v, time, lag) for v in carry]
            return [{i: tuple(self._near(e, time, n) for e, n in zip(es, self._shapes[i], strict=True))
                     for i, es in v.items()} for v in shifted]  # fmt: skip

        def settled(carry: list[Dependence]) -> list[Dependence]:
            while True:
                later = lagged(step(carry, rows)[0])
                joined = [self._joined([a, b], s) for a, b, s in zip(carry, later, carried, strict=True)]
                if joined == carry:
                    return carry
                carry = joined

        shapes = shapes[constants + count :]
        rows = [
            self._moved(v, s, {a: a - 1 if a else time for a in range(len(s))}) for v, s in zip(xs, shapes, strict=True)
        ]
        early, early_made = step(start, [self._fixed(v, time, first) for v in rows])
        carry = settled([{}] * count)  # as if the start depended on nothing
        late, made = step(carry, rows)
        if length > 1:
            second = [self._fixed(v, time, first - lag) for v in carry]
            if not all(self._covers(a, b) for a, b in zip(second, early, strict=True)):
                carry = settled([self._joined([a, b], s) for a, b, s in zip(carry, early, carried, strict=True)])
                late, made = step(carry, rows)
        last = first - lag * (length - 1)
        final = early if length == 1 else [self._fixed(v, time, last) for v in late]
        outputs = []
        for aval, whole, opening in zip(body.out_avals[count:], made, early_made, strict=True):
            shape = (length, *aval.shape)
            axes = {a: a + 1 for a in range(len(aval.shape))} | {time: 0}
            steady = self._moved(whole, aval.shape, axes)
            opening = self._moved(opening, aval.shape, axes)
            if not self._covers(self._fixed(steady, 0, first), opening):
                steady = self._joined([steady, opening], shape)
            outputs.append(steady)
        self._times.pop()
        return [*final, *outputs]

    def _near(self, entry: Entry, time: int, size: int) -> Entry:
        far = isinstance(entry, Along) and entry.axis == time and max(map(abs, entry.offsets)) > _FARTHEST
        return self._collapsed(entry, (), size) if far else entry

    def _fixed(self, value: Dependence, axis: int, position: int) -> Dependence:
        """What the entry at one position of an axis depends on."""

        def fix(entry: Entry, size: int) -> Entry:
            if isinstance(entry, At) or entry.axis != axis:
                return entry
            if isinstance(entry, Picked):
                return At(None)
            found = frozenset(position + o for o in entry.offsets if 0 <= position + o < size)
            return At(None if len(found) == size else found)

        return {i: tuple(fix(e, n) for e, n in zip(es, self._shapes[i], strict=True)) for i, es in value.items()}

    def _covers(self, larger: Dependence, smaller: Dependence) -> bool:
        def covers(a: Entry, b: Entry) -> bool:
            if isinstance(a, At) and isinstance(b, At):
                return a.positions is None or (b.positions is not None and b.positions <= a.positions)
            return a == b or a == At(None)

        return all(
            i in larger and all(covers(a, b) for a, b in zip(larger[i], entries, strict=True))
            for i, entries in smaller.items()
        )


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)


def _opened(inner: Any, owner: Dependences) -> tuple[Any, list[int]]:
    """A jaxpr and its constants."""
    return getattr(inner, "jaxpr", inner), [owner._constant(c) for c in getattr(inner, "consts", ())]
