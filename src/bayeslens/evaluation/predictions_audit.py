"""An audit of predictions in a table, made by any program: are they what they say they are, and what is to be done?

A file says more than its distributions do: intervals and sets as written, probabilities of exceeding a threshold, log
scores. Each of these claims is held against what happened. Calibration at large is tested by CORP (see
`score_decomposition`), intervals and sets by the binomial distribution, events by CORP again.

The verdict asks two questions, whether the predicted distributions are calibrated and whether the claims beside them
hold, and the claims are several: both are judged by the procedure of Holm, so that good predictions are blamed with a
probability of 5% in all, however many columns there are. Whether one forecast for all rows would do better is asked
beside them, at two standard errors.

Sources: S. Holm, "A simple sequentially rejective multiple test procedure" (1979); V. Chernozhukov, I. Fernández-Val,
A. Galichon, "Quantile and probability curves without crossing" (2010), for sorting quantiles that cross.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from bayeslens.core.foreign import Empirical
from bayeslens.core.quantiles import cdf
from bayeslens.core.table import rounding_step
from bayeslens.evaluation.conformal import check_coverage
from bayeslens.evaluation.predictions_columns import ColumnMap, Reading, dependence_of, read_predictions
from bayeslens.evaluation.score_comparison import mean_error
from bayeslens.evaluation.score_decomposition import ReliabilityDiagram, ScoreDecomposition, reliability_diagram
from bayeslens.evaluation.scores import log_score
from bayeslens.evaluation.scoring import Scores, score_predictions

SIGNIFICANT = 0.05
_VAGUE = 0.05  # a margin of chance, in coverage, too wide to rely on
_AGREE = {True: 0.01, False: 0.1}  # nats: exact for classes; a density between quantiles is not told to the last digit
_OTHER_COVERAGE = 0.02  # in what an interval spans, too much for rounding
_FEW = 5  # quantiles that are listed one by one
_SMALL_GAIN = 0.01  # of the loss: what recalibration saves is not worth the trouble


class Claim(NamedTuple):
    """A statement of the file, and how often it came true.

    Attributes:
        name: the column or columns.
        kind: `"interval"`, `"set"`, `"quantile"` or `"event"`.
        promised: how often it should come true; of an event, its mean probability.
        observed: how often it did.
        standard_error: of `observed`.
        p_value: how often a claim that holds looks as bad as this, or worse.
        size: mean width of the intervals, or mean number of classes in the sets; NaN for the others.
    """

    name: str
    kind: str
    promised: float
    observed: float
    standard_error: float
    p_value: float
    size: float = float("nan")


class WrittenLogScore(NamedTuple):
    """The column `log_score` against the log scores that the other columns imply, mean by mean, in nats."""

    written: float
    implied: float
    difference: float
    standard_error: float
    agrees: bool


class Finding(NamedTuple):
    """One sentence of the verdict; `is_good` is None where it is a remark."""

    sentence: str
    is_good: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionsAudit:
    """What `audit` returns.

    Attributes:
        target: the column predicted.
        source: what was read as predictions, in words.
        coverage: nominal coverage of intervals and sets.
        rows: how many were scored.
        left_out: how many have no target.
        scores: all scores, decompositions and pictures; see `score_predictions`.
        claims: intervals, sets, quantiles and events as written.
        events: reliability diagram of each `probability_above_T` column, by its name.
        log_score: the written log scores against the implied; None without such a column.
        findings: the verdict, sentence by sentence, the most important first.
        advice: what to do.
        files: what was written, by role.
    """

    target: str
    source: str
    coverage: float
    rows: int
    left_out: int
    scores: Scores
    claims: tuple[Claim, ...]
    events: dict[str, ReliabilityDiagram]
    log_score: WrittenLogScore | None
    findings: tuple[Finding, ...]
    advice: str
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether nothing was found that speaks against the predictions."""
        return all(found.is_good is not False for found in self.findings)

    @property
    def verdict(self) -> tuple[str, ...]:
        """The findings and the advice as sentences."""
        return (*(found.sentence for found in self.findings), self.advice)

    @property
    def table(self) -> pd.DataFrame:
        """A row per score."""
        return self.scores.table

    @property
    def stated(self) -> tuple[Claim, ...]:
        """The claims that a page has room for: without quantiles where they are many."""
        few = [claim for claim in self.claims if claim.kind != "quantile"]
        return self.claims if len(self.claims) - len(few) <= _FEW else tuple(few)

    @property
    def claim_table(self) -> pd.DataFrame:
        """A row per claim of the file."""
        return pd.DataFrame([claim._asdict() for claim in self.claims], columns=Claim._fields)

    def summary(self) -> dict[str, Any]:
        """What `--json` prints: plain numbers and texts."""
        keys = ("target", "source", "coverage", "rows", "left_out", "is_good", "advice", "files")
        kept = ["score", "component", "value", "standard_error", "by_chance", "p_value"]
        return {key: getattr(self, key) for key in keys} | {
            "verdict": list(self.verdict),
            "scores": {s.name: {"value": s.value, "standard_error": s.standard_error} for s in self.scores.scores},
            "decomposition": self.scores.decomposition[kept].astype(object).to_dict("records"),
            "claims": [claim._asdict() for claim in self.claims],
            "log_score_as_written": None if self.log_score is None else self.log_score._asdict(),
        }

    def __str__(self) -> str:
        parts = ["\n".join(self.verdict), self.table.to_string(index=False, float_format="%.4g")]
        if self.claims:
            parts.append(self.claim_table.to_string(index=False, float_format="%.4g", na_rep=""))
        parts.append(self.scores.decomposition.to_string(index=False, float_format="%.4g", na_rep=""))
        return "\n\n".join(parts)


