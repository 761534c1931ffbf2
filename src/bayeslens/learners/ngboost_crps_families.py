"""The families of natural gradient boosting under the continuous ranked probability score (CRPS).

The CRPS of a distribution F at y is the integral of (F(x) - 1{x >= y})^2 (Gneiting and Raftery 2007); closed forms are
those of Jordan, Krueger and Lerch (2019). The metric is 2 times the integral of dF dF' (Duan et al. 2020). Counts are
summed over instead of integrated.

Censored targets are not scored: the integral of F^2 up to the censoring point (Avati et al. 2020) is not a proper
score, and half of a standard normal's draws censored at 0 would be fitted with a standard deviation of 0.55.

For classes, the CRPS of a class's indicator is its Brier score (Brier 1950): `bernoulli` scores the second class,
`categorical` the sum over all classes, which for two classes is twice as much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from bayeslens.learners.natural_gradient import LOG_CONCENTRATION, LOG_DF, LOG_MEAN, Family, bounded_exp, columns

_ROOT_PI = np.sqrt(np.pi)
_LOG_STEP = 1e-4  # of central differences in a log parameter: their error is about 1e-8
_LEAST_METRIC = 0.005  # of a spread or a logit, in units of the score: below, the natural gradient would chase noise


def under_crps(name: str, family: Family) -> Family:
    """The same distributions, scored by the CRPS.

    Args:
        name: of the family: any of `ngboost_families` but `multivariate_normal`.
        family: that family under the log score.

    >>> from bayeslens.learners.ngboost_families import family_of
    >>> family = under_crps("poisson", family_of("poisson"))
    >>> family.loss(np.array([0.0]), np.zeros((1, 1)), None).round(4).tolist()  # sum of (F(k) - 1)^2, rate 1
    [0.4762]
    """
    loss, gradient = _SCORES[name]
    return family._replace(loss=loss, gradient=gradient, censoring=False)


def _density(z: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


class _Standard(NamedTuple):
    """A standardized location-scale family, and the metric of location (times scale) and log scale (over scale)."""

    cdf: Callable
    crps: Callable
    metric: tuple[float, float]


def _laplace_cdf(z: np.ndarray) -> np.ndarray:
    tail = 0.5 * np.exp(-np.abs(z))
    return np.where(z < 0, tail, 1 - tail)


_NORMAL = _Standard(
    special.ndtr,
    lambda z: z * (2 * special.ndtr(z) - 1) + 2 * _density(z) - 1 / _ROOT_PI,
    (1 / _ROOT_PI, 1 / (2 * _ROOT_PI)),
)
_LAPLACE = _Standard(_laplace_cdf, lambda z: np.abs(z) + np.exp(-np.abs(z)) - 0.75, (0.5, 0.25))


def _location_scale(standard: _Standard) -> tuple[Callable, Callable]:
    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        scale = bounded_exp(t[:, 1])
        return scale * standard.crps((y - t[:, 0]) / scale)

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        scale = bounded_exp(t[:, 1])
        z = (y - t[:, 0]) / scale
        by_z = 2 * standard.cdf(z) - 1
        metric = columns(standard.metric[0] / scale, standard.metric[1] * scale)
        return columns(-by_z, scale * (standard.crps(z) - z * by_z)), metric

    return loss, gradient


def _lognormal() -> tuple[Callable, Callable]:
    """In the units of y (Baran and Lerch 2015); the metric is not diagonal."""

    def pieces(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
        scale = bounded_exp(t[:, 1])
        z, mean = (np.log(y) - t[:, 0]) / scale, bounded_exp(t[:, 0] + scale**2 / 2)
        return scale, z, mean, special.ndtr(z - scale) + special.ndtr(scale / np.sqrt(2)) - 1

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        _, z, mean, share = pieces(y, t)
        return y * (2 * special.ndtr(z) - 1) - 2 * mean * share

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        scale, z, mean, share = pieces(y, t)
        at_y, at_scale = _density(z), _density(scale / np.sqrt(2))
        by_scale = scale * (2 * y * at_y - 2 * mean * scale * share - np.sqrt(2) * mean * at_scale)
        metric = np.array([[1 / scale, scale / 2], [scale / 2, scale * (0.5 + scale**2 / 4)]])
        metric = metric * bounded_exp(t[:, 0] + scale**2 / 4) / _ROOT_PI
        return columns(-2 * mean * share, by_scale), np.moveaxis(metric, 2, 0)

    return loss, gradient


def _t_constant(df: np.ndarray) -> np.ndarray:
    """Log of a Student t density at its center."""
    return special.gammaln((df + 1) / 2) - special.gammaln(df / 2) - 0.5 * np.log(df * np.pi)


def _t_density(z: np.ndarray, df: np.ndarray) -> np.ndarray:
    return np.exp(_t_constant(df) - (df + 1) / 2 * np.log1p(z * z / df))


def _t_product(df: np.ndarray, more: int) -> np.ndarray:
    """Integral of the squared density times (1 + z^2 / df)^(1 - more): again that of a Student t density."""
    of_product = 2 * df - 1 + 2 * more
    return np.exp(2 * _t_constant(df) - _t_constant(of_product)) * np.sqrt(df / of_product)


def _t_pieces(z: np.ndarray, df: np.ndarray) -> np.ndarray:
    """F at -|z|, the integral of |x| f beyond |z|, and half the mean difference of two draws."""
    far = np.abs(z)
    partial = (df + far * far) / (df - 1) * _t_density(far, df)
    return np.stack([special.stdtr(df, -far), partial, 2 * df / (df - 1) * _t_product(df, 0)])


def _t_excess(z: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """CRPS less |z|."""
    below, partial, spread = pieces
    return 2 * partial - 2 * np.abs(z) * below - spread


@functools.cache
def _student_t_metric() -> Callable:
    """Integrals of dF dF' that hold the log degrees of freedom, as functions of these: with log scale, with itself."""
    from scipy.interpolate import CubicSpline

    log_df = np.linspace(*LOG_DF, 60)
    df = np.exp(log_df)[:, None]
    # Substitute z = sinh(s), so that heavy tails are reached.
    s, weights = np.polynomial.legendre.leggauss(600)
    s, weights = 22.5 * (s + 1), 22.5 * weights
    z, weights = np.sinh(s), weights * np.cosh(s)
    change = special.stdtr(df * np.exp(_LOG_STEP), -z) - special.stdtr(df * np.exp(-_LOG_STEP), -z)
    change = change / (2 * _LOG_STEP)
    # 2 for the metric, 2 for both tails; dF / d log scale = -z f, and the lower tail has z negative.
    cross, own = 4 * (weights * z * _t_density(z, df) * change).sum(1), 4 * (weights * change**2).sum(1)
    return CubicSpline(log_df, np.stack([np.log(-cross), np.log(own)], 1))


