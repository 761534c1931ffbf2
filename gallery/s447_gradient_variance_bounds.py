"""How noisy the gradients of black-box variational inference are, and how that grows with dimension.

Claim: for a target that is smooth (constant L) and grows quadratically (constant mu), the second moment of the
reparameterization gradient of the negative evidence bound F stays under 2A (F - F*) + B |grad F|^2 + C, with B = 1 and
A proportional to L^2 / mu times a factor of the dimension d: of order d for a full-rank scale, and of order sqrt(d) for
a mean-field one. For quadratic targets the second moment has a closed form, so that the bound cannot be much better.

The constants here are derived anew, for a standard normal base (kurtosis 3). Let g be the target's gradient at
z = m + C u. Its second moment is E|g|^2(1 + |u|^2) <= L^2 (d + 3) r for a full-rank scale, where r is
|m - mode|^2 + |C|^2, and E sum_i g_i^2 (1 + u_i^2) <= L^2 (1 + 3 sqrt(d)) r for a mean-field one, since
max_i u_i^2 <= sqrt(sum_i u_i^4). Exact entropy adds |grad F|^2 at most. Quadratic growth and
log c <= mu c^2 / 4 - 1/2 - log(mu / 2) / 2 give r <= (4 / mu) (F - least energy + d/2 log(4 pi / mu)).

Source: K. Kim, K. Wu, J. Oh, J. Gardner, "Practical and matching gradient variance bounds for black-box variational
Bayesian inference" (2023); the full-rank factor is by J. Domke (2019).
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import optimize

from bayeslens.gallery import Evidence

PAPER = "S447"
CLAIM = "Gradients' second moments obey the ABC bound, and grow slower with dimension for mean-field than full-rank."
NOT_CHECKED = "Nonlinear scale parameterizations such as softplus; convergence rates that follow from the bound."
DIMENSIONS = (2, 8, 32, 128, 256)
DRAWS = 4000


class Target(NamedTuple):
    """Energies (negative log densities) of rows: quadratic where there are no rows."""

    rows: Float[np.ndarray, "rows dimension"]
    curvature: Float[np.ndarray, " dimension"]

    def energy(self, z: Array) -> Array:
        """Of one point: logistic losses and a quadratic."""
        return jax.nn.softplus(self.rows @ z).sum() + 0.5 * (self.curvature * z**2).sum()

    @property
    def constants(self) -> tuple[float, float]:
        """Smoothness L and quadratic growth mu."""
        largest = np.linalg.norm(self.rows, 2) ** 2 / 4 if len(self.rows) else 0.0
        return float(largest + self.curvature.max()), float(self.curvature.min())


def targets(dimension: int, rng: np.random.Generator) -> dict[str, Target]:
    """A normal target, and logistic regression of 50 signed rows with a normal prior."""
    curvature = rng.uniform(0.5, 2.0, dimension)
    rows = rng.normal(size=(50, dimension)) / np.sqrt(dimension)
    return {
        "normal": Target(np.zeros((0, dimension)), curvature),
        "logistic": Target(rows, np.ones(dimension)),
    }


@eqx.filter_jit
def second_moment(target: Target, m: Array, c: Array, u: Array) -> dict[str, Array]:
    """Of the gradients in m and the scale's entries, each of mean-field and full-rank (lower triangular) scale.

    The scale is the diagonal c. Mean energies come along, and the squared norms of the exact gradient's estimates.
    """
    energy, slope = jax.vmap(jax.value_and_grad(target.energy))(m + c * u)
    below = jnp.tril(jnp.ones((len(m), len(m))))
    entropy = 1 / c  # gradient of the entropy, in the diagonal alone
    full = jax.lax.map(lambda p: jnp.sum((p[0][:, None] * p[1] * below - jnp.diag(entropy)) ** 2), (slope, u))
    location = (slope**2).sum(1)
    mean_slope, mean_scale = slope.mean(0), slope.T @ u / len(u) * below
    norm = (mean_slope**2).sum()
    return {
        "energy": energy.mean(),
        "mean-field": (location + ((slope * u - entropy) ** 2).sum(1)).mean(),
        "full-rank": (location + full).mean(),
        "spread full-rank": (location + full).std() / jnp.sqrt(len(u)),
        "spread mean-field": (location + ((slope * u - entropy) ** 2).sum(1)).std() / jnp.sqrt(len(u)),
        "norm mean-field": norm + ((jnp.diag(mean_scale) - entropy) ** 2).sum(),
        "norm full-rank": norm + ((mean_scale - jnp.diag(entropy)) ** 2).sum(),
    }


def closed_form(target: Target, m: np.ndarray, c: np.ndarray) -> dict[str, float]:
    """The same second moments, exactly, for a quadratic target: moments of normal numbers up to the fourth."""
    a, count = target.curvature, np.arange(len(m))
    own = a**2 * (m**2 + 3 * c**2) - 2 * a + 1 / c**2  # of (a (m + c u) u - 1 / c)^2
    others = count * a**2 * (m**2 + c**2)  # one for every entry left of the diagonal
    location = (a**2 * (m**2 + c**2)).sum()
    return {"mean-field": float(location + own.sum()), "full-rank": float(location + own.sum() + others.sum())}


def factor(family: str, dimension: int) -> float:
    """By which the dimension enters the bound."""
    return dimension + 3 if family == "full-rank" else 1 + 3 * np.sqrt(dimension)


def measure(dimension: int, control: bool) -> dict[str, float]:
    """Second moments over bounds at a few locations and scales, and their growth at the optimum's scale."""
    rng = np.random.default_rng(dimension)
    found = {"bound": 0.0, "abc": 0.0, "closed": 0.0}
    for name, target in targets(dimension, rng).items():
        smooth, growth = target.constants
        mode = optimize.minimize(target.energy, np.zeros(dimension), jac=jax.grad(target.energy), tol=1e-10)
        for distance, width in ((0.0, 1.0), (1.0, 1.0), (3.0, 0.3), (0.3, 3.0)):
            m = mode.x + distance * rng.normal(size=dimension)
            c = width * rng.uniform(0.7, 1.4, dimension)
            seen = {k: float(v) for k, v in second_moment(target, m, c, rng.normal(size=(DRAWS, dimension))).items()}
            radius = ((m - mode.x) ** 2).sum() + (c**2).sum()
            for family in ("mean-field", "full-rank"):
                # The control bounds the full-rank gradient as if it were mean-field.
                times = smooth**2 * factor("mean-field" if control else family, dimension)
                found["bound"] = max(found["bound"], seen[family] / (times * radius + seen[f"norm {family}"]))
                excess = seen["energy"] - np.log(c).sum() - 0.5 * dimension * np.log(2 * np.pi * np.e) - mode.fun
                over = 4 * times / growth * (excess + 0.5 * dimension * np.log(4 * np.pi / growth))
                found["abc"] = max(found["abc"], seen[family] / (over + seen[f"norm {family}"]))
                if name == "normal":
                    error = abs(seen[family] - closed_form(target, m, c)[family]) / seen[f"spread {family}"]
                    found["closed"] = max(found["closed"], error)
    flat = Target(np.zeros((0, dimension)), np.ones(dimension))
    exact = closed_form(flat, np.ones(dimension), np.ones(dimension))
    # As a multiple of the squared distance, which grows with the dimension for both.
    return found | {family: value / (2 * dimension) for family, value in exact.items()}


