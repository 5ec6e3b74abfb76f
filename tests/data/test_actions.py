"""Actions: cards and specs, statistics and normalisation, tokens."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from rvlm.data.actions import CARDS, ActionSpec, NormStats, StatsAccumulator
from rvlm.data.errors import CardError, SpecMismatch
from rvlm.data.groups import Group
from rvlm.data.normalization import NORMALIZATIONS
from rvlm.data.rotations import LAYOUTS, from_rotation, to_rotation
from rvlm.policy.action_tokenizer import ActionTokenizer

SPECS = {name: ActionSpec.from_card(name) for name in ("tabletop_franka7", "tabletop_ur6", "tabletop_small5")}
FRANKA, UR = SPECS["tabletop_franka7"], SPECS["tabletop_ur6"]
BINARY = [False] * 6 + [True]


def some_actions(n=200, spec=FRANKA, seed=0):
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (n, 7)).astype(np.float32)
    return spec.set_grippers(actions, rng.random((n, 1)) > 0.5)


def stats_of(x, kind="q01_q99", **kwargs):
    return StatsAccumulator().update(x).finish(kind, **kwargs)


# --- spec -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_spec_survives_json(spec):
    assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_spec_refuses_unknown_and_missing_fields():
    with pytest.raises(CardError, match=r"unknown fields \['colour'\].*fields that exist"):
        ActionSpec.from_dict(FRANKA.to_dict() | {"colour": 1})
    with pytest.raises(CardError, match=r"missing fields \['rate_hz'\]"):
        ActionSpec.from_dict({k: v for k, v in FRANKA.to_dict().items() if k != "rate_hz"})


JOINTS = Group("joint", ("a", "b"), ("rad", "rad"), low=(-1.0, -1.0), high=(1.0, 1.0))
JAW = Group("gripper", ("jaw",), ("1",), low=(0.0,), high=(100.0,), open=100.0, close=0.0)
BAD_GROUPS = {
    "a gripper among the arm": (
        0,
        {"names": ("gripper", *FRANKA.names[:6]), "units": ("1",) * 7},
        "one to three names of position.*reorder",
    ),
    "two scales": (0, {"scale": (1.0, 1.0)}, "'scale' has 2 entries for 6 names"),
    "another rotation": (0, {"rotation": "euler"}, "rotation is 'euler'; expected one of axis_angle, euler_xyz"),
    "a quaternion of three": (0, {"rotation": "rot6d"}, r"one to three names of position, then 6 of the rotation"),
    "no frame": (0, {"frame": "hand"}, "frame is 'hand'; expected one of world, base, ee"),
    "an unknown kind": (0, {"kind": "arm"}, "kind is 'arm'; expected one of pose_delta"),
    "joints with a frame": (0, {"kind": "joint"}, "a frame and a rotation of pose_delta and pose alone"),
    "open is close": (1, {"close": 1.0}, "open and close are both 1.0; they must differ"),
    "close within": (1, {"close": 0.0}, "open and close at low and high"),
    "no close": (1, {"close": None}, "'open' and 'close' of a gripper"),
    "an absent gripper": (1, {"absent": ("gripper",)}, "and no gripper"),
    "a name twice": (1, {"names": ("dx",)}, r"action names without repetition, got \['dx'\] twice"),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_a_group_that_contradicts_itself_is_refused(name):
    index, changes, message = BAD_GROUPS[name]
    with pytest.raises(CardError, match=rf"tabletop_franka7: (action group {index} \(|expected).*{message}"):
        FRANKA.replace_group("action", index, **changes)


def test_a_state_group_takes_no_range():
    with pytest.raises(CardError, match=r"state group 0 \(pose\): expected kind, names, units.*got \['low'\] too"):
        FRANKA.replace_group("state", 0, low=(0.0,) * 6)


def two_arms(**changes):
    """Two joints, a gripper between open and closed, and another arm with a binary one."""
    left = (JOINTS, JAW)
    right = (dataclasses.replace(JOINTS, names=("c", "d")), dataclasses.replace(FRANKA.action[1], names=("hand",)))
    state = Group("joint", ("a", "b", "c", "d"), ("rad",) * 4)
    return ActionSpec("two", "two", 10.0, ("top",), (*left, *right), (state,), **changes)


def test_each_dimension_is_trained_by_its_own_kind():
    spec, rng = two_arms(), np.random.default_rng(0)
    raw = rng.uniform(spec.low, spec.high, (50, 6))
    raw[:, 5] = np.where(rng.random(50) > 0.5, 1.0, -1.0)
    stats = stats_of(raw, passthrough=(5,))
    assert spec.names == ("a", "b", "jaw", "c", "d", "hand") and spec.is_binary.tolist() == [False] * 5 + [True]
    assert spec.gripper_indices == (2, 5) and (spec.is_open(raw) == np.stack([raw[:, 2] > 50, raw[:, 5] > 0], 1)).all()
    normalized = spec.normalize(raw, stats)
    assert (normalized[:, 5] == (raw[:, 5] > 0)).all() and np.allclose(normalized[:, :5], stats.normalize(raw)[:, :5])
    assert np.allclose(spec.unnormalize(normalized, stats), raw), "a jaw that is half open stays so"
    assert np.allclose(spec.unnormalize(torch.from_numpy(normalized), stats).numpy(), raw, atol=1e-6)
    assert spec.set_grippers(raw, True)[:, [2, 5]].tolist() == [[100.0, 1.0]] * 50
    assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(SpecMismatch, match=r"action group 1 open: 100.0 against 50.0"):
        spec.require_same(spec.replace_group("action", 1, open=50.0))


def test_a_robot_without_grippers():
    planar = Group("pose", ("x", "y"), ("px", "px"), low=(0.0, 0.0), high=(512.0, 512.0), frame="world")
    spec = ActionSpec("plane", "plane", 10.0, ("top",), (planar,), (Group("pose", ("x", "y"), ("px", "px"), frame="world"),))
    raw = np.random.default_rng(0).uniform(0, 512, (20, 2))
    stats = stats_of(raw)
    assert spec.gripper_indices == () and spec.is_open(raw).shape == (20, 0) and spec.action[0].n_position == 2
    for x in (raw, torch.from_numpy(raw)):
        assert np.allclose(spec.unnormalize(spec.normalize(x, stats), stats), raw)


@pytest.mark.parametrize("layout", [name for name, n in LAYOUTS.items() if n])
def test_rotation_layouts_are_inverse_pairs(layout):
    rotation = Rotation.random(200, rng=np.random.default_rng(3))
    numbers = from_rotation(rotation, layout)
    assert numbers.shape == (200, LAYOUTS[layout])
    assert (to_rotation(numbers, layout) * rotation.inv()).magnitude().max() < 1e-6
    one = from_rotation(rotation[0], layout)
    assert one.shape == (LAYOUTS[layout],) and (to_rotation(one[None], layout) * rotation[0].inv()).magnitude().max() < 1e-6


def test_quaternions_are_canonical_and_their_order_counts():
    quarter = Rotation.from_euler("z", 90, degrees=True)
    half = np.sqrt(0.5)
    assert np.allclose(from_rotation(quarter, "quat_xyzw"), [0, 0, half, half])
    assert np.allclose(from_rotation(quarter, "quat_wxyz"), [half, 0, 0, half])
    flipped = to_rotation(-from_rotation(quarter, "quat_wxyz")[None], "quat_wxyz")
    assert np.allclose(from_rotation(flipped, "quat_wxyz"), [half, 0, 0, half]), "q and -q are one rotation"
    assert np.allclose(from_rotation(quarter, "rot6d"), [0, 1, 0, -1, 0, 0]), "the first two columns"
    stretched = np.array([0, 3.0, 0, -1, 0.5, 0])
    assert np.allclose(from_rotation(to_rotation(stretched[None], "rot6d"), "rot6d"), [0, 1, 0, -1, 0, 0])


@pytest.mark.parametrize(
    ("values", "layout", "message"),
    [
        (np.zeros((1, 4)), "quat_xyzw", "numbers that are none"),
        (np.ones((1, 6)), "rot6d", "two that are parallel"),
        (np.ones((1, 3)), "quat_xyzw", "got 'quat_xyzw' and 3 numbers"),
        (np.ones((1, 3)), "euler", "got 'euler' and 3 numbers"),
        (np.ones((1, 0)), "none", "got 'none' and 0 numbers"),
    ],
)
def test_numbers_that_are_no_rotation_are_refused(values, layout, message):
    with pytest.raises(SpecMismatch, match=message):
        to_rotation(values, layout)


def test_missing_and_broken_cards_say_what_to_do(tmp_path):
    with pytest.raises(CardError, match=r"no data card at .*cards that exist: .*tabletop_franka7"):
        ActionSpec.from_card("tabletop_francka")
    card = tmp_path / "mine.md"
    for text, message in (
        ("# no matter", "expected YAML front matter"),
        ("---\na: [\n---\n", "is not YAML"),
        ("---\na: 1\n---\n", "'rvlm:'"),
    ):
        card.write_text(text)
        with pytest.raises(CardError, match=message):
            ActionSpec.from_card(card)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4)])
def test_polarity_follows_the_card_on_the_last_axis(spec, shape):
    """Sign from the card, gripper and arm split on the last axis for any leading shape."""
    actions = np.random.default_rng(0).uniform(0.1, 0.9, (*shape, 7))
    opened, closed = (spec.set_grippers(actions, np.full((*shape, 1), is_open)) for is_open in (True, False))
    assert (opened[..., -1] == spec.action[1].open).all() and (closed[..., -1] == spec.action[1].close).all()
    assert spec.is_open(opened).all() and not spec.is_open(closed).any() and spec.is_open(opened).shape == (*shape, 1)
    assert (opened[..., :6] == actions[..., :6]).all()


def test_the_same_number_means_opposite_things_for_two_robots():
    assert FRANKA.is_open(np.ones(7)).all() and not UR.is_open(np.ones(7)).any()


def test_si_units():
    assert np.allclose(FRANKA.to_si(np.ones((2, 7)), "dx", "dyaw"), [[FRANKA.scale[0], FRANKA.scale[5]]] * 2)
    assert FRANKA.to_si(np.ones((2, 7))).shape == (2, 7)
    with pytest.raises(SpecMismatch, match=r"no action dimension \['roll'\]; it has \['dx'"):
        FRANKA.to_si(np.ones(7), "roll")


def test_check_names_row_and_dimension():
    actions = some_actions(10)
    FRANKA.check(actions)
    with pytest.raises(SpecMismatch, match=r"expected 7 action dimensions .*got shape \(10, 6\); use the card"):
        FRANKA.check(actions[:, :6])
    for value, expected in ((np.nan, "finite numbers"), (np.inf, "finite numbers"), (1.5, "low .* to high")):
        bad = actions.copy()
        bad[3, 1] = value
        with pytest.raises(SpecMismatch, match=rf"expected {expected}.*, got {value} for 'dy' in row 3 \(1 of 10 rows"):
            FRANKA.check(bad)


def test_require_same_names_every_difference():
    FRANKA.require_same(dataclasses.replace(FRANKA, dataset="another set of the same robot"))
    with pytest.raises(SpecMismatch) as error:
        FRANKA.require_same(UR, "policy vs environment")
    for part in (
        "policy vs environment",
        "action group 1 open: 1.0 against -1.0",
        "rate_hz: 10.0 against 8.0",
        "action group 0 scale: [",
        "convert",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("change", [{"kind": "pose"}, {"rotation": "euler_xyz"}, {"frame": "base"}])
def test_require_same_catches_the_silent_faults_of_a_group(change):
    with pytest.raises(SpecMismatch, match=f"action group 0 {next(iter(change))}"):
        FRANKA.require_same(FRANKA.replace_group("action", 0, **change))


@pytest.mark.parametrize("change", [{"cameras": ("wrist", "static")}, {"rate_hz": 20.0}, {"image_rotation_deg": 180.0}])
def test_require_same_catches_the_silent_faults(change):
    with pytest.raises(SpecMismatch, match=next(iter(change))):
        FRANKA.require_same(dataclasses.replace(FRANKA, **change))


# --- statistics -----------------------------------------------------------------------------------------------------------

values = arrays(np.float64, st.tuples(st.integers(2, 40), st.just(3)), elements=st.floats(-1e3, 1e3, width=32))


@settings(max_examples=40, deadline=None)
@given(x=values, kind=st.sampled_from(NORMALIZATIONS))
def test_normalisation_is_an_inverse_pair(x, kind):
    """Also of constant dimensions."""
    x[:, 2] = 7.0
    stats = stats_of(x, kind)
    assert np.isfinite(stats.normalize(x)).all()
    assert np.allclose(stats.unnormalize(stats.normalize(x)), x, atol=1e-6)
    assert np.allclose(stats.normalize(stats.unnormalize(x)), x, rtol=1e-5, atol=1e-3)


def test_no_clip_on_top():
    x = np.r_[np.zeros(98), 1, 50.0][:, None]
    stats = stats_of(x)
    assert stats.normalize(x).max() > 1.5
    assert np.allclose(stats.unnormalize(stats.normalize(x)), x)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_actions_in_training_units_and_back(spec, kind):
    actions = some_actions(spec=spec)
    stats = stats_of(actions, kind)
    normalized = spec.normalize(actions.reshape(2, 100, 7), stats)
    assert set(np.unique(normalized[..., -1])) == {0.0, 1.0}
    assert (normalized[..., -1:] == spec.is_open(actions).reshape(2, 100, 1)).all()
    assert np.allclose(spec.unnormalize(normalized, stats).reshape(-1, 7), actions, atol=1e-6)


def test_numpy_and_torch_agree():
    actions = some_actions()
    stats = stats_of(actions)
    tensor = torch.from_numpy(actions)
    normalized = FRANKA.normalize(tensor, stats)
    assert normalized.dtype == torch.float32
    assert np.allclose(normalized.numpy(), FRANKA.normalize(actions, stats), atol=1e-6)
    assert torch.allclose(FRANKA.unnormalize(normalized, stats), tensor, atol=1e-5)
    assert FRANKA.is_open(tensor).dtype == torch.bool and FRANKA.to_si(tensor, "dx").shape == (200, 1)


def test_float32_stays_float32():
    actions = some_actions()
    assert FRANKA.normalize(actions, stats_of(actions)).dtype == np.float32


def test_passthrough_leaves_a_dimension_alone():
    x = some_actions()
    assert (stats_of(x, passthrough=(6,)).normalize(x)[:, 6] == x[:, 6]).all()


def test_another_kind_than_stored_is_refused():
    stats = stats_of(some_actions())
    stats.normalize(np.ones(7), kind="q01_q99")
    with pytest.raises(SpecMismatch, match=r"stored for 'q01_q99' but 'min_max' was asked for; .*recompute"):
        stats.unnormalize(np.ones(7), kind="min_max")
    with pytest.raises(SpecMismatch, match="unknown kind of normalisation 'q99'; expected one of q01_q99"):
        stats_of(np.ones((2, 1)), "q99")


def test_the_kinds_differ_where_data_has_tails():
    """Reading statistics as another kind has an effect."""
    x = np.random.default_rng(0).standard_t(2, (1000, 1))
    scales = [stats_of(x, kind).offset_and_scale()[1][0] for kind in NORMALIZATIONS]
    assert len({round(s, 3) for s in scales}) == 4


def test_stats_survive_json():
    stats = stats_of(some_actions(), "mean_std", passthrough=(6,))
    back = NormStats.from_dict(json.loads(json.dumps(stats.to_dict())))
    assert back.kind == "mean_std" and back.passthrough == (6,) and back.count == 200 and (back.q99 == stats.q99).all()
    with pytest.raises(SpecMismatch, match="statistics: expected fields"):
        NormStats.from_dict(stats.to_dict() | {"q95": []})


@settings(max_examples=25, deadline=None)
@given(x=values, cut=st.integers(0, 40))
def test_merged_statistics_are_those_of_the_whole(x, cut):
    """Quantiles of a union, not envelopes of its parts' quantiles."""
    parts = [StatsAccumulator().update(p) for p in (x[cut:], x[:cut])]
    stats = parts[0].merge(parts[1]).finish()
    for name, q in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        assert np.allclose(getattr(stats, name), np.quantile(x, q, axis=0), rtol=1e-12)
    assert np.allclose(stats.mean, x.mean(0)) and np.allclose(stats.std, x.std(0)) and stats.count == len(x)


