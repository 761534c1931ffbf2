"""Bayesian inverses without arbitrary choices: what is impossible under the prior has no inverse.

Claim: where a prior gives some observations probability zero, a Bayesian inverse defined on all observations needs
arbitrary rows, and two sets of choices disagree: composing filled-in inverses differs from filling in the composite.
Restricted to the support of the pushed-forward prior, inverses are unique and compose exactly.

Source: D. Braithwaite, J. Hedges, "Dependent Bayesian lenses" (2022).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bayeslens.core.finite import FiniteKernel
from bayeslens.gallery import Evidence

PAPER = "S375"
CLAIM = "Inverses restricted to the prior's support are unique and compose exactly; arbitrary fill-ins do not."
NOT_CHECKED = "Support objects in categories other than finite sets."
CASES = 300


def sparse_kernels(rng, sources, targets):
    """Random kernels, many of whose entries are exactly zero."""
    rows = rng.gamma(1.0, size=(CASES, sources, targets)) * (rng.random((CASES, sources, targets)) < 0.4)
    rows[..., 0] += rows.sum(-1) == 0
    return rows / rows.sum(-1, keepdims=True)


def both_ways(prior, f, g, fill_in):
    """The inverse of "g after f" and the composite of the inverses, with undefined rows filled in uniformly or not."""

    def inverse(kernel, at):
        probs = kernel.invert(at).probs
        return FiniteKernel(jnp.where(probs.any(1, keepdims=True), probs, 1 / probs.shape[1]) if fill_in else probs)

    prior, f, g = FiniteKernel.state(prior), FiniteKernel(f), FiniteKernel(g)
    piecewise = inverse(g, f.push(prior)) >> inverse(f, prior)
    return inverse(f >> g, prior).probs, piecewise.probs


def check(*, control: bool = False) -> Evidence:
    """Composed inverses on kernels with zeros; the control fills undefined rows in with the uniform distribution."""
    rng = np.random.default_rng(0)
    prior, f, g = sparse_kernels(rng, 1, 4)[:, 0], sparse_kernels(rng, 4, 4), sparse_kernels(rng, 4, 4)
    with jax.enable_x64(True):
        made = jax.jit(jax.vmap(lambda *case: both_ways(*case, fill_in=control)))(prior, f, g)
        whole, piecewise = map(np.asarray, made)
    joint = np.einsum("nx,nxy,nyz->nzx", prior, f, g)
    possible = joint.sum(-1) > 0
    bayes = joint / np.where(possible, joint.sum(-1), 1)[..., None]
    numbers = {
        "impossible observations": float((~possible).sum()),
        "composite against whole": float(np.abs(whole - piecewise).max()),
        "against Bayes' rule on the support": float(np.abs(piecewise - bayes)[possible].max()),
        "wrongly defined rows": float((piecewise.any(-1) != possible).sum()),
    }
    holds = numbers["composite against whole"] < 1e-14 and numbers["wrongly defined rows"] == 0
    holds &= numbers["against Bayes' rule on the support"] < 1e-14 and not possible.all()
    shown = (
        f"over {CASES} chains with {numbers['impossible observations']:.0f} impossible observations the two ways "
        f"differ by {numbers['composite against whole']:.1e} (exact is 0); "
        f"{numbers['wrongly defined rows']:.0f} rows are defined that should not be"
    )
    return Evidence(bool(holds), shown, numbers)
