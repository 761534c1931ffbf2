"""Kinds of uncertainty: what members disagree on (epistemic) and what each leaves open (aleatoric)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpyro.distributions import Distribution

from bayeslens.core.mixture import member_moments


class VarianceSplit(NamedTuple):
    """Law of total variance, one entry per row: total = aleatoric + epistemic."""

    total: np.ndarray
    aleatoric: np.ndarray
    epistemic: np.ndarray


class EntropySplit(NamedTuple):
    """Entropy of the mixture, mean entropy of members and their difference (mutual information), in nats."""

    total: np.ndarray
    aleatoric: np.ndarray
    epistemic: np.ndarray


def variance_split(members: Distribution, weights: Any) -> VarianceSplit:
    """Split the variance of members' mixture.

    Args:
        members: batch shape (members, rows).
        weights: members' weights, shape (members,).

    >>> import numpyro.distributions as dist
    >>> s = variance_split(dist.Normal(np.array([[-1.0], [1.0]]), 2.0), np.array([0.5, 0.5]))
    >>> s.epistemic.tolist(), s.aleatoric.tolist()
    ([1.0], [4.0])
    """
    mean, variance = member_moments(members)
    weights = np.asarray(weights, np.float64)
    center = weights @ mean
    aleatoric = weights @ variance
    epistemic = weights @ np.square(mean - center)
    return VarianceSplit(aleatoric + epistemic, aleatoric, epistemic)


def entropy_split(probs: Any, weights: Any) -> EntropySplit:
    """Split the entropy of members' class probabilities; the epistemic part is their mutual information (BALD).

    Args:
        probs: shape (members, rows, classes).
        weights: shape (members,).

    >>> s = entropy_split(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), np.array([0.5, 0.5]))
    >>> s.epistemic.round(4).tolist(), s.aleatoric.tolist()
    ([0.6931], [0.0])
    """
    probs, weights = np.asarray(probs, np.float64), np.asarray(weights, np.float64)
    total = _entropy(np.einsum("m,mrc->rc", weights, probs))
    aleatoric = weights @ _entropy(probs)
    return EntropySplit(total, aleatoric, np.maximum(total - aleatoric, 0.0))


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
