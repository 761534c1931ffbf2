"""Models of posteriordb as PyMC programs, with the names of parameters and data of their Stan definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
from posteriordb_models import ODE_STEPS


def _positive(name: str, *shape: int) -> Any:
    return pm.HalfFlat(name, shape=shape or None)


def _regression(name: str, y: Any, *columns: Any, cauchy: bool = False) -> None:
    beta = pm.Flat("beta", shape=len(columns) + 1)
    sigma = pm.HalfCauchy("sigma", 2.5) if cauchy else _positive("sigma")
    pm.Normal(name, beta[0] + np.stack(columns, axis=1) @ beta[1:], sigma, observed=y)


def kidscore_momhs(kid_score, mom_hs):
    _regression("kid_score", kid_score, mom_hs, cauchy=True)


def kidscore_momiq(kid_score, mom_iq):
    _regression("kid_score", kid_score, mom_iq, cauchy=True)


def kidscore_momhsiq(kid_score, mom_hs, mom_iq):
    _regression("kid_score", kid_score, mom_hs, mom_iq, cauchy=True)


def kidscore_interaction(kid_score, mom_hs, mom_iq):
    _regression("kid_score", kid_score, mom_hs, mom_iq, mom_hs * mom_iq, cauchy=True)


def earn_height(earn, height):
    _regression("earn", earn, height)


def logearn_height(earn, height):
    _regression("log_earn", np.log(earn), height)


def log10earn_height(earn, height):
    _regression("log10_earn", np.log10(earn), height)


def logearn_interaction(earn, height, male):
    _regression("log_earn", np.log(earn), height, male, height * male)


def logearn_logheight_male(earn, height, male):
    _regression("log_earn", np.log(earn), np.log(height), male)


def logmesquite_logvolume(weight, diam1, diam2, canopy_height):
    _regression("log_weight", np.log(weight), np.log(diam1 * diam2 * canopy_height))


def mesquite(weight, diam1, diam2, canopy_height, total_height, density, group):
    _regression("w", weight, diam1, diam2, canopy_height, total_height, density, group)


def nes(partyid7, real_ideo, race_adj, educ1, gender, income, age_discrete):
    ages = [np.where(age_discrete == level, 1.0, 0.0) for level in (2, 3, 4)]
    _regression("party", partyid7, real_ideo, race_adj, *ages, educ1, gender, income)


def blr(X, y):
    beta = pm.Normal("beta", 0.0, 10.0, shape=X.shape[1])
    sigma = pm.HalfNormal("sigma", 10.0)
    pm.Normal("y", X @ beta, sigma, observed=y)


def kilpisjarvi(x, y, pmualpha, psalpha, pmubeta, psbeta):
    alpha = pm.Normal("alpha", pmualpha, psalpha)
    beta = pm.Normal("beta", pmubeta, psbeta)
    pm.Normal("y", alpha + beta * x, _positive("sigma"), observed=y)


def arK(K, y):
    alpha = pm.Normal("alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=K)
    sigma = pm.HalfCauchy("sigma", 2.5)
    lagged = np.stack([y[K - lag : len(y) - lag] for lag in range(1, K + 1)], axis=1)
    pm.Normal("y", alpha + lagged @ beta, sigma, observed=y[K:])


def eight_schools_noncentered(y, sigma):
    theta_trans = pm.Normal("theta_trans", 0.0, 1.0, shape=len(y))
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0)
    pm.Normal("y", pm.Deterministic("theta", theta_trans * tau + mu), sigma, observed=y)


def gp_regr(x, y):
    rho = pm.Gamma("rho", 25.0, 4.0)
    alpha = pm.HalfNormal("alpha", 2.0)
    sigma = pm.HalfNormal("sigma", 1.0)
    squared = (x[:, None] - x) ** 2
    covariance = alpha**2 * pt.exp(-0.5 * squared / rho**2) + sigma * pt.eye(len(x))
    pm.MvNormal("y", np.zeros(len(x)), cov=covariance, observed=y)


def low_dim_gauss_mix(y):
    mu = _ordered("mu", (0.0, 0.0), 2.0)
    sigma = pm.HalfNormal("sigma", 2.0, shape=2)
    theta = pm.Beta("theta", 5.0, 5.0)
    pm.NormalMixture("y", pt.stack([theta, 1 - theta]), mu, sigma, observed=y)


def _ordered(name: str, means: tuple, sd: float, positive: bool = False) -> Any:
    """Two increasing numbers with Normal priors."""
    order = pm.distributions.transforms.ordered
    start = np.array([0.5, 1.5])
    if not positive:
        return pm.Normal(name, np.array(means), sd, shape=2, transform=order, initval=start)
    logs = pm.Flat(f"log_{name}", shape=2, transform=order, initval=np.log(start))
    value = pm.Deterministic(name, pt.exp(logs))
    pm.Potential(f"{name}_prior", (pm.logp(pm.Normal.dist(np.array(means), sd), value) + logs).sum())
    return value


def _hidden_markov(emission: Any, *priors: Any) -> None:
    rows = [pm.Dirichlet(f"theta{i}", np.asarray(prior)) for i, prior in enumerate(priors, 1)]
    transition = pt.log(pt.stack(rows))

    def step(now: Any, gamma: Any, transition: Any) -> Any:
        return pt.logaddexp(gamma[0] + transition[0], gamma[1] + transition[1]) + now

    gammas = pytensor.scan(
        step, sequences=[emission[1:]], outputs_info=[emission[0]], non_sequences=[transition], return_updates=False
    )
    pm.Potential("data", pt.logsumexp(gammas[-1]))


def hmm_example(y):
    mu = _ordered("mu", (3.0, 10.0), 1.0, positive=True)
    _hidden_markov(pm.logp(pm.Normal.dist(mu, 1.0), y[:, None]), np.ones(2), np.ones(2))


def hmm_drive_0(u, v, alpha):
    phi = _ordered("phi", (0.0, 3.0), 1.0, positive=True)
    rate = _ordered("lambda", (0.0, 3.0), 1.0, positive=True)
    emission = pt.log(phi) - phi * u[:, None] + pt.log(rate) - rate * v[:, None]
    _hidden_markov(emission, *alpha)


def hmm_drive_1(u, v, alpha, tau, rho):
    phi, mean = _ordered("phi", (0.0, 3.0), 1.0), _ordered("lambda", (0.0, 3.0), 1.0)
    emission = pm.logp(pm.Normal.dist(phi, tau), u[:, None]) + pm.logp(pm.Normal.dist(mean, rho), v[:, None])
    _hidden_markov(emission, *alpha)


def lotka_volterra(ts, y_init, y):
    means, sds = np.array([1.0, 0.05, 1.0, 0.05]), np.array([0.5, 0.05, 0.5, 0.05])
    theta = pm.TruncatedNormal("theta", means, sds, lower=0.0, shape=4, initval=means)
    z_init = pm.LogNormal("z_init", np.log(10.0), 1.0, shape=2)
    sigma = pm.LogNormal("sigma", -1.0, 1.0, shape=2)

    def slope(w: Any, theta: Any) -> Any:
        z = pt.exp(w)
        return pt.stack([theta[0] - theta[1] * z[1], theta[3] * z[0] - theta[2]])

    def advance(duration: Any, w: Any, theta: Any) -> Any:
        h = duration / ODE_STEPS
        for _ in range(ODE_STEPS):
            k1 = slope(w, theta)
            k2 = slope(w + 0.5 * h * k1, theta)
            k3 = slope(w + 0.5 * h * k2, theta)
            k4 = slope(w + h * k3, theta)
            w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return w

    logs = pytensor.scan(
        advance, sequences=[pt.as_tensor(np.diff(ts, prepend=0.0))], outputs_info=[pt.log(z_init)],
        non_sequences=[theta], return_updates=False,
    )  # fmt: skip
    pm.LogNormal("y_init", pt.log(z_init), sigma, observed=y_init)
    pm.LogNormal("y", logs, sigma, observed=y)


MODELS: dict[str, Callable] = {
    model.__name__: model
    for model in (
        arK, blr, earn_height, eight_schools_noncentered, gp_regr, hmm_drive_0, hmm_drive_1, hmm_example,
        kidscore_interaction, kidscore_momhs, kidscore_momhsiq, kidscore_momiq, kilpisjarvi, log10earn_height,
        logearn_height, logearn_interaction, logearn_logheight_male, logmesquite_logvolume, lotka_volterra,
        low_dim_gauss_mix, mesquite, nes,
    )
}  # fmt: skip
