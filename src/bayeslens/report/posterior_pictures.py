"""Pictures of a posterior: marginals, traces, ranks, pairs and energies.

Sources: A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P. Buerkner, "Rank-normalization, folding, and localization"
(2021), for rank plots; M. Betancourt, "Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo"
(2016), for energies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.report import tables
from bayeslens.report.pictures import ACCENT, ALERT, INK, MUTED, Panel, lay_out, plain
from bayeslens.report.posterior_scalars import Exact, Scalars, scalars_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = (ACCENT, "#a8741a", "#2c7a52", "#7457a6")  # chains that stand beside each other
MAX_MARGINALS = 12
_MAX_WORST = 3  # numbers with a trace and a rank plot
_MAX_POINTS, _MAX_STEPS, _MAX_BARS, _MAX_LINES = 400, 250, 40, 8
_REASONS = {
    "marginals": "no number has finite draws",
    "trace": "its draws are no Markov chains, or are too few",
    "rank": "its draws are not several Markov chains, or are too few",
    "pairs": "it has no two numbers that vary",
    "energy": "its engine kept no energies",
}


# ---- panels ------------------------------------------------------------------------------------------------------


def plot_posterior(posterior: Posterior, kind: str | None = None) -> Figure:
    """One kind of picture of a posterior as a figure, by default of its marginals: see `plot`.

    Raises:
        InputError: an unknown kind, or the posterior lacks what the picture needs.
    """
    kind = kind or "marginals"
    if kind not in _KINDS:
        raise InputError(f"unknown kind {kind!r}: use one of {', '.join(_KINDS)}")
    drawn = posterior_panels(scalars_of(posterior), posterior.statistics, kind)
    if not drawn:
        raise InputError(f"this posterior has no picture of kind {kind!r}: {_REASONS[kind]}")
    return lay_out(drawn, columns=1 if kind in ("trace", "rank") else 3)


def posterior_panels(scalars: Scalars, statistics: dict[str, Any], kind: str) -> list[Panel]:
    """The panels of one kind of picture; empty where the posterior lacks what they need."""
    return _KINDS[kind](scalars, statistics)


def drawn_marginals(scalars: Scalars) -> list[int]:
    """Which scalars get a picture: the first of each site, then the second of each, until there are enough."""
    places, seen = [], {}
    for i, site in enumerate(scalars.sites):
        seen[site] = seen.get(site, -1) + 1
        if scalars.finite[i] or scalars.names[i] in scalars.exact:
            places.append((seen[site], i))
    return sorted(i for _, i in sorted(places)[:MAX_MARGINALS])


def _marginals(scalars: Scalars, _: dict[str, Any]) -> list[Panel]:
    chosen = drawn_marginals(scalars)
    size = (5.0, 3.0) if len(chosen) in (1, 2, 4) else (3.5, 2.5)
    return [Panel(scalars.names[i], functools.partial(_marginal, scalars=scalars, i=i), size) for i in chosen]


def _marginal(axes: Axes, scalars: Scalars, i: int) -> None:
    """What is believed about one number: the density with its 90% interval and median, and thinly each chain's."""
    exact = scalars.exact.get(scalars.names[i])
    low, median, high = scalars.quantiles[i]
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelleft=False)
    axes.grid(False, axis="y")
    if scalars.whole[i]:
        _bars(axes, scalars, i, exact)
    elif exact is None and np.ptp(scalars.draws[i]) == 0:
        axes.vlines(median, 0, 1, color=ACCENT, lw=3)
        axes.set(ylim=(0, 1.1))
    else:
        if exact is not None and exact.density is not None:
            grid, density = exact.density
            top = np.quantile(density[np.isfinite(density)], 0.98)  # a density may have no bound at its end
            density = np.minimum(np.nan_to_num(density, posinf=np.inf), max(2 * top, 1e-300))
        else:
            grid, density = kernel_density(scalars.draws[i], scalars.weights)
        inside = np.linspace(low, high, 80)
        axes.fill_between(grid, density, color=ACCENT, alpha=0.1, lw=0)
        axes.fill_between(inside, np.interp(inside, grid, density), color=ACCENT, alpha=0.22, lw=0)
        if 1 < scalars.draws.shape[1] <= _MAX_LINES:
            for chain, values in enumerate(scalars.draws[i]):
                weights = None if scalars.weights is None else scalars.weights[chain]
                if np.ptp(values) > 0:
                    axes.plot(*kernel_density(values, weights), color=MUTED, lw=0.8, alpha=0.8)
        axes.plot(grid, density, color=ACCENT, lw=1.8)
        axes.vlines(median, 0, np.interp(median, grid, density), color=INK, lw=1.2)
        margin = 0.02 * np.ptp(grid)
        axes.set(xlim=(grid[0] - margin, grid[-1] + margin), ylim=(0, 1.12 * axes.dataLim.y1))
    axes.locator_params(axis="x", nbins=4, integer=bool(scalars.whole[i]))
    low, median, high = in_digits((low, median, high), scalars.sd[i], bool(scalars.whole[i]))
    axes.set_xlabel(f"median {median}, 90% in {low} to {high}")


