"""The invented worlds, the tools, and that the tasks can't be solved without them."""
import re

import pytest

from gym import make, play_out, Rewards
from tasks import Task
from tasks.atlas import atlas_text, FACTS, world
from tasks.tools import calc, call


def reward(task, policy=None):
    return Rewards().score(task, play_out(task, policy)[2]).reward


def fresh(name, seed, level, **more):
    env = make(Task(name, seed, level, **more))
    return env, env.reset()


# ---- the world ----------------------------------------------------------------------------------

def test_a_world_is_closed_and_its_emblems_differ():
    there, other = world(), world(0, True)
    assert not there.pages.keys() & other.pages.keys() and 180 < len(there.pages) < 220
    for page in there.pages.values():
        for fact, (of, _) in FACTS[page.kind].items():
            assert of not in FACTS or there.pages[page.facts[fact]].kind == of
    for country in there.named["country"]:
        assert there.pages[there.pages[country].facts["capital"]].facts["country"] == country
    drawn = [page.emblem for page in there.pages.values() if page.emblem]
    assert len(set(drawn)) == len(drawn) == 96


def test_searches_find_the_page_and_its_twin():
    there = world(5)
    for page in there.pages.values():
        year = page.facts[next(fact for fact in page.numbers)]
        assert there.search(f"{page.kind} {year}")[0] is page
        if page.emblem:
            found = there.similar(page.emblem)
            assert page in found and len(found) == 4 == len({other.name for other in found})
            shared = [sum(map(str.__eq__, page.emblem, other.emblem)) for other in found]
            assert sorted(shared)[-2] == 4         # its twin: all but one thing the same
    assert there.search("zzz ???") == [] and there.search("") == []


def test_only_the_atlas_text_describes_flags_in_words():
    n = len(world().pages)
    for i, page in enumerate(world().pages.values()):
        for text in (atlas_text(i), atlas_text(i + n)):
            assert all(page.tell(fact) in text for fact in page.facts)
            assert page.emblem is None or page.describe_emblem() in text
        assert not re.search(r"\b(flag|emblem|red|blue|star)\b", page.text)
    assert atlas_text(0) != atlas_text(n) and atlas_text(3) == atlas_text(3)


def test_training_never_asks_what_is_held_out():
    def asked(split):
        found = set()
        for seed in range(300):
            env, obs = fresh("world_knowledge", seed, seed % 3, split=split)
            turns = [obs.text, *(question for question, _ in env.more)]
            found |= {(env.pages[0].name, text.replace("<|image|>", "")) for text in turns}
        return found
    assert not asked("train") & asked("test")


# ---- the tools ----------------------------------------------------------------------------------

@pytest.mark.parametrize("text,value", [
    ("3*(4+5)", "27"), ("7/2", "3.5"), ("6/3", "2"), ("-2 + 1", "-1"), ("1900 - 1456", "444"),
    ("2**9", None), ("1e999", None), ("9" * 300, None), ("1/0", None), ("a", None), ("", None),
    ("'a'*9", None), ("(" * 300, None), ("1j", None), ("True", None), ("\0", None), ("1;2", None)])
def test_calc(text, value):
    assert calc(text) == value


def test_wrong_calls_say_so_and_cost_a_turn():
    env, obs = fresh("image_mining", 0, 2)
    for text in ("crop(1, 2, 3)", "crop(5, 5, 9, 9)", "crop(0, 0, 999, 40)", "crop(900, 0, 0, 9)",
                 "zoom(1, 1000)", "zoom('a', 2)", "open(3)", "open('nowhere')", "fly()",
                 "search_image(0, 0, 999, 999)", "draw_point(3, 3)"):
        step = env.step(text)
        assert not step.done and step.obs.images == [] and len(step.obs.text) > 9
    end = env.step("<|image|>" * 99)
    assert end.done and end.truncated and end.obs is None and env.step("answer('1')").done
    assert env.evidence()["answer"] is None


