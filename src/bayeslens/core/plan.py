"""What inference will do with each site of a model, and why."""

from __future__ import annotations

import equinox as eqx


class PlannedSite(eqx.Module):
    """What is done with one latent site.

    Attributes:
        name: of the site.
        shape: of its value.
        treatment: `"solved exactly"`, `"enumerated"`, `"marginalized"` or `"sampled"`.
        by: the engine that does it.
        why: in a few words.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    by: str
    why: str


class Plan(eqx.Module):
    """What inference will do with each site of a model, and why: made by `bayeslens.plan`, kept by its `Posterior`.

    Attributes:
        engine: the name of the engine that runs.
        sites: what is done with each latent site.
        notes: sentences on the whole.

    >>> print(Plan("nuts", (PlannedSite("mu", (), "sampled", "nuts", "no closed form"),)))
    engine: nuts
    site  shape   treatment  by    why
    mu    scalar  sampled    nuts  no closed form
    """

    engine: str
    sites: tuple[PlannedSite, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ("site", "shape", "treatment", "by", "why")
        rows = [header, *((s.name, _shown(s.shape), s.treatment, s.by, s.why) for s in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"engine: {self.engine}", *lines, *self.notes])


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
