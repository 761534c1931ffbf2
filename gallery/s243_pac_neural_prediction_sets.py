"""Prediction sets whose threshold is a network, with a certificate that a scalar threshold would have.

Claim: sets {label: score >= tau(x)} whose threshold tau is a neural network, trained for small sets and then certified
by a binomial tail bound on held-out errors, keep the PAC guarantee (miscoverage at most epsilon, with probability
1 - delta over the calibration rows) and are smaller than sets with one threshold for all inputs.

Source: S. Park, T. Kim, "PAC neural prediction set learning to quantify the uncertainty of generative language models"
(2023). What the network buys depends on the scores: where they are probabilities of the labels that are right for every
input, one threshold is already best. The first table has scores that are not: distances that do not know how noisy an
input is. On the second, handwritten digits scored by naive Bayes, most sets hold one label either way.
"""

from __future__ import annotations

import jax
import numpy as np
from scipy.stats import binom

from bayeslens.evaluation.pac_prediction_sets import PACPredictionSets, pac_threshold
from bayeslens.gallery import Evidence

PAPER = "S243"
CLAIM = "Sets with a neural threshold are smaller than those with a scalar one at the same PAC guarantee."
NOT_CHECKED = "Generative language models, the 63% of the paper's language tasks, and the training loss of the paper."
ERROR, DELTA = 0.1, 0.1
RESPLITS, CALIBRATION_ROWS = 200, 500


def distances(rows, rng):
    """Eight classes on a line; the score is a distance, and noise grows with the second feature."""
    x = rng.uniform(-1, 1, size=(rows, 2))
    center = 3.5 + 3 * x[:, 0]
    labels = np.clip(np.rint(center + np.exp(1.5 * x[:, 1] - 0.5) * rng.normal(size=rows)), 0, 7).astype(int)
    return x, -np.abs(np.arange(8) - center[:, None]), labels


def digits(rng):
    """Handwritten digits: naive Bayes is fitted on 400 rows; the others come with its log-probabilities, and features
    that are these sorted."""
    from sklearn.datasets import load_digits
    from sklearn.naive_bayes import GaussianNB

    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    fit, rest = order[:400], order[400:]
    model = GaussianNB(var_smoothing=1e-2).fit(pixels[fit], labels[fit])
    scores = np.maximum(model.predict_log_proba(pixels[rest]), -60.0)
    return np.sort(scores, 1), scores, labels[rest]


def strangeness(features, scores, sets):
    """Of every class: how far its score is below the threshold, for the network and for one threshold for all."""
    return {"neural": sets.thresholds(features)[:, None] - scores, "scalar": -scores}


def resplits(strange, labels, rng, certify):
    """Miscoverage and mean set size of both kinds, for calibration rows drawn anew each time; the others are test."""
    result = {name: ([], []) for name in strange}
    for _ in range(RESPLITS):
        order = rng.permutation(len(labels))
        calibration, test = order[:CALIBRATION_ROWS], order[CALIBRATION_ROWS:]
        for name, of_all in strange.items():
            own = of_all[np.arange(len(labels)), labels]
            kept = own[calibration]
            edge = pac_threshold(kept, ERROR, DELTA) if certify else np.quantile(kept, 1 - ERROR)
            result[name][0].append((own[test] > edge).mean())
            result[name][1].append((of_all[test] <= edge).sum(1).mean())
    return {name: tuple(np.array(v) for v in pair) for name, pair in result.items()}


def check(*, control: bool = False) -> Evidence:
    """Guarantee and size over 200 calibrations; the control takes the empirical quantile, without certificate."""
    rng = np.random.default_rng(0)
    found = {}
    learning, pool = distances(1000, rng), distances(20_000, rng)
    sets = PACPredictionSets.fit(
        learning, tuple(a[:1000] for a in pool), error=ERROR, failure_probability=DELTA, key=jax.random.key(0)
    )
    found["distances"] = resplits(strangeness(*pool[:2], sets), pool[2], rng, not control)
    features, scores, labels = digits(rng)
    learning, rest = slice(0, 500), slice(500, None)
    table = features, scores, labels
    sets = PACPredictionSets.fit(
        tuple(a[learning] for a in table),
        tuple(a[rest] for a in table),
        error=ERROR,
        failure_probability=DELTA,
        key=jax.random.key(1),
        width=16,
    )
    found["digits"] = resplits(strangeness(features[rest], scores[rest], sets), labels[rest], rng, not control)
    numbers = {}
    for table_name, kinds in found.items():
        for kind, (missed, size) in kinds.items():
            numbers[f"{table_name}, {kind}: share of calibrations with miscoverage above epsilon"] = float(
                (missed > ERROR).mean()
            )
            numbers[f"{table_name}, {kind}: mean miscoverage"] = float(missed.mean())
            numbers[f"{table_name}, {kind}: mean set size"] = float(size.mean())
    failures = int((found["distances"]["neural"][0] > ERROR).sum())
    # The 19,500 test rows stand for the population; a count above this has probability below 1e-3 if delta is kept.
    most = int(binom.isf(1e-3, RESPLITS, DELTA))
    smaller = {name: kinds["neural"][1].mean() / kinds["scalar"][1].mean() for name, kinds in found.items()}
    holds = failures <= most and smaller["distances"] < 1
    shown = (
        f"miscoverage exceeds {ERROR} in {failures} of {RESPLITS} calibrations (at most {most} if delta is {DELTA}); "
        f"sets are {smaller['distances']:.2f} times as large as with one threshold for all (below 1 was to be shown), "
        f"and {smaller['digits']:.2f} times on digits, where there is little to gain"
    )
    return Evidence(bool(holds), shown, numbers)