def audit(
    frame: pd.DataFrame,
    target: str,
    *,
    probability: str | Sequence[str] | Mapping[Any, str] = (),
    quantiles: Sequence[str] | Mapping[float, str] | None = None,
    samples: str | None = None,
    coverage: float = 0.9,
    groups: str | None = None,
    time: str | None = None,
    key: Any = None,
) -> PredictionsAudit:
    """Hold predictions in the columns of a table against what happened.

    Without a mapping, the columns that `predict` writes are looked for: `probability_LABEL` for classes, `quantile_Q`
    for numbers, or else `mean` and `std`, which are read as a Normal. `lower` and `upper`, `prediction_set`,
    `probability_above_T` and `log_score` are checked wherever they stand.

    Args:
        frame: predictions beside what happened, one row each. Rows where the target is missing are left out.
        target: the column with what happened.
        probability: one column, the probability that a two-valued target is its second value (the larger, true, or
            last in the alphabet); or columns by class, as a mapping or as texts `LABEL=COLUMN`.
        quantiles: columns by level, as a mapping or as texts `LEVEL=COLUMN`, two or more.
        samples: how the names of columns begin that hold draws.
        coverage: what `lower` and `upper` or `prediction_set` promise.
        groups: a column; rows of one group may depend on each other (for standard errors and coverage).
        time: a column; rows are a series in its order (likewise).
        key: a `jax.random.key` for what is resampled; the same one whenever none is given.

    Returns:
        A `PredictionsAudit`: a verdict in sentences, scores, claims, pictures.

    Raises:
        InputError: columns that are not there or not told apart, predictions that are not finite or no probabilities,
            outcomes without a probability; the message names the row, counted from 0.

    >>> table = pd.DataFrame({"rain": [0, 1, 0, 1] * 25, "p": [0.2, 0.8, 0.3, 0.7] * 25})
    >>> found = audit(table, "rain", probability="p")
    >>> round(found.scores["brier"], 3), found.is_good  # it rained whenever 70% or 80% was said
    (0.13, False)
    """
    coverage = check_coverage(coverage)
    reading = read_predictions(frame, target, ColumnMap(probability, quantiles, samples))
    kept = frame.rename(columns=str).iloc[reading.rows]
    dependence = dependence_of(kept, groups, time)
    scores = score_predictions(
        reading.predictive,
        None,
        reading.y,
        coverage=coverage,
        quantile_levels=reading.levels if quantiles else None,
        key=key,
        **dependence,
    )
    claims, events = _claims(kept, reading, coverage, dependence, key)
    written = _written_log_score(kept, reading)
    findings, advice = _judge(scores, claims, coverage, dependence)
    findings += _remarks(kept, reading, claims, coverage, written)
    if reading.left_out:
        findings.append(Finding(f"{reading.left_out} rows without a value of {target!r} were left out."))
    rows = len(reading.rows)
    return PredictionsAudit(
        target,
        reading.source,
        coverage,
        rows,
        reading.left_out,
        scores,
        tuple(claims),
        events,
        written,
        tuple(findings),
        advice,
    )


