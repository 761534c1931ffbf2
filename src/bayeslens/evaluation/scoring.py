"""How good are these predictions? Every score that suits them, taken apart, and compared with those of a rival."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpyro.distributions import Distribution

from bayeslens.core.distribution import take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.foreign import Empirical, as_predictive
from bayeslens.core.quantiles import quantile
from bayeslens.core.table import Target
from bayeslens.core.transformed import through_rounding_cells
from bayeslens.evaluation import scores as proper
from bayeslens.evaluation.calibration import expected_calibration_error, pit_calibration_error
from bayeslens.evaluation.conformal import highest_probability_sets
from bayeslens.evaluation.decision_curves import DecisionCurve, decision_curve
from bayeslens.evaluation.score_comparison import ScoreDifference, compare_scores, mean_error
from bayeslens.evaluation.score_decomposition import (
    ReliabilityDiagram,
    ScoreDecomposition,
    decompose_classes,
    decompose_crps,
    decompose_probability,
    reliability_diagram,
)

if TYPE_CHECKING:
    import pandas as pd

_DECOMPOSED_ROWS = 5_000  # rows from which a CRPS is decomposed: a second's work
_LOWER = ("crps", "brier", "ranked_probability", "interval_loss", "quantile_loss", "threshold_weighted")
_SIGNIFICANT = 0.05
_PLACES = 10  # in the rounding cell of a count


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One score: its mean over rows, standard error, and which way is better."""

    name: str
    value: float
    standard_error: float
    better: str


