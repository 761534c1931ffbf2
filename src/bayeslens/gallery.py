"""Runs the gallery: one runnable claim check per paper, each with a control that must fail."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bayeslens.core.errors import InputError
from bayeslens.core.files import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

_PACKAGE = Path(__file__).parent


class Evidence(NamedTuple):
    """What a check measured.

    `holds` says whether the claim holds, `shown` is one sentence with the figures next to what was to be
    shown, `numbers` keeps the figures themselves.
    """

    holds: bool
    shown: str
    numbers: dict[str, float]


class Entry(NamedTuple):
    """A gallery file as it is read, not run: the paper's id, the claim, what was not checked, and where it is."""

    paper: str
    claim: str
    not_checked: str
    path: Path


# Finding and reading entries


def entries(folder: str | Path | None = None) -> dict[str, Path]:
    """The files of the gallery by paper id, in the order of the ids.

    Args:
        folder: where the files are; None takes the `gallery` of the checkout that is imported, or the copy
            inside the installed package.

    Raises:
        InputError: no such folder, or two files for one paper.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "s290_ngboost.py").touch()
    >>> entries(folder)["S290"].name
    's290_ngboost.py'
    """
    folder = Path(folder) if folder is not None else _home()
    if not folder.is_dir():
        raise InputError(f"there is no gallery in {folder}: give the folder that holds files such as s290_ngboost.py")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("s[0-9][0-9][0-9]_*.py")):
        paper = path.name[:4].upper()
        if paper in found:
            raise InputError(f"{found[paper].name} and {path.name} are both about paper {paper}: keep one")
        found[paper] = path
    return found


def read_entry(path: str | Path) -> Entry:
    """Read what a gallery file says about itself, without running it.

    Raises:
        InputError: the file does not follow the protocol; the message says what is missing.
    """
    path = Path(path)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise InputError(f"{path.name} is not valid Python: {error}") from None
    if not ast.get_docstring(tree):
        raise InputError(f"{path.name} has no docstring: say in it what the paper claims and where it is from")
    names = ("PAPER", "CLAIM", "NOT_CHECKED")
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name in names:
        if not isinstance(constants.get(name), str):
            raise InputError(f"{path.name} has no constant {name}: set it to a plain text at the top of the file")
    paper, claim, not_checked = (constants[name] for name in names)
    if paper.lower() != path.name[:4]:
        raise InputError(f"{path.name} says PAPER = {paper!r}, which does not go with its name")
    if not claim.strip():
        raise InputError(f"{path.name} has an empty CLAIM")
    if not any(isinstance(node, ast.FunctionDef) and _takes_control(node) for node in tree.body):
        raise InputError(f"{path.name} has no function check(*, control: bool = False) -> Evidence")
    return Entry(paper, claim, not_checked, path)


