"""Prior sensitivity by power scaling: does the posterior move when prior or likelihood count a little more?

Prior and likelihood are raised to powers near one, by Pareto-smoothed importance weights of the draws that are there.

Source: N. Kallioinen, T. Paananen, P.-C. Buerkner, A. Vehtari, "Detecting and diagnosing prior and likelihood
sensitivity with power-scaling" (2023); H.-V. Nguyen, J. Vreeken, "Non-parametric Jensen-Shannon divergence" (2015).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bayeslens.core.errors import InputError
from bayeslens.inference.diagnostics import K_HAT_LIMIT, pareto_k, pareto_smoothed

if TYPE_CHECKING:
    import pandas as pd

    from bayeslens.core.posterior import Posterior

CONFLICT, WEAK, FINE = "prior-data conflict", "strong prior or weak likelihood", "-"
_SENSITIVE = 0.05  # the paper's threshold
_POWER = 1.01
_BLOCKS = 20  # of draws, for standard errors
_SHOWN = (0.8, 0.9, 1.0, 1.11, 1.25)


@dataclasses.dataclass(frozen=True)
class PowerScaling:
    """How each quantity's posterior answers to prior and likelihood.

    Attributes:
        names: of the quantities.
        prior, likelihood: sensitivity: change of cumulative Jensen-Shannon distance per doubling of the power.
        prior_error, likelihood_error: standard errors, by a jackknife over blocks of draws.
        diagnosis: `"prior-data conflict"` where both are sensitive, `"strong prior or weak likelihood"` where the
            prior alone is, `"-"` otherwise.
        prior_path, likelihood_path: mean and standard deviation at each of `powers`, shape (powers, quantities, 2).
        powers: that pictures show.
        k_hat: largest Pareto k-hat of the weights that the sensitivities rest on.
        draws: the posterior's, shape (draws, quantities).
        log_prior, log_likelihood: of each draw.
    """

    names: tuple[str, ...]
    prior: Float[np.ndarray, " quantities"]
    prior_error: Float[np.ndarray, " quantities"]
    likelihood: Float[np.ndarray, " quantities"]
    likelihood_error: Float[np.ndarray, " quantities"]
    diagnosis: tuple[str, ...]
    prior_path: Float[np.ndarray, "powers quantities 2"]
    likelihood_path: Float[np.ndarray, "powers quantities 2"]
    powers: tuple[float, ...]
    k_hat: float
    draws: Float[np.ndarray, "draws quantities"]
    log_prior: Float[np.ndarray, " draws"]
    log_likelihood: Float[np.ndarray, " draws"]

    @property
    def table(self) -> pd.DataFrame:
        """One row per quantity."""
        import pandas as pd

        return pd.DataFrame(
            {
                "quantity": self.names,
                "prior": self.prior,
                "prior_standard_error": self.prior_error,
                "likelihood": self.likelihood,
                "likelihood_standard_error": self.likelihood_error,
                "diagnosis": self.diagnosis,
            }
        )

    @property
    def verdict(self) -> str:
        """One sentence for each diagnosis that was made."""
        said = []
        for kind, sentence in (
            (CONFLICT, "Prior and data disagree on {}: both move the posterior; look at the prior."),
            (WEAK, "The prior decides on {}: the data say little; say in the report where the prior is from."),
        ):
            found = [n for n, d in zip(self.names, self.diagnosis, strict=True) if d == kind]
            if found:
                said.append(sentence.format(", ".join(found)))
        if self.k_hat > K_HAT_LIMIT:
            said.append(f"Pareto k-hat is {self.k_hat:.2f}: the sensitivities cannot be trusted; take more draws.")
        return " ".join(said) or "The posterior hardly depends on the strength of the prior."

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="%.3f") + "\n" + self.verdict


def power_scaling(
    draws: Posterior | Float[np.ndarray, "draws quantities"],
    log_prior: Float[np.ndarray, " draws"] | None = None,
    log_likelihood: Float[np.ndarray, " draws"] | None = None,
    *,
    names: tuple[str, ...] | None = None,
) -> PowerScaling:
    """Sensitivity of a posterior to powers of its prior and its likelihood.

    Args:
        draws: a `Posterior` that knows its model and data; or draws of the quantities of interest, with the
            logarithms of prior density and likelihood of each draw (joint over sites and observations).
        log_prior, log_likelihood: with plain draws.
        names: of the quantities.

    Raises:
        InputError: shapes that do not fit, values that are not finite, fewer than 100 draws, or a posterior without
            model, data or draws.

    >>> rng = np.random.default_rng(0)
    >>> mu = rng.normal(2.5, np.sqrt(0.5), size=4000)  # prior N(0, 1), one observation 5 with unit noise
    >>> print(power_scaling(mu, -mu**2 / 2, -((5 - mu) ** 2) / 2, names=("mu",)).diagnosis[0])
    prior-data conflict
    """
    if hasattr(draws, "log_likelihood") and hasattr(draws, "draws"):
        terms = log_terms(draws)
        names, draws, log_prior, log_likelihood = terms.names, terms.draws, terms.log_prior, terms.log_likelihood
    draws = np.asarray(draws, np.float64)
    draws = draws[:, None] if draws.ndim == 1 else draws
    if log_prior is None or log_likelihood is None:
        raise InputError("plain draws need log_prior and log_likelihood, one number a draw each")
    log_prior, log_likelihood = np.asarray(log_prior, np.float64), np.asarray(log_likelihood, np.float64)
    if draws.ndim != 2 or not log_prior.shape == log_likelihood.shape == draws.shape[:1]:
        raise InputError(
            "need draws of shape (draws, quantities) and one log prior and log likelihood each, got "
            f"{draws.shape}, {log_prior.shape} and {log_likelihood.shape}"
        )
    if len(draws) < 100:
        raise InputError(f"need at least 100 draws, got {len(draws)}: draw more")
    wrong = ~(np.isfinite(draws).all(1) & np.isfinite(log_prior) & np.isfinite(log_likelihood))
    if wrong.any():
        raise InputError(f"draw {int(wrong.argmax())} or its log density is not finite: drop it or look at the model")
    names = tuple(names) if names is not None else tuple(f"quantity {i}" for i in range(draws.shape[1]))
    if len(names) != draws.shape[1]:
        raise InputError(f"{len(names)} names were given for {draws.shape[1]} quantities")
    order = draws.argsort(0)
    found, errors, paths, k_hat = [], [], [], -np.inf
    for log_part in (log_prior, log_likelihood):
        sensitivity = _sensitivity(draws, order, log_part)
        found.append(sensitivity)
        block = np.arange(len(draws)) * _BLOCKS // len(draws)  # neighbours of one chain stay together
        left_out = []
        for b in range(_BLOCKS):
            kept = block != b
            left_out.append(_sensitivity(draws[kept], draws[kept].argsort(0), log_part[kept]))
        spread = np.stack(left_out) - np.mean(left_out, 0)
        errors.append(np.sqrt((_BLOCKS - 1) / _BLOCKS * (spread**2).sum(0)))
        paths.append(np.stack([_moments(draws, (power - 1) * log_part) for power in _SHOWN]))
        k_hat = max(k_hat, *(pareto_k((power - 1) * log_part) for power in (1 / _POWER, _POWER)))
    prior, likelihood = found
    diagnosis = tuple(
        (CONFLICT if b >= _SENSITIVE else WEAK) if a >= _SENSITIVE else FINE
        for a, b in zip(prior, likelihood, strict=True)
    )
    return PowerScaling(
        names, prior, errors[0], likelihood, errors[1], diagnosis, *paths, _SHOWN, float(k_hat), draws,
        log_prior, log_likelihood,
    )  # fmt: skip


def scaled_weights(log_part: Float[np.ndarray, " draws"], power: float) -> Float[np.ndarray, " draws"]:
    """Normalized importance weights of draws for prior or likelihood raised to a power, Pareto-smoothed.

    >>> scaled_weights(np.zeros(4), 1.1).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    smoothed = pareto_smoothed((power - 1) * log_part)
    weights = np.exp(smoothed - smoothed.max())
    return weights / weights.sum()


