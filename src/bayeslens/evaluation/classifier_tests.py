"""Classifier two-sample tests: can a classifier tell draws of a posterior from draws of the right one?

Sources: D. Lopez-Paz, M. Oquab, "Revisiting classifier two-sample tests" (2017); J.-M. Lueckmann et al., "Benchmarking
simulation-based inference" (2021), for the classifier by which posteriors are compared; J. Linhart, A. Gramfort,
P. Rodrigues, "L-C2ST: local diagnostics for posterior approximations in simulation-based inference" (2023).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy import linalg, special

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator

if TYPE_CHECKING:
    import pandas as pd

_MOST_FEATURES = 600
_STEPS = 200


@dataclasses.dataclass(frozen=True)
class ClassifierTwoSampleTest:
    """How well a classifier tells two samples apart on held-out rows.

    Attributes:
        accuracy: 0.5 for equal distributions, 1 for disjoint ones.
        standard_error: binomial.
        p_value: one-sided, of an accuracy as high by chance.
        folds: accuracy on each fold.
        null: accuracies with labels shuffled; empty where the binomial distribution was used.
    """

    accuracy: float
    standard_error: float
    p_value: float
    folds: Float[np.ndarray, " folds"]
    null: Float[np.ndarray, " permutations"]

    @property
    def table(self) -> pd.DataFrame:
        """One row."""
        import pandas as pd

        return pd.DataFrame(
            [{"accuracy": self.accuracy, "standard_error": self.standard_error, "p_value": self.p_value}]
        )

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="%.3g")


def classifier_two_sample_test(
    first: Float[np.ndarray, "rows dimensions"],
    second: Float[np.ndarray, "rows dimensions"],
    *,
    key: Any,
    classifier: Any = None,
    folds: int = 5,
    permutations: int = 0,
) -> ClassifierTwoSampleTest:
    """Held-out accuracy of a classifier between two samples (C2ST).

    Args:
        first, second: samples, standardized by the mean and standard deviation of the first. Equally many rows of
            both are used.
        key: a `jax.random.key`, of folds, the network's start and permutations.
        classifier: any scikit-learn classifier; by default the network of the benchmark of simulation-based
            inference: two hidden layers of ten units per dimension.
        folds: of the cross-validation.
        permutations: how many times labels are shuffled for the p-value, each of which fits all folds again. By
            default the p-value is binomial, which treats folds as independent.

    Raises:
        InputError: shapes that do not fit, fewer than 10 rows a fold, or values that are not finite.

    >>> import jax
    >>> from sklearn.naive_bayes import GaussianNB
    >>> rng = np.random.default_rng(0)
    >>> found = classifier_two_sample_test(
    ...     rng.normal(size=(500, 2)), 2 * rng.normal(size=(500, 2)), key=jax.random.key(0), classifier=GaussianNB()
    ... )
    >>> 0.6 < found.accuracy < 0.8, found.p_value < 1e-6
    (True, True)
    """
    first, second = _rows(first, "first"), _rows(second, "second")
    if first.shape[1] != second.shape[1]:
        raise InputError(f"the samples have {first.shape[1]} and {second.shape[1]} dimensions: they must have the same")
    rng = host_generator(key)
    count = min(len(first), len(second))
    if folds < 2 or count < 5 * folds:
        raise InputError(
            f"{count} rows of each sample are too few for {folds} folds: give at least {5 * max(folds, 2)}"
        )
    pair = [s if len(s) == count else s[rng.permutation(len(s))[:count]] for s in (first, second)]
    center, scale = first.mean(0), first.std(0)
    x = (np.concatenate(pair) - center) / np.where(scale > 0, scale, 1)
    labels = np.repeat([0, 1], count)
    accuracies = _cross_validated(x, labels, classifier, folds, rng)
    accuracy = float(accuracies.mean())
    null = np.array(
        [_cross_validated(x, rng.permutation(labels), classifier, folds, rng).mean() for _ in range(permutations)]
    )
    if permutations:
        p_value = (1 + (null >= accuracy - 1e-12).sum()) / (permutations + 1)
    else:
        p_value = special.bdtrc(round(accuracy * 2 * count) - 1, 2 * count, 0.5)
    error = np.sqrt(accuracy * (1 - accuracy) / (2 * count))
    return ClassifierTwoSampleTest(accuracy, float(error), float(p_value), accuracies, null)


def _cross_validated(x: np.ndarray, labels: np.ndarray, classifier: Any, folds: int, rng: Any) -> np.ndarray:
    from sklearn.base import clone
    from sklearn.model_selection import StratifiedKFold

    state = int(rng.integers(2**31))
    if classifier is None:
        classifier = default_classifier(x.shape[1], state)
    found = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=state).split(x, labels):
        found.append((clone(classifier).fit(x[train], labels[train]).predict(x[test]) == labels[test]).mean())
    return np.array(found)


def default_classifier(dimension: int, random_state: int) -> Any:
    """The network by which the benchmark of simulation-based inference compares posteriors.

    >>> default_classifier(3, 0).hidden_layer_sizes
    (30, 30)
    """
    from sklearn.neural_network import MLPClassifier

    sizes = (10 * dimension, 10 * dimension)
    return MLPClassifier(sizes, activation="relu", solver="adam", max_iter=10_000, random_state=random_state)


@dataclasses.dataclass(frozen=True)
class LocalClassifierTwoSampleTest:
    """Is the posterior of one observation right? By a classifier over all simulations.

    Attributes:
        statistic: mean of (probability - 1/2)^2 over draws of the observation's posterior.
        null: the same of classifiers for which parameters and draws changed places by chance.
        p_value: of a statistic as large by chance.
        probabilities: that a draw is one of the posterior approximation and no parameter, by draw: above 1/2 the
            approximation has too much mass there.
    """

    statistic: float
    null: Float[np.ndarray, " trials"]
    p_value: float
    probabilities: Float[np.ndarray, " draws"]

    @property
    def table(self) -> pd.DataFrame:
        """One row."""
        import pandas as pd

        low, high = np.quantile(self.null, [0.5, 0.95])
        row = {"statistic": self.statistic, "null_median": low, "null_95%": high, "p_value": self.p_value}
        return pd.DataFrame([row])

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="%.3g")


def local_classifier_two_sample_test(
    parameters: Float[np.ndarray, "simulations parameters"],
    draws: Float[np.ndarray, "simulations parameters"],
    data: Float[np.ndarray, "simulations features"],
    *,
    observation: Float[np.ndarray, " features"],
    observation_draws: Float[np.ndarray, "draws parameters"],
    key: Any,
    classifier: Any = None,
    trials: int = 199,
) -> LocalClassifierTwoSampleTest:
    """Local classifier two-sample test (L-C2ST): no reference posterior of the observation is needed.

    A classifier learns to tell (draw, data) from (parameter, data) over all simulations. Where it can, for the draws
    of one observation, the posterior is wrong there. The null distribution comes of classifiers trained after draw and
    parameter of each simulation changed places with probability one half, which is exact if the posterior is right for
    all data.

    Args:
        parameters: that were drawn from the prior.
        draws: one draw from the posterior approximation of each simulation, shape (simulations, parameters), or
            several, of which the first is used.
        data: of each simulation, or numbers that summarize them.
        observation: the data whose posterior is looked at.
        observation_draws: of its posterior approximation.
        key: a `jax.random.key`.
        classifier: any scikit-learn classifier with `predict_proba`, fitted `trials` + 1 times. By default logistic
            regression on all numbers and their products of degree three, of degree two where those are more than 600;
            all trials are fitted at once. Degree two is the right family for Gaussian posteriors with linear means
            and equal covariances; what is wrong for some data alone takes degree three, or a classifier that bends.
        trials: classifiers of the null distribution.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or more than 600 products for the default.

    >>> import jax
    >>> rng = np.random.default_rng(0)
    >>> mean = rng.normal(size=(1000, 1))
    >>> parameters, draws = mean + rng.normal(size=(1000, 1)), mean + 0.5 * rng.normal(size=(1000, 1))
    >>> local_classifier_two_sample_test(parameters, draws, mean, observation=[0.0],
    ...     observation_draws=0.5 * rng.normal(size=(200, 1)), key=jax.random.key(0)).p_value
    0.005
    """
    draws = np.asarray(draws, np.float64)
    parameters, draws = _rows(parameters, "parameters"), _rows(draws[:, 0] if draws.ndim == 3 else draws, "draws")
    data = _rows(np.reshape(data, (len(parameters), -1)), "data")
    target, point = (
        _rows(observation_draws, "observation_draws"),
        _rows(np.reshape(observation, (1, -1)), "observation"),
    )
    shapes = {"draws": draws.shape == parameters.shape, "observation": point.shape[1] == data.shape[1]}
    shapes["observation_draws"] = target.shape[1] == parameters.shape[1]
    for name, fits in shapes.items():
        if not fits:
            raise InputError(
                f"{name} do not fit: parameters are {parameters.shape}, draws {draws.shape}, data {data.shape}, the "
                f"observation has {point.shape[1]} numbers and its draws shape {target.shape}"
            )
    rng = host_generator(key)
    rows = len(parameters)
    joint = np.concatenate([np.concatenate([draws, parameters]), np.concatenate([data, data])], 1)
    at = np.concatenate([target, np.broadcast_to(point, (len(target), point.shape[1]))], 1)
    center, scale = joint.mean(0), joint.std(0)
    scale = np.where(scale > 0, scale, 1)
    joint, at = (joint - center) / scale, (at - center) / scale
    swapped = rng.random((trials + 1, rows)) < 0.5
    swapped[0] = False
    labels = np.concatenate([~swapped, swapped], 1)  # True: counts as a draw of the approximation
    if classifier is None:
        probabilities = _polynomial_logistic(joint, labels, at)
    else:
        from sklearn.base import clone

        probabilities = np.stack([clone(classifier).fit(joint, y).predict_proba(at)[:, 1] for y in labels.astype(int)])
    statistics = ((probabilities - 0.5) ** 2).mean(1)
    p_value = (1 + (statistics[1:] >= statistics[0]).sum()) / (trials + 1)
    return LocalClassifierTwoSampleTest(float(statistics[0]), statistics[1:], float(p_value), probabilities[0])


def _polynomial_logistic(x: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Probabilities by penalized logistic regressions on products, one for each row of labels, at new points.

    The Hessian is bounded by a quarter of X'X (Boehning, Lindsay 1988), which is factorized once for all.
    """
    from math import comb

    from sklearn.preprocessing import PolynomialFeatures

    dimension = x.shape[1]
    degree = 3 if comb(dimension + 3, 3) <= _MOST_FEATURES else 2
    width = comb(dimension + degree, degree)
    if width > _MOST_FEATURES:
        raise InputError(
            f"parameters and data have {dimension} numbers and {width} products, more than {_MOST_FEATURES}: "
            "summarize the data, or give a classifier"
        )
    products = PolynomialFeatures(degree).fit(x)
    design, penalty = products.transform(x), np.full(width, 1.0)
    penalty[0] = 1e-6
    factor = linalg.cho_factor(design.T @ design / 4 + np.diag(penalty))
    weights = np.zeros((labels.shape[0], width))
    for _ in range(_STEPS):
        gradient = (labels - special.expit(weights @ design.T)) @ design - penalty * weights
        step = linalg.cho_solve(factor, gradient.T).T
        weights += step
        if np.abs(step).max() < 1e-4:
            break
    return special.expit(weights @ products.transform(new).T)


def _rows(values: Any, what: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2:
        raise InputError(f"{what} need shape (rows, dimensions), got {values.shape}")
    wrong = ~np.isfinite(values).all(1)
    if wrong.any():
        raise InputError(f"row {int(wrong.argmax())} of {what} is not finite: drop it")
    return values
