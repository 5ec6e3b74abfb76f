"""What a vision-language model knows of scenes that it never saw, against guessing and against answering blindly.

An answer is judged token by token: the most likely token at each place, given the question and the true answer so far.
It counts as right only if every token is, its end included. That is a little kinder than free generation to long answers,
the same for one-token answers, and a whole batch takes one pass.

Taught in: 01_load_a_vlm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from rvlm.envs.tabletop.questions import N_LOCATIONS, QUESTION_KINDS
from rvlm.statistics import Rate, wilson
from rvlm.vlm.prompts import PromptBuilder, pad
from rvlm.vlm.question_answering import VQACollator, encode_vqa

LOCATION = re.compile(r"<loc(\d+)>")
GROUNDING = ("point", "point_wrist", "where", "where_wrist", "offset")  # kinds of questions that are answered in location tokens
QUESTION_PREFIX = {"color": "what color", "point_wrist": "wrist"}  # where these can't be asked, their makers ask something else
QUESTIONS = ("side", "color", "shape", "count", "held", "drawer", "light", "gripper")  # ... in a word


class VQAItem(NamedTuple):
    """One question of an exam: which scene it is about, its kind, and the true answer."""

    scene: int
    kind: str
    question: str
    answer: str


def sample_questions(scenes: Any, n_per_kind: int, seed: int = 0, kinds: Sequence[str] = tuple(QUESTION_KINDS)) -> list[VQAItem]:
    """`n_per_kind` questions of each kind, each about a scene drawn at random; all places that are asked for are in view."""
    rng, exam = np.random.default_rng(seed), []
    for kind in kinds:
        n_wanted = len(exam) + n_per_kind
        while len(exam) < n_wanted:
            scene = int(rng.integers(len(scenes)))
            asked = VQAItem(scene, kind, *QUESTION_KINDS[kind][0](scenes[scene][1], rng))
            if asked.question.startswith(QUESTION_PREFIX.get(kind, "")) and (
                kind not in GROUNDING or LOCATION.search(asked.answer)
            ):
                exam.append(asked)
    return exam


@torch.inference_mode()
def evaluate_vqa(
    model: Any, processor: Any, scenes: Any, exam: Sequence[VQAItem], is_blind: bool = False, batch_size: int = 64
) -> pd.DataFrame:
    """Let a model answer an exam.

    Args:
        model: as `load_backbone` gives it.
        processor: as `load_processor` gives it.
        scenes: `Scenes`.
        exam: from `sample_questions`.
        is_blind: black images: what language alone can answer.
        batch_size: questions in one pass.

    Returns:
        One row per question: kind, question, answer, said, is_right, and `bins_off`, the distance [bins] of each location
        token from the true one (infinite where another word stands in its place; empty for answers in words).
    """
    collate, rows = VQACollator(processor), []
    for start in range(0, len(exam), batch_size):
        asked = exam[start : start + batch_size]
        images = np.stack([scenes[a.scene][0] for a in asked])
        samples = [(np.zeros_like(i) if is_blind else i, [(a.question, a.answer)]) for i, a in zip(images, asked, strict=True)]
        batch = {k: v.to(model.device) for k, v in collate(samples).items()}
        labels = batch.pop("labels")[:, 1:].cpu()
        said = model(**batch, use_cache=False).logits[:, :-1].argmax(-1).cpu()
        rows += [_judge(processor.tokenizer, *pair) for pair in zip(asked, said, labels, strict=True)]
    return pd.DataFrame(rows)


def _judge(tokenizer: Any, asked: VQAItem, said: torch.Tensor, true: torch.Tensor) -> dict[str, Any]:
    """One answer against the truth, both as token ids ``(l,)``; truth is -100 outside the answer."""
    said, true = said[true >= 0], true[true >= 0]
    pairs = zip(*(map(_bin, tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in (said, true)), strict=True)
    off = [abs(s - t) if s is not None else np.inf for s, t in pairs if t is not None]
    text = tokenizer.decode(said).replace(tokenizer.eos_token or "", "").strip()
    wanted = {"kind": asked.kind, "question": asked.question, "answer": asked.answer}
    return {**wanted, "said": text, "is_right": bool((said == true).all()), "bins_off": off}


def _bin(token: str) -> int | None:
    match = LOCATION.fullmatch(token)
    return int(match.group(1)) if match else None


def majority_baseline(answers: pd.DataFrame) -> pd.DataFrame:
    """The same exam, had each kind's commonest answer (the commonest bin of each coordinate) always been given."""
    return pd.concat([_guess(group) for _, group in answers.groupby("kind", sort=False)])


