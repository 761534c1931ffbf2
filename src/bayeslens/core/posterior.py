"""What is believed after data: draws, weighted particles or densities of named sites, and how they were made."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayeslens.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from numpyro.distributions import Distribution


class Posterior(eqx.Module):
    """What is believed about every site: draws, or a density from which draws are made on demand.

    Attributes:
        draws: site -> array of shape (chains, draws, ...). Particles are one chain with `log_weights`. Empty where
            there is a density and nothing was drawn yet.
        log_weights: unnormalized log weights of particles, shape (chains, draws); None when all count alike.
        log_evidence: log marginal likelihood of the data, where the engine has it.
        log_evidence_error: its standard error, in nats, where it is an estimate.
        log_evidence_bound: a lower bound on it, where the engine maximizes one.
        k_hat: Pareto k-hat of an approximation's draws as proposals for the exact posterior: above 0.7 they miss it.
        engine: what made it, such as `"nuts"`.
        settings: the engine's settings; with random engines the data of their `key`, a list of integers.
        statistics: sampler statistics such as `diverging`, each of shape (chains, draws).
        warnings: sentences on why it should not be trusted, and what to try; empty when nothing was found.
        versions: of the libraries that made it.
        model: the NumPyro program, for `predict`; it is not stored in files: `load(path, model=...)`.
        density: site -> distribution, independent of each other, where the posterior has a tractable density: see
            `from_density`.
        data: the model's arguments by name, as far as they are arrays, numbers and text.
        plan: what `infer` did with each site and why.
        marginals: site -> exact marginal distribution, with the site's shape, where an exact engine knows it. Sites
            may depend on each other: the draws are of all together.

    >>> p = Posterior({"mu": np.arange(6.0).reshape(2, 3)})
    >>> p["mu"].shape, p.names
    ((2, 3), ('mu',))
    """

    draws: dict[str, Any]
    log_weights: Any = None
    log_evidence: Any = None
    engine: str = ""
    settings: dict[str, Any] = eqx.field(default_factory=dict)
    statistics: dict[str, Any] = eqx.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = eqx.field(default_factory=dict)
    model: Callable | None = None
    density: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    plan: Any = None
    marginals: dict[str, Any] | None = None
    log_evidence_error: Any = None
    log_evidence_bound: Any = None
    k_hat: Any = None

    from_caller: ClassVar[tuple[str, ...]] = ("model",)

    def __check_init__(self):
        if not self.draws and not self.density:
            raise InputError("a posterior needs draws or a density of at least one site")
        for name, distribution in (self.density or {}).items():
            if distribution.batch_shape:
                raise InputError(
                    f"the density of {name!r} has batch shape {distribution.batch_shape}: one distribution of the "
                    f"whole site is needed, `.to_event({len(distribution.batch_shape)})` makes it one"
                )
        if not self.draws:
            return
        leading = {np.shape(v)[:2] for v in self.draws.values()}
        if len(leading) != 1 or len(next(iter(leading))) != 2:
            raise InputError(f"all sites need draws of one shape (chains, draws, ...), got {sorted(leading)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Sites, in alphabetical order."""
        return tuple(sorted(self.draws or self.density))

    def __getitem__(self, site: str) -> Float[Array, "chains draws ..."]:
        """Draws of one site.

        Raises:
            InputError: no such site, or a density of which nothing was drawn.
        """
        if not self.draws:
            raise InputError("this posterior is a density without draws: make some by `posterior.drawn(key)`")
        if site not in self.draws:
            raise InputError(f"the posterior has no site {site!r}; it has {', '.join(self.names)}")
        return self.draws[site]

    @property
    def flat(self) -> Float[Array, "draws dimensions"]:
        """All sites side by side, one row per draw over all chains."""
        parts = [jnp.reshape(jnp.asarray(self[n]), (-1, max(1, _size(self[n])))) for n in self.names]
        return jnp.concatenate(parts, axis=1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """New draws: site -> array of shape (*sample_shape, ...).

        They are of the density where there is one, otherwise taken with replacement from the draws, by their weights.
        """
        if self.density:
            keys = jax.random.split(key, len(self.density))
            return {n: self.density[n].sample(k, sample_shape) for n, k in zip(self.names, keys, strict=True)}
        chains, draws = np.shape(self.draws[self.names[0]])[:2]
        weights = jnp.zeros(chains * draws) if self.log_weights is None else jnp.ravel(self.log_weights)
        index = jax.random.categorical(key, weights, shape=sample_shape)
        return {n: jnp.asarray(v).reshape(-1, *np.shape(v)[2:])[index] for n, v in self.draws.items()}

    @classmethod
    def from_density(
        cls,
        density: dict[str, Distribution],
        *,
        log_evidence: Any = None,
        engine: str = "exact",
        model: Callable | None = None,
    ) -> Posterior:
        """A posterior that is known as a density, such as a conjugate one.

        Args:
            density: site -> NumPyro distribution without batch shape. Sites are independent: what depends on each
                other is one site.
            log_evidence: log marginal likelihood of the data.
            engine: what found it.
            model: the NumPyro program, for `predict`.

        Raises:
            InputError: no site, or a distribution with a batch shape.

        >>> import numpyro.distributions as dist
        >>> p = Posterior.from_density({"rate": dist.Gamma(2.0, 1.0), "mu": dist.Normal(0.0, 1.0)})
        >>> round(float(p.log_prob({"rate": 1.0, "mu": 0.0})), 4)
        -1.9189
        >>> p.sample(jax.random.key(0), (5,))["mu"].shape, p.drawn(jax.random.key(0), 100)["mu"].shape
        ((5,), (1, 100))
        """
        return cls({}, None, log_evidence, engine, versions=current_versions(), model=model, density=dict(density))

    def log_prob(self, values: dict[str, Any]) -> Float[Array, "..."]:
        """Log density of values of all sites, each of shape (*batch, ...); the result has shape `batch`.

        Raises:
            InputError: a posterior of draws alone has no density; sites that lack a value or do not exist.
        """
        self._check_density()
        if set(values) != set(self.density):
            raise InputError(f"a value of each of the sites {', '.join(self.names)} is needed, got {sorted(values)}")
        return sum(self.density[n].log_prob(jnp.asarray(values[n])) for n in self.names)

    def drawn(self, key: Any, num_draws: int = 4000) -> Posterior:
        """The same posterior with independent draws of its density, as one chain.

        Args:
            key: a `jax.random.key`.
            num_draws: by default as many as `infer` keeps.

        Raises:
            InputError: there is no density to draw from.
        """
        self._check_density()
        return dataclasses.replace(self, draws=self.sample(key, (1, num_draws)))

    def _check_density(self) -> None:
        if not self.density:
            raise InputError("this posterior has draws and no density: make one with `Posterior.from_density`")

    def doubted(self, warnings: tuple[str, ...]) -> Posterior:
        """The same with more sentences on why it should not be trusted."""
        return dataclasses.replace(self, warnings=(*self.warnings, *warnings))

    def push(self, function: Callable[..., Any], *others: Any, name: str = "value", key: Any = None) -> Posterior:
        """The posterior of a function of the sites, draw by draw.

        How the draws were made is kept. Densities are not, and neither is the model, whose sites are not these.

        Args:
            function: of one draw, a dict by site, and of one value of each of `others`; it returns an array, or a dict
                of arrays.
            others: further arguments of the function: posteriors that are independent of this one, of which it gets one
                draw each, as a dict by site; anything else is given as it is.
            name: site of the result when it is an array.
            key: a `jax.random.key`, which other posteriors need: their draws are taken with replacement.

        Raises:
            InputError: other posteriors without a key.

        >>> doubled = Posterior({"mu": np.ones((2, 3))}).push(lambda s: 2 * s["mu"], name="twice")
        >>> doubled["twice"].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
        >>> speed, time = Posterior({"v": np.full((1, 3), 4.0)}), Posterior({"t": np.full((1, 5), 2.0)})
        >>> speed.push(lambda s, t, unit: s["v"] * t["t"] * unit, time, 0.5, key=jax.random.key(0))["value"].tolist()
        [[4.0, 4.0, 4.0]]
        """
        if key is None and any(isinstance(o, Posterior) for o in others):
            raise InputError("other posteriors are drawn from: give a key, such as jax.random.key(0)")
        own = {n: jnp.asarray(self[n]) for n in self.names}
        shape = next(iter(own.values())).shape[:2]
        drawn = {
            i: other.sample(jax.random.fold_in(key, i), shape)
            for i, other in enumerate(others)
            if isinstance(other, Posterior)
        }

        def apply(sites: dict[str, Array], drawn: dict[int, dict[str, Array]]) -> Any:
            return function(sites, *(drawn.get(i, other) for i, other in enumerate(others)))

        pushed = jax.vmap(jax.vmap(apply))(own, drawn)
        pushed = pushed if isinstance(pushed, dict) else {name: pushed}
        return dataclasses.replace(self, draws=pushed, model=None, density=None, marginals=None)

    def predict(self, new_data: dict[str, Any], *, key: Any) -> dict[str, Float[Array, "draws ..."]]:
        """Posterior predictive draws of the model's sites for new arguments, over all chains.

        A density without draws gives as many as `drawn` makes.

        Args:
            new_data: the model's arguments by name; give None for what is to be predicted.
            key: a `jax.random.key`.

        Raises:
            InputError: the posterior does not know its model.
        """
        if self.model is None:
            raise InputError("this posterior does not know its model: load it with load(path, model=...)")
        from numpyro.infer import Predictive

        if not self.draws:
            return self.drawn(jax.random.fold_in(key, 0)).predict(new_data, key=key)
        count = int(np.prod(np.shape(self.draws[self.names[0]])[:2]))
        flat = self.sample(key, (count,)) if self.log_weights is not None else {
            n: jnp.asarray(v).reshape(-1, *np.shape(v)[2:]) for n, v in self.draws.items()
        }  # fmt: skip
        return Predictive(self.model, flat)(jax.random.fold_in(key, 1), **new_data)

    def summary(self) -> pd.DataFrame:
        """Mean, standard deviation, 5%, 50% and 95% quantiles, bulk and tail effective sample sizes and R-hat.

        One row per scalar, named as in `beta[0]`. Means and standard deviations are exact where an engine knows the
        marginals. Of weighted particles the effective sample size is that of their weights, and there is no R-hat.
        Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021.
        """
        import pandas as pd

        names = [n for site in self.names for n in _scalars(site, np.shape(self[site])[2:])]
        values = np.concatenate([np.reshape(self.draws[n], (-1, max(1, _size(self[n])))) for n in self.names], 1)
        values = values.astype(np.float64)
        weights = np.full(len(values), 1 / len(values))
        if self.log_weights is not None:
            weights = np.exp(np.ravel(self.log_weights) - np.max(self.log_weights))
            weights = weights / weights.sum()
        mean = weights @ values
        spread = np.sqrt(weights @ (values - mean) ** 2 / max(1 - (weights**2).sum(), 1e-12))
        table = pd.DataFrame({"mean": mean, "sd": spread}, index=names)
        if self.log_weights is None:
            table[["5%", "50%", "95%"]] = np.quantile(values, [0.05, 0.5, 0.95], axis=0).T
            import arviz as az

            found = az.summary(self.to_arviz(), kind="diagnostics", round_to="none")
            order = {str(i).replace(" ", ""): i for i in found.index}
            for column in ("ess_bulk", "ess_tail", "r_hat"):
                table[column] = [found.loc[order[n.replace(" ", "")], column] for n in names]
        else:
            table[["5%", "50%", "95%"]] = np.stack([_weighted_quantiles(v, weights) for v in values.T])
            table["ess_bulk"] = table["ess_tail"] = 1 / (weights**2).sum()
            table["r_hat"] = np.nan
        for site, marginal in (self.marginals or {}).items():
            rows = _scalars(site, np.shape(self[site])[2:])
            try:
                exact = [np.asarray(v, np.float64) for v in (marginal.mean, marginal.variance)]
            except (NotImplementedError, AttributeError):
                continue  # a categorical site has no mean
            if exact[0].size == len(rows):
                table.loc[rows, "mean"], table.loc[rows, "sd"] = exact[0].ravel(), np.sqrt(exact[1].ravel())
        return table

    def _equally_weighted(self) -> Posterior:
        """Itself, or particles resampled to equal weights."""
        if self.log_weights is None:
            return self
        shape = np.shape(self[self.names[0]])[:2]
        # Statistics belong to the draws as they were.
        return dataclasses.replace(self, draws=self.sample(jax.random.key(0), shape), log_weights=None, statistics={})

    def log_likelihood(self) -> dict[str, Float[np.ndarray, "chains draws ..."]]:
        """Log likelihood of every observation under every draw, by observed site; factors are left out.

        Raises:
            InputError: the posterior does not know its model and data, or the model has factors alone.
        """
        if self.model is None or self.data is None:
            raise InputError(
                "this posterior does not know its model and data: make it with infer, or load(path, model)"
            )
        from numpyro import infer

        draws = {n: jnp.asarray(self[n]) for n in self.names}
        found = infer.log_likelihood(self.model, draws, batch_ndims=2, parallel=True, **self.data)
        shapes = {n: np.shape(v) for n, v in found.items()}
        found = {n: np.asarray(v) for n, v in found.items() if n in self._observations()}
        if not found:
            raise InputError(
                f"the model has no observation with a likelihood of its own: its sites are {sorted(shapes)}"
            )
        return found

    def _observations(self) -> dict[str, np.ndarray]:
        """Observed values by site, factors left out."""
        from numpyro import handlers

        values = {n: jnp.asarray(self[n])[0, 0] for n in self.names}
        program = handlers.seed(handlers.substitute(self.model, data=values), jax.random.key(0))
        trace = handlers.trace(program).get_trace(**self.data)
        samples = {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
        return {n: np.asarray(s["value"]) for n, s in samples.items() if type(s["fn"]).__name__ != "Unit"}

    def to_arviz(self, log_likelihood: bool = False) -> Any:
        """An `arviz.InferenceData` with groups posterior and sample_stats; weighted particles are resampled first.

        Args:
            log_likelihood: add the groups log_likelihood and observed_data, which need the model and its data.
        """
        import arviz as az

        equal = self._equally_weighted()
        if equal is not self:
            import warnings

            warnings.warn("weighted particles were resampled to equal weights", stacklevel=2)
        statistics = {n: np.asarray(v) for n, v in equal.statistics.items()}
        more = {}
        if log_likelihood:
            more = {"log_likelihood": equal.log_likelihood(), "observed_data": equal._observations()}
        return az.from_dict(
            posterior={n: np.asarray(equal[n]) for n in self.names},
            sample_stats=statistics or None,
            posterior_attrs={"engine": self.engine, **{f"version_{k}": v for k, v in self.versions.items()}},
            **more,
        )

    @classmethod
    def from_arviz(cls, data: Any, model: Callable | None = None) -> Posterior:
        """A posterior from the `posterior` group of an `arviz.InferenceData` made elsewhere.

        Raises:
            InputError: there is no such group.
        """
        if not hasattr(data, "posterior"):
            raise InputError("the inference data has no group 'posterior'")
        draws = {str(n): np.asarray(v) for n, v in data.posterior.data_vars.items()}
        return cls(draws, engine=str(data.posterior.attrs.get("inference_library", "arviz")), model=model)


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    return values[order][np.minimum(np.searchsorted(np.cumsum(weights[order]), [0.05, 0.5, 0.95]), len(values) - 1)]


def _size(array: Any) -> int:
    return int(np.prod(np.shape(array)[2:]))


def _scalars(site: str, shape: tuple[int, ...]) -> list[str]:
    return [site] if not shape else [f"{site}[{', '.join(map(str, i))}]" for i in np.ndindex(*shape)]


def current_versions() -> dict[str, str]:
    """Versions of the libraries that a posterior depends on.

    >>> sorted(current_versions())
    ['bayeslens', 'jax', 'numpyro']
    """
    from bayeslens import __version__

    return {"bayeslens": __version__} | {n: importlib.metadata.version(n) for n in ("jax", "numpyro")}
