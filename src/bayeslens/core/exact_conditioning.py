"""A small language of normal draws, affine arithmetic and exact conditions, with exact posteriors.

A program gets a `Machine`, draws from it, computes with the draws, conditions on equalities and returns what it
wants to know. `x =:= y` of the paper is `machine.condition(x, y)`:

>>> def program(machine):
...     height = machine.normal(180.0, 10.0)
...     machine.condition(height + machine.normal(0.0, 10.0), 200.0)
...     return height
>>> posterior = run(program)
>>> round(float(posterior.mean), 4), round(float(posterior.covariance), 4)
(190.0, 50.0)

All draws are affine functions of independent standard normals z. A condition is a hyperplane that z lies on; what is
kept is the point of the conditions' intersection that is nearest to the origin, and the projector on the directions
that are still free. As variables keep their coefficients of z, "zero" is always judged at the variable's own size
before conditioning. The machine computes with NumPy in float64, whatever the precision of JAX.

Source: D. Stein, S. Staton, "Compositional semantics for probabilistic programs with exact conditioning" (2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

from bayeslens.core.errors import InputError

_TOLERANCE = 1e-11  # relative to a variable's size: far above float64 rounding, far below any real observation


class Affine:
    """A random array: `offset + coefficients @ z`. It adds, subtracts, scales, indexes, and `matrix @ affine` works.

    Args:
        coefficients: shape (*shape, draws).
        offset: shape `shape`.

    >>> def program(machine):
    ...     x = machine.normal(0.0, 1.0, shape=(2,))
    ...     return 2 * x[0] - np.array([1.0, 1.0]) @ x + 3
    >>> float(run(program).mean)
    3.0

    Raises:
        InputError: the result would not be affine, as with the product of two random variables.
    """

    __array_ufunc__ = None  # NumPy leaves `array + affine` and `array @ affine` to this class

    def __init__(self, coefficients: Any, offset: Any, *, spread: Any = None, magnitude: Any = None):
        self.coefficients, self.offset = np.asarray(coefficients, float), np.asarray(offset, float)
        # The sizes that coefficients and offset had before anything cancelled: rounding errors are relative to these.
        self._spread = np.linalg.norm(self.coefficients, axis=-1) if spread is None else np.asarray(spread)
        self._magnitude = np.abs(self.offset) if magnitude is None else np.asarray(magnitude)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the random array."""
        return self.offset.shape

    def __add__(self, other: Any) -> Affine:
        other = _affine(other)
        width = max(self.coefficients.shape[-1], other.coefficients.shape[-1])
        shape = np.broadcast_shapes(self.shape, other.shape)
        terms = [np.broadcast_to(_pad(a, width), (*shape, width)) for a in (self, other)]
        return Affine(
            terms[0] + terms[1],
            self.offset + other.offset,
            spread=np.hypot(self._spread, other._spread),
            magnitude=self._magnitude + other._magnitude,
        )

    __radd__ = __add__

    def __neg__(self) -> Affine:
        return self * -1.0

    def __sub__(self, other: Any) -> Affine:
        return self + (-_affine(other))

    def __rsub__(self, other: Any) -> Affine:
        return _affine(other) - self

    def __mul__(self, other: Any) -> Affine:
        factor = _number(other, "multiply")
        size = np.abs(factor)
        return Affine(
            self.coefficients * factor[..., None],
            self.offset * factor,
            spread=self._spread * size,
            magnitude=self._magnitude * size,
        )

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Affine:
        return self * (1 / _number(other, "divide"))

    def __rmatmul__(self, matrix: Any) -> Affine:
        matrix = _number(matrix, "multiply")
        size = np.abs(matrix)
        return Affine(
            np.tensordot(matrix, self.coefficients, (-1, 0)),
            matrix @ self.offset,
            spread=size @ self._spread,
            magnitude=size @ self._magnitude,
        )

    def __getitem__(self, index: Any) -> Affine:
        return Affine(
            self.coefficients[index],
            self.offset[index],
            spread=self._spread[index],
            magnitude=self._magnitude[index],
        )


class ExactPosterior(NamedTuple):
    """What `run` returns.

    `mean` has the shape of what the program returned, `covariance` that shape twice, and `log_evidence` is the log
    density of all conditions together, on their support: of the differences, so that stating a condition in other
    units changes it, though not the posterior.
    """

    mean: Float[np.ndarray, "*shape"]
    covariance: Float[np.ndarray, "*shape_twice"]
    log_evidence: float


