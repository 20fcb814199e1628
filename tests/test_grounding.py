"""Grounding: expressions that fit exactly one thing, films, viewpoints, and their verifiers."""
import json
import re
from itertools import combinations

import pytest

from gym import make, play_out, Rewards
from tasks import Task, verify
from tasks.base import box, IMAGE
from tasks.grounding import ranked, related, SIDES
from tasks.scenes import by_rows, Item


def stand(*things):
    """Items such as ("red star", column, row), each in the middle of its cell."""
    return [Item(*name.split(), (250 * x + 50, 250 * y + 50, 250 * x + 200, 250 * y + 200))
            for name, x, y in things]


def test_expressions_fit_exactly_one_thing():
    left, right, _ = items = stand(("red star", 0, 1), ("blue star", 3, 1), ("red square", 2, 1))
    assert "first star from the left" in ranked(left, items)
    assert "second star from the left" in ranked(right, items)
    assert not any("top" in call for call in ranked(left, items))           # one row: no rank
    assert related(left, items) == ["star left of the red square"]      # two red ones lie left
    assert related(right, items) == ["star right of the red square"]
    beside, *_ = items = stand(("red star", 0, 0), ("blue star", 0, 3), ("red cross", 2, 0))
    assert not any(call.startswith("star left") for call in related(beside, items))


def test_orders_are_asked_only_where_they_are_clear():
    left, right = items = stand(("red star", 1, 0), ("blue star", 1.2, 2))
    assert ranked(left, items) == ["first star from the top", "second star from the bottom"]
    anchor = stand(("pink cross", 3, 0.4))
    assert "star left of the pink cross" not in related(left, items + anchor)   # nor is the other
    askew = stand(("red star", 1, 1), ("pink cross", 3, 2.9), ("blue star", 3.1, 0))
    assert not any(call.endswith("pink cross") for call in related(askew[0], askew))


def test_things_are_listed_row_by_row():
    names = "red star", "blue star", "pink cross", "green circle"
    places = (2, 0.2), (0, 0.3), (3, 0), (0, 1.2)
    listed = by_rows(stand(*((name, *at) for name, at in zip(names, places))), lambda i: i.area)
    assert [item.name for item in listed] == [names[i] for i in (1, 0, 2, 3)]


@pytest.mark.parametrize("level", range(5))
def test_a_box_on_every_cell_earns_nothing(level):
    cells = [[250 * x + 35, 250 * y + 35, 250 * x + 215, 250 * y + 215]
             for x in range(4) for y in range(4)]
    for name in ("ground_box", "ground_multi", "spot_diff"):
        for seed in range(20):
            task = Task(name, seed, level)
            evidence = play_out(task, [box(cells)])[2]
            assert Rewards().score(task, evidence).reward == 0


def test_crowded_scenes_terminate_and_things_never_touch():
    for seed in range(300):                 # in a few of these nothing at first tells it apart
        make(Task("ground_box", seed, 4)).reset()
    for seed in range(50):
        env = make(Task("ground_multi", seed, seed % 5))
        width, height = env.reset().images[0].size
        corners = [[round(c * side / 999) for c, side in zip(area, (width, height) * 2)]
                   for area in env.shown[0]]
        assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, y0, x1, y1 in corners)
        for a, b in combinations(corners, 2):           # a pixel of the ground lies between them
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_the_pictures_differ_in_the_gold_boxes_and_nowhere_else():
    for seed in range(20):
        env = make(Task("spot_diff", seed, 2, pixels=256))
        images = env.reset().images
        (first, second), (width, height), seen = [i.load() for i in images], images[0].size, set()
        for y in range(height):
            for x in range(width):
                if first[x, y] != second[x, y]:
                    at = (x + 0.5) * 999 / width, (y + 0.5) * 999 / height
                    seen.add(next(i for i, b in enumerate(env.gold) if verify.inside(at, b)))
        assert seen == set(range(len(env.gold)))


def test_a_film_shows_what_its_answers_say():
    for seed in range(30):
        env = make(Task("video_events", seed, 0))
        obs = env.reset()
        assert obs.text.startswith(f"{IMAGE}1 {IMAGE}2 {IMAGE}3 {IMAGE}4\n")
        frames = [image.tobytes() for image in obs.images]
        changes = [i + 1 for i in range(1, 4) if frames[i] != frames[i - 1]]
        assert changes == [int(n) for n in re.findall(r"frame (\d+)", env.why)]


def test_orders_and_frames_have_their_own_verifier():
    assert verify.moment({"reply": box("red, blue, pink"), "gold": ["red", "pink", "blue"]}) == 0.5
    assert verify.moment({"reply": box("red, red, pink"), "gold": ["red", "pink", "blue"]}) == 0
    assert [verify.moment({"reply": box(text), "gold": 7}) for text in ("7", "6-8")] == [1, 0]


def test_sides_are_those_of_the_arrow():
    for level, ways in ((1, {"up"}), (3, {"left", "right", "down"})):
        looks = set()
        for seed in range(40):
            env = make(Task("spatial_relation", seed, level))
            env.reset()
            way = re.match(r"The arrow looks (\w+)\.", env.why).group(1)
            looks.add(way)
            found = re.search(r"Its (.+) is (.+) in the picture", env.why)
            if found and way == "right":
                side, sky = found.groups()
                turned = dict(zip(SIDES, ("right", "down right", "down", "down left", "left",
                                          "up left", "up", "up right")))
                assert turned[side] == sky
        assert looks == ways


def test_json_is_judged_by_attribute():
    env = make(Task("scene_to_json", 3, 3))
    env.reset()
    told = json.loads(verify.boxed(env.reply(env.gold)))

    def score(answer):
        return verify.match_things({"reply": box(json.dumps(answer)), "gold": env.gold})

    assert score(told) == score(told[::-1]) == 1 and len(told) >= 4
    wrong = [{**told[0], "color": "grey"}, *told[1:]]
    assert score(wrong) == 1 - 1 / (4 * len(told))
    assert score(told[1:]) == pytest.approx(2 * (len(told) - 1) / (2 * len(told) - 1))
    assert score(told + told) == pytest.approx(2 / 3)               # each truth is matched once
    assert score([{**thing, "at": [0, 0]} for thing in told]) == 0
    everywhere = [{**told[0], "at": [250 * x + 125, 250 * y + 125]}
                  for x in range(4) for y in range(4)]
    assert score(everywhere) == 0
    for broken in (told[0], [*told, 5], [{**told[0], "more": 1}], [{**told[0], "at": [True, 5]}],
                   [{**told[0], "at": [5, 1000]}], [{**told[0], "size": None}], 20 * told):
        assert score(broken) == 0
    twice = '[{"color":"red","color":"blue","shape":"star","size":"big","at":[1,1]}]'
    for text in ("[" * 3000, "[NaN]", "1e999", twice, "", "9" * 3999):
        assert verify.parse_things(text) is None
