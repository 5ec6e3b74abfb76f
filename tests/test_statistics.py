"""Intervals and tests agree with independent formulas and published numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from rvlm.statistics import (
    ASSUMED_SPREAD,
    Difference,
    check_verdict,
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_difference,
    newcombe,
    p_value,
    paired_difference,
    r_squared,
    ridge_probe,
    seed_variance,
    success_rate,
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


def test_newcombes_paired_interval_gives_the_published_example():
    a, b = [1] * 14 + [1] * 5 + [0] * 22, [1] * 14 + [0] * 27  # Altman et al. (2000), Statistics with Confidence, table 6.2
    got = paired_difference(a, b)
    assert (got.estimate, got.low, got.high) == pytest.approx((0.122, 0.011, 0.226), abs=5e-4)
    mirrored = paired_difference(b, a)
    assert (mirrored.low, mirrored.high) == pytest.approx((-got.high, -got.low), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(outcomes)
def test_one_training_gets_wilsons_interval(pairs):
    solved = [int(a) for a, _ in pairs]
    got, reference = success_rate(solved), wilson(sum(solved), len(solved))
    assert (got.successes, got.n) == (reference.successes, reference.n)
    assert (got.low, got.high) == pytest.approx((reference.low, reference.high), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_no_interval_of_outcomes_has_width_zero_or_leaves_its_bounds(m, n, seed, p):
    a, b = np.random.default_rng(seed).random((2, m, n)) < p
    rate, gain = success_rate(a), paired_difference(a, b)
    assert 0 <= rate.low <= rate.rate + 1e-12 and rate.rate - 1e-12 <= rate.high <= 1 and rate.low < rate.high
    assert -1 <= gain.low <= gain.estimate <= gain.high <= 1 and gain.low < gain.high
    assert gain.high - gain.low > 0.5 / (m * n)


def test_more_trainings_and_more_episodes_narrow_the_interval():
    solved = np.tile([[0, 1, 1, 1], [1, 0, 1, 1]], (1, 10))
    widths = [
        (lambda r: r.high - r.low)(success_rate(np.tile(solved, (repeats, longer))))
        for repeats, longer in [(1, 1), (2, 1), (2, 4)]
    ]
    assert widths[0] > widths[1] > widths[2] > 0


def recipe(rng, p, m, n, scenes, between=0.5):
    """Chances (m, n) of m trainings in n scenes; trainings and scenes move their log odds."""
    if p in (0, 1):
        return np.full((m, n), float(p))
    odds = math.log(p / (1 - p)) + rng.normal(0, between, (m, 1)) + scenes + rng.normal(0, 0.5, (1, n))
    return 1 / (1 + np.exp(-odds))


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.95])
def test_intervals_of_outcomes_cover_the_truth(m, p):
    """With one training that policy's own rate, with several the recipe's; differences with an equal and with another recipe."""
    rng, n, n_trials, is_held = np.random.default_rng(0), 50, 200, []
    many = [recipe(rng, q, 300, 500, rng.normal(0, 1, (1, 500))) for q in (p, p, 0.5)]
    for _ in range(n_trials):
        scenes = rng.normal(0, 1, (1, n))
        trainings = [recipe(rng, q, m, n, scenes) for q in (p, p, 0.5)]
        true = [r.mean() for r in (trainings if m == 1 else many)]
        a, b, c = (rng.random((m, n)) < r for r in trainings)
        intervals = [(success_rate(a), true[0]), (paired_difference(a, b), true[0] - true[1] if m == 1 else 0.0)]
        intervals.append((paired_difference(a, c), true[0] - true[2]))
        is_held.append([interval.low <= value <= interval.high for interval, value in intervals])
    assert np.mean(is_held, axis=0).min() > 0.92, np.mean(is_held, axis=0)


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("n", [24, 60])
@pytest.mark.parametrize(
    ("between", "own", "shift", "most"), [(1.0, 0.2, 0.0, 0.8), (1.0, 0.2, 1.0, 0.8), (0.3, 0.2, -2.0, 0.95)]
)
def test_what_trainings_have_in_common_in_two_ways_does_not_count(m, n, between, own, shift, most):
    """Policies in two ways, log odds `shift` apart, by training `own`: the interval covers, narrower than for other trainings."""
    rng, n_trials, is_held, widths = np.random.default_rng(1), 200, [], []

    def ways(m, n):
        odds = rng.normal(0, between, (m, 1)) + rng.normal(0, 1, (1, n))
        return [1 / (1 + np.exp(-odds - s - rng.normal(0, own, (m, 1)))) for s in (0.0, shift)]

    true = np.subtract(*(rates.mean() for rates in ways(2000, 2000)))
    for _ in range(n_trials):
        a, b = (rng.random((m, n)) < rates for rates in ways(m, n))
        got, other = paired_difference(a, b, same_trainings=True), paired_difference(a, b)
        is_held.append(got.low <= true <= got.high)
        widths.append((got.high - got.low) / (other.high - other.low))
        assert got.at(0.9).low >= got.low and got.at(0.9).high <= got.high and got.at(0.95) == got
    assert np.mean(is_held) > 0.92, np.mean(is_held)
    assert m == 2 or np.median(widths) < most, np.median(widths)


def test_ways_that_end_alike_in_every_episode_differ_by_little():
    outcomes = np.random.default_rng(0).random((5, 24)) < 0.5
    got = paired_difference(outcomes, outcomes, same_trainings=True)
    assert got.estimate == 0 and -0.1 < got.low < 0 < got.high < 0.1


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [1.0, 100.0])  # of errors per episode: an exponential, nearly a normal
def test_intervals_of_errors_cover_the_truth(m, shape):
    rng, n, is_held = np.random.default_rng(0), 40, []
    for _ in range(300):
        hard, trainings = rng.gamma(shape, 10 / shape, n), rng.normal(0, 1.5, (2, m, 1))
        a, b = hard + trainings + rng.normal(0, 2, (2, m, n))
        true = trainings[:, 0, 0] if m == 1 else np.zeros(2)
        gain, mean = paired_difference(a, b, lower_is_better=True), mean_interval(a)
        is_held.append([gain.low <= true[1] - true[0] <= gain.high, mean.low <= 10 + true[0] <= mean.high])
    assert np.mean(is_held, axis=0).min() > 0.92, np.mean(is_held, axis=0)


def test_equal_recipes_hardly_ever_earn_a_verdict():
    """Trainings of each pair differ by 10 points; intervals over episodes alone would be wrong four times of ten."""
    rng, words = np.random.default_rng(0), {1: [], 3: []}
    for m, verdicts in words.items():
        for _ in range(200):
            hard = rng.normal(0.5, 0.25, 100)
            rates = np.clip(hard + rng.normal(0, 0.1 / math.sqrt(2), (2, m, 1)), 0, 1)
            verdicts.append(verdict(paired_difference(*(rng.random((2, m, 100)) < rates))))
    assert set(words[1]) == {"one training: no verdict"}
    assert words[3].count("supported") + words[3].count("reversed") < 10


def gain(low, high, n_trainings=3):
    return Difference((low + high) / 2, low, high, n_trainings)


@pytest.mark.parametrize(
    "low, high, margin, word",
    [
        (0.1, 0.3, None, "supported"),
        (0.01, 0.04, 0.05, "supported"),
        (-0.3, -0.1, None, "reversed"),
        (-0.3, 0.0, None, "undecided"),
        (0.0, 0.0, None, "undecided"),
        (-0.02, 0.04, 0.05, "no difference larger than 0.05 shown"),
        (-0.02, 0.06, 0.05, "undecided"),
        (math.nan, math.nan, 0.05, "undecided"),
    ],
)
def test_a_verdict_follows_its_rule(low, high, margin, word):
    assert verdict(gain(low, high), margin) == word == check_verdict(word)
    for n_trainings, none in ((1, "one training: no verdict"), (2, "2 trainings: no verdict")):
        assert verdict(gain(low, high, n_trainings), margin) == none == check_verdict(none)


def test_only_what_was_published_is_replicated():
    assert verdict(gain(0.1, 0.3), is_published=True) == "replicated"
    assert verdict(gain(-0.3, -0.1), is_published=True) == "reversed"
    with pytest.raises(ValueError, match="no verdict 'not replicated'; there are supported"):
        check_verdict("not replicated")


def test_a_baseline_at_its_floor_is_not_compared():
    rng = np.random.default_rng(0)
    better, chance, none = (rng.random((3, 100)) < p for p in (0.8, 0.06, 0.0))
    for baseline in (chance, none):
        assert verdict(paired_difference(better, baseline)) == "supported"
        assert verdict(paired_difference(better, baseline), floor=0.06) == "not compared"
    assert verdict(paired_difference(better, better), floor=0.06) == "undecided"
    near, far = rng.normal(10, 1, (3, 50)), rng.normal(40, 1, (3, 50))
    assert verdict(paired_difference(near, far, lower_is_better=True), floor=40.1) == "not compared"
    assert verdict(paired_difference(near, far, lower_is_better=True), floor=60) == "supported"
    with pytest.raises(ValueError, match="a floor needs the outcomes of the baseline"):
        verdict(newcombe(wilson(5, 10), wilson(3, 10)), floor=0.1)


def test_errors_are_better_where_they_are_lower():
    low, high = np.random.default_rng(0).normal(1, 0.1, (3, 30)), np.random.default_rng(1).normal(2, 0.1, (3, 30))
    got = paired_difference(low, high, lower_is_better=True)
    assert got.estimate == pytest.approx((high - low).mean()) and verdict(got) == "supported"
    assert got.at(0.5).high < got.high and got.at(0.95) == got


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_holms_p_values_are_those_of_statsmodels_and_its_intervals_agree_with_them(seed, k):
    rng = np.random.default_rng(seed)
    gains = {str(i): paired_difference(*(rng.random((2, 3, 40)) < [[[rng.random()]], [[0.4]]])) for i in range(k)}
    adjusted = holm(gains)
    alone = [p_value(gain) for gain in gains.values()]
    expected = multipletests(alone, method="holm")[1]
    assert list(adjusted) == list(gains)
    assert [gain.p_value for gain in adjusted.values()] == pytest.approx(list(expected))
    for claim, gain in adjusted.items():
        if abs(gain.p_value - 0.05) > 1e-4:
            assert (gain.low > 0 or gain.high < 0) == (gain.p_value < 0.05)
        assert gain.low <= gains[claim].low + 1e-12 and gains[claim].high <= gain.high + 1e-12
    if k == 1:
        assert adjusted["0"].low == pytest.approx(gains["0"].low)


def test_a_p_value_is_that_of_the_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 50), rng.normal(0, 1, 50)
    assert p_value(paired_difference(a, b)) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-3)
    assert p_value(paired_difference([0, 1, 0], [0, 1, 0])) == p_value(paired_difference([3.0], [2.0])) == 1.0


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("m, n, between", [(3, 200, 0.03), (5, 100, 0.02), (5, 200, 0.07), (5, 400, 0.1)])
def test_the_smallest_difference_that_shows_is_shown_as_often_as_asked(m, n, between, k):
    """Also the first of several contrasts, at the level at which Holm's procedure tests it."""
    shows = minimum_detectable_difference(0.4, n, m, between=between, n_contrasts=k)
    rng, n_shown, n_trials = np.random.default_rng(0), 0, 300
    for _ in range(n_trials):
        rates = np.clip(rng.normal([[[0.4 + shows]], [[0.4]]], between, (2, m, 1)), 0, 1)
        n_shown += verdict(paired_difference(*(rng.random((2, m, n)) < rates), level=1 - 0.05 / k)) == "supported"
    assert 0.73 < n_shown / n_trials < 0.87, (shows, n_shown / n_trials)


