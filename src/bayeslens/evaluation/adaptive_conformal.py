"""Online conformal prediction: thresholds for a series whose distribution may drift in any way."""

from __future__ import annotations

import bisect
import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from bayeslens.core.errors import InputError
from bayeslens.evaluation.conformal import check_coverage, check_scores

_STEPS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
_HORIZON = 500  # steps over which the best expert is followed


class AdaptiveConformal(NamedTuple):
    """Thresholds of a series, each made from earlier scores alone.

    `threshold[t]` bounds the score at time t (infinite: everything belongs; minus infinite: nothing does), `level[t]`
    is the miscoverage that was asked of the earlier scores to get there, and `covered[t]` whether the score was within;
    `coverage` is what was wanted.
    """

    threshold: Float[np.ndarray, " times"]
    level: Float[np.ndarray, " times"]
    covered: Bool[np.ndarray, " times"]
    coverage: float


def adaptive_conformal_inference(
    scores: Any, coverage: float, *, step: float | None = None, window: int | None = None
) -> AdaptiveConformal:
    """Adaptive conformal inference: after every miss the sets grow, after every hit they shrink a little.

    The threshold at time t is the conformal quantile of earlier scores at miscoverage a(t), and a(t + 1) = a(t) + step
    (alpha - missed(t)). With a fixed step, whatever the series does, the share of misses after T steps differs from
    alpha = 1 - coverage by at most (max(alpha, 1 - alpha) + step) / (step T). By default eight steps from 0.001 to
    0.128 run side by side, and are averaged by exponential weights on how well they did lately (DtACI), so that no
    step has to be chosen.

    Args:
        scores: nonconformity scores in the order of time, larger for stranger, shape (times,).
        coverage: wanted share of scores within their thresholds.
        step: of the miscoverage level, positive; None weighs eight of them.
        window: how many of the latest scores make the quantile; None takes all earlier ones.

    Raises:
        InputError: missing scores, a step that is not positive or an empty window.

    Sources: I. Gibbs, E. Candes, "Adaptive conformal inference under distribution shift" (2021), for a fixed step;
    I. Gibbs, E. Candes, "Conformal inference for online prediction with arbitrary distribution shifts" (2024).

    >>> drift = np.arange(400.0)  # every score is larger than all before
    >>> found = adaptive_conformal_inference(drift, 0.9, step=0.05)
    >>> bool(abs(found.covered.mean() - 0.9) <= (0.9 + 0.05) / (0.05 * 400))
    True
    """
    alpha = 1 - check_coverage(coverage)
    scores = check_scores(scores)
    if step is not None and not (step > 0 and math.isfinite(step)):
        raise InputError(f"step must be positive, got {step}: 0.005 is common, None weighs several")
    if window is not None and window < 1:
        raise InputError(f"window must hold at least one score, got {window}")
    steps = np.array(_STEPS if step is None else [step])
    experts, weights = np.full(len(steps), alpha), np.full(len(steps), 1 / len(steps))
    # Exponential weights for losses with the second moment that they have when ranks are uniform.
    moment = ((1 - alpha) ** 2 * alpha**3 + alpha**2 * (1 - alpha) ** 3) / 3
    rate = math.sqrt((math.log(len(steps) * _HORIZON) + 2) / (_HORIZON * moment))
    share = 1 / (2 * _HORIZON)
    earlier: list[float] = []  # sorted
    latest: deque[float] = deque()
    threshold, level = np.empty(len(scores)), np.empty(len(scores))
    for t, score in enumerate(scores.tolist()):
        level[t] = weights @ experts
        threshold[t] = _quantile(earlier, level[t])
        # The least miscoverage at which the set would have missed.
        edge = 1 - bisect.bisect_left(earlier, score) / (len(earlier) + 1)
        if len(steps) > 1:
            gap = edge - experts
            weights = weights * np.exp(-rate * (alpha * gap - np.minimum(gap, 0)))
            weights = (1 - share) * weights / weights.sum() + share / len(steps)
        missed = experts >= edge
        # Below zero everything belongs; there and above one, the quantile does not know of the edge.
        missed = np.where(experts <= 0, False, np.where(experts >= 1, True, missed))
        experts = experts + steps * (alpha - missed)
        bisect.insort(earlier, score)
        latest.append(score)
        if window is not None and len(latest) > window:
            del earlier[bisect.bisect_left(earlier, latest.popleft())]
    return AdaptiveConformal(threshold, level, scores <= threshold, coverage)


def _quantile(earlier: list[float], level: float) -> float:
    if level <= 0:
        return math.inf
    if level >= 1:
        return -math.inf
    rank = math.ceil((1 - level) * (len(earlier) + 1) - 1e-12)
    return earlier[rank - 1] if rank <= len(earlier) else math.inf
