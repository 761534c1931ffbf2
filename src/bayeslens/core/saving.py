"""Saving, loading and showing nouns: one checksummed, versioned `.bayes` file, without pickle.

A noun is described as a tree in JSON, and its arrays are named by attribute path; `core.container` writes both to
one file. Loading runs no code that a file could choose: classes come from this package, from `equinox.nn` or from
`register`, and are filled field by field, without their `__init__`.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bayeslens.core.container import PLAIN_KINDS, open_container, read_array, understood, write_container
from bayeslens.core.errors import InputError

_MODULE = re.compile(r"bayeslens(\.[a-z][a-z0-9_]*)*")
_REGISTERED: dict[str, Any] = {}  # classes and functions from outside this package, by name
_NAMES: dict[Any, str] = {}


def register(name: str) -> Callable:
    """Make a dataclass, an Equinox module or a function of your own known to `save` and `load`, under a fixed name.

    Whoever loads the file must have imported the module that registers the name.

    >>> @register("example.double")
    ... def double(x):
    ...     return 2 * x

    Raises:
        InputError: the name is taken by something else, or holds a colon.
    """

    def remember(thing: Any) -> Any:
        known = _REGISTERED.get(name, thing)
        if isinstance(thing, type) and not dataclasses.is_dataclass(thing):
            raise InputError(f"{thing.__name__} cannot be registered: make it a dataclass or an Equinox module")
        if ":" in name or (known.__module__, known.__qualname__) != (thing.__module__, thing.__qualname__):
            raise InputError(f"{name!r} cannot be registered: it is taken, or has a colon in it; choose another name")
        _REGISTERED[name], _NAMES[thing] = thing, name
        return thing

    return remember


def save(noun: Any, path: str | os.PathLike) -> None:
    """Save a noun to a `.bayes` file: all of it, or nothing.

    Args:
        noun: a predictive, learner, posterior, table, distribution, network, or a list, tuple or dict of these, of
            arrays, keys and plain values. Of Equinox modules that are neither this package's nor registered only the
            numbers are saved: `load` then wants such a module, built anew, as `model`.
        path: the file; one that exists is replaced.

    Raises:
        InputError: something in it cannot be saved, or the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"mu": np.arange(3.0)}, folder + "/numbers.bayes")
    ...     load(folder + "/numbers.bayes")
    {'mu': array([0., 1., 2.])}
    """
    arrays: dict[str, np.ndarray] = {}
    root = _tree(noun, arrays, strict=True)
    write_container(path, {"root": root}, arrays)


def load(path: str | os.PathLike, model: Any = None) -> Any:
    """Load what `save` wrote.

    Args:
        path: a `.bayes` file.
        model: what the file does not hold because it is code: the NumPyro model of a posterior, or Equinox modules of
            another library, built anew, whose numbers are then replaced by the saved ones.

    Raises:
        InputError: the file is missing, not a `.bayes` file, damaged, made by a newer version, holds a class that is
            not known here, or needs `model`.
    """
    with open_container(path) as (manifest, archive):
        return understood(path, lambda: _Decoder(archive, model)(manifest["root"]))


def show(noun: Any) -> str:
    """What a noun or a `.bayes` file holds, a line per field.

    >>> print(show({"mu": np.arange(3.0), "note": "a test"}))
    dict of 2
      mu: float64 (3,)
      note: 'a test'

    Raises:
        InputError: the file cannot be read; see `load`.
    """
    if not isinstance(noun, str | os.PathLike):
        return "\n".join(_describe(_tree(noun, {}, strict=False)))
    with open_container(noun) as (manifest, archive):
        lines = understood(noun, lambda: _describe(manifest["root"]))
        size, count = sum(i.file_size for i in archive.infolist()), len(archive.infolist()) - 1
        version = manifest.get("bayeslens")
        lines.insert(0, f"{Path(noun).name}: saved by bayeslens {version}, {size:,} bytes, {count} arrays")
    return "\n".join(lines)


def _tree(noun: Any, arrays: dict[str, np.ndarray], *, strict: bool) -> Any:
    try:
        return _encode(noun, (), arrays, strict)
    except RecursionError:
        said = f"a {type(noun).__name__} that contains itself, or is nested too deeply, cannot be saved"
        raise InputError(said) from None


def _encode(noun: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray], strict: bool) -> Any:
    """The noun as JSON; its arrays are added to `arrays` by attribute path."""

    def inner(value: Any, name: Any) -> Any:
        return _encode(value, (*path, str(name)), arrays, strict)

    kind = type(noun)
    if noun is None or kind in (bool, int, str):
        return noun
    if kind is float:
        return noun if math.isfinite(noun) else {"is": "float", "value": repr(noun)}
    if kind is list:
        return [inner(v, i) for i, v in enumerate(noun)]
    if kind is tuple:
        return {"is": "tuple", "of": [inner(v, i) for i, v in enumerate(noun)]}
    if kind is dict:
        return {"is": "dict", "of": [[inner(k, "key"), inner(v, k)] for k, v in noun.items()]}
    if kind in (datetime.date, datetime.datetime) and getattr(noun, "tzinfo", None) is None:
        return {"is": kind.__name__, "value": noun.isoformat()}
    if isinstance(noun, np.generic):
        return {"is": "scalar", "of": inner(np.asarray(noun), "value")}
    if isinstance(noun, np.ndarray) and not isinstance(noun, np.ma.MaskedArray):
        if noun.dtype == object:
            return {"is": "objects", "shape": list(noun.shape), "of": [inner(v, i) for i, v in enumerate(noun.flat)]}
        return _encode_array(noun, path, arrays, strict, "array")
    for encode in (_encode_of_pandas, _encode_of_jax, _encode_object):
        node = encode(noun, path, arrays, strict, inner)
        if node is not None:
            return node
    if not strict:
        return {"is": "unknown", "type": kind.__name__}
    what = f"the function {getattr(noun, '__name__', noun)!r}" if callable(noun) else f"a {_name(kind)}"
    cure = "use a named one such as jax.nn.relu, or register it" if callable(noun) else "register its class"
    raise InputError(f"{_where(path)} is {what}, which cannot be saved: {cure} with bayeslens.core.saving.register")


def _where(path: tuple[str, ...]) -> str:
    return f"the attribute {'.'.join(path)}" if path else "this"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _encode_array(noun: Any, path: tuple, arrays: dict, strict: bool, kind: str) -> dict:
    array = np.asarray(noun)
    extended = _extended_dtype(array.dtype.name) is not None
    plain = array.dtype.kind in PLAIN_KINDS and array.dtype.itemsize > 0 and not extended
    if not plain and not extended and strict:
        raise InputError(f"{_where(path)} is an array of type {array.dtype}, which cannot be saved: use plain numbers")
    name = stem = re.sub(r"[^A-Za-z0-9_.-]", "_", ".".join(path) or "array")[:200]
    while name in arrays:
        name = f"{stem}~{len(arrays)}"
    # bfloat16 and its kin are unknown to .npy files: their bits are stored, their type is named.
    arrays[name] = array.view(f"u{array.dtype.itemsize}") if extended else array
    dtype = array.dtype.str if plain else array.dtype.name
    return {"is": kind, "name": name, "dtype": dtype, "shape": list(array.shape)}


def _extended_dtype(name: str) -> np.dtype | None:
    import ml_dtypes

    known = getattr(ml_dtypes, name, None) if re.fullmatch(r"(bfloat|float|int|uint)\w*", name) else None
    return np.dtype(known) if isinstance(known, type) and issubclass(known, np.generic) else None


def _encode_of_pandas(noun: Any, path: tuple, arrays: dict, strict: bool, inner: Callable) -> dict | None:
    pd = sys.modules.get("pandas")
    if pd is None:
        return None
    if isinstance(noun, pd.Timestamp):
        zone = None if noun.tz is None else str(noun.tz)
        return {"is": "timestamp", "of": inner(np.asarray(noun.to_datetime64()), "value"), "zone": zone}
    if isinstance(noun, pd.Interval):
        return {"is": "interval", "of": [inner(noun.left, "left"), inner(noun.right, "right")], "closed": noun.closed}
    return None


def _encode_of_jax(noun: Any, path: tuple, arrays: dict, strict: bool, inner: Callable) -> dict | None:
    import jax

    if isinstance(noun, jax.core.Tracer):
        raise InputError(f"{_where(path)} is being traced: save outside of jax.jit")
    if isinstance(noun, jax.Array):
        if jax.dtypes.issubdtype(noun.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(noun))
            return {"is": "key", "implementation": str(jax.random.key_impl(noun)), "of": inner(data, "key_data")}
        return _encode_array(noun, path, arrays, strict, "jax")
    if callable(noun):
        name = next((n for n, f in _functions().items() if f is noun), None)
        return None if name is None else {"is": "function", "name": name}
    return None


def _functions() -> dict[str, Any]:
    """Functions that a network may hold, by name."""
    import inspect

    import equinox as eqx
    import jax
    import jax.numpy as jnp

    activations = ("relu relu6 sigmoid softplus soft_sign silu log_sigmoid leaky_relu hard_sigmoid hard_silu hard_tanh "
                   "elu celu selu gelu glu squareplus mish softmax log_softmax standardize identity")  # fmt: skip
    found = {f"jax.nn.{n}": getattr(jax.nn, n) for n in activations.split()}
    plain = ("tanh", "sin", "cos", "exp", "expm1", "log", "log1p", "abs", "square", "sqrt")
    found |= {f"jax.numpy.{n}": getattr(jnp, n) for n in plain}
    found |= {f"jax.lax.{n}": getattr(jax.lax, n) for n in ("tanh", "exp", "logistic")}
    for module in (eqx.nn.MLP, eqx.nn.GRUCell):
        for parameter in inspect.signature(module).parameters.values():
            if inspect.isfunction(parameter.default):
                found[f"{module.__name__}.{parameter.name}"] = parameter.default
    return found | {n: f for n, f in _REGISTERED.items() if not isinstance(f, type)}


def _encode_object(noun: Any, path: tuple, arrays: dict, strict: bool, inner: Callable) -> dict | None:
    import equinox as eqx
    from numpyro.distributions import Distribution

    from bayeslens.core.distribution import FAMILIES, Parts, take_apart

    kind = type(noun)
    if (reason := getattr(noun, "not_savable", None)) and strict:
        raise InputError(f"a {kind.__name__} cannot be saved: {reason}")
    name = _NAMES.get(kind) or _constructor(kind)
    if isinstance(noun, Distribution):
        if hasattr(noun, "saved_fields"):
            # It holds networks: what is shared by all rows is stored once.
            saved = {n: inner(v, n) for n, v in noun.saved_fields().items()}
            return {"is": "density", "family": kind.__module__, "class": kind.__name__, "fields": saved}
        try:
            return {"is": "distribution", "parts": inner(take_apart(noun), "parts")}
        except InputError:
            if strict:
                raise
            return {"is": "unknown", "type": kind.__name__}
    if name is None:
        return _encode_numbers(noun, inner) if isinstance(noun, eqx.Module) else None
    caller = getattr(kind, "from_caller", ())
    fields = {}
    for field in dataclasses.fields(noun):
        if not hasattr(noun, field.name):
            raise InputError(f"a {kind.__name__} whose field {field.name!r} was never set cannot be saved")
        value = getattr(noun, field.name)
        fields[field.name] = {"is": "caller"} if field.name in caller else inner(value, field.name)
    node = {"is": "object", "class": name, "fields": fields}
    if kind is Parts and noun.family in FAMILIES:
        node["family"] = FAMILIES[noun.family].__module__  # imported before the distribution is put together
    return node


def _constructor(cls: type) -> str | None:
    """The name under which a class of this package or of `equinox.nn` is saved; None for others."""
    import equinox as eqx

    if not dataclasses.is_dataclass(cls):
        return None
    if _MODULE.fullmatch(cls.__module__) and "<" not in cls.__qualname__:
        return f"{cls.__module__}:{cls.__qualname__}"
    stateful = (eqx.nn.State, eqx.nn.StateIndex, eqx.nn.Shared)
    if getattr(eqx.nn, cls.__name__, None) is cls and cls not in stateful:
        return f"equinox.nn:{cls.__name__}"
    return None


def _numbers(module: Any) -> dict[str, Any]:
    """Arrays and plain numbers of a module, by path."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    return {jax.tree_util.keystr(p): v for p, v in leaves if isinstance(v, jax.Array | np.ndarray | bool | int | float)}


