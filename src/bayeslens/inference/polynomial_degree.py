"""Degrees of an array program's outputs as polynomials of some of its inputs, proved from its jaxpr.

A density that is quadratic in some latents, whatever the others are, is Gaussian in them. Operations that are not
known here are taken to be no polynomials, so that what is found is never less than the true degree. Inputs are taken
to be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

BEYOND = 3  # a higher degree, or no polynomial

_NAMES = """
add add_any broadcast_in_dim concatenate convert_element_type copy copy_p cumsum dynamic_update_slice neg pad real
reduce_precision reduce_sum reshape rev scatter-add select_n slice squeeze sub transpose
"""
_LINEAR = frozenset(_NAMES.split())
_BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})
# Operands that must not depend on the inputs: indices, conditions, divisors, matrices that are inverted.
_FIXED = {"div": (1,), "gather": (1,), "scatter-add": (1,), "select_n": (0,), "triangular_solve": (0,)}
_FIXED |= {"dynamic_slice": slice(1, None), "dynamic_update_slice": slice(2, None)}
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")


def polynomial_degrees(function: Callable, moving: Any, *fixed: Any) -> list[int]:
    """The degree of each output of a function as a polynomial of its first argument; `BEYOND` for more than two.

    Args:
        function: traced once, not compiled; its outputs are arrays.
        moving: first argument: arrays, or a pytree of them.
        fixed: other arguments.

    >>> import jax.numpy as jnp
    >>> polynomial_degrees(lambda x, s: [x @ jnp.exp(s), x @ (x / s), jnp.exp(x)], jnp.ones(2), jnp.ones(2))
    [1, 2, 3]
    """
    closed = jax.make_jaxpr(function)(moving, *fixed)
    moved = len(jax.tree.leaves(moving))
    inputs = [1] * moved + [0] * (len(closed.jaxpr.invars) - moved)
    return _run(closed.jaxpr, [0] * len(closed.consts), inputs)


def _run(jaxpr: Any, consts: Sequence[int], values: Sequence[int]) -> list[int]:
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

    def read(atom: Any) -> int:
        return 0 if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        inputs = [read(a) for a in equation.invars]
        plain = not any(inputs) or _holds_always(equation)
        found = [0] * len(equation.outvars) if plain else _degrees(equation, inputs)
        known.update(zip(equation.outvars, (min(d, BEYOND) for d in found), strict=True))
    return [read(a) for a in jaxpr.outvars]


def _holds_always(equation: Any) -> bool:
    """Whether it asks if numbers are finite, as distributions do of values."""
    name, atoms = equation.primitive.name, equation.invars
    if name in ("eq", "ne") and atoms[0] is atoms[1]:
        return True
    literals = [np.asarray(a.val) for a in atoms if hasattr(a, "val")]
    return name == "is_finite" or (name == "ne" and any(np.isinf(v).all() for v in literals))


def _degrees(equation: Any, inputs: list[int]) -> list[int]:
    name, params, outputs = equation.primitive.name, equation.params, len(equation.outvars)
    if name in _CALLS:
        return _opened(params.get("jaxpr", params.get("call_jaxpr")), inputs)
    if name == "scan":
        return _scan(params, inputs)
    if name == "cond" and not inputs[0]:
        made = [_opened(branch, inputs[1:]) for branch in params["branches"]]
        return [max(degrees) for degrees in zip(*made, strict=True)]
    fixed = _FIXED.get(name, ())
    if any(inputs[fixed] if isinstance(fixed, slice) else [inputs[i] for i in fixed]):
        return [BEYOND] * outputs
    if name in _LINEAR or name in _FIXED:
        return [max(inputs)] * outputs
    if name in _BILINEAR:
        return [sum(inputs)] * outputs
    if name == "square" or (name == "integer_pow" and params["y"] == 2):
        return [2 * inputs[0]]
    return [BEYOND] * outputs


def _opened(inner: Any, inputs: list[int]) -> list[int]:
    return _run(getattr(inner, "jaxpr", inner), [0] * len(getattr(inner, "consts", ())), inputs)


def _scan(params: dict[str, Any], inputs: list[int]) -> list[int]:
    """The carry's degrees grow until they stay."""
    constants, count = params["num_consts"], params["num_carry"]
    carry = inputs[constants : constants + count]
    while True:
        made = _opened(params["jaxpr"], [*inputs[:constants], *carry, *inputs[constants + count :]])
        later = [max(a, b) for a, b in zip(carry, made[:count], strict=True)]
        if later == carry:
            return made
        carry = later
