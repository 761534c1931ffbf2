"""Linear-Gaussian conditional distributions and their exact algebra: compose, disintegrate, invert.

A kernel is y = A x + b + F z with z standard normal, that is y given x ~ N(A x + b, F F'). It keeps the factor F and
never the covariance: factors stay positive semidefinite under every verb, they resolve standard deviations down to
rounding (covariances only down to its square root), and they may be singular, so that deterministic maps, copies
and exact observations are kernels like all others. A state is a kernel without source (n = 0).

All conditioning goes through one function, `regress`. Sources: K. Cho, B. Jacobs, "Disintegration and Bayesian
inversion via string diagrams" (2019); D. Braithwaite, J. Hedges, T. St Clere Smithe, "The compositional structure
of Bayesian inference" (2023); the square-root form is that of Kaminski, Bryson and Schmidt (1971).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from bayeslens.core.errors import InputError
from bayeslens.core.finite import as_floating
from bayeslens.core.kernel import Kernel


class Regression(NamedTuple):
    """What `regress` returns; see there."""

    gain: Float[Array, "rest given"]
    factor: Float[Array, "rest noise"]
    log_prob: Float[Array, ""]


@jax.jit
def regress(
    given: Float[Array, "given noise"],
    rest: Float[Array, "rest noise"],
    residual: Float[Array, " given"] | None = None,
    *,
    scale: Float[Array, " given"] | None = None,
    magnitude: Float[Array, " given"] | None = None,
) -> Regression:
    """Regress `rest` z on `given` z, where z is standard normal: the one place where Gaussians are conditioned.

    Args:
        given: factor of the variables that become known. It may be singular.
        rest: factor of the variables to predict from them.
        residual: observed values of the known variables less their means; None leaves `log_prob` zero.
        scale: size of each known variable's standard deviation before any cancellation; what is smaller than
            rounding at this scale counts as zero. By default the norms of the rows of `given`.
        magnitude: size of the numbers that `residual` is a difference of, in the same sense.

    Returns:
        `gain` K with E[rest z given (given z = r)] = K r; the `factor` of what remains of `rest`; and the `log_prob`
        of the residual, a density with respect to Lebesgue measure on the support, which is minus infinity off it.

    >>> result = regress(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 0.0]]), jnp.array([2.0]))
    >>> round(float(result.gain[0, 0]), 4), round(float((result.factor @ result.factor.T)[0, 0]), 4)
    (0.5, 0.5)
    """
    dtype, (size, noise) = given.dtype, given.shape
    tolerance = 32 * max(size, noise, 1) * jnp.finfo(dtype).eps
    if size == 0:
        return Regression(jnp.zeros((rest.shape[0], 0), dtype), rest, jnp.zeros((), dtype))
    if noise == 0:  # constants: nothing to regress on, but the residual may still be impossible
        given, rest = jnp.zeros((size, 1), dtype), jnp.zeros((rest.shape[0], 1), dtype)
        noise = 1
    # Change units so that every variable has scale one: the rank must not depend on the user's units.
    norms = jnp.linalg.norm(jax.lax.stop_gradient(given), axis=1)
    scale = norms if scale is None else jax.lax.stop_gradient(scale)
    unit = jnp.where(scale > 0, scale, 1)
    scaled = given / unit[:, None]
    # The basis of the support is a constant under differentiation: derivatives of singular vectors do not exist
    # where singular values coincide, and what is computed in the basis has the right derivatives without them.
    basis, singular, _ = jnp.linalg.svd(jax.lax.stop_gradient(scaled), full_matrices=False)
    kept = (singular > tolerance).astype(dtype)
    basis = basis * kept
    padded = jnp.concatenate([(basis.T @ scaled).T, jnp.diag(1 - kept)])
    q, r = jnp.linalg.qr(padded)  # the directions that are not kept become unit columns, so that r is invertible
    q = q[:noise]
    whiten = jax.scipy.linalg.solve_triangular(r.T, (basis / unit[:, None]).T, lower=True)
    along = rest @ q
    factor = rest - along @ q.T
    # A row that was all predicted is zero, not rounding.
    vanished = jnp.linalg.norm(jax.lax.stop_gradient(factor), axis=1) <= tolerance * jnp.linalg.norm(rest, axis=1)
    factor = jnp.where(vanished[:, None], 0, factor)
    if residual is None:
        return Regression(along @ whiten, factor, jnp.zeros((), dtype))
    white = whiten @ residual
    # The volume that the change of units gives the support, by elimination with pivots: unlike a determinant of
    # squares it stands units that differ by many orders of magnitude.
    lower, upper = jax.scipy.linalg.lu(jnp.concatenate([basis * unit[:, None], jnp.diag(1 - kept)]), permute_l=True)
    log_unit = jnp.log(jnp.abs(jnp.diag(upper))).sum() + jnp.linalg.slogdet(lower.T @ lower)[1] / 2
    log_volume = jnp.log(jnp.abs(jnp.diag(r))).sum() + log_unit
    log_prob = -(white @ white) / 2 - log_volume - kept.sum() * jnp.log(2 * jnp.pi) / 2
    off = residual / unit - basis @ (basis.T @ (residual / unit))
    projector = jnp.abs(jnp.eye(size, dtype=dtype) - basis @ basis.T)
    magnitude = jnp.abs(residual) if magnitude is None else magnitude
    allowed = tolerance * (projector @ (magnitude / unit) + (scale / unit) * (1 + jnp.linalg.norm(white)))
    return Regression(along @ whiten, factor, jnp.where((jnp.abs(off) <= allowed).all(), log_prob, -jnp.inf))


def factor_of(covariance: Real[ArrayLike, "n n"] | Sequence) -> Float[Array, "n n"]:
    """A matrix F with F F' = covariance, of the covariance's rank, however singular.

    >>> f = factor_of(jnp.array([[1.0, 1.0], [1.0, 1.0]]))
    >>> (f @ f.T).round(4).tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    Raises:
        InputError: not a square matrix, missing values, not symmetric, or a negative eigenvalue.
    """
    covariance = as_floating(covariance)
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise InputError(f"a covariance of shape {covariance.shape} is not a square matrix")
    _check_finite(covariance, "covariance")
    factor, asymmetry, lowest = _factor(covariance)
    if not isinstance(lowest, jax.core.Tracer):
        allowed = 320 * max(covariance.shape[0], 1) * np.finfo(covariance.dtype).eps
        if asymmetry > allowed or lowest < -allowed:
            raise InputError(
                f"the covariance is not symmetric positive semidefinite: asymmetry {asymmetry:.3g}, lowest "
                f"eigenvalue {lowest:.3g} in units of the standard deviations"
            )
    return factor


@jax.jit
def _factor(covariance: Array) -> tuple[Array, Array, Array]:
    """The factor, the asymmetry and the lowest eigenvalue, both in units of the standard deviations."""
    size = covariance.shape[0]
    tolerance = 32 * max(size, 1) * jnp.finfo(covariance.dtype).eps
    variance = jax.lax.stop_gradient(jnp.diag(covariance))
    unit = jnp.sqrt(jnp.where(variance > 0, variance, 1))
    scaled = covariance / unit[:, None] / unit
    values, basis = jnp.linalg.eigh(jax.lax.stop_gradient(scaled))
    kept = (values > tolerance).astype(covariance.dtype)
    basis = basis * kept  # a constant, as in `regress`
    inner = basis.T @ scaled @ basis
    root = jnp.linalg.cholesky((inner + inner.T) / 2 + jnp.diag(1 - kept))
    return unit[:, None] * (basis @ root), jnp.abs(scaled - scaled.T).max(initial=0), values.min(initial=0)


class LinearGaussianKernel(Kernel):
    """A conditional distribution y given x ~ N(A x + b, F F'), possibly degenerate.

    Args:
        matrix: A, shape (target, source). A state has shape (target, 0).
        offset: b, shape (target,).
        factor: F, shape (target, any).

    Bayesian linear regression, with weights ~ N(0, I) and noise of standard deviation 0.5:

    >>> X, y = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), jnp.array([0.1, 0.9, 2.1])
    >>> prior = LinearGaussianKernel.state(jnp.zeros(2), jnp.eye(2))
    >>> likelihood = LinearGaussianKernel(X, jnp.zeros(3), 0.5 * jnp.eye(3))
    >>> posterior, log_evidence = likelihood.condition(prior, y)
    >>> [round(float(m), 2) for m in posterior.mean], round(float(log_evidence), 2)
    ([0.12, 0.9], -3.61)

    Raises:
        InputError: shapes that do not fit.
    """

    matrix: Float[Array, "target source"] = eqx.field(converter=as_floating)
    offset: Float[Array, " target"] = eqx.field(converter=as_floating)
    factor: Float[Array, "target noise"] = eqx.field(converter=as_floating)

    def __check_init__(self):
        shapes = self.matrix.shape, self.offset.shape, self.factor.shape
        if [len(s) for s in shapes] != [2, 1, 2] or len({s[0] for s in shapes}) > 1:
            raise InputError(
                f"matrix, offset and factor have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}; "
                "(target, source), (target,) and (target, any) are needed"
            )

    @classmethod
    def from_covariance(
        cls,
        matrix: Real[ArrayLike, "target source"] | Sequence,
        offset: Real[ArrayLike, " target"] | Sequence,
        covariance: Real[ArrayLike, "target target"] | Sequence,
    ) -> LinearGaussianKernel:
        """The kernel with this noise covariance, which may be singular.

        >>> LinearGaussianKernel.from_covariance([[2.0]], [0.0], [[9.0]]).covariance.round(3).tolist()
        [[9.0]]

        Raises:
            InputError: missing values, or a covariance that is not symmetric positive semidefinite.
        """
        _check_finite(matrix, "matrix")
        _check_finite(offset, "offset")
        return cls(matrix, offset, factor_of(covariance))

    @classmethod
    def state(
        cls, mean: Real[ArrayLike, " target"] | Sequence, covariance: Real[ArrayLike, "target target"] | Sequence
    ) -> LinearGaussianKernel:
        """The unconditional normal distribution with this mean and covariance.

        >>> LinearGaussianKernel.state([1.0], [[4.0]]).mean.tolist()
        [1.0]
        """
        mean = as_floating(mean)
        return cls.from_covariance(jnp.zeros((*mean.shape, 0), mean.dtype), mean, covariance)

    @classmethod
    def deterministic(
        cls,
        matrix: Real[ArrayLike, "target source"] | Sequence,
        offset: Real[ArrayLike, " target"] | Sequence | None = None,
    ) -> LinearGaussianKernel:
        """The affine map y = A x + b as a kernel without noise: identity, copy, discard and projections are such.

        >>> LinearGaussianKernel.deterministic([[1.0], [1.0]]).given([3.0]).mean.tolist()
        [3.0, 3.0]
        """
        matrix = as_floating(matrix)
        offset = jnp.zeros(matrix.shape[:1], matrix.dtype) if offset is None else offset
        return cls(matrix, offset, jnp.zeros((matrix.shape[0], 0), matrix.dtype))

    @classmethod
    def identity(cls, size: int) -> LinearGaussianKernel:
        """The kernel that returns its input.

        >>> LinearGaussianKernel.identity(1).matrix.tolist()
        [[1.0]]
        """
        return cls.deterministic(jnp.eye(size))

    @property
    def source_size(self) -> int:
        """The length of x."""
        return self.matrix.shape[1]

    @property
    def target_size(self) -> int:
        """The length of y."""
        return self.matrix.shape[0]

    @property
    def mean(self) -> Float[Array, " target"]:
        """The mean of a state (of a kernel: the offset b)."""
        return self.offset

    @property
    def covariance(self) -> Float[Array, "target target"]:
        """The covariance F F' of y given x."""
        return self.factor @ self.factor.T

    def __call__(self, x: Real[ArrayLike, "*batch source"] | Sequence = ()) -> dist.MultivariateNormal:
        """The distribution of y given x as NumPyro's multivariate normal, batch shape x's leading axes.

        Raises:
            InputError: the covariance is singular, so that there is no density; use `log_prob` of this class.

        >>> LinearGaussianKernel([[2.0]], [1.0], [[3.0]])(jnp.ones((4, 1))).batch_shape
        (4,)
        """
        wide = jnp.pad(self.factor, ((0, 0), (0, max(0, self.target_size - self.factor.shape[1]))))
        triangle = jnp.linalg.qr(wide.T, mode="r").T
        diagonal = jnp.diag(triangle)
        if not isinstance(diagonal, jax.core.Tracer) and self.target_size:
            tolerance = 32 * max(self.factor.shape) * jnp.finfo(diagonal.dtype).eps
            if (jnp.abs(diagonal) <= tolerance * jnp.linalg.norm(self.factor, axis=1)).any():
                raise InputError(
                    "the covariance is singular: there is no density; use `log_prob`, `mean`, `covariance`"
                )
        loc = jnp.asarray(x, self.matrix.dtype) @ self.matrix.T + self.offset
        return dist.MultivariateNormal(loc, scale_tril=triangle * jnp.where(diagonal < 0, -1, 1))

    def given(self, x: Real[ArrayLike, " source"] | Sequence) -> LinearGaussianKernel:
        """The state at one x.

        >>> LinearGaussianKernel([[2.0]], [1.0], [[3.0]]).given([1.0]).mean.tolist()
        [3.0]
        """
        x = _vector(x, self.source_size, "x")
        empty = jnp.zeros((self.target_size, 0), self.matrix.dtype)
        return LinearGaussianKernel(empty, self.matrix @ x + self.offset, self.factor)

    def log_prob(
        self, y: Real[ArrayLike, " target"] | Sequence, x: Real[ArrayLike, " source"] | Sequence = ()
    ) -> Float[Array, ""]:
        """Log density of y given x, on the support if the covariance is singular; minus infinity off the support.

        >>> line = LinearGaussianKernel.state([0.0, 0.0], [[1.0, 1.0], [1.0, 1.0]])
        >>> round(float(line.log_prob([0.0, 0.0])), 4), float(line.log_prob([0.0, 1.0]))
        (-1.2655, -inf)
        """
        y, x = _vector(y, self.target_size, "y"), _vector(x, self.source_size, "x")
        residual = y - self.matrix @ x - self.offset
        magnitude = jnp.abs(y) + jnp.abs(self.matrix) @ jnp.abs(x) + jnp.abs(self.offset)
        return regress(self.factor, self.factor[:0], residual, magnitude=magnitude).log_prob

    def then(self, other: LinearGaussianKernel) -> LinearGaussianKernel:
        """First this kernel, then `other`. Also written `>>`.

        >>> double = LinearGaussianKernel.deterministic([[2.0]])
        >>> (LinearGaussianKernel.state([1.0], [[1.0]]) >> double).covariance.round(3).tolist()
        [[4.0]]

        Raises:
            InputError: the target of this kernel is not the source of the other.
        """
        if self.target_size != other.source_size:
            raise InputError(
                f"cannot compose: the first kernel ends in {self.target_size} numbers, "
                f"the second starts from {other.source_size}"
            )
        factor = jnp.concatenate([other.matrix @ self.factor, other.factor], axis=1)
        return LinearGaussianKernel(
            other.matrix @ self.matrix, other.matrix @ self.offset + other.offset, _narrow(factor)
        )

    __rshift__ = then

    def push(self, state: LinearGaussianKernel) -> LinearGaussianKernel:
        """The distribution of y when x has distribution `state`.

        >>> LinearGaussianKernel([[1.0]], [0.0], [[1.0]]).push(LinearGaussianKernel.state([3.0], [[1.0]])).mean.tolist()
        [3.0]
        """
        return state.then(self)

    def tensor(self, other: LinearGaussianKernel) -> LinearGaussianKernel:
        """Both kernels side by side and independent. Also written `@`.

        >>> one = LinearGaussianKernel.state([0.0], [[1.0]])
        >>> (one @ one).covariance.round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        """
        offset = jnp.concatenate([self.offset, other.offset])
        return LinearGaussianKernel(_block(self.matrix, other.matrix), offset, _block(self.factor, other.factor))

    __matmul__ = tensor

    def marginal(self, *coordinates: int) -> LinearGaussianKernel:
        """Keep these coordinates of y, in this order.

        >>> LinearGaussianKernel.state([1.0, 2.0], jnp.eye(2)).marginal(1).mean.tolist()
        [2.0]
        """
        if any(not -self.target_size <= c < self.target_size for c in coordinates):
            raise InputError(f"the coordinates {coordinates} are not all among the {self.target_size} of the target")
        index = np.array(coordinates, int)
        return LinearGaussianKernel(self.matrix[index], self.offset[index], self.factor[index])

    def joint(self, prior: LinearGaussianKernel) -> LinearGaussianKernel:
        """The joint distribution of (x, y) when x has distribution `prior`: a state.

        >>> LinearGaussianKernel([[2.0]], [0.0], [[1.0]]).joint(
        ...     LinearGaussianKernel.state([0.0], [[1.0]])).covariance.round(3).tolist()
        [[1.0, 2.0], [2.0, 5.0]]
        """
        self._check_prior(prior)
        x, y, mean = self._joint_factors(prior)
        mean = jnp.concatenate([prior.offset, mean])
        return LinearGaussianKernel(jnp.zeros((mean.size, 0), mean.dtype), mean, jnp.concatenate([x, y]))

    def disintegrate(self, given: int = 1) -> tuple[LinearGaussianKernel, LinearGaussianKernel]:
        """Split a joint p(u, v given x) into the marginal p(u given x) and the conditional p(v given x, u).

        Args:
            given: u is the first `given` coordinates of the target, v the others.

        Returns:
            marginal and conditional; the source of the conditional is (x, u). If u is degenerate, the conditional
            is unique on u's support only; there `condition` tells whether a value has support.

        >>> _, conditional = LinearGaussianKernel.state([0.0, 0.0], [[2.0, 1.0], [1.0, 1.0]]).disintegrate()
        >>> conditional.matrix.round(3).tolist(), conditional.covariance.round(3).tolist()
        ([[0.5]], [[0.5]])
        """
        if not 0 <= given <= self.target_size:
            raise InputError(f"cannot condition on {given} coordinates of a target that has {self.target_size}")
        u, v = range(given), range(given, self.target_size)
        first, second = self.marginal(*u), self.marginal(*v)
        gain, factor, _ = regress(first.factor, second.factor)
        matrix = jnp.concatenate([second.matrix - gain @ first.matrix, gain], axis=1)
        return first, LinearGaussianKernel(matrix, second.offset - gain @ first.offset, _narrow(factor))

    def invert(self, prior: LinearGaussianKernel) -> LinearGaussianKernel:
        """The Bayesian inverse p(x given y) at this prior: the kernel of posteriors.

        >>> noisy = LinearGaussianKernel([[1.0]], [0.0], [[1.0]])
        >>> noisy.invert(LinearGaussianKernel.state([0.0], [[1.0]])).matrix.round(3).tolist()
        [[0.5]]
        """
        self._check_prior(prior)
        x, y, mean = self._joint_factors(prior)
        gain, factor, _ = regress(y, x, scale=self._scale(prior))
        return LinearGaussianKernel(gain, prior.offset - gain @ mean, _narrow(factor))

    def condition(
        self, prior: LinearGaussianKernel, value: Real[ArrayLike, " target"] | Sequence
    ) -> tuple[LinearGaussianKernel, Float[Array, ""]]:
        """Bayes' rule: what is believed about x after y was seen to be `value`, and the log evidence.

        Returns:
            the posterior state and log p(value). A value off the support of y gives NaN (there is no posterior)
            and minus infinity.

        >>> exact = LinearGaussianKernel.deterministic([[1.0, 1.0]])
        >>> posterior, _ = exact.condition(LinearGaussianKernel.state([0.0, 0.0], jnp.eye(2)), [3.0])
        >>> [round(float(m), 3) for m in posterior.mean]
        [1.5, 1.5]

        Raises:
            InputError: missing values or a wrong length.
        """
        self._check_prior(prior)
        _check_finite(value, "value")
        value = _vector(value, self.target_size, "value")
        x, y, mean = self._joint_factors(prior)
        magnitude = jnp.abs(value) + jnp.abs(self.matrix) @ jnp.abs(prior.offset) + jnp.abs(self.offset)
        residual = value - mean
        gain, factor, log_evidence = regress(y, x, residual, scale=self._scale(prior), magnitude=magnitude)
        exists = jnp.where(log_evidence > -jnp.inf, 0, jnp.nan)
        posterior = LinearGaussianKernel(
            prior.matrix, prior.offset + gain @ residual + exists, _narrow(factor) + exists
        )
        return posterior, log_evidence

    def isclose(self, other: LinearGaussianKernel) -> Bool[Array, ""]:
        """Whether both kernels are equal up to rounding, measured in standard deviations or in their own size.

        >>> one = LinearGaussianKernel.state([0.0], [[1.0]])
        >>> bool(one.isclose(one @ LinearGaussianKernel.state([], jnp.zeros((0, 0)))))
        True
        """
        if self.matrix.shape != other.matrix.shape:
            return jnp.array(False)
        tolerance = 1024 * max(*self.matrix.shape, 1) * jnp.finfo(self.matrix.dtype).eps
        deviation = jnp.linalg.norm(self.factor, axis=1) + jnp.linalg.norm(other.factor, axis=1)
        size = jnp.abs(self.offset) + jnp.abs(other.offset) + deviation
        slope = jnp.abs(self.matrix).max(initial=0) + jnp.abs(other.matrix).max(initial=0)
        return (
            (jnp.abs(self.offset - other.offset) <= tolerance * size).all()
            & (jnp.abs(self.matrix - other.matrix) <= tolerance * slope).all()
            & (jnp.abs(self.covariance - other.covariance) <= tolerance * jnp.outer(deviation, deviation)).all()
        )

    def _joint_factors(self, prior: LinearGaussianKernel) -> tuple[Array, Array, Array]:
        """Factors of x and of y over one noise vector, and the mean of y."""
        x = jnp.concatenate([prior.factor, jnp.zeros((self.source_size, self.factor.shape[1]), self.factor.dtype)], 1)
        y = jnp.concatenate([self.matrix @ prior.factor, self.factor], axis=1)
        return x, y, self.matrix @ prior.offset + self.offset

    def _scale(self, prior: LinearGaussianKernel) -> Float[Array, " target"]:
        """The size of y's standard deviations before cancellation between the terms of A x."""
        spread = jnp.abs(self.matrix) @ jnp.linalg.norm(prior.factor, axis=1)
        return spread + jnp.linalg.norm(self.factor, axis=1)

    def _check_prior(self, prior: LinearGaussianKernel) -> None:
        if prior.source_size != 0 or prior.target_size != self.source_size:
            raise InputError(
                f"the prior takes {prior.source_size} numbers to {prior.target_size}; a state of {self.source_size} "
                "numbers is needed: LinearGaussianKernel.state(mean, covariance)"
            )


def _narrow(factor: Float[Array, "target noise"]) -> Float[Array, "target target"]:
    """A factor of the same covariance with no more columns than rows."""
    if factor.shape[1] <= factor.shape[0]:
        return factor
    return jnp.linalg.qr(factor.T, mode="r").T


def _block(first: Array, second: Array) -> Array:
    """The block-diagonal matrix of two matrices, which may be empty."""
    right, left = ((0, 0), (0, second.shape[1])), ((0, 0), (first.shape[1], 0))
    return jnp.concatenate([jnp.pad(first, right), jnp.pad(second, left)])


def _vector(value: ArrayLike | Sequence, size: int, name: str) -> Array:
    value = as_floating(value)
    if value.shape != (size,):
        raise InputError(f"{name} has shape {value.shape}, but ({size},) is needed")
    return value


def _check_finite(value: ArrayLike | Sequence, name: str) -> None:
    if not isinstance(value, jax.core.Tracer) and not np.isfinite(np.asarray(value, float)).all():
        raise InputError(f"{name} has missing or infinite entries: remove or impute them first")
