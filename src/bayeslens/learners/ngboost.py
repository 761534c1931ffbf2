"""Natural gradient boosting: every parameter of the predictive distribution is boosted, with LightGBM's trees."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import put_together, take_apart
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.table import Table, Target
from bayeslens.learners.boosted_trees import BoostedTrees, export_trees
from bayeslens.learners.linear import check_weights
from bayeslens.learners.ngboost_families import family_of, natural_gradient

_STEP_LIMIT = 5.0  # natural gradients are clipped here, in units of each parameter's own scale


class NGBoost(Learner):
    """Natural gradient boosting (Duan et al. 2020).

    Args:
        distribution: auto (Normal, or Categorical for classes), normal, lognormal, student_t, laplace, poisson.
        num_trees: rounds at most.
        learning_rate: shrinkage of every round.
        num_leaves: of each tree.
        min_rows_per_leaf: of each tree.
        row_fraction: rows drawn for each round.
        column_fraction: columns drawn for each tree.
        early_stopping_rounds: rounds without a better held-out score after which boosting stops.
    """

    distribution: str = "auto"
    num_trees: int = 500
    learning_rate: float = 0.05
    num_leaves: int = 8
    min_rows_per_leaf: int = 10
    row_fraction: float = 0.8
    column_fraction: float = 0.8
    early_stopping_rounds: int = 25

    tasks: ClassVar[frozenset[str]] = frozenset({"regression", "classification"})
    takes: ClassVar[frozenset[str]] = frozenset({"weights"})

    def fit(self, X: Any, y: Any, *, key: Any, weights: Any = None) -> NGBoostPredictive:
        """See `Learner.fit`."""
        target = Target.from_values(y)
        table = Table.from_data(X)
        features = table.trees(X)
        weights = check_weights(weights, len(features))
        family = family_of(self.distribution, len(target.classes) if target.classes else None)
        family.check(target.values)
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        center, scale = 0.0, 1.0
        rng = np.random.default_rng(seed)
        held = rng.random(len(features)) < 0.15
        data = (features, target.values, weights)
        rounds = self.num_trees
        if held.sum() >= 10:
            rounds = self._boost(family, table, data, ~held, held, seed, self.num_trees)[1]
        booster, _, start = self._boost(family, table, data, np.ones(len(features), bool), None, seed, rounds)
        trees = export_trees(booster, len(start), max(rounds, 1))
        return NGBoostPredictive(table, trees, start, self.distribution, center, scale, target.classes)

    def _boost(
        self, family: Any, table: Table, data: tuple, train: np.ndarray, held: Any, seed: int, rounds: int
    ) -> Any:
        import lightgbm as lgb

        x, y, w = (a[train] for a in data)
        start = family.start(y, w)
        outputs = len(start)

        def gradient(predicted: np.ndarray, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
            theta = predicted.reshape(len(y), outputs)
            g = np.clip(natural_gradient(family, y, theta), -1e9, 1e9)
            g = (g * w[:, None]).astype(np.float32)
            h = np.broadcast_to(w[:, None], g.shape).astype(np.float32)
            return (g, h) if outputs > 1 else (g[:, 0], h[:, 0])

        parameters = {
            "objective": gradient,
            "num_class": outputs,
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            "min_data_in_leaf": min(self.min_rows_per_leaf, max(1, len(y) // 4)),
            "min_data_in_bin": 1 if len(y) < 1000 else 3,
            "bagging_fraction": self.row_fraction,
            "bagging_freq": 1 if self.row_fraction < 1 else 0,
            "feature_fraction": self.column_fraction,
            "min_sum_hessian_in_leaf": 0.0,
            "verbose": -1,
            "seed": seed % 10**6,
            "deterministic": True,
            "force_row_wise": True,
            # Threads cost more than they bring on small tables.
            "num_threads": 1 if len(y) < 5000 else 0,
        }
        categorical = list(table.categorical_features)
        offset = np.broadcast_to(start, (len(y), outputs)).ravel("F")
        dataset = lgb.Dataset(x, weight=None, init_score=offset, categorical_feature=categorical, free_raw_data=True)
        if held is None:
            return lgb.train(parameters, dataset, max(rounds, 1)), rounds, start
        held_x, held_y, held_w = (a[held] for a in data)
        valid = dataset.create_valid(held_x, init_score=np.broadcast_to(start, (len(held_y), outputs)).ravel("F"))

        def score(predicted: np.ndarray, dataset: Any) -> tuple[str, float, bool]:
            theta = predicted.reshape(len(held_y), outputs)
            return "score", float(np.average(family.score(held_y, theta), weights=held_w)), True

        booster = lgb.train(
            parameters,
            dataset,
            rounds,
            valid_sets=[valid],
            feval=score,
            callbacks=[lgb.early_stopping(self.early_stopping_rounds, verbose=False)],
        )
        return booster, booster.best_iteration, start


class NGBoostPredictive(Predictive):
    """The boosted distribution of every row."""

    table: Table
    trees: BoostedTrees
    start: Float[np.ndarray, " parameters"]
    distribution: str
    center: float
    scale: float
    classes: tuple | None = None

    traceable: ClassVar[bool] = True

    def __call__(self, x: Any) -> Distribution:
        """The boosted distribution of every row."""
        theta = self.start + self.trees(self.table.trees(x))
        return family_of(self.distribution, len(self.classes) if self.classes else None).distribution(theta)

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """One member."""
        one = jax.tree.map(lambda a: a[None], take_apart(self(x)))
        return put_together(one), np.ones(1)
