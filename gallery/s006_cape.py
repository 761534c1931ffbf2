"""CaPE: a network whose probabilities agree with frequencies, for outcomes that nothing could have determined.

Claim: where outcomes are random given the inputs, cross-entropy training ends in probabilities near 0 and 1. Stopping
early helps; alternating further cross-entropy epochs with epochs on empirical probabilities, the frequencies of
outcomes among training inputs of like prediction, helps more: the estimates come nearer to the true probabilities than
those of early stopping, and of an overfitted network with a temperature.

Shown here: events whose true probability is a known nonlinear function of two of ten inputs, eight data sets; the mean
squared distance from the true probabilities, for 5,000 new rows. The control takes bins of a single row, whose
empirical probability is the outcome itself, so that nothing but cross-entropy is left.

Source: S. Liu, A. Kaku, W. Zhu, M. Leibovich, S. Mohan, B. Yu, L. Zanna, N. Razavian, C. Fernandez-Granda, "Deep
probability estimation" (2022).
"""

from __future__ import annotations

import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
from scipy.stats import t

from bayeslens.evaluation.calibration import Temperature
from bayeslens.evaluation.probability_estimation import cape, probabilities
from bayeslens.gallery import Evidence

PAPER = "S006"
CLAIM = "Alternating with empirical probabilities estimates true probabilities better than early stopping does."
NOT_CHECKED = (
    "Images, and the paper's three real tasks (rain, survival, crashes), whose true probabilities are unknown."
)

_ROWS, _REPEATS = 3000, 8


def events(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, true probabilities and outcomes."""
    x = rng.normal(size=(rows, 10)).astype(np.float32)
    p = 1 / (1 + np.exp(-2 * np.tanh(x[:, 0] ** 2 + x[:, 1] ** 2 - 2)))
    return x, p, (rng.random(rows) < p).astype(np.float32)


def check(*, control: bool = False) -> Evidence:
    """Errors against the truth; the control has a bin for every row.

    Holds when the error is below that of early stopping by a paired test at 5% (one-sided t-test of the logarithms of
    the ratios), and on average below that of an overfitted network with a temperature, which has as many rows to learn
    from and to hold out.
    """
    errors = []
    for repeat in range(_REPEATS):
        rng = np.random.default_rng(repeat)
        (x, _, y), (new, truth, _) = events(rng, _ROWS), events(rng, 5000)
        network = eqx.nn.MLP(10, "scalar", 64, 2, key=jax.random.key(repeat))
        settings = {"key": jax.random.key(100 + repeat), "learning_rate": 1e-3, "batch_size": 128}
        ours, _ = cape(network, x, y, **settings, validation=1 / 3, bins=_ROWS if control else None)
        early, _ = cape(network, x, y, **settings, validation=1 / 3, cycles=0)
        kept = 2 * _ROWS // 3
        overfitted = memorized(network, x[:kept], y[:kept], settings)
        held_out = np.stack([1 - (q := probabilities(overfitted, x[kept:])), q], 1)
        q = probabilities(overfitted, new)
        cooled = Temperature.fit(held_out, y[kept:])(dist.CategoricalProbs(np.stack([1 - q, q], 1)))
        found = [probabilities(ours, new), probabilities(early, new), q, np.asarray(cooled.probs)[:, 1]]
        errors.append([np.mean((f - truth) ** 2) for f in found])
    names = ("cape", "early stopping", "overfitted", "overfitted with a temperature")
    numbers = {name: round(float(e), 5) for name, e in zip(names, np.mean(errors, 0), strict=True)}
    ratios = np.log(np.array(errors)[:, 0] / np.array(errors)[:, 1])
    spread = ratios.std(ddof=1) / np.sqrt(_REPEATS)
    p_value = float(t.cdf(ratios.mean() / spread, _REPEATS - 1)) if spread > 0 else 1.0
    numbers |= {"ratio to early stopping": round(float(np.exp(ratios.mean())), 4), "p-value": round(p_value, 5)}
    holds = p_value < 0.05 and numbers["cape"] < numbers["overfitted with a temperature"]
    shown = (
        f"mean squared distance from the true probabilities {numbers['cape']:.4f} against "
        f"{numbers['early stopping']:.4f} of early stopping (ratio {np.exp(ratios.mean()):.3f}, below 1 with p = "
        f"{p_value:.3g}), {numbers['overfitted with a temperature']:.4f} of an overfitted network with a temperature "
        f"and {numbers['overfitted']:.4f} without"
    )
    return Evidence(bool(holds), shown, numbers)


def memorized(network, x: np.ndarray, y: np.ndarray, settings: dict):
    """The network after 100 epochs of cross-entropy, whatever becomes of it."""
    import jax.numpy as jnp

    from bayeslens.core.training import train

    def cross_entropy(network, batch, key):
        log_odds = jax.vmap(network)(batch["x"])
        return jnp.mean(jax.nn.softplus(log_odds) - batch["y"] * log_odds)

    return train(cross_entropy, network, {"x": x, "y": y}, num_epochs=100, **settings)[0]
