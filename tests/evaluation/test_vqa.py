"""An exam is fair (in view, of its kind) and its marks are right; a spoken answer is read as a place."""

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
    "opening": 0.08,
}


def make():
    texts = [part for asked in vqa.sample_questions(SCENES, 5) for part in asked[2:]]
    return small_vlm(train_tokenizer(texts, location_tokens()), image_size=48)


SCENES = Scenes([(np.zeros((2, 48, 48, 3), np.uint8), SCENE)])


def test_an_exam_asks_only_what_it_says_it_asks():
    exam = vqa.sample_questions(SCENES, 20)
    assert pd.Series([a.kind for a in exam]).value_counts().to_dict() == dict.fromkeys(QUESTION_KINDS, 20)
    assert {a.answer for a in exam if a.kind == "where_wrist"} == {"<loc04><loc06>"}  # the one thing in view
    assert {a.question for a in exam if a.kind == "color"} == {"what color is the cube ?"}
    assert {a.question for a in exam if a.kind == "point_wrist"} == {"wrist red cube"}
    assert exam == vqa.sample_questions(SCENES, 20)


def test_marks_count_whole_answers_and_bins():
    tokenizer = make()[1].tokenizer

    def judge(answer, said):
        asked = vqa.VQAItem(0, "where", "where is it ?", answer)
        true, told = (torch.tensor(tokenizer(text).input_ids) for text in (answer, said))
        return vqa._judge(tokenizer, asked, torch.cat([told[:1], told]), torch.cat([torch.tensor([-100]), true]))

    rows = [
        judge("<loc03><loc04>", "<loc03><loc04>"),
        judge("<loc03><loc04>", "<loc03><loc05>"),
        judge("<loc03><loc09>", "<loc03> red"),
    ]
    assert [r["is_right"] for r in rows] == [True, False, False]
    assert [r["bins_off"] for r in rows] == [[0, 0], [0, 1], [0, np.inf]]
    answers = pd.DataFrame(rows)
    (row,) = vqa.score_grounding(answers).to_dict("records")
    assert (row["n"], row["coordinate"], row["place"], row["within_one"]) == (3, 4 / 6, 1 / 3, 2 / 3)
    assert vqa.score(answers).to_dict("records") == [{"group": "where", "n": 3, "successes": 1}]
    guess = vqa.majority_baseline(answers)
    assert guess["bins_off"].tolist() == [[0, 0], [0, 0], [0, 5]] and guess["is_right"].tolist() == [True, True, False]


def test_the_summary_counts_places_and_words_apart():
    words = [
        {"kind": k, "answer": a, "is_right": a == "yes", "bins_off": []}
        for k in ("drawer", "caption")
        for a in ("yes", "yes", "no")
    ]
    place = {"kind": "where", "answer": "<loc01><loc02>", "is_right": False, "bins_off": [0, 1]}
    answers = pd.DataFrame([*words, place])
    told = {name: (rate.successes, rate.n) for name, rate in vqa.summary(answers).items()}
    assert told["answer"] == (4, 7), "of all kinds, the hard ones and those in whole sentences too"
    assert told == {"answer": (4, 7), "coordinate": (1, 2), "place": (0, 1), "within_one": (1, 1), "question": (2, 3)}
    assert vqa.majority_baseline(answers)["is_right"].tolist() == [True, True, False] * 2 + [True]


def test_a_model_takes_an_exam_and_speaks():
    model, processor = make()
    exam = vqa.sample_questions(SCENES, 2)
    answers = vqa.evaluate_vqa(model.eval(), processor, SCENES, exam, batch_size=5)
    assert answers["answer"].tolist() == [a.answer for a in exam]
    alone = vqa.evaluate_vqa(model, processor, SCENES, exam[3:4])
    assert alone["said"].item() == answers["said"][3], "an answer must not depend on its batch"
    assert answers["bins_off"].map(len).tolist()[:10] == [2] * 8 + [3] * 2
    said = vqa.generate_answers(
        model, processor, SCENES[0][0], ["is the drawer open ?", "describe the scene ."], max_new_tokens=4
    )
    assert len(said) == 2 and all(isinstance(s, str) for s in said)


def test_places_are_the_centres_of_bins():
    found = vqa.decode_locations(["<loc00><loc15>", "out of view", "<loc01>"])
    assert found[0].tolist() == [0.5 / N_LOCATIONS, 15.5 / N_LOCATIONS] and np.isnan(found[1:]).all()


def test_parts_add_up_and_a_ribbon_names_each_token():
    model, processor = make()
    assert parameter_summary(model)["parameters"].sum() == sum(p.numel() for p in model.parameters())
    tokens, kinds = PromptBuilder(processor, 2).token_roles("is the drawer open")
    assert kinds.count("image") == 2 * processor.image_seq_len and (tokens[-1], kinds[-1]) == (ACT, "action")
    assert "".join(t for t, k in zip(tokens, kinds, strict=True) if k == "instruction").replace("Ġ", " ") == " is the drawer open"