def test_envelopes_would_be_wrong():
    near, far = np.linspace(0, 1, 990)[:, None], np.linspace(0, 100, 10)[:, None]
    merged = StatsAccumulator().update(near).merge(StatsAccumulator().update(far)).finish()
    assert merged.q99[0] < 60 < stats_of(far).q99[0]


def test_accumulator_refuses_nonsense():
    with pytest.raises(SpecMismatch, match="no rows came"):
        StatsAccumulator().finish()
    with pytest.raises(SpecMismatch, match="got nan in row 1, dimension 0"):
        StatsAccumulator().update(np.array([[0.0], [np.nan]]))
    with pytest.raises(SpecMismatch, match=r"expected an array \(n, 2\), got shape \(3, 4\)"):
        StatsAccumulator().update(np.ones((1, 2))).update(np.ones((3, 4)))


# --- tokens ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    arm=arrays(np.float64, (5, 6), elements=st.floats(-1, 1)),
    gripper=arrays(np.float64, (5, 1), elements=st.floats(0, 1)),
    bins=st.sampled_from([16, 255, 256]),
)
def test_tokens_lose_at_most_half_a_bin(arm, gripper, bins):
    tokenizer, x = ActionTokenizer(BINARY, bins), np.concatenate([arm, gripper], 1)
    ids = tokenizer.encode(x)
    assert ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < bins
    half = np.r_[[1 / bins] * 6, 0.5 / bins]
    assert (np.abs(tokenizer.decode(ids) - x) <= half + 1e-12).all()
    assert (tokenizer.encode(tokenizer.decode(ids)) == ids).all()


