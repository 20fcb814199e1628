"""The contract that every category keeps, and how `gym.py check` measures it.

For one category at one level, averaged over `count` tasks:

    oracle      the oracle's replies earn 1
    other       the right replies of another task earn no more than chance
    random      replies of the right form with random content earn no more than chance
    majority    the best constant reply earns no more than chance
    no image    the best guess from the text of the question earns no more than chance
    echo        the question, repeated as the reply, earns nothing
    empty       an empty reply earns nothing
    hacks       known tricks (verify.hacks) earn nothing: the best of them, on four tasks
    glance      a baseline that sees the picture but ignores the question earns less at level 4
                than at level 0, so that higher levels are harder
    chance      what the category declares is not above what `majority` and `no image` earn

Besides, the same task gives the same bytes in a fresh process, evidence survives pickling, and a
step after the end changes nothing. The list is our own [O].
"""
import hashlib
import math
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import CATEGORIES, verify
from .base import box, OneShot, Task
from .driver import demonstrate, make, play_out
from .rewards import Rewards


# ---- the same bytes in a fresh process ----------------------------------------------------------

def fingerprint(task: Task) -> str:
    """A digest of the pictures, the texts and the gold of a task and of its demonstrations."""
    digest = hashlib.sha256(repr(play_out(task)).encode())
    for conversation in demonstrate(task):
        for message in conversation:
            digest.update(f"{message.role}\0{message.text}\0".encode())
            for image in message.images:
                digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def fingerprints(tasks: list[Task]) -> list[str]:
    return [fingerprint(task) for task in tasks]


def in_fresh_process(function: str, *args):
    """Call tasks.contract.<function>(*args) in a new Python process and return its result."""
    # SIG_DFL: on Ctrl-C it ends without a traceback of its own
    code = ("import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "import pickle, sys; from tasks import contract; "
            "function, args = pickle.load(sys.stdin.buffer); "
            "sys.stdout.buffer.write(pickle.dumps(getattr(contract, function)(*args)))")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((function, args)),
                          check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    return pickle.loads(done.stdout)


# ---- baselines ----------------------------------------------------------------------------------

def scramble(reply: str, rng) -> str:
    """A reply of the same form with random content: other digits everywhere and, inside the box
    marks or between quotes, other letters."""
    def other(found):
        characters = []
        for c in found[0]:
            if c.isdigit():
                c = str(rng.integers(1, 10))
            elif c.isalpha():
                c = chr(rng.integers(97, 123))
            characters.append(c)
        return "".join(characters)

    answer = verify.boxed(reply)
    if answer is None:
        return re.sub(r'"[^"]*"|\d', other, reply)
    return box(other([answer]))


@lru_cache(maxsize=None)
def glance_score(category, level, split, pixels, count) -> float:
    """Mean score of a baseline that sees the picture but ignores the question (`Env.glance`)."""
    rng, rewards = np.random.default_rng(level), Rewards()
    tasks = [Task(category, seed, level, split, pixels) for seed in range(count)]

    def policy(env, messages):
        return env.glance(rng)

    return float(np.mean([rewards.score(task, play_out(task, policy)[2]).reward
                          for task in tasks]))