def _encode_numbers(noun: Any, inner: Callable) -> dict:
    """A module of unknown code: only its numbers."""
    return {"is": "numbers", "class": _name(type(noun)), "of": [[n, inner(v, n)] for n, v in _numbers(noun).items()]}


class _Decoder:
    """Builds a noun from its tree; `model` gives what the file does not hold."""

    def __init__(self, archive: zipfile.ZipFile, model: Any):
        self.archive, self.model = archive, model
        self.filled = 0  # modules of the caller that have got their numbers
        self.readers: dict[str, Callable[[dict], Any]] = {
            "float": lambda node: float(node["value"]),
            "tuple": lambda node: tuple(self(node["of"])),
            "dict": lambda node: dict(self(node["of"])),
            "date": lambda node: datetime.date.fromisoformat(node["value"]),
            "datetime": lambda node: datetime.datetime.fromisoformat(node["value"]),
            "scalar": lambda node: self(node["of"])[()],
            "caller": lambda node: self.model,
            "objects": self.objects,
            "array": self.array,
            "jax": self.jax_array,
            "key": self.key,
            "timestamp": self.timestamp,
            "interval": self.interval,
            "function": self.function,
            "distribution": self.distribution,
            "density": self.density,
            "object": self.noun,
            "numbers": self.numbers,
        }

    def __call__(self, node: Any) -> Any:
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, list):
            return [self(n) for n in node]
        if node["is"] not in self.readers:
            raise InputError(f"it holds a {node['is']!r}, which this version does not know: upgrade bayeslens")
        return self.readers[node["is"]](node)

    def objects(self, node: dict) -> np.ndarray:
        array = np.empty(len(node["of"]), object)
        for i, value in enumerate(node["of"]):
            array[i] = self(value)
        return array.reshape(node["shape"])

    def array(self, node: dict) -> np.ndarray:
        array = read_array(self.archive, node["name"])
        if node["dtype"][0] in "<>|=":
            return array
        extended = _extended_dtype(node["dtype"])
        if extended is None:
            raise InputError(f"its array {node['name']} has the unknown type {node['dtype']!r}")
        return array.view(extended)

    def jax_array(self, node: dict) -> Any:
        import jax
        import jax.numpy as jnp

        array = self.array(node)
        # Without x64, JAX would halve the precision in silence: such an array stays NumPy's.
        return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array

    def key(self, node: dict) -> Any:
        import jax

        return jax.random.wrap_key_data(self(node["of"]), impl=node["implementation"])

    def timestamp(self, node: dict) -> Any:
        import pandas as pd

        value = pd.Timestamp(self(node["of"])[()])
        return value if node["zone"] is None else value.tz_localize("UTC").tz_convert(node["zone"])

    def interval(self, node: dict) -> Any:
        import pandas as pd

        return pd.Interval(*self(node["of"]), closed=node["closed"])

    def function(self, node: dict) -> Callable:
        functions = _functions()
        if node["name"] not in functions:
            raise InputError(f"it holds the function {node['name']!r}: import the module that registers it")
        return functions[node["name"]]

    def distribution(self, node: dict) -> Any:
        from bayeslens.core.distribution import put_together

        return put_together(self(node["parts"]))

    def density(self, node: dict) -> Any:
        from bayeslens.core.distribution import FAMILIES

        if _MODULE.fullmatch(node["family"]):
            importlib.import_module(node["family"])
        family = FAMILIES.get(node["class"])
        if not hasattr(family, "saved_fields"):
            raise InputError(f"it holds a {node['class']!r}, which is not known here: import what registers it")
        return family(**{n: self(v) for n, v in node["fields"].items()})

    def noun(self, node: dict) -> Any:
        if "family" in node and _MODULE.fullmatch(node["family"]):
            importlib.import_module(node["family"])
        cls = _class_of(node["class"])
        odd = {f.name for f in dataclasses.fields(cls)} ^ set(node["fields"])
        if odd:
            raise InputError(f"its {cls.__name__} was made by another version of bayeslens, differing in {sorted(odd)}")
        noun = object.__new__(cls)
        for name, value in node["fields"].items():
            object.__setattr__(noun, name, self(value))
        return noun

    def numbers(self, node: dict) -> Any:
        """The caller's module with the saved numbers in it."""
        import jax

        def is_it(tree: Any) -> bool:
            return _name(type(tree)) == node["class"]

        found = [m for m in jax.tree.leaves(self.model, is_leaf=is_it) if is_it(m)]
        if self.filled >= len(found):
            raise InputError(
                f"it holds the numbers of a {node['class']}, but not its code: give load one built anew, as model"
            )
        module, self.filled = found[self.filled], self.filled + 1
        saved, own = dict(self(node["of"])), _numbers(module)
        shapes, own_shapes = ({n: np.shape(v) for n, v in d.items()} for d in (saved, own))
        if shapes != own_shapes:
            odd = sorted(n for n in shapes | own_shapes if shapes.get(n) != own_shapes.get(n))[:3]
            raise InputError(f"the {node['class']} given as model differs from the saved one in shape, at {odd}")
        leaves, structure = jax.tree_util.tree_flatten_with_path(module)
        return structure.unflatten(saved.get(jax.tree_util.keystr(p), leaf) for p, leaf in leaves)


