"""Posteriors of posteriordb: data, reference draws and models; and how far other draws are from the reference draws.

Source: M. Magnusson, J. Torgander, P.-C. Buerkner, L. Zhang, B. Carpenter, A. Vehtari, "posteriordb: Testing,
Benchmarking and Developing Bayesian Inference Algorithms" (2025). Get it by
`git clone https://github.com/stan-dev/posteriordb`.
"""

from __future__ import annotations

import inspect
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from posteriordb_models import MODELS
from scipy import stats

from bayeslens.core.errors import InputError


class Case(NamedTuple):
    """A posterior of the database.

    Attributes:
        model: a NumPyro program.
        data: its arguments by name: NumPy arrays in float64, and Python numbers.
        reference: reference draws by parameter, each of shape (chains, draws, ...), close to independent.
        dimensions: number of scalars by parameter.
    """

    model: Callable
    data: dict[str, Any]
    reference: dict[str, Float[np.ndarray, "chains draws ..."]]
    dimensions: dict[str, int]


def posteriors(path: str | Path) -> dict[str, Case]:
    """Every posterior in a folder whose model `posteriordb_models` has and of which there are reference draws, by name.

    Args:
        path: a clone of posteriordb, or a folder with an `index.json` (a list of posteriors with their data, model and
            dimensions), `data/NAME.json.zip` and `reference/NAME.json.zip`.

    Raises:
        InputError: it is neither, or its draws do not have the dimensions that it states.
    """
    found = {}
    for name, model_name, dimensions, data_file, draws_file in _listed(Path(path)):
        if model_name not in MODELS:
            continue
        model = MODELS[model_name]
        content = _unzipped(data_file)
        data = {argument: _argument(content[argument]) for argument in inspect.signature(model).parameters}
        reference = _gathered(_unzipped(draws_file))
        sizes = {parameter: int(np.prod(draws.shape[2:])) for parameter, draws in reference.items()}
        if sizes != dimensions:
            raise InputError(f"{draws_file} has dimensions {sizes}, the database says {dimensions}: get it anew")
        found[name] = Case(model, data, reference, dimensions)
    return found


def _listed(path: Path) -> Iterator[tuple[str, str, dict[str, int], Path, Path]]:
    """Name, model, dimensions, and files of data and reference draws."""
    if (path / "index.json").exists():
        for entry in json.loads((path / "index.json").read_text()):
            name, data = entry["posterior"], path / "data" / f"{entry['data']}.json.zip"
            yield name, entry["model"], entry["dimensions"], data, path / "reference" / f"{name}.json.zip"
        return
    root = path / "posterior_database"
    if not root.is_dir():
        raise InputError(
            f"{path} is no posteriordb: git clone https://github.com/stan-dev/posteriordb and name its folder"
        )
    for file in sorted((root / "posteriors").glob("*.json")):
        entry = json.loads(file.read_text())
        if reference := entry.get("reference_posterior_name"):
            draws = root / "reference_posteriors" / "draws" / "draws" / f"{reference}.json.zip"
            data = root / "data" / "data" / f"{entry['data_name']}.json.zip"
            yield entry["name"], entry["model_name"], entry["dimensions"], data, draws


