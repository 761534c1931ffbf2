"""Kinds of uncertainty: identities that hold exactly."""

from __future__ import annotations

import numpy as np
import numpyro.distributions as dist
import scipy.stats as st

from bayeslens.core.mixture import Members, mix_members
from bayeslens.core.quantiles import mean_and_variance
from bayeslens.evaluation.uncertainty import entropy_split, variance_split

RNG = np.random.default_rng(0)
LOC, SCALE = RNG.normal(size=(5, 7)), RNG.gamma(2, size=(5, 7))
WEIGHTS = RNG.dirichlet(np.ones(5))
PROBS = RNG.dirichlet(np.ones(3), (5, 7))


def test_total_variance_is_that_of_the_mixture():
    members = dist.Normal(LOC, SCALE)
    split = variance_split(members, WEIGHTS)
    _, variance = mean_and_variance(mix_members(members, WEIGHTS))
    np.testing.assert_allclose(split.total, variance)
    np.testing.assert_allclose(split.aleatoric + split.epistemic, split.total)
    np.testing.assert_allclose(split.aleatoric, WEIGHTS @ SCALE**2)


def test_families_side_by_side():
    members = Members([dist.Normal(LOC[:3], SCALE[:3]), dist.Laplace(LOC[3:], SCALE[3:])])
    split = variance_split(members, WEIGHTS)
    _, variance = mean_and_variance(mix_members(members, WEIGHTS))
    np.testing.assert_allclose(split.total, variance)


def test_members_that_agree_leave_nothing_epistemic():
    split = variance_split(dist.Normal(np.tile(LOC[:1], (5, 1)), SCALE), WEIGHTS)
    np.testing.assert_allclose(split.epistemic, 0.0, atol=1e-12)
    split = entropy_split(np.tile(PROBS[:1], (5, 1, 1)), WEIGHTS)
    np.testing.assert_allclose(split.epistemic, 0.0, atol=1e-12)


def test_entropy_split():
    split = entropy_split(PROBS, WEIGHTS)
    mixed = np.einsum("m,mrc->rc", WEIGHTS, PROBS)
    np.testing.assert_allclose(split.total, st.entropy(mixed, axis=1))
    np.testing.assert_allclose(split.aleatoric, WEIGHTS @ st.entropy(PROBS, axis=2))
    # Mutual information is the mean divergence of the members from their mixture.
    np.testing.assert_allclose(split.epistemic, WEIGHTS @ st.entropy(PROBS, mixed[None], axis=2))
    assert (split.epistemic >= 0).all() and (split.total <= np.log(3)).all()


def test_certain_members_have_no_aleatoric_part():
    split = entropy_split(np.eye(3)[:, None], np.ones(3) / 3)
    np.testing.assert_allclose([split.aleatoric[0], split.epistemic[0]], [0.0, np.log(3)])
