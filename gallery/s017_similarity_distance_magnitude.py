"""Similarity, distance and magnitude: which predictions of a classifier can be relied on when the inputs change.

Claim: a softmax that also looks at how many nearest training examples agree with the prediction, and how far they are,
knows better what it does not know. Selecting the predictions of its high-reliability region keeps the promised accuracy
when the inputs shift, where selection by softmax, by a temperature or by conformal sets of one class breaks; the price
is that it abstains.

Shown here: a small network on handwritten digits, for three splits, asked for predictions that are right 95% of the
time, on clean digits and on rotated, noisy, inverted and shuffled ones. Accuracy among the selected, and how many are
selected. The control shows the method the features of random clean digits in place of the shifted ones, so that it
cannot see how far they are.

Source: A. Schmaltz, "Similarity-Distance-Magnitude universal verification" (2025), with the high-reliability region of
its sequel "Similarity-Distance-Magnitude activations" (2025).
"""

from __future__ import annotations

import warnings

import numpy as np
import numpyro.distributions as dist
from scipy.ndimage import rotate
from scipy.special import softmax
from scipy.stats import binomtest

from bayeslens.evaluation.calibration import Temperature
from bayeslens.evaluation.conformal import class_scores, conformal_threshold, prediction_sets
from bayeslens.evaluation.similarity_distance_magnitude import SimilarityDistanceMagnitude
from bayeslens.gallery import Evidence

PAPER = "S017"
CLAIM = "Selective accuracy of 95% holds under shift with similarity and distance, and breaks for softmax and kin."
NOT_CHECKED = (
    "Language models and their verification layers; training the last layer under the activation, in place of which "
    "the logits of a frozen network are scaled; the sampling error of the distance's distribution functions."
)

_ACCURACY, _SPLITS = 0.95, 3


def network(x: np.ndarray, y: np.ndarray, seed: int):
    """A fitted network as a function from images to its hidden layer and logits."""
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = MLPClassifier((64,), max_iter=200, random_state=seed).fit(x, y)

    def look(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.maximum(images @ fitted.coefs_[0] + fitted.intercepts_[0], 0)
        return hidden, hidden @ fitted.coefs_[1] + fitted.intercepts_[1]

    return look


def shifts(x: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Clean images and what may befall them."""
    images = x.reshape(-1, 8, 8)
    turned = {f"rotated {a}": rotate(images, a, (1, 2), reshape=False, order=1).reshape(-1, 64) for a in (15, 30, 45)}
    noisy = {f"noise {s}": x + s * rng.normal(size=x.shape) for s in (0.2, 0.4, 0.6)}
    return {"clean": x} | turned | noisy | {"inverted": 1 - x, "shuffled": rng.permuted(x, axis=1)}


def check(*, control: bool = False) -> Evidence:
    """Selective accuracy under shift, pooled over splits; the control hides the shift from the method.

    Holds when, of all shifted images together, the selected ones are not significantly less often right than promised
    (binomial test at 1%), at least half of the clean images are selected and right as often, and softmax, the
    temperature and conformal sets all fall short. Single shifts are in the numbers: where only a handful of images is
    selected, they may fall short (rotation by 45 degrees, at which some digits become others).
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, counts = x / 16, {}
    for split in range(_SPLITS):
        rng = np.random.default_rng(split)
        order = rng.permutation(len(y))
        train, held_out, test = order[:700], order[700:1200], order[1200:]
        look = network(x[train], y[train], split)
        sdm = SimilarityDistanceMagnitude.fit(
            *look(x[train]), y[train], *look(x[held_out]), y[held_out], accuracy=_ACCURACY
        )
        probs = softmax(look(x[held_out])[1], axis=1)
        cooled = Temperature.fit(probs, y[held_out])
        edge = conformal_threshold(class_scores(probs)[np.arange(len(held_out)), y[held_out]], _ACCURACY)
        for name, images in shifts(x[test], rng).items():
            features, logits = look(images)
            shown = look(x[rng.choice(train, len(test))])[0] if control and name != "clean" else features
            probs = softmax(logits, axis=1)
            selected = {
                "sdm": sdm.select(shown, logits),
                "softmax": probs.max(1) >= _ACCURACY,
                "temperature": np.asarray(cooled(dist.CategoricalProbs(probs)).probs).max(1) >= _ACCURACY,
                "conformal": prediction_sets(probs, edge).sum(1) == 1,
            }
            right = logits.argmax(1) == y[test]
            for method, chosen in selected.items():
                found = counts.setdefault((name, method), np.zeros(3, int))
                found += [right[chosen].sum(), chosen.sum(), len(chosen)]
    names = list(dict.fromkeys(name for name, _ in counts))
    pooled, numbers = {}, {}
    for method in ("sdm", "softmax", "temperature", "conformal"):
        pooled[method] = sum(counts[name, method] for name in names[1:])
        found = {n: counts[n, method] for n in names} | {"all shifts": pooled[method]}
        for name, (right, chosen, rows) in found.items():
            numbers[f"{name}: selected by {method}"] = round(float(chosen / rows), 4)
            if chosen:
                numbers[f"{name}: accuracy of {method}"] = round(float(right / chosen), 4)

    def short(found: np.ndarray) -> bool:
        """Whether significantly fewer of the selected are right than promised."""
        right, chosen, _ = found.tolist()
        return chosen > 0 and binomtest(right, chosen, _ACCURACY, "less").pvalue < 0.01

    coverage, shifted = numbers["clean: selected by sdm"], numbers["all shifts: selected by sdm"]
    fallen = [name for name in names if short(counts[name, "sdm"])]
    shown = (
        f"accuracy of what is selected under shift {numbers.get('all shifts: accuracy of sdm', 1.0):.1%} (to be "
        f"{_ACCURACY:.0%}), against {numbers['all shifts: accuracy of softmax']:.1%} by softmax, "
        f"{numbers['all shifts: accuracy of temperature']:.1%} by a temperature and "
        f"{numbers['all shifts: accuracy of conformal']:.1%} by conformal sets; selected {coverage:.0%} of clean and "
        f"{shifted:.1%} of shifted images; short under {', '.join(fallen) or 'no single shift'}"
    )
    others = all(short(pooled[m]) for m in pooled if m != "sdm")
    holds = not short(pooled["sdm"]) and not short(counts["clean", "sdm"]) and coverage >= 0.5 and others
    return Evidence(bool(holds), shown, numbers)