def _unzipped(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def _argument(value: Any) -> Any:
    return np.asarray(value, np.float64) if isinstance(value, list) else value


def _gathered(chains: list[dict[str, list[float]]]) -> dict[str, np.ndarray]:
    """Draws of `beta[1]`, `beta[2]`, ... as one array with trailing axes; Stan counts from one."""
    entries: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for label in chains[0]:
        name, indices = re.fullmatch(r"(\w+)(?:\[([\d,]+)\])?", label).groups()
        index = tuple(int(i) - 1 for i in indices.split(",")) if indices else ()
        entries.setdefault(name, {})[index] = np.array([chain[label] for chain in chains], np.float64)
    gathered = {}
    for name, parts in entries.items():
        leading = next(iter(parts.values())).shape
        gathered[name] = np.full(leading + tuple(np.max(list(parts), axis=0).astype(int) + 1), np.nan)
        for index, draws in parts.items():
            gathered[name][(..., *index)] = draws
    return gathered


def compare(draws: Mapping[str, Any], reference: dict[str, Float[np.ndarray, "chains draws ..."]]) -> pd.DataFrame:
    """How far means and standard deviations of draws are from those of reference draws, in standard errors.

    If draws and reference come from one distribution, then z is about standard normal. So its standard error takes
    variances from the reference, which is long, and effective sample sizes from each set of draws by itself: errors of
    few and skewed draws would be correlated with what they are the errors of. Two sets of draws with effective sample
    sizes n and m have means that differ by about sd * sqrt(1/n + 1/m). For standard deviations the same is done with
    the squares q = (x - mean)^2, whose mean is the variance and whose effective sample size differs from that of x;
    an error of the variance, divided by 2 sd, is one of the sd (delta method).

    Chains that disagree have a small effective sample size, hence a small z: look at `r_hat` first. And z of the sd
    needs fourth moments: for tails like a Cauchy's it means little.

    Args:
        draws: by parameter, of shape (chains, draws, ...): chains, or one chain of independent draws. A `Posterior`
            will do. Parameters that the reference lacks are left out.
        reference: as in `Case`.

    Returns:
        A row per scalar, labelled as in `beta[0]`: `mean`, `reference_mean`, `mean_z`, `sd`, `reference_sd`, `sd_z`,
        `ess` (of the mean), `ess_of_squares`, `r_hat` (split) and `mean_p`, `sd_p`: two-sided p-values with Holm's
        correction for all means and standard deviations in the table.

    Raises:
        InputError: a parameter is missing or has another shape, or a draw is not finite.

    >>> rng = np.random.default_rng(0)
    >>> table = compare({"beta": rng.normal(size=(4, 500, 2))}, {"beta": rng.normal([0.0, 0.5], 1.0, (10, 1000, 2))})
    >>> (table.mean_p < 0.01).to_dict()
    {'beta[0]': False, 'beta[1]': True}
    """
    tables = [_compared(name, _draws_of(draws, name, expected), expected) for name, expected in reference.items()]
    table = pd.concat(tables)
    p_values = 2 * stats.norm.sf(np.abs(table[["mean_z", "sd_z"]].to_numpy()))
    table[["mean_p", "sd_p"]] = _holm(p_values.ravel()).reshape(p_values.shape)
    return table


def _draws_of(draws: Mapping[str, Any], name: str, expected: np.ndarray) -> np.ndarray:
    try:
        found = np.asarray(draws[name], np.float64)
    except KeyError:
        raise InputError(f"no draws of {name!r}, which the reference has: add them to draws") from None
    if found.shape[2:] != expected.shape[2:] or found.ndim < 2:
        raise InputError(f"draws of {name!r} have shape {found.shape}, not (chains, draws, *{expected.shape[2:]})")
    if not np.isfinite(found).all():
        raise InputError(f"draws of {name!r} hold {(~np.isfinite(found)).sum()} values that are not finite")
    return found


def _compared(name: str, found: np.ndarray, expected: np.ndarray) -> pd.DataFrame:
    shape = found.shape[2:]
    found, expected = (a.reshape(*a.shape[:2], -1) for a in (found, expected))
    ours, theirs = _moments(found), _moments(expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_z = (ours.mean - theirs.mean) / (theirs.sd * np.sqrt(1 / ours.ess + 1 / theirs.ess))
        error = theirs.sd_of_squares * np.sqrt(1 / ours.ess_of_squares + 1 / theirs.ess_of_squares)
        sd_z = (ours.sd - theirs.sd) / (error / (2 * theirs.sd))
    # Draws that never move say nothing about their error.
    sd_z = np.where((ours.sd == 0) & (theirs.sd > 0), -np.inf, sd_z)
    mean_z, sd_z = (np.where(np.isnan(z), 0.0, z) for z in (mean_z, sd_z))  # equal constants
    return pd.DataFrame(
        {
            "mean": ours.mean,
            "reference_mean": theirs.mean,
            "mean_z": mean_z,
            "sd": ours.sd,
            "reference_sd": theirs.sd,
            "sd_z": sd_z,
            "ess": ours.ess,
            "ess_of_squares": ours.ess_of_squares,
            "r_hat": split_gelman_rubin(found),
        },
        index=[f"{name}[{', '.join(map(str, index))}]" if index else name for index in np.ndindex(*shape)],
    )


class _Moments(NamedTuple):
    mean: np.ndarray
    sd: np.ndarray
    sd_of_squares: np.ndarray
    ess: np.ndarray
    ess_of_squares: np.ndarray


def _moments(draws: Float[np.ndarray, "chains draws dimension"]) -> _Moments:
    mean, sd = draws.mean((0, 1)), draws.std((0, 1), ddof=1)
    squares = (draws - mean) ** 2
    return _Moments(mean, sd, squares.std((0, 1), ddof=1), _effective(draws), _effective(squares))


def _effective(draws: np.ndarray) -> np.ndarray:
    """Effective sample size of the mean; at most N log10 N, as in Stan; 1 where nothing moves."""
    number = draws.shape[0] * draws.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = effective_sample_size(draws)
    most = number * np.log10(number)
    found = np.where(found > 0, np.minimum(found, most), most)
    return np.where(np.ptp(draws, axis=(0, 1)) > 0, found, 1.0)


def _holm(p_values: np.ndarray) -> np.ndarray:
    order = np.argsort(p_values)
    corrected = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)), 1.0)
    return corrected[np.argsort(order)]