def test_answers_that_list_or_nest_earn_nothing():
    for name in ("visual_tools", "text_tools", "image_mining"):
        task = Task(name, 3, 1)
        *way, last = play_out(task)[1]
        gold = play_out(task)[2]["gold"]["answer"]
        for said in (f"{gold} or 12", f"{gold}, 12", "10-99", f"<|begin_of_box|>{gold}", ""):
            assert reward(task, [*way, call("answer", said)]) == 0
        assert reward(task, [*way, f"answer({gold})"]) == 1         # an integer is as good


# ---- what fails, and without what ---------------------------------------------------------------

@pytest.mark.parametrize("pixels", [128, 1024])
def test_fine_print_is_seen_in_crops_only(pixels):
    for level in (0, 4):
        env, _ = fresh("visual_tools", 1, level, pixels=pixels)
        env.step("draw_box(0, 0, 999, 999)")
        assert env.log == [["draw_box"]]                            # all of it, and nothing read
        env.step(call("zoom", *env.spots[0]))
        assert env.log[1] == ["zoom", "card 0"]


def test_a_reader_of_legible_text_needs_the_crop():
    """A solver that answers with a number it has seen, and with 50 where it has seen none."""
    def solver(cropping):
        def policy(env, messages):
            if cropping and not env.log:
                return call("zoom", *env.spots[0])
            seen = [int(name[5:]) for turn in env.log for name in turn[1:]]
            return call("answer", str(env.values[seen[0]] if seen else 50))
        return policy
    tasks = [Task("visual_tools", seed, 1) for seed in range(20)]
    assert [reward(task, solver(True)) for task in tasks] == [1] * 20
    assert sum(reward(task, solver(False)) for task in tasks) <= 1


MINED = [Task("image_mining", seed, level, split) for seed, level in enumerate((0, 1, 2, 3, 4) * 2)
         for split in ("train", "test")]


def gold(task):
    return play_out(task)[2]["gold"]["answer"]


def test_mining_fails_without_tools_and_from_memory():
    for task in MINED:
        assert reward(task) == 1
        assert reward(task, [call("answer", gold(task))]) == 0      # said, but seen nowhere
    env, _ = fresh("image_mining", 0, 0)
    other, _ = fresh("image_mining", 1, 0)
    other.world, other.pages = env.world, env.pages     # the same pages in two tasks: other signs
    assert sum(env.scene(name)[0] == other.scene(name)[0] for name in env.pages) < 10


def test_mining_fails_without_the_image():
    """Who looks at another card, or at none, can't know, even if the rest of the way is right."""
    for task in MINED:
        env, _ = fresh("image_mining", task.seed, task.level, split=task.split)
        way = play_out(task)[1]
        assert reward(task, [call("zoom", *env.spots[1]), *way[1:]]) == reward(task, way[1:]) == 0


def test_mining_fails_by_text_search_alone():
    """Signs are numbers of three digits, and no text of any page has one."""
    def searcher(env, messages):
        if len(env.log) == 11:
            return call("answer", re.findall(r"\d+", messages[-1].text + " 0")[0])
        if len(env.log) % 2 == 0:
            words = re.findall(r"\w+", messages[0].text)[len(env.log):]
            return call("search_text", " ".join(words[:20]))
        return call("open", messages[-1].text.removeprefix("Pages: ").split(" (")[0])
    for task in MINED:
        assert reward(task, searcher) == 0
        env, _ = fresh("image_mining", task.seed, task.level, split=task.split)
        assert not any(re.search(r"\b\d{3}\b", page.text) for page in env.pages.values())


def test_the_oracle_opens_only_pages_that_it_was_shown():
    for name in ("image_mining", "text_tools"):
        for seed in range(10):
            env, obs = fresh(name, seed, seed % 5)
            shown = obs.text + (env.route[0][0] if env.first and env.level < 2 else "")   # a card
            for reply in env.oracle():
                if reply.startswith("open"):
                    assert re.search(r'"(\w+)"', reply)[1] in shown
                shown += getattr(env.step(reply).obs, "text", "")