def _student_t() -> tuple[Callable, Callable]:
    """Location, log scale and log degrees of freedom."""

    def unpack(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
        scale = bounded_exp(t[:, 1])
        return np.clip(t[:, 2], *LOG_DF), scale, (y - t[:, 0]) / scale

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        log_df, scale, z = unpack(y, t)
        return scale * (np.abs(z) + _t_excess(z, _t_pieces(z, np.exp(log_df))))

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        log_df, scale, z = unpack(y, t)
        df = np.exp(log_df)
        # F has no closed derivative in the degrees of freedom; both sides' mean is as good as the middle.
        up, down = (_t_pieces(z, np.exp(log_df + step)) for step in (_LOG_STEP, -_LOG_STEP))
        by_df = (_t_excess(z, up) - _t_excess(z, down)) / (2 * _LOG_STEP)
        below, partial, spread = (up + down) / 2
        once, less = _t_product(df, 1), _t_product(df, 0)
        cross, own = np.exp(_student_t_metric()(log_df)).T
        metric = np.zeros((len(z), 3, 3))
        metric[:, 0, 0] = 2 * once / scale
        metric[:, 1, 1] = 2 * scale * df * (less - once)
        metric[:, 1, 2] = metric[:, 2, 1] = -scale * cross
        metric[:, 2, 2] = scale * np.maximum(own, _LEAST_METRIC)
        return columns(np.sign(z) * (2 * below - 1), scale * (2 * partial - spread), scale * by_df), metric

    return loss, gradient


def _poisson() -> tuple[Callable, Callable]:
    def pieces(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
        rate = bounded_exp(t[:, 0])
        return rate, special.gammaincc(y + 1, rate), np.exp(y * np.log(rate) - rate - special.gammaln(y + 1))

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        rate, below, mass = pieces(y, t)
        spread = special.i0e(2 * rate) + special.i1e(2 * rate)
        return (y - rate) * (2 * below - 1) + rate * (2 * mass - spread)

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        rate, below, mass = pieces(y, t)
        # dF / d rate is minus the mass, and the sum of its squares a Bessel function.
        squares = special.i0e(2 * rate)
        return (rate * (1 - 2 * (below - mass) - squares))[:, None], (2 * rate**2 * squares)[:, None]

    return loss, gradient


@functools.cache
def _count_tables() -> tuple:
    """Splines over log mean and log concentration: the logs of half the mean difference of two draws over the mean,
    and of both diagonal entries of the metric, and the correlation between these two.

    Sums over counts are integrals over frequencies (Parseval), with the characteristic function u^-concentration.
    """
    from scipy.interpolate import RectBivariateSpline

    log_mean, log_r = np.linspace(*LOG_MEAN, 161), np.linspace(*LOG_CONCENTRATION, 61)
    node, weights = np.polynomial.legendre.leggauss(200)
    # Logarithmic in the frequency: the width of the characteristic function spans many orders of magnitude.
    frequency = np.pi * np.exp(-24 * (node + 1))
    weights = weights * 24 * frequency / np.pi
    sine = np.sin(frequency / 2) ** 2
    gap = 2 * sine - 1j * np.sin(frequency)
    tables = np.empty((4, len(log_mean), len(log_r)))
    r = np.exp(log_r)[:, None]
    for i, m in enumerate(np.exp(log_mean)):
        log_u = np.log1p(m / r * gap)
        size = np.exp(-r * np.log1p(4 * m / r * (1 + m / r) * sine))  # squared modulus
        by_mean, by_r = -m * gap * np.exp(-log_u), r * (m / r * gap * np.exp(-log_u) - log_u)
        own_mean, own_r, cross = (
            (size * (a * b.conj()).real / (2 * sine)) @ weights
            for a, b in ((by_mean, by_mean), (by_r, by_r), (by_mean, by_r))
        )
        tables[0, i] = np.log((1 - size) / (4 * sine) @ weights / m)
        tables[1:, i] = np.log(own_mean), np.log(own_r), cross / np.sqrt(own_mean * own_r)
    return tuple(RectBivariateSpline(log_mean, log_r, table) for table in tables)


def _negative_binomial() -> tuple[Callable, Callable]:
    """Log mean and log concentration, which the CRPS, unlike the log score, does not make orthogonal."""

    def unpack(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.clip(t[:, 0], *LOG_MEAN), np.clip(t[:, 1], *LOG_CONCENTRATION)

    def pieces(y: np.ndarray, m: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F, and the mass at y of the concentration plus 1, over p: F less this is that concentration's F below y."""
        log_mass = special.gammaln(y + r + 1) - special.gammaln(r + 1) - special.gammaln(y + 1)
        log_mass = log_mass - r * np.log1p(m / r) - y * np.log1p(r / m)
        return special.betainc(r, y + 1, r / (r + m)), np.exp(log_mass)

    def loss(y: np.ndarray, t: np.ndarray, censored: Any = None) -> np.ndarray:
        log_m, log_r = unpack(t)
        m, r = np.exp(log_m), np.exp(log_r)
        below, mass = pieces(y, m, r)
        distance = (y - m) * (2 * below - 1) + 2 * m * mass  # the mean of |X - y|
        return distance - m * np.exp(_count_tables()[0].ev(log_m, log_r))

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        log_m, log_r = unpack(t)
        m = np.exp(log_m)
        tables = _count_tables()
        spread = m * np.exp(tables[0].ev(log_m, log_r))
        # F has no closed derivative in the concentration; both sides' mean is as good as the middle.
        up, down = (np.stack(pieces(y, m, np.exp(log_r + step))) for step in (_LOG_STEP, -_LOG_STEP))
        below, mass = (up + down) / 2
        by_mean = m * (1 - 2 * (below - mass)) - spread * (1 + tables[0].ev(log_m, log_r, dx=1))
        by_r = 2 * ((y - m) * (up - down)[0] + m * (up - down)[1]) / (2 * _LOG_STEP)
        by_r = by_r - spread * tables[0].ev(log_m, log_r, dy=1)
        own_mean, own_r = (np.exp(table.ev(log_m, log_r)) for table in tables[1:3])
        metric = np.empty((len(y), 2, 2))
        metric[:, 0, 0], metric[:, 1, 1] = own_mean, np.maximum(own_r, _LEAST_METRIC * spread)
        correlation = np.clip(tables[3].ev(log_m, log_r), -0.999, 0.999)
        metric[:, 0, 1] = metric[:, 1, 0] = correlation * np.sqrt(own_mean * own_r)
        return columns(by_mean, by_r), metric

    return loss, gradient


def _bernoulli() -> tuple[Callable, Callable]:
    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        p = special.expit(t)
        change = p * (1 - p)
        return 2 * (p - y[:, None]) * change, np.maximum(2 * change**2, _LEAST_METRIC)

    return lambda y, t, censored=None: (special.expit(t[:, 0]) - y) ** 2, gradient


def _categorical() -> tuple[Callable, Callable]:
    """Class logits; the metric's diagonal: in full it is singular."""

    def residual(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = special.softmax(t, 1)
        off = p.copy()
        off[np.arange(len(y)), y.astype(int)] -= 1
        return p, off

    def gradient(y: np.ndarray, t: np.ndarray, censored: Any = None) -> tuple[np.ndarray, np.ndarray]:
        p, off = residual(y, t)
        metric = 2 * p**2 * ((1 - p) ** 2 + (p**2).sum(1, keepdims=True) - p**2)
        return 2 * p * (off - (p * off).sum(1, keepdims=True)), np.maximum(metric, _LEAST_METRIC)

    return lambda y, t, censored=None: (residual(y, t)[1] ** 2).sum(1), gradient


_SCORES = {
    "normal": _location_scale(_NORMAL),
    "lognormal": _lognormal(),
    "laplace": _location_scale(_LAPLACE),
    "student_t": _student_t(),
    "poisson": _poisson(),
    "negative_binomial": _negative_binomial(),
    "bernoulli": _bernoulli(),
    "categorical": _categorical(),
}