# ---- claims --------------------------------------------------------------------------------------------------------


def _claims(
    frame: pd.DataFrame, reading: Reading, coverage: float, dependence: dict[str, Any], key: Any
) -> tuple[list[Claim], dict[str, ReliabilityDiagram]]:
    """What the file says beside its distributions, against what happened."""
    if reading.sets is not None:
        hits = np.array([y in held for y, held in zip(reading.y, reading.sets, strict=True)], float)
        size = float(np.mean([len(held) for held in reading.sets]))
        return [_rate("prediction_set", "set", hits, coverage, "less", dependence, size)], {}
    if reading.predictive.classes is not None:
        return [], {}
    claims, events, y = [], {}, reading.y
    if {"lower", "upper"} <= set(frame.columns):
        lower, upper = (reading.numbers(frame, name) for name in ("lower", "upper"))
        reading.refuse(lower > upper, np.stack([lower, upper], 1), "has a lower above its upper: swap the columns")
        inside = ((lower <= y) & (y <= upper)).astype(float)
        size = float((upper - lower).mean())
        claims.append(_rate("lower to upper", "interval", inside, coverage, "two-sided", dependence, size))
    for name, threshold in reading.thresholds.items():
        said = reading.numbers(frame, name)
        reading.refuse((said < -1e-9) | (said > 1 + 1e-9), said[:, None], f"has no probability in {name!r}")
        hit = (y > threshold).astype(float)
        diagram = reliability_diagram(np.clip(said, 0, 1), hit, key=key, **dependence)
        events[name] = diagram
        error = float(mean_error(hit, **dependence).standard_error)
        claims.append(Claim(name, "event", float(said.mean()), float(hit.mean()), error, diagram.p_value))
    for level, values in zip(reading.levels if reading.levels is not None else (), reading.values.T, strict=True):
        # Outcomes that equal a quantile count as below or above it, whichever is kinder: of counts many do.
        below, reached = (y < values).astype(float), (y <= values).astype(float)
        if reached.mean() < level:
            claim = _rate(f"quantile {level:g}", "quantile", reached, level, "less", dependence)
        elif below.mean() > level:
            claim = _rate(f"quantile {level:g}", "quantile", below, level, "greater", dependence)
        else:
            error = float(mean_error(reached, **dependence).standard_error)
            claim = Claim(f"quantile {level:g}", "quantile", level, float(level), error, 0.5)
        claims.append(claim._replace(p_value=min(1.0, 2 * claim.p_value)))
    return claims, events


def _rate(
    name: str,
    kind: str,
    hits: np.ndarray,
    promised: float,
    alternative: str,
    dependence: dict[str, Any],
    size: float = float("nan"),
) -> Claim:
    """How often something happened against how often it was said to: exact for independent rows, else a t test."""
    error, observed = mean_error(hits, **dependence), float(hits.mean())
    spread = float(error.standard_error)
    if all(value is None for value in dependence.values()) or spread == 0:
        independent = error.method == "independent rows"
        count = len(hits) if independent else int(error.degrees_of_freedom) + 1
        chance = stats.binomtest(round(observed * count), count, promised, alternative).pvalue
    else:
        statistic, degrees = (observed - promised) / spread, error.degrees_of_freedom
        one_sided = {"less": stats.t.cdf(statistic, degrees), "greater": stats.t.sf(statistic, degrees)}
        chance = one_sided.get(alternative, 2 * stats.t.sf(abs(statistic), degrees))
    return Claim(name, kind, float(promised), observed, spread, float(chance), size)


