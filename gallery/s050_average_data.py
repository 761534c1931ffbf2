"""Raw data of one trial and averages of another in one hierarchical model, by hypothetical subjects.

Claim: a hierarchical nonlinear model learns from averages that another trial reports, although their likelihood has no
closed form. Mean and covariance of an average come from hypothetical subjects simulated at the current parameters, a
normal likelihood scores what was reported, and a shrunken shift lets parameters differ between the trials. Where the
likelihood of averages is known, in a linear model, the posterior is that of exact pooling; in a nonlinear drug model
intervals become narrower than with the averages left out, still cover the truth, and the shift is found.

Source: S. Weber, A. Gelman, D. Lee, M. Betancourt, A. Vehtari, A. Racine-Poon, "Bayesian aggregation of average data:
An application in drug development" (2018).

The drug model: a response turns over from its baseline to a level that saturates with the dose (Emax). The own trial
has only low doses, the external one a high dose, and another population: its baseline, and a little its effect, differ.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayeslens
from bayeslens.gallery import Evidence
from bayeslens.processes.average_data import average_of, hypothetical_subjects, shifted

PAPER = "S050"
CLAIM = "Averages of another trial, scored by hypothetical subjects: exact pooling if linear, sharper if nonlinear."
NOT_CHECKED = "The macular degeneration trials and their differential equation; random numbers drawn independently."
PAIRS, ALONE = 8, 3  # of trials, and of those also looked at without averages
KEY = jax.random.key(0)

# Linear: a line for each subject, with known variances.

TIMES = np.linspace(0.0, 2.0, 5)
DESIGN = np.stack([np.ones(5), TIMES], 1)
EFFECTS, NOISE, SPREAD = np.array([0.7, 0.4]), 0.5, np.array([0.3, 0.2])
SUBJECTS, EXTERNAL = 20, 100


def lines(raw, averages, count, base):
    """Random intercepts and slopes; the averages of `count` subjects of a trial with other means."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    there = shifted("delta", mean, SPREAD)
    effects = numpyro.sample("effects", dist.Normal(0.0, 1.0).expand([len(raw), 2]).to_event(2))
    numpyro.sample("raw", dist.Normal((mean + EFFECTS * effects) @ DESIGN.T, NOISE).to_event(2), obs=raw)
    averaged = average_of(lambda effects: DESIGN @ (there + EFFECTS * effects), base, count, NOISE)
    numpyro.sample("averages", averaged, obs=averages)


def exact_pooling(raw, averages, covariance):
    """Mean and covariance of the means and shifts, by conjugacy."""
    precision, linear = np.diag([0.25, 0.25, *SPREAD**-2.0]), np.zeros(4)
    own, both = np.hstack([DESIGN, 0 * DESIGN]), np.hstack([DESIGN, DESIGN])
    for design, count, average in ((own, SUBJECTS, raw.mean(0)), (both, EXTERNAL, averages)):
        precision += count * design.T @ np.linalg.solve(covariance, design)
        linear += count * design.T @ np.linalg.solve(covariance, average)
    covariance = np.linalg.inv(precision)
    return covariance @ linear, covariance


def linear_case(count):
    """Largest differences from exact pooling: of means, in standard deviations, and of log standard deviations."""
    rng = np.random.default_rng(1)
    covariance = DESIGN @ np.diag(EFFECTS**2) @ DESIGN.T + NOISE**2 * np.eye(5)
    raw = DESIGN @ [1.0, -0.5] + rng.multivariate_normal(np.zeros(5), covariance, SUBJECTS)
    averages = DESIGN @ [1.3, -0.6] + rng.multivariate_normal(np.zeros(5), covariance / EXTERNAL)
    data = {"raw": raw, "averages": averages, "count": np.array(count), "base": hypothetical_subjects(2, 64, key=KEY)}
    found = bayeslens.infer(lines, data, key=KEY, engine="nuts")
    draws = np.concatenate([found["mean"], found["delta"]], -1).reshape(-1, 4)
    mean, covariance = exact_pooling(raw, averages, covariance)
    spread = np.sqrt(np.diag(covariance))
    return np.abs(draws.mean(0) - mean).max() / spread.min(), np.abs(np.log(draws.std(0) / spread)).max()


# Nonlinear: turnover with an Emax effect.

WEEKS = np.array([0.0, 1.0, 2.0, 4.0, 8.0, 16.0])
LOW, HIGH = np.repeat([5.0, 15.0], 10), 100.0  # doses
NAMES = ("log baseline", "log rate", "log Emax", "log ED50", "shift of baseline", "shift of Emax")
CENTER, WIDTH = np.log([50.0, 0.3, 0.5, 20.0]), np.array([0.3, 0.5, 0.5, 0.7])  # priors of the population
BETWEEN = np.array([0.15, 0.3, 0.3])  # subjects, of all but the ED50
SHIFT = np.array([0.3, 0.0, 0.05, 0.0])
ERROR, REPORTED = 3.0, 200


