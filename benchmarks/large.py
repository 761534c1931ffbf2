"""`bayeslens predict` on a million rows: seconds, memory, and the log score against LightGBM with constant variance.

    python benchmarks/large.py [--rows 1000000]

The table is generated: 17 numbers (three with gaps), a city, a flag and a day; interactions, and noise whose spread
depends on the row. The peer is trained on all rows with early stopping on a twentieth of them, which also gives it
its variance. Both answer for the same 100,000 further rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from record import record

TEST_ROWS = 100_000


def table(rows: int, seed: int) -> pd.DataFrame:
    """Features x0 to x16, city, flag and day, and the target y."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 17)).astype(np.float32)
    city = rng.integers(0, 12, rows)
    flag = rng.random(rows) < 0.3
    day = rng.integers(0, 1500, rows)
    signal = x[:, 0] + np.sin(2 * x[:, 1]) * (1 + flag) + x[:, 2] * x[:, 3] + (city % 4) + np.sin(day / 58.0)
    spread = np.exp(0.5 * x[:, 4] + 0.4 * flag - 0.5)
    frame = pd.DataFrame(x, columns=[f"x{i}" for i in range(17)])
    for column in ("x5", "x6", "x1"):
        frame.loc[rng.random(rows) < 0.05, column] = np.nan
    frame["city"] = pd.Categorical.from_codes(city, [f"city {c}" for c in range(12)]).astype(str)
    frame["flag"] = flag
    frame["day"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(day, unit="D")
    frame["y"] = signal + spread * rng.normal(size=rows)
    return frame


def ours(train: Path, test: Path, folder: Path) -> dict:
    """Run the command in a process of its own; seconds, its largest memory in GiB, and what it says."""
    command = [sys.executable, "-m", "bayeslens.cli", "predict", str(train), "--target", "y", "--test", str(test)]
    outputs = ["--out", str(folder / "predictions.csv"), "--report", str(folder / "report.html"), "--json"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, *outputs], stdout=subprocess.PIPE)
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"predict ended with {status}")
    answer = json.loads(said)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "gib": round(used.ru_maxrss / 2**20, 2),
        "learner": answer["learner"],
        "log_score": round(answer["metrics"]["log_score"], 4),
        "coverage": round(answer["metrics"]["coverage"], 4),
        "skipped": [e["note"] for e in answer["leaderboard"] if e["note"]],
    }


def peer(train: pd.DataFrame, test: pd.DataFrame) -> dict:
    """LightGBM's regression with one variance for all rows."""
    import lightgbm

    def features(frame: pd.DataFrame) -> pd.DataFrame:
        day = (frame["day"] - pd.Timestamp("2020-01-01")).dt.days
        return frame.drop(columns="y").assign(city=frame["city"].astype("category"), day=day)

    began = time.perf_counter()
    held = np.arange(len(train)) % 20 == 0
    x, y = features(train), train["y"].to_numpy()
    settings = {"objective": "regression", "verbose": -1, "learning_rate": 0.1, "num_leaves": 31}
    fit, check = lightgbm.Dataset(x[~held], y[~held]), lightgbm.Dataset(x[held], y[held])
    stop = lightgbm.early_stopping(20, verbose=False)
    model = lightgbm.train(settings, fit, 500, valid_sets=[check], callbacks=[stop])
    variance = np.mean((y[held] - model.predict(x[held])) ** 2)
    model = lightgbm.train(settings, lightgbm.Dataset(x, y), model.best_iteration)
    squares = (test["y"].to_numpy() - model.predict(features(test))) ** 2
    score = -0.5 * np.log(2 * np.pi * variance) - squares.mean() / (2 * variance)
    return {"seconds": round(time.perf_counter() - began, 1), "log_score": round(float(score), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        train, test = Path(folder) / "train.parquet", Path(folder) / "test.parquet"
        table(rows, 0).to_parquet(train)
        table(TEST_ROWS, 1).to_parquet(test)
        result = {"rows": rows, "bayeslens": ours(train, test, Path(folder))}
        print(json.dumps(result["bayeslens"]), flush=True)
        result["lightgbm"] = peer(pd.read_parquet(train), pd.read_parquet(test))
        print(json.dumps(result["lightgbm"]))
    record("large", result)


if __name__ == "__main__":
    main()
