"""Visual question answering on unseen scenes, against a majority and a blank-image baseline.

Answers are scored with teacher forcing: the most likely token at each position, given the question and the true answer up to
it. An answer is correct if all its tokens are, end token included. That favours long answers a little over free generation,
is the same for answers of one token, and needs one forward pass per batch.

Taught in: 01_load_a_vlm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from rvlm.statistics import Rate, wilson
from rvlm.vlm.prompt_batches import pad
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.question_answering import VQACollator, encode_vqa

LOCATION = re.compile(r"<loc(\d+)>")
GROUNDING = ("point", "point_wrist", "where", "where_wrist", "offset")  # kinds of questions with answers in location tokens
ONE_WORD = ("side", "color", "shape", "count", "held", "drawer", "light", "gripper")  # ... with answers in a word
QUESTION_PREFIX = {"color": "what color", "point_wrist": "wrist"}  # of kinds whose generators ask another kind in some scenes


class VQAItem(NamedTuple):
    """One question: index of its scene, its kind, and the true answer."""

    scene: int
    kind: str
    question: str
    answer: str


def sample_vqa_items(scenes: Any, questions: Mapping[str, Any], n_per_kind: int, seed: int = 0) -> list[VQAItem]:
    """`n_per_kind` questions of each kind about scenes drawn at random, without questions about things out of view.

    Args:
        scenes: `rvlm.data.scenes.Scenes`.
        questions: Kind -> what asks (record of a scene, numpy generator -> question and answer), first of a tuple, such as
            `rvlm.envs.tabletop.questions.QUESTION_KINDS`.
        n_per_kind: Questions of each kind.
        seed: Of all random choices.
    """
    rng, items = np.random.default_rng(seed), []
    for kind, (ask, *_) in questions.items():
        n_wanted = len(items) + n_per_kind
        while len(items) < n_wanted:
            scene = int(rng.integers(len(scenes)))
            item = VQAItem(scene, kind, *ask(scenes[scene][1], rng))
            is_in_view = kind not in GROUNDING or LOCATION.search(item.answer)
            if item.question.startswith(QUESTION_PREFIX.get(kind, "")) and is_in_view:
                items.append(item)
    return items


@torch.inference_mode()
def evaluate_vqa(
    model: Any, processor: Any, scenes: Any, items: Sequence[VQAItem], blank_images: bool = False, batch_size: int = 64
) -> pd.DataFrame:
    """Predict the answers to questions, with teacher forcing.

    Args:
        model: as `load_backbone` gives it.
        processor: as `load_processor` gives it.
        scenes: `Scenes`.
        items: from `sample_vqa_items`.
        blank_images: black images, for what language alone can answer.
        batch_size: questions per forward pass.

    Returns:
        One row per question: kind, question, answer, predicted, is_correct, and `bin_errors`, the distance [bins] of each
        location token from the true one (infinite for another token in its place; empty for answers in words).
    """
    collate, rows = VQACollator(processor), []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        images = np.stack([scenes[item.scene][0] for item in part])
        images = np.zeros_like(images) if blank_images else images
        samples = [(image, [(item.question, item.answer)]) for image, item in zip(images, part, strict=True)]
        batch = {k: v.to(model.device) for k, v in collate(samples).items()}
        labels = batch.pop("labels")[:, 1:].cpu()
        predicted = model(**batch, use_cache=False).logits[:, :-1].argmax(-1).cpu()
        rows += [_score_answer(processor.tokenizer, *answer) for answer in zip(part, predicted, labels, strict=True)]
    return pd.DataFrame(rows)


def _score_answer(tokenizer: Any, item: VQAItem, predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """A row of `evaluate_vqa` from token ids ``(l,)``; labels are -100 outside the answer."""
    predicted, labels = predicted[labels >= 0], labels[labels >= 0]
    bins = [map(_location_bin, tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in (predicted, labels)]
    errors = [abs(p - true) if p is not None else np.inf for p, true in zip(*bins, strict=True) if true is not None]
    text = tokenizer.decode(predicted).replace(tokenizer.eos_token or "", "").strip()
    question = {"kind": item.kind, "question": item.question, "answer": item.answer}
    return {**question, "predicted": text, "is_correct": bool((predicted == labels).all()), "bin_errors": errors}


def _location_bin(token: str) -> int | None:
    match = LOCATION.fullmatch(token)
    return int(match.group(1)) if match else None


def majority_baseline(answers: pd.DataFrame) -> pd.DataFrame:
    """The same rows, with each kind's most frequent answer (for locations the most frequent bin per coordinate) predicted."""
    return pd.concat([_majority_of_kind(group) for _, group in answers.groupby("kind", sort=False)])


