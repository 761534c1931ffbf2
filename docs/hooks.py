"""What the site's build does by itself: runs the tutorial, writes the page of papers and the reference of the rooms."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import tempfile
import traceback
from pathlib import Path
from typing import Any

import papers
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parent.parent / "src" / "bayeslens"
# The order of the architecture; a room that is not named here comes last.
ROOMS = (
    *("core", "training", "inference", "distributions", "processes", "networks", "logic", "amortized"),
    *("evaluation", "learners", "decision", "language", "datasets", "report"),
)
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)


def on_config(config: Any) -> Any:
    """Put the reference of every room into the navigation."""
    config.nav.append({"Reference": [{name: f"reference/{name}.md"} for name in _reference()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are written from the code and the results."""
    pages = {"papers.md": papers.page()} | {f"reference/{k}.md": v for k, v in _reference().items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Run the Python blocks of a page that says `execute: true`, and show what they print below each of them."""
    return run_blocks(markdown, page.file.src_uri) if page.meta.get("execute") else markdown


def run_blocks(markdown: str, name: str) -> str:
    """Run all Python blocks of a page in one namespace and an empty folder.

    Below each block comes what it prints, and the value of its last line if that is an expression.

    Raises:
        PluginError: a block fails; that stops the build.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}

    def run(block: re.Match) -> str:
        try:
            output = _run(block[1], namespace, name)
        except (Exception, SystemExit) as error:
            raise PluginError(f"{name}: this block failed\n\n{block[1]}\n{traceback.format_exc()}") from error
        return block[0] + (f'\n```text title="Output"\n{output.rstrip()}\n```\n' if output.strip() else "")

    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return BLOCK.sub(run, markdown)
        finally:
            os.chdir(before)


def _run(code: str, namespace: dict[str, Any], name: str) -> str:
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
            if value is not None:
                print(repr(value))
    return printed.getvalue()


def _reference() -> dict[str, str]:
    """A page per room that exists, and one for the top level, in the order of the architecture."""
    rooms = {p.parent.name: p.parent for p in sorted(PACKAGE.glob("*/__init__.py"))}
    pages = {"verbs": _page("Verbs", ["bayeslens.verbs"])}
    for name in sorted(rooms, key=lambda name: ROOMS.index(name) if name in ROOMS else len(ROOMS)):
        modules = [f"bayeslens.{name}.{p.stem}" for p in sorted(rooms[name].glob("*.py")) if p.stem[0] != "_"]
        pages[name] = _page(name.capitalize(), modules or [f"bayeslens.{name}"])
    return pages | {"gallery": _page("Gallery", ["bayeslens.gallery"])}


def _page(title: str, modules: list[str]) -> str:
    blocks = "\n\n".join(f"::: {module}" for module in modules)
    return f"# {title}\n\n{blocks}\n"
