"""Natural gradient boosting: every parameter of the predictive distribution is boosted, with LightGBM's trees."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import put_together, take_apart
from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.table import Table, Target
from bayeslens.learners.boosted_trees import BoostedTrees, export_trees
from bayeslens.learners.linear import check_weights
from bayeslens.learners.ngboost_families import Family, best_shift, family_of, marginal_parameters, natural_gradient

_ONE_THREAD_ROWS = 50_000  # threads cost more than they bring on smaller tables, above all on a busy machine
_STEP_LIMIT = 10.0  # natural gradients of log parameters are clipped here: a first tree must not overshoot


class _Rows(NamedTuple):
    """Training rows: features, targets, weights, log exposures (or None), censoring mask (or None)."""

    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    offset: np.ndarray | None
    censored: np.ndarray | None

    def take(self, rows: np.ndarray) -> _Rows:
        return _Rows(*(None if a is None else a[rows] for a in self))


class NGBoost(Learner):
    """Natural gradient boosting (Duan, Avati, Ding, Thai, Basu, Ng and Schuler 2020).

    Each round grows one tree per parameter of the predictive distribution, on the natural gradient. The paper scales
    each round's step by a line search; a fixed learning rate with early stopping on held-out rows scores as well and
    needs no further passes over the rows. The number of rounds is found on held-out rows and the trees are then grown
    on all of them.

    Args:
        distribution: `auto` (Normal; Bernoulli or Categorical for classes; multivariate Normal for several targets),
            or a name of `ngboost_families`.
        scoring_rule: `log` or `crps` (normal and laplace).
        num_trees: rounds at most. 500 at this learning rate suffice for most tables.
        learning_rate: shrinkage of every round; 0.05.
        num_leaves: of a tree; 8, which is about the default depth of the paper.
        min_rows_per_leaf: 10.
        row_fraction: share of rows drawn for each round; 0.8 regularizes and is quicker.
        column_fraction: share of columns drawn for each tree; 0.8 likewise.
        early_stopping_rounds: rounds without a better held-out score after which boosting stops; 0 grows all
            `num_trees` on all rows.
        natural_gradient: False boosts with the ordinary gradient, to see what the natural one brings.

    >>> X = np.arange(200.0)[:, None]
    >>> y = np.sin(X[:, 0] / 20) + 0.1 * np.cos(7 * X[:, 0])
    >>> predictive = NGBoost(num_trees=100).fit(X, y, key=jax.random.key(0))
    >>> bool(np.corrcoef(predictive(X).loc, y)[0, 1] > 0.95)
    True
    """

    distribution: str = "auto"
    scoring_rule: str = "log"
    num_trees: int = 500
    learning_rate: float = 0.05
    num_leaves: int = 8
    min_rows_per_leaf: int = 10
    row_fraction: float = 0.8
    column_fraction: float = 0.8
    early_stopping_rounds: int = 25
    natural_gradient: bool = True

    takes: ClassVar[frozenset[str]] = frozenset({"weights", "offset", "censored"})

    @property
    def tasks(self) -> frozenset[str]:
        """Classification for bernoulli and categorical, regression for other names, both for auto."""
        if self.distribution == "auto":
            return frozenset({"regression", "classification"})
        classes = self.distribution in ("bernoulli", "categorical")
        return frozenset({"classification" if classes else "regression"})

    def fit(
        self, X: Any, y: Any, *, key: Any, weights: Any = None, offset: Any = None, censored: Any = None
    ) -> NGBoostPredictive:
        """See `Learner.fit`.

        Args:
            X: rows.
            y: targets, shape (rows,); or (rows, targets) for a multivariate Normal.
            key: a `jax.random.key`.
            weights: how much each row counts.
            offset: log exposure of each row, for Poisson and negative binomial; predictions are per unit exposure.
            censored: True where the target is only known to be larger than `y`.

        Raises:
            InputError: a target, family or argument that do not go together.
        """
        table = Table.from_data(X)
        values, classes = self._targets(y)
        family = family_of(
            self.distribution,
            score=self.scoring_rule,
            classes=None if classes is None else len(classes),
            targets=values.shape[1] if values.ndim == 2 else 1,
        )
        family.check(values)
        rows = _Rows(
            table.trees(X),
            values,
            check_weights(weights, len(values)),
            _check_offset(offset, family, len(values)),
            _check_censored(censored, family, len(values)),
        )
        if len(rows.x) != len(values):
            raise InputError(f"X has {len(rows.x)} rows and y has {len(values)}: they must agree")
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        rounds, shift = self.num_trees, 0.0
        held = np.random.default_rng(seed).random(len(values)) < 0.15
        if self.early_stopping_rounds and 5 <= held.sum() < len(values):
            booster, start = self._boost(family, table, rows.take(~held), rows.take(held), seed, rounds)
            rounds = booster.best_iteration
            shift = _spread_shift(family, booster, start, rows.take(held))
        booster, start = self._boost(family, table, rows, None, seed, rounds)
        start = start + shift
        trees = export_trees(booster, len(start), max(rounds, 1))
        shape = values.shape[1] if values.ndim == 2 else 1
        return NGBoostPredictive(table, trees, start, self.distribution, self.scoring_rule, shape, classes)

    def _targets(self, y: Any) -> tuple[np.ndarray, tuple | None]:
        if np.ndim(y) == 2 and np.shape(y)[1] > 1:
            values = np.asarray(y, np.float64)
            if not np.isfinite(values).all():
                raise InputError("targets hold NaN or infinity: drop or fill these rows")
            return values, None
        tasks = self.tasks
        target = Target.from_values(y, next(iter(tasks)) if len(tasks) == 1 else "auto")
        return target.values, target.classes

    def _boost(
        self, family: Family, table: Table, rows: _Rows, held: _Rows | None, seed: int, rounds: int
    ) -> tuple[Any, np.ndarray]:
        """Grow trees on `rows`; stop early by the loss of `held` where it is given."""
        import lightgbm as lgb

        start = marginal_parameters(family, rows.y, rows.weights, rows.censored)
        outputs = len(start)

        def gradient(predicted: np.ndarray, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
            theta = predicted.reshape(len(rows.y), outputs)
            if self.natural_gradient:
                slope = natural_gradient(family, rows.y, theta, rows.censored)
            else:
                slope = family.gradient(rows.y, theta, rows.censored)[0]
            slope = np.nan_to_num(slope, nan=0.0)
            if self.natural_gradient and outputs > 1:
                slope[:, 1:] = np.clip(slope[:, 1:], -_STEP_LIMIT, _STEP_LIMIT)
            weighted = (slope * rows.weights[:, None]).astype(np.float32)
            hessian = np.repeat(rows.weights.astype(np.float32)[:, None], outputs, 1)
            return (weighted, hessian) if outputs > 1 else (weighted[:, 0], hessian[:, 0])

        dataset = lgb.Dataset(
            rows.x,
            init_score=_starting_scores(start, rows, family),
            categorical_feature=list(table.categorical_features),
            params={"min_data_in_bin": 1 if len(rows.y) < 1000 else 3, "verbose": -1},
        )
        parameters = self._parameters(gradient, outputs, len(rows.y), seed)
        if held is None:
            return lgb.train(parameters, dataset, max(rounds, 1)), start

        def held_out(predicted: np.ndarray, dataset: Any) -> tuple[str, float, bool]:
            theta = predicted.reshape(len(held.y), outputs)
            loss = np.minimum(family.loss(held.y, theta, held.censored), 1e6)
            return "loss", float(np.average(loss, weights=held.weights + 1e-12)), False

        valid = dataset.create_valid(held.x, init_score=_starting_scores(start, held, family))
        stop = lgb.early_stopping(self.early_stopping_rounds, verbose=False)
        return lgb.train(parameters, dataset, rounds, [valid], feval=held_out, callbacks=[stop]), start

    def _parameters(self, gradient: Any, outputs: int, rows: int, seed: int) -> dict[str, Any]:
        return {
            "objective": gradient,
            "num_class": outputs,
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            "min_data_in_leaf": min(self.min_rows_per_leaf, max(1, rows // 4)),
            "min_sum_hessian_in_leaf": 0.0,
            "bagging_fraction": self.row_fraction,
            "bagging_freq": int(self.row_fraction < 1),
            "feature_fraction": self.column_fraction,
            "min_data_in_bin": 1 if rows < 1000 else 3,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1 if rows < _ONE_THREAD_ROWS else 0,
            "seed": seed % 10**6,
            "verbose": -1,
        }


def _spread_shift(family: Family, booster: Any, start: np.ndarray, held: _Rows) -> np.ndarray:
    """A constant for every parameter but the first that makes the held-out rows likeliest.

    Trees shrink the spread on the rows they were grown on, and parameters that matter little, such as degrees of
    freedom, are still on their way when boosting stops.
    """
    none = np.zeros(len(start))
    if len(start) == 1 or not family.spread:
        return none
    theta = export_trees(booster, len(start), max(booster.best_iteration, 1))(held.x) + start
    if held.offset is not None:
        theta[:, family.rate] += held.offset
    shift = best_shift(family, held.y, theta, held.weights, held.censored, none, prior_rows=10.0)
    shift[0] = 0.0
    return shift


def _starting_scores(start: np.ndarray, rows: _Rows, family: Family) -> np.ndarray:
    scores = np.broadcast_to(start, (len(rows.y), len(start))).copy()
    if rows.offset is not None:
        scores[:, family.rate] += rows.offset
    return scores.ravel("F")


def _check_offset(offset: Any, family: Family, rows: int) -> np.ndarray | None:
    if offset is None:
        return None
    if family.rate is None:
        raise InputError("an offset is a log exposure, which only poisson and negative_binomial have")
    offset = np.asarray(offset, np.float64)
    if offset.shape != (rows,) or not np.isfinite(offset).all():
        raise InputError(f"the offset needs a finite log exposure per row, shape ({rows},), got {offset.shape}")
    return offset


def _check_censored(censored: Any, family: Family, rows: int) -> np.ndarray | None:
    if censored is None:
        return None
    if not family.censoring:
        raise InputError("censored targets need normal, lognormal, laplace or student_t under the log score")
    censored = np.asarray(censored)
    if censored.shape != (rows,) or not np.isin(censored, [0, 1]).all():
        raise InputError(f"censored needs True or False per row, shape ({rows},), got {censored.shape}")
    return censored.astype(bool)


class NGBoostPredictive(Predictive):
    """The boosted distribution of every row: a sum of trees for each of its parameters."""

    table: Table
    trees: BoostedTrees
    start: Float[np.ndarray, " parameters"]
    distribution: str = eqx.field(static=True)
    scoring_rule: str = eqx.field(static=True)
    num_targets: int = eqx.field(static=True)
    classes: tuple | None = None

    def parameters(self, x: Any) -> Float[np.ndarray, "rows parameters"]:
        """Unconstrained parameters of every row, in the order of the family. A `jax.Array` may be traced."""
        features = x if isinstance(x, jax.Array) and self.table.is_array else self.table.trees(x)
        return self.start + self.trees(features)

    def __call__(self, x: Any) -> Distribution:
        """The boosted distribution of every row; for counts, of one unit of exposure."""
        classes = None if self.classes is None else len(self.classes)
        family = family_of(self.distribution, score=self.scoring_rule, classes=classes, targets=self.num_targets)
        return family.distribution(self.parameters(x))

    def members(self, x: Any) -> tuple[Distribution, np.ndarray]:
        """One member: boosting has no spread of its own, so nothing of it counts as epistemic."""
        return put_together(jax.tree.map(lambda a: a[None], take_apart(self(x)))), np.ones(1)
