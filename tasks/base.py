"""What a task is, and what an environment owes its driver.

A Task is five plain fields and the whole identity of an instance: the same five fields give the
same bytes in any process. An environment shows observations, takes text, and at the end hands out
evidence; it never says how good a reply was, that is the business of the reward system (gym.py).

Most categories are `OneShot`: one picture, one question, one reply, about 25 lines of `make`.
Nothing under tasks/ imports torch, so a worker process starts in a fifth of a second.
"""
from dataclasses import dataclass, field
from typing import Any, Iterator
from zlib import crc32

import numpy as np

IMAGE = "<|image|>"


@dataclass(frozen=True)
class Task:
    """The identity of one instance. pixels=0 means the category's least size. [O]"""
    category: str
    seed: int
    level: int = 0              # 0 (easy) to 4
    split: str = "train"        # anything else is held out
    pixels: int = 0


@dataclass
class Obs:
    """What the model sees: text with one `<|image|>` where each of the PIL RGB images goes."""
    text: str
    images: list = field(default_factory=list)

    def __post_init__(self):
        assert self.text.count(IMAGE) == len(self.images), (self.text, len(self.images))


@dataclass
class Step:
    """What a reply led to. `truncated`: the turns ran out before the task was finished."""
    obs: Obs | None
    done: bool
    truncated: bool = False
    info: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    role: str                   # system | user | assistant | observation
    text: str
    images: tuple = ()


def stream(task: Task) -> np.random.Generator:
    """The random stream of a task; splits never share one. [O]"""
    key = [crc32(task.category.encode()), crc32(task.split.encode()), task.level, task.seed]
    return np.random.default_rng(key)


def pick(rng, options):
    """One of a sequence, uniformly (Generator.choice is ten times slower on short lists)."""
    return options[int(rng.integers(len(options)))]


def held(text: str) -> bool:
    """Whether a string is kept out of training: one in five, by its checksum alone. [O]"""
    return crc32(text.encode()) % 5 == 0


def box(answer) -> str:
    """An answer between the box marks, `<|begin_of_box|>7<|end_of_box|>`. [C]"""
    return f"<|begin_of_box|>{answer}<|end_of_box|>"


def click(area) -> str:
    """The action that clicks the middle of (x0, y0, x1, y1), all in 0-999. [C]"""
    x, y = middle(area)
    return f"click({x}, {y})"


def middle(area) -> tuple[int, int]:
    return round((area[0] + area[2]) / 2), round((area[1] + area[3]) / 2)


def recap(goal: str, actions: list[str]) -> str:
    """The prompt of one turn in the segment layout: picture, goal, earlier actions as text. [C]"""
    return "\n".join([IMAGE + goal, *actions])


class Env:
    """One instance of a category. Subclasses say what it shows and when it ends."""
    family = "perception"       # perception | reasoning | agent
    tier = 0                    # 0 perception, 1 grounding, 2 one action, 3 trajectory
    max_turns = 1
    min_pixels = 64             # the least size at which a question has one right answer
    verifier = ""               # for the table: EX, NUM, ED, HIT, STATE, ...
    layout = "append"           # append: one growing stream; segment: a fresh prompt every turn
    why = ""                    # the thought behind the oracle's last reply, where it has one
    more: list = []             # further (question, reply) about this picture, to learn from
    blind: tuple = ()           # see `chance`: five values, one a level

    def __init__(self, task: Task):
        self.task, self.level, self.rng = task, task.level, stream(task)
        self.heldout = task.split != "train"
        self.pixels = task.pixels or self.min_pixels

    @classmethod
    def chance(cls, level: int) -> float:
        """Score of the best guess that does not look at the picture, from the train split."""
        return cls.blind[level]

    def reset(self) -> Obs:
        """The first observation; call once, before anything else."""
        raise NotImplementedError

    def step(self, text: str) -> Step:
        """Take a reply. Never raises on what a model wrote; safe after the end."""
        raise NotImplementedError

    def evidence(self) -> dict:
        """All that a verifier needs, picklable: the reply or the final state, and the gold."""
        raise NotImplementedError

    def oracle(self) -> Iterator[str]:
        """Replies that solve the task, each made from the state at the time it is asked for."""
        raise NotImplementedError

    def glance(self, rng) -> str:
        """The reply of one who sees what is there but not what is asked: a baseline that must
        fall as the level rises."""
        raise NotImplementedError

    def close(self):
        """Release what the instance holds."""


class OneShot(Env):
    """One question, one reply. `make` returns (Obs, gold)."""
    shown: list = []            # see `glance`: what might be the gold of some question
    obs: Obs | None = None      # once drawn

    def make(self) -> tuple[Obs, Any]:
        raise NotImplementedError

    def reply(self, gold) -> str:
        """The right reply to the own question."""
        return box(gold)

    def reset(self):
        if self.obs is None:
            self.obs, self.gold = self.make()
        self.said = None
        return self.obs

    def step(self, text):
        if self.said is None:
            self.said = str(text)
        return Step(None, True)

    def evidence(self):
        return {"reply": self.said or "", "gold": self.gold}

    def oracle(self):
        yield self.reply(self.gold)

    def glance(self, rng):
        return self.reply(pick(rng, self.shown))

    def turns(self) -> list[tuple[str, str]]:
        """Up to five (question, reply) about the picture; the first is the task's own. Several
        turns per image are what breaks the plateau before the image is used at all. [O]"""
        return [(self.obs.text, self.reply(self.gold)), *self.more]
