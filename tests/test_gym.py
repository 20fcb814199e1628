"""The contract of every category, the known hacks, and the driver. `python -m pytest tests`"""
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
from PIL import Image

import gym
from gym import Rewards, demonstrate, drive, make, play_out
from tasks import CATEGORIES, Category, Obs, OneShot, Step, Task, contract, verify
from tasks.base import IMAGE, box, click, held
from tasks.contract import Exam, fingerprints, in_fresh_process
from tasks.draw import HELD_PAIRS, Canvas

CASES = [pytest.param(name, level, marks=[] if level in (0, 4) else pytest.mark.slow)
         for name in gym.names() for level in range(5)]


@pytest.mark.parametrize("name,level", CASES)
def test_contract(name, level):
    exam = Exam(name, level, count=40 if issubclass(CATEGORIES[name].env, OneShot) else 12)
    assert exam.violations(exam.measure()) == []


def test_same_bytes_in_a_fresh_process():
    tasks = [Task(name, seed, level, split) for name in gym.names() for split in ("train", "test")
             for seed, level in enumerate((0, 4))]
    tasks += [Task(name, 1, 2, "test", CATEGORIES[name].env.min_pixels + 50)
              for name in gym.names()]
    assert fingerprints(tasks) == in_fresh_process("fingerprints", tasks)


@pytest.mark.parametrize("name,level", CASES)
def test_oracle_solves_the_held_out_split_at_any_size(name, level):
    least = CATEGORIES[name].env.min_pixels
    for seed, pixels in enumerate((0, least + 36, 1024)):
        task = Task(name, seed, level, "test", pixels)
        images = make(task).reset().images
        assert not images or max(max(image.size) for image in images) == (pixels or least)
        assert all(image.mode == "RGB" for image in images)
        assert Rewards().score(task, play_out(task)[2]).reward == pytest.approx(1)


def test_splits_and_sizes_share_no_picture_but_sizes_share_the_question():
    train, test = (make(Task("point", 3, 1, split)).reset() for split in ("train", "test"))
    assert train.images[0].tobytes() != test.images[0].tobytes()
    assert make(Task("point", 3, 1, "train", 128)).reset().text == train.text


def test_a_group_shares_what_is_only_looked_at():
    """A one-shot task is drawn once, the same as alone; what is said stays apart, and so does
    whatever an agent can change."""
    task, form = Task("counting", 5), Task("gui_form", 5)
    envs = [gym.begin(task) for _ in range(2)]
    shown, other = [env.reset() for env in envs]
    alone = make(task).reset()
    assert shown.images[0] is other.images[0] and shown.text == alone.text
    assert shown.images[0].tobytes() == alone.images[0].tobytes()
    [env.step(reply) for env, reply in zip(envs, "ab")]
    assert [env.evidence()["reply"] for env in envs] == ["a", "b"]
    first, second = gym.begin(form), gym.begin(form)
    assert first.reset().images[0] is not second.reset().images[0]


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


# ------------------------------------------------------------------------------ driver and forms

def turns(task, think=False):
    """A demonstration without the further questions about a screen."""
    env = make(task)
    env.reset()
    further = {IMAGE + question for question, _ in env.more}
    return [c for c in demonstrate(task, think) if c[0].text not in further]


@pytest.mark.parametrize("name", gym.names())
def test_demonstrations_are_whole_conversations(name):
    for seed in range(10):
        task = Task(name, seed, seed % 5)
        conversations = demonstrate(task)
        segment = make(task).layout == "segment"
        for conversation in conversations:
            roles = [message.role for message in conversation]
            between = "user" if issubclass(CATEGORIES[name].env, OneShot) else "observation"
            assert roles == ["user", "assistant", *[between, "assistant"] * (len(roles) // 2 - 1)]
            assert len(roles) == 2 or not segment
            assert all(m.text.count(IMAGE) == len(m.images) for m in conversation)
        said = [m.text for c in turns(task) for m in c if m.role == "assistant"]
        replies = play_out(task)[1]
        assert said[:len(replies)] == replies
        if len(replies) == 1:
            questions = [m.text for m in conversations[0] if m.role == "user"]
            assert len(set(questions)) == len(questions) <= 6
            assert not any(m.images for m in conversations[0][1:])
        pickle.dumps(conversations)


@pytest.mark.parametrize("name", gym.names())
def test_thoughts_stand_before_replies_and_change_nothing(name):
    stated = 0
    for seed in range(5):
        task = Task(name, seed, seed)
        plain, aloud = turns(task), turns(task, think=True)
        for reply, thought in zip((c[-1].text for c in plain), (c[-1].text for c in aloud)):
            assert verify.spoken(thought) == verify.spoken(reply)
        stated += "<think>" in aloud[0][1].text
        replies = [m.text for c in aloud for m in c if m.role == "assistant"]
        assert Rewards().score(task, play_out(task, replies)[2]).reward == pytest.approx(1)
    assert stated or CATEGORIES[name].env.tier < 2 or name in ("gui_click", "gui_form")


def test_segments_show_the_goal_the_actions_and_the_current_screen_only():
    task = next(t for s in range(99) if len(turns(t := Task("gui_form", s, 2))) == 4)
    conversations = turns(task)
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
    class Echo(CATEGORIES["counting"].env):
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
    (("counting", 0, 0, "train", -64), "64"), (("counting", 0, 0, "train", 64.0), "64"),
    (("counting", 0, 0, "train", 1025), "1024")])