def response(population, effects, dose):
    """Curve of one subject: from its baseline to (1 + effect of the dose) times that."""
    baseline, rate, most = jnp.exp(population[:3] + BETWEEN * effects)
    return baseline * (1 + most * dose / (dose + jnp.exp(population[3])) * (1 - jnp.exp(-rate * WEEKS)))


def turnover(raw, averages, count, used, base):
    """Raw data at low doses, averages at a high dose; with `used` zero these are left out."""
    own = numpyro.sample("population", dist.Normal(CENTER, WIDTH).to_event(1))
    delta = numpyro.sample("delta", dist.Normal(0.0, SHIFT[[0, 2]]).to_event(1))
    there = own.at[jnp.array([0, 2])].add(delta)
    effects = numpyro.sample("effects", dist.Normal(0.0, 1.0).expand([len(LOW), 3]).to_event(2))
    curves = jax.vmap(response, (None, 0, 0))(own, effects, LOW)
    numpyro.sample("raw", dist.Normal(curves, ERROR).to_event(2), obs=raw)
    with numpyro.handlers.scale(scale=used + 1e-10):
        averaged = average_of(lambda effects: response(there, effects, HIGH), base, count, ERROR)
        numpyro.sample("averages", averaged, obs=averages)


def two_trials(rng):
    """Parameters from the prior, but for the shift of the baseline, which is a large one; their data."""
    own, delta = rng.normal(CENTER, WIDTH), np.array([0.3, 0.05 * rng.normal()])
    there = own + np.array([delta[0], 0, delta[1], 0])

    def measured(population, doses):
        curves = jax.vmap(response, (None, 0, 0))(population, rng.normal(size=(len(doses), 3)), doses)
        return np.asarray(curves) + ERROR * rng.normal(size=curves.shape)

    return np.append(own, delta), measured(own, LOW), measured(there, np.full(REPORTED, HIGH)).mean(0)


def nonlinear_case(count):
    """Of pairs of trials: the truth, and 90% intervals of all parameters with the averages and, for some, without."""
    rng, base = np.random.default_rng(2), hypothetical_subjects(3, 256, key=KEY)
    for pair in range(PAIRS):
        truth, raw, averages = two_trials(rng)
        intervals = []
        for used in (1.0, 0.0)[: 2 if pair < ALONE else 1]:
            data = {"raw": raw, "averages": averages, "count": np.array(count), "used": np.array(used), "base": base}
            found = bayeslens.infer(turnover, data, key=KEY, engine="nuts", num_warmup=400, num_samples=400)
            draws = np.concatenate([found["population"], found["delta"]], -1).reshape(-1, 6)
            intervals.append(np.quantile(draws, [0.05, 0.95], axis=0))
        yield truth, *intervals


def check(*, control: bool = False) -> Evidence:
    """Both cases; in the control averages are taken for the data of one subject, whose covariance is not divided."""
    off, scale = linear_case(1 if control else EXTERNAL)
    found = list(nonlinear_case(1 if control else REPORTED))
    truth, low, high = (np.stack(a) for a in zip(*((t, *interval) for t, interval, *_ in found), strict=True))
    before = np.stack([np.diff(alone, axis=0)[0] for _, _, alone in found[:ALONE]])
    share = np.exp(np.log((high - low)[:ALONE] / before).mean(0))
    inside, shift_found = (low < truth) & (truth < high), low[:, 4] > 0
    numbers = {"linear, largest error of a mean": off, "linear, largest error of a log standard deviation": scale}
    numbers |= {f"{n}, width with averages to without": s for n, s in zip(NAMES, share, strict=True)}
    numbers |= {f"{n}, intervals that cover": c for n, c in zip(NAMES, inside.mean(0), strict=True)}
    numbers |= {"intervals that cover": inside.mean(), "shifts told from none": shift_found.mean()}
    shown = (
        f"linear: means within {off:.2f} standard deviations of exact pooling and standard deviations within "
        f"{scale:.0%} (sampling alone: up to 0.15 and 12%); nonlinear: 90% intervals of log Emax and log ED50 have "
        f"{share[2]:.0%} and {share[3]:.0%} of their width without averages (should be less than 100%, by more than "
        f"the 10% that sampling makes), {inside.sum()} of {inside.size} cover (90% should), and the shift of the "
        f"baseline is told from none in {shift_found.sum()} of {PAIRS} pairs (should be nearly all)"
    )
    # Of 48 independent intervals, fewer than 37 cover once in 450 times; those of a pair are not independent.
    shrunk, covered = max(share[2], share[3]) < 0.9, inside.sum() >= 37
    holds = off < 0.15 and scale < 0.12 and shrunk and covered and shift_found.mean() > 0.8
    return Evidence(bool(holds), shown, {k: round(float(v), 4) for k, v in numbers.items()})
