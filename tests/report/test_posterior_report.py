"""The report of a posterior: it says first whether to trust it, and holds the numbers; one safe file."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

from bayeslens import report
from bayeslens.core.errors import InputError
from bayeslens.core.plan import Plan, PlannedSite
from bayeslens.core.posterior import Posterior
from bayeslens.report import posterior_scalars
from bayeslens.report.posterior import effective_size, judge, render_posterior
from bayeslens.report.posterior_pictures import energy_fraction, kernel_density, tied
from bayeslens.report.posterior_scalars import scalars_of, shares

HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1) & $\\frac{$ \u202e http://evil.example {{ 7*7 }}"
CHAINS, COUNT = 4, 600


def eight_schools(J, sigma, y):
    """Stands for a model; nothing runs it."""


def good(**changes) -> Posterior:
    """Four chains that agree: a hierarchy with two scalars and eight effects."""
    rng = np.random.default_rng(0)
    mu = 4.4 + 3.2 * rng.normal(size=(CHAINS, COUNT))
    tau = np.exp(1.1 + 0.6 * rng.normal(size=(CHAINS, COUNT)))
    theta = mu[..., None] + tau[..., None] * rng.normal(size=(CHAINS, COUNT, 8))
    fields = {
        "draws": {"mu": mu.astype(np.float32), "tau": jnp.asarray(tau), "theta": theta},
        "engine": "nuts",
        "settings": {"num_warmup": 1000, "num_samples": COUNT, "num_chains": CHAINS, "key": [0, 42]},
        "statistics": {
            "diverging": np.zeros((CHAINS, COUNT), bool),
            "energy": rng.gamma(9.0, 1.0, (CHAINS, COUNT)),
            "num_steps": np.full((CHAINS, COUNT), 7),
        },
        "versions": {"bayeslens": "0.1.0", "jax": "0.10.0", "numpyro": "0.22.0"},
        "model": eight_schools,
        "data": {"J": 8, "sigma": np.ones(8), "y": np.arange(8.0), "unit": "points", "absent": None},
        "plan": Plan(
            "nuts",
            (
                PlannedSite("mu", (), "sampled", "nuts", "no closed form"),
                PlannedSite("tau", (), "sampled", "nuts", "no closed form"),
                PlannedSite("theta", (8,), "sampled", "nuts", "no closed form"),
            ),
            ("The model is continuous.",),
        ),
    }
    return Posterior(**(fields | changes))


def bad() -> Posterior:
    """One chain elsewhere, all of them slow, and divergences in the neck of a funnel."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(CHAINS, COUNT))
    log_tau = np.zeros((CHAINS, COUNT))
    for i in range(1, COUNT):
        log_tau[:, i] = 0.97 * log_tau[:, i - 1] + 0.25 * noise[:, i]
    log_tau[2] += 2.5
    x = np.exp(log_tau) * rng.normal(size=(CHAINS, COUNT))
    diverging = (log_tau < np.quantile(log_tau, 0.08)) & (rng.random(log_tau.shape) < 0.5)
    energy = np.cumsum(rng.normal(size=(CHAINS, COUNT)), 1)
    model_draws = {"log_tau": log_tau, "x": x, "other": rng.normal(size=(CHAINS, COUNT))}
    return good(
        draws=model_draws,
        statistics={"diverging": diverging, "energy": energy},
        plan=None,
        warnings=(f"{diverging.sum()} transitions diverged: try a non-centred parameterization",),
    )


def weighted(scale: float = 1.0) -> Posterior:
    """Particles of N(0, 4), weighted to N(1, 1): 2 and 3 are not what unweighted draws have as mean and variance."""
    rng = np.random.default_rng(2)
    x = 2 * rng.normal(size=(1, 4000))
    log_weights = scale * (stats.norm(1, 1).logpdf(x) - stats.norm(0, 2).logpdf(x))
    return Posterior(
        {"x": x, "y": 2 * x + rng.normal(size=x.shape)},
        log_weights,
        -12.345,
        "smc",
        log_evidence_error=0.04,
        versions={"jax": "0.10.0"},
    )


