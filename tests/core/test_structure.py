"""Round trips of dicts, ragged sequences and token strings; bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.structure import Padded, Structure, Vocabulary, pad

VALUES = {"z": np.arange(6.0).reshape(2, 3), "a": np.float64(7.0), "none": np.zeros((0, 2))}


def test_dicts_become_vectors_and_come_back():
    structure = Structure.of(VALUES)
    flat = structure.flatten(dict(reversed(VALUES.items())))
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7] and structure.size == 7
    assert structure.labels[3:] == ("z[1,0]", "z[1,1]", "z[1,2]", "a")
    again = structure.unflatten(flat)
    assert list(again) == ["z", "a", "none"] and all((again[k] == VALUES[k]).all() for k in VALUES)
    assert {k: v.shape for k, v in again.items()} == {"z": (2, 3), "a": (), "none": (0, 2)}


def test_leading_axes_are_batch_axes_and_all_is_traceable():
    batched = {"z": jnp.ones((4, 5, 2, 3)), "a": jnp.zeros((4, 5))}
    structure = Structure.of(batched, batch_ndim=2)
    assert structure == Structure(("z", "a"), ((2, 3), ()))
    flat = jax.jit(lambda s, v: s.flatten(v))(structure, batched)
    assert flat.shape == (4, 5, 7)
    again = jax.vmap(jax.vmap(structure.unflatten))(flat)
    assert again["z"].shape == (4, 5, 2, 3) and (again["a"] == 0).all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.flatten({"z": 1}), r"parts must be \['z', 'a', 'none'\]"),
        (lambda s: s.flatten(VALUES | {"z": np.zeros((3, 2))}), r"'z' must end in the shape \(2, 3\)"),
        (lambda s: s.flatten(VALUES | {"a": np.zeros(4)}), "same leading axes"),
        (lambda s: s.unflatten(np.zeros(6)), r"has 7 entries, got \(6,\)"),
        (lambda s: pad([]), "no sequence"),
        (lambda s: pad([1.0]), "in a list"),
        (lambda s: pad([[[1, 2], [3]]]), "one shape"),
        (lambda s: pad([np.zeros((2, 3)), [], np.zeros((2, 4))]), r"\(3,\) in one sequence and \(4,\) in number 2"),
        (lambda s: pad([[1, 2, 3], [1]], length=2), "sequence 0 has 3 items"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(InputError, match=message):
        act(Structure.of(VALUES))


def test_ragged_sequences_are_padded_and_come_back():
    sequences = [np.ones((2, 3)), [], 5 * np.ones((4, 3))]
    padded = pad(sequences, length=6)
    assert padded.values.shape == (3, 6, 3) and padded.lengths.tolist() == [2, 0, 4]
    assert [a.shape for a in padded.unpad()] == [(2, 3), (0, 3), (4, 3)]
    assert jax.jit(lambda p: p.mean())(padded).tolist() == [[1, 1, 1], [0, 0, 0], [5, 5, 5]]
    assert pad([[], []]).values.shape == (2, 0)
    # What stands in the padding must not count.
    spoiled = Padded(np.where(padded.mask[..., None], padded.values, 99), padded.mask)
    assert spoiled.mean().tolist() == padded.mean().tolist()


def test_strings_become_integers_and_come_back():
    letters = Vocabulary.of(["abba", "cab"])
    coded = letters.encode(["cab", "", "bad"], length=5)
    assert coded.values[0].tolist() == [3, 1, 2, 0, 0] and coded.values.dtype == np.int32
    assert letters.decode(coded) == [["c", "a", "b"], [], ["b", "a", "<unknown>"]]
