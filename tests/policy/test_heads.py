"""Action heads: the published losses, tokens that come back, flows that learn two modes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_policies import FAST, SPEC, TOKENS, a_batch, build, fused, inputs

from rvlm.data.windows import EpisodeDataset
from rvlm.policy.action_expert import ActionExpert
from rvlm.policy.action_losses import join_dims, split_dims
from rvlm.policy.embodiments import Embodiment
from rvlm.policy.factory import make_policy
from rvlm.policy.heads import HEADS, FlowHead, MLPHead
from rvlm.policy.token_decoding import generate_tokens
from rvlm.policy.token_heads import FASTHead, TokensHead

SEVEN = [False] * 6 + [True]  # six arm dimensions and a gripper
ROBOTS = {
    "arm and gripper": SEVEN,
    "no gripper": [False] * 2,
    "two arms, two grippers": [*SEVEN, *SEVEN],
    "gripper first": [True, False, False],
    "gripper alone": [True],
}


def test_an_unknown_option_of_the_head_is_an_error(toy_vlm, toy_stats):
    with pytest.raises(TypeError, match="depth"):
        make_policy(toy_vlm, SPEC, toy_stats, head_options={"depth": 3})


@pytest.mark.parametrize(
    ("head", "option", "wrong"),
    [
        *((head, "gripper_weight", wrong) for head in ("mlp", "flow", "expert") for wrong in (-1, float("nan"), float("inf"))),
        *(
            (head, f"n_{what}", n)
            for head in ("flow", "expert")
            for what in ("euler_steps", "noise_samples")
            for n in (0, -1, True)
        ),
        *(("fast", "scale", wrong) for wrong in (0, -1.0, float("nan"), float("inf"))),
    ],
)
def test_an_option_that_means_nothing_is_refused(head, option, wrong):
    with pytest.raises(ValueError, match=rf"expected {option} as a (whole|finite) number (from|above) [01]( on)?, got {wrong}"):
        HEADS[head](16, 2, SEVEN, **{option: wrong})


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("kind", [MLPHead, FlowHead])
def test_arm_and_gripper_are_split_on_the_last_axis(kind, shape):
    """For any leading shape."""
    torch.manual_seed(0)
    head, features = kind(8, 5, SEVEN), torch.randn(*shape, 8)
    predicted = head.predict(features)
    assert predicted.shape == (*shape, 5, 7)
    assert ((predicted[..., 6] > 0) & (predicted[..., 6] < 1)).all()
    action, mask = torch.zeros_like(predicted), torch.ones_like(predicted, dtype=torch.bool)

    def losses(action):
        torch.manual_seed(1)
        return head.loss(features, action, mask)

    before = losses(action)
    closed, moved = action.clone(), action.clone()
    closed[..., 6], moved[..., :6] = 1, 1
    assert losses(closed)["arm_loss"] == before["arm_loss"] and losses(closed)["gripper_loss"] != before["gripper_loss"]
    assert losses(moved)["arm_loss"] != before["arm_loss"] and losses(moved)["gripper_loss"] == before["gripper_loss"]


@pytest.mark.parametrize("is_binary", ROBOTS.values(), ids=ROBOTS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [(MLPHead, {"hidden": 32}), (FlowHead, {"hidden": 32}), (TokensHead, {"n_bins": 32}), (FASTHead, {})],
)
def test_every_head_fits_the_dimensions_of_any_robot(kind, options, is_binary):
    """Regressed where continuous, classified where binary, wherever they stand; masked ones do not count."""
    if kind is FlowHead and all(is_binary):
        with pytest.raises(ValueError, match="expected a continuous action dimension to denoise"):
            kind(8, 2, is_binary)
        return
    torch.manual_seed(0)
    head, binary = kind(64, 2, is_binary, **options), torch.tensor(is_binary)
    is_discrete = isinstance(head, TokensHead)
    features = torch.randn(1, *([head.n_queries] if is_discrete else []), 64)
    action = torch.where(binary, torch.tensor(1.0), torch.linspace(-0.9, 0.9, 2 * len(is_binary)).view(1, 2, -1))
    mask = torch.ones_like(action, dtype=torch.bool)
    mask[..., -1, 0] = False
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        losses = head.loss(features, torch.where(mask, action, 1e6), mask)
        losses["loss"].backward()
        optimizer.step()
    predicted = head.predict(features)
    assert predicted.shape == action.shape and torch.allclose(predicted[mask], action[mask], atol=0.15)
    assert (predicted[..., binary] <= 1).all() and torch.equal(join_dims(*split_dims(action, is_binary), is_binary), action)
    if not is_discrete:
        assert (losses["gripper_loss"] == 0) == (not any(is_binary)) and (losses["arm_loss"] == 0) == all(is_binary)


def test_flow_follows_the_straight_line_to_the_action():
    """With a denoiser that predicts one chunk, any number of Euler steps goes there in a straight line, in equal steps."""
    goal, path = torch.rand(2, 3, 6), []
    for n_euler_steps in (1, 4, 10):
        head, noise = FlowHead(8, 3, SEVEN, n_euler_steps=n_euler_steps), torch.randn(2, 3, 6)
        head.predict_clean_action = lambda features, chunk, time: path.append((time[0], chunk)) or goal
        torch.testing.assert_close(head.predict(torch.randn(2, 8), noise)[..., :6], goal)
        for time, chunk in path:
            torch.testing.assert_close(chunk, (1 - time) * noise + time * goal)
        path.clear()


def test_flow_learns_two_modes_where_regression_averages_them():
    """Half of the demonstrations go left and half go right: regression predicts the mean, flow matching one of the two."""
    torch.manual_seed(0)
    features, action, mask = torch.zeros(256, 8), torch.zeros(256, 1, 7), torch.ones(256, 1, 7, dtype=torch.bool)
    action[::2, 0, 0], action[1::2, 0, 0] = -1.0, 1.0
    for head, is_chosen in ((MLPHead(8, 1, SEVEN, hidden=64), False), (FlowHead(8, 1, SEVEN, hidden=64, n_euler_steps=10), True)):
        optimizer = torch.optim.Adam(head.parameters(), 3e-3)
        for _ in range(400):
            optimizer.zero_grad()
            head.loss(features, action, mask)["loss"].backward()
            optimizer.step()
        distance = head.predict(features[:1])[0, 0, 0].abs()
        assert (distance > 0.5) == is_chosen


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_tokens_of_any_leading_shape_come_back(shape):
    head = TokensHead(8, 3, SEVEN, n_bins=64)
    action = torch.rand(*shape, 3, 7) * 2 - 1
    action[..., 6] = (action[..., 6] > 0).float()
    ids = head.encode(action)
    assert ids.shape == (*shape, 21)
    back = head.decode(ids)
    assert (back - action)[..., :6].abs().max() <= 1 / 64 + 1e-6
    assert torch.equal(back[..., 6] > 0.5, action[..., 6] > 0.5)
    assert torch.equal(head.encode(back), ids)


@pytest.mark.parametrize("settings", [TOKENS, FAST], ids=["bins", "fast"])
def test_the_chunk_that_is_trained_is_the_chunk_that_is_decoded(toy_vlm, toy_stats, settings):
    """Decoding token by token in the cache equals one pass over all tokens, for prompts of different lengths."""
    model, processor = build(toy_vlm, toy_stats, settings)
    batch = inputs(a_batch(model, processor, b=3))
    state, chunk = batch["state"], model.predict(**batch)
    del batch["state"]
    with torch.inference_mode():
        tokens = generate_tokens(model, state[:, -1], is_present=torch.ones(7, dtype=torch.bool), **batch)
        assert torch.equal(model.head.decode(tokens), chunk)
        rest = torch.zeros(3, model.head.n_queries - tokens.shape[1], dtype=torch.int64)  # once all chunks are complete
        again = model.head.greedy_tokens(model.history_features(state, tokens=torch.cat([tokens, rest], 1), **batch))
    assert torch.equal(again[:, 0, : tokens.shape[1]], tokens)


@pytest.mark.parametrize("head", ["tokens", "fast"])
def test_statistics_beyond_the_tokens_are_refused(head, toy_vlm, toy_demos):
    data = EpisodeDataset(toy_demos)
    assert np.abs(data.column("action")).max() <= 1
    with pytest.raises(ValueError, match=rf"head '{head}': expected statistics that bring 98 % of each action into"):
        make_policy(toy_vlm, data.spec, data.stats("mean_std"), head=head)
    for kind in ("min_max", "identity"):
        model, _ = make_policy(toy_vlm, data.spec, data.stats(kind), head=head)
    others = [Embodiment(data.spec, data.stats()), Embodiment(replace(data.spec, dataset="other"), data.stats("mean_std"))]
    with pytest.raises(ValueError, match=rf"head '{head}': expected statistics that bring 98 % of each action into"):
        model.register_embodiments(others)


def test_action_tokens_are_causal(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, TOKENS)
    batch = a_batch(model, processor, b=1)
    before = fused(model, batch)
    batch["action"][0, 0, 1, 2] += 0.5  # token 9 of 21
    changed = (fused(model, batch) - before).abs().amax(-1).flatten() > 1e-6
    assert changed.tolist() == [False] * 10 + [True] * 11


@pytest.mark.parametrize("name", ["mse", "huber", "l1"])
def test_loss_is_the_published_formula(name):
    """With six arm dimensions and a gripper it is the source's; another order of dimensions does not change it."""
    torch.manual_seed(0)
    head, features = MLPHead(8, 2, SEVEN, arm_loss=name, gripper_weight=0.3), torch.randn(4, 8)
    action, mask = torch.rand(4, 2, 7).round(), torch.rand(4, 2, 7) > 0.3
    raw = head(features)
    error = (raw[..., :6] - action[..., :6]).abs()
    arm = {"mse": error**2, "l1": error, "huber": torch.where(error < 1, error**2 / 2, error - 0.5)}[name]
    p = raw[..., 6:].sigmoid()
    bce = -(action[..., 6:] * p.log() + (1 - action[..., 6:]) * (1 - p).log())
    published = arm[mask[..., :6]].mean() + 0.3 * bce[mask[..., 6:]].mean()
    torch.testing.assert_close(head.loss(features, action, mask)["loss"], published)

    order = [6, 2, 0, 1, 5, 3, 4]
    other = MLPHead(8, 2, [SEVEN[i] for i in order], arm_loss=name, gripper_weight=0.3)
    other.load_state_dict(head.state_dict())
    rows = torch.tensor([7 * step + i for step in range(2) for i in order])
    other.layers[-1].weight.data, other.layers[-1].bias.data = (w.data[rows] for w in head.layers[-1].parameters())
    torch.testing.assert_close(other.loss(features, action[..., order], mask[..., order])["loss"], published)