def exact() -> Posterior:
    """Closed forms of a block, a proportion, a simplex and a code; and a function of them that has none."""
    rng = np.random.default_rng(3)
    beta = rng.normal([1.0, -2.0], [0.5, 0.1], (1, 4000, 2))
    p = rng.beta(8, 4, (1, 4000))
    code = rng.choice(3, p=[0.2, 0.5, 0.3], size=(1, 4000))
    return Posterior(
        {"beta": beta, "p": p, "w": rng.dirichlet([1, 2, 3], (1, 4000)), "code": code, "odds": p / (1 - p)},
        log_evidence=-2.5,
        engine="exact",
        marginals={
            "beta": dist.Normal(np.array([1.0, -2.0]), np.array([0.5, 0.1])),
            "p": dist.Beta(8.0, 4.0),
            "w": dist.Dirichlet(np.array([1.0, 2.0, 3.0])),
            "code": dist.CategoricalProbs(np.array([0.2, 0.5, 0.3])),
        },
    )


def single() -> Posterior:
    """One scalar, one chain, nothing else."""
    return Posterior({"rate": np.random.default_rng(4).gamma(2, 1, (1, 500))})


def many() -> Posterior:
    """Five hundred scalars, most of them of one site."""
    rng = np.random.default_rng(5)
    draws = {
        "theta": rng.normal(size=(4, 250, 495)),
        "mu": rng.normal(size=(4, 250)),
        "z": rng.normal(size=(4, 250, 4)),
    }
    return good(draws=draws, statistics={}, plan=None)


def hostile() -> Posterior:
    rng = np.random.default_rng(6)
    site = PlannedSite(HOSTILE, (2,), HOSTILE, HOSTILE, HOSTILE)
    model = lambda: None  # noqa: E731
    model.__name__ = HOSTILE
    return good(
        draws={HOSTILE: rng.normal(size=(2, 100, 2)), "$": rng.normal(size=(2, 100))},
        engine=HOSTILE,
        settings={HOSTILE: HOSTILE, "key": [HOSTILE]},
        statistics={},
        warnings=(HOSTILE, f"{HOSTILE}: {HOSTILE}"),
        versions={HOSTILE: HOSTILE},
        model=model,
        data={HOSTILE: HOSTILE},
        plan=Plan(HOSTILE, (site,), (HOSTILE,)),
    )


def not_numbers() -> Posterior:
    """A site without a finite draw, one with a few lost ones, a constant, an integer and a truth value."""
    rng = np.random.default_rng(7)
    broken = rng.normal(size=(2, 400))
    broken[0, 7] = np.nan
    return Posterior(
        {
            "all": np.full((2, 400), np.nan),
            "some": broken,
            "still": np.full((2, 400), 3.0),
            "count": rng.poisson(3, (2, 400)),
            "large": rng.poisson(3000, (2, 400)),
            "flag": rng.random((2, 400)) < 0.3,
            "empty": np.zeros((2, 400, 0)),
            "fine": rng.normal(size=(2, 400)).astype(np.float32),
        }
    )


def density() -> Posterior:
    """A density without draws."""
    joint = dist.MultivariateNormal(np.zeros(2), np.array([[1.0, 0.6], [0.6, 4.0]]))
    return Posterior.from_density({"mu": dist.Normal(1.0, 2.0), "beta": joint})


def approximate(k_hat: float = 0.3) -> Posterior:
    return Posterior(
        {"x": np.random.default_rng(8).normal(size=(1, 1000))},
        engine="pathfinder",
        k_hat=k_hat,
        log_evidence_bound=-7.125,
    )


CASES = {
    "good": good,
    "bad": bad,
    "weighted": weighted,
    "exact": exact,
    "one scalar": single,
    "five hundred": many,
    "hostile": hostile,
    "not numbers": not_numbers,
    "density": density,
    "approximate": approximate,
    "three draws": lambda: Posterior({"x": np.array([[1.0, 2.0, 4.0]])}),
    "no number": lambda: Posterior({"x": np.array([["a", "b"]])}),
    "weights without hope": lambda: Posterior(
        {"x": np.ones((1, 9)), "y": np.arange(9.0)[None]}, np.full((1, 9), -np.inf)
    ),
}
_VOID = ("meta", "path", "use", "rect", "clippath")


