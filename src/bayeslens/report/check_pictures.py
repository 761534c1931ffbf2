"""Pictures of posterior checks: ranks, expected coverage, replicated data, power scaling."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from bayeslens.report.pictures import ACCENT, ALERT, INK, MUTED, Panel, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bayeslens.evaluation.checking import CalibrationChecks, PosteriorChecks
    from bayeslens.evaluation.classifier_tests import LocalClassifierTwoSampleTest
    from bayeslens.evaluation.credible_coverage import ExpectedCoverage
    from bayeslens.evaluation.predictive_checks import PosteriorPredictiveCheck
    from bayeslens.evaluation.prior_sensitivity import PowerScaling
    from bayeslens.evaluation.rank_tests import SimulationBasedCalibration

_MAX_PANELS = 12
_MAX_LINES = 40
_SMALL = (3.6, 2.7)


def calibration_check_panels(found: SimulationBasedCalibration) -> list[Panel]:
    """For each quantity, the empirical distribution of its ranks less the uniform one; those that look worst first."""
    order = np.argsort(found.tests.adjusted_p_value, kind="stable")
    return [
        Panel(found.names[i], functools.partial(_ranks, found=found, i=int(i)), _SMALL) for i in order[:_MAX_PANELS]
    ]


def _ranks(axes: Axes, found: SimulationBasedCalibration, i: int) -> None:
    level = (found.ranks[:, i] + 0.5) / (found.draws + 1)
    _ecdf_difference(axes, level, found.draws + 1, found.coverage, found.tests.adjusted_p_value[i] <= 0.05)
    p = found.tests.adjusted_p_value[i]
    axes.text(
        0.98, 0.95, f"adjusted p = {p:.2g}", transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=8
    )
    axes.set(xlabel="Rank among draws, as a share", ylabel="ECDF less uniform")


def _ecdf_difference(axes: Axes, level: np.ndarray, size: int, coverage: float, wrong: bool) -> None:
    """An empirical distribution less the uniform one, on the band that holds all of it with a known probability."""
    from bayeslens.evaluation.rank_tests import uniform_ecdf

    uniform = uniform_ecdf(len(level), size)
    lower, upper = uniform.band(coverage)
    at = uniform.probability
    x = np.concatenate([[0], at, [1]])
    low, high = (np.concatenate([[0], v - at, [0]]) for v in (lower, upper))
    axes.fill_between(x, low, high, color=MUTED, alpha=0.22, lw=0, label=f"if right, {100 * coverage:.0f}%")
    axes.axhline(0, color=MUTED, lw=1, ls=(0, (4, 3)))
    share = np.searchsorted(np.sort(level), at) / len(level) - at
    axes.plot(x, np.concatenate([[0], share, [0]]), color=ALERT if wrong else ACCENT, lw=1.6)
    top = 1.35 * max(np.abs(share).max(), np.abs(np.concatenate([low, high])).max())
    axes.set(xlim=(0, 1), ylim=(-top, top))


def coverage_panels(found: ExpectedCoverage) -> list[Panel]:
    """Expected coverage against credibility, with its simultaneous band, and the difference of the two."""
    kind = found.method.split(":")[0]
    return [
        Panel(f"{kind}: expected coverage", functools.partial(_coverage, found=found, less=False)),
        Panel("Coverage less credibility", functools.partial(_coverage, found=found, less=True)),
    ]


def _coverage(axes: Axes, found: ExpectedCoverage, less: bool) -> None:
    x, curve = found.credibility, found.coverage
    base = x if less else 0
    lower, upper = found.band
    axes.fill_between(
        x,
        lower - base,
        upper - base,
        color=MUTED,
        alpha=0.22,
        lw=0,
        label=f"if right, {100 * found.band_coverage:.0f}%",
    )
    axes.plot((0, 1), (0, 0 if less else 1), color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.plot(x, curve - base, color=ALERT if found.p_value <= 0.05 else ACCENT, lw=1.8, label="observed")
    axes.set(
        xlim=(0, 1), xlabel="Credibility of the region", ylabel="Coverage less credibility" if less else "Coverage"
    )
    if less:
        top = 1.35 * max(np.abs(curve - x).max(), np.abs(np.concatenate([lower, upper]) - np.tile(x, 2)).max())
        axes.set_ylim(-top, top)
        text = f"p = {found.p_value:.2g}"
        axes.text(0.98, 0.95, text, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=9)
    else:
        axes.set_ylim(0, 1)
        axes.legend(loc="upper left", frameon=False, fontsize=8)


def predictive_panels(found: PosteriorPredictiveCheck) -> list[Panel]:
    """Observed beside replicated data, each statistic, and LOO-PIT where there is one."""
    drawn = [Panel("Observed and replicated data", functools.partial(_densities, found=found), _SMALL)]
    order = np.argsort(np.minimum(found.p_values, 1 - found.p_values), kind="stable")
    drawn += [Panel(found.names[i], functools.partial(_statistic, found=found, i=int(i)), _SMALL) for i in order]
    if found.loo_pit is not None:
        drawn.insert(1, Panel("Leave-one-out PIT", functools.partial(_loo_pit, found=found), _SMALL))
    return drawn[:_MAX_PANELS]


def _densities(axes: Axes, found: PosteriorPredictiveCheck) -> None:
    """Densities, or shares of counts, of some replicated data sets and of the observed one."""
    chosen = np.linspace(0, len(found.replicated) - 1, min(_MAX_LINES, len(found.replicated))).astype(int)
    lines = found.replicated[chosen]
    whole = (found.data == found.data.round()).all() and (lines == lines.round()).all()
    low, high = np.quantile(np.concatenate([lines.ravel(), found.data]), [0.001, 0.999])
    low, high = min(low, found.data.min()), max(high, found.data.max())
    if whole and high - low <= 60:
        edges = np.arange(np.floor(low), np.ceil(high) + 2) - 0.5
    else:
        edges = np.linspace(low, high, int(np.clip(2 * len(found.data) ** (1 / 3), 8, 40)) + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    for line in lines:
        axes.plot(middle, np.histogram(line, edges)[0] / width / len(line), color=MUTED, lw=0.6, alpha=0.4)
    axes.plot(
        middle, np.histogram(found.data, edges)[0] / width / len(found.data), color=ACCENT, lw=2, label="observed"
    )
    axes.plot([], [], color=MUTED, lw=1, label="replicated")
    axes.set(ylim=(0, None), xlabel="Value", ylabel="Density")
    axes.legend(loc="upper right", frameon=False, fontsize=8)


def _statistic(axes: Axes, found: PosteriorPredictiveCheck, i: int) -> None:
    values, observed, p = found.replicated_statistics[:, i], found.observed[i], found.p_values[i]
    low, high = min(values.min(), observed), max(values.max(), observed)
    axes.hist(values, 30, range=(low, high) if high > low else None, color=MUTED, alpha=0.5, lw=0)
    axes.axvline(observed, color=ALERT if min(p, 1 - p) < 0.025 else ACCENT, lw=2)
    side = (0.02, "left") if observed > (low + high) / 2 else (0.98, "right")
    axes.text(side[0], 0.95, f"p = {p:.2g}", transform=axes.transAxes, ha=side[1], va="top", color=INK, fontsize=8)
    axes.set(xlabel=f"{plain(found.names[i])}: replicated, observed as line", ylabel="Draws")


def _loo_pit(axes: Axes, found: PosteriorPredictiveCheck) -> None:
    wrong = found.loo_pit_p_value <= 0.05
    _ecdf_difference(axes, found.loo_pit, 1000, 0.95, wrong)
    text = f"p = {found.loo_pit_p_value:.2g}"
    axes.text(0.98, 0.95, text, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=8)
    axes.set(xlabel="Probability of at most the observation", ylabel="ECDF less uniform")


def power_scaling_panels(found: PowerScaling) -> list[Panel]:
    """Mean and standard deviation of each quantity as prior or likelihood count more; the most sensitive first."""
    order = np.argsort(-np.maximum(found.prior, 0), kind="stable")[:_MAX_PANELS]
    return [Panel(found.names[i], functools.partial(_powers, found=found, i=int(i)), _SMALL) for i in order]


def _powers(axes: Axes, found: PowerScaling, i: int) -> None:
    at = np.arange(len(found.powers))
    for path, color, label, shift in (
        (found.prior_path, ALERT, f"prior, sensitivity {found.prior[i]:.2f}", -0.08),
        (found.likelihood_path, ACCENT, f"likelihood, {found.likelihood[i]:.2f}", 0.08),
    ):
        mean, spread = path[:, i].T
        axes.errorbar(
            at + shift, mean, spread, color=color, lw=1.6, elinewidth=1, capsize=2, marker="o", ms=3, label=label
        )
    axes.set_xticks(at, [f"{p:g}" for p in found.powers])
    bottom, top = axes.get_ylim()
    axes.set(
        xlabel="Power of prior or likelihood",
        ylabel="Mean ± standard deviation",
        ylim=(bottom, top + 0.3 * (top - bottom)),
    )
    axes.legend(loc="upper left", frameon=False, fontsize=8)


def local_test_panels(found: LocalClassifierTwoSampleTest) -> list[Panel]:
    """The statistic on its null distribution, and what the classifier says of each draw."""
    return [
        Panel("Local classifier two-sample test", functools.partial(_local, found=found)),
        Panel("Probability of a draw of the approximation", functools.partial(_probabilities, found=found)),
    ]


def _local(axes: Axes, found: LocalClassifierTwoSampleTest) -> None:
    axes.hist(found.null, 30, color=MUTED, alpha=0.5, lw=0)
    axes.axvline(found.statistic, color=ALERT if found.p_value <= 0.05 else ACCENT, lw=2)
    text = f"p = {found.p_value:.2g}"
    axes.text(0.98, 0.95, text, transform=axes.transAxes, ha="right", va="top", color=INK, fontsize=9)
    axes.set(xlabel="Mean of (probability - 1/2)²: null, observed as line", ylabel="Trials")


def _probabilities(axes: Axes, found: LocalClassifierTwoSampleTest) -> None:
    axes.hist(found.probabilities, 30, range=(0, 1), color=ACCENT, alpha=0.8, lw=0)
    axes.axvline(0.5, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.set(xlim=(0, 1), xlabel="Above 1/2 the approximation has too much mass", ylabel="Draws")


def calibration_checks_panels(found: CalibrationChecks) -> list[Panel]:
    """Ranks of every quantity, and coverage around random points."""
    return [*calibration_check_panels(found.calibration), *coverage_panels(found.coverage)]


def posterior_checks_panels(found: PosteriorChecks) -> list[Panel]:
    """Replicated data against the data, and what powers of prior and likelihood do."""
    return [*predictive_panels(found.predictive), *power_scaling_panels(found.sensitivity)]