def check(*, control: bool = False) -> Evidence:
    """Second moments against bounds and closed forms in 2 to 256 dimensions."""
    with jax.enable_x64(True):
        rows = [measure(dimension, control) for dimension in DIMENSIONS]
    slopes = {
        family: float(np.polyfit(np.log(DIMENSIONS), np.log([row[family] for row in rows]), 1)[0])
        for family in ("mean-field", "full-rank")
    }
    numbers = {
        "largest share of the bound": max(row["bound"] for row in rows),
        "largest share of the ABC bound": max(row["abc"] for row in rows),
        "largest error of closed forms, in standard errors": max(row["closed"] for row in rows),
        "growth exponent, mean-field": slopes["mean-field"],
        "growth exponent, full-rank": slopes["full-rank"],
    }
    # 40 comparisons with heavy-tailed averages of 4,000 draws: six standard errors, false alarms below 1e-4.
    holds = (
        numbers["largest share of the bound"] <= 1
        and numbers["largest share of the ABC bound"] <= 1
        and numbers["largest error of closed forms, in standard errors"] < 6
        and slopes["mean-field"] <= 0.5 < slopes["full-rank"]
    )
    shown = (
        f"second moments reach {numbers['largest share of the bound']:.2f} of the bound (at most 1) and "
        f"{numbers['largest share of the ABC bound']:.2f} of the ABC bound in 2 to 256 dimensions; closed forms are "
        f"met within {numbers['largest error of closed forms, in standard errors']:.1f} standard errors; over squared "
        f"distance they grow like d^{slopes['mean-field']:.2f} for mean-field (bound 0.5) and "
        f"d^{slopes['full-rank']:.2f} for full-rank (bound 1)"
    )
    return Evidence(bool(holds), shown, numbers)
