"""Boosted trees as flat arrays: exported from LightGBM after fitting, evaluated without it.

Model text of LightGBM is never loaded: damaged text can end the process. Arrays can be saved, traced and checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bayeslens.core.errors import InputError

_CHUNK = 4096  # rows evaluated at once on the host
_NOTHING = {"num_leaves": "1", "leaf_value": "0"}  # a tree that adds nothing
_CELLS = 1 << 18  # comparisons held at once, in bytes: they stay in the processor's cache


class BoostedTrees(eqx.Module):
    """Sums of binary trees, for several outputs.

    Instead of being walked from the root, a tree is evaluated whole (Lucchese et al. 2015, "QuickScorer"): each of its
    splits rules out the leaves on the other side, and the one leaf that no split rules out is reached. On the host
    features become codes between thresholds, leaves become bits, and everything is done in bytes, for many trees and
    rows at once, with nothing compiled. Under JAX the same arrays are compared directly.

    Attributes:
        feature: which feature each split looks at. Trees are ordered by round, then by output; those with few splits
            are filled up with splits that rule nothing out.
        threshold: a numeric split sends x left when x <= threshold, in float32.
        missing_left: whether a numeric split sends missing values left.
        category_set: for a categorical split, the row of `category_sets` with the codes that go left; missing and
            unknown codes go right. -1 for numeric splits.
        category_sets: codes in each set.
        leaves_if_left: leaves that are still possible when the split sends a row left.
        leaves_if_right: the same for right.
        values: of the leaves.
        num_outputs: sums for each row.
    """

    feature: Int[np.ndarray, "trees splits"]
    threshold: Float[np.ndarray, "trees splits"]
    missing_left: Bool[np.ndarray, "trees splits"]
    category_set: Int[np.ndarray, "trees splits"]
    category_sets: Bool[np.ndarray, "sets codes"]
    leaves_if_left: Bool[np.ndarray, "trees splits leaves"]
    leaves_if_right: Bool[np.ndarray, "trees splits leaves"]
    values: Float[np.ndarray, "trees leaves"]
    num_outputs: int = eqx.field(static=True)

    def __call__(self, x: Any) -> Float[Array, "rows outputs"]:
        """Sum of leaf values for each row and output.

        Args:
            x: features, shape (rows, features), NaN where missing. A `jax.Array` may be traced and gives one; an
                array of numbers is evaluated on the host, in float64.
        """
        if isinstance(x, jax.Array):
            return self._evaluate_traced(x)
        x = np.asarray(x, np.float32)
        result = np.zeros((len(x), self.num_outputs))
        if len(self.values) == 0 or len(x) == 0:
            return result
        plan = _Plan.of(self)
        for start in range(0, len(x), _CHUNK):
            plan.add_to(result[start : start + _CHUNK], x[start : start + _CHUNK])
        return result

    def _evaluate_traced(self, x: Array) -> Array:
        # Trees were grown on float32 features.
        x = x.astype(jnp.float32)
        total = jnp.zeros((x.shape[0], self.num_outputs), jnp.result_type(float))
        sets = jnp.asarray(self.category_sets)

        def add(total: Array, round_: tuple) -> tuple[Array, None]:
            feature, threshold, missing_left, category_set, if_left, if_right, values = round_
            v = x[:, feature]
            left = jnp.where(jnp.isnan(v), missing_left, v <= threshold)
            if (self.category_set >= 0).any():
                known = (v >= 0) & (v < sets.shape[1])
                member = known & sets[category_set, jnp.where(known, v, 0).astype(jnp.int32)]
                left = jnp.where(category_set >= 0, member, left)
            reached = jnp.where(left[..., None], if_left, if_right).all(-2)
            return total + jnp.where(reached, values, 0).sum(-1), None

        rounds = (
            self.feature,
            self.threshold,
            self.missing_left,
            self.category_set,
            self.leaves_if_left,
            self.leaves_if_right,
            self.values.astype(total.dtype),
        )
        by_round = [jnp.asarray(a.reshape(-1, self.num_outputs, *a.shape[1:])) for a in rounds]
        return jax.lax.scan(add, total, tuple(by_round))[0]


class _Plan(eqx.Module):
    """What the evaluation on the host needs, worked out once per call.

    A plane is a row of bytes, one for each row of the table: codes of a feature, with missing values lowest (they go
    left everywhere) or highest (right everywhere), or membership in a set of categories. A split compares one plane
    with its cut.
    """

    numeric: list[tuple[int, np.ndarray, int, int]]  # feature, thresholds, plane with missing lowest, and highest
    categorical: list[tuple[int, np.ndarray]]  # feature, and which sets it is compared with
    sets: np.ndarray
    num_planes: int
    plane: np.ndarray  # (trees, splits)
    cut: np.ndarray  # (trees, splits)
    if_left: np.ndarray  # (trees, splits, bytes of leaves)
    change: np.ndarray  # bits that differ when the row goes right
    lookup: np.ndarray  # (trees, bytes of leaves, 256): value of the one leaf whose bit is set
    num_outputs: int

    @classmethod
    def of(cls, trees: BoostedTrees) -> _Plan:
        is_set, count = trees.category_set >= 0, len(trees.category_sets)
        plane, cut = np.where(is_set, trees.category_set, 0), np.zeros(trees.feature.shape, np.int64)
        numeric, num_planes = [], count
        for feature in np.unique(trees.feature[~is_set]):
            here = ~is_set & (trees.feature == feature)
            thresholds = np.unique(trees.threshold[here])
            cut[here] = np.searchsorted(thresholds, trees.threshold[here])
            plane[here] = np.where(trees.missing_left[here], num_planes, num_planes + 1)
            numeric.append((int(feature), thresholds, num_planes, num_planes + 1))
            num_planes += 2
        categorical = []
        for feature in np.unique(trees.feature[is_set]):
            categorical.append((int(feature), np.unique(trees.category_set[is_set & (trees.feature == feature)])))
        if_left, if_right = (
            np.packbits(a, axis=-1, bitorder="little") for a in (trees.leaves_if_left, trees.leaves_if_right)
        )
        width = if_left.shape[-1]
        lookup = np.zeros((len(plane), width, 256))
        for leaf in range(trees.values.shape[1]):
            lookup[:, leaf // 8, 1 << leaf % 8] = trees.values[:, leaf]
        kind = np.uint8 if max((len(t) for _, t, *_ in numeric), default=0) < 255 else np.uint16
        sets = trees.category_sets
        change, cut = if_left ^ if_right, cut.astype(kind)
        return cls(numeric, categorical, sets, num_planes, plane, cut, if_left, change, lookup, trees.num_outputs)

    def add_to(self, result: np.ndarray, x: np.ndarray) -> None:
        """Add the trees' values for some rows."""
        planes = self._planes(x)
        splits, width = self.if_left.shape[1:]
        block = max(1, _CELLS // (len(x) * max(splits * width, 8) * self.num_outputs)) * self.num_outputs
        offsets = 256 * np.arange(min(block, len(self.plane)) * width).reshape(-1, width, 1)
        for start in range(0, len(self.plane), block):
            part = slice(start, start + block)
            right = planes[self.plane[part]] > self.cut[part][..., None]
            # 255 where the row goes right, so that bits can be chosen without branching.
            mask = np.negative(right.view(np.uint8))[:, :, None]
            bits = mask & self.change[part][..., None]
            bits ^= self.if_left[part][..., None]
            leaf = np.bitwise_and.reduce(bits, axis=1)
            values = self.lookup[part].ravel()[leaf + offsets[: len(leaf)]].sum(1)
            result += values.reshape(-1, self.num_outputs, len(x)).sum(0).T

    def _planes(self, x: np.ndarray) -> np.ndarray:
        planes = np.zeros((self.num_planes, len(x)), self.cut.dtype)
        for feature, thresholds, low, high in self.numeric:
            v = x[:, feature]
            codes = np.searchsorted(thresholds, v)  # thresholds below v; missing values come last
            planes[high] = codes
            planes[low] = np.where(np.isnan(v), 0, codes)
        for feature, rows in self.categorical:
            v = x[:, feature]
            with np.errstate(invalid="ignore"):
                known = (v >= 0) & (v < self.sets.shape[1])
                code = np.where(known, v, 0).astype(np.int64)
            planes[rows] = ~(self.sets[np.ix_(rows, code)] & known)
        return planes


def export_trees(boosters: Sequence[Any], rounds: Sequence[int]) -> BoostedTrees:
    """The trees of LightGBM boosters that were fitted in this process, on float32 features.

    As in LightGBM, a feature that had no missing value in training takes one for zero.

    Args:
        boosters: a `lightgbm.Booster` of one output and without linear leaves for each output; None has no trees.
        rounds: how many trees of each to keep, from the first; at most those that were grown.

    Raises:
        InputError: linear leaves, or zeros that stand for missing values.

    >>> import lightgbm
    >>> x = np.arange(40.0)[:, None]
    >>> settings = {"min_data_in_leaf": 5, "verbose": -1, "num_threads": 1}
    >>> booster = lightgbm.train(settings, lightgbm.Dataset(x, x[:, 0]), 3)
    >>> bool(np.allclose(export_trees([booster], [3])(x)[:, 0], booster.predict(x), atol=1e-6))
    True
    """
    grown = [_described(booster, count) for booster, count in zip(boosters, rounds, strict=True)]
    blocks = [b for each in itertools.zip_longest(*grown, fillvalue=_NOTHING) for b in each]
    count = len(blocks)
    leaves = max((int(b["num_leaves"]) for b in blocks), default=1)
    splits = max(leaves - 1, 1)

    def stacked(name: str, width: int, dtype: Any, fill: float = 0) -> np.ndarray:
        array = np.full((count, width), fill, dtype)
        for row, b in zip(array, blocks, strict=True):
            found = np.array(b.get(name, "").split(), np.float64)
            row[: len(found)] = found
        return array

    feature, threshold = stacked("split_feature", splits, np.int32), stacked("threshold", splits, np.float64)
    decision, size = stacked("decision_type", splits, np.int32), stacked("num_leaves", 1, np.int32)
    left, right = stacked("left_child", splits, np.int32), stacked("right_child", splits, np.int32)
    is_split = np.arange(splits) < size - 1
    is_set, missing_type = (decision & 1 == 1) & is_split, decision >> 2 & 3
    if any(b.get("is_linear", "0").strip() == "1" for b in blocks) or (missing_type == 1).any():
        raise InputError("trees with linear leaves or zero_as_missing cannot be exported: train without them")
    missing_left = np.where(missing_type == 2, decision & 2 == 2, threshold >= 0)
    category_set, category_sets = _category_sets(blocks, threshold, is_set)
    if_left, if_right = _possible_leaves(left, right, leaves)
    if_left[~is_split] = if_right[~is_split] = True
    # Leaves that only fill up smaller trees are never reached: exactly one leaf must remain.
    real = (np.arange(leaves) < size)[:, None]
    if_left, if_right = if_left & real, if_right & real
    # The nearest float32 at or below keeps x <= threshold true for the same float32 values.
    largest = float(np.finfo(np.float32).max)  # a split of missing values from all others has a threshold beyond
    rounded = np.clip(threshold, -largest, largest).astype(np.float32)
    rounded = np.where(rounded > threshold, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return BoostedTrees(
        feature=feature,
        threshold=np.where(is_split & ~is_set, rounded, np.float32(0)),
        missing_left=missing_left & ~is_set,
        category_set=category_set,
        category_sets=category_sets,
        leaves_if_left=if_left,
        leaves_if_right=if_right,
        values=stacked("leaf_value", leaves, np.float64),
        num_outputs=len(boosters),
    )


def _described(booster: Any, rounds: int) -> list[dict[str, str]]:
    """Each tree's fields in LightGBM's text form."""
    if booster is None or rounds == 0:
        return []
    text = booster.model_to_string(num_iteration=rounds, importance_type="split")
    return [dict(line.split("=", 1) for line in b.splitlines() if "=" in line) for b in text.split("\nTree=")[1:]]


def _possible_leaves(left: np.ndarray, right: np.ndarray, leaves: int) -> tuple[np.ndarray, np.ndarray]:
    """Leaves that stay possible when a split sends a row left, and right: all but those on the other side."""
    count, splits = left.shape
    tree, each = np.arange(count), np.eye(leaves, dtype=bool)
    under = np.zeros((2, count, splits, leaves), bool)
    for split in range(splits - 1, -1, -1):  # children have higher numbers than their parents
        for side, child in enumerate((left[:, split], right[:, split])):
            below = under[:, tree, np.maximum(child, 0)].any(0)
            under[side, :, split] = np.where((child < 0)[:, None], each[np.maximum(~child, 0)], below)
    return ~under[1], ~under[0]


def _category_sets(blocks: list[dict], threshold: np.ndarray, is_set: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of each categorical split's set, and the codes in every set."""
    number, sets = np.full(threshold.shape, -1, np.int32), []
    for tree, split in zip(*np.nonzero(is_set), strict=True):
        bounds = np.array(blocks[tree]["cat_boundaries"].split(), int)
        words = np.array(blocks[tree]["cat_threshold"].split(), np.uint32)
        which = int(threshold[tree, split])
        inside = words[bounds[which] : bounds[which + 1]].astype("<u4").view(np.uint8)
        number[tree, split] = len(sets)
        sets.append(np.unpackbits(inside, bitorder="little").astype(bool))
    table = np.zeros((len(sets), max((len(s) for s in sets), default=1)), bool)
    for row, members in zip(table, sets, strict=True):
        row[: len(members)] = members
    return number, table
