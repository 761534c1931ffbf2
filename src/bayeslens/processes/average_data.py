"""Averages of a trial as data: hypothetical subjects stand in for those whose own data were not reported.

One hierarchical, nonlinear model explains the raw data of one trial and the averages that another trial reports. The
likelihood of averages has no closed form, because nonlinear curves do not average to the curve of average parameters.
But averages over many subjects are nearly normal, so that the mean and the covariance of one subject's curve are all
that is needed; both are computed from many hypothetical subjects, simulated anew at the parameters of every step of
the sampler. Their random numbers stay the same, which makes the likelihood a smooth function of the parameters, with a
gradient. Parameters of the external trial may differ from those of one's own by a shift that is shrunk to zero.

Source: S. Weber, A. Gelman, D. Lee, M. Betancourt, A. Vehtari, A. Racine-Poon, "Bayesian aggregation of average data:
An application in drug development" (2018). The paper draws the random numbers of hypothetical subjects independently.
Here they are spread evenly and have mean zero and covariance one to the last digit, so that the likelihood is exact
where curves are linear in the random effects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.errors import InputError
from bayeslens.core.randomness import host_generator

if TYPE_CHECKING:
    from numpyro.distributions import MultivariateNormal


def hypothetical_subjects(
    num_effects: int, num_hypothetical: int = 512, *, key: Any
) -> Float[np.ndarray, "hypothetical effects"]:
    """Standard normal random effects of hypothetical subjects, spread evenly: a Sobol sequence and its mirror image.

    Mean and covariance are those of the standard normal to the last digit.

    Args:
        num_effects: random effects of a subject.
        num_hypothetical: subjects; an even number, best a power of two. With the default, mean and covariance of a
            curve that bends moderately are off by less than a percent of its standard deviation; they should be off
            by less than the averages are, so trials of thousands of subjects want more.
        key: a `jax.random.key`, of the scrambling.

    Raises:
        InputError: fewer than one effect, an odd number of subjects, or fewer than four for each effect.

    >>> effects = hypothetical_subjects(2, 64, key=jax.random.key(0))
    >>> effects.shape, np.allclose(effects.T @ effects / 64, np.eye(2))
    ((64, 2), True)
    """
    if num_effects < 1:
        raise InputError(f"num_effects must be at least 1, got {num_effects}")
    if num_hypothetical % 2 or num_hypothetical < 4 * num_effects:
        raise InputError(
            f"num_hypothetical must be even and at least four times the {num_effects} effects, got {num_hypothetical}"
        )
    from scipy.special import ndtri
    from scipy.stats import qmc

    rng = host_generator(key)
    half = num_hypothetical // 2
    points = qmc.Sobol(num_effects, rng=rng).random_base2(int(np.ceil(np.log2(half))))[:half]
    # A point may be the corner of the cube, whose quantile is infinite.
    effects = ndtri(np.clip(points, 1e-9, 1 - 1e-9))
    effects = np.concatenate([effects, -effects])
    factor = np.linalg.cholesky(effects.T @ effects / num_hypothetical)
    return np.linalg.solve(factor, effects.T).T


def average_of(
    simulate: Callable[[Array], Array],
    base_noise: Float[Any, "hypothetical effects"],
    num_subjects: Any,
    noise_scale: Any = None,
) -> MultivariateNormal:
    """The distribution of averages of a trial, for `numpyro.sample(name, ..., obs=averages)` in any model.

    Args:
        simulate: from the random numbers of one subject, a row of `base_noise`, to its curve, of shape (times,), at
            the current parameters; what the trial averaged, such as changes from baseline or several arms side by
            side. It is traced.
        base_noise: random numbers of hypothetical subjects, the same at each step: see `hypothetical_subjects`.
        num_subjects: how many subjects were averaged; of shape (times,) where some left the trial: those at a late
            visit are then taken to be among those at the earlier ones.
        noise_scale: standard deviation of measurement noise, independent from visit to visit, a number or of shape
            (times,); None where `simulate` adds it.

    Raises:
        InputError: no subjects; base noise that is no table; curves without one axis; or so few random numbers that
            curves without noise lie in a plane.

    >>> effects = hypothetical_subjects(1, key=jax.random.key(0))
    >>> averages = average_of(lambda effect: 2.0 + 3.0 * effect, effects, num_subjects=100, noise_scale=4.0)
    >>> averages.loc.round(3).tolist(), jnp.sqrt(averages.covariance_matrix).round(3).tolist()
    ([2.0], [[0.5]])
    """
    from numpyro.distributions import MultivariateNormal

    base_noise = jnp.asarray(base_noise)
    if base_noise.ndim != 2:
        raise InputError(f"base_noise needs a row for each hypothetical subject, got shape {base_noise.shape}")
    if not isinstance(num_subjects, jax.core.Tracer) and not np.all(np.asarray(num_subjects) >= 1):
        raise InputError(f"num_subjects must be at least 1, got {num_subjects}")
    curves = jax.vmap(simulate)(base_noise)
    if curves.ndim != 2:
        raise InputError(f"simulate must return a curve of shape (times,), got shape {curves.shape[1:]}")
    times = curves.shape[1]
    if noise_scale is None and base_noise.shape[1] < times:
        raise InputError(
            f"{base_noise.shape[1]} random numbers make curves of {times} times with a singular covariance: give "
            "noise_scale, or let simulate add noise from further columns of base_noise"
        )
    mean = jnp.mean(curves, axis=0)
    deviations = curves - mean
    covariance = deviations.T @ deviations / len(curves)
    if noise_scale is not None:
        covariance += jnp.diag(jnp.broadcast_to(jnp.asarray(noise_scale) ** 2, (times,)))
    # Of two averages, one over some of the other's subjects, the covariance has the larger number below it.
    count = jnp.broadcast_to(jnp.asarray(num_subjects, curves.dtype), (times,))
    return MultivariateNormal(mean, covariance / jnp.maximum(count[:, None], count))


def average_data_log_likelihood(
    simulate: Callable[[Array], Array],
    base_noise: Float[Any, "hypothetical effects"],
    averages: Float[Any, " times"],
    num_subjects: Any,
    noise_scale: Any = None,
) -> Float[Array, ""]:
    """Log likelihood of reported averages, for samplers other than NumPyro's; it can be differentiated.

    Args:
        simulate: see `average_of`, as for the other arguments.
        base_noise: random numbers of hypothetical subjects.
        averages: as they were reported.
        num_subjects: over how many subjects.
        noise_scale: of measurements.

    Raises:
        InputError: averages that do not have the shape of a curve or are missing; others as for `average_of`.

    >>> effects = hypothetical_subjects(1, key=jax.random.key(0))
    >>> found = average_data_log_likelihood(lambda e: 2.0 + 3.0 * e, effects, jnp.array([2.5]), 100, 4.0)
    >>> round(float(found), 4)  # a standard error off
    -0.7258
    """
    distribution = average_of(simulate, base_noise, num_subjects, noise_scale)
    if np.shape(averages) != distribution.event_shape:
        raise InputError(f"averages have shape {np.shape(averages)}, but simulated curves {distribution.event_shape}")
    if not isinstance(averages, jax.core.Tracer) and not np.isfinite(np.asarray(averages, float)).all():
        raise InputError("an average is missing or infinite: leave out that visit, also in simulate")
    return distribution.log_prob(jnp.asarray(averages))


def shifted(name: str, parameters: Float[Any, " parameters"], spread: Any) -> Float[Array, " parameters"]:
    """Parameters of an external trial: one's own plus a latent shift, normal about zero. For use in a NumPyro model.

    Args:
        name: of the site of the shift.
        parameters: of one's own trial, on a scale where shifts add up, such as logarithms.
        spread: standard deviation of shifts, a number or one for each parameter; it says how far trials may differ
            before seeing them. It may be a latent itself, where several trials share it.

    >>> import numpyro
    >>> def model():
    ...     own = numpyro.sample("own", numpyro.distributions.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     return shifted("delta", own, 0.1)
    >>> numpyro.handlers.seed(model, 0)().shape
    (2,)
    """
    import numpyro
    from numpyro.distributions import Normal

    parameters = jnp.asarray(parameters)
    spread = jnp.broadcast_to(jnp.asarray(spread, parameters.dtype), parameters.shape)
    return parameters + numpyro.sample(name, Normal(0.0, spread).to_event(parameters.ndim))