class Page(HTMLParser):
    """Collects tags, attributes that could load or run something, and text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = set(), [], [], []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def pages() -> dict[str, tuple[str, str]]:
    """The HTML and the text of each case's report, made once."""
    made: dict[str, tuple[str, str]] = {}

    def page(case: str) -> tuple[str, str]:
        if case not in made:
            html = render_posterior(CASES[case]())
            made[case] = html, " ".join(" ".join(Page(html).text).split())
        return made[case]

    return page


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_self_contained(case, pages):
    html, text = pages(case)
    page = Page(html)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "img", "form", "base"}
    assert not [n for n, _ in page.attributes if n.startswith("on") or n in ("src", "srcset", "action")]
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))  # a picture that takes another's clip path or marker is drawn wrongly
    assert "nan" not in text.lower().replace("<nan", "").split()
    assert len(html.encode()) < 2_000_000


def test_good_chains_are_said_to_be_good(pages):
    html, text = pages("good")
    posterior = good()
    assert "Posterior of eight_schools" in text and "nuts drew 4 chains of 600 draws" in text
    assert "10 unknown numbers in 3 sites, given J , sigma , y , unit" in text
    assert "Nothing was found that speaks against it : R-hat is at most 1.00" in text
    assert f"none of {CHAINS * COUNT:,} transitions diverged" in text and "Do not trust" not in text
    assert "no closed form" in text and "The model is continuous." in text
    assert "np.uint32([0, 42])" in text and "num_warmup = 1000" in text and "numpyro 0.22.0" in text
    assert "J: 8, sigma: 8 numbers, y: 8 numbers, unit: points, absent: not given" in text
    # ten marginals, a trace and a rank plot of three, an energy plot, three pairs
    assert html.count("<figure>") == 10 + 6 + 1 + 3
    mean = np.mean(np.asarray(posterior["mu"], np.float64))
    assert f"mu {mean:.2f} " in text


def test_the_table_is_that_of_the_summary():
    posterior = good()
    scalars, table = scalars_of(posterior), posterior.summary()
    assert list(table.index) == list(scalars.names)
    moments = np.column_stack([scalars.mean, scalars.sd, scalars.quantiles])
    np.testing.assert_allclose(moments, table[["mean", "sd", "5%", "50%", "95%"]].to_numpy(), rtol=1e-6)
    np.testing.assert_allclose(scalars.r_hat, table["r_hat"], rtol=1e-3)
    np.testing.assert_allclose(scalars.ess_bulk, table["ess_bulk"], rtol=0.02)
    np.testing.assert_allclose(scalars.ess_tail, table["ess_tail"], rtol=0.05)


def test_bad_chains_are_doubted_first(pages):
    html, text = pages("bad")
    assert "Do not trust it yet" in text and "speaks against" not in text
    doubts = text[text.index("Do not trust it yet") : text.index("Largest R-hat")]
    for part in ("transitions diverged", "R-hat is", "The least effective sample size is", "E-BFMI is"):
        assert doubts.count(part) == 1, part  # the engine's sentence is not repeated by ours
    assert 'class="value bad"' in html and 'class="n bad"' in html
    assert "where transitions diverged" in text
    scalars = scalars_of(bad())
    assert scalars.names[scalars.worst[0]] == "log_tau"


def test_pairs_show_what_is_tied():
    """A funnel, whose values are not correlated, before two numbers that are, weakly; copies are no pair."""
    rng = np.random.default_rng(0)
    log_tau = rng.normal(size=(4, 500))
    draws = {f"a{i}": rng.normal(size=(4, 500)) for i in range(6)}
    draws["a1"] = 0.3 * draws["a0"] + draws["a1"]
    draws |= {"log_tau": log_tau, "tau": np.exp(log_tau), "x": np.exp(log_tau) * rng.normal(size=(4, 500))}
    scalars = scalars_of(Posterior(draws))
    names = {scalars.names[i] for i in tied(scalars)}
    assert "x" in names and names & {"tau", "log_tau"}
    assert not {"tau", "log_tau"} <= names


