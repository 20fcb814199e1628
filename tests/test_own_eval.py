"""sample.py eval --data: what is asked, what is skipped, and the figures."""
import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gym
import sample
from lib import own_eval
from lib.checkpoint import load_model
from lib.cli import UserError
from lib.common import ROOT
from lib.evaluation import evaluate
from model import sized
from rl import DEMO
from tasks.base import Task
from tasks.verify import boxed
from tokenizer import Tokenizer

EXAMPLE = ROOT / "docs/example.png"     # four things; the diamond is pink


def written(folder: Path, *lines) -> str:
    """A JSONL file of these lines in a folder that has the picture example.png."""
    (folder / "example.png").write_bytes(EXAMPLE.read_bytes())
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "own.jsonl").write_text(text, encoding="utf-8")
    return str(folder / "own.jsonl")


def questions(path: str, room: int = 400):
    return own_eval.read_questions(path, Tokenizer(512), sized("tiny"), room)


def asked(**fields) -> dict:
    return {"image": "example.png", "question": "What color is the diamond?", "answer": "pink",
            "metric": "exact"} | fields


def test_an_evaluation_of_own_questions(tmp_path, capsys):
    """Two questions that the demo's model answers rightly, as its README shows, and one wrongly."""
    uri = "data:image/png;base64," + base64.b64encode(EXAMPLE.read_bytes()).decode()
    data = written(
        tmp_path, asked(group="colors"), asked(image=None, images=[uri], group="colors"),
        asked(question="Point at the diamond.", answer=[0, 0, 999, 999], metric="point-in-box"),
        asked(answers=["green", "grey"], answer=None, group="odd ones"),
        asked(image="missing.png"), "5", asked(metric="good"))
    out = tmp_path / "o/eval.json"
    sample.evaluation(sample.Eval(ckpt=[str(DEMO)], data=data, out=str(out), max_new=24,
                                  device="cpu", dtype="float32"))
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    colors = found["groups"]["colors"]
    assert list(found["groups"]) == ["colors", "odd ones", "point-in-box"]
    assert colors["accuracy"] == 1 and colors["n"] == 2 and colors["chance"] is None
    assert 0 <= colors["blank"] <= 1 and colors["low"] < 0.4 and colors["high"] == 1
    assert found["groups"]["odd ones"]["accuracy"] == 0
    assert found["groups"]["point-in-box"]["chance"] == 1 and found["all"]["accuracy"] == 0.75
    assert found["all"]["unread"] == 0 and found["all"]["n"] == 4 == len(found["replies"])
    assert {kind: row[0] for kind, row in found["skipped"].items()} == {
        "missing image": 1, "not an object": 1, "unknown metric": 1}
    assert "1 x unknown metric, the first: own.jsonl: line 7" in said and "odd ones" in said
    picture = Image.open(tmp_path / "o/pictures" / found["samples"][0]["pictures"][0])
    assert picture.size == (64, 64) and found["samples"][0]["answer"].count("pink") == 1


@pytest.mark.slow
def test_tasks_of_the_gym_as_a_file_get_the_figures_of_the_gyms_own_evaluation(tmp_path):
    lines = []
    for k in range(40):
        env = gym.make(Task("counting", 1_000_000 + k, 0, "test"))
        obs = env.reset()
        obs.images[0].save(tmp_path / f"{k}.png")
        lines.append(asked(image=f"{k}.png", question=obs.text.replace("<|image|>", ""),
                           answer=boxed(next(env.oracle()))))
    model, tokens = load_model(DEMO), Tokenizer(512)
    found = own_eval.evaluate_file(model, tokens, written(tmp_path, *lines), tmp_path, max_new=48)
    row = evaluate(model, tokens, "counting", levels=1, count=40)["counting"]
    own = found["all"]
    assert 0.5 < own["accuracy"] < 1
    assert all(own[key] == row[key] for key in ("accuracy", "low", "high", "blank", "n"))


def test_choices_are_shown_and_letters_alone_are_not(tmp_path):
    data = written(tmp_path, asked(metric="choice", choices=["red", "pink"]),
                   asked(metric="choice", choices=["A", "B", "C"], answer="C"))
    (words, letters), skipped = questions(data)
    assert words.text == "What color is the diamond?\nA. red\nB. pink" and not skipped
    assert letters.text == "What color is the diamond?"
    answered = [own_eval.Answered(q, "", 1.0, None, False, None) for q in (words, letters)]
    row = own_eval.figures(answered)
    assert row["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2) and row["blank"] == 0


def test_boxes_count_from_half_an_overlap_on(tmp_path):
    (question,), _ = questions(written(tmp_path, asked(metric="iou", answer=[0, 0, 9, 9])))
    row = own_eval.figures([own_eval.Answered(question, "", value, None, False, None)
                            for value in (0.5, 0.4, None, 1.0)])
    assert row["accuracy"] == 0.5 and row["mean_iou"] == pytest.approx(1.9 / 4)
    assert row["unread"] == 1 and row["chance"] is None


def test_a_field_that_is_null_is_as_if_it_were_left_out(tmp_path):
    """A table has all columns in all rows."""
    [question], _ = questions(written(tmp_path, asked(images=None, answers=None)))
    assert len(question.prompt.images) == 1 and question.answers == ["pink"]


@pytest.mark.parametrize("fields,kind", [
    ({"question": " "}, "no question"), ({"question": 5}, "no question"),
    ({"metric": None}, "unknown metric"), ({"metric": ["exact"]}, "unknown metric"),
    ({"choices": "red"}, "odd choices"), ({"choices": ["red"]}, "odd choices"),
    ({"choices": [1, 2]}, "odd choices"), ({"answer": None}, "odd answer"),
    ({"answer": {"a": 1}}, "odd answer"), ({"metric": "iou"}, "odd answer"),
    ({"image": 5}, "missing image"), ({"images": ["http://a.b/c.png"]}, "image on the web"),
    ({"images": ["own.jsonl"]}, "damaged picture"), ({"question": "word " * 999}, "too long")])
def test_a_line_that_can_not_be_used(tmp_path, fields, kind):
    with pytest.raises(UserError, match=f"no line of .*own.jsonl can be used: 1 x {kind}"):
        questions(written(tmp_path, asked(**fields)))


def test_a_picture_that_is_cut_off_is_noticed_while_it_is_loaded(tmp_path):
    """Its header is whole, so the file is found damaged only when its pixels are needed."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    data = written(tmp_path, asked(image="cut.png"))
    assert len(questions(data)[0]) == 1
    with pytest.raises(UserError, match="1 x damaged picture"):
        sample.evaluation(sample.Eval(ckpt=[str(DEMO)], data=data, out=str(tmp_path / "eval.json"),
                                      device="cpu", dtype="float32"))


def test_options_about_the_gyms_tasks_do_not_go_with_a_file(tmp_path):
    with pytest.raises(UserError, match="--levels is about the gym's tasks"):
        sample.evaluation(sample.Eval(data="x.jsonl", levels=2))


def test_a_text_of_a_record_is_no_image_mark(tmp_path):
    """The mark of a picture in a question is text like any other."""
    data = written(tmp_path, asked(question="<|image|> says what?"))
    (question,), _ = questions(data)
    tokens = Tokenizer(512)
    assert (question.prompt.ids == tokens.image).sum() == 16        # of the one 64 x 64 picture
    assert "<|image|> says" in tokens.decode(question.prompt.ids[20:])
