"""Round trips of everything that can be saved; damaged, foreign and newer files; refusals; all of it or nothing."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import zipfile
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import pytest

from bayeslens.core import container
from bayeslens.core.conjugate import NormalInverseGamma
from bayeslens.core.distribution import take_apart
from bayeslens.core.errors import InputError
from bayeslens.core.foreign import EstimatorPredictive, FixedPredictive
from bayeslens.core.mixture import Members, Mixture
from bayeslens.core.saving import load, register, save, show
from bayeslens.core.table import Table, Target
from bayeslens.core.transformed import Dequantized, QuantileDistribution, Recalibrated

KEY = jax.random.key(0)


@register("tests.Slope")
class Slope(eqx.Module):
    weight: Any
    unit: str = eqx.field(static=True, default="m")

    def __init__(self, weight: Any, unit: str = "m"):
        assert weight is not None, "loading must not call this"
        self.weight, self.unit = weight, unit


@register("tests.halve")
def halve(x: Any) -> Any:
    return x / 2


@register("tests.Labelled")
class Labelled(eqx.Module):
    classes: tuple


class Unregistered(eqx.Module):
    """A network of a user's: its code is not saved."""

    layer: eqx.nn.Linear
    bias: float
    activation: Any


def same(a: Any, b: Any) -> bool:
    """Whether two nouns are equal: types, structure, types of arrays, and bits."""
    if type(a) is not type(b) and not (isinstance(a, jax.Array) and isinstance(b, jax.Array)):
        return False
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return a.dtype == b.dtype and bool((jax.random.key_data(a) == jax.random.key_data(b)).all())
    if isinstance(a, jax.Array | np.ndarray | np.generic):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.tolist() == b.tolist() if a.dtype == object else np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, dist.Distribution):
        return same(take_apart(a), take_apart(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, eqx.Module):
        return all(same(getattr(a, k), getattr(b, k)) for k in type(a).__dataclass_fields__)
    return a == b or (a != a and b != b)


frame = pd.DataFrame({"a": [1.0, None, 3.0], "b": ["x", "ü/../", "x"], "c": pd.date_range("2020", periods=3)})
LABELS = [
    ("a", "b"),
    (0, 1),
    (0.5, float("inf")),
    (False, True),
    (np.int64(3), np.float32(0.1), np.str_("é")),
    (pd.Timestamp("2020-01-01 03:04:05.000000007"), pd.Timestamp("2021-06-01", tz="Europe/Berlin")),
    (pd.Interval(0, 1, closed="left"), datetime.date(2020, 2, 29), datetime.datetime(2020, 2, 29, 1)),
]
NOUNS = {
    "plain": [None, True, 3, -(2**80), "text \x00 \ud800 ✓", [], (), {}, 1e-320, (1, [2, {"k": (None,)}])],
    "floats": [0.1, float("nan"), float("inf"), -float("inf"), -0.0],
    "keys of any kind": {1: "a", (2, "x"): "b", "a/b\\..\n": np.ones(1), "a_b__..n": np.zeros(1), None: 0.0},
    "numpy": {t: np.arange(6).reshape(2, 3).astype(t) for t in ("f2", "f4", ">f8", "i1", "u8", "?", "c16", "U3", "S2")},
    "odd shapes": [np.zeros((0, 3)), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(1.0), np.ones(5)[::2]],
    "dates": np.array(["2020-01-01", "NaT"], "M8[s]"),
    "objects": np.array([["a", 1], [None, 2.5]], object),
    "bfloat16": [jnp.arange(5, dtype=jnp.bfloat16), np.arange(3).astype(jnp.bfloat16), jnp.ones(2, jnp.float8_e5m2)],
    "jax": [jnp.arange(3), jnp.zeros(()), jnp.array([True]), jnp.array([1j])],
    "keys": [jax.random.key(7), jax.random.split(jax.random.key(1, impl="rbg"), 3)],
    "linear": eqx.nn.Linear(2, 3, key=KEY),
    "mlp": eqx.nn.MLP(2, 1, 4, 2, activation=jnp.tanh, key=KEY),
    "norms": [eqx.nn.LayerNorm(3), eqx.nn.RMSNorm(3), eqx.nn.Dropout(0.1), eqx.nn.GRUCell(2, 3, key=KEY)],
    "layers": eqx.nn.Sequential([eqx.nn.Conv1d(1, 2, 3, key=KEY), eqx.nn.Lambda(jax.nn.silu), eqx.nn.Identity()]),
    "registered": [Slope(jnp.ones(2), "km"), halve],
    "table": Table.from_data(frame),
    "target": Target.from_values(["u", "v", "u"]),
    "predictive": FixedPredictive(dist.Normal(np.zeros(3), 1.0), Table.from_data(frame)),
    **{f"labels {i}": Labelled(labels) for i, labels in enumerate(LABELS)},
}
DISTRIBUTIONS = [
    dist.StudentT(np.array([3.0, 4.0]), 0.0, np.array([1.0, 2.0])),
    dist.MultivariateNormal(np.zeros(2), np.array([[2.0, 0.3], [0.3, 1.0]])),
    dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(1),
    dist.MixtureSameFamily(dist.Categorical(np.array([0.3, 0.7])), dist.Laplace(np.array([0.0, 1.0]), 2.0)),
    Mixture(np.array([0.3, 0.7]), [dist.Normal(0.0, 1.0), Dequantized(dist.Poisson(2.0))]),
    Members([dist.Normal(np.zeros((2, 3)), 1.0), dist.Gamma(np.ones((1, 3)), 1.0)]),
    Recalibrated(dist.Logistic(0.0, 1.0), np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.25, 1.0])),
    QuantileDistribution(np.array([0.25, 0.75]), np.array([[-1.0, 1.0], [0.0, 3.0]])),
    NormalInverseGamma(jnp.zeros((3, 2)), 2.0 * jnp.eye(2), jnp.array([1.0, 2.0, 3.0]), 1.5),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "noun.bayes"


