"""How far draws can be trusted: rank-normalized R-hat, bulk and tail effective sample sizes, Pareto k-hat, in words.

Sources: A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P. Buerkner, "Rank-normalization, folding, and localization"
(2021); A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto smoothed importance sampling" (2024).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import fft, special, stats

R_HAT_LIMIT, ESS_LIMIT, K_HAT_LIMIT = 1.01, 400, 0.7
_LEAST_DRAWS = 4


class Convergence(NamedTuple):
    """For every scalar: rank-normalized split R-hat, and effective sample sizes of the bulk and of the 5% tails."""

    r_hat: Float[np.ndarray, " dimension"]
    ess_bulk: Float[np.ndarray, " dimension"]
    ess_tail: Float[np.ndarray, " dimension"]


def convergence(draws: Float[np.ndarray, "chains draws dimension"]) -> Convergence:
    """How well chains have mixed. A scalar that never moves gives NaN.

    >>> chains = np.random.default_rng(0).normal(size=(4, 500, 2))
    >>> found = convergence(chains)
    >>> bool((found.r_hat < 1.02).all() and (found.ess_bulk > 1000).all())
    True
    """
    draws = np.asarray(draws, np.float64)
    split = _split(draws)
    bulk = _normal_ranks(split)
    folded = _normal_ranks(np.abs(split - np.median(split, axis=(0, 1))))
    r_hat = np.maximum(_r_hat(bulk), _r_hat(folded))
    tails = np.quantile(draws, [0.05, 0.95], axis=(0, 1))
    ess_tail = np.minimum(*(_effective((split <= q).astype(np.float64)) for q in tails))
    still = np.ptp(split, axis=(0, 1)) == 0
    return Convergence(*(np.where(still, np.nan, v) for v in (r_hat, _effective(bulk), ess_tail)))


def _split(draws: np.ndarray) -> np.ndarray:
    """Each chain as two."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, draws.shape[1] - half :]])


def _normal_ranks(draws: np.ndarray) -> np.ndarray:
    size = draws.shape[0] * draws.shape[1]
    ranks = stats.rankdata(draws.reshape(size, -1), axis=0).reshape(draws.shape)
    return special.ndtri((ranks - 0.375) / (size + 0.25))


def _r_hat(draws: np.ndarray) -> np.ndarray:
    count = draws.shape[1]
    within = draws.var(axis=1, ddof=1).mean(0)
    between = count * draws.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((between / within + count - 1) / count)


def _effective(draws: np.ndarray) -> np.ndarray:
    """Effective sample size by Geyer's initial monotone sequence over all chains."""
    chains, count, _ = draws.shape
    centred = draws - draws.mean(1, keepdims=True)
    size = fft.next_fast_len(2 * count, real=True)
    spectrum = np.abs(fft.rfft(centred, size, axis=1)) ** 2
    covariance = fft.irfft(spectrum, size, axis=1)[:, :count].mean(0) / count
    within = covariance[0] * count / (count - 1)
    total = covariance[0] + (draws.mean(1).var(0, ddof=1) if chains > 1 else 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = 1 - (within - covariance * count / (count - 1)) / total
        correlation[0] = 1.0
        pairs = correlation[: count - count % 2].reshape(-1, 2, draws.shape[2])
        sums = pairs.sum(1)
        # Sums of neighbours are positive and decreasing in theory: the first negative one ends what can be seen.
        ends = np.where((sums < 0).any(0), (sums < 0).argmax(0), len(sums) - 1)
        sums = np.minimum.accumulate(np.maximum(sums, 0), axis=0)
        seen = np.arange(len(sums))[:, None] < ends
        last = np.maximum(np.take_along_axis(pairs[:, 0], ends[None], 0)[0], 0)
        time = -1 + 2 * (sums * seen).sum(0) + last
        return np.minimum(
            chains * count / np.maximum(time, 1 / np.log10(chains * count)), chains * count * np.log10(chains * count)
        )


def pareto_k(log_weights: Float[np.ndarray, " draws"]) -> float:
    """Shape of a generalized Pareto distribution of the largest importance weights: above 0.7 they cannot be trusted.

    Estimated from the `min(0.2 S, 3 sqrt(S))` largest of S weights by Zhang and Stephens' (2009) method, with the
    weak prior towards 0.5 of the paper.

    >>> normal = np.random.default_rng(0).normal(size=10_000)
    >>> pareto_k(-0.5 * normal**2 * (1 / 16 - 1)) > 0.7  # wide target, narrow proposal: variance 16 against 1
    True
    """
    log_weights = np.sort(np.asarray(log_weights, np.float64).ravel())
    if not np.isfinite(log_weights[-1]):
        return float("inf")
    size = len(log_weights)
    tail = int(np.ceil(min(0.2 * size, 3 * np.sqrt(size))))
    if tail < 5:
        return float("inf")
    weights = np.exp(log_weights - log_weights[-1])
    excess = weights[-tail:] - weights[-tail - 1]
    if excess[0] <= 0 and excess[-1] <= 0:
        return -np.inf  # all weights are equal
    excess = np.maximum(excess, np.finfo(float).tiny)
    # Profile posterior mean of Zhang and Stephens.
    count = 30 + int(np.sqrt(tail))
    grid = 1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))
    quarter = excess[int(tail / 4 + 0.5) - 1]
    theta = grid / (3 * quarter) + 1 / excess[-1]
    shapes = np.log1p(-theta[:, None] * excess).mean(1)
    profile = tail * (np.log(-theta / shapes) - shapes - 1)
    with np.errstate(over="ignore"):
        weight = 1 / np.exp(profile - profile[:, None]).sum(1)
    mean = float((theta * weight).sum() / weight.sum())
    shape = float(np.log1p(-mean * excess).mean())
    return (tail * shape + 10 * 0.5) / (tail + 10)


