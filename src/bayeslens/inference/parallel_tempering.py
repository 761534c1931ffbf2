"""Parallel tempering: chains between prior and posterior that exchange places, for posteriors of several modes.

Each chain is a ladder of replicas. The one at rung k draws from prior * likelihood^beta_k, from the prior itself at
the foot to the posterior at the top. A scan moves every replica by Hamiltonian dynamics, draws the one at the foot
anew from the prior, and offers neighbours to exchange places: even pairs in one scan, odd ones in the next. Replicas
that have just gone up are so offered to go on upwards, and carry independent draws of the prior to the posterior in a
time that does not grow with the number of rungs, where random pairs would let them diffuse.

Source: S. Syed, A. Bouchard-Cote, G. Deligiannidis, A. Doucet, "Non-reversible parallel tempering: a scalable highly
parallel MCMC scheme" (2022).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from scipy import special, stats

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar
from bayeslens.inference.diagnostics import doubts_of_chains
from bayeslens.inference.replica_exchange import SCANS, Ladders, Trace, joined, rejection_rates

_BATCHES = 4  # of each chain, whose evidences are compared
_FEW_ROUND_TRIPS = 10  # of each chain
_LARGE_REJECTION = 0.9


class ParallelTempering(Engine):
    """Non-reversible parallel tempering: the posterior and its evidence where modes are far apart.

    Chains that stay in one mode (NUTS, HMC) know nothing of the weights of the others. Here draws of the prior come
    up a ladder of tempered posteriors, again and again, so that each mode is visited as often as it weighs. Warm-up
    finds steps and scales at each rung, sets the rungs to equal rejection of exchanges, and finds how many are needed.

    It takes some ten times as many gradients per draw as HMC: for a single mode use NUTS. Of many cheap likelihoods
    SMC makes as much; tempering goes on from where it is for as long as it is let, and says by R-hat how far it is.
    A mode that is narrower than others in many dimensions weighs little near the prior, and comes up rarely: where
    chains disagree, draw more.

    The evidence comes from all rungs, by bridges between neighbours; its standard error from the spread over chains
    and parts of chains. `statistics` hold, for each draw, `lp`, `log_likelihood` and `round_trip` (whether a draw of
    the prior has come up to the posterior there), and, the same for all, `barrier` (the sum of the rejections: about
    half the number of rungs that serves best), `num_rungs`, `rejection` (the largest of an exchange) and
    `num_gradients`, whose sum is the number of gradients that were computed.

    Args:
        num_chains: independent ladders, run at once in one compiled program; 4 are needed to trust R-hat.
        num_warmup: scans of warm-up. They come in rounds that double; the ladder is set anew after each.
        num_samples: draws kept per chain, one in each scan.
        num_rungs: of a ladder, prior and posterior included. By default twice the barrier and one, which serves long
            ladders best, rounded up to a multiple of 8, as many as move at once; 64 at most.

    Source: S. Syed, A. Bouchard-Cote, G. Deligiannidis, A. Doucet, "Non-reversible parallel tempering: a scalable
    highly parallel MCMC scheme" (2022).

    >>> import numpyro, numpyro.distributions as dist
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(y):
    ...     x = numpyro.sample("x", dist.Normal(0.0, 3.0))
    ...     numpyro.sample("y", dist.Normal(x**2, 0.5), obs=y)
    >>> engine = ParallelTempering(num_warmup=100, num_samples=300)
    >>> found = engine(conditioned_model(model, {"y": 9.0}), key=jax.random.key(0))
    >>> bool(abs((found["x"] > 0).mean() - 0.5) < 0.15)  # modes near -3 and 3
    True
    """

    name: ClassVar[str] = "tempering"

    num_chains: int = 4
    num_warmup: int = 500
    num_samples: int = 1000
    num_rungs: int | None = None

    def __check_init__(self):
        check_counts(self, "num_chains", "num_warmup", "num_samples")
        if self.num_rungs is not None and self.num_rungs < 2:
            raise InputError(f"num_rungs must be at least 2, prior and posterior, got {self.num_rungs}")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        found = exchange(conditioned, self, key=key)
        shape = found.draws.shape[:2]
        log_evidence, error = bridged_evidence(found.log_likelihood, found.betas)
        rejections = rejection_rates(found.log_likelihood, found.betas)
        constants = {
            "barrier": rejections.sum(),
            "num_rungs": len(found.betas),
            "rejection": rejections.max(),
            "num_gradients": found.num_gradients / np.prod(shape),
        }
        statistics = {
            "lp": found.log_density,
            "log_likelihood": found.log_likelihood_of_draws,
            "round_trip": found.round_trips,
        } | {n: np.full(shape, v) for n, v in constants.items()}
        posterior = posterior_of(
            self,
            conditioned,
            found.draws,
            key=key,
            log_evidence=log_evidence,
            log_evidence_error=error,
            statistics=statistics,
        )
        doubts = _doubts(found, self, rejections) + doubts_of_chains(posterior.draws, statistics)
        return posterior.doubted(doubts)


class Exchanged(NamedTuple):
    """What `exchange` found after warm-up.

    Attributes:
        draws: unconstrained, at the top rung.
        log_density, log_likelihood_of_draws: at them.
        round_trips: whether a replica that came from the prior reached the top in that scan, for the first time since.
        log_likelihood: of the replicas at all rungs, in every scan, before they were offered to exchange places.
        betas: exponents of the likelihood at the rungs, from 0 to 1.
        acceptance: of moves, at each rung.
        num_gradients: computed, warm-up included.
    """

    draws: Float[np.ndarray, "chains draws dimension"]
    log_density: Float[np.ndarray, "chains draws"]
    log_likelihood_of_draws: Float[np.ndarray, "chains draws"]
    round_trips: Bool[np.ndarray, "chains draws"]
    log_likelihood: Float[np.ndarray, "draws rungs chains"]
    betas: Float[np.ndarray, " rungs"]
    acceptance: Float[np.ndarray, " rungs"]
    num_gradients: int


def exchange(conditioned: ConditionedModel, settings: ParallelTempering, *, key: Any) -> Exchanged:
    """Draws of the posterior by parallel tempering, and what all replicas did meanwhile.

    Raises:
        InputError: discrete latents, improper priors, observations outside of their support, or a likelihood that is
            zero at all draws from the prior.
    """
    conditioned.check_proper("parallel tempering")
    ladders = Ladders(conditioned, settings.num_chains, settings.num_rungs, key)
    parts: list[Trace] = []
    with ProgressBar("parallel tempering", settings.num_warmup + settings.num_samples) as bar:
        done = 0
        for length in rounds(settings.num_warmup):
            warming = []
            for begun in range(0, length, SCANS):
                warming.append(ladders.run(1 / (2.0 + begun + np.arange(SCANS)) ** 0.7))
                bar(done + begun, f"warm-up, {len(ladders.betas)} rungs")
            done += length
            ladders.adapt(joined(warming))
        try:
            while len(parts) * SCANS < settings.num_samples:
                parts.append(ladders.run())
                bar(settings.num_warmup + len(parts) * SCANS, "sampling")
        except KeyboardInterrupt:
            if not parts:
                raise
    trace = jax.tree.map(lambda a: a[: settings.num_samples], joined(parts))
    return Exchanged(
        trace.points.swapaxes(0, 1),
        trace.log_density.T,
        trace.log_likelihood_of_draws.T,
        trace.round_trips.T,
        trace.log_likelihood,
        ladders.betas,
        trace.acceptance.mean(0),
        ladders.num_gradients,
    )


def rounds(num_warmup: int) -> list[int]:
    """Lengths of the rounds of warm-up in scans, each about twice as long as the one before.

    >>> rounds(500)
    [8, 16, 32, 64, 128, 256]
    """
    count = max(1, int(np.ceil(np.log2(num_warmup / SCANS + 1))))
    parts = num_warmup * 2.0 ** np.arange(count) / (2.0**count - 1)
    return [int(np.ceil(np.round(p / SCANS, 6))) * SCANS for p in parts]


def bridged_evidence(
    log_likelihood: Float[np.ndarray, "scans rungs chains"], betas: Float[np.ndarray, " rungs"]
) -> tuple[float, float]:
    """Log evidence and its standard error, from the log likelihoods of the replicas of all rungs.

    The ratio of the evidences of neighbours is that of the means of likelihood^(half their distance) at the lower and
    of likelihood^(-half) at the upper one (a geometric bridge). The error comes from the spread over parts of chains,
    widened as in `mean_evidence` for their small number.
    """
    half = np.diff(betas)[:, None] / 2

    def estimate(part: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        count = np.log(np.prod([part.shape[a] for a in axes]))
        up = special.logsumexp(half * part[:, :-1], axis=axes, keepdims=True) - count
        down = special.logsumexp(-half * part[:, 1:], axis=axes, keepdims=True) - count
        return (up - down).sum(1).ravel()

    batches = np.array_split(log_likelihood, min(_BATCHES, max(1, len(log_likelihood) // 8)))
    parts = np.concatenate([estimate(b, (0,)) for b in batches])
    if len(parts) == 1 or not np.isfinite(parts).all():
        return float(estimate(log_likelihood, (0, 2))[0]), float("inf")
    widened = stats.t.ppf(0.975, len(parts) - 1) / stats.norm.ppf(0.975)
    return float(estimate(log_likelihood, (0, 2))[0]), float(parts.std(ddof=1) / np.sqrt(len(parts)) * widened)


def _doubts(found: Exchanged, settings: ParallelTempering, rejections: np.ndarray) -> tuple[str, ...]:
    doubts, (chains, count) = [], found.draws.shape[:2]
    if count < settings.num_samples:
        doubts.append(f"interrupted after {count} of {settings.num_samples} draws per chain: run it again")
    worst = int(rejections.argmax())
    if rejections[worst] > _LARGE_REJECTION:
        doubts.append(
            f"exchanges between the exponents {found.betas[worst]:.2g} and {found.betas[worst + 1]:.2g} are rejected "
            f"at a rate of {rejections[worst]:.2f}: raise num_rungs or num_warmup, or give less vague priors"
        )
    if (trips := int(found.round_trips.sum())) < _FEW_ROUND_TRIPS * chains:
        doubts.append(
            f"only {trips} draws of the prior have come up to the posterior, fewer than {_FEW_ROUND_TRIPS} per chain: "
            "the weights of modes are not known well; raise num_samples"
        )
    if found.acceptance[1:].min() < 0.3:
        doubts.append(
            f"at one rung only {found.acceptance[1:].min():.0%} of the moves are accepted: raise num_warmup, or try "
            "another parameterization"
        )
    return tuple(doubts)
