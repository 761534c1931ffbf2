"""Exact inference by enumeration: a hidden Markov model against the forward-backward algorithm, and its time by length.

    python benchmarks/enumeration.py

In double precision. Seconds are those of a second call with another key, with the engine's default number of draws, and
those of the first call, which compiles; the median of five.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from record import record
from scipy.special import logsumexp

from bayeslens.core.conditioned_model import conditioned_model
from bayeslens.inference import Enumeration

STATES, LENGTHS = 16, (100, 200, 400)


def forward_backward(transition: np.ndarray, log_likelihood: np.ndarray) -> tuple[float, np.ndarray]:
    """Log evidence and log marginals, in the log domain; state 0 comes before the first."""
    log_transition = np.log(transition)
    forward, backward = [log_transition[0] + log_likelihood[0]], [np.zeros(STATES)]
    for row in log_likelihood[1:]:
        forward.append(logsumexp(forward[-1][:, None] + log_transition, axis=0) + row)
    for row in log_likelihood[:0:-1]:
        backward.append(logsumexp(log_transition + row + backward[-1], axis=1))
    joint = np.array(forward) + np.array(backward[::-1])
    return float(logsumexp(forward[-1])), joint - logsumexp(joint, axis=1, keepdims=True)


def main() -> None:
    rng = np.random.default_rng(0)
    transition, mean = rng.dirichlet(np.ones(STATES), STATES), np.linspace(-4, 4, STATES)

    def model(y):
        def step(state, y):
            state = numpyro.sample("state", dist.Categorical(jnp.asarray(transition)[state]))
            numpyro.sample("y", dist.Normal(jnp.asarray(mean)[state], 1.0), obs=y)
            return state, None

        scan(step, 0, y)

    found = {}
    with jax.enable_x64(True):
        for length in LENGTHS:
            y = rng.normal(size=length) * 2
            conditioned, engine = conditioned_model(model, {"y": y}), Enumeration()
            seconds = []
            for i in range(6):
                began = time.perf_counter()
                posterior = engine(conditioned, key=jax.random.key(i))
                seconds.append(time.perf_counter() - began)
            log_likelihood = -0.5 * (y[:, None] - mean) ** 2 - 0.5 * np.log(2 * np.pi)
            evidence, marginals = forward_backward(transition, log_likelihood)
            row = {
                "evidence_error": abs(posterior.log_evidence - evidence),
                "marginal_error": float(np.abs(np.exp(posterior.marginals["state"].logits) - np.exp(marginals)).max()),
                "seconds": round(float(np.median(seconds[1:])), 3),
                "first_call_seconds": round(seconds[0], 2),
            }
            found[f"{length} steps, {STATES} states"] = row
            print(length, row)
    record("enumeration", found)


if __name__ == "__main__":
    main()
