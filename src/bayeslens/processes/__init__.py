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
    "NonlinearGaussianKernel": "guiding_rules",
    "StochasticDifferentialEquation": "guiding_rules",
    "backward_filter": "backward_filtering_forward_guiding",
    "exact_filter": "factorial_hidden_markov_model",
    "exact_smoother": "factorial_hidden_markov_model",
    "forward_guide": "backward_filtering_forward_guiding",
    "graph_filter": "factorial_hidden_markov_model",
    "graph_smoother": "factorial_hidden_markov_model",
    "infer_tree": "backward_filtering_forward_guiding",
    "linearize": "guiding_rules",
    "local_total_variation": "factorial_hidden_markov_model",
    "tabulate": "factorial_hidden_markov_model",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.processes.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