class CategoryCheck:
    """Measurements of one category at one level, averaged over the tasks of seeds 0..count-1.

    A *script* is a tuple of replies, one for each turn. The baselines without a picture learn from
    tasks of other seeds, `known`: four times `count` of them, or as many as `count` where an
    episode has several turns and takes longer.
    """

    def __init__(self, category: str, level: int, split="train", pixels=0, count=200):
        self.one_shot = issubclass(CATEGORIES[category].env, OneShot)
        self.category, self.level, self.split, self.pixels = category, level, split, pixels
        self.count = count
        self.rewards = Rewards()
        self.cache = {}                 # (task, script): its reward
        self.tasks = [self.task(seed) for seed in range(count)]
        self.known = [self.task(100_000 + i) for i in range(count * (4 if self.one_shot else 1))]
        # (prompt, replies, evidence) of the oracle
        self.played = {task: play_out(task) for task in self.tasks + self.known}
        self.solved = [self.played[task] for task in self.tasks]
        start = time.perf_counter()
        self.mean([replies for _, replies, _ in self.solved[:5]])
        self.slow = not self.one_shot or time.perf_counter() - start > 0.01     # 2 ms a reward
        self.has_images = any(message.images for task in self.tasks[:5]
                              for conversation in demonstrate(task) for message in conversation)

    def task(self, seed: int) -> Task:
        return Task(self.category, seed, self.level, self.split, self.pixels)

    def score(self, task, evidence) -> float:
        """The reward. A verifier's error is a fault of the category, so it is raised here."""
        score = self.rewards.score(task, evidence)
        if score.error:
            raise RuntimeError(f"{task}: {score.error}")
        return score.reward

    def reward(self, task, script) -> float:
        """The reward of a script. A one-shot task is not drawn again: only the reply changes."""
        key = task, tuple(script)
        if key not in self.cache:
            if self.one_shot:
                evidence = {**self.played[task][2], "reply": script[0]}
            else:
                evidence = play_out(task, script)[2]
            self.cache[key] = self.score(task, evidence)
        return self.cache[key]

    def mean(self, scripts) -> float:
        """The mean reward of one script for each task."""
        return float(np.mean([self.reward(*pair) for pair in zip(self.tasks, scripts)]))

    def best_script(self, tasks, candidates: int, sample: int):
        """(lower bound of its reward, script): of the most frequent right replies to `tasks`, the
        one that earns most on all of them. The bound is half a standard error below the mean,
        so that a script which was tried on few tasks is not preferred by luck."""
        if self.slow:
            candidates, sample = 4, 10
        right = Counter(tuple(self.played[task][1]) for task in tasks)
        tasks = tasks[:sample]
        best = None
        for script, _ in right.most_common(candidates):
            mean = sum(self.reward(task, script) for task in tasks) / len(tasks)
            bound = mean - 0.5 / math.sqrt(len(tasks))
            if best is None or (bound, script) > best:
                best = bound, script
        return best

    def blind_baselines(self) -> tuple[float, float]:
        """(majority, no image). majority: the best constant script. no image: for each prompt the
        script that earned most on known tasks with the same prompt, or with one of its words in
        theirs, or the constant, whichever has the highest bound."""
        def clues(prompt):
            return dict.fromkeys([prompt, *prompt.split()])

        constant = self.best_script(self.known, candidates=16, sample=200)
        tasks_with = {}                             # clue: the known tasks whose prompt has it
        if self.has_images:
            for task in self.known:
                for clue in clues(self.played[task][0]):
                    tasks_with.setdefault(clue, []).append(task)
        best = {clue: self.best_script(tasks, candidates=6, sample=50)
                for clue, tasks in tasks_with.items() if len(tasks) >= 10}
        informed = []
        for prompt, _, _ in self.solved:
            options = [constant, *(best[clue] for clue in clues(prompt) if clue in best)]
            informed.append(max(options)[1])
        return self.mean([constant[1]] * self.count), self.mean(informed)

    def best_hack(self) -> float:
        """The highest reward of a known hack; where there are many turns, each is another hack."""
        earned = []
        for task, (prompt, replies, _) in list(zip(self.tasks, self.solved))[:4]:
            hacks = verify.hacks(replies[0], prompt)
            turns = 1 if self.one_shot else make(task).max_turns
            for i in range(0, len(hacks), turns):
                earned.append(self.reward(task, hacks[i:i + turns]))
        return max(earned)

    def measure(self) -> dict[str, float]:
        """One row of the table, {column: value}, as the docstring on top lists them."""
        rng = np.random.default_rng(0)
        right = [replies for _, replies, _ in self.solved]
        random = [[scramble(reply, rng) for reply in replies] for replies in right]
        majority, no_image = self.blind_baselines()
        glance = {level: glance_score(self.category, level, self.split, self.pixels,
                                      max(40, self.count)) for level in (0, 4)}
        return {"chance": CATEGORIES[self.category].env.chance(self.level),
                "oracle": self.mean(right), "other": self.mean(right[1:] + right[:1]),
                "random": self.mean(random), "majority": majority, "no image": no_image,
                "echo": self.mean([[prompt] for prompt, _, _ in self.solved]),
                "empty": self.mean([[""]] * self.count), "hacks": self.best_hack(),
                "glance 0": glance[0], "glance 4": glance[4]}

    # ---- the clauses ----------------------------------------------------------------------------

    def violations(self, row: dict) -> list[str]:
        """The clauses of the contract that a row of `measure` breaks, in words. Means over few
        tasks are noisy, so the bounds on them are wider by 1 / sqrt(count)."""
        margin = 0.10 + 1 / math.sqrt(self.count)
        broken = []
        for name in ("other", "random", "majority", *["no image"] * self.has_images):
            if row[name] > row["chance"] + margin:
                broken.append(f"{name} {row[name]:.2f} is too far above chance, "
                              f"{row['chance']:.2f}")
        broken += [f"{name} {row[name]:.2f} is above 0.05" for name in ("echo", "empty", "hacks")
                   if row[name] > 0.05]
        if row["oracle"] < 1 - 1e-9:
            broken.append(f"oracle {row['oracle']:.3f} is not 1")
        if row["chance"] > max(row["majority"], row["no image"]) + margin:
            broken.append("the declared chance is above what guessing without the picture earns")
        if not row["glance 4"] < row["glance 0"]:       # also true of nan, a verifier's error
            broken.append("level 4 is not harder than level 0 for the glance baseline")
        for task, (_, replies, evidence) in list(zip(self.tasks, self.solved))[:10]:
            broken += self.misbehaviour(task, replies, evidence)
        return broken

    def misbehaviour(self, task, replies, evidence) -> list[str]:
        """What is wrong with the evidence of one solved task, or with steps after its end."""
        wrong, env = [], make(task)
        if pickle.loads(pickle.dumps(evidence)) != evidence:
            wrong.append("the evidence does not survive pickling")
        if self.one_shot and play_out(task, ["?"])[2] != {**evidence, "reply": "?"}:
            wrong.append("more of the evidence than the reply depends on the reply")
        env.reset()
        steps = [env.step(reply) for reply in [*replies, replies[-1], "?", ""]]
        if not all(step.done for step in steps[-4:]) or env.evidence() != evidence:
            wrong.append("steps after the end change something")
        return wrong


def check_category(category, level, split="train", pixels=0, count=200):
    """(the row of one category at one level, the list of the clauses that it breaks)."""
    check = CategoryCheck(category, level, split, pixels, count)
    row = check.measure()
    return row, check.violations(row)
