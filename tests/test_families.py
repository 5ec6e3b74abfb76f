"""Any image-text-to-text family is a backbone: the same loader, the same code, every structure."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_policies import SPEC

from rvlm.batches import RobotCollator
from rvlm.checkpoints import load_vla, make_vla
from rvlm.families import FAMILIES, REFUSED, SIDE, TEXTS
from rvlm.policy import Policy
from rvlm.processors import load_processor
from rvlm.prompts import markup

ROOT = Path(__file__).resolve().parents[1]
STRUCTURES = {
    "one-step, mlp": {"structure": "one_step"},
    "one-step, tokens": {"structure": "one_step", "head": "tokens", "chunk_size": 1},
    "interleaved": {"structure": "interleaved", "n_obs_steps": 2},
    "policy head": {"structure": "policy_head", "history": "lstm", "n_obs_steps": 2},
    "one-step, lora": {"structure": "one_step", "tuning": "lora"},
    "one-step, qlora": {"structure": "one_step", "tuning": "qlora"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    FAMILIES[request.param](folder)
    return folder


def made(folder, stats, settings):
    torch.manual_seed(0)
    return make_vla(folder, SPEC, stats, **{"chunk_size": 2, **settings})


def samples(config, seed=0):
    """Three windows of noise with instructions of different lengths."""
    rng, t, k = np.random.default_rng(seed), config.n_obs_steps, config.chunk_size
    for i, instruction in enumerate(TEXTS):
        arm, is_open = rng.uniform(-1, 1, (t, k, 6)), rng.integers(0, 2, (t, k, 1))
        yield {
            "images": rng.integers(0, 256, (t, 2, SIDE, SIDE, 3), np.uint8),
            "state": rng.normal(size=(t, 7)).astype(np.float32),
            "action": np.concatenate([arm, is_open], -1).astype(np.float32),
            "action_mask": np.ones((t, k, 7), bool),
            "obs_mask": np.ones(t, bool),
            "dataset_index": i,
            "instruction": instruction,
        }


def observations(seed):
    rng = np.random.default_rng(seed)
    image = lambda: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)  # noqa: E731
    return [
        {"image": image(), "wrist_image": image(), "state": rng.normal(size=7).astype(np.float32), "instruction": text}
        for text in TEXTS
    ]


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_a_family_without_a_place_for_act_is_refused_with_the_reason(build, toy_stats, tmp_path):
    build(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)expected .*{REFUSED[build]}.*take a family that reads images"):
        made(tmp_path, toy_stats, {})


def test_the_readme_names_every_family():
    """Its table is this matrix: a family that is not tested is not promised."""
    plain = lambda name: re.sub(r"[^a-z0-9]", "", name.lower())  # noqa: E731
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| SmolVLM"))
    assert [plain(name) for name in line.strip("| ").split("|")] == [plain(name) for name in FAMILIES]


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_family_trains_saves_loads_and_acts_in_every_structure(folder, toy_stats, tmp_path, name):
    model, processor = made(folder, toy_stats, STRUCTURES[name])
    batch = RobotCollator(model.prompter(processor))(list(samples(model.config)))
    learns = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learns, 3e-3), []
    for _ in range(12):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path, processor)
    before, after = Policy(model, processor), Policy.load(tmp_path)
    for policy in (before, after):
        policy.reset(3)
    for step in range(3):
        acted = [policy.select_action(observations(step)) for policy in (before, after)]
        assert np.array_equal(*acted) and acted[0].shape == (3, 7)


def test_a_padded_sample_equals_the_sample_alone_and_sees_its_images(folder, toy_stats):
    """Laws 15 and 18."""
    model, processor = made(folder, toy_stats, {})
    collate, model = RobotCollator(model.prompter(processor)), model.eval()
    three = list(samples(model.config))
    asked = ("action", "action_mask", "obs_mask", "dataset_index")

    def predicted(chosen):
        return model.predict(**{k: v for k, v in collate(chosen).items() if k not in asked})

    together, alone = predicted(three), predicted(three[2:])
    assert torch.allclose(together[2:], alone, atol=1e-4)
    blind = predicted([{**s, "images": np.zeros_like(s["images"])} for s in three])
    assert (blind - together).abs().max() > 1e-6


def test_the_future_does_not_change_the_past(folder, toy_stats):
    model, processor = made(folder, toy_stats, STRUCTURES["interleaved"])
    collate, two = RobotCollator(model.prompter(processor)), list(samples(model.config))[:1]
    later = [{**two[0], "images": np.stack([two[0]["images"][0], 255 - two[0]["images"][1]])}]
    with torch.inference_mode():
        read = []
        for chosen in (two, later):
            batch = collate(chosen)
            inputs = {k: v for k, v in batch.items() if k not in ("action", "action_mask", "dataset_index")}
            read.append(model.eval().fused(**inputs))
    assert torch.allclose(read[0][:, 0], read[1][:, 0], atol=1e-5)
    assert (read[0][:, 1] - read[1][:, 1]).abs().max() > 1e-6


def test_a_prompt_is_written_as_the_family_writes_it(folder):
    processor = load_processor(folder)
    before, image, after = markup(processor)
    assert processor.image_token in image
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": TEXTS[0]}]
        said = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert said == f"{before}{image * 2}{TEXTS[0]}{after}"


def test_a_processor_without_its_video_part_is_saved_and_loaded_whole(folder, tmp_path):
    processor = load_processor(folder)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = load_processor(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    _, mark, _ = markup(processor)
    one, two = (p(images=[[image]], text=[f"{mark}lift"], return_tensors="pt") for p in (processor, again))
    assert one.keys() == two.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


def test_what_is_loaded_is_what_was_saved(folder, toy_stats, tmp_path):
    model, processor = made(folder, toy_stats, {})
    model.save_pretrained(tmp_path, processor)
    again, _ = load_vla(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
