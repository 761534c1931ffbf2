"""CaPE: targets by counting, the choice of the best network, and its gain over a network that memorized."""

from __future__ import annotations

import equinox as eqx
import jax
import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.evaluation.probability_estimation import cape, empirical_probabilities, probabilities

RNG = np.random.default_rng(0)


def test_bins_hold_equal_numbers_and_their_mean():
    probability, outcome = RNG.random(1000), RNG.random(1000) < 0.3
    found = empirical_probabilities(probability, outcome, bins=10)
    order = np.argsort(probability)
    np.testing.assert_allclose(
        found[order].reshape(10, 100), np.tile(outcome[order].reshape(10, 100).mean(1), (100, 1)).T
    )
    np.testing.assert_allclose(empirical_probabilities(probability, outcome, bins=1), outcome.mean())
    np.testing.assert_array_equal(empirical_probabilities(probability, outcome, bins=5000), outcome)  # a bin per row


def test_kernel_is_a_weighted_mean():
    """Against the sum over all pairs; cells a twentieth of the bandwidth wide leave 2%."""
    probability = RNG.random(400)
    outcome = (RNG.random(400) < probability).astype(float)
    found = empirical_probabilities(probability, outcome, bins=None, bandwidth=0.1)
    weights = np.exp(-0.5 * ((probability[:, None] - probability) / 0.1) ** 2)
    np.testing.assert_allclose(found, weights @ outcome / weights.sum(1), atol=0.01)


@pytest.fixture(scope="module")
def trained():
    x = RNG.normal(size=(800, 4)).astype(np.float32)
    p = 1 / (1 + np.exp(-x[:, 0]))
    network = eqx.nn.MLP(4, "scalar", 32, 1, key=jax.random.key(0))
    return network, x, p, cape(network, x, RNG.random(800) < p, key=jax.random.key(1), cycles=2, learning_rate=3e-3)


def test_best_network_is_returned(trained):
    history = trained[-1][1]
    assert len(history.validation_losses) == history.early_epochs + 2 * 2
    assert history.best_epoch == history.validation_losses.argmin() + 1


def test_probabilities_are_near_the_truth(trained):
    """Far nearer than the base rate: a third of its mean squared error."""
    _, x, p, (fitted, _) = trained
    assert np.mean((probabilities(fitted, x) - p) ** 2) < np.var(p) / 3


def test_keys_decide(trained):
    network, x, p, _ = trained
    y = p > 0.5
    settings = {"cycles": 1, "max_epochs": 2, "learning_rate": 3e-3}
    one, two = (cape(network, x, y, key=jax.random.key(5), **settings)[1] for _ in range(2))
    np.testing.assert_array_equal(one.validation_losses, two.validation_losses)


@pytest.mark.parametrize(
    ("features", "outcomes", "message"),
    [
        (np.zeros((10, 2)), np.full(10, 2.0), "outcome of row 0 is 2"),
        (np.full((10, 2), np.nan), np.zeros(10), "features of row 0"),
        (np.zeros((10, 2)), np.zeros(9), "one outcome per row"),
        (np.zeros((2, 2)), np.zeros(2), "leaves nothing"),
    ],
)
def test_bad_input(features, outcomes, message):
    with pytest.raises(InputError, match=message):
        cape(eqx.nn.Linear(2, "scalar", key=jax.random.key(0)), features, outcomes, key=jax.random.key(0))