def results(folder: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """The last measured results by paper id, as `results.json` of the gallery keeps them; empty without that file.

    Raises:
        InputError: the file is not what the gallery writes.
    """
    path = (Path(folder) if folder is not None else _home()) / "results.json"
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore it, or delete it and run the gallery") from None
    if not isinstance(kept, dict):
        raise InputError(f"{path} does not hold one object keyed by paper id: delete it and run the gallery")
    return kept


def state(result: dict[str, Any] | None) -> str:
    """What a result says: `"holds"`, `"did not reproduce"`, or `"not yet"` (not run, crashed, or no valid control).

    >>> state(None)
    'not yet'
    >>> state({"holds": True, "control": {"holds": False}})
    'holds'
    """
    if result is None or "error" in result:
        return "not yet"
    if not result["holds"]:
        return "did not reproduce"
    return "not yet" if result["control"]["holds"] else "holds"


def failure(result: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Why a result is a failure, or an empty text.

    Args:
        result: what was just measured.
        before: what was recorded earlier. A claim that is on record as not reproduced is a finding: that it still
            does not hold is no failure.

    >>> failure({"holds": True, "control": {"holds": True}})
    'the control holds too, so the check does not show what the mechanism does'
    """
    if "error" in result:
        return f"stopped with {result['error']}"
    if not result["holds"]:
        known = before is not None and state(before) == "did not reproduce"
        return "" if known else "the claim does not hold"
    if result["control"]["holds"]:
        return "the control holds too, so the check does not show what the mechanism does"
    return ""


def _home() -> Path:
    """The gallery of the checkout that is imported, or the copy inside the installed package."""
    checkout = _PACKAGE.parent.parent / "gallery"
    return checkout if _PACKAGE.parent.name == "src" and checkout.is_dir() else _PACKAGE / "gallery_entries"


def _takes_control(node: ast.FunctionDef) -> bool:
    return node.name == "check" and [a.arg for a in node.args.kwonlyargs] == ["control"]


# Running entries


def run(paper: str, *, folder: str | Path | None = None) -> dict[str, Any]:
    """Check the claim of one paper, and its control; nothing is recorded.

    Returns:
        `holds`, `claim`, `evidence` and `control` (each `holds`, `shown` and `numbers`), `not_checked`, `seconds`
        and `version`. A check that crashes gives `holds` False and the exception's text as `error`.

    Raises:
        InputError: no entry for this paper, or one that does not follow the protocol.
    """
    from bayeslens import __version__

    entry = read_entry(_entry_path(paper, folder))
    started = time.perf_counter()
    outcome: dict[str, Any] = {"holds": False, "claim": entry.claim, "evidence": None, "control": None}
    try:
        module = _load(entry.path)
        outcome["evidence"] = _plain(module.check())
        outcome["control"] = _plain(module.check(control=True))
        outcome["holds"] = outcome["evidence"]["holds"]
    except (Exception, SystemExit) as error:  # one broken entry must not take the others with it
        outcome["error"] = f"{type(error).__name__}: {error}".strip(": ")
    seconds = round(time.perf_counter() - started, 1)
    return outcome | {"not_checked": entry.not_checked, "seconds": seconds, "version": __version__}


def run_all(
    papers: Iterable[str] | None = None,
    *,
    folder: str | Path | None = None,
    budget: float = math.inf,
    record: bool = True,
    progress: Callable[[str, dict[str, Any] | None], None] = lambda paper, result: None,
) -> dict[str, dict[str, Any]]:
    """Check the claims of several papers one after another.

    Every result is recorded in `results.json` as soon as it is there, so that an interruption loses nothing.

    Args:
        papers: ids such as `"S290"`; None takes every entry.
        folder: where the gallery is; None finds it.
        budget: seconds. An entry is left out when its last recorded duration would go over what remains.
        record: whether to write `results.json`.
        progress: called as `progress(paper, None)` when a check begins and `progress(paper, result)` when it ends.

    Returns:
        The results of those that ran, by paper id.

    Raises:
        InputError: no entry for a paper, or results that cannot be written.
    """
    folder = Path(folder) if folder is not None else _home()
    papers = list(dict.fromkeys(p.upper() for p in papers)) if papers is not None else list(entries(folder))
    for paper in papers:
        _entry_path(paper, folder)
    kept, done, started = results(folder), {}, time.perf_counter()
    for paper in papers:
        expected = kept.get(paper, {}).get("seconds", 0.0)
        if time.perf_counter() - started + expected > budget:
            continue
        progress(paper, None)
        try:
            done[paper] = run(paper, folder=folder)
        except InputError as error:
            done[paper] = {"holds": False, "error": str(error), "seconds": 0.0}
        if record:
            _record(paper, done[paper], folder)
        progress(paper, done[paper])
    return done


def draw(paper: str, path: str | Path, *, folder: str | Path | None = None) -> None:
    """Draw the picture of a gallery entry that has one into a file.

    Raises:
        InputError: no entry for this paper, or it has no picture.
    """
    module = _load(_entry_path(paper, folder))
    if not hasattr(module, "picture"):
        raise InputError(f"the entry of paper {paper.upper()} has no picture")
    module.picture(path)


def _entry_path(paper: str, folder: str | Path | None) -> Path:
    found = entries(folder)
    if paper.upper() not in found:
        raise InputError(f"the gallery has no entry for paper {paper!r}; `bayeslens gallery` lists those it has")
    return found[paper.upper()]


def _load(path: Path) -> ModuleType:
    name = f"bayeslens_gallery_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _plain(evidence: Evidence) -> dict[str, Any]:
    """Evidence as JSON can keep it; there is no NaN or infinity in JSON, so these become null."""
    holds, shown, numbers = evidence
    numbers = {str(k): float(v) for k, v in numbers.items()}
    numbers = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    return {"holds": bool(holds), "shown": str(shown), "numbers": numbers}


def _record(paper: str, result: dict[str, Any], folder: Path) -> None:
    # Read again: another run may have recorded something in the meantime.
    kept = dict(sorted((results(folder) | {paper: result}).items()))
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "results.json", lambda name: Path(name).write_text(text, encoding="utf-8"))


# What a change touches


def touched(revision: str, *, folder: str | Path | None = None) -> list[str]:
    """Papers whose check a change may have affected, and then a tenth of the rest that differs from commit to commit.

    First those whose own file changed since `revision`, then those that import a file of the library that changed
    (directly; what that file imports is not followed), then the tenth.

    Args:
        revision: any git revision; uncommitted and new files count as changed.
        folder: the gallery, inside a git checkout; None finds it.

    Raises:
        InputError: the gallery is not in a git checkout, or there is no such revision.
    """
    found = entries(folder)
    folder = Path(folder) if folder is not None else _home()
    top = Path(_git(folder, "rev-parse", "--show-toplevel"))
    names = _git(top, "diff", "--name-only", revision, "--") + "\n"
    names += _git(top, "ls-files", "--others", "--exclude-standard")
    changed = {(top / name).resolve() for name in names.splitlines() if name}
    own = [paper for paper, path in found.items() if path.resolve() in changed]
    users = [p for p, path in found.items() if p not in own and _imported_files(path) & changed]
    rest = [p for p in found if p not in own and p not in users]
    commit = _git(top, "rev-parse", "HEAD")
    rest.sort(key=lambda paper: hashlib.sha256((commit + paper).encode()).digest())
    return own + users + rest[: math.ceil(len(rest) / 10)]


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise InputError("git is not installed: name the papers to run instead") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"git {arguments[0]} in {folder}: {error.stderr.strip().splitlines()[0]}") from None
    return done.stdout.strip()


def _imported_files(path: Path) -> set[Path]:
    """The files of the library that a gallery file imports."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:
        return set()  # read_entry says so when it is run
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {_file_of(name) for name in names if name.split(".")[0] == "bayeslens"}


@functools.cache
def _file_of(name: str) -> Path:
    """The file that defines an importable name of the library.

    >>> _file_of("bayeslens.core.Table").name, _file_of("bayeslens.predict").name
    ('table.py', 'verbs.py')
    """
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        file = _PACKAGE.joinpath(*parts[:length]).with_suffix(".py")
        if file.is_file():
            return file.resolve()
    if len(parts) == 2 and (_PACKAGE / parts[0] / "__init__.py").is_file():
        # A room loads its public names lazily and lists the file of each.
        room = _PACKAGE / parts[0]
        listed = re.search(rf'"{parts[1]}": "(\w+)"', (room / "__init__.py").read_text(encoding="utf-8"))
        return (room / f"{listed[1]}.py" if listed else room / "__init__.py").resolve()
    return (_PACKAGE / "verbs.py").resolve()


# The command line


def list_entries(folder: str | Path | None = None) -> Table:
    """A table of the gallery with every entry's last measured result, for a rich console to print."""
    from rich.markup import escape
    from rich.table import Table

    kept = results(folder)
    table = Table(title="The gallery: claims of papers, checked", title_justify="left")
    for column in ("paper", "claim", "state", "measured", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for paper, path in entries(folder).items():
        result = kept.get(paper)
        seconds = f"{result['seconds']:.0f}" if result else ""
        table.add_row(paper, escape(read_entry(path).claim), state(result), escape(measured(result)), seconds)
    return table


def measured(result: dict[str, Any] | None) -> str:
    """The last measured evidence of a result in one sentence, or why there is none."""
    if result is None:
        return ""
    return f"stopped with {result['error']}" if "error" in result else result["evidence"]["shown"]


def add_commands(app: typer.Typer) -> None:
    """Add `bayeslens gallery` and its commands to the command line."""
    gallery = typer.Typer(help="Claims of papers, checked: `bayeslens gallery` lists them.")
    gallery.callback(invoke_without_command=True)(_list_command)
    gallery.command("run")(_run_command)
    gallery.command("picture")(_picture_command)
    app.add_typer(gallery, name="gallery")


def _list_command(context: typer.Context) -> None:
    """Claims of papers, checked: lists them with their last measured result."""
    if context.invoked_subcommand is None:
        from rich.console import Console

        Console().print(list_entries())


def _run_command(
    papers: Annotated[list[str] | None, typer.Argument(help="Paper ids such as S290; none means all.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Only those without a recorded result.")] = False,
    changed_since: Annotated[
        str | None,
        typer.Option(help="Check, without recording, what a change since this git revision touches."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which no further check begins.")] = math.inf,
) -> None:
    """Run checks and their controls, and record the results; ends with exit code 1 if one fails."""
    if bool(papers) + missing + (changed_since is not None) > 1:
        raise InputError("give paper ids, --missing or --changed-since, not several of them")
    before = results()
    if changed_since is not None:
        papers = touched(changed_since)
    elif missing:
        papers = [paper for paper in entries() if paper not in before]
    papers = [p.upper() for p in papers] if papers or missing or changed_since is not None else list(entries())
    # An installed package is not a place to write to: only a checkout keeps results.
    record = changed_since is None and _home().name == "gallery"
    with _narrator(before) as progress:
        done = run_all(papers, budget=budget, record=record, progress=progress)
    left = [paper for paper in papers if paper not in done]
    failed = [paper for paper, result in done.items() if failure(result, before.get(paper))]
    print(f"gallery: {len(done)} of {len(papers)} checks ran, {len(failed)} of them failed")
    if left:
        print(f"left out for lack of time: {' '.join(left)}")
    if failed:
        print(f"failed: {' '.join(failed)}")
        raise typer.Exit(1)


def _picture_command(
    paper: Annotated[str, typer.Argument(help="Paper id such as S290.")],
    path: Annotated[str, typer.Argument(help="File to draw into, such as s290.png.")],
) -> None:
    """Draw the picture of an entry that has one."""
    draw(paper, path)


def _narrator(before: dict[str, dict[str, Any]]) -> Any:
    """A context that gives a progress function: one line per finished check, and a spinner on a terminal."""
    import contextlib

    from rich.console import Console

    @contextlib.contextmanager
    def context() -> Any:
        console = Console(stderr=True)
        with console.status("") if console.is_terminal else contextlib.nullcontext() as status:

            def tell(paper: str, result: dict[str, Any] | None) -> None:
                if result is None:
                    if status is not None:
                        status.update(f"checking {paper}")
                    return
                reason = failure(result, before.get(paper))
                verdict = f"FAILED: {reason}" if reason else state(result)
                shown = "" if "error" in result else f": {measured(result)}"
                print(f"{paper} {verdict} ({result['seconds']:.1f} s){shown}", flush=True)

            yield tell

    return context()
