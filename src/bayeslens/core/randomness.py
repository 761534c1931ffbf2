"""Random numbers from a `jax.random.key` where JAX's default generator would be slow to compile."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def host_generator(key: Any) -> np.random.Generator:
    """A NumPy generator for what is drawn on the host, where no program has to be compiled for it.

    >>> float(host_generator(jax.random.key(0)).random()) == float(host_generator(jax.random.key(0)).random())
    True
    """
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def fast_key(key: Any) -> Any:
    """A key of XLA's own generator, for compiled training loops: quick to compile and to run.

    >>> jax.random.key_impl(fast_key(jax.random.key(0)))
    'rbg'
    """
    return jax.random.key(int(np.asarray(jax.random.key_data(key)).ravel()[-1]), impl="rbg")