def cumulative_jensen_shannon(values: Float[np.ndarray, " draws"], weights: Float[np.ndarray, " draws"]) -> float:
    """Cumulative Jensen-Shannon distance of draws from the same draws with weights, normalized to [0, 1].

    The larger of the distances of distribution functions and of survival functions, so that the sign of the quantity
    does not matter.

    >>> cumulative_jensen_shannon(np.array([0.0, 1.0, 2.0]), np.full(3, 1 / 3))
    0.0
    """
    order = np.argsort(values)
    return float(_distance(np.asarray(values, np.float64)[order][:, None], np.asarray(weights)[order][:, None])[0])


def _distance(ordered: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The distances of columns, sorted by value."""
    width = np.diff(ordered, axis=0)
    base = np.arange(1, len(ordered))[:, None] / len(ordered)
    moved = weights.cumsum(0)[:-1]
    best = np.zeros(ordered.shape[1])
    for p, q in ((base, moved), (1 - base, np.maximum(1 - moved, 1e-300))):
        middle = (p + q) / 2
        # The terms without logarithms cancel between the two directions.
        divergence = (width * (p * np.log2(p / middle) + q * np.log2(q / middle))).sum(0)
        bound = (width * (p + q)).sum(0)
        best = np.maximum(best, np.maximum(divergence, 0) / np.where(bound > 0, bound, 1))
    return np.sqrt(best)


def _sensitivity(draws: np.ndarray, order: np.ndarray, log_part: np.ndarray) -> np.ndarray:
    """Change of the distance per doubling of the power, from both sides of one."""
    ordered = np.take_along_axis(draws, order, 0)
    total = sum(_distance(ordered, scaled_weights(log_part, power)[order]) for power in (1 / _POWER, _POWER))
    return total / (2 * np.log2(_POWER))


def _moments(draws: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    smoothed = pareto_smoothed(log_weights)
    weights = np.exp(smoothed - smoothed.max())
    weights /= weights.sum()
    mean = weights @ draws
    return np.stack([mean, np.sqrt(weights @ (draws - mean) ** 2)], -1)


class LogTerms(NamedTuple):
    """Scalars of a posterior's latent sites, draw by draw, with log prior density and log likelihood."""

    names: tuple[str, ...]
    draws: Float[np.ndarray, "draws scalars"]
    log_prior: Float[np.ndarray, " draws"]
    log_likelihood: Float[np.ndarray, " draws"]


def log_terms(posterior: Posterior) -> LogTerms:
    """Log prior density of the model's sites, by their own measures, and log likelihood of each draw of a posterior.

    Raises:
        InputError: the posterior does not know its model and data, has no draws, or weighs them.
    """
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from numpyro import handlers

    from bayeslens.core.conditioned_model import conditioned_model, site_log_prob

    if posterior.model is None or posterior.data is None:
        raise InputError("this posterior does not know its model and data: make it with infer, or load(path, model)")
    if not posterior.draws or posterior.log_weights is not None:
        raise InputError("power scaling needs draws that count alike: make some by drawn(key), or resample them")
    conditioned = conditioned_model(posterior.model, posterior.data)
    sites = tuple(sorted(s.name for s in conditioned.latents))
    flat = {n: jnp.asarray(posterior[n]).reshape(-1, *np.shape(posterior[n])[2:]) for n in sites}

    @eqx.filter_jit
    def both(flat: dict[str, Any]) -> Any:
        def one(values: dict[str, Any]) -> Any:
            program = handlers.seed(handlers.substitute(conditioned.model, data=values), jax.random.key(0))
            trace = handlers.trace(program).get_trace(**conditioned.arguments)
            samples = [s for s in trace.values() if s["type"] == "sample"]
            totals = [
                sum(jnp.sum(site_log_prob(s)) for s in samples if bool(s["is_observed"]) is seen)
                for seen in (False, True)
            ]
            return totals

        return jax.vmap(one)(flat)

    log_prior, log_likelihood = both(flat)
    names, columns = [], []
    for n in sites:
        shape = flat[n].shape[1:]
        names += [n] if not shape else [f"{n}[{', '.join(map(str, i))}]" for i in np.ndindex(*shape)]
        columns.append(np.asarray(flat[n], np.float64).reshape(len(flat[n]), -1))
    return LogTerms(
        tuple(names), np.concatenate(columns, 1), np.asarray(log_prior, np.float64), np.asarray(log_likelihood, float)
    )
