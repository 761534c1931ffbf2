"""CaPE: networks that estimate the probability of outcomes which no input could determine.

Source: S. Liu, A. Kaku, W. Zhu, M. Leibovich, S. Mohan, B. Yu, L. Zanna, N. Razavian, C. Fernandez-Granda, "Deep
probability estimation" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator
from bayeslens.core.training import train

Network = Callable[[Float[Array, " features"]], Float[Array, ""]]


class CaPEHistory(NamedTuple):
    """How a training went: held-out cross-entropy after every epoch of both stages, in nats.

    `early_epochs` is the length of the first stage, ordinary cross-entropy until it overfits; `best_epoch` is the
    one whose network was returned, counted from 1 over both stages.
    """

    validation_losses: Float[np.ndarray, " epochs"]
    early_epochs: int
    best_epoch: int


def cape(
    network: Network,
    features: Float[np.ndarray, "rows features"],
    outcomes: Any,
    *,
    key: Any,
    validation: float = 0.2,
    bins: int | None = None,
    bandwidth: float = 0.05,
    cycles: int = 30,
    cross_entropy_epochs: int = 1,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    max_epochs: int = 200,
    patience: int = 20,
) -> tuple[Network, CaPEHistory]:
    """Train a network so that what it says agrees with how often outcomes happen among inputs that it finds alike.

    First by cross-entropy, until the held-out cross-entropy gets worse. Then in cycles: one epoch whose targets are
    empirical probabilities of the training rows (see `empirical_probabilities`), renewed in every cycle, and some
    epochs of cross-entropy, which keep the network able to tell inputs apart. The network with the least held-out
    cross-entropy of all is returned.

    Args:
        network: an Equinox module from one row of features to a log-odds, a scalar.
        features: inputs; standardize them.
        outcomes: whether the event happened, 0 or 1, shape (rows,).
        key: a `jax.random.key`, of batches and of the rows held out.
        validation: share of the rows held out.
        bins: of equal numbers of rows, in which outcomes are averaged; None, the default, averages by a kernel. The
            source has both; the kernel did better where we measured.
        bandwidth: standard deviation of the kernel, on the scale of probabilities.
        cycles: of the second stage.
        cross_entropy_epochs: of each cycle; the source's code takes 5, in which small networks overfit again.
        learning_rate: of Adam.
        batch_size: rows per step.
        max_epochs: of the first stage.
        patience: epochs without a better held-out cross-entropy that end the first stage; 20, since it is noisy.

    Returns:
        The network, and its `CaPEHistory`.

    Raises:
        InputError: outcomes other than 0 and 1, features that are not finite, or too few rows to hold some out.

    >>> import equinox as eqx
    >>> x = np.linspace(-2, 2, 200)[:, None]
    >>> network = eqx.nn.Linear(1, "scalar", key=jax.random.key(0))
    >>> fitted, history = cape(network, x, x[:, 0] > 0, key=jax.random.key(1), cycles=1, max_epochs=2)
    >>> len(history.validation_losses)
    4
    """
    features, outcomes = _checked(features, outcomes)
    order = host_generator(key).permutation(len(features))
    held = round(validation * len(features))
    if not 0 < held < len(features) - 1:
        raise InputError(f"validation={validation} of {len(features)} rows leaves nothing to hold out or to train on")
    held_out, kept = order[:held], order[held:]
    x, y = features[kept], outcomes[kept]
    steps = max(1, len(x) // min(batch_size, len(x)))
    # A check at the end of every epoch; one set of settings throughout, so that one compiled program serves all.
    settings = {"batch_size": batch_size, "check_every": steps, "learning_rate": learning_rate}
    settings |= {"validation": {"x": features[held_out], "target": outcomes[held_out]}, "progress": lambda _: None}
    best, early = train(
        _cross_entropy,
        network,
        {"x": x, "target": y},
        key=key,
        num_steps=steps * max_epochs,
        patience=patience,
        **settings,
    )
    losses, network = early.checks.tolist(), best
    best_epoch = int(early.checks.argmin()) + 1
    for cycle in range(cycles):
        empirical = empirical_probabilities(probabilities(network, x), y, bins=bins, bandwidth=bandwidth)
        for epoch in range(1 + cross_entropy_epochs):
            data = {"x": x, "target": y if epoch else empirical.astype(np.float32)}
            epoch_key = jax.random.fold_in(key, 1 + cycle * (1 + cross_entropy_epochs) + epoch)
            network, history = train(_cross_entropy, network, data, key=epoch_key, num_steps=steps, **settings)
            losses.append(float(history.checks[-1]))
            if losses[-1] <= min(losses):
                best, best_epoch = network, len(losses)
    return best, CaPEHistory(np.array(losses), len(early.checks), best_epoch)


def empirical_probabilities(
    probability: Any, outcome: Any, *, bins: int | None = None, bandwidth: float = 0.05
) -> Float[np.ndarray, " rows"]:
    """How often the outcome happened among rows of similar predicted probability: the targets of CaPE.

    Args:
        probability: predicted, shape (rows,).
        outcome: 0 or 1, shape (rows,).
        bins: of equal numbers of rows; None takes a Gaussian kernel instead.
        bandwidth: its standard deviation, on the scale of probabilities.

    >>> empirical_probabilities([0.1, 0.2, 0.8, 0.9], [0, 1, 1, 1], bins=2).tolist()
    [0.5, 0.5, 1.0, 1.0]
    """
    probability, outcome = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    if bins is not None:
        bin_of = np.empty(len(probability), int)
        bins = min(bins, len(probability))
        bin_of[np.argsort(probability, kind="stable")] = np.arange(len(probability)) * bins // len(probability)
        return (np.bincount(bin_of, outcome) / np.bincount(bin_of))[bin_of]
    from scipy.ndimage import gaussian_filter1d

    # On cells much narrower than the kernel, so that the work does not grow with the square of the rows.
    cells = int(max(200, 20 / bandwidth))
    cell = np.minimum((probability * cells).astype(int), cells - 1)
    sums = [np.bincount(cell, w, minlength=cells).astype(float) for w in (outcome, np.ones(len(cell)))]
    hits, rows = (gaussian_filter1d(a, bandwidth * cells, mode="constant", truncate=6.0) for a in sums)
    return (hits / np.maximum(rows, 1e-300))[cell]


def probabilities(network: Network, features: Float[np.ndarray, "rows features"]) -> Float[np.ndarray, " rows"]:
    """The probabilities that a network gives to rows.

    >>> probabilities(lambda x: x.sum(), np.zeros((2, 3))).tolist()
    [0.5, 0.5]
    """
    return np.asarray(jax.nn.sigmoid(jax.vmap(network)(jnp.asarray(features, jnp.float32))), np.float64)


def _cross_entropy(network: Network, batch: dict, key: Any) -> Float[Array, ""]:
    log_odds = jax.vmap(network)(batch["x"])
    return jnp.mean(jax.nn.softplus(log_odds) - batch["target"] * log_odds)


def _checked(features: Any, outcomes: Any) -> tuple[np.ndarray, np.ndarray]:
    features, outcomes = np.asarray(features, np.float32), np.asarray(outcomes, np.float32)
    if features.ndim != 2 or outcomes.shape != features.shape[:1]:
        raise InputError(
            f"need features of shape (rows, features) and one outcome per row, got {features.shape} and "
            f"{outcomes.shape}"
        )
    wrong = ~np.isfinite(features).all(1)
    if wrong.any():
        raise InputError(f"the features of row {wrong.argmax()} are not finite: fill them in or leave that row out")
    wrong = (outcomes != 0) & (outcomes != 1)
    if wrong.any():
        raise InputError(f"the outcome of row {wrong.argmax()} is {outcomes[wrong.argmax()]}: it must be 0 or 1")
    return features, outcomes
