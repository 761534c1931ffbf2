"""Trees for several outputs, grown round by round with LightGBM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float

from bayeslens.learners.boosted_trees import BoostedTrees, export_trees

_ONE_THREAD_ROWS = 2_000  # on smaller tables handing work to another thread costs more than it brings
_MANY_THREADS_ROWS = 50_000


class GrowingTrees:
    """One LightGBM booster for each output, and the sums of their trees so far.

    Outputs grow side by side in threads of this process, each on one core. LightGBM's own threads wait for each
    other in a busy loop: on two cores with another program running, 200 rounds on 10,000 rows took 40 s with them and
    0.7 s without. They are used only where cores are left over and rows are many.

    Args:
        x: features, shape (rows, features), float32, NaN where missing.
        held: features of held-out rows; None for none.
        categorical: columns that hold codes.
        settings: LightGBM's, the same for every output but for the columns drawn.
        num_outputs: sums for each row.

    >>> x = np.arange(100, dtype=np.float32)[:, None]
    >>> trees = GrowingTrees(x, None, (), {"learning_rate": 1.0}, 1)
    >>> trees.grow(np.where(x < 50, 1.0, -1.0), np.ones((100, 1)))
    >>> trees.sums[[0, 99]].ravel().tolist()
    [-1.0, 1.0]
    """

    def __init__(
        self,
        x: Float[np.ndarray, "rows features"],
        held: Float[np.ndarray, "held features"] | None,
        categorical: Sequence[int],
        settings: dict[str, Any],
        num_outputs: int,
    ):
        import lightgbm

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        side_by_side = min(num_outputs, cores) if len(x) >= _ONE_THREAD_ROWS else 1
        threads = max(1, cores // side_by_side) if len(x) >= _MANY_THREADS_ROWS else 1
        settings = settings | {"objective": "none", "metric": "none", "verbose": -1, "num_threads": threads}
        seeds = [settings.get("seed", 0) + 7919 * k for k in range(num_outputs)]
        data = lightgbm.Dataset(x, categorical_feature=list(categorical), params=settings)
        data.construct()
        self.boosters: list[Any] = [None] * num_outputs
        # LightGBM refuses data without any possible split.
        if any(data.feature_num_bin(i) > 1 for i in range(x.shape[1])):
            self.boosters = [lightgbm.Booster(settings | {"feature_fraction_seed": seed}, data) for seed in seeds]
            if held is not None:
                held_data = data.create_valid(held, params=settings).construct()
                for booster in self.boosters:
                    booster.add_valid(held_data, "held out")
        self.sums = np.zeros((len(x), num_outputs), order="F")
        self.held_sums = np.zeros((0 if held is None else len(held), num_outputs), order="F")
        self.counts = [[0] * num_outputs]  # trees of each output after each round: a round may find nothing to split
        self._pool = ThreadPoolExecutor(side_by_side, initializer=_be_quiet) if side_by_side > 1 else None

    def grow(self, gradient: Float[np.ndarray, "rows outputs"], hessian: Float[np.ndarray, "rows outputs"]) -> None:
        """Add a tree to each output: against its gradient, with its hessian."""
        gradient, hessian = (np.asfortranarray(a, np.float32) for a in (gradient, hessian))

        def one(output: int) -> int:
            booster = self.boosters[output]
            if booster is None:
                return 0
            booster.update(fobj=lambda sums, data: (gradient[:, output], hessian[:, output]))
            booster.eval_train(lambda sums, data: _copy(sums, self.sums[:, output]))
            if len(self.held_sums):
                booster.eval_valid(lambda sums, data: _copy(sums, self.held_sums[:, output]))
            return booster.current_iteration()

        run = map if self._pool is None else self._pool.map
        self.counts.append(list(run(one, range(len(self.boosters)))))

    def export(self, rounds: int) -> BoostedTrees:
        """The trees of the first rounds."""
        return export_trees(self.boosters, self.counts[rounds])


def _be_quiet() -> None:
    """LightGBM keeps for each thread how much it prints, and learns it from the settings of any data."""
    import lightgbm

    lightgbm.Dataset(np.arange(2.0)[:, None], params={"verbose": -1}).construct()


def _copy(source: np.ndarray, target: np.ndarray) -> tuple[str, float, bool]:
    """Take what LightGBM hands to a metric: its only way to the sums. The result is the metric, which nobody reads."""
    target[:] = source
    return "", 0.0, False
