"""Shows the doctests of docstrings as code in the reference; Markdown would take their brackets for links."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a prompt to the next empty line.
DOCTEST = re.compile(r"^([ \t]*)>>> .*?(?=\n[ \t]*\n|\Z)", re.M | re.S)


class Doctests(griffe.Extension):
    """Puts a fence around each doctest that has none."""

    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        """Called by griffe with everything that may have a docstring."""
        if obj.docstring is not None and "```" not in obj.docstring.value:
            text = obj.docstring.value
            obj.docstring.value = DOCTEST.sub(lambda m: f"\n{m[1]}```pycon\n{m[0]}\n{m[1]}```\n", text)
