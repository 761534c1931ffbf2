"""Natural gradient boosting: every parameter of the predictive distribution is boosted, with LightGBM's trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.distribution import put_together, take_apart
from bayeslens.core.errors import InputError
from bayeslens.core.learner import Learner, Predictive
from bayeslens.core.mixture import mix_members
from bayeslens.core.table import Table, Target, take
from bayeslens.learners.boosted_trees import BoostedTrees
from bayeslens.learners.growing_trees import GrowingTrees
from bayeslens.learners.linear import check_weights
from bayeslens.learners.natural_gradient import Family, best_shift, marginal_parameters, natural_gradient
from bayeslens.learners.ngboost_families import family_of
from bayeslens.learners.splits import folds, holdout_rows, seed_from

_FOLD_ROWS = 1000  # below this, rounds are chosen by cross-validation: one held-out part would tell too little
_NUM_FOLDS = 5
_LEAST_ROWS = 5  # below this there is nothing to hold out, and the marginal distribution is kept
_HELD_OUT_SHARE = 0.15
_REFIT_ROWS = 100_000  # above this, the held-out rows would change little: the trees without them are kept
_SHIFT_LIMIT = 1.0  # a held-out correction of the spread by more than a factor of e would be one outlier's word
_LEAF_PRIOR_ROWS = 1.0  # a row's worth of belief that a leaf steps like all rows
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


class _Training(NamedTuple):
    """What is fitted: a family, the table that encodes its columns, encoded rows, classes, groups, targets per row."""

    family: Family
    table: Table
    rows: _Rows
    classes: tuple | None
    groups: np.ndarray | None
    num_targets: int


class _Run(NamedTuple):
    """Trees being grown: `grow` adds a round, `loss` is the mean loss so far on the rows `held` out.

    The mean step of all rows is no matter for trees: a tree that finds nothing to split would not take it. `constants`
    are the parameters before trees after each round.
    """

    family: Family
    trees: GrowingTrees
    constants: list[np.ndarray]
    held: _Rows | None
    grow: Callable[[], None]
    loss: Callable[[], float]

    def export(self, rounds: int, shift: np.ndarray) -> tuple[BoostedTrees, np.ndarray]:
        """The first rounds' trees, and the parameters that are added to them."""
        return self.trees.export(rounds), self.constants[rounds] + shift


class _Curves(NamedTuple):
    """Runs that were grown in step: their held-out losses after each round, shape (1 + rounds, runs), and the
    parameters of their held-out rows at the best round."""

    runs: list[_Run]
    losses: np.ndarray
    parameters: list[np.ndarray]

    def choose(self, which: Sequence[int]) -> tuple[int, np.ndarray]:
        """The rounds and the shift of the spread that suit the held-out rows of some of the runs."""
        held = [self.runs[i].held for i in which]
        mean = np.average(self.losses[:, list(which)], axis=1, weights=[h.weights.sum() for h in held])
        shift = _spread_shift(self.runs[0].family, held, [self.parameters[i] for i in which])
        return int(mean.argmin()), shift


