"""Tasks, observations, and the interface of an environment.

A Task is five plain fields, which identify an instance completely: the same five fields give the
same bytes in any process. An environment shows observations, takes replies as text, and returns
evidence at the end. It does not judge a reply; the reward system (rewards.py) does.

Most categories derive from `OneShot`: one picture, one question, one reply, about 25 lines of
`make`. Nothing under tasks/ imports torch, so a worker process starts in a fifth of a second.
"""
from dataclasses import dataclass, field
from typing import Any, Iterator
from zlib import crc32

import numpy as np

IMAGE = "<|image|>"


@dataclass(frozen=True)
class Task:
    """The identity of one instance. pixels: side of the picture; 0 = the smallest allowed. [O]"""
    category: str
    seed: int
    level: int = 0              # 0 (easy) to 4
    split: str = "train"        # anything else is held out
    pixels: int = 0


@dataclass
class Obs:
    """What the model sees: PIL images in RGB, and text with one `<|image|>` for each of them. Text
    that a model wrote goes into it by `quoted` only."""
    text: str
    images: list = field(default_factory=list)

    def __post_init__(self):
        assert self.text.count(IMAGE) == len(self.images), (self.text, len(self.images))


@dataclass
class Step:
    """The result of a reply. obs: the next observation, None at the end. truncated: the turns ran
    out before the task was finished."""
    obs: Obs | None
    done: bool
    truncated: bool = False


@dataclass(frozen=True)
class Message:
    """One message of a conversation; its text has one `<|image|>` for each image."""
    role: str                   # system | user | assistant | observation
    text: str
    images: tuple = ()
    weight: float | None = None     # of the loss on its tokens; None: 1 for a reply, 0 otherwise


class Stream(np.random.Generator):
    """The random generator of a task, which also knows whether the task's split is held out."""
    heldout = False


def stream(task: Task) -> Stream:
    """The random generator of a task. It is seeded by all fields but the size, so splits never
    share random numbers, and a larger picture shows the same scene. [O]"""
    key = [crc32(task.category.encode()), crc32(task.split.encode()), task.level, task.seed]
    rng = Stream(np.random.PCG64(key))
    rng.heldout = task.split != "train"
    return rng


def pick(rng, options):
    """Draw one element of a sequence, uniformly (Generator.choice is ten times slower here)."""
    return options[int(rng.integers(len(options)))]


def worded(rng: Stream, forms, level: int, few: int = 2) -> str:
    """One of several wordings of a question. Level 0, the first minutes of a small model, has only
    the first `few`. From level 1 on the last of four or more wordings is held out: it never occurs
    in training, and a quarter of the questions of a held-out split have it. [O]"""
    if level == 0 or len(forms) < 4:
        return pick(rng, forms if level else forms[:few])
    return forms[-1] if rng.heldout and rng.integers(4) == 0 else pick(rng, forms[:-1])


def held(text: str) -> bool:
    """Whether a string is held out of training. One in five is, decided by its checksum. [O]"""
    return crc32(text.encode()) % 5 == 0


def box(answer) -> str:
    """An answer between the box marks, `<|begin_of_box|>7<|end_of_box|>`. [C]"""
    return f"<|begin_of_box|>{answer}<|end_of_box|>"


def click(area) -> str:
    """The action that clicks the middle of (x0, y0, x1, y1), all in 0-999. [C]"""
    x, y = middle(area)
    return f"click({x}, {y})"


def middle(area) -> tuple[int, int]:
    """The centre of (x0, y0, x1, y1), rounded to integers."""
    return round((area[0] + area[2]) / 2), round((area[1] + area[3]) / 2)


def quoted(text: str) -> str:
    """A text that a model wrote, or that has a part of it, for an observation: special tokens are
    broken up, so that none can be taken for ours and placed before a picture of its own."""
    return text.replace("<|", "< |")


def recap(goal: str, actions: list[str]) -> str:
    """The prompt of one turn in the segment layout: picture, goal, earlier actions as text. [C]"""
    return "\n".join([IMAGE + goal, *map(quoted, actions)])


class Env:
    """One instance of a category. Subclasses define what it shows and when it ends."""
    family = "perception"       # perception | reasoning | agent
    tier = 0                    # 0 perception, 1 grounding, 2 one action, 3 trajectory
    max_turns = 1
    min_pixels = 64             # the smallest size at which a question has one right answer
    verifier = ""               # for the table: EX, NUM, ED, HIT, STATE, ...
    layout = "append"           # append: one growing stream; segment: a fresh prompt every turn
    why = ""                    # the reason for the oracle's last reply, as a thought; "": none
    more: list = []             # further (question, reply) about this picture, for pretraining
    blind: tuple = ()           # what `chance` returns at each of the five levels

    def __init__(self, task: Task):
        self.task, self.level, self.rng = task, task.level, stream(task)
        self.heldout = task.split != "train"
        self.pixels = task.pixels or self.min_pixels

    @classmethod
    def chance(cls, level: int) -> float:
        """Score of the best guess without the picture, measured on the train split."""
        return cls.blind[level]

    def reset(self) -> Obs:
        """Return the first observation. Call it once, before anything else."""
        raise NotImplementedError

    def step(self, text: str) -> Step:
        """Take a reply. Never raises on what a model wrote, and is safe to call after the end."""
        raise NotImplementedError

    def evidence(self) -> dict:
        """What a verifier needs, picklable: the reply or the final state, and "gold"."""
        raise NotImplementedError

    def oracle(self) -> Iterator[str]:
        """Yield replies that solve the task, each computed from the state when it is requested."""
        raise NotImplementedError

    def glance(self, rng) -> str:
        """The reply of a baseline that sees the picture but ignores the question (contract.py)."""
        raise NotImplementedError


class OneShot(Env):
    """One question, one reply. A subclass only has to define `make`."""
    shown: list = []            # golds that some question about this picture could have; `glance`
    obs: Obs | None = None      # set once the picture is drawn

    def make(self) -> tuple[Obs, Any]:
        """Draw the instance from `self.rng` and return (observation, right answer)."""
        raise NotImplementedError

    def reply(self, gold) -> str:
        """The right reply to the task's own question."""
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
        """All (question, reply) about the picture, the task's own question first. Training on
        several questions per picture shortens the plateau before the model uses it at all. [O]"""
        return [(self.obs.text, self.reply(self.gold)), *self.more]
