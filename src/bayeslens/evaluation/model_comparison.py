"""Several models of the same data, compared by what they predict: PSIS-LOO and stacking weights."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.core.posterior import Posterior

if TYPE_CHECKING:
    import pandas as pd

_K_HAT_LIMIT = 0.7


def compare(posteriors: dict[str, Posterior]) -> pd.DataFrame:
    """Posteriors of several models of the same data by their expected log predictive density, best first.

    Args:
        posteriors: name -> posterior. Each must know its model and data, as those of `infer` do.

    Returns:
        A row per model: `elpd` (expected log pointwise predictive density by Pareto smoothed leave-one-out, in nats;
        higher is better) and its standard error `se`, the effective number of parameters `p_loo`, `elpd_difference`
        to the best and its `difference_se`, the stacking `weight`, the largest `k_hat`, and the `warning` where
        observations have a k-hat above 0.7, so that leaving them out cannot be imitated.

    Raises:
        InputError: fewer than two posteriors, other observations, or no likelihood by observation.

    Sources: A. Vehtari, A. Gelman, J. Gabry, "Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC" (2017); Y. Yao, A. Vehtari, D. Simpson, A. Gelman, "Using stacking to average Bayesian
    predictive distributions" (2018).
    """
    import arviz as az

    if len(posteriors) < 2:
        raise InputError(f"compare needs two posteriors or more, got {len(posteriors)}")
    runs, sizes = {}, {}
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Posterior):
            raise InputError(f"{name!r} is no posterior: give what infer returned")
        run = posterior.to_arviz(log_likelihood=True)
        terms = [np.asarray(v, np.float64) for v in run.log_likelihood.data_vars.values()]
        together = np.concatenate([t.reshape(*t.shape[:2], -1) for t in terms], -1)
        sizes[name] = together.shape[-1]
        draws = {str(n): np.asarray(v) for n, v in run.posterior.data_vars.items()}
        runs[name] = az.from_dict(posterior=draws, log_likelihood={"observations": together})
    if len(set(sizes.values())) > 1:
        raise InputError(f"the models have different numbers of observations: {sizes}; compare them on the same data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = az.compare(runs, ic="loo", method="stacking", scale="log")
        k_hats = {name: float(az.loo(run, pointwise=True).pareto_k.max()) for name, run in runs.items()}
    table = found.rename(columns={"elpd_loo": "elpd", "elpd_diff": "elpd_difference", "dse": "difference_se"})[
        ["elpd", "se", "p_loo", "elpd_difference", "difference_se", "weight"]
    ].astype(float)
    table["k_hat"] = [k_hats[name] for name in table.index]
    table["warning"] = [
        f"k-hat up to {k:.2f}: some observations decide too much; refit without them" if k > _K_HAT_LIMIT else ""
        for k in table["k_hat"]
    ]
    table.index.name = "model"
    return table
