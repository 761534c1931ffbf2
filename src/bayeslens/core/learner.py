"""Learners and predictives: kernels made from data, and how they are made."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float
from numpyro.distributions import Distribution

from bayeslens.core.errors import InputError
from bayeslens.core.kernel import Kernel
from bayeslens.core.mixture import mix_members
from bayeslens.core.table import Table, Target, take


class Predictive(Kernel):
    """A kernel made from data: one marginal distribution per row of a table or array.

    A subclass gives `members` and two attributes: `table`, which turns frames and arrays into features,
    and `classes` (None for regression). `traceable` says whether a call on a `jax.Array` may run under
    `jax.jit`; `differentiable` whether its gradient in `x` means something.
    """

    table: eqx.AbstractVar[Table]
    classes: eqx.AbstractVar[tuple | None]
    traceable: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False

    @abc.abstractmethod
    def members(self, x: Any) -> tuple[Distribution, Float[np.ndarray, " members"]]:
        """The distributions of each member, batch shape (members, rows), and the members' weights.

        What members disagree on is not known (epistemic); what each of them leaves open is random (aleatoric).
        """

    def __call__(self, x: Any) -> Distribution:
        """The marginal distribution of every row, batch shape (rows,): the mixture of the members."""
        distribution, weights = self.members(x)
        return mix_members(distribution, weights)

    def joint(self, x: Any) -> Distribution:
        """One distribution over all rows, event shape (rows,): a mixture over members of independent rows.

        Gaussian processes override this with their exact joint.
        """
        distribution, weights = self.members(x)
        return mix_members(distribution.to_event(1), weights)

    @property
    def task(self) -> str:
        """`"regression"` or `"classification"`."""
        return "regression" if self.classes is None else "classification"


class Learner(eqx.Module):
    """Hyperparameters and nothing fitted; `fit` returns a `Predictive`.

    `tasks` names what it can learn. `takes` names the optional arguments that `fit` accepts
    (`"weights"`, `"offset"`, `"censored"`).
    """

    tasks: ClassVar[frozenset[str]] = frozenset({"regression"})
    takes: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def fit(self, X: Any, y: Any, *, key: Any, **arguments: Any) -> Predictive:
        """Learn from rows `X` (frame or array) and their targets `y`.

        Args:
            X: a DataFrame or an array of shape (rows, columns).
            y: targets, shape (rows,): numbers for regression, labels of any kind for classification,
                or a `Target` that is already encoded.
            key: a `jax.random.key`; learners without randomness ignore it.
            weights: shape (rows,), where `takes` has it: how much each row counts.
        """

    def fit_folds(
        self, X: Any, target: Target, splits: Sequence[tuple], *, key: Any, weights: Any = None
    ) -> tuple[list[Predictive], Callable[[Any], Predictive]]:
        """Fit on the training rows of every split of a cross-validation.

        Learners that choose a setting by cross-validation of their own override this, to choose it once for all.

        Args:
            X: rows.
            target: of all rows.
            splits: pairs of training and held-out row numbers.
            key: a `jax.random.key`.
            weights: of all rows.

        Returns:
            The predictive of each split, and a function of a key that fits on all rows.

        Raises:
            InputError: weights for a learner that takes none.
        """
        keys = jax.random.split(key, len(splits))
        fitted = [fit_rows(self, X, target, rows, k, weights) for k, (rows, _) in zip(keys, splits, strict=True)]
        return fitted, lambda key: fit_rows(self, X, target, None, key, weights)


def fit_rows(learner: Learner, X: Any, target: Target, rows: np.ndarray | None, key: Any, weights: Any) -> Predictive:
    """Fit on some rows, with weights where the learner takes them."""
    arguments = {"key": key}
    if weights is not None:
        if "weights" not in learner.takes:
            raise InputError(f"{type(learner).__name__} does not take weights")
        arguments["weights"] = weights if rows is None else weights[rows]
    if rows is None:
        return learner.fit(X, target, **arguments)
    return learner.fit(take(X, rows), target.rows(rows), **arguments)
