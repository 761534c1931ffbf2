"""Posterior predictive checks: do data that the fitted model would make look like the data that there are?

Sources: A. Gelman, X.-L. Meng, H. Stern, "Posterior predictive assessment of model fitness via realized discrepancies"
(1996); J. Gabry, D. Simpson, A. Vehtari, M. Betancourt, A. Gelman, "Visualization in Bayesian workflow" (2019), for
LOO-PIT; A. Vehtari, A. Gelman, J. Gabry, "Practical Bayesian model evaluation using leave-one-out cross-validation and
WAIC" (2017), for its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator
from bayeslens.evaluation.rank_tests import uniform_ecdf
from bayeslens.inference.diagnostics import K_HAT_LIMIT, convergence, pareto_k, pareto_smoothed

if TYPE_CHECKING:
    import pandas as pd

    from bayeslens.core.posterior import Posterior

_LEAST_DRAWS = 50
_RESOLUTION = 1000  # ranks by which LOO-PIT values are tested


def _skewness(y: np.ndarray) -> np.ndarray:
    centred = y - y.mean(-1, keepdims=True)
    scale = centred.std(-1)
    return (centred**3).mean(-1) / np.where(scale > 0, scale, 1) ** 3


def _share_of_zeros(y: np.ndarray) -> np.ndarray:
    return (y == 0).mean(-1)


STATISTICS: dict[str, Callable] = {
    "mean": lambda y: y.mean(-1),
    "standard deviation": lambda y: y.std(-1),
    "skewness": _skewness,
    "minimum": lambda y: y.min(-1),
    "maximum": lambda y: y.max(-1),
}


@dataclasses.dataclass(frozen=True)
class PosteriorPredictiveCheck:
    """Statistics of observed data beside those of replicated data.

    Attributes:
        names: of the statistics.
        observed: their values.
        replicated_statistics: of each draw, shape (draws, statistics).
        p_values: probability of a replicated value of at least the observed one, ties by half. Near 0 or 1 the model
            does not make such data. Under the right model they are not uniform but nearer to one half.
        standard_errors: of the p-values, from the number of draws.
        data: the observations, shape (rows,).
        replicated: shape (draws, rows).
        loo_pit: probability of at most each observation, predicted from all others; None without log likelihoods.
        loo_pit_p_value: of their uniformity; approximate, since the values depend on each other a little.
        k_hats: Pareto k-hat of each observation's weights; None without log likelihoods.
    """

    names: tuple[str, ...]
    observed: Float[np.ndarray, " statistics"]
    replicated_statistics: Float[np.ndarray, "draws statistics"]
    p_values: Float[np.ndarray, " statistics"]
    standard_errors: Float[np.ndarray, " statistics"]
    data: Float[np.ndarray, " rows"]
    replicated: Float[np.ndarray, "draws rows"]
    loo_pit: Float[np.ndarray, " rows"] | None = None
    loo_pit_p_value: float | None = None
    k_hats: Float[np.ndarray, " rows"] | None = None

    @property
    def table(self) -> pd.DataFrame:
        """One row per statistic: observed value, replicated 5%, 50% and 95%, p-value and its standard error."""
        import pandas as pd

        low, middle, high = np.quantile(self.replicated_statistics, [0.05, 0.5, 0.95], axis=0)
        return pd.DataFrame(
            {
                "statistic": self.names,
                "observed": self.observed,
                "5%": low,
                "50%": middle,
                "95%": high,
                "p_value": self.p_values,
                "standard_error": self.standard_errors,
            }
        )

    @property
    def verdict(self) -> str:
        """What does not fit, in words."""
        extreme = [
            f"{n} ({'below' if p > 0.5 else 'above'} what the model makes)"
            for n, p in zip(self.names, self.p_values, strict=True)
            if min(p, 1 - p) < 0.025
        ]
        said = ["The model makes no such data: " + ", ".join(extreme) + "."] if extreme else []
        if self.loo_pit_p_value is not None and self.loo_pit_p_value < 0.05:
            said.append(f"Leave-one-out predictions are not calibrated (p = {self.loo_pit_p_value:.2g}).")
        if self.k_hats is not None and (bad := int((self.k_hats > K_HAT_LIMIT).sum())):
            said.append(f"{bad} observations have Pareto k-hat above {K_HAT_LIMIT}: their LOO-PIT is not reliable.")
        return " ".join(said) or "The model makes data like these, as far as these statistics see."

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="%.3g") + "\n" + self.verdict


def posterior_predictive_check(
    data: Float[np.ndarray, " rows"],
    replicated: Float[np.ndarray, "draws rows"],
    *,
    key: Any,
    statistics: dict[str, Callable] | None = None,
    log_likelihood: Float[np.ndarray, "draws rows"] | None = None,
    thin: int | None = None,
) -> PosteriorPredictiveCheck:
    """Compare observed with replicated data.

    Args:
        data: observations.
        replicated: one data set for each posterior draw; see `replicate` for those of a `Posterior`.
        key: a `jax.random.key`, of broken ties in LOO-PIT.
        statistics: name -> function of an array whose last axis are rows. By default mean, standard deviation,
            skewness, minimum and maximum, and the share of zeros where there are any. What the model fits directly,
            such as the mean, cannot look wrong: choose statistics that matter and were not fitted.
        log_likelihood: of each observation under each draw, for LOO-PIT.
        thin: every so many draws are nearly independent, for standard errors; estimated by default.

    Raises:
        InputError: shapes that do not fit, fewer than 50 draws, values that are not finite, or a statistic that gives
            another shape.

    >>> import jax
    >>> rng = np.random.default_rng(0)
    >>> skewed, normal = rng.exponential(size=200), rng.normal(1.0, 1.0, size=(500, 200))
    >>> found = posterior_predictive_check(skewed, normal, key=jax.random.key(0))
    >>> bool(found.table.p_value[found.names.index("minimum")] < 0.01)
    True
    """
    data, replicated = np.asarray(data, np.float64).ravel(), np.asarray(replicated, np.float64)
    replicated = replicated.reshape(len(replicated), -1) if replicated.ndim > 1 else replicated
    if replicated.ndim != 2 or replicated.shape[1] != len(data) or len(replicated) < _LEAST_DRAWS:
        raise InputError(
            f"need replicated data of shape (draws, {len(data)}) with at least {_LEAST_DRAWS} draws, got "
            f"{replicated.shape}"
        )
    for name, values in (("observation", np.isfinite(data)), ("replicated data set", np.isfinite(replicated).all(1))):
        if not values.all():
            raise InputError(f"{name} {int((~values).argmax())} holds values that are not finite: drop it")
    if statistics is None:
        zeros = (data == 0).any() or (replicated == 0).mean() > 0.01
        statistics = STATISTICS | ({"share of zeros": _share_of_zeros} if zeros else {})
    observed = np.array([_value(n, f, data, ()) for n, f in statistics.items()])
    made = np.stack([_value(n, f, replicated, (len(replicated),)) for n, f in statistics.items()], 1)
    above = (made > observed) + 0.5 * (made == observed)
    p_values = above.mean(0)
    if thin is None:
        with np.errstate(all="ignore"):
            effective = convergence(made[None]).ess_bulk
        effective = np.clip(np.nan_to_num(effective, nan=len(made)), 1, len(made))
    else:
        effective = np.full(len(observed), len(made) / thin)
    # One more draw on either side: a share of 0 has an error too.
    share = (p_values * effective + 1) / (effective + 2)
    errors = np.sqrt(share * (1 - share) / (effective + 3))
    pit = p_value = k_hats = None
    if log_likelihood is not None:
        pit, k_hats = loo_pit(data, replicated, log_likelihood, key=key)
        uniform = uniform_ecdf(len(pit), _RESOLUTION)
        below = np.searchsorted(np.sort(pit), uniform.probability)
        p_value = float(uniform.p_value(uniform.tails[np.arange(len(below)), below].min()))
    return PosteriorPredictiveCheck(
        tuple(statistics), observed, made, p_values, errors, data, replicated, pit, p_value, k_hats
    )


def _value(name: str, statistic: Callable, data: np.ndarray, shape: tuple[int, ...]) -> Any:
    value = np.asarray(statistic(data), np.float64)
    if value.shape != shape or not np.isfinite(value).all():
        raise InputError(
            f"the statistic {name!r} of data of shape {data.shape} must be finite and of shape {shape}, got "
            f"{value.shape}: reduce the last axis, as in lambda y: y.mean(-1)"
        )
    return value


def loo_pit(
    data: Float[np.ndarray, " rows"],
    replicated: Float[np.ndarray, "draws rows"],
    log_likelihood: Float[np.ndarray, "draws rows"],
    *,
    key: Any,
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Probability of at most each observation, predicted from all others, and Pareto k-hat of its weights.

    Draws are weighed by one over the likelihood of the observation left out, Pareto-smoothed. Where a replicated value
    equals the observation, a uniform share of its weight counts, so that values of counts are uniform too.

    Args:
        data, replicated: as for `posterior_predictive_check`.
        log_likelihood: of each observation under each draw, in the order of the draws that made `replicated`.
        key: a `jax.random.key`.
    """
    log_likelihood = np.asarray(log_likelihood, np.float64)
    log_likelihood = log_likelihood.reshape(len(log_likelihood), -1)
    if log_likelihood.shape != replicated.shape:
        raise InputError(
            f"log likelihoods need the shape of the replicated data, {replicated.shape}, got {log_likelihood.shape}"
        )
    rng = host_generator(key)
    share = rng.random(len(data))
    values, k_hats = np.empty(len(data)), np.empty(len(data))
    for i in range(len(data)):
        smoothed = pareto_smoothed(-log_likelihood[:, i])
        weights = np.exp(smoothed - smoothed.max())
        weights /= weights.sum()
        k_hats[i] = pareto_k(-log_likelihood[:, i])
        below = weights @ (replicated[:, i] < data[i])
        values[i] = below + share[i] * (weights @ (replicated[:, i] == data[i]))
    return np.clip(values, 0, 1), k_hats


