"""Exact posteriors of models whose log joint density is conjugate, which is found out numerically.

Sites with real support form one block, whose log density must be quadratic; sites of positive support must be
log-gamma or log-inverse-gamma, those on the unit interval log-beta, those on the simplex log-Dirichlet. What counts
is the density that the program has, not how it is written: `Exponential` priors, `Uniform(0, 1)` priors, plates,
designs and Kalman filters are all found. The factorization is checked at points far apart, in double precision.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from scipy import special

from bayeslens.core.conditioned_model import ConditionedModel
from bayeslens.core.engine import Engine, check_counts, posterior_of
from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior
from bayeslens.core.randomness import host_generator
from bayeslens.core.structure import Structure

_LARGEST_BLOCK = 2000  # real dimensions: the Hessian is dense
_LARGEST_REST = 500  # other entries: one row of a linear system each
_CHECKS = 8
_TOLERANCE = 1e-8  # relative; rounding in double precision stays below 1e-10 for thousands of rows
_FAMILIES = {
    *("Normal", "MultivariateNormal", "LowRankMultivariateNormal", "GaussianRandomWalk", "ImproperUniform"),
    *("Beta", "Uniform", "Gamma", "Exponential", "Chi2", "InverseGamma", "Dirichlet"),
}


class ExactSolution(NamedTuple):
    """The exact posterior: a Gaussian block over real sites, and independent conjugate sites.

    Attributes:
        block: the structure of the Gaussian block.
        mean, covariance: of the block.
        others: site -> its conjugate family with natural parameters.
        log_evidence: log marginal likelihood; None under an improper prior.
    """

    block: Structure
    mean: np.ndarray
    covariance: np.ndarray
    others: dict[str, Any]
    log_evidence: float | None


def solve_exactly(conditioned: ConditionedModel) -> tuple[ExactSolution | None, str]:
    """The exact posterior of a conjugate model, and a sentence on how it was found or why there is none.

    Nothing is compiled for programs whose sites rule it out.
    """
    real, others = {}, {}
    for site in conditioned.latents:
        if site.discrete:
            return None, f"{site.name} is discrete"
        if site.family not in _FAMILIES or site.support not in ("real", "positive", "unit", "simplex"):
            return None, f"{site.family} {site.name} has no conjugate form"
        (real if site.support == "real" else others)[site.name] = site.shape
    block = Structure(tuple(real), tuple(real.values()))
    if block.size > _LARGEST_BLOCK or sum(int(np.prod(s)) for s in others.values()) > _LARGEST_REST:
        return None, f"{conditioned.dimension} dimensions are too many for a dense solution"
    with jax.enable_x64(True):
        data = {n: jnp.asarray(v) for n, v in conditioned.data.items()}  # a program compiled for doubles needs doubles
        solution = _solve(eqx.tree_at(lambda c: c.data, conditioned, data), block, others)
    if solution is None:
        return None, "the log density is not conjugate in the sites together"
    names = " and ".join(
        part
        for part in (
            f"an affine-Gaussian block of {', '.join(real)}" if real else "",
            ", ".join(f"{site.family} {n}" for n, site in solution.others.items()),
        )
        if part
    )
    return solution, f"{names}: checked at {_CHECKS} points"


class Exact(Engine):
    """The exact posterior of conjugate and affine-Gaussian models: evidence, marginals and independent draws.

    Args:
        num_samples: independent draws, as one chain; 4000 as other engines keep.

    >>> import numpyro
    >>> from bayeslens.core.conditioned_model import conditioned_model
    >>> def model(heads):
    ...     p = numpyro.sample("p", dist.Uniform(0.0, 1.0))
    ...     numpyro.sample("heads", dist.Binomial(10, p), obs=heads)
    >>> posterior = Exact()(conditioned_model(model, {"heads": 7}), key=jax.random.key(0))
    >>> float(posterior.marginals["p"].concentration1), round(float(posterior.log_evidence), 6)
    (8.0, -2.397895)
    """

    name: ClassVar[str] = "exact"

    num_samples: int = 4000

    def __check_init__(self):
        check_counts(self, "num_samples")

    def __call__(self, conditioned: ConditionedModel, *, key: Any) -> Posterior:
        conditioned.check_continuous("the exact engine")
        if conditioned.subsampled:
            raise InputError(f"the plates {list(conditioned.subsampled)} are subsampled: no exact posterior is known")
        conditioned.check_observations(key)
        solution, why = solve_exactly(conditioned)
        if solution is None:
            raise InputError(f"no exact posterior is known for this model: {why}; use engine nuts")
        draws, marginals = _draw(solution, key, self.num_samples)
        return posterior_of(self, conditioned, draws, key=key, log_evidence=solution.log_evidence, marginals=marginals)


def _draw(solution: ExactSolution, key: Any, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Independent draws and marginals, on the host: compiling a program for each family takes longer than both."""
    rng = host_generator(key)
    draws, marginals = {}, {}
    if solution.block.size:
        factor = np.linalg.cholesky(solution.covariance)
        vectors = solution.mean + rng.normal(size=(count, solution.block.size)) @ factor.T
        draws = solution.block.unflatten(vectors)
        mean, sd = solution.block.unflatten(solution.mean), np.sqrt(np.diag(solution.covariance))
        marginals = {n: dist.Normal(mean[n], s) for n, s in solution.block.unflatten(sd).items()}
    for name, site in solution.others.items():
        draws[name], marginals[name] = site.sample(rng, count), site.distribution()
    return {n: np.asarray(v, jnp.result_type(float))[None] for n, v in draws.items()}, marginals


