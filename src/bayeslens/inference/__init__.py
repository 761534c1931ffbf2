"""Engines: ways to invert a model."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "BlockMove": "learned_proposals",
    "BlockProposal": "block_proposal",
    "DeepLatentGaussian": "stochastic_backpropagation",
    "ENGINES": "infer",
    "Enumeration": "enumeration",
    "Exact": "exact",
    "Flow": "variational",
    "FullRank": "variational",
    "Gibbs": "numpyro_kernel",
    "GumbelSoftmax": "relaxation",
    "HMC": "hamiltonian",
    "ImplicitVariational": "implicit_variational",
    "Laplace": "laplace",
    "LearnedProposals": "learned_proposals",
    "MeanField": "variational",
    "NUTS": "nuts",
    "NestedSampling": "nested_sampling",
    "NeuralNestedSampling": "neural_nested_sampling",
    "NumPyroGuide": "numpyro_guide",
    "NumPyroKernel": "numpyro_kernel",
    "ParallelTempering": "parallel_tempering",
    "Pathfinder": "pathfinder",
    "SGHMC": "stochastic_gradient",
    "SGLD": "stochastic_gradient",
    "SMC": "sequential_monte_carlo",
    "StructuredGaussian": "stochastic_backpropagation",
    "block_metropolis_hastings": "learned_proposals",
    "categorical_expectation": "relaxation",
    "categorical_gradient": "relaxation",
    "convergence": "diagnostics",
    "deep_latent_gaussian": "stochastic_backpropagation",
    "discrete_marginals": "enumeration",
    "engine_named": "infer",
    "entropy_bound": "implicit_variational",
    "gaussian_gradient": "stochastic_backpropagation",
    "gaussian_sites": "gaussian_block",
    "gumbel_softmax": "relaxation",
    "hierarchical_sites": "reparameterization",
    "integrate_out": "gaussian_block",
    "linearized_entropy": "implicit_variational",
    "marginalize": "enumeration",
    "pareto_k": "diagnostics",
    "pareto_smoothed": "diagnostics",
    "plan": "planning",
    "pymc_program": "pymc_models",
    "reparameterize": "reparameterization",
    "sample_discrete": "enumeration",
    "solve_exactly": "exact",
    "train_proposal": "block_proposal",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.inference.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
