"""What `gym.py check` measures of a category."""
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

from tasks import CATEGORIES, verify
from tasks.base import box, OneShot, Task
from tasks.driver import demonstrate, make, play_out
from tasks.rewards import Rewards


def fingerprint(task: Task) -> str:
    """A digest of everything that the demonstrations of a task show and say, and of its gold."""
    digest = hashlib.sha256(repr(play_out(task)).encode())
    for message in (m for conversation in demonstrate(task) for m in conversation):
        digest.update(f"{message.role}\0{message.text}\0".encode())
        for image in message.images:
            digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def fingerprints(tasks: list[Task]) -> list[str]:
    return [fingerprint(task) for task in tasks]


def in_fresh_process(call: str, *args):
    """What tasks.contract.<call>(*args) gives in a fresh process."""
    code = ("import pickle, sys; from tasks import contract; "
            "call, args = pickle.load(sys.stdin.buffer); "
            "sys.stdout.buffer.write(pickle.dumps(getattr(contract, call)(*args)))")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((call, args)),
                          check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    return pickle.loads(done.stdout)


def scramble(reply: str, rng) -> str:
    """The same form with other digits and, in a boxed answer or between quotes, other letters."""
    def other(found):
        return "".join(str(rng.integers(1, 10)) if c.isdigit() else
                       chr(rng.integers(97, 123)) if c.isalpha() else c for c in found[0])

    answer = verify.boxed(reply)
    if answer is None:
        return re.sub(r'"[^"]*"|\d', other, reply)
    return box(other([answer]))


