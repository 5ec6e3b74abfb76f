"""Figures hold what they claim: widths, sentences, units, colours, outcome; a notebook shows each once."""

import io
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from rvlm.report import plots

NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
SCALE = np.array([0.02] * 3 + [0.05] * 3 + [1.0])
SPEC = SimpleNamespace(
    names=NAMES,
    units=("m",) * 3 + ("rad",) * 3 + ("1",),
    is_binary=[False] * 6 + [True],
    to_si=lambda actions, *names: actions * SCALE,
)
FRAMES = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)

ESTIMATES = pd.DataFrame(
    {"name": ["a", "b"] * 2, "panel": ["dx [m]"] * 2 + ["avg_len [tasks]"] * 2, "value": [0.1, 0.2, 4, 2]}
    | {"low": [0.05, 0.1, None, None], "high": [0.2, 0.3, None, None]}
)
LOG = [{"step": i, "n_steps": 8, "arm_loss": 1 / i} for i in range(1, 9)]
CURVES = pd.DataFrame(
    {"name": list("aab"), "window [steps]": [2, 4, 4], "time [ms]": [5.0, 6, 9], "low": [4.0, 5, 8], "high": [6.0, 7, 10]}
)
MASKS = {"alone": np.eye(3), "together": np.tril(np.ones((3, 3)))}
KINDS = {name: ("image", "instruction", "action") for name in MASKS}
POINTS = pd.DataFrame({"name": ["a", "a", "b"], "error_m": [0.01, 0.02, 0.03], "successes": [9, 5, 0], "n": [10, 10, 10]})


MEMORY = pd.DataFrame({"name": ["small, LoRA", "large, full"], "weights": [5.0, 30], "optimizer": [0.0, 60]})
PLANNED = pd.DataFrame({"name": ["full", "LoRA"], "planned": [50.0, 20], "measured": [40.0, 20]})
LEFT = {"without replay": np.array([[1.0, 0.0], [0.2, 0.9]]), "with replay": np.array([[1.0, 0.0], [0.9, 0.9]])}
TRIALS = pd.DataFrame({"rate": [1e-3, 1e-4, 1e-3], "decay": [0.0, 0.1, 0.1], "error [mm]": [20.0, 30.0, None]})
DIAGNOSES = pd.DataFrame({"name": ["sound", "gripper"], "check": [None, "motion"], "fault": [None, "gripper sign"]})
READINGS = pd.DataFrame({"candidate": ["as recorded", "gripper sign"], "distance [mm]": [5.0, 0.0]})
FAILED = pd.DataFrame(
    {"group": ["lift", "lift", "push"], "failure": ["dropped", "timed out"] * 1 + ["timed out"], "share": [0.1, 0.2, 0.05]}
)


def draw_all():
    rng = np.random.default_rng(0)
    rates = pd.DataFrame(
        {"name": ["one-step continuous", "random"], "successes": [9, 0], "n": [20, 20], "published": [0.5, None]}
    )
    return {
        "filmstrip": plots.filmstrip({"static": FRAMES, "wrist": FRAMES}, "lift the red cube", True, n=4),
        "action_curves": plots.action_curves(rng.normal(size=(12, 7)), SPEC, rng.normal(size=(12, 3, 7))),
        "token_map": plots.token_map(["<image>"] * 16 + ["lift", "<act>"], ["image"] * 16 + ["instruction", "action"]),
        "success_bars": plots.success_bars(rates),
        "loss_curves": plots.loss_curves([{"step": i, "loss": 1 / i, "learning_rate": 0.1} for i in range(1, 9)]),
        "grounding_overlay": plots.grounding_overlay(FRAMES[0], [(3, 4), (14, 2.5)], ["red cube", "drawer"]),
        "attention_overlay": plots.attention_overlay(FRAMES[0], rng.random((4, 4))),
        "estimates": plots.estimates(ESTIMATES, "Two policies and what is published"),
        "lines": plots.lines(CURVES, "A longer window costs more"),
        "attention_masks": plots.attention_masks(MASKS, KINDS, "Past tokens are seen in one sequence only"),
        "compare_losses": plots.compare_losses({"a": LOG, "b": LOG}),
        "diagnosis": plots.diagnosis(DIAGNOSES, ["data card", "motion", "replay"], "One of two policies has a fault"),
        "evidence": plots.evidence({"replay": READINGS, "again": READINGS}, "Another reading makes it right"),
        "failures": plots.failures(FAILED, ["dropped", "timed out"], "Lifts fail most of all"),
        "error_against_success": plots.error_against_success(POINTS, "A lower error goes with more success"),
        "memory_bars": plots.memory_bars(MEMORY, {"L4": 24}, "One of two models fits"),
        "planned_and_measured": plots.planned_and_measured(PLANNED, "MB", "The plan is at most 25 % off"),
        "forgetting_matrices": plots.forgetting_matrices(LEFT, ["a", "b"], ["a", "b"], "Replay keeps what was learned"),
        "parallel_coordinates": plots.parallel_coordinates(TRIALS, ["rate", "decay"], "error [mm]", "A small rate is best"),
    }


