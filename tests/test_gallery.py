"""The gallery's mechanism, on small made-up entries; and that every real entry follows the protocol."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bayeslens import gallery
from bayeslens.core.errors import InputError

REAL = Path(__file__).parent.parent / "gallery"

ENTRY = '''"""A made-up claim."""

from bayeslens.gallery import Evidence
{imports}
PAPER = "{paper}"
CLAIM = "Two is more than one."
NOT_CHECKED = "Three."


def check(*, control: bool = False) -> Evidence:
    """Compare."""
    {body}
'''
BODIES = {
    "good": 'return Evidence(not control, "2 against 1", {"larger": 2, "ratio": float("inf")})',
    "not_holding": 'return Evidence(False, "1 against 2", {"larger": 1.0})',
    "bad_control": 'return Evidence(True, "2 against 2", {})',
    "crash": 'raise RuntimeError("broken on purpose")',
}


def write(folder: Path, paper: str, body: str, imports: str = "") -> Path:
    path = folder / f"{paper.lower()}_{body}.py"
    path.write_text(ENTRY.format(paper=paper, body=BODIES[body], imports=imports))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "gallery"
    folder.mkdir()
    for paper, body in zip(
        ("S001", "S002", "S003", "S004"), ("crash", "good", "not_holding", "bad_control"), strict=True
    ):
        write(folder, paper, body)
    return folder


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `bayeslens gallery …` on the made-up gallery."""
    monkeypatch.setattr(gallery, "_home", lambda: folder)
    app = typer.Typer()
    gallery.add_commands(app)
    app.command("other")(lambda: None)
    return lambda *arguments: CliRunner().invoke(app, ["gallery", *arguments])


def test_a_result_has_what_is_recorded(folder: Path):
    result = gallery.run("s002", folder=folder)
    assert set(result) == {"holds", "claim", "evidence", "control", "not_checked", "seconds", "version"}
    assert result["holds"] and not result["control"]["holds"]
    assert result["evidence"] == {"holds": True, "shown": "2 against 1", "numbers": {"larger": 2.0, "ratio": None}}
    assert not (folder / "results.json").exists()


def test_all_are_run_and_recorded_whatever_happens_to_one(folder: Path):
    told = []
    done = gallery.run_all(folder=folder, progress=lambda paper, result: told.append((paper, result is not None)))
    assert told == [(p, ended) for p in ("S001", "S002", "S003", "S004") for ended in (False, True)]
    assert json.loads((folder / "results.json").read_text()) == done == gallery.results(folder)
    assert {p: gallery.state(r) for p, r in done.items()} == {
        "S001": "not yet",
        "S002": "holds",
        "S003": "did not reproduce",
        "S004": "not yet",
    }
    assert done["S001"]["error"] == "RuntimeError: broken on purpose"
    assert [p for p, r in done.items() if gallery.failure(r)] == ["S001", "S003", "S004"]


def test_a_known_finding_is_no_failure_but_a_claim_that_held_before_is(folder: Path):
    result = gallery.run("S003", folder=folder)
    assert gallery.failure(result, before=result) == ""
    assert gallery.failure(result, before=gallery.run("S002", folder=folder)) == "the claim does not hold"


def test_an_interruption_keeps_what_is_finished(folder: Path):
    def interrupt(paper: str, result: dict | None) -> None:
        if paper == "S003":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gallery.run_all(folder=folder, progress=interrupt)
    assert list(gallery.results(folder)) == ["S001", "S002"]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_the_budget_leaves_out_what_took_too_long_last_time(folder: Path):
    slow = gallery.run("S002", folder=folder) | {"seconds": 1000.0}
    (folder / "results.json").write_text(json.dumps({"S002": slow}))
    done = gallery.run_all(["S002", "S003"], folder=folder, budget=500, record=False)
    assert list(done) == ["S003"]
    assert list(gallery.results(folder)) == ["S002"]


