"""The training loop: any model with parameters, any loss, minibatches, early stopping, checkpoints.

Steps run inside compiled loops of about a quarter of a second, so that Python is out of the way and yet a training
can be watched, interrupted and resumed. One program serves the whole training, and later ones of the same shapes.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bayeslens.core.errors import InputError
from bayeslens.core.files import check_writable
from bayeslens.core.progress import ProgressBar
from bayeslens.core.randomness import host_generator
from bayeslens.core.saving import load, save

_PIECE_SECONDS = 0.25  # of one compiled call: how long Ctrl-C may have to wait
_CHECKPOINT_SECONDS = 10.0

Loss = Callable[[Any, Any, Array], Float[Array, ""]]


class History(eqx.Module):
    """How a training went.

    `losses` has one training loss per step; `checks` the losses that decided which model is best (validation, or the
    interval's mean training loss), made after `check_steps` steps; `best_step` is the step of the returned model.
    `stopped` is `"finished"`, `"early"` (patience ran out), `"interrupted"` or `"diverged"`.
    """

    losses: Float[np.ndarray, " steps"]
    checks: Float[np.ndarray, " checks"]
    check_steps: Int[np.ndarray, " checks"]
    best_step: int
    stopped: str
    seconds: float


def train(
    loss: Loss,
    model: PyTree,
    data: PyTree,
    *,
    key: Array,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | Callable = 1e-3,
    optimizer: Any = None,
    validation: PyTree | float | None = None,
    patience: int | None = None,
    check_every: int = 100,
    checkpoint: str | os.PathLike | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[PyTree, History]:
    """Minimize a loss over the parameters of a model by stochastic gradients.

    Args:
        loss: `loss(model, batch, key)`, the mean loss over a batch, a scalar.
        model: any pytree. Its floating `jax.Array`s are trained; NumPy arrays and all else stay as they are.
        data: a pytree of arrays whose first axis is rows; None for losses that need no data.
        key: a `jax.random.key`; equal keys give equal results.
        num_steps: gradient steps; 1000 unless `num_epochs` is given.
        num_epochs: passes over the rows, instead of `num_steps`.
        batch_size: rows per step, drawn without replacement within an epoch; None takes all rows in every step.
        learning_rate: of Adam, or an Optax schedule.
        optimizer: an Optax optimizer, instead of Adam.
        validation: rows like `data` on which models are compared, or the share of rows to hold out. Without it, the
            mean training loss between two checks decides.
        patience: checks without a better loss after which training stops; None never stops early.
        check_every: steps between two checks.
        checkpoint: a `.bayes` file, written every ten seconds and at the end. If it exists, training goes on from
            there, with the very result of an uninterrupted one.
        progress: called with a sentence at every check; by default a bar is shown on a terminal after two seconds.

    Returns:
        The best model so far and its `History`. Ctrl-C ends the training, with a warning, and returns these as well.

    Raises:
        InputError: arguments that do not fit, nothing to train, a loss that is not a number from the start, or a
            checkpoint of another training.

    >>> x = jnp.linspace(-1.0, 1.0, 20)
    >>> squares = lambda slope, batch, key: jnp.mean((batch["y"] - slope * batch["x"]) ** 2)
    >>> slope, history = train(squares, jnp.zeros(()), {"x": x, "y": 3 * x}, key=jax.random.key(0),
    ...                        num_steps=300, learning_rate=0.1)
    >>> round(float(slope), 3), history.stopped
    (3.0, 'finished')
    """
    data, validation = _rows_of(data, validation, key)
    rows = _count_rows(data)
    if batch_size is not None and (rows is None or batch_size < 1):
        raise InputError(f"batch_size={batch_size} needs data with rows, and at least one row per batch")
    batch_size = None if batch_size is None or batch_size >= rows else batch_size
    total = _total_steps(num_steps, num_epochs, 1 if batch_size is None else rows // batch_size)
    if check_every < 1 or (patience is not None and patience < 1):
        raise InputError("check_every and patience must be at least 1")
    parameters, static = eqx.partition(model, lambda a: isinstance(a, jax.Array) and eqx.is_inexact_array(a))
    if not jax.tree.leaves(parameters):
        raise InputError("there is nothing to train: the model has no floating jax.Array (NumPy arrays stay fixed)")
    # Weak types would make the program's second call differ from its first.
    parameters = jax.tree.map(lambda a: jnp.asarray(a, a.dtype), parameters)
    optimizer = optimizer if optimizer is not None else _adam(learning_rate)
    state = _State(parameters, optimizer.init(parameters), parameters)
    plan = _Plan(total, batch_size, check_every, patience, rows, str(np.asarray(jax.random.key_data(key)).tolist()))
    if checkpoint is not None:
        check_writable(checkpoint)
        if Path(checkpoint).exists():
            state = _resume(checkpoint, state, plan)
    shown = _Progress(total, progress)
    run = _Run(loss, static, optimizer, data, validation, key, plan)
    begun, saved, stopped = time.perf_counter() - state.seconds, time.perf_counter(), "finished"
    try:
        with shown:
            while state.step < total:
                if state.stopped(patience):
                    stopped = "early"
                    break
                state = run.advance(state)._replace(seconds=time.perf_counter() - begun)
                shown(state)
                if not np.isfinite(state.losses[-1]):
                    stopped = "diverged"
                    break
                if checkpoint is not None and time.perf_counter() - saved > _CHECKPOINT_SECONDS:
                    _save(state, plan, checkpoint)
                    saved = time.perf_counter()
    except KeyboardInterrupt:
        stopped = "interrupted"
        said = f"training was interrupted after step {state.step}: the best model so far is returned"
        warnings.warn(said, stacklevel=2)
    if stopped == "diverged" and state.best_step < 0:
        step = int(np.isfinite(state.losses).sum())
        raise InputError(
            f"the loss is {state.losses[-1]} after {step} steps: look for NaN or infinity in data and model, or lower "
            "the learning_rate"
        )
    if checkpoint is not None:
        _save(state, plan, checkpoint)
    best, best_step = (state.best, state.best_step) if state.best_step >= 0 else (state.parameters, state.step)
    history = History(state.losses, state.checks, state.check_steps, best_step, stopped, state.seconds)
    return eqx.combine(best, static), history


class _State(NamedTuple):
    """Everything that a training is at one step."""

    parameters: PyTree
    optimizer: PyTree
    best: PyTree
    best_step: int = -1  # no check was made yet
    best_loss: float = np.inf
    step: int = 0
    losses: np.ndarray = np.zeros(0)
    checks: np.ndarray = np.zeros(0)
    check_steps: np.ndarray = np.zeros(0, int)
    seconds: float = 0.0

    def stopped(self, patience: int | None) -> bool:
        """Whether the last `patience` checks brought nothing better."""
        return patience is not None and int((self.check_steps > self.best_step).sum()) >= patience


class _Plan(NamedTuple):
    total: int
    batch_size: int | None
    check_every: int
    patience: int | None
    rows: int | None
    key: str


class _Run:
    """The compiled loop over steps, and how long a step takes."""

    def __init__(self, loss: Loss, static: Any, optimizer: Any, data: Any, validation: Any, key: Array, plan: _Plan):
        self.shared = (loss, static, optimizer, data)
        self.validation, self.key, self.plan = validation, key, plan
        self.piece = 1  # the first call is mostly compilation, and tells nothing of later ones

    def advance(self, state: _State) -> _State:
        """Some steps, at most up to the next check, and the check if it is due."""
        plan, first = self.plan, state.step // self.plan.check_every * self.plan.check_every
        start, stop = state.step - first, min(plan.check_every, plan.total - first)
        stop = min(stop, start + self.piece)
        began = time.perf_counter()
        parameters, optimizer, losses = _steps(
            *self.shared, state.parameters, state.optimizer, self._batches(first), self.key,
            *(jnp.asarray(n, jnp.int32) for n in (first, start, stop)), plan.check_every,
        )  # fmt: skip
        losses = np.asarray(losses)[start:stop]
        per_step = (time.perf_counter() - began) / (stop - start)
        self.piece = 2 if self.piece == 1 else max(1, int(min(_PIECE_SECONDS / per_step, 4 * self.piece)))
        state = state._replace(
            parameters=parameters,
            optimizer=optimizer,
            step=first + stop,
            losses=np.concatenate([state.losses, losses]),
        )
        return self._check(state) if state.step % plan.check_every == 0 or state.step == plan.total else state

    def _check(self, state: _State) -> _State:
        if self.validation is None:
            value = float(state.losses[(state.step - 1) // self.plan.check_every * self.plan.check_every :].mean())
        else:
            loss, static, *_ = self.shared
            # The same random numbers every time, so that checks can be compared.
            value = float(_mean_loss(loss, static, state.parameters, self.validation, self.key, self.plan.batch_size))
        checks, check_steps = np.append(state.checks, value), np.append(state.check_steps, state.step)
        state = state._replace(checks=checks, check_steps=check_steps)
        if not value < state.best_loss:
            return state
        return state._replace(best=state.parameters, best_step=state.step, best_loss=value)

    def _batches(self, first: int) -> Int[np.ndarray, "check_every batch"] | None:
        """Row numbers of every batch until the next check: permutations, one per epoch, made on the host."""
        plan = self.plan
        if plan.batch_size is None:
            return None
        per_epoch = plan.rows // plan.batch_size
        epochs = range(first // per_epoch, (first + plan.check_every - 1) // per_epoch + 1)
        seed = np.asarray(jax.random.key_data(self.key)).ravel()
        shuffled = [np.random.default_rng([*seed, e]).permutation(plan.rows) for e in epochs]
        batches = [order[: per_epoch * plan.batch_size].reshape(per_epoch, -1) for order in shuffled]
        skipped = first - epochs[0] * per_epoch
        return jnp.asarray(np.concatenate(batches)[skipped : skipped + plan.check_every], jnp.int32)


@eqx.filter_jit
def _steps(
    loss: Loss, static: Any, optimizer: Any, data: Any, parameters: Any, optimizer_state: Any, batches: Any,
    key: Array, first: Any, start: Any, stop: Any, check_every: int,
) -> tuple[Any, Any, Float[Array, " check_every"]]:  # fmt: skip
    """Steps `start` to `stop` (traced numbers, so that one program serves all pieces) after step `first`."""
    import optax

    update = optax.with_extra_args_support(optimizer).update

    def step(i: Any, carry: tuple) -> tuple:
        parameters, state, losses = carry
        batch = data if batches is None else jax.tree.map(lambda a: a[batches[i]], data)
        of = lambda p: loss(eqx.combine(p, static), batch, jax.random.fold_in(key, first + i))  # noqa: E731
        value, gradient = jax.value_and_grad(of)(parameters)
        updates, state = update(gradient, state, parameters, value=value)
        return optax.apply_updates(parameters, updates), state, losses.at[i].set(value)

    return jax.lax.fori_loop(start, stop, step, (parameters, optimizer_state, jnp.zeros(check_every)))


@eqx.filter_jit
def _mean_loss(loss: Loss, static: Any, parameters: Any, data: Any, key: Array, batch_size: int | None) -> Array:
    """Mean loss over all rows, in batches that bound the memory."""
    model, rows = eqx.combine(parameters, static), _count_rows(data)
    size = min(batch_size or rows, rows)
    whole = rows // size * size
    stacked = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), data)
    keys = jax.random.split(key, rows // size)
    total = jax.lax.map(lambda pair: loss(model, *pair), (stacked, keys)).sum() * size
    if whole < rows:
        total += loss(model, jax.tree.map(lambda a: a[whole:], data), key) * (rows - whole)
    return total / rows


@functools.lru_cache
def _adam(learning_rate: Any) -> Any:
    """One optimizer per learning rate, so that later trainings find their program compiled."""
    import optax

    return optax.adam(learning_rate)


def _count_rows(data: Any) -> int | None:
    leaves = jax.tree.leaves(data)
    return leaves[0].shape[0] if leaves else None


def _rows_of(data: Any, validation: Any, key: Array) -> tuple[Any, Any]:
    """Rows to train on and rows to validate on, as JAX arrays."""
    if not (hasattr(key, "dtype") and hasattr(key, "shape")):
        raise InputError(f"key must be a jax.random.key, got {key!r}: use key=jax.random.key(0)")
    data = _arrays("data", data)
    if validation is None:
        return data, None
    rows = _count_rows(data)
    if isinstance(validation, float):
        held = round(validation * rows) if rows else 0
        if not 0 < held < (rows or 0):
            raise InputError(f"validation={validation} of {rows} rows leaves nothing to validate or to train on")
        order = host_generator(key).permutation(rows)
        return jax.tree.map(lambda a: a[order[held:]], data), jax.tree.map(lambda a: a[order[:held]], data)
    validation = _arrays("validation", validation)
    if jax.tree.structure(validation) != jax.tree.structure(data) or rows is None:
        raise InputError("validation must hold the same arrays as data, for other rows")
    return data, validation


def _arrays(name: str, data: Any) -> Any:
    try:
        data = jax.tree.map(jnp.asarray, data)
    except TypeError as error:
        raise InputError(f"{name} must hold arrays of numbers: {str(error).splitlines()[0]}") from None
    lengths = {a.shape[:1] for a in jax.tree.leaves(data)}
    if len(lengths) > 1 or () in lengths or (0,) in lengths:
        shapes = [a.shape for a in jax.tree.leaves(data)]
        raise InputError(f"the arrays of {name} need equally many rows, at least one; got shapes {shapes}")
    return data


def _total_steps(num_steps: int | None, num_epochs: int | None, per_epoch: int) -> int:
    if num_steps is not None and num_epochs is not None:
        raise InputError("give num_steps or num_epochs, not both")
    total = num_epochs * per_epoch if num_epochs is not None else 1000 if num_steps is None else num_steps
    if total < 1:
        raise InputError(f"training needs at least one step, got {total}")
    return total


def leaf_names(tree: PyTree) -> list[str]:
    """The path of every leaf, in leaf order; those inside of NumPyro distributions by attribute.

    The leaf order of a distribution changes with the interpreter's hash seed; its names do not.

    >>> import numpyro.distributions as dist
    >>> sorted(leaf_names({"d": dist.Gamma(3.0, 1.0)}))
    ["['d'].concentration", "['d'].rate"]
    """
    from numpyro.distributions import Distribution

    leaves, structure = jax.tree.flatten(tree)
    names = [""] * len(leaves)

    def name(node: Any, path: str) -> None:
        inside, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: isinstance(n, Distribution))
        for where, leaf in inside:
            here = path + jax.tree_util.keystr(where)
            if isinstance(leaf, Distribution):
                for field in type(leaf).gather_pytree_data_fields():
                    name(leaf.__dict__.get(field), f"{here}.{field}")
            else:
                names[leaf] = here

    name(structure.unflatten(range(len(leaves))), "")
    return names


def _save(state: _State, plan: _Plan, path: str | os.PathLike) -> None:
    content = state._asdict()
    for name in ("parameters", "optimizer", "best"):
        tree = content[name]
        content[name] = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    save({"training": content, "plan": _identity(plan)}, path)


def _identity(plan: _Plan) -> dict[str, Any]:
    """What must be equal for a training to go on: its length and patience may change."""
    return {k: v for k, v in plan._asdict().items() if k not in ("total", "patience")}


def _resume(path: str | os.PathLike, state: _State, plan: _Plan) -> _State:
    """The saved state, in the structure of a fresh one."""
    content = load(path)
    if not isinstance(content, dict) or set(content) != {"training", "plan"}:
        raise InputError(f"{path} is not the checkpoint of a training: choose another name for it")
    odd = [k for k, v in _identity(plan).items() if content["plan"].get(k) != v]
    content = content["training"]
    for name in ("parameters", "optimizer", "best"):
        leaves, structure = jax.tree.flatten(getattr(state, name))
        saved = [content[name].get(n) for n in leaf_names(getattr(state, name))]
        if len(saved) != len(content[name]) or any(
            np.shape(a) != np.shape(b) for a, b in zip(saved, leaves, strict=True)
        ):
            odd.append(name)
        content[name] = structure.unflatten(saved)
    if odd:
        raise InputError(
            f"{path} is the checkpoint of another training, which differs in {', '.join(odd)}: remove it or choose "
            "another name"
        )
    return _State(**content)


class _Progress:
    """A bar on a terminal after two seconds, or sentences for whoever asked for them."""

    def __init__(self, total: int, tell: Callable[[str], None] | None):
        self.total, self.tell, self.bar, self.told = total, tell, ProgressBar("training", total), 0

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, state: _State) -> None:
        if self.tell is not None:
            if len(state.checks) > self.told:
                self.tell(f"step {state.step} of {self.total}, loss {state.checks[-1]:.4g}")
            self.told = len(state.checks)
            return
        self.bar(state.step, f"loss {state.losses[-1]:.4g}")

    def __exit__(self, *_: Any) -> None:
        self.bar.__exit__()
