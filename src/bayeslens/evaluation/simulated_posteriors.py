"""Parameters from the prior, data from the model, and draws of the posterior that an engine makes of each data set.

What `simulation_based_calibration`, `tarp` and `local_classifier_two_sample_test` look at. Made here from a NumPyro
program and an engine, a lens or any function; arrays made elsewhere go to these tests as they are.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.conditioned_model import ConditionedModel, conditioned_model
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.progress import ProgressBar

if TYPE_CHECKING:
    from bayeslens.core.engine import Engine

LOG_JOINT = "log joint density"
_OBSERVED = "observed_"  # arguments of the program that hold simulated observations begin so


@dataclasses.dataclass(frozen=True)
class SimulatedPosteriors:
    """Parameters from a prior, data that they make, and draws of the posterior given these.

    Attributes:
        parameters: shape (simulations, parameters).
        draws: shape (simulations, draws, parameters).
        names: of the parameters, such as `beta[0]`.
        data: what was simulated, flat, shape (simulations, features).
        quantities: further test quantities by name, each the parameters' value in the first column and those of the
            draws in the others: `"log joint density"` of parameters and data, which a posterior that ignores the
            data gets wrong.
        warnings: sentences on what went wrong, with how often.
    """

    parameters: Float[np.ndarray, "simulations parameters"]
    draws: Float[np.ndarray, "simulations draws parameters"]
    names: tuple[str, ...]
    data: Float[np.ndarray, "simulations features"]
    quantities: dict[str, Float[np.ndarray, "simulations items"]]
    warnings: tuple[str, ...] = ()


class _Recast:
    """A program whose observations are arguments: one object, so that what is compiled for it is kept."""

    def __init__(self, model: Callable, observed: tuple[str, ...]):
        self.model, self.observed = model, observed

    def __call__(self, **arguments: Any) -> Any:
        from numpyro import handlers

        values = {name: arguments.pop(_OBSERVED + name) for name in self.observed}
        return handlers.condition(handlers.uncondition(self.model), data=values)(**arguments)


@functools.lru_cache(maxsize=16)
def _recast(model: Callable, observed: tuple[str, ...]) -> _Recast:
    return _Recast(model, observed)


def simulate_posteriors(
    model: Callable,
    example: dict[str, Any],
    engine: str | Engine | Callable,
    *,
    key: Any,
    count: int = 200,
    draws: int | None = None,
    executor: concurrent.futures.Executor | None = None,
) -> SimulatedPosteriors:
    """Run an engine on data sets that a model simulates from parameters of its prior.

    What is observed under the example is simulated, with its shape; all else is kept, such as a design. Programs that
    an engine compiles serve all simulations. An interrupt keeps those that are done.

    Args:
        model: a NumPyro program with proper priors.
        example: its arguments by name, such as `{"x": x, "y": y}`.
        engine: an engine or its name, such as `NUTS(num_samples=500)` or `"exact"`; `"auto"` takes the one that
            `plan` names for the first simulation. Or a function of the simulated observations, a dict by site, and
            `key=`, that returns a `Posterior` or a dict of draws by latent site, such as a trained lens.
        key: a `jax.random.key`.
        count: how many simulations: 200 see a posterior 15% too narrow in five dimensions, 500 one 10% too narrow.
        draws: how many to keep of each posterior, evenly spread; all by default, and of weighted particles as many
            as there are, resampled.
        executor: where the runs go, such as a pool of threads; one after the other by default.

    Raises:
        InputError: improper priors, a model without observations, simulated values that are not finite, or an engine
            that gives other sites or numbers of draws.

    >>> import numpyro, numpyro.distributions as dist
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> def lens(observed, *, key):  # the exact posterior; an engine such as "nuts" would do
    ...     return {"mu": observed["y"] / 2 + np.sqrt(0.5) * np.asarray(jax.random.normal(key, (50,)))}
    >>> found = simulate_posteriors(model, {"y": 0.0}, lens, key=jax.random.key(0), count=20)
    >>> found.parameters.shape, found.draws.shape, found.names
    ((20, 1), (20, 50, 1), ('mu',))
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    first = conditioned_model(model, example)
    first.check_proper("simulations")
    keys = jax.random.split(key, count)
    simulated = _simulate(model, first, keys)
    observed = tuple(sorted(simulated["observed"]))
    if not observed:
        raise InputError("the model has factors and no observed site: give the simulator's observation as obs=")
    for name, value in (simulated["observed"] | simulated["latent"]).items():
        wrong = ~np.isfinite(value.reshape(count, -1)).all(1) if value.dtype.kind == "f" else np.zeros(count, bool)
        if wrong.any():
            raise InputError(
                f"simulation {int(wrong.argmax())} gives {name!r} values that are not finite: make the prior narrower"
            )
    recast = _recast(model, observed)

    def data_of(i: int) -> dict[str, Any]:
        return first.given | {_OBSERVED + n: simulated["observed"][n][i] for n in observed}

    conditioned = conditioned_model(recast, data_of(0))
    run = _runner(recast, conditioned, engine, data_of, {n: simulated["observed"][n] for n in observed}, keys)
    sites = tuple(sorted(simulated["latent"]))
    values, warnings = _collect(run, count, sites, simulated["latent"], draws, executor)
    done = len(values[sites[0]])
    names = tuple(n for s in sites for n in _names(s, simulated["latent"][s].shape[1:]))
    flat = {n: np.asarray(simulated["latent"][n][:done], np.float64).reshape(done, -1) for n in sites}
    return SimulatedPosteriors(
        np.concatenate([flat[n] for n in sites], 1),
        np.concatenate([values[n].reshape(done, values[n].shape[1], -1) for n in sites], 2).astype(np.float64),
        names,
        np.concatenate(
            [np.asarray(simulated["observed"][n][:done], np.float64).reshape(done, -1) for n in observed], 1
        ),
        {LOG_JOINT: _log_joint(conditioned, data_of, simulated["latent"], values, done)},
        warnings,
    )


