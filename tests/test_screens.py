"""Small screens: what a person sees on them is enough to answer, and they look like people's."""
import os
import sys
from functools import cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest

from gym import make, play_out, Rewards, Task
from tasks.base import box, click, held, IMAGE
from tasks.draw import SHAPES
from tasks.screens import ENDINGS, FORM_GOALS, GOALS, GuiClick, LIST, WORDS
from tasks.verify import parse_action


@cache
def opened(name, level, split="train", count=80):
    """(environment, its first observation) of some tasks. Nothing is done in them, so each is drawn
    once for all tests."""
    envs = [make(Task(name, seed, level, split)) for seed in range(count)]
    return [(env, env.reset()) for env in envs]


def apart(areas) -> bool:
    """Whether boxes lie inside the picture and none touches another."""
    areas = list(areas)
    return (all(0 <= a[0] < a[2] <= 999 and 0 <= a[1] < a[3] <= 999 for a in areas)
            and not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
                        for i, a in enumerate(areas) for b in areas[:i]))


@pytest.mark.parametrize("level", range(5))
def test_widgets_lie_inside_the_picture_and_never_overlap(level):
    for split in ("train", "test"):
        assert all(apart(w.area for w in env.shown) for env, _ in opened("gui_click", level, split))
        assert all(apart(env.areas.values()) for env, _ in opened("gui_form", level, split))


def test_a_goal_fits_one_button_and_calls_it_by_a_colour_only_if_it_has_one():
    for level in (0, 3):
        for env, obs in opened("gui_click", level):
            asked = obs.text.removeprefix(IMAGE)
            fits = [w for w in env.shown for name in w.names()
                    if asked in [goal.format(name) for goal in GOALS]]
            assert len(fits) == 1 and fits[0].area == env.gold["box"]
            assert all(bool(w.color) == (w.kind in ("plate", "outlined")) for w in env.shown)
            assert all(w.label or w.color for w in env.shown)


def test_words_are_held_out_however_they_are_written():
    for split in ("train", "test"):
        labels = {w.label.upper() for level in (0, 2)
                  for env, _ in opened("gui_click", level, split) for w in env.shown}
        words = labels - {"", *(shape.upper() for shape in SHAPES)}
        assert words <= set(WORDS) and len(words) > 8
        assert all(held(word) == (split == "test") for word in words)


def test_clicks_fall_on_a_lattice_at_level_0_only():
    points = [{parse_action(click(env.gold["box"]))[1][0] for env, _ in opened("gui_click", level)}
              for level in (0, 1)]
    assert len(points[0]) <= 8 and len(points[1]) > 30


@pytest.mark.parametrize("name", ["gui_click", "gui_form"])
def test_screens_are_light_and_dark_and_from_level_1_on_of_several_aspects(name):
    for level in (0, 1):
        pictures = [obs.images[0] for _, obs in opened(name, level)]
        light = sum(max(p.getcolors(9999))[1] > (140, 140, 140) for p in pictures)
        assert 10 < light < 70 if level else light == 0
        assert len({p.size for p in pictures}) == (5 if level else 1)
        assert all(p.width * p.height <= 64 * 64 for p in pictures)


def test_questions_about_a_screen_are_of_several_kinds_and_true():
    kinds = {"click": 0, "point": 0, "number": 0, "color": 0, "list": 0}
    for env, obs in opened("gui_click", 1):
        for question, reply in env.more:
            hits = [w for w in env.shown if reply in (click(w.area), box(
                list(map(int, click(w.area)[6:-1].split(", ")))))]
            colors = [w for w in env.shown if w.color and reply == box(w.color)]
            kind = ("list" if question in LIST else "click" if reply.startswith("click") else
                    "point" if "[" in reply else "color" if colors else "number")
            kinds[kind] += 1
            assert kind not in ("click", "point") or len(hits) == 1
            if "How many" in question or "Count" in question:
                assert reply == box(len(env.shown))
    assert min(kinds.values()) > 5


def test_the_goal_of_a_form_names_its_last_button():
    words = set()
    for env, obs in opened("gui_form", 3):
        word = env.buttons["OK"][0]
        listed = " and ".join(filter(None, (", ".join(env.chosen[:-1]), env.chosen[-1])))
        assert obs.text.removeprefix(IMAGE) in [g.format(listed, word) for g in FORM_GOALS]
        assert word != env.buttons["NO"][0]
        words.add(word)
    assert words == {yes for yes, _ in ENDINGS[:-1]}


def test_a_screen_of_any_size_asks_the_same():
    for name in ("gui_click", "gui_form"):
        for seed in range(10):
            for pixels in (0, 100, 256):
                task = Task(name, seed, 1, "train", pixels)
                assert make(task).reset().text == make(Task(name, seed, 1)).reset().text
                assert Rewards().score(task, play_out(task)[2]).reward == 1


@pytest.mark.parametrize("level", range(1, 5))
def test_a_screen_has_as_many_buttons_as_its_level_says(level):
    for split in ("train", "test"):
        shown = [len(env.shown) for env, _ in opened("gui_click", level, split)]
        low, high = GuiClick.widgets[level]
        assert max(shown) == high and sum(n >= low for n in shown) >= 75


def test_a_screen_without_room_is_drawn_again():
    """A long word and large buttons: in this instance no two fit on the first screen."""
    env = make(Task("gui_click", 753578758, 1))
    env.reset()
    assert len(env.shown) > 1