def check_posterior(
    posterior: Posterior, *, key: Any, site: str | None = None, statistics: dict[str, Callable] | None = None
) -> PosteriorPredictiveCheck:
    """Posterior predictive check of a `Posterior` that knows its model and data, with LOO-PIT.

    Args:
        posterior: as `infer` makes it.
        key: a `jax.random.key`.
        site: which observed site; needed where there are several.
        statistics: as for `posterior_predictive_check`.

    Raises:
        InputError: the posterior does not know its model and data, or there are several observed sites.
    """
    import jax

    data, replicated, log_likelihood = replicate(posterior, key=jax.random.fold_in(key, 0), site=site)
    return posterior_predictive_check(
        data, replicated, key=jax.random.fold_in(key, 1), statistics=statistics, log_likelihood=log_likelihood
    )


def replicate(
    posterior: Posterior, *, key: Any, site: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Observed data of a site, one replicated data set for each draw, and log likelihoods.

    Returns:
        Shapes (rows,), (draws, rows) and (draws, rows); no log likelihoods where an observation has several numbers
        or draws carry weights.

    Raises:
        InputError: the posterior does not know its model and data, or there are several observed sites.
    """
    import jax
    import jax.numpy as jnp
    from numpyro import handlers, infer

    if posterior.model is None or posterior.data is None or not posterior.draws:
        raise InputError("a posterior with draws, model and data is needed: make it with infer, or load(path, model)")
    shape = np.shape(posterior[posterior.names[0]])[:2]
    count = int(np.prod(shape))
    if posterior.log_weights is None:
        flat = {n: jnp.asarray(v).reshape(-1, *np.shape(v)[2:]) for n, v in posterior.draws.items()}
    else:
        flat = posterior.sample(jax.random.fold_in(key, 1), (count,))
    one = {n: v[0] for n, v in flat.items()}
    program = handlers.seed(handlers.substitute(posterior.model, data=one), jax.random.key(0))
    trace = handlers.trace(program).get_trace(**posterior.data)
    sites = {
        n: np.asarray(s["value"])
        for n, s in trace.items()
        if s["type"] == "sample" and s["is_observed"] and type(s["fn"]).__name__ != "Unit"
    }
    if site is None and len(sites) != 1:
        raise InputError(f"the model observes the sites {sorted(sites)}: say which one to check, by site=")
    site = site or next(iter(sites))
    if site not in sites:
        raise InputError(f"the model does not observe {site!r}; it observes {sorted(sites)}")
    # Deterministic sites follow from the others.
    latent = {n: flat[n] for n, s in trace.items() if s["type"] == "sample" and n in flat}
    data = {n: jnp.asarray(v) if isinstance(v, np.ndarray) else v for n, v in posterior.data.items()}
    draw = infer.Predictive(handlers.uncondition(posterior.model), latent, return_sites=[site], parallel=True)
    replicated = np.asarray(draw(key, **data)[site]).reshape(count, -1)
    log_likelihood = None
    if posterior.log_weights is None:
        found = np.asarray(posterior.log_likelihood()[site]).reshape(count, -1)
        log_likelihood = found if found.shape == replicated.shape else None
    return sites[site].ravel(), replicated, log_likelihood
