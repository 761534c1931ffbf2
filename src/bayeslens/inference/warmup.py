"""Warm-up of Hamiltonian chains: where they start, the scale of the posterior, and the step.

All chains learn together, from gradients as much as from draws. The scale is the linear map after which draws and
gradients of the log density have the same covariance; for a Gaussian posterior it is exact as soon as there are more
draws than dimensions, wherever they were drawn. Warm-up ends when a window of draws agrees with the scale that it was
made with, and the chains with each other.

Source: A. Seyboldt, E. Carlson, B. Carpenter, "Preconditioning Hamiltonian Monte Carlo by minimizing Fisher
divergence" (2026).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from bayeslens.inference.diagnostics import convergence
from bayeslens.inference.leapfrog import Chains, Scale, Transitions

Kind = Literal["diagonal", "dense", "low_rank"]
RANK = 16  # directions of a low-rank scale
_RIDGE = 1e-5  # of whitened covariances, so that directions without draws keep the diagonal scale
_FIRST_WINDOWS = (3, 4, 6, 10, 15)  # transitions per chain; the scale of the next window is made after each
_WINDOW, _GROWTH = 25, 1.5  # of the windows after these, each of which may be the last
_FIRST_LIMIT = 32  # of the machine, while nothing is known about the scale
_CALL = 16  # leapfrog steps between two looks at the acceptance
_R_HAT = 1.2  # of a window
_HOPELESS = 20.0  # nats by which the weight of a mode must be less than that of another, to be left
_NEAR = 10.0  # nats below the best point, and ten for each dimension, at which points tell of the posterior
_SEARCHES = 100  # evaluations of L-BFGS at most
_HISTORY = 8  # steps that L-BFGS remembers


def rank_of(kind: Kind, dimension: int) -> int:
    """How many directions a scale of this kind is stretched along."""
    return {"diagonal": 0, "dense": dimension, "low_rank": min(dimension, RANK)}[kind]


def fisher_scale(
    positions: Float[np.ndarray, "draws dimension"],
    gradients: Float[np.ndarray, "draws dimension"],
    groups: Int[np.ndarray, " draws"],
    rank: int,
) -> Scale:
    """The linear map from a standard Normal that fits draws and gradients of their log density best.

    Its square S solves S G S = X, with X and G the covariances of draws and gradients: the least Fisher divergence
    among Gaussians. It is found on the diagonal first, then in the space that whitened draws and gradients span,
    where the `rank` directions that differ most from the diagonal are kept.

    Args:
        positions: draws, or any points that have to do with the posterior.
        gradients: of the log density at these.
        groups: of each draw: means are taken off group by group, so that chains that disagree do not widen it.
        rank: number of directions.

    >>> x = np.random.default_rng(0).normal(size=(8, 2)) * [1.0, 10.0]
    >>> fisher_scale(x, -x / [1.0, 100.0], np.zeros(8, int), 0).diagonal.round(3).tolist()
    [1.0, 10.0]
    """
    dimension = positions.shape[1]
    finite = np.isfinite(positions).all(1) & np.isfinite(gradients).all(1)
    x, g, groups = positions[finite], gradients[finite], groups[finite]
    for group in np.unique(groups):
        members = groups == group
        x[members], g[members] = x[members] - x[members].mean(0), g[members] - g[members].mean(0)
    nothing = np.zeros((dimension, rank)), np.ones(rank)
    least = 1e-12
    spread, slope = (np.sqrt(np.square(a).sum(0)) for a in (x, g))
    known = (spread > least) & (slope > least)
    diagonal = np.sqrt(np.where(known, spread, 1.0) / np.where(known, slope, 1.0))
    if not rank or not known.any():
        return Scale(diagonal, *nothing)
    x, g = x / diagonal, g * diagonal
    basis = _span(x, g)
    x, g = x @ basis, g @ basis
    ridge = _RIDGE * len(x) * np.eye(basis.shape[1])
    values, vectors = np.linalg.eigh(_solve_riccati(x.T @ x + ridge, g.T @ g + ridge))
    values = np.maximum(values, 1e-10)
    order = np.argsort(-np.abs(np.log(values)))[:rank]
    vectors, stretch = basis @ vectors[:, order], np.sqrt(values[order])
    filled = rank - len(order)
    return Scale(diagonal, np.pad(vectors, ((0, 0), (0, filled))), np.pad(stretch, (0, filled), constant_values=1.0))


def _span(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span draws and gradients."""
    if len(x) >= x.shape[1]:
        return np.eye(x.shape[1])
    stacked = np.concatenate([x / np.linalg.norm(x), g / np.linalg.norm(g)])
    _, sizes, rows = np.linalg.svd(stacked, full_matrices=False)
    return rows[sizes > 1e-6 * sizes[0]].T


