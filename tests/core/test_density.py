"""One battery for densities of networks: every way in which JAX and NumPyro pass distributions around."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow
from numpyro.distributions.batch_util import promote_batch_shape

from bayeslens.core.density import ConditionalDensity, Density, over_leading_axes
from bayeslens.core.distribution import put_together, take_apart, take_rows
from bayeslens.core.errors import InputError
from bayeslens.core.mixture import Mixture, mix_members
from bayeslens.core.saving import load, register, save, show
from bayeslens.core.training import train

KEY = jax.random.key(0)


@register("tests.AffineDensity")
class Affine(eqx.Module):
    """x = shift + exp(log_scale) z in two dimensions, through networks: the activation is a leaf, as in any MLP."""

    net: eqx.nn.MLP
    shape: tuple = eqx.field(static=True, default=(2,))

    def _parameters(self, condition):
        out = self.net(jnp.ones(1) if condition is None else condition)
        return out[:2], jnp.tanh(out[2:])

    def log_prob(self, x, condition=None):
        shift, log_scale = self._parameters(condition)
        return (dist.Normal(shift, jnp.exp(log_scale)).log_prob(x)).sum()

    def sample(self, key, condition=None):
        shift, log_scale = self._parameters(condition)
        return shift + jnp.exp(log_scale) * jax.random.normal(key, (2,))


def affine(key: Any = KEY, inputs: int = 1) -> Affine:
    return Affine(eqx.nn.MLP(inputs, 4, 8, 1, activation=jax.nn.tanh, key=key))


def flow(key: Any = KEY) -> Any:
    made = coupling_flow(key, base_dist=Normal(jnp.zeros(2)), flow_layers=2, nn_width=4)
    # Away from the identity at which flowjax starts.
    return jax.tree.map(lambda a: a + 0.1 if eqx.is_inexact_array(a) else a, made)


NETWORKS = {"affine": affine, "flow": flow}
battery = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
# Flows take twice as long to compile as others.
slow_for_flows = pytest.mark.parametrize(
    "make", [pytest.param(affine, id="affine"), pytest.param(flow, marks=pytest.mark.slow, id="flow")]
)


@pytest.fixture(scope="module")
def grid():
    line = np.linspace(-12, 12, 241)
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1), (line[1] - line[0]) ** 2


@slow_for_flows
def test_the_density_is_normalized_and_is_that_of_its_samples(make, grid):
    d = Density(make())
    points, cell = grid
    mass = np.exp(jax.jit(lambda d, x: d.log_prob(x))(d, points)) * cell
    # The trapezoidal rule is exact to rounding for smooth densities inside of the grid.
    np.testing.assert_allclose(mass.sum(), 1.0, atol=2e-3)
    mean = (mass[..., None] * points).sum((0, 1))
    deviation = np.sqrt((mass[..., None] * (points - mean) ** 2).sum((0, 1)))
    draws = np.asarray(d.sample(KEY, (4000,)))
    # Four standard errors in two means and, roughly, two deviations: a false alarm in 4000 keys; the key is fixed.
    assert (np.abs(draws.mean(0) - mean) < 4 * deviation / np.sqrt(4000)).all()
    assert (np.abs(draws.std(0) / deviation - 1) < 0.08).all()


@battery
def test_as_argument_of_jit_vmap_scan_and_grad(make):
    d, x = Density(make()), jnp.array([[0.3, -0.2], [1.0, 2.0], [0.0, 0.0]])
    direct = jnp.stack([d.network.log_prob(row) for row in x])
    close = lambda a: np.testing.assert_allclose(a, direct, rtol=2e-5)  # noqa: E731
    traces = []

    @jax.jit
    def evaluate(d, x):
        traces.append(1)
        return d.log_prob(x)

    close(evaluate(d, x))
    evaluate(jax.tree.map(lambda a: a + 0.01, d), x)
    assert len(traces) == 1
    close(jax.vmap(lambda d, x: d.log_prob(x), in_axes=(None, 0))(d, x))
    _, scanned = jax.lax.scan(lambda d, row: (d, d.log_prob(row)), d, x)
    close(scanned)
    gradient = jax.grad(lambda d: d.log_prob(x).sum(), allow_int=True)(d)
    numbers = [a for a in jax.tree.leaves(gradient) if jnp.issubdtype(a.dtype, jnp.inexact)]
    assert all(np.isfinite(a).all() for a in numbers) and any(np.abs(a).max() > 0 for a in numbers)
    assert d.event_shape == (2,) and d.log_prob(np.zeros((4, 1, 2))).shape == (4, 1)


def test_ensembles_are_batches_of_networks():
    apart = [Density(affine(k)) for k in jax.random.split(KEY, 2)]
    x = jnp.array([[0.3, -0.2], [1.0, 2.0]])
    promoted = promote_batch_shape(jax.tree.map(lambda *a: jnp.stack(a), *apart))
    expected = np.stack([d.log_prob(x) for d in apart], 1)
    assert promoted.batch_shape == (2,)
    np.testing.assert_allclose(promoted.log_prob(x[:, None]), expected, rtol=2e-5)
    assert promoted.sample(KEY, (5,)).shape == (5, 2, 2)
    again = take_rows(promoted, np.array([1]))
    np.testing.assert_allclose(again.log_prob(x[0]), expected[0, 1:], rtol=2e-5)
    assert promote_batch_shape(apart[0]).batch_shape == ()


@pytest.mark.slow
def test_promotion_keeps_older_batch_axes_apart():
    condition = jnp.arange(6.0).reshape(3, 2)
    make = lambda key: Density(affine(key, 2), condition)  # noqa: E731
    keys = jax.random.split(KEY, 2)
    promoted = promote_batch_shape(jax.vmap(make)(keys))
    assert promoted.batch_shape == (2, 3)
    expected = jnp.stack([make(k).log_prob(jnp.ones(2)) for k in keys])
    np.testing.assert_allclose(promoted.log_prob(jnp.ones(2)), expected, rtol=1e-5)
    # Members of a predictive: mixed over the leading axis.
    mixed = mix_members(promoted, np.array([0.25, 0.75])).log_prob(jnp.ones(2))
    np.testing.assert_allclose(mixed, np.log([0.25, 0.75] @ np.exp(expected)), rtol=1e-5)


@slow_for_flows
def test_in_plates_mixtures_and_nuts(make):
    from numpyro.infer import MCMC, NUTS

    prior = Density(make())

    def model(y=None):
        with numpyro.plate("groups", 2):
            z = numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(z, 0.1).to_event(2), obs=y)

    y = jnp.array([[0.5, 0.5], [-0.5, 1.0]])
    if make is flow:  # the harder of the two; compiling NUTS is most of this file's time
        run = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
        run.run(KEY, y)
        # The likelihood is far narrower than the prior: five of its standard deviations.
        np.testing.assert_allclose(run.get_samples()["z"].mean(0), y, atol=0.5)
    traced = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
    assert traced["z"]["value"].shape == (2, 2) and traced["z"]["fn"].log_prob(traced["z"]["value"]).shape == (2,)
    mixture = Mixture(np.array([0.5, 0.5]), [prior, dist.Normal(jnp.zeros(2), 1.0).to_event(1)])
    x = jnp.array([[0.1, 0.2], [1.0, 1.0]])
    expected = 0.5 * jnp.exp(prior.log_prob(x)) + 0.5 * jnp.exp(dist.Normal(0, 1).log_prob(x).sum(-1))
    np.testing.assert_allclose(jax.jit(lambda m: jnp.exp(m.log_prob(x)))(mixture), expected, rtol=1e-4)


def test_saved_and_loaded(tmp_path):
    path, x = tmp_path / "d.bayes", jnp.array([0.3, 0.7])
    d = Density(affine(inputs=3), jnp.ones((5, 3)))
    save({"density": d}, path)
    again = load(path)["density"]
    np.testing.assert_array_equal(again.log_prob(x), d.log_prob(x))
    assert again.batch_shape == (5,) and jax.tree.structure(again) == jax.tree.structure(d)
    assert path.stat().st_size < 12_000, "a shared network is stored once"
    assert "density: Density" in show(path)
    # The code of a foreign network comes from the caller.
    trained = Density(flow())
    save(trained, path)
    other = coupling_flow(jax.random.key(5), base_dist=Normal(jnp.zeros(2)), flow_layers=2, nn_width=4)
    np.testing.assert_array_equal(load(path, model=other).log_prob(x), trained.log_prob(x))
    with pytest.raises(InputError, match="give load one built anew"):
        load(path)


def test_rows_share_one_network():
    d = Density(affine(inputs=3), jnp.arange(15.0).reshape(5, 3))
    parts = take_apart(d)
    assert sorted(parts.arrays) == ["batch", "condition"]
    assert jax.tree.structure(take_apart(d)) == jax.tree.structure(parts)
    x = jnp.ones(2)
    np.testing.assert_allclose(take_rows(d, np.array([3, 0])).log_prob(x), d.log_prob(x)[np.array([3, 0])], rtol=1e-6)
    assert jax.jit(lambda d: put_together(take_apart(d)).log_prob(x))(d).shape == (5,)
    expanded = Density(affine()).expand((4, 3))
    assert expanded.sample(KEY).shape == (4, 3, 2) and expanded.log_prob(x).shape == (4, 3)
    assert put_together(take_apart(expanded)).batch_shape == (4, 3)
    with pytest.raises(InputError, match="cannot be expanded"):
        expanded.expand((2,))


@pytest.mark.slow
def test_conditional_densities_learn():
    kernel = ConditionalDensity(affine(inputs=3), embed=eqx.nn.Linear(1, 3, key=KEY))
    x = jnp.linspace(-1, 1, 64).reshape(4, 16, 1)
    d = kernel(x)
    assert d.batch_shape == (4, 16) and d.event_shape == (2,) and d.sample(KEY).shape == (4, 16, 2)
    one = kernel.network.log_prob(jnp.ones(2), condition=kernel.embed(x[1, 3]))
    np.testing.assert_allclose(d.log_prob(jnp.ones(2))[1, 3], one, rtol=1e-5)
    y = jnp.concatenate([2 * x, -x], -1) + 0.1 * jax.random.normal(KEY, (4, 16, 2))
    loss = lambda k, batch, key: -k(batch[0]).log_prob(batch[1]).mean()  # noqa: E731
    data = (x.reshape(-1, 1), y.reshape(-1, 2))
    trained, history = train(loss, kernel, data, key=KEY, num_steps=300, learning_rate=0.02)
    # The best possible: two Normals of deviation 0.1, less what tanh allows (exp(-1) is the smallest scale).
    best = -float(dist.Normal(0, np.exp(-1)).log_prob(0.1) * 2)
    assert history.losses[-1] < best + 0.1 < history.losses[0]
    assert abs(float(trained(jnp.array([[0.5]])).sample(KEY, (500,))[..., 0].mean()) - 1.0) < 0.15


class Energy(eqx.Module):
    weight: jax.Array

    def energy(self, x):
        return self.weight * x**2

    def log_prob_bound(self, x, key):
        return -self.weight * x**2 - jax.random.uniform(key)


def test_inexact_densities_say_so():
    d = Density(Energy(jnp.array(2.0)), event_shape=())
    assert d.energy(jnp.array([1.0, 3.0])).tolist() == [2.0, 18.0]
    bounds = d.log_prob_bound(jnp.ones(3), key=KEY)
    assert len(set(bounds.tolist())) == 3 and (bounds < -2).all()
    with pytest.raises(InputError, match="Energy has no exact log_prob; it offers log_prob_bound and energy"):
        d.log_prob(1.0)
    with pytest.raises(InputError, match="has no log_prob_estimate"):
        d.log_prob_estimate(1.0, key=KEY)
    with pytest.raises(InputError, match="event_shape of the Energy"):
        Density(Energy(jnp.array(2.0)))
    with pytest.raises(InputError, match=r"1 axes.*got \(\)"):
        Density(affine(), jnp.array(1.0))
    with pytest.raises(InputError, match="x needs 1 axes"):
        ConditionalDensity(affine())(1.0)
    with pytest.raises(InputError, match="support of its own"):
        Density(Energy(jnp.array(2.0)), event_shape=(), support=dist.constraints.positive).saved_fields()


def test_support_is_checked_and_kept():
    d = Density(Energy(jnp.array(2.0)), event_shape=(), support=dist.constraints.positive)
    assert jax.jit(lambda d: d)(d).support is dist.constraints.positive
    assert Density(affine()).support.event_dim == 1


def test_functions_of_one_example_broadcast():
    result = over_leading_axes(lambda a, b: jnp.outer(a, b), 1, 1, result_ndim=2)(jnp.ones((4, 1, 2)), jnp.ones((5, 3)))
    assert result.shape == (4, 5, 2, 3)
