"""Any image-text-to-text family is a backbone: the same loader, the same code, every structure."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_card import CARD, PretendedCard
from toy_policies import SPEC

from rvlm.policy.collation import RobotCollator
from rvlm.policy.factory import load_vla, make_policy
from rvlm.policy.inspection import can_append_to_cache
from rvlm.policy.observation_history import KVCachedSequence, UncachedSequence
from rvlm.policy.policy import Policy, load_policy
from rvlm.vlm import tiny_models
from rvlm.vlm.backbones import language_model, load_backbone, vision_modules
from rvlm.vlm.processors import ACT, load_processor
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.quantization import dtype_of
from rvlm.vlm.templates import image_token
from rvlm.vlm.tiny import FAMILIES, SIDE, UNSUPPORTED
from rvlm.vlm.tiny import TOKENIZER_TEXTS as TEXTS

ROOT = Path(__file__).resolve().parents[2]
STRUCTURES = {
    "one-step, mlp": {"structure": "one_step"},
    "one-step, tokens": {"structure": "one_step", "head": "tokens", "chunk_size": 1},
    "one-step, fast": {"structure": "one_step", "head": "fast", "chunk_size": 1, "head_options": {"scale": 4.0}},
    "interleaved": {"structure": "interleaved", "n_obs_steps": 2},
    "policy head": {"structure": "policy_head", "history": "lstm", "n_obs_steps": 2, "head": "flow", "vlm_layers": 2},
    "one-step, expert": {"structure": "one_step", "head": "expert", "head_options": {"hidden": 32, "n_layers": 2}},
    "one-step, lora": {"structure": "one_step", "finetuning": "lora"},
    "one-step, qlora": {"structure": "one_step", "finetuning": "qlora"},
}
ONE_IMAGE = ("kosmos2", "florence2")
SUCCESSORS = ("idefics3", "idefics2", "qwen2_vl", "qwen3_vl", "llava_next")  # share the code of a family that is tested in full
SUCCESSOR_STRUCTURES = ("one-step, expert", "one-step, tokens", "interleaved", "policy head")
IMPOSSIBLE = {
    ("kosmos2", "interleaved"): "one image a prompt",
    ("florence2", "interleaved"): "one image a prompt",
    ("florence2", "one-step, tokens"): "attends bidirectionally",
    ("florence2", "one-step, fast"): "attends bidirectionally",
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / request.param
    folder.mkdir()
    torch.manual_seed(0)
    FAMILIES[request.param](folder)
    return folder


def refuse_impossible(folder, toy_stats, name):
    """Structures that a family's processor or attention rules out are refused, with the possible ones."""
    reason = IMPOSSIBLE.get((folder.name, name))
    if reason:
        with pytest.raises(ValueError, match=rf"(?s)expected .*{reason}.*take .*'one_step'"):
            build(folder, toy_stats, STRUCTURES[name])
    return bool(reason)


def build(folder, stats, settings):
    torch.manual_seed(0)
    few = {"cameras": ("static",)} if folder.name in ONE_IMAGE else {}
    return make_policy(folder, SPEC, stats, **{"chunk_size": 2, **few, **settings})


def samples(config, seed=0):
    """Three windows of noise with instructions of different lengths."""
    rng, t, k = np.random.default_rng(seed), config.n_obs_steps, config.chunk_size
    for i, instruction in enumerate(TEXTS):
        arm, is_open = rng.uniform(-1, 1, (t, k, 6)), rng.integers(0, 2, (t, k, 1))
        yield {
            "images": rng.integers(0, 256, (t, len(config.cameras), SIDE, SIDE, 3), np.uint8),
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
        {"images": {"static": image(), "wrist": image()}, "state": rng.normal(size=7).astype(np.float32), "instruction": text}
        for text in TEXTS
    ]


@pytest.mark.parametrize("builder", UNSUPPORTED, ids=lambda builder: builder.__name__)
def test_a_family_without_hidden_states_at_act_is_refused_with_the_reason(builder, toy_stats, tmp_path):
    builder(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)expected .*{UNSUPPORTED[builder]}.*take a family that reads images"):
        build(tmp_path, toy_stats, {"cameras": ("static",)})


def families_in_docs(pattern):
    """Families that docs/any_backbone.md lists where this pattern matches, by their names here."""
    found = re.findall(pattern, (ROOT / "docs/any_backbone.md").read_text(), re.M | re.S)
    listed = re.split(r",\s+|\s+and\s+", ", ".join(found))
    by_name = {name.replace("_", ""): name for name in FAMILIES}
    return {by_name[re.sub(r"[^a-z0-9]", "", name.lower())] for name in listed}


def test_the_docs_list_every_family():
    """Its list is the tested families."""
    assert families_in_docs(r"^- [a-z ,]+: (.*?)(?=\n- |\n\n)") == set(FAMILIES)


def test_every_family_with_several_images_appends_to_its_kv_cache(folder):
    if folder.name not in ONE_IMAGE:
        processor = load_processor(folder)
        assert can_append_to_cache(load_backbone(folder, processor), processor)


