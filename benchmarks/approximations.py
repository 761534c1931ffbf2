"""Normalizing-flow guides on the posteriors of posteriordb: Pareto k-hat of 10,000 draws, and seconds.

    python benchmarks/approximations.py PATH [--engine flow] [--posteriors NAME ...] [--seed 0]

PATH is a clone of https://github.com/stan-dev/posteriordb. Each posterior is approximated in a new process: seconds are
those of the call of `infer`, with compilation and without imports. k-hat should be under 0.7 within 60 seconds. Results
are kept for each posterior in `results/approximations.json`; what is there is measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from record import record

DRAWS, LIMIT, SECONDS = 10_000, 0.7, 60.0


def measure(path: str, name: str, engine: str, seed: int) -> dict[str, float]:
    """One posterior, in this process."""
    import jax
    from posteriordb_data import posteriors

    import bayeslens

    case = posteriors(path)[name]
    began = time.perf_counter()
    found = bayeslens.infer(case.model, case.data, key=jax.random.key(seed), engine=engine, num_samples=DRAWS)
    seconds = time.perf_counter() - began
    return {"k_hat": round(float(found.k_hat), 3), "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path")
    parser.add_argument("--engine", default="flow")
    parser.add_argument("--posteriors", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.path, given.posteriors[0], given.engine, given.seed)))
        return
    from posteriordb_data import posteriors

    found = {}
    for name in given.posteriors or posteriors(given.path):
        command = [sys.executable, __file__, given.path, "--engine", given.engine, "--one"]
        done = subprocess.run(
            [*command, "--posteriors", name, "--seed", str(given.seed)], capture_output=True, text=True, timeout=1800
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise SystemExit(1)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:48} k-hat {found[name]['k_hat']:6.2f}  {found[name]['seconds']:6.1f} s", flush=True)
        record("approximations", {given.engine: found}, keep_others=True)
    good = sum(row["k_hat"] < LIMIT and row["seconds"] <= SECONDS for row in found.values())
    print(f"{good} of {len(found)} have k-hat under {LIMIT} within {SECONDS:.0f} s")


if __name__ == "__main__":
    main()
