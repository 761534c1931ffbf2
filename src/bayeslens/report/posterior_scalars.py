"""The scalars of a posterior as the report needs them: draws, summaries, exact marginals, and how well chains mixed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from bayeslens.core.posterior import Posterior
from bayeslens.inference.diagnostics import convergence

_MAX_SCALARS, _MAX_VALUES = 1000, 4_000_000  # looked at: a report is to be written in seconds
_LEVELS = (0.05, 0.5, 0.95)
_MADE = 4000  # draws of a density that comes without


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """The exact marginal of one scalar; `density` holds a grid and its values, `probabilities` those of 0, 1, ..."""

    mean: float
    sd: float
    quantiles: Float[np.ndarray, " 3"]
    density: tuple[np.ndarray, np.ndarray] | None = None
    probabilities: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scalars:
    """The scalars of a posterior: of sites with very many, the first.

    Attributes:
        names: such as `beta[0]`.
        sites: the site of each.
        sizes: number of scalars of each site, all counted.
        draws: in double precision.
        whole: whether a scalar is an integer or a truth value.
        weights: normalized, of particles; None when all draws count alike.
        kind: `"chains"`, `"weights"` or `"independent"` draws.
        made: whether the draws were made from a density for this purpose.
        mean, sd, quantiles: of each scalar; NaN where draws are not finite. Exact where `exact` has the scalar.
        r_hat, ess_bulk, ess_tail: NaN for all but chains.
        exact: name -> exact marginal.
    """

    names: tuple[str, ...]
    sites: tuple[str, ...]
    sizes: dict[str, int]
    draws: Float[np.ndarray, "scalars chains draws"]
    whole: Bool[np.ndarray, " scalars"]
    weights: Float[np.ndarray, "chains draws"] | None
    kind: str
    made: bool
    mean: Float[np.ndarray, " scalars"]
    sd: Float[np.ndarray, " scalars"]
    quantiles: Float[np.ndarray, "scalars 3"]
    r_hat: Float[np.ndarray, " scalars"]
    ess_bulk: Float[np.ndarray, " scalars"]
    ess_tail: Float[np.ndarray, " scalars"]
    exact: dict[str, Exact]

    @property
    def finite(self) -> Bool[np.ndarray, " scalars"]:
        """Whether all draws of a scalar are finite."""
        return np.isfinite(self.draws).all((1, 2))

    @property
    def moving(self) -> Bool[np.ndarray, " scalars"]:
        """Whether a scalar has finite draws that are not all the same."""
        return self.finite & (self.draws != self.draws[:, :1, :1]).any((1, 2))

    @functools.cached_property
    def worst(self) -> list[int]:
        """Scalars for which chains did worst: by R-hat, and by effective sample size."""
        known = np.flatnonzero(np.isfinite(self.ess_bulk))
        by_r_hat = known[np.argsort(-np.nan_to_num(self.r_hat[known], posinf=1e9), kind="stable")]
        by_size = known[np.argsort(np.minimum(self.ess_bulk, self.ess_tail)[known], kind="stable")]
        return list(dict.fromkeys(int(i) for pair in zip(by_r_hat, by_size, strict=True) for i in pair))


def shares(sizes: dict[str, int], budget: int) -> dict[str, int]:
    """How many scalars of each site are shown if there is room for `budget`: small sites whole, large ones alike.

    >>> shares({"mu": 1, "theta": 100, "z": 100}, 21)
    {'mu': 1, 'theta': 10, 'z': 10}
    """
    left, given = budget, {}
    for rank, (site, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        given[site] = min(size, left // (len(sizes) - rank) if left >= len(sizes) - rank else min(left, 1))
        left -= given[site]
    return {site: given[site] for site in sizes}


def scalars_of(posterior: Posterior) -> Scalars:
    """The scalars of a posterior. A density without draws is drawn from, with a fixed key."""
    made = not posterior.draws
    posterior = posterior.drawn(jax.random.key(0), _MADE) if made else posterior
    arrays = {n: np.asarray(posterior.draws[n]) for n in posterior.names}
    arrays = {n: v for n, v in arrays.items() if v.size and v.dtype.kind in "biuf"}
    chains, count = next(iter(arrays.values())).shape[:2] if arrays else (0, 0)
    sizes = {n: int(np.prod(v.shape[2:])) for n, v in arrays.items()}
    budget = int(np.clip(_MAX_VALUES // max(chains * count, 1), 4, _MAX_SCALARS))
    given = shares(sizes, budget)
    picked = [(n, index) for n, k in given.items() for index in range(k)]
    values = [np.moveaxis(v.reshape(chains, count, -1)[..., : given[n]], 2, 0) for n, v in arrays.items()]
    draws = np.concatenate(values).astype(np.float64) if values else np.zeros((0, chains, count))
    weights = None
    if posterior.log_weights is not None:
        weights = _normalized(np.asarray(posterior.log_weights, np.float64))
    kind = _kind(posterior)
    exact = {}
    for site, marginal in {**(posterior.density or {}), **(posterior.marginals or {})}.items():
        if site in arrays:
            exact |= _exact(site, arrays[site].shape[2:], marginal, given[site])
    names = tuple(_named(n, arrays[n].shape[2:], i) for n, i in picked)
    moments = np.array([_moments(v, weights) for v in draws]).reshape(len(draws), 5)
    for i, name in enumerate(names):
        if name in exact:
            moments[i] = exact[name].mean, exact[name].sd, *exact[name].quantiles
    return Scalars(
        names,
        tuple(n for n, _ in picked),
        sizes,
        draws,
        np.array([arrays[n].dtype.kind in "biu" for n, _ in picked], bool),
        weights,
        kind,
        made,
        moments[:, 0],
        moments[:, 1],
        moments[:, 2:],
        *_convergence(draws, kind),
        exact,
    )


def _normalized(log_weights: np.ndarray) -> np.ndarray:
    """Weights that sum to one; all alike where none is known."""
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    largest = log_weights.max()
    weights = np.exp(log_weights - largest) if np.isfinite(largest) else np.ones(log_weights.shape)
    return weights / weights.sum()


def _kind(posterior: Posterior) -> str:
    if posterior.log_weights is not None:
        return "weights"
    known = (posterior.density, posterior.marginals, posterior.k_hat, posterior.log_evidence_bound)
    has_sampler = any(n in posterior.statistics for n in ("diverging", "energy", "num_steps", "accept_prob"))
    return "independent" if any(v is not None for v in known) and not has_sampler else "chains"


def _named(site: str, shape: tuple[int, ...], index: int) -> str:
    return f"{site}[{', '.join(str(i) for i in np.unravel_index(index, shape))}]" if shape else site


def _moments(values: np.ndarray, weights: np.ndarray | None) -> tuple[float, ...]:
    values = values.ravel()
    if not np.isfinite(values).all():
        return (np.nan,) * 5
    if weights is None:
        return float(values.mean()), float(values.std(ddof=min(values.size - 1, 1))), *np.quantile(values, _LEVELS)
    weights = weights.ravel()
    mean = weights @ values
    sd = np.sqrt(weights @ (values - mean) ** 2 / max(1 - weights @ weights, 1e-12))
    order = np.argsort(values)
    found = np.searchsorted(np.cumsum(weights[order]), _LEVELS)
    return float(mean), float(sd), *values[order][np.minimum(found, len(values) - 1)]


def _convergence(draws: np.ndarray, kind: str) -> tuple[np.ndarray, ...]:
    found = np.full((3, len(draws)), np.nan)
    if kind == "chains" and len(draws) and draws.shape[2] >= 8:
        usable = np.isfinite(draws).all((1, 2))
        if usable.any():
            with np.errstate(all="ignore"):
                found[:, usable] = convergence(np.moveaxis(draws[usable], 0, 2))
    return tuple(found)


# ---- exact marginals ---------------------------------------------------------------------------------------------


def _exact(site: str, shape: tuple[int, ...], marginal: Any, count: int) -> dict[str, Exact]:
    """Exact marginals of the first scalars of a site; none where the family has no closed form."""
    import numpyro.distributions as dist

    from bayeslens.core.quantiles import log_prob, mean_and_variance, quantile

    names = [_named(site, shape, i) for i in range(count)]
    if isinstance(marginal, dist.CategoricalProbs | dist.CategoricalLogits) and marginal.batch_shape == shape:
        rows = np.asarray(marginal.probs, np.float64).reshape(-1, marginal.probs.shape[-1])[:count]
        return {n: _categorical(p) for n, p in zip(names, rows, strict=True)}
    marginal = _of_scalars(marginal)
    if marginal is None or marginal.batch_shape != shape:
        return {}
    levels = np.array([0.002, 0.998, *_LEVELS])
    mean, variance = (np.ravel(v)[:count] for v in mean_and_variance(marginal))
    found = quantile(marginal, levels).reshape(-1, len(levels))[:count]
    whole = quantile(marginal, levels)
    step = np.linspace(0, 1, 160).reshape(-1, *[1] * len(shape))
    grid = whole[..., 0] + step * (whole[..., 1] - whole[..., 0])
    density = np.exp(log_prob(marginal, grid)).reshape(len(step), -1)
    grid = grid.reshape(len(step), -1)
    return {
        n: Exact(float(mean[i]), float(np.sqrt(variance[i])), found[i, 2:], (grid[:, i], density[:, i]))
        for i, n in enumerate(names)
    }


def _of_scalars(marginal: Any) -> Any:
    """The marginal of a site as one plain distribution per scalar, which SciPy evaluates; None if there is none."""
    import numpyro.distributions as dist

    if isinstance(marginal, dist.Independent):
        return _of_scalars(marginal.base_dist)
    if isinstance(marginal, dist.Dirichlet):
        concentration = np.asarray(marginal.concentration, np.float64)
        return dist.Beta(concentration, concentration.sum(-1, keepdims=True) - concentration)
    if isinstance(marginal, dist.MultivariateNormal):
        return dist.Normal(marginal.mean, np.sqrt(np.asarray(marginal.variance, np.float64)))
    plain_families = (dist.Normal, dist.StudentT, dist.LogNormal, dist.Gamma, dist.InverseGamma, dist.Beta)
    return marginal if type(marginal) in (*plain_families, dist.Exponential, dist.Laplace, dist.Uniform) else None


def _categorical(probabilities: np.ndarray) -> Exact:
    codes = np.arange(len(probabilities))
    mean = float(probabilities @ codes)
    quantiles = np.minimum(np.searchsorted(np.cumsum(probabilities), _LEVELS), len(codes) - 1).astype(float)
    return Exact(mean, float(np.sqrt(probabilities @ (codes - mean) ** 2)), quantiles, None, probabilities)
