"""Distribution families for natural gradient boosting: parameters, losses, gradients and metrics, in plain NumPy.

A family maps unconstrained parameters, shape (rows, parameters), to a NumPyro distribution. Here they are under the
log score; `ngboost_crps_families` scores the same distributions by the CRPS. Tests hold each gradient against
automatic differentiation, and each metric against quadrature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import Distribution
from scipy import special

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import backend
from bayeslens.learners.natural_gradient import LOG_CONCENTRATION, LOG_DF, LOG_MEAN, Family, bounded_exp, columns
from bayeslens.learners.ngboost_crps_families import under_crps


class _Standard(NamedTuple):
    """A standardized location-scale family: log density, log survival, and -d log density / dz times one and z."""

    log_density: Callable
    log_survival: Callable
    slope: Callable
    information: tuple[float, float]  # Fisher information of location (times scale^2) and of log scale


def _laplace_log_survival(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, np.log(0.5) - z, np.log1p(-0.5 * np.exp(np.minimum(z, 0.0))))


_NORMAL = _Standard(
    lambda z: -0.5 * z * z - 0.5 * np.log(2 * np.pi), lambda z: special.log_ndtr(-z), lambda z: z, (1.0, 2.0)
)
_LAPLACE = _Standard(lambda z: -np.abs(z) - np.log(2), _laplace_log_survival, np.sign, (1.0, 1.0))


def _location_scale(standard: _Standard, build_distribution: Callable) -> Family:
    """Location and log scale under the log score, rows possibly right-censored."""

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        z = (y - t[:, 0]) * np.exp(-t[:, 1])
        plain = t[:, 1] - standard.log_density(z)
        return plain if censored is None else np.where(censored, -standard.log_survival(z), plain)

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        inverse = np.exp(-t[:, 1])
        z = (y - t[:, 0]) * inverse
        slope, constant = standard.slope(z), 1.0
        if censored is not None:
            hazard = np.exp(np.clip(standard.log_density(z) - standard.log_survival(z), -700, 700))
            slope, constant = np.where(censored, hazard, slope), np.where(censored, 0.0, 1.0)
        metric = np.empty_like(t, order="F")
        metric[:, 0], metric[:, 1] = standard.information[0] * inverse * inverse, standard.information[1]
        return columns(-slope * inverse, constant - slope * z), metric

    return Family(_location_scale_start, loss, gradient, build_distribution, censoring=True)


def _location_scale_start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    mean = np.average(y, weights=w)
    scale = np.sqrt(np.average((y - mean) ** 2, weights=w))
    return np.array([mean, np.log(max(scale, 1e-6 * max(abs(mean), 1e-6)))])


def _with_scale(family: type[Distribution]) -> Callable[[Any], Distribution]:
    return lambda t: build(family, loc=t[:, 0], scale=bounded_exp(t[:, 1]))


def _of_log(family: Family, build_distribution: Callable) -> Family:
    """The family of exp(Y)."""

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        jacobian = np.log(y) if censored is None else np.where(censored, 0.0, np.log(y))
        return family.loss(np.log(y), t, censored) + jacobian

    return family._replace(
        start=lambda y, w: family.start(np.log(y), w),
        loss=loss,
        gradient=lambda y, t, censored=None: family.gradient(np.log(y), t, censored),
        distribution=build_distribution,
        check=_check_positive,
    )


def _check_positive(y: np.ndarray) -> None:
    if (y <= 0).any():
        raise InputError(
            f"lognormal needs positive targets, and {int((y <= 0).sum())} are not: use normal, or shift the target"
        )


def _check_counts(y: np.ndarray) -> None:
    if (y < 0).any() or (y != np.round(y)).any():
        raise InputError("poisson and negative_binomial need whole targets of at least 0: use normal or lognormal")


def _student_t() -> Family:
    """Location, log scale and log degrees of freedom; the information is that of Lange, Little and Taylor (1989)."""

    def unpack(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
        df = np.exp(np.clip(t[:, 2], *LOG_DF))
        inverse = np.exp(-t[:, 1])
        return df, inverse, (y - t[:, 0]) * inverse

    def log_density(z: np.ndarray, df: np.ndarray) -> np.ndarray:
        constant = special.gammaln((df + 1) / 2) - special.gammaln(df / 2) - 0.5 * np.log(df * np.pi)
        return constant - (df + 1) / 2 * np.log1p(z * z / df)

    def log_survival(z: np.ndarray, df: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(special.stdtr(df, -z), 1e-300))

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        df, _, z = unpack(y, t)
        plain = t[:, 1] - log_density(z, df)
        return plain if censored is None else np.where(censored, -log_survival(z, df), plain)

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        df, inverse, z = unpack(y, t)
        slope = (df + 1) * z / (df + z * z)
        by_df = special.digamma((df + 1) / 2) - special.digamma(df / 2) - 1 / df - np.log1p(z * z / df)
        by_df = -0.5 * df * (by_df + (df + 1) * z * z / (df * (df + z * z)))
        constant = 1.0
        if censored is not None:
            hazard = np.exp(log_density(z, df) - log_survival(z, df))
            slope, constant = np.where(censored, hazard, slope), np.where(censored, 0.0, 1.0)
            # The survival function has no closed derivative in the degrees of freedom.
            up, down = log_survival(z, df * np.exp(1e-4)), log_survival(z, df * np.exp(-1e-4))
            by_df = np.where(censored, -(up - down) / 2e-4, by_df)
        metric = np.zeros((len(z), 3, 3))
        metric[:, 0, 0] = (df + 1) / (df + 3) * inverse * inverse
        metric[:, 1, 1] = 2 * df / (df + 3)
        metric[:, 1, 2] = metric[:, 2, 1] = -2 * df / ((df + 1) * (df + 3))
        curvature = special.polygamma(1, df / 2) - special.polygamma(1, (df + 1) / 2)
        metric[:, 2, 2] = df * df * (curvature / 4 - (df + 5) / (2 * df * (df + 1) * (df + 3)))
        # With many degrees of freedom the information fades, and its inverse would chase noise.
        metric[:, 2, 2] = np.maximum(metric[:, 2, 2], 0.02)
        return columns(-slope * inverse, constant - slope * z, by_df), metric

    def start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
        _, log_scale = _location_scale_start(y, w)
        spread = np.subtract(*np.quantile(y, [0.75, 0.25])) / 1.5
        return np.array([np.median(y), np.log(spread) if spread > 0 else log_scale, np.log(5.0)])

    def distribution(t: np.ndarray) -> Distribution:
        df = bounded_exp(backend(t).clip(t[:, 2], *LOG_DF))
        return build(dist.StudentT, df=df, loc=t[:, 0], scale=bounded_exp(t[:, 1]))

    return Family(start, loss, gradient, distribution, censoring=True)


def _poisson() -> Family:
    return Family(
        lambda y, w: np.array([np.log(max(np.average(y, weights=w), 1e-6))]),
        lambda y, t, censored=None: np.exp(t[:, 0]) - y * t[:, 0] + special.gammaln(y + 1),
        lambda y, t, censored=None: (np.exp(t) - y[:, None], np.exp(t)),
        lambda t: build(dist.Poisson, rate=bounded_exp(t[:, 0])),
        _check_counts,
        rate=0,
    )


@functools.cache
def _concentration_information() -> Any:
    """Fisher information of a negative binomial's log concentration, over log mean and log concentration."""
    from scipy.interpolate import RectBivariateSpline
    from scipy.stats import nbinom

    log_mean, log_r = np.linspace(-6, 9, 31), np.linspace(*LOG_CONCENTRATION, 31)
    table = np.empty((31, 31))
    for i, m in enumerate(np.exp(log_mean)):
        for j, r in enumerate(np.exp(log_r)):
            p = r / (r + m)
            # The sum over counts as an integral over the quantiles, which stays short for any mean.
            top = nbinom.ppf(1 - 1e-8, r, p)
            y = np.unique(np.round(np.r_[np.arange(min(top, 200) + 1), np.geomspace(200, max(top, 201), 400)]))
            upper = nbinom.cdf(y, r, p)
            mass = np.diff(upper, prepend=0.0)
            by_r = special.digamma(y + r) - special.digamma(r) + np.log(p) + 1 - (r + y) / (r + m)
            table[i, j] = r * r * (mass * by_r**2).sum()
    return RectBivariateSpline(log_mean, log_r, np.log(np.maximum(table, 1e-6)))


