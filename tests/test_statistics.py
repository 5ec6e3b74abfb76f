"""Intervals and tests agree with independent formulas and published numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rvlm.statistics import (
    Difference,
    Mean,
    bootstrap_mean,
    episodes_needed,
    mcnemar,
    newcombe,
    paired_bootstrap,
    r_squared,
    ridge_probe,
    smallest_effect,
    spread_of_trainings,
    verdict,
    wilson,
)

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=50, deadline=None)
@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(count, level):
    rate = wilson(*count, level=level)
    reference = stats.binomtest(*count).proportion_ci(level, method="wilson")
    assert (rate.low, rate.high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1


@settings(max_examples=50, deadline=None)
@given(counts, counts)
def test_newcombe_agrees_with_its_formula(count_a, count_b):
    a, b = wilson(*count_a), wilson(*count_b)
    d = a.rate - b.rate
    expected = d - math.hypot(a.rate - a.low, b.high - b.rate), d + math.hypot(a.high - a.rate, b.rate - b.low)
    got = newcombe(a, b)
    assert (got.low, got.high) == pytest.approx(expected, abs=1e-9)
    mirrored = newcombe(b, a)
    assert (mirrored.low, mirrored.high) == pytest.approx((-got.high, -got.low), abs=1e-9)


def test_newcombe_gives_the_published_example():
    got = newcombe(wilson(56, 70), wilson(48, 80))  # Newcombe (1998), table II, contrast (a)
    assert (got.estimate, got.low, got.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@settings(max_examples=50, deadline=None)
@given(outcomes)
def test_mcnemar_agrees_with_the_binomial_test(pairs):
    a, b = np.array(pairs).T
    got = mcnemar(a, b)
    discordant = got.only_a + got.only_b
    expected = stats.binomtest(got.only_a, discordant).pvalue if discordant else 1.0
    assert got.p_value == pytest.approx(expected)
    assert (got.only_a - got.only_b) / got.n == pytest.approx(a.mean() - b.mean())


def test_paired_bootstrap_is_near_the_normal_interval_and_repeats():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 1, 400), rng.normal(0.5, 1, 400)
    got, gain = paired_bootstrap(a, b, seed=1), a - b
    half = 1.96 * gain.std(ddof=1) / 20
    assert got.estimate == pytest.approx(gain.mean())
    assert (got.low, got.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.02)
    assert got == paired_bootstrap(a, b, seed=1) != paired_bootstrap(a, b, seed=2)


def test_paired_bootstrap_of_identical_outcomes_is_a_point():
    assert paired_bootstrap([1, 0, 1], [1, 0, 1], seed=0) == Difference(0.0, 0.0, 0.0)


def test_intervals_over_trainings_hold_the_truth_where_those_over_episodes_alone_do_not():
    rng, n_trials, n_trainings, n_episodes = np.random.default_rng(0), 200, 5, 200
    is_held = np.zeros(2)
    for _ in range(n_trials):  # no true difference; both recipes' trainings differ, those of each pair by 10 points
        hard = rng.normal(0.5, 0.25, n_episodes)
        rates = np.clip(hard + rng.normal(0, 0.1 / math.sqrt(2), (2, n_trainings, 1)), 0, 1)
        a, b = (rng.random((2, n_trainings, n_episodes)) < rates).astype(float)
        both = [paired_bootstrap(a.mean(0), b.mean(0), 0, n_resamples=500), paired_bootstrap(a, b, 0, n_resamples=500)]
        is_held += [gain.low <= 0 <= gain.high for gain in both]
    over_episodes, over_both = is_held / n_trials
    assert over_episodes < 0.7 and over_both > 0.88


def test_intervals_over_trainings_are_what_drawing_both_anew_gives():
    values = np.random.default_rng(0).random((3, 8))
    rng, means = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = values[np.ix_(rng.integers(3, size=3), rng.integers(8, size=8))]
        means.append(drawn.mean())
    got = bootstrap_mean(values, seed=0)
    assert got.n == 8 and got.mean == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)
    assert bootstrap_mean(values[:1], seed=0) == bootstrap_mean(values[0], seed=0)
    assert got == bootstrap_mean(values, seed=0) != bootstrap_mean(values, seed=1)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("n", [30, 200])
def test_the_smallest_effect_needs_the_episodes_it_was_asked_for(p, n):
    effect = smallest_effect(p, n)
    if p + effect < 1:
        assert abs(episodes_needed(p, effect) - n) <= 1
    assert smallest_effect(p, 4 * n) < effect


def test_episodes_needed_gives_the_power_asked_for():
    n = episodes_needed(0.5, 0.1, power=0.8)
    assert n == 387 or n == 388  # Cohen's table: h = 0.2, n about 388
    assert episodes_needed(0.5, 0.2) < n < episodes_needed(0.5, 0.1, power=0.9)
    rng = np.random.default_rng(0)
    a, b = rng.binomial(n, 0.6, 4000) / n, rng.binomial(n, 0.5, 4000) / n
    z = (a - b) / np.sqrt(a * (1 - a) / n + b * (1 - b) / n)
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    "low, high, worthwhile, word",
    [
        (0.1, 0.3, 0.0, "replicated"),
        (-0.3, -0.1, 0.0, "not replicated"),
        (-0.3, 0.0, 0.0, "not replicated"),
        (-0.1, 0.1, 0.0, "undecided"),
        (-0.02, 0.04, 0.05, "not replicated"),
        (0.01, 0.04, 0.05, "not replicated"),
        (0.01, 0.10, 0.05, "replicated"),
    ],
)
def test_verdict_follows_its_rule(low, high, worthwhile, word):
    assert verdict(Difference((low + high) / 2, low, high), worthwhile) == word


def test_bootstrap_mean_is_reproducible_and_narrows_with_n():
    values = np.random.default_rng(0).normal(size=400)
    few, many = bootstrap_mean(values[:40], seed=0), bootstrap_mean(values, seed=0)
    assert many == bootstrap_mean(values, seed=0) and many.n == 400
    assert few.low < few.mean < few.high and many.high - many.low < 0.5 * (few.high - few.low)
    assert bootstrap_mean([2.0, 2.0], seed=0) == Mean(2.0, 2, 2.0, 2.0)


def test_ridge_probe_finds_what_is_linear_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(300, 8)) * 100 + 5, rng.normal(size=(300, 1))
    y = np.hstack([x[:, :1] * 0.3 + 7, noise])
    read = ridge_probe(x[:200], y[:200], x[200:])
    linear, none = (r_squared(y[200:, i], read[:, i], seed=0) for i in range(2))
    assert linear.mean > 0.99 and linear.low <= linear.mean <= linear.high and linear.n == 100
    assert none.mean < 0.1


def test_bad_input_is_one_clear_error():
    with pytest.raises(ValueError, match="got 0 successes of 0; were any episodes run"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="got 5 successes of 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match=r"two arrays \(n,\) over the same episodes, got \(2,\) and \(3,\)"):
        mcnemar([True, False], [True, False, True])
    with pytest.raises(ValueError, match=r"p = 0\.95, effect = 0\.1"):
        episodes_needed(0.95, 0.1)
    with pytest.raises(ValueError, match=r"one number per episode, \(n,\) or \(m, n\) with n > 0; got shape \(0,\)"):
        bootstrap_mean([], seed=0)
    with pytest.raises(ValueError, match=r"at least 0, got -0\.1"):
        verdict(Difference(0.0, -1.0, 1.0), worthwhile=-0.1)


def test_rates_read_as_text():
    assert str(wilson(94, 200)) == "47% [40%, 54%], 94 of 200"


@pytest.mark.parametrize("between", [0.0, 0.15])
def test_the_spread_of_trainings_is_taken_apart(between):
    """Rates drawn around 0.5 with a known deviation between trainings: the part that is not judging comes back on average."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        true = np.clip(rng.normal(0.5, between, 5), 0, 1)
        spread = spread_of_trainings([wilson(int(rng.binomial(50, p)), 50) for p in true])
        found.append(spread.observed**2 - spread.evaluation**2)
        assert spread.training**2 == pytest.approx(max(found[-1], 0), abs=1e-12) and spread.n == 5
    assert np.mean(found) == pytest.approx(between**2, abs=0.002)


def test_one_training_has_no_spread():
    with pytest.raises(ValueError, match="expected at least two trainings, got 1; train with more seeds"):
        spread_of_trainings([wilson(3, 5)])