def test_every_id_comes_back():
    ids = np.repeat(np.arange(256)[:, None], 7, 1)
    assert (ActionTokenizer(BINARY).encode(ActionTokenizer(BINARY).decode(ids)) == ids).all()


def test_outside_falls_into_the_end_bins():
    assert ActionTokenizer(BINARY).encode(np.array([-3.0, 3, 0, 0, 0, 0, 1])).tolist() == [0, 255, 128, 128, 128, 128, 255]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_round_trip_error_in_si_units(spec):
    actions = some_actions(500, spec)
    stats = stats_of(actions, "min_max")
    worst = ActionTokenizer(BINARY).round_trip_error(actions, spec, stats, np.max)
    half_bin = stats.offset_and_scale()[1] * np.asarray(spec.scale) / 256
    assert worst.shape == (7,) and (worst[:6] <= half_bin[:6] * 1.001).all() and (worst[:6] > half_bin[:6] * 0.8).all()
    assert worst[6] == 0
    assert (ActionTokenizer(BINARY).round_trip_error(actions, spec, stats) < worst + 1e-9).all()


# --- cards that say what they can't mean ------------------------------------------------------------------------------------

CARD = (CARDS / "tabletop_franka7.md").read_text()
BAD_CARDS = {
    "scale of text": (
        "scale: [0.04,",
        "scale: [four,",
        r"mine\.md: .*expected 'scale' as a list of finite numbers, got \['four'",
    ),
    "one scale for all": (
        "scale: [0.04, 0.04, 0.04, 0.2, 0.2, 0.2]",
        "scale: 0.04",
        "'scale' as a list of finite numbers, got 0.04",
    ),
    "scale in quotes": ("scale: [0.04,", "scale: ['0.04',", "'scale' as a list of finite numbers"),
    "infinite scale": ("scale: [0.04,", "scale: [.inf,", "'scale' as a list of finite numbers, got .inf"),
    "low that is null": ("low: [-1,", "low: [null,", "'low' as a list of finite numbers, got .None"),
    "low of truth": ("low: [-1,", "low: [true,", "'low' as a list of finite numbers, got .True"),
    "low above high": ("low: [-1,", "low: [2,", "expected 'low' below 'high'.*'dx'"),
    "binary as text": ("is_binary: true", "is_binary: 'no'", "expected 'is_binary' as true or false, got 'no'"),
    "binary as a number": ("is_binary: true", "is_binary: 1", "expected 'is_binary' as true or false, got 1"),
    "binary left empty": ("is_binary: true", "is_binary:", "expected 'is_binary' as true or false, got None"),
    "a group that is text": (
        "    - kind: gripper\n      names: [gripper_opening]\n      units: [m]",
        "    - gripper",
        "state group 1: expected a group of fields",
    ),
    "an unknown field of a group": (
        "is_binary: true",
        "is_binary: true\n      opens: 1",
        r"action group 1: unknown fields \['opens'\]",
    ),
    "a group without names": (
        "names: [gripper]\n",
        "",
        r"action group 1: unknown fields \[\], missing fields \['names'\]|is not YAML",
    ),
    "rate as text": ("rate_hz: 10", "rate_hz: 10 Hz", "expected 'rate_hz' as a finite number, got '10 Hz'"),
    "rate that is NaN": ("rate_hz: 10", "rate_hz: .nan", "expected 'rate_hz' as a finite number, got nan"),
    "rate of 0": ("rate_hz: 10", "rate_hz: 0", "a positive rate_hz"),
    "gripper of truth": ("open: 1", "open: yes", "expected 'open' as a finite number, got True"),
    "a name that YAML takes for truth": (
        "cameras: [static,",
        "cameras: [on,",
        "expected 'cameras' as a list of texts .in quotes.*True",
    ),
    "a unit that is a number": ('units: ["1"]', "units: [1]", "expected 'units' as a list of texts"),
    "one camera as text": ("cameras: [static, wrist]", "cameras: static", "expected 'cameras' as a list of texts"),
    "a camera twice": ("cameras: [static, wrist]", "cameras: [wrist, wrist]", "'cameras' without repetition"),
    "a camera that is a path": (
        "cameras: [static, wrist]",
        "cameras: [/tmp/x, wrist]",
        r"'cameras' named by letters.*got \['/tmp/x'\]",
    ),
    "a camera that climbs": (
        "cameras: [static, wrist]",
        "cameras: [a..b, wrist]",
        r"'cameras' named by letters.*got \['a\.\.b'\]",
    ),
    "a state twice": ("names: [x, y,", "names: [x, x,", "state group 0: expected 'names' without repetition"),
    "a field twice": ("is_binary: true", "is_binary: true\n      is_binary: false", "is_binary written twice"),
    "a robot that is a number": ("robot: franka7", "robot: 7", "expected 'robot' as text"),
    "a frame that is a list": ("frame: world", "frame: [world]", "expected 'frame' as text"),
    "absent as text": ("rotation: axis_angle", "rotation: axis_angle\n      absent: dx", "expected 'absent' as a list of texts"),
}