def _negative_binomial() -> Family:
    """Log mean and log concentration, which are orthogonal; variance = mean + mean^2 / concentration."""

    def unpack(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        xp = backend(t)
        return xp.exp(xp.clip(t[:, 0], *LOG_MEAN)), xp.exp(xp.clip(t[:, 1], *LOG_CONCENTRATION))

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        m, r = unpack(t)
        counts = special.gammaln(y + r) - special.gammaln(r) - special.gammaln(y + 1)
        return -(counts + r * np.log(r / (r + m)) + special.xlogy(y, m / (r + m)))

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        m, r = unpack(t)
        by_r = special.digamma(y + r) - special.digamma(r) + np.log(r / (r + m)) + 1 - (r + y) / (r + m)
        log_mean, log_r = np.clip(t[:, 0], -6, 9), np.clip(t[:, 1], *LOG_CONCENTRATION)
        information = np.exp(_concentration_information().ev(log_mean, log_r))
        slope = columns((m - y) * r / (r + m), -r * by_r)
        return slope, columns(m * r / (m + r), np.maximum(information, 1e-2))

    def start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
        mean = max(np.average(y, weights=w), 1e-6)
        extra = np.average((y - mean) ** 2, weights=w) - mean
        return np.array([np.log(mean), np.log(np.clip(mean**2 / max(extra, 1e-3 * mean), 0.05, 100))])

    def distribution(t: np.ndarray) -> Distribution:
        m, r = unpack(t)
        return build(dist.NegativeBinomial2, mean=m, concentration=r)

    return Family(start, loss, gradient, distribution, _check_counts, rate=0)


def _softmax(t: Any) -> Any:
    e = backend(t).exp(t - t.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _categorical(classes: int) -> Family:
    """Class logits. The metric is the Fisher information's diagonal: in full it is singular."""

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        return -special.log_softmax(t, 1)[np.arange(len(y)), y.astype(int)]

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        p = _softmax(t)
        residual = p.copy()
        residual[np.arange(len(y)), y.astype(int)] -= 1
        return residual, np.maximum(p * (1 - p), 0.05)

    def start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
        share = np.bincount(y.astype(int), w, classes) + 0.5
        return np.log(share / share.sum())

    return Family(
        start,
        loss,
        gradient,
        lambda t: build(dist.CategoricalProbs, probs=_softmax(t).astype(np.float32)),
        spread=False,
    )


def _bernoulli() -> Family:
    """The logit of the second class; predictions are Categorical over both."""

    def distribution(t: np.ndarray) -> Distribution:
        probs = _softmax(backend(t).stack([0 * t[:, 0], t[:, 0]], 1))
        return build(dist.CategoricalProbs, probs=probs.astype(np.float32))

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        p = special.expit(t)
        return p - y[:, None], np.maximum(p * (1 - p), 0.05)

    return Family(
        lambda y, w: special.logit((np.average(y, weights=w, keepdims=True) * len(y) + 0.5) / (len(y) + 1)),
        lambda y, t, censored=None: np.logaddexp(0, t[:, 0]) - y * t[:, 0],
        gradient,
        distribution,
    )


def _multivariate_normal(size: int) -> Family:
    """Means, and the Cholesky factor L of the precision with log diagonal, rows of the lower triangle."""
    rows, columns = np.tril_indices(size)
    diagonal = rows == columns
    # Cov(dl/dL_ij, dl/dL_kl) = Sigma_ik [j = l] + L_ii^-2 [i = j = k = l], since L^-1 is lower triangular.
    same_column = columns[:, None] == columns[None, :]
    both_diagonal = np.diag(diagonal.astype(float))
    places = np.eye(size * size)[rows * size + columns]

    def unpack(t: np.ndarray) -> np.ndarray:
        entries = backend(t).where(diagonal, bounded_exp(backend(t).clip(t[:, size:], -30, 30)), t[:, size:])
        return (entries @ places).reshape(-1, size, size)

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        z = np.einsum("nij,ni->nj", unpack(t), y - t[:, :size])
        log_diagonal = t[:, size:][:, diagonal].sum(1)
        return 0.5 * (z * z).sum(1) - log_diagonal + 0.5 * size * np.log(2 * np.pi)

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        factor, residual = unpack(t), y - t[:, :size]
        z = np.einsum("nij,ni->nj", factor, residual)
        by_entry = residual[:, rows] * z[:, columns]
        chain = np.where(diagonal, factor[:, rows, columns], 1.0)
        by_entry = by_entry * chain - diagonal
        inverse = np.linalg.inv(factor)
        covariance = np.einsum("nki,nkj->nij", inverse, inverse)
        parameters = t.shape[1]
        metric = np.zeros((len(y), parameters, parameters))
        metric[:, :size, :size] = np.einsum("nik,njk->nij", factor, factor)
        block = covariance[:, rows[:, None], rows[None, :]] * same_column
        block = block + both_diagonal * (inverse[:, rows, rows] ** 2)[:, :, None]
        metric[:, size:, size:] = block * chain[:, :, None] * chain[:, None, :]
        by_mean = -np.einsum("nij,nj->ni", factor, z)
        return np.concatenate([by_mean, by_entry], 1), metric

    def start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
        mean = np.average(y, axis=0, weights=w)
        covariance = np.atleast_2d(np.cov(y.T, aweights=w, ddof=0))
        covariance = covariance + 1e-9 * max(np.trace(covariance), 1e-9) * np.eye(size)
        factor = np.linalg.cholesky(np.linalg.inv(covariance))
        entries = factor[rows, columns]
        return np.concatenate([mean, np.where(diagonal, np.log(np.where(diagonal, entries, 1)), entries)])

    def distribution(t: np.ndarray) -> Distribution:
        inverse, xp = backend(t).linalg.inv(unpack(t)), backend(t)
        tril = xp.linalg.cholesky(xp.einsum("nki,nkj->nij", inverse, inverse))
        return build(dist.MultivariateNormal, loc=t[:, :size], scale_tril=tril)

    return Family(start, loss, gradient, distribution, spread=False)


NAMES = ("normal", "lognormal", "student_t", "laplace", "poisson", "negative_binomial")


@functools.cache
def family_of(name: str, *, score: str = "log", classes: int | None = None, targets: int = 1) -> Family:
    """The family of a name under a score.

    Args:
        name: one of `NAMES`, or for classes `bernoulli` or `categorical`, or for several targets
            `multivariate_normal`; `auto` is the normal, or what suits the classes or targets.
        score: `log`, or `crps`, which for classes is the Brier score and for several targets is not there.
        classes: how many, for classification.
        targets: how many numbers each row has.

    Raises:
        InputError: an unknown name, or one that does not suit the target or the score.
    """
    if score not in ("log", "crps"):
        raise InputError(f"unknown score {score!r}: use log or crps")
    if classes is not None:
        if name not in ("auto", "bernoulli", "categorical") or (name == "bernoulli" and classes != 2):
            raise InputError(f"distribution {name!r} does not suit {classes} classes: use auto, or categorical")
        name = "bernoulli" if classes == 2 and name != "categorical" else "categorical"
        family = _bernoulli() if name == "bernoulli" else _categorical(classes)
    elif targets > 1:
        if name not in ("auto", "multivariate_normal") or score != "log":
            raise InputError(f"{targets} targets need distribution='multivariate_normal' and the log score")
        return _multivariate_normal(targets)
    else:
        name = "normal" if name == "auto" else name
        normal = _location_scale(_NORMAL, _with_scale(dist.Normal))
        families = {
            "normal": lambda: normal,
            "lognormal": lambda: _of_log(normal, _with_scale(dist.LogNormal)),
            "laplace": lambda: _location_scale(_LAPLACE, _with_scale(dist.Laplace)),
            "student_t": _student_t,
            "poisson": _poisson,
            "negative_binomial": _negative_binomial,
        }
        if name not in families:
            raise InputError(f"unknown distribution {name!r}: use auto, {', '.join(NAMES)}")
        family = families[name]()
    return family if score == "log" else under_crps(name, family)
