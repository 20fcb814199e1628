"""lib/scoring.py: each metric against values computed by hand, and replies that can't be read."""
import math

import pytest

from lib import scoring
from lib.scoring import checked, score
from tasks.base import box
from tasks.verify import hacks, iou


@pytest.mark.parametrize("metric,reply,answers,expected", [
    ("exact", box("A Dog."), ["a dog"], 1),
    ("exact", "<think>a cat?</think>\n a  dog", ["cat", "a dog"], 1),
    ("exact", "a dog and a cat", ["a dog"], 0),
    ("exact", "<think>a dog", ["a dog"], None),             # the thought is not closed
    ("exact", " ", ["a dog"], None),
    ("relaxed", "It is about 41 %.", ["40"], 1),            # 40 +- 1
    ("relaxed", "41.1", ["40"], 0),
    ("relaxed", "$1,530", ["1,500"], 1),                    # 1500 +- 37.5
    ("relaxed", "1530", ["1500"], 0),                       # may be a year
    ("relaxed", "-0.41", ["-.4"], 1),
    ("relaxed", "between 39 and 41", ["40"], None),
    ("relaxed", "2010-2015", ["2010"], None),
    ("relaxed", "many", ["40"], None),
    ("relaxed", "Many", ["many"], 1),
    ("relaxed", "forty", ["40", "forty"], 1),
    ("relaxed", "40.5", ["forty", "40"], 1),
    ("relaxed", "0", ["0"], 1),
    ("anls", "Helo", ["hello"], 0.8),                       # 1 edit of 5
    ("anls", "hat", ["what time"], 0),                      # 6 edits of 9: 1/3 < 0.5
    ("anls", "abcd", ["abxy"], 0.5),
    ("anls", "hello", ["help", "hello world"], 0.6),        # 2 of 5; 6 of 11
    ("anls", "", ["hello"], None),
    ("contains", "It says\nHello  World!", ["hello world"], 1),
    ("contains", "Helo", ["hello"], 0),
    ("contains", "", ["a"], None),
    ("contains-formula", "x = \\frac {1} {2}", ["x=\\frac{1}{2}"], 1),
    ("contains-formula", "X=1", ["x = 1"], 0),
    ("iou", box("[[0, 0, 10, 10]]"), [[0, 0, 10, 10]], 1),
    ("iou", "(0, 0, 10, 10)", [[5, 0, 15, 10]], 50 / 150),
    ("iou", "[0, 0, 10, 10]", [[20, 20, 30, 30], [0, 0, 10, 5]], 0.5),
    ("iou", "[0, 0, 10, 10] or [1, 1, 9, 9]", [[0, 0, 10, 10]], None),
    ("iou", "[10, 10, 10, 20]", [[0, 0, 10, 10]], None),
    ("iou", "[0, 0, 10]", [[0, 0, 10, 10]], None),
    ("point-in-box", "click(412, 377)", [[400, 370, 412, 380]], 1),
    ("point-in-box", box("[413, 377]"), [[400, 370, 412, 380]], 0),
    ("point-in-box", "I click at (5,5).", [[0, 0, 1, 1], [5, 5, 6, 6]], 1),
    ("point-in-box", "click(1e9, 1)", [[0, 0, 999, 999]], None),
    ("point-in-box", "[1, 1], [2, 2]", [[0, 0, 999, 999]], None),
    ("point-in-box", "click(412, 1377)", [[0, 0, 999, 999]], None),
])
def test_a_metric_by_hand(metric, reply, answers, expected):
    assert score(metric, reply, answers) == (expected if expected is None
                                             else pytest.approx(expected))


@pytest.mark.parametrize("reply,letter", [
    ("B", "B"), ("(b)", "B"), ("B. a cat", "B"), ("B: a cat, A: a dog", "B"), ("A bird", None),
    ("The answer is (B).", "B"), ("Answer: A", "A"), ("**B**", "B"), ("Option B", "B"),
    ("Option A is wrong: the correct option is B.", "B"),
    ("a CAT", "B"), ("D", None), ("", None),
    ("Both", None), ("I think that it is a dog", None)])
def test_the_letter_of_a_reply(reply, letter):
    choices = ["a dog", "a cat", "both of them"]
    assert scoring.letter_of(reply, choices) == letter
    assert score("choice", reply, ["B"], choices) == (None if letter is None else letter == "B")
    assert score("choice", reply, ["a cat"], choices) == score("choice", reply, ["B"], choices)


