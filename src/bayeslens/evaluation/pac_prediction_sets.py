"""Prediction sets with a threshold network, certified: miscoverage at most epsilon at confidence 1 - delta."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import beta, binom

from bayeslens.core.errors import InputError
from bayeslens.core.training import train
from bayeslens.evaluation.conformal import check_scores

_TEMPERATURE = 0.04  # of the smoothed membership, in distances from the first to the last decile of the own scores
_VALIDATION, _CHECK_EVERY, _PATIENCE = 0.25, 25, 6


def clopper_pearson_upper(errors: Any, rows: Any, failure_probability: float) -> Float[np.ndarray, "..."]:
    """The upper confidence bound on an error rate: exceeded by the truth with at most `failure_probability`.

    Args:
        errors: how many of the rows were errors.
        rows: how many independent rows were seen.
        failure_probability: delta.

    >>> round(float(clopper_pearson_upper(0, 59, 0.05)), 4)
    0.0495
    """
    errors, rows = np.asarray(errors), np.asarray(rows)
    bound = beta.ppf(1 - failure_probability, errors + 1, np.maximum(rows - errors, 1))
    return np.where(errors >= rows, 1.0, bound)


def pac_threshold(scores: Any, error: float, failure_probability: float) -> float:
    """The least threshold on nonconformity scores whose miscoverage is certified to be at most `error`.

    Over independent calibration rows, the miscoverage of new rows exceeds `error` with probability at most
    `failure_probability`. (A split conformal threshold bounds its average alone.)

    Args:
        scores: of calibration rows, larger for stranger, shape (rows,).
        error: epsilon, the miscoverage that is allowed.
        failure_probability: delta, the probability that the calibration rows mislead.

    Raises:
        InputError: too few rows to certify anything: log(delta) / log(1 - epsilon) are needed.

    Sources: V. Vovk, "Conditional validity of inductive conformal predictors" (2013); S. Park, O. Bastani, N. Matni,
    I. Lee, "PAC confidence sets for deep neural networks via calibrated prediction" (2020).

    >>> pac_threshold(np.arange(100.0), 0.1, 0.05)
    95.0
    """
    for name, value in (("error", error), ("failure_probability", failure_probability)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie strictly between 0 and 1, got {value}")
    scores = check_scores(scores)
    allowed = _allowed_errors(len(scores), error, failure_probability)
    if allowed < 0:
        least = math.ceil(math.log(failure_probability) / math.log1p(-error))
        raise InputError(
            f"miscoverage {error:g} with confidence {1 - failure_probability:g} needs at least {least} calibration "
            f"rows, got {len(scores)}: add rows, or raise error or failure_probability"
        )
    return float(np.partition(scores, len(scores) - allowed - 1)[len(scores) - allowed - 1])


def _allowed_errors(rows: int, error: float, failure_probability: float) -> int:
    """The most errors among the rows whose Clopper-Pearson bound is at most `error`; -1 where none will do."""
    found = int(binom.ppf(failure_probability, rows, error))
    while found >= 0 and binom.cdf(found, rows, error) > failure_probability:
        found -= 1
    return found


class ThresholdNetwork(eqx.Module):
    """A number for every row, by a small network on its standardized features."""

    network: eqx.nn.MLP
    center: Float[np.ndarray, " features"]
    scale: Float[np.ndarray, " features"]

    def __call__(self, features: Float[Array, "rows features"]) -> Float[Array, " rows"]:
        """The network's value of every row."""
        return jax.vmap(self.network)((features - self.center) / self.scale)


