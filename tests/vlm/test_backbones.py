"""Backbones: prompts as the family's own processor makes them, `<act>` in any tokenizer, strict weights."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from toy_data import TEXTS, TOY
from transformers import LlavaForConditionalGeneration

from rvlm.data.actions import ActionSpec
from rvlm.policy.collation import RobotCollator
from rvlm.policy.factory import make_policy
from rvlm.policy.policy import Policy
from rvlm.vlm.backbones import as_encoder_outputs, load_backbone
from rvlm.vlm.pixel_lookup import PixelLookup
from rvlm.vlm.processors import ACT, load_processor, to_pil
from rvlm.vlm.prompt_batches import pad
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.question_answering import encode_vqa
from rvlm.vlm.small import small_vlm, train_tokenizer

RNG = np.random.default_rng(0)


def images(b=2, n=2, side=48):
    return RNG.integers(0, 256, (b, n, side, side, 3), np.uint8)


@pytest.fixture(scope="module")
def processor(toy_vlm):
    return load_processor(toy_vlm)


def own(processor, image_batch, texts):
    """What the family's own processor makes of the prompt's text and images."""
    whole = [f"{processor.image_token * image_batch.shape[1]}{text}{ACT}" for text in texts]
    return processor(images=[list(p) for p in image_batch], text=whole, padding=True, padding_side="right", return_tensors="pt")


@pytest.mark.parametrize(
    ("call", "wrong"),
    [(to_pil, np.zeros((2, 8, 8, 4), np.uint8)), (as_encoder_outputs, torch.zeros(2, 3))],
    ids=["pixels", "features"],
)
def test_a_wrong_shape_in_a_signature_is_refused(call, wrong):
    with pytest.raises(TypeCheckError, match=r"n h w 3|n p d"):
        call(wrong)


@pytest.mark.parametrize("family", ["toy_vlm", "llava"])
@pytest.mark.parametrize("side", [48, 60])
def test_prompts_equal_the_processors_own(family, side, request):
    processor = load_processor(request.getfixturevalue(family))
    image_batch, texts = images(side=side), [TEXTS[0], "is the light on ?"]
    ours, theirs = PromptBuilder(processor, 2)(image_batch, texts), own(processor, image_batch, texts)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(ours[key], theirs[key])
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-5, rtol=0)


def test_fast_path_is_taken_and_skips_the_processor(processor, monkeypatch):
    prompt_builder, image_batch = PromptBuilder(processor, 2), images()
    prompt_builder(image_batch, TEXTS[:2])
    monkeypatch.setattr(type(processor), "__call__", lambda *_, **__: pytest.fail("the processor ran again"))
    monkeypatch.setattr(
        type(processor.image_processor), "__call__", lambda *_, **__: pytest.fail("the image processor ran again")
    )
    assert prompt_builder(image_batch, TEXTS[:2])["pixel_values"].shape == (2, 2, 3, 48, 48)


def test_a_processor_that_does_more_than_normalise_is_called(processor, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3])
    prompt_builder, image_batch = PromptBuilder(processor, 1), images(n=1)
    monkeypatch.setattr(PixelLookup, "__call__", lambda self, seen: torch.zeros(len(seen), len(self.position)))
    torch.testing.assert_close(prompt_builder.pixels(image_batch), own(processor, image_batch, TEXTS[:2])["pixel_values"])


def test_prompts_of_training_and_evaluation_are_equal(toy_vlm, toy_stats):
    spec = ActionSpec.from_card("tabletop_franka7")
    model, processor = make_policy(toy_vlm, spec, toy_stats)
    policy, collate = Policy(model, processor), RobotCollator(model.prompt_builder(processor))
    assert type(policy.prompt_builder) is type(collate.prompt_builder) is PromptBuilder
    sample = {
        "images": images(1, 2), "state": np.zeros((1, 7), np.float32), "action": np.zeros((1, 4, 7), np.float32),
        "action_mask": np.ones((1, 4, 7), bool), "obs_mask": np.ones(1, bool), "dataset_index": 0, "instruction": TEXTS[0],
    }  # fmt: skip
    trained, acted = collate([sample]), policy.prompt_builder(sample["images"], [TEXTS[0]])
    assert torch.equal(trained["input_ids"], acted["input_ids"])
    assert torch.equal(trained["pixel_values"], acted["pixel_values"])


def test_every_prompt_ends_in_one_act(processor):
    act = processor.tokenizer.convert_tokens_to_ids(ACT)
    ids = PromptBuilder(processor, 2).token_ids(TEXTS[1])
    assert ids.count(act) == 1 and ids[-1] == act
    assert ids.count(processor.image_token_id) == 2 * 4


@pytest.mark.parametrize("instruction", ["lift <act> it", "lift <image> it"])
def test_an_instruction_with_the_prompts_own_tokens_is_refused(processor, instruction):
    with pytest.raises(ValueError, match=r"expected an instruction in words, got .*take it out"):
        PromptBuilder(processor, 1).token_ids(instruction)


def test_act_joins_a_tokenizer_that_lacks_it_and_embeddings_grow(llava):
    before = LlavaForConditionalGeneration.from_pretrained(llava)
    processor = load_processor(llava)
    rows = before.get_input_embeddings().num_embeddings
    assert processor.tokenizer.convert_tokens_to_ids(ACT) == rows
    assert processor.tokenizer.tokenize(f"lift{ACT}")[-1] == ACT
    after = load_backbone(llava, processor)
    assert after.get_input_embeddings().num_embeddings == rows + 1
    assert torch.equal(after.get_input_embeddings().weight[:rows], before.get_input_embeddings().weight)


def test_embeddings_with_spare_rows_do_not_shrink(tmp_path):
    tokenizer = train_tokenizer(TEXTS, [])
    model, processor = small_vlm(tokenizer, **TOY)
    model.resize_token_embeddings(len(tokenizer) + 40)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, load_processor(tmp_path))
    assert loaded.get_input_embeddings().num_embeddings == len(tokenizer) + 40


def test_scratch_has_other_weights(toy_vlm, processor):
    pretrained, scratch = load_backbone(toy_vlm, processor), load_backbone(toy_vlm, processor, is_pretrained=False)
    weights, others = pretrained.state_dict(), scratch.state_dict()
    assert weights.keys() == others.keys()
    assert not torch.equal(pretrained.get_input_embeddings().weight, scratch.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", ["missing_keys", "mismatched_keys"])
def test_a_wrong_weight_of_a_backbone_is_named(toy_vlm, processor, tmp_path, kind):
    for file in toy_vlm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(k for k in weights if k.endswith("down_proj.weight"))
    weight = weights.pop(name)
    save_file(
        weights if kind == "missing_keys" else {**weights, name: weight[:-1].contiguous()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=f"{kind}.*down_proj"):
        load_backbone(tmp_path, processor)


def test_padding_is_on_the_right_and_masked():
    batch = pad([[5, 6, 7], [8]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_vqa_supervises_answers_only(processor):
    ids, labels = encode_vqa(PromptBuilder(processor, 2), [("is the light on ?", "yes"), ("open ?", "no")])
    supervised = processor.tokenizer.decode([label for label in labels if label >= 0])
    assert len(ids) == len(labels)
    assert supervised.replace(" ", "") == "yes</s>no</s>"
    assert processor.tokenizer.convert_tokens_to_ids(ACT) not in ids


def test_any_text_has_an_encoding():
    tokenizer = train_tokenizer(TEXTS, ["<loc00>"])
    text = "a zebra Ωmega, 7!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
    assert tokenizer.tokenize("<loc00>") == ["<loc00>"]
