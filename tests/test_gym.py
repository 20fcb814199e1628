"""The contract of every category, the known hacks, and the driver. `python -m pytest tests`"""
import math
import os
import pickle
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
from PIL import Image

import gym
from gym import Exam, Rewards, demonstrate, drive, fingerprint, fresh_fingerprints, make, play_out
from tasks import CATEGORIES, Obs, OneShot, Step, Task, verify
from tasks.base import IMAGE, box, click, held
from tasks.draw import HELD_PAIRS

LEVELS = (0, 4)
CASES = [(name, level) for name in gym.names() for level in LEVELS]


@pytest.mark.parametrize("name,level", CASES)
def test_contract(name, level):
    exam = Exam(name, level, count=40)
    assert exam.violations(exam.measure()) == []


@pytest.mark.parametrize("split", ["train", "test"])
def test_same_bytes_in_a_fresh_process(split):
    tasks = [Task(name, seed, level, split) for name, level in CASES for seed in range(3)]
    tasks += [Task(name, 1, 2, split, 200) for name in gym.names()]
    assert [fingerprint(task) for task in tasks] == fresh_fingerprints(tasks)


@pytest.mark.parametrize("name,level", CASES)
def test_oracle_solves_the_held_out_split_at_any_size(name, level):
    for seed, pixels in enumerate((0, 64, 100, 256, 1024)):
        task = Task(name, seed, level, "test", pixels)
        obs = make(task).reset()
        assert obs.images[0].size == (pixels or 64, pixels or 64) and obs.images[0].mode == "RGB"
        assert Rewards().score(task, play_out(task)[2]).reward == 1


def test_splits_and_sizes_share_no_picture_but_sizes_share_the_question():
    train, test = (make(Task("point", 3, 1, split)).reset() for split in ("train", "test"))
    assert train.images[0].tobytes() != test.images[0].tobytes()
    assert make(Task("point", 3, 1, "train", 128)).reset().text == train.text


def test_training_never_draws_what_is_held_out():
    for seed in range(150):
        for split in ("train", "test"):
            reading, scene = (make(Task(name, seed, 2, split)) for name in ("ocr_line", "point"))
            reading.reset(), scene.reset()
            assert held(reading.gold) == (split == "test")
            pairs = {(item.color, item.shape) for item in scene.items}
            assert split == "test" or not pairs & HELD_PAIRS


# ----------------------------------------------------------------------------------- verifiers

def test_boxed():
    assert verify.boxed(box("7")) == "7"
    assert verify.boxed("<think>" + box("3") + "</think> It is " + box(" 7 ")) == "7"
    for text in ("7", "", box("7") * 2, box(box("7")), verify.BEGIN + "7", "<think>" + box("7"),
                 verify.END + verify.BEGIN, box("7" * 100_000)):
        assert verify.boxed(text) is None


def test_parse_action():
    assert verify.parse_action("click(412, 377)") == ("click", [412, 377])
    assert verify.parse_action('<think>hm</think>type("a, b)")') == ("type", ["a, b)"])
    assert verify.parse_action("done()") == ("done", [])
    assert verify.parse_action("click(-1, [2, 'x'])") == ("click", [-1, [2, "x"]])
    for text in ("", "click", "click(1, 2", "a.b(1)", "click(x)", "click(1)(2)", "click(x=1)", "\0",
                 "click(*[1])", "click(1); click(2)", "click(1 + open('f'))", "(" * 399, "-" * 399,
                 "click(" + "9" * 5000 + ")", "click(" + "1" * 390 + ")" * 4, "f(" * 199, "é(1"):
        assert verify.parse_action(text) is None, text


@pytest.mark.parametrize("verifier,right,wrong,gold", [
    (verify.exact, ["red", " Red.", "RED"], ["dark red", "red green", "", "red or blue"], "red"),
    (verify.number, ["4", "04"], ["1-4", "4.0", "four", "3, 4", "4 4", "٤", "", "9" * 5000], 4),
    (verify.hit_point, ["[5, 9]", "[0,10]"], ["5, 9", "[0, 0, 10, 10]", "[5.0, 9]", "[99, 5]",
                                             "[-5, 5]", "[[5, 9]]"], (0, 0, 10, 10)),
    (verify.edit, ["aB3"], ["", "xyz", "ABCDEFGHaB3", "a"], "aB3"),
])
def test_verifiers(verifier, right, wrong, gold):
    assert [verifier({"reply": box(text), "gold": gold}) for text in right] == [1] * len(right)
    assert [verifier({"reply": box(text), "gold": gold}) for text in wrong] == [0] * len(wrong)


def test_edit_is_graded_and_minds_case():
    assert verify.edit({"reply": box("AB34"), "gold": "aB34"}) == 0.75
    assert verify.distance("kitten", "sitting") == 3 and verify.distance("", "ab") == 2


def test_a_failing_verifier_is_an_error_and_not_a_zero():
    task, evidence = Task("counting", 0), {"reply": box(1), "gold": 1}
    assert Rewards().score(task, evidence) == gym.Score(1.0, {"answer": 1.0})
    for broken in (lambda e: math.nan, lambda e: 2.0, lambda e: 1 / 0, lambda e: None):
        score = Rewards({"counting": ("mean", {"answer": (broken, 1)})}).score(task, evidence)
        assert score.error and math.isnan(score.reward)
    assert Rewards().score(task, {}).error and Rewards().score(Task("nothing", 0), {}).error


