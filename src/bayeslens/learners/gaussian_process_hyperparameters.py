"""Hyperparameters of a Gaussian process: their prior, the most probable ones, and draws from their posterior.

They are the logs of length scales, standard deviations of the smooth and of the linear part, and of the noise. An
`objective` is the log evidence of such a vector with its gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayeslens.learners.gaussian_process_evidence import Observations, log_evidence, traceable_log_evidence

_STARTING_ROWS = 400  # restarts run on at most this many rows
# Log standard deviations of smooth part, linear part and noise: prior means and standard deviations, and bounds.
_SCALE_MEANS, _SCALE_DEVIATIONS = np.log([0.8, 0.3, 0.4]), np.array([1.0, 1.5, 1.2])
_LENGTH_DEVIATION = 1.2
_LOWEST_NOISE = 1e-3
_CHAINS, _WARMUP, _SAMPLES = 2, 100, 200  # for a few members; every step factorizes a matrix of rows x rows
_R_HAT = 1.1  # a few draws want chains that have mixed, not the 1.01 that quantiles in the tails want


def hyperprior(num_lengths: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and standard deviations of the Normal priors on log hyperparameters, and their bounds.

    Length scales grow with the root of their number, so that the function stays as complex when inputs are added
    (Hvarfner, Hellsten and Nardi 2024, Vanilla Bayesian Optimization Performs Great in High Dimensions).

    >>> means, deviations, bounds = hyperprior(4)
    >>> means.shape, bounds.shape
    ((7,), (7, 2))
    """
    means = np.append(np.full(num_lengths, np.log(1.5 * np.sqrt(max(num_lengths, 1)))), _SCALE_MEANS)
    deviations = np.append(np.full(num_lengths, _LENGTH_DEVIATION), _SCALE_DEVIATIONS)
    bounds = np.stack([means - 6 * deviations, means + 6 * deviations], 1)
    bounds[-1] = np.log([_LOWEST_NOISE, 10.0])
    return means, deviations, bounds