@dataclasses.dataclass(frozen=True, eq=False)
class Scores(Mapping):
    """What `score_predictions` returns; as a mapping, the value of each score by name (`scores["crps"]`).

    `scores["crps_se"]` is the standard error of the same.

    Attributes:
        rows: how many rows were scored.
        scores: one entry per score.
        decompositions: of the Brier and log loss of classes, or of the CRPS (of more than 5,000 rows, on as many evenly
            spaced ones).
        comparisons: differences from the rival, first minus second, by score; empty without one.
        reliability: CORP reliability diagram of the second of two classes, or of the most probable of several; None for
            regression.
        decision_curve: of two classes, otherwise None.
        event: which event `reliability` and `decision_curve` are about.
    """

    rows: int
    scores: tuple[ScoreRow, ...]
    decompositions: tuple[ScoreDecomposition, ...] = ()
    comparisons: dict[str, ScoreDifference] = dataclasses.field(default_factory=dict)
    reliability: ReliabilityDiagram | None = None
    decision_curve: DecisionCurve | None = None
    event: str = ""

    def __getitem__(self, name: str) -> float:
        for row in self.scores:
            if name in (row.name, f"{row.name}_se"):
                return row.value if name == row.name else row.standard_error
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (row.name for row in self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def table(self) -> pd.DataFrame:
        """A row per score."""
        import pandas as pd

        columns = {"name": "score"}
        return pd.DataFrame([dataclasses.asdict(row) for row in self.scores]).rename(columns=columns)

    @property
    def decomposition(self) -> pd.DataFrame:
        """A row per component of each decomposed loss."""
        import pandas as pd

        return pd.concat([d.table for d in self.decompositions], ignore_index=True)

    @property
    def comparison(self) -> pd.DataFrame | None:
        """A row per score: how the first predictor differs from the second; None without a second."""
        import pandas as pd

        if not self.comparisons:
            return None
        names = ("difference", "standard_error", "statistic", "p_value", "lower", "upper")
        rows = [
            {"score": name, **{n: getattr(found, n) for n in names}, "better": _winner(name, found)}
            for name, found in self.comparisons.items()
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        parts = [self.table.to_string(index=False, float_format="%.4g")]
        if self.decompositions:
            parts.append(self.decomposition.to_string(index=False, float_format="%.4g"))
        if self.comparisons:
            parts.append("first minus second:\n" + self.comparison.to_string(index=False, float_format="%.4g"))
        return "\n\n".join(parts)


def is_loss(name: str) -> bool:
    """Whether lower is better.

    >>> is_loss("crps"), is_loss("log_score")
    (True, False)
    """
    return name.startswith(_LOWER) or name == "miscalibration"


def _winner(name: str, found: ScoreDifference) -> str:
    if found.p_value > _SIGNIFICANT:
        return "undecided"
    return "first" if (found.difference < 0) == is_loss(name) else "second"


def score_predictions(
    source: Any,
    X: Any,
    y: Any,
    *,
    coverage: float = 0.9,
    quantile_levels: Sequence[float] | None = None,
    samples: bool = False,
    ordered: bool = False,
    thresholds: Sequence[float] | None = None,
    against: Any = None,
    groups: Any = None,
    time: Any = None,
    key: Any = None,
) -> Scores:
    """Every proper score that suits these predictions, with standard errors, taken apart, and against a rival's.

    Args:
        source: a predictive, a fitted scikit-learn estimator, a NumPyro distribution with one row per batch entry, or
            an array of class probabilities, quantiles or draws: whatever `as_predictive` takes.
        X: rows to predict; None where `source` is predictions already.
        y: what happened, shape (rows,).
        coverage: nominal coverage of the intervals or sets.
        quantile_levels: probabilities of the columns, where `source` is an array of quantiles; a quantile loss is
            given for each. With other sources, the levels of the quantile losses.
        samples: `source` is an array of draws, shape (draws, rows).
        ordered: the classes are ordered, so that the ranked probability loss means something.
        thresholds: for regression, values of y above which a threshold-weighted CRPS is given; for two classes, the
            threshold probabilities of the decision curve.
        against: another source of the same kind of predictions for the same rows, compared score by score.
        groups: labels of rows that may depend on each other: one patient, one site.
        time: times of the rows of a series, or of several.
        key: a `jax.random.key` for what is resampled (bands, and the miscalibration by chance); the same one whenever
            none is given.

    Returns:
        A `Scores`: its table has log_score, crps or brier and others, coverage, width or set_size, calibration_error.
        Draws have no log score. Sets are the fewest classes whose probabilities reach the coverage.

    >>> import numpyro.distributions as dist
    >>> y = np.linspace(-1.5, 1.5, 40)
    >>> found = score_predictions(dist.Normal(np.zeros(40), 1.0), None, y, against=dist.Normal(np.zeros(40), 2.0))
    >>> round(found["crps"], 3), found.comparison.set_index("score").loc["crps", "better"]
    (0.516, 'first')

    Raises:
        InputError: predictions without probabilities or that do not fit the rows, or classes that differ.
    """
    levels = None if quantile_levels is None else np.asarray(quantile_levels, np.float64)
    predictive, distribution = _predicted(source, X, levels, samples)
    target = Target.with_classes(y, predictive.classes)
    rows, is_class = len(target.values), predictive.classes is not None
    settings = {"coverage": coverage, "levels": levels, "ordered": ordered}
    settings["thresholds"] = None if is_class else thresholds
    each = _row_scores(distribution, target, **settings)
    dependence = {"groups": groups, "time": time}
    found = [_summary(name, values, coverage, dependence) for name, values in each.items()]
    found.append(_calibration(distribution, target))
    decompositions = _decompositions(distribution, target, dependence | {"key": key})
    diagram, curve, event = None, None, ""
    if is_class:
        probs = np.asarray(distribution.probs, np.float64)
        if probs.shape[1] == 2:
            event, probability, hit = f"{predictive.classes[1]}", probs[:, 1], target.values == 1
            steps = None if thresholds is None else np.asarray(thresholds)
            curve = decision_curve(np.clip(probability, 0, 1), hit, thresholds=steps, **dependence)
        else:
            event, probability = "the most probable class", probs.max(1)
            hit = probs.argmax(1) == target.values
        diagram = reliability_diagram(np.clip(probability, 0, 1), hit, key=key, **dependence)
    comparisons = {}
    if against is not None:
        other, rival = _predicted(against, X, levels, samples)
        if other.classes != predictive.classes:
            raise InputError(f"the two predict different classes: {predictive.classes} and {other.classes}")
        theirs = _row_scores(rival, target, **settings)
        pairs = {name: (values, theirs[name]) for name, values in each.items() if name in theirs}
        mine, others = decompositions[0], _decompositions(rival, target, dependence | {"resamples": 0})[0]
        for name, (worse, fitted) in {"miscalibration": (0, 1), "discrimination": (2, 1)}.items():
            pairs[name] = tuple(d.by_row[:, worse] - d.by_row[:, fitted] for d in (mine, others))
        comparisons = {
            name: compare_scores(*pair, **_of_rows(_evenly(len(pair[0]), rows), dependence))
            for name, pair in pairs.items()
            if name not in ("coverage", "width", "set_size") and all(np.isfinite(p).all() for p in pair)
        }
    return Scores(rows, tuple(found), decompositions, comparisons, diagram, curve, event)


def _predicted(source: Any, X: Any, levels: np.ndarray | None, samples: bool) -> tuple[Any, Distribution]:
    """The predictive that `source` is, and its distributions of these rows."""
    # With draws, levels are those of the quantile losses alone; only arrays look at either.
    predictive = as_predictive(source, quantile_levels=None if samples else levels, samples=samples)
    return predictive, predictive(X)


def _row_scores(
    distribution: Distribution,
    target: Target,
    coverage: float,
    levels: np.ndarray | None,
    ordered: bool,
    thresholds: Sequence[float] | None,
) -> dict[str, np.ndarray]:
    """Every score, row by row."""
    y, found = target.values, {}
    if distribution.batch_shape != y.shape:
        raise InputError(f"there are predictions for {distribution.batch_shape[0]} rows and outcomes for {len(y)}")
    if target.classes is not None:
        codes = y.astype(int)
        probs = np.asarray(distribution.probs, np.float64)
        sets = highest_probability_sets(probs, coverage)
        found["log_score"] = proper.log_score(distribution, y)
        found["brier"] = proper.brier_loss(probs, codes)
        found["spherical_score"] = proper.spherical_score(probs, codes)
        if ordered:
            found["ranked_probability_loss"] = proper.ranked_probability_loss(probs, codes)
        found["coverage"] = sets[np.arange(len(y)), codes].astype(float)
        found["set_size"] = sets.sum(1).astype(float)
        return found
    if not isinstance(distribution, Empirical):
        found["log_score"] = proper.log_score(distribution, y, target.step)
    found["crps"] = proper.crps_loss(distribution, y)
    for threshold in () if thresholds is None else np.atleast_1d(thresholds).tolist():
        name = f"threshold_weighted_crps_above_{threshold:g}"
        found[name] = proper.threshold_weighted_crps_loss(distribution, y, lower=threshold)
    tail = (1 - coverage) / 2
    asked = np.zeros(0) if levels is None else levels
    values = quantile(distribution, np.concatenate([[tail, 1 - tail], asked]))
    found["interval_loss"] = proper.interval_loss(values[:, 0], values[:, 1], y, coverage)
    for level, predicted in zip(asked, values.T[2:], strict=True):
        found[f"quantile_loss_{level:g}"] = proper.quantile_loss(predicted, float(level), y)
    found["coverage"] = ((values[:, 0] <= y) & (y <= values[:, 1])).astype(float)
    found["width"] = values[:, 1] - values[:, 0]
    return found


def _summary(name: str, values: np.ndarray, coverage: float, dependence: dict[str, Any]) -> ScoreRow:
    finite = bool(np.isfinite(values).all())
    error = float(mean_error(values, **dependence).standard_error) if finite else float("nan")
    better = "lower" if is_loss(name) else "higher"
    special = {"coverage": f"near {coverage:g}", "width": "lower, at coverage", "set_size": "lower, at coverage"}
    return ScoreRow(name, float(values.mean()), error, special.get(name, better))


def _calibration(distribution: Distribution, target: Target) -> ScoreRow:
    y, name = target.values, "calibration_error"
    if target.classes is not None:
        error = expected_calibration_error(np.asarray(distribution.probs), y.astype(int))
        return ScoreRow(name, float(error.value), float(error.standard_error), "lower")
    # Counts are spread evenly over their cells (the nonrandomized PIT of Czado, Gneiting and Held 2009).
    spread, places = through_rounding_cells(distribution), np.zeros(1)
    if distribution.is_discrete:
        places = (np.arange(_PLACES) + 0.5) / _PLACES - 0.5
    transform = np.concatenate([np.clip(proper.pit(spread, y + place), 0, 1) for place in places])
    error = pit_calibration_error(transform)
    return ScoreRow(name, float(error.value), float(error.standard_error * np.sqrt(len(places))), "lower")


def _decompositions(
    distribution: Distribution, target: Target, settings: dict[str, Any]
) -> tuple[ScoreDecomposition, ...]:
    y = target.values
    if target.classes is None:
        index = _evenly(min(len(y), _DECOMPOSED_ROWS), len(y))
        return (decompose_crps(take_rows(distribution, index), y[index], **_of_rows(index, settings)),)
    probs = np.clip(np.asarray(distribution.probs, np.float64), 0, 1)
    found = [decompose_classes(probs, y, **settings)]
    if probs.shape[1] == 2 and (probs[np.arange(len(y)), y.astype(int)] > 0).all():
        found.append(decompose_probability(probs[:, 1], y, score="log", **settings))
    return tuple(found)


def _evenly(kept: int, rows: int) -> np.ndarray:
    return np.linspace(0, rows - 1, kept).round().astype(int)


def _of_rows(index: np.ndarray, settings: dict[str, Any]) -> dict[str, Any]:
    """Groups and times of some rows."""
    return {
        name: np.asarray(value)[index] if name in ("groups", "time") and value is not None else value
        for name, value in settings.items()
    }