def _written_log_score(frame: pd.DataFrame, reading: Reading) -> WrittenLogScore | None:
    """Whether the column `log_score` is the log score of the distributions beside it."""
    distribution = reading.predictive(None)
    if "log_score" not in frame.columns or isinstance(distribution, Empirical):
        return None
    classes = reading.predictive.classes
    if classes is None:
        implied = log_score(distribution, reading.y, rounding_step(reading.y))
    else:
        codes = pd.Index(classes, dtype=object).get_indexer(reading.y)
        with np.errstate(divide="ignore"):
            implied = np.log(np.asarray(distribution.probs, np.float64)[np.arange(len(codes)), codes])
    written = pd.to_numeric(frame["log_score"], errors="coerce").to_numpy(float)
    known = np.isfinite(written) & np.isfinite(implied)
    if known.sum() < 2:
        return None
    written, implied = written[known], implied[known]
    difference = float((written - implied).mean())
    error = float(mean_error(written - implied).standard_error)
    agrees = abs(difference) <= _AGREE[classes is not None] + 2 * error
    return WrittenLogScore(float(written.mean()), float(implied.mean()), difference, error, agrees)


# ---- verdict -------------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for their number by the procedure of Holm (1979): rejected where at most the level.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def main_decomposition(scores: Scores) -> ScoreDecomposition:
    """The decomposition by which calibration is tested: of the event for two classes, which is resampled most."""
    return scores.reliability.decomposition if scores.decision_curve is not None else scores.decompositions[0]


def judge_scores(
    scores: Scores, p_value: float | None = None, *, groups: Any = None, time: Any = None
) -> list[Finding]:
    """Whether predictions are calibrated, and whether they tell rows apart.

    Args:
        scores: what `score_predictions` returned.
        p_value: of calibration, adjusted for other tests made beside it; that of the decomposition by default.
        groups: labels of rows that may depend on each other.
        time: times of rows of a series.
    """
    found = main_decomposition(scores)
    loss = {"brier": "Brier loss", "crps": "CRPS"}[found.score]
    p_value = found.p_value if p_value is None else p_value
    if p_value > SIGNIFICANT:
        calibrated = Finding(
            "Nothing speaks against calibration: calibrated predictions of as many rows look as miscalibrated as these "
            f"or more with a probability of {found.p_value:.2g}.",
            True,
        )
    else:
        calibrated = Finding(
            "The predictions are miscalibrated: calibrated ones would look this bad with a probability of "
            f"{found.p_value:.2g} at most. Recalibrated, they would lose about {_gain(found):.1%} less by {loss}.",
            False,
        )
    # A CRPS of many rows was decomposed on evenly spaced ones.
    index = np.linspace(0, scores.rows - 1, len(found.by_row)).round().astype(int)
    groups, time = (None if labels is None else np.asarray(labels)[index] for labels in (groups, time))
    saved = mean_error(found.by_row[:, 2] - found.by_row[:, 0], groups=groups, time=time)
    skill, error = (v / max(found.uncertainty, 1e-300) for v in (found.uncertainty - found.loss, saved.standard_error))
    shown = f"{abs(skill):.0%} ± {error:.0%}"
    if skill > 2 * error:
        sentence = f"They tell rows apart: by {loss}, {shown} better than one forecast for all."
        return [calibrated, Finding(sentence, True)]
    if skill < -2 * error:
        sentence = f"One forecast for all rows, their average, would do better than these, by {shown} of its {loss}."
        return [calibrated, Finding(sentence, False)]
    return [calibrated, Finding(f"By {loss} they are not clearly better than one forecast for all rows.", None)]


def _gain(found: ScoreDecomposition) -> float:
    """Share of the loss that recalibration saves, less what it would seem to save by chance."""
    return max(found.miscalibration - found.expected_miscalibration, 0.0) / max(found.loss, 1e-300)


