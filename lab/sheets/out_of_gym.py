"""What a model learned on the gym's screens works on the same screens drawn by a browser.

The paper's model learns to act in environments and is meant for real screens [C]. Ours has only
seen what the gym draws. So the least that can be asked is whether it clicks as well where a browser
draws the same buttons at the same places, with other pixels at all edges and letters.

`ckpt/demo` clicks on held-out screens of `gui_click`, level 0: as the gym draws them, as Chromium
draws them (lab/out_of_gym.py), and, for comparison only, as Chromium draws them on a white page,
which the gym never shows at this level. A seed is a set of 300 screens, the same ones for all
three; no two seeds have one in common. `right` is the percent of clicks in the named button.

This sheet needs Chromium: on Debian `apt-get install chromium`.
"""
from data import task_pixels
from lab.out_of_gym import ask, find_browser, score, screens_of
from lab.sheet import NoLoss, Sheet
from sample import load
from tasks.base import Task

COUNT = 300


def measure(arm, seed, folder):
    browser = find_browser()
    model, tokens, _ = load("ckpt/demo", "cpu", "float32")
    side, first = task_pixels("gui_click", model.config), 1_000_000 + COUNT * seed
    tasks = [Task("gui_click", first + i, 0, "test", side) for i in range(COUNT)]
    screens, pictures = screens_of(arm, tasks, browser, folder)
    found = score(screens, ask(model, tokens, [screen.goal for screen in screens], pictures))
    return {"right": found["right, %"], "no click": found["no click, %"]}


SHEET = Sheet(
    arms=("gym", "browser", "white page"), measure=measure, minutes=1,
    equal=f"ckpt/demo, {COUNT} held-out screens, greedy replies",
    tests=(NoLoss("right clicks, points, browser minus gym",
                  lambda runs: runs["browser"]["right"] - runs["gym"]["right"], claimed=5,
                  source="[O] one click in twenty; the paper has no figure"),))