@pytest.mark.parametrize("noun", NOUNS.values(), ids=NOUNS)
def test_comes_back_as_it_was(noun, path):
    save(noun, path)
    assert same(load(path), noun)
    first = path.read_bytes()
    save(load(path), path)
    assert path.read_bytes() == first
    assert show(path).splitlines()[1:] == show(noun).splitlines()


@pytest.mark.parametrize("noun", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_distributions_come_back(noun, path):
    save(noun, path)
    assert same(load(path), noun)
    assert type(noun).__name__ in show(path)


def test_loaded_networks_compute_and_differentiate(path):
    network = NOUNS["mlp"]
    save(network, path)
    again = load(path)
    np.testing.assert_array_equal(again(jnp.ones(2)), network(jnp.ones(2)))
    assert eqx.filter_jit(eqx.filter_grad(lambda n: n(jnp.ones(2)).sum()))(again).layers[0].weight.shape == (4, 2)


def test_double_precision_is_not_lost_without_x64(path):
    with jax.enable_x64(True):
        save(jnp.array([0.1]), path)
        assert same(load(path), jnp.array([0.1]))
    assert load(path).tolist() == [0.1]


def test_another_interpreter_with_another_hash_seed_reads_it_in_order(path):
    code = f"""if 1:
    import numpy as np, numpyro.distributions as dist
    from bayeslens.core.saving import save
    from bayeslens.core.transformed import Recalibrated
    t = dist.StudentT(np.array([3.0]), np.array([0.5]), np.array([2.0]))
    save([t, Recalibrated(t, np.array([0.0, 1.0]), np.array([0.0, 1.0]))], {str(path)!r})"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "1"}, check=True)
    for d in (load(path)[0], load(path)[1].base):
        assert (d.df.item(), d.loc.item(), d.scale.item()) == (3.0, 0.5, 2.0)


def test_of_foreign_modules_the_numbers_come_back_into_the_callers(path):
    def make(key, activation=lambda x: x**2):
        return Unregistered(eqx.nn.Linear(2, 2, key=key), 0.5, activation)

    noun = make(KEY)
    save({"network": noun}, path)
    other = eqx.tree_at(lambda m: m.bias, make(jax.random.key(1)), 9.0)
    again = load(path, model=other)["network"]
    assert same(again.layer, noun.layer) and again.bias == 0.5 and again.activation is other.activation
    with pytest.raises(InputError, match="give load one built anew, as model"):
        load(path)
    wrong = Unregistered(eqx.nn.Linear(3, 2, key=KEY), 0.5, None)
    with pytest.raises(InputError, match=r"differs from the saved one in shape, at .*weight"):
        load(path, model=wrong)
    with pytest.raises(InputError, match="give load one"):
        load(path, model=KEY)


class Held(eqx.Module):
    value: Any
    not_savable: ClassVar[str] = "it is held"


def itself() -> list:
    loop: list = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("noun", "message"),
    [
        (lambda x: x, "this is the function '<lambda>'.*jax.nn.relu"),
        ({"net": eqx.nn.MLP(1, 1, 2, 1, activation=lambda x: x, key=KEY)}, r"net\.activation is the function"),
        ([object()], "0 is a builtins.object.*register its class"),
        (EstimatorPredictive(object()), "wraps an estimator of another library"),
        (Held(1), "a Held cannot be saved: it is held"),
        (dist.Normal(0, 1).expand([2]).mask(False), "cannot be taken apart"),
        (np.zeros(2, [("a", "f4")]), "cannot be saved: use plain numbers"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "MaskedArray"),
        (np.array([object()], object), "builtins.object"),
        (itself(), "contains itself"),
        ({1, 2}, "builtins.set"),
    ],
)
def test_refuses_what_it_cannot_restore_and_leaves_nothing(noun, message, path):
    with pytest.raises(InputError, match=message):
        save(noun, path)
    assert os.listdir(path.parent) == []
    if "itself" not in message:
        assert show(noun)


def test_refuses_to_save_while_tracing(path):
    with pytest.raises(InputError, match=r"outside of jax\.jit"):
        jax.jit(lambda x: save(x, path))(1.0)


def test_register_refuses_taken_names():
    with pytest.raises(InputError, match="is taken"):
        register("tests.halve")(Slope)
    with pytest.raises(InputError, match="dataclass"):
        register("tests.plain")(type("Plain", (), {}))
    assert register("tests.halve")(halve) is halve


def test_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "m.bayes"
    save(1, path)
    with monkeypatch.context() as patched:
        patched.setattr(container.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match="No space left"):
            save(2, path)
    assert load(path) == 1 and os.listdir(tmp_path) == ["m.bayes"]
    with pytest.raises(InputError, match="does not exist"):
        save(1, tmp_path / "no" / "m.bayes")
    with pytest.raises(InputError, match="is a folder"):
        save(1, tmp_path)
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(InputError, match="cannot be written to: Permission denied"):
        save(1, tmp_path / "new.bayes")
    assert os.listdir(tmp_path) == ["m.bayes"]


def test_every_damage_is_found(path):
    save({"x": np.arange(50.0), "d": DISTRIBUTIONS[0]}, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(400):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            damaged = damaged[: rng.integers(len(whole))]
        elif trial % 4 == 1:
            start, size = rng.integers(len(whole) - 40), rng.integers(1, 40)
            damaged[start : start + size] = rng.bytes(size) if trial % 8 == 1 else b""
        else:
            damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        if bytes(damaged) == whole:
            continue
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"not a \.bayes file|damaged or incomplete") as caught:
            load(path)
        assert "noun.bayes" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04" + b"\0" * 300, os.urandom(1000)])
def test_foreign_files(content, path):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"noun.bayes is not a \.bayes file"):
        load(path)
    with pytest.raises(InputError, match=r"noun.bayes is not a \.bayes file"):
        show(path)


def test_missing_files(path):
    for missing in (path, path.parent):
        with pytest.raises(InputError, match="there is no file"):
            load(missing)


def forge(
    path: Any, root: Any, version: Any = 1, entries: dict | None = None, method: int = zipfile.ZIP_STORED
) -> None:
    """A file with a right digest and whatever content: what a stranger could write."""
    manifest = {"format": "bayeslens", "format_version": version, "bayeslens": "9.9", "root": root}
    with open(path, "w+b") as file:
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr(zipfile.ZipInfo("manifest.json"), json.dumps(manifest))
            for name, data in (entries or {}).items():
                archive.writestr(name, data)
            archive.comment = b"0" * 64
        digest = container._digest(file)
        file.seek(-64, os.SEEK_END)
        file.write(digest)


def claimed(shape: str, descr: str = "<f8") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 8


ARRAY = {"is": "array", "name": "x", "dtype": "<f8", "shape": [1]}


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"root": 1, "version": 2}, r"has format 2, made by bayeslens 9\.9.*upgrade"),
        ({"root": 1, "version": "x"}, "has format x"),
        ({"root": {"is": "object", "class": "os:system", "fields": {}}}, "'os:system', which is not known"),
        ({"root": {"is": "object", "class": "bayeslens.core.saving:os._Environ", "fields": {}}}, "not known"),
        ({"root": {"is": "object", "class": "bayeslens.core.table:re.Pattern", "fields": {}}}, "not known"),
        ({"root": {"is": "object", "class": "bayeslens.nowhere:X", "fields": {}}}, "not known here: upgrade"),
        ({"root": {"is": "object", "class": "equinox.nn:Shared", "fields": {}}}, "not known"),
        ({"root": {"is": "object", "class": "their.Thing", "fields": {}}}, "import the module that registers it"),
        (
            {"root": {"is": "object", "class": "bayeslens.core.table:Table", "fields": {"columns": 1}}},
            "another version",
        ),
        ({"root": {"is": "function", "name": "eval"}}, "the function 'eval'"),
        ({"root": {"is": "function", "name": "jax.nn.relu; 1"}}, "the function"),
        ({"root": {"is": "novelty"}}, "'novelty', which this version does not know"),
        ({"root": {"no": "is"}}, "made by another version or changed"),
        ({"root": {"is": "distribution", "parts": 3}}, "another version"),
        ({"root": ARRAY}, "another version or changed"),
        ({"root": ARRAY, "entries": {"x.npy": claimed("(1,)")}}, None),
        ({"root": ARRAY, "entries": {"x.npy": claimed("(99999999999999,)")}}, "not what it declares"),
        ({"root": ARRAY, "entries": {"x.npy": claimed("(-1,)")}}, "not what it declares"),
        ({"root": ARRAY, "entries": {"x.npy": claimed("(1,)", "|O")}}, "not what it declares"),
        ({"root": ARRAY | {"dtype": "object"}, "entries": {"x.npy": claimed("(1,)")}}, "unknown type 'object'"),
        ({"root": 1, "entries": {"x.npy": b"\0" * 10**7}, "method": zipfile.ZIP_DEFLATED}, "declares more data"),
    ],
)
def test_forged_files(forged, message, path):
    forge(path, **forged)
    if message is None:
        load(path)
    else:
        with pytest.raises(InputError, match=message):
            load(path)


def test_deep_nesting_is_no_crash(path):
    nested = b"[" * 100_000 + b"]" * 100_000
    with open(path, "w+b") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("manifest.json", b'{"format": "bayeslens", "format_version": 1, "root": ' + nested + b"}")
            archive.comment = b"0" * 64
        digest = container._digest(file)
        file.seek(-64, os.SEEK_END)
        file.write(digest)
    with pytest.raises(InputError, match="another version or changed"):
        load(path)


def test_show_goes_two_levels_deep(path):
    save({"net": NOUNS["linear"], "table": NOUNS["table"]}, path)
    text = show(str(path))
    assert text.startswith("noun.bayes: saved by bayeslens") and "2 arrays" in text.splitlines()[0]
    assert "  net: Linear\n    weight: float32 (3, 2)" in text and "    columns: tuple of 3" in text
    assert show({"a": object()}) == "dict of 1\n  a: object (cannot be saved)"