class _Conjugate(NamedTuple):
    """A site whose log density is `sum(natural * statistics)`, apart from a constant."""

    family: str
    natural: np.ndarray

    def distribution(self) -> Any:
        return {"Beta": dist.Beta, "Gamma": dist.Gamma, "InverseGamma": dist.InverseGamma, "Dirichlet": dist.Dirichlet}[
            self.family
        ](*self._arguments())

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        arguments = self._arguments()
        if self.family == "Beta":
            return rng.beta(*arguments, size=(count, *arguments[0].shape))
        gamma = rng.gamma(arguments[0], size=(count, *arguments[0].shape))
        if self.family == "Dirichlet":
            return gamma / gamma.sum(-1, keepdims=True)
        return gamma / arguments[1] if self.family == "Gamma" else arguments[1] / gamma

    def log_prob(self, statistics: np.ndarray) -> np.ndarray:
        """Summed over the site, of statistics with one leading axis."""
        arguments = self._arguments()
        if self.family == "Dirichlet":
            constant = special.gammaln(arguments[0]).sum(-1) - special.gammaln(arguments[0].sum(-1))
        elif self.family == "Beta":
            constant = special.betaln(*arguments)
        else:
            constant = special.gammaln(arguments[0]) - arguments[0] * np.log(arguments[1])
        return (self.natural * statistics).reshape(len(statistics), -1).sum(1) - np.sum(constant)

    def _arguments(self) -> tuple[np.ndarray, ...]:
        if self.family == "Dirichlet":
            return (self.natural + 1,)
        first, second, *third = np.moveaxis(self.natural, -1, 0)
        if self.family == "Beta":
            return first + 1, second + 1
        return (first + 1, -second) if self.family == "Gamma" else (-first - 1, -third[0])


