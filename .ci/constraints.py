"""Checks that constraints.txt and pyproject.toml pin the same tested versions.

    python .ci/constraints.py            # check
    python .ci/constraints.py --write    # take the versions of the environment in .venv, in both files

uv reads pins only from pyproject.toml, pip only from a file of its own: hence two places and this check.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
LIST = re.compile(r"^constraint-dependencies = \[\n.*?^\]\n", re.M | re.S)


def main() -> int:
    constraints, project = TOP / "constraints.txt", TOP / "pyproject.toml"
    if "--write" in sys.argv[1:]:
        command = ["uv", "pip", "freeze", "--exclude-editable", "--python", str(TOP / ".venv")]
        frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        # Only what a registry serves: nothing installed from a path or an address.
        pins = [line for line in frozen.splitlines() if re.fullmatch(r"[\w.-]+==[\w.]+", line)]
        constraints.write_text("".join(f"{pin}\n" for pin in pins))
        listed = "constraint-dependencies = [\n" + "".join(f'    "{pin}",\n' for pin in pins) + "]\n"
        project.write_text(LIST.sub(lambda _: listed, project.read_text()))
    pins = constraints.read_text().splitlines()
    if tomllib.loads(project.read_text())["tool"]["uv"]["constraint-dependencies"] != pins:
        print("constraints.txt and [tool.uv] constraint-dependencies in pyproject.toml differ:", file=sys.stderr)
        print("run `python .ci/constraints.py --write` with a .venv that passes the tests", file=sys.stderr)
        return 1
    print(f"{len(pins)} pinned versions agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