def test_a_family_whose_prompt_changes_with_its_observations_recomputes(toy_stats, tmp_path):
    """LLaVA-OneVision tiles an image that is the only one of its prompt."""
    FAMILIES["llava_onevision"](tmp_path)
    settings = {"structure": "interleaved", "n_obs_steps": 3, "cameras": ("static",)}
    assert type(Policy(*build(tmp_path, toy_stats, settings)).history) is UncachedSequence


@pytest.fixture
def two_layers(folder, tmp_path, monkeypatch):
    """The family with two layers: in the second, what is cached depends on the tokens before."""
    monkeypatch.setitem(tiny_models.LAYER_CONFIG, "num_hidden_layers", 2)
    FAMILIES[folder.name](tmp_path)
    return tmp_path


@torch.inference_mode()
def test_appending_equals_recomputing(two_layers, folder, toy_stats):
    """As windows fill and slide, for robots whose instructions differ in length and of which some are dropped."""
    if folder.name in ONE_IMAGE:
        return
    settings = {"structure": "interleaved", "n_obs_steps": 4, "image_tiling": True}
    model, processor = build(two_layers, toy_stats, settings)
    for weight in language_model(model.backbone).parameters():
        weight.mul_(8 if weight.ndim == 2 else 1)  # for attention to differ between tokens
    for size in ((SIDE, SIDE), (SIDE, 2 * SIDE)):  # wide images are tiled by some
        lengths = appended_lengths(model.eval(), processor, size)
        one, more = lengths[:2]
        assert more < one and lengths[:4] == [one, more, more, more] and lengths[5] == more < lengths[4]


def appended_lengths(model, processor, size):
    """Tokens that a cached history passes through the model at each step, whose predictions are those of an uncached one."""
    prompt_builder, rng, robots, lengths = model.prompt_builder(processor), np.random.default_rng(0), [0, 1, 2], []
    histories = [kind(model, prompt_builder) for kind in (KVCachedSequence, UncachedSequence)]
    handle = model.backbone.get_input_embeddings().register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    for step in range(6):
        images = rng.integers(0, 256, (len(robots), 2, *size, 3), np.uint8)
        state = torch.as_tensor(rng.normal(size=(len(robots), 7)), dtype=torch.float32)
        for history in histories:
            history.add(images, state, [TEXTS[robot] + " and then stop" * robot for robot in robots])
        cached, uncached = (history.predict() for history in histories)
        assert torch.allclose(cached, uncached, atol=1e-5), (step, float((cached - uncached).abs().max()))
        rows = {1: [2, 0], 4: [1]}.get(step, range(len(robots)))
        robots = [robots[row] for row in rows]
        for history in histories:
            history.keep(rows)
    handle.remove()
    return lengths[::2]


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_family_trains_saves_loads_and_acts_in_every_structure(folder, toy_stats, tmp_path, name):
    if folder.name in SUCCESSORS and name not in SUCCESSOR_STRUCTURES:
        return
    if refuse_impossible(folder, toy_stats, name):
        return
    model, processor = build(folder, toy_stats, STRUCTURES[name])
    batch = RobotCollator(model.prompt_builder(processor))(list(samples(model.config)))
    trainable = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, 3e-3), []
    while len(losses) < 20 and (len(losses) < 12 or losses[-1] >= 0.7 * losses[0]):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path, processor)
    before, after = Policy(model, processor), load_policy(tmp_path)
    for policy in (before, after):
        policy.reset(3)
    for step in range(3):
        acted = [policy.select_action(observations(step)) for policy in (before, after)]
        assert np.array_equal(*acted) and acted[0].shape == (3, 7)


TARGETS = ("action", "action_mask", "obs_mask", "dataset_index")


def predicted(model, processor, chosen):
    batch = RobotCollator(model.prompt_builder(processor))(chosen)
    return model.eval().predict(**{k: v for k, v in batch.items() if k not in TARGETS})


def test_every_trainable_language_weight_gets_a_gradient(folder, toy_stats):
    """Vision towers may not: some families skip their last layers."""
    model, processor = build(folder, toy_stats, {})
    model.train()(**RobotCollator(model.prompt_builder(processor))(list(samples(model.config)))).loss.backward()
    vision = {p for part in vision_modules(model.backbone) for p in part.parameters()}
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None and p not in vision]


def test_only_the_language_model_has_adapters(folder, toy_stats):
    model, _ = build(folder, toy_stats, STRUCTURES["one-step, lora"])
    adapted = {name for name, p in model.backbone.named_parameters() if p.requires_grad and "lora_" in name}
    vision = {p for part in vision_modules(model.backbone) for p in part.parameters()}
    assert adapted and not [name for name, p in model.backbone.named_parameters() if p.requires_grad and p in vision]


