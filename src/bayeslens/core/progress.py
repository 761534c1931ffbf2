"""A bar for long work: on a terminal only, and only after two seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

_SILENT_SECONDS = 2.0


class ProgressBar:
    """A bar that appears on a terminal after two seconds, and nowhere else.

    Args:
        name: of the work, shown at the left.
        total: steps of the work.

    >>> with ProgressBar("sampling", 10) as bar:
    ...     bar(5, "half done")
    """

    def __init__(self, name: str, total: int):
        self.name, self.total, self.begun, self.bar = name, total, time.perf_counter(), None

    def __enter__(self) -> ProgressBar:
        return self

    def __call__(self, completed: float, description: str = "") -> None:
        """Say how many steps are done, and anything else in a few words."""
        if self.bar is None:
            if time.perf_counter() - self.begun < _SILENT_SECONDS or not sys.stderr.isatty():
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self.name), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.bar.add_task("", total=self.total)
        self.bar.update(self.bar.task_ids[0], completed=completed, description=description)

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
