"""Random functions and sequences: state space models, and processes on trees."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "Beliefs": "factorial_hidden_markov_model",
    "DirectedTree": "backward_filtering_forward_guiding",
    "FactorialHiddenMarkovModel": "factorial_hidden_markov_model",
    "GaussianMessage": "guiding_rules",
    "Guide": "backward_filtering_forward_guiding",
    "LinearEquation": "guiding_rules",
    "MarginalisedGaussianProcess": "kernel_marginalised_gaussian_process",
    "NonlinearGaussianKernel": "guiding_rules",
    "StochasticDifferentialEquation": "guiding_rules",
    "average_data_log_likelihood": "average_data",
    "average_of": "average_data",
    "backward_filter": "backward_filtering_forward_guiding",
    "cosine": "kernel_marginalised_gaussian_process",
    "exact_filter": "factorial_hidden_markov_model",
    "exact_smoother": "factorial_hidden_markov_model",
    "forward_guide": "backward_filtering_forward_guiding",
    "graph_filter": "factorial_hidden_markov_model",
    "graph_smoother": "factorial_hidden_markov_model",
    "hypothetical_subjects": "average_data",
    "infer_marginalised": "kernel_marginalised_gaussian_process",
    "infer_tree": "backward_filtering_forward_guiding",
    "linearize": "guiding_rules",
    "local_total_variation": "factorial_hidden_markov_model",
    "log_evidence_ratio": "kernel_marginalised_gaussian_process",
    "marginalised_gaussian_process": "kernel_marginalised_gaussian_process",
    "matern_32": "kernel_marginalised_gaussian_process",
    "matern_52": "kernel_marginalised_gaussian_process",
    "periodic": "kernel_marginalised_gaussian_process",
    "rational_quadratic": "kernel_marginalised_gaussian_process",
    "shifted": "average_data",
    "squared_exponential": "kernel_marginalised_gaussian_process",
    "tabulate": "factorial_hidden_markov_model",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.processes.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
