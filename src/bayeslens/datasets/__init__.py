"""Small data sets that ship with the package."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def penguins() -> pd.DataFrame:
    """Measurements of 344 penguins near Palmer Station, Antarctica, 2007 to 2009; some values are missing.

    Body mass in grams, lengths in millimetres. Source: Horst, Hill and Gorman 2020, palmerpenguins (CC0).

    >>> penguins().shape
    (344, 8)
    """
    import pandas as pd

    with files("bayeslens.datasets").joinpath("penguins.csv").open() as file:
        return pd.read_csv(file)
