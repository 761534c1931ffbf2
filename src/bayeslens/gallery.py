"""Runs the gallery: one runnable claim check per paper, each with a control that must fail."""

from __future__ import annotations

from typing import NamedTuple


class Evidence(NamedTuple):
    """What a check measured.

    `holds` says whether the claim holds, `shown` is one sentence with the figures next to what was to be
    shown, `numbers` keeps the figures themselves.
    """

    holds: bool
    shown: str
    numbers: dict[str, float]
