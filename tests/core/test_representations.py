"""Programs and algorithms against exact enumeration: each keeps the measure that its program denotes."""

import itertools
import math

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

from bayeslens.core import representations
from bayeslens.core.errors import InputError
from bayeslens.core.probabilistic_program import (
    IMPOSSIBLE,
    UNIT,
    Operations,
    Population,
    enumerate_measure,
    value_of,
    weighted,
)
from bayeslens.core.representations import (
    SUSPENDED,
    collapse,
    importance,
    metropolis_hastings,
    metropolis_hastings_step,
    particle_marginal,
    resample,
    resample_move_smc,
    sample_posterior,
    smc,
    suspended,
    trace,
)

BERNOULLI = {q: dist.Bernoulli(q) for q in (0.25, 0.5, 0.75)}  # made once: NumPyro checks arguments for long


def branching(p):
    """Which choice comes second depends on the first, and one branch is impossible."""
    if p.sample(BERNOULLI[0.5]):
        kind = p.sample(dist.Categorical(probs=np.array([0.25, 0.25, 0.5])))
        p.score([-0.3, -np.inf, 0.7][kind])
        return "kind", kind
    flip = p.sample(BERNOULLI[0.25])
    p.score([-1.2, 0.4][flip])
    return "flip", flip


def flips(p):
    """A random number of choices and of scores; each choice depends on those before."""
    seen = []
    for _ in range(p.sample(dist.Categorical(probs=np.array([0.5, 0.25, 0.25])))):
        seen.append(p.sample(BERNOULLI[0.75 if sum(seen) else 0.5]))
        p.score([-1.2, 0.7][seen[-1]])
    return tuple(seen)


def chain(p):
    """Two steps of a hidden Markov model, scored after each, with another choice at the end."""
    x = p.sample(BERNOULLI[0.5])
    p.score([-0.2, -1.3][x])
    y = p.sample(BERNOULLI[[0.25, 0.5][x]])
    p.score([-1.7, -0.1][y])
    return x, y


def stopping(p):
    """Some runs finish at the first score, where others go on: all probabilities are halves."""
    if p.sample(BERNOULLI[0.5]):
        p.score(-0.2)
        return "stopped"
    p.score(0.5)
    y = p.sample(BERNOULLI[0.5])
    p.score([-1.7, 0.3][y])
    return y


def single(p):
    """One scored choice, and one after it."""
    x = p.sample(BERNOULLI[0.5])
    p.score([-0.2, -1.3][x])
    return x, p.sample(BERNOULLI[0.5])


def theta(p):
    return p.sample(BERNOULLI[0.5])


def static_model(p, bias):
    """A hidden choice that is observed twice, given a parameter."""
    x = p.sample(BERNOULLI[0.5])
    p.score([[-0.2, -1.5], [-0.9, -0.4]][bias][x])
    p.score([[-1.1, -0.3], [-0.2, -2.0]][bias][x])
    return bias, x


def assert_same(found, exact, tolerance=1e-12):
    """Enumeration is exact up to the rounding of sums."""
    assert set(found.log_masses) == set(exact.log_masses)
    for result, log_mass in exact.log_masses.items():
        assert found.log_masses[result] == pytest.approx(log_mass, abs=tolerance), result


# Enumeration itself, against sums written by hand


def test_enumeration_is_the_sum_over_choices():
    exact = enumerate_measure(chain).log_masses
    for x, y in itertools.product((0, 1), repeat=2):
        prior = 0.5 * [[0.75, 0.25], [0.5, 0.5]][x][y]
        assert exact[x, y] == pytest.approx(math.log(prior) + [-0.2, -1.3][x] + [-1.7, -0.1][y], abs=1e-14)
    exact = enumerate_measure(branching)
    assert set(exact.log_masses) == {("kind", 0), ("kind", 2), ("flip", 0), ("flip", 1)}
    total = 0.5 * (0.25 * np.exp(-0.3) + 0.5 * np.exp(0.7)) + 0.5 * (0.75 * np.exp(-1.2) + 0.25 * np.exp(0.4))
    assert exact.log_evidence == pytest.approx(math.log(total), abs=1e-14)
    exact = enumerate_measure(flips)
    assert len(exact.log_masses) == 7
    assert exact.log_masses[1, 0] == pytest.approx(math.log(0.25 * 0.5 * 0.25) + 0.7 - 1.2, abs=1e-14)
    assert sum(exact.probs.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "distribution",
    [
        dist.DiscreteUniform(2, 4),
        dist.Binomial(3, 0.3),
        dist.Bernoulli(logits=0.4),
    ],
)
def test_every_scalar_distribution_of_finite_support_enumerates(distribution):
    exact = enumerate_measure(lambda p: p.sample(distribution))
    expected = np.exp(distribution.log_prob(distribution.enumerate_support()))
    # NumPyro computes these probabilities in float32
    np.testing.assert_allclose([exact.probs[k] for k in sorted(exact.probs)], expected, rtol=1e-5)


