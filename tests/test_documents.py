"""Documents: nothing is cut off at any size, and reading in the wrong order or place earns less."""
import re

import numpy as np
import pytest

from gym import make, play_out, Rewards
from tasks import CATEGORIES, Task, verify
from tasks.base import box, IMAGE


@pytest.mark.parametrize("category", ["ocr_document", "table_read", "doc_qa"])
@pytest.mark.parametrize("pixels", [256, 301, 640])
def test_nothing_reaches_the_edge_of_the_paper(category, pixels):
    for seed in range(30):
        for image in make(Task(category, seed, seed % 5, "test", pixels)).reset().images:
            pixel = np.asarray(image)
            rim = np.concatenate([pixel[:4].reshape(-1, 3), pixel[-4:].reshape(-1, 3),
                                  pixel[:, :4].reshape(-1, 3), pixel[:, -4:].reshape(-1, 3)])
            assert (rim == rim[0]).all()


def test_columns_come_one_after_another():
    for level, whole in ((0, True), (1, True), (2, False), (4, False)):
        for seed in range(20):
            env = make(Task("ocr_document", seed, level))
            env.reset()
            assert sorted(env.shown[0].split()) == sorted(env.gold.split())
            assert (env.shown[0] == env.gold) is whole


def test_reading_is_scored_by_the_longest_common_subsequence():
    def score(text):
        return verify.reading({"reply": box(text), "gold": "a b c d e"})
    assert score("a b c d e") == 1 and score("a b c d") == 0.8
    assert score("c d e a b") == 0.6 and score("a x b c d e") == pytest.approx(5 / 6)
    assert score("e d c b a") == score("") == score("a b c d e " * 5) == score("a, b, c, d, e") == 0


def test_the_bit_parallel_edit_distance_equals_the_table():
    def table(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            last, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
        return row[-1]
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = ("".join(map(chr, 97 + rng.integers(3, size=rng.integers(90)))) for _ in "ab")
        assert verify.distance(a, b) == table(a, b)


def test_a_value_needs_its_page():
    gold = {"value": 57, "page": 12}
    for text, score in (("57, page 12", 1), ("57,page 12.", 1), ("57, page 11", 0.5), ("57", 0),
                        ("58, page 12", 0), ("57, page 12, page 11", 0), ("57, page 11 or 12", 0),
                        ("page 12", 0), ("57, 12", 0)):
        assert verify.cited({"reply": box(text), "gold": gold}) == score, text


def test_each_price_occurs_once_in_all_pages():
    for seed in range(30):
        env = make(Task("doc_qa", seed, seed % 5))
        obs = env.reset()
        prices = [one["value"] for one in env.shown]
        assert len(set(prices)) == len(prices) and len(obs.images) == env.pages[seed % 5]
        assert env.gold in env.shown
        assert str(env.gold["page"]) in env.why


@pytest.mark.parametrize("level", range(5))
def test_replaying_the_story_gives_the_same_answer(level):
    for seed in range(30):
        task = Task("interleaved_qa", seed, level)
        env = make(task)
        text = env.reset().text
        *told, question = text.replace(f"bag {IMAGE}", "bag").split(". ")
        holds = {}
        for words in map(str.split, told):
            if "swap" in words:
                a, b = words[0], words[2]
                holds[a], holds[b] = holds[b], holds[a]
            else:
                holds[words[0]] = words[0]
        [asked] = holds.keys() & set(re.findall(r"\w+", question))
        first = env.why.split(" had:")[0].split()[-1]
        assert holds[asked] == first and env.gold in env.why and len(holds) == env.people[level]
        assert Rewards().score(task, play_out(task)[2]).reward == 1


def test_all_cells_of_a_column_differ():
    for seed in range(30):
        env = CATEGORIES["table_read"].env(Task("table_read", seed, seed % 5))
        env.reset()
        for cells in env.cells.values():
            assert len(set(cells)) == len(cells)
