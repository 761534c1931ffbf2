"""Known minima, checks and early stopping; interruption and resumption; one compilation; bad input."""

from __future__ import annotations

import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

from bayeslens.core import progress, training
from bayeslens.core.errors import InputError
from bayeslens.core.saving import load, save
from bayeslens.core.training import leaf_names, train

KEY = jax.random.key(0)
rng = np.random.default_rng(0)
X = rng.normal(size=(60, 3))
Y = X @ [1.0, -2.0, 0.5] + rng.normal(size=60) * 0.3
DATA = {"x": X, "y": Y}
TRACES = []


class Linear(eqx.Module):
    weights: jax.Array
    center: np.ndarray
    activation: object = jax.nn.identity


def squares(model, batch, key):
    TRACES.append(1)
    return jnp.mean((batch["y"] - model.activation((batch["x"] - model.center) @ model.weights)) ** 2)


def noisy(model, batch, key):
    return squares(model, batch, key) + 0.1 * jnp.mean(model.weights * jax.random.normal(key, (3,)))


def lopsided(model, batch, key):
    TRACES.append(1)
    return jnp.mean((batch["y"] - batch["x"][:, 0] * model.weights) ** 2)


def start():
    return Linear(jnp.zeros(3), np.zeros(3))


def test_recovers_least_squares():
    model, history = train(squares, start(), DATA, key=KEY, num_steps=800, learning_rate=0.05)
    exact = np.linalg.lstsq(X, Y)[0]
    np.testing.assert_allclose(model.weights, exact, atol=1e-3)
    np.testing.assert_allclose(history.losses[-1], np.mean((Y - X @ exact) ** 2), rtol=1e-4)
    assert history.losses.shape == (800,) and history.check_steps.tolist() == list(range(100, 801, 100))
    assert isinstance(model.center, np.ndarray) and not model.center.any(), "NumPy arrays are not trained"


def test_minibatches_see_every_row_once_an_epoch():
    seen = []

    def loss(model, batch, key):
        jax.debug.callback(lambda rows: seen.append(np.asarray(rows)), batch, ordered=True)
        return model**2

    train(loss, jnp.ones(()), jnp.arange(12), key=KEY, num_epochs=3, batch_size=4, check_every=2)
    jax.effects_barrier()
    epochs = np.concatenate(seen).reshape(3, 12)
    assert (np.sort(epochs, 1) == np.arange(12)).all() and (epochs[0] != epochs[1]).any()


def test_every_step_has_its_own_randomness():
    loss = lambda slope, batch, key: 0 * slope + jax.random.normal(key)  # noqa: E731
    _, history = train(loss, jnp.ones(()), None, key=KEY, num_steps=30, check_every=10)
    assert len(np.unique(history.losses)) == 30


def test_compiles_once():
    TRACES.clear()
    weak = Linear(jnp.asarray(0.0), np.zeros(3), lambda a: a.sum())
    for _ in range(2):
        train(lopsided, weak, DATA, key=KEY, num_steps=230, batch_size=8, learning_rate=0.013)
    # The loss is traced once by value_and_grad, though pieces and intervals differ in length.
    assert len(TRACES) == 1


def test_stops_early_and_returns_the_best():
    # The way from 0 to the training optimum, 3, passes the validation optimum, 1.
    loss = lambda slope, batch, key: jnp.mean((batch - slope) ** 2)  # noqa: E731
    arguments = dict(key=KEY, optimizer=optax.sgd(0.005), validation=jnp.full(7, 1.0), check_every=5, batch_size=2)
    slope, history = train(loss, jnp.zeros(()), jnp.full(4, 3.0), num_steps=400, patience=3, **arguments)
    assert abs(slope - 1) < 0.1 and history.stopped == "early"
    assert len(history.losses) == history.best_step + 15
    assert history.checks.min() == history.checks[-4]
    full, history = train(loss, jnp.zeros(()), jnp.full(4, 3.0), num_steps=400, **arguments)
    assert full == slope and history.stopped == "finished" and len(history.losses) == 400


def test_validation_covers_all_rows_whatever_the_batches():
    loss = lambda slope, batch, key: jnp.mean((batch - slope) ** 2)  # noqa: E731
    rows = jnp.array([0.0, 0.0, 0.0, 5.0])
    for batch_size in (None, 3):
        _, history = train(loss, jnp.zeros(()), jnp.zeros(6), key=KEY, num_steps=1, validation=rows,
                           batch_size=batch_size)  # fmt: skip
        np.testing.assert_allclose(history.checks, 25 / 4)
    _, history = train(squares, start(), DATA, key=KEY, num_steps=1, validation=0.25)
    assert history.checks[0] != history.losses[0]


def stop_at(step):
    def tell(sentence):
        if sentence.startswith(f"step {step} "):
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("interrupted_at", ["a check", "anywhere"])
def test_resuming_equals_an_uninterrupted_training(interrupted_at, tmp_path, monkeypatch):
    path = tmp_path / "training.bayes"
    arguments = dict(key=KEY, num_steps=500, batch_size=7, check_every=50, validation=0.2, optimizer=optax.adam(0.02))
    whole, history = train(noisy, start(), DATA, **arguments)
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="interrupted after step .*returned"):
        calls, steps = [], training._steps
        if interrupted_at == "anywhere":
            patched.setattr(training, "_PIECE_SECONDS", 1e-9)

            def interrupting(*args):
                calls.append(1)
                if len(calls) == 73:
                    raise KeyboardInterrupt
                return steps(*args)

            patched.setattr(training, "_steps", interrupting)
        train(noisy, start(), DATA, checkpoint=path, progress=stop_at(200), **arguments)
    resumed, again = train(noisy, start(), DATA, checkpoint=path, **arguments)
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    for name in ("losses", "checks", "check_steps", "best_step"):
        np.testing.assert_array_equal(getattr(again, name), getattr(history, name))
    # A finished training is not run again, but may be made longer.
    TRACES.clear()
    assert train(noisy, start(), DATA, checkpoint=path, **arguments)[1].losses.shape == (500,)
    longer = arguments | {"num_steps": 600}
    np.testing.assert_array_equal(
        train(noisy, start(), DATA, checkpoint=path, **longer)[0].weights,
        train(noisy, start(), DATA, **longer)[0].weights,
    )


