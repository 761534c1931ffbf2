"""Every public name of every room can be had, also after the room's files were imported."""

import importlib
import pkgutil
from pathlib import Path

import pytest

import bayeslens

ROOMS = [m.name for m in pkgutil.iter_modules(bayeslens.__path__) if m.ispkg]


@pytest.mark.parametrize("room", ROOMS)
def test_public_names(room):
    package = importlib.import_module(f"bayeslens.{room}")
    files = {f.stem for f in Path(package.__file__).parent.glob("*.py")}
    # Python sets a package's attribute of the name of a submodule to the module, whatever `__getattr__` would give.
    names = getattr(package, "__all__", ())
    assert not files & set(names)
    for name in names:
        assert getattr(package, name) is not None


def test_verbs():
    for name in bayeslens.__all__:
        assert callable(getattr(bayeslens, name))
