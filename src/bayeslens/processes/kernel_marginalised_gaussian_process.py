"""Gaussian processes whose kernel, mean function and noise model are unknown too, and are averaged over.

The space of all candidates is their product: a coordinate, uniform between zero and one, says by the interval in which
it lies which kernel is meant; the hyperparameters of every candidate are latents, of which those of the chosen one
enter the marginal likelihood of the Gaussian process, while the others keep their priors. In this space of fixed
dimension nested sampling finds the evidence of all candidates together; the share of posterior draws that chose a
kernel is its posterior probability, and its own evidence follows. Mean functions and noise models are chosen likewise.
Predictions are averages over choices and hyperparameters at once.

Source: N. Kroupa, D. Yallup, W. Handley, M. Hobson, "Kernel-, mean- and noise-marginalised Gaussian processes for
exoplanet transits and H0 inference" (2023).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import special

from bayeslens.core.errors import InputError
from bayeslens.core.mixture import mix_members
from bayeslens.core.posterior import Posterior

if TYPE_CHECKING:
    from numpyro.distributions import Distribution

Candidates = Mapping[str, tuple[Callable, Mapping[str, Any]]]
_SIMULATIONS = 200  # of shrinkage, as nested sampling makes for its own error

# Kernels


def _squared_distance(first: Array, second: Array, length_scale: Any) -> Array:
    """Of all pairs of points, each of shape (n,) or (n, d), with a length scale for all or for each coordinate."""
    # Differences before the division: compiled code rounds two quotients in unlike ways, and equal points differ then.
    difference = jnp.atleast_1d(first)[:, None] - jnp.atleast_1d(second)
    scaled = (difference if difference.ndim == 3 else difference[:, :, None]) / length_scale
    return jnp.sum(scaled**2, axis=-1)


def _distance(first: Array, second: Array, length_scale: Any) -> Array:
    squared = _squared_distance(first, second, length_scale)
    # The root has no gradient at zero. Compiled code may compute the argument of a `where` twice, and not the same.
    return jnp.sqrt(squared + jnp.finfo(squared.dtype).tiny)


def squared_exponential(first: Array, second: Array, amplitude: Any, length_scale: Any) -> Float[Array, "first second"]:
    """Kernel of infinitely smooth functions.

    Args:
        first: points, of shape (n,) or (n, d).
        second: others.
        amplitude: standard deviation of values.
        length_scale: a number, or one for each coordinate.

    >>> [round(float(v), 3) for v in squared_exponential(jnp.zeros(1), jnp.array([0.0, 1.0]), 2.0, 1.0)[0]]
    [4.0, 2.426]
    """
    return amplitude**2 * jnp.exp(-_squared_distance(first, second, length_scale) / 2)


def exponential(first: Array, second: Array, amplitude: Any, length_scale: Any) -> Float[Array, "first second"]:
    """Kernel of rough functions, the Ornstein-Uhlenbeck process; arguments as for `squared_exponential`."""
    return amplitude**2 * jnp.exp(-_distance(first, second, length_scale))


def matern_32(first: Array, second: Array, amplitude: Any, length_scale: Any) -> Float[Array, "first second"]:
    """Kernel of functions that can be differentiated once; arguments as for `squared_exponential`."""
    scaled = np.sqrt(3.0) * _distance(first, second, length_scale)
    return amplitude**2 * (1 + scaled) * jnp.exp(-scaled)


def matern_52(first: Array, second: Array, amplitude: Any, length_scale: Any) -> Float[Array, "first second"]:
    """Kernel of functions that can be differentiated twice; arguments as for `squared_exponential`."""
    scaled = np.sqrt(5.0) * _distance(first, second, length_scale)
    return amplitude**2 * (1 + scaled + scaled**2 / 3) * jnp.exp(-scaled)


def rational_quadratic(
    first: Array, second: Array, amplitude: Any, length_scale: Any, power: Any
) -> Float[Array, "first second"]:
    """A mixture of squared exponentials of many length scales, fewer the larger `power` is.

    Other arguments as for `squared_exponential`.
    """
    return amplitude**2 * (1 + _squared_distance(first, second, length_scale) / (2 * power)) ** -power


def cosine(first: Array, second: Array, amplitude: Any, period: Any) -> Float[Array, "first second"]:
    """Kernel of sine waves of one period and any phase, on a line; arguments as for `squared_exponential`."""
    return amplitude**2 * jnp.cos(2 * jnp.pi * _difference(first, second) / period)


def periodic(
    first: Array, second: Array, amplitude: Any, length_scale: Any, period: Any
) -> Float[Array, "first second"]:
    """Kernel of smooth functions that repeat, on a line; `length_scale` has no unit, others as for `cosine`."""
    wave = jnp.sin(jnp.pi * _difference(first, second) / period) / length_scale
    return amplitude**2 * jnp.exp(-2 * wave**2)


def linear(first: Array, second: Array, amplitude: Any, origin: Any) -> Float[Array, "first second"]:
    """Kernel of straight lines through zero at `origin`, with slopes of standard deviation `amplitude`."""
    first, second = (jnp.atleast_1d(p) - origin for p in (first, second))
    return amplitude**2 * (first[:, None] * second if first.ndim == 1 else first @ second.T)


def _difference(first: Array, second: Array) -> Array:
    if jnp.ndim(first) != 1:
        raise InputError(f"cosine and periodic kernels take points on a line, of shape (n,), got {jnp.shape(first)}")
    return first[:, None] - second


# The model


@dataclass(frozen=True, eq=False)
class MarginalisedGaussianProcess:
    """A NumPyro model; see `marginalised_gaussian_process`, which makes it.

    Attributes:
        candidates: role ("kernel", "mean", "noise") -> name -> (function, priors of its hyperparameters).
    """

    candidates: dict[str, dict[str, tuple[Callable, dict[str, Any]]]]

    def __call__(self, x: Any, y: Any = None, errors: Any = 0.0, new_x: Any = None) -> None:
        import numpyro
        from numpyro.distributions import MultivariateNormal

        x, errors = jnp.asarray(x), jnp.asarray(errors)
        if x.ndim not in (1, 2) or (y is not None and jnp.shape(y) != x.shape[:1]):
            raise InputError(f"x needs shape (n,) or (n, d) and y (n,), got {x.shape} and {jnp.shape(y)}")
        if errors.shape not in ((), x.shape[:1]):
            raise InputError(f"errors need shape () or {x.shape[:1]}, one for each row, got {errors.shape}")
        # One after another, so that the order of latents is that of the roles.
        kernel, mean, noise = (self._chosen(role) for role in ("kernel", "mean", "noise"))
        count, center = len(x), mean(x)
        covariance = kernel(x, x)
        for name, found, shape in (("kernel", covariance, (count, count)), ("mean", center, (count,))):
            if found.shape != shape:
                raise InputError(f"the {name} functions must return arrays of shape {shape}, got {found.shape}")
        # Rounding errors of a Cholesky factor are of this size.
        rounding = count * jnp.finfo(covariance.dtype).eps * jnp.max(jnp.diagonal(covariance))
        covariance += jnp.diag(errors**2 + noise(x) ** 2 + rounding)
        factor = jnp.linalg.cholesky(covariance)
        numpyro.sample("y", MultivariateNormal(center, scale_tril=factor), obs=y)
        if new_x is not None:
            new_x = jnp.asarray(new_x)
            both = jnp.concatenate([kernel(x, new_x), (y - center)[:, None]], axis=1)
            solved = jax.scipy.linalg.solve_triangular(factor, both, lower=True)
            solved, residual = solved[:, :-1], solved[:, -1]
            prior = jax.vmap(lambda row: kernel(row[None], row[None])[0, 0])(new_x)
            numpyro.deterministic("new_mean", mean(new_x) + residual @ solved)
            numpyro.deterministic("new_scale", jnp.sqrt(jnp.maximum(prior - jnp.sum(solved**2, axis=0), 0.0)))
            numpyro.deterministic("new_noise", jnp.broadcast_to(noise(new_x), new_x.shape[:1]))

    def _chosen(self, role: str) -> Callable:
        """The candidate that the coordinate of a role means, as a function of points; it samples all latents."""
        import numpyro
        from numpyro.distributions import Uniform

        options = self.candidates[role]
        values = {
            name: {p: numpyro.sample(f"{role}/{name}/{p}", prior) for p, prior in priors.items()}
            for name, (_, priors) in options.items()
        }
        index = jnp.zeros((), int)
        if len(options) > 1:
            coordinate = numpyro.sample(f"{role}_coordinate", Uniform(0.0, 1.0))
            index = jnp.minimum((coordinate * len(options)).astype(int), len(options) - 1)
        numpyro.deterministic(role, index)
        functions = [
            lambda *points, f=function, h=values[name]: jnp.asarray(f(*points, **h), points[0].dtype)
            for name, (function, _) in options.items()
        ]
        return lambda *points: jax.lax.switch(index, functions, *points)


def _zero(x: Array) -> Array:
    return jnp.zeros(len(x), x.dtype)


def marginalised_gaussian_process(
    kernels: Candidates, means: Candidates | None = None, noises: Candidates | None = None
) -> MarginalisedGaussianProcess:
    """The NumPyro model of a Gaussian process over all choices of a kernel, a mean function and a noise model.

    Its arguments are `x` of shape (n,) or (n, d), `y` of shape (n,), and optionally `errors`, known standard deviations
    of y, of shape () or (n,). Latents are `kernel/NAME/PARAMETER` for all candidates, and `kernel_coordinate` if there
    are several; likewise for mean and noise. Which candidate a draw chose is in the sites `kernel`, `mean`, `noise`, by
    number. Every choice has equal prior probability. The density jumps with the coordinates: engine `nested` is right,
    engines with gradients are not. Squared exponential kernels with little noise want double precision.

    Args:
        kernels: name -> (function of two sets of points and its hyperparameters by name, their priors): functions such
            as `matern_32`, or one's own; they return a matrix. tinygp's kernels fit: `lambda a, b, scale:
            tinygp.kernels.Matern32(scale)(a, b)`.
        means: name -> (function of points and hyperparameters that returns an array (n,), priors); None is zero.
        noises: name -> (the same, returning standard deviations of noise that is independent from row to row), which
            are added in quadrature to `errors`; None is none.

    Raises:
        InputError: no kernel, a candidate that is no pair, or priors that do not fit the function's arguments.

    >>> import numpyro.distributions as dist
    >>> scales = {"amplitude": dist.LogNormal(0.0, 1.0), "length_scale": dist.LogNormal(0.0, 1.0)}
    >>> model = marginalised_gaussian_process({"rough": (exponential, scales), "smooth": (squared_exponential, scales)})
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> conditioned_model(model, {"x": np.arange(3.0), "y": np.ones(3), "errors": 0.1}).dimension
    5
    """
    roles = {"kernel": (kernels, 2), "mean": (means or {"zero": (_zero, {})}, 1)}
    roles["noise"] = (noises or {"none": (_zero, {})}, 1)
    if not kernels:
        raise InputError("at least one kernel is needed: {name: (function, priors)}")
    for role, (options, count) in roles.items():
        for name, option in options.items():
            if not (isinstance(option, tuple) and len(option) == 2 and callable(option[0])):
                raise InputError(
                    f"the {role} {name!r} must be a pair: (function, priors of its hyperparameters by name)"
                )
            try:
                inspect.signature(option[0]).bind(*(None,) * count, **option[1])
            except TypeError as error:
                raise InputError(f"the priors of the {role} {name!r} do not fit its function: {error}") from None
    return MarginalisedGaussianProcess(
        {role: {n: (f, dict(p)) for n, (f, p) in options.items()} for role, (options, _) in roles.items()}
    )


# Inference


class Choice(NamedTuple):
    """What the data say about the candidates of a role.

    Attributes:
        probabilities: posterior probability of each.
        errors: their standard errors.
        log_evidences: log marginal likelihood of the data under each, averaged over other choices; minus infinity
            where no draw chose it.
        log_evidence_errors: their standard errors.
    """

    probabilities: dict[str, float]
    errors: dict[str, float]
    log_evidences: dict[str, float]
    log_evidence_errors: dict[str, float]


class MarginalisedInference(NamedTuple):
    """The posterior, and what it says about each choice."""

    posterior: Posterior
    kernels: Choice
    means: Choice
    noises: Choice


def infer_marginalised(
    model: MarginalisedGaussianProcess, data: dict[str, Any], *, key: Any, **settings: Any
) -> MarginalisedInference:
    """Posterior, evidence and probabilities of all choices, by nested sampling.

    Args:
        model: from `marginalised_gaussian_process`.
        data: `x`, `y` and, where known, `errors`.
        key: a `jax.random.key`.
        settings: of `NestedSampling`; errors fall with the root of `num_live`, divided among candidates.

    Raises:
        InputError: data that do not fit, and as `infer`.

    >>> model = marginalised_gaussian_process(kernels, means)  # doctest: +SKIP
    >>> found = infer_marginalised(model, {"x": x, "y": y, "errors": 0.1}, key=jax.random.key(0))  # doctest: +SKIP
    >>> found.kernels.probabilities, found.posterior.log_evidence  # doctest: +SKIP
    """
    from bayeslens.inference.infer import infer

    posterior = infer(model, data, key=key, engine="nested", **settings)
    return MarginalisedInference(posterior, *(choice(posterior, role) for role in ("kernel", "mean", "noise")))


def choice(posterior: Posterior, role: str) -> Choice:
    """Probabilities and evidences of the candidates of a role.

    Standard errors are those of separate runs of nested sampling, one for each candidate, with the live points that
    it has at each time: candidates compete for live points, and slices seldom pass from one to another. They are found
    by simulating the shrinkage of volumes, with the error of a count of live points added. They are on the safe side
    where slices do pass.

    Args:
        posterior: of a `marginalised_gaussian_process` by engine nested.
        role: "kernel", "mean" or "noise".

    Raises:
        InputError: another engine or model, or another role.
    """
    model, statistics = posterior.model, posterior.statistics
    if not isinstance(model, MarginalisedGaussianProcess) or "log_volume" not in statistics:
        raise InputError(
            "a posterior of a marginalised_gaussian_process by engine nested is needed: infer_marginalised"
        )
    if role not in model.candidates:
        raise InputError(f"there is no role {role!r}: use kernel, mean or noise")
    names = list(model.candidates[role])
    chosen = np.ravel(posterior[role]).astype(int)
    log_likelihood = np.ravel(statistics["log_likelihood"]).astype(float)
    log_weights = np.ravel(posterior.log_weights).astype(float)
    log_evidences = np.array([_log_sum(log_weights[chosen == k]) for k in range(len(names))])
    log_probabilities = log_evidences - _log_sum(log_evidences)
    # Share of each candidate in the volume above each point, and so in the live points.
    volume = np.exp(np.ravel(statistics["log_volume"]).astype(float))
    width = np.concatenate([[1.0], volume[:-1]]) - volume
    above = np.cumsum(width[::-1])[::-1]
    live = np.minimum(posterior.settings["num_live"], np.arange(len(chosen), 0, -1))
    rng, simulated = np.random.default_rng(posterior.settings["key"]), np.full((_SIMULATIONS, len(names)), -np.inf)
    for k in range(len(names)):
        mine = chosen == k
        if not mine.any():
            continue
        own = np.cumsum(width[mine][::-1])[::-1]
        number = np.maximum(1.0, live[mine] * own / above[mine])
        shrinkage = rng.exponential(size=(_SIMULATIONS, mine.sum())) / number
        log_shell = np.log(-np.expm1(-shrinkage)) - np.cumsum(shrinkage, axis=1) + shrinkage
        simulated[:, k] = special.logsumexp(log_likelihood[mine] + log_shell, axis=1)
    shares = special.softmax(simulated, axis=1)
    spread = [s.std() if np.isfinite(s).all() else np.inf for s in simulated.T]
    total = float(posterior.log_evidence) + np.log(len(names))
    # The live points of a candidate are a draw themselves; by the rule of succession one that has none may be likely.
    num_live, probabilities = posterior.settings["num_live"], np.exp(log_probabilities)
    smooth = (num_live * probabilities + 1) / (num_live + len(names))
    counting = np.sqrt(smooth * (1 - smooth) / num_live) * (len(names) > 1)
    errors = np.hypot(shares.std(axis=0), counting)
    columns = (probabilities, errors, total + log_probabilities, np.hypot(spread, counting / smooth))
    return Choice(*({n: float(v) for n, v in zip(names, column, strict=True)} for column in columns))


def _log_sum(values: np.ndarray) -> float:
    return special.logsumexp(values) if len(values) else -np.inf


def predict(posterior: Posterior, new_x: Any, *, key: Any, num_draws: int = 500, noisy: bool = False) -> Distribution:
    """The function's values at new points, or noisy ones, averaged over choices and hyperparameters.

    Args:
        posterior: of a `marginalised_gaussian_process`, with its data.
        new_x: points, of shape (m,) or (m, d).
        key: a `jax.random.key`, of the draws of the posterior that are taken.
        num_draws: how many; the mixture's mean is off by 4% of the spread between draws with the default.
        noisy: whether to add the noise of the noise model; known `errors` are not added, they belong to rows.

    Returns:
        a mixture of normal distributions, of batch shape (m,): the marginal of each point.

    Raises:
        InputError: a posterior of another model, or without its data.
    """
    from numpyro.distributions import Normal

    if not isinstance(posterior.model, MarginalisedGaussianProcess) or not posterior.data:
        raise InputError("predict needs the posterior of a marginalised_gaussian_process, with its data")
    names = [n for n in posterior.names if "/" in n or n.endswith("_coordinate")]
    draws = {n: v for n, v in posterior.sample(key, (num_draws,)).items() if n in names}
    data = {n: jnp.asarray(v) for n, v in posterior.data.items()}
    found = _conditionals(posterior.model, draws, data, jnp.asarray(new_x))
    center, scale, noise = (np.asarray(f, float) for f in found)
    scale = np.sqrt(scale**2 + noise**2) if noisy else scale
    # A point where the function is known exactly: a distribution needs some width.
    scale = np.maximum(scale, 1e-12 * (1 + np.abs(center)))
    return mix_members(Normal(center, scale), np.full(num_draws, 1 / num_draws))


@eqx.filter_jit
def _conditionals(model: Any, draws: dict[str, Array], data: dict[str, Array], new_x: Array) -> tuple[Array, ...]:
    """Mean and standard deviation of the function at new points, and of the noise, for each draw."""
    from numpyro import handlers

    def one(values: dict[str, Array]) -> tuple[Array, ...]:
        trace = handlers.trace(handlers.substitute(model, data=values)).get_trace(**data, new_x=new_x)
        return tuple(trace[n]["value"] for n in ("new_mean", "new_scale", "new_noise"))

    return jax.lax.map(one, draws)


def log_evidence_ratio(joint: Posterior, *separate: Posterior) -> tuple[float, float]:
    """Log of R, and its standard error: evidence of all data together over the product of those of each alone.

    Positive values say that the data sets agree, negative ones that they are in tension: no choice and no
    hyperparameters explain them together as well as their own would. R depends on the width of the priors.

    Args:
        joint: posterior of a model given all data sets.
        separate: posteriors of the same model given each of them.

    Raises:
        InputError: fewer than two data sets, or a posterior without evidence.

    >>> one = Posterior({"x": np.zeros((1, 1))}, log_evidence=-3.0, log_evidence_error=0.3)
    >>> both = Posterior({"x": np.zeros((1, 1))}, log_evidence=-5.0, log_evidence_error=0.4)
    >>> ratio, error = log_evidence_ratio(both, one, one)
    >>> ratio, round(error, 3)
    (1.0, 0.583)
    """
    if len(separate) < 2:
        raise InputError("at least two posteriors of separate data sets are needed")
    if any(p.log_evidence is None for p in (joint, *separate)):
        raise InputError("a posterior has no log evidence: infer it by an engine that has, such as nested")
    errors = [float(p.log_evidence_error or 0.0) for p in (joint, *separate)]
    return float(joint.log_evidence) - sum(float(p.log_evidence) for p in separate), float(np.linalg.norm(errors))
