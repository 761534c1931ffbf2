"""Mean losses taken apart: miscalibration - discrimination + uncertainty (CORP), and reliability diagrams without bins.

Forecasts are recalibrated by the best increasing function of themselves (isotonic regression by pooling adjacent
violators), which needs no bins and no tuning. With S the mean loss of the forecasts, C that of the recalibrated
forecasts and R that of one best constant forecast,

    miscalibration = S - C,    discrimination = R - C,    uncertainty = R,

so that S = miscalibration - discrimination + uncertainty, and neither of the first two is negative.

Standard errors are those of the infinitesimal jackknife. Both C and R are minima, so that a row's weight moves them, to
first order, only through its own loss; each component is therefore as uncertain as a mean of row losses, and nothing is
fitted anew. Where the miscalibration is zero in truth its estimate is not: isotonic fits look better than they are.
What it would be by chance is therefore found by drawing outcomes from the forecasts, with a p-value of calibration,
where forecasts are probabilities. It is the greater the fewer the rows, and inflates the discrimination alike.

Sources: T. Dimitriadis, T. Gneiting, A. I. Jordan, "Stable reliability diagrams for probabilistic classifiers" (2021),
for CORP (their consistency band resamples the forecasts too, here they are held fixed); T. Gneiting, J. Resin,
"Regression diagnostics meets forecast evaluation" (2023), for means and quantiles; S. Arnold, E.-M. Walz, J. Ziegel,
T. Gneiting, "Decompositions of the mean continuous ranked probability score" (2024), where `decompose_crps` is the
Brier score based decomposition; L. A. Jaeckel, "The infinitesimal jackknife" (1972).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution
from scipy.special import xlog1py, xlogy

from bayeslens.core.distribution import take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf, quantile
from bayeslens.core.randomness import host_generator
from bayeslens.evaluation.decision_curves import checked_events
from bayeslens.evaluation.isotonic import isotonic_mean, isotonic_quantile, pooled_adjacent_violators
from bayeslens.evaluation.score_comparison import mean_error

if TYPE_CHECKING:
    import pandas as pd

COMPONENTS = ("loss", "miscalibration", "discrimination", "uncertainty")
_EDGES = 60  # cells of the CRPS's integral: half as many again would move it by less than a thousandth
_TAILS = np.array([1e-4, 1e-3, 0.01, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 0.99, 0.999, 0.9999])


@dataclasses.dataclass(frozen=True)
class ScoreDecomposition:
    """A mean loss and its components: loss = miscalibration - discrimination + uncertainty, to rounding.

    Attributes:
        score: the loss's name.
        loss: mean loss of the forecasts.
        miscalibration: what recalibration would save.
        discrimination: what the recalibrated forecasts save over one constant forecast.
        uncertainty: mean loss of the best constant forecast; a property of the outcomes alone.
        standard_errors: of the four, by name.
        by_row: losses of the forecasts, of the recalibrated ones and of the constant one, shape (rows, 3). Two
            forecasters are compared component by component by `compare_scores` of its differences.
        expected_miscalibration: what calibrated forecasts would show by chance; None where it was not asked for, or
            forecasts of a mean or quantile do not say.
        p_value: how often calibrated forecasts look as miscalibrated as these, or more; likewise.
        thresholds: of a CRPS, where the events y <= threshold were looked at, shape (thresholds,), otherwise None.
        by_threshold: the four components of these events' Brier losses, shape (thresholds, 4), or None.
    """

    score: str
    loss: float
    miscalibration: float
    discrimination: float
    uncertainty: float
    standard_errors: dict[str, float]
    by_row: Float[np.ndarray, "rows 3"]
    expected_miscalibration: float | None = None
    p_value: float | None = None
    thresholds: Float[np.ndarray, " thresholds"] | None = None
    by_threshold: Float[np.ndarray, "thresholds 4"] | None = None

    @property
    def table(self) -> pd.DataFrame:
        """A row per component: its value, standard error, share of the uncertainty, and what of it may be chance."""
        import pandas as pd

        values = [getattr(self, name) for name in COMPONENTS]
        return pd.DataFrame(
            {
                "score": self.score,
                "component": COMPONENTS,
                "value": values,
                "standard_error": [self.standard_errors[name] for name in COMPONENTS],
                "share_of_uncertainty": [v / self.uncertainty if self.uncertainty > 0 else np.nan for v in values],
                "by_chance": [np.nan, self.expected_miscalibration, np.nan, np.nan],
                "p_value": [np.nan, self.p_value, np.nan, np.nan],
            }
        )

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="%.4g", na_rep="")


def _decomposition(
    score: str,
    by_row: np.ndarray,
    groups: Any,
    time: Any,
    chance: np.ndarray | None = None,
    thresholds: Any = None,
    by_threshold: Any = None,
) -> ScoreDecomposition:
    """Means and errors of row losses; `chance` holds the miscalibrations of outcomes drawn from the forecasts."""
    components = _components(by_row)
    errors = np.asarray(mean_error(components, groups=groups, time=time).standard_error)
    values = _components(by_row.mean(0)[None])[0]
    expected, p_value = None, None
    if chance is not None and len(chance):
        exceeded = (chance >= values[1] * (1 - 1e-9)).sum()
        expected, p_value = float(chance.mean()), float((1 + exceeded) / (len(chance) + 1))
    return ScoreDecomposition(
        score,
        *(float(v) for v in values),
        {name: float(error) for name, error in zip(COMPONENTS, errors, strict=True)},
        by_row,
        expected,
        p_value,
        thresholds,
        by_threshold,
    )


def _components(losses: np.ndarray) -> np.ndarray:
    """Loss, miscalibration, discrimination and uncertainty from losses of forecasts, recalibrated ones, constant."""
    own, recalibrated, constant = losses.T
    return np.stack([own, own - recalibrated, constant - recalibrated, constant], 1)


def _saved(loss: Callable, distinct: np.ndarray, counts: np.ndarray, means: np.ndarray) -> float:
    """Mean loss that recalibration saves, from the distinct forecasts and the mean outcome at each."""
    return (
        float(counts @ (loss(distinct, means) - loss(pooled_adjacent_violators(means, counts), means))) / counts.sum()
    )


def _generator(key: Any) -> np.random.Generator:
    import jax

    return host_generator(jax.random.key(0) if key is None else key)


# ---- decompositions ----------------------------------------------------------------------------------------------


def brier(probability: Any, outcome: Any) -> np.ndarray:
    """Squared error of an event's probability.

    >>> brier(np.array([0.8]), np.array([1.0])).round(2).tolist()
    [0.04]
    """
    return (np.asarray(probability) - outcome) ** 2


def log_loss(probability: Any, outcome: Any) -> np.ndarray:
    """Minus the log of the probability of what happened, in nats.

    >>> log_loss(np.array([0.5, 1.0]), np.array([1.0, 1.0])).round(4).tolist()
    [0.6931, -0.0]
    """
    return -xlogy(outcome, probability) - xlog1py(1 - np.asarray(outcome), -np.asarray(probability))


_EVENT_LOSSES = {"brier": brier, "log": log_loss}


def decompose_probability(
    probability: Any,
    outcome: Any,
    *,
    score: str = "brier",
    groups: Any = None,
    time: Any = None,
    resamples: int = 99,
    key: Any = None,
) -> ScoreDecomposition:
    """CORP decomposition of the probabilities of an event.

    Args:
        probability: predicted probabilities, shape (rows,).
        outcome: whether it happened, shape (rows,).
        score: `"brier"`, the squared error (half of `brier_loss` of two classes), or `"log"`, in nats.
        groups: labels of rows that may depend on each other; see `mean_error`.
        time: times of rows of a series; see `mean_error`.
        resamples: how often outcomes are drawn from the forecasts to find the miscalibration by chance; 0 does not.
        key: a `jax.random.key` for that; the same one whenever none is given.

    >>> found = decompose_probability([0.2, 0.2, 0.6, 0.6], [0, 0, 0, 1])
    >>> [round(getattr(found, name), 4) for name in ("loss", "miscalibration", "discrimination", "uncertainty")]
    [0.15, 0.025, 0.0625, 0.1875]

    Raises:
        InputError: probabilities out of range, outcomes other than 0 and 1, an unknown score, or probability zero for
            what happened under the log score.
    """
    if score not in _EVENT_LOSSES:
        raise InputError(f"unknown score {score!r}: use one of {', '.join(_EVENT_LOSSES)}")
    probability, outcome = checked_events(probability, outcome)
    impossible = np.abs(outcome - probability) == 1
    if score == "log" and impossible.any():
        row = int(impossible.argmax())
        raise InputError(
            f"row {row} has the probability {probability[row]:g} and the outcome {outcome[row]:g}: its log loss is "
            "infinite; bound the probabilities away from 0 and 1, or decompose the Brier loss"
        )
    loss = _EVENT_LOSSES[score]
    losses = _losses(loss, probability, isotonic_mean(probability, outcome), outcome.mean(), outcome)
    distinct, counts = np.unique(probability, return_counts=True)
    drawn = _generator(key).binomial(counts, distinct, (resamples, len(distinct))) / counts
    chance = np.array([_saved(loss, distinct, counts, means) for means in drawn])
    return _decomposition(score, losses, groups, time, chance)


def _losses(loss: Callable, forecast: Any, recalibrated: Any, constant: Any, y: np.ndarray) -> np.ndarray:
    constant = np.full(len(y), constant)
    return np.stack([loss(forecast, y), loss(recalibrated, y), loss(constant, y)], 1)


def decompose_classes(
    probs: Any, labels: Any, *, groups: Any = None, time: Any = None, resamples: int = 99, key: Any = None
) -> ScoreDecomposition:
    """Decomposition of the Brier loss of class probabilities: the sum of those of every class against the rest.

    The recalibrated probabilities of a row need not sum to one: this asks for calibration class by class.

    Args:
        probs: shape (rows, classes).
        labels: class codes, shape (rows,).
        groups: labels of rows that may depend on each other.
        time: times of rows of a series.
        resamples: how often outcomes are drawn from the forecasts to find the miscalibration by chance; 0 does not.
        key: a `jax.random.key` for that; the same one whenever none is given.

    >>> found = decompose_classes(np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]]), [0, 0, 0, 1])
    >>> round(found.loss, 4), round(found.miscalibration, 4)  # both classes: twice those of one event
    (0.3, 0.05)

    Raises:
        InputError: labels that are no class codes, or that do not fit the rows.
    """
    probs, labels = np.asarray(probs, np.float64), np.asarray(labels, int)
    if probs.ndim != 2 or labels.shape != probs.shape[:1]:
        raise InputError(f"give class probabilities and one label per row, got shapes {probs.shape} and {labels.shape}")
    wrong = (labels < 0) | (labels >= probs.shape[1])
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"row {row} has the class code {labels[row]}: there are {probs.shape[1]} classes, from 0")
    outcome = np.eye(probs.shape[1])[labels]
    places = _generator(key).uniform(size=(resamples, len(probs)))
    losses, chance, below = 0.0, np.zeros(resamples), np.zeros(len(probs))
    for p, y in zip(probs.T, outcome.T, strict=True):
        losses = losses + _losses(brier, p, isotonic_mean(p, y), y.mean(), y)
        distinct, index, counts = np.unique(p, return_inverse=True, return_counts=True)
        for i, place in enumerate(places):
            drawn = ((place >= below) & (place < below + p)).astype(np.float64)
            chance[i] += _saved(brier, distinct, counts, np.bincount(index, drawn) / counts)
        below = below + p
    return _decomposition("brier", losses, groups, time, chance)


def decompose_mean(prediction: Any, y: Any, *, groups: Any = None, time: Any = None) -> ScoreDecomposition:
    """Decomposition of the squared error of predicted means.

    1 - loss/uncertainty is the coefficient of determination.

    Args:
        prediction: predicted means, shape (rows,).
        y: outcomes, shape (rows,).
        groups: labels of rows that may depend on each other.
        time: times of rows of a series.

    >>> found = decompose_mean([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])  # one too low everywhere
    >>> found.miscalibration, found.discrimination == found.uncertainty
    (1.0, True)
    """
    prediction, y = _checked_points(prediction, y)
    losses = _losses(brier, prediction, isotonic_mean(prediction, y), y.mean(), y)
    return _decomposition("squared_error", losses, groups, time)


def decompose_quantile(
    prediction: Any, level: float, y: Any, *, groups: Any = None, time: Any = None
) -> ScoreDecomposition:
    """Decomposition of the quantile loss of predicted quantiles of one level.

    Args:
        prediction: predicted quantiles, shape (rows,).
        level: their probability, strictly between 0 and 1.
        y: outcomes, shape (rows,).
        groups: labels of rows that may depend on each other.
        time: times of rows of a series.

    >>> found = decompose_quantile([0.0, 0.0, 5.0, 5.0], 0.5, [1.0, 2.0, 3.0, 9.0])
    >>> found.loss, found.miscalibration, found.discrimination
    (1.125, 0.25, 0.25)
    """
    from bayeslens.evaluation.scores import quantile_loss

    prediction, y = _checked_points(prediction, y)
    if not 0 < level < 1:
        raise InputError(f"a quantile level must lie strictly between 0 and 1, got {level}")
    constant = np.quantile(y, level, method="inverted_cdf")
    losses = _losses(
        lambda q, y: quantile_loss(q, level, y), prediction, isotonic_quantile(prediction, y, level), constant, y
    )
    return _decomposition(f"quantile_loss_{level:g}", losses, groups, time)


def decompose_crps(
    distribution: Distribution,
    y: Any,
    *,
    groups: Any = None,
    time: Any = None,
    resamples: int = 39,
    key: Any = None,
) -> ScoreDecomposition:
    """Decomposition of the mean CRPS: the integral over z of the CORP decompositions of the events y <= z.

    It asks that the predicted probabilities of every event y <= z come true. The integral is over Gauss-Legendre
    nodes in cells between outcomes and predicted quantiles, so that the loss agrees with the mean CRPS to about three
    digits; the four components agree with each other to rounding.

    Args:
        distribution: batch shape (rows,).
        y: outcomes, shape (rows,).
        groups: labels of rows that may depend on each other.
        time: times of rows of a series.
        resamples: how often outcomes are drawn from the forecasts to find the miscalibration by chance; 0 does not.
        key: a `jax.random.key` for that; the same one whenever none is given.

    >>> import numpyro.distributions as dist
    >>> found = decompose_crps(dist.Normal(np.arange(9.0), 1.0), np.arange(9.0))
    >>> round(found.loss, 2), round(found.uncertainty, 2), found.miscalibration > 0
    (0.23, 1.48, True)

    Raises:
        InputError: outcomes that are not finite or do not fit the rows.
    """
    y = np.asarray(y, np.float64)
    if distribution.batch_shape != y.shape or not np.isfinite(y).all():
        raise InputError(
            f"give one finite outcome per row; there are {distribution.batch_shape} predictions and outcomes of shape "
            f"{y.shape}, {int((~np.isfinite(y)).sum())} of them not finite"
        )
    nodes, weights = _threshold_nodes(distribution, y)
    by_row, by_threshold = np.zeros((len(y), 3)), np.empty((len(nodes), 4))
    # An outcome drawn from F is at most z just where a uniform number, the same for every z, is at most F(z).
    places, chance = _generator(key).uniform(size=(resamples, len(y))), np.zeros(resamples)
    for i, (z, weight) in enumerate(zip(nodes, weights, strict=True)):
        event = (y <= z).astype(np.float64)
        forecast = np.clip(cdf(distribution, np.full(len(y), z)), 0.0, 1.0)
        distinct, index, counts = np.unique(forecast, return_inverse=True, return_counts=True)
        fitted = pooled_adjacent_violators(np.bincount(index, event) / counts, counts)[index]
        losses = _losses(brier, forecast, fitted, event.mean(), event)
        by_row += weight * losses
        by_threshold[i] = _components(losses.mean(0)[None])[0]
        for j, place in enumerate(places):
            drawn = np.bincount(index, place <= forecast) / counts
            chance[j] += weight * _saved(brier, distinct, counts, drawn)
    return _decomposition("crps", by_row, groups, time, chance, nodes, by_threshold)


def _threshold_nodes(distribution: Distribution, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where to look at the events y <= z, and what each place counts for."""
    kept = np.linspace(0, len(y) - 1, min(len(y), 200)).round().astype(int)
    forecasts = quantile(take_rows(distribution, kept), _TAILS)
    pool = np.concatenate([np.unique(forecasts), np.quantile(y, np.linspace(0, 1, 200))])
    # The mean Brier loss jumps where an outcome lies: few outcomes are all edges.
    own = np.unique(y) if len(y) <= 2 * _EDGES else np.quantile(y, np.linspace(0, 1, _EDGES))
    edges = np.unique(np.concatenate([own, np.quantile(pool, np.linspace(0, 1, _EDGES))]))
    half = np.diff(edges)[:, None] / 2
    points = np.array([-1, 1]) / np.sqrt(3)
    nodes = edges[:-1, None] + half * (1 + points)
    return nodes.ravel(), np.broadcast_to(half, nodes.shape).ravel()


