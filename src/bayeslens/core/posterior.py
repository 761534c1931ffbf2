"""What is believed after data: draws or weighted particles over a model's named sites, and how they were made."""

from __future__ import annotations

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


class Posterior(eqx.Module):
    """Draws from a posterior, by site.

    Attributes:
        draws: site -> array of shape (chains, draws, ...). Particles are one chain with `log_weights`.
        log_weights: unnormalized log weights of particles, shape (chains, draws); None when all count alike.
        log_evidence: log marginal likelihood of the data, where the engine has it.
        engine: what made it, such as `"nuts"`.
        settings: the engine's settings.
        statistics: sampler statistics such as `diverging`, each of shape (chains, draws).
        warnings: sentences on why it should not be trusted, and what to try; empty when nothing was found.
        versions: of the libraries that made it.
        model: the NumPyro program, for `predict`; it is not stored in files: `load(path, model=...)`.

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

    from_caller: ClassVar[tuple[str, ...]] = ("model",)

    def __check_init__(self):
        if not self.draws:
            raise InputError("a posterior needs draws of at least one site")
        leading = {np.shape(v)[:2] for v in self.draws.values()}
        if len(leading) != 1 or len(next(iter(leading))) != 2:
            raise InputError(f"all sites need draws of one shape (chains, draws, ...), got {sorted(leading)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Sites, in alphabetical order."""
        return tuple(sorted(self.draws))

    def __getitem__(self, site: str) -> Float[Array, "chains draws ..."]:
        """Draws of one site.

        Raises:
            InputError: no such site.
        """
        if site not in self.draws:
            raise InputError(f"the posterior has no site {site!r}; it has {', '.join(self.names)}")
        return self.draws[site]

    @property
    def flat(self) -> Float[Array, "draws dimensions"]:
        """All sites side by side, one row per draw over all chains."""
        parts = [jnp.reshape(jnp.asarray(self.draws[n]), (-1, max(1, _size(self.draws[n])))) for n in self.names]
        return jnp.concatenate(parts, axis=1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """Draws with replacement, by their weights: site -> array of shape (*sample_shape, ...)."""
        chains, draws = np.shape(self.draws[self.names[0]])[:2]
        weights = jnp.zeros(chains * draws) if self.log_weights is None else jnp.ravel(self.log_weights)
        index = jax.random.categorical(key, weights, shape=sample_shape)
        return {n: jnp.asarray(v).reshape(-1, *np.shape(v)[2:])[index] for n, v in self.draws.items()}

    def push(self, function: Callable[[dict[str, Array]], Any], name: str = "value") -> Posterior:
        """The posterior of a function of the sites.

        Args:
            function: of one draw, a dict by site; it returns an array, or a dict of arrays.
            name: site of the result when it is an array.

        >>> doubled = Posterior({"mu": np.ones((2, 3))}).push(lambda s: 2 * s["mu"], "twice")
        >>> doubled["twice"].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
        """
        pushed = jax.vmap(jax.vmap(function))({n: jnp.asarray(v) for n, v in self.draws.items()})
        pushed = pushed if isinstance(pushed, dict) else {name: pushed}
        return Posterior(pushed, self.log_weights, self.log_evidence, self.engine, self.settings, {}, self.warnings)

    def predict(self, new_data: dict[str, Any], *, key: Any) -> dict[str, Float[Array, "draws ..."]]:
        """Posterior predictive draws of the model's sites for new arguments, over all chains.

        Args:
            new_data: the model's arguments by name; give None for what is to be predicted.
            key: a `jax.random.key`.

        Raises:
            InputError: the posterior does not know its model.
        """
        if self.model is None:
            raise InputError("this posterior does not know its model: load it with load(path, model=...)")
        from numpyro.infer import Predictive

        count = int(np.prod(np.shape(self.draws[self.names[0]])[:2]))
        flat = self.sample(key, (count,)) if self.log_weights is not None else {
            n: jnp.asarray(v).reshape(-1, *np.shape(v)[2:]) for n, v in self.draws.items()
        }  # fmt: skip
        return Predictive(self.model, flat)(jax.random.fold_in(key, 1), **new_data)

    def summary(self) -> pd.DataFrame:
        """Mean, standard deviation, 5%, 50% and 95% quantiles, bulk and tail effective sample sizes and R-hat.

        One row per scalar, named as in `beta[0]`. Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021.
        """
        import arviz as az
        import pandas as pd

        data = self.to_arviz()
        found = az.summary(data, kind="diagnostics", round_to="none")
        values = np.asarray(self._equally_weighted().flat)
        names = [n for site in self.names for n in _scalars(site, np.shape(self.draws[site])[2:])]
        table = pd.DataFrame({"mean": values.mean(0), "sd": values.std(0, ddof=1)}, index=names)
        table[["5%", "50%", "95%"]] = np.quantile(values, [0.05, 0.5, 0.95], axis=0).T
        order = {str(i).replace(" ", ""): i for i in found.index}
        for column in ("ess_bulk", "ess_tail", "r_hat"):
            table[column] = [found.loc[order[n.replace(" ", "")], column] for n in names]
        return table

    def _equally_weighted(self) -> Posterior:
        """Itself, or particles resampled to equal weights."""
        if self.log_weights is None:
            return self
        shape = np.shape(self.draws[self.names[0]])[:2]
        return Posterior(self.sample(jax.random.key(0), shape), None, self.log_evidence, self.engine, self.settings)

    def to_arviz(self) -> Any:
        """An `arviz.InferenceData` with groups posterior and sample_stats; weighted particles are resampled first."""
        import arviz as az

        equal = self._equally_weighted()
        if equal is not self:
            import warnings

            warnings.warn("weighted particles were resampled to equal weights", stacklevel=2)
        statistics = {n: np.asarray(v) for n, v in self.statistics.items()}
        return az.from_dict(
            posterior={n: np.asarray(equal.draws[n]) for n in self.names},
            sample_stats=statistics or None,
            posterior_attrs={"engine": self.engine, **{f"version_{k}": v for k, v in self.versions.items()}},
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
