"""Boosted trees as flat arrays: exported from LightGBM after fitting, evaluated without it.

Model text of LightGBM is never loaded: damaged text can end the process. Arrays can be saved, traced and checked.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

_CHUNK = 8192


class BoostedTrees(eqx.Module):
    """Sums of binary trees, for several outputs.

    Nodes of all trees are stored one after another; a leaf is its own child. A numeric node sends x to the left
    when x <= threshold; a categorical node when the code is in its set; a missing value as `missing_left` says.
    """

    feature: Int[np.ndarray, " nodes"]
    threshold: Float[np.ndarray, " nodes"]
    category_row: Int[np.ndarray, " nodes"]
    category_sets: Bool[np.ndarray, "sets codes"]
    missing_left: Bool[np.ndarray, " nodes"]
    left: Int[np.ndarray, " nodes"]
    right: Int[np.ndarray, " nodes"]
    value: Float[np.ndarray, " nodes"]
    roots: Int[np.ndarray, "rounds outputs"]
    depth: int

    def __call__(self, x: Any) -> Any:
        """Sum of leaf values for each row and output, shape (rows, outputs). A `jax.Array` may be traced."""
        if isinstance(x, jax.Array):
            return self._evaluate(x, jnp)
        x = np.asarray(x, np.float32)
        parts = [self._evaluate(x[i : i + _CHUNK], np) for i in range(0, max(len(x), 1), _CHUNK)]
        return np.concatenate(parts)

    def _evaluate(self, x: Any, xp: Any) -> Any:
        rows, outputs = x.shape[0], self.roots.shape[1]
        arrays = [xp.asarray(a) for a in (self.feature, self.threshold, self.category_row, self.category_sets)]
        feature, threshold, category_row, sets = arrays
        missing_left, left, right, value = (
            xp.asarray(a) for a in (self.missing_left, self.left, self.right, self.value)
        )
        total = xp.zeros((rows, outputs), xp.float32)
        index = xp.arange(rows)[:, None]

        def add(total: Any, roots: Any) -> Any:
            node = xp.broadcast_to(roots, (rows, outputs))
            for _ in range(self.depth):
                v = x[index, feature[node]]
                code = xp.clip(xp.nan_to_num(v, nan=-1.0), -1, sets.shape[1]).astype(xp.int32)
                known = (code >= 0) & (code < sets.shape[1])
                member = sets[category_row[node], xp.where(known, code, 0)] & known
                go = xp.where(category_row[node] >= 0, member, v <= threshold[node])
                go = xp.where(xp.isnan(v) & (category_row[node] < 0), missing_left[node], go)
                node = xp.where(go, left[node], right[node])
            return total + value[node]

        if xp is np:
            for roots in self.roots:
                total = add(total, roots)
            return total
        return jax.lax.scan(lambda t, r: (add(t, r), None), total, jnp.asarray(self.roots))[0]


def export_trees(booster: Any, num_outputs: int, num_rounds: int) -> BoostedTrees:
    """The trees of a LightGBM booster that was fitted in this process."""
    trees = booster.dump_model(num_iteration=num_rounds)["tree_info"]
    nodes: dict[str, list] = {k: [] for k in ("feature", "threshold", "row", "missing", "left", "right", "value")}
    sets: list[list[int]] = []
    depth = 1

    def add(node: dict, level: int) -> int:
        nonlocal depth
        depth, number = max(depth, level), len(nodes["feature"])
        for k, empty in (("feature", 0), ("threshold", 0.0), ("row", -1), ("missing", False), ("value", 0.0)):
            nodes[k].append(empty)
        nodes["left"].append(number)
        nodes["right"].append(number)
        if "leaf_value" in node:
            nodes["value"][number] = node["leaf_value"]
            return number
        nodes["feature"][number] = node["split_feature"]
        if node["decision_type"] == "==":
            nodes["row"][number] = len(sets)
            sets.append([int(c) for c in str(node["threshold"]).split("||")])
        else:
            nodes["threshold"][number] = float(node["threshold"])
            # Without missing values in training LightGBM treats NaN as zero.
            goes_left = node["default_left"] if node["missing_type"] == "NaN" else float(node["threshold"]) >= 0
            nodes["missing"][number] = bool(goes_left)
        nodes["left"][number] = add(node["left_child"], level + 1)
        nodes["right"][number] = add(node["right_child"], level + 1)
        return number

    roots = [add(t["tree_structure"], 0) for t in trees]
    table = np.zeros((max(len(sets), 1), 1 + max((max(s) for s in sets), default=0)), bool)
    for i, codes in enumerate(sets):
        table[i, codes] = True
    # The nearest float32 at or below keeps x <= threshold true for the same float32 values.
    largest = float(np.finfo(np.float32).max)
    exact = np.clip(np.array(nodes["threshold"], np.float64), -largest, largest)
    rounded = exact.astype(np.float32)
    rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return BoostedTrees(
        feature=np.array(nodes["feature"], np.int32),
        threshold=rounded.astype(np.float32),
        category_row=np.array(nodes["row"], np.int32),
        category_sets=table,
        missing_left=np.array(nodes["missing"], bool),
        left=np.array(nodes["left"], np.int32),
        right=np.array(nodes["right"], np.int32),
        value=np.array(nodes["value"], np.float32),
        roots=np.array(roots, np.int32).reshape(-1, num_outputs),
        depth=depth,
    )