def test_pairing_narrows_the_interval_of_several_trainings():
    """Scenes that are hard for all count against both sides; taken one against another's, they widen the difference."""
    rng, n = np.random.default_rng(0), 100
    hard = rng.random(n) < 0.5  # hardly ever solved, the others nearly always
    rates = np.where(hard, 0.05, 0.9) + np.array([[[0.05]], [[0.0]]])
    a, b = rng.random((2, 3, n)) < rates
    same, others = paired_difference(a, b), paired_difference(a, b[:, rng.permutation(n)])
    errors = [paired_difference(side_a * 1.5, side_b * 1.5) for side_a, side_b in ((a, b), (a, b[:, rng.permutation(n)]))]
    for paired, unpaired in ((same, others), errors):
        assert paired.estimate == pytest.approx(unpaired.estimate)
        assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)


def test_a_design_knows_pairing_trainings_and_contrasts():
    design = {"p": 0.5, "n_episodes": 100, "n_trainings": 4, "between": 0.03}
    plain, *less = (
        minimum_detectable_difference(**{**design, **change})
        for change in ({}, {"n_trainings": 5}, {"correlation": 0.5}, {"between": 0.01}, {"n_episodes": 200})
    )
    assert max(less) < plain < minimum_detectable_difference(**design, n_contrasts=4) < 0.5
    assert ASSUMED_SPREAD == 0.07 and minimum_detectable_difference(0.5, 100, 3) == math.inf  # too few for so wide a spread
    assert [minimum_detectable_difference(0.5, 10_000, m) for m in (1, 2)] == [math.inf] * 2  # no verdict, whatever n
    assert minimum_detectable_difference(0.5, 5, 3) == math.inf  # it would have to leave [0, 1]
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\].*got p=1.5"):
        minimum_detectable_difference(1.5, 10, 3)


