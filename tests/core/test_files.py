"""Users' files: what is read, what is refused in one sentence, and that nothing half-written stays."""

from __future__ import annotations

import os
import stat

import numpy as np
import pandas as pd
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.files import check_writable, read_table, write_atomically, write_csv

FRAME = pd.DataFrame({"size": [1.5, np.nan, 3.0], "kind": ["a", "b", None], "n": [1, 2, 3]})


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters(tmp_path, delimiter):
    path = tmp_path / "t.csv"
    FRAME.to_csv(path, sep=delimiter, index=False)
    pd.testing.assert_frame_equal(read_table(path), FRAME, check_dtype=False)
    pd.testing.assert_frame_equal(read_table(str(path)), read_table(path))


def test_decimal_commas(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a;b\n1,5;x\n-2,25;y\n")
    assert read_table(path)["a"].tolist() == [1.5, -2.25]
    path.write_text("a;b\n1.5;x\n2.5;y\n")
    assert read_table(path)["a"].tolist() == [1.5, 2.5]


def test_byte_order_mark_quotes_and_windows_line_ends(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbf"a","b, c"\r\n1,"x, y"\r\n')
    frame = read_table(path)
    assert frame.columns.tolist() == ["a", "b, c"] and frame["b, c"].tolist() == ["x, y"]


def test_one_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a\n1\n2\n")
    assert read_table(path)["a"].tolist() == [1, 2]


def test_parquet_and_frames(tmp_path):
    path = tmp_path / "t.parquet"
    FRAME.to_parquet(path)
    pd.testing.assert_frame_equal(read_table(path), FRAME)
    assert read_table(FRAME) is FRAME


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "there is no file .*absent.csv"),
        ("empty.csv", b"", "is empty"),
        ("blank.csv", b"\n\n", "is empty"),
        ("twice.csv", b"a,b,a\n1,2,3\n", r"duplicate column names \['a'\]"),
        ("latin.csv", b"gr\xf6\xdfe,b\n1,2\n", "not a UTF-8"),
        ("latin_below.csv", b"a,b\n1,gr\xf6\xdfe\n", "UTF-8|utf-8|cannot be read"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3,4\n", "cannot be read as a table"),
        ("bad.parquet", b"not parquet", "cannot be read as Parquet"),
    ],
)
def test_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(path)


def test_not_a_table():
    with pytest.raises(InputError, match="got int"):
        read_table(3)


def test_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_table(tmp_path)
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        check_writable(tmp_path / "no" / "file.csv")


def test_checking_leaves_nothing(tmp_path):
    check_writable(tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == []


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("old")

    def write(name):
        with open(name, "w") as file:
            file.write("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_written_files_have_usual_permissions(tmp_path):
    path = tmp_path / "out.csv"
    write_csv(FRAME, path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_index_is_kept_when_it_says_something(tmp_path):
    path = tmp_path / "out.csv"
    write_csv(FRAME, path)
    pd.testing.assert_frame_equal(read_table(path), FRAME, check_dtype=False)
    write_csv(FRAME.set_index("n"), path)
    assert read_table(path).columns.tolist() == ["n", "size", "kind"]
