"""Deep ensembles: exact forward pass, known regressions and classifications, small and awkward tables."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.quantiles import cdf, log_prob
from bayeslens.core.table import Target
from bayeslens.evaluation.uncertainty import variance_split
from bayeslens.learners.deep_ensemble import DeepEnsemble, DeepEnsemblePredictive, _advance

RNG = np.random.default_rng(0)
ROWS = 300
X = RNG.normal(size=(ROWS + 4000, 3))
MEAN, SCALE = np.sin(X[:, 0]) + X[:, 1], 0.2 + 0.3 * np.abs(X[:, 0])
Y = 100 + 10 * (MEAN + SCALE * RNG.normal(size=len(X)))


SMALL = DeepEnsemble(num_members=2, width=8)  # with 33 to 48 rows, all tests share its one program


@pytest.fixture(scope="module")
def regression() -> DeepEnsemblePredictive:
    return DeepEnsemble().fit(X[:ROWS], Y[:ROWS], key=jax.random.key(0))


@pytest.fixture(scope="module")
def classification() -> DeepEnsemblePredictive:
    labels = np.where(Y[:ROWS] > 105, "high", np.where(Y[:ROWS] > 95, "middle", "low"))
    return DeepEnsemble().fit(X[:ROWS], labels, key=jax.random.key(0))


def test_it_nears_the_true_density(regression: DeepEnsemblePredictive) -> None:
    scores = log_prob(regression(X[ROWS:]), Y[ROWS:])
    oracle = log_prob(dist.Normal(100 + 10 * MEAN[ROWS:], 10 * SCALE[ROWS:]), Y[ROWS:])
    constant = log_prob(dist.Normal(np.full(4000, Y[:ROWS].mean()), Y[:ROWS].std()), Y[ROWS:])
    # Fixed key: a regression test with room; 300 rows of three features cost about 0.15 nats here.
    assert oracle.mean() - scores.mean() < 0.3
    assert scores.mean() > constant.mean() + 0.5


def test_central_intervals_cover(regression: DeepEnsemblePredictive) -> None:
    transform = cdf(regression(X[ROWS:]), Y[ROWS:])
    share = ((transform > 0.05) & (transform < 0.95)).mean()
    # Nothing promises coverage; four binomial standard errors of 4,000 rows are 0.02, the rest is for the fit.
    assert 0.8 < share < 0.97


def test_forward_pass_is_the_network_written_out(regression: DeepEnsemblePredictive) -> None:
    rows = X[:4]
    members, weights = regression.members(rows)
    hidden = regression.table.dense(rows)
    layers = [(np.asarray(w)[2].astype(np.float64), np.asarray(b)[2]) for w, b in regression.layers]
    for w, b in layers[:-1]:
        pre = hidden @ w + b
        hidden = pre / (1 + np.exp(-pre))
    outputs = hidden @ layers[-1][0] + layers[-1][1]
    scale = 1e-3 + np.log1p((np.e - 1) * np.exp(outputs[:, 1]))
    np.testing.assert_allclose(members.loc[2], regression.location + regression.scale * outputs[:, 0], rtol=1e-4)
    np.testing.assert_allclose(members.scale[2], regression.scale * scale, rtol=1e-4)
    np.testing.assert_allclose(weights, 0.2, rtol=1e-6)


def test_host_and_traced_predictions_agree(regression: DeepEnsemblePredictive) -> None:
    rows = X[:7].astype(np.float32)
    host = regression.members(rows)[0]
    assert isinstance(host.loc, np.ndarray)
    traced = eqx.filter_jit(lambda p, x: p.members(x)[0].loc)(regression, jnp.asarray(rows))
    np.testing.assert_allclose(host.loc, traced, rtol=2e-4)


def test_gradient_in_x_is_that_of_finite_differences(regression: DeepEnsemblePredictive) -> None:
    mean = jax.jit(lambda x: regression.members(x)[0].loc.mean())
    row, step = X[:1].astype(np.float32), 1e-2
    gradient = jax.grad(mean)(jnp.asarray(row))[0, 1]
    shift = np.array([[0.0, step, 0.0]], np.float32)
    finite = (mean(jnp.asarray(row + shift)) - mean(jnp.asarray(row - shift))) / (2 * step)
    assert abs(float(gradient) - float(finite)) < 0.02 * abs(float(gradient)) + 0.02


def test_members_disagree_more_far_away(regression: DeepEnsemblePredictive) -> None:
    near = variance_split(*regression.members(X[ROWS : ROWS + 500])).epistemic.mean()
    far = variance_split(*regression.members(6 + X[ROWS : ROWS + 500])).epistemic.mean()
    assert far > 5 * near


def test_classes(classification: DeepEnsemblePredictive) -> None:
    members, _ = classification.members(X[ROWS:])
    probs = classification(X[ROWS:]).probs
    assert members.batch_shape == (5, 4000) and classification.classes == ("high", "low", "middle")
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    truth = np.where(Y[ROWS:] > 105, 0, np.where(Y[ROWS:] > 95, 2, 1))
    assert (probs.argmax(1) == truth).mean() > 0.7
    traced = jax.jit(lambda x: classification(x).probs)(jnp.asarray(X[:5], jnp.float32))
    np.testing.assert_allclose(classification(X[:5].astype(np.float32)).probs, traced, rtol=1e-3, atol=1e-6)


def test_same_key_same_answer_and_another_key_another() -> None:
    means = [SMALL.fit(X[:40], Y[:40], key=jax.random.key(k))(X[:3]).mean for k in (1, 1, 2)]
    np.testing.assert_array_equal(means[0], means[1])
    assert np.abs(means[0] - means[2]).max() > 0


def test_folds_of_similar_size_share_one_program() -> None:
    SMALL.fit(X[:36], Y[:36], key=jax.random.key(0))
    before = _advance._cache_size()
    SMALL.fit(X[:48, :2], Y[:48], key=jax.random.key(1))
    assert _advance._cache_size() == before


def test_rows_of_weight_zero_do_not_exist() -> None:
    weights = np.repeat([1.0, 0.0], 40)
    spoiled = np.where(weights > 0, Y[:80], 1e6)
    weighted = SMALL.fit(X[:80], spoiled, key=jax.random.key(0), weights=weights)
    alone = SMALL.fit(X[:40], Y[:40], key=jax.random.key(0))
    np.testing.assert_allclose(weighted(X[:5]).mean, alone(X[:5]).mean, rtol=1e-6)


@pytest.mark.parametrize("labels", [False, True])
def test_a_weight_of_three_standardizes_as_three_rows(labels: bool) -> None:
    # Batches and held-out rows are drawn by position, so that only what comes before them can be the same.
    counts, y = 1 + np.arange(16) % 3, np.where(Y[:16] > 105, "high", "low") if labels else Y[:16]
    weighted = SMALL.fit(X[:16], y, key=jax.random.key(0), weights=counts)
    repeated = SMALL.fit(np.repeat(X[:16], counts, 0), np.repeat(y, counts), key=jax.random.key(0))
    np.testing.assert_allclose(weighted.table.dense(X[16:30]), repeated.table.dense(X[16:30]), rtol=1e-6)
    np.testing.assert_allclose((weighted.location, weighted.scale), (repeated.location, repeated.scale), rtol=1e-12)


def test_weights_move_the_prediction() -> None:
    rng = np.random.default_rng(1)
    y = np.repeat([0.0, 1.0], 20)
    # Rows cannot be told apart, so that the weighted mean 0.9 is all there is to learn.
    noise = rng.normal(size=(40, 1))
    predictive = SMALL.fit(noise, y + 1e-3 * rng.normal(size=40), key=jax.random.key(0), weights=1 + 8 * y)
    assert abs(predictive(noise).mean.mean() - 0.9) < 0.15


def test_categories_and_missing_values() -> None:
    frame = pd.DataFrame({"a": X[:48, 0], "b": np.where(X[:48, 1] > 0, "x", "y"), "c": X[:48, 2]})
    frame.loc[::5, "a"] = np.nan
    predictive = SMALL.fit(frame, 5.0 * (frame["b"] == "x"), key=jax.random.key(0))
    new = pd.DataFrame({"a": [np.nan, 0.0, 0.0], "b": ["x", "y", None], "c": [0.0, 0.0, np.nan]})
    mean = predictive.members(new)[0].probs[:, :, 1].mean(0)  # two values are classes
    assert mean[0] > 0.8 > 0.2 > mean[1] and np.isfinite(mean).all()


@pytest.mark.parametrize("y", [np.arange(10.0) ** 1.5, np.array(["a", "b"] * 5)])
def test_ten_rows(y: np.ndarray) -> None:
    predictive: Distribution = SMALL.fit(X[:10], y, key=jax.random.key(0))(X[:1000])
    variance = predictive.variance if y.dtype.kind == "f" else predictive.probs
    assert np.isfinite(variance).all()


def test_a_constant_target_is_predicted() -> None:
    target = Target.from_values(np.full(40, 7.0), "regression")
    predictive = SMALL.fit(X[:40], target, key=jax.random.key(0))
    np.testing.assert_allclose(predictive(X[:3]).mean, 7, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        (3, None, "at least 4 rows"),
        (10, np.eye(10)[0], "at least 4 rows"),
        (10, -np.ones(10), "not negative"),
        (10, np.ones(9), "one per row"),
    ],
)
def test_errors_say_what_is_wrong(rows: int, weights: np.ndarray | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeepEnsemble().fit(X[:rows], Y[:rows], key=jax.random.key(0), weights=weights)