def _bars(axes: Axes, scalars: Scalars, i: int, exact: Exact | None) -> None:
    """Probabilities of whole numbers, those inside the 90% interval dark; dots are the chains'."""
    values, weights = scalars.draws[i], scalars.weights
    low, _, high = scalars.quantiles[i]
    if exact is not None and exact.probabilities is not None:
        first, height = 0, exact.probabilities
    else:
        first = int(values.min())
        width = max(1, -(-int(np.ptp(values) + 1) // _MAX_BARS))
        edges = first - 0.5 + width * np.arange(int(np.ptp(values)) // width + 2)
        flat = np.full(values.size, 1 / values.size) if weights is None else weights.ravel()
        height = np.histogram(values.ravel(), edges, weights=flat)[0]
        if width > 1:
            axes.bar(edges[:-1], height, 0.9 * width, align="edge", color=ACCENT, alpha=0.75, lw=0)
            axes.axvspan(low, high, color=ACCENT, alpha=0.12, lw=0)
            return
    at = first + np.arange(len(height))
    inside = (at >= low) & (at <= high)
    axes.bar(at[inside], height[inside], 0.8, color=ACCENT, alpha=0.8, lw=0)
    axes.bar(at[~inside], height[~inside], 0.8, color=ACCENT, alpha=0.3, lw=0)
    axes.tick_params(labelleft=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.locator_params(axis="y", nbins=4)
    chains = values.shape[0]
    if exact is None and 1 < chains <= _MAX_LINES and weights is None:
        own = np.stack([(values == a).mean(1) for a in at], 1)
        axes.scatter(np.repeat(at[None], chains, 0), own, s=7, color=MUTED, lw=0, zorder=3)


def kernel_density(values: Any, weights: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian kernel density estimate on a grid, by Silverman's rule, reflected at the ends of the draws.

    Far tails are cut off: one enormous draw must not flatten the rest.

    >>> grid, density = kernel_density(np.random.default_rng(0).normal(size=4000))
    >>> bool(abs(density.max() - 0.399) < 0.03)
    True
    """
    values = np.ravel(values)
    weights = np.full(values.size, 1 / values.size) if weights is None else np.ravel(weights) / np.sum(weights)
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    levels = (0.002, 0.05, 0.25, 0.75, 0.95, 0.998)
    at = values[order][np.minimum(np.searchsorted(cumulated, levels), len(values) - 1)]
    core = np.clip(values, at[0], at[5])
    sd = np.sqrt(weights @ (core - weights @ core) ** 2)
    middle = at[3] - at[2]
    spread = min(sd, middle / 1.34) or sd or np.ptp(values)
    bandwidth = 0.9 * spread * (1 / (weights @ weights)) ** -0.2
    used = values[weights > 0]
    low, high = max(at[0] - 3 * bandwidth, used.min()), min(at[5] + 3 * bandwidth, used.max())
    if middle > 0:
        low = max(low, min(at[1] - middle, at[2] - 6 * middle))
        high = min(high, max(at[4] + middle, at[3] + 6 * middle))
    if high <= low:
        return np.array([low - 0.5, low, low + 0.5]), np.array([0.0, 1.0, 0.0])
    bins = 160
    heights, edges = np.histogram(values, bins, (low, high), weights=weights)
    step = edges[1] - edges[0]
    reach = min(bins, int(np.ceil(4 * bandwidth / step)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / bandwidth) ** 2)
    padded = np.concatenate([heights[:reach][::-1], heights, heights[bins - reach :][::-1]])
    return (edges[:-1] + edges[1:]) / 2, np.convolve(padded, kernel / kernel.sum(), "valid") / step


def in_digits(values: Iterable[float], sd: float, whole: bool = False) -> list[str]:
    """Numbers with the decimals that their standard deviation warrants, three of its digits; none for whole numbers.

    >>> in_digits((1.23456, -0.5), 0.0567), in_digits((3.0,), float("nan"))
    (['1.2346', '−0.5000'], ['3'])
    """
    if whole or (np.isfinite(sd) and 1e-4 < sd < 1e6):
        decimals = 0 if whole else int(np.clip(2 - np.floor(np.log10(sd)), 0, 6))
        return [tables.number(np.round(v, decimals) + 0.0, decimals) for v in values]  # + 0.0: no minus before a zero
    return [tables.number(v) for v in values]


def _trace(scalars: Scalars, _: dict[str, Any]) -> list[Panel]:
    chosen = scalars.worst[:_MAX_WORST]
    return [
        Panel(f"{scalars.names[i]}, draw by draw", functools.partial(_lines, draws=scalars.draws[i]), (5.0, 2.5))
        for i in chosen
    ]


def _lines(axes: Axes, draws: np.ndarray) -> None:
    """Every chain's draws in the order in which they were made, thinned."""
    step = -(-draws.shape[1] // _MAX_STEPS)
    at = np.arange(0, draws.shape[1], step)
    for chain, values in enumerate(draws[: 2 * len(SERIES)]):
        axes.plot(at + 1, values[::step], color=SERIES[chain % len(SERIES)], lw=0.8, alpha=0.8)
    axes.margins(x=0.01)
    axes.set_xlabel(f"Draw{f', every {step}th' if step > 3 else ''}")


def _rank(scalars: Scalars, _: dict[str, Any]) -> list[Panel]:
    if scalars.draws.shape[1] < 2:
        return []
    chosen = scalars.worst[:_MAX_WORST]
    return [
        Panel(f"{scalars.names[i]}, ranks by chain", functools.partial(_ranks, draws=scalars.draws[i]), (5.0, 2.5))
        for i in chosen
    ]


def _ranks(axes: Axes, draws: np.ndarray) -> None:
    """Where each chain's draws rank among all: flat for chains that mixed; the band is for independent draws."""
    from scipy.stats import binom

    chains, count = draws.shape
    bins = int(np.clip(count // 10, 4, 20))
    ties = np.random.default_rng(0).random(draws.size)  # whole numbers have many: they are broken at random
    ranks = np.empty(draws.size)
    ranks[np.lexsort((ties, draws.ravel()))] = (np.arange(draws.size) + 0.5) / draws.size
    ranks = ranks.reshape(chains, count)
    low, high = (bins * binom.ppf(q, count, 1 / bins) / count for q in (0.05, 0.95))
    axes.axhspan(low, high, color=MUTED, alpha=0.16, lw=0, zorder=0)
    axes.axhline(1, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    top = high
    for chain in range(min(chains, 2 * len(SERIES))):
        heights, edges = np.histogram(ranks[chain], bins, (0, 1))
        heights = heights * bins / count
        axes.stairs(heights, edges, baseline=None, color=SERIES[chain % len(SERIES)], lw=1.4, alpha=0.9)
        top = max(top, heights.max())
    axes.set(xlim=(0, 1), ylim=(0, 1.12 * top))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_xlabel("Rank among the draws of all chains")
    axes.set_ylabel("Share, 1 is even")


def _pairs(scalars: Scalars, statistics: dict[str, Any]) -> list[Panel]:
    """Of the three numbers that are tied most closely, every two against each other."""
    together = tied(scalars)
    chains, count = scalars.draws.shape[1:]
    diverging = np.asarray(statistics.get("diverging", np.zeros(0)))
    diverging = diverging.ravel().astype(bool) if diverging.shape == (chains, count) else np.zeros(chains * count, bool)
    rng = np.random.default_rng(0)  # of which points are drawn, nothing more
    if scalars.weights is None:
        plain_ones = np.flatnonzero(~diverging)
        taken = plain_ones[np.linspace(0, len(plain_ones) - 1, min(len(plain_ones), _MAX_POINTS)).astype(int)]
        marked = np.flatnonzero(diverging)
        marked = marked[np.linspace(0, len(marked) - 1, min(len(marked), _MAX_POINTS // 2)).astype(int)]
    else:
        taken = rng.choice(chains * count, _MAX_POINTS, p=scalars.weights.ravel())
        marked = np.zeros(0, int)
    panels = []
    for a, b in [(a, b) for j, a in enumerate(together) for b in together[j + 1 :]]:
        x, y = (scalars.draws[i].ravel() for i in (a, b))
        label = (plain(scalars.names[a]), plain(scalars.names[b]))
        draw = functools.partial(_points, taken=(x[taken], y[taken]), marked=(x[marked], y[marked]), names=label)
        size = (5.0, 3.5) if len(together) == 2 else (3.5, 3.0)
        panels.append(Panel(f"{scalars.names[a]} and {scalars.names[b]}", draw, size))
    return panels


def tied(scalars: Scalars) -> list[int]:
    """The two or three numbers most closely tied: by rank correlation of their values, or of how far out they lie.

    The second kind finds funnels, whose values are not correlated. Numbers that are functions of each other are one.
    """
    from scipy.stats import rankdata

    pool = np.flatnonzero(scalars.moving & ~scalars.whole)[:200]
    if len(pool) < 2:
        return []
    flat = scalars.draws[pool].reshape(len(pool), -1)
    if scalars.weights is None:
        flat = flat[:, np.linspace(0, flat.shape[1] - 1, min(flat.shape[1], 1000)).astype(int)]
    else:
        flat = flat[:, np.random.default_rng(0).choice(flat.shape[1], 1000, p=scalars.weights.ravel())]
    ranks = rankdata(flat, axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    far = np.abs(ranks)
    far = far - far.mean(1, keepdims=True)
    ranks, far = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (ranks, far))
    value = np.abs(ranks @ ranks.T)
    strength = np.maximum(value, np.maximum(np.abs(far @ ranks.T), np.abs(ranks @ far.T)))
    strength[value > 0.999] = -1.0  # the same number twice, and each with itself
    first, second = np.unravel_index(np.argmax(strength), strength.shape)
    if strength[first, second] < 0:
        return []
    chosen = [int(first), int(second)]
    third = np.where((strength[first] < 0) | (strength[second] < 0), -1.0, strength[first] + strength[second])
    if third.max() > 0:
        chosen.append(int(np.argmax(third)))
    return sorted(int(pool[i]) for i in chosen)


def _points(axes: Axes, taken: tuple, marked: tuple, names: tuple[str, str]) -> None:
    axes.scatter(*taken, s=8, color=ACCENT, alpha=0.4, lw=0)
    axes.scatter(*marked, s=13, color=ALERT, alpha=0.9, lw=0, zorder=3)
    for axis in ("x", "y"):
        axes.locator_params(axis=axis, nbins=5)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])


def energy_fraction(statistics: dict[str, Any]) -> float | None:
    """The least E-BFMI of all chains: the part of the energy's variance that one transition explores, at most 2.

    Chains with less than 0.3 explore heavy tails too slowly.
    """
    energy = np.asarray(statistics.get("energy", np.zeros(0)), np.float64)
    if energy.ndim != 2 or energy.shape[1] < 8 or not np.isfinite(energy).all():
        return None
    variance = energy.var(axis=1)
    if not (variance > 0).all():
        return None
    return float(np.min((np.diff(energy, axis=1) ** 2).mean(1) / variance))


def _energy(scalars: Scalars, statistics: dict[str, Any]) -> list[Panel]:
    if energy_fraction(statistics) is None:
        return []
    return [Panel("Energy", functools.partial(_energies, energy=np.asarray(statistics["energy"], np.float64)))]


def _energies(axes: Axes, energy: np.ndarray) -> None:
    """Energies about their mean, and by how much one transition changes them: alike if chains move freely."""
    own, change = (energy - energy.mean(1, keepdims=True)).ravel(), np.diff(energy, axis=1).ravel()
    grid, density = kernel_density(own)
    axes.fill_between(grid, density, color=ACCENT, alpha=0.2, lw=0)
    axes.plot(grid, density, color=ACCENT, lw=1.6, label="energy")
    axes.plot(*kernel_density(change), color=SERIES[1], lw=1.6, label="its change")
    axes.tick_params(labelleft=False)
    axes.set(ylim=(0, 1.25 * axes.dataLim.y1))
    axes.set_xlabel("Energy about its mean, and its change in one draw")
    axes.legend(loc="upper left", ncols=2, fontsize=9, frameon=False, handletextpad=0.3, labelcolor=MUTED)


_KINDS = {"marginals": _marginals, "trace": _trace, "rank": _rank, "pairs": _pairs, "energy": _energy}