@pytest.mark.parametrize("name", BAD_CARDS)
def test_a_card_with_a_wrong_field_names_it(name, tmp_path):
    before, after, message = BAD_CARDS[name]
    assert before in CARD
    (tmp_path / "mine.md").write_text(CARD.replace(before, after, 1))
    with pytest.raises(CardError, match=message):
        ActionSpec.from_card(tmp_path / "mine.md")


def test_a_card_is_read_as_it_was_meant(tmp_path):
    text = CARD.replace("scale: [0.04, 0.04, 0.04,", "scale: [4e-2, 4E-2, 4.0e-2,").replace("low: [-1,", "low: [-1e0,")
    for how in (text, "\ufeff" + text, text.replace("\n", "\r\n")):
        (tmp_path / "mine.md").write_text(how, encoding="utf-8", newline="")
        assert ActionSpec.from_card(tmp_path / "mine.md") == FRANKA
    (tmp_path / "mine.md").write_bytes(CARD.encode("utf-16"))
    with pytest.raises(CardError, match=r"mine\.md: expected text in UTF-8"):
        ActionSpec.from_card(tmp_path / "mine.md")


def test_a_directly_constructed_spec_is_validated_too():
    with pytest.raises(CardError, match="expected 'scale' as a list of finite numbers"):
        FRANKA.replace_group("action", 0, scale=(np.nan,) * 6)