def _class_of(name: str) -> type:
    """A class that may be loaded, by the name it was saved under.

    >>> _class_of("bayeslens.core.table:Table").__name__
    'Table'
    """
    found = _REGISTERED.get(name)
    module, _, qualified = name.partition(":")
    if found is None and (module == "equinox.nn" or _MODULE.fullmatch(module)):
        try:
            found = importlib.import_module(module)
            for part in qualified.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            found = None
    # What is reached through a module's imports keeps its own name, and is refused.
    if not isinstance(found, type) or (name not in _REGISTERED and _constructor(found) != name):
        cure = "upgrade bayeslens" if ":" in name else "import the module that registers it"
        raise InputError(f"it holds a {name!r}, which is not known here: {cure}")
    return found


def _describe(node: Any, depth: int = 0) -> list[str]:
    """A line on a node, and lines for what is in it, two levels deep."""
    title, inside = _summary(node)
    lines = [title]
    for name, child in inside if depth < 2 else ():
        first, *more = _describe(child, depth + 1)
        lines += [f"  {name}: {first}", *(f"  {line}" for line in more)]
    return lines


def _summary(node: Any) -> tuple[str, list[tuple[Any, Any]]]:
    if not isinstance(node, dict | list):
        text = repr(node)
        return (text if len(text) <= 60 else f"{text[:57]}..."), []
    if isinstance(node, list):
        return f"list of {len(node)}", []
    match node["is"]:
        case "array" | "jax":
            dtype = node["dtype"]
            return f"{np.dtype(dtype).name if dtype[0] in '<>|=' else dtype} {tuple(node['shape'])}", []
        case "object" | "numbers" | "density":
            return re.split(r"[:.]", node["class"])[-1], list(node.get("fields", {}).items())
        case "distribution":
            fields = node["parts"]["fields"]
            return f"{fields['family']} distribution", list(_pairs(fields["arrays"]))
        case "dict":
            return f"dict of {len(node['of'])}", list(_pairs(node))
        case "tuple":
            return f"tuple of {len(node['of'])}", []
        case "function":
            return node["name"], []
        case "float":
            return node["value"], []
        case "unknown":
            return f"{node['type']} (cannot be saved)", []
        case "caller":
            return "given to load as model", []
        case other:
            return other, []


def _pairs(node: dict) -> Iterator[tuple[Any, Any]]:
    for key, value in node["of"]:
        yield (key if isinstance(key, str) else _summary(key)[0]), value
