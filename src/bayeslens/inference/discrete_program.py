"""NumPyro programs as functions of their latents: what their sites are, and their log densities term by term."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.primitives import Messenger

from bayeslens.core.errors import InputError
from bayeslens.inference.factorization import Factorization


class Site(NamedTuple):
    """A site of a program: what an abstract run shows of it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    support: Any  # values of an entry of a discrete latent that is summed out, None of other sites
    kind: str  # sample or param


class Term(NamedTuple):
    """The log density of a site's entries, or of the first or the later steps of a site in a scan."""

    site: str
    is_prior: bool
    entries: Any


class DiscreteProgram:
    """A program without arguments, traced as a function of its latents.

    Args:
        run: the program.
        given: parameters that are inputs too; None for all of them.
    """

    def __init__(self, run: Callable[[], Any], given: Iterable[str] | None = ()):
        from numpyro import handlers

        for handler in _outer_handlers(handlers.condition):
            run = handlers.condition(run, data=handler.data)
        look = _Look()
        sites = _looked_at(run, look)
        latents = [s for s in sites if s.kind == "sample" and s.name not in look.fixed]
        parameters = [s for s in sites if s.kind == "param" and (given is None or s.name in given)]
        self.discrete = [s for s in latents if s.name in look.supports]
        self.free = [s for s in latents if s.name not in look.supports] + parameters
        self._check(look)
        self.terms: list[Term] = []
        self.deterministic: Any = []
        if not self.discrete:
            return

        def traced(*values: Any) -> list[Array]:
            named = dict(zip((s.name for s in (*self.discrete, *self.free)), values, strict=True))
            given = _Given(named, look.scans)
            with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=jax.random.key(0)), given:
                run()
            self.terms = [*_terms(trace), *given.terms]
            made = {n: s["value"] for n, s in trace.items() if s["type"] == "deterministic"} | given.deterministic
            self.deterministic = list(made)
            return [*(t.entries for t in self.terms), *(jnp.asarray(v) for v in made.values())]

        inputs = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in (*self.discrete, *self.free)]
        closed = jax.make_jaxpr(traced)(*inputs)
        self.terms = [t._replace(entries=None) for t in self.terms]
        supports = {i: np.asarray(look.supports[s.name], s.dtype) for i, s in enumerate(self.discrete)}
        self.discrete = [s._replace(support=supports[i]) for i, s in enumerate(self.discrete)]
        names = [*(t.site for t in self.terms), *self.deterministic]
        self.factorization = Factorization(closed, supports, dict(enumerate(s.name for s in self.discrete)), names)
        self.tied_terms = [t for t in range(len(self.terms)) if self.factorization.depends(t)]
        tied = {self.terms[t].site for t in self.tied_terms}
        self.tied_sites = tied - {s.name for s in self.discrete}
        self.tied_latents = tied & {s.name for s in self.free}
        self.deterministic = {n: len(self.terms) + d for d, n in enumerate(self.deterministic)}  # site -> output
        self.tied_deterministic = {n: o for n, o in self.deterministic.items() if self.factorization.depends(o)}

    def _check(self, look: _Look) -> None:
        if look.subsampled:
            raise InputError(
                f"the plates {look.subsampled} take a new part of the data in each run, and discrete sites are summed "
                "out of the whole: leave out subsample_size"
            )
        endless = [s.name for s in self.free if s.name in look.endless]
        if endless:
            raise InputError(
                f"the discrete sites {endless} have infinitely many values, or as many as data or parameters say: "
                "truncate them (a Categorical over the values that matter), give their bounds as plain numbers, or "
                "integrate them out by hand (a Poisson mixed over a Gamma is a GammaPoisson)"
            )
        branched = [s.name for s in self.discrete if s.name in look.branched]
        if branched:
            raise InputError(
                f"the discrete sites {branched} are sampled inside numpyro.contrib.control_flow.cond, which cannot be "
                "summed out: sample them before it"
            )

    def inputs(self, values: dict[str, Any]) -> list[Any]:
        """Inputs of the traced program: nothing for discrete sites, then the values of the others."""
        lacking = [s.name for s in self.free if s.name not in values]
        if lacking:
            raise InputError(f"values of the sites {lacking} are needed: give all continuous latents")
        for site in self.free:
            if jnp.shape(values[site.name]) != site.shape:
                raise InputError(
                    f"the value of {site.name!r} has shape {jnp.shape(values[site.name])}, the site {site.shape}: "
                    "give one draw, and map over draws with jax.vmap"
                )
        return [None] * len(self.discrete) + [jnp.asarray(values[s.name], s.dtype) for s in self.free]

    def density(self, inputs: list[Any], terms: list[int]) -> Array:
        """Sum of terms at values of all their inputs."""
        entries = self.factorization.evaluated(terms, inputs) if terms else []
        return sum((jnp.sum(e) for e in entries), jnp.zeros(()))


# Running programs