def test_weighted_particles_count_by_their_weights(pages):
    _, text = pages("weighted")
    posterior = weighted()
    scalars, table = scalars_of(posterior), posterior.summary()
    moments = np.column_stack([scalars.mean, scalars.sd, scalars.quantiles])
    np.testing.assert_allclose(moments, table[["mean", "sd", "5%", "50%", "95%"]].to_numpy(), rtol=1e-9)
    size = effective_size(scalars.weights)
    np.testing.assert_allclose(size, table["ess_bulk"].iloc[0])
    # Of importance weights w = q(x) / p(x) the size is n / E_q[w], here in closed form within five standard errors.
    w = stats.norm(1, 1).pdf(np.linspace(-8, 10, 4001)) ** 2 / stats.norm(0, 2).pdf(np.linspace(-8, 10, 4001))
    assert abs(size / 4000 - 1 / np.trapezoid(w, dx=18 / 4000)) < 0.06
    assert "4,000 weighted particles" in text and f"is {size:,.0f} (400 wanted)" in text
    assert "−12.345 ± 0.040" in text and "resampled" in text and "R-hat" not in text
    assert "ESS" not in text
    text = render_posterior(weighted(scale=4000.0))
    assert "use more particles" in text and "Do not trust it yet" in text


def test_exact_marginals_are_exact(pages):
    html, text = pages("exact")
    assert "It is exact" in text and "nats, exact" in text and "−2.50" in text
    scalars = scalars_of(exact())
    assert set(scalars.names) - set(scalars.exact) == {"odds"}
    levels = (0.05, 0.5, 0.95)
    expected = {
        "beta[1]": stats.norm(-2, 0.1),
        "p": stats.beta(8, 4),
        "w[2]": stats.beta(3, 3),
    }
    for name, law in expected.items():
        found = scalars.exact[name]
        np.testing.assert_allclose((found.mean, found.sd), (law.mean(), law.std()), rtol=1e-5)
        np.testing.assert_allclose(found.quantiles, law.ppf(levels), rtol=1e-5)
        grid, density = found.density
        np.testing.assert_allclose(density, law.pdf(grid), rtol=1e-4, atol=1e-5)
        assert scalars.mean[scalars.names.index(name)] == found.mean
    code = scalars.exact["code"]
    np.testing.assert_allclose((code.mean, code.sd, *code.quantiles), (1.1, 0.7, 0, 1, 2), rtol=1e-6)
    assert html.count(">exact</td>") == 7 and "R-hat" not in text


def test_a_density_is_drawn_from(pages):
    _, text = pages("density")
    assert "made from the density for this report" in text and "It is exact" in text
    scalars = scalars_of(density())
    np.testing.assert_allclose([scalars.exact[n].sd for n in ("beta[0]", "beta[1]", "mu")], [1, 2, 2], rtol=1e-5)


def test_an_approximation_is_judged_by_its_k_hat(pages):
    _, text = pages("approximate")
    assert "Nothing was found" in text and "Pareto k-hat is 0.30" in text and "≥ −7.12" in text
    text = render_posterior(approximate(1.25))
    assert "above 0.7" in text and "Do not trust it yet" in text
    doubted = approximate(1.25).doubted(("Pareto k-hat is 1.25: try nuts",))
    assert judge(doubted, scalars_of(doubted)).doubts == ["Pareto k-hat is 1.25: try nuts"]


def test_long_tables_are_cut_and_say_so(pages):
    html, text = pages("five hundred")
    assert "500 unknown numbers in 3 sites" in text
    assert re.search(r"and 440 more of theta : R-hat at most 1\.0\d+, ESS at least \d+", text)
    assert "12 of 500 numbers are drawn, the first of each site" in text
    assert "theta[54]" in text and "theta[55]" not in text.split("What is believed about each")[0]
    assert html.count("<figure>") <= 25


def test_very_many_scalars_are_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(posterior_scalars, "_MAX_SCALARS", 40)
    scalars = scalars_of(many())
    assert len(scalars.names) == 40 and sum(scalars.sizes.values()) == 500
    assert {"mu", "z[3]", "theta[34]"} <= set(scalars.names)
    assert shares({f"s{i}": 1 for i in range(9)}, 4) == {f"s{i}": int(i < 4) for i in range(9)}


def test_hostile_names_are_only_text(pages):
    html, text = pages("hostile")
    assert "<script" not in html.lower() and "\u202e" not in html and " 49 " not in text
    assert "&lt;script&gt;" in html


