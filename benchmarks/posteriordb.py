"""Engines on the posteriors of posteriordb: time to an effective sample size of 400, and whether the answer is right.

    python benchmarks/posteriordb.py PATH [--posteriors NAME ...] [--engines nuts numpyro] [--repeats 3] [--out NAME]

PATH is a clone of https://github.com/stan-dev/posteriordb. For each posterior, repeat and engine a new process measures
the seconds from the call of the engine until the bulk and tail effective sample sizes of all parameters reach 400 over
four chains: with compilation, without imports, and without a cache of compiled programs. Engines take turns.

`numpyro` is NumPyro's own NUTS with a diagonal mass matrix, its default: vectorized and parallel (each chain on a host
device of its own), each with 500 and with 1000 transitions of warm-up; the fastest of the four by the median counts,
posterior by posterior. It is told beforehand how many draws it needs: a pilot run of parallel chains with the same
random numbers, which is not counted, finds the least number; a run that falls short of it is not repeated.
`nutpie` is PyMC's model with nutpie, compiled by Numba or by JAX, where both are installed.

Parameters are compared with the reference draws: two-sided tests of means and standard deviations, with standard errors
of both runs and Holm's correction over all parameters of a posterior, at 1%.

Results are kept for each posterior, engine and repeat in `results/NAME_by_run.json`; what is there is not measured
again. The summary goes to `results/NAME.json`, by default `posteriordb`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from record import RESULTS, record, write_json

EFFECTIVE, CHAINS = 400, 4
MOST_DRAWS = 9600  # per chain
PILOT_DRAWS = [800, 3200, MOST_DRAWS]
LEVEL = 0.01
SECONDS_AT_MOST = 1800


Found = tuple[dict[str, Any], dict[str, np.ndarray]]


# Each imports what it needs, and returns a function of a case, a seed and a number of draws.
def ours(engine: str) -> Callable:
    import jax

    import bayeslens
    from bayeslens.inference.infer import engine_named

    made = engine_named(engine, num_chains=CHAINS, num_samples=MOST_DRAWS, effective=EFFECTIVE)

    def run(case: Any, seed: int, _: int) -> Found:
        found = bayeslens.infer(case.model, case.data, key=jax.random.key(seed), engine=made)
        return found.draws, found.statistics

    return run


def numpyro_chains(method: str, num_warmup: int) -> Callable:
    import jax
    from numpyro import infer

    def run(case: Any, seed: int, draws: int) -> Found:
        mcmc = infer.MCMC(
            infer.NUTS(case.model),
            num_warmup=num_warmup,
            num_samples=draws,
            num_chains=CHAINS,
            chain_method=method,
            progress_bar=False,
        )
        mcmc.run(jax.random.key(seed), extra_fields=("diverging", "num_steps"), **case.data)
        found = {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}
        return found, {n: np.asarray(v) for n, v in mcmc.get_extra_fields(group_by_chain=True).items()}

    return run


def nutpie_chains(backend: str) -> Callable:
    import nutpie
    import pymc
    from posteriordb_pymc import MODELS

    def run(case: Any, seed: int, draws: int) -> Found:
        with pymc.Model() as model:
            MODELS[case.model.__name__](**case.data)
        compiled = nutpie.compile_pymc_model(model, backend=backend)
        trace = nutpie.sample(compiled, draws=draws, chains=CHAINS, seed=seed, progress_bar=False)
        found = {n: np.asarray(trace.posterior[n]) for n in case.reference}
        statistics = {n: np.asarray(trace.sample_stats[n]) for n in ("diverging", "n_steps")}
        return found, {"diverging": statistics["diverging"], "num_steps": statistics["n_steps"]}

    return run


ENGINES = (
    {name: functools.partial(ours, name) for name in ("nuts", "hmc")}
    | {
        f"numpyro {method} {warmup}": functools.partial(numpyro_chains, method, warmup)
        for warmup in (500, 1000)
        for method in ("vectorized", "parallel")
    }
    | {f"nutpie {backend}": functools.partial(nutpie_chains, backend) for backend in ("numba", "jax")}
)
PARTS = {peer: tuple(n for n in ENGINES if n.startswith(peer)) for peer in ("numpyro", "nutpie")}


def measure(path: str, name: str, engine: str, seed: int, draws: int) -> dict[str, Any]:
    """One engine on one posterior, in this process."""
    if "parallel" in engine:
        import numpyro

        numpyro.set_host_device_count(CHAINS)
    import jax
    from posteriordb_data import compare, posteriors

    from bayeslens.inference.diagnostics import convergence

    case, run = posteriors(path)[name], ENGINES[engine]()
    jax.block_until_ready(jax.random.normal(jax.random.key(0), (3,)) + 1)  # XLA has started
    began, began_cpu = time.perf_counter(), time.process_time()
    found, statistics = run(case, seed, draws)
    flat = np.concatenate([np.asarray(found[n]).reshape(*found[n].shape[:2], -1) for n in case.reference], -1)
    mixing = convergence(flat)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    table = compare(found, case.reference)
    effective = float(np.min([mixing.ess_bulk, mixing.ess_tail]))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "draws": int(flat.shape[1]),
        "needed": _least_draws(flat),
        "effective": effective,
        "r_hat": float(mixing.r_hat.max()),
        "diverging": int(np.sum(statistics["diverging"])),
        "gradients_per_effective": float(np.sum(statistics["num_steps"]) / effective),
        "largest_mean_z": float(table.mean_z.abs().max()),
        "largest_sd_z": float(table.sd_z.abs().max()),
        "z": {n: [round(float(z), 2) for z in row] for n, row in table[["mean_z", "sd_z"]].T.items()},
        "least_p": float(np.nanmin(table[["mean_p", "sd_p"]].to_numpy())),
    }


def _least_draws(flat: np.ndarray) -> int | None:
    """With how many draws per chain the effective sample sizes were large enough first; None if they never were."""
    from bayeslens.inference.diagnostics import convergence

    count = 80.0
    while count < flat.shape[1] * 1.05:
        size = min(int(count), flat.shape[1])
        mixing = convergence(flat[:, :size])
        if np.min([mixing.ess_bulk, mixing.ess_tail]) >= EFFECTIVE:
            return size
        count *= 1.05
    return None


def in_new_process(path: str, name: str, engine: str, seed: int, kept: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own; peers are told how many draws they need."""
    if not any(engine in parts for parts in PARTS.values()):
        return _in_new_process(path, name, engine, seed, MOST_DRAWS)
    pilot = engine.replace("vectorized", "parallel")
    entry = f"{name}|pilot of {pilot}|{seed}"
    for draws in PILOT_DRAWS:
        if "needed" in kept.get(entry, {}):
            break
        found = _in_new_process(path, name, pilot, seed, draws)
        if "failed" in found:
            return found
        if found["needed"] or draws == PILOT_DRAWS[-1]:
            kept[entry] = {"needed": found["needed"] or draws}
    return _in_new_process(path, name, engine, seed, kept[entry]["needed"])


