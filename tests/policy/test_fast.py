"""FAST tokens: chunks come back within the rounding, in fewer tokens than bins; any tokens are a chunk."""

import numpy as np
import pytest
import torch
from scipy.fft import dct
from toy_policies import FAST, a_batch, build, inputs

from rvlm.data.errors import SpecMismatch
from rvlm.policy.action_tokenizer import ActionTokenizer
from rvlm.policy.factory import load_vla, modify_policy
from rvlm.policy.fast_tokenizer import FASTTokenizer, cosine_matrix
from rvlm.policy.heads import HEADS
from rvlm.policy.token_heads import FASTHead, hold_masked, learn_vocabulary

SEVEN = [False] * 6 + [True]
ROBOTS = {"arm and gripper": SEVEN, "no gripper": [False] * 2, "gripper first": [True, False], "gripper alone": [True]}


def chunks(n, k, is_binary, seed=0):
    """Smooth motions like those of an arm: sums of slow waves, and a gripper that switches at most once."""
    rng = np.random.default_rng(seed)
    step = np.arange(k) / max(k, 8)
    amplitude, phase, speed = (rng.uniform(low, high, (n, 1, len(is_binary))) for low, high in ((-1, 1), (0, 6), (0, 3)))
    waves = amplitude * np.sin(phase + speed * step[:, None])
    switched = (np.arange(k)[:, None] >= rng.integers(-k, 2 * k, (n, 1, len(is_binary)))) == (amplitude > 0)
    return np.where(is_binary, switched, waves)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_transform_is_the_orthonormal_cosine_transform(k):
    values = np.random.default_rng(0).normal(size=(k, 3))
    np.testing.assert_allclose(cosine_matrix(k) @ values, dct(values, axis=0, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(cosine_matrix(k).T @ cosine_matrix(k), np.eye(k), atol=1e-12)


@pytest.mark.parametrize("is_binary", ROBOTS.values(), ids=ROBOTS)
@pytest.mark.parametrize(("k", "scale"), [(1, 10.0), (4, 10.0), (10, 3.5)])
def test_a_chunk_comes_back_within_the_rounding(k, scale, is_binary):
    """With learned pairs and without: any values in [-1, 1], also of no training chunk; binary ones exactly, once thresholded."""
    plain = FASTTokenizer(k, is_binary, scale)
    noise = np.random.default_rng(1).uniform(-1, 1, (200, k, len(is_binary)))
    seen, unseen = chunks(200, k, is_binary), np.where(is_binary, noise > 0, noise)
    learned = plain.learn(seen, n_vocab=plain.n_vocab + 40)
    for tokenizer, actions in ((plain, seen), (plain, unseen), (learned, seen), (plain.learn(unseen, 200), unseen)):
        ids = tokenizer.encode(actions)
        back = tokenizer.decode(ids)
        assert ids.shape == (200, tokenizer.n_tokens) and tokenizer.is_whole(ids).all()
        rms = np.sqrt(((back - actions) ** 2).mean(1))
        assert (rms <= 0.5 / scale + 1e-9).all()
        assert k > 1 or np.array_equal(back[..., is_binary] > 0.5, actions[..., is_binary] > 0.5)
    assert np.array_equal(learned.decode(learned.encode(seen)), plain.decode(plain.encode(seen)))  # pairs lose nothing


def test_smooth_chunks_take_fewer_tokens_than_bins():
    """Of held-out chunks; with pairs far fewer than one for each dimension of each action."""
    for k, factor in ((4, 1.5), (16, 4)):
        tokenizer, test = FASTTokenizer(k, SEVEN), chunks(500, k, SEVEN, seed=1)
        tokenizer = tokenizer.learn(chunks(2000, k, SEVEN), 1024)
        n_bins = ActionTokenizer(SEVEN).encode(test)[0].size
        assert (tokenizer.encode(test) != tokenizer.padding).sum(-1).mean() < n_bins / factor


def test_learning_is_deterministic_and_its_vocabulary_is_bounded():
    tokenizer, seen = FASTTokenizer(4, SEVEN), chunks(300, 4, SEVEN)
    learned = tokenizer.learn(seen, 200)
    assert learned == tokenizer.learn(seen, 200) and tokenizer.n_vocab < learned.n_vocab <= 200
    assert learned.encode(seen).max() <= learned.padding and learned.max_tokens == learned.encode(seen).shape[-1]
    with pytest.raises(ValueError, match=r"expected n_vocab of at least 41, .* got 40 and 300 chunks; raise it"):
        tokenizer.learn(seen, 40)


def test_values_outside_are_clipped_and_values_that_are_not_finite_are_refused():
    tokenizer = FASTTokenizer(3, SEVEN)
    far = 5 * np.sign(chunks(4, 3, SEVEN) - 0.1)
    near = np.clip(far, [[-1] * 6 + [0]], 1)
    assert np.array_equal(tokenizer.encode(far), tokenizer.encode(near))
    far[0, 0, 0] = np.nan
    with pytest.raises(SpecMismatch, match="expected finite actions to tokenize"):
        tokenizer.encode(far)


def test_any_tokens_are_a_chunk():
    """Random ones, ids of no token, a truncated sequence: it keeps the low frequencies; the head warns of it."""
    tokenizer = FASTTokenizer(4, SEVEN).learn(chunks(300, 4, SEVEN), 200)
    rng = np.random.default_rng(0)
    noise = rng.integers(-3, tokenizer.n_vocab + 5, (300, tokenizer.n_tokens))
    back = tokenizer.decode(noise)
    assert np.isfinite(back).all() and np.abs(back).max() <= 1 and back[..., 6].min() >= 0 and not tokenizer.is_whole(noise).all()
    assert np.array_equal(tokenizer.decode(noise[:, :0]), np.broadcast_to([0.0] * 6 + [0.5], (300, 4, 7)))

    plain, one = FASTTokenizer(4, SEVEN), chunks(1, 4, SEVEN)
    ids = plain.encode(one)
    means = plain.decode(ids[:, :7])  # the first frequency of each dimension is its mean
    np.testing.assert_allclose(means, np.broadcast_to(one.mean(1, keepdims=True), means.shape), atol=0.05)
    assert np.array_equal(plain.decode(np.concatenate([ids, ids], 1)), plain.decode(ids))

    head = FASTHead(8, 4, SEVEN)
    assert torch.equal(head.decode(torch.from_numpy(ids)), torch.from_numpy(plain.decode(ids)).float())
    with pytest.warns(UserWarning, match="expected tokens of 28 coefficients for each chunk, got fewer or more for some"):
        head.decode(torch.from_numpy(ids[:, :9]))


def test_masked_actions_do_not_count():
    """Past the end of an episode, in an absent dimension, in padded observations."""
    torch.manual_seed(0)
    head, action = FASTHead(8, 4, SEVEN), torch.from_numpy(chunks(3, 4, SEVEN)).float()
    mask = torch.ones_like(action, dtype=torch.bool)
    mask[0, 2:], mask[..., 1], mask[2] = False, False, False
    features = torch.randn(3, head.n_queries, 8)
    loss = head.loss(features, action, mask)["loss"]
    assert head.loss(features, torch.where(mask, action, 7.0), mask)["loss"] == loss
    assert head.loss(features[:2], action[:2], mask[:2])["loss"] == loss
    held = hold_masked(action, mask)
    assert torch.equal(held[mask], action[mask]) and (held[..., 1] == 0).all() and (held[2] == 0).all()
    assert torch.equal(held[0, 2:, 0], action[0, 1, 0].expand(2))
    empty = head.loss(features, action, torch.zeros_like(mask))["loss"]
    assert empty == 0 and torch.isfinite(loss)


def test_a_learned_vocabulary_is_saved_and_acts(toy_vlm, toy_stats, tmp_path):
    """It is in the configuration; another chunk size or scale forgets it, another history of training keeps it."""
    model, processor = build(toy_vlm, toy_stats, FAST)
    n_before = model.head.n_queries
    seen = torch.from_numpy(chunks(200, 3, SEVEN)).float()
    learn_vocabulary(model, seen, torch.ones_like(seen, dtype=torch.bool))
    assert model.head.n_queries < n_before and model.config.action_vocabulary["merges"]
    expected = model.eval().predict(**inputs(a_batch(model, processor, b=3)))
    model.save_pretrained(tmp_path, processor)
    again, same = load_vla(tmp_path)
    assert again.head.fast == model.head.fast
    assert torch.equal(again.predict(**inputs(a_batch(again, same, b=3))), expected)
    for head in ("mlp", "tokens", "flow", "expert"):
        other = modify_policy(tmp_path, head=head)[0]  # the old head's options are not the new one's
        assert other.config.head_options is None and type(other.head) is HEADS[head]
    given = modify_policy(tmp_path, head="mlp", head_options={"hidden": 16})[0]
    assert given.config.head_options == {"hidden": 16}
    kept, changed = (modify_policy(tmp_path, **settings)[0] for settings in (FAST, {"chunk_size": 2}))
    assert kept.head.fast == model.head.fast and torch.equal(kept.head.out[1].weight, model.head.out[1].weight)
    assert changed.config.action_vocabulary is None and changed.head.fast.merges == ()
