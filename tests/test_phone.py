"""The simulated phone: its state, its messages, and an oracle that recovers from stray actions."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pytest

from gym import make, play_out, Rewards, Task
from tasks import verify
from tasks.agent import GuidedDevice, GuiMultiApp, GuiNavigate
from tasks.base import box, IMAGE
from tasks.phone import random_device


def phone(seed=0, level=3, **where):
    return GuidedDevice(*random_device(np.random.default_rng(seed), False, level), **where)


def do(device, *actions):
    return [device.act(*verify.parse_action(action)) for action in actions]


def test_a_switch_changes_itself_and_nothing_else():
    world, data = random_device(np.random.default_rng(1), False, 2)
    key = next(key for key, (kind, _) in world["controls"].items() if kind == "switch")
    *path, name = key.split("/")
    device, before = GuidedDevice(world, data, "Settings", path), dict(data["Settings"])
    while way := device.toward("Settings", path, name):
        do(device, way[0][0])
    do(device, device.tap(name))
    assert data["Settings"] == {**before, key: not before[key]}
    do(device, "back()", 'open("Shop")', 'open("Settings")')
    assert device.path == path[:-1] and data["Settings"][key] is not before[key]


def test_a_form_is_filled_in_and_a_record_erased():
    device = phone(app="Notes")
    words, notes = device.world["words"], list(device.data["Notes"])
    assert do(device, 'type("x")') != [None]                    # no field has been clicked
    while way := device.toward("Notes", [words["new"]], words["save"]):
        do(device, way[0][0])
    do(device, device.tap(words["save"]))
    assert device.data["Notes"] == notes                        # empty: not saved
    for field, text in (("Title", "Zed"), ("Text", "12")):
        assert do(device, device.tap(field), f'type("{text}")') == [None, None]
    do(device, device.tap(words["save"]))
    assert device.data["Notes"] == [*notes, ["Zed", "12"]] and device.path == []
    while step := device.step_to({**device.data, "Notes": notes}):
        do(device, step[0][0])
    assert device.data["Notes"] == notes


def test_lists_scroll_and_stop_at_both_ends():
    device = phone(level=4, app="Shop")
    rows = [row.label for row in device.rows()]
    assert len(rows) > device.visible
    do(device, *['scroll("down")'] * 5)
    assert [row.label for _, row in device.in_sight()] == rows[-device.visible:]
    do(device, *['scroll("up")'] * 5)
    assert [row.label for _, row in device.in_sight()] == rows[:device.visible]


def test_an_open_dialog_blocks_everything_else():
    device = phone(app="Shop")
    key = next(key for key, value in device.data["Settings"].items() if value is False)
    device.popup = key
    assert do(device, "back()", 'scroll("down")') == ["a dialog is open"] * 2
    agree, refuse = device.world["words"]["popup"]
    do(device, device.tap(refuse))
    assert device.popup is None and device.data["Settings"][key] is False
    device.popup = key
    do(device, device.tap(agree))
    assert device.popup is None and device.data["Settings"][key] is True


@pytest.mark.parametrize("wrong,told", [
    ("click(1)", "two integers"), ("click(-5, 2000)", "two integers"), ('scroll("left")', "scroll"),
    ('open("Mail")', "open"), ("back(1)", "back"), (f'type("{IMAGE}")', "type"),
    ("fly()", "no such"), (f'remember("{IMAGE}")', "remember"), ("done(1)", "done"),
    ("answer({1, 2})", "answer"), ("click({1}, b'2')", "two integers"), ("nonsense", "no such")])
def test_a_wrong_call_gets_a_one_line_message_and_takes_a_turn(wrong, told):
    env = make(Task("gui_multi_app", 1, 1))
    env.reset()
    before = env.evidence()["state"]
    step = env.step(wrong)
    assert not step.done and step.obs.text.split("\n")[-1].startswith("? ")
    assert told in step.obs.text and step.obs.text.count("\n") == 1
    assert env.evidence()["state"] == before


@pytest.mark.parametrize("kind", [GuiNavigate, GuiMultiApp])
def test_the_oracle_finds_its_way_after_stray_actions(kind):
    name = {GuiNavigate: "gui_navigate", GuiMultiApp: "gui_multi_app"}[kind]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        task = Task(name, seed, 1 + seed % 4)
        env = make(task)
        env.max_turns = 400
        env.begin()
        for _ in range(25):
            env.take(pick_stray(rng, env.device))
        for reply in env.oracle():
            env.take(reply)
        assert Rewards().score(task, env.evidence()).reward == 1, task


def pick_stray(rng, device):
    if rng.integers(6) == 0:
        return ['scroll("down")', "back()", 'open("Notes")', 'open("Shop")'][rng.integers(4)]
    return 'type("Bob")' if device.focus else device.random_click(rng)


def test_an_infeasible_errand_changes_nothing():
    lost = 0
    for seed in range(60):
        task = Task("gui_multi_app", seed, 3)
        _, replies, evidence = play_out(task)
        if replies[-1] == 'done("infeasible")':
            lost += 1
            given_up = play_out(task, ['done("infeasible")'])[2]
            assert given_up["state"] == evidence["state"] == evidence["gold"]
    assert 4 <= lost <= 24


def test_what_is_remembered_stays_in_the_prompt():
    tasks = [Task("gui_multi_app", seed, 2) for seed in range(20)]
    task = next(task for task in tasks if "remember" in str(play_out(task)[1]))
    env = make(task)
    env.reset()
    texts = [env.step(reply).obs for reply in env.oracle()]
    assert 'remember("' in texts[-2].text


def test_a_next_action_is_judged_by_verb_place_and_text():
    clicks = {"click": [(0, 0, 99, 99), (500, 500, 600, 600)], "open": ["Shop"]}
    keys = (verify.key_verb, verify.key_place, verify.key_text)
    for reply, right in (("click(9, 9)", (1, 1, 1)), ("click(550, 550)", (1, 1, 1)),
                         ("click(300, 9)", (1, 0, 1)), ('open("Shop")', (1, 1, 1)),
                         ('open("Notes")', (1, 1, 0)), ("open()", (1, 1, 0)), ("?", (0, 1, 0)),
                         ('open("Shop", "Notes")', (1, 1, 0)), ("back()", (0, 1, 0))):
        assert tuple(key({"reply": reply, "gold": clicks}) for key in keys) == right, reply
    for gold, replies in (
            ({"done": ["infeasible"]}, {"done()": 0, 'done("infeasible")': 1,
                                        'done("Infeasible")': 0}),
            ({"back": [""]}, {"back()": 1, 'back("")': 0}),
            ({"remember": ["3"]}, {'remember("3")': 1, "remember(3)": 0}),
            ({"type": ["Nadia"]}, {'type("Nadia")': 1, 'type("NADIA")': 0}),
            ({"scroll": ["down"]}, {'scroll("down")': 1, 'scroll(" DOWN! ")': 0}),
            ({"answer": ["3"]}, {'answer("3")': 1, "answer(3)": 1, "answer()": 0})):
        assert {reply: verify.key_text({"reply": reply, "gold": gold})
                for reply in replies} == replies


def test_exactly_one_action_for_the_critic_is_wrong():
    for seed in range(20):
        env = make(Task("gui_critic", seed, seed % 5))
        obs = env.reset()
        turn, kind = env.gold.split(", ")
        assert 1 <= int(turn) <= len(obs.images) == obs.text.count(IMAGE)
        assert kind in ("misread", "mis-target", "wrong-next")
        assert verify.exact({"reply": box(env.gold), "gold": env.gold}) == 1
