"""Questions are in view and of their kind, answers are scored right, and location tokens are decoded."""

import numpy as np
import pandas as pd
import torch

from rvlm.envs.tabletop.questions import N_LOCATIONS, QUESTION_KINDS, location_tokens
from rvlm.evaluation import vqa
from rvlm.policy.inspection import parameter_summary
from rvlm.vlm.processors import ACT
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.small import small_vlm, train_tokenizer


class Scenes(list):
    """Stands for stored scenes: black images and a true state."""


SCENE = {
    "names": ["red cube", "blue ball", "green ball", "drawer handle", "button", "slider", "white square", "gripper"],
    "n_objects": 3,
    "static": [[0.1 * i, 0.5] for i in range(1, 9)],
    "wrist": [[0.3, 0.4], [1.4, 0.2]] + [[-0.3, 0.2]] * 6,
    "pos": [[0.01 * i, 0.0, 0.0] for i in range(8)],
    "held": None,
    "drawer": True,
    "light": False,
    "is_gripper_open": True,
}


def make():
    texts = [part for item in vqa.sample_vqa_items(SCENES, QUESTION_KINDS, 5) for part in item[2:]]
    return small_vlm(train_tokenizer(texts, location_tokens()), image_size=48)


SCENES = Scenes([(np.zeros((2, 48, 48, 3), np.uint8), SCENE)])


def test_questions_are_of_the_kind_that_is_asked_for():
    items = vqa.sample_vqa_items(SCENES, QUESTION_KINDS, 20)
    assert pd.Series([a.kind for a in items]).value_counts().to_dict() == dict.fromkeys(QUESTION_KINDS, 20)
    assert {a.answer for a in items if a.kind == "where_wrist"} == {"<loc04><loc06>"}  # the one thing in view
    assert {a.question for a in items if a.kind == "color"} == {"what color is the cube ?"}
    assert {a.question for a in items if a.kind == "point_wrist"} == {"wrist red cube"}
    assert items == vqa.sample_vqa_items(SCENES, QUESTION_KINDS, 20)


def test_scores_count_whole_answers_and_bins():
    tokenizer = make()[1].tokenizer

    def row(answer, predicted):
        item = vqa.VQAItem(0, "where", "where is it ?", answer)
        true, ids = (torch.tensor(tokenizer(text).input_ids) for text in (answer, predicted))
        return vqa._score_answer(tokenizer, item, torch.cat([ids[:1], ids]), torch.cat([torch.tensor([-100]), true]))

    rows = [
        row("<loc03><loc04>", "<loc03><loc04>"),
        row("<loc03><loc04>", "<loc03><loc05>"),
        row("<loc03><loc09>", "<loc03> red"),
    ]
    assert [r["is_correct"] for r in rows] == [True, False, False]
    assert [r["bin_errors"] for r in rows] == [[0, 0], [0, 1], [0, np.inf]]
    answers = pd.DataFrame(rows)
    (found,) = vqa.grounding_accuracy(answers).to_dict("records")
    assert (found["n"], found["coordinate"], found["location"], found["within_one"]) == (3, 4 / 6, 1 / 3, 2 / 3)
    assert vqa.accuracy_by_kind(answers).to_dict("records") == [{"group": "where", "n": 3, "successes": 1}]
    majority = vqa.majority_baseline(answers)
    assert majority["bin_errors"].tolist() == [[0, 0], [0, 0], [0, 5]] and majority["is_correct"].tolist() == [True, True, False]


def test_the_summary_counts_locations_and_words_apart():
    words = [
        {"kind": k, "answer": a, "is_correct": a == "yes", "bin_errors": []}
        for k in ("drawer", "caption")
        for a in ("yes", "yes", "no")
    ]
    location = {"kind": "where", "answer": "<loc01><loc02>", "is_correct": False, "bin_errors": [0, 1]}
    answers = pd.DataFrame([*words, location])
    counts = {name: (rate.successes, rate.n) for name, rate in vqa.accuracy_summary(answers).items()}
    assert counts["answer"] == (4, 7), "of all kinds, the hard ones and those in whole sentences too"
    assert counts == {"answer": (4, 7), "coordinate": (1, 2), "location": (0, 1), "within_one": (1, 1), "one_word": (2, 3)}
    assert vqa.majority_baseline(answers)["is_correct"].tolist() == [True, True, False] * 2 + [True]


def test_a_model_answers_with_teacher_forcing_and_freely():
    model, processor = make()
    items = vqa.sample_vqa_items(SCENES, QUESTION_KINDS, 2)
    answers = vqa.evaluate_vqa(model.eval(), processor, SCENES, items, batch_size=5)
    assert answers["answer"].tolist() == [a.answer for a in items]
    alone = vqa.evaluate_vqa(model, processor, SCENES, items[3:4])
    assert alone["predicted"].item() == answers["predicted"][3], "an answer must not depend on its batch"
    assert answers["bin_errors"].map(len).tolist()[:10] == [2] * 8 + [3] * 2
    texts = vqa.generate_answers(
        model, processor, SCENES[0][0], ["is the drawer open ?", "describe the scene ."], max_new_tokens=4
    )
    assert len(texts) == 2 and all(isinstance(s, str) for s in texts)


def test_locations_are_the_centres_of_bins():
    found = vqa.decode_locations(["<loc00><loc15>", "out of view", "<loc01>"], N_LOCATIONS)
    assert found[0].tolist() == [0.5 / N_LOCATIONS, 15.5 / N_LOCATIONS] and np.isnan(found[1:]).all()


def test_parameters_add_up_and_each_token_has_a_role():
    model, processor = make()
    assert parameter_summary(model)["parameters"].sum() == sum(p.numel() for p in model.parameters())
    tokens, kinds = PromptBuilder(processor, 2).token_roles("is the drawer open")
    assert kinds.count("image") == 2 * processor.image_seq_len and (tokens[-1], kinds[-1]) == (ACT, "action")
    assert "".join(t for t, k in zip(tokens, kinds, strict=True) if k == "instruction").replace("Ġ", " ") == " is the drawer open"
