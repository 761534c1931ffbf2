"""Conditional distributions on finite sets, and their exact algebra: compose, disintegrate, invert.

A kernel p(y given x) is an array whose first axes are x and whose last axes are y; a state is a kernel without
source axes. All verbs are array operations, so that they work under `jit`, `vmap` and `grad`.

Conditional probabilities given something impossible do not exist. Rows of zeros say so: a kernel may be undefined
at some x (its `domain` leaves them out), a Bayesian inverse is defined on the support of the pushed-forward prior
and nowhere else, and a composite is undefined where its first part may land outside the domain of the second.
Inverses so restricted are unique and compose exactly.

Sources: K. Cho, B. Jacobs, "Disintegration and Bayesian inversion via string diagrams" (2019); D. Braithwaite,
J. Hedges, "Dependent Bayesian lenses" (2022), for the restriction to supports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from bayeslens.core.errors import InputError
from bayeslens.core.kernel import Kernel

_ROW_SUM_TOLERANCE = 1e-3  # wide enough for the rounding of thousands of float32 compositions


def as_floating(value: ArrayLike | Sequence) -> Array:
    """The value as a JAX array of floating point numbers; floats keep their precision.

    >>> as_floating([1, 2]).tolist()
    [1.0, 2.0]
    """
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


class FiniteKernel(Kernel):
    """A conditional distribution p(y given x) between finite sets, or between products of finite sets.

    Args:
        probs: shape (*source, *target): `probs[x]` holds the probabilities of y given x. A row sums to one; a row
            of zeros says that the kernel is undefined at that x.
        source_ndim: how many leading axes are the source; 0 makes a state, an unconditional distribution.

    >>> test = FiniteKernel([[0.99, 0.01], [0.1, 0.9]])  # rows: healthy, ill; columns: negative, positive
    >>> prior = FiniteKernel.state([0.98, 0.02])
    >>> posterior = test.invert(prior)
    >>> [round(float(p), 3) for p in posterior.probs[1]]
    [0.353, 0.647]

    Raises:
        InputError: negative or missing probabilities, or a row whose sum is neither one nor zero.
    """

    probs: Float[Array, "*source_and_target"] = eqx.field(converter=as_floating)
    source_ndim: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if not 0 <= self.source_ndim <= self.probs.ndim:
            raise InputError(
                f"source_ndim is {self.source_ndim}, but probs of shape {self.probs.shape} has no such axes"
            )
        if isinstance(self.probs, jax.core.Tracer):
            return
        probs = np.asarray(self.probs)
        if not (np.isfinite(probs).all() and (probs >= 0).all()):
            raise InputError("probs has missing, infinite or negative entries: probabilities lie between 0 and 1")
        sums = probs.reshape(*self.source_shape, -1).sum(-1)
        wrong = (np.abs(sums - 1) > _ROW_SUM_TOLERANCE) & (sums != 0)
        if wrong.any():
            row = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise InputError(
                f"the probabilities in row {row} sum to {sums[row]:.6g}: divide each row by its sum "
                "(a row of zeros means that the kernel is undefined there)"
            )

    @classmethod
    def state(cls, probs: Real[ArrayLike, "*target"] | Sequence) -> FiniteKernel:
        """The unconditional distribution with these probabilities.

        >>> FiniteKernel.state([0.5, 0.5]).target_shape
        (2,)
        """
        return cls(probs, source_ndim=0)

    @classmethod
    def identity(cls, shape: Sequence[int]) -> FiniteKernel:
        """The kernel that returns its input, on sets of these sizes.

        >>> FiniteKernel.identity((2,)).probs.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        """
        shape = tuple(shape)
        return cls(jnp.eye(int(np.prod(shape))).reshape(shape + shape), source_ndim=len(shape))

    @classmethod
    def copy(cls, shape: Sequence[int]) -> FiniteKernel:
        """The kernel that returns its input twice.

        >>> FiniteKernel.copy((2,)).target_shape
        (2, 2)
        """
        shape, size = tuple(shape), int(np.prod(shape))
        eye = jnp.eye(size)
        return cls((eye[:, :, None] * eye[:, None, :]).reshape(shape * 3), source_ndim=len(shape))

    @classmethod
    def discard(cls, shape: Sequence[int]) -> FiniteKernel:
        """The kernel that forgets its input: its target is the unit, which has no axes.

        >>> FiniteKernel.discard((3,)).target_shape
        ()
        """
        return cls(jnp.ones(tuple(shape)), source_ndim=len(tuple(shape)))

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Sizes of the sets that x ranges over."""
        return self.probs.shape[: self.source_ndim]

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Sizes of the sets that y ranges over."""
        return self.probs.shape[self.source_ndim :]

    @property
    def domain(self) -> Bool[Array, "*source"]:
        """Where the kernel is defined.

        >>> FiniteKernel([[0.5, 0.5], [0.0, 0.0]]).domain.tolist()
        [True, False]
        """
        return (self.probs > 0).any(axis=tuple(range(self.source_ndim, self.probs.ndim)))

    @property
    def support(self) -> Bool[Array, "*source_and_target"]:
        """Which y are possible given each x; for a state, its support object.

        >>> FiniteKernel.state([0.25, 0.0, 0.75]).support.tolist()
        [True, False, True]
        """
        return self.probs > 0

    def __call__(self, x: Any = ()) -> dist.Distribution:
        """The distribution of y given x, as NumPyro's Categorical over the target, flattened in row-major order.

        Args:
            x: an index into the source; for a source of several axes a tuple of indices. Arrays of indices give
                a batch. Where the kernel is undefined, the probabilities are NaN.

        >>> FiniteKernel([[0.5, 0.5], [0.25, 0.75]])(np.array([1, 0])).probs.tolist()
        [[0.25, 0.75], [0.5, 0.5]]
        """
        index = x if isinstance(x, tuple) else (x,)
        if len(index) != self.source_ndim:
            raise InputError(f"{len(index)} indices for a kernel whose source has {self.source_ndim} axes")
        rows = jnp.where(self.domain[(..., *[None] * len(self.target_shape))], self.probs, jnp.nan)[index]
        batch = rows.shape[: rows.ndim - len(self.target_shape)]
        return dist.Categorical(probs=rows.reshape(*batch, -1), validate_args=False)

    def given(self, x: Any) -> FiniteKernel:
        """The state at one x (an index, or a tuple of indices).

        >>> FiniteKernel([[0.5, 0.5], [0.25, 0.75]]).given(1).probs.tolist()
        [0.25, 0.75]
        """
        index = x if isinstance(x, tuple) else (x,)
        _check_index(index, self.source_shape, "x", "source")
        return FiniteKernel.state(self.probs[index])

    def then(self, other: FiniteKernel) -> FiniteKernel:
        """First this kernel, then `other`: the sum over y of p(y given x) q(z given y). Also written `>>`.

        Rows that may land where `other` is undefined are undefined.

        >>> flip = FiniteKernel([[0.0, 1.0], [1.0, 0.0]])
        >>> (FiniteKernel.state([0.25, 0.75]) >> flip).probs.tolist()
        [0.75, 0.25]

        Raises:
            InputError: the target of this kernel is not the source of the other.
        """
        if self.target_shape != other.source_shape:
            raise InputError(
                f"cannot compose: the first kernel ends in sets of sizes {self.target_shape}, "
                f"the second starts from {other.source_shape}"
            )
        axes = other.source_ndim
        through = jnp.tensordot(self.probs, other.probs, axes=axes, precision="highest")
        lost = jnp.tensordot(self.probs, (~other.domain).astype(self.probs.dtype), axes=axes) > 0
        return FiniteKernel(
            jnp.where(lost[(..., *[None] * len(other.target_shape))], 0, through), source_ndim=self.source_ndim
        )

    __rshift__ = then

    def push(self, state: FiniteKernel) -> FiniteKernel:
        """The distribution of y when x has distribution `state`.

        >>> FiniteKernel([[0.5, 0.5], [0.0, 1.0]]).push(FiniteKernel.state([0.5, 0.5])).probs.tolist()
        [0.25, 0.75]
        """
        return state.then(self)

    def tensor(self, other: FiniteKernel) -> FiniteKernel:
        """Both kernels side by side and independent: p(y given x) q(y' given x'). Also written `@`.

        >>> (FiniteKernel.state([0.5, 0.5]) @ FiniteKernel.state([1.0, 0.0])).probs.tolist()
        [[0.5, 0.0], [0.5, 0.0]]
        """
        outer = jnp.tensordot(self.probs, other.probs, axes=0)
        a, b = self.source_ndim, self.probs.ndim
        moved = jnp.moveaxis(outer, range(b, b + other.source_ndim), range(a, a + other.source_ndim))
        return FiniteKernel(moved, source_ndim=a + other.source_ndim)

    __matmul__ = tensor

    def marginal(self, *axes: int) -> FiniteKernel:
        """Keep these axes of the target, in this order; all others are summed out.

        >>> joint = FiniteKernel.state([[0.1, 0.2], [0.3, 0.4]])
        >>> [round(float(p), 2) for p in joint.marginal(1).probs]
        [0.4, 0.6]
        """
        count = len(self.target_shape)
        inside = [a % count for a in axes if -count <= a < count]
        if len(set(inside)) < len(axes):
            raise InputError(f"the axes {axes} are not different axes of a target that has {count}")
        kept = [self.source_ndim + a % count for a in axes]
        summed = self.probs.sum([a for a in range(self.source_ndim, self.probs.ndim) if a not in kept])
        order = list(range(self.source_ndim)) + [self.source_ndim + sorted(kept).index(a) for a in kept]
        return FiniteKernel(summed.transpose(order), source_ndim=self.source_ndim)

    def joint(self, prior: FiniteKernel) -> FiniteKernel:
        """The joint distribution of x and y when x has distribution `prior`: a state on (*source, *target).

        >>> FiniteKernel([[0.5, 0.5], [0.0, 1.0]]).joint(FiniteKernel.state([0.5, 0.5])).probs.tolist()
        [[0.25, 0.25], [0.0, 0.5]]
        """
        self._check_prior(prior)
        probs = prior.probs[(..., *[None] * len(self.target_shape))] * self.probs
        lost = (prior.support & ~self.domain).any()
        return FiniteKernel.state(jnp.where(lost, 0, probs))

    def disintegrate(self, given: int = 1) -> tuple[FiniteKernel, FiniteKernel]:
        """Split a joint p(u, v given x) into the marginal p(u given x) and the conditional p(v given x, u).

        Args:
            given: u is the first `given` axes of the target, v the others.

        Returns:
            marginal and conditional. The conditional is undefined where its condition has probability zero.

        >>> marginal, conditional = FiniteKernel.state([[0.2, 0.2], [0.0, 0.6], [0.0, 0.0]]).disintegrate()
        >>> conditional.domain.tolist(), conditional.probs[0].tolist()
        ([True, True, False], [0.5, 0.5])
        """
        if not 0 <= given <= len(self.target_shape):
            raise InputError(f"cannot condition on {given} axes of a target that has {len(self.target_shape)}")
        first = self.source_ndim + given
        total = self.probs.sum(tuple(range(first, self.probs.ndim)))
        divisor = jnp.where(total > 0, total, 1)[(..., *[None] * (self.probs.ndim - first))]
        return FiniteKernel(total, source_ndim=self.source_ndim), FiniteKernel(self.probs / divisor, source_ndim=first)

    def invert(self, prior: FiniteKernel) -> FiniteKernel:
        """The Bayesian inverse p(x given y) at this prior, defined on the support of the pushed-forward prior.

        >>> FiniteKernel([[1.0, 0.0], [0.5, 0.5]]).invert(FiniteKernel.state([1.0, 0.0])).domain.tolist()
        [True, False]
        """
        joint, sources = self.joint(prior), range(self.source_ndim)
        swapped = joint.marginal(*range(self.source_ndim, self.probs.ndim), *sources)
        return swapped.disintegrate(len(self.target_shape))[1]

    def condition(self, prior: FiniteKernel, value: Any) -> tuple[FiniteKernel, Float[Array, ""]]:
        """Bayes' rule: what is believed about x after y was seen to be `value`, and the log evidence.

        Args:
            prior: the distribution of x.
            value: an index into the target, or a tuple of indices.

        Returns:
            the posterior state and log p(value). An impossible value gives an undefined state (all zeros) and
            minus infinity.

        >>> kernel = FiniteKernel([[0.5, 0.5], [0.0, 1.0]])
        >>> posterior, log_evidence = kernel.condition(FiniteKernel.state([0.5, 0.5]), 0)
        >>> posterior.probs.tolist(), round(float(log_evidence), 4)
        ([1.0, 0.0], -1.3863)
        """
        index = value if isinstance(value, tuple) else (value,)
        _check_index(index, self.target_shape, "value", "target")
        joint = self.joint(prior).probs[(..., *index)]
        evidence = joint.sum()
        return FiniteKernel.state(joint / jnp.where(evidence > 0, evidence, 1)), jnp.log(evidence)

    def isclose(self, other: FiniteKernel) -> Bool[Array, ""]:
        """Whether both kernels are equal up to rounding and defined at the same places.

        >>> bool(FiniteKernel.state([0.5, 0.5]).isclose(FiniteKernel.state([0.25, 0.75])))
        False
        """
        if self.source_ndim != other.source_ndim or self.probs.shape != other.probs.shape:
            return jnp.array(False)
        tolerance = 64 * max(self.probs.shape, default=1) * jnp.finfo(self.probs.dtype).eps
        return (jnp.abs(self.probs - other.probs) <= tolerance).all() & (self.domain == other.domain).all()

    def _check_prior(self, prior: FiniteKernel) -> None:
        if prior.source_ndim != 0 or prior.probs.shape != self.source_shape:
            raise InputError(
                f"the prior has shape {prior.probs.shape} with {prior.source_ndim} source axes; "
                f"a state of shape {self.source_shape} is needed: FiniteKernel.state(probs)"
            )


def _check_index(index: tuple, shape: tuple[int, ...], name: str, what: str) -> None:
    if len(index) != len(shape):
        raise InputError(f"{name} has {len(index)} indices, but the {what} has {len(shape)} axes")
    for i, size in zip(index, shape, strict=True):
        if isinstance(i, (int, np.integer)) and not -size <= i < size:
            raise InputError(f"{name} {index} is outside the {what}, whose sizes are {shape}")
