"""Boosting every parameter of a distribution needs the natural gradient.

Duan, Avati, Ding, Thai, Basu, Ng and Schuler (2020), "NGBoost: Natural Gradient Boosting for Probabilistic Prediction",
treat the parameters of a predictive distribution as targets of gradient boosting, and correct the gradient by the
inverse Fisher information. The result should beat boosting the mean with a constant variance where the noise varies,
and boosting along the ordinary gradient everywhere.
"""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist

from bayeslens.core.quantiles import log_prob, quantile
from bayeslens.gallery import Evidence
from bayeslens.learners import NGBoost

PAPER = "S290"
CLAIM = "Natural gradient boosting beats constant-variance boosting and the ordinary gradient by held-out log score."
NOT_CHECKED = "The paper's own UCI tables and its comparison with deep ensembles and Gaussian processes."


def tables() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Simulated noise that varies 20-fold, and the diabetes table of scikit-learn."""
    from sklearn.datasets import load_diabetes

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 4))
    y = 10 * (x[:, 0] + np.exp(0.7 * x[:, 1]) * rng.normal(size=3000))
    order = np.random.default_rng(1).permutation(442)
    diabetes = load_diabetes(return_X_y=True)
    return {"heteroscedastic": (x, y), "diabetes": (diabetes[0][order], diabetes[1][order])}


def constant_variance(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> dist.Distribution:
    """LightGBM for the mean, with one Normal for its cross-validated errors."""
    from lightgbm import LGBMRegressor
    from sklearn.model_selection import cross_val_predict

    model = LGBMRegressor(n_estimators=100, learning_rate=0.05, num_leaves=8, n_jobs=1, verbose=-1)
    spread = np.std(y - cross_val_predict(model, x, y, cv=5))
    mean = model.fit(x, y).predict(new)
    return dist.Normal(mean, np.full(len(new), spread))


def check(*, control: bool = False) -> Evidence:
    """Compare held-out log scores; the control boosts along the ordinary gradient instead."""
    numbers: dict[str, float] = {}
    holds, shown = True, []
    for name, (x, y) in tables().items():
        cut = 2 * len(y) // 3
        x, y, new, truth = x[:cut], y[:cut], x[cut:], y[cut:]
        ours = NGBoost(natural_gradient=not control).fit(x, y, key=jax.random.key(0))(new)
        ordinary = NGBoost(natural_gradient=False).fit(x, y, key=jax.random.key(0))(new)
        score = float(log_prob(ours, truth).mean())
        plain = float(log_prob(ordinary, truth).mean())
        constant = float(log_prob(constant_variance(x, y, new), truth).mean())
        bounds = quantile(ours, [0.05, 0.95])
        covered = float(((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean())
        # Nominal 90%, with three standard errors of the share and a tenth for fitting.
        tolerance = 3 * np.sqrt(0.09 / len(truth)) + 0.03
        # On a small table with even noise there is little to gain over a constant variance, but nothing to lose.
        better = score > constant + (0.05 if name == "heteroscedastic" else 0.0)
        holds &= better and score > plain + 0.01 and abs(covered - 0.9) < tolerance
        numbers |= {f"{name}_log_score": score, f"{name}_ordinary": plain, f"{name}_constant": constant}
        numbers[f"{name}_coverage"] = covered
        shown.append(
            f"{name}: log score {score:.3f} against {constant:.3f} for constant variance and {plain:.3f} for the "
            f"ordinary gradient, 90% intervals cover {covered:.1%}"
        )
    return Evidence(bool(holds), "; ".join(shown), numbers)