# --- dimensions that hardly ever move ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q01_q99", "mean_std"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_noise_and_a_rare_move_stay_small_numbers(spec, kind):
    """Divided by the std of noise a real move would reach thousands, and the loss with it."""
    x = spec.set_grippers(np.random.default_rng(1).normal(0, 1e-3, (400, 7)) * spec.scale_floor, True)
    move = np.where(spec.present[:6], 30 * spec.scale_floor[:6], 0)
    x[::200, :6] = move
    plain, floored = stats_of(x, kind), stats_of(x, kind, floor=spec.scale_floor)
    there = spec.present[:6]
    if kind == "q01_q99":
        assert np.abs(plain.normalize(x)).max(0)[:6][there].min() > 1e4
    assert np.abs(floored.normalize(x)).max() <= 31 and np.allclose(floored.unnormalize(floored.normalize(x)), x)


def test_the_floor_does_not_change_usual_motion():
    x = some_actions(500)
    assert (stats_of(x, floor=FRANKA.scale_floor).normalize(x) == stats_of(x).normalize(x)).all()


def test_without_any_spread_it_is_only_shifted():
    x = np.zeros((400, 7))
    x[::200, 4] = 0.4
    assert np.abs(stats_of(x, floor=FRANKA.scale_floor).normalize(x)).max() == pytest.approx(0.4)


