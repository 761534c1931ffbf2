"""The noun `Kernel`: every exact kernel is one, gives batches by x's leading axes, and the room exports all it has."""

from __future__ import annotations

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bayeslens import core
from bayeslens.core.finite import FiniteKernel
from bayeslens.core.kernel import Kernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel


@pytest.mark.parametrize(
    ("kernel", "x", "means"),
    [
        (
            FiniteKernel([[1.0, 0.0], [0.25, 0.75]]),
            np.array([[1, 0], [0, 0], [1, 1]]),
            [[0.75, 0], [0, 0], [0.75, 0.75]],
        ),
        (LinearGaussianKernel([[2.0]], [1.0], [[3.0]]), jnp.arange(6.0).reshape(3, 2, 1), [[1, 3], [5, 7], [9, 11]]),
    ],
)
def test_exact_kernels_are_kernels(kernel, x, means):
    assert isinstance(kernel, Kernel)
    distribution = kernel(x)
    assert distribution.batch_shape == (3, 2)
    mean = distribution.probs[..., 1] if isinstance(kernel, FiniteKernel) else distribution.mean[..., 0]
    np.testing.assert_allclose(mean, means)


def test_a_kernel_without_a_call_is_refused():
    class Silent(Kernel):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent()


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        core.nothing  # noqa: B018


def test_importing_loads_nothing_heavy():
    heavy = "import bayeslens, bayeslens.core, sys; print(*{'jax', 'numpyro', 'pandas', 'sklearn'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
