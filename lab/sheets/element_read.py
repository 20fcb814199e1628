"""A model that reads an element rightly also points at it rightly: perception is the foundation.

The first of the paper's three lenses says that perception stays the foundation of what an agent can
do, and its tiers lead from reading single elements to grounding and to actions [C]. If so, a model
should hit an element more often where it can say what the element looks like.

`ckpt/gym` sees held-out drawings of `point`, level 0, with three things. It points at one of them
as it is asked to; and, in another conversation, it answers a question of `shape_attr` about the
same thing: what colour the square is, or what shape the red one is where there are two squares. It
learned both. Drawings stand in for screens, since about buttons it learned no question that it
could answer: asked about the icons of `gui_click` it guesses, and `ckpt/demo`, which guesses less,
clicks on all of them rightly. A seed is a set of 3,000 tasks, of which about 900 have three things;
no two seeds have one in common.

The effect compares drawings that are easy for the model with hard ones. So it shows that reading
and pointing go together, and not that better reading would make it point better.
"""
import gym
from data import task_pixels
from lab.out_of_gym import ask
from lab.sheet import Gain, Sheet
from lib.scoring import score
from sample import load
from tasks.base import IMAGE, Task
from tasks.scenes import COLOR_OF, SHAPE_OF

COUNT, THINGS = 3000, 3


def drawing(task):
    """(goal, picture, target, question about it, answer) of a task of `point`, or None where it has
    not three things, or the question could mean two of them."""
    env = gym.make(task)
    obs = env.reset()
    target, *others = env.items
    if len(others) != THINGS - 1:
        return None
    if target.shape not in [item.shape for item in others]:
        question = COLOR_OF[0].format(target.shape), target.color
    elif target.color not in [item.color for item in others]:
        question = SHAPE_OF[0].format(target.color), target.shape
    else:
        return None
    return obs.text.replace(IMAGE, ""), obs.images[0], target, *question


def measure(arm, seed, folder):
    model, tokens, _ = load("ckpt/gym", "cpu", "float32")
    side, first = task_pixels("point", model.config), 1_000_000 + COUNT * seed
    found = [drawing(Task("point", first + i, 0, "test", side)) for i in range(COUNT)]
    goals, pictures, targets, questions, answers = zip(*filter(None, found))
    points, replies = (ask(model, tokens, texts, pictures) for texts in (goals, questions))
    hits = {True: [], False: []}                    # read rightly -> whether the points were right
    for point, reply, target, answer in zip(points, replies, targets, answers):
        read = score("exact", reply, [answer]) == 1
        hits[read].append(score("point-in-box", point, [target.area]) == 1)
    return {"drawings": len(goals), "read rightly": 100 * len(hits[True]) / len(goals),
            "right points where read rightly": 100 * sum(hits[True]) / max(1, len(hits[True])),
            "right points where misread": 100 * sum(hits[False]) / max(1, len(hits[False]))}


def gap(runs):
    """Right points where the target was read rightly minus those where it was not, in points."""
    run = runs["ckpt/gym"]
    return run["right points where read rightly"] - run["right points where misread"]


SHEET = Sheet(
    arms=("ckpt/gym",), measure=measure, minutes=1.5, seeds=5,
    equal="the same drawings for pointing and for reading, greedy replies",
    tests=(Gain("right points, percent, where the target was read rightly minus where it was not",
                gap, claimed=10, source="[O] the paper has no figure"),))
