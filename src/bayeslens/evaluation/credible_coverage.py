"""Expected coverage: how often credible regions of a posterior hold the parameters that made the data.

Sources: J. Hermans et al., "A trust crisis in simulation-based inference? Your posterior approximations can be
unfaithful" (2022), for highest-density regions; D. Zhao, N. Dalmasso, R. Izbicki, A. Lee, "Diagnostics for conditional
density models and Bayesian inference algorithms" (2021), for their ranks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator
from bayeslens.evaluation.rank_tests import (
    RankTests,
    judged_ranks,
    ranks_of_all,
    refuse_simulation,
    uniform_ecdf,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class ExpectedCoverage:
    """Credibility of regions, and how often they hold the truth.

    Attributes:
        method: what the regions are.
        ranks: how many draws lie strictly deeper inside the regions than the truth, shape (simulations,).
        draws: how many draws there were.
        tests: of the ranks, see `RankTests`, with one entry.
        band_coverage: probability that the band holds the whole curve, if the posterior is right.
        note: what this test cannot see; empty if nothing.
    """

    method: str
    ranks: Int[np.ndarray, " simulations"]
    draws: int
    tests: RankTests
    band_coverage: float = 0.95
    note: str = ""

    @property
    def credibility(self) -> Float[np.ndarray, " levels"]:
        """Of the regions, increasing from 0 to 1."""
        return np.concatenate([[0.0], uniform_ecdf(len(self.ranks), self.draws + 1).probability, [1.0]])

    @property
    def coverage(self) -> Float[np.ndarray, " levels"]:
        """Share of simulations whose truth the region of this credibility holds."""
        cuts = uniform_ecdf(len(self.ranks), self.draws + 1).cuts
        return np.concatenate([[0.0], np.searchsorted(np.sort(self.ranks), cuts) / len(self.ranks), [1.0]])

    @property
    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """Between which shares the whole curve lies with probability `band_coverage`, if the posterior is right."""
        lower, upper = uniform_ecdf(len(self.ranks), self.draws + 1).band(self.band_coverage)
        return np.concatenate([[0.0], lower, [1.0]]), np.concatenate([[0.0], upper, [1.0]])

    @property
    def p_value(self) -> float:
        """Of location, spread and empirical distribution of the ranks together."""
        return self.tests.joint

    @property
    def table(self) -> pd.DataFrame:
        """Coverage of the regions of nine credibilities, with binomial standard errors."""
        import pandas as pd

        credibility = np.arange(1, 10) / 10
        cuts = np.round(credibility * (self.draws + 1))
        share = np.searchsorted(np.sort(self.ranks), cuts) / len(self.ranks)
        return pd.DataFrame(
            {
                "credibility": cuts / (self.draws + 1),
                "coverage": share,
                "standard_error": np.sqrt(share * (1 - share) / len(self.ranks)),
                "standard_error_if_right": np.sqrt(credibility * (1 - credibility) / len(self.ranks)),
            }
        )

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.p_value > 0.05:
            return f"No sign of a wrong posterior in {len(self.ranks)} simulations (p = {self.p_value:.2g})."
        gap = (self.coverage - self.credibility).mean()
        kind = "hold the truth too seldom" if gap < 0 else "hold the truth too often"
        return f"The posterior is wrong (p = {self.p_value:.2g}): on average its regions {kind}."

    def __str__(self) -> str:
        text = f"{self.method}\n{self.table.to_string(index=False, float_format='%.3f')}\n{self.verdict}"
        return f"{text}\nNote: {self.note}" if self.note else text


def coverage_of(
    depth: Float[np.ndarray, "simulations items"], method: str, *, key: Any, band_coverage: float, note: str = ""
) -> ExpectedCoverage:
    """Coverage of regions that hold items in increasing order of `depth`; the truth is the first item.

    Args:
        depth: of the truth and of all draws.
        method: what the regions are.
        key: a `jax.random.key`, of ties and of the null distribution.
        band_coverage: of the band.
        note: what the test cannot see.
    """
    rng = host_generator(key)
    ranks = ranks_of_all(depth[..., None], rng)
    return ExpectedCoverage(method, ranks[:, 0, 0], depth.shape[1] - 1, judged_ranks(ranks, rng), band_coverage, note)


def expected_coverage(
    log_prob_parameters: Float[np.ndarray, " simulations"],
    log_prob_draws: Float[np.ndarray, "simulations draws"],
    *,
    key: Any,
    band_coverage: float = 0.95,
) -> ExpectedCoverage:
    """Coverage of highest-density regions, from log densities of the truth and of draws under each posterior.

    A region of a wrong posterior may still cover as often as it says: the prior in place of the posterior does.
    `tarp` with references that depend on the data sees that.

    Args:
        log_prob_parameters: log density of each simulation's parameters under its posterior; any constant may be
            missing, such as the evidence.
        log_prob_draws: of that posterior's independent draws.
        key: a `jax.random.key`, of broken ties and the null distribution of the p-value.
        band_coverage: of the simultaneous band.

    Raises:
        InputError: shapes that do not fit, fewer than 20 simulations or 9 draws, or values that are not a number.

    >>> import jax
    >>> rng = np.random.default_rng(0)
    >>> truth, draws = rng.normal(size=200), 0.5 * rng.normal(size=(200, 99))  # posteriors half as wide as they should
    >>> found = expected_coverage(-2 * truth**2, -2 * draws**2, key=jax.random.key(0))
    >>> found.p_value < 0.01, bool(found.coverage[25] < 0.4)
    (True, True)
    """
    truth, draws = np.asarray(log_prob_parameters, np.float64), np.asarray(log_prob_draws, np.float64)
    if truth.ndim != 1 or draws.ndim != 2 or len(draws) != len(truth) or len(truth) < 20 or draws.shape[1] < 9:
        raise InputError(
            "need log densities of shape (simulations,) and (simulations, draws) with at least 20 simulations and 9 "
            f"draws, got {truth.shape} and {draws.shape}"
        )
    refuse_simulation(np.isnan(truth) | np.isnan(draws).any(1), "a log density", "is not a number")
    depth = -np.concatenate([truth[:, None], draws], 1)
    note = "highest-density regions of the prior cover as often as they say, whatever the data"
    return coverage_of(depth, "Highest-density regions", key=key, band_coverage=band_coverage, note=note)
