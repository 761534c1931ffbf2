"""Conditioning on evidence that is itself uncertain: Jeffrey's rule, virtual evidence, distributional evidence.

A report about y may be uncertain in three ways, and the three give different posteriors. Choose by how it came about:

- `"jeffrey"`: the report is what its author now believes about y, all things considered, prior included. The
  posterior is the mixture of the posteriors for each y. Afterwards y has the reported distribution.
- `"virtual"`: the report is a reading of an instrument that sees y through noise of its own: a likelihood of y.
  Reports of this kind may be combined in any order.
- `"distributional"`: y varies with this distribution over repeated draws from p(y given x), all of the same x; every
  outcome counts by its share.

Source: A. Munk, A. Mead, F. Wood, "Uncertain evidence in probabilistic models and stochastic simulators" (2023).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bayeslens.core.bayesian_lens import ExactKernel
from bayeslens.core.errors import InputError
from bayeslens.core.finite import FiniteKernel
from bayeslens.core.linear_gaussian import LinearGaussianKernel


def update_on_uncertain_evidence(
    prior: ExactKernel, kernel: ExactKernel, evidence: ExactKernel, interpretation: str
) -> ExactKernel:
    """What is believed about x after an uncertain report about y.

    Args:
        prior: the distribution of x.
        kernel: p(y given x).
        evidence: the report: a state q over y. As virtual evidence its probabilities or density are the likelihood
            l(y), of which only ratios count.
        interpretation: `"jeffrey"`: p(x) = sum_y q(y) p(x given y); `"virtual"`: p(x) is proportional to
            prior(x) sum_y q(y) p(y given x); `"distributional"`: to prior(x) exp(sum_y q(y) log p(y given x)).

    Returns:
        the posterior state. On a finite space it is all zeros under `jit` where it does not exist.

    >>> prior, alarm = FiniteKernel.state([0.75, 0.25]), FiniteKernel([[0.75, 0.25], [0.25, 0.75]])
    >>> heard = FiniteKernel.state([0.1, 0.9])
    >>> for rule in ("jeffrey", "virtual", "distributional"):
    ...     print(rule, round(float(update_on_uncertain_evidence(prior, alarm, heard, rule).probs[1]), 4))
    jeffrey 0.46
    virtual 0.4375
    distributional 0.4453

    Raises:
        InputError: an unknown interpretation, kernels that do not fit, or a report that the model rules out.
    """
    rules = {
        FiniteKernel: {"jeffrey": _jeffrey, "virtual": _virtual_finite, "distributional": _distributional_finite},
        LinearGaussianKernel: {"jeffrey": _jeffrey, "virtual": _virtual_gaussian, "distributional": _at_the_mean},
    }
    if not (type(prior) is type(kernel) is type(evidence)) or type(kernel) not in rules:
        raise InputError("prior, kernel and evidence must be all finite or all linear-Gaussian")
    if interpretation not in rules[type(kernel)]:
        raise InputError(f"unknown interpretation {interpretation!r}: use 'jeffrey', 'virtual' or 'distributional'")
    if not _same_space(kernel, evidence):
        raise InputError("the evidence must be a state over the target of the kernel, one probability for each y")
    return rules[type(kernel)][interpretation](prior, kernel, evidence)


def _jeffrey(prior, kernel, evidence):
    _refuse(~_within(evidence, kernel.push(prior)))
    return kernel.invert(prior).push(evidence)


def _virtual_finite(prior, kernel, evidence):
    # Observe that an instrument with hit rate l(y) fired: an ordinary observation of a binary variable.
    likelihood = evidence.probs / evidence.probs.max()
    instrument = FiniteKernel(jnp.stack([1 - likelihood, likelihood], axis=-1), source_ndim=evidence.probs.ndim)
    return _posterior(kernel.then(instrument).condition(prior, 1))


def _virtual_gaussian(prior, kernel, evidence):
    # N(y; m, C) is also the density of reading m from an instrument with noise covariance C.
    instrument = LinearGaussianKernel(jnp.eye(evidence.target_size), jnp.zeros(evidence.target_size), evidence.factor)
    return _posterior(kernel.then(instrument).condition(prior, evidence.mean))


def _distributional_finite(prior, kernel, evidence):
    probs = kernel.probs
    logs = jnp.log(jnp.where(probs > 0, probs, 1))
    axes = evidence.probs.ndim
    expected = jnp.tensordot(logs, evidence.probs, axes=axes, precision="highest")
    possible = jnp.tensordot((probs == 0).astype(probs.dtype), evidence.probs, axes=axes) == 0
    possible &= prior.support
    expected = jnp.where(possible, expected, -jnp.inf)
    highest = expected.max()
    weights = prior.probs * jnp.exp(jnp.where(possible, expected - jnp.where(highest > -jnp.inf, highest, 0), -jnp.inf))
    total = weights.sum()
    _refuse(total <= 0)
    return FiniteKernel.state(weights / jnp.where(total > 0, total, 1))


def _at_the_mean(prior, kernel, evidence):
    # The expected log density of a Gaussian is its log density at the mean, less a term in which x does not occur.
    _refuse(~_within(evidence, kernel, spread_only=True))
    return _posterior(kernel.condition(prior, evidence.mean))


def _posterior(conditioned):
    posterior, log_evidence = conditioned
    _refuse(log_evidence == -jnp.inf)
    return posterior


def _same_space(kernel, evidence):
    if isinstance(kernel, FiniteKernel):
        return evidence.source_ndim == 0 and evidence.target_shape == kernel.target_shape
    return evidence.source_size == 0 and evidence.target_size == kernel.target_size


def _within(evidence, model, spread_only=False):
    """Whether the model gives positive probability (density on its support) to all that the evidence does."""
    if isinstance(evidence, FiniteKernel):
        return (model.support | ~evidence.support).all()
    # Every column of the evidence's factor is a direction in which y may vary: the model's noise must cover it.
    noise = LinearGaussianKernel(jnp.zeros((model.target_size, 0)), jnp.zeros(model.target_size), model.factor)
    covered = (jax.vmap(noise.log_prob)(evidence.factor.T) > -jnp.inf).all()
    return covered if spread_only else covered & (model.log_prob(evidence.mean) > -jnp.inf)


def _refuse(impossible) -> None:
    if not isinstance(impossible, jax.core.Tracer) and impossible:
        raise InputError("the evidence gives weight to values of y that the model rules out: no posterior exists")
