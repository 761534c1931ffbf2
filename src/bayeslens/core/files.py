"""Reading and writing of users' files: clear errors first, and never half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslens.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


def read_table(source: Any) -> pd.DataFrame:
    """A DataFrame as it is, or read from a CSV (any common delimiter) or Parquet file.

    Raises:
        InputError: the file is missing, empty, unreadable, or has a delimiter that cannot be told.
    """
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        return source
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a table is a DataFrame or the path of a CSV or Parquet file, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path")
    if path.suffix.lower() in (".parquet", ".pq"):
        try:
            return pd.read_parquet(path)
        except Exception as error:
            raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    return _read_csv(path)


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a UTF-8 text file: save it as CSV in UTF-8") from None
    if not header.strip():
        raise InputError(f"{path} is empty: it needs a header line with column names")
    delimiter = max(",;\t|", key=header.count)
    if delimiter not in header:
        delimiter = ","
    names = [n.strip().strip('"') for n in header.rstrip("\r\n").split(delimiter)]
    repeated = sorted({n for n in names if names.count(n) > 1 and n})
    if repeated:
        raise InputError(f"{path} has duplicate column names {repeated}: rename them so that each name stands once")
    try:
        # A decimal comma is what goes with a semicolon, if the numbers have one.
        decimal = "," if delimiter == ";" and _has_decimal_commas(path) else "."
        return pd.read_csv(path, sep=delimiter, decimal=decimal, encoding="utf-8-sig", low_memory=False)
    except (pd.errors.ParserError, UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a table with delimiter {delimiter!r}: {str(error).strip().splitlines()[-1]}"
        ) from None


def _has_decimal_commas(path: Path) -> bool:
    import re

    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = [next(file, "") for _ in range(20)][1:]
    return any(re.search(r"(^|;)\s*-?\d+,\d+\s*(;|$)", line) for line in lines)


def check_writable(path: str | os.PathLike) -> None:
    """Say before long work begins that its result could not be written.

    Raises:
        InputError: the folder does not exist or cannot be written to, or the path is a folder.
    """
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise InputError(f"{target} is a folder: give the name of a file in it")
    if not folder.is_dir():
        raise InputError(f"the folder {folder} of {target.name} does not exist: make it first")
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".bayeslens-")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be written to: {error.strerror}") from None


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there: all of it or nothing.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path)
    check_writable(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".bayeslens-", suffix=target.suffix)
    os.close(handle)
    try:
        write(name)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        if os.path.exists(name):
            os.unlink(name)


def write_csv(frame: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a table as CSV, with its index when that is not just row numbers."""
    import pandas as pd

    numbered = isinstance(frame.index, pd.RangeIndex) and frame.index.name is None
    write_atomically(path, lambda name: frame.to_csv(name, index=not numbered))


def load_function(source: str) -> Callable:
    """The function of a `FILE.py:function`; running the file is what the user asked for.

    Raises:
        InputError: no such file or function, or a file that fails.
    """
    import types

    path, _, name = source.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise InputError(f"{source!r} does not name a function in a file: write it as MODEL.py:function")
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}: check the path")
    module = types.ModuleType(Path(path).stem)
    module.__file__ = path
    try:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), module.__dict__)  # leaves no __pycache__
    except Exception as error:
        raise InputError(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        functions = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise InputError(f"{path} has no function {name!r}; it has {functions}")
    return getattr(module, name)


def read_arguments(path: str | os.PathLike) -> dict[str, Any]:
    """A model's arguments by name from a JSON object: lists become arrays, null becomes None.

    Raises:
        InputError: no such file, no JSON, no object, or a ragged list.
    """
    import json

    import numpy as np

    if not Path(path).is_file():
        raise InputError(f"there is no file {path}: check the path")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, the model's arguments by name")
    found = {}
    for name, value in content.items():
        try:
            array = np.asarray(value) if isinstance(value, list) else None
        except ValueError:
            raise InputError(f"{name!r} in {path} is a ragged list: all its rows must have the same length") from None
        if array is not None and array.dtype.kind == "O":
            array = np.array(value, float)  # null stands for a missing number
        found[name] = value if array is None else array
    return found


def write_posterior(posterior: Any, path: str | os.PathLike) -> None:
    """Write a posterior as netCDF for ArviZ (`.nc`), or as a `.bayes` file.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    ending = Path(path).suffix
    if ending == ".bayes":
        from bayeslens.core.saving import save

        save(posterior, path)
    elif ending == ".nc":
        write_atomically(path, lambda name: posterior.to_arviz().to_netcdf(name))
    else:
        raise InputError(f"{path} must end in .nc (netCDF for ArviZ) or .bayes")
