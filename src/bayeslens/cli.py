"""The command line: every command takes the same arguments as the verb of its name."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turns your table, model or simulator into probabilities you can check and act on.",
)


def main() -> None:
    """Run the command line: bad input ends with exit code 2 and one sentence, Ctrl-C with 130."""
    from bayeslens.core.errors import InputError

    _use_compilation_cache()
    from bayeslens.gallery import add_commands

    add_commands(app)
    try:
        app()
    except InputError as error:
        print(f"bayeslens: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bayeslens: interrupted", file=sys.stderr)
        sys.exit(130)


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs; set through the environment, so that jax is not imported here."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "bayeslens", "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


@app.callback()
def _root() -> None:
    """Turns your table, model or simulator into probabilities you can check and act on."""


@app.command()
def predict(
    train: Annotated[str | None, typer.Argument(help="CSV or Parquet table to learn from.")] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict.")] = None,
    test: Annotated[str | None, typer.Option(help="Table to predict; default: a held-out fifth.")] = None,
    task: Annotated[str, typer.Option(help="auto, regression or classification.")] = "auto",
    learner: Annotated[str, typer.Option(help="auto, or the name of a learner.")] = "auto",
    coverage: Annotated[float, typer.Option(help="Coverage of intervals and sets.")] = 0.9,
    above: Annotated[list[float] | None, typer.Option(help="Add the probability of exceeding this.")] = None,
    groups: Annotated[str | None, typer.Option(help="Column whose groups are never split.")] = None,
    time: Annotated[str | None, typer.Option(help="Column whose order every split respects.")] = None,
    weights: Annotated[str | None, typer.Option(help="Column of row weights.")] = None,
    out: Annotated[str | None, typer.Option(help="Predictions, as CSV (default: predictions.csv).")] = None,
    report: Annotated[str | None, typer.Option(help="Self-contained HTML report (default: report.html).")] = None,
    save: Annotated[str | None, typer.Option(help="Where to keep the model (.bayes).")] = None,
    load: Annotated[str | None, typer.Option(help="Model to predict with, instead of training.")] = None,
    time_budget: Annotated[float, typer.Option(help="Seconds after which no further learner is tried.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """An honest probability for every row of a table: files, a leaderboard, a report."""
    from bayeslens import verbs

    with _progress(quiet=as_json) as progress:
        prediction = verbs.predict(
            train,
            target,
            test=test,
            task=task,
            learner=learner,
            coverage=coverage,
            above=tuple(above or ()),
            groups=groups,
            time=time,
            weights=weights,
            out=out or "predictions.csv",
            report=report or (None if as_json else "report.html"),
            save=save,
            load=load,
            time_budget=time_budget,
            seed=seed,
            progress=progress,
        )
    if as_json:
        print(json.dumps(_finite(prediction.summary())))
    else:
        _print_prediction(prediction)


@app.command()
def check(
    predictions: Annotated[str, typer.Argument(help="CSV or Parquet table of predictions beside what happened.")],
    target: Annotated[str | None, typer.Option(help="Column with what happened.")] = None,
    probability: Annotated[
        list[str] | None, typer.Option(help="COLUMN of the second of two classes, or LABEL=COLUMN for each class.")
    ] = None,
    quantile: Annotated[list[str] | None, typer.Option(help="LEVEL=COLUMN for each quantile, such as 0.1=low.")] = None,
    samples: Annotated[str | None, typer.Option(help="How the names of columns of draws begin.")] = None,
    coverage: Annotated[float, typer.Option(help="What intervals and sets in the table promise.")] = 0.9,
    groups: Annotated[str | None, typer.Option(help="Column whose groups of rows may depend on each other.")] = None,
    time: Annotated[str | None, typer.Option(help="Column whose order makes the rows a series.")] = None,
    report: Annotated[str | None, typer.Option(help="Self-contained HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Whether predictions made by any program are what they say: a verdict, every score, a report."""
    from bayeslens import verbs

    with _progress(quiet=as_json) as progress:
        progress("checking")
        found = verbs.check(
            predictions,
            target,
            probability=tuple(probability or ()),
            quantiles=tuple(quantile or ()),
            samples=samples,
            coverage=coverage,
            groups=groups,
            time=time,
            report=report,
        )
    if as_json:
        print(json.dumps(_finite(found.summary())))
    else:
        _print_audit(found)


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="The model, as MODEL.py:function.")],
    data: Annotated[str, typer.Argument(help="JSON file: the model's arguments by name.")],
    engine: Annotated[str, typer.Option(help="auto, or the name of an engine.")] = "auto",
    out: Annotated[str | None, typer.Option(help="Draws, as netCDF for ArviZ (.nc) or as .bayes.")] = None,
    report: Annotated[str | None, typer.Option(help="Self-contained HTML report.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """The posterior of a NumPyro model: a plan, a summary, and whether to trust it."""
    import jax

    from bayeslens import verbs
    from bayeslens.core.files import check_writable, load_function, read_arguments, write_posterior

    for path in (out, report):
        if path is not None:
            check_writable(path)
    with _progress(quiet=as_json) as progress:
        progress("reading")
        function, arguments = load_function(model), read_arguments(data)
        progress("inferring")
        posterior = verbs.infer(function, arguments, key=jax.random.key(seed), engine=engine)
    files = {}
    if out is not None:
        write_posterior(posterior, out)
        files["out"] = out
    if report is not None:
        from bayeslens.report import write_report

        write_report(posterior, report)
        files["report"] = report
    if as_json:
        print(json.dumps(_finite(_posterior_summary(posterior) | {"files": files})))
    else:
        _print_posterior(posterior, files)


def _posterior_summary(posterior: Any) -> dict[str, Any]:
    table = posterior.summary()
    return {
        "engine": posterior.engine,
        "plan": None if posterior.plan is None else [dataclasses.asdict(site) for site in posterior.plan.sites],
        "summary": {name: dict(row) for name, row in table.iterrows()},
        "log_evidence": posterior.log_evidence,
        "log_evidence_error": posterior.log_evidence_error,
        "log_evidence_bound": posterior.log_evidence_bound,
        "k_hat": posterior.k_hat,
        "warnings": list(posterior.warnings),
        "settings": posterior.settings,
        "versions": posterior.versions,
    }


@app.command()
def show(file: Annotated[str, typer.Argument(help="A .bayes file.")]) -> None:
    """What a saved file holds."""
    from bayeslens import verbs

    print(verbs.show(file))


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _progress(*, quiet: bool) -> Any:
    """A context that gives a function to report what is running: a spinner on a terminal, nothing elsewhere."""
    import contextlib

    @contextlib.contextmanager
    def context() -> Any:
        if quiet or not sys.stderr.isatty():
            yield lambda message: None
            return
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("reading")
            yield lambda message: bar.update(task, description=message)

    return context()


_COLUMNS = {
    "log_score": ("log score ↑", ".3f"),
    "crps": ("CRPS ↓", ".4g"),
    "brier": ("Brier ↓", ".4f"),
    "coverage": ("coverage", ".1%"),
    "width": ("width ↓", ".4g"),
    "set_size": ("set size ↓", ".2f"),
    "weight": ("weight", ".2f"),
    "seconds": ("seconds", ".1f"),
}


def _print_prediction(prediction: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for warning in prediction.warnings:
        console.print(f"[yellow]note[/] {escape(warning)}", highlight=False)
    title = f"Learners for {escape(prediction.target)}, by cross-validated log score"
    board = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    board.add_column("learner", no_wrap=True)
    shown = [c for c in _COLUMNS if any(c in e for e in prediction.leaderboard)]
    for column in shown:
        board.add_column(_COLUMNS[column][0], justify="right")
    for entry in prediction.leaderboard:
        if "log_score" in entry:
            cells = [format(entry[c], _COLUMNS[c][1]) if c in entry else "" for c in shown]
            board.add_row(escape(entry["learner"]), *cells)
    console.print(board)
    for entry in prediction.leaderboard:
        if entry["note"]:
            console.print(f"{entry['learner']}: {entry['note']}", highlight=False, markup=False)
    metrics = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in prediction.metrics.items())
    source = "test rows" if prediction.metrics_from == "test" else "cross-validation"
    console.print(f"{prediction.learner}: from {source}: {metrics}", highlight=False, markup=False)
    console.print(
        f"trained on {prediction.n_train} rows, predicted {prediction.n_test} rows in {prediction.seconds:.1f} s",
        highlight=False,
    )
    for role, path in prediction.files.items():
        console.print(f"{role}: {path}", highlight=False, markup=False)


def _print_audit(found: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"{found.target}: {found.rows} rows; {found.source}", highlight=False, markup=False)
    for finding in found.findings:
        mark = {True: "[green]ok[/]  ", False: "[red]no[/]  ", None: "    "}[finding.is_good]
        console.print(f"{mark}{escape(finding.sentence)}", highlight=False)
    console.print(f"[bold]{escape(found.advice)}[/]", highlight=False)
    scores = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("score", "value", "standard error", "better"):
        scores.add_column(column, justify="left" if column in ("score", "better") else "right")
    for row in found.scores.scores:
        scores.add_row(row.name.replace("_", " "), f"{row.value:.4g}", f"{row.standard_error:.2g}", row.better)
    console.print(scores)
    if found.stated:
        claims = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("as written", "promised", "observed", "standard error", "p value"):
            claims.add_column(column, justify="left" if column == "as written" else "right")
        for claim in found.stated:
            rates = (f"{rate:.1%}" for rate in (claim.promised, claim.observed, claim.standard_error))
            claims.add_row(escape(claim.name), *rates, f"{claim.p_value:.2g}")
        console.print(claims)
    if len(found.claims) > len(found.stated):
        console.print(f"and {len(found.claims) - len(found.stated)} quantiles: see --report or --json", highlight=False)
    for role, path in found.files.items():
        console.print(f"{role}: {path}", highlight=False, markup=False)


_MOST_ROWS = 40  # of a summary on a terminal; files have them all


def _print_posterior(posterior: Any, files: dict[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if posterior.plan is not None:
        console.print(str(posterior.plan), highlight=False, markup=False)
    summary = posterior.summary()
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("site", no_wrap=True)
    for column in summary.columns:
        shown.add_column(column.replace("_", " "), justify="right")
    for name, row in summary.head(_MOST_ROWS).iterrows():
        shown.add_row(escape(str(name)), *(_figure(c, v) for c, v in row.items()))
    console.print(shown)
    if len(summary) > _MOST_ROWS:
        console.print(f"and {len(summary) - _MOST_ROWS} more rows", highlight=False)
    if posterior.log_evidence is not None:
        error = "" if posterior.log_evidence_error is None else f" ± {float(posterior.log_evidence_error):.2g}"
        console.print(f"log evidence {float(posterior.log_evidence):.4f}{error} nats", highlight=False)
    if posterior.log_evidence_bound is not None:
        console.print(f"log evidence at least {float(posterior.log_evidence_bound):.4f} nats", highlight=False)
    for warning in posterior.warnings:
        console.print(f"[yellow]do not trust this yet[/] {escape(warning)}", highlight=False)
    for role, path in files.items():
        console.print(f"{role}: {path}", highlight=False, markup=False)


def _figure(column: str, value: float) -> str:
    if value != value:
        return ""
    return f"{value:.0f}" if column.startswith("ess") else f"{value:.3f}" if column == "r_hat" else f"{value:.4g}"


if __name__ == "__main__":
    main()
