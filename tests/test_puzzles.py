"""Puzzles and geometry: exactly one answer, rules that are executed, no leaks."""
import sys
from collections import Counter
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest

from gym import make
from tasks import Task, verify
from tasks.base import box
from tasks.geometry import Figure, pythagoras
from tasks.puzzles import pack_rows, patterns, shortest, sudokus, VALUES


def instances(name, level, count=40):
    for seed in range(count):
        env = make(Task(name, seed, level, ("train", "test")[seed % 2]))
        env.reset()
        yield env


# Two by three crossings with every road open.
TOWN = {"start": (0, 0), "goal": (1, 1), "moves": ["right", "down"],
        "roads": [(1, 0), (2, 1), (0, 1), (1, 2), (0, 3), (1, 4), (2, 3)]}


@pytest.mark.parametrize("moves,score", [
    ("right, down", 1), ("Down, Right.", 1), ("down,right", 1),
    ("down, down, right, up", 0), ("right, left", 0),
    ("right, down, left, right", 0), ("right, right, down", 0), ("up", 0), ("right down", 0),
    ("right, down or not", 0), ("", 0), ("right, " * 50 + "down", 0)])
def test_routes_are_executed(moves, score):
    assert verify.route({"reply": box(moves), "gold": TOWN}) == score


def test_a_longer_route_earns_less():
    far = {**TOWN, "goal": (1, 2), "moves": ["down", "down", "right"]}
    assert verify.route({"reply": box("right, down, down"), "gold": far}) == 1
    loop = box("right, left, down, down, right")
    assert verify.route({"reply": loop, "gold": far}) == pytest.approx(1 / 3)
    with pytest.raises(KeyError):
        verify.route({"reply": loop, "gold": {}})


def test_from_level_2_on_the_direct_route_is_barred():
    for env in instances("map_route", 2):
        (x, y), (u, v) = env.gold["start"], env.gold["goal"]
        assert len(env.gold["moves"]) > abs(x - u) + abs(y - v)
        assert shortest((x, y), env.gold["roads"])[u, v] == env.gold["moves"]


def completions(rows, values):
    """The last values that a person may find, reading a matrix by rows or by columns."""
    found = set()
    for grid in (rows, list(map(list, zip(*rows)))):
        if all(row[0] == row[1] == row[2] for row in grid[:2]) and grid[2][0] == grid[2][1]:
            found.add(grid[2][0])
        sets = [sorted(row, key=str) for row in grid[:2]]
        if sets[0] == sets[1] and len({*sets[0]}) == 3 and {*grid[2][:2]} < {*sets[0]}:
            found |= {*sets[0]} - {*grid[2][:2]}
        if not isinstance(values[0], int) and values[0] != "small":
            continue
        at = [[values.index(value) for value in row] for row in grid]
        steps = {row[i + 1] - row[i] for row in at[:2] for i in range(2)} | {at[2][1] - at[2][0]}
        if len(steps) == 1 and 0 not in steps and 0 <= 2 * at[2][1] - at[2][0] < len(values):
            found.add(values[2 * at[2][1] - at[2][0]])
    return found


@pytest.mark.parametrize("rule,name", [(rule, name) for rule in ("all", "rows", "three", "step")
                                       for name in VALUES if rule != "step" or name in
                                       ("size", "number")])
def test_a_matrix_has_one_completion(rule, name):
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = pack_rows(rng, rule, VALUES[name])
        assert completions(rows, VALUES[name]) == {rows[2][2]}, rows


@pytest.mark.parametrize("level", [0, 4])
def test_the_choices_alone_give_nothing_away(level):
    """The majority of each respect, or what is most common among right answers, is no help."""
    right, letters, n = 0, Counter(), 200
    learned = Counter((name, env.right[name]) for env in instances("matrix_puzzle", level, n)
                      for name in env.right)
    for env in instances("matrix_puzzle", level, n):
        counts = {name: Counter(look[name] for look in env.choices) for name in env.right}
        assert all(len({*count.values()}) == 1 for count in counts.values())
        scores = [sum(learned[item] for item in look.items()) for look in env.choices]
        right += env.choices[scores.index(max(scores))] == env.right
        letters[env.gold] += 1
        assert len({str(look) for look in env.choices}) == len(env.choices)
    assert right / n < 2 ** -env.respects[level] + 0.1
    assert max(letters.values()) / n < 2 ** -env.respects[level] + 0.1


def test_all_sudokus_and_all_lines():
    assert sudokus().shape == (288, 16)
    assert sum(map(len, patterns(4).values())) == 16 and patterns(4)["[1, 1]"] == [
        "0101", "1001", "1010"]


@pytest.mark.parametrize("level", range(5))
def test_grids_have_one_solution_and_show_every_sign(level):
    for env in instances("grid_logic", level):
        gold, n = env.gold, env.gold["size"]
        if gold["once"]:
            assert {*gold["givens"].values()} == {*gold["signs"]}
            grids = ([gold["signs"][i] for i in grid] for grid in sudokus())
        else:
            grids = product("01", repeat=n * n) if n == 3 else ()
        fits = [g for g in grids if verify.grid({"reply": env.reply({**gold, "cells": g}),
                                                 "gold": gold})]
        assert n == 4 and not gold["once"] or fits == [type(fits[0])(gold["cells"])]


def test_any_grid_that_keeps_the_rules_is_right():
    two = {"size": 2, "signs": ["0", "1"], "givens": {}, "once": [],
           "runs": [((0, 1), [1]), ((2, 3), [1]), ((0, 2), [1]), ((1, 3), [1])]}
    score = lambda text: verify.grid({"reply": box(text), "gold": two})
    assert score("1 0 / 0 1") == score("0 1/1 0") == 1
    for text in ("1 0 / 1 0", "1 0 0 1", "10 / 01", "1 0 / 0 1 / 0 0", "1 0 / 0 x", "", "/"):
        assert score(text) == 0


def test_every_kind_of_figure_finds_room_for_its_labels():
    for kind in {kind for level in Figure.kinds for kind in level}:
        rng, settled = np.random.default_rng(1), 0
        for _ in range(60):
            figure = Figure(rng, False, kind.__name__)
            question, answer, why = kind(figure)
            assert type(answer) is int and 0 < answer < 2000 and str(answer) in why
            for label, spot in figure.place_labels() or ():
                settled += 1
                assert 1 < spot.real < 63 and 1 < spot.imag < 63
        assert settled > 5, kind.__name__


def test_the_steps_add_up():
    assert pythagoras(3, 4, 5, 0) == "5^2 - 4^2 = 25 - 16 = 9 = 3^2."
    assert pythagoras(3, 4, 5, 2) == "3^2 + 4^2 = 9 + 16 = 25 = 5^2."
    for level in range(5):
        for env in instances("geometry", level, 30):
            last = env.why.rstrip(".").split(". ")[-1].partition(": ")
            sum_, *_, answer = (last[2] or last[0]).removesuffix(" at the centre").split(" = ")
            if "^" not in answer:
                assert eval(sum_.replace("x", "*")) == int(answer) == env.gold
