"""Simulation-based calibration: are posteriors of simulated data right, parameter by parameter and all together?

If parameters come from the prior and data from the model, then the parameters and the draws of their exact posterior
are exchangeable. Ranks of the former among the latter are uniform, and a test of any statistic of the ranks of all
parameters is exact when its null distribution is made by letting draws change places with the parameters: dependence
between parameters needs no correction.

Sources: S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman, "Validating Bayesian inference algorithms with
simulation-based calibration" (2018); M. Modrak et al., "Simulation-based calibration checking for Bayesian
computation: the choice of test quantities shapes sensitivity" (2023), for densities as test quantities; T. Sailynoja,
P.-C. Buerkner, A. Vehtari, "Graphical test for discrete uniformity" (2022), for the simultaneous bands; P. Westfall,
S. Young, "Resampling-based multiple testing" (1993), for the adjusted p-values.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special, stats

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator

if TYPE_CHECKING:
    import pandas as pd

    from bayeslens.evaluation.simulated_posteriors import SimulatedPosteriors

JOINT = "all parameters (Mahalanobis)"
_POINTS = 50  # where empirical distributions are compared with the uniform one
_MOST_DRAWS = 999  # ranks among more are no sharper at any number of simulations that is run
_EXCHANGES = 999
_LOOKED_AT = 40  # simulations from which the autocorrelation of draws is estimated


class RankTests(NamedTuple):
    """What ranks say, with one entry for each quantity.

    Location and spread are those of a parameter's posterior. Of the Mahalanobis distance, which is never negative, a
    positive location says that the posterior is too narrow.

    Attributes:
        location: mean of the parameters' normal scores: how far they lie above the draws, in posterior standard
            deviations.
        location_error: its standard error.
        spread: root mean square of the normal scores: what the posterior's standard deviation should be multiplied by.
            Above 1 the posterior is too narrow.
        spread_error: its standard error.
        p_location, p_spread: two-sided p-values; the second is of folded ranks |rank - 1/2|.
        p_ecdf: exact p-value of the empirical distribution of ranks leaving its simultaneous band.
        p_value: of the three together.
        adjusted_p_value: the same, for the quantity that looks worst among all (family-wise error rate).
        joint: p-value of all quantities together.
    """

    location: np.ndarray
    location_error: np.ndarray
    spread: np.ndarray
    spread_error: np.ndarray
    p_location: np.ndarray
    p_spread: np.ndarray
    p_ecdf: np.ndarray
    p_value: np.ndarray
    adjusted_p_value: np.ndarray
    joint: float


@dataclasses.dataclass(frozen=True)
class SimulationBasedCalibration:
    """Ranks of parameters among the draws of their posteriors, and what they say.

    Attributes:
        names: of the quantities.
        ranks: how many draws are below the parameter, from 0 to `draws`, shape (simulations, quantities).
        draws: how many draws they were ranked among, after thinning.
        tests: see `RankTests`.
        coverage: of the simultaneous bands in pictures.
    """

    names: tuple[str, ...]
    ranks: Int[np.ndarray, "simulations quantities"]
    draws: int
    tests: RankTests
    coverage: float

    @property
    def p_value(self) -> float:
        """Of all quantities together, whatever their dependence."""
        return self.tests.joint

    @property
    def table(self) -> pd.DataFrame:
        """One row per quantity."""
        import pandas as pd

        found = {"quantity": self.names} | self.tests._asdict()
        del found["joint"]
        return pd.DataFrame(found)

    @property
    def verdict(self) -> str:
        """One sentence."""
        simulations = len(self.ranks)
        if self.p_value > 0.05:
            return f"No sign of a wrong posterior in {simulations} simulations (p = {self.p_value:.2g})."
        worst = int(np.argmin(self.tests.adjusted_p_value))
        names = ("p_location", "p_spread", "p_ecdf")
        kind = int(np.argmin([getattr(self.tests, n)[worst] for n in names]))
        location, spread = self.tests.location[worst], self.tests.spread[worst]
        if self.names[worst] == JOINT and kind == 0:
            return f"The posterior is wrong (p = {self.p_value:.2g}): it is too {'narrow' if location > 0 else 'wide'}."
        said = (
            f"draws lie {abs(location):.2g} of their standard deviations too {'low' if location > 0 else 'high'}",
            f"draws are spread too {'narrowly' if spread > 1 else 'widely'}, by a factor of {spread:.2f}",
            "ranks are not uniform",
        )[kind]
        return f"The posterior is wrong (p = {self.p_value:.2g}), most clearly in {self.names[worst]}: {said}."

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format="%.3g") + "\n" + self.verdict


def simulation_based_calibration(
    parameters: Float[np.ndarray, "simulations parameters"] | SimulatedPosteriors,
    draws: Float[np.ndarray, "simulations draws parameters"] | None = None,
    *,
    key: Any,
    names: tuple[str, ...] | None = None,
    quantities: dict[str, Float[np.ndarray, "simulations items"]] | None = None,
    thin: int | None = None,
    coverage: float = 0.95,
) -> SimulationBasedCalibration:
    """Rank parameters among draws of their posteriors, and test whether the ranks are uniform.

    Each parameter is ranked; with two or more also the Mahalanobis distance from the draws' mean, which sees the
    spread in all directions at once. Three statistics look at each: the mean normal score (a shifted posterior), the
    mean square (folded ranks: a posterior of the wrong width), and the largest departure of the empirical distribution
    from uniformity (anything else). The p-values of all together hold their level exactly for independent draws: the
    null distribution is made of exchanges of parameters with draws.

    A posterior that is the prior passes for every parameter; give log likelihoods as `quantities` to see it
    (`simulate_posteriors` does).

    Args:
        parameters: that were drawn from the prior, or what `simulate_posteriors` returned.
        draws: of the posterior given the data of each simulation.
        key: a `jax.random.key`, of exchanges and broken ties.
        names: of parameters.
        quantities: name -> values of a further test quantity, which may depend on the data: those of the parameters
            in the first column, those of the draws in the others.
        thin: keep every so many draws. By default as many as are nearly independent, which is estimated; 1 for
            independent draws. At most 999 are used.
        coverage: of the simultaneous bands in pictures.

    Raises:
        InputError: shapes that do not fit, values that are not finite, fewer than 20 simulations or 9 draws.

    >>> import jax
    >>> rng = np.random.default_rng(0)
    >>> mean = rng.normal(size=(300, 2))
    >>> narrow = mean[:, None] + 0.6 * rng.normal(size=(300, 100, 2))
    >>> found = simulation_based_calibration(mean + rng.normal(size=(300, 2)), narrow, key=jax.random.key(0), thin=1)
    >>> found.p_value < 0.01, bool((found.tests.spread > 1.3).all())
    (True, True)
    """
    parameters, draws, names, quantities = _checked(parameters, draws, names, quantities)
    step = _stride(draws) if thin is None else int(thin)
    if step < 1:
        raise InputError(f"thin must be at least 1, got {thin}")
    kept = slice(None, None, max(step, -(-draws.shape[1] // _MOST_DRAWS)))
    draws = draws[:, kept]
    _check_draws(draws.shape[1])
    items = np.concatenate([parameters[:, None], draws], 1)
    columns = [items]
    if items.shape[2] > 1 and items.shape[1] > 4 * items.shape[2]:
        columns.append(mahalanobis(items)[..., None])
        names = (*names, JOINT)
    for name, values in quantities.items():
        columns.append(np.concatenate([values[:, :1], values[:, 1:][:, kept]], 1)[..., None])
        names = (*names, name)
    rng = host_generator(key)
    ranks = ranks_of_all(np.concatenate(columns, 2), rng)
    return SimulationBasedCalibration(names, ranks[:, 0], draws.shape[1], judged_ranks(ranks, rng), coverage)


def mahalanobis(items: Float[np.ndarray, "simulations items parameters"]) -> np.ndarray:
    """Squared distance of each item from the mean of all, in units of their covariance."""
    centred = items - items.mean(1, keepdims=True)
    scale = centred.std(1, keepdims=True)
    centred = centred / np.where(scale > 0, scale, 1)
    covariance = np.swapaxes(centred, 1, 2) @ centred / items.shape[1]
    root = np.linalg.cholesky(covariance + 1e-9 * np.eye(items.shape[2]))
    return (np.linalg.solve(root, np.swapaxes(centred, 1, 2)) ** 2).sum(1)


def ranks_of_all(items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rank of every item among all of its simulation, ties broken at random.

    Args:
        items: shape (simulations, items, quantities).
        rng: for ties.

    >>> ranks_of_all(np.array([[[3.0], [1.0], [2.0]]]), np.random.default_rng(0))[0, :, 0].tolist()
    [2, 0, 1]
    """
    columns = np.ascontiguousarray(np.swapaxes(items, 1, 2))
    order = columns.argsort(-1)
    ordered = np.take_along_axis(columns, order, -1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        order = np.lexsort((rng.random(columns.shape), columns))
    ranks = np.empty(order.shape, np.int32)
    np.put_along_axis(ranks, order, np.arange(order.shape[-1], dtype=np.int32), -1)
    return np.swapaxes(ranks, 1, 2)


def judged_ranks(ranks: Int[np.ndarray, "simulations items quantities"], rng: np.random.Generator) -> RankTests:
    """Tests of the ranks of the first item, whose null distribution is made by exchanging it with the others.

    Args:
        ranks: of every item among all of its simulation.
        rng: of the exchanges.
    """
    rows, size, count = ranks.shape
    score = special.ndtri((np.arange(size) + 0.5) / size)
    width = (score**2).mean()
    first = score[ranks[:, 0]]
    observed = _statistics(ranks[:, 0][None], size)
    pieces = [observed]
    at_once = max(1, int(2e6 / (rows * count)))
    for start in range(0, _EXCHANGES, at_once):
        chosen = rng.integers(size, size=(min(at_once, _EXCHANGES - start), rows))
        pieces.append(_statistics(ranks[np.arange(rows), chosen], size))
    p_values = np.concatenate(pieces)  # (1 + exchanges, quantities, statistics)
    least = p_values.min(2)
    # All quantities have the same null distribution: their exchanges are pooled.
    pool = np.sort(least[1:].ravel())
    alone = (1 + np.searchsorted(pool, least[0], "right") / count) / (_EXCHANGES + 1)
    worst = np.sort(least[1:].min(1))
    adjusted = (1 + np.searchsorted(worst, least[0], "right")) / (_EXCHANGES + 1)
    spread = np.sqrt((first**2).mean(0) / width)
    return RankTests(
        first.mean(0),
        first.std(0, ddof=1) / np.sqrt(rows),
        spread,
        (first**2).std(0, ddof=1) / width / (2 * np.maximum(spread, 1e-9) * np.sqrt(rows)),
        *observed[0].T,
        np.minimum(alone, 1.0),
        adjusted,
        float(adjusted.min()),
    )


def _statistics(ranks: np.ndarray, size: int) -> np.ndarray:
    """p-values of location, spread and empirical distribution; ranks (batch, simulations, quantities)."""
    batch, rows, count = ranks.shape
    score = special.ndtri((np.arange(size) + 0.5) / size)
    width = (score**2).mean()
    square = score**2 / width
    uniform = uniform_ecdf(rows, size)
    owner = (np.arange(batch)[:, None, None] * count + np.arange(count)) * size
    histogram = np.bincount((owner + ranks).ravel(), minlength=batch * count * size).reshape(-1, size)
    # Everything that is looked at is a sum over ranks.
    below = np.arange(size)[:, None] < uniform.cuts
    sums = histogram.astype(np.float64) @ np.column_stack([score, square, below])
    location = sums[:, 0] / np.sqrt(rows * width)
    shape = rows / max(square.var(), 1e-12)  # a gamma distribution has the right mean, variance and nearly skewness
    spread = sums[:, 1] / rows * shape
    p_spread = 2 * np.minimum(special.gammainc(shape, spread), special.gammaincc(shape, spread))
    counts = sums[:, 2:].round().astype(int)
    p_ecdf = uniform.p_value(uniform.tails[np.arange(len(uniform.cuts)), counts].min(-1))
    p_values = np.stack([2 * special.ndtr(-np.abs(location)), np.minimum(p_spread, 1), p_ecdf], -1)
    return p_values.reshape(batch, count, 3)


# ---- bands -------------------------------------------------------------------------------------------------------


class UniformECDF(NamedTuple):
    """What chance does to the empirical distribution of uniform ranks.

    Attributes:
        cuts: ranks below which ranks are counted.
        probability: of a rank below each cut.
        tails: two-sided binomial p-value of each count at each cut, shape (cuts, rows + 1).
        grid, chance: log of the least pointwise p-value over all cuts, and the log probability of one at most that.
    """

    cuts: np.ndarray
    probability: np.ndarray
    tails: np.ndarray
    grid: np.ndarray
    chance: np.ndarray

    def p_value(self, least: Any) -> np.ndarray:
        """Exact p-value of the least of the pointwise p-values."""
        return np.exp(np.interp(np.log(np.maximum(least, 1e-300)), self.grid, self.chance))

    def band(self, coverage: float) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest shares of ranks below the cuts, of a band that holds all with this probability."""
        pointwise = np.exp(np.interp(np.log(1 - coverage), self.chance, self.grid))
        inside = self.tails > pointwise
        rows = self.tails.shape[1] - 1
        return inside.argmax(1) / rows, 1 - inside[:, ::-1].argmax(1) / rows


@functools.lru_cache(maxsize=32)
def uniform_ecdf(rows: int, size: int) -> UniformECDF:
    """The chances of empirical distributions of `rows` uniform ranks from 0 to `size - 1`, exactly.

    How probable it is that all counts stay inside follows from the Markov chain of counts from cut to cut.

    >>> lower, upper = uniform_ecdf(100, 1000).band(0.95)
    >>> round(float(lower[24]), 2), round(float(upper[24]), 2)  # at one half
    (0.36, 0.64)
    """
    cuts = np.unique(np.round(np.arange(1, _POINTS) * size / _POINTS).astype(int))
    cuts = cuts[(cuts > 0) & (cuts < size)]
    probability = cuts / size
    counts = np.arange(rows + 1)
    below = stats.binom.cdf(counts, rows, probability[:, None])
    above = stats.binom.sf(counts - 1, rows, probability[:, None])
    tails = np.minimum(2 * np.minimum(below, above), 1.0)
    grid = np.concatenate([np.geomspace(1e-7, 1e-4, 4), np.geomspace(3e-4, 0.2, 14), [0.5]])
    chance = np.array([_leaving(tails > least, probability, rows) for least in grid])
    grid, chance = np.concatenate([[1e-300], grid, [1.0]]), np.concatenate([[1e-300], chance, [1.0]])
    chance = np.maximum.accumulate(np.clip(chance, 1e-300, 1.0))
    return UniformECDF(cuts, probability, tails, np.log(grid), np.log(chance))


def _leaving(inside: np.ndarray, probability: np.ndarray, rows: int) -> float:
    """Probability that the count at some cut is not among those inside."""
    log_factorial = special.gammaln(np.arange(rows + 1) + 1)
    states, mass, before = np.zeros(1, int), np.ones(1), 0.0
    for allowed, here in zip(inside, probability, strict=True):
        following = np.flatnonzero(allowed)
        step = (here - before) / (1 - before)
        left, more = rows - states, following[:, None] - states
        possible = more >= 0
        more = np.where(possible, more, 0)
        log_chance = log_factorial[left] - log_factorial[more] - log_factorial[np.maximum(left - more, 0)]
        log_chance = log_chance + more * np.log(step) + (left - more) * np.log1p(-step)
        mass = np.where(possible & (more <= left), np.exp(log_chance), 0.0) @ mass
        states, before = following, here
    return max(1 - float(mass.sum()), 1e-12)


# ---- input -------------------------------------------------------------------------------------------------------


def _stride(draws: np.ndarray) -> int:
    """Every which draw is nearly independent of the one before, by effective sample sizes in some simulations."""
    from bayeslens.inference.diagnostics import convergence

    rows, count, dimension = draws.shape
    some = draws[np.linspace(0, rows - 1, min(rows, _LOOKED_AT)).astype(int)]
    side_by_side = np.moveaxis(some, 1, 0).reshape(1, count, -1)
    with np.errstate(all="ignore"):
        effective = convergence(side_by_side).ess_bulk.reshape(-1, dimension)
    # Parameters that never move, or all of few values, say nothing.
    seen = np.isfinite(effective).any(0)
    if not seen.any():
        return 1
    slowest = np.nanmean(effective[:, seen], 0).min()
    return 1 if slowest > 0.8 * count else int(np.ceil(count / max(slowest, 1.0)))


def _checked(
    parameters: Any, draws: Any, names: tuple[str, ...] | None, quantities: dict[str, Any] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], dict[str, np.ndarray]]:
    if draws is None:
        if not hasattr(parameters, "draws"):
            raise InputError("give draws of the posterior of each simulation, shape (simulations, draws, parameters)")
        names, quantities = names or parameters.names, parameters.quantities | (quantities or {})
        parameters, draws = parameters.parameters, parameters.draws
    parameters, draws = checked_draws(parameters, draws)
    names = tuple(names) if names is not None else tuple(f"parameter {i}" for i in range(parameters.shape[1]))
    if len(names) != parameters.shape[1]:
        raise InputError(f"{len(names)} names were given for {parameters.shape[1]} parameters")
    quantities = {n: np.asarray(v, np.float64) for n, v in (quantities or {}).items()}
    for name, values in quantities.items():
        if values.shape != (len(draws), draws.shape[1] + 1):
            raise InputError(
                f"the quantity {name!r} needs shape {(len(draws), draws.shape[1] + 1)}: the parameters' value and "
                f"those of all draws, got {values.shape}"
            )
        refuse_simulation(np.isnan(values).any(1), f"the quantity {name!r}", "is not a number")
    return parameters, draws, names, quantities


def checked_draws(parameters: Any, draws: Any) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and draws as float64, or an `InputError` that names the first wrong simulation.

    >>> checked_draws(np.zeros((30, 2)), np.zeros((30, 50, 3)))
    Traceback (most recent call last):
    bayeslens.core.errors.InputError: parameters of shape (30, 2) need draws of shape (30, draws, 2), got (30, 50, 3)
    """
    parameters, draws = np.asarray(parameters, np.float64), np.asarray(draws, np.float64)
    if parameters.ndim == 1 and draws.ndim == 2:
        parameters, draws = parameters[:, None], draws[..., None]
    if parameters.ndim != 2 or draws.ndim != 3 or (draws.shape[0], draws.shape[2]) != parameters.shape:
        rows = parameters.shape[0] if parameters.ndim else "simulations"
        columns = parameters.shape[1] if parameters.ndim == 2 else "parameters"
        raise InputError(
            f"parameters of shape {parameters.shape} need draws of shape ({rows}, draws, {columns}), got {draws.shape}"
        )
    if len(parameters) < 20:
        raise InputError(f"need at least 20 simulations to see anything, got {len(parameters)}")
    _check_draws(draws.shape[1])
    refuse_simulation(~np.isfinite(parameters).all(1), "a parameter", "is not finite")
    refuse_simulation(~np.isfinite(draws).all((1, 2)), "a draw", "is not finite")
    return parameters, draws


def _check_draws(count: int) -> None:
    if count < 9:
        raise InputError(
            f"need at least 9 nearly independent draws of every posterior, got {count}: draw more, or give thin=1 if "
            "they are independent"
        )


def refuse_simulation(wrong: np.ndarray, what: str, how: str) -> None:
    """Refuse the first simulation that is wrong."""
    if wrong.any():
        raise InputError(
            f"{what} of simulation {int(wrong.argmax())} {how}: drop that simulation or mend its inference"
        )
