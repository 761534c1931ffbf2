"""Neural nested sampling against exact evidences and plain runs; its networks and their breeding by themselves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import special

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.inference import nested_sampling, neural_nested_sampling
from bayeslens.inference.nested_sampling import NestedSampling
from bayeslens.inference.neural_nested_sampling import NeuralNestedSampling, fit, offspring, random_genes

KEY = jax.random.key(0)
CENTER = np.array([1.0, -1.0])
COVARIANCE = 0.1 * np.array([[1.0, 0.6], [0.6, 1.0]])
CALLS = []


def python_density(x, center):
    """Log density of a normal distribution, in plain Python."""
    CALLS.append(np.size(x) // 2)
    difference = np.asarray(x) - np.asarray(center)
    quadratic = np.einsum("...i,ij,...j", difference, np.linalg.inv(COVARIANCE), difference)
    return np.asarray(-0.5 * quadratic - 0.5 * np.linalg.slogdet(2 * np.pi * COVARIANCE)[1], np.float32)


def gaussian(center):
    x = numpyro.sample("x", dist.Uniform(-5.0, 5.0).expand([2]).to_event(1))
    shape = jax.ShapeDtypeStruct((), np.float32)
    numpyro.factor("likelihood", jax.pure_callback(python_density, shape, x, center, vmap_method="expand_dims"))


@pytest.fixture(scope="module")
def conditioned():
    return conditioned_model(gaussian, {"center": CENTER})


@pytest.fixture(scope="module")
def plain(conditioned):
    return NestedSampling(num_live=300)(conditioned, key=KEY)


@pytest.fixture(scope="module")
def neural(conditioned):
    CALLS.clear()
    return NeuralNestedSampling(num_live=300)(conditioned, key=KEY), sum(CALLS)


@pytest.mark.slow
def test_fewer_likelihoods_for_the_same_evidence_and_posterior(neural, plain):
    found, calls = neural
    # The likelihood integrates to one within the square, but for e^-80.
    assert abs(found.log_evidence + np.log(100)) < 4 * found.log_evidence_error
    assert abs(plain.log_evidence + np.log(100)) < 4 * plain.log_evidence_error
    assert found.log_evidence_error < 0.2
    evaluations = found.statistics["num_evaluations"].sum()
    assert calls == round(evaluations)
    assert evaluations < 0.7 * plain.statistics["num_evaluations"].sum()
    assert found.statistics["num_guesses"].sum() > evaluations / 10
    weights = special.softmax(found.log_weights)[0]
    mean = weights @ found["x"][0]
    # Weighted points are worth some 200 independent draws: five standard errors.
    assert (np.abs(mean - CENTER) < 5 * np.sqrt(0.1 / 200)).all()
    difference = found["x"][0] - CENTER
    assert np.abs((weights * difference.T) @ difference - COVARIANCE).max() < 5 * 0.1 * np.sqrt(2 / 200)
    assert found.engine == "neural_nested" and found.warnings == ()


@pytest.mark.slow
def test_weights_are_made_of_true_likelihoods(neural):
    found, _ = neural
    true = python_density(found["x"][0], CENTER)
    np.testing.assert_allclose(found.statistics["log_likelihood"][0], true, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_without_an_accurate_network_it_is_plain_nested_sampling(conditioned, plain, monkeypatch):
    monkeypatch.setattr(neural_nested_sampling.Breeding, "train", lambda self, *_: (None, self))
    found = NeuralNestedSampling(num_live=300)(conditioned, key=KEY)
    np.testing.assert_array_equal(found["x"], plain["x"])
    assert found.log_evidence == plain.log_evidence and "num_guesses" not in found.statistics


def banana(points):
    """The log density of a curved shape."""
    a, b = np.asarray(points, np.float64).T
    return -0.5 * ((a + b**2) ** 2 + b**2)


def fitted(log_likelihood):
    """Networks of a first generation and their errors, for as many points as the engine has, by the same program."""
    rng = np.random.default_rng(1)
    points = rng.normal(size=(600, 2)).astype(np.float32)
    values = log_likelihood(points)
    return fit(points[:300], values[:300], random_genes(rng), key=KEY, more=(points[300:], values[300:]))


@pytest.fixture(scope="module")
def trained():
    networks, errors = fitted(banana)
    return networks[int(np.argmin(errors))], errors.min()


class Wrong:
    """A breeding that gives a network for another likelihood."""

    def __init__(self, network, given):
        self.network, self.given = network, given

    def train(self, *_):
        self.given.append(1)
        return self.network, self


@pytest.mark.slow
def test_wrong_networks_are_thrown_out(conditioned, plain, trained, monkeypatch):
    given = []
    wrong = Wrong(trained[0], given)
    monkeypatch.setattr(neural_nested_sampling, "Breeding", lambda key: wrong)
    found = NeuralNestedSampling(num_live=300)(conditioned, key=KEY)
    assert len(given) > 3 and found.statistics["num_guesses"].sum() > 0
    # Nothing that it guided is kept, but what it cost is told.
    assert abs(found.log_evidence + np.log(100)) < 4 * found.log_evidence_error
    assert found.statistics["num_evaluations"].sum() > plain.statistics["num_evaluations"].sum()


@pytest.mark.slow
def test_networks_learn_a_likelihood(trained):
    network, stated = trained
    rng = np.random.default_rng(2)
    fresh = rng.normal(size=(300, 2)).astype(np.float32)
    guessed, wanted = np.asarray(jax.vmap(network.guess)(jnp.asarray(fresh))), network.scaled(banana(fresh))
    # The error that it states is that on points that it never saw.
    ordered = np.sort(network.scaled(banana(rng.normal(size=(300, 2)))))
    misplaced = np.abs(np.searchsorted(ordered, guessed) - np.searchsorted(ordered, wanted)).mean() / 300
    assert stated < 0.05 and misplaced < 2 * stated + 0.01
    # What it approximates grows with the likelihood.
    assert (np.diff(network.scaled(np.sort(banana(fresh)))) > 0).all()


@pytest.mark.slow
def test_what_cannot_be_learned_is_not_let_in():
    # Independent places are a third apart in the mean.
    assert fitted(lambda points: np.random.default_rng(3).permutation(banana(points)))[1].min() > 0.2


def test_children_have_their_parents_genes_or_new_ones():
    rng = np.random.default_rng(2)
    genes, errors = random_genes(rng), np.array([3.0, 1.0, 5.0, 2.0, 6.0, 4.0])
    after = [offspring(genes, errors, rng) for _ in range(200)]
    for name in genes._fields:
        before, later = getattr(genes, name), np.array([getattr(a, name) for a in after])
        assert (later[:, :2] == before[[1, 3]]).all()
    rates = np.array([a.learning_rate[2:] for a in after]).ravel()
    kept = np.isin(rates, genes.learning_rate[[1, 3, 0]])
    # Four fifths of 800 genes are the better half's: five standard errors.
    assert abs(kept.mean() - 0.8) < 5 * np.sqrt(0.16 / 800)
    assert not np.isin(rates, genes.learning_rate[[5, 2, 4]]).any()


@pytest.mark.slow
def test_an_interruption_returns_what_there_is(conditioned, monkeypatch):
    true, calls = nested_sampling.climb, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(nested_sampling, "climb", interrupted)
    found = NeuralNestedSampling(num_live=300)(conditioned, key=KEY)
    assert "interrupted" in found.warnings[0] and np.isfinite(found.log_evidence)


def flat(y):
    mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_improper_priors():
    with pytest.raises(InputError, match="improper priors, and neural nested sampling"):
        NeuralNestedSampling()(conditioned_model(flat, {"y": 1.0}), key=KEY)


@pytest.mark.parametrize("settings", [{"num_live": 19}, {"num_steps": 0}, {"accuracy": 0.0}, {"accuracy": 1.0}])
def test_bad_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        dataclasses.replace(NeuralNestedSampling(), **settings)