# Every transformer and algorithm keeps the measure, exactly. `cells` is the common denominator of the probabilities.

ALGORITHMS = {
    "importance, branching": (branching, lambda q: importance(q, 2), 4),
    "importance, flips": (flips, lambda q: importance(q, 2), 4),
    "smc of one particle": (flips, lambda q: smc(q, 1), 4),
    "smc, branching": (branching, lambda q: smc(q, 2), 4),
    "smc, stopping": (stopping, lambda q: smc(q, 2), 2),
    "smc, collapsed": (stopping, lambda q: collapse(smc(q, 2)), 2),
    "metropolis-hastings, branching": (branching, lambda q: metropolis_hastings(q, 2, 1), 4),
    "metropolis-hastings, flips": (flips, lambda q: metropolis_hastings(q, 1, 1), 4),
    "metropolis-hastings, two starts": (stopping, lambda q: metropolis_hastings(q, 1, 2), 2),
    "resample-move, stopping": (stopping, lambda q: resample_move_smc(q, 1, 1), 2),
    "resample-move, chain": (chain, lambda q: resample_move_smc(q, 1, 1), 4),
    "resample-move, population": (single, lambda q: resample_move_smc(q, 2, 1), 2),
    "metropolis-hastings on smc": (single, lambda q: metropolis_hastings(collapse(importance(q, 1)), 1, 1), 2),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_measure_is_kept_exactly(name):
    program, algorithm, cells = ALGORITHMS[name]
    assert_same(enumerate_measure(algorithm(program), cells=cells), enumerate_measure(program))


def test_particle_marginal_metropolis_hastings_keeps_the_measure_exactly():
    program = particle_marginal(theta, static_model, 2)
    exact = enumerate_measure(lambda p: static_model(p, theta(p)))
    assert_same(enumerate_measure(program, cells=2), exact)
    assert_same(enumerate_measure(metropolis_hastings(particle_marginal(theta, static_model, 1), 2, 1), cells=2), exact)


@pytest.mark.slow
def test_particle_marginal_with_two_particles_within_metropolis_hastings():
    def model(p, bias):
        p.score([[-0.2, -1.5], [-0.9, -0.4]][bias][p.sample(BERNOULLI[0.5])])
        return bias

    algorithm = metropolis_hastings(particle_marginal(theta, model, 2), 1, 1)
    assert_same(enumerate_measure(algorithm, cells=2), enumerate_measure(lambda p: model(p, theta(p))))


def test_weighted_and_suspended_runs_carry_the_measure():
    def reweighted(p):
        result, scores = weighted(flips)(p)
        p.score(sum(scores))
        return result

    assert_same(enumerate_measure(reweighted), enumerate_measure(flips))
    first, second = (enumerate_measure(suspended(stopping, k)).log_masses for k in (1, 2))
    assert first == {SUSPENDED: pytest.approx(math.log(0.5 * np.exp(-0.2) + 0.5 * np.exp(0.5)))}
    assert second["stopped"] == pytest.approx(math.log(0.5) - 0.2)
    assert second[SUSPENDED] == pytest.approx(math.log(0.25 * np.exp(0.5 - 1.7) + 0.25 * np.exp(0.5 + 0.3)))
    assert_same(enumerate_measure(suspended(stopping, 3)), enumerate_measure(stopping))


def test_resampling_keeps_the_measure_of_any_population():
    given = Population(["a", "b", "c"], np.array([-0.3, -np.inf, 1.1]))
    assert_same(enumerate_measure(lambda p: resample(given, p)), enumerate_measure(lambda p: given))
    dead = Population(["a"], np.array([-np.inf]))
    assert resample(dead, None) is dead


def test_step_satisfies_detailed_balance_between_traces_of_different_lengths():
    """Flows between every two results, of which the number of choices differs, are equal in both directions."""

    def pair(p):
        before = trace(flips, p)
        p.score(before.log_weight)
        return before.result, metropolis_hastings_step(before, flips, p)[0].result

    flow = enumerate_measure(pair, cells=4).log_masses
    crossing = [(a, b) for a, b in flow if len(a) != len(b)]
    assert len(crossing) >= 20
    for a, b in flow:
        assert flow[b, a] == pytest.approx(flow[a, b], abs=1e-12)


def forgetful_resample(population, p):
    """Resampling that drops the mean weight."""
    return resample(population, p)._replace(log_weights=np.zeros(len(population.members)))


def unbalanced_step(state, program, p):
    """Metropolis-Hastings that ignores the change in the number of choices."""
    site = p.sample(dist.DiscreteUniform(0, len(state.choices) - 1))
    new = trace(program, p, (*state.choices[:site], None, *state.choices[site + 1 :]))
    ratio = math.exp(min(new.log_weight - state.log_weight, 0.0))
    return (new if p.sample(dist.Categorical(probs=np.array([1 - ratio, ratio]))) else state), True


@pytest.mark.parametrize(
    "broken, replacement, name",
    [
        ("resample", forgetful_resample, "smc, stopping"),
        ("metropolis_hastings_step", unbalanced_step, "metropolis-hastings, flips"),
        ("_going_on", lambda reached: reached, "resample-move, stopping"),
    ],
)
def test_enumeration_sees_a_broken_mechanism(monkeypatch, broken, replacement, name):
    """The last: were particles moved into finishing, but never back, more mass would end there than should."""
    program, algorithm, cells = ALGORITHMS[name]
    monkeypatch.setattr(representations, broken, replacement)
    found = enumerate_measure(algorithm(program), cells=cells).log_masses
    exact = enumerate_measure(program).log_masses
    assert max(abs(found[k] - exact[k]) for k in exact) > 0.02


def test_program_whose_stack_is_all_impossible_under_some_choices():
    """Inner SMC whose particles all die weighs its branch by zero, and the rest goes on."""

    def model(p, bias):
        p.score(-np.inf if bias == 0 else -0.5)
        return bias

    measure = enumerate_measure(particle_marginal(theta, model, 2), cells=2)
    assert measure.log_masses == {1: pytest.approx(math.log(0.5) - 0.5)}
    assert weighted(lambda p: p.score(-np.inf))(Operations(None, None, None))[0] is IMPOSSIBLE


# Real runs, with unbounded numbers of choices and continuous distributions, against closed forms


def trials(p):
    """A loop without a bound: mass 2^-n on n, times 0.8^n, so 0.4^n. The evidence is 2/3, and P(n) = 0.6 0.4^(n-1)."""
    count = 1
    p.score(math.log(0.8))
    while p.sample(BERNOULLI[0.5]):
        count += 1
        p.score(math.log(0.8))
    return {"count": count}


def gaussian(p):
    """A mean known to be Normal(0, 1) before, with two observations; posterior Normal(2/3, 1/3)."""
    mean = p.sample(dist.Normal(0.0, 1.0, validate_args=False))
    for y in (0.5, 1.5):
        p.observe(dist.Normal(mean, 1.0, validate_args=False), y)
    return {"mean": mean}


LOG_EVIDENCE = -math.log(2 * math.pi) - 0.5 * math.log(3) - 0.5 * (2.5 - 4 / 3)  # of 0.5 and 1.5 under I + 11'


def test_log_evidence_of_the_gaussian_is_its_density():
    covariance = np.eye(2) + 1
    y = np.array([0.5, 1.5])
    exact = -0.5 * y @ np.linalg.solve(covariance, y) - 0.5 * math.log(np.linalg.det(2 * math.pi * covariance))
    assert pytest.approx(exact) == LOG_EVIDENCE


RUNS = {
    "importance": lambda q: importance(q, 20),
    "smc": lambda q: smc(q, 15),
    "resample-move": lambda q: resample_move_smc(q, 10, 1),
    "metropolis-hastings": lambda q: metropolis_hastings(q, 30, 10),
    "particle marginal": lambda q: metropolis_hastings(particle_marginal(lambda p: 0, lambda p, _: q(p), 5), 5, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_weighted_averages_are_unbiased(name):
    """Mean weight times average result estimates an integral without bias: 60 runs, within five standard errors.

    A Student t with 59 degrees of freedom is beyond 5 with probability 5e-6; four such numbers for five algorithms
    give a false alarm once in 9,000.
    """
    expected = {"count": (2 / 3, 2 / 3 * 5 / 3), "mean": (math.exp(LOG_EVIDENCE), math.exp(LOG_EVIDENCE) * 2 / 3)}
    for program, site in ((trials, "count"), (gaussian, "mean")):
        estimates = []
        for key in jax.random.split(jax.random.key(0), 60):
            population = run_once(RUNS[name](program), key)
            weights = np.exp(population.log_weights)
            values = np.array([m[site] if w > 0 else 0 for m, w in zip(population.members, weights, strict=True)])
            estimates.append((weights.mean(), (weights * values).mean()))
        error = np.std(estimates, axis=0, ddof=1) / np.sqrt(60)
        deviation = np.abs(np.mean(estimates, 0) - expected[site])
        assert (deviation < 5 * error + 1e-12).all(), (site, deviation / error)


def run_once(algorithm, key):
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    sample = lambda distribution: value_of(distribution, generator.random())  # noqa: E731
    return algorithm(Operations(sample, None, sample))


def test_long_chain_forgets_its_start():
    """4,000 states on the geometric: batch means of 40 batches give the standard error of the average.

    Beyond 5 of them with 39 degrees of freedom has probability 1e-5.
    """
    posterior = sample_posterior(metropolis_hastings(trials, 4000, 1), key=jax.random.key(1))
    batches = posterior["count"].reshape(40, 100).mean(1)
    assert abs(batches.mean() - 5 / 3) < 5 * batches.std(ddof=1) / np.sqrt(40)
    assert posterior.log_weights is None and posterior.log_evidence is None
    assert 0.2 < posterior.statistics["accepted"].mean() < 1


def test_posterior_carries_draws_weights_and_evidence():
    def program(p):
        x = p.sample(dist.Normal(np.zeros(2), 1.0))
        p.score(-np.inf if x[0] < 0 else -0.5)
        return {"x": x, "sum": x.sum()}

    posterior = sample_posterior(importance(program, 40), key=jax.random.key(3))
    again = sample_posterior(importance(program, 40), key=jax.random.key(3))
    alive = posterior["x"].shape[1]
    assert posterior["x"].shape == (1, alive, 2) and posterior["sum"].shape == (1, alive) and 5 < alive < 35
    assert (posterior["x"][..., 0] >= 0).all() and (again["x"] == posterior["x"]).all()
    assert posterior.log_evidence == pytest.approx(math.log(alive / 40) - 0.5)  # the dead count in the mean
    assert posterior.log_weights.shape == (1, alive) and posterior.settings["runs"] == 40
    assert sample_posterior(importance(lambda p: 3.0, 2), key=jax.random.key(0))["value"].tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize(
    "distribution",
    [dist.Normal(1.0, 2.0), dist.Gamma(3.0, 2.0), dist.Poisson(3.0), dist.Gumbel(0.5, 1.0), dist.Binomial(5, 0.3)],
)
def test_choices_have_their_distribution_when_the_number_is_uniform(distribution):
    """Mean of 400 draws on a stratified grid of uniform numbers.

    Quantiles then have far less error than the 5 standard errors of independent draws, and draws by key (Gumbel)
    are beyond these with probability 6e-7.
    """
    draws = [value_of(distribution, (i + 0.5) / 400) for i in range(400)]
    assert abs(np.mean(draws) - distribution.mean) < 5 * math.sqrt(distribution.variance / 400)
    assert value_of(UNIT, 0.3) == 0.3


def test_observe_scores_the_log_density():
    def program(p):
        p.observe(dist.Bernoulli(0.25), np.array([1, 0, 1]))
        p.observe(dist.Normal(0.0, 1.0), np.array([0.3, -1.0]))
        p.observe(dist.Poisson(2.0), 3)
        p.observe(dist.MultivariateNormal(np.zeros(2), np.eye(2)), np.ones(2))
        p.observe(dist.Bernoulli(0.25), 7)

    scores = weighted(program)(Operations(None, None, None))[1]
    expected = [
        math.log(0.25**2 * 0.75),
        -math.log(2 * math.pi) - 0.545,
        math.log(8 / 6) - 2,
        -math.log(2 * math.pi) - 1,
    ]
    np.testing.assert_allclose(scores[:4], expected, rtol=1e-6)
    assert scores[4] == -math.inf


# Bad input


class Leak:
    """A program that depends on how often it ran: in its choices, or in its scores."""

    def __init__(self, where):
        self.calls, self.where = 0, where

    def __call__(self, p):
        self.calls += 1
        x = p.sample(dist.Bernoulli(1 / (1 + self.calls) if self.where == "choices" else 0.5))
        p.score(-self.calls if self.where == "scores" else 0.0)
        y = p.sample(dist.Normal(self.calls, 1.0)) if self.where == "values" else p.sample(BERNOULLI[0.5])
        p.score(-1.0)
        p.score(-y * y)
        return x


@pytest.mark.parametrize("where", ["values", "scores"])
def test_irreproducible_programs_are_refused_by_smc(where):
    with pytest.raises(InputError, match="not reproducible"):
        sample_posterior(smc(Leak(where), 5), key=jax.random.key(0))


def test_irreproducible_programs_are_refused_by_enumeration_and_metropolis_hastings():
    with pytest.raises(InputError, match="not reproducible"):
        enumerate_measure(Leak("choices"))
    with pytest.raises(InputError, match="not reproducible"):
        sample_posterior(metropolis_hastings(Leak("choices"), 50, 1), key=jax.random.key(0))
    with pytest.raises(InputError, match="`fresh`"):
        inner = particle_marginal(lambda p: 0, lambda p, _: p.score(-(p.sample(dist.Normal(0.0, 1.0)) ** 2)), 2)
        sample_posterior(smc(lambda p: (inner(p), p.score(-1.0)), 3), key=jax.random.key(0))


def forever(p):
    while p.sample(BERNOULLI[0.5]) is not None:
        pass


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: enumerate_measure(lambda p: p.sample(dist.Normal(0.0, 1.0))), "finite support"),
        (lambda: enumerate_measure(lambda p: p.sample(dist.Bernoulli(np.full(2, 0.5)))), "of shape"),
        (lambda: enumerate_measure(importance(chain, 1)), "set `cells`"),
        (lambda: enumerate_measure(forever), "bound its loops"),
        (lambda: enumerate_measure(lambda p: set()), "type set is not hashable"),
        (lambda: enumerate_measure(lambda p: p.score(-np.inf)).probs, "all weights are zero"),
        (lambda: enumerate_measure(lambda p: p.score(np.nan)), "a score is nan"),
        (lambda: value_of(dist.Bernoulli(1.5, validate_args=False), 0.5), "lie between 0 and 1"),
        (lambda: drawn(importance(lambda p: p.score(-np.inf), 3)), "all weights are zero"),
        (lambda: drawn(smc(lambda p: p.score(-np.inf), 3)), "all weights are zero"),
        (lambda: drawn(metropolis_hastings(lambda p: p.score(-np.inf), 3)), "all weights are zero"),
        (lambda: drawn(resample_move_smc(lambda p: p.score(-np.inf), 3, 1)), "all weights are zero"),
        (lambda: drawn(lambda p: p.sample(BERNOULLI[0.5])), "is no algorithm"),
        (lambda: drawn(lambda p: p.score(0.0)), "outside of any algorithm"),
        (lambda: drawn(importance(lambda p: p.sample(0.5), 3)), "give a NumPyro distribution"),
        (lambda: drawn(importance(flips, 20)), "do not stack"),
        (lambda: drawn(importance(chain, 0)), "at least 1"),
        (lambda: drawn(smc(chain, 0)), "at least 1"),
        (lambda: drawn(metropolis_hastings(chain, 0)), "at least 1"),
    ],
)
def test_bad_input_names_the_culprit(act, message):
    with pytest.raises(InputError, match=message):
        act()


def drawn(algorithm):
    return sample_posterior(algorithm, key=jax.random.key(0))