class NGBoost(Learner):
    """Natural gradient boosting (Duan, Avati, Ding, Thai, Basu, Ng and Schuler 2020).

    Each round grows one tree per parameter of the predictive distribution, on the natural gradient. The paper scales
    each round's step by a line search; here the learning rate is fixed and held-out rows say when to stop, which
    needs no further passes over the rows (`benchmarks/boosting.py` compares the scores). The rounds are chosen by
    5-fold cross-validation below 1,000 rows and on 15% of the rows above, and the trees are then grown on all rows;
    above 100,000 rows the trees of that first pass are kept.

    Args:
        distribution: `auto` (Normal; Bernoulli or Categorical for classes; multivariate Normal for several targets),
            or a name of `ngboost_families`.
        scoring_rule: `log`, or `crps`, which outliers move less and which for classes is the Brier score; several
            or censored targets have the log score alone.
        num_trees: rounds at most. 500 at this learning rate suffice for most tables.
        learning_rate: shrinkage of every round; 0.05.
        num_leaves: of a tree; 8, as many as a tree of depth 3, the default of the paper's own code.
        min_rows_per_leaf: least total weight in a leaf; 10.
        row_fraction: share of rows drawn for each round; half, as Friedman (2002) recommends, regularizes.
        column_fraction: share of columns drawn for each tree; 0.8 likewise.
        early_stopping_rounds: rounds without a better held-out score after which boosting stops; 0 grows all
            `num_trees` on all rows.
        natural_gradient: False boosts with the ordinary gradient, to see what the natural one brings.
        num_members: 1; more are fitted to bootstrap samples of the rows, and what they disagree on is epistemic.

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
    row_fraction: float = 0.5
    column_fraction: float = 0.8
    early_stopping_rounds: int = 25
    natural_gradient: bool = True
    num_members: int = 1

    takes: ClassVar[frozenset[str]] = frozenset({"weights", "offset", "censored", "groups"})

    @property
    def tasks(self) -> frozenset[str]:
        """Classification for bernoulli and categorical, regression for other names, both for auto."""
        if self.distribution == "auto":
            return frozenset({"regression", "classification"})
        classes = self.distribution in ("bernoulli", "categorical")
        return frozenset({"classification" if classes else "regression"})

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        key: Any,
        weights: Any = None,
        offset: Any = None,
        censored: Any = None,
        groups: Any = None,
    ) -> NGBoostPredictive:
        """See `Learner.fit`. It can be interrupted between rounds; nothing is then kept.

        Args:
            X: rows.
            y: targets, shape (rows,); or (rows, targets) for a multivariate Normal.
            key: a `jax.random.key`.
            weights: how much each row counts; rows of weight 0 are not looked at.
            offset: log exposure of each row, for Poisson and negative binomial; predictions are per unit exposure.
            censored: True where the target is only known to be larger than `y`. The natural gradient keeps the
                metric of uncensored rows.
            groups: a label per row; rows of a group are held out together.

        Raises:
            InputError: a target, family, setting or argument that do not go together.
        """
        self._check_settings()
        training = self._prepare(X, y, weights, offset, censored, groups)
        seed = seed_from(key)
        rows, splits = training.rows, self._splits(training, seed)
        if not splits:
            rounds = 0 if len(rows.y) < _LEAST_ROWS else self.num_trees
            return self._grow_members(training, rounds, np.zeros(1), seed)
        runs = [self._start(training, rows.take(train), rows.take(held), seed) for train, held in splits]
        chosen = self._grow_together(runs).choose(range(len(runs)))
        if len(rows.y) > _REFIT_ROWS and self.num_members == 1:
            return self._predictive(training, [runs[0].export(*chosen)])
        return self._grow_members(training, *chosen, seed)

    def fit_folds(
        self, X: Any, target: Target, splits: Sequence[tuple], *, key: Any, weights: Any = None
    ) -> tuple[list[NGBoostPredictive], Callable[[Any], NGBoostPredictive]]:
        """Fit on the training part of every split, and on all rows, with rounds that were chosen together.

        The rounds of each part are those that suit the held-out rows of all other splits: how well a row is predicted
        has no say in its own prediction, and no part has to be cross-validated once more.

        Args:
            X: rows.
            target: of all rows.
            splits: pairs of training and held-out row numbers; a single pair has no other, and is fitted by itself.
            key: a `jax.random.key`.
            weights: of all rows.

        Returns:
            A predictive for each split, and a function of a key that fits on all rows.
        """
        if not self.early_stopping_rounds or min(len(train) for train, _ in splits) < _LEAST_ROWS or len(splits) == 1:
            return super().fit_folds(X, target, splits, key=key, weights=weights)
        self._check_settings()
        seed, parts, runs, weights = seed_from(key), [], [], check_weights(weights, len(target.values))
        for train, held in splits:
            parts.append(self._prepare(take(X, train), target.rows(train), weights[train]))
            rest = _Rows(parts[-1].table.trees(take(X, held)), target.values[held], weights[held], None, None)
            runs.append(self._start(parts[-1], parts[-1].rows, rest, seed))
        curves = self._grow_together(runs)
        fitted = []
        for number, part in enumerate(parts):
            chosen = curves.choose([other for other in range(len(runs)) if other != number])
            if self.num_members == 1:
                fitted.append(self._predictive(part, [runs[number].export(*chosen)]))
            else:
                fitted.append(self._grow_members(part, *chosen, seed))
        chosen = curves.choose(range(len(runs)))
        return fitted, lambda key: self._grow_members(self._prepare(X, target, weights), *chosen, seed_from(key))

    def _check_settings(self) -> None:
        least_of = {"num_trees": 1, "num_leaves": 2, "min_rows_per_leaf": 1, "num_members": 1}
        for name, least in (least_of | {"early_stopping_rounds": 0}).items():
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "row_fraction", "column_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")

    def _targets(self, y: Any) -> tuple[np.ndarray, tuple | None]:
        if np.ndim(y) == 2 and np.shape(y)[1] > 1:
            values = np.asarray(y, np.float64)
            if not np.isfinite(values).all():
                raise InputError("targets hold NaN or infinity: drop or fill these rows")
            return values, None
        tasks = self.tasks
        target = Target.from_values(y, next(iter(tasks)) if len(tasks) == 1 else "auto")
        return target.values, target.classes

    def _prepare(
        self, X: Any, y: Any, weights: Any, offset: Any = None, censored: Any = None, groups: Any = None
    ) -> _Training:
        """Check all arguments, and encode the rows."""
        values, classes = self._targets(y)
        count = len(values)
        if np.shape(X)[0] != count:
            raise InputError(f"X has {np.shape(X)[0]} rows and y has {count}: they must agree")
        weights, num_targets = check_weights(weights, count), values.shape[1] if values.ndim == 2 else 1
        num_classes = None if classes is None else len(classes)
        family = family_of(self.distribution, score=self.scoring_rule, classes=num_classes, targets=num_targets)
        family.check(values)
        table = Table.from_data(X, weights)
        offset, censored = _check_offset(offset, family, count), _check_censored(censored, family, count)
        groups = _check_groups(groups, count)
        rows = _Rows(table.trees(X), values, weights, offset, censored)
        if (weights == 0).any():
            rows, groups = rows.take(weights > 0), None if groups is None else groups[weights > 0]
        return _Training(family, table, rows, classes, groups, num_targets)

    def _splits(self, training: _Training, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows to grow on and to hold out; none when the number of rounds is given."""
        rows, groups = training.rows, training.groups
        count = len(rows.y)
        if count < _LEAST_ROWS or not self.early_stopping_rounds:
            return []
        if count < _FOLD_ROWS:
            return folds(Target(rows.y, training.classes), num_folds=_NUM_FOLDS, seed=seed, groups=groups)
        if groups is not None:
            return [holdout_rows(count, seed=seed, groups=groups, share=_HELD_OUT_SHARE)]
        out = np.random.default_rng(seed).random(count) < _HELD_OUT_SHARE
        return [(np.flatnonzero(~out), np.flatnonzero(out))]

    def _grow_members(self, training: _Training, rounds: int, shift: np.ndarray, seed: int) -> NGBoostPredictive:
        """A given number of rounds on all rows, or for several members on bootstrap samples of them."""
        rng, members, rows = np.random.default_rng(seed), [], training.rows
        for member in range(self.num_members):
            drawn = rows
            if self.num_members > 1:
                times = np.bincount(rng.integers(len(rows.y), size=len(rows.y)), minlength=len(rows.y))
                drawn = rows._replace(weights=rows.weights * times).take(times > 0)
            run = self._start(training, drawn, None, seed + member)
            for _ in range(rounds):
                run.grow()
            members.append(run.export(rounds, shift))
        return self._predictive(training, members)

    def _predictive(self, training: _Training, members: list[tuple[BoostedTrees, np.ndarray]]) -> NGBoostPredictive:
        trees, starts = tuple(t for t, _ in members), np.stack([start for _, start in members])
        settings = self.distribution, self.scoring_rule, training.num_targets, training.classes
        return NGBoostPredictive(training.table, trees, starts, *settings)

    def _grow_together(self, runs: list[_Run]) -> _Curves:
        """Grow all runs in step until their held-out loss has not fallen for a while."""
        sizes = np.array([run.held.weights.sum() for run in runs])
        losses = [[run.loss() for run in runs]]
        best, least = 0, np.dot(losses[0], sizes)
        while len(losses) <= self.num_trees and len(losses) - 1 - best < self.early_stopping_rounds:
            for run in runs:
                run.grow()
            losses.append([run.loss() for run in runs])
            if np.dot(losses[-1], sizes) < least:
                best, least = len(losses) - 1, np.dot(losses[-1], sizes)
        held_out = []
        for run in runs:
            trees, constant = run.export(best, np.zeros(1))
            held_out.append(_parameters_of(trees(run.held.x), constant, run.held, run.family))
        return _Curves(runs, np.array(losses), held_out)

    def _start(self, training: _Training, rows: _Rows, held: _Rows | None, seed: int) -> _Run:
        """Parameters of the marginal distribution, and no trees yet."""
        family, categorical = training.family, training.table.categorical_features
        constants = [marginal_parameters(family, rows.y, rows.weights, rows.censored)]
        settings, outputs = self._tree_settings(rows.weights, seed), len(constants[0])
        trees = GrowingTrees(rows.x, None if held is None else held.x, categorical, settings, outputs)
        total, counted = rows.weights.sum(), bool((rows.weights != 1).any())
        hessian = np.tile(rows.weights.astype(np.float32), (outputs, 1)).T

        def grow() -> None:
            theta = _parameters_of(trees.sums, constants[-1], rows, family)
            if self.natural_gradient:
                slope = natural_gradient(family, rows.y, theta, rows.censored)
            else:
                slope = family.gradient(rows.y, theta, rows.censored)[0]
            if not np.isfinite(slope.sum()):
                slope = np.nan_to_num(slope, nan=0.0)
            if self.natural_gradient and outputs > 1:
                np.clip(slope[:, 1:], -_STEP_LIMIT, _STEP_LIMIT, out=slope[:, 1:])
            mean = rows.weights @ slope / total
            slope = slope - mean
            if counted:
                slope *= rows.weights[:, None]
            trees.grow(slope, hessian)
            constants.append(constants[-1] - self.learning_rate * mean)

        def loss() -> float:
            theta = _parameters_of(trees.held_sums, constants[-1], held, family)
            return float(np.average(np.minimum(family.loss(held.y, theta, held.censored), 1e6), weights=held.weights))

        return _Run(family, trees, constants, held, grow, loss)

    def _tree_settings(self, weights: np.ndarray, seed: int) -> dict[str, Any]:
        rows = len(weights)
        least = min(self.min_rows_per_leaf, max(1, rows // 4))
        return {
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            # Hessians are weights, so that a row of weight 2 is two rows; small weights are taken for shares.
            "min_data_in_leaf": 1,
            "min_sum_hessian_in_leaf": 0.999 * least * min(1.0, weights.mean()),
            "min_data_per_group": least,
            "bagging_fraction": self.row_fraction,
            "bagging_freq": int(self.row_fraction < 1),
            "feature_fraction": self.column_fraction,
            "lambda_l2": _LEAF_PRIOR_ROWS * min(1.0, weights.mean()),
            "min_data_in_bin": 1 if rows < 1000 else 3,
            "max_bin": 127,  # half of LightGBM's default: scores are the same, and it is quicker
            "deterministic": True,
            "force_row_wise": True,
            "seed": seed % 10**6,
        }


def _spread_shift(family: Family, held_out: list[_Rows], theta: list[np.ndarray]) -> np.ndarray:
    """A constant for every parameter but the first that makes the held-out rows likeliest.

    Trees shrink the spread on the rows they were grown on, and parameters that matter little, such as degrees of
    freedom, are still on their way when boosting stops.
    """
    none = np.zeros(theta[0].shape[1])
    if len(none) == 1 or not family.spread:
        return none
    y, weights = (np.concatenate([getattr(held, name) for held in held_out]) for name in ("y", "weights"))
    censored = None if held_out[0].censored is None else np.concatenate([held.censored for held in held_out])
    shift = best_shift(family, y, np.concatenate(theta), weights, censored, none, prior_rows=10.0)
    shift[0] = 0.0
    return np.clip(shift, -_SHIFT_LIMIT, _SHIFT_LIMIT)


def _parameters_of(sums: np.ndarray, constant: np.ndarray, rows: _Rows, family: Family) -> np.ndarray:
    """Sums of trees, constants and log exposures."""
    theta = sums + constant
    if rows.offset is not None:
        theta[:, family.rate] += rows.offset
    return theta


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


def _check_groups(groups: Any, rows: int) -> np.ndarray | None:
    if groups is None:
        return None
    groups = np.asarray(groups)
    if groups.shape != (rows,):
        raise InputError(f"groups need a label per row, shape ({rows},), got {groups.shape}")
    return groups


class NGBoostPredictive(Predictive):
    """The boosted distribution of every row: a sum of trees for each of its parameters.

    `trees` and `start`, the parameters before the first tree, have one entry per member.
    """

    table: Table
    trees: tuple[BoostedTrees, ...]
    start: Float[np.ndarray, "members parameters"]
    distribution: str = eqx.field(static=True)
    scoring_rule: str = eqx.field(static=True)
    num_targets: int = eqx.field(static=True)
    classes: tuple | None = None

    traceable: ClassVar[bool] = True

    def parameters(self, x: Any, offset: Any = None) -> Float[np.ndarray, "members rows parameters"]:
        """Unconstrained parameters of every member and row, in the order of the family.

        Args:
            x: rows; a `jax.Array` may be traced, when every column is numeric.
            offset: log exposure of each row, for Poisson and negative binomial; 0, one unit, when None.

        Raises:
            InputError: an offset that does not fit.
        """
        if isinstance(x, jax.Array):
            if not self.table.is_array:
                raise InputError("a traced array needs a table of numeric columns only")
            features = x[:, np.array([i for i, c in enumerate(self.table.columns) if c.num_features], int)]
            theta = jnp.stack([start + trees(features) for trees, start in zip(self.trees, self.start, strict=True)])
        else:
            features = self.table.trees(x)
            theta = np.stack([start + trees(features) for trees, start in zip(self.trees, self.start, strict=True)])
        offset = _check_offset(offset, self._family, theta.shape[1])
        return theta if offset is None else theta + offset[:, None] * np.eye(theta.shape[2])[self._family.rate]

    @property
    def _family(self) -> Family:
        classes = None if self.classes is None else len(self.classes)
        return family_of(self.distribution, score=self.scoring_rule, classes=classes, targets=self.num_targets)

    def __call__(self, x: Any, offset: Any = None) -> Distribution:
        """The boosted distribution of every row, the mixture of the members; for counts, of one unit of exposure, or
        of `offset`, the log exposure of each row."""
        return mix_members(*self.members(x, offset))

    def members(self, x: Any, offset: Any = None) -> tuple[Distribution, np.ndarray]:
        """One distribution per member and row, with equal weights. A single member leaves nothing epistemic."""
        theta = self.parameters(x, offset)
        flat = take_apart(self._family.distribution(theta.reshape(-1, theta.shape[2])))
        shaped = put_together(jax.tree.map(lambda a: a.reshape(*theta.shape[:2], *a.shape[1:]), flat))
        return shaped, np.full(len(self.trees), 1 / len(self.trees), np.float32)
