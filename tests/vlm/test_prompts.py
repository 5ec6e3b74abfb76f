"""Chat templates and processors of any kind: the prompt is transformers' own, the same in training and acting."""

import datetime
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from toy_policies import SPEC
from transformers import AutoConfig
from transformers.utils import chat_template_utils

from rvlm.policy.collation import RobotCollator
from rvlm.policy.factory import load_vla, make_policy
from rvlm.policy.policy import Policy
from rvlm.vlm import prompts
from rvlm.vlm.backbones import load_backbone
from rvlm.vlm.causality import ensure_causal_attention
from rvlm.vlm.processors import ACT, load_processor
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.tiny import FAMILIES, SIDE
from rvlm.vlm.tiny import TOKENIZER_TEXTS as TEXTS

TURNS = (
    "{% for m in messages %}<u>{% for c in m['content'] %}{% if c['type'] == 'image' %}@image@{% else %}@text@{% endif %}"
    "{% endfor %}</u>{% endfor %}"
)
QWEN = "<|vision_start|><|image_pad|><|vision_end|>"


def template(image, text="{{ c['text'] }}", before="", after="{% if add_generation_prompt %}{{ 'answer: ' }}{% endif %}"):
    return before + TURNS.replace("@image@", image).replace("@text@", text) + after


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a tiny model of a family, made once a module."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("families") / family
            made[family].mkdir()
            torch.manual_seed(0)
            FAMILIES[family](made[family])
        return made[family]

    return folder


@pytest.fixture
def with_template(folders, tmp_path):
    """A copy of a family's folder, without weights unless asked for, whose one chat template is the given one."""

    def copy(family, text, weights=False):
        ignored = None if weights else shutil.ignore_patterns("*.safetensors")
        folder = Path(shutil.copytree(folders(family), tmp_path / family, ignore=ignored))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)
        return folder

    return copy


def library_ids(processor, instruction, n=2, **options):
    """Token ids of transformers' own prompt, followed by `<act>`."""
    image_parts = [{"type": "image", "image": Image.new("RGB", (SIDE, SIDE))} for _ in range(n)]
    turn = [{"role": "user", "content": [*image_parts, {"type": "text", "text": instruction}]}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ids = processor.apply_chat_template(turn, **how, **options)["input_ids"][0].tolist()
    return [*ids, processor.tokenizer.convert_tokens_to_ids(ACT)]


TEMPLATES = {
    "an image token that contains TEXT": ("internvl", template("{{ '<IMG_CONTEXT>\n' }}")),
    "a system turn that says TEXT": ("qwen2_vl", template(QWEN, before="system: TEXT TEXT <x>")),
    "text that is trimmed": ("qwen2_vl", template(QWEN, "{{ c['text'] | trim }}")),
    "text in capitals": ("qwen2_vl", template(QWEN, "{{ c['text'] | upper }}")),
    "images first": ("llava_next", None),
    "no generation prompt": ("llava", template("<image>", after="")),
    "BOS, which the tokenizer adds too": ("gemma3", None),
    "a date": ("mllama", None),
    "a begin of thinking": ("qwen3_5", None),
    "numbered images": ("qwen2_5_vl", None),
    "a space that depends on images": ("smolvlm", None),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_prompt_is_what_the_library_makes_of_the_template(folders, with_template, kind):
    """Compared with the ids that transformers makes of images and text."""
    family, text = TEMPLATES[kind]
    processor = load_processor(folders(family) if text is None else with_template(family, text))
    for instruction in (TEXTS[0], "  lift TEXT, <u>it</u> ", ""):
        if family == "smolvlm":  # whose processor needs a video processor for that
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": instruction}]}],
                add_generation_prompt=True,
            )
            assert PromptBuilder(processor, 2).text(instruction) == prompt + ACT
        else:
            assert PromptBuilder(processor, 2).token_ids(instruction) == library_ids(processor, instruction)


def test_content_may_be_a_string(with_template):
    text = "{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}"
    assert PromptBuilder(load_processor(with_template("llava", text)), 2).text("lift") == f"[<image><image>lift]{ACT}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ raise_exception('no user turn') }}", "no user turn"),
        ("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}", "it writes"),
        (template("<image>", ""), "it writes"),
        (template("<image>{{ c['text'] + 1 }}"), "it writes|Error"),
        ("{% for", "TemplateSyntaxError"),
    ],
    ids=["raises", "drops images", "drops text", "breaks", "is no template"],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_reason(with_template, text, why):
    with pytest.raises(ValueError, match=rf"(?s)expected a chat template that writes 2 image.*({why}).*give the model another"):
        PromptBuilder(load_processor(with_template("llava", text)), 2)


