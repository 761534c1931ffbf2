"""Bayesian lenses: forward models that carry their exact inverse, and compose.

To invert "d after c" under a prior, invert d under the prior pushed through c, invert c under the prior, and run the
two inverses one after the other. So a chain is inverted piece by piece; nothing ever builds its joint distribution.

Source: D. Braithwaite, J. Hedges, T. St Clere Smithe, "The compositional structure of Bayesian inference" (2023).
"""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from bayeslens.core.errors import InputError
from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel

ExactKernel = FiniteKernel | LinearGaussianKernel


class BayesianLens(eqx.Module):
    """A chain of kernels with its prior and the inverse of every stage. Make one with `exact_lens`.

    Args:
        prior: the distribution of the chain's input.
        stages: kernels, each starting where the one before ends.
        inverses: the Bayesian inverse of every stage at the prior that reaches it.

    Calling the lens with data gives the posterior:

    >>> weather = FiniteKernel([[0.75, 0.25], [0.5, 0.5]])  # dry or wet today, tomorrow
    >>> report = FiniteKernel([[1.0, 0.0], [0.5, 0.5]])
    >>> lens = exact_lens(FiniteKernel.state([0.5, 0.5]), weather, report)
    >>> [round(float(p), 4) for p in lens(1).probs]
    [0.3333, 0.6667]
    """

    prior: ExactKernel
    stages: tuple[ExactKernel, ...]
    inverses: tuple[ExactKernel, ...]

    @property
    def forward(self) -> ExactKernel:
        """The whole chain as one kernel.

        >>> half = FiniteKernel([[0.5, 0.5], [0.5, 0.5]])
        >>> exact_lens(FiniteKernel.state([0.5, 0.5]), half, half).forward.probs.tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        """
        return functools.reduce(lambda first, second: first.then(second), self.stages)

    @property
    def inverse(self) -> ExactKernel:
        """The inverse of the whole chain: the inverses of its stages, last stage first.

        >>> half = FiniteKernel([[0.5, 0.5], [0.0, 1.0]])
        >>> exact_lens(FiniteKernel.state([0.0, 1.0]), half).inverse.domain.tolist()
        [False, True]
        """
        return functools.reduce(lambda first, second: first.then(second), reversed(self.inverses))

    @property
    def predictive(self) -> ExactKernel:
        """The distribution of the data before any is seen: the prior pushed through the chain.

        >>> exact_lens(FiniteKernel.state([0.5, 0.5]), FiniteKernel([[0.5, 0.5], [0.0, 1.0]])).predictive.probs.tolist()
        [0.25, 0.75]
        """
        return functools.reduce(lambda state, stage: stage.push(state), self.stages, self.prior)

    def condition(self, value: Any) -> tuple[ExactKernel, Float[Array, ""]]:
        """The posterior of the input given that the chain's output was `value`, and the log evidence.

        An impossible value has no posterior: the state is all zeros (finite) or NaN (Gaussian), and the log evidence
        is minus infinity.

        >>> lens = exact_lens(FiniteKernel.state([0.5, 0.5]), FiniteKernel([[0.5, 0.5], [0.0, 1.0]]))
        >>> posterior, log_evidence = lens.condition(0)
        >>> posterior.probs.tolist(), round(float(log_evidence), 4)
        ([1.0, 0.0], -1.3863)
        """
        *earlier, last = self.stages
        reached = functools.reduce(lambda state, stage: stage.push(state), earlier, self.prior)
        posterior, log_evidence = last.condition(reached, value)
        # A state pushed through inverse after inverse: cheaper than composing the inverses first.
        back = functools.reduce(lambda state, inverse: inverse.push(state), self.inverses[-2::-1], posterior)
        return back, log_evidence

    def __call__(self, value: Any) -> ExactKernel:
        """The posterior of the input, given that the chain's output was `value`; see `condition`.

        >>> noisy = LinearGaussianKernel([[1.0]], [0.0], [[1.0]])
        >>> exact_lens(LinearGaussianKernel.state([0.0], [[1.0]]), noisy)([2.0]).mean.round(3).tolist()
        [1.0]
        """
        return self.condition(value)[0]

    def at(self, prior: ExactKernel) -> BayesianLens:
        """The same forward model under another prior: every stage is inverted anew.

        >>> lens = exact_lens(FiniteKernel.state([0.5, 0.5]), FiniteKernel([[0.5, 0.5], [0.0, 1.0]]))
        >>> lens.at(FiniteKernel.state([1.0, 0.0]))(1).probs.tolist()
        [1.0, 0.0]
        """
        return exact_lens(prior, *self.stages)

    def then(self, other: BayesianLens | ExactKernel) -> BayesianLens:
        """First this lens, then `other`. Also written `>>`.

        A kernel is inverted at the prior that reaches it. A lens must have been made at that prior.

        >>> first = exact_lens(FiniteKernel.state([0.5, 0.5]), FiniteKernel([[0.5, 0.5], [0.0, 1.0]]))
        >>> len((first >> FiniteKernel([[0.5, 0.5], [0.25, 0.75]])).stages)
        2

        Raises:
            InputError: the other lens was made at a different prior (checked outside `jit` only).
        """
        reached = self.predictive
        if not isinstance(other, BayesianLens):
            other = exact_lens(reached, other)
        equal = other.prior.isclose(reached)
        if not isinstance(equal, jax.core.Tracer) and not equal:
            raise InputError(
                "the second lens inverts at a prior that is not what the first lens pushes forward, so the composite "
                "would not be Bayes' rule: compose with `second.at(first.predictive)`"
            )
        return BayesianLens(self.prior, self.stages + other.stages, self.inverses + other.inverses)

    __rshift__ = then

    def tensor(self, other: BayesianLens) -> BayesianLens:
        """Both lenses side by side under independent priors. Also written `@`.

        >>> lens = exact_lens(FiniteKernel.state([0.5, 0.5]), FiniteKernel([[0.5, 0.5], [0.0, 1.0]]))
        >>> (lens @ lens)((0, 0)).probs.tolist()
        [[1.0, 0.0], [0.0, 0.0]]
        """
        return BayesianLens(
            self.prior.tensor(other.prior),
            (self.forward.tensor(other.forward),),
            (self.inverse.tensor(other.inverse),),
        )

    __matmul__ = tensor


def exact_lens(prior: ExactKernel, *stages: ExactKernel) -> BayesianLens:
    """The lens of a chain of kernels, all finite or all linear-Gaussian, at a prior.

    Args:
        prior: a state on the source of the first stage.
        stages: one kernel or more, each starting where the one before ends.

    >>> exact_lens(FiniteKernel.state([0.5, 0.5]), FiniteKernel([[1.0, 0.0], [0.0, 1.0]]))(0).probs.tolist()
    [1.0, 0.0]

    Raises:
        InputError: no stage, kernels of different kinds, or sources and targets that do not fit.
    """
    kinds = {type(kernel).__name__ for kernel in (prior, *stages)}
    if not stages or len(kinds) > 1:
        raise InputError(f"a lens needs at least one stage, and kernels of one kind, not {sorted(kinds)}")
    inverses, state = [], prior
    for stage in stages:
        inverses.append(stage.invert(state))
        state = stage.push(state)
    return BayesianLens(prior, stages, tuple(inverses))