def _solve(conditioned: ConditionedModel, block: Structure, others: dict[str, tuple[int, ...]]) -> ExactSolution | None:
    kinds = {s.name: s.support for s in conditioned.latents}
    rng = np.random.default_rng(0)
    centre = {n: _points(kinds[n], s, rng, 1)[0] for n, s in others.items()}
    mean, covariance = np.zeros(block.size), np.zeros((block.size, block.size))
    if block.size:
        gradient, hessian = (
            np.asarray(v) for v in _expand(conditioned, block, jnp.zeros(block.size), _doubles(centre))
        )
        try:
            factor = np.linalg.cholesky(-hessian)
        except np.linalg.LinAlgError:
            return None
        inverse = np.linalg.solve(factor, np.eye(block.size))
        covariance = inverse.T @ inverse
        mean = covariance @ gradient
    found: dict[str, Any] = {}
    if others:
        size = sum(_statistics(kinds[n], centre[n]).size for n in others) + 1
        points = {n: _points(kinds[n], s, rng, size + 4) for n, s in others.items()}
        values = np.asarray(_densities(conditioned, block, jnp.tile(mean, (size + 4, 1)), _doubles(points)))
        columns = [_statistics(kinds[n], points[n]).reshape(size + 4, -1) for n in others]
        design = np.concatenate([*columns, np.ones((size + 4, 1))], 1)
        scale = np.abs(design).max(0)
        coefficients = np.linalg.lstsq(design / scale, values, rcond=None)[0] / scale
        start = 0
        for name, column in zip(others, columns, strict=True):
            part = coefficients[start : start + column.shape[1]]
            start += column.shape[1]
            found[name] = _conjugate(kinds[name], part.reshape(*_statistics(kinds[name], centre[name]).shape))
            if found[name] is None:
                return None
    # The log density minus that of the solution is the evidence, wherever it is looked at.
    spread = np.sqrt(np.diag(covariance)) if block.size else np.zeros(0)
    reals = mean + 3 * spread * rng.normal(size=(_CHECKS, block.size))
    points = {n: _points(kinds[n], s, rng, _CHECKS) for n, s in others.items()}
    joint = np.asarray(_densities(conditioned, block, jnp.asarray(reals), _doubles(points)))
    own = np.zeros(_CHECKS)
    if block.size:
        own = -0.5 * ((factor.T @ (reals - mean).T) ** 2).sum(0) + np.log(np.diag(factor)).sum()
        own -= 0.5 * block.size * np.log(2 * np.pi)
    for name, site in found.items():
        own += site.log_prob(_statistics(kinds[name], points[name]))
    evidence = joint - own
    if not np.isfinite(evidence).all() or np.ptp(evidence) > _TOLERANCE * (1 + np.abs(joint).max()):
        return None
    proper = all(s.proper for s in conditioned.latents)
    return ExactSolution(block, mean, covariance, found, float(np.median(evidence)) if proper else None)


def _points(kind: str, shape: tuple[int, ...], rng: np.random.Generator, count: int) -> np.ndarray:
    """Points well inside a support and far apart."""
    if kind == "positive":
        return np.exp(rng.normal(size=(count, *shape)))
    if kind == "unit":
        return rng.uniform(0.05, 0.95, (count, *shape))
    weights = rng.gamma(2.0, size=(count, *shape)) + 0.1
    return weights / weights.sum(-1, keepdims=True)


def _statistics(kind: str, x: np.ndarray) -> np.ndarray:
    """Sufficient statistics, on a trailing axis but for the simplex, whose own axis they take."""
    if kind == "positive":
        return np.stack([np.log(x), x, 1 / x], -1)
    return np.log(x) if kind == "simplex" else np.stack([np.log(x), np.log1p(-x)], -1)


def _conjugate(kind: str, natural: np.ndarray) -> _Conjugate | None:
    """The site of natural parameters, None where they belong to no distribution."""
    if kind == "simplex":
        return _Conjugate("Dirichlet", natural) if (natural > -1).all() else None
    first, second = natural[..., 0], natural[..., 1]
    if kind == "unit":
        return _Conjugate("Beta", natural) if (natural > -1).all() else None
    third, small = natural[..., 2], 1e-7 * (1 + np.abs(natural).max())
    if (np.abs(third) < small).all() and (first > -1).all() and (second < 0).all():
        return _Conjugate("Gamma", np.stack([first, second, np.zeros_like(third)], -1))
    if (np.abs(second) < small).all() and (first < -1).all() and (third < 0).all():
        return _Conjugate("InverseGamma", np.stack([first, np.zeros_like(second), third], -1))
    return None


def _doubles(values: dict[str, np.ndarray]) -> dict[str, Array]:
    return {n: jnp.asarray(v) for n, v in values.items()}


@eqx.filter_jit
def _expand(conditioned: ConditionedModel, block: Structure, point: Array, rest: dict) -> tuple[Array, Array]:
    def density(vector: Array) -> Array:
        return conditioned.log_density(block.unflatten(vector) | rest)

    return jax.grad(density)(point), jax.hessian(density)(point)


@eqx.filter_jit
def _densities(conditioned: ConditionedModel, block: Structure, reals: Array, rest: dict) -> Array:
    return jax.vmap(lambda vector, rest: conditioned.log_density(block.unflatten(vector) | rest))(reals, rest)