def test_bad_tasks_are_refused_in_one_line(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        make(Task(*fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [
    "", "show", "show countng", "show point --level 9", "show point --level one", "fly", "check x",
    "play point --pixels 3", "show point --count 0", "show point --out /", "list --wat",
    "check --jobs 0", "bench pont", "bench --pixels 2000 point", "check point --level -1"])
def test_bad_command_lines_end_with_one_line_and_2(line, capsys):
    assert gym.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("name", gym.names())
def test_show_and_play(name, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "sheet.png"
    assert gym.main(["show", name, "--all-levels", "--count", "1", "--out", str(out)]) == 0
    assert Image.open(out).width > 190
    task = Task(name, 4, 1)
    replies = iter(play_out(task)[1])
    monkeypatch.setattr("builtins.input", lambda _: next(replies))
    line = ["play", name, "--seed", "4", "--level", "1", "--out", str(tmp_path / "play.png")]
    assert gym.main(line) == 0
    assert "reward 1.00" in capsys.readouterr().out
    assert (tmp_path / "play.png").exists() == any(m.images for m in demonstrate(task)[0])


def test_the_other_verbs(capsys):
    assert gym.main(["list"]) == 0 and "gui_form" in capsys.readouterr().out
    assert gym.main(["bench", "point", "gui_form", "--count", "3"]) == 0
    assert "median" in capsys.readouterr().out
    line = "play gui_form --seed 4 --level 1 --script".split()
    assert gym.main([*line, "; ".join(play_out(Task("gui_form", 4, 1))[1])]) == 0
    assert "reward 1.00" in capsys.readouterr().out
    assert gym.main("check point ocr_line --level 1 --count 20 --jobs 2".split()) == 0
    assert "the contract holds" in capsys.readouterr().out


def test_a_broken_category_is_found_out(monkeypatch, capsys):
    class Careless(CATEGORIES["counting"].env):
        def make(self):
            obs, gold = super().make()
            return Obs(f"{obs.text} (It is {gold}.)", obs.images), gold

    monkeypatch.setitem(CATEGORIES, "counting", Category(Careless, {"answer": verify.number}))
    row, wrong = contract.examine("counting", 1, count=60)
    assert row["no image"] == 1 and "no image 1.00 is too far above chance" in wrong[0]


def test_a_missing_glyph_is_refused():
    with pytest.raises(ValueError, match="no glyph"):
        Canvas(64, (0, 0, 0)).text("caf\u00e9", 0, 0, (255, 255, 255), 8)


def test_the_readme_shows_a_whole_category(tmp_path):
    """The 25 lines, put where the README says, in a copy of the gym."""
    found = re.search(r"### Your own category.*?```python\n(.*?)```",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    if not found:
        pytest.skip("the README does not say yet")
    assert found[1].count("\n") <= 25
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    shutil.copy(ROOT / "gym.py", tmp_path)
    (tmp_path / "tasks" / "dice.py").write_text(found[1])
    with open(tmp_path / "tasks" / "__init__.py", "a") as table:
        table.write('from . import dice\n'
                    'CATEGORIES["dice"] = Category(dice.Dice, {"answer": verify.number})\n')
    done = subprocess.run([sys.executable, "gym.py", "check", "dice", "--count=60"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_one_shot_category_needs_no_more_than_make():
    assert all(issubclass(c.env, OneShot) or c.env.max_turns > 1 for c in CATEGORIES.values())