@pytest.fixture(scope="module")
def figures():
    return draw_all()


def test_every_figure_has_a_paper_width_and_a_sentence(figures):
    for name, fig in figures.items():
        assert fig.get_figwidth() in (plots.COLUMN_IN, plots.PAGE_IN), name
        title = fig.get_suptitle() or fig.axes[0].texts[-1].get_text()
        assert len(title.split()) >= 4, (name, title)


def test_every_plain_axis_carries_a_unit_or_counts_steps(figures):
    for name in ("action_curves", "success_bars", "loss_curves", "estimates", "compare_losses", "error_against_success"):
        labels = [ax.get_xlabel() or ax.get_ylabel() for ax in figures[name].axes if ax.get_xlabel() or ax.get_ylabel()]
        assert labels and all("[" in label or "step" in label for label in labels), (name, labels)


def test_drawing_leaves_no_trace():
    before = dict(plt.rcParams)
    draw_all()
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("success, color", [(True, plots.SUCCESS), (False, plots.FAILURE), (None, plots.NEUTRAL)])
def test_filmstrip_border_and_title_tell_the_outcome(success, color):
    fig = plots.filmstrip({"static": list(FRAMES)}, "open the drawer", success, n=5)
    shown = [ax for ax in fig.axes if ax.images]
    assert [ax.get_xlabel() for ax in shown] == [f"step {i}" for i in (0, 3, 6, 8, 11)]
    assert {to_hex(s.get_edgecolor()) for ax in shown for s in ax.spines.values()} == {to_hex(color)}
    assert "open the drawer" in fig.get_suptitle()
    assert ("not done" in fig.get_suptitle()) == (success is False)


def test_action_curves_draw_si_units_and_start_chunks_where_they_were_predicted():
    actions = np.arange(84, dtype=float).reshape(12, 7)
    fig = plots.action_curves(actions, SPEC, {5: np.ones((3, 7))})
    panels = {ax.get_ylabel(): ax for ax in fig.axes}
    assert set(panels) >= {"dx [m]", "droll [rad]", "gripper"}
    chunk, executed = panels["droll [rad]"].lines
    np.testing.assert_allclose(executed.get_ydata(), actions[:, 3] * 0.05)
    np.testing.assert_array_equal(chunk.get_xdata(), [5, 6, 7])
    np.testing.assert_allclose(chunk.get_ydata(), 0.05)


def test_names_have_one_color_each():
    assert len({plots.dimension_color(name) for name in NAMES}) == len(NAMES)
    assert len({plots.structure_color(name) for name in plots.STRUCTURE_NAMES}) == len(plots.STRUCTURE_NAMES)
    assert plots.structure_color("policy_head_continuous") == plots.structure_color("Policy-head continuous, LSTM")
    assert plots.dimension_color("joint_3") == plots.dimension_color("joint_3") in plots.PALETTE
    assert plots.structure_color("random actions") == plots.NEUTRAL


def test_token_map_counts_and_folds_images():
    fig = plots.token_map(["<image>"] * 16 + ["Ġlift", "\n", "<act>"], ["image"] * 16 + ["instruction", "other", "action"])
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert {"16 × image", "lift", "⏎", "<act>", "16 image", "1 action"} <= set(texts)
    assert any(t.startswith("The model reads 19 tokens") for t in texts)


def test_success_bars_show_wilson_intervals_and_hollow_published_values():
    table = pd.DataFrame(
        {"name": ["a", "b"], "successes": [94, 20], "n": [200, 200], "published": [None, 0.3], "source": [None, "X"]}
    )
    ax = plots.success_bars(table).axes[0]
    (bar,) = ax.containers[1].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 0], [40.2, 53.9], atol=0.1)
    (hollow,) = [line for line in ax.lines if line.get_marker() == "D"]
    assert hollow.get_markerfacecolor() == "none"
    assert (hollow.get_xdata()[0], hollow.get_ydata()[0], hollow.get_label()) == (30, 1, "published (X)")