class Machine:
    """Runs a program: `normal` draws, `condition` states an equality. `run` makes one."""

    def __init__(self):
        self._point, self._free = np.zeros(0), np.zeros((0, 0))  # nearest point, projector on free directions
        self._conditions: list[Affine] = []

    def normal(self, mean: Any, deviation: Any = 1.0, shape: tuple[int, ...] = ()) -> Affine:
        """Draw from a normal distribution.

        Args:
            mean: a number, array or random variable.
            deviation: standard deviation, a number or array; 0 makes a constant.
            shape: of the draw; broadcast with the shapes of mean and deviation.

        >>> float(run(lambda machine: machine.normal(machine.normal(0.0, 3.0), 4.0)).covariance)
        25.0

        Raises:
            InputError: a deviation that is negative, missing or random.
        """
        mean, deviation = _affine(mean), _number(deviation, "use as a standard deviation")
        if (deviation < 0).any():
            raise InputError("a standard deviation is negative")
        shape = np.broadcast_shapes(mean.shape, deviation.shape, shape)
        old, count = self._point.size, int(np.prod(shape))
        self._point = np.append(self._point, np.zeros(count))
        free = np.eye(old + count)
        free[:old, :old] = self._free
        self._free = free
        fresh = np.zeros((*shape, old + count))
        fresh.reshape(count, old + count)[:, old:] = np.eye(count)
        return mean + Affine(fresh, np.zeros(shape)) * np.broadcast_to(deviation, shape)

    def condition(self, left: Any, right: Any) -> None:
        """From now on `left` equals `right`, element by element: the paper's `left =:= right`.

        >>> def program(machine):
        ...     x, y = machine.normal(0.0, 1.0), machine.normal(0.0, 1.0)
        ...     machine.condition(x, y)
        ...     return x
        >>> float(run(program).covariance.round(12))
        0.5

        Raises:
            InputError: what was drawn and conditioned before rules this out.
        """
        difference = _affine(left) - right
        for index in np.ndindex(difference.shape):
            self._hold(difference[index])

    def posterior(self, value: Affine) -> ExactPosterior:
        """What is known about a random variable now.

        >>> machine = Machine()
        >>> machine.posterior(machine.normal(1.0, 2.0)).mean.tolist()
        1.0
        """
        value = _affine(value)
        rows = _pad(value, self._point.size)
        flat = rows.reshape(-1, self._point.size) @ self._free
        covariance = (flat @ flat.T).reshape(value.shape * 2)
        return ExactPosterior(rows @ self._point + value.offset, covariance, self._log_evidence())

    def _hold(self, difference: Affine) -> None:
        """Restrict z to the hyperplane on which a random number vanishes."""
        self._conditions.append(difference)
        row = _pad(difference, self._point.size)
        missing = -(row @ self._point + difference.offset)
        along = self._free @ row
        length = np.linalg.norm(along)
        if length <= _TOLERANCE * difference._spread:  # nothing random is left: the equality holds or it does not
            size = difference._magnitude + difference._spread * (1 + np.linalg.norm(self._point))
            if abs(missing) > _TOLERANCE * size:
                raise InputError(
                    f"a condition has no support: its sides always differ by {abs(missing):.6g}; "
                    "add noise to one side, or drop the condition"
                )
            return
        direction = self._free @ (along / length)  # projected twice, so that a short one is free to full precision
        direction /= np.linalg.norm(direction)
        self._point = self._point + direction * (missing / length)
        self._free = self._free - np.outer(direction, direction)

    def _log_evidence(self) -> float:
        """The density of all conditions at once: chaining one by one would depend on the order of redundant ones."""
        if not self._conditions:
            return 0.0
        rows = np.stack([_pad(c, self._point.size) for c in self._conditions])
        offsets = np.array([float(c.offset) for c in self._conditions])
        sizes = np.array([c._spread if c._spread > 0 else 1.0 for c in self._conditions])
        basis, singular, _ = np.linalg.svd(rows / sizes[:, None], full_matrices=False)
        kept = singular > _TOLERANCE
        basis, singular = basis[:, kept], singular[kept]
        white = basis.T @ (offsets / sizes) / singular
        lower, upper = scipy.linalg.lu(basis * sizes[:, None], permute_l=True)
        log_units = np.log(np.abs(np.diag(upper))).sum() + np.linalg.slogdet(lower.T @ lower)[1] / 2
        return float(-white @ white / 2 - np.log(singular).sum() - log_units - kept.sum() * np.log(2 * np.pi) / 2)


def run(program: Callable[[Machine], Any]) -> ExactPosterior:
    """The exact posterior of what a program returns: a random variable, an array of them, or a list to be stacked.

    >>> def line(machine):  # Bayesian linear regression
    ...     slope, intercept = machine.normal(0.0, 1.0), machine.normal(0.0, 1.0)
    ...     for x, y in [(0.0, 0.1), (1.0, 0.9), (2.0, 2.1)]:
    ...         machine.condition(intercept + slope * x + machine.normal(0.0, 0.5), y)
    ...     return [slope, intercept]
    >>> posterior = run(line)
    >>> posterior.mean.round(4).tolist(), round(posterior.log_evidence, 4)
    ([0.9023, 0.1209], -3.6138)

    Raises:
        InputError: a condition without support, or arithmetic that is not affine.
    """
    machine = Machine()
    result = program(machine)
    if isinstance(result, (list, tuple)):
        width = machine._point.size
        parts = [_affine(part) for part in result]
        result = Affine(np.stack([_pad(a, width) for a in parts]), np.stack([a.offset for a in parts]))
    return machine.posterior(result)


def _affine(value: Any) -> Affine:
    if isinstance(value, Affine):
        return value
    value = _number(value, "add")
    return Affine(np.zeros((*value.shape, 0)), value)


def _number(value: Any, verb: str) -> np.ndarray:
    if isinstance(value, Affine):
        raise InputError(f"cannot {verb} a random variable here: only affine programs have normal posteriors")
    value = np.asarray(value, float)
    if not np.isfinite(value).all():
        raise InputError("a number in the program is missing or infinite")
    return value


def _pad(value: Affine, width: int) -> np.ndarray:
    """Coefficients over all draws made so far."""
    short = width - value.coefficients.shape[-1]
    return np.pad(value.coefficients, [(0, 0)] * len(value.shape) + [(0, short)])