def maximize(
    objective: Callable, start: Float[np.ndarray, " parameters"], iterations: int
) -> tuple[Float[np.ndarray, " parameters"], float]:
    """Maximize objective(parameters) -> (value, gradient) plus the log prior by L-BFGS, within the prior's bounds.

    Returns the parameters and the value there.

    >>> means, _, _ = hyperprior(1)
    >>> found, _ = maximize(lambda p: (0.0, 0.0 * p), means + 1, 100)  # no data: the prior
    >>> bool(np.abs(found - means).max() < 0.02)
    True
    """
    from scipy.optimize import minimize

    means, deviations, bounds = hyperprior(len(start) - 3)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(parameters)
        z = (parameters - means) / deviations
        return 0.5 * z @ z - value, z / deviations - gradient

    options = {"maxiter": iterations, "ftol": 1e-6, "gtol": 1e-2}
    found = minimize(loss, np.clip(start, *bounds.T), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return found.x, -float(found.fun)


def optimize_hyperparameters(observations: Observations) -> Float[np.ndarray, " parameters"]:
    """The most probable log hyperparameters: restarts on some rows, the best of them finished on all.

    >>> x = np.linspace(-2, 2, 40)[:, None]
    >>> best = optimize_hyperparameters(Observations(np.zeros(1, int), x, np.sin(3 * x[:, 0]), np.ones(40)))
    >>> bool(np.exp(best[-1]) < 0.05)  # hardly any noise
    True
    """
    count = len(observations.y)
    means, _, _ = hyperprior(observations.num_lengths)
    rough, plain = means.copy(), means.copy()
    rough[:-3] -= 0.7
    plain[:-3] += 1.0
    rough[-3:], plain[-3:] = np.log([1.0, 0.1, 0.2]), np.log([0.5, 0.5, 0.8])
    some = observations.take(np.linspace(0, count - 1, min(count, _STARTING_ROWS)).round().astype(int))
    trials = [maximize(lambda p: log_evidence(p, some), start, 15) for start in (rough, plain)]
    best = max(trials, key=lambda trial: trial[1])[0]
    # Many rows leave little to do after some of them, and each step costs the third power of the rows.
    iterations = 100 if count <= _STARTING_ROWS else max(10, 20_000 // count)
    return maximize(lambda p: log_evidence(p, observations), best, iterations)[0]


def laplace_root(
    best: Float[np.ndarray, " parameters"], objective: Callable
) -> Float[np.ndarray, "parameters parameters"]:
    """A root R of the covariance RR' of the Normal approximation of the posterior at its mode `best` (Laplace).

    The Hessian is by differences of the gradient of objective(parameters) -> (value, gradient).

    >>> means, deviations, _ = hyperprior(1)
    >>> root = laplace_root(means, lambda p: (0.0, 0.0 * p))  # no data: the prior
    >>> bool(np.allclose(root @ root.T, np.diag(deviations**2)))
    True
    """
    _, deviations, _ = hyperprior(len(best) - 3)
    step, there = 0.01, objective(best)[1]
    columns = np.stack([objective(best + step * e)[1] - there for e in np.eye(len(best))])
    precision = np.diag(1 / deviations**2) - columns / step
    values, vectors = np.linalg.eigh((precision + precision.T) / 2)
    values = np.maximum(values, 1 / deviations.max() ** 2)  # the data never say less than the prior
    return vectors / np.sqrt(values)


def draw_by_laplace(
    best: Float[np.ndarray, " parameters"], objective: Callable, num_draws: int
) -> Float[np.ndarray, "draws parameters"]:
    """Draws from the Normal approximation of the posterior of log hyperparameters at its mode `best`.

    Antithetic pairs, from the same random numbers every time, so that folds differ by their data only.

    >>> means, deviations, _ = hyperprior(1)
    >>> draw_by_laplace(means, lambda p: (0.0, 0.0 * p), 4).shape  # no data: the prior
    (4, 4)
    """
    noise = np.random.default_rng(0).normal(size=((num_draws + 1) // 2, len(best)))
    noise = np.concatenate([noise, -noise])[:num_draws]
    return np.clip(best + noise @ laplace_root(best, objective).T, *hyperprior(len(best) - 3)[2].T)


def draw_by_nuts(
    best: Float[np.ndarray, " parameters"], observations: Observations, num_draws: int, *, key: Any
) -> Float[np.ndarray, "draws parameters"]:
    """Draws from the posterior of log hyperparameters by NUTS, in float64.

    Chains walk in the coordinates of Laplace's approximation at the mode `best`, where the posterior is nearly a
    standard Normal. Values beyond the prior's bounds count as the bounds. Draws are evenly spaced in two chains of
    200, or of more when more are asked for. Warns when the chains disagree.

    Source: Hoffman and Gelman 2014, The No-U-Turn Sampler; through `bayeslens.inference.NUTS`.

    >>> row = Observations(np.zeros(1, int), np.zeros((1, 1)), np.zeros(1), np.ones(1))
    >>> best = optimize_hyperparameters(row)
    >>> draw_by_nuts(best, row, 8, key=jax.random.key(0)).shape
    (8, 4)
    """
    import numpyro
    import numpyro.distributions as dist
    from numpyro.diagnostics import split_gelman_rubin

    from bayeslens.inference.infer import infer

    means, deviations, bounds = hyperprior(observations.num_lengths)
    root = laplace_root(best, lambda p: log_evidence(p, observations))

    @jax.jit  # one program: the engine first runs the model step by step, and would compile every step
    def correction(z: Any) -> Any:
        parameters = best + root @ z
        log_prior = -0.5 * jnp.square((parameters - means) / deviations).sum()
        evidence = traceable_log_evidence(jnp.clip(parameters, *bounds.T), observations)
        return evidence + log_prior + 0.5 * z @ z

    def model() -> None:
        # Laplace's approximation is the prior of z, and is taken away again by the correction.
        z = numpyro.sample("z", dist.Normal(np.zeros(len(best)), 1.0).to_event(1))
        numpyro.factor("correction", correction(z))

    num_samples = max(_SAMPLES, -(-num_draws // _CHAINS))
    with jax.enable_x64(True):
        settings = {"num_chains": _CHAINS, "num_warmup": _WARMUP, "num_samples": num_samples}
        posterior = infer(model, {}, key=key, engine="nuts", **settings)
    r_hat = float(np.max(split_gelman_rubin(posterior["z"])))
    if r_hat > _R_HAT:
        cure = f"a num_draws above {_CHAINS * _SAMPLES} makes them longer, hyperparameters='auto' does without"
        warnings.warn(f"the chains of hyperparameters disagree, R-hat is {r_hat:.2f}: {cure}", stacklevel=2)
    z = posterior["z"].reshape(-1, len(best))
    evenly = np.linspace(0, len(z) - 1, num_draws).round().astype(int)
    return np.clip(best + z[evenly] @ root.T, *bounds.T)