def test_what_has_no_spread_has_no_interval_but_within_bounds():
    assert math.isnan(mean_interval([2.0, 2.0]).low) and math.isnan(mean_interval([2.0]).high)
    assert math.isnan(paired_difference([2.0], [1.0]).low) and math.isnan(paired_difference([2.5, 3.5], [1.5, 2.5]).high)
    assert verdict(paired_difference(np.full((3, 4), 2.5), np.full((3, 4), 1.5))) == "undecided"
    best = mean_interval([5, 5, 5], bounds=(0, 5))
    assert best.high == 5 and best.low < 3
    inside = mean_interval([0, 1, 0, 0], bounds=(0, 5))
    assert inside.low == 0 and inside.high < 5


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
    for nothing in ([], [1.0, math.nan]):
        with pytest.raises(
            ValueError, match=r"expected finite numbers, one per episode, \(n,\) or \(m, n\) with n > 0; got shape"
        ):
            mean_interval(nothing)
    with pytest.raises(ValueError, match="expected outcomes of 0 and 1; use mean_interval"):
        success_rate([0, 2])
    with pytest.raises(ValueError, match=r"expected above 0, got -0\.1"):
        verdict(gain(-1.0, 1.0), margin=-0.1)


def test_rates_read_as_text():
    assert str(wilson(94, 200)) == "47% [40%, 54%], 94 of 200"


@pytest.mark.parametrize("between", [0.0, 0.15])
def test_the_spread_of_trainings_is_taken_apart(between):
    """Rates around 0.5 with a known deviation between trainings: without evaluation noise it is recovered on average."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        true = np.clip(rng.normal(0.5, between, 5), 0, 1)
        spread = seed_variance([wilson(int(rng.binomial(50, p)), 50) for p in true])
        found.append(spread.observed**2 - spread.evaluation**2)
        assert spread.training**2 == pytest.approx(max(found[-1], 0), abs=1e-12) and spread.n == 5
    assert np.mean(found) == pytest.approx(between**2, abs=0.002)


def test_one_training_has_no_spread():
    with pytest.raises(ValueError, match="expected at least two trainings, got 1; train with more seeds"):
        seed_variance([wilson(3, 5)])
