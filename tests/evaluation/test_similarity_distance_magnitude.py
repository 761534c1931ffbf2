"""Similarity-distance-magnitude: the definition by brute force, limits, and the region's promise."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats as st

from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.evaluation.similarity_distance_magnitude import SimilarityDistanceMagnitude

RNG = np.random.default_rng(0)
CENTERS = 3.0 * np.eye(3)


def rows(count: int, spread: float = 1.0):
    labels = np.arange(count) % 3
    features = CENTERS[labels] + spread * RNG.normal(size=(count, 3))
    return features, 2 * features, labels  # a linear classifier whose logits are the features


TRAIN, HELD_OUT = rows(300), rows(600)
SDM = SimilarityDistanceMagnitude.fit(*TRAIN, *HELD_OUT, accuracy=0.9)


def by_definition(x: np.ndarray, logits: np.ndarray):
    """q, d and activations of one row, from the sentences of the source."""
    predicted = logits.argmax()
    order = np.argsort(np.linalg.norm(TRAIN[0] - x, axis=1))
    q = 0
    for i in order:
        if TRAIN[2][i] != predicted or TRAIN[1][i].argmax() != predicted:
            break
        q += 1
    nearest = np.linalg.norm(TRAIN[0] - x, axis=1).min()
    d = min(np.mean(distances >= nearest - 1e-9) for distances in SDM.distances)
    activation = (2.0 + q) ** (SDM.scale * d * logits)
    return q, d, activation / activation.sum()


def test_activation_is_its_definition():
    features, logits, _ = rows(40, spread=1.5)
    found = SDM(features, logits)
    for i in range(40):
        q, d, probs = by_definition(features[i], logits[i])
        assert found.similarity[i] == q
        assert found.distance[i] == pytest.approx(d)
        np.testing.assert_allclose(found.probs[i], probs, rtol=1e-6)
        assert found.rescaled_similarity[i] == pytest.approx(min(q, (2 + q) ** probs[logits[i].argmax()]))


def test_prediction_stays_and_far_rows_are_uniform():
    features, logits, _ = rows(200, spread=2.0)
    found = SDM(features, logits)
    near = found.distance > 0
    assert (found.probs.argmax(1) == logits.argmax(1))[near].all()
    far = SDM(features + 1000, logits)
    np.testing.assert_allclose(far.probs, 1 / 3)
    assert not SDM.select(features + 1000, logits).any()


def test_base_of_e_is_softmax():
    """With q = e - 2, d = 1 and scale 1 the activation is the softmax, whose logarithm is affine in the logits."""
    features, logits, _ = rows(50)
    found = SDM(features, logits)
    factor = SDM.scale * found.distance * np.log(2 + found.similarity)
    softmax = np.exp(logits * factor[:, None])
    np.testing.assert_allclose(found.probs, softmax / softmax.sum(1, keepdims=True), rtol=1e-9)


def test_selected_rows_are_as_accurate_as_promised():
    """Of 3,000 new rows the selected ones are right 90% of the time or more; false-alarm rate 1e-6, binomial."""
    features, logits, labels = rows(3000)
    chosen = SDM.select(features, logits)
    right = (logits.argmax(1) == labels)[chosen]
    assert chosen.mean() > 0.3
    assert st.binomtest(int(right.sum()), len(right), 0.9, alternative="less").pvalue > 1e-6


def test_calibration_region_holds_its_thresholds():
    found = SDM(HELD_OUT[0], HELD_OUT[1])
    inside = found.rescaled_similarity >= SDM.least_similarity
    true = found.probs[np.arange(len(inside)), HELD_OUT[2]]
    for k in range(3):
        share = (true[inside & (HELD_OUT[2] == k)] >= SDM.thresholds[k]).mean()
        assert SDM.thresholds[k] >= 0.9 and share >= 0.9


def test_nothing_is_selected_where_nothing_is_reliable():
    labels = RNG.integers(0, 3, 300)
    blind = SimilarityDistanceMagnitude.fit(TRAIN[0], TRAIN[1], labels, *HELD_OUT[:2], RNG.integers(0, 3, 600))
    assert blind.least_similarity == np.inf and not blind.select(*TRAIN[:2]).any()


def test_round_trip(tmp_path):
    save(SDM, tmp_path / "sdm.bayes")
    again, new = load(tmp_path / "sdm.bayes"), rows(50)
    np.testing.assert_array_equal(again.select(*new[:2]), SDM.select(*new[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((300, 3), np.nan)}, "features of row 0 are not finite"),
        ({"logits": np.zeros((299, 3))}, "shape"),
        ({"labels": np.full(300, 7)}, "label of row 0 is 7"),
        ({"accuracy": 0.2}, "accuracy"),
        ({"calibration_features": np.zeros((600, 2))}, "same features"),
    ],
)
def test_bad_input(change, message):
    names = ("features", "logits", "labels", "calibration_features", "calibration_logits", "calibration_labels")
    given = dict(zip(names, (*TRAIN, *HELD_OUT), strict=True)) | change
    with pytest.raises(InputError, match=message):
        SimilarityDistanceMagnitude.fit(**given)
