"""Real-time chunking: the mask and the weight are the paper's, and the new chunk goes on like the old one."""

import math

import numpy as np
import pytest
import torch
from toy_policies import SETTINGS, SPEC, build, observe

from rvlm.policy.continuation_checks import check_previous
from rvlm.policy.delayed_policy import DelayedPolicy
from rvlm.policy.flow_matching import draw_noise
from rvlm.policy.heads import FlowHead
from rvlm.policy.policy import Policy
from rvlm.policy.real_time_chunking import continue_chunk, guidance_weight, soft_mask

IS_BINARY = (False, False, True)
ARM = [0, 1]


def test_the_mask_is_the_papers():
    """Equation 5, with a horizon of 10, a delay of 3 and 4 executed actions: 6 actions overlap."""
    c = [(6 - i) / (6 - 3 + 1) for i in range(3, 6)]
    expected = [1.0] * 3 + [x * (math.exp(x) - 1) / (math.e - 1) for x in c] + [0.0] * 4
    torch.testing.assert_close(soft_mask(10, 3, 6), torch.tensor(expected))


@pytest.mark.parametrize(("n_frozen", "n_overlap"), [(0, 0), (0, 8), (8, 8), (9, 3), (3, 3)])
def test_the_mask_freezes_no_more_than_overlaps_and_falls(n_frozen, n_overlap):
    mask = soft_mask(8, n_frozen, n_overlap)
    assert (mask[: min(n_frozen, n_overlap)] == 1).all() and (mask[n_overlap:] == 0).all()
    assert (mask.diff() <= 0).all() and (mask[:n_overlap] > 0).all()


def test_the_weight_is_the_papers_and_clipped():
    def unclipped(t):
        r2 = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        return (1 - t) / (t * r2)

    assert guidance_weight(0.0) == 5 and guidance_weight(0.1) == 5 and guidance_weight(0.99) == 5
    assert guidance_weight(0.4) == pytest.approx(unclipped(0.4)) and guidance_weight(0.8) == pytest.approx(unclipped(0.8))


def test_a_step_is_the_euler_step_with_the_vector_jacobian_product():
    """Against the formula, with the Jacobian written out."""
    torch.manual_seed(0)
    head, features, previous = FlowHead(4, 5, IS_BINARY, hidden=8, n_euler_steps=2), torch.randn(1, 4), torch.randn(1, 3, 3)
    target = torch.cat([previous[0][:, ARM], torch.zeros(2, 2)])
    noise = torch.randn(1, 5, 2)
    chunk = noise[0]
    for time in (0.0, 0.5):

        def clean(x, time=time):
            return head.predict_clean_action(features, x[None], torch.full((1, 1), time))[0]

        jacobian = torch.autograd.functional.jacobian(clean, chunk).reshape(10, 10)
        error = soft_mask(5, 2, 3)[:, None] * (target - clean(chunk))
        pull = (error.reshape(10) @ jacobian).reshape(5, 2)
        chunk = chunk + 0.5 * ((clean(chunk) - chunk) / (1 - time) + guidance_weight(time) * pull)
    torch.testing.assert_close(continue_chunk(head, features, previous, 2, noise)[0][:, ARM], chunk.detach())


def test_without_weight_it_is_the_heads_prediction():
    torch.manual_seed(0)
    head, features, noise = FlowHead(4, 5, IS_BINARY, hidden=8), torch.randn(2, 4), torch.randn(2, 5, 2)
    unguided = continue_chunk(head, features, torch.randn(2, 4, 3), 0, noise, maximum=0.0)
    torch.testing.assert_close(unguided, head.predict(features, noise))


def trained_on_two_modes():
    """A head that has seen the arm go left and go right, from the same feature."""
    torch.manual_seed(0)
    head = FlowHead(4, 8, IS_BINARY, hidden=64)
    features, mask = torch.zeros(128, 4), torch.ones(128, 8, 3, dtype=torch.bool)
    action = torch.where(torch.arange(128) % 2 == 0, -1.0, 1.0)[:, None, None].expand(128, 8, 3).clone()
    action[..., 2] = 0
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(features, action, mask)["loss"].backward()
        optimizer.step()
    return head


@pytest.fixture(scope="module")
def two_modes():
    return trained_on_two_modes()


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_it_stays_in_the_mode_of_the_previous_chunk(two_modes, side):
    """Unguided, about half of the noise leads to the other mode, whatever was executed before."""
    features, noise = torch.zeros(64, 4), draw_noise((8, 2), range(64))
    guided = continue_chunk(two_modes, features, torch.full((64, 5, 3), side), 3, noise)[..., ARM]
    is_other = (two_modes.predict(features, noise)[..., ARM].mean((1, 2)) - side).abs() > 1
    assert (guided * side > 0).all() and (guided - side).abs().mean() < 0.2 and 0.25 < is_other.float().mean() < 0.75