def test_aggregation():
    assert gym.combine("mean", [1, 0], [3, 1]) == 0.75
    assert gym.combine("product", [0.5, 0.5], [1, 2]) == 0.125
    assert gym.combine("gate", [1, 0.5], [1, 1]) == 0.5
    assert gym.combine("gate", [0.9, 1], [1, 1]) == 0
    with pytest.raises(ValueError, match="median"):
        gym.combine("median", [1], [1])


# ------------------------------------------------------------------------------ driver and forms

@pytest.mark.parametrize("name", gym.names())
def test_demonstrations_are_whole_conversations(name):
    for seed in range(20):
        task = Task(name, seed, seed % 5)
        conversations = demonstrate(task)
        for conversation in conversations:
            roles = [message.role for message in conversation]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) <= 12
            assert [m.text.count(IMAGE) for m in conversation] == [1] + [0] * (len(roles) - 1)
            assert [len(m.images) for m in conversation] == [1] + [0] * (len(roles) - 1)
        assert [c[1].text for c in conversations] == play_out(task)[1]
        questions = [m.text for m in conversations[0] if m.role == "user"]
        assert len(set(questions)) == len(questions)
        pickle.dumps(conversations)


def test_segments_show_the_goal_the_actions_and_the_current_screen_only():
    task = next(t for s in range(99) if len(demonstrate(t := Task("gui_form", s, 2))) == 4)
    conversations = demonstrate(task)
    goal = conversations[0][0].text
    for turn, (user, _) in enumerate(conversations):
        said = [earlier[1].text for earlier in conversations[:turn]]
        assert user.text == "\n".join([goal, *said])
    screens = [c[0].images[0].tobytes() for c in conversations]
    assert len(set(screens)) == 4


def test_some_forms_start_wrong_and_are_mended():
    starts = [make(Task("gui_form", seed, 2)) for seed in range(60)]
    for env in starts:
        env.reset()
    wrong = [env for env in starts if any(env.ticks[n] and not env.wanted[n] for n in env.ticks)]
    assert 5 < len(wrong) < 40


def test_a_form_counts_only_when_all_of_it_is_right():
    task = Task("gui_form", 0, 3)
    env = make(task)
    env.reset()
    for button, submitted in (("OK", True), ("NO", False)):
        _, replies, evidence = play_out(task, [click(env.areas[button])])
        assert len(replies) == 1 and evidence["state"]["submitted"] is submitted
        assert Rewards().score(task, evidence).reward == 0
    assert play_out(task, ["done()"])[2]["state"]["submitted"] is False
    _, replies, evidence = play_out(task, ["nonsense"])
    assert len(replies) == env.max_turns and evidence["log"] == ["?"] * env.max_turns
    solved = play_out(task)[2]
    ticks = {**solved["state"]["ticks"], "Z": True}
    extra = {**solved, "state": {**solved["state"], "ticks": ticks}}
    assert Rewards().score(task, solved).reward == 1 and Rewards().score(task, extra).reward == 0


def test_the_driver_appends_observations():
    class Echo(CATEGORIES["counting"]):
        def reset(self):
            self.heard = []
            return Obs("say a, then b")

        def step(self, text):
            self.heard.append(text)
            return Step(Obs("go on"), len(self.heard) == 2)

        def evidence(self):
            return {"heard": self.heard}

    episode = drive(Echo(Task("counting", 0)))
    assert [m.role for m in next(episode)] == ["user"]
    assert [m.role for m in episode.send("a")] == ["user", "assistant", "observation"]
    with pytest.raises(StopIteration) as end:
        episode.send("b")
    assert end.value.value == {"heard": ["a", "b"]}


def test_placeholders_must_match_images():
    with pytest.raises(AssertionError):
        Obs(IMAGE + IMAGE, [Image.new("RGB", (8, 8))])


# ------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("fields,words", [
    (("countng", 0), "counting"), (("", 0), "unknown"), (("counting", -1), "seed"),
    (("counting", 0, 5), "level"), (("counting", 0, "1"), "level"),
    (("counting", 0, 0, ""), "split"), (("counting", 0, 0, "train", 63), "64"),
    (("counting", 0, 0, "train", -64), "64"),
    (("counting", 0, 0, "train", 1025), "1024")])
def test_bad_tasks_are_refused_in_one_line(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        make(Task(*fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [
    "", "show", "show countng", "show point --level 9", "show point --level one", "fly", "check x",
    "play point --pixels 3", "show point --count 0", "show point --out /", "list --wat"])
def test_bad_command_lines_end_with_one_line_and_2(line, capsys):
    assert gym.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_verbs(tmp_path, capsys):
    assert gym.main(["list"]) == 0 and "gui_form" in capsys.readouterr().out
    for name in ("counting", "gui_form"):
        out = tmp_path / "new" / f"{name}.png"
        assert gym.main(["show", name, "--all-levels", "--count", "2", "--out", str(out)]) == 0
        assert Image.open(out).width > 300
    task = Task("gui_form", 4, 1)
    script = "; ".join(play_out(task)[1])
    line = ["play", "gui_form", "--seed", "4", "--level", "1", "--script", script]
    assert gym.main([*line, "--out", str(tmp_path / "play.png")]) == 0
    assert "reward 1.00" in capsys.readouterr().out


def test_every_one_shot_category_needs_no_more_than_make():
    assert all(issubclass(kind, OneShot) or kind.max_turns > 1 for kind in CATEGORIES.values())
    assert set(gym.RULES) == set(CATEGORIES)