@pytest.mark.parametrize("name", ["one-step, mlp", "one-step, expert", "one-step, tokens"])
def test_a_padded_sample_equals_the_sample_alone(folder, toy_stats, name):
    if refuse_impossible(folder, toy_stats, name):
        return
    model, processor = build(folder, toy_stats, STRUCTURES[name])
    three = list(samples(model.config))
    together, alone = (predicted(model, processor, chosen) for chosen in (three, three[2:]))
    assert torch.allclose(together[2:], alone, atol=1e-4)


def test_every_image_is_seen(folder, toy_stats):
    """For each camera."""
    model, processor = build(folder, toy_stats, {})
    three = list(samples(model.config))
    whole = predicted(model, processor, three)
    for camera in range(len(model.config.cameras)):
        dark = [{**s, "images": s["images"].copy()} for s in three]
        for sample in dark:
            sample["images"][:, camera] = 0
        assert (predicted(model, processor, dark) - whole).abs().max() > 1e-6


def test_every_family_computes_on_another_device_as_on_the_cpu(folder, toy_stats):
    model, processor = build(folder, toy_stats, {})
    three = list(samples(model.config))
    expected = predicted(model, processor, three)
    with PretendedCard():
        model.to(CARD)
        batch = RobotCollator(model.prompt_builder(processor))(three)
        loss = model(**{name: value.to(CARD) for name, value in batch.items()}).loss
        loss.backward()
        assert loss.device == CARD
        actions = model.predict(**{k: v.to(CARD) for k, v in batch.items() if k not in TARGETS})
        assert torch.allclose(actions.cpu(), expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_family_learns_and_acts_in_half_precision(folder, toy_stats, precision):
    """As a GPU does it: frozen weights in 16 bits, trained ones in 32, forward passes under autocast while training alone."""
    model, processor = build(folder, toy_stats, {"finetuning": "lora", "precision": precision})
    batch = RobotCollator(model.prompt_builder(processor))(list(samples(model.config)))
    dtypes = {p.requires_grad: p.dtype for p in model.backbone.parameters()}
    assert dtypes == {True: torch.float32, False: dtype_of(precision)}
    with torch.autocast("cpu", dtypes[False]):
        loss = model.train()(**batch).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.grad.isfinite().all() for p in trained if p.grad is not None)
    actions = predicted(model, processor, list(samples(model.config)))
    assert actions.dtype == torch.float32 and actions.isfinite().all()


def test_new_tokens_join_without_touching_the_others(folder, toy_stats, tmp_path):
    """In most families on the Hub the embedding table has to grow for `<act>`."""
    processor = load_processor(folder)
    before = load_backbone(folder, processor)
    processor.tokenizer.add_tokens([f"<new{i}>" for i in range(80)])
    grown, n = load_backbone(folder, processor), len(processor.tokenizer)
    ids = torch.arange(n)[None]
    rows, old = (m.get_input_embeddings()(ids[:, : n - 80])[0] for m in (grown, before))
    assert torch.equal(rows, old) and grown.get_input_embeddings()(ids).isfinite().all()
    grown.save_pretrained(tmp_path)
    again = load_backbone(tmp_path, processor)
    assert torch.equal(again.get_input_embeddings()(ids), grown.get_input_embeddings()(ids))


def test_the_future_does_not_change_the_past(folder, toy_stats):
    if refuse_impossible(folder, toy_stats, "interleaved"):
        return
    model, processor = build(folder, toy_stats, STRUCTURES["interleaved"])
    collate, two = RobotCollator(model.prompt_builder(processor)), list(samples(model.config))[:1]
    later = [{**two[0], "images": np.stack([two[0]["images"][0], 255 - two[0]["images"][1]])}]
    with torch.inference_mode():
        features = []
        for chosen in (two, later):
            batch = collate(chosen)
            inputs = {k: v for k, v in batch.items() if k not in ("action", "action_mask", "dataset_index")}
            features.append(model.eval().history_features(**inputs))
    assert torch.allclose(features[0][:, 0], features[1][:, 0], atol=1e-5)
    assert (features[0][:, 1] - features[1][:, 1]).abs().max() > 1e-6


def test_a_prompt_is_written_as_the_family_writes_it(folder):
    processor = load_processor(folder)
    n = 1 if folder.name in ONE_IMAGE else 2
    text = PromptBuilder(processor, n).text(TEXTS[0])
    prompt = image_token(processor) * n + TEXTS[0]
    if processor.chat_template:
        content = [{"type": "image"}] * n + [{"type": "text", "text": TEXTS[0]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt + ACT


def test_a_processor_without_a_video_processor_is_saved_and_loaded(folder, tmp_path):
    processor = load_processor(folder)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = load_processor(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    one, two = (PromptBuilder(p, 1)(image[None, None], ["lift it"]) for p in (processor, again))
    assert one.keys() == two.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


def test_loaded_weights_equal_the_saved_ones(folder, toy_stats, tmp_path):
    model, processor = build(folder, toy_stats, {})
    model.save_pretrained(tmp_path, processor)
    again, _ = load_vla(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
