"""Distribution families for natural gradient boosting: parameters, negative scores and natural gradients in NumPy.

Every family maps unconstrained parameters of shape (rows, parameters) to a NumPyro distribution. The natural gradient
is the gradient of the negative log likelihood, multiplied by the inverse Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy import special

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError

Gradient = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Family(NamedTuple):
    """One family.

    `start(y, weights)` gives the marginal's parameters, `score(y, theta)` the log likelihood per row,
    `gradient(y, theta)` the gradient of the negative log likelihood and the Fisher information (its diagonal, shape
    (rows, parameters)), `distribution(theta, scale)` the NumPyro distribution; `check(y)` refuses impossible targets.
    """

    start: Callable
    score: Callable
    gradient: Gradient
    distribution: Callable[[np.ndarray], Distribution]
    check: Callable[[np.ndarray], None] = lambda y: None


def _moments(y: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    mean = np.average(y, weights=w)
    return mean, max(float(np.sqrt(np.average((y - mean) ** 2, weights=w))), 1e-9)


def _normal_start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    mean, scale = _moments(y, w)
    return np.array([mean, np.log(scale)])


def _normal_score(y: np.ndarray, t: np.ndarray) -> np.ndarray:
    return -0.5 * ((y - t[:, 0]) * np.exp(-t[:, 1])) ** 2 - t[:, 1] - 0.5 * np.log(2 * np.pi)


def _normal_gradient(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    precision = np.exp(-2 * t[:, 1])
    residual = t[:, 0] - y
    return (
        np.stack([residual * precision, 1 - residual**2 * precision], 1),
        np.stack([precision, np.full(len(y), 2.0)], 1),
    )


def _positive(name: str) -> Callable[[np.ndarray], None]:
    def check(y: np.ndarray) -> None:
        if (y <= 0).any():
            raise InputError(f"the {name} family needs positive targets; {int((y <= 0).sum())} rows are not")

    return check


def _counts(y: np.ndarray) -> None:
    if (y < 0).any() or (y != np.round(y)).any():
        raise InputError("count families need whole targets of at least 0: use normal or lognormal for others")


def _laplace_gradient(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inverse = np.exp(-t[:, 1])
    residual = t[:, 0] - y
    gradient = np.stack([np.sign(residual) * inverse, 1 - np.abs(residual) * inverse], 1)
    return gradient, np.stack([inverse**2, np.ones(len(y))], 1)


def _student_score(y: np.ndarray, t: np.ndarray, df: float = 4.0) -> np.ndarray:
    z = (y - t[:, 0]) * np.exp(-t[:, 1])
    constant = special.gammaln((df + 1) / 2) - special.gammaln(df / 2) - 0.5 * np.log(df * np.pi)
    return constant - t[:, 1] - (df + 1) / 2 * np.log1p(z * z / df)


def _student_gradient(y: np.ndarray, t: np.ndarray, df: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    inverse = np.exp(-t[:, 1])
    z = (y - t[:, 0]) * inverse
    weight = (df + 1) / (df + z * z)
    gradient = np.stack([-weight * z * inverse, 1 - weight * z * z], 1)
    return gradient, np.stack([(df + 1) / (df + 3) * inverse**2, np.full(len(y), 2 * df / (df + 3))], 1)


def _poisson_start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.array([np.log(max(np.average(y, weights=w), 1e-6))])


def _poisson_gradient(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rate = np.exp(t)
    return rate - y[:, None], rate


def _categorical(classes: int) -> Family:
    def start(y: np.ndarray, w: np.ndarray) -> np.ndarray:
        share = np.bincount(y.astype(int), w, classes) + 0.5
        return np.log(share / share.sum())

    def probabilities(t: np.ndarray) -> np.ndarray:
        return special.softmax(t, 1)

    def gradient(y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = probabilities(t)
        residual = p.copy()
        residual[np.arange(len(y)), y.astype(int)] -= 1
        # The diagonal of the Fisher information, bounded below as in Newton boosting.
        return residual, np.maximum(p * (1 - p), 0.05)

    return Family(
        start,
        lambda y, t: special.log_softmax(t, 1)[np.arange(len(y)), y.astype(int)],
        gradient,
        lambda t: build(dist.CategoricalProbs, probs=probabilities(t).astype(np.float32)),
    )


def _log_target(family: Family, distribution: Callable) -> Family:
    return Family(
        lambda y, w: family.start(np.log(y), w),
        lambda y, t: family.score(np.log(y), t) - np.log(y),
        lambda y, t: family.gradient(np.log(y), t),
        distribution,
        _positive("lognormal"),
    )


_NORMAL = Family(
    _normal_start,
    _normal_score,
    _normal_gradient,
    lambda t: build(dist.Normal, loc=t[:, 0], scale=np.exp(t[:, 1])),
)
FAMILIES: dict[str, Family] = {
    "normal": _NORMAL,
    "lognormal": _log_target(_NORMAL, lambda t: build(dist.LogNormal, loc=t[:, 0], scale=np.exp(t[:, 1]))),
    "laplace": Family(
        lambda y, w: np.array([np.median(y), np.log(max(np.average(np.abs(y - np.median(y)), weights=w), 1e-9))]),
        lambda y, t: -np.abs(y - t[:, 0]) * np.exp(-t[:, 1]) - t[:, 1] - np.log(2),
        _laplace_gradient,
        lambda t: build(dist.Laplace, loc=t[:, 0], scale=np.exp(t[:, 1])),
    ),
    "student_t": Family(
        lambda y, w: np.array([np.median(y), np.log(max(_moments(y, w)[1] * 0.7, 1e-9))]),
        _student_score,
        _student_gradient,
        lambda t: build(dist.StudentT, df=np.full(len(t), 4.0), loc=t[:, 0], scale=np.exp(t[:, 1])),
    ),
    "poisson": Family(
        _poisson_start,
        lambda y, t: y * t[:, 0] - np.exp(t[:, 0]) - special.gammaln(y + 1),
        _poisson_gradient,
        lambda t: build(dist.Poisson, rate=np.exp(t[:, 0])),
        _counts,
    ),
}


def family_of(name: str, classes: int | None) -> Family:
    """The family of a name; for classes always the Categorical.

    Raises:
        InputError: an unknown name.
    """
    if classes is not None:
        return _categorical(classes)
    if name == "auto":
        return _NORMAL
    if name not in FAMILIES:
        raise InputError(f"unknown distribution {name!r}: use auto, {', '.join(FAMILIES)}")
    return FAMILIES[name]


def natural_gradient(family: Family, y: Any, theta: Float[np.ndarray, "rows parameters"]) -> np.ndarray:
    """Inverse Fisher information times the gradient of the negative log likelihood."""
    gradient, fisher = family.gradient(y, theta)
    return gradient / fisher
