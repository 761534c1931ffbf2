"""Sums over discrete latents against brute force over all assignments, and the forward algorithm."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.util import log_density

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.enumeration import Enumeration, discrete_marginals, marginalize, sample_discrete

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def rows(*shape):
    """Random conditional probabilities, some nearly zero."""
    p = RNG.gamma(0.5, size=shape) + 1e-3
    return p / p.sum(-1, keepdims=True)


def brute_force(model, data, values, names):
    """Log joint density of every assignment of the discrete sites, and the assignments."""
    trace = handlers.trace(handlers.seed(model, KEY)).get_trace(**data)
    supports = {}
    for name in names:
        law = trace[name]["fn"]
        while hasattr(law, "base_dist"):
            law = law.base_dist
        supports[name] = np.asarray(law.enumerate_support(expand=False)).reshape(-1)
    shapes = {n: jnp.shape(trace[n]["value"]) for n in names}
    entries = [s for n in names for s in [supports[n]] * int(np.prod(shapes[n]))]
    flat = np.array(list(itertools.product(*entries)))
    assignments, start = {}, 0
    for n in names:
        size = int(np.prod(shapes[n]))
        kind = trace[n]["value"].dtype
        assignments[n] = jnp.asarray(flat[:, start : start + size].reshape(-1, *shapes[n]), kind)
        start += size

    def joint(values, assignment):
        return log_density(handlers.seed(model, KEY), (), data, {**values, **assignment})[0]

    return jax.vmap(joint, in_axes=(None, 0)), assignments, supports


def compare(model, data, values, names, tolerance=1e-10):
    """Log sum, its gradient and marginals against brute force, in float64."""
    joint, assignments, supports = brute_force(model, data, values, names)
    values = {n: jnp.asarray(v, float) for n, v in values.items()}

    def exact(values):
        return jax.nn.logsumexp(joint(values, assignments))

    def found(values):
        return log_density(marginalize(model), (), data, values)[0]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def everything(values):
        return (
            jax.value_and_grad(exact)(values),
            jax.value_and_grad(found)(values),
            jnp.exp(joint(values, assignments) - exact(values)),
            discrete_marginals(model, data, values),
        )

    (a, da), (b, db), weights, marginals = everything(values)
    np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
    for n in values:
        np.testing.assert_allclose(db[n], da[n], rtol=1e-8, atol=1e-9)
    assert set(marginals) == set(names)
    for n in names:
        hits = np.asarray(assignments[n])[..., None] == supports[n]
        np.testing.assert_allclose(np.exp(marginals[n]), np.tensordot(weights, hits, 1), atol=1e-9)
    return weights, assignments


# Models: each with its data, continuous latents and discrete sites

with jax.enable_x64(True):
    P3, P33, P333 = (jnp.asarray(rows(*[3] * n)) for n in (1, 2, 3))


def mixture(y):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("components", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    with numpyro.plate("rows", 4):
        z = numpyro.sample("z", dist.Categorical(weights))
        numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def network():
    """Twelve variables of two or three values, with loops."""
    a = numpyro.sample("a", dist.Categorical(P3))
    b = numpyro.sample("b", dist.Categorical(P33[a]))
    c = numpyro.sample("c", dist.Bernoulli(jnp.where(a == 1, 0.2, 0.7)))
    d = numpyro.sample("d", dist.Categorical(P333[a, b]))
    e = numpyro.sample("e", dist.Bernoulli(0.1 + 0.3 * c + 0.1 * d))
    f = numpyro.sample("f", dist.Bernoulli(jax.nn.sigmoid(d - 1.0)))
    g = numpyro.sample("g", dist.DiscreteUniform(2, 4))
    h = numpyro.sample("h", dist.Binomial(2, 0.2 * g))
    i = numpyro.sample("i", dist.Bernoulli(0.2 + 0.6 * e * f))
    j = numpyro.sample("j", dist.Bernoulli(0.3 + 0.1 * h))
    k = numpyro.sample("k", dist.Bernoulli(0.9 - 0.7 * (i == j)))
    n = numpyro.sample("n", dist.Bernoulli(0.4 + 0.2 * k))
    numpyro.deterministic("sum", n + k + g)
    x = numpyro.sample("x", dist.Normal(a + 1.0 * n, 1.0))
    numpyro.sample("y", dist.Normal(x + h, 0.5), obs=1.3)


def nested_plates(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    a = numpyro.sample("a", dist.Bernoulli(0.3))
    with numpyro.plate("groups", 2, dim=-1):
        b = numpyro.sample("b", dist.Categorical(P33[a]))
        with numpyro.plate("members", 3, dim=-2):
            c = numpyro.sample("c", dist.Bernoulli(0.2 + 0.2 * b))
            numpyro.sample("y", dist.Normal(b - 2.0 * c + a, scale), obs=y)
    with numpyro.plate("others", 2):
        numpyro.sample("w", dist.Normal(2.0 * a, scale), obs=jnp.array([0.3, 1.0]))


def indexed(y, group):
    with numpyro.plate("groups", 3):
        z = numpyro.sample("z", dist.Categorical(P3))
    with numpyro.plate("rows", 5):
        w = numpyro.sample("w", dist.Bernoulli(0.2 + 0.3 * z[group]))
        mu = numpyro.sample("mu", dist.Normal(z[group] - w, 1.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def interacting():
    """Entries of a plate that depend on each other: by neighbours, by a sum, across two plates."""
    with numpyro.plate("spins", 4):
        s = numpyro.sample("s", dist.Bernoulli(0.4))
    numpyro.factor("ising", 0.7 * (s[1:] == s[:-1]))
    with numpyro.plate("units", 3):
        v = numpyro.sample("v", dist.Bernoulli(0.4))
    with numpyro.plate("hidden", 2):
        h = numpyro.sample("h", dist.Bernoulli(0.3))
    numpyro.factor("energy", (v[:, None] * h * jnp.arange(6.0).reshape(3, 2)).sum())
    with numpyro.plate("votes", 3):
        t = numpyro.sample("t", dist.Categorical(P3))
    numpyro.sample("y", dist.Normal(t.sum() + s[2] - v[0], 1.0), obs=2.0)


def restricted():
    """A bipartite graph of two plates: one of them is taken apart."""
    with numpyro.plate("rows", 3, dim=-2):
        v = numpyro.sample("v", dist.Bernoulli(0.4))
    with numpyro.plate("columns", 2, dim=-1):
        h = numpyro.sample("h", dist.Bernoulli(0.3))
    with numpyro.plate("r", 3, dim=-2), numpyro.plate("c", 2, dim=-1):
        numpyro.sample("y", dist.Normal(v * h - 0.5 * v, 1.0), obs=jnp.arange(6.0).reshape(3, 2) / 3)


def markov(y):
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(3), 1.0).to_event(1))

    def step(state, seen):
        x = numpyro.sample("x", dist.Categorical(P33[state]))
        numpyro.sample("y", dist.Normal(mu[x], 1.0), obs=seen)
        return x, numpyro.deterministic("twice", 2 * x)

    first = numpyro.sample("first", dist.Categorical(P3))
    last, _ = scan(step, first, y)
    numpyro.sample("end", dist.Normal(last, 1.0), obs=1.0)


def started(y):
    """A chain whose first step is told by the time in the carry; states one hot; a latent path; other sites."""
    drift = numpyro.sample("drift", dist.Normal(0.0, 1.0))
    kind = numpyro.sample("kind", dist.Bernoulli(0.4))

    def step(carry, seen):
        hot, t, position = carry
        p = jnp.where(t == 0, P3, hot @ P33)
        x = numpyro.sample("x", dist.Categorical(p))
        position = numpyro.sample("position", dist.Normal(position + drift * x + kind, 1.0))
        numpyro.sample("y", dist.Normal(position, 0.5), obs=seen)
        return (jax.nn.one_hot(x, 3), t + 1, position), x

    _, path = scan(step, (jnp.zeros(3), 0, 0.0), y)
    with numpyro.plate("steps", 5):
        numpyro.sample("late", dist.Normal(path, 2.0), obs=jnp.arange(5.0))


def factorial(y, shift):
    def step(carry, inputs):
        a, b = carry
        seen, s = inputs
        a = numpyro.sample("a", dist.Bernoulli(0.2 + 0.5 * a))
        with numpyro.plate("copies", 2):
            u = numpyro.sample("u", dist.Bernoulli(0.3 + 0.2 * a))
        b = numpyro.sample("b", dist.Categorical(P33[b]))
        numpyro.sample("y", dist.Normal(a * b + s + u.sum(), 1.0), obs=seen)
        return (a, b), None

    scan(step, (0, 2), (y, shift), length=3)


def chains_in_plate(y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))

    def step(state, seen):
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", dist.Bernoulli(0.2 + 0.6 * state))
            numpyro.sample("y", dist.Normal(slope * x, 1.0), obs=seen)
        return x, None

    scan(step, jnp.zeros(2, int), y, reverse=False)


def vector(y):
    z = numpyro.sample("z", dist.Bernoulli(jnp.array([0.1, 0.4, 0.8])).to_event(1))
    x = numpyro.sample("x", dist.Normal(jnp.arange(3.0) * z, 1.0).to_event(1))
    numpyro.sample("y", dist.MultivariateNormal(x, jnp.eye(3)), obs=y)


def zero_inflated(y):
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    gate = numpyro.sample("gate", dist.Beta(1.0, 1.0))
    with numpyro.plate("rows", 4):
        off = numpyro.sample("off", dist.Bernoulli(gate))
        numpyro.sample("y", dist.Poisson(jnp.where(off == 1, 1e-6, rate)), obs=y)


CASES = {
    "mixture": (
        mixture, {"y": np.array([-1.0, 0.5, 2.0, 2.2])},
        {"weights": [0.2, 0.5, 0.3], "mu": [-1.0, 0.3, 2.0]}, ["z"],
    ),
    "network": (network, {}, {"x": 1.7}, list("abcdefghijkn")),
    "nested plates": (nested_plates, {"y": np.arange(6.0).reshape(3, 2) - 2}, {"scale": 0.7}, ["a", "b", "c"]),
    "indexed": (
        indexed, {"y": np.arange(5.0) - 2, "group": np.array([0, 2, 2, 1, 0])}, {"mu": np.arange(5.0) - 2}, ["z", "w"]
    ),
    "interacting": (interacting, {}, {}, ["s", "v", "h", "t"]),
    "restricted": (restricted, {}, {}, ["v", "h"]),
    "markov": (markov, {"y": np.array([0.3, -1.0, 2.0, 0.1, 0.4])}, {"mu": [-1.0, 0.2, 2.0]}, ["first", "x"]),
    "started": (
        started, {"y": np.arange(5.0) / 2}, {"drift": 0.4, "position": np.array([0.1, 0.4, 1.3, 1.2, 3.0])},
        ["kind", "x"],
    ),
    "factorial": (factorial, {"y": np.array([0.3, 1.0, 2.0]), "shift": np.arange(3.0)}, {}, ["a", "u", "b"]),
    "chains in a plate": (chains_in_plate, {"y": np.arange(8.0).reshape(4, 2) / 4}, {"slope": 1.5}, ["x"]),
    "vector": (vector, {"y": np.array([0.3, 0.9, 2.5])}, {"x": [0.1, 0.6, 2.0]}, ["z"]),
    "zero inflated": (zero_inflated, {"y": np.array([0, 3, 0, 1])}, {"rate": 1.5, "gate": 0.3}, ["off"]),
}  # fmt: skip


QUICKEST = {"mixture", "restricted"}


@pytest.mark.parametrize("case", [c if c in QUICKEST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_against_brute_force(case):
    with jax.enable_x64(True):
        model, data, values, names = CASES[case]
        compare(model, data, values, names)


def chi_square(draws, assignments, weights, names):
    """p-value of joint frequencies; rare assignments are lumped."""
    from scipy import stats

    def code(values, lead):
        return np.concatenate([np.asarray(values[n]).reshape(lead, -1) for n in names], axis=1)

    table = {tuple(r): i for i, r in enumerate(code(assignments, len(weights)))}
    count = len(np.asarray(draws[names[0]]))
    seen = np.bincount([table[tuple(r)] for r in code(draws, count)], minlength=len(weights))
    expected = np.asarray(weights) * count
    common = expected >= 5
    seen, expected = (np.append(v[common], v[~common].sum()) for v in (seen, expected))
    keep = expected > 0
    return stats.chi2.sf(((seen - expected)[keep] ** 2 / expected[keep]).sum(), keep.sum() - 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["markov", "indexed", "chains in a plate"])
def test_draws_have_the_exact_joint_distribution(case):
    # Three tests that are wrong once in 10,000 each.
    model, data, values, names = CASES[case]
    values = {n: jnp.asarray(v, float) for n, v in values.items()}
    joint, assignments, _ = brute_force(model, data, values, names)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(keys):
        return jax.vmap(lambda k: sample_discrete(model, data, values, k))(keys), joint(values, assignments)

    draws, logs = run(jax.random.split(KEY, 4000))
    weights = np.exp(np.asarray(logs, float) - np.logaddexp.reduce(np.asarray(logs, float)))
    assert chi_square(draws, assignments, weights / weights.sum(), names) > 1e-4
    if case == "markov":
        np.testing.assert_array_equal(draws["twice"], 2 * draws["x"])
        assert len(np.unique(draws["x"], axis=0)) > 10


@pytest.fixture(scope="module")
def hidden_markov():
    """Sixteen states, two hundred steps."""
    rng = np.random.default_rng(1)
    return rng.dirichlet(np.full(16, 0.3), 16), rng.dirichlet(np.ones(16)), rng.normal(0, 4, 200), np.arange(16.0) - 8


def test_long_hidden_markov_model_is_the_forward_algorithm(hidden_markov):
    from scipy.special import logsumexp

    transition, start, seen, means = hidden_markov

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(means, 1.0).to_event(1))

        def step(state, y):
            x = numpyro.sample("x", dist.Categorical(jnp.asarray(transition)[state]))
            numpyro.sample("y", dist.Normal(mu[x], 1.0), obs=y)
            return x, None

        scan(step, numpyro.sample("x0", dist.Categorical(start)), y)

    def forward(mu):
        message = np.log(start)
        for y in seen:
            message = logsumexp(message[:, None] + np.log(transition), axis=0) + log_normal(y - mu)
        return logsumexp(message) + log_normal(mu - means).sum()

    with jax.enable_x64(True):
        evaluate = jax.jit(jax.value_and_grad(lambda mu: log_density(marginalize(model), (seen,), {}, {"mu": mu})[0]))
        found, slope = evaluate(means + 0.5)
        np.testing.assert_allclose(found, forward(means + 0.5), rtol=1e-12)
        step = 1e-5 * np.eye(16)[3]
        finite = (forward(means + 0.5 + step) - forward(means + 0.5 - step)) / 2e-5
        np.testing.assert_allclose(slope[3], finite, rtol=1e-6)


def log_normal(x):
    return -0.5 * x**2 - 0.5 * np.log(2 * np.pi)


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_many_separate_sites(shape):
    """Forty variables of their own: a table of all would have 2^40 entries."""
    p = np.random.default_rng(2).uniform(0.1, 0.9, (40, 2))
    parents = [i - 1 if shape == "chain" else (i - 1) // 2 for i in range(40)]

    def model():
        x = []
        for i in range(40):
            x.append(numpyro.sample(f"x{i}", dist.Bernoulli(jnp.asarray(p[i])[x[parents[i]] if i else 0])))
            numpyro.factor(f"f{i}", (0.3 * (i % 3) - 0.2) * x[i])

    messages = np.zeros((40, 2))
    for i in reversed(range(40)):
        own = messages[i] + np.array([0.0, 0.3 * (i % 3) - 0.2])
        up = np.log(np.exp(own) @ np.stack([1 - p[i], p[i]]))
        if i:
            messages[parents[i]] += up
    with jax.enable_x64(True):
        found = jax.jit(lambda: log_density(marginalize(model), (), {}, {})[0], compiler_options=QUICK)()
    np.testing.assert_allclose(found, up[0], rtol=1e-12, atol=1e-12)


def second_order(y):
    def step(carry, seen):
        before, last = carry
        x = numpyro.sample("x", dist.Categorical(P333[before, last]))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=seen)
        return (last, x), None

    scan(step, (0, 1), y)


def conditioned_inside(unused):
    def base():
        def step(state, _):
            x = numpyro.sample("x", dist.Categorical(P33[state]))
            numpyro.sample("y", dist.Normal(x, 1.0))
            return x, None

        scan(step, 2, None, length=4)

    handlers.condition(base, data={"y": jnp.array([0.1, 2.0, 1.0, unused])})()


def reversed_markov(y):
    def step(state, seen):
        x = numpyro.sample("x", dist.Categorical(P33[state]))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=seen)
        return x, None

    first, _ = scan(step, 2, y, reverse=True)
    numpyro.factor("first", 0.5 * first)


def outcomes_by_cond(y):
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(cond(y > 0, lambda v: 2.0 * v, lambda v: -1.0 * v, z), 1.0), obs=y)


def masked(y, mask):
    with numpyro.plate("rows", 3), handlers.mask(mask=mask):
        z = numpyro.sample("z", dist.Bernoulli(jnp.array([[0.1], [0.4]])))
        with handlers.scale(scale=2.0):
            numpyro.sample("y", dist.Normal(z[..., None], jnp.ones(2)).to_event(1), obs=y)


MORE = {
    **{c: CASES[c] for c in ("network", "nested plates", "interacting")},
    "second order": (second_order, {"y": np.arange(5.0) / 2}, {}, ["x"]),
    "conditioned inside": (conditioned_inside, {"unused": 0.3}, {}, ["x"]),
    "reversed": (reversed_markov, {"y": np.arange(4.0)}, {}, ["x"]),
    "cond": (outcomes_by_cond, {"y": 0.7}, {}, ["z"]),
    "masked": (masked, {"y": np.arange(12.0).reshape(2, 3, 2), "mask": np.array([True, False, True])}, {}, ["z"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_log_sum_against_brute_force(case):
    model, data, values, names = MORE[case]
    with jax.enable_x64(True):
        joint, assignments, _ = brute_force(model, data, values, names)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def both():
            found = log_density(marginalize(model), (), data, values)[0]
            return found, jax.nn.logsumexp(joint(values, assignments))

        found, exact = both()
        np.testing.assert_allclose(found, exact, rtol=1e-11)


@pytest.mark.slow
def test_as_a_conditioned_model():
    """Prior and likelihood of the continuous sites that depend on discrete ones, data as traced arguments."""
    model, data, values, _ = CASES["indexed"]
    conditioned = conditioned_model(marginalize(model), data)
    assert [s.name for s in conditioned.latents] == ["mu"] and conditioned.latents[0].proper
    prior, likelihood = jax.jit(lambda c, v: c.log_terms(v))(conditioned, jnp.asarray(values["mu"]))
    total = log_density(marginalize(model), (), data, values)[0]
    np.testing.assert_allclose(prior + likelihood, total, rtol=1e-5)
    blocked = handlers.block(handlers.condition(model, data={"mu": jnp.asarray(values["mu"])}), hide=["y"])
    joint, assignments, _ = brute_force(blocked, data, {}, ["z", "w"])
    np.testing.assert_allclose(prior, jax.nn.logsumexp(joint({}, assignments)), rtol=1e-5)
    # Prior draws of mu have the mean that its discrete parents give: five standard errors of 2000 draws.
    draws = jax.jit(jax.vmap(conditioned.sample_prior))(jax.random.split(KEY, 2000))
    mean = float(P3 @ jnp.arange(3.0))
    spread = float(P3 @ jnp.arange(3.0) ** 2 - mean**2)
    assert abs(draws[:, 1].mean() - (mean - 0.2 - 0.3 * mean)) < 5 * np.sqrt((1 + spread + 0.25) / 2000)
    assert marginalize(model) == marginalize(model) and hash(marginalize(model)) == hash(marginalize(model))


def test_what_stands_before_a_chain_is_not_carried_along_it(monkeypatch):
    """The state before a scan touches its first step only: tables have two states at once, not three."""
    from bayeslens.inference import variable_elimination

    monkeypatch.setattr(variable_elimination, "LARGEST_TABLE", 9)
    model, data, *_ = CASES["markov"]
    jax.eval_shape(lambda: log_density(marginalize(model), (), data, {"mu": jnp.zeros(3)})[0])


def dice(seen):
    die = numpyro.sample("die", dist.DiscreteUniform(1, 6))
    with numpyro.plate("rolls", 3):
        loaded = numpyro.sample("loaded", dist.Bernoulli(0.1 * die))
        numpyro.sample("seen", dist.Normal(die + 2.0 * loaded, 1.0), obs=seen)
    numpyro.deterministic("total", die + loaded.sum())
    numpyro.deterministic("constant", 3.0)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_engine(precision):
    seen = np.array([3.0, 4.5, 2.2])
    die = np.arange(1, 7)
    rows = np.logaddexp(
        np.log(1 - 0.1 * die)[:, None] + log_normal(seen - die[:, None]),
        np.log(0.1 * die)[:, None] + log_normal(seen - die[:, None] - 2),
    )
    logs = np.log(1 / 6) + rows.sum(1)
    with jax.enable_x64(precision == "float64"):
        posterior = Enumeration(num_samples=1000)(conditioned_model(dice, {"seen": seen}), key=KEY)
        probs = np.asarray(posterior.marginals["die"].probs)
    exact, tolerance = np.logaddexp.reduce(logs), 1e-5 if precision == "float32" else 1e-12
    np.testing.assert_allclose(posterior.log_evidence, exact, rtol=tolerance)
    np.testing.assert_allclose(probs, np.exp(logs - exact), atol=tolerance)
    assert posterior.marginals["loaded"].batch_shape == (3,) and posterior.engine == "enumeration"
    draws = posterior["die"]
    assert draws.shape == (1, 1000) and posterior["loaded"].shape == (1, 1000, 3) and draws.min() >= 1
    np.testing.assert_array_equal(posterior["total"], draws + posterior["loaded"].sum(-1))
    assert (posterior["constant"] == 3).all()
    # Five standard errors.
    mean = np.exp(logs - exact) @ die
    assert abs(draws.mean() - mean) < 5 * np.sqrt((np.exp(logs - exact) @ die**2 - mean**2) / 1000)


@pytest.mark.slow
def test_a_wrong_factorization_is_an_error(monkeypatch):
    from bayeslens.inference import dependence

    def model():
        with numpyro.plate("rows", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.factor("pairs", z * z[::-1])

    assert Enumeration(num_samples=8)(conditioned_model(model, {}), key=KEY).log_evidence > 0
    monkeypatch.setattr(dependence, "_ELEMENTWISE", dependence._ELEMENTWISE | {"rev"})
    with pytest.raises(InputError, match="do not multiply"):
        Enumeration(num_samples=8)(conditioned_model(lambda: model(), {}), key=KEY)


def poisson():
    k = numpyro.sample("k", dist.Poisson(2.0))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=1.0)


def subsampled():
    with numpyro.plate("rows", 10, subsample_size=2):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=jnp.zeros(2))


def dense():
    with numpyro.plate("rows", 40):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.factor("f", z.sum() ** 2)


def grid():
    with numpyro.plate("a", 12, dim=-1), numpyro.plate("b", 12, dim=-2):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.factor("f", (z[1:] * z[:-1])[:, 1:] + (z[:, 1:] * z[:, :-1])[1:])


def wide_restricted():
    with numpyro.plate("rows", 100, dim=-2):
        v = numpyro.sample("v", dist.Bernoulli(0.4))
    with numpyro.plate("columns", 100, dim=-1):
        h = numpyro.sample("h", dist.Bernoulli(0.3))
    numpyro.factor("y", v * h)


def inside_cond():
    z = cond(True, *(lambda p: numpyro.sample("z", dist.Bernoulli(p)) for _ in range(2)), 0.5)
    numpyro.factor("f", 1.0 * z)


def impossible():
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.factor("f", jnp.where(z == z, -jnp.inf, 0.0))


def continuous():
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(z, 1.0))
    numpyro.factor("f", 0.0)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: sample_discrete(poisson, {}, {}, KEY), "'k'. have infinitely many"),
        (lambda: sample_discrete(subsampled, {}, {}, KEY), "'rows'. take a new part"),
        (lambda: sample_discrete(dense, {}, {}, KEY), "'z'. cannot be summed out: 'f' depends on"),
        (lambda: sample_discrete(grid, {}, {}, KEY), "neighbours along more than one"),
        (lambda: sample_discrete(wide_restricted, {}, {}, KEY), "depend on each other along an axis of length 100"),
        (lambda: sample_discrete(inside_cond, {}, {}, KEY), "inside numpyro.contrib.control_flow.cond"),
        (lambda: sample_discrete(continuous, {}, {}, KEY), "values of the sites .'x'"),
        (lambda: sample_discrete(continuous, {}, {"x": jnp.zeros(3)}, KEY), "has shape .3,., the site"),
        (lambda: Enumeration()(conditioned_model(continuous, {}), key=KEY), "'x'. are continuous"),
        (lambda: Enumeration()(conditioned_model(poisson, {}), key=KEY), "'k'. have infinitely many"),
        (lambda: Enumeration()(conditioned_model(impossible, {}), key=KEY), "the model excludes them"),
        (lambda: Enumeration(num_samples=0), "num_samples"),
    ],
)
def test_bad_input(run, message):
    with pytest.raises(InputError, match=message):
        run()