def adding_bos(folder):
    """A folder's processor, with a tokenizer that adds BOS."""
    tokenizer = load_processor(folder).tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    return load_processor(folder)


@pytest.mark.parametrize("family", ["paligemma", "llava", "qwen2_vl", "internvl", "idefics3", "mllama", "gemma3"])
@pytest.mark.parametrize("writes", [True, False], ids=["template writes", "tokenizer writes"])
def test_a_prompt_has_one_bos_token(with_template, family, writes):
    words = {"qwen2_vl": QWEN, "internvl": "<IMG_CONTEXT>", "mllama": "<|image|>", "gemma3": "<start_of_image>"}
    text = template(words.get(family, "<image>"), before="{{ bos_token }}" if writes else "")
    processor = adding_bos(with_template(family, text))
    ids = PromptBuilder(processor, 2, 1, "left", True).token_ids("lift it", 3)
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_images_are_numbered_through_a_prompt_as_the_library_numbers_them(folders):
    processor = load_processor(folders("qwen2_5_vl"))
    text = PromptBuilder(processor, 2, 1, "left", True).text("lift it", 3)
    assert [text.count(f"Picture {i}:") for i in range(1, 8)] == [1] * 6 + [0]
    parts = text.split(ACT)
    assert [part.count("Picture") for part in parts] == [2, 2, 2, 0]
    six = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}] * 6}])
    assert parts[1] in six and parts[2] in six


def test_a_template_that_counts_images_is_refused_where_more_follow(with_template):
    counting = "{{ messages[0]['content'] | selectattr('type', 'equalto', 'image') | list | length }} images: "
    processor = load_processor(with_template("llava", template("<image>", before=counting)))
    assert PromptBuilder(processor, 2).text("lift").startswith("2 images: <u><image><image>lift")
    with pytest.raises(ValueError, match=r"(?s)expected a chat template that inserts one text for one more image.*'one_step'"):
        PromptBuilder(processor, 2, 1, "left", True)


class Tomorrow(datetime.datetime):
    """A later clock."""

    @classmethod
    def now(cls, tz=None):
        """Years later."""
        return datetime.datetime(2031, 7, 9)


def test_a_date_in_the_template_is_the_same_on_every_day(with_template, toy_stats, tmp_path, monkeypatch):
    dated = "{% set how = '%d %b %Y %A' %}{% if strftime_now is defined %}{{ strftime_now(how) }}{% endif %}"
    folder = with_template("llava", template("<image>", before=dated), weights=True)
    model, processor = make_policy(folder, SPEC, toy_stats)
    trained = model.prompt_builder(processor).token_ids("lift it")
    assert "01 Jan 2025 Wednesday" in model.prompt_builder(processor).text("lift it")
    model.save_pretrained(tmp_path / "policy", processor)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    again = load_vla(tmp_path / "policy")
    assert again[0].prompt_builder(again[1]).token_ids("lift it") == trained
    assert library_ids(again[1], "lift it") == trained, "any other program that reads the folder says the same day"


