"""Transits in correlated noise, with a Gaussian process whose kernel is averaged over.

Claim: one run of nested sampling, in the product of the spaces of all kernels with a coordinate that selects one, gives
the probability of each kernel as their separate evidences would. The right kernel is found where noise is low, and none
is preferred where it is high; predictions averaged over kernels and hyperparameters say honestly how far they are off,
which those of the one kernel that fits best do not.

Source: N. Kroupa, D. Yallup, W. Handley, M. Hobson, "Kernel-, mean- and noise-marginalised Gaussian processes for
exoplanet transits and H0 inference" (2023).

Light curves are a transit of unknown depth plus a draw from a Gaussian process plus white noise, with kernel, scales
and depth drawn from their priors: averaged over these, exact intervals cover as often as they say. Evidences are
integrated on a grid of both scales of each kernel, in closed form over the depth.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy import special, stats

from bayeslens.core.quantiles import cumulative
from bayeslens.gallery import Evidence
from bayeslens.processes.kernel_marginalised_gaussian_process import (
    exponential,
    infer_marginalised,
    marginalised_gaussian_process,
    matern_32,
    predict,
    squared_exponential,
)

PAPER = "S054"
CLAIM = "Kernel probabilities as by quadrature, the right kernel found as noise falls, predictions that cover."
NOT_CHECKED = "The measured Hubble rates, their H0 and the tension between data sets; the transit code of the paper."
KERNELS = {"exponential": exponential, "Matern 3/2": matern_32, "squared exponential": squared_exponential}
NOISES = (1.0, 0.1, 0.01)
CURVES, MORE = 3, 60  # for nested sampling, and for quadrature alone, at each noise
AMPLITUDE, LENGTH, DEPTH = (0.0, 0.5), (np.log(0.3), 0.7), (3.0, 1.0)  # mean and standard deviation, logs for scales
SEEN = np.linspace(-1.0, 1.0, 24)
NEW = np.concatenate([(SEEN[1:] + SEEN[:-1])[::2] / 2, [1.1, 1.2, 1.3]])


def shape(x):
    """A transit of unit depth of a small planet, before a star that is half as bright at its limb."""
    across = 1 - (x / 0.4) ** 2
    return jnp.where(across > 0, 0.5 + 0.5 * jnp.sqrt(jnp.maximum(across, 0.0)), 0.0)


def light_curve(rng, noise):
    """Number of the true kernel, the brightness that was seen, and the true one at new points."""
    truth, x = rng.integers(len(KERNELS)), np.concatenate([SEEN, NEW])
    scales = np.exp(rng.normal(AMPLITUDE[0], AMPLITUDE[1])), np.exp(rng.normal(LENGTH[0], LENGTH[1]))
    values, vectors = np.linalg.eigh(list(KERNELS.values())[truth](x, x, *scales))
    function = vectors @ (np.sqrt(np.maximum(values, 0)) * rng.normal(size=len(x)))
    function = function - rng.normal(*DEPTH) * np.asarray(shape(x))
    return truth, function[: len(SEEN)] + noise * rng.normal(size=len(SEEN)), function[len(SEEN) :]


class Grid:
    """Evidences and maximum likelihoods over a grid of scales, by one eigendecomposition for each length scale."""

    def __init__(self, nodes=41):
        z = np.linspace(-4.0, 4.0, nodes)
        self.log_prior = stats.norm.logpdf(z)[:, None] + stats.norm.logpdf(z) + 2 * np.log(z[1] - z[0])
        self.length, self.amplitude = (np.exp(m + s * z) for m, s in (LENGTH, AMPLITUDE))
        decompose = [
            np.linalg.eigh(jax.vmap(lambda n, k=k: k(SEEN, SEEN, 1.0, n))(self.length)) for k in KERNELS.values()
        ]
        self.values, self.vectors = (np.stack([np.asarray(d[i]) for d in decompose]) for i in (0, 1))

    def look(self, y, noise):
        """Log evidences of the kernels; kernel, scales and depth of greatest likelihood."""
        variance = self.amplitude[:, None] ** 2 * np.maximum(self.values, 0)[:, :, None] + noise**2

        def product(a, b):
            a, b = (np.einsum("klij,i->klj", self.vectors, v) for v in (a, b))
            return (a * b)[:, :, None] / variance

        centered, dip = y + DEPTH[0] * np.asarray(shape(SEEN)), -np.asarray(shape(SEEN))
        quadratic, cross, square = (product(*p).sum(-1) for p in ((centered, centered), (centered, dip), (dip, dip)))
        determinant = np.log(variance).sum(-1) + len(y) * np.log(2 * np.pi)
        # With the depth integrated out, and with the best depth.
        precision = square + DEPTH[1] ** -2
        log_likelihood = -(quadratic - cross**2 / precision + determinant + np.log(precision * DEPTH[1] ** 2)) / 2
        best = -(quadratic - cross**2 / square + determinant) / 2
        k, n, a = np.unravel_index(np.argmax(best), best.shape)
        depth = DEPTH[0] + cross[k, n, a] / square[k, n, a]
        evidences = special.logsumexp(log_likelihood + self.log_prior, axis=(1, 2))
        return evidences, (k, self.amplitude[a], self.length[n], depth)


def plugged_in(y, noise, best):
    """Predictions of the kernel, scales and depth that fit best, as if they were known."""
    number, *scales, depth = best
    kernel = list(KERNELS.values())[number]
    cross, prior = (np.asarray(kernel(x, NEW, *scales)) for x in (SEEN, NEW))
    gain = np.linalg.solve(kernel(SEEN, SEEN, *scales) + noise**2 * np.eye(len(SEEN)), cross).T
    mean = gain @ (y + depth * np.asarray(shape(SEEN))) - depth * np.asarray(shape(NEW))
    return mean, np.sqrt(np.maximum(np.diag(prior - gain @ cross), 1e-12))


def check(*, control: bool = False) -> Evidence:
    """Nine light curves by both ways, more by quadrature; in the control all names mean one and the same kernel."""
    scales = {"amplitude": dist.LogNormal(*AMPLITUDE), "length_scale": dist.LogNormal(*LENGTH)}
    kernels = {name: (squared_exponential if control else k, scales) for name, k in KERNELS.items()}
    model = marginalised_gaussian_process(
        kernels, {"transit": (lambda x, depth: -depth * shape(x), {"depth": dist.Normal(*DEPTH)})}
    )
    rng, off, wrong, inside, plugged, share, exact_share = np.random.default_rng(0), [], [], [], [], {}, {}
    with jax.enable_x64(True):
        grid = Grid()
        for noise in NOISES:
            many = [light_curve(rng, noise) for _ in range(MORE)]
            looked = [grid.look(y, noise) for _, y, _ in many]
            exact = [special.softmax(evidences) for evidences, _ in looked]
            exact_share[noise] = np.mean([p[truth] for p, (truth, _, _) in zip(exact, many, strict=True)])
            share[noise] = 0.0
            for i, (truth, y, unseen) in enumerate(many[:CURVES]):
                data = {"x": SEEN, "y": y, "errors": np.array(noise)}
                found = infer_marginalised(model, data, key=jax.random.key(i), num_live=100, num_steps=20)
                p, errors = (np.array(list(d.values())) for d in found.kernels[:2])
                log_evidence = special.logsumexp(looked[i][0]) - np.log(len(KERNELS))
                off.append(np.abs(p - exact[i]) / np.maximum(errors, 1e-3))
                wrong.append((found.posterior.log_evidence - log_evidence) / found.posterior.log_evidence_error)
                share[noise] += p[truth] / CURVES
                predicted = predict(found.posterior, NEW, key=jax.random.key(i))
                inside.append(np.abs(np.asarray(cumulative(predicted, unseen)) - 0.5) < 0.45)
                mean, spread = plugged_in(y, noise, looked[i][1])
                plugged.append(np.abs(unseen - mean) < stats.norm.ppf(0.95) * spread)
    worst, evidence_off = np.max(off), np.max(np.abs(wrong))
    coverage, by_one = np.mean(inside, axis=1), np.mean(plugged, axis=1)
    error = coverage.std(ddof=1) / np.sqrt(len(coverage))
    numbers = {
        "kernel probabilities off, in standard errors": worst,
        "log evidences off, in standard errors": evidence_off,
        "coverage of 90% intervals, averaged over kernels": coverage.mean(),
        "its standard error": error,
        "coverage of 90% intervals, kernel that fits best": by_one.mean(),
    }
    numbers |= {f"probability of the true kernel, noise {n}": s for n, s in share.items()}
    numbers |= {f"probability of the true kernel by quadrature, noise {n}": s for n, s in exact_share.items()}
    shown = (
        f"kernel probabilities of {len(off)} light curves are within {worst:.1f} standard errors of quadrature, log "
        f"evidences within {evidence_off:.1f} (should be below 4); the true kernel has probability "
        f"{', '.join(f'{s:.2f}' for s in share.values())} at noise {', '.join(map(str, NOISES))} (by quadrature of "
        f"{MORE} each {', '.join(f'{s:.2f}' for s in exact_share.values())}; should rise from about a third); 90% "
        f"intervals cover {coverage.mean():.0%} +- {error:.0%}, those of the kernel that fits best {by_one.mean():.0%}"
    )
    # Four standard errors of 27 probabilities and 9 evidences: false alarm 2e-3.
    right, rises = worst < 4 and evidence_off < 4, share[NOISES[-1]] > share[NOISES[0]] + 0.2
    honest = abs(coverage.mean() - 0.9) < 3 * error and abs(coverage.mean() - 0.9) < abs(by_one.mean() - 0.9)
    return Evidence(bool(right and rises and honest), shown, {k: round(float(v), 4) for k, v in numbers.items()})