def _solve_riccati(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The positive definite S for which S b S = a."""
    root, inverse = _roots(b)
    middle, _ = _roots(root @ a @ root)
    return inverse @ middle @ inverse


def _roots(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square root of a positive semidefinite matrix, and its inverse."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


class StepSize:
    """Looks for the step of a target acceptance.

    For steps that are not too large, a step e accepts 2 Phi(-c e^2) on average with a constant c (A. Beskos et al.,
    "Optimal tuning of the hybrid Monte Carlo algorithm", 2013). The constant is the one that explains the sum of all
    acceptances since the scale was set, so that their noise averages out before it is bent.
    """

    def __init__(self, target: float):
        self.wanted, self.log_step = -special.ndtri(target / 2), np.log(0.3)
        self.believed = 0.05 * target, 1 - 0.05 * (1 - target)  # range of acceptances that say more than a direction
        self.seen = np.zeros((0, 3))  # number of transitions, logarithm of the step, mean acceptance

    @property
    def step(self) -> float:
        return float(np.exp(self.log_step))

    def forget(self) -> None:
        """The scale has changed: what was learned is worth a few transitions."""
        self.seen = np.array([[5.0, self.log_step, 2 * special.ndtr(-self.wanted)]])

    def learn(self, acceptance: Float[np.ndarray, " transitions"]) -> None:
        """From the acceptances of transitions with the present step."""
        if not len(acceptance):
            return
        mean = acceptance.mean()
        if not self.believed[0] < mean < self.believed[1]:  # nothing that was learned so far holds
            self.seen, self.log_step = self.seen[:0], self.log_step + (1.0 if mean > self.believed[0] else -1.5)
            return
        self.seen = np.concatenate([self.seen, [[len(acceptance), self.log_step, mean]]])
        number, log_steps, means = self.seen.T
        low, high = -30.0, 30.0  # of the logarithm of c
        for _ in range(40):
            middle = 0.5 * (low + high)
            more = number @ (2 * special.ndtr(-np.exp(middle + 2 * log_steps)) - means) > 0
            low, high = (middle, high) if more else (low, middle)
        self.log_step = 0.5 * (np.log(self.wanted) - low)


def warm_up(chains: Chains, num_warmup: int, target_acceptance: float, report: Callable[[float, str], None]) -> float:
    """Bring new chains into the posterior, and set their scale and step.

    Args:
        chains: of finite density.
        num_warmup: transitions per chain at most.
        target_acceptance: mean acceptance probability that the step is to have.
        report: of transitions per chain that are done, and what is being done.

    Returns:
        Transitions per chain that it took.
    """
    limit, count, rank = chains.limit, chains.num_chains, len(chains.scale.stretch)
    positions, near, slopes = approach(chains)
    chains.rescale(fisher_scale(near, slopes, np.zeros(len(near), int), rank), positions)
    step, done, window = StepSize(target_acceptance), 0.0, 0
    while done < num_warmup:
        last = window - len(_FIRST_WINDOWS)
        length = _FIRST_WINDOWS[window] if last < 0 else _WINDOW * _GROWTH**last
        chains.limit = min(limit, _FIRST_LIMIT) if window < 3 else limit
        drawn = _window(chains, min(length, num_warmup - done) * count, step)
        done, window = done + len(drawn.chain) / count, window + 1
        report(min(done, num_warmup), f"warm-up, step {step.step:.2g}")
        if done >= num_warmup or (last >= 0 and _settled(chains, drawn)):
            break
        positions = _relocated(chains, drawn) if window > 3 else chains.positions
        chains.rescale(fisher_scale(drawn.position, drawn.gradient, drawn.chain, rank), positions)
        step.forget()
    chains.limit, chains.step = limit, np.full(count, step.step)
    return done


def _window(chains: Chains, least: float, step: StepSize) -> Transitions:
    """At least as many transitions, of all chains together, while the step learns."""
    parts: list[Transitions] = []
    while sum(len(p.chain) for p in parts) < least:
        chains.step = np.full(chains.num_chains, step.step)
        parts.append(chains.run(_CALL))
        step.learn(parts[-1].acceptance)
    return Transitions.joined(parts)


def _settled(chains: Chains, drawn: Transitions) -> bool:
    """Whether the scale that a window shows is the one it was drawn with, and the chains agree."""
    by_chain = [np.flatnonzero(drawn.chain == c) for c in range(chains.num_chains)]
    shortest = min(len(index) for index in by_chain)
    whitened = chains.scale.inverse(drawn.position), chains.scale.backward(drawn.gradient)
    if shortest < 8 or not np.isfinite(whitened).all():
        return False
    values = np.concatenate([whitened[0], drawn.scalars["potential"][:, None]], 1)
    if np.nanmax(convergence(np.stack([values[index[:shortest]] for index in by_chain])).r_hat, initial=1) > _R_HAT:
        return False
    change = fisher_scale(*whitened, drawn.chain, len(chains.scale.stretch))
    ratios = np.log(np.concatenate([change.diagonal, change.stretch]))
    return bool(np.abs(ratios).max() < np.log(1.5) + 0.5 * np.sqrt(chains.dimension / len(drawn.chain)))


def _relocated(chains: Chains, drawn: Transitions) -> np.ndarray:
    """Where the chains are; those in a mode of no weight beside another's go where a chain of the other was.

    The weight of a mode is estimated as if it were Gaussian, from the log density and the spread of a chain's draws.
    """
    positions, whitened = np.array(chains.positions), chains.scale.inverse(drawn.position)
    log_weights = np.full(chains.num_chains, np.nan)
    for chain in range(chains.num_chains):
        index = drawn.chain == chain
        if index.sum() >= 5:
            spread = np.log(whitened[index].std(0) + 1e-9).sum()
            log_weights[chain] = spread - drawn.scalars["potential"][index].mean()
    lost = log_weights < np.nanmax(log_weights, initial=-np.inf) - _HOPELESS - 2 * np.sqrt(chains.dimension)
    if lost.any():
        sound = np.flatnonzero(np.isfinite(log_weights[drawn.chain]) & ~lost[drawn.chain])
        positions[lost] = drawn.position[chains.random.choice(sound, lost.sum())]
    return positions


def approach(chains: Chains) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take all chains towards modes by L-BFGS, until the density grows no more than it does between typical draws.

    Modes themselves are not looked for: densities of hierarchical models have none.

    Returns:
        Positions of the chains; points near to where they ended, and gradients there.
    """
    searches = [_Search(p, v, g) for p, v, g in zip(chains.positions, chains.log_probs, chains.gradients, strict=True)]
    for _ in range(_SEARCHES):
        if all(s.done for s in searches):
            break
        chains.look(np.stack([s.trial for s in searches]))
        for search, value, gradient in zip(searches, chains.log_probs, chains.gradients, strict=True):
            search.learn(value, gradient)
    best = max(s.value for s in searches)
    points = [p for s in searches for p in s.points if p[1] > best - _NEAR - 10 * chains.dimension]
    return np.stack([s.position for s in searches]), *(np.stack([p[i] for p in points]) for i in (0, 2))


class _Search:
    """Maximization of one chain by L-BFGS with backtracking, a point at a time."""

    def __init__(self, position: np.ndarray, value: float, gradient: np.ndarray):
        self.position, self.value, self.gradient = position, value, gradient
        self.points, self.pairs, self.done = [(position, value, gradient)], [], False
        self._turn(gradient / max(1.0, np.linalg.norm(gradient)))

    def _turn(self, direction: np.ndarray) -> None:
        self.direction, self.slope = direction, float(direction @ self.gradient)
        self._go(1.0)

    def _go(self, size: float) -> None:
        self.size, self.trial = size, self.position + size * self.direction

    def learn(self, value: float, gradient: np.ndarray) -> None:
        """What is found at `trial`."""
        if self.done:
            return
        if not (np.isfinite(gradient).all() and value >= self.value + 1e-4 * self.size * self.slope):
            self._go(0.3 * self.size)
            self.done = self.size < 1e-8
            return
        moved, bent = self.trial - self.position, self.gradient - gradient
        if moved @ bent > 1e-10 * (bent @ bent):
            self.pairs = [*self.pairs, (moved, bent)][-_HISTORY:]
        self.position, self.value, self.gradient = self.trial, value, gradient
        self.points.append((self.trial, value, gradient))
        values = [p[1] for p in self.points]
        # Log densities of draws spread over about the root of the dimension.
        self.done = len(values) > 5 and values[-1] - values[-6] < max(len(moved), 1e-5 * abs(value))
        self._turn(self._newton())

    def _newton(self) -> np.ndarray:
        if not self.pairs:
            return self.gradient / max(1.0, np.linalg.norm(self.gradient))
        direction, factors = self.gradient.copy(), []
        for moved, bent in reversed(self.pairs):
            factors.append((moved @ direction) / (moved @ bent))
            direction -= factors[-1] * bent
        moved, bent = self.pairs[-1]
        direction *= (moved @ bent) / (bent @ bent)
        for (moved, bent), factor in zip(self.pairs, reversed(factors), strict=True):
            direction += moved * (factor - (bent @ direction) / (moved @ bent))
        return direction