def test_success_bars_show_the_intervals_of_the_table_where_it_has_some():
    table = pd.DataFrame({"name": ["a"], "successes": [90], "n": [200], "rate": [0.45], "low": [0.2], "high": [0.8]})
    for ax in (plots.success_bars(table).axes[0], plots.rates_by_group(table.assign(group="x"), "A title").axes[0]):
        (bar,) = next(c for c in ax.containers if c.__class__.__name__ == "ErrorbarContainer").lines[2]
        np.testing.assert_allclose(bar.get_segments()[0][:, 0], [20, 80])


@pytest.mark.parametrize(
    "successes, n, title",
    [
        ([94], [200], "First solves 94 of 200 episodes"),
        ([184, 20], [200, 200], "First solves most: 184 of 200 episodes"),
        ([64, 61, 60], [80, 80, 80], "No winner shown: 75 to 80 % (n = 80)"),
        ([0, 0], [4, 8], "No winner shown: 0 % (n = 4 to 8)"),
    ],
)
def test_a_title_names_a_winner_only_where_its_interval_stands_apart(successes, n, title):
    table = pd.DataFrame({"name": ["first", "second", "third"][: len(n)], "successes": successes, "n": n})
    assert plots.verdict_title(table) == title == plots.success_bars(table).get_suptitle()


def test_success_bars_print_counts_and_shared_episodes_once():
    once = pd.DataFrame({"name": ["a"], "successes": [169], "n": [200]})
    assert [t.get_text() for t in plots.success_bars(once).axes[0].texts] == ["169/200"]
    table = pd.DataFrame({"name": ["a", "b"], "successes": [840, 100], "n": [1000, 200], "trainings": [5, None]})
    fig = plots.success_bars(table)
    assert [t.get_text() for t in fig.axes[0].texts] == ["84 %, 5 × 200", "100/200"]
    assert fig.get_suptitle() == "A solves most: 84 % of 5 × 200 episodes"


def test_a_short_curve_is_not_smoothed_and_a_long_one_does_not_lag():
    falling = pd.Series(np.linspace(1, 0, 59))
    assert plots.smoothed(falling) is falling
    line = pd.Series(np.linspace(1, 0, 101))
    np.testing.assert_allclose(plots.smoothed(line)[10:-10], line[10:-10])
    noisy = line + np.random.default_rng(0).normal(0, 0.1, 101)
    assert (plots.smoothed(noisy) - line).abs().mean() < 0.5 * (noisy - line).abs().mean()


def test_a_loss_axis_is_logarithmic_only_where_a_decade_is_crossed():
    def scale(last):
        log = [{"step": i, "n_steps": 4, "arm_loss": v} for i, v in enumerate(np.linspace(1, last, 5))]
        return plots.compare_losses({"a": log}).axes[0].get_yscale(), plots.loss_curves(log).axes[0].get_yscale()

    assert (scale(0.5), scale(0.05)) == (("linear",) * 2, ("log",) * 2)


def test_zero_is_a_drawn_line_where_gains_may_lie_on_both_sides():
    gains = pd.DataFrame({"name": ["a"], "panel": "gain [points]", "value": [3.0], "low": [-4.0], "high": [10.0]})
    ax = plots.estimates(gains, "A gain").axes[0]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_color() == "black"] == [[0, 0]]
    rows = pd.DataFrame({"name": ["mean action", "one-step continuous"], "panel": "x", "value": 1.0, "low": 0.5, "high": 2.0})
    colors = [to_hex(c.lines[0].get_color()) for c in plots.estimates(rows, "Rows").axes[0].containers]
    assert colors == [plots.NEUTRAL, plots.structure_color("one-step continuous")], "a row with a label needs no colour"


def test_no_text_is_smaller_than_six_points(figures):
    sizes = {
        name: min(t.get_fontsize() for t in fig.findobj(Text) if t.get_text()) for name, fig in {**figures, **draw_more()}.items()
    }
    assert min(sizes.values()) >= 6, sizes


def test_loss_curves_skip_the_mean_and_refuse_a_log_without_loss():
    fig = plots.loss_curves(
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}, {"step": 2, "train_loss": 2.5, "eval_loss": 1.0}]
    )
    assert [line.get_label() for line in fig.axes[0].lines] == ["loss", "eval loss"]
    assert "does not fall" in fig.get_suptitle()
    with pytest.raises(ValueError, match="expected records with 'step' and a loss, got the keys"):
        plots.loss_curves([{"step": 1, "learning_rate": 0.1}])


