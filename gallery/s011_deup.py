"""DEUP: predict the error of a predictor directly, and take away the noise.

What a model does not know is not only the spread of its posterior: a model that cannot follow the data is wrong with
great confidence. The excess risk, expected loss beyond that of the best possible prediction, holds both parts, and
it can be learned: train a second model on the held-out losses of the first, and subtract the noise.

Shown here: for two misspecified regressions with known noise, a Gaussian process with a length scale that is too long
and a deep ensemble of small networks, the true excess risk is computed, and the learned one ranks inputs more like
it than the model's own variance does. Used in place of the Gaussian process's variance in expected improvement, it
finds the maximum of a function with many peaks at least as well. The control shuffles the losses that the error
model learns from.

Source: Lahlou, Jain, Nekoei, Butoi, Bertin, Rector-Brooks, Korablyov and Bengio 2023, DEUP: Direct Epistemic
Uncertainty Prediction, Transactions on Machine Learning Research. The function is the one of its section on
sequential optimization.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy.special import ndtr
from scipy.stats import spearmanr

from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.quantiles import mean_and_variance
from bayeslens.core.table import Table, Target
from bayeslens.evaluation.uncertainty import variance_split
from bayeslens.gallery import Evidence
from bayeslens.learners.deep_ensemble import DeepEnsemble
from bayeslens.learners.deup import DEUP
from bayeslens.learners.ngboost import NGBoost

PAPER = "S011"
CLAIM = (
    "A second model of the held-out losses, less the noise, ranks inputs by excess risk better than the variance of "
    "a misspecified model does, and drives sequential optimization at least as well."
)
NOT_CHECKED = (
    "Exploration in reinforcement learning, uncertainty of image classifiers, drug combinations, functions of many "
    "dimensions, and training on the errors of each acquisition instead of cross-validation."
)

_NOISE = 0.3
_ROWS = 100
_GRID = np.linspace(-2, 2, 401)[:, None]
_PEAK_NOISE = 0.02  # assumed in the optimization, whose values have none
_LOG_LOSS_NOISE = 2.2  # standard deviation of the logarithm of a squared Normal
_LENGTHS = tuple(np.geomspace(0.03, 3, 8))
_STEPS = 20
_SEEDS = 10


def check(*, control: bool = False) -> Evidence:
    """Rank correlations with the true excess risk, and the regret of optimization, for DEUP and for variances.

    Holds when DEUP's mean rank correlation is higher by at least 0.1 for both models and its mean regret is not
    higher. `control` trains the error model on shuffled losses.
    """
    gp_own, gp_deup = _rank_correlations(SmallGaussianProcess(_NOISE, (1.0,)), range(4), control)
    ensemble_own, ensemble_deup = _rank_correlations(DeepEnsemble(width=16), range(2), control)
    own_regret, deup_regret = (
        np.mean([_regret(seed, by_deup, control) for seed in range(_SEEDS)]) for by_deup in (False, True)
    )
    numbers = {
        "rank_correlation_gp_variance": gp_own,
        "rank_correlation_deup_of_gp": gp_deup,
        "rank_correlation_ensemble_variance": ensemble_own,
        "rank_correlation_deup_of_ensemble": ensemble_deup,
        "regret_gp_variance": float(own_regret),
        "regret_deup": float(deup_regret),
    }
    ranks = gp_deup > gp_own + 0.1 and ensemble_deup > ensemble_own + 0.1
    shown = (
        f"Rank correlation with the true excess risk: {gp_deup:.2f} against {gp_own:.2f} of the Gaussian process's "
        f"variance and {ensemble_deup:.2f} against {ensemble_own:.2f} of the ensemble's (to be higher by 0.1); "
        f"regret after {_STEPS} steps {deup_regret:.3f} against {own_regret:.3f} (not to be higher)."
    )
    return Evidence(bool(ranks and deup_regret <= own_regret), shown, numbers)


class SmallGaussianProcess(Learner):
    """A Gaussian process with the most likely of a few length scales, quick enough for hundreds of fits.

    Args:
        noise: standard deviation of the noise, in the target's units.
        lengths: length scales tried, in standard deviations of the inputs.
    """

    noise: float
    lengths: tuple[float, ...]

    def fit(self, X: Any, y: Any, *, key: Any = None) -> SmallPredictive:
        """See `Learner.fit`; the key is not used."""
        target, table = Target.from_values(y, "regression"), Table.from_data(X)
        points = table.dense(X).astype(np.float64)
        center, scale = target.values.mean(), target.values.std()
        standardized = (target.values - center) / scale
        best, chosen = -np.inf, None
        for length in self.lengths:
            covariance = _matern(points, points, length) + (self.noise / scale) ** 2 * np.eye(len(points))
            inverse = np.linalg.inv(covariance)
            evidence = -standardized @ inverse @ standardized - np.linalg.slogdet(covariance)[1]
            if evidence > best:
                best, chosen = evidence, (length, inverse)
        length, inverse = chosen
        return SmallPredictive(
            table, points, inverse @ standardized, inverse, length, self.noise, float(center), float(scale)
        )


class SmallPredictive(Predictive):
    """Predictions of `SmallGaussianProcess`."""

    table: Table
    points: Float[np.ndarray, "points inputs"]
    coefficients: Float[np.ndarray, " points"]
    inverse: Float[np.ndarray, "points points"]
    length: float
    noise: float
    center: float
    scale: float
    classes: tuple | None = None

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """Two functions, one posterior standard deviation below and above the mean: the same first two moments."""
        cross = _matern(self.table.dense(x).astype(np.float64), self.points, self.length)
        deviation = np.sqrt(np.maximum(1 - ((cross @ self.inverse) * cross).sum(1), 1e-12))
        functions = cross @ self.coefficients + np.array([[-1.0], [1.0]]) * deviation
        return dist.Normal(self.center + self.scale * functions, self.noise), np.full(2, 0.5)


def _matern(x: np.ndarray, z: np.ndarray, length: float) -> Float[np.ndarray, "left right"]:
    """Matern-5/2 covariance."""
    a = np.sqrt(5 * np.square(x[:, None] - z).sum(-1)) / length
    return (1 + a + a**2 / 3) * np.exp(-a)


class ShuffledLosses(Learner):
    """The control: a learner that is given its targets in random order."""

    learner: Learner

    def fit(self, X: Any, y: Any, *, key: Any) -> Predictive:
        """See `Learner.fit`."""
        target = Target.from_values(y, "regression")
        return self.learner.fit(X, target.rows(np.asarray(jax.random.permutation(key, len(target.values)))), key=key)


def _truth(x: np.ndarray) -> np.ndarray:
    """Fast waves on the left, a line on the right: no one length scale fits both."""
    return np.where(x < 0, np.sin(12 * x), 0.5 * x)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, and 0 for what says the same everywhere."""
    return float(spearmanr(a, b)[0]) if np.ptp(a) > 0 else 0.0


