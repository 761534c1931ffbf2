"""Plain Python functions inside models: simulators and likelihoods that JAX cannot trace."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayeslens.core.errors import InputError


def black_box(
    function: Callable, *, shape: tuple[int, ...] = (), executor: concurrent.futures.Executor | None = None
) -> Callable[..., jax.Array]:
    """A plain Python function as one that a NumPyro model may call, without gradients.

    Engines that need no gradients (`smc`, `nested`, `neural_nested`) evaluate many points at once; these calls are
    spread over the executor. `engine="auto"` takes one of these engines for such a model.

    Args:
        function: of NumPy arrays or numbers; it must give the same answer whenever it is called with the same
            arguments, and for a process pool or a cluster it must be picklable.
        shape: of its result, a number by default.
        executor: where the calls run: a pool of threads for functions that wait or release the interpreter's lock, a
            pool of processes, or a cluster (`dask.distributed.Client(...).get_executor()`). By default they run one
            after the other in this process.

    Raises:
        InputError: when it is called: a result that is not an array of that shape.

    >>> import math, numpyro, numpyro.distributions as dist
    >>> speed = black_box(lambda height: math.sqrt(2 * 9.81 * height))
    >>> float(jax.jit(speed)(5.0)), jax.vmap(speed)(jnp.array([0.0, 5.0])).shape
    (9.90454..., (2,))
    >>> def model(y):
    ...     height = numpyro.sample("height", dist.Gamma(2.0, 0.5))
    ...     numpyro.sample("y", dist.Normal(speed(height), 0.1), obs=y)
    """
    if not callable(function):
        raise InputError(f"black_box needs a function, got {type(function).__name__}")
    if executor is not None and not isinstance(executor, concurrent.futures.Executor):
        raise InputError(
            f"the executor is a {type(executor).__name__}: give a concurrent.futures.Executor, such as "
            "ThreadPoolExecutor(), or client.get_executor() of a Dask client"
        )
    name = getattr(function, "__name__", type(function).__name__)

    def traced(*arguments: Any) -> jax.Array:
        arguments = tuple(jnp.asarray(a) for a in arguments)
        inner = [a.ndim for a in arguments]
        dtype = jnp.result_type(float)

        def on_host(*batches: Any) -> np.ndarray:
            batches = [np.asarray(b) for b in batches]
            lead = next((b.shape[: b.ndim - n] for b, n in zip(batches, inner, strict=True)), ())
            calls = [b.reshape(-1, *b.shape[b.ndim - n :]) for b, n in zip(batches, inner, strict=True)]
            calls = [[c[()] for c in call] for call in calls]
            # Without arguments it is called once.
            found = list((map if executor is None else executor.map)(function, *calls)) if calls else [function()]
            for value in found:
                if np.shape(value) != shape:
                    raise InputError(
                        f"the function {name} gave a result of shape {np.shape(value)}, not {shape}: give black_box "
                        "the shape of its result"
                    )
            return np.asarray(found, dtype).reshape((*lead, *shape))

        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(shape, dtype), *arguments, vmap_method="broadcast_all")

    return traced
