"""lab/joint.py: what is wrong in its worlds, its figures, and each study in miniature."""
import json
import math
from dataclasses import replace
from unittest import mock

import pytest

import gym
import pretrain
import rl
from data import parse_mix
from lab import joint, worlds
from lab.worlds import fallible
from lib.checkpoint import save_model
from lib.cli import UserError
from lib.common import ROOT
from model import GLMV, sized
from tasks.base import Task


def box(answer) -> str:
    return f"<|begin_of_box|>{answer}<|end_of_box|>"


@pytest.mark.parametrize("question,reply,wrong", [
    ("How many stars?", box(4), box(3)),                        # as in lab/worlds.py
    ("Press OK.", "click(250, 125)", "click(250, 375)"),
    ("Box the star.", box([10, 500, 200, 700]), box([10, 750, 200, 950])),
    ("Box the star.", box([10, 700, 200, 900]), box([10, 450, 200, 650])),
    ("All stars?", box([[1, 2, 3, 4], [5, 6, 7, 8]]), box([[1, 252, 3, 254], [5, 256, 7, 258]])),
    ("Is Alerts on?", box("yes"), box("no")), ("Go back.", "back()", "back()"),
    ("What is at your left?", box("red circle"), box("orange square"))])
def test_mistakes(question, reply, wrong):
    assert joint.mistake(question, reply) == wrong


@pytest.mark.parametrize("name", joint.ERRING)
def test_annotators_err_in_every_category_that_is_named(name):
    side = gym.CATEGORIES[name].env.min_pixels
    tasks = [Task(name, seed, pixels=side) for seed in range(40)]
    with fallible(joint.mistake, joint.ERRING):
        scripts = [[talk[1].text for talk in gym.demonstrate(task)] for task in tasks]
    right = [gym.Rewards().score(task, gym.play_out(task, script[:1])[2]).solved
             for task, script in zip(tasks, scripts)]
    assert 0.2 < sum(right) / len(right) < 0.85


def test_categories_without_annotators_are_shown_as_they_are():
    task = Task("ocr_line", 3)
    true = gym.demonstrate(task)
    with fallible(joint.mistake, joint.ERRING):
        assert [m.text for talk in gym.demonstrate(task) for m in talk] == [
            m.text for talk in true for m in talk]


def test_episodes_are_shown_without_further_questions():
    task = Task("gui_form", 5)
    everything = gym.demonstrate(task)
    with joint.whole_episodes():
        talks, clicks = gym.demonstrate(task), gym.demonstrate(Task("point", 5))
    assert 0 < len(talks) < len(everything) and "click" in talks[0][-1].text
    assert clicks and joint.BEGIN in clicks[0][-1].text     # a one-shot task stays as it is


def test_the_weak_verifier_takes_counts_that_are_too_large():
    task = Task("counting", 1)
    evidence = gym.play_out(task)[2]
    said = {answer: {**evidence, "reply": box(answer), "gold": 4}
            for answer in ("3", "4", "9", "many")}
    with joint.weak_verifier():
        weak = {answer: gym.Rewards().score(task, e).reward for answer, e in said.items()}
    true = {answer: gym.Rewards().score(task, e).reward for answer, e in said.items()}
    assert weak == {"3": 0, "4": 1, "9": 1, "many": 0} and true == {**weak, "9": 0}


def test_an_effect_of_three_seeds():
    found = joint.effect([1.0, 2.0, 3.0])           # a deviation of 1, so an error of 1 / sqrt(3)
    assert found["mean"] == 2 and found["low"] == pytest.approx(2 - 4.303 / math.sqrt(3))
    assert found["detectable"] == pytest.approx((4.303 + 1.061) / math.sqrt(3))
    assert joint.effect([5.0]) == {"mean": 5.0}


def test_gains_count_each_category_the_same():
    study = joint.Study("point,gui_form", {}, "", joint.Phase("sft", "point"))
    start = {"solved": {"point": "0000", "gui_form": "10"}}
    runs = {"rl": {0: {"solved": {"point": "1100", "gui_form": "00"}, "minutes": 1.0}}}
    table = joint.figures(runs, start, study)
    assert table["start: percent"]["all"] == 25 and table["gain, rl: all"] == {"mean": 0}
    assert table["gain, rl: perception"] == {"mean": 50} and table["gain, rl: tier 3"] == {
        "mean": -50}
    assert table["CPU minutes"] == {"rl, seed 0": 1.0}


def test_a_world_is_compared_run_by_run():
    study = replace(joint.world(joint.Args()), names=joint.THIRTY)
    made = {arm: {"solved": {name: solved for name in joint.THIRTY.split(",")}, "minutes": 1.0}
            for arm, solved in (("start", "0000"), ("rl", "1110"), ("sft", "1000"))}
    table = joint.figures({arm: {0: made[arm]} for arm in ("rl", "sft")}, made["start"], study)
    assert table["rl, seed 0 over start: all"]["difference"] == pytest.approx(75)
    found = table["rl, seed 0 over sft, seed 0: all"]
    assert found["difference"] == pytest.approx(50) and 0 < found["low"] < 50 < found["high"]
    one = table["rl, seed 0 over sft, seed 0: point"]
    assert one["high"] - one["low"] > 3 * (found["high"] - found["low"])    # of 30 categories