def _judge(
    scores: Scores, claims: list[Claim], coverage: float, dependence: dict[str, Any]
) -> tuple[list[Finding], str]:
    """Findings on calibration, discrimination and claims, and what to do."""
    found = main_decomposition(scores)
    # Quantiles are what the distributions are made of, which the first question is about.
    judged = [claim for claim in claims if claim.kind != "quantile"]
    adjusted = holm([claim.p_value for claim in judged]) if judged else np.zeros(0)
    questions = holm([found.p_value, adjusted.min()]) if judged else np.array([found.p_value])
    # Each claim is judged as if it were the only one beside calibration: it has paid for the others already.
    adjusted = [holm([found.p_value, p_value])[1] for p_value in adjusted]
    findings = judge_scores(scores, float(questions[0]), **dependence)
    broken = []
    for claim, p_value in zip(judged, adjusted, strict=True):
        is_kept = p_value > SIGNIFICANT
        broken += [] if is_kept else [claim]
        findings.append(Finding(_sentence(claim, is_kept), bool(is_kept)))
    if any(value is not None for value in dependence.values()):
        findings.append(
            Finding("The test of calibration takes rows as independent: where they are not, its p-value is too small.")
        )
    count = scores.rows
    if dependence["groups"] is not None or dependence["time"] is not None:
        count = len(np.unique(next(v for v in dependence.values() if v is not None)))
    margin = 1.96 * np.sqrt(coverage * (1 - coverage) / count)
    if questions[0] <= SIGNIFICANT and (_gain(found) >= _SMALL_GAIN or broken):
        advice = "Recalibrate them, on rows that were not trained on."
    elif broken:
        advice = f"Recalibrate what {broken[0].name} says, on rows that were not trained on."
    elif questions[0] <= SIGNIFICANT:
        advice = "Nothing needs to be done: the miscalibration is certain, but too small to matter."
    elif margin > _VAGUE:
        what = "rows" if count == scores.rows else "groups or times"
        advice = (
            f"Gather more rows before relying on this: {count} {what} leave a margin of {margin:.0%} on either side of "
            f"a coverage of {coverage:.0%}."
        )
    else:
        advice = "Nothing needs to be done."
    return findings, advice


def _sentence(claim: Claim, is_kept: bool) -> str:
    rate = f"{claim.observed:.1%} ± {claim.standard_error:.1%}"
    chance = f"p = {claim.p_value:.2g}"
    if claim.kind == "event":
        what = "came true as often as said" if is_kept else "did not come true as often as said, row by row"
        return f"{claim.name} {what}: {claim.promised:.1%} on average, and {rate} happened ({chance})."
    subject = "The sets of prediction_set" if claim.kind == "set" else "The intervals from lower to upper"
    least = "at least " if claim.kind == "set" else ""
    if is_kept:
        return f"{subject} held the truth in {rate} of rows; they promise {least}{claim.promised:.0%} ({chance})."
    side = "less" if claim.observed < claim.promised else "more"
    return f"{subject} held the truth in {rate} of rows, {side} than the {claim.promised:.0%} they promise ({chance})."


def _remarks(
    frame: pd.DataFrame, reading: Reading, claims: list[Claim], coverage: float, written: WrittenLogScore | None
) -> list[Finding]:
    """What else there is to know about the file."""
    found = [Finding(sentence, is_good) for sentence, is_good in reading.notes]
    if any(claim.kind == "interval" for claim in claims) and reading.levels is not None:
        lower, upper = (reading.numbers(frame, name) for name in ("lower", "upper"))
        distribution = reading.predictive(None)
        span = float(np.median(cdf(distribution, upper) - cdf(distribution, lower)))
        if abs(span - coverage) > _OTHER_COVERAGE:
            found.append(
                Finding(
                    f"By the quantile columns, lower to upper spans {span:.0%}, and was judged as {coverage:.0%}: if "
                    f"it was made for that, give the coverage {span:.2g}."
                )
            )
    if written is not None and written.agrees:
        found.append(Finding(f"log_score as written agrees with the other columns: {written.written:.3f} nats.", True))
    elif written is not None:
        negative = abs(written.written + written.implied) <= 0.1 + 2 * written.standard_error
        hint = "its sign is that of a loss" if negative else "it is of other predictions, or in other units"
        found.append(
            Finding(
                f"log_score as written is {written.written:.3f} nats, but the other columns imply "
                f"{written.implied:.3f}: {hint}.",
                False,
            )
        )
    return found
