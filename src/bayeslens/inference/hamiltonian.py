"""Hamiltonian Monte Carlo: what its engines share, and the engine `HMC` with trajectories of one length.

Source: R. Neal, "MCMC using Hamiltonian dynamics" (2011); M. Hoffman, A. Radul, P. Sountsov, "An adaptive-MCMC scheme
for setting trajectory lengths in Hamiltonian Monte Carlo" (2021), for the jitter.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bayeslens.core.conditioned_model import ConditionedModel, constrain_draws
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.inference.diagnostics import convergence, doubts_of_chains
from bayeslens.inference.leapfrog import (
    MOMENTUM,
    Chains,
    Controls,
    Machine,
    Noise,
    Scale,
    Transitions,
    leapfrog,
    next_momentum,
    packed,
    weight_of,
)
from bayeslens.inference.warmup import rank_of, warm_up

_CHUNK = 128  # draws per chain that are mapped to the model's sites at once


def check_settings(engine: Any) -> None:
    """Refuse settings without a meaning, of engines that `sampled` runs."""
    check_counts(engine, "num_chains", "num_warmup", "num_samples")
    if engine.mass_matrix not in ("diagonal", "dense", "low_rank"):
        raise InputError(f"mass_matrix must be diagonal, dense or low_rank, got {engine.mass_matrix!r}")
    if not 0 < engine.target_acceptance < 1:
        raise InputError(f"target_acceptance must lie between 0 and 1, got {engine.target_acceptance}")
    if engine.effective is not None and engine.effective <= 0:
        raise InputError(f"effective must be positive, or None to keep num_samples draws, got {engine.effective}")


def sampled(
    engine: Any, conditioned: ConditionedModel, machine: Machine, limit: float, statistics: Any, key: Any
) -> Posterior:
    """The posterior that chains of a machine find.

    Args:
        engine: with the settings that `check_settings` knows.
        conditioned: the model with its data.
        machine: the kind of transition.
        limit: of the machine.
        statistics: function of scalars by name to statistics by name, beyond those that all machines have.
        key: a `jax.random.key`.
    """
    conditioned.check_continuous(type(engine).__name__)
    chains = Chains(
        conditioned, machine, engine.num_chains, limit, rank_of(engine.mass_matrix, conditioned.dimension), key
    )
    drawn = _Drawn(conditioned, engine.num_chains)
    stopped: tuple[str, ...] = ()
    with ProgressBar(engine.name, engine.num_warmup + engine.num_samples) as bar:
        warm_up(chains, engine.num_warmup, engine.target_acceptance, bar)
        try:
            while drawn.count < engine.num_samples and not drawn.reached(engine.effective):
                drawn.add(chains.run())
                bar(engine.num_warmup + min(drawn.count, engine.num_samples), "sampling")
        except KeyboardInterrupt:
            if not drawn.count:
                raise
            stopped = (f"interrupted after {drawn.count} of {engine.num_samples} draws per chain: run it again",)
    count = min(drawn.count, engine.num_samples)
    sites, scalars = drawn.sites(count), drawn.scalars(count)
    found = {
        "diverging": scalars["diverging"] > 0,
        "energy": scalars["energy"],
        "lp": -scalars["potential"],
        "num_steps": scalars["num_steps"].astype(int),
        "accept_prob": scalars["accept_sum"] / scalars["num_steps"],
        "step_size": scalars["step"],
    } | statistics(scalars)
    posterior = posterior_of(engine, conditioned, sites, key=key, statistics=found)
    return posterior.doubted(stopped + doubts_of_chains(posterior.draws, found))


class _Drawn:
    """Draws so far, chain by chain, and the model's sites of as many as all chains have."""

    def __init__(self, conditioned: ConditionedModel, num_chains: int):
        self.conditioned = conditioned
        self.positions: list[list[np.ndarray]] = [[] for _ in range(num_chains)]
        self.kept: list[list[dict[str, np.ndarray]]] = [[] for _ in range(num_chains)]
        self.counts, self.next_look = np.zeros(num_chains, int), 0.0
        self.chunks: list[dict[str, np.ndarray]] = []

    @property
    def count(self) -> int:
        """Draws that every chain has."""
        return int(self.counts.min())

    def add(self, found: Transitions) -> None:
        for chain, (positions, kept) in enumerate(zip(self.positions, self.kept, strict=True)):
            index = found.chain == chain
            positions.append(found.position[index])
            kept.append({n: v[index] for n, v in found.scalars.items()})
            self.counts[chain] += index.sum()

    def sites(self, count: int) -> dict[str, np.ndarray]:
        """The model's sites, of shape (chains, count, ...); mapped in chunks of one size, compiled once."""
        vectors = np.stack([np.concatenate(p)[:count] for p in self.positions])
        while (mapped := len(self.chunks) * _CHUNK) + _CHUNK <= count:
            self.chunks.append(constrain_draws(self.conditioned, vectors[:, mapped : mapped + _CHUNK]))
        chunks, rest = list(self.chunks[: count // _CHUNK]), count % _CHUNK
        if rest:
            padded = np.pad(vectors[:, -rest:], ((0, 0), (0, _CHUNK - rest), (0, 0)), mode="edge")
            chunks.append({n: v[:, :rest] for n, v in constrain_draws(self.conditioned, padded).items()})
        return {n: np.concatenate([c[n] for c in chunks], 1) for n in chunks[0]}

    def scalars(self, count: int) -> dict[str, np.ndarray]:
        """What the machine remembered at the end of each transition."""
        names = self.kept[0][0]
        return {n: np.stack([np.concatenate([k[n] for k in kept])[:count] for kept in self.kept]) for n in names}

    def reached(self, effective: float | None) -> bool:
        """Whether every scalar of every site has this bulk and tail effective sample size."""
        if effective is None or self.count < max(self.next_look, 16):
            return False
        draws = [v.reshape(*v.shape[:2], -1) for v in self.sites(self.count).values() if v.size]
        flat = np.concatenate(draws, -1).astype(np.float64)
        moving = np.ptp(flat, axis=(0, 1)) > 0
        found = convergence(flat[..., moving])
        least = np.nanmin([found.ess_bulk, found.ess_tail], initial=np.inf)
        # Effective sizes grow in proportion to the draws; looking takes time.
        self.next_look = self.count * float(np.clip(0.95 * effective / max(least, 1.0), 1.1, 2.0))
        return bool(least >= effective)


class Scalars(NamedTuple):
    """What a chain remembers in numbers. Truth values are 0 and 1.

    Attributes:
        finished: this leaf ends the trajectory.
        accept: it is the next draw.
        diverging: it has diverged.
        row: of the momentum to be used next.
        initial_energy: of the trajectory.
        length: leapfrog steps of it.
        potential, energy: at the draw.
        accept_sum: acceptance probability times steps, as other machines sum it over steps.
        num_steps: steps so far.
        step: their size.
    """

    finished: Any
    accept: Any
    diverging: Any
    row: Any
    initial_energy: Any
    length: Any
    potential: Any
    energy: Any
    accept_sum: Any
    num_steps: Any
    step: Any


class Trajectory(NamedTuple):
    """State of all chains: the last point of the trajectory, the draw before it, and packed `Scalars`."""

    leaf: Float[Array, "3 chains dimension"]
    proposal: Float[Array, "3 chains dimension"]
    scalars: Float[Array, "names chains"]


def _blank(num_chains: int, dimension: int, dtype: Any) -> Trajectory:
    leaf, proposal = (np.zeros((3, num_chains, dimension), dtype) for _ in range(2))
    return Trajectory(leaf, proposal, np.zeros((len(Scalars._fields), num_chains), dtype))


def _iterate(
    value_and_grad: Any,
    state: Trajectory,
    index: Int[Array, ""],
    scale: Scale,
    controls: Controls,
    uniforms: Float[Array, "3 chains"],
    noise: Noise,
) -> Trajectory:
    s, select = Scalars(*state.scalars), jnp.where
    finished, accept = s.finished != 0, s.accept != 0
    momentum, kinetic = next_momentum(noise, s.row)
    proposal = select(accept[:, None], state.leaf, state.proposal)
    first = select((jnp.arange(3) == MOMENTUM)[:, None, None], momentum, proposal)
    front = select(finished[:, None], first, state.leaf)
    initial_energy = select(finished, s.potential + kinetic, s.initial_energy)
    step = select(finished, controls.step, s.step)
    jittered = jnp.maximum(1.0, jnp.round(controls.limit * (0.5 + uniforms[0]) / step))
    length = select(finished, jittered, s.length)
    leaf = leapfrog(value_and_grad, front, select(controls.begin, 0.0, step), scale)
    weight, diverging = weight_of(leaf.energy - initial_energy)
    num_steps = select(finished, 0.0, s.num_steps) + 1
    ends = (num_steps >= length) | diverging | controls.begin
    accept = ends & ((uniforms[1] < weight) | controls.begin)
    scalars = Scalars(
        finished=ends,
        accept=accept,
        diverging=diverging,
        row=s.row + s.finished,
        initial_energy=initial_energy,
        length=length,
        potential=select(accept, leaf.potential, s.potential),
        energy=select(accept, leaf.energy, select(finished, initial_energy, s.energy)),
        accept_sum=jnp.minimum(weight, 1.0) * num_steps,
        num_steps=num_steps,
        step=step,
    )
    return Trajectory(leaf.point, proposal, packed(scalars, index))


TRAJECTORIES = Machine(Scalars._fields, _blank, _iterate)


class HMC(Engine):
    """Hamiltonian Monte Carlo with trajectories of one length in whitened coordinates, and jitter.

    For posteriors near to Gaussian, where it needs about half the gradients of NUTS. Step and mass matrix are learned
    as for NUTS.

    Args:
        num_chains: run at once, in one compiled program; 4 are needed to trust R-hat.
        num_warmup: transitions per chain of warm-up at most: it ends when scale and step have settled.
        num_samples: draws kept per chain; at most, if `effective` is given.
        trajectory_length: mean time of a trajectory; each is from half to one and a half times as long. The default
            takes a standard Normal a quarter of its period, to an independent draw.
        mass_matrix: see `NUTS`.
        target_acceptance: mean acceptance probability that the step is made for.
        effective: draw until every scalar has this bulk and tail effective sample size; None draws `num_samples`.
    """

    name: ClassVar[str] = "hmc"

    num_chains: int = 4
    num_warmup: int = 1000
    num_samples: int = 1000
    trajectory_length: float = float(np.pi / 2)
    mass_matrix: str = "low_rank"
    target_acceptance: float = 0.8
    effective: float | None = None

    def __check_init__(self):
        check_settings(self)
        if self.trajectory_length <= 0:
            raise InputError(f"trajectory_length must be positive, got {self.trajectory_length}")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        return sampled(self, conditioned, TRAJECTORIES, self.trajectory_length, lambda scalars: {}, key)
