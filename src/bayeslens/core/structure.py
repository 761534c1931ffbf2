"""How structured values become arrays: dicts of latents as vectors, sequences and sets padded with masks, tokens."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from bayeslens.core.errors import InputError


class Structure(eqx.Module):
    """Names and shapes of the parts of a dict, and how they lie one after another in a flat vector.

    Parts come in the order of the dict they were learned from. Values are as they are: what maps constrained values
    to real numbers is NumPyro's `biject_to`.

    >>> structure = Structure.of({"mu": 0.0, "slopes": np.zeros((2, 2))})
    >>> structure.labels
    ('mu', 'slopes[0,0]', 'slopes[0,1]', 'slopes[1,0]', 'slopes[1,1]')
    >>> structure.unflatten(structure.flatten({"slopes": np.eye(2), "mu": np.ones(())}))["slopes"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    names: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    @classmethod
    def of(cls, values: dict[str, Any], batch_ndim: int = 0) -> Structure:
        """The structure of a dict of arrays, whose first `batch_ndim` axes are not part of it."""
        return cls(tuple(values), tuple(np.shape(v)[batch_ndim:] for v in values.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each part."""
        return tuple(int(np.prod(shape)) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Numbers in the flat vector."""
        return sum(self.sizes)

    @property
    def labels(self) -> tuple[str, ...]:
        """A label for every entry of the flat vector."""
        found = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            found += [f"{name}[{','.join(map(str, i))}]" if i else name for i in np.ndindex(*shape)]
        return tuple(found)

    def flatten(self, values: dict[str, Any]) -> Shaped[Array, "*batch size"]:
        """The parts side by side. Leading axes are batch axes, equal in all parts.

        Raises:
            InputError: a part is lacking or too many, or has another shape.
        """
        if set(values) != set(self.names):
            raise InputError(f"the parts must be {list(self.names)}, got {list(values)}")
        batches = {}
        for name, shape in zip(self.names, self.shapes, strict=True):
            given = np.shape(values[name])
            if given[len(given) - len(shape) :] != shape:
                raise InputError(f"{name!r} must end in the shape {shape}, got {given}")
            batches[name] = given[: len(given) - len(shape)]
        if len(set(batches.values())) > 1:
            raise InputError(f"all parts need the same leading axes, got {batches}")
        xp = np if all(isinstance(v, np.ndarray | np.generic | float | int) for v in values.values()) else jnp
        parts = [
            xp.reshape(xp.asarray(values[n]), (*batches[n], s)) for n, s in zip(self.names, self.sizes, strict=True)
        ]
        return xp.concatenate(parts, -1) if parts else np.zeros(0)

    def unflatten(self, vector: Shaped[Array, "*batch size"]) -> dict[str, Array]:
        """The dict of parts of a flat vector, or of a batch of them.

        Raises:
            InputError: the vector has another length.
        """
        if np.ndim(vector) < 1 or vector.shape[-1] != self.size:
            raise InputError(f"a flat vector of {list(self.names)} has {self.size} entries, got {np.shape(vector)}")
        edges = np.cumsum([0, *self.sizes])
        pieces = [vector[..., a:b] for a, b in itertools.pairwise(edges)]
        return {
            name: piece.reshape((*vector.shape[:-1], *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }


class Padded(eqx.Module):
    """Sequences or sets of different lengths as one array: `values` (count, length, ...) where `mask` is true."""

    values: Shaped[Array, "count length ..."]
    mask: Bool[Array, "count length"]

    @property
    def lengths(self) -> Int[Array, " count"]:
        """Items in each sequence."""
        return self.mask.sum(-1)

    def mean(self) -> Float[Array, "count ..."]:
        """The mean of each sequence's items; zero for an empty one. Blind to order, as for sets it must be."""
        mask = self.mask.reshape(*self.mask.shape, *[1] * (self.values.ndim - 2))
        count = self.lengths.reshape(-1, *[1] * (self.values.ndim - 2))
        return (self.values * mask).sum(1) / jnp.maximum(count, 1)

    def unpad(self) -> list[np.ndarray]:
        """The sequences again."""
        return [np.asarray(v)[np.asarray(m)] for v, m in zip(self.values, self.mask, strict=True)]


def pad(sequences: Iterable[Any], length: int | None = None) -> Padded:
    """Sequences or sets of items of one shape, padded with zeros at their ends.

    Args:
        sequences: arrays of shape (items, ...), or lists of items; an empty one is allowed.
        length: to pad to; by default the longest. A fixed one lets compiled programs be used again.

    Raises:
        InputError: no sequence, items of different shapes, or a sequence longer than `length`.

    >>> padded = pad([[1.0, 2.0], [3.0]])
    >>> padded.values.tolist(), padded.mask.tolist()
    ([[1.0, 2.0], [3.0, 0.0]], [[True, True], [True, False]])
    """
    try:
        arrays = [np.asarray(s) for s in sequences]
    except ValueError:
        raise InputError("the items of every sequence must have one shape") from None
    if not arrays:
        raise InputError("there is no sequence to pad")
    if any(a.ndim == 0 for a in arrays):
        raise InputError("a sequence needs an axis of items; put a single item in a list")
    filled = [a for a in arrays if len(a)] or arrays[:1]
    item = filled[0].shape[1:]
    odd = [i for i, a in enumerate(arrays) if len(a) and a.shape[1:] != item]
    if odd:
        raise InputError(f"items have shape {item} in one sequence and {arrays[odd[0]].shape[1:]} in number {odd[0]}")
    lengths = np.array([len(a) for a in arrays])
    length = int(lengths.max()) if length is None else length
    if lengths.max() > length:
        raise InputError(f"sequence {lengths.argmax()} has {lengths.max()} items, more than length={length}")
    values = np.zeros((len(arrays), length, *item), np.result_type(*filled))
    for row, array in zip(values, arrays, strict=True):
        if len(array):
            row[: len(array)] = array
    return Padded(values, np.arange(length) < lengths[:, None])


class Vocabulary(eqx.Module):
    """The tokens of a language, and how strings of them become integers. Token 0 stands for unknown ones.

    >>> words = Vocabulary.of(["to be or not to be".split()])
    >>> words.tokens, words.encode(["not to worry".split()]).values.tolist()
    (('<unknown>', 'to', 'be', 'or', 'not'), [[4, 1, 0]])
    """

    tokens: tuple[Hashable, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, strings: Iterable[Sequence[Hashable]]) -> Vocabulary:
        """All tokens in some strings, in order of appearance. A str is a sequence of characters."""
        return cls(("<unknown>", *dict.fromkeys(t for s in strings for t in s if t != "<unknown>")))

    def encode(self, strings: Iterable[Sequence[Hashable]], length: int | None = None) -> Padded:
        """The strings as padded integers; see `pad`."""
        codes = {t: i for i, t in enumerate(self.tokens)}
        return pad([np.array([codes.get(t, 0) for t in s], np.int32) for s in strings], length)

    def decode(self, padded: Padded) -> list[list[Hashable]]:
        """The strings again, as lists of tokens."""
        return [[self.tokens[i] for i in row] for row in padded.unpad()]