def _guess(group: pd.DataFrame) -> pd.DataFrame:
    true = np.array([[int(b) for b in LOCATION.findall(answer)] for answer in group["answer"]])
    if true.shape[1] and len(group["bins_off"].iloc[0]):
        commonest = np.array([np.bincount(axis).argmax() for axis in true.T])
        off = np.abs(true - commonest)
        said = "".join(f"<loc{b:02d}>" for b in commonest)
        return group.assign(said=said, bins_off=off.tolist(), is_right=(off == 0).all(1))
    commonest = group["answer"].mode().iloc[0]
    return group.assign(said=commonest, is_right=group["answer"] == commonest)


def score(answers: pd.DataFrame) -> pd.DataFrame:
    """Per kind: questions n, and how many answers are right in every token."""
    table = answers.groupby("kind", sort=False)["is_right"].agg(n="size", successes="sum").reset_index()
    return table.rename(columns={"kind": "group"})


def score_grounding(answers: pd.DataFrame) -> pd.DataFrame:
    """Per kind that is answered in location tokens, shares in [0, 1].

    Columns: questions n, `coordinate` (single coordinates in the exact bin), `place` (all coordinates of an answer), and
    `within_one` (all at most one bin off).
    """
    rows = []
    for kind, group in answers[answers["bins_off"].map(len) > 0].groupby("kind", sort=False):
        off = np.array(group["bins_off"].tolist())  # (n, coordinates)
        shares = {"coordinate": (off == 0).mean(), "place": (off == 0).all(1).mean(), "within_one": (off <= 1).all(1).mean()}
        rows.append({"kind": kind, "n": len(group), **shares})
    return pd.DataFrame(rows)


def summary(answers: pd.DataFrame) -> dict[str, Rate]:
    """The exam in five rates with 95 % Wilson intervals.

    "answer": answers of all kinds with every token right. Parts of it: "coordinate", "place" and "within_one" as in
    `score_grounding`, for places in the static image; "question", about relations, looks and states in a word or two.
    """
    off = np.array(answers.loc[answers["kind"] == "where", "bins_off"].tolist())
    asked = answers[answers["kind"].isin(QUESTIONS)]
    counts = {"answer": answers["is_right"], "coordinate": off == 0, "place": (off == 0).all(1)}
    counts |= {"within_one": (off <= 1).all(1), "question": asked["is_right"]}
    return {name: wilson(int(np.sum(right)), int(np.size(right))) for name, right in counts.items()}


@torch.inference_mode()
def generate_answers(
    model: Any, processor: Any, images: np.ndarray, questions: Sequence[str], max_new_tokens: int = 48
) -> list[str]:
    """What the model answers by itself, greedily, to questions about one scene's images ``(n, h, w, 3)`` uint8."""
    prompter, tokenizer, said = PromptBuilder(processor, len(images)), processor.tokenizer, []
    pixels = prompter.pixels(images[None]).to(model.device)
    for question in questions:
        ids, _ = encode_vqa(prompter, [(question, "")])
        prompt = {k: v.to(model.device) for k, v in pad([ids[:-1]], tokenizer.pad_token_id).items()}
        out = model.generate(
            **prompt, pixel_values=pixels, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        said.append(tokenizer.decode(out[0, len(ids) - 1 :]).replace(tokenizer.eos_token, "").strip())
    return said


def decode_locations(texts: Sequence[str]) -> np.ndarray:
    """Answers in location tokens -> centres of their bins ``(n, 2)`` in [0, 1] (column, row); NaN where one names no place."""
    found = [[int(b) for b in LOCATION.findall(text)] for text in texts]
    return np.array([[(b + 0.5) / N_LOCATIONS for b in bins] if len(bins) == 2 else [np.nan] * 2 for bins in found])