def _majority_of_kind(group: pd.DataFrame) -> pd.DataFrame:
    true = np.array([[int(b) for b in LOCATION.findall(answer)] for answer in group["answer"]])
    if true.shape[1] and len(group["bin_errors"].iloc[0]):
        majority = np.array([np.bincount(axis).argmax() for axis in true.T])
        errors = np.abs(true - majority)
        predicted = "".join(f"<loc{b:02d}>" for b in majority)
        return group.assign(predicted=predicted, bin_errors=errors.tolist(), is_correct=(errors == 0).all(1))
    majority = group["answer"].mode().iloc[0]
    return group.assign(predicted=majority, is_correct=group["answer"] == majority)


def accuracy_by_kind(answers: pd.DataFrame) -> pd.DataFrame:
    """Per kind of question (`group`): number of questions `n`, and of correct answers (`successes`)."""
    table = answers.groupby("kind", sort=False)["is_correct"].agg(n="size", successes="sum").reset_index()
    return table.rename(columns={"kind": "group"})


def grounding_accuracy(answers: pd.DataFrame) -> pd.DataFrame:
    """Per kind of question with answers in location tokens, accuracies in [0, 1].

    Columns: kind, number of questions n, `coordinate` (single coordinates in the true bin), `location` (all coordinates of an
    answer), and `within_one` (all at most one bin off).
    """
    rows = []
    for kind, group in answers[answers["bin_errors"].map(len) > 0].groupby("kind", sort=False):
        errors = np.array(group["bin_errors"].tolist())  # (n, coordinates)
        exact, near = errors == 0, errors <= 1
        accuracies = {"coordinate": exact.mean(), "location": exact.all(1).mean(), "within_one": near.all(1).mean()}
        rows.append({"kind": kind, "n": len(group), **accuracies})
    return pd.DataFrame(rows)


def accuracy_summary(answers: pd.DataFrame) -> dict[str, Rate]:
    """Five accuracies with 95 % Wilson intervals.

    "answer": answers of all kinds. Parts of it: "coordinate", "location" and "within_one" as in `grounding_accuracy`, for
    locations in the static image; "one_word", answers in a word.
    """
    errors = np.array(answers.loc[answers["kind"] == "where", "bin_errors"].tolist())
    counts = {"answer": answers["is_correct"], "coordinate": errors == 0, "location": (errors == 0).all(1)}
    counts |= {"within_one": (errors <= 1).all(1), "one_word": answers.loc[answers["kind"].isin(ONE_WORD), "is_correct"]}
    return {name: wilson(int(np.sum(correct)), int(np.size(correct))) for name, correct in counts.items()}


@torch.inference_mode()
def generate_answers(
    model: Any, processor: Any, images: np.ndarray, questions: Sequence[str], max_new_tokens: int = 48
) -> list[str]:
    """Answers to questions about one scene's images ``(n, h, w, 3)`` uint8, by free greedy generation."""
    prompts, tokenizer, answers = PromptBuilder(processor, len(images)), processor.tokenizer, []
    pixels = prompts.pixels(images[None]).to(model.device)
    for question in questions:
        ids, _ = encode_vqa(prompts, [(question, "")])
        prompt = {k: v.to(model.device) for k, v in pad([ids[:-1]], tokenizer.pad_token_id).items()}
        out = model.generate(
            **prompt, pixel_values=pixels, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers.append(tokenizer.decode(out[0, len(ids) - 1 :]).replace(tokenizer.eos_token, "").strip())
    return answers


def decode_locations(texts: Sequence[str], n_bins: int) -> np.ndarray:
    """Answers in location tokens of `n_bins` an axis -> centres ``(n, 2)`` in [0, 1] (column, row); NaN for other answers."""
    found = [[int(b) for b in LOCATION.findall(text)] for text in texts]
    return np.array([[(b + 0.5) / n_bins for b in bins] if len(bins) == 2 else [np.nan] * 2 for bins in found])