class Exam:
    """The measurements of one category at one level, each a mean over `count` seeds. What the
    blind baselines may learn from is other seeds, four times as many, or as many where an
    episode has several turns."""

    def __init__(self, category: str, level: int, split="train", pixels=0, count=200):
        self.one_shot = issubclass(CATEGORIES[category].env, OneShot)
        self.rewards, self.count, self.earned = Rewards(), count, {}
        self.identity = category, level, split, pixels
        self.task = lambda seed: Task(category, seed, level, split, pixels)
        self.known = [self.task(100_000 + i) for i in range(count * (4 if self.one_shot else 1))]
        self.tasks = [self.task(seed) for seed in range(count)]
        self.played = {task: play_out(task) for task in self.tasks + self.known}
        self.solved = [self.played[task] for task in self.tasks]
        start = time.perf_counter()
        self.mean([replies for _, replies, _ in self.solved[:5]])
        self.slow = not self.one_shot or time.perf_counter() - start > 0.01    # 2 ms a verdict
        self.sees = any(m.images for task in self.tasks[:5] for c in demonstrate(task) for m in c)

    def reward(self, task, evidence):
        """A verifier's error is the category's fault, so here it is raised."""
        score = self.rewards.score(task, evidence)
        if score.error:
            raise RuntimeError(f"{task}: {score.error}")
        return score.reward

    def worth(self, task, script) -> float:
        """What a script earns. One reply changes nothing but itself: no need to draw again."""
        key = task, tuple(script)
        if key not in self.earned:
            evidence = self.played[task][2]
            self.earned[key] = self.reward(task, {**evidence, "reply": script[0]} if self.one_shot
                                           else play_out(task, script)[2])
        return self.earned[key]

    def mean(self, scripts):
        return float(np.mean([self.worth(*pair) for pair in zip(self.tasks, scripts)]))

    def best_script(self, tasks, few=16, seeds=200):
        """(worth, script) of that which earns most on these tasks; few tasks prove little."""
        if self.slow:
            few, seeds = 4, 10
        scripts = Counter(tuple(self.played[task][1]) for task in tasks)
        tasks = tasks[:seeds]
        return max((sum(self.worth(task, script) for task in tasks) / len(tasks)
                    - 0.5 / math.sqrt(len(tasks)), script)
                   for script, _ in scripts.most_common(few))

    def blind(self):
        """(majority, image-free): the best constant; and the best script for the prompt, or for
        one of its words, whichever promises most."""
        def clues(prompt):
            return dict.fromkeys([prompt, *prompt.split()])

        constant, groups = self.best_script(self.known), {}
        for task in self.known if self.sees else ():
            for clue in clues(self.played[task][0]):
                groups.setdefault(clue, []).append(task)
        best = {c: self.best_script(g, 6, 50) for c, g in groups.items() if len(g) >= 10}
        informed = [max([constant, *(best[c] for c in clues(prompt) if c in best)])[1]
                    for prompt, _, _ in self.solved]
        return self.mean([constant[1]] * self.count), self.mean(informed)

    def hacked(self):
        """The most that a hack earns; where there are many turns, a hack on each."""
        earned = []
        for task, (prompt, replies, _) in list(zip(self.tasks, self.solved))[:4]:
            tricks = verify.hacks(replies[0], prompt)
            n = 1 if self.one_shot else make(task).max_turns
            earned += [self.worth(task, tricks[i:i + n]) for i in range(0, len(tricks), n)]
        return max(earned)

    def measure(self) -> dict[str, float]:
        """The row of the table."""
        rng, scripts = np.random.default_rng(0), [replies for _, replies, _ in self.solved]
        noise = [[scramble(reply, rng) for reply in script] for script in scripts]
        majority, blind = self.blind()
        category, level, split, pixels = self.identity
        look = [glance(category, at, split, pixels, max(40, self.count)) for at in (0, 4)]
        return {"chance": CATEGORIES[category].env.chance(level),
                "oracle": self.mean(scripts), "other": self.mean(scripts[1:] + scripts[:1]),
                "random": self.mean(noise), "majority": majority, "no image": blind,
                "echo": self.mean([[prompt] for prompt, _, _ in self.solved]),
                "empty": self.mean([[""]] * self.count), "hacks": self.hacked(),
                "glance 0": look[0], "glance 4": look[1]}

    def violations(self, row: dict) -> list[str]:
        """The clauses of the contract that do not hold. Means over few seeds are noisy: bounds on
        them are wider by one over the root of their number."""
        slack = 0.10 + 1 / math.sqrt(self.count)
        blind = ("other", "random", "majority", *["no image"] * self.sees)
        wrong = [f"{name} {row[name]:.2f} is too far above chance, {row['chance']:.2f}"
                 for name in blind if row[name] > row["chance"] + slack]
        wrong += [f"{name} {row[name]:.2f} is above 0.05" for name in ("echo", "empty", "hacks")
                  if row[name] > 0.05]
        if row["oracle"] < 1 - 1e-9:
            wrong.append(f"oracle {row['oracle']:.3f} is not 1")
        if row["chance"] > max(row["majority"], row["no image"]) + slack:
            wrong.append("declared chance is above what blind guessing gives")
        if not row["glance 4"] < row["glance 0"]:       # true also of nan, a verifier's error
            wrong.append("level 4 is not harder than level 0 for a glance")
        for task, (_, replies, evidence) in list(zip(self.tasks, self.solved))[:10]:
            if pickle.loads(pickle.dumps(evidence)) != evidence:
                wrong.append("the evidence does not survive pickling")
            if self.one_shot and play_out(task, ["?"])[2] != {**evidence, "reply": "?"}:
                wrong.append("more of the evidence than the reply depends on the reply")
            env = make(task)
            env.reset()
            late = [env.step(reply) for reply in [*replies, replies[-1], "?", ""]]
            if not all(step.done for step in late[-4:]) or env.evidence() != evidence:
                wrong.append("steps after the end change something")
        return wrong


@lru_cache(maxsize=None)
def glance(category, level, split, pixels, count) -> float:
    """What one earns who sees but does not heed the question."""
    rng, rewards = np.random.default_rng(level), Rewards()
    tasks = [Task(category, seed, level, split, pixels) for seed in range(count)]

    def look(env, messages):
        return env.glance(rng)

    return float(np.mean([rewards.score(t, play_out(t, look)[2]).reward for t in tasks]))


def examine(category, level, split="train", pixels=0, count=200):
    """The row of one category at one level, and what is wrong with it."""
    exam = Exam(category, level, split, pixels, count)
    row = exam.measure()
    return row, exam.violations(row)
