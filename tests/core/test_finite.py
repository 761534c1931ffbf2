"""Finite kernels against enumeration, on random kernels with many zero probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayeslens.core.errors import InputError
from bayeslens.core.finite import FiniteKernel

TRIALS = 200
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running


def random_rows(rng, *shape, source_ndim=0, zeros=0.4):
    """Random row-stochastic arrays, many entries exactly zero, no row all zero."""
    size = int(np.prod(shape[source_ndim:]))
    rows = rng.gamma(0.7, size=(*shape[:source_ndim], size)) + 1e-3
    mask = rng.random(rows.shape) < zeros
    mask[..., 0] &= ~mask.all(-1)
    rows = np.where(mask, 0, rows)
    return (rows / rows.sum(-1, keepdims=True)).reshape(shape)


def cases(seed=0):
    """Priors on 4 states, kernels 4 -> (3, 2) and (3, 2) -> 5, with zeros."""
    rng = np.random.default_rng(seed)
    prior = np.stack([random_rows(rng, 4) for _ in range(TRIALS)])
    f = np.stack([random_rows(rng, 4, 3, 2, source_ndim=1) for _ in range(TRIALS)])
    g = np.stack([random_rows(rng, 3, 2, 5, source_ndim=2) for _ in range(TRIALS)])
    return prior, f, g


def bayes(prior, f):
    """Posterior rows by enumeration, zero where the evidence is zero: shapes (x,), (x, y) to (y, x)."""
    result = np.zeros(f.shape[::-1])
    for y in range(f.shape[1]):
        evidence = sum(prior[x] * f[x, y] for x in range(len(prior)))
        for x in range(len(prior)):
            result[y, x] = prior[x] * f[x, y] / evidence if evidence > 0 else 0.0
    return result


def verbs(prior, f, g):
    """Everything that is compared, for one case."""
    prior, f, g = FiniteKernel.state(prior), FiniteKernel(f), FiniteKernel(g, source_ndim=2)
    marginal, conditional = f.disintegrate(1)
    whole, second, first = (f >> g).invert(prior), g.invert(f.push(prior)), f.invert(prior)
    return {
        "compose": (f >> g).probs,
        "push": (prior >> f >> g).probs,
        "invert": first.probs,
        "domain": first.domain,
        "whole": whole.probs,
        "whole domain": whole.domain,
        "piecewise": (second >> first).probs,
        "piecewise domain": (second >> first).domain,
        "joint": f.joint(prior).probs,
        "marginal": marginal.probs,
        "conditional": conditional.probs,
        "tensor": (f @ prior @ g).probs,
        "swapped": f.marginal(1, 0).probs,
        "posterior": (f >> g).condition(prior, 3)[0].probs,
        "log evidence": (f >> g).condition(prior, 3)[1],
    }


@pytest.fixture(scope="module", params=["float32", "float64"])
def results(request):
    """Cases and what the verbs make of them, compiled and vectorized over the cases."""
    with jax.enable_x64(request.param == "float64"):
        made = jax.jit(jax.vmap(verbs), compiler_options=QUICK)(*(jnp.asarray(a, request.param) for a in cases()))
        return cases(), {k: np.asarray(v) for k, v in made.items()}, 2e-6 if request.param == "float32" else 1e-14


def test_composition_and_products_are_sums_over_paths(results):
    (prior, f, g), made, tolerance = results
    composed = np.einsum("nxab,nabz->nxz", f, g)
    np.testing.assert_allclose(made["compose"], composed, atol=tolerance)
    np.testing.assert_allclose(made["push"], np.einsum("nx,nxz->nz", prior, composed), atol=tolerance)
    np.testing.assert_allclose(made["tensor"], np.einsum("nxab,nw,ncdz->nxcdabwz", f, prior, g), atol=tolerance)
    np.testing.assert_allclose(made["swapped"], f.swapaxes(2, 3), atol=tolerance)


def test_inverse_is_bayes_rule_on_the_support_and_undefined_off_it(results):
    (prior, f, g), made, tolerance = results
    undefined = 0
    for i in range(TRIALS):
        exact = bayes(prior[i], f[i].reshape(4, 6)).reshape(3, 2, 4)
        np.testing.assert_allclose(made["invert"][i], exact, atol=tolerance)
        possible = (prior[i][:, None, None] * f[i]).sum(0) > 0
        assert (made["domain"][i] == possible).all()
        undefined += (~possible).sum()
        exact = bayes(prior[i], np.einsum("xab,abz->xz", f[i], g[i]))
        np.testing.assert_allclose(made["whole"][i], exact, atol=tolerance)
        np.testing.assert_allclose(made["posterior"][i], exact[3], atol=tolerance)
    assert undefined > 50  # the cases do have impossible observations


def test_inverses_compose_exactly_without_choices(results):
    _, made, tolerance = results
    np.testing.assert_allclose(made["piecewise"], made["whole"], atol=tolerance)
    assert (made["piecewise domain"] == made["whole domain"]).all()
    assert not made["whole domain"].all()


def test_disintegration_rebuilds_the_joint(results):
    (prior, f, _), made, tolerance = results
    np.testing.assert_allclose(made["marginal"], f.sum(3), atol=tolerance)
    np.testing.assert_allclose(made["marginal"][..., None] * made["conditional"], f, atol=tolerance)
    defined = made["conditional"].sum(-1)
    np.testing.assert_allclose(defined, f.sum(3) > 0, atol=tolerance)
    np.testing.assert_allclose(made["joint"], prior[:, :, None, None] * f, atol=tolerance)


def test_log_evidence(results):
    (prior, f, g), made, _ = results
    with np.errstate(divide="ignore"):
        exact = np.log(np.einsum("nx,nxab,nab->n", prior, f, g[..., 3]))
    assert np.isneginf(exact).any()
    np.testing.assert_allclose(made["log evidence"], exact, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, compiler_options=QUICK)
def laws(f, prior):
    copy, discard, identity = FiniteKernel.copy((4,)), FiniteKernel.discard((4,)), FiniteKernel.identity((4,))
    f, prior = FiniteKernel(f), FiniteKernel.state(prior)
    left = prior >> copy >> (identity @ f)
    right = f.push(prior) >> FiniteKernel.copy((3,)) >> (f.invert(prior) @ FiniteKernel.identity((3,)))
    return {
        "identity": (identity >> f).isclose(f),
        "copy then forget one": copy.marginal(0).isclose(identity) & copy.marginal(1).isclose(identity),
        "copy then discard one": (copy >> (identity @ discard)).isclose(identity),
        "kernels are normalized": (f >> FiniteKernel.discard((3,))).isclose(discard),
        "a Bayesian inverse, by its string diagram": left.isclose(right) & left.isclose(f.joint(prior)),
        "different kernels are told apart": ~left.isclose(FiniteKernel.state(left.probs[::-1])),
    }


def test_copy_discard_identity_laws():
    held = laws(random_rows(np.random.default_rng(1), 4, 3, source_ndim=1), jnp.array([0.5, 0.0, 0.2, 0.3]))
    assert all(held.values()), held


def test_where_a_composite_is_undefined():
    partial = FiniteKernel([[0.5, 0.5], [0.0, 0.0]])
    rows = (FiniteKernel([[1.0, 0.0], [1 - 1e-6, 1e-6]]) >> partial).probs
    assert rows.tolist() == [[0.5, 0.5], [0.0, 0.0]]  # never a row that sums to less than one
    assert not partial.joint(FiniteKernel.state([0.5, 0.5])).probs.any()
    assert partial.joint(FiniteKernel.state([1.0, 0.0])).probs.any()
    assert not partial.isclose(FiniteKernel([[0.5, 0.5], [0.5, 0.5]]))


def test_as_a_numpyro_kernel():
    kernel = FiniteKernel([[[0.1, 0.2], [0.3, 0.4]], [[0.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(kernel(0).log_prob(2), np.log(0.3), rtol=1e-6)  # y = (1, 0), in row-major order
    batch = kernel(np.array([0, 1, 0]))
    assert batch.batch_shape == (3,) and np.isnan(batch.probs[1]).all() and not np.isnan(batch.probs[0]).any()


def test_gradient_of_the_log_evidence():
    f = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    prior = jnp.array([0.25, 0.75])
    slope = jax.grad(lambda p: FiniteKernel(f).condition(FiniteKernel.state(p), 0)[1])(prior)
    np.testing.assert_allclose(slope, f[:, 0] / (prior @ f[:, 0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteKernel([[0.5, 0.4]]), "sum to 0.9"),
        (lambda: FiniteKernel([[1.5, -0.5]]), "negative"),
        (lambda: FiniteKernel([[np.nan, 1.0]]), "missing"),
        (lambda: FiniteKernel([0.5, 0.5], source_ndim=2), "source_ndim"),
        (lambda: FiniteKernel.identity((2,)) >> FiniteKernel.identity((3,)), "cannot compose"),
        (lambda: FiniteKernel.identity((2,)).invert(FiniteKernel.state([1.0])), "prior"),
        (lambda: FiniteKernel.identity((2,)).invert(FiniteKernel.identity((2,))), "prior"),
        (lambda: FiniteKernel.identity((2,)).condition(FiniteKernel.state([0.5, 0.5]), 2), "outside"),
        (lambda: FiniteKernel.identity((2,)).given((0, 0)), "indices"),
        (lambda: FiniteKernel.identity((2,))((0, 0)), "indices"),
        (lambda: FiniteKernel.identity((2,)).marginal(0, 0), "different axes"),
        (lambda: FiniteKernel.identity((2,)).marginal(1), "different axes"),
        (lambda: FiniteKernel.identity((2,)).disintegrate(2), "condition on"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
