"""Natural gradient boosting: every parameter of the predictive distribution is boosted, with LightGBM's trees."""

from __future__ import annotations

from collections.abc import Callable
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
from bayeslens.core.table import Table, Target
from bayeslens.learners.boosted_trees import BoostedTrees, export_trees
from bayeslens.learners.linear import check_weights
from bayeslens.learners.ngboost_families import Family, best_shift, family_of, marginal_parameters, natural_gradient
from bayeslens.learners.splits import folds, holdout_rows

_FOLD_ROWS = 1000  # below this, rounds are chosen by cross-validation: one held-out part would tell too little
_NUM_FOLDS = 5
_LEAST_ROWS = 5  # below this there is nothing to hold out, and the marginal distribution is kept
_HELD_OUT_SHARE = 0.15
_REFIT_ROWS = 100_000  # above this, the held-out rows would change little: the trees without them are kept
_SHIFT_LIMIT = 1.0  # a held-out correction of the spread by more than a factor of e would be one outlier's word
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


class _Run(NamedTuple):
    """Trees being grown: `grow` adds a round, `loss` is the mean held-out loss so far."""

    booster: Any
    start: np.ndarray
    grow: Callable[[], None]
    loss: Callable[[], float]


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
        scoring_rule: `log` or `crps` (normal, lognormal and laplace only).
        num_trees: rounds at most. 500 at this learning rate suffice for most tables.
        learning_rate: shrinkage of every round; 0.05.
        num_leaves: of a tree; 8, as many as a tree of depth 3, the default of the paper's own code.
        min_rows_per_leaf: least total weight in a leaf; 10.
        row_fraction: share of rows drawn for each round; 0.8 regularizes and is quicker.
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
    row_fraction: float = 0.8
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
        values, classes = self._targets(y)
        count = len(values)
        if np.shape(X)[0] != count:
            raise InputError(f"X has {np.shape(X)[0]} rows and y has {count}: they must agree")
        weights = check_weights(weights, count)
        family = family_of(
            self.distribution,
            score=self.scoring_rule,
            classes=None if classes is None else len(classes),
            targets=values.shape[1] if values.ndim == 2 else 1,
        )
        family.check(values)
        table = Table.from_data(X, weights)
        offset, censored = _check_offset(offset, family, count), _check_censored(censored, family, count)
        groups = _check_groups(groups, count)
        rows = _Rows(table.trees(X), values, weights, offset, censored)
        if (weights == 0).any():
            rows, groups = rows.take(weights > 0), None if groups is None else groups[weights > 0]
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        members = self._fit_members(family, table, rows, classes, groups, seed)
        shape = values.shape[1] if values.ndim == 2 else 1
        trees, starts = tuple(t for t, _ in members), np.stack([start for _, start in members])
        return NGBoostPredictive(table, trees, starts, self.distribution, self.scoring_rule, shape, classes)

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

    def _fit_members(
        self, family: Family, table: Table, rows: _Rows, classes: tuple | None, groups: Any, seed: int
    ) -> list[tuple[BoostedTrees, np.ndarray]]:
        """Trees and starting parameters of every member."""
        count, shift, rounds = len(rows.y), 0.0, self.num_trees
        if count < _LEAST_ROWS:
            rounds = 0
        elif self.early_stopping_rounds:
            if count < _FOLD_ROWS:
                splits = folds(Target(rows.y, classes), num_folds=_NUM_FOLDS, seed=seed, groups=groups)
            elif groups is not None:
                splits = [holdout_rows(count, seed=seed, groups=groups, share=_HELD_OUT_SHARE)]
            else:
                out = np.random.default_rng(seed).random(count) < _HELD_OUT_SHARE
                splits = [(np.flatnonzero(~out), np.flatnonzero(out))]
            held_out = [rows.take(held) for _, held in splits]
            runs = [
                self._start(family, table, rows.take(train), held, seed)
                for (train, _), held in zip(splits, held_out, strict=True)
            ]
            rounds = self._best_rounds(runs, [held.weights.sum() for held in held_out])
            shift = _spread_shift(family, runs, held_out, rounds)
            if count > _REFIT_ROWS and self.num_members == 1:
                return [(export_trees(runs[0].booster, len(runs[0].start), rounds), runs[0].start + shift)]
        rng, members = np.random.default_rng(seed), []
        for member in range(self.num_members):
            drawn = rows
            if self.num_members > 1:
                times = np.bincount(rng.integers(count, size=count), minlength=count)
                drawn = rows._replace(weights=rows.weights * times).take(times > 0)
            run = self._start(family, table, drawn, None, seed + member)
            for _ in range(rounds):
                run.grow()
            members.append((export_trees(run.booster, len(run.start), rounds), run.start + shift))
        return members

    def _best_rounds(self, runs: list[_Run], sizes: list[float]) -> int:
        """Grow all runs in step until their held-out loss has not fallen for a while; the rounds at its least."""
        best, least = 0, np.average([run.loss() for run in runs], weights=sizes)
        for number in range(1, self.num_trees + 1):
            for run in runs:
                run.grow()
            loss = np.average([run.loss() for run in runs], weights=sizes)
            if loss < least:
                best, least = number, loss
            elif number - best >= self.early_stopping_rounds:
                break
        return best

    def _start(self, family: Family, table: Table, rows: _Rows, held: _Rows | None, seed: int) -> _Run:
        """Parameters of the marginal distribution, and a booster without trees yet."""
        import lightgbm as lgb

        start = marginal_parameters(family, rows.y, rows.weights, rows.censored)
        outputs = len(start)
        hessian = np.repeat(rows.weights.astype(np.float32)[:, None], outputs, 1)

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
            return (weighted, hessian) if outputs > 1 else (weighted[:, 0], hessian[:, 0])

        def held_out(predicted: np.ndarray, dataset: Any) -> tuple[str, float, bool]:
            theta = predicted.reshape(len(held.y), outputs)
            loss = np.minimum(family.loss(held.y, theta, held.censored), 1e6)
            return "loss", float(np.average(loss, weights=held.weights)), False

        parameters = self._parameters(outputs, rows.weights, seed)
        categorical = list(table.categorical_features)
        scores = _starting_scores(start, rows, family)
        dataset = lgb.Dataset(rows.x, init_score=scores, categorical_feature=categorical, params=parameters).construct()
        if not any(dataset.feature_num_bin(i) > 1 for i in range(rows.x.shape[1])):
            # LightGBM refuses features without a possible split; the marginal is then all there is to say.
            loss = (
                None
                if held is None
                else held_out(_starting_scores(start, held, family).reshape(-1, outputs, order="F"), None)[1]
            )
            return _Run(None, start, lambda: None, lambda: loss)
        booster = lgb.Booster(parameters, dataset)
        if held is not None:
            scores = _starting_scores(start, held, family)
            booster.add_valid(dataset.create_valid(held.x, init_score=scores, params=parameters), "held out")
        return _Run(booster, start, lambda: booster.update(fobj=gradient), lambda: booster.eval_valid(held_out)[0][2])

    def _parameters(self, outputs: int, weights: np.ndarray, seed: int) -> dict[str, Any]:
        rows = len(weights)
        least = min(self.min_rows_per_leaf, max(1, rows // 4))
        return {
            "objective": "none",
            "metric": "none",
            "num_class": outputs,
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            # Hessians are weights, so that a row of weight 2 is two rows; small weights are taken for shares.
            "min_data_in_leaf": 1,
            "min_sum_hessian_in_leaf": 0.999 * least * min(1.0, weights.mean()),
            "min_data_per_group": least,
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


def _spread_shift(family: Family, runs: list[_Run], held_out: list[_Rows], rounds: int) -> np.ndarray:
    """A constant for every parameter but the first that makes the held-out rows likeliest.

    Trees shrink the spread on the rows they were grown on, and parameters that matter little, such as degrees of
    freedom, are still on their way when boosting stops.
    """
    none = np.zeros(len(runs[0].start))
    if len(none) == 1 or not family.spread:
        return none
    theta = []
    for run, held in zip(runs, held_out, strict=True):
        scores = _starting_scores(run.start, held, family).reshape(-1, len(none), order="F")
        theta.append(scores + export_trees(run.booster, len(none), rounds)(held.x))
    y, weights = (np.concatenate([getattr(held, name) for held in held_out]) for name in ("y", "weights"))
    censored = None if held_out[0].censored is None else np.concatenate([held.censored for held in held_out])
    shift = best_shift(family, y, np.concatenate(theta), weights, censored, none, prior_rows=10.0)
    shift[0] = 0.0
    return np.clip(shift, -_SHIFT_LIMIT, _SHIFT_LIMIT)


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
