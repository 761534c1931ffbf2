"""How information passes through Markov kernels: pulled back from where they end, and followed forward.

Both passes are rules for kinds of kernels: `spaces`, `pull_back`, `guide`, `observe` and `log_density`. They compose
along the edges of a tree as derivatives do (`backward_filtering_forward_guiding.py`), and another kind of kernel joins
by registering its own rules.

| kernel | what is pulled back | weights |
| --- | --- | --- |
| `FiniteKernel` | the values of log g | equal |
| `LinearGaussianKernel` | log g = c + F'x - x'Hx/2 | equal |
| `NonlinearGaussianKernel` | the same, through its linear-Gaussian `auxiliary` | ratios of Gaussian integrals |
| `StochasticDifferentialEquation` | the same, through its linear `auxiliary` | those of the Euler steps (Girsanov) |

Source: F. van der Meulen, M. Schauer, S. Sommer, "Automatic Backward Filtering Forward Guiding for Markov processes and
graphical models" (2020), later "Backward Filtering Forward Guiding" (2025).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from bayeslens.core.errors import InputError
from bayeslens.core.finite import FiniteKernel, as_floating
from bayeslens.core.kernel import Kernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel

# What is pulled back


class FiniteMessage(eqx.Module):
    """A function g on a finite set, by the logarithms of its values; a scalar for g on the unit.

    >>> float(FiniteMessage(jnp.array([0.0, -1.0]))(1))
    -1.0
    """

    log_values: Float[Array, "*states"]

    def __call__(self, x: Any) -> Float[Array, ""]:
        """Log g(x)."""
        return self.log_values[x] if self.log_values.ndim else self.log_values


class GaussianMessage(eqx.Module):
    """A function g on vectors, log g(x) = constant + potential' x - x' precision x / 2.

    >>> float(GaussianMessage(jnp.eye(1), jnp.ones(1), jnp.array(0.5))(jnp.array([2.0])))
    0.5
    """

    precision: Float[Array, "n n"]
    potential: Float[Array, " n"]
    constant: Float[Array, ""]

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """Log g(x)."""
        return self.constant + self.potential @ x - x @ self.precision @ x / 2


Message = FiniteMessage | GaussianMessage


# Kernels that need a simplified companion


class NonlinearGaussianKernel(Kernel):
    """y given x ~ N(mean(x), F F') with F = factor(x), and a linear-Gaussian kernel that resembles it.

    Args:
        mean: from x, shape (source,), to shape (target,).
        factor: from x to shape (target, noise).
        auxiliary: a linear-Gaussian kernel between the same spaces. The closer it is, the more even are the weights.
            Estimates are unbiased whatever it is, but with less noise than the kernel a few weights may be huge.

    Functions may be Equinox modules or `jax.tree_util.Partial`, whose arrays are then traced.

    >>> kernel = NonlinearGaussianKernel(jnp.sin, lambda x: jnp.eye(1), LinearGaussianKernel([[1.0]], [0.0], [[1.0]]))
    >>> kernel(jnp.zeros((4, 1))).batch_shape
    (4,)
    """

    mean: Callable
    factor: Callable
    auxiliary: LinearGaussianKernel

    def __call__(self, x: Float[ArrayLike, "*batch source"]) -> dist.MultivariateNormal:
        """The distribution of y given x; the covariance must not be singular."""
        mean = jnp.vectorize(self.mean, signature="(n)->(d)")(x)
        factor = jnp.vectorize(self.factor, signature="(n)->(d,k)")(x)
        return dist.MultivariateNormal(mean, covariance_matrix=factor @ jnp.swapaxes(factor, -1, -2))


class LinearEquation(eqx.Module):
    """The linear stochastic differential equation dX = (matrix X + offset) dt + diffusion dW.

    >>> LinearEquation([[-1.0]], [0.0], [[1.0]]).matrix.shape
    (1, 1)
    """

    matrix: Float[Array, "n n"] = eqx.field(converter=as_floating)
    offset: Float[Array, " n"] = eqx.field(converter=as_floating)
    diffusion: Float[Array, "n noise"] = eqx.field(converter=as_floating)


class StochasticDifferentialEquation(eqx.Module):
    """The solution of dX = drift(X) dt + diffusion(X) dW after some time, by Euler-Maruyama steps.

    The steps are the model: likelihoods are those of the discretized equation. More steps bring it closer to the
    equation itself.

    Args:
        drift: from x, shape (n,), to shape (n,).
        diffusion: from x to shape (n, noise).
        duration: the time that the edge takes.
        auxiliary: a linear equation that resembles this one where the paths are expected (see `linearize`), with no
            less noise: otherwise a few weights may be huge.
        num_steps: number of Euler steps.
    """

    drift: Callable
    diffusion: Callable
    duration: Float[Array, ""] = eqx.field(converter=as_floating)
    auxiliary: LinearEquation
    num_steps: int = eqx.field(static=True)


def linearize(drift: Callable, diffusion: Callable, point: Float[ArrayLike, " n"]) -> LinearEquation:
    """The linear equation that touches a nonlinear one at a point; the diffusion is frozen there.

    >>> linear = linearize(lambda x: -(x**3), lambda x: jnp.eye(1), jnp.array([1.0]))
    >>> linear.matrix.tolist(), linear.offset.tolist()
    ([[-3.0]], [2.0])
    """
    point = as_floating(point)
    matrix = jax.jacfwd(drift)(point)
    return LinearEquation(matrix, drift(point) - matrix @ point, diffusion(point))


# The rules. Default cases are kinds of kernels that have none


def _unknown(kernel: Any) -> InputError:
    return InputError(
        f"kernels of type {type(kernel).__name__} have no rules for this: register them (`spaces`, `pull_back` and "
        "`guide`; `observe` and `log_density` for leaves); stochastic differential equations are observed with noise"
    )


@functools.singledispatch
def spaces(kernel: Any) -> tuple[tuple[str, int], tuple[str, int]]:
    """What a kernel starts from and ends in: kind and size of each; the size of the unit is 0.

    >>> spaces(FiniteKernel.state([0.5, 0.5]))
    (('finite', 0), ('finite', 2))
    """
    raise _unknown(kernel)


@functools.singledispatch
def pull_back(kernel: Any, message: Message) -> tuple[Message, PyTree]:
    """The function x -> (kernel g)(x), or its simplification, and what `guide` will need of the way there.

    >>> kernel, g = FiniteKernel([[0.25, 0.75], [0.5, 0.5]]), FiniteMessage(jnp.array([0.0, -jnp.inf]))
    >>> jnp.exp(pull_back(kernel, g)[0].log_values).tolist()
    [0.25, 0.5]
    """
    raise _unknown(kernel)


@functools.singledispatch
def guide(kernel: Any, trail: PyTree, x: Any, key: PRNGKeyArray) -> tuple[Any, Any, Float[Array, ""]]:
    """Draw y from g(y) kernel(x, dy), normalized.

    Returns:
        y, the path to it (None if there is nothing in between), and the log weight.
    """
    raise _unknown(kernel)


@functools.singledispatch
def observe(kernel: Any, value: Any) -> Message:
    """The likelihood of an observed leaf as a function of its parent, or its simplification."""
    raise _unknown(kernel)


@functools.singledispatch
def log_density(kernel: Any, x: Any, value: Any) -> Float[Array, ""]:
    """The log likelihood of an observed leaf given its parent."""
    raise _unknown(kernel)


def _log(probs: Array) -> Array:
    """Logarithms whose derivative at zero is zero, not missing."""
    return jnp.where(probs > 0, jnp.log(jnp.where(probs > 0, probs, 1)), -jnp.inf)


def log_sum(terms: Array) -> Array:
    """Log of the sum of exponentials over the last axis, with the same care for what is impossible."""
    highest = jax.lax.stop_gradient(terms.max(-1, keepdims=True))
    shift = jnp.where(jnp.isfinite(highest), highest, 0)
    return _log(jnp.exp(terms - shift).sum(-1)) + shift[..., 0]


def _row(kernel: FiniteKernel, x: Any) -> Array:
    return _log(kernel.probs[x] if kernel.source_ndim else kernel.probs)


@spaces.register
def _(kernel: FiniteKernel):
    if kernel.source_ndim > 1 or len(kernel.target_shape) != 1:
        raise InputError(
            f"a finite kernel from {kernel.source_shape} to {kernel.target_shape}: flatten its sets to one axis each"
        )
    return ("finite", sum(kernel.source_shape)), ("finite", kernel.target_shape[0])


@pull_back.register
def _(kernel: FiniteKernel, message):
    pulled = FiniteMessage(log_sum(_log(kernel.probs) + message.log_values))
    return pulled, (pulled, message)


@guide.register
def _(kernel: FiniteKernel, trail, x, key):
    before, after = trail
    logits = _row(kernel, x) + after.log_values
    return jax.random.categorical(key, logits), None, log_sum(logits) - before(x)


@observe.register
def _(kernel: FiniteKernel, value):
    return FiniteMessage(_log(kernel.probs[..., value]))


@log_density.register
def _(kernel: FiniteKernel, x, value):
    return _row(kernel, x)[value]


def _integrate(factor: Array, message: GaussianMessage) -> GaussianMessage:
    """The function of m that is the mean of g(m + factor z), with z standard normal."""
    precision, potential = message.precision, message.potential
    root = jnp.linalg.cholesky(jnp.eye(factor.shape[1], dtype=factor.dtype) + factor.T @ precision @ factor)
    half = jax.scipy.linalg.solve_triangular(root, factor.T, lower=True)  # covariance of the guided step: half' half
    along, white = half @ precision, half @ potential
    constant = message.constant + white @ white / 2 - jnp.log(jnp.diag(root)).sum()
    return GaussianMessage(precision - along.T @ along, potential - along.T @ white, constant)


def _guided_step(mean: Array, factor: Array, message: GaussianMessage, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Draw mean + factor z, weighted by g; and the log of the mean of g."""
    root = jnp.linalg.cholesky(jnp.eye(factor.shape[1], dtype=factor.dtype) + factor.T @ message.precision @ factor)
    pull = jax.scipy.linalg.solve_triangular(
        root, factor.T @ (message.potential - message.precision @ mean), lower=True
    )
    noise = jax.random.normal(key, pull.shape, pull.dtype)
    drawn = mean + factor @ jax.scipy.linalg.solve_triangular(root.T, pull + noise, lower=False)
    return drawn, message(mean) + pull @ pull / 2 - jnp.log(jnp.diag(root)).sum()


def _moments(kernel: LinearGaussianKernel | NonlinearGaussianKernel, x: Array) -> tuple[Array, Array]:
    """Mean and factor of y given x; at least one column, since empty matrices have no Cholesky factor."""
    if isinstance(kernel, NonlinearGaussianKernel):
        return kernel.mean(x), kernel.factor(x)
    return kernel.matrix @ x + kernel.offset, jnp.pad(kernel.factor, ((0, 0), (0, int(not kernel.factor.shape[1]))))


@spaces.register
def _(kernel: LinearGaussianKernel):
    return ("vector", kernel.source_size), ("vector", kernel.target_size)


@pull_back.register
def _(kernel: LinearGaussianKernel, message):
    matrix, offset = kernel.matrix, kernel.offset
    inner = _integrate(_moments(kernel, jnp.zeros(kernel.source_size))[1], message)
    pulled = GaussianMessage(
        matrix.T @ inner.precision @ matrix, matrix.T @ (inner.potential - inner.precision @ offset), inner(offset)
    )
    return pulled, (pulled, message)


@observe.register
def _(kernel: LinearGaussianKernel, value):
    covariance = kernel.factor @ kernel.factor.T
    scaled = jnp.linalg.solve(covariance, jnp.column_stack([kernel.matrix, value - kernel.offset]))
    constant = dist.MultivariateNormal(kernel.offset, covariance).log_prob(value)
    return GaussianMessage(kernel.matrix.T @ scaled[:, :-1], kernel.matrix.T @ scaled[:, -1], constant)


for _rule in (spaces, pull_back, observe):
    _rule.register(NonlinearGaussianKernel, lambda kernel, *rest, rule=_rule: rule(kernel.auxiliary, *rest))


@guide.register(LinearGaussianKernel)
@guide.register(NonlinearGaussianKernel)
def _(kernel, trail, x, key):
    before, after = trail
    drawn, log_mean = _guided_step(*_moments(kernel, x), after, key)
    return drawn, None, log_mean - before(x)


@log_density.register(LinearGaussianKernel)
@log_density.register(NonlinearGaussianKernel)
def _(kernel, x, value):
    mean, factor = _moments(kernel, x)
    return dist.MultivariateNormal(mean, factor @ factor.T).log_prob(value)


@spaces.register
def _(kernel: StochasticDifferentialEquation):
    return (("vector", kernel.auxiliary.offset.shape[0]),) * 2


@pull_back.register
def _(kernel: StochasticDifferentialEquation, message):
    step, linear = kernel.duration / kernel.num_steps, kernel.auxiliary
    matrix = jnp.eye(linear.offset.shape[0], dtype=linear.matrix.dtype) + step * linear.matrix
    euler = LinearGaussianKernel(matrix, step * linear.offset, jnp.sqrt(step) * linear.diffusion)
    return jax.lax.scan(lambda after, _: pull_back(euler, after), message, None, kernel.num_steps, reverse=True)


@guide.register
def _(kernel: StochasticDifferentialEquation, trail, x, key):
    step = kernel.duration / kernel.num_steps

    def euler(x, now):
        (before, after), key = now
        drawn, log_mean = _guided_step(x + step * kernel.drift(x), jnp.sqrt(step) * kernel.diffusion(x), after, key)
        return drawn, (drawn, log_mean - before(x))

    last, (path, log_weights) = jax.lax.scan(euler, x, (trail, jax.random.split(key, kernel.num_steps)))
    return last, path, log_weights.sum()
