"""What `check` says of posteriors: of one, of an engine on data that a model simulates, and of draws made elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.evaluation.credible_coverage import ExpectedCoverage
from bayeslens.evaluation.predictive_checks import PosteriorPredictiveCheck, check_posterior
from bayeslens.evaluation.prior_sensitivity import PowerScaling, power_scaling
from bayeslens.evaluation.random_points import tarp
from bayeslens.evaluation.rank_tests import SimulationBasedCalibration, simulation_based_calibration
from bayeslens.evaluation.simulated_posteriors import SimulatedPosteriors, simulate_posteriors


@dataclasses.dataclass(frozen=True)
class PosteriorChecks:
    """Whether a posterior predicts data like those it was made from, and what it owes to its prior.

    Attributes:
        predictive: statistics of replicated data against those of the data, and LOO-PIT.
        sensitivity: to powers of the prior and of the likelihood.
        warnings: of the engine that made the posterior.
    """

    predictive: PosteriorPredictiveCheck
    sensitivity: PowerScaling
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n\n".join([*self.warnings, str(self.predictive), str(self.sensitivity)])


@dataclasses.dataclass(frozen=True)
class CalibrationChecks:
    """Whether draws of posteriors are right, over data sets that were simulated from the prior.

    Attributes:
        calibration: ranks of the parameters among the draws (simulation-based calibration).
        coverage: of balls around random points (TARP).
        warnings: of the simulations.
    """

    calibration: SimulationBasedCalibration
    coverage: ExpectedCoverage
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n\n".join([*self.warnings, str(self.calibration), str(self.coverage)])


def checks_of_posterior(posterior: Posterior, *, key: Any) -> PosteriorChecks:
    """Posterior predictive checks and prior sensitivity of a posterior that knows its model and data.

    Args:
        posterior: as `infer` makes it.
        key: a `jax.random.key`.

    Raises:
        InputError: it does not know its model and data.

    >>> import jax, numpy as np, numpyro, numpyro.distributions as dist
    >>> from bayeslens.inference.infer import infer
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0).expand([20]), obs=y)
    >>> posterior = infer(model, {"y": np.linspace(-1.0, 3.0, 20)}, key=jax.random.key(0), engine="exact")
    >>> found = checks_of_posterior(posterior, key=jax.random.key(1))
    >>> found.sensitivity.diagnosis
    ('-',)
    """
    return PosteriorChecks(check_posterior(posterior, key=key), power_scaling(posterior), posterior.warnings)


def checks_of_engine(
    model: Callable, example: dict[str, Any], *, key: Any, engine: Any = "auto", count: int = 200, **settings: Any
) -> CalibrationChecks:
    """Simulation-based calibration and TARP of an engine, or of a lens, on data that a model simulates.

    Args:
        model: a NumPyro program with proper priors.
        example: its arguments by name; what is observed under them is simulated.
        key: a `jax.random.key`.
        engine: what inverts the model; see `simulate_posteriors`.
        count: how many data sets.
        settings: of `simulate_posteriors`: `draws`, `executor`.

    Raises:
        InputError: as `simulate_posteriors`.
    """
    import jax

    keys = jax.random.split(key, 2)
    simulated = simulate_posteriors(model, example, engine, key=keys[0], count=count, **settings)
    return checks_of_draws(simulated, key=keys[1])


def checks_of_draws(
    parameters: Any, draws: Any = None, data: Any = None, *, key: Any, names: tuple[str, ...] | None = None
) -> CalibrationChecks:
    """The same of parameters, data and draws that were made elsewhere.

    Args:
        parameters: that made the data, shape (simulations, parameters); or what `simulate_posteriors` returned.
        draws: of their posteriors, shape (simulations, draws, parameters).
        data: numbers that describe each data set, shape (simulations, features): without them a posterior that is the
            prior cannot be told.
        key: a `jax.random.key`.
        names: of the parameters.

    Raises:
        InputError: no draws, or shapes that do not fit.

    >>> import jax, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> mu = rng.normal(size=(300, 1))
    >>> y = mu + rng.normal(size=(300, 1))
    >>> draws = y[:, None] / 2 + np.sqrt(0.5) * rng.normal(size=(300, 99, 1))
    >>> found = checks_of_draws(mu, draws, y, key=jax.random.key(0))
    >>> found.calibration.p_value > 0.01, found.coverage.p_value > 0.01
    (True, True)
    """
    import jax

    if draws is None and not isinstance(parameters, SimulatedPosteriors):
        raise InputError("draws of the posteriors are needed, of shape (simulations, draws, parameters)")
    keys = jax.random.split(key, 2)
    calibration = simulation_based_calibration(parameters, draws, key=keys[0], names=names)
    coverage = tarp(parameters, draws, key=keys[1], data=data)
    return CalibrationChecks(calibration, coverage, getattr(parameters, "warnings", ()))