def _simulate(model: Callable, conditioned: ConditionedModel, keys: Any) -> dict[str, dict[str, np.ndarray]]:
    """Latents and observations of one run of the program for each key."""
    from numpyro import handlers

    latent = {s.name for s in conditioned.latents}
    given = conditioned.arguments
    example = handlers.trace(handlers.seed(model, keys[0])).get_trace(**given)
    observed = {
        n for n, s in example.items() if s["type"] == "sample" and s["is_observed"] and type(s["fn"]).__name__ != "Unit"
    }

    found = _run_program(conditioned, tuple(sorted(latent)), tuple(sorted(observed)), keys)
    return jax.tree.map(np.asarray, found)


@eqx.filter_jit
def _run_program(
    conditioned: ConditionedModel, latent: tuple[str, ...], observed: tuple[str, ...], keys: Any
) -> dict[str, dict[str, Array]]:
    from numpyro import handlers

    def one(key: Any) -> dict[str, dict[str, Array]]:
        program = handlers.seed(handlers.uncondition(conditioned.model), key)
        trace = handlers.trace(program).get_trace(**conditioned.arguments)
        return {
            "latent": {n: trace[n]["value"] for n in latent},
            "observed": {n: trace[n]["value"] for n in observed},
        }

    return jax.vmap(one)(keys)


def _runner(
    recast: Callable,
    conditioned: ConditionedModel,
    engine: Any,
    data_of: Callable[[int], dict[str, Any]],
    observed: dict[str, np.ndarray],
    keys: Any,
) -> Callable[[int], Any]:
    """The posterior of one simulation, by its number."""
    from bayeslens.core.engine import Engine
    from bayeslens.inference.infer import engine_named, infer

    def key_of(i: int) -> Any:
        return jax.random.fold_in(keys[i], 1)

    if callable(engine) and not isinstance(engine, Engine):
        return lambda i: engine({n: v[i] for n, v in observed.items()}, key=key_of(i))
    if engine == "auto":
        from bayeslens.inference.planning import plan_for

        engine = plan_for(conditioned, {}).engine
    made = engine_named(engine) if isinstance(engine, str) else engine
    # The model is looked through once where all that changes are arrays that its program takes as they come.
    same = set(conditioned.data) >= {_OBSERVED + n for n in observed}
    if isinstance(made, Engine) and same and (made.takes_discrete or not conditioned.discrete):
        return lambda i: made(
            dataclasses.replace(conditioned, data={n: data_of(i)[n] for n in conditioned.data}), key=key_of(i)
        )
    return lambda i: infer(recast, data_of(i), engine=made, key=key_of(i))