def _in_new_process(path: str, name: str, engine: str, seed: int, draws: int) -> dict[str, Any]:
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, path, "--one", name, engine, str(seed), str(draws)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS_AT_MOST, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {SECONDS_AT_MOST} seconds"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"}
    return json.loads(done.stdout.splitlines()[-1])


def median(kept: dict[str, Any], name: str, engine: str, quantity: str) -> float:
    values = [r[quantity] for k, r in kept.items() if k.startswith(f"{name}|{engine}|") and quantity in r]
    return float(np.median(values)) if values else float("nan")


def fastest(kept: dict[str, Any], name: str, engine: str) -> str:
    """The part of an engine whose median time is the least."""
    parts = PARTS.get(engine, (engine,))
    seconds = [median(kept, name, part, "seconds") for part in parts]
    return parts[int(np.nanargmin(seconds))] if np.isfinite(seconds).any() else parts[0]


def summarize(kept: dict[str, Any]) -> dict[str, Any]:
    names = sorted({k.split("|")[0] for k in kept})
    engines = sorted({k.split("|")[1].split(" ")[0] for k in kept} - {"pilot"})
    summary: dict[str, Any] = {"posteriors": {}, "engines": {}}
    for name in names:
        row = {}
        for engine in engines:
            part = fastest(kept, name, engine)
            runs = [r for k, r in kept.items() if k.startswith(f"{name}|{part}|") and "seconds" in r]
            if runs:
                row[engine] = {
                    "as": part,
                    "seconds": round(median(kept, name, part, "seconds"), 3),
                    "cpu_seconds": round(median(kept, name, part, "cpu_seconds"), 3),
                    "gradients_per_effective": round(median(kept, name, part, "gradients_per_effective"), 2),
                    "diverging": sum(r["diverging"] for r in runs),
                    "r_hat": round(max(r["r_hat"] for r in runs), 4),
                    "least_effective": round(min(r["effective"] for r in runs)),
                    "wrong": sum(r["least_p"] < LEVEL for r in runs),
                    "runs": len(runs),
                }
        summary["posteriors"][name] = row
    for engine in engines:
        rows = [r[engine] for r in summary["posteriors"].values() if engine in r]
        found = {k: sum(r[k] for r in rows) for k in ("diverging", "wrong", "runs")}
        found["failed"] = sum("failed" in r for k, r in kept.items() if k.split("|")[1].startswith(engine))
        for quantity in ("seconds", "cpu_seconds", "gradients_per_effective"):
            pairs = [
                (r["numpyro"][quantity], r[engine][quantity])
                for r in summary["posteriors"].values()
                if engine in r and "numpyro" in r
            ]
            if pairs and engine != "numpyro":
                ratios = np.array([a / b for a, b in pairs])
                found[f"numpyro_over_ours_{quantity}"] = {
                    "geometric_mean": round(float(np.exp(np.log(ratios).mean())), 2),
                    "range": [round(float(ratios.min()), 2), round(float(ratios.max()), 2)],
                    "posteriors": len(pairs),
                }
        summary["engines"][engine] = found
    return summary