def pareto_smoothed(log_weights: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    """Log importance weights whose largest are replaced by quantiles of the Pareto distribution that fits them.

    The scale of the tail is matched at its median. Weights are at most the largest raw one.

    Source: A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, "Pareto smoothed importance sampling" (2024).

    >>> raw = np.random.default_rng(0).normal(size=1000) * 2
    >>> smoothed = pareto_smoothed(raw)
    >>> bool((np.argsort(smoothed) == np.argsort(raw)).all() and smoothed.max() <= raw.max())
    True
    """
    log_weights = np.asarray(log_weights, np.float64)
    size = len(log_weights)
    tail = int(np.ceil(min(0.2 * size, 3 * np.sqrt(size))))
    shape = pareto_k(log_weights)
    if tail < 5 or not np.isfinite(shape):
        return log_weights
    order = np.argsort(log_weights)
    largest, cut = order[-tail:], log_weights[order[-tail - 1]]
    peak = log_weights[order[-1]]
    excess = np.exp(log_weights[largest] - peak) - np.exp(cut - peak)
    levels = (np.arange(tail) + 0.5) / tail
    growth = lambda p: -np.log1p(-p) if abs(shape) < 1e-9 else np.expm1(-shape * np.log1p(-p)) / shape  # noqa: E731
    scale = np.median(excess) / growth(0.5)
    smoothed = log_weights.copy()
    with np.errstate(divide="ignore"):
        smoothed[largest] = np.minimum(np.log(np.exp(cut - peak) + scale * growth(levels)), 0.0) + peak
    return smoothed


def importance_evidence(log_weights: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """Log of the mean importance weight of independent draws, and its standard error relative to that mean.

    >>> importance_evidence(np.log([1.0, 3.0]))
    (0.693..., 0.353...)
    """
    weights = np.exp(log_weights - np.max(log_weights))
    error = weights.std() / weights.mean() / np.sqrt(len(weights))
    return float(np.max(log_weights) + np.log(weights.mean())), float(error)


def doubts_of_chains(draws: dict[str, np.ndarray], statistics: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Sentences on why the draws of a Markov chain should not be trusted, and what to try.

    Args:
        draws: site -> array of shape (chains, draws, ...).
        statistics: those of the sampler; `diverging` is looked at.
    """
    found = []
    diverging = int(np.sum(statistics.get("diverging", 0)))
    if diverging:
        found.append(
            f"{diverging} transitions diverged: parts of the posterior may be missed; "
            "try a non-centred parameterization or a tighter prior"
        )
    chains, count = next(iter(draws.values())).shape[:2]
    if count < 2 * _LEAST_DRAWS:
        return (*found, "too few draws to diagnose: raise num_samples")
    names = [n for n, v in draws.items() if v.size and v.dtype.kind in "fiub"]
    flat = np.concatenate([draws[n].reshape(chains, count, -1) for n in names], -1).astype(np.float64)
    if not np.isfinite(flat).all():
        return (*found, "some draws are not finite: look for overflow in the model")
    moving = np.ptp(flat, axis=(0, 1)) > 0
    if not moving.any():
        return tuple(found)
    measured = convergence(flat[..., moving])
    if (r_hat := np.nanmax(measured.r_hat)) > R_HAT_LIMIT:
        found.append(
            f"R-hat is {r_hat:.3f}, above {R_HAT_LIMIT}: the chains disagree; raise num_warmup, or look at the model"
        )
    if (effective := np.nanmin([measured.ess_bulk, measured.ess_tail])) < ESS_LIMIT:
        found.append(f"the least effective sample size is {effective:.0f}, below {ESS_LIMIT}: raise num_samples")
    return tuple(found)


def doubts_of_weights(log_weights: Any) -> tuple[float, tuple[str, ...]]:
    """Pareto k-hat of importance weights, and a sentence where it is too large."""
    k_hat = pareto_k(np.asarray(log_weights))
    if k_hat <= K_HAT_LIMIT:
        return k_hat, ()
    return k_hat, (
        f"Pareto k-hat is {k_hat:.2f}, above {K_HAT_LIMIT}: the approximation misses parts of the posterior; try "
        "engine flow or nuts, or another parameterization",
    )