def _rank_correlations(base: Learner, seeds: Any, control: bool) -> tuple[float, float]:
    """Mean rank correlations with the true excess risk: of the base's epistemic variance, and of DEUP."""
    error = ShuffledLosses(NGBoost()) if control else NGBoost()
    own, learned = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        x = rng.uniform(-2, 2, _ROWS)
        y = _truth(x) + _NOISE * rng.normal(size=_ROWS)
        deup = DEUP(base, error=error, noise=_NOISE**2).fit(x[:, None], y, key=jax.random.key(seed))
        excess = np.square(mean_and_variance(deup(_GRID))[0] - _truth(_GRID[:, 0]))
        own.append(_rank_correlation(variance_split(*deup.members(_GRID)).epistemic, excess))
        # Ranks of the predicted loss are those of the excess risk, without ties where that is cut off at 0.
        learned.append(_rank_correlation(deup.expected_loss(_GRID), excess))
    return float(np.mean(own)), float(np.mean(learned))


def _peaks(x: np.ndarray) -> np.ndarray:
    return np.sin(x) * np.cos(5 * x) * np.cos(22 * x)


def _expected_improvement(mean: np.ndarray, variance: np.ndarray, best: float) -> Float[np.ndarray, " rows"]:
    """Expected improvement of a Normal over the best value so far (Jones, Schonlau and Welch 1998)."""
    deviation = np.sqrt(np.maximum(variance, 1e-12))
    z = (mean - best) / deviation
    return (mean - best) * ndtr(z) + deviation * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)


def _regret(seed: int, by_deup: bool, control: bool) -> float:
    """How far the best value found lies below the maximum, from six random points on."""
    grid = np.linspace(-1, 2, 601)
    error = SmallGaussianProcess(_LOG_LOSS_NOISE, _LENGTHS)
    error = ShuffledLosses(error) if control else error
    # Halves show the error model rows far from any other, as most of the interval is.
    base = SmallGaussianProcess(_PEAK_NOISE, _LENGTHS)
    learner = DEUP(base, error=error, num_folds=(2, 2)) if by_deup else base
    rng = np.random.default_rng(seed)
    tried = list(rng.choice(len(grid), 6, replace=False))
    for step in range(_STEPS):
        x, y = grid[tried, None], _peaks(grid[tried])
        predictive = learner.fit(x, y, key=jax.random.fold_in(jax.random.key(seed), step))
        own = variance_split(*predictive.members(grid[:, None])).epistemic
        variance = predictive.excess_risk(grid[:, None]) if by_deup else own
        gain = _expected_improvement(mean_and_variance(predictive(grid[:, None]))[0], variance, y.max())
        gain[tried] = -np.inf
        tried.append(int(gain.argmax()))
    return float(_peaks(grid).max() - _peaks(grid[tried]).max())
