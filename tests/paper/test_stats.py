"""Statistics against tabulated values and closed forms, and against scipy where it is installed."""

import math

import pytest

from paper import stats

try:
    import scipy.stats as scipy_stats
except ImportError:
    scipy_stats = None

needs_scipy = pytest.mark.skipif(scipy_stats is None, reason="scipy is not installed")

# P(T > t): (t, degrees, p); quantiles of published tables, and closed forms: 1/2 - atan(t)/pi for 1 degree,
# 1/2 - t / (2 sqrt(2 + t^2)) for 2.
TAILS = [(12.706, 1, 0.025), (4.303, 2, 0.025), (3.182, 3, 0.025), (2.776, 4, 0.025), (1.943, 6, 0.05),
         (3.250, 9, 0.005), (1.833, 9, 0.05), (2.086, 20, 0.025), (2.457, 30, 0.01), (0.0, 7, 0.5), (-2.262, 9, 0.975)]


def test_t_interval():
    mean, half = stats.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert stats.mean_interval([5.0]) == (5.0, None)


@pytest.mark.parametrize("t, degrees, p", TAILS)
def test_t_tail_is_that_of_the_tables(t, degrees, p):
    assert stats.t_tail(t, degrees) == pytest.approx(p, rel=2e-3)


@pytest.mark.parametrize("t", (-3.0, -0.5, 0.1, 1.0, 4.0))
def test_t_tail_in_closed_form(t):
    assert stats.t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-12)
    assert stats.t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


@pytest.mark.parametrize("degrees, quantile", ((1, 12.7062047), (2, 4.3026527), (6, 2.4469119), (9, 2.2621572),
                                               (30, 2.0422725), (63, 1.9983405), (10_000, 1.9602013)))
def test_quantiles_in_all_digits_that_are_printed(degrees, quantile):
    assert stats.t95(degrees) == pytest.approx(quantile, rel=1e-7)


def test_p_below():
    """By hand: differences of mean -0.02 and standard error 0.01 / sqrt(3)."""
    differences = [-0.03, -0.02, -0.01]
    error = 0.01 / math.sqrt(3)
    assert stats.p_below(differences, 0.0) == pytest.approx(stats.t_tail(0.02 / error, 2))
    assert stats.p_below(differences, 0.01) < stats.p_below(differences, 0.0) < 0.05
    assert stats.p_below(differences, -0.03) == pytest.approx(0.8873, abs=1e-4)
    assert stats.p_below([1.0], 0.0) is None
    assert stats.p_below([0.5, 0.5], 1.0) == 0.0 and stats.p_below([0.5, 0.5], 0.5) == 1.0


def test_holm():
    """Holm 1979: the least p times n, the next times n - 1, never falling."""
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.001, 0.5, 0.9, 0.02]) == pytest.approx([0.004, 1.0, 1.0, 0.06])
    assert stats.holm([]) == []


@pytest.mark.parametrize("hits, n, low, high", ((4, 23, 0.0698, 0.3714), (9, 23, 0.2216, 0.5921), (0, 10, 0, 0.2775)))
def test_wilson(hits, n, low, high):
    assert stats.wilson(hits, n) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize("here, there, p", ((5, 0, 0.0625), (0, 0, 1.0), (9, 4, 0.26684570), (1, 9, 0.02148438)))
def test_mcnemar(here, there, p):
    assert stats.mcnemar(here, there) == pytest.approx(p)


def test_frontier():
    points = [(3, 1.0), (1, 2.0), (2, 2.5), (2, 1.5), (4, 1.2)]
    assert stats.frontier(points) == [(1, 2.0), (2, 1.5), (3, 1.0)]
    named = [(1, 1.0, object()), (1, 1.0, object())]       # what follows is not compared
    assert stats.frontier(named) == named[:1]


def test_a_loss_above_709_has_no_perplexity():
    assert stats.perplexity(2.0) == math.exp(2.0)
    assert math.isfinite(stats.perplexity(709.0)) and stats.perplexity(709.9) is None and stats.perplexity(1e9) is None


@needs_scipy
def test_against_scipy():
    values = [0.3, 0.1, -0.4, 0.25, 0.05]
    mean, half = stats.mean_interval(values)
    low, high = scipy_stats.t.interval(0.95, 4, mean, scipy_stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    for degrees in (1, 2, 9, 40, 500):
        assert stats.t95(degrees) == pytest.approx(scipy_stats.t.ppf(0.975, degrees), rel=1e-9)
    for t, degrees, _ in TAILS:
        assert stats.t_tail(t, degrees) == pytest.approx(scipy_stats.t.sf(t, degrees), rel=1e-9)
    assert stats.p_below(values, 0.1) == pytest.approx(scipy_stats.ttest_1samp(values, 0.1, alternative="less").pvalue)
    assert stats.mcnemar(1, 9) == pytest.approx(scipy_stats.binomtest(1, 10).pvalue)
    interval = scipy_stats.binomtest(4, 23).proportion_ci(0.95, "wilson")
    assert stats.wilson(4, 23) == pytest.approx((interval.low, interval.high))