@pytest.mark.parametrize(("width", "n_heads", "expected"), [(128, 4, 96), (2048, 8, 1536), (50, 4, 36), (3, 4, 4)])
def test_an_action_expert_is_three_quarters_as_wide_as_the_backbone(width, n_heads, expected):
    head = ActionExpert(width, 2, [False] * 6 + [True], n_heads=n_heads)
    assert head.out[1].in_features == expected
    assert ActionExpert(width, 2, [False] * 6 + [True], hidden=8, n_heads=n_heads).out[1].in_features == 8


def test_noised_chunks_of_an_action_expert_do_not_see_each_other():
    torch.manual_seed(0)
    head, features = ActionExpert(16, 3, SEVEN, hidden=8, n_layers=2), torch.randn(2, 2, 5, 16)
    chunks, time = torch.randn(4, 2, 3, 6), torch.rand(4, 2, 1)
    together = head.predict_clean_action(features, chunks, time)
    alone = torch.stack([head.predict_clean_action(features, *one) for one in zip(chunks, time, strict=True)])
    torch.testing.assert_close(together, alone)


def test_layers_of_an_action_expert_read_those_of_the_backbone_in_their_order():
    head, features, read = ActionExpert(16, 3, SEVEN, hidden=8, n_layers=4), torch.randn(1, 2, 5, 16), []
    for project in head.context:
        project.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    head.predict_clean_action(features, torch.randn(1, 3, 6), torch.rand(1, 1))
    assert [torch.equal(layer, features[:, i]) for layer, i in zip(read, (0, 0, 1, 1), strict=True)] == [True] * 4


@pytest.mark.parametrize("hidden", [0, -4, 6])
def test_a_width_that_the_experts_heads_cannot_share_is_refused(hidden):
    with pytest.raises(ValueError, match=f"a width that its heads share evenly; .* hidden={hidden}, n_heads=4"):
        ActionExpert(16, 2, [False], hidden=hidden)
