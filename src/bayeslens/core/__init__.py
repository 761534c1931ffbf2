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
    "Posterior": "posterior",
    "Predictive": "learner",
    "QuantileDistribution": "transformed",
    "Recalibrated": "transformed",
    "Structure": "structure",
    "Table": "table",
    "Target": "table",
    "as_predictive": "foreign",
    "certify": "conjugate",
    "conjugate_pair": "conjugate",
    "hyperparameters_of": "conjugate",
    "load": "saving",
    "log_marginal_likelihood": "conjugate",
    "mix": "mixture",
    "quantile": "quantile",
    "register": "saving",
    "register_family": "distribution",
    "run": "exact_conditioning",
    "save": "saving",
    "show": "saving",
    "train": "training",
    "update_on_uncertain_evidence": "uncertain_evidence",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.core.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