@pytest.mark.parametrize("metric", scoring.METRICS)
def test_no_reply_makes_a_metric_raise_and_no_hack_pays(metric):
    """The hacks of the gym's verifiers: lists, ranges, several boxes, calls with odd arguments."""
    gold = {"iou": [[300, 300, 310, 310]], "point-in-box": [[300, 300, 310, 310]], "choice": ["Q"]}
    for reply in hacks(box("nothing"), "What number?"):
        if len(reply) < 10_000:     # a model's are short
            assert (score(metric, reply, gold.get(metric, ["47"])) or 0) < 0.01


@pytest.mark.parametrize("metric,answers,choices,reason", [
    ("iou", [5, 5, 4, 9], (), "no box"), ("iou", ["a"], (), "no box"), ("iou", [], (), "no box"),
    ("point-in-box", [[0, 0, 1000, 5]], (), "no box"), ("iou", [True, 0, 5, 5], (), "no box"),
    ("exact", [], (), "empty"), ("exact", " ", (), "neither"), ("exact", None, (), "neither"),
    ("exact", True, (), "neither"), ("relaxed", [["a"]], (), "neither"),
    ("choice", "E", ["a", "b", "c", "d"], "none of the choices"),
    ("choice", "some words", (), "none of the choices")])
def test_answers_that_a_metric_can_not_use(metric, answers, choices, reason):
    with pytest.raises(ValueError, match=reason):
        checked(metric, answers, choices)


def test_answers_may_be_one_or_several():
    assert checked("iou", [0, 0, 5, 5.5]) == [[0, 0, 5, 5.5]] == checked("iou", [[0, 0, 5, 5.5]])
    assert checked("relaxed", 40) == ["40"] and checked("exact", ["a", 1.5]) == ["a", "1.5"]
    assert checked("choice", "b", ["x", "y"]) == ["b"]


def test_chance():
    assert scoring.chance("choice", ["A"], ["x", "y", "z", "w"]) == 0.25
    assert scoring.chance("choice", ["A", "B"], ["x", "y", "z", "w"]) == 0.5    # either is right
    assert scoring.chance("exact", ["3", "three"], ["one", "three", "4"]) == pytest.approx(1 / 3)
    assert scoring.chance("exact", ["a"]) is None
    assert scoring.chance("point-in-box", [[0, 0, 99, 9.5]]) == 100 * 10 / 1e6
    assert scoring.chance("point-in-box", [[0, 0, 999, 999], [0, 0, 9, 9]]) == 1
    assert scoring.chance("point-in-box", [[0, 0, 99, 99], [50, 0, 149, 99]]) == 0.015


@pytest.mark.parametrize("share,n,low,high", [
    (0.8, 10, 0.490, 0.943), (0.0, 10, 0.0, 0.278), (1.0, 10, 0.722, 1.0), (0.5, 4, 0.150, 0.850)])
def test_wilsons_interval(share, n, low, high):
    """Values of a table: 8 of 10 is 49.0% to 94.3%; 0 of 10 is 0 to 27.8%."""
    found, half = scoring.interval(share, n), 1.96 * math.sqrt(share * (1 - share) / n)
    assert found != pytest.approx((share - half, share + half), abs=5e-4), (
        "this is the normal interval: its standard error is that of the observed share")
    assert found == pytest.approx((low, high), abs=5e-4)
    assert 0 <= found[0] and found[1] <= 1, "a share is never below 0 nor above 1"
    if 0 < share < 1:       # both ends are the shares from which `share` is 1.96 errors away
        for p in found:
            assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), rel=1e-3)


@pytest.mark.parametrize("a,b,expected", [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1), ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
    ((0, 0, 10, 10), (2, 3, 4, 8), 10 / 100), ((0, 0, 10, 10), (5, 6, 20, 16), 20 / 230),
    ((0, 0, 10, 10), (20, 20, 30, 30), 0), ((0, 0, 10, 10), (0, 20, 10, 30), 0),
    ((0, 0, 10, 10), (10, 0, 20, 10), 0), ((5, 5, 5, 9), (5, 5, 5, 9), 0)],
    ids=["equal", "shifted", "inside", "corner", "apart", "below", "touching", "no-area"])
def test_iou_by_hand(a, b, expected):
    """Boxes are (left, top, right, bottom)."""
    assert iou(a, b) == pytest.approx(expected), f"of {a} and {b}"
    assert iou(b, a) == pytest.approx(expected), f"of {b} and {a}, the same in the other order"