def print_table(kept: dict[str, Any]) -> None:
    """A line for each run."""
    quantities = ("seconds", "cpu_seconds", "gradients_per_effective", "effective", "draws", "diverging", "r_hat")
    print(f"{'posterior':45}{'engine':26}" + "".join(f"{q[:11]:>12}" for q in (*quantities, "least_p")))
    for entry, run in sorted(kept.items()):
        name, engine, _ = entry.split("|")
        if "seconds" in run:
            print(f"{name:45}{engine:26}" + "".join(f"{run[q]:12.5g}" for q in (*quantities, "least_p")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="a clone of posteriordb")
    parser.add_argument("--posteriors", nargs="*", help="all by default")
    parser.add_argument("--engines", nargs="*", default=["nuts", "numpyro"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", default="posteriordb", help="name of the results")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.path:
        print("git clone https://github.com/stan-dev/posteriordb and name its folder")
        return
    if arguments.one:
        name, engine, seed, draws = arguments.one
        print(json.dumps(measure(arguments.path, name, engine, int(seed), int(draws))))
        return
    from posteriordb_data import posteriors

    file = RESULTS / f"{arguments.out}_by_run.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    parts = [part for engine in arguments.engines for part in PARTS.get(engine, (engine,))]
    names = list(posteriors(arguments.path))
    for given, known in ((parts, {*ENGINES, *PARTS}), (arguments.posteriors or [], set(names))):
        if unknown := sorted(set(given) - known):
            parser.error(f"unknown {unknown}: choose from {sorted(known)}")
    for repeat in range(arguments.repeats):
        for name in arguments.posteriors or names:
            turn = repeat % len(parts)
            for part in parts[turn:] + parts[:turn]:
                entry = f"{name}|{part}|{repeat}"
                if entry not in kept:
                    kept[entry] = in_new_process(arguments.path, name, part, repeat, kept)
                    write_json(file, kept)
                    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in kept[entry].items()}
                    print(entry, shown, flush=True)
    print_table(kept)
    summary = summarize(kept)
    print(json.dumps(summary["engines"], indent=1))
    record(arguments.out, summary)


if __name__ == "__main__":
    main()