def test_an_interruption_returns_the_best_so_far():
    loss = lambda slope, batch, key: jnp.mean((batch - slope) ** 2)  # noqa: E731
    arguments = dict(key=KEY, optimizer=optax.sgd(0.005), validation=jnp.full(7, 1.0), check_every=5)
    best, _ = train(loss, jnp.zeros(()), jnp.full(4, 3.0), num_steps=200, **arguments)
    with pytest.warns(UserWarning, match="interrupted after step 200"):
        slope, history = train(loss, jnp.zeros(()), jnp.full(4, 3.0), num_steps=400, progress=stop_at(200), **arguments)
    assert slope == best and history.stopped == "interrupted" and history.best_step < 60
    with pytest.warns(UserWarning, match="interrupted"):
        slope, history = train(loss, jnp.zeros(()), jnp.ones(4), key=KEY, progress=stop_at(100), num_steps=200)
    assert slope > 0


def test_divergence_returns_the_best_or_says_what_to_do():
    loss = lambda slope, batch, key: jnp.where(slope > 1, jnp.nan, -slope)  # noqa: E731
    slope, history = train(loss, jnp.zeros(()), None, key=KEY, optimizer=optax.sgd(0.01), check_every=10)
    assert history.stopped == "diverged" and 0.85 < slope <= 1.0
    with pytest.raises(InputError, match=r"is nan after 0 steps: look for NaN"):
        train(loss, jnp.array(2.0), None, key=KEY)
    with pytest.raises(InputError, match="lower the learning_rate"):
        train(loss, jnp.zeros(()), None, key=KEY, optimizer=optax.sgd(0.2))


def test_a_distribution_is_trained_and_resumed_by_attribute(tmp_path):
    path = tmp_path / "fit.bayes"
    loss = lambda d, batch, key: -d.log_prob(batch).mean()  # noqa: E731
    model = dist.Gumbel(jnp.array(0.0), jnp.array(1.0), validate_args=False)
    rows = np.random.default_rng(1).gumbel(2.0, 1.0, 200)
    fitted, _ = train(loss, model, rows, key=KEY, num_steps=150, learning_rate=0.05, checkpoint=path)
    assert abs(fitted.loc - 2) < 0.3 and abs(fitted.scale - 1) < 0.2
    names = set(load(path)["training"]["parameters"])
    assert names == {".loc", ".scale"}
    # Whatever the order in the file, values go to their attributes.
    content = load(path)
    content["training"]["best"] = dict(sorted(content["training"]["best"].items(), reverse=True))
    save(content, path)
    again, _ = train(loss, model, rows, key=KEY, num_steps=150, learning_rate=0.05, checkpoint=path)
    assert again.loc == fitted.loc and again.scale == fitted.scale
    assert sorted(leaf_names([model, 1.0])) == ["[0].loc", "[0].scale", "[1]"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": 0}, r"use key=jax\.random\.key\(0\)"),
        ({"model": start().center}, "nothing to train"),
        ({"data": {"x": X, "y": Y[:5]}}, "equally many rows"),
        ({"data": {"x": np.array(["a"])}}, "arrays of numbers"),
        ({"data": None, "batch_size": 3}, "needs data with rows"),
        ({"batch_size": 0}, "at least one row per batch"),
        ({"num_steps": 3, "num_epochs": 3}, "not both"),
        ({"num_steps": 0}, "at least one step"),
        ({"patience": 0}, "at least 1"),
        ({"validation": 0.999}, "leaves nothing"),
        ({"validation": X}, "same arrays as data"),
        ({"checkpoint": "no/such/folder.bayes"}, "does not exist"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(InputError, match=message):
        train(**({"loss": squares, "model": start(), "data": DATA, "key": KEY} | changes))


def test_checkpoints_of_something_else_are_refused(tmp_path):
    path = tmp_path / "training.bayes"
    train(squares, start(), DATA, key=KEY, num_steps=5, checkpoint=path)
    with pytest.raises(InputError, match="differs in key"):
        train(squares, start(), DATA, key=jax.random.key(1), num_steps=5, checkpoint=path)
    with pytest.raises(InputError, match="differs in batch_size, optimizer"):
        train(squares, start(), DATA, key=KEY, num_steps=5, batch_size=2, checkpoint=path, optimizer=optax.sgd(0.1))
    save([1], path)
    with pytest.raises(InputError, match="not the checkpoint of a training"):
        train(squares, start(), DATA, key=KEY, num_steps=5, checkpoint=path)


def test_a_bar_on_terminals_only(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0.0)
    train(squares, start(), DATA, key=KEY, num_steps=20)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    train(squares, start(), DATA, key=KEY, num_steps=20)
    assert "training" in capsys.readouterr().err


def test_schedules_and_double_precision():
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = train(
            squares, Linear(jnp.zeros(3), np.zeros(3)), DATA, key=KEY, num_steps=500,
            learning_rate=optax.cosine_decay_schedule(0.1, 500),
        )  # fmt: skip
        assert model.weights.dtype == jnp.float64
        np.testing.assert_allclose(model.weights, np.linalg.lstsq(X, Y)[0], atol=1e-8)
