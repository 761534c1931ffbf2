"""The nouns of the library, tables, exact kernel algebra, the training loop, saving and loading."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "Affine": "exact_conditioning",
    "BayesianLens": "bayesian_lens",
    "CONJUGATE_PAIRS": "conjugate",
    "Certificate": "conjugate",
    "ConditionalDensity": "density",
    "ConjugatePair": "conjugate",
    "Density": "density",
    "Dequantized": "transformed",
    "Empirical": "foreign",
    "ExactPosterior": "exact_conditioning",
    "FiniteKernel": "finite",
    "InputError": "errors",
    "Kernel": "kernel",
    "Learner": "learner",
    "LinearGaussianKernel": "linear_gaussian",
    "Machine": "exact_conditioning",
    "Members": "mixture",
    "Mixture": "mixture",
    "NormalInverseGamma": "conjugate",
    "Operations": "probabilistic_program",
    "Population": "probabilistic_program",
    "Posterior": "posterior",
    "Predictive": "learner",
    "QuantileDistribution": "transformed",
    "Recalibrated": "transformed",
    "Structure": "structure",
    "Table": "table",
    "Target": "table",
    "as_predictive": "foreign",
    "black_box": "plain_python",
    "certify": "conjugate",
    "collapse": "representations",
    "conjugate_pair": "conjugate",
    "enumerate_measure": "probabilistic_program",
    "hyperparameters_of": "conjugate",
    "importance": "representations",
    "load": "saving",
    "log_marginal_likelihood": "conjugate",
    "metropolis_hastings": "representations",
    "mix": "mixture",
    "particle_marginal": "representations",
    "quantile": "quantiles",
    "register": "saving",
    "register_family": "distribution",
    "resample_move_smc": "representations",
    "run": "exact_conditioning",
    "sample_posterior": "representations",
    "save": "saving",
    "show": "saving",
    "smc": "representations",
    "suspended": "representations",
    "traced": "representations",
    "train": "training",
    "update_on_uncertain_evidence": "uncertain_evidence",
    "weighted": "probabilistic_program",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.core.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
