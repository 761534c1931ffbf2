"""The `.bayes` container: a JSON manifest and named arrays in one checksummed, versioned file.

It is a zip of uncompressed entries, `manifest.json` first, then one `.npy` entry per array. The zip's comment ends in
the SHA-256 digest of everything before it, so that damage anywhere is found before anything is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bayeslens.core.errors import InputError
from bayeslens.core.files import write_atomically

FORMAT_VERSION = 1
PLAIN_KINDS = "biufcSUMm"  # what a .npy file holds without pickle and without names of fields
_MANIFEST = "manifest.json"
_MAGIC = b'{"format": "bayeslens"'
_COMMENT = b"bayeslens sha256 "
_DIGITS = 64
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def write_container(path: str | os.PathLike, manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a manifest and arrays of plain types, by name: all of the file, or nothing.

    Raises:
        InputError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_container(folder + "/a.bayes", {"note": "two numbers"}, {"x": np.array([1.0, 2.0])})
    ...     with open_container(folder + "/a.bayes") as (manifest, archive):
    ...         manifest["note"], read_array(archive, "x").tolist()
    ('two numbers', [1.0, 2.0])
    """
    from bayeslens import __version__

    manifest = {"format": "bayeslens", "format_version": FORMAT_VERSION, "bayeslens": __version__, **manifest}
    text = json.dumps(manifest, allow_nan=False).encode()
    write_atomically(path, lambda name: _write(name, text, arrays))


def _write(name: str, manifest: bytes, arrays: dict[str, np.ndarray]) -> None:
    with open(name, "w+b") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # Entries have zip's fixed date, so that equal nouns give equal files.
            archive.writestr(zipfile.ZipInfo(_MANIFEST), manifest)
            for entry, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{entry}.npy"), "w", force_zip64=array.nbytes > 2**31) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
            archive.comment = _COMMENT + b"0" * _DIGITS
        digest = _digest(file)
        file.seek(-_DIGITS, os.SEEK_END)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _digest(file: BinaryIO) -> bytes:
    """SHA-256 of a file but for its last 64 bytes, in hexadecimal."""
    left = file.seek(0, os.SEEK_END) - _DIGITS
    file.seek(0)
    result = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 2**20))):
        result.update(block)
        left -= len(block)
    return result.hexdigest().encode()


@contextlib.contextmanager
def open_container(path: str | os.PathLike) -> Iterator[tuple[dict, zipfile.ZipFile]]:
    """The manifest and the archive of a container, once it is known to be whole.

    Raises:
        InputError: the file is missing, something else, damaged, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield understood(path, lambda: _read(path, file))


def _read(path: Path, file: BinaryIO) -> tuple[dict, zipfile.ZipFile]:
    if _MAGIC not in file.read(200):
        raise InputError(f"{path} is not a .bayes file, or its beginning is damaged")
    digest = _digest(file)
    if file.read() != digest:
        raise InputError(f"{path} is damaged or incomplete: get another copy of it")
    archive = zipfile.ZipFile(file)
    infos = archive.infolist()
    # Nothing is compressed, so that a small file cannot fill the memory.
    if any(i.compress_type or i.file_size != i.compress_size for i in infos) or (
        sum(i.file_size for i in infos) > os.path.getsize(path)
    ):
        raise InputError(f"{path} declares more data than it holds: it was not written by bayeslens")
    manifest = json.loads(archive.read(_MANIFEST))
    version = manifest["format_version"]
    if type(version) is not int or version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format {version}, made by bayeslens {manifest.get('bayeslens')}; this version reads formats "
            f"up to {FORMAT_VERSION}: upgrade bayeslens"
        )
    return manifest, archive


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of a container.

    Raises:
        InputError: the entry's header claims another size or type than its data have.
    """
    content = io.BytesIO(archive.read(f"{name}.npy"))
    shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(content)](content)
    data = bytearray(content.read())
    # Checked by hand: NumPy's reader makes room for whatever the header claims.
    if dtype.kind not in PLAIN_KINDS or dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"its array {name} is not what it declares")
    return np.ndarray(shape, dtype, data, order="F" if fortran else "C")


def understood(path: str | os.PathLike, read: Callable[[], Any]) -> Any:
    """The result of reading; whatever goes wrong in a file that is whole, but not ours, becomes one clear error."""
    try:
        return read()
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} cannot be loaded: {error}") from None
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise InputError(f"{path} cannot be loaded, it was made by another version or changed ({said})") from None
