"""Block moves against exact transition matrices, enumeration and closed forms."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference.block_proposal import BlockProposal, train_proposal
from bayeslens.inference.enumeration import discrete_marginals
from bayeslens.inference.learned_proposals import (
    BlockMove,
    LearnedProposals,
    block_metropolis_hastings,
    log_acceptance_ratio,
)

KEY = jax.random.key(0)
SIDE = 4  # of the grids; their first row and column have parents outside, which are 0


class Grid(eqx.Module):
    """A binary grid: every node given those above and to the left; `logits` has a 2 by 2 table for each."""

    logits: jax.Array

    def __call__(self, state):
        x = jnp.pad(state.reshape(SIDE, SIDE), ((1, 0), (1, 0))).astype(int)
        i, j = np.indices((SIDE, SIDE))
        logits = self.logits[i, j, x[:-1, 1:], x[1:, :-1]]
        return jax.nn.log_sigmoid(jnp.where(x[1:, 1:] == 1, logits, -logits)).sum()


def grid_program(logits, corner):
    x = {}
    for i, j in itertools.product(range(SIDE), range(SIDE)):
        up, left = x.get((i - 1, j), 0), x.get((i, j - 1), 0)
        seen = corner if (i, j) == (SIDE - 1, SIDE - 1) else None
        x[i, j] = numpyro.sample(f"x{i}{j}", dist.Bernoulli(logits=logits[i, j, up, left]), obs=seen)


def random_grid(key):
    return 2.5 * jax.random.normal(key, (SIDE, SIDE, 2, 2))


def simulate(key, logits):
    uniform = jax.random.uniform(key, (SIDE, SIDE))

    def node(t, x):
        i, j = t // SIDE, t % SIDE
        chance = jax.nn.sigmoid(logits[i, j, x[i, j + 1], x[i + 1, j]])
        return x.at[i + 1, j + 1].set((uniform[i, j] < chance).astype(int))

    return jax.lax.fori_loop(0, SIDE**2, node, jnp.zeros((SIDE + 1, SIDE + 1), int))[1:, 1:].astype(float).ravel()


# The motif: two nodes side by side. Entries of each place: those of the block, then its blanket: the parent at the
# left, the parents above, the child at the right with its parent above, the children below, and their parent at the
# left. Nodes outside the grid are entry 16, which is 0; children outside have tables that say nothing.
BLANKET = np.array([(0, -1), (-1, 0), (-1, 1), (0, 2), (-1, 2), (1, 0), (1, 1), (1, -1)])
CORNERS = [(i, j) for i in range(SIDE) for j in (0, 2)]


def entry(i, j):
    return i * SIDE + j if 0 <= i < SIDE and 0 <= j < SIDE else SIDE**2


BLOCKS = np.array([[entry(i, j), entry(i, j + 1)] for i, j in CORNERS])
PLACES = np.array([[entry(i + a, j + b) for a, b in BLANKET] for i, j in CORNERS])
TABLES = np.array([[entry(i, j), entry(i, j + 1), entry(i, j + 2), entry(i + 1, j), entry(i + 1, j + 1)]
                   for i, j in CORNERS])  # fmt: skip


def tables(logits):
    return jnp.concatenate([logits.reshape(-1, 2, 2), jnp.zeros((1, 2, 2))])[TABLES]


def features(x, blanket, table):
    """What the blanket selects of the tables: one entry of the first node's, two of each other's."""
    left, above, beside, right, over, below, corner, outer = x[blanket].astype(int)
    sign = lambda child: 2.0 * child - 1  # noqa: E731
    own = [table[0, above, left][None], table[1, beside]]
    children = [table[2, over] * sign(right), table[3, :, outer] * sign(below), table[4, :, below] * sign(corner)]
    return jnp.concatenate(own + children)


def context(state, parameters):
    return features(jnp.append(state, 0.0), *parameters)


def grid_instance(key):
    tabled, drawn = jax.random.split(key)
    logits = random_grid(tabled)
    state = simulate(drawn, logits)
    return state[BLOCKS], jax.vmap(context, (None, 0))(state, (jnp.asarray(PLACES), tables(logits)))


UNTRAINED = BlockProposal.random((2, 2), 9, key=jax.random.key(5), components=3, hidden=(48,))


@pytest.fixture(scope="module")
def trained():
    return train_proposal(UNTRAINED, grid_instance, key=jax.random.key(1), num_steps=1200, batch_size=32)[0]


def transition_matrix(log_density, move, place, states):
    """Of proposing one block, from its definition, row by row."""
    block = np.asarray(place[0])
    values = [np.array(v, float) for v in itertools.product(*(range(s) for s in move.proposal.sizes))]
    index = {tuple(s): i for i, s in enumerate(states.tolist())}
    matrix = np.zeros((len(states), len(states)))

    @jax.jit
    def row(state):
        seen = move.context(state.at[block].set(0.0), place[1])
        ratio = lambda v: log_acceptance_ratio(log_density, move, place, state, v, log_density(state))[0]  # noqa: E731
        q = jax.vmap(lambda v: move.proposal.log_prob(v, seen))(jnp.asarray(values))
        return jnp.exp(q + jnp.minimum(0.0, jax.vmap(ratio)(jnp.asarray(values))))

    for i, state in enumerate(states):
        for value, chance in zip(values, np.asarray(row(jnp.asarray(state))), strict=True):
            then = state.copy()
            then[block] = value
            if (j := index[tuple(then.tolist())]) != i:
                matrix[i, j] = chance
        matrix[i, i] = 1 - matrix[i].sum()
    return matrix


def test_a_random_network_leaves_the_posterior_exactly_invariant():
    with jax.enable_x64(True):
        states = np.array(list(itertools.product(range(2), range(3), range(2))), float)
        table = jnp.asarray(2 * np.random.default_rng(0).normal(size=(2, 3, 2)))
        log_density = lambda s: table[tuple(s.astype(int))]  # noqa: E731
        proposal = BlockProposal.random((3, 2), 2, key=KEY, components=2, hidden=(5,))
        # This context reads the block itself, which it must not be shown.
        move = BlockMove(proposal, [[1, 2]], lambda s, p: 3.0 * jnp.stack([s[0] + s[2], s[1]]))
        matrix = transition_matrix(log_density, move, (np.array([1, 2]), None), states)
        target = np.exp(np.array([float(log_density(s)) for s in jnp.asarray(states)]))
        target /= target.sum()
        assert (matrix >= 0).all() and (matrix - np.eye(len(states)) < 1).all()
        np.testing.assert_allclose(target @ matrix, target, atol=1e-12)
        flow = target[:, None] * matrix
        np.testing.assert_allclose(flow, flow.T, atol=1e-12)
        assert not np.allclose(matrix, matrix[[0]], atol=0.01)  # far from exact conditionals

        # What the compiled chains do: one sweep from each state, 4,000 times.
        start = jnp.asarray(np.repeat(states, 4000, 0))
        drawn = np.asarray(block_metropolis_hastings(log_density, [move], start, key=KEY, num_sweeps=1).draws[:, 0])
        place = (drawn @ [6, 2, 1]).astype(int).reshape(len(states), -1)
        counts = np.array([np.bincount(row, minlength=len(states)) for row in place])
        assert (counts[matrix == 0] == 0).all()
        error = (counts / 4000 - matrix) / np.sqrt(np.maximum(matrix * (1 - matrix), 1e-3) / 4000)
        # 72 comparisons at five standard errors: false alarms below 1e-4.
        assert np.abs(error).max() < 5


@pytest.mark.slow
def test_densities_are_those_of_the_draws():
    proposal = BlockProposal.random((0, 3, 0), 2, key=jax.random.key(3), components=2, hidden=(6,))
    scales = (np.array([1, 0, -2.0], np.float32), np.array([2, 1, 0.5], np.float32))
    proposal = eqx.tree_at(lambda p: (p.middle, p.width), proposal, scales)
    seen = jnp.array([0.3, -1.0])
    first, second = np.meshgrid(np.linspace(-39, 41, 401), np.linspace(-12, 8, 401), indexing="ij")
    cell = 0.2 * 0.05
    draws = np.asarray(jax.vmap(proposal.sample, (0, None))(jax.random.split(KEY, 20_000), seen))
    log_prob = jax.jit(jax.vmap(proposal.log_prob, (0, None)))
    chance, moments = np.zeros(3), np.zeros((3, 4))
    for k in range(3):
        points = np.stack([first.ravel(), np.full(first.size, k), second.ravel()], 1)
        p = np.exp(np.asarray(log_prob(jnp.asarray(points, jnp.float32), seen), float)) * cell
        chance[k] = p.sum()
        x, y = points[:, 0], points[:, 2]
        moments[k] = [(p * f).sum() for f in (x, y, x * y, x * x)]
    assert chance.sum() == pytest.approx(1, abs=1e-4)
    x, k, y = draws.T
    assert set(k) <= {0, 1, 2}
    for value in range(3):
        for want, f in zip([chance[value], *moments[value]], (np.ones_like(x), x, y, x * y, x * x), strict=True):
            measured = f * (k == value)
            # 15 comparisons at 4.5 standard errors: false alarms about 1e-4.
            assert abs(measured.mean() - want) < 4.5 * measured.std() / np.sqrt(len(x)) + 1e-4
    assert float(proposal.log_prob(jnp.array([0.0, 3.0, 0.0]), seen)) == -np.inf


@pytest.mark.slow
def test_marginals_of_unseen_grids_match_variable_elimination(trained):
    for number in (11, 12):
        logits = random_grid(jax.random.key(number))
        truth = simulate(jax.random.key(number), logits)
        corner = float(truth[-1])
        exact = eliminated(logits, int(corner))
        exact = np.array([float(jnp.exp(exact[f"x{i}{j}"])[1]) for i, j in np.ndindex(SIDE, SIDE) if i + j < 6])
        # The corner is observed: the density is minus infinity elsewhere.
        grid = Grid(logits)
        density = Observed(grid, jnp.asarray(corner))
        free = jnp.zeros((16, SIDE**2)).at[:, -1].set(corner)
        found = {}
        for name, proposal in (("trained", trained), ("untrained", UNTRAINED)):
            move = BlockMove(proposal, BLOCKS, context, (PLACES, tables(logits)))
            chains = block_metropolis_hastings(density, [move], free, key=KEY, num_sweeps=1200)
            draws = np.asarray(chains.draws[:, 200:, :-1])
            found[name] = np.asarray(chains.accepted).mean()
            error = draws.mean((0, 1)) - exact
            spread = draws.mean(1).std(0, ddof=1) / np.sqrt(16)
            if name == "trained":
                # 15 comparisons by t with 15 degrees of freedom at 6 standard errors: false alarms about 4e-4.
                assert (np.abs(error) < 6 * spread + 1e-3).all()
                assert np.abs(error).max() < 0.05
        assert found["trained"] > 0.75 > 0.5 > found["untrained"]


@jax.jit
def eliminated(logits, corner):
    return discrete_marginals(grid_program, {"logits": logits, "corner": corner}, {})


class Observed(eqx.Module):
    grid: Grid
    corner: jax.Array

    def __call__(self, state):
        return jnp.where(state[-1] == self.corner, self.grid(state), -jnp.inf)


# A tight pair: x0 ~ N(parent, 1), x1 ~ N(slope x0, scale), and a child ~ N(x1, 1).
def pair_instance(key):
    numbers = jax.random.normal(key, (6,))
    parent, slope, log_scale = numbers[0], numbers[1], 0.5 * numbers[2] - 2.5
    first = parent + numbers[3]
    second = slope * first + jnp.exp(log_scale) * numbers[4]
    child = second + numbers[5]
    return jnp.stack([first, second]), jnp.stack([parent, child, slope, log_scale])


def pair_program(slope, scale, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", dist.Normal(mu, 1.0))
    z = numpyro.sample("z", dist.Normal(slope * x, scale))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.slow
def test_a_tight_pair_beside_its_parent_matches_the_closed_form():
    pair = BlockProposal.random((0, 0), 4, key=KEY, components=1, hidden=(48, 48))
    pair, history = train_proposal(pair, pair_instance, key=jax.random.key(1), num_steps=1000, batch_size=64)
    assert len(history.losses) == 1000

    def parent_instance(key):
        mu, noise = jax.random.normal(key, (2,))
        return mu[None], (mu + noise)[None]

    parent = BlockProposal.random((0,), 1, key=KEY, components=1, hidden=(8,))
    parent, _ = train_proposal(parent, parent_instance, key=jax.random.key(2), num_steps=200)
    slope, scale, y = 0.8, 0.05, 1.5
    told = jnp.array([[slope, np.log(scale)]])
    moves = (
        BlockMove(pair, [["x", "z"]], lambda v, p: jnp.stack([v["mu"], 1.5, *p]), told),
        BlockMove(parent, [["mu"]], lambda v, p: v["x"][None]),
    )
    conditioned = conditioned_model(pair_program, {"slope": slope, "scale": scale, "y": y})
    posterior = LearnedProposals(moves, num_samples=3000)(conditioned, key=jax.random.key(4))
    assert posterior.statistics["accept_prob"].mean() > 0.6 and posterior["x"].shape == (4, 3000)
    # Precision matrix of (mu, x, z) from the quadratic form of the log density.
    tight = 1 / scale**2
    precision = np.array([[2, -1, 0], [-1, 1 + slope**2 * tight, -slope * tight], [0, -slope * tight, tight + 1]])
    covariance = np.linalg.inv(precision)
    mean = covariance @ [0, 0, y]
    draws = np.stack([np.asarray(posterior[n], np.float64).ravel() for n in ("mu", "x", "z")], 1)
    # A tenth of a standard deviation is about five standard errors at the effective sample sizes of over 2,000.
    assert (np.abs(draws.mean(0) - mean) < 0.1 * np.sqrt(np.diag(covariance))).all()
    np.testing.assert_allclose(np.cov(draws.T), covariance, rtol=0.12)
    assert np.std(draws[:, 2] - slope * draws[:, 1]) == pytest.approx(scale, rel=0.1)


def mixed_program(y):
    z = numpyro.sample("z", dist.Categorical(np.array([0.2, 0.5, 0.3])))
    x = numpyro.sample("x", dist.Normal(2.0 * z, 0.5))
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


@pytest.mark.slow
def test_a_block_of_a_finite_and_a_continuous_latent():
    # Even an untrained proposal is exact, if slow.
    proposal = BlockProposal.random((3, 0), 1, key=KEY, components=2, hidden=(4,))
    proposal = eqx.tree_at(lambda p: p.width, proposal, np.array([1, 2.0], np.float32))
    move = BlockMove(proposal, [["z", "x"]], lambda values, p: jnp.ones(1))
    posterior = LearnedProposals((move,), num_chains=16, num_warmup=100, num_samples=2000)(
        conditioned_model(mixed_program, {"y": 1.3}), key=KEY
    )
    weights = np.array([0.2, 0.5, 0.3]) * np.exp(-((1.3 - 2.0 * np.arange(3)) ** 2))
    weights /= weights.sum()
    z, x = np.asarray(posterior["z"]), np.asarray(posterior["x"])
    assert z.dtype.kind == "i"
    for want, f in [(weights[1], z == 1), (weights[2], z == 2), (weights @ (np.arange(3) + 0.65), x)]:
        means = f.mean(1)
        # t with 15 degrees of freedom at six standard errors, three times: false alarms about 1e-4.
        assert abs(means.mean() - want) < 6 * means.std(ddof=1) / 4


def test_proposals_that_are_not_numbers_are_refused():
    proposal = BlockProposal.random((0,), 1, key=KEY, components=1, hidden=(4,))
    move = BlockMove(proposal, [[0]], lambda s, p: jnp.full(1, jnp.nan))
    chains = block_metropolis_hastings(lambda s: -(s**2).sum(), [move], jnp.ones((2, 1)), key=KEY, num_sweeps=5)
    assert (np.asarray(chains.draws) == 1).all() and not np.asarray(chains.accepted).any()


def test_bad_input():
    for sizes, message in (((), "0 for a continuous"), ((1,), "0 for a continuous"), ((2, -1), "0 for a continuous")):
        with pytest.raises(InputError, match=message):
            BlockProposal.random(sizes, 1, key=KEY)
    with pytest.raises(InputError, match="at least 1"):
        BlockProposal.random((2,), 0, key=KEY)
    proposal = BlockProposal.random((2,), 1, key=KEY, hidden=(4,))
    with pytest.raises(InputError, match="2 block values and 1 features"):
        train_proposal(proposal, lambda k: (jnp.zeros(2), jnp.zeros(1)), key=KEY)
    with pytest.raises(InputError, match="not finite"):
        train_proposal(proposal, lambda k: (jnp.zeros(1), jnp.full(1, jnp.nan)), key=KEY)
    with pytest.raises(InputError, match="must be one of 0 to 1"):
        train_proposal(proposal, lambda k: (jnp.full(1, 2.0), jnp.zeros(1)), key=KEY)
    with pytest.raises(InputError, match="num_steps"):
        train_proposal(proposal, lambda k: (jnp.zeros(1), jnp.zeros(1)), key=KEY, num_steps=0)
    context = lambda s, p: jnp.zeros(1)  # noqa: E731
    with pytest.raises(InputError, match=r"shape \(places, 1\)"):
        BlockMove(proposal, [[0, 1]], context)
    with pytest.raises(InputError, match="2 rows, one per place"):
        BlockMove(proposal, [[0], [1]], context, jnp.zeros(3))
    flat, start = (lambda s: jnp.zeros(())), jnp.zeros((2, 2))
    for blocks, message in (([[2]], "from 0 to 1"), ([[-1]], "from 0 to 1"), ([["x"]], "must be indices")):
        with pytest.raises(InputError, match=message):
            block_metropolis_hastings(flat, [BlockMove(proposal, blocks, context)], start, key=KEY)
    double = BlockMove(BlockProposal.random((2, 2), 1, key=KEY, hidden=(4,)), [[0, 0]], context)
    with pytest.raises(InputError, match="twice"):
        block_metropolis_hastings(flat, [double], start, key=KEY)
    fine = BlockMove(proposal, [[0]], context)
    with pytest.raises(InputError, match="nothing to do"):
        block_metropolis_hastings(flat, [], start, key=KEY)
    with pytest.raises(InputError, match="axis for chains"):
        block_metropolis_hastings(flat, [fine], jnp.zeros(2), key=KEY)
    with pytest.raises(InputError, match="chain 0 starts where"):
        block_metropolis_hastings(lambda s: -jnp.inf * jnp.ones(()), [fine], start, key=KEY)


def test_models_and_settings_that_do_not_fit():
    proposal = BlockProposal.random((2,), 1, key=KEY, hidden=(4,))
    context = lambda v, p: jnp.zeros(1)  # noqa: E731
    engine = LearnedProposals((BlockMove(proposal, [["z"]], context),), num_samples=10)

    def with_z(**sites):
        def program(y):
            for name, d in sites.items():
                numpyro.sample(name, d)
            numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

        return conditioned_model(program, {"y": 0.0})

    coin = dist.Bernoulli(0.5)
    for sites, message in (
        ({"z": coin, "x": dist.Normal(0.0, 1.0)}, r"no block moves \['x'\]"),
        ({"w": coin}, "blocks name 'z'"),
        ({"z": dist.Categorical(np.ones(3) / 3)}, r"have \[3\] values"),
        ({"z": dist.DiscreteUniform(1, 2)}, "do not count from 0"),
        ({"z": dist.Poisson(1.0)}, "infinitely many"),
        ({"z": coin, "x": dist.HalfNormal(1.0)}, "'x' .HalfNormal. is not real-valued"),
        ({"z": coin, "x": dist.ImproperUniform(dist.constraints.real, (), ())}, "improper"),
    ):
        with pytest.raises(InputError, match=message):
            engine(with_z(**sites), key=KEY)
    with pytest.raises(InputError, match="num_chains must be"):
        LearnedProposals(engine.moves, num_chains=0)
    with pytest.raises(InputError, match="tuple of BlockMove"):
        LearnedProposals([proposal])