def _looked_at(run: Callable, look: _Look) -> list[Site]:
    """Latents and parameters, from an abstract run."""
    from numpyro import handlers

    found: list[Site] = []

    def abstract(key: Any) -> list:
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=key), look:
            run()
        for name, site in trace.items():
            latent = site["type"] == "sample" and not site["is_observed"]
            if latent or site["type"] == "param":
                value = jnp.asarray(site["value"])
                found.append(Site(name, value.shape, value.dtype, None, site["type"]))
        return []

    jax.eval_shape(abstract, jax.random.key(0))
    return found


def _outer_handlers(kind: type) -> list[Any]:
    from numpyro.primitives import _PYRO_STACK

    return [h for h in _PYRO_STACK if isinstance(h, kind) and getattr(h, "data", None)]


def _is_scan(message: dict[str, Any]) -> bool:
    return message["type"] == "control_flow" and message["fn"].__name__ == "scan_wrapper"


class _Look(Messenger):
    """Notes supports of discrete latents, latents that the program fixes itself, and what is inside loops."""

    def __init__(self):
        super().__init__()
        self.supports: dict[str, np.ndarray] = {}
        self.endless: set[str] = set()
        self.fixed: set[str] = set()
        self.branched: set[str] = set()
        self.subsampled: list[str] = []
        self.scans: list[list[str]] = []  # latents of each scan
        self.inside: list[str] | None = None

    def process_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "control_flow":
            f, *rest = message["args"]
            if _is_scan(message):
                self.scans.append([])
                message["args"] = (self._within(f, self.scans[-1]), *rest)
            else:
                names: list[str] = []
                first, second, *operands = rest
                message["args"] = (f, self._within(first, names), self._within(second, names), *operands)
                self.branches = names
        elif message["type"] == "sample" and not message.get("_control_flow_done"):
            self._note(message)
        elif message["type"] == "plate" and message["args"][1] not in (None, message["args"][0]):
            self.subsampled.append(message["name"])

    def postprocess_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "control_flow" and not _is_scan(message):
            self.branched |= set(self.branches)
        elif message["type"] == "sample" and message["is_observed"]:
            self.supports.pop(message["name"], None)

    def _within(self, function: Callable, names: list[str]) -> Callable:
        inner = _Look()
        inner.supports, inner.endless, inner.subsampled = self.supports, self.endless, self.subsampled
        inner.inside = names

        def run(*args: Any) -> Any:
            with inner:
                return function(*args)

        return run

    def _note(self, message: dict[str, Any]) -> None:
        name, law = message["name"], message["fn"]
        if self.inside is not None and name not in self.inside:
            self.inside.append(name)
        if message["value"] is not None:
            self.fixed.add(name)
        if message["value"] is not None or not law.is_discrete:
            if message["value"] is None and _is_improper(law):
                message["value"] = _feasible(law)
            return
        base = law
        while type(base).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
            base = base.base_dist
        try:
            with jax.ensure_compile_time_eval():
                support = np.asarray(base.enumerate_support(expand=False))
            self.supports[name] = support.reshape(-1)
        except (NotImplementedError, TypeError, ValueError, jax.errors.JAXTypeError):
            self.endless.add(name)


def _is_improper(law: Any) -> bool:
    while type(law).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        law = law.base_dist
    return type(law).__name__ == "ImproperUniform"


def _feasible(law: Any) -> Array:
    from numpyro.distributions import biject_to

    transform = biject_to(law.support)
    return transform(jnp.zeros(transform.inverse_shape(law.shape())))