def test_a_file_that_does_not_follow_the_protocol_is_an_error_of_its_own(folder: Path):
    path = write(folder, "S005", "good")
    path.write_text(path.read_text().replace("CLAIM", "BOAST"))
    with pytest.raises(InputError, match="no constant CLAIM"):
        gallery.run("S005", folder=folder)
    assert "no constant CLAIM" in gallery.run_all(["S005"], folder=folder)["S005"]["error"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"""A made-up claim."""', "", "no docstring"),
        ('PAPER = "S002"', 'PAPER = "S003"', "does not go with its name"),
        ('CLAIM = "Two', 'CLAIM = = "Two', "not valid Python"),
        ('NOT_CHECKED = "Three."', "NOT_CHECKED = None", "no constant NOT_CHECKED"),
        ("*, control: bool = False", "control: bool = False", "no function check"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(folder: Path, old: str, new: str, message: str):
    path = folder / "s002_good.py"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        gallery.read_entry(path)


def test_bad_input(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no entry for paper 'S999'"):
        gallery.run_all(["S002", "S999"], folder=folder)
    assert not (folder / "results.json").exists()
    with pytest.raises(InputError, match="no gallery in"):
        gallery.entries(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no picture"):
        gallery.draw("S002", tmp_path / "s002.png", folder=folder)
    write(folder, "S002", "bad_control")
    with pytest.raises(InputError, match="both about paper S002"):
        gallery.entries(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        gallery.results(folder)


def test_a_picture_is_drawn_where_there_is_one(folder: Path, tmp_path: Path):
    path = folder / "s002_good.py"
    path.write_text(path.read_text() + "\n\ndef picture(path):\n    open(path, 'w').write('drawn')\n")
    gallery.draw("S002", tmp_path / "s002.png", folder=folder)
    assert (tmp_path / "s002.png").read_text() == "drawn"


def git(top: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(top), *identity, *arguments], check=True, capture_output=True)


def test_a_change_touches_its_own_entries_then_users_then_a_tenth(folder: Path, monkeypatch: pytest.MonkeyPatch):
    top = folder.parent
    for number in range(10, 30):
        write(folder, f"S0{number}", "good")
    write(folder, "S050", "good", imports="from bayeslens.core import Table\n")
    (top / "room").mkdir()
    library = top / "room" / "table.py"
    library.touch()
    git(top, "init")
    git(top, "add", ".")
    git(top, "commit", "-m", "first")
    assert len(gallery.touched("HEAD", folder=folder)) == 3  # a tenth of 25, and nothing else
    write(folder, "S060", "good")
    (folder / "s011_good.py").write_text("# broken(")
    library.write_text("# changed")
    monkeypatch.setattr(gallery, "_file_of", lambda name: library if name == "bayeslens.core.Table" else top)
    chosen = gallery.touched("HEAD", folder=folder)
    assert chosen[:3] == ["S011", "S060", "S050"]
    assert len(chosen) == 3 + 3 == len(set(chosen))
    assert chosen == gallery.touched("HEAD", folder=folder)
    with pytest.raises(InputError, match="git diff"):
        gallery.touched("no-such-revision", folder=folder)


def test_outside_git_a_change_cannot_be_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent.parent))
    with pytest.raises(InputError, match="git rev-parse"):
        gallery.touched("HEAD", folder=folder)


def test_the_commands(command, folder: Path):
    failed = command("run")
    assert failed.exit_code == 1
    assert "S002 holds" in failed.output and "2 against 1" in failed.output
    assert "failed: S001 S003 S004" in failed.output
    assert command("run", "s003").exit_code == 0  # on record by now
    assert command("run", "S002", "S003").exit_code == 0
    assert "0 of 0 checks ran" in command("run", "--missing").output
    listed = command()
    assert listed.exit_code == 0 and "did not" in listed.output
    assert isinstance(command("run", "S999").exception, InputError)
    assert isinstance(command("run", "S002", "--missing").exception, InputError)
    assert "1 of 1 checks ran, 0 of them failed" in command("run", "S002", "--budget", "100").output
    assert "left out for lack of time: S002" in command("run", "S002", "--budget=-1").output


def test_an_installed_copy_is_found_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "site-packages" / "bayeslens"
    (package / "gallery_entries").mkdir(parents=True)
    write(package / "gallery_entries", "S002", "good")
    monkeypatch.setattr(gallery, "_PACKAGE", package)
    assert list(gallery.entries()) == ["S002"]


def papers() -> dict[str, dict[str, str]]:
    with (REAL / "papers.csv").open(encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("path", sorted(REAL.glob("s*.py")), ids=lambda path: path.stem)
def test_every_entry_follows_the_protocol(path: Path):
    entry = gallery.read_entry(path)
    assert entry.paper in papers()
    # One process runs many entries: what an entry changes for all, the next one would meet.
    assert "config.update" not in path.read_text(encoding="utf-8")


def test_the_gallery_is_found_and_its_papers_and_results_are_known():
    assert len(papers()) == 474
    assert {p.stem for p in REAL.glob("s*.py")} == {p.stem for p in gallery.entries().values()}
    assert set(gallery.results()) <= set(gallery.entries())
