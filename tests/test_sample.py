"""sample.py: what `eval` evaluates, and what it refuses."""
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gym
import sample
from lib import card, evaluation
from lib.checkpoint import load_model, save_model
from lib.cli import UserError
from lib.common import ROOT
from lib.episodes import Episode
from model import GLMV, sized
from rl import DEMO
from tasks import verify
from tasks.base import Task
from tokenizer import Tokenizer


@pytest.fixture
def run(tmp_path) -> Path:
    """The run folder of a pretraining of one step."""
    save_model(GLMV(sized("tiny")), tmp_path / "run/step_000001")
    return tmp_path / "run"


def evaluated(run: Path, options: dict, **args) -> tuple[dict, int]:
    """The table and the levels after `eval` of a run with these options."""
    (run / "config.json").write_text(json.dumps(options))
    out = run / "eval.json"
    sample.evaluation(sample.Eval(ckpt=[str(run)], count=2, out=str(out), device="cpu",
                                  dtype="float32", context=256, max_new=4, **args))
    found = json.loads(out.read_text())
    return found["table"], found["levels"]


def test_eval_takes_mix_and_levels_of_the_training(run, capsys):
    """The run's categories without its text; the level, too, unless the options say otherwise."""
    options = {"mix": "counting:3,point,text:1,code:1", "levels": 2, "steps": 1}
    table, levels = evaluated(run, options)
    assert list(table) == ["counting", "point"] and levels == 2
    assert [len(row["by_level"]) for row in table.values()] == [2, 2]
    assert "config.json: counting,point" in capsys.readouterr().out
    table, levels = evaluated(run, options, mix="shape_attr")
    assert list(table) == ["shape_attr"] and levels == 2
    table, levels = evaluated(run, options, levels=1)
    assert list(table) == ["counting", "point"] and levels == 1


def test_eval_of_the_same_checkpoint_by_its_own_folder(run):
    (run / "config.json").write_text(json.dumps({"mix": "point", "levels": 3}))
    assert card.trained_on(run / "step_000001")[:2] == ("point", 3)


@pytest.mark.parametrize("where,text", [
    ("config.json", "[1]"), ("config.json", "{"), ("config.json", '{"mix": 5}'),
    ("config.json", '{"mix": "point", "levels": "x"}'),
    ("config.json", '{"mix": "point", "levels": 9}'), ("step_000001/report.json", "{}"),
    ("step_000001/report.json", "7"), ("step_000001/report.json", '{"table": [1]}'),
    ("step_000001/report.json", "\udcff")])
def test_damaged_files_about_the_training_are_one_line(run, where, text):
    (run / where).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=f"{where} is damaged") as error:
        card.trained_on(run / "step_000001")
    assert "\n" not in str(error.value)


def test_tasks_that_all_end_in_errors_are_left_out_and_not_zero(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "run_tasks", lambda model, tokens, tasks, *args, **options: [
        Episode(task, i, 0, score=gym.Score(math.nan, {}, "it is too long")
                       if task.category == "point" else gym.Score(1.0, {}))
        for i, task in enumerate(tasks)])
    assert list(evaluated(run, {"mix": "counting,point"})[0]) == ["counting"]
    assert "point is left out, as all 2 tasks ended in errors" in capsys.readouterr().err
    with pytest.raises(UserError, match="no task of point could be played"):
        evaluated(run, {"mix": "point"})


def test_the_slots_are_no_more_than_the_tasks(monkeypatch):
    """A huge --slots takes no memory."""
    made = []
    monkeypatch.setattr(evaluation, "Engine",
                        lambda model, slots, *more, **options: made.append(slots) or 1 / 0)
    for tasks in ([], [1, 2, 3]):
        with pytest.raises(ZeroDivisionError):
            evaluation.run_tasks(None, None, tasks, 10 ** 9, 512, 48)
    assert made == [1, 3]


def test_eval_of_a_run_on_text_only(run):
    with pytest.raises(UserError, match="only text: give --mix"):
        evaluated(run, {"mix": "text", "levels": 1})
    with pytest.raises(UserError, match="only own data: give --mix"):
        evaluated(run, {"mix": "", "data": "own.jsonl", "levels": 1})


def test_what_the_demos_model_was_trained_on():
    mix, levels, source = card.trained_on(DEMO)
    assert "shape_attr" in mix and levels == 1 and source.endswith("report.json")


def test_a_folder_that_says_nothing_of_its_training(tmp_path):
    assert card.trained_on(tmp_path / "checkpoint") == ("gym", 1, "no file")


# ---- what the shipped model was trained on, and the answers to everything else ------------------

@pytest.fixture(scope="module")
def shipped() -> card.Seen:
    return card.seen(DEMO, sized("tiny"))


@pytest.mark.parametrize("question", ["What color is the circle?", "Count the crosses.",
                                      "Point at the red one.", "List all.", "Press OK.",
                                      "Tick star and H. Press OK."])
def test_questions_that_the_shipped_model_knows(shipped, question):
    dark = np.full((64, 64, 3), 40, np.uint8)
    assert shipped.differences(question, [dark]) == []


def test_questions_and_pictures_that_it_does_not_know(shipped):
    white = np.full((32, 80, 3), 255, np.uint8)
    light, size, words = shipped.differences("Is there a dog?", [white])
    assert light.startswith("its brightness is 255, not ")
    assert size == "its size is 80x32, not 64x64"
    assert "worded" in words