def test_binary_dimensions_are_the_previous_chunks_where_frozen(two_modes):
    previous = torch.ones(2, 4, 3)
    for n_frozen, n_kept in ((2, 2), (6, 4)):
        opened = continue_chunk(two_modes, torch.zeros(2, 4), previous, n_frozen, torch.randn(2, 8, 2))[..., 2]
        assert (opened[:, :n_kept] == 1).all() and (opened[:, n_kept:] < 0.5).all()


@pytest.mark.parametrize("structure", ["one_step-flow", "interleaved-flow", "policy_head-lstm-flow", "one_step-expert"])
def test_policies_of_every_structure_continue_a_chunk(toy_vlm, toy_stats, structure):

    policy, rng = Policy(*build(toy_vlm, toy_stats, SETTINGS[structure])), np.random.default_rng(0)
    observations = [observe(rng), observe(rng)]
    policy.reset(2)
    first = policy.predict_action_chunk(observations)
    policy.reset(2)
    previous = np.clip(rng.normal(size=(2, 2, 7)), SPEC.low, SPEC.high).astype(np.float32)
    previous = SPEC.set_grippers(previous, True)
    continued = policy.predict_action_chunk(observations, previous, 1)
    assert continued.shape == first.shape and not np.allclose(continued, first, atol=1e-4)
    assert SPEC.is_open(continued)[:, 0].all()


@pytest.mark.parametrize("structure", ["one_step-mlp", "one_step-tokens", "one_step-tokens-parallel"])
def test_heads_that_are_no_flow_continue_no_chunk(toy_vlm, toy_stats, structure):
    policy = Policy(*build(toy_vlm, toy_stats, SETTINGS[structure]))
    head = SETTINGS[structure]["head"]
    with pytest.raises(ValueError, match=f"guides a flow: expected a head such as 'flow', got '{head}'"):
        policy.predict_action_chunk([observe(np.random.default_rng(0))], np.zeros((1, 2, 7), np.float32), 1)


def test_what_is_no_chunk_is_not_continued(toy_vlm, toy_stats):
    """Before the observation enters the history."""
    policy, observation = Policy(*build(toy_vlm, toy_stats, SETTINGS["policy_head-lstm-flow"])), observe(np.random.default_rng(0))
    for shape in ((1, 4, 7), (1, 0, 7), (2, 2, 7), (1, 2, 6)):
        with pytest.raises(ValueError, match=r"raw actions \(1, 1 to 3, 7\), got float32 of shape") as refused:
            policy.predict_action_chunk([observation], np.zeros(shape, np.float32), 1)
        assert str(shape) in str(refused.value)
    with pytest.raises(ValueError, match="it holds NaN or infinity; without one leave `previous` out"):
        policy.predict_action_chunk([observation], np.full((1, 2, 7), np.nan), 1)
    for wrong in (-1, True):
        with pytest.raises(ValueError, match=f"n_frozen as a number of control steps from 0 on, got {wrong}"):
            policy.predict_action_chunk([observation], np.zeros((1, 2, 7)), wrong)
    assert not policy.history._features
    with pytest.raises(ValueError, match=r"got float64 of shape \(2, 7\)"):
        check_previous(np.zeros((2, 7)), 1, 2, 3, 7)


@pytest.mark.parametrize("structure", ["one_step-flow", "one_step-expert", "one_step-mlp"])
def test_each_chunk_of_each_episode_begins_with_noise_of_its_own(toy_vlm, toy_stats, structure):
    policy, observation = Policy(*build(toy_vlm, toy_stats, SETTINGS[structure])), observe(np.random.default_rng(0))

    def chunks(seeds, kept=(0, 1)):
        """(2 chunks, robots, k, a) of robots that see the same."""
        delayed = DelayedPolicy(policy)  # hands seeds and rows on
        delayed.reset(2)
        delayed.seed_episodes(seeds)
        first = policy.predict_action_chunk([observation] * 2)[list(kept)]
        delayed.keep(kept)
        return np.stack([first, policy.predict_action_chunk([observation] * len(kept))])

    once = chunks([7, 8])
    assert np.array_equal(once, chunks([7, 8])), "it can be repeated"
    assert np.allclose(once[:, ::-1], chunks([8, 7]), atol=1e-5), "whichever robot it is"
    assert np.allclose(once[:, 1:], chunks([7, 8], kept=[1]), atol=1e-5), "whatever became of the others"
    pairs = [(once[0, 0], once[1, 0]), (once[0, 0], once[0, 1]), (once[0, 0], chunks([9, 8])[0, 0])]
    assert [np.allclose(*pair, atol=1e-5) for pair in pairs] == [structure.endswith("mlp")] * 3
    with pytest.raises(ValueError, match="a seed from 0 on of each of 2 robots, got"):
        chunks([1, 2, 3])