def test_statistics_from_before_there_was_a_floor_load_and_normalise_as_they_did():
    x = np.random.default_rng(0).normal(0, 1e-5, (400, 7))
    old, new = stats_of(x), stats_of(x, floor=FRANKA.scale_floor)
    assert "floor" not in old.to_dict() and NormStats.from_dict(old.to_dict()).to_dict() == old.to_dict()
    back = NormStats.from_dict(json.loads(json.dumps(new.to_dict())))
    assert back.to_dict() == new.to_dict() and (back.normalize(x) == new.normalize(x)).all()
    assert (NormStats.from_dict(old.to_dict()).normalize(x) == old.normalize(x)).all() and np.abs(old.normalize(x)).max() > 1


def test_names_of_a_quaternion_in_another_order_than_its_layout_are_refused():
    def card(names, layout):
        pose = Group("pose", ("x", "y", "z", *names), ("m",) * 3 + ("1",) * 4, frame="base", rotation=layout)
        speed = Group("base_velocity", ("v",), ("m/s",), low=(-1.0,), high=(1.0,))
        return ActionSpec("arm", "arm", 10.0, ("top",), (speed,), (pose,))

    wrong = (("qx qy qz qw", "quat_wxyz"), ("qw qx qy qz", "quat_xyzw"), ("rw rz ry rx", "quat_wxyz"))
    forms = ("q{}.pos", "{}_quat", "q{}_target", "Q{}")
    wrong += tuple((" ".join(form.format(axis) for axis in "xyzw"), "quat_wxyz") for form in forms)
    for names, layout in wrong:
        with pytest.raises(CardError, match=rf"state group 0 \(pose\).*order of its rotation, {layout}, got \['{names[:2]}.*"):
            card(names.split(), layout)
    for names, layout in (("qx qy qz qw", "quat_xyzw"), ("rw rx ry rz", "quat_wxyz"), ("a b c d", "quat_wxyz")):
        card(names.split(), layout)
