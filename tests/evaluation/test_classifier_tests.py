"""Classifier two-sample tests: Bayes accuracy, levels, and what a local test sees."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.preprocessing import PolynomialFeatures

from bayeslens.core.errors import InputError
from bayeslens.evaluation.classifier_tests import (
    _polynomial_logistic,
    classifier_two_sample_test,
    default_classifier,
    local_classifier_two_sample_test,
)
from bayeslens.report.check_pictures import local_test_panels
from bayeslens.report.pictures import lay_out

KEY = jax.random.key(0)


def test_accuracy_is_that_of_the_best_classifier():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4000, 2)), rng.normal(size=(4000, 2)) + np.array([1.0, 0.0])
    found = classifier_two_sample_test(first, second, key=KEY, classifier=LinearDiscriminantAnalysis())
    assert abs(found.accuracy - stats.norm.cdf(0.5)) < 4 * found.standard_error  # false alarms below 1e-4
    assert found.p_value < 1e-10 and "accuracy" in str(found)


def test_the_network_tells_what_linear_classifiers_cannot():
    rng = np.random.default_rng(0)
    sign = rng.choice([-1.0, 1.0], 300)
    first = np.column_stack([sign, sign]) + 0.3 * rng.normal(size=(300, 2))
    second = np.column_stack([sign, -sign]) + 0.3 * rng.normal(size=(300, 2))
    network = default_classifier(2, 0).set_params(max_iter=300)
    assert classifier_two_sample_test(first, second, key=KEY, classifier=network, folds=2).accuracy > 0.95
    assert classifier_two_sample_test(first, second, key=KEY, classifier=LinearDiscriminantAnalysis()).p_value > 0.01


def test_levels_of_both_p_values():
    binomial, shuffled = [], []
    for repeat in range(50):
        rng = np.random.default_rng(repeat)
        first, second = rng.normal(size=(2, 60, 2))
        found = classifier_two_sample_test(first, second, key=jax.random.key(repeat), classifier=GaussianNB())
        binomial.append(found.p_value)
        if repeat < 20:
            more = {"classifier": GaussianNB(), "folds": 2, "permutations": 19}
            shuffled.append(classifier_two_sample_test(first, second, key=jax.random.key(repeat), **more).p_value)
    # The binomial one takes folds as independent; upper bounds for level 0.2, false alarms 1e-3
    assert sum(p <= 0.2 for p in binomial) <= stats.binom.ppf(1 - 1e-3, 50, 0.2) + 3
    assert sum(p <= 0.2 for p in shuffled) <= stats.binom.ppf(1 - 1e-3, 20, 0.2)


def test_logistic_regressions_reach_the_optimum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    labels = np.stack([rng.random(300) < 1 / (1 + np.exp(-x[:, 0] * x[:, 1] - x[:, 0])), rng.random(300) < 0.5])
    products = PolynomialFeatures(3, include_bias=False).fit_transform(x)
    for found, y in zip(_polynomial_logistic(x, labels, x), labels, strict=True):
        fitted = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(products, y)
        np.testing.assert_allclose(found, fitted.predict_proba(products)[:, 1], atol=2e-3)


def local(seed, scale_at, rows=400, where=1.0, **more):
    """Posteriors N(data, 1) approximated by N(data, scale_at(data)^2), looked at where data are `where`."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(rows, 1))
    parameters = data + rng.normal(size=data.shape)
    draws = data + scale_at(data) * rng.normal(size=data.shape)
    at = where + scale_at(np.array([[where]])) * rng.normal(size=(100, 1))
    return local_classifier_two_sample_test(
        parameters, draws, data, observation=[where], observation_draws=at, key=jax.random.key(seed), **more
    )


def test_the_local_level_holds():
    rejected = sum(local(s, lambda x: 1.0, trials=39).p_value <= 0.2 for s in range(60))
    # exact level 0.2; binomial(60), false alarms 1e-3 on either side
    assert stats.binom.ppf(1e-3, 60, 0.2) <= rejected <= stats.binom.ppf(1 - 1e-3, 60, 0.2)


def test_a_narrow_posterior_is_found_and_where_it_has_too_much_mass():
    found = local(0, lambda x: 0.6, 800)
    assert found.p_value <= 0.01 and found.probabilities.mean() > 0.5
    lay_out(local_test_panels(found), 2)
    assert "statistic" in str(found)


@pytest.mark.slow
def test_the_statistic_is_local():
    def scale(x):  # right where data are 0, too narrow above and too wide below
        return np.exp(-0.5 * x)

    above, right = (local(0, scale, 1000, where=where) for where in (1.2, 0.0))
    assert above.p_value <= 0.01 and above.statistic > 2 * right.statistic
    assert np.median(above.probabilities) > 0.55 and abs(right.probabilities.mean() - 0.5) < 0.1


def test_any_classifier_will_do():
    assert local(0, lambda x: 0.3, 300, classifier=GaussianNB(), trials=19).p_value <= 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: classifier_two_sample_test(z, z[:, :1], key=KEY), "3 and 1 dimensions"),
        (lambda z: classifier_two_sample_test(z[:8], z, key=KEY), "too few for 5 folds"),
        (lambda z: classifier_two_sample_test(np.where(z > 2, np.nan, z), z, key=KEY), "is not finite"),
        (lambda z: local_classifier_two_sample_test(
            z, z, z, observation=np.zeros(2), observation_draws=z, key=KEY), "observation do not fit"),
        (lambda z: local_classifier_two_sample_test(
            z, z, np.tile(z, (1, 15)), observation=np.zeros(45), observation_draws=z, key=KEY), "summarize the data"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(np.random.default_rng(0).normal(size=(100, 3)))