class _Given(Messenger):
    """Gives latents their values, in scans by steps, and gathers the log densities inside scans.

    The first step of a scan is run by itself, since it depends on what comes before the scan.
    """

    def __init__(self, values: dict[str, Any], scans: list[list[str]] = ()):
        super().__init__()
        self.values, self.scans, self.count = values, scans, 0
        self.terms: list[Term] = []
        self.deterministic: dict[str, Array] = {}

    def process_message(self, message: dict[str, Any]) -> None:
        if message["type"] in ("sample", "param") and not message.get("_control_flow_done"):
            if message["name"] in self.values and not message.get("is_observed"):
                message["value"] = self.values[message["name"]]
        elif _is_scan(message):
            if not self.scans:
                raise InputError("a scan inside a scan cannot be summed out: write the inner one as a loop or a plate")
            message["fn"] = functools.partial(self._scan, self.scans[self.count])
            self.count += 1
        elif message["type"] == "control_flow":
            message["kwargs"]["substitute_stack"].append(("substitute", self.values))

    def _scan(
        self, names: list[str], f: Callable, init: Any, xs: Any, length: int | None, reverse: bool, **settings: Any
    ) -> Any:
        from numpyro import handlers
        from numpyro.contrib.control_flow.scan import _subs_wrapper
        from numpyro.ops.pytree import PytreeTrace

        length = jax.tree.leaves(xs)[0].shape[0] if length is None else length
        own = {n: self.values[n] for n in names if n in self.values}
        made: list[Term] = []

        def step(carry: Any, inputs: Any) -> Any:
            i, x, values = inputs
            program = f
            for kind, data in settings["substitute_stack"]:  # handlers inside the program
                substitute = functools.partial(_subs_wrapper, data, i, length)
                if kind == "condition":
                    program = handlers.condition(program, condition_fn=substitute)
                elif kind == "substitute":
                    program = handlers.substitute(program, substitute_fn=substitute)
            inner = _Given(values)
            with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=jax.random.key(0)), inner:
                carry, y = program(carry, x)
            made[:] = _terms(trace)
            kept = {n: s["value"] for n, s in trace.items() if s["type"] == "deterministic"}
            return carry, (y, [t.entries for t in made], kept)

        order = jnp.arange(length)[::-1] if reverse else jnp.arange(length)
        inputs = (order, xs, own)
        first, rest = (-1, slice(None, -1)) if reverse else (0, slice(1, None))
        carry, (y, early, kept) = step(init, jax.tree.map(lambda v: v[first], inputs))
        ys, kept = jax.tree.map(lambda v: jnp.asarray(v)[None], (y, kept))
        self.terms += [t._replace(entries=e) for t, e in zip(made, early, strict=True)]
        if length > 1:
            carry = jax.tree.map(lambda c, before: jnp.asarray(c, jnp.result_type(before)), carry, init)
            later = jax.tree.map(lambda v: v[rest], inputs)
            carry, (more, late, more_kept) = jax.lax.scan(step, carry, later, reverse=reverse)
            self.terms += [t._replace(entries=e) for t, e in zip(made, late, strict=True)]
            pair = (lambda a, b: (b, a)) if reverse else (lambda a, b: (a, b))
            ys, kept = jax.tree.map(lambda a, b: jnp.concatenate(pair(a, b)), (ys, kept), (more, more_kept))
        self.deterministic |= kept
        return (length, None, carry), (PytreeTrace({}), ys)


def _terms(trace: dict[str, dict[str, Any]]) -> list[Term]:
    """Log densities of a trace's sites, not summed over independent entries."""
    found = []
    for name, site in trace.items():
        if site["type"] == "sample":
            entries, extra = _entries(site["fn"], site["value"])
            if site["scale"] is not None:
                scale = jnp.asarray(site["scale"])
                entries = entries * (scale.reshape(scale.shape + (1,) * extra) if scale.ndim else scale)
            found.append(Term(name, not site["is_observed"], jnp.asarray(entries)))
    return found


def _entries(law: Any, value: Any) -> tuple[Array, int]:
    """Log densities of entries, and how many axes they have beyond the distribution's batch shape."""
    kind = type(law).__name__
    if kind == "Independent":
        entries, extra = _entries(law.base_dist, value)
        return entries, extra + law.reinterpreted_batch_ndims
    if kind == "MaskedDistribution" and not isinstance(law._mask, bool):
        entries, extra = _entries(law.base_dist, value)
        return jnp.where(law._mask.reshape(law._mask.shape + (1,) * extra), entries, 0.0), extra
    return law.log_prob(value), 0


class Summed(Messenger):
    """Runs a program for its continuous sites: discrete ones are hidden, densities that depend on them are zero.

    Discrete sites get draws from the prior where there is a key, so that a draw from the program is one of the model.
    """

    def __init__(self, program: DiscreteProgram):
        super().__init__()
        self.supports = {s.name: s.support for s in program.discrete}
        self.wanted = {s.name for s in program.free}
        self.masked = program.tied_sites
        self.hidden = set(program.tied_deterministic)
        self.found: dict[str, Any] = {}

    def process_message(self, message: dict[str, Any]) -> None:
        import numpyro

        name = message.get("name")
        if message["type"] == "sample" and name in self.supports:
            if message["value"] is None:
                message["value"] = self._value(message, numpyro.prng_key())
            message["stop"] = True
        elif message["type"] == "sample" and name in self.masked:
            message["fn"] = message["fn"].mask(False)
        elif message["type"] == "deterministic" and name in self.hidden:
            message["stop"] = True
        elif _is_scan(message):
            f, *rest = message["args"]
            message["args"] = (functools.partial(self._step, message, f), *rest)

    def postprocess_message(self, message: dict[str, Any]) -> None:
        if message.get("name") in self.wanted and message["type"] in ("sample", "param"):
            self.found[message["name"]] = message["value"]

    def _value(self, message: dict[str, Any], key: Any) -> Array:
        shape = (*message["kwargs"]["sample_shape"], *message["fn"].shape())
        if key is None:
            return jnp.full(shape, self.supports[message["name"]][0])
        return message["fn"].sample(key, message["kwargs"]["sample_shape"])

    def _step(self, scan: dict[str, Any], f: Callable, *args: Any) -> Any:
        from numpyro import handlers

        def fixed(message: dict[str, Any]) -> Any:
            if message["name"] in self.supports and scan["kwargs"]["rng_key"] is None:
                return self._value(message, None)
            return None

        with handlers.substitute(substitute_fn=fixed):
            return f(*args)
