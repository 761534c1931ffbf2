"""PAC prediction sets: the certificate is a binomial tail, exactly, and the network makes sets smaller."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.evaluation.pac_prediction_sets import PACPredictionSets, clopper_pearson_upper, pac_threshold


@pytest.mark.parametrize("rows", [59, 100, 1000])
@pytest.mark.parametrize("error,delta", [(0.05, 0.05), (0.1, 0.01), (0.3, 0.2)])
def test_threshold_is_the_tightest_that_can_be_certified(rows, error, delta):
    """With continuous scores the miscoverage is the (errors + 1)-th of n uniforms from above: Beta, so exact."""
    scores = np.random.default_rng(0).permutation(np.arange(float(rows)))
    errors = int((scores > pac_threshold(scores, error, delta)).sum())
    assert st.beta.sf(error, errors + 1, rows - errors) <= delta < st.beta.sf(error, errors + 2, rows - errors - 1)
    assert clopper_pearson_upper(errors, rows, delta) <= error + 1e-9
    assert clopper_pearson_upper(errors + 1, rows, delta) > error


def test_upper_bound_solves_its_equation():
    bound = clopper_pearson_upper(np.array([0, 3, 50]), 50, 0.05)
    np.testing.assert_allclose(st.binom.cdf([0, 3], 50, bound[:2]), 0.05, rtol=1e-9)
    assert bound[2] == 1


def rows(n, seed):
    """Six classes on a line, and a score that does not know how the noise grows with the second feature."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(n, 2))
    center = 2.5 + 2 * x[:, 0]
    labels = np.clip(np.rint(center + np.exp(1.5 * x[:, 1] - 1) * rng.normal(size=n)), 0, 5).astype(int)
    return x, -np.abs(np.arange(6) - center[:, None]), labels


@pytest.fixture(scope="module")
def fitted():
    return PACPredictionSets.fit(
        rows(1000, 0), rows(1000, 1), error=0.1, key=jax.random.key(0), width=16, num_steps=200
    )


def test_network_makes_sets_smaller_at_the_same_promise(fitted):
    features, scores, labels = rows(20_000, 2)
    inside = fitted(features, scores)
    # Given this network, miscoverage exceeds 0.1 with probability 0.05 over calibration rows; 0.115 with 1e-3.
    assert 1 - inside[np.arange(len(labels)), labels].mean() < 0.115
    _, calibration_scores, calibration_labels = rows(1000, 1)
    edge = pac_threshold(-calibration_scores[np.arange(1000), calibration_labels], 0.1, 0.05)
    assert inside.sum(1).mean() < 0.9 * (-scores <= edge).sum(1).mean()


def test_certificate_can_be_renewed(fitted):
    again = fitted.certify(rows(1000, 1))
    assert again.margin == fitted.margin
    assert fitted.certify(rows(1000, 1), error=0.05).margin > fitted.margin
    assert "at most 10.0%" in fitted.promise


def test_round_trip(fitted, tmp_path):
    save(fitted, tmp_path / "sets.bayes")
    features, scores, _ = rows(50, 3)
    assert (load(tmp_path / "sets.bayes")(features, scores) == fitted(features, scores)).all()


def test_bad_input(fitted):
    with pytest.raises(InputError, match="at least 59 calibration"):
        pac_threshold(np.zeros(58), 0.05, 0.05)
    with pytest.raises(InputError, match="error must lie"):
        pac_threshold(np.zeros(58), 0.0, 0.05)
    features, scores, labels = rows(100, 4)
    with pytest.raises(InputError, match="codes from 0 to 5"):
        fitted.certify((features, scores, labels + 6))
    scores[3, 0] = -np.inf
    with pytest.raises(InputError, match="row 3 of the new rows"):
        fitted(features, scores)
