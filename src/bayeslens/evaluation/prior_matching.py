"""Prior matching: class weights that give the predicted classes a known frequency, without any label.

Source: A. Liusie, P. Manakul, M. Gales, "Mitigating word bias in zero-shot prompt-based classifiers" (2023).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import build
from bayeslens.core.errors import InputError
from bayeslens.evaluation.calibration import checked_probabilities

_TOLERANCE = 1e-10  # of the mean probabilities
_LARGEST = 300.0  # log-weight; where there is no solution, they grow without end


class PriorMatching(eqx.Module):
    """Class probabilities times a weight per class, renormalized: P'(y|x) = a_y P(y|x) / sum_k a_k P(k|x).

    `log_weights` have mean 0; `standard_error` is theirs, from the spread of the rows they were learned from (0 where
    they come from a single null input).
    """

    log_weights: Float[np.ndarray, " classes"]
    standard_error: Float[np.ndarray, " classes"]

    @classmethod
    def fit(cls, probs: Float[np.ndarray, "rows classes"], prior: Any = None) -> PriorMatching:
        """Weights under which the mean of the reweighted probabilities is the prior.

        They minimize the mean of log sum_k a_k P(k|x) less the prior's mean of log a, which is convex in log a, so
        that they are unique up to a factor; found by Newton's method.

        Args:
            probs: predictions for unlabelled rows like those to come.
            prior: class frequencies to expect, shape (classes,); uniform by default, as in the source.

        Raises:
            InputError: probabilities that are none, a prior that is none, or a class that no row gives a chance to.

        >>> probs = np.array([[0.9, 0.1], [0.6, 0.4]])
        >>> matched = PriorMatching.fit(probs)
        >>> matched(dist.CategoricalProbs(probs)).probs.mean(0).round(6).tolist()
        [0.5, 0.5]
        """
        probs, _ = checked_probabilities(probs, np.zeros(len(probs), int))
        classes = probs.shape[1]
        prior = _checked_prior(prior, classes)
        never = ~(probs > 0).any(0)
        if never.any():
            raise InputError(f"class {never.argmax()} has probability 0 in every row: no weight can change that")
        with np.errstate(divide="ignore"):
            log_probs = np.log(probs)

        def objective(weights: np.ndarray) -> float:
            return np.logaddexp.reduce(log_probs + weights, axis=1).mean() - prior @ weights

        weights = np.log(prior) - np.log(probs.mean(0))  # right at once where rows are alike
        value = objective(weights)
        for _ in range(200):
            matched = _reweighted(probs, weights)
            gap = matched.mean(0) - prior
            if np.abs(gap).max() < _TOLERANCE or np.abs(weights).max() > _LARGEST:
                break
            step = np.linalg.lstsq(_hessian(matched), gap, rcond=1e-12)[0]
            size = min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))
            while size > 1e-10 and objective(weights - size * step) > value - 1e-4 * size * (gap @ step):
                size /= 2
            weights = weights - size * step
            value = objective(weights)
        if np.abs(gap).max() > 1e-6:
            raise InputError(
                f"no weights give these probabilities the prior {np.round(prior, 4).tolist()}: too many rows are "
                "certain; ask for a prior nearer to what is predicted"
            )
        # Sandwich: the weights solve mean(matched) = prior, whose left side varies from table to table.
        bread = np.linalg.pinv(_hessian(matched), rcond=1e-10)
        variance = bread @ np.cov(matched.T) @ bread.T / len(probs) if len(probs) > 1 else np.zeros_like(bread)
        center = np.eye(classes) - 1 / classes
        spread = np.sqrt(np.maximum(np.diag(center @ variance @ center), 0.0))
        return cls(weights - weights.mean(), spread)

    @classmethod
    def from_null(cls, null_probs: Float[np.ndarray, " classes"], prior: Any = None) -> PriorMatching:
        """Weights without any data: the prior over what is predicted for an input that says nothing.

        Args:
            null_probs: class probabilities for the null input, shape (classes,).
            prior: class frequencies to expect; uniform by default.

        >>> PriorMatching.from_null(np.array([0.8, 0.2])).log_weights.round(3).tolist()
        [-0.693, 0.693]
        """
        null_probs = np.asarray(null_probs, np.float64)
        if null_probs.ndim != 1 or not (null_probs > 0).all():
            raise InputError(f"null_probs must be one positive probability per class, got {null_probs.tolist()}")
        weights = np.log(_checked_prior(prior, len(null_probs))) - np.log(null_probs)
        return cls(weights - weights.mean(), np.zeros(len(weights)))

    def __call__(self, distribution: Distribution) -> Distribution:
        """The reweighted Categorical."""
        probs = np.asarray(distribution.probs, np.float64)
        return build(dist.CategoricalProbs, probs=_reweighted(probs, self.log_weights))


def _reweighted(probs: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        scores = np.log(probs) + log_weights
    return np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))


def _hessian(matched: np.ndarray) -> np.ndarray:
    return np.diag(matched.mean(0)) - matched.T @ matched / len(matched)


def _checked_prior(prior: Any, classes: int) -> np.ndarray:
    prior = np.full(classes, 1 / classes) if prior is None else np.asarray(prior, np.float64)
    if prior.shape != (classes,) or not (prior > 0).all() or abs(prior.sum() - 1) > 1e-6:
        raise InputError(f"the prior must hold {classes} positive probabilities that sum to 1, got {prior.tolist()}")
    return prior
