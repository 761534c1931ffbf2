"""The report of a posterior as one HTML page: whether to trust it first, then what it says and how it was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import re
from typing import Any, NamedTuple

import numpy as np

from bayeslens.core.posterior import Posterior
from bayeslens.inference.diagnostics import ESS_LIMIT, K_HAT_LIMIT, R_HAT_LIMIT, doubts_of_chains
from bayeslens.report import html
from bayeslens.report.pictures import shorten
from bayeslens.report.posterior_pictures import (
    MAX_MARGINALS,
    drawn_marginals,
    energy_fraction,
    in_digits,
    posterior_panels,
)
from bayeslens.report.posterior_scalars import Scalars, scalars_of, shares
from bayeslens.report.tables import number

MAX_ROWS = 60  # of the table of estimates
_MAX_PLANNED, _MAX_DOUBTS = 40, 30
_ENERGY_LIMIT = 0.3  # Betancourt 2016


class Verdict(NamedTuple):
    """What was found: whether it is good (None if nothing could be checked), what was checked, and every doubt."""

    is_good: bool | None
    checks: list[str]
    doubts: list[str]


def render_posterior(posterior: Posterior) -> str:
    """The report of a posterior as the text of an HTML page; every name in it is escaped."""
    return html.fill("posterior_template.html", _context(posterior))


def _context(posterior: Posterior) -> dict[str, Any]:
    scalars = scalars_of(posterior)

    def pictures(kind: str) -> list[dict[str, Any]]:
        return html.drawings(posterior_panels(scalars, posterior.statistics, kind), kind)

    verdict = judge(posterior, scalars)
    rows, left_out = _rows(scalars)
    chains, count = scalars.draws.shape[1:]
    planned = () if posterior.plan is None else posterior.plan.sites
    mixing = [p for pair in zip(pictures("trace"), pictures("rank"), strict=False) for p in pair] or pictures("trace")
    return {
        "model": _model_name(posterior.model),
        "engine": posterior.engine,
        "kind": scalars.kind,
        "chains": chains,
        "count": count,
        "made": scalars.made,
        "num_sites": len(posterior.names),
        "num_scalars": sum(scalars.sizes.values()),
        "looked_at": len(scalars.names),
        "given": [name for name, value in (posterior.data or {}).items() if value is not None][:6],
        "verdict": verdict._replace(doubts=verdict.doubts[:_MAX_DOUBTS]),
        "more_doubts": max(0, len(verdict.doubts) - _MAX_DOUBTS),
        "is_exact": _is_exact(posterior, scalars),
        "cards": _cards(posterior, scalars),
        "plan": planned[:_MAX_PLANNED],
        "more_planned": max(0, len(planned) - _MAX_PLANNED),
        "plan_notes": () if posterior.plan is None else posterior.plan.notes,
        "rows": rows,
        "left_out": left_out,
        "any_exact": bool(scalars.exact) and (bool(posterior.marginals) or _is_exact(posterior, scalars)),
        "marginals": pictures("marginals"),
        "num_drawn": len(drawn_marginals(scalars)),
        "most_drawn": MAX_MARGINALS,
        "mixing": mixing,
        "pairs": pictures("pairs"),
        "diverging": _diverging(posterior),
        "energy": pictures("energy"),
        "facts": _facts(posterior, scalars),
        "version": importlib.metadata.version("bayeslens"),
        "date": datetime.date.today().isoformat(),
    }


# ---- whether to trust it -----------------------------------------------------------------------------------------


def judge(posterior: Posterior, scalars: Scalars) -> Verdict:
    """What was checked, and every doubt: those that the engine had, and those that its draws give.

    An engine's own sentences are kept; one of ours that finds the same, with whatever numbers and cure, is left out.
    """
    checks, doubts = [], list(posterior.warnings)
    ours: list[str] = []
    if scalars.kind == "chains":
        ours += _doubts_of_chains(posterior, scalars)
        _check_chains(posterior, scalars, checks)
        ours += _check_energy(posterior, checks)
    elif not scalars.finite.all():
        ours.append("some draws are not finite: look for overflow in the model")
    if scalars.weights is not None:
        ours += _check_weights(posterior, scalars, checks)
    if (k_hat := _float(posterior.k_hat)) is not None:
        checks.append(f"Pareto k-hat is {number(k_hat, 2)} (at most {K_HAT_LIMIT} wanted)")
        if not k_hat <= K_HAT_LIMIT and not any("k-hat" in d for d in doubts):
            ours.append(
                f"Pareto k-hat is {number(k_hat, 2)}, above {K_HAT_LIMIT}: the approximation misses parts of the "
                "posterior; try engine nuts, or another parameterization"
            )
    said = {_without_numbers(d) for d in doubts}
    doubts += [d for d in ours if _without_numbers(d) not in said]
    return Verdict(False if doubts else True if checks or _is_exact(posterior, scalars) else None, checks, doubts)


def _without_numbers(sentence: str) -> str:
    return re.sub(r"[\d.,]+|−|inf|∞", "", sentence.partition(":")[0])


def _is_exact(posterior: Posterior, scalars: Scalars) -> bool:
    """Whether an exact engine made it: densities may be approximations, marginals are exact by definition."""
    approximate = posterior.k_hat is not None or posterior.log_evidence_bound is not None
    known = posterior.marginals or (posterior.density and posterior.engine in ("exact", "enumeration"))
    return bool(known) and not approximate and scalars.kind == "independent"


def _doubts_of_chains(posterior: Posterior, scalars: Scalars) -> tuple[str, ...]:
    """Those of the worst scalars alone, which are those of all."""
    if not len(scalars.draws):
        return ()
    worst = set(scalars.worst[:2]) | set(np.flatnonzero(~scalars.finite)[:1])
    for values in (scalars.ess_bulk, scalars.ess_tail):
        if np.isfinite(values).any():
            worst.add(int(np.nanargmin(values)))
    draws = {scalars.names[i]: scalars.draws[i] for i in worst or {0}}
    with np.errstate(all="ignore"):
        return doubts_of_chains(draws, {"diverging": np.asarray(posterior.statistics.get("diverging", 0))})


def _check_chains(posterior: Posterior, scalars: Scalars, checks: list[str]) -> None:
    if np.isfinite(scalars.ess_bulk).any():
        r_hat, least = _worst_r_hat(scalars.r_hat), np.nanmin([scalars.ess_bulk, scalars.ess_tail])
        checks.append(f"R-hat is at most {number(r_hat, 3)} ({R_HAT_LIMIT} allowed)")
        checks.append(f"the least effective sample size is {number(least, 0)} ({ESS_LIMIT} wanted)")
    if (diverging := _diverging(posterior)) is not None:
        transitions = np.size(posterior.statistics["diverging"])
        checks.append(f"{number(diverging, 0) if diverging else 'none'} of {transitions:,} transitions diverged")


def _check_energy(posterior: Posterior, checks: list[str]) -> list[str]:
    fraction = energy_fraction(posterior.statistics)
    if fraction is None:
        return []
    checks.append(f"E-BFMI is at least {number(fraction, 2)} ({_ENERGY_LIMIT} wanted)")
    if fraction >= _ENERGY_LIMIT:
        return []
    return [
        f"E-BFMI is {number(fraction, 2)}, below {_ENERGY_LIMIT}: energies are explored too slowly, so heavy tails may "
        "be missed; try a non-centred parameterization"
    ]


def _check_weights(posterior: Posterior, scalars: Scalars, checks: list[str]) -> list[str]:
    log_weights = np.asarray(posterior.log_weights, np.float64)
    if np.isnan(log_weights).any() or not np.isfinite(log_weights.max()):
        return ["some weights are no numbers: look for overflow in the model"]
    size = effective_size(scalars.weights)
    checks.append(f"the effective size of the weights is {number(size, 0)} ({ESS_LIMIT} wanted)")
    if size >= ESS_LIMIT:
        return []
    return [f"the effective size of the weights is {number(size, 0)}, below {ESS_LIMIT}: use more particles"]


def effective_size(weights: Any) -> float:
    """How many equally weighted draws normalized weights are worth: one over the sum of their squares.

    >>> effective_size(np.full(8, 1 / 8))
    8.0
    """
    return float(1 / np.sum(np.square(weights)))


def _worst_r_hat(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else math.nan


def _diverging(posterior: Posterior) -> int | None:
    diverging = posterior.statistics.get("diverging")
    return None if diverging is None else int(np.sum(np.asarray(diverging)))


def _float(value: Any) -> float | None:
    return None if value is None else float(np.asarray(value))


# ---- figures and tables ------------------------------------------------------------------------------------------


def _cards(posterior: Posterior, scalars: Scalars) -> list[dict[str, Any]]:
    """The key figures: name, value, its error, how to read it, and whether it is doubtful."""
    cards = []

    def card(title: str, value: str, how: str, error: str = "", is_bad: bool = False) -> None:
        cards.append({"title": title, "value": value, "how": how, "error": error, "is_bad": is_bad})

    if scalars.kind == "chains" and np.isfinite(scalars.ess_bulk).any():
        r_hat, least = _worst_r_hat(scalars.r_hat), float(np.nanmin([scalars.ess_bulk, scalars.ess_tail]))
        card("Largest R-hat", number(r_hat, 3), f"1 is perfect; {R_HAT_LIMIT} allowed", is_bad=r_hat > R_HAT_LIMIT)
        how = f"of bulk and tails; {ESS_LIMIT} wanted"
        card("Least effective sample size", number(least, 0), how, is_bad=least < ESS_LIMIT)
    if (diverging := _diverging(posterior)) is not None:
        transitions = np.size(posterior.statistics["diverging"])
        card("Divergent transitions", number(diverging, 0), f"of {transitions:,}; none wanted", is_bad=diverging > 0)
    if scalars.weights is not None:
        size = effective_size(scalars.weights)
        how = f"of {scalars.weights.size:,} particles; {ESS_LIMIT} wanted"
        card("Effective size of the weights", number(size, 0), how, is_bad=size < ESS_LIMIT)
    if (k_hat := _float(posterior.k_hat)) is not None:
        is_bad = not k_hat <= K_HAT_LIMIT
        card("Pareto k-hat", number(k_hat, 2), f"of the approximation; at most {K_HAT_LIMIT} wanted", is_bad=is_bad)
    if (evidence := _float(posterior.log_evidence)) is not None:
        error = _float(posterior.log_evidence_error)
        decimals = 2 if not error or not math.isfinite(error) else int(np.clip(1 - math.floor(math.log10(error)), 0, 6))
        how = "nats; ± is one standard error" if error else "nats, exact" if _is_exact(posterior, scalars) else "nats"
        card("Log evidence", number(evidence, decimals), how, f"± {number(error, decimals)}" if error else "")
    if (bound := _float(posterior.log_evidence_bound)) is not None:
        card("Log evidence", f"≥ {number(bound, 2)}", "nats; a lower bound, up to the noise of its estimate")
    return cards


def _rows(scalars: Scalars) -> tuple[list[dict[str, Any]], str]:
    """Rows of the table of estimates, with a row on what is left out of each site, and a sentence on whole sites."""
    looked_at = {site: scalars.sites.count(site) for site in dict.fromkeys(scalars.sites)}
    shown = shares(looked_at, MAX_ROWS)
    rows, seen = [], dict.fromkeys(shown, 0)
    for i, site in enumerate(scalars.sites):
        if seen[site] < shown[site]:
            rows.append(_row(scalars, i))
        seen[site] += 1
        if shown[site] and seen[site] == looked_at[site] and (more := scalars.sizes[site] - shown[site]):
            rows.append({"more": f"{more:,} more of", "site": site, "rest": _rest(scalars, site, shown[site])})
    absent = [site for site in scalars.sizes if not shown.get(site)]
    return rows, f"{len(absent):,} more sites" if absent else ""


def _row(scalars: Scalars, i: int) -> dict[str, Any]:
    name = scalars.names[i]
    values = (scalars.mean[i], scalars.sd[i], *scalars.quantiles[i])
    texts = in_digits(values[:2], scalars.sd[i]) + in_digits(values[2:], scalars.sd[i], bool(scalars.whole[i]))
    cells = [{"text": text, "is_bad": False} for text in texts]
    if scalars.kind == "chains":
        sizes = (scalars.ess_bulk[i], scalars.ess_tail[i])
        cells += [{"text": number(v, 0), "is_bad": bool(v < ESS_LIMIT)} for v in sizes]
        cells.append({"text": number(scalars.r_hat[i], 3), "is_bad": bool(scalars.r_hat[i] > R_HAT_LIMIT)})
    return {"name": name, "cells": cells, "is_exact": name in scalars.exact}


def _rest(scalars: Scalars, site: str, shown: int) -> str:
    """How well the scalars of a site do that have no row."""
    index = [i for i, s in enumerate(scalars.sites) if s == site][shown:]
    if scalars.kind != "chains" or not np.isfinite(scalars.ess_bulk[index]).any():
        return ""
    least = np.nanmin([scalars.ess_bulk[index], scalars.ess_tail[index]])
    return f"R-hat at most {number(_worst_r_hat(scalars.r_hat[index]), 3)}, ESS at least {number(least, 0)}"


def _facts(posterior: Posterior, scalars: Scalars) -> list[tuple[str, str]]:
    chains, count = scalars.draws.shape[1:]
    facts = [("Engine", posterior.engine or "not recorded")]
    if scalars.made:
        facts.append(("Draws", f"{count:,}, made from the density for this report"))
    else:
        what = "weighted particles" if scalars.kind == "weights" else "draws"
        facts.append(("Draws", f"{chains:,} × {count:,} {what}" if chains != 1 else f"{count:,} {what}"))
    settings = {n: v for n, v in posterior.settings.items() if n != "key"}
    if settings:
        facts.append(("Settings", ", ".join(f"{n} = {shorten(v, 60)}" for n, v in list(settings.items())[:30])))
    key = posterior.settings.get("key")
    if key is not None:
        facts.append(("Key", f"jax.random.wrap_key_data(np.uint32({shorten(key, 60)}))"))
    if posterior.data:
        facts.append(("Data", ", ".join(f"{n}: {_described(v)}" for n, v in list(posterior.data.items())[:30])))
    if posterior.versions:
        facts.append(("Made by", ", ".join(f"{n} {v}" for n, v in posterior.versions.items())))
    return facts


def _described(value: Any) -> str:
    if value is None or isinstance(value, str):
        return "not given" if value is None else shorten(value, 40)
    shape = np.shape(value)
    return f"{' × '.join(f'{s:,}' for s in shape)} numbers" if shape else number(np.asarray(value))


def _model_name(model: Any) -> str | None:
    """The name of the program, inside handlers such as `seed`; None where it has none that says something."""
    for _ in range(10):
        name = getattr(model, "__name__", None)
        if name:
            return None if name == "<lambda>" else str(name)
        model = getattr(model, "fn", None) or getattr(model, "func", None)
    return None
