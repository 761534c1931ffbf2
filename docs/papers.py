"""Writes the page of papers from gallery/papers.csv and gallery/results.json.

    python docs/papers.py        # prints it

The site's build calls `page()`, so that the page is never older than the results.
"""

from __future__ import annotations

import ast
import collections
import csv
import re
from pathlib import Path
from typing import Any

from bayeslens import gallery

GALLERY = Path(__file__).parent.parent / "gallery"
# What a reader can use, rather than a finding that can be measured again.
METHODS = {"algorithm", "model", "framework", "metric", "software"}
STATES = {
    "works": "the method is part of the library, and its claim held when it was last checked",
    "reproduced": "the finding was measured again with the library, and held",
    "did not reproduce": "the check ran, and the claim did not hold",
    "not yet": "there is no check yet, or none that ran with a valid control",
}


def page() -> str:
    """The page in Markdown: how many papers are in each state, and a row per paper."""
    with (GALLERY / "papers.csv").open(encoding="utf-8", newline="") as file:
        papers = list(csv.DictReader(file))
    entries, results = gallery.entries(GALLERY), gallery.results(GALLERY)
    states = {p["id"]: _state(p, entries.get(p["id"]), results.get(p["id"])) for p in papers}
    counts = collections.Counter(states.values())
    lines = [
        "# Papers",
        "",
        f"Bayeslens grows along {len(papers)} papers. Each one that is done has a runnable check of its claim in "
        "the gallery, with a control in which the mechanism is removed: the control must not hold. "
        "`bayeslens gallery run S290` repeats one; what was measured last is below.",
        "",
        "| State | Papers | Meaning |",
        "| --- | ---: | --- |",
        *(f"| {state} | {counts[state]} | {meaning} |" for state, meaning in STATES.items()),
        "",
        "| Paper | Title | Room | State | Last measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for paper in papers:
        shown = _escape(gallery.measured(results.get(paper["id"])))
        lines.append(
            f"| {paper['id']} | {_escape(paper['title'])} | {paper['room']} | {states[paper['id']]} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def _state(paper: dict[str, str], entry: Path | None, result: dict[str, Any] | None) -> str:
    state = gallery.state(result) if entry is not None else "not yet"
    if state != "holds":
        return state
    return "works" if paper["kind"] in METHODS and _imports_room(entry, paper["room"]) else "reproduced"


def _imports_room(entry: Path, room: str) -> bool:
    """Whether a gallery entry takes something from the room where the paper's part belongs."""
    wanted = f"bayeslens.{room}"
    for node in ast.walk(ast.parse(entry.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(module == wanted or module.startswith(wanted + ".") for module in modules):
            return True
    return False


def _escape(text: str) -> str:
    """Text as one Markdown table cell that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|$~^#])", r"\\\1", " ".join(text.split())).replace("\\<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