@pytest.mark.parametrize("study", joint.STUDIES)
def test_a_study_names_categories_that_its_arms_and_models_have(study):
    made = joint.STUDIES[study](joint.Args())
    names = made.names.split(",")
    assert set(names) <= set(gym.names()) and len(set(names)) == len(names)
    for phases in made.arms.values():
        assert sum(phase.share for phase in phases) == pytest.approx(1)
        assert {name for phase in phases for name, _ in parse_mix(phase.mix)} <= set(names)
    assert len(joint.THIRTY.split(",")) == 30 and len(joint.EIGHTEEN.split(",")) == 18


@pytest.fixture
def small(tmp_path, monkeypatch):
    save_model(GLMV(sized("tiny"), seed=0), tmp_path / "model")
    for script, options in ((pretrain, {"rows": 1, "row_tokens": 512}), (rl, {"group": 2})):
        full = script.Args
        monkeypatch.setattr(script, "Args", lambda full=full, options=options, **more: full(
            **more | options | {"mix": "point"} | ({"parts": ""} if "parts" in more else {})))
    monkeypatch.setattr(joint, "FEW", 1)
    monkeypatch.setattr(joint, "budget", lambda *rest: (200, 4))
    return joint.Args(seeds=1, minutes=0.001, before=1, prompts=1, think=2, count=1,
                      init=str(tmp_path / "model"), out=str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("study", joint.STUDIES)
def test_studies_run_and_go_on(study, small, tmp_path, monkeypatch, capsys):
    whole = joint.STUDIES[study]
    monkeypatch.setitem(joint.STUDIES, study, lambda args: replace(whole(args), names="point"))
    score = lambda self, task, evidence: gym.Score(len(str(evidence["reply"])) % 2)
    monkeypatch.setattr(gym.Rewards, "score", score)
    args = replace(small, study=study)
    joint.joint(args)
    out = tmp_path / "out" / study
    facts = json.loads((out / "report.json").read_text())
    arms = whole(args).arms
    assert list(facts["runs"]) == list(arms)
    for arm, phases in arms.items():
        assert (out / f"{arm}0/phase{len(phases) - 1}/log.jsonl").exists()
        assert (out / f"{arm}0/report.html").exists() and f"gain, {arm}: all" in facts["figures"]
    assert ("gain thinking, think: all" in facts["figures"]) == (study == "matrix")
    with mock.patch.object(pretrain, "run", None), mock.patch.object(rl, "run", None):
        joint.joint(replace(args, arms=list(arms)[0]))      # once more: nothing is trained again
    assert "the report is" in capsys.readouterr().out
    with pytest.raises(UserError, match="begun with other options"):
        joint.joint(replace(args, count=2))
    with pytest.raises(UserError, match="has no arm 'best'"):
        joint.joint(replace(args, arms="best"))


def test_a_silent_arm_is_an_outcome(small, tmp_path, monkeypatch, capsys):
    def silent(settings):
        raise UserError("none of the last 60 groups had a signal, so nothing is learned. ...")

    monkeypatch.setattr(rl, "run", silent)
    phase = joint.Phase("rl", "point")
    assert 0 <= joint.train(phase, small, 1.0, tmp_path / "model", 0, tmp_path / "run") < 1
    assert "had a signal" in capsys.readouterr().out
    spent = json.loads((tmp_path / "run/seconds.json").read_text())["so far"]
    monkeypatch.setattr(rl, "run", None)        # would fail if it were called: it is not repeated
    again = joint.train(phase, small, 1.0, tmp_path / "model", 0, tmp_path / "run")
    assert again == spent / 60


def test_sft_begins_with_a_model_or_with_a_tower_wherever_they_are(small, tmp_path):
    (tmp_path / "align").mkdir()
    model = (tmp_path / "model").rename(tmp_path / "align/model")
    phase = joint.Phase("sft", "point")
    for init, option in ((model, "init"), (ROOT / "ckpt/align", "vit")):
        settings = joint.settings_of(phase, small, init, 0, tmp_path / "run")[1]
        assert {name: getattr(settings, name) for name in ("init", "vit")} == {
            "init": "", "vit": "", option: str(init)}


def test_the_time_of_an_interrupted_run_counts(tmp_path, monkeypatch):
    clock, calls = [0.0], []

    def work(settings):
        calls.append(settings.steps)
        clock[0] += 3
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(worlds.time, "process_time", lambda: clock[0])
    run = pretrain.Args(steps=7, out=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        worlds.timed(work, run)
    assert [worlds.timed(work, run) for _ in range(2)] == [6, 6] and calls == [7, 7]
    assert worlds.timed(work, replace(run, steps=9)) == 9       # of both parts
