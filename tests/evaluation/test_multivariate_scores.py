"""Scores of draws of vectors: pair by pair, unbiased, and each seeing what it should."""

from __future__ import annotations

import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.evaluation import multivariate_scores
from bayeslens.evaluation.multivariate_scores import energy_loss, variogram_loss
from bayeslens.evaluation.scores import crps_loss_from_samples

RNG = np.random.default_rng(0)
DRAWS, Y = RNG.normal(size=(9, 5, 3)), RNG.normal(size=(5, 3))


def energy_by_pairs(draws, y, fair):
    count = len(draws)
    pairs = np.linalg.norm(draws[:, None] - draws, axis=-1).sum((0, 1))
    return np.linalg.norm(draws - y, axis=-1).mean(0) - pairs / (count * (count - fair)) / 2


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("block", [2**21, 40, 1])
def test_energy_is_pair_by_pair(fair, block, monkeypatch):
    monkeypatch.setattr(multivariate_scores, "_BLOCK", block)  # the blocks must not be seen
    np.testing.assert_allclose(energy_loss(DRAWS, Y, fair=fair), energy_by_pairs(DRAWS, Y, fair), rtol=1e-6)


def test_energy_far_from_the_origin():
    np.testing.assert_allclose(energy_loss(DRAWS + 1e6, Y + 1e6), energy_loss(DRAWS, Y), atol=1e-6)


def test_energy_in_one_dimension_is_the_crps():
    np.testing.assert_allclose(energy_loss(DRAWS[..., :1], Y[:, :1]), crps_loss_from_samples(DRAWS[..., 0], Y[:, 0]))


@pytest.mark.parametrize("order", [0.5, 1.0])
def test_variogram_is_pair_by_pair(order, monkeypatch):
    monkeypatch.setattr(multivariate_scores, "_BLOCK", 60)
    total = np.zeros(5)
    for i in range(3):
        for j in range(3):
            predicted = (np.abs(DRAWS[..., i] - DRAWS[..., j]) ** order).mean(0)
            total += (np.abs(Y[:, i] - Y[:, j]) ** order - predicted) ** 2
    np.testing.assert_allclose(variogram_loss(DRAWS, Y, order=order, fair=False), total)


@pytest.mark.parametrize("loss", [energy_loss, variogram_loss])
def test_fair_losses_do_not_depend_on_the_number_of_draws(loss):
    """Mean over 4,000 sets of 3 draws against 4,000 of 30, within 4 standard errors (false alarm rate 6e-5)."""
    few, many = (loss(RNG.normal(size=(m, 4000, 2)), np.tile([0.5, -0.3], (4000, 1))) for m in (3, 30))
    error = np.hypot(few.std(), many.std()) / np.sqrt(4000)
    assert abs(few.mean() - many.mean()) < 4 * error
    unfair = loss(RNG.normal(size=(3, 4000, 2)), np.tile([0.5, -0.3], (4000, 1)), fair=False)
    assert unfair.mean() - many.mean() > 4 * error  # the control: the plug-in loss favours more draws


def test_each_sees_its_kind_of_error():
    """Outcomes with correlation 0.9; 400 rows of 60 draws. Standard errors of paired differences; false alarms 6e-5."""
    root = np.linalg.cholesky(np.array([[1.0, 0.9], [0.9, 1.0]]))
    y, noise = RNG.normal(size=(400, 2)) @ root.T, RNG.normal(size=(60, 400, 2))
    truth, independent, shifted = noise @ root.T, noise, noise @ root.T + 1.0

    def z(loss, rival):
        difference = loss(rival, y) - loss(truth, y)
        return difference.mean() / (difference.std() / 20)

    assert z(energy_loss, shifted) > 4 and z(variogram_loss, independent) > 4
    assert z(variogram_loss, independent) > z(energy_loss, independent)
    np.testing.assert_allclose(variogram_loss(shifted, y), variogram_loss(truth, y))  # a shared error is not seen


@pytest.mark.parametrize(
    ("draws", "y", "message"),
    [
        (np.zeros((1, 2, 2)), np.zeros((2, 2)), "at least two"),
        (np.zeros((3, 2, 2)), np.zeros((3, 2)), "shape"),
        (np.zeros((3, 2)), np.zeros(2), "shape"),
        (np.zeros((3, 2, 2)), np.array([[0.0, 0.0], [np.nan, 0.0]]), "row 1 .*not finite"),
    ],
)
def test_refused(draws, y, message):
    with pytest.raises(InputError, match=message):
        energy_loss(draws, y)


def test_variogram_needs_two_dimensions():
    with pytest.raises(InputError, match="two dimensions"):
        variogram_loss(np.zeros((3, 2, 1)), np.zeros((2, 1)))