def _checked_points(prediction: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    prediction, y = np.asarray(prediction, np.float64), np.asarray(y, np.float64)
    if prediction.ndim != 1 or prediction.shape != y.shape:
        raise InputError(f"give one prediction and one outcome per row, got shapes {prediction.shape} and {y.shape}")
    wrong = ~(np.isfinite(prediction) & np.isfinite(y))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"row {row} has the prediction {prediction[row]:g} and the outcome {y[row]:g}: drop it")
    return prediction, y


# ---- reliability diagrams --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReliabilityDiagram:
    """A CORP reliability diagram: recalibrated against predicted probability, with what chance does if all is well.

    Attributes:
        predicted: distinct predicted probabilities, increasing, shape (distinct,).
        observed: conditional event frequencies, by isotonic regression, shape (distinct,).
        rows: how many rows have each predicted probability.
        lower, upper: consistency band: where `observed` lies, probability by probability, if the predictions are
            calibrated.
        coverage: of the band.
        decomposition: of the event's Brier loss, with its miscalibration by chance and a p-value of calibration.
    """

    predicted: Float[np.ndarray, " distinct"]
    observed: Float[np.ndarray, " distinct"]
    rows: np.ndarray
    lower: Float[np.ndarray, " distinct"]
    upper: Float[np.ndarray, " distinct"]
    coverage: float
    decomposition: ScoreDecomposition

    @property
    def p_value(self) -> float:
        """How often calibrated predictions look as miscalibrated as these, or more."""
        return self.decomposition.p_value

    @property
    def table(self) -> pd.DataFrame:
        """A row per pooled block: the range of predicted probabilities, what was observed, the band, rows."""
        import pandas as pd

        first = np.flatnonzero(np.diff(self.observed, prepend=np.nan) != 0)
        last = np.append(first[1:], len(self.observed)) - 1
        return pd.DataFrame(
            {
                "predicted_from": self.predicted[first],
                "predicted_to": self.predicted[last],
                "observed": self.observed[first],
                "lower": self.lower[first],
                "upper": self.upper[last],
                "rows": np.add.reduceat(self.rows, first),
            }
        )

    def __str__(self) -> str:
        return f"{self.table.to_string(index=False, float_format='%.4g')}\n\n{self.decomposition}"