class PACPredictionSets(eqx.Module):
    """Sets {class: score >= tau(x) - margin}, with a network tau and a certified margin.

    tau is trained for small sets on learning rows: with memberships smoothed by a sigmoid, the mean number of classes
    in a set is minimized where the margin makes just the allowed share of learning rows miss. The margin is then
    set anew on calibration rows, which neither the scores nor the network have seen: the sets grow with it, so that the
    Clopper-Pearson bound of the errors certifies it at no further price, whatever the network has learned.

    Source: S. Park, T. Kim, "PAC neural prediction set learning to quantify the uncertainty of generative language
    models" (2023). The margin inside of the training loss follows D. Stutz, K. Dvijotham, A. Cemgil, A. Doucet,
    "Learning optimal conformal classifiers" (2022).
    """

    threshold: ThresholdNetwork
    margin: float
    error: float
    failure_probability: float

    @classmethod
    def fit(
        cls,
        learning: tuple[Any, Any, Any],
        calibration: tuple[Any, Any, Any],
        *,
        error: float = 0.1,
        failure_probability: float = 0.05,
        key: Any,
        width: int = 32,
        num_steps: int = 500,
        learning_rate: float = 0.01,
    ) -> PACPredictionSets:
        """Train the threshold network, and certify it.

        Args:
            learning: features of shape (rows, features), scores of shape (rows, classes) (larger for likelier:
                log-probabilities, logits, or any other number) and class codes of shape (rows,). Not the rows on which
                the scores were fitted.
            calibration: likewise, of other rows.
            error: epsilon, the miscoverage that is allowed.
            failure_probability: delta, the probability that the calibration rows mislead.
            key: a `jax.random.key`, for the network's start.
            width: of the network's two hidden layers.
            num_steps: of Adam, at most; a quarter of the learning rows is held out to stop in time.
            learning_rate: of Adam.

        Raises:
            InputError: shapes that do not fit, missing values, labels without a score, or too few calibration rows.
        """
        features, scores, labels = _check(*learning, "learning")
        network = eqx.nn.MLP(features.shape[1], "scalar", width, 2, key=key)
        # At the start all thresholds are equal, as without a network; training goes on while held-out sets get smaller.
        network = eqx.tree_at(lambda n: n.layers[-1].weight, network, replace_fn=jnp.zeros_like)
        scale = np.where(features.std(0) > 0, features.std(0), 1.0)
        start = ThresholdNetwork(network, features.mean(0).astype(np.float32), scale.astype(np.float32))
        low, high = np.quantile(scores[np.arange(len(labels)), labels], [0.1, 0.9])
        unit = _TEMPERATURE * float((high - low) or scores.std() or 1.0)
        data = {"features": features, "scores": scores, "own": scores[np.arange(len(labels)), labels]}
        data = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), data)

        def loss(model: ThresholdNetwork, batch: dict, key: Array) -> Array:
            tau = model(batch["features"])
            margin = -jnp.quantile(batch["own"] - tau, error)
            inside = jax.nn.sigmoid((batch["scores"] - tau[:, None] + margin) / unit)
            return jnp.log(inside.sum(1).mean())

        trained, _ = train(
            loss,
            start,
            data,
            key=key,
            num_steps=num_steps,
            learning_rate=learning_rate,
            validation=_VALIDATION,
            check_every=_CHECK_EVERY,
            patience=_PATIENCE,
        )
        return cls(trained, 0.0, error, failure_probability).certify(calibration)

    def certify(
        self, calibration: tuple[Any, Any, Any], *, error: float | None = None, failure_probability: float | None = None
    ) -> PACPredictionSets:
        """The same network with the margin certified on these rows, which must not have been used for anything else.

        Args:
            calibration: features, scores and class codes, see `fit`.
            error: another epsilon; None keeps it.
            failure_probability: another delta; None keeps it.
        """
        features, scores, labels = _check(*calibration, "calibration")
        error = self.error if error is None else error
        delta = self.failure_probability if failure_probability is None else failure_probability
        strangeness = self.thresholds(features) - scores[np.arange(len(labels)), labels]
        return PACPredictionSets(self.threshold, pac_threshold(strangeness, error, delta), error, delta)

    def thresholds(self, features: Any) -> Float[np.ndarray, " rows"]:
        """The network's threshold of every row, before the margin is subtracted."""
        return np.asarray(self.threshold(jnp.asarray(features, jnp.float32)), np.float64)

    def __call__(self, features: Any, scores: Any) -> Bool[np.ndarray, "rows classes"]:
        """The sets of new rows.

        Args:
            features: shape (rows, features).
            scores: shape (rows, classes).
        """
        features, scores, _ = _check(features, scores, np.zeros(len(scores), int), "new")
        return self.thresholds(features)[:, None] - scores <= self.margin

    @property
    def promise(self) -> str:
        """What was certified."""
        return (
            f"With probability at least {1 - self.failure_probability:.1%} over the calibration rows, at most "
            f"{self.error:.1%} of independent new rows lie outside of their sets (Park and Kim 2023)."
        )


def _check(features: Any, scores: Any, labels: Any, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    features, scores = np.asarray(features, np.float64), np.asarray(scores, np.float64)
    labels = np.asarray(labels)
    if features.ndim != 2 or scores.ndim != 2 or not len(features) == len(scores) == len(labels) > 0:
        raise InputError(
            f"the {which} rows need features (rows, features), scores (rows, classes) and labels (rows,); got shapes "
            f"{features.shape}, {scores.shape} and {labels.shape}"
        )
    finite = np.isfinite(features).all(1) & np.isfinite(scores).all(1)
    if not finite.all():
        raise InputError(
            f"row {int((~finite).argmax())} of the {which} rows has missing or infinite features or scores: "
            "clip log-probabilities of zero"
        )
    if not (np.equal(np.mod(labels, 1), 0).all() and (labels >= 0).all() and (labels < scores.shape[1]).all()):
        raise InputError(f"labels of the {which} rows must be class codes from 0 to {scores.shape[1] - 1}")
    return features, scores, labels.astype(int)