def test_estimates_draw_intervals_and_hollow_markers_where_there_is_none():
    ours, theirs = plots.estimates(ESTIMATES, "Two policies and what is published").axes
    assert (ours.get_xlabel(), theirs.get_xlabel()) == ("dx [m]", "avg_len [tasks]")
    (bar,) = ours.containers[0].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 0], [0.05, 0.2])
    assert [line.get_markerfacecolor() for line in theirs.lines] == ["none", "none"]


def test_errors_and_success_are_drawn_in_their_units():
    ax = plots.error_against_success(POINTS, "A lower error goes with more success").axes[0]
    line = ax.containers[0].lines[0]
    np.testing.assert_allclose(np.asarray([line.get_xdata(), line.get_ydata()], float), [[10, 20], [90, 50]])


def test_attention_is_drawn_as_shares():
    fig = plots.attention_overlay(FRAMES[0], np.array([[3, 1], [0, 0]]), title="Where it looks now")
    np.testing.assert_allclose(fig.axes[1].images[1].get_array(), [[75, 25], [0, 0]])


def test_attention_masks_color_attended_tokens_by_role():
    fig = plots.attention_masks(MASKS, KINDS, "Past tokens are seen in one sequence only")
    alone, together = (ax.images[0].get_array() for ax in fig.axes[:2])
    assert (np.asarray(alone)[2, 0] == 1).all(), "white where nobody looks"
    image, row = np.asarray(together)[:, 0], np.asarray(together)[2]
    assert (image < 1).any(axis=-1).all() and (row < 1).any(axis=-1).all()
    assert image[2].sum() < image[1].sum(), "rows of an action token are drawn in full"


@pytest.mark.parametrize("lowest", [0.5, 0.1, 1e-2, 1e-5])
def test_a_loss_axis_is_labelled_however_far_the_loss_falls(lowest):
    log = [{"step": i + 1, "n_steps": 9, "arm_loss": float(v)} for i, v in enumerate(np.geomspace(1, lowest, 9))]
    ax = plots.compare_losses({"a": log}).axes[0]
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    labels = [t.get_text() for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert len([label for label in labels if label]) >= 2, labels


def test_lines_draw_every_curve_with_its_band_down_to_zero_or_below():
    ax = plots.lines(CURVES, "A longer window costs more").axes[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[5, 6], [9]] and len(ax.collections) == 2
    assert ax.get_xlabel() == "window [steps]" and ax.get_ylabel() == "time [ms]" and ax.get_ylim()[0] == 0
    below = CURVES.assign(**{"time [ms]": [-5.0, 6, 9], "low": [-6.0, 5, 8]})
    assert plots.lines(below, "Below zero").axes[0].get_ylim()[0] < -5


def test_a_diagnosis_ends_at_the_check_that_fails(figures):
    texts = [text.get_text() for text in figures["diagnosis"].axes[0].texts]
    assert texts == ["passes", "passes", "passes", "no fault", "passes", "fails", "gripper sign"]


def test_failures_stack_to_the_share_that_failed(figures):
    ax = figures["failures"].axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["lift", "push"]
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in ax.patches if bar.get_y() < 0}
    assert max(ends) == pytest.approx(30)


def test_memory_stacks_its_parts_and_marks_the_memory_of_gpus(figures):
    ax = figures["memory_bars"].axes[0]
    assert [bar.get_x() + bar.get_width() for bar in ax.containers[1]] == [5.0, 90.0]
    assert {line.get_xdata()[0] for line in ax.lines} == {24} and "24 GB" in [t.get_text() for t in ax.texts][-1]


def test_a_plan_that_is_right_lies_on_the_line(figures):
    line, *points = figures["planned_and_measured"].axes[0].lines
    assert np.array_equal(*line.get_data())
    assert [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points] == [(40.0, 50.0), (20.0, 20.0)]


def test_forgetting_is_written_in_every_field(figures):
    written = [[text.get_text() for text in ax.texts] for ax in figures["forgetting_matrices"].axes]
    assert written == [["100 %", "0 %", "20 %", "90 %"], ["100 %", "0 %", "90 %", "90 %"]]


