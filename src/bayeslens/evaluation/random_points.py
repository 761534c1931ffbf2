"""TARP: expected coverage of balls around random points, from parameters and draws of their posteriors alone.

Source: P. Lemos, A. Coogan, Y. Hezaveh, L. Perreault-Levasseur, "Sampling-based accuracy testing of posterior
estimators for general inference" (2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator
from bayeslens.evaluation.credible_coverage import ExpectedCoverage, coverage_of
from bayeslens.evaluation.rank_tests import checked_draws, refuse_simulation

_FOLDS = 10
_METRICS = ("euclidean", "manhattan")


def tarp(
    parameters: Any,
    draws: Float[np.ndarray, "simulations draws parameters"] | None = None,
    *,
    key: Any,
    data: Float[np.ndarray, "simulations features"] | None = None,
    references: Float[np.ndarray, "simulations parameters"] | None = None,
    metric: str = "euclidean",
    band_coverage: float = 0.95,
) -> ExpectedCoverage:
    """Coverage of balls around random reference points, which end at the parameter that made the data.

    The share of draws that are closer to the reference than the truth is uniform for every distribution of references
    if and only if the posterior is right. References that do not depend on the data cannot tell the posterior from
    the prior; give `data`, or references made from them. References near the posterior also see best whether it is
    too narrow: far from it, a ball's surface is a plane, and one direction is looked at. Small shifts are seen better
    by the ranks of `simulation_based_calibration`.

    Args:
        parameters: that were drawn from the prior, shape (simulations, parameters), or what `simulate_posteriors`
            returned.
        draws: independent draws of the posterior given the data of each simulation.
        key: a `jax.random.key`, of references and the null distribution of the p-value.
        data: numbers that describe the data of each simulation. References are then made of them: a ridge
            regression of the parameters, fitted to other simulations, plus noise as large as its residuals.
        references: points made by the caller. They may depend on data, but not on the parameters beyond that. Without
            them and without data they are uniform in the box that holds the parameters, as in the paper.
        metric: `"euclidean"` or `"manhattan"`, of parameters divided by their standard deviations.
        band_coverage: of the simultaneous band.

    Raises:
        InputError: shapes that do not fit, values that are not finite, an unknown metric, both data and references.

    >>> import jax
    >>> rng = np.random.default_rng(0)
    >>> parameters, prior = rng.normal(size=(300, 2)), rng.normal(size=(300, 100, 2))  # data were not looked at
    >>> data = parameters + 0.5 * rng.normal(size=(300, 2))
    >>> blind, seeing = (tarp(parameters, prior, key=jax.random.key(0), data=d) for d in (None, data))
    >>> blind.p_value > 0.05, seeing.p_value < 0.01
    (True, True)
    """
    if draws is None:
        if not hasattr(parameters, "draws"):
            raise InputError("give draws of the posterior of each simulation, shape (simulations, draws, parameters)")
        simulated = parameters
        parameters, draws = simulated.parameters, simulated.draws
        data = simulated.data if data is None and references is None else data
    parameters, draws = checked_draws(parameters, draws)
    if metric not in _METRICS:
        raise InputError(f"unknown metric {metric!r}: use one of {', '.join(_METRICS)}")
    if data is not None and references is not None:
        raise InputError("references are given or made from data: give one of the two")
    rng = host_generator(key)
    note = ""
    if references is not None:
        references = np.asarray(references, np.float64)
        if references.shape != parameters.shape:
            raise InputError(
                f"references need shape {parameters.shape}, one point a simulation, got {references.shape}"
            )
        refuse_simulation(~np.isfinite(references).all(1), "the reference", "is not finite")
    elif data is not None:
        references = references_from_data(parameters, data, rng)
    else:
        low, high = parameters.min(0), parameters.max(0)
        references = low + (high - low) * rng.random(parameters.shape)
        note = "references do not depend on the data, so that the prior in place of the posterior passes: give data"
    items = np.concatenate([parameters[:, None], draws], 1) - references[:, None]
    scale = parameters.std(0)
    items /= np.where(scale > 0, scale, 1)
    distance = np.abs(items).sum(2) if metric == "manhattan" else np.einsum("nsp,nsp->ns", items, items)
    method = f"TARP: balls around {'random points' if note else 'points that depend on the data'}"
    return coverage_of(distance, method, key=key, band_coverage=band_coverage, note=note)


def references_from_data(
    parameters: Float[np.ndarray, "simulations parameters"], data: Any, rng: np.random.Generator
) -> Float[np.ndarray, "simulations parameters"]:
    """Reference points near the parameters that data suggest: a cross-fitted ridge regression, plus noise.

    Args:
        parameters: of each simulation.
        data: numbers for each simulation, shape (simulations, ...).
        rng: of folds and noise.

    Raises:
        InputError: another number of rows, or values that are not finite.
    """
    features = np.asarray(data, np.float64)
    rows = len(parameters)
    if features.ndim < 1 or len(features) != rows:
        raise InputError(f"data need one row for each of the {rows} simulations, got shape {features.shape}")
    features = features.reshape(rows, -1)
    refuse_simulation(~np.isfinite(features).all(1), "the data", "are not finite")
    features, outcome = _standardized(features), _standardized(parameters)
    fold = rng.permutation(rows) % _FOLDS
    predicted = np.empty_like(outcome)
    for held_out in range(_FOLDS):
        rest = fold != held_out
        predicted[~rest] = _ridge(features[rest], outcome[rest], features[~rest])
    residual = outcome - predicted
    # The scale of the noise is that of the residuals, whose root mean square hardly depends on any one simulation.
    root = np.linalg.cholesky(residual.T @ residual / rows + 1e-9 * np.eye(outcome.shape[1]))
    scale = parameters.std(0)
    return parameters.mean(0) + np.where(scale > 0, scale, 1) * (predicted + rng.normal(size=outcome.shape) @ root.T)


def _standardized(values: np.ndarray) -> np.ndarray:
    scale = values.std(0)
    return (values - values.mean(0)) / np.where(scale > 0, scale, 1)


def _ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression, whose penalty is chosen by generalized cross-validation."""
    center, level = x.mean(0), y.mean(0)
    left, singular, right = np.linalg.svd(x - center, full_matrices=False)
    projected = left.T @ (y - level)
    best, chosen = np.inf, None
    for penalty in np.geomspace(1e-3, 1e3, 13) * len(x):
        shrink = singular**2 / (singular**2 + penalty)
        free = len(x) - 1 - shrink.sum()
        error = ((y - level - left @ (shrink[:, None] * projected)) ** 2).mean(0) / y.var(0).clip(1e-300)
        score = error.mean() / max(free / len(x), 1e-3) ** 2
        if score < best:
            gain = singular / (singular**2 + penalty)
            best, chosen = score, right.T @ (gain[:, None] * projected)
    return level + (new - center) @ chosen