def _collect(
    run: Callable[[int], Any],
    count: int,
    sites: tuple[str, ...],
    latent: dict[str, np.ndarray],
    draws: int | None,
    executor: concurrent.futures.Executor | None,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Draws of all simulations by site, as far as they are done when the user interrupts."""
    kept: list[dict[str, np.ndarray]] = []
    doubts: dict[str, int] = {}
    tasks = [executor.submit(run, i) for i in range(count)] if executor is not None else None
    with ProgressBar("simulations", count) as bar:
        try:
            for i in range(count):
                found = tasks[i].result() if tasks is not None else run(i)
                if isinstance(found, Posterior) and found.warnings:
                    doubts["the engine warned of its posterior"] = (
                        doubts.get("the engine warned of its posterior", 0) + 1
                    )
                kept.append(_draws(found, sites, latent, draws, i))
                bar(i + 1)
        except KeyboardInterrupt:
            for task in tasks or ():
                task.cancel()
            if not kept:
                raise
    if len(kept) < count:
        doubts[f"interrupted after {len(kept)} of {count} simulations, which are kept"] = 1
    least = {len(one[sites[0]]) for one in kept}
    if len(least) > 1:
        raise InputError(f"the engine gave between {min(least)} and {max(least)} draws: give draws={min(least)}")
    values = {n: np.stack([one[n] for one in kept]) for n in sites}
    sentences = tuple(s if s.startswith("interrupted") else f"{s} in {n} simulations" for s, n in doubts.items())
    return values, sentences


def _draws(found: Any, sites: tuple[str, ...], latent: dict, draws: int | None, i: int) -> dict[str, np.ndarray]:
    """Draws of one posterior along one axis."""
    if isinstance(found, Posterior):
        key = jax.random.key(i)
        if not found.draws:
            found = found.drawn(key, draws or 1000)
        lacking = sorted(set(sites) - set(found.names))
        total = int(np.prod(np.shape(next(iter(found.draws.values())))[:2]))
        if found.log_weights is not None:
            flat = found.sample(key, (total,))
        else:
            flat = {n: np.reshape(v, (total, *np.shape(v)[2:])) for n, v in found.draws.items()}
    else:
        flat = {n: np.asarray(v) for n, v in dict(found).items()}
        lacking = sorted(set(sites) - set(flat))
    if lacking:
        raise InputError(f"the posterior of simulation {i} lacks the sites {lacking}; it has {sorted(flat)}")
    for name in sites:
        if np.shape(flat[name])[1:] != latent[name].shape[1:]:
            raise InputError(
                f"draws of {name!r} need shape (draws, {', '.join(map(str, latent[name].shape[1:]))}), got "
                f"{np.shape(flat[name])} in simulation {i}"
            )
    have = len(flat[sites[0]])
    chosen = slice(None)
    if draws is not None:
        if have < draws:
            raise InputError(
                f"draws is {draws}, and the posterior of simulation {i} has {have}: ask the engine for more"
            )
        chosen = np.linspace(0, have - 1, draws).round().astype(int)
    return {n: np.asarray(flat[n])[chosen] for n in sites}


def _log_joint(
    conditioned: ConditionedModel, data_of: Callable, latent: dict, values: dict[str, np.ndarray], done: int
) -> np.ndarray:
    """Log joint density of the parameters and of all draws with the simulated data, one row per simulation."""
    rows = []
    for i in range(done):
        model = dataclasses.replace(conditioned, data={n: data_of(i)[n] for n in conditioned.data})
        if conditioned.fixed is not None and any(n.startswith(_OBSERVED) for n in conditioned.fixed.value):
            model = conditioned_model(conditioned.model, data_of(i))
        items = {n: jnp.asarray(np.concatenate([latent[n][i : i + 1], values[n][i]])) for n in values}
        rows.append(np.asarray(_densities(model, items), np.float64))
    return np.stack(rows)


@eqx.filter_jit
def _densities(conditioned: ConditionedModel, items: dict[str, Array]) -> Array:
    return jax.vmap(conditioned.log_density)(items)


def _names(site: str, shape: tuple[int, ...]) -> list[str]:
    return [site] if not shape else [f"{site}[{', '.join(map(str, i))}]" for i in np.ndindex(*shape)]