def test_draws_that_are_no_numbers_are_dashes(pages):
    _, text = pages("not numbers")
    assert "Some draws are not finite" in text and "5 of 7 numbers are drawn; the others have draws" in text
    assert "all – – – – – – – –" in text and "some – – – – – – – –" in text
    assert "still 3 0 3 3 3 – – –" in text


def test_a_density_that_no_exact_engine_made_is_not_called_exact():
    rng = np.random.default_rng(0)
    draws = {"mu": rng.normal(size=(1, 100)), "beta": rng.normal(size=(1, 100, 2))}
    posterior = dataclasses.replace(density(), engine="amortized", draws=draws)
    assert judge(posterior, scalars_of(posterior)).is_good is None
    html = render_posterior(posterior)
    assert "It is exact" not in html and ">exact</td>" not in html


def test_draws_without_anything_to_judge_by_are_not_called_good():
    posterior = Posterior({"x": np.full((4, 100), 2.0)})
    verdict = judge(posterior, scalars_of(posterior))
    assert verdict.is_good is None and "Nothing could be checked" in render_posterior(posterior)


@pytest.mark.parametrize("kind", ["marginals", "trace", "rank", "pairs", "energy"])
@pytest.mark.parametrize("make", [good, bad])
def test_plot_gives_a_figure_without_a_window(kind, make, tmp_path):
    figure = report.plot(make(), kind)
    figure.savefig(tmp_path / "picture.png", dpi=30)
    assert all(axes.get_title(loc="left") for axes in figure.axes)


def test_plot_says_what_is_lacking():
    assert report.plot(single()).axes
    with pytest.raises(InputError, match="several Markov chains"):
        report.plot(single(), "rank")
    with pytest.raises(InputError, match="kept no energies"):
        report.plot(weighted(), "energy")
    with pytest.raises(InputError, match="use one of marginals, trace"):
        report.plot(good(), "calibration")


def test_density_estimates_are_those_of_the_truth():
    """Within five standard errors of a kernel estimate with 20,000 draws; exponential draws have an end at 0."""
    rng = np.random.default_rng(0)
    for law, draws in ((stats.norm, rng.normal(size=20_000)), (stats.expon, rng.exponential(size=20_000))):
        grid, density = kernel_density(draws)
        assert np.max(np.abs(density - law.pdf(grid))) < 0.06 * law.pdf(grid).max()
        np.testing.assert_allclose(density.sum() * (grid[1] - grid[0]), 1, atol=0.005)  # far tails are cut off
    x = rng.normal(size=20_000)
    grid, density = kernel_density(x, np.exp(x - 0.5))  # weighted from N(0, 1) to N(1, 1)
    assert np.max(np.abs(density - stats.norm(1, 1).pdf(grid))) < 0.05


def test_energy_fraction_of_known_chains():
    """Independent energies have E-BFMI 2; an autoregression with coefficient a has 2 (1 - a)."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 20_000))
    assert abs(energy_fraction({"energy": noise}) - 2) < 0.06  # standard error 0.014
    slow = np.zeros_like(noise)
    for i in range(1, noise.shape[1]):
        slow[:, i] = 0.9 * slow[:, i - 1] + noise[:, i]
    assert abs(energy_fraction({"energy": slow}) - 0.2) < 0.03
    assert energy_fraction({}) is None and energy_fraction({"energy": np.ones((2, 100))}) is None


def test_the_file_is_written_like_any_report(tmp_path):
    path = report.write_report(approximate(), tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and "pathfinder" in path.read_text("utf-8")
    with pytest.raises(InputError, match="cannot write the report"):
        report.write_report(approximate(), tmp_path / "absent" / "report.html")
    with pytest.raises(InputError, match="reports of predictions and of posteriors, got dict"):
        report.write_report({}, tmp_path / "other.html")


def test_own_doubts_do_not_need_an_engine():
    draws = np.random.default_rng(0).normal(size=(4, 500))
    draws[3] += 3
    posterior = dataclasses.replace(single(), draws={"x": draws})
    assert any("R-hat" in d for d in judge(posterior, scalars_of(posterior)).doubts)