def test_without_a_question_the_known_ones_are_listed(capsys):
    sample.ask(sample.Ask(ckpt=str(DEMO)))
    said = capsys.readouterr().out
    for words in ("shape_attr", "gui_form", "List all.", "What does it say?", "Brightness"):
        assert words in said


def test_a_model_of_unknown_training_has_no_notes(run, capsys):
    assert card.seen(run / "step_000001", sized("tiny")) is None
    sample.ask(sample.Ask(ckpt=str(run)))
    assert "no file beside" in capsys.readouterr().out


def test_the_example_of_the_readme(capsys):
    """Its picture is the held-out task that the README's command draws; the replies are right."""
    task = Task("counting", 44, 0, "test")
    drawn = gym.make(task).reset().images[0]
    assert Image.open(ROOT / "docs/example.png").tobytes() == drawn.tobytes()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    asked = re.findall(r'ask --ckpt=ckpt/demo --image=docs/example\.png "(.+?)"\s+# (.+)', readme)
    assert len(asked) >= 2
    for question, reply in asked:
        sample.ask(sample.Ask(question, [str(ROOT / "docs/example.png")], ckpt=str(DEMO),
                              device="cpu", dtype="float32"))
        said = capsys.readouterr()
        assert said.out.strip() == reply and "unlike" not in said.err
    talk = [message for talk in gym.demonstrate(task) for message in talk]
    right = {q.text.replace("<|image|>", ""): verify.boxed(a.text)
             for q, a in zip(talk[::2], talk[1::2])}
    assert dict(asked)["List all."] == right["List all."] and "pink diamond" in right["List all."]
    assert dict(asked)["What color is the diamond?"] == "pink"


def test_an_evaluation_draws_tasks_at_a_size_that_suits_the_patches(monkeypatch):
    model, sides = GLMV(sized("tiny")), []
    model.config.vision.patch_size, model.config.max_tokens = 14, 64

    def played(model, tokens, tasks, *_, **more):
        sides.append(tasks[0].pixels)
        return [Episode(task, 0, 0, score=gym.Score(0.0, {}, "gone")) for task in tasks]

    monkeypatch.setattr(evaluation, "run_tasks", played)
    for pixels in (0, 140):
        with pytest.raises(UserError, match="no task of point"):
            evaluation.evaluate(model, Tokenizer(512), "point", 1, 2, pixels=pixels)
    assert sides == [112, 140]


def test_a_reply_gets_twice_the_room_of_the_oracles():
    tokens, config = Tokenizer(512), sized("tiny")
    short, long = (evaluation.budget([Task(name, i) for i in range(30)], tokens, config)
                   for name in ("point", "scene_to_json"))
    assert 64 < short[0] < 512 and 16 < short[1] < 100
    assert long[1] > 2 * short[1] and long[0] <= config.text.max_position_embeddings


def test_a_card_says_what_was_measured_and_seen(run, capsys):
    """And `ask` takes from it what the model has seen, without drawing anything."""
    (run / "config.json").write_text(json.dumps({"mix": "counting,point", "levels": 2}))
    folder = run / "step_000001"
    (folder / "training.md").write_text("One step.")
    (folder / "out_of_gym.json").write_text(json.dumps({"figures": {
        "white page": {"right, %": 12.5, "from": 4.0, "to": 20.0}}}))
    drawn = card.seen(folder, sized("tiny"))
    sample.evaluation(sample.Eval(ckpt=[str(run)], count=4, levels=2, device="cpu", dtype="float32",
                                  context=256, max_new=4, card=str(folder),
                                  out=str(run / "eval.json")))
    text = (folder / "README.md").read_text()
    assert re.search(r"\| counting \| 0 \[0-\d+\] \| 0 \| 25 \| 0 \[", text)
    assert "Level 1: 0 of 2 categories are 20 points" in text and "One step." in text
    assert "| white page | 12.5 | 4.0-20.0 |" in text and "- point: " in text
    kept = card.seen(folder, sized("tiny"))
    assert kept.questions == drawn.questions and kept.sizes == drawn.sizes
    assert card.trained_on(folder) == ("counting,point", 2, str(folder / "report.json"))
    for damaged in ({"light": 1}, 5, {"light": [0, 9], "sizes": [[8]], "questions": {}},
                    {"light": [0, 9], "sizes": [], "questions": {"point": 3}}):
        (folder / "report.json").write_text(json.dumps({"table": {"point": {}}, "seen": damaged}))
        with pytest.raises(UserError, match="report.json is damaged"):
            card.seen(folder, sized("tiny"))


def test_a_card_of_levels_that_were_not_measured(run):
    """A level whose tasks all ended in errors has no figures, and is no zero."""
    row = dict(accuracy=0.5, low=0.2, high=0.8, blank=0.1, chance=0.25, n=3)
    facts = {"table": {"point": {"by_level": [None, row]}, "counting": {"by_level": [row, row]}},
             "trained_levels": 2}
    folder = run / "step_000001"
    card.write_card(folder, load_model(folder), None, facts)
    text = (folder / "README.md").read_text()
    assert "| point | - | - | - | 50 [20-80] | 10 | 25 |" in text
    assert "Level 0: 1 of 1 categories" in text and "Level 1: 2 of 2 categories" in text
