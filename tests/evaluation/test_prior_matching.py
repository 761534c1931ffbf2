"""Prior matching: the defining equation, exact recovery of a bias, and errors of the weights."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.evaluation.prior_matching import PriorMatching

RNG = np.random.default_rng(0)


def posteriors(rows: int, classes: int = 3) -> np.ndarray:
    """Class probabilities whose mean is uniform, exactly: every row is repeated under all turns of the classes."""
    probs = RNG.dirichlet(np.full(classes, 0.5), rows // classes)
    return np.concatenate([np.roll(probs, turn, 1) for turn in range(classes)])


def biased(probs: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    scores = probs * np.exp(log_weights)
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("prior", [None, [0.2, 0.3, 0.5], [0.98, 0.01, 0.01]])
def test_mean_is_the_prior(prior):
    probs = RNG.dirichlet([0.2, 1.0, 3.0], 500)
    matched = np.asarray(PriorMatching.fit(probs, prior)(dist.CategoricalProbs(probs)).probs)
    np.testing.assert_allclose(matched.mean(0), np.full(3, 1 / 3) if prior is None else prior, atol=1e-9)
    np.testing.assert_allclose(matched.sum(1), 1.0)


def test_bias_is_undone_exactly():
    """Probabilities with a uniform mean, biased by known weights: these are found, and the bias is gone."""
    probs, bias = posteriors(600), np.array([2.0, -0.5, -1.5])
    matched = PriorMatching.fit(biased(probs, bias))
    np.testing.assert_allclose(matched.log_weights, -bias, atol=1e-6)
    np.testing.assert_allclose(matched(dist.CategoricalProbs(biased(probs, bias))).probs, probs, atol=1e-6)


def test_strong_bias_converges():
    probs, bias = posteriors(600), np.array([25.0, 0.0, -25.0])
    np.testing.assert_allclose(PriorMatching.fit(biased(probs, bias)).log_weights, -bias, rtol=1e-5, atol=1e-6)


def test_null_input_is_the_bias():
    bias = np.array([1.0, 0.0, -1.0])
    null = biased(np.full((1, 3), 1 / 3), bias)[0]
    np.testing.assert_allclose(PriorMatching.from_null(null).log_weights, -bias, atol=1e-12)
    prior = np.array([0.5, 0.25, 0.25])
    moved = PriorMatching.from_null(null, prior)
    np.testing.assert_allclose(moved(dist.CategoricalProbs(null[None])).probs[0], prior)


def test_standard_errors_match_repetition():
    """The spread of the weights over 400 tables, within 15% (four standard errors of a standard deviation)."""
    tables = RNG.dirichlet([0.4, 1.0, 2.0], (400, 100))
    fitted = [PriorMatching.fit(t) for t in tables]
    spread = np.std([f.log_weights for f in fitted], axis=0)
    np.testing.assert_allclose(np.mean([f.standard_error for f in fitted], axis=0), spread, rtol=0.15)


def test_round_trip(tmp_path):
    probs = RNG.dirichlet(np.ones(3), 50)
    matched = PriorMatching.fit(probs)
    save(matched, tmp_path / "matched.bayes")
    again = load(tmp_path / "matched.bayes")
    np.testing.assert_array_equal(again.log_weights, matched.log_weights)


@pytest.mark.parametrize(
    ("probs", "prior", "message"),
    [
        ([[0.5, 0.6]], None, "row 0"),
        ([[0.5, 0.5]], [0.5, 0.4], "sum to 1"),
        ([[0.5, 0.5]], [1.0, 0.0], "positive"),
        ([[1.0, 0.0]], None, "class 1 has probability 0"),
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.9, 0.1]], [0.5, 0.5], "too many rows are certain"),
    ],
)
def test_bad_input(probs, prior, message):
    with pytest.raises(InputError, match=message):
        PriorMatching.fit(np.array(probs), prior)


def test_bad_null_input():
    with pytest.raises(InputError, match="null_probs"):
        PriorMatching.from_null([0.5, 0.0])
