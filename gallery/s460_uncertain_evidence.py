"""An uncertain report can be read in three ways, and the wrong reading costs calibration.

Claim: Jeffrey's rule, virtual evidence and distributional evidence answer different questions. Each gives the exact
posterior when the report came about as it assumes: intervals then have their nominal coverage and no other reading
scores better. Any other reading scores worse, and most lose coverage.

Here a latent x is seen through y, and a report about y arrives:
- virtual: an instrument reads y with noise of its own;
- jeffrey: an expert states what they believe about y after such a reading, their prior for y included;
- distributional: y itself is stated, along with a spread that says nothing about x.

Source: A. Munk, A. Mead, F. Wood, "Uncertain evidence in probabilistic models and stochastic simulators" (2023).
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
from scipy.stats import norm

from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel
from bayeslens.core.uncertain_evidence import update_on_uncertain_evidence
from bayeslens.gallery import Evidence

PAPER = "S460"
CLAIM = "A reading of uncertain evidence is exact for reports that came about as it assumes; the others do worse."
NOT_CHECKED = "The paper's simulators; here a discrete network and a linear-Gaussian model, where all is exact."
update = jax.jit(update_on_uncertain_evidence, static_argnums=3)
RULES = ("jeffrey", "virtual", "distributional")
NOISE, SPREAD = 0.8, 1.2  # of y given x, and of the report about y; x is standard normal

# Burglary and earthquake set off an alarm; somebody is 70% sure to have heard it.
BURGLARY, EARTHQUAKE, HEARD = np.array([0.95, 0.05]), np.array([0.9, 0.1]), np.array([0.3, 0.7])
ALARM = np.array([[[0.99, 0.01], [0.7, 0.3]], [[0.1, 0.9], [0.05, 0.95]]])


def burglary_by_library(rule: str) -> float:
    """The probability of a burglary."""
    prior = FiniteKernel.state(BURGLARY) @ FiniteKernel.state(EARTHQUAKE)
    alarm, report = FiniteKernel(ALARM, source_ndim=2), FiniteKernel.state(HEARD)
    return float(update(prior, alarm, report, rule).marginal(0).probs[1])


def burglary_by_enumeration(rule: str) -> float:
    """The same, by the paper's formulas, state by state."""
    weights = np.zeros(2)
    evidence = np.einsum("b,e,bea->a", BURGLARY, EARTHQUAKE, ALARM)
    for b, e in itertools.product(range(2), range(2)):
        rows = ALARM[b, e]
        factor = {
            "jeffrey": sum(HEARD[a] * rows[a] / evidence[a] for a in range(2)),
            "virtual": sum(HEARD[a] * rows[a] for a in range(2)),
            "distributional": rows[0] ** HEARD[0] * rows[1] ** HEARD[1],
        }
        weights[b] += BURGLARY[b] * EARTHQUAKE[e] * factor[rule]
    return float(weights[1] / weights.sum())


def report(made_by: str, y: float, noise: float) -> tuple[float, float]:
    """Mean and standard deviation of the report, given y and the standard normal noise of the reading."""
    reading = y + SPREAD * noise
    if made_by == "jeffrey":  # the expert's posterior for y, whose prior is N(0, 1 + NOISE^2)
        shrink = (1 + NOISE**2) / (1 + NOISE**2 + SPREAD**2)
        return shrink * reading, SPREAD * shrink**0.5
    return (reading if made_by == "virtual" else y), SPREAD


def coverage_and_score(read_as: str, made_by: str) -> tuple[float, float]:
    """How often the central 90% interval holds x, and the expected log density of x: exactly, as all is linear."""

    def posterior(y, noise):
        mean, deviation = report(made_by, y, noise)
        state = update(
            LinearGaussianKernel(np.zeros((1, 0)), [0.0], [[1.0]]),
            LinearGaussianKernel([[1.0]], [0.0], [[NOISE]]),
            LinearGaussianKernel(np.zeros((1, 0)), [mean], [[deviation]]),
            read_as,
        )
        return float(state.mean[0]), float(state.covariance[0, 0])

    (by_y, variance), (by_noise, _) = posterior(1.0, 0.0), posterior(0.0, 1.0)
    error = (1 - by_y) ** 2 + (by_y * NOISE) ** 2 + by_noise**2  # variance of x less the posterior mean
    coverage = 2 * norm.cdf(norm.ppf(0.95) * (variance / error) ** 0.5) - 1
    return float(coverage), float(-(np.log(2 * np.pi * variance) + error / variance) / 2)


def check(*, control: bool = False) -> Evidence:
    """The three rules by enumeration and their coverage; the control reads each report by the next rule."""
    rotated = dict(zip(RULES, RULES[1:] + RULES[:1], strict=True)) if control else {rule: rule for rule in RULES}
    with jax.enable_x64(True):
        table = max(abs(burglary_by_library(rotated[rule]) - burglary_by_enumeration(rule)) for rule in RULES)
        cells = {(a, b): coverage_and_score(a, b) for a in RULES for b in RULES}
    numbers = {"burglary, against enumeration": table}
    numbers |= {f"coverage of {a} for reports made as {b}": cell[0] for (a, b), cell in cells.items()}
    numbers |= {f"log score of {a} for reports made as {b}": cell[1] for (a, b), cell in cells.items()}
    others = [(a, b) for b in RULES for a in RULES if a != rotated[b]]
    matched = max(abs(cells[rotated[b], b][0] - 0.9) for b in RULES)
    lost = sum(abs(cells[pair][0] - 0.9) > 0.02 for pair in others)
    worse = min(cells[rotated[b], b][1] - cells[a, b][1] for a, b in others)
    numbers |= {"matched: largest error of coverage": matched, "mismatched: smallest loss of log score": worse}
    shown = (
        f"enumeration agrees to {table:.1e}; read as it was made, a report gives 90% intervals that cover 90% (error "
        f"{matched:.1e}); {lost} of 6 other readings miss by over 2%, down to {min(c for c, _ in cells.values()):.0%}, "
        f"and all lose at least {worse:.3f} nats"
    )
    # That the exact posterior scores best is Gibbs' inequality. One wrong reading keeps its coverage: Jeffrey's rule
    # takes an instrument's reading at face value, which is wider than need be but right on average.
    return Evidence(bool(table < 1e-12 and matched < 1e-10 and lost >= 4 and worse > 1e-3), shown, numbers)
