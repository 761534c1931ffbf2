"""Decision curves: whom would a prediction help, and by how much, at every exchange rate between hits and alarms?

Source: A. J. Vickers, E. B. Elkin, "Decision curve analysis: a novel method for evaluating prediction models" (2006).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from bayeslens.core.errors import InputError
from bayeslens.evaluation.score_comparison import mean_error

if TYPE_CHECKING:
    import pandas as pd

THRESHOLDS = np.arange(1, 100) / 100


@dataclasses.dataclass(frozen=True)
class DecisionCurve:
    """Net benefit at each threshold probability, in true positives per row; 0 is that of treating nobody.

    Attributes:
        thresholds: probabilities above which one acts, shape (thresholds,).
        net_benefit: of acting on the predictions, shape (thresholds,).
        standard_error: of it.
        treat_all: net benefit of always acting.
        treat_all_standard_error: of it.
        advantage: net benefit over the better of always and never acting.
        advantage_standard_error: of it, from the same rows, so that what the two share cancels.
        rows: how many were predicted.
    """

    thresholds: Float[np.ndarray, " thresholds"]
    net_benefit: Float[np.ndarray, " thresholds"]
    standard_error: Float[np.ndarray, " thresholds"]
    treat_all: Float[np.ndarray, " thresholds"]
    treat_all_standard_error: Float[np.ndarray, " thresholds"]
    advantage: Float[np.ndarray, " thresholds"]
    advantage_standard_error: Float[np.ndarray, " thresholds"]
    rows: int

    @property
    def table(self) -> pd.DataFrame:
        """A row per threshold."""
        import pandas as pd

        names = [f.name for f in dataclasses.fields(self) if f.name != "rows"]
        return pd.DataFrame({("threshold" if n == "thresholds" else n): getattr(self, n) for n in names})

    def __str__(self) -> str:
        kept = np.linspace(0, len(self.thresholds) - 1, min(9, len(self.thresholds))).round().astype(int)
        return self.table.iloc[kept].to_string(index=False, float_format="%.4g")


def decision_curve(
    probability: Any,
    outcome: Any,
    *,
    thresholds: Float[np.ndarray, " thresholds"] | None = None,
    groups: Any = None,
    time: Any = None,
) -> DecisionCurve:
    """Net benefit of acting where the predicted probability reaches a threshold: hits less alarms at their price.

    Who acts from probability t on says that t/(1-t) false alarms are worth one hit, so that the net benefit is the
    share of true positives less t/(1-t) times the share of false positives. It is a mean over rows, whose standard
    error at a given threshold is that of a mean; no approximation is needed.

    Args:
        probability: predicted probabilities of the event, shape (rows,).
        outcome: whether it happened, shape (rows,).
        thresholds: probabilities strictly between 0 and 1; 0.01, 0.02, …, 0.99 by default.
        groups: labels of rows that may depend on each other; see `mean_error`.
        time: times of rows of a series; see `mean_error`.

    >>> curve = decision_curve([0.9, 0.6, 0.2], [1, 0, 0], thresholds=np.array([0.5]))
    >>> curve.net_benefit.round(4).tolist(), curve.treat_all.round(4).tolist()  # one hit and one alarm of three rows
    ([0.0], [-0.3333])

    Raises:
        InputError: probabilities or thresholds out of range, or outcomes other than 0 and 1.
    """
    probability, outcome = checked_events(probability, outcome)
    thresholds = THRESHOLDS if thresholds is None else np.atleast_1d(np.asarray(thresholds, np.float64))
    if not ((thresholds > 0) & (thresholds < 1)).all():
        raise InputError(f"thresholds must lie strictly between 0 and 1, got {thresholds.tolist()}")
    gain = outcome[:, None] - (1 - outcome[:, None]) * thresholds / (1 - thresholds)
    acted = gain * (probability[:, None] >= thresholds)
    everyone, benefit = gain.mean(0), acted.mean(0)
    default = np.where(everyone > 0, gain, 0.0)
    errors = [mean_error(values, groups=groups, time=time).standard_error for values in (acted, gain, acted - default)]
    advantage = benefit - np.maximum(everyone, 0.0)
    return DecisionCurve(thresholds, benefit, errors[0], everyone, errors[1], advantage, errors[2], len(outcome))


def checked_events(probability: Any, outcome: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of an event and whether it happened, as two float vectors.

    >>> checked_events([0.5], [True])[1].tolist()
    [1.0]

    Raises:
        InputError: shapes that differ, probabilities outside [0, 1], or outcomes other than 0 and 1.
    """
    probability, outcome = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    if probability.ndim != 1 or probability.shape != outcome.shape:
        raise InputError(
            "give one probability of the event and one outcome per row, "
            f"got shapes {probability.shape} and {outcome.shape}"
        )
    wrong = ~((probability >= 0) & (probability <= 1))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"row {row} has the probability {probability[row]:g}: it must lie in [0, 1]")
    wrong = (outcome != 0) & (outcome != 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"row {row} has the outcome {outcome[row]:g}: code events as 1 and 0, or true and false")
    return probability, outcome