@pytest.mark.parametrize("where", ["processor", "tokenizer", "legacy file", "one of several", "several, none the default"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision"], ids=["whole", "assembled"])
def test_a_template_is_found_wherever_it_is_kept(with_template, where, family):
    folder, text = with_template(family, None), template("<image>", before="system: ")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    if where == "processor":
        (folder / "chat_template.jinja").write_text(text)
    elif where == "tokenizer":
        config["chat_template"] = text
    elif where == "legacy file":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    else:
        first = "default" if where == "one of several" else "rag"
        config["chat_template"] = [{"name": first, "template": text}, {"name": "tool_use", "template": "{{ 'no' }}"}]
    path.write_text(json.dumps(config))
    if where == "several, none the default":
        with pytest.raises(ValueError, match=r"expected one chat template.*'rag', 'tool_use'.*chat_template.jinja"):
            load_processor(folder)
        return
    processor = load_processor(folder)
    assert PromptBuilder(processor, 1).text("lift").startswith("system: <u><image>lift</u>")
    processor.save_pretrained(folder.parent / "again")
    shutil.copy(folder / "config.json", folder.parent / "again")
    assert load_processor(folder.parent / "again").chat_template == processor.chat_template


def test_without_a_template_images_come_before_the_instruction(with_template):
    assert PromptBuilder(load_processor(with_template("llava", None)), 2).text("lift") == f"<image><image>lift{ACT}"


@pytest.mark.parametrize("word", ["<|im_end|>", "<image>", ACT, "</s>"])
def test_an_instruction_with_a_special_token_is_refused(folders, word):
    with pytest.raises(ValueError, match=r"expected an instruction in words.*take it out"):
        PromptBuilder(load_processor(folders("llava_onevision")), 1).token_ids(f"lift {word} it")


def test_new_instructions_need_only_the_tokenizer_and_old_ones_leave_the_cache(folders, monkeypatch):
    processor = load_processor(folders("llava"))
    prompt_builder = PromptBuilder(processor, 2)
    prompt_builder.token_ids(TEXTS[0])
    part = type(processor.image_processor)
    monkeypatch.setattr(part, "__call__", lambda *_, **__: pytest.fail("images were processed again"))
    monkeypatch.setattr(prompts, "MAX_CACHED_PROMPTS", 2)
    ids = [prompt_builder.token_ids(f"lift {i} cubes") for i in range(9)]
    assert len(prompt_builder._known) == 2 and len({tuple(i) for i in ids}) == 9


def test_processors_get_pil_images(folders, monkeypatch):
    processor = load_processor(folders("llava"))
    part = type(processor.image_processor)
    inner = part.__call__

    def picky(self, images, *args, **options):
        flat = images if isinstance(images[0], Image.Image) else [image for row in images for image in row]
        assert all(isinstance(image, Image.Image) for image in flat), "a PIL image, not an array"
        return inner(self, images, *args, **options)

    monkeypatch.setattr(part, "__call__", picky)
    assert PromptBuilder(processor, 2)(np.zeros((1, 2, 30, 40, 3), np.uint8), ["lift"])["pixel_values"].shape == (
        2,
        3,
        SIDE,
        SIDE,
    )


def test_image_size_is_the_side_of_a_tile(folders):
    processor = load_processor(folders("idefics3"))
    part = processor.image_processor
    part.size, part.max_image_size, part.do_image_splitting = {"longest_edge": 4 * SIDE}, {"longest_edge": SIDE}, True
    prompt_builder = PromptBuilder(processor, 1)
    image = np.zeros((1, 1, SIDE, SIDE, 3), np.uint8)
    assert prompt_builder.image_size == SIDE and prompt_builder.shortcut(image) is None
    batch = prompt_builder(image, ["lift"])
    assert batch["pixel_values"].shape[1] == 17 and torch.equal(batch["input_ids"], prompt_builder.tokens(["lift"])["input_ids"])


@pytest.mark.parametrize("family", ["idefics2", "internvl", "llava_next", "qwen2_vl", "mllama", "smolvlm"])
def test_a_batch_of_two_image_sizes_equals_its_samples_alone(folders, toy_stats, family):
    model, processor = make_policy(folders(family), SPEC, toy_stats, chunk_size=2, image_tiling=True)
    collate, rng = RobotCollator(model.prompt_builder(processor)), np.random.default_rng(0)

    def sample(i, height, width):
        action = np.concatenate([rng.uniform(-1, 1, (1, 2, 6)), np.ones((1, 2, 1))], -1).astype(np.float32)
        return {
            "images": rng.integers(0, 256, (1, 2, height, width, 3), np.uint8), "state": np.zeros((1, 7), np.float32),
            "action": action, "action_mask": np.ones((1, 2, 7), bool), "obs_mask": np.ones(1, bool), "dataset_index": i,
            "instruction": TEXTS[i],
        }  # fmt: skip

    def predicted(samples):
        keys = ("action", "action_mask", "obs_mask", "dataset_index")
        return model.eval().predict(**{k: v for k, v in collate(samples).items() if k not in keys})

    samples = [sample(0, SIDE, SIDE), sample(1, 24, 40)]
    together = predicted(samples)
    for i in range(2):
        assert torch.allclose(together[i], predicted(samples[i : i + 1])[0], atol=1e-5)


def test_features_are_cached_only_for_images_that_leave_the_text_unchanged(folders):
    """With a frozen tower: InternVL cuts wide images into tiles when a text goes along."""
    separable, tiled = (PromptBuilder(load_processor(folders(family), is_tiled=True), 1) for family in ("smolvlm", "internvl"))
    assert PromptBuilder(load_processor(folders("internvl")), 1).is_separable(24, 40), "as one tile"
    wide = np.zeros((2, 1, 24, 40, 3), np.uint8)
    assert separable.is_separable(24, 40) and separable.pixels(wide).shape == (2, 1, 3, SIDE, SIDE)
    assert tiled.is_separable(SIDE, SIDE) and not tiled.is_separable(24, 40)
    with pytest.raises(
        ValueError, match=r"expected images that InternVLProcessor processes without the text, got 24 x 40.*resize"
    ):
        tiled.pixels(wide)


def test_causality_is_tried_without_dropout(folders):
    folder = folders("kosmos2")
    processor = load_processor(folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.dropout = 0.5
    model = type(load_backbone(folder, processor))(config).train()
    prompt_builder = PromptBuilder(processor, 1, n_queries=3, padding_side="left")
    assert ensure_causal_attention(model, prompt_builder, processor.tokenizer.convert_tokens_to_ids(ACT)) and model.training
    assert not load_backbone(folder, processor, is_pretrained=False).training


def test_a_repositorys_own_code_never_runs(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoProcessor": "own.Processor"}})
    )
    (tmp_path / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('')\n")
    with pytest.raises(ValueError, match=r"expected a model of a class in transformers.*code of its own.*never run here"):
        load_processor(tmp_path)
    assert not (tmp_path / "ran").exists()


def chunks(model, processor, images, states, structure):
    """What a policy predicts acting step by step, and from the windows of the same steps in one batch."""
    policy, t = Policy(model, processor), model.config.n_obs_steps
    policy.reset()
    spec = policy.robot.spec
    acted = []
    for views, state in zip(images, states, strict=True):
        observation = {"images": {"static": views[0], "wrist": views[-1]}, "state": state, "instruction": TEXTS[0]}
        acted.append(policy.predict_action_chunk([observation])[0])
    normalized = policy.robot.stats["observation.state"].normalize(states).astype(np.float32)
    samples = []
    for end in range(len(images)):
        steps = [max(0, i) for i in range(end - t + 1, end + 1)]
        samples.append({
            "images": images[steps], "state": normalized[steps], "action": np.zeros((t, 2, 7), np.float32), "dataset_index": 0,
            "action_mask": np.ones((t, 2, 7), bool), "obs_mask": np.arange(end - t + 1, end + 1) >= 0, "instruction": TEXTS[0],
        })  # fmt: skip
    batch = RobotCollator(policy.prompt_builder)(samples)
    trained = model.predict(**{k: v for k, v in batch.items() if k not in ("action", "action_mask", "dataset_index")})
    return np.stack(acted), spec.unnormalize(trained.numpy(), policy.robot.stats["action"])


@pytest.mark.parametrize(
    ("family", "structure", "is_tiled"),
    [(name, "interleaved", False) for name in FAMILIES if name not in ("kosmos2", "florence2", "qwen3_vl")]
    + [(name, "one_step", True) for name in ("internvl", "llava_next", "mllama", "idefics2")],
)
def test_acting_equals_training_on_square_and_wide_images(folders, toy_stats, family, structure, is_tiled):
    """Over families and their chat templates; three observations, a full window."""
    n = 3 if structure == "interleaved" else 1
    settings = {"structure": structure, "n_obs_steps": n, "chunk_size": 2, "image_tiling": is_tiled}
    model, processor = make_policy(folders(family), SPEC, toy_stats, **settings)
    rng = np.random.default_rng(0)
    for height, width in ((SIDE, SIDE), (24, 40)):
        images = rng.integers(0, 256, (3, 2, height, width, 3), np.uint8)
        acted, trained = chunks(model.eval(), processor, images, rng.normal(size=(3, 7)).astype(np.float32), structure)
        assert np.abs(acted - trained)[..., :6].max() < 1e-5


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("idefics", "kosmos2", "florence2")])
def test_all_outputs_of_a_processor_are_passed_on_with_its_own_ids(folders, family):
    processor = load_processor(folders(family))
    prompt_builder = PromptBuilder(processor, 2)
    images = np.random.default_rng(0).integers(0, 256, (2, 2, SIDE, SIDE, 3), np.uint8)
    ours = prompt_builder(images, TEXTS[:2])
    pil_images = [[Image.fromarray(image) for image in views] for views in images]
    how = {"padding": True, "padding_side": "right", "return_tensors": "pt", **prompt_builder._bos_options}
    theirs = processor(images=pil_images, text=[prompt_builder.text(text) for text in TEXTS[:2]], **how)
    assert set(ours) == set(theirs) - {"labels"}
    for key, value in ours.items():
        assert torch.allclose(value.double(), torch.as_tensor(theirs[key]).double(), atol=1e-5), key
    rows = prompt_builder.tokens(TEXTS[:2])
    assert torch.equal(rows["input_ids"], ours["input_ids"]) and torch.equal(rows["attention_mask"], ours["attention_mask"])
