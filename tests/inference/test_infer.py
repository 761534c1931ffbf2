"""`infer`, `plan` and `compare` from the outside: what is chosen and why, files, and bad input."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from typer.testing import CliRunner

import bayeslens
from bayeslens import cli
from bayeslens.core.errors import InputError
from bayeslens.inference.exact import Exact

KEY = jax.random.key(0)
Y = np.array([0.3, 1.1, 0.2, 2.0, 0.9, 1.4])

PROGRAM = """
import numpyro, numpyro.distributions as dist

def normal(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

def broken(y):
    raise RuntimeError("as it does")
"""


def normal(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def narrow(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    numpyro.sample("y", dist.Normal(mu, 0.1), obs=y)


def unknown_scale(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(mu, scale), obs=y)


def two_groups(y):
    share = numpyro.sample("share", dist.Beta(1.0, 1.0))
    kind = numpyro.sample("kind", dist.Bernoulli(share))
    numpyro.sample("y", dist.Normal(2.0 * kind, 1.0), obs=y)


def urn(y):
    kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
    numpyro.sample("y", dist.Normal(kind, 1.0), obs=y)


def unbounded(y):
    k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


@pytest.fixture(scope="module")
def exact():
    return bayeslens.infer(normal, {"y": Y}, key=KEY)


def test_auto_solves_what_it_can(exact):
    assert exact.engine == "exact" and exact.plan.sites[0].treatment == "solved exactly"
    precision = 0.25 + len(Y)
    np.testing.assert_allclose(exact.marginals["mu"].mean, Y.sum() / precision, rtol=1e-6)
    np.testing.assert_array_equal(exact.data["y"], Y)


@pytest.mark.parametrize(
    ("model", "engine", "treatments"),
    [
        (normal, "exact", ["solved exactly"]),
        (unknown_scale, "nuts", ["sampled", "sampled"]),
        (two_groups, "nuts", ["sampled", "marginalized"]),
        (urn, "enumeration", ["enumerated"]),
    ],
)
def test_plans(model, engine, treatments):
    plan = bayeslens.plan(model, {"y": 1.0})
    assert plan.engine == engine and [s.treatment for s in plan.sites] == treatments
    lines = str(plan).splitlines()
    assert lines[0] == f"engine: {engine}" and len({line.index("  ") > 0 for line in lines[1:]}) == 1


def test_settings_narrow_the_choice():
    plan = bayeslens.infer(normal, {"y": Y}, key=KEY, num_warmup=100, num_samples=100, num_chains=2).plan
    assert plan.engine == "nuts" and "engine exact would solve it" in plan.sites[0].why


def test_engines_by_object_class_and_name(exact):
    for engine in (Exact(num_samples=10), Exact, "exact"):
        found = bayeslens.infer(normal, {"y": Y}, key=KEY, engine=engine)
        np.testing.assert_allclose(found.log_evidence, exact.log_evidence, rtol=1e-6)
        assert found.plan is None


@pytest.mark.slow
def test_a_kernel_of_numpyro():
    from numpyro.infer import SA

    found = bayeslens.infer(normal, {"y": Y}, key=KEY, engine=SA)
    mean, sd = Y.sum() / (0.25 + len(Y)), (0.25 + len(Y)) ** -0.5
    # At least 100 effective draws: five standard errors.
    assert abs(np.asarray(found["mu"]).mean() - mean) < 5 * sd / np.sqrt(100)
    assert found.engine == "numpyro_kernel" and found.settings["kernel"] == "SA"


def test_finite_sites_beside_continuous_ones_are_summed_out():
    found = bayeslens.infer(two_groups, {"y": 1.5}, key=KEY)
    assert found.plan.sites[1].treatment == "marginalized" and found["kind"].shape == found["share"].shape
    # The share is uniform, so that either kind is as likely before; Bayes' rule, five standard errors of 1,000 draws.
    odds = np.exp(dist.Normal(2.0, 1.0).log_prob(1.5) - dist.Normal(0.0, 1.0).log_prob(1.5))
    exact = odds / (1 + odds)
    assert abs(found["kind"].mean() - exact) < 5 * np.sqrt(exact * (1 - exact) / 1000)
    # Given the kind, the share is Beta(2, 1) or Beta(1, 2).
    assert abs(found["share"][found["kind"] == 1].mean() - 2 / 3) < 0.05


def test_files_keep_all_of_it(exact, tmp_path):
    bayeslens.save(exact, tmp_path / "p.bayes")
    loaded = bayeslens.load(tmp_path / "p.bayes", model=normal)
    assert str(loaded.plan) == str(exact.plan) and loaded.log_evidence == exact.log_evidence
    np.testing.assert_allclose(loaded.marginals["mu"].mean, exact.marginals["mu"].mean)
    np.testing.assert_array_equal(loaded.data["y"], Y)


def test_models_are_compared(exact):
    other = bayeslens.infer(narrow, {"y": Y}, key=KEY)
    table = bayeslens.compare({"narrow": other, "wide": exact})
    assert list(table.index) == ["wide", "narrow"] and table.loc["wide", "weight"] > 0.5
    # Exact leave-one-out predictive densities of the conjugate model; Pareto smoothing errs by a few hundredths.
    elpd = 0.0
    for i in range(len(Y)):
        rest = np.delete(Y, i)
        precision = 0.25 + len(rest)
        elpd += float(dist.Normal(rest.sum() / precision, np.sqrt(1 + 1 / precision)).log_prob(Y[i]))
    assert abs(table.loc["wide", "elpd"] - elpd) < 0.05
    assert table.loc["narrow", "warning"]


def test_comparisons_that_make_no_sense(exact):
    with pytest.raises(InputError, match="two posteriors"):
        bayeslens.compare({"a": exact})
    with pytest.raises(InputError, match="'b' is no posterior"):
        bayeslens.compare({"a": exact, "b": 1})
    shorter = bayeslens.infer(normal, {"y": Y[:3]}, key=KEY)
    with pytest.raises(InputError, match="different numbers of observations"):
        bayeslens.compare({"a": exact, "b": shorter})
    with pytest.raises(InputError, match="does not know its model"):
        exact.push(lambda s: s["mu"]).log_likelihood()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (normal, {"engine": "magic"}, "unknown engine 'magic'"),
        (normal, {"engine": "exact", "num_chains": 2}, r"no settings \['num_chains'\]"),
        (normal, {"engine": Exact(), "num_samples": 2}, "to the engine itself"),
        (normal, {"engine": 3}, "int is no engine"),
        (unbounded, {}, r"\['k'\] have infinitely many values"),
        (unbounded, {"engine": "nuts"}, r"\['k'\] are discrete with infinitely many"),
        (urn, {"engine": "nuts"}, "use engine enumeration"),
        (unknown_scale, {"engine": "exact"}, "no exact posterior"),
        (unknown_scale, {"engine": "gibbs"}, "this model has none"),
    ],
)
def test_bad_input(model, settings, message):
    with pytest.raises(InputError, match=message):
        bayeslens.infer(model, {"y": 1.0}, key=KEY, **settings)


def command(*arguments):
    return CliRunner().invoke(cli.app, ["infer", *map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    (tmp_path / "model.py").write_text(PROGRAM)
    (tmp_path / "data.json").write_text(json.dumps({"y": Y.tolist()}))
    return f"{tmp_path}/model.py:normal", tmp_path / "data.json", tmp_path


def test_command_line(files):
    import arviz as az

    program, data, folder = files
    found = command(program, data, "--out", folder / "draws.nc", "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert answer["engine"] == "exact" and answer["plan"][0]["name"] == "mu" and answer["warnings"] == []
    assert abs(answer["summary"]["mu"]["mean"] - Y.sum() / (0.25 + len(Y))) < 1e-6
    assert az.from_netcdf(folder / "draws.nc").posterior["mu"].shape == (1, 4000)
    shown = command(program, data, "--out", folder / "draws.bayes", "--report", folder / "report.html").stdout
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    assert "solved exactly" in shown and "log evidence" in shown


@pytest.mark.parametrize(
    ("program", "content", "message"),
    [
        ("nowhere.py:normal", "{}", "there is no file"),
        ("model.py", "{}", "MODEL.py:function"),
        ("model.py:absent", "{}", "no function 'absent'; it has .*normal"),
        ("model.py:broken", '{"y": 1}', "as it does"),
        ("model.py:normal", "{", "not JSON"),
        ("model.py:normal", "[1]", "must hold a JSON object"),
        ("model.py:normal", '{"y": [[1, 2], [3]]}', "'y' .* ragged"),
        ("model.py:normal", '{"y": [1.0, null]}', "'y' holds 1 NaN"),
    ],
)
def test_bad_files(files, program, content, message):
    import re

    _, data, folder = files
    data.write_text(content)
    found = command(folder / program, data)
    assert isinstance(found.exception, InputError) and re.search(message, str(found.exception))


def test_bad_outputs(files):
    program, data, folder = files
    assert "must end in .nc" in str(command(program, data, "--out", folder / "draws.txt").exception)
    assert "does not exist" in str(command(program, data, "--out", folder / "none" / "draws.nc").exception)
    assert sorted(p.name for p in folder.iterdir()) == ["data.json", "model.py"]