def test_a_pruned_trial_is_dashed_and_the_best_is_drawn_last(figures):
    lines = figures["parallel_coordinates"].axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["--", "-", "-"]
    assert np.allclose(lines[-1].get_ydata(), [1, 0], atol=0.05), "rate 1e-3, decay 0"


def test_bad_input_is_one_clear_error():
    with pytest.raises(ValueError, match="unknown: \\['picture'\\]"):
        plots.token_map(["a"], ["picture"])
    with pytest.raises(ValueError, match=r"got \{'static': 12, 'wrist': 3\}"):
        plots.filmstrip({"static": FRAMES, "wrist": FRAMES[:3]}, "lift", True)
    with pytest.raises(ValueError, match="got 1 points and 2 labels"):
        plots.grounding_overlay(FRAMES[0], [(1, 1)], ["a", "b"])
    with pytest.raises(ValueError, match="with a positive sum"):
        plots.attention_overlay(FRAMES[0], np.zeros((2, 2)))


def test_video_is_h264_that_browsers_play_and_decodes_to_the_frames():
    import av

    flat = np.full((6, 15, 21, 3), 90, np.uint8)
    flat[3:, :, :, 0] = 200
    with av.open(io.BytesIO(plots.mp4(flat, 10))) as container:
        stream = container.streams.video[0]
        assert (stream.codec.canonical_name, stream.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 10.0)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 6 and min(decoded[0].shape[:2]) >= 256
    assert np.abs(decoded[0].mean((0, 1)) - 90).max() < 4 and abs(decoded[5][..., 0].mean() - 200) < 6
    assert 'src="data:video/mp4;base64,' in plots.player(flat, 10).data


def test_explore_scrubs_every_camera():
    widget = plots.explore({"images": {"static": FRAMES, "wrist": FRAMES[::-1]}, "instruction": "lift the red cube"})
    label, screens, controls = widget.children
    first = [screen.value for screen in screens.children]
    controls.children[-1].value = 11
    assert label.value == "lift the red cube"
    assert [screen.value for screen in screens.children] == first[::-1] != first


def draw_more():
    rng = np.random.default_rng(0)
    bins = {"bins": [4, 4, 64, 64], "dimension": ["dx", "dyaw"] * 2, "unit": ["m", "rad"] * 2, "error": [0.02, 0.1, 0.01, 0.06]}
    rates = {"group": ["lift", "push"] * 2, "name": ["seeing", "seeing", "blind", "blind"], "successes": [9, 5, 0, 1], "n": 10}
    bins, rates = pd.DataFrame(bins), pd.DataFrame(rates)
    ends = np.array([[-1.0] * 7, [1.0] * 7])
    return {
        "histograms": plots.histograms(rng.normal(size=(50, 7)), NAMES, SPEC.units, ends, "Most are small"),
        "hand_path": plots.hand_path(rng.normal(size=(9, 7)), {"recorded": rng.normal(size=(9, 2))}, "The label leads back"),
        "error_by_bins": plots.error_by_bins(bins, "More bins lose less", needed=0.005),
        "rates_by_group": plots.rates_by_group(rates, "Seeing helps"),
        "gallery": plots.gallery({"static": FRAMES[:3], "wrist": FRAMES[3:6]}, ["1 [px]", "2 [px]", "3 [px]"], "Three scenes"),
        "observation": plots.observation(
            {"images": {"static": FRAMES[0], "wrist": FRAMES[1]}, "state": np.arange(2.0), "instruction": "lift it"},
            SimpleNamespace(state_names=("x", "y"), state_units=("m", "m")),
        ),
    }


def test_what_the_first_notebooks_draw_has_a_width_a_sentence_and_units():
    for name, fig in draw_more().items():
        assert fig.get_figwidth() in (plots.COLUMN_IN, plots.PAGE_IN), name
        labels = [ax.get_xlabel() for ax in fig.axes if ax.get_visible()]
        assert fig.get_suptitle() and all("[" in x or "bins" in x or "px" in x or x == "gripper" for x in labels if x), (
            name,
            labels,
        )


def test_a_displacement_starts_where_the_hand_was_and_the_camera_looks_from_below():
    state = np.zeros((1, 7)) + 0.1
    (ax,) = plots.hand_path(state, {"recorded": np.array([[0.02, 0.0]])}, "One step").axes
    (arrows,) = [c for c in ax.collections if hasattr(c, "U")]
    assert (arrows.U[0], arrows.V[0]) == (0, 2) and np.allclose(arrows.get_offsets(), 10)  # [cm]: y across, x downwards
    assert ax.yaxis_inverted()