def reliability_diagram(
    probability: Any,
    outcome: Any,
    *,
    coverage: float = 0.9,
    resamples: int = 400,
    groups: Any = None,
    time: Any = None,
    key: Any = None,
) -> ReliabilityDiagram:
    """CORP reliability diagram with a consistency band and a test of calibration, both by resampling outcomes.

    Args:
        probability: predicted probabilities of the event, shape (rows,).
        outcome: whether it happened, shape (rows,).
        coverage: of the band at each probability.
        resamples: how often outcomes are drawn from the predictions; 400 gives p-values in steps of 1/401.
        groups: labels of rows that may depend on each other, for the standard errors; the band takes rows as
            independent given their predictions.
        time: times of rows of a series, likewise.
        key: a `jax.random.key`; the same one whenever none is given.

    >>> found = reliability_diagram([0.2] * 50 + [0.7] * 50, [1] * 25 + [0] * 25 + [1] * 35 + [0] * 15)
    >>> found.observed.tolist(), found.p_value < 0.01
    ([0.5, 0.7], True)

    Raises:
        InputError: probabilities or coverage out of range, outcomes other than 0 and 1, or no resamples.
    """
    if not 0 < coverage < 1 or resamples < 1:
        raise InputError(
            f"coverage must lie strictly between 0 and 1 and resamples be positive, got {coverage} and {resamples}"
        )
    found = decompose_probability(probability, outcome, groups=groups, time=time, resamples=resamples, key=key)
    probability, outcome = checked_events(probability, outcome)
    predicted, index, counts = np.unique(probability, return_inverse=True, return_counts=True)
    observed = pooled_adjacent_violators(np.bincount(index, outcome) / counts, counts)
    drawn = _generator(key).binomial(counts, predicted, (resamples, len(predicted))) / counts
    fits = np.stack([pooled_adjacent_violators(means, counts) for means in drawn])
    lower, upper = np.quantile(fits, [(1 - coverage) / 2, (1 + coverage) / 2], axis=0)
    return ReliabilityDiagram(predicted, observed, counts, lower, upper, coverage, found)
