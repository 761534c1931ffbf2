"""Kernels: conditional distributions, the noun that likelihoods, decoders, policies and predictors share."""

import abc
from typing import Any

import equinox as eqx
from numpyro.distributions import Distribution


class Kernel(eqx.Module):
    """A conditional distribution p(y given x).

    Calling it with `x` returns a NumPyro distribution whose batch shape is x's leading axes.
    """

    @abc.abstractmethod
    def __call__(self, x: Any) -> Distribution:
        """The distribution of y for every row of `x`."""
