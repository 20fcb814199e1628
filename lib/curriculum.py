"""Which tasks RL draws."""

import numpy as np

from lib.cli import UserError
from lib.episodes import Episode
from tasks.base import Task


class Curriculum:
    """Tasks by category and level. A cell's odds are its category's share of the mix times
    1/4 + 3 p (1 - p), p the mean reward there, smoothed: what is half solved teaches most [R], and
    nothing leaves the mix, since what is not rewarded is forgotten [O]. A category begins at
    level 0; the next opens when 80% of the reward of the last is earned.

    faults above 10% of a category's rollouts pause it; above 50% of all, they end the run [O].
    """

    def __init__(self, mix: tuple, seed: int, levels: int, say=print):
        self.mix, self.seed, self.levels, self.say = dict(mix), seed, levels, say
        self.drawn = 0                                  # tasks so far
        self.kept: list[tuple] = []                     # tasks given up unplayed: they go first
        self.cells: dict[str, list] = {}                # "name/level": mean reward, groups
        self.top = dict.fromkeys(self.mix, 0)           # the highest level that is open
        self.faults: dict[str, list] = {}       # name: errors, rollouts (both fade), last error
        self.silent = 0.0                               # share of groups without signal

    STATE = ("drawn", "kept", "cells", "top", "faults", "silent")

    def state(self) -> dict:
        return {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: dict):
        for name in self.STATE:
            setattr(self, name, state[name])
        # --mix and --levels may be others; what was paused may be mended.
        self.top = {name: min(self.top.get(name, 0), self.levels - 1) for name in self.mix}
        self.kept = [task for task in self.kept if task[0] in self.mix]
        for name in filter(self.paused, list(self.faults)):
            self.say(f"{name} was paused for its errors and is tried again")
            del self.faults[name]

    @property
    def expansion(self) -> float:
        """How many times more groups to begin than are wanted: 1 / (1 - silent) [R]."""
        return min(4.0, 1 / (1 - min(0.99, self.silent)))

    def paused(self, name: str) -> bool:
        errors, count, _ = self.faults.get(name, (0, 0, ""))
        return count >= 32 and errors > 0.1 * count

    def draw(self) -> Task:
        """The next task; the n-th is a function of seed, n and the books."""
        if self.kept:
            return Task(*self.kept.pop(0))
        names = [name for name, weight in self.mix.items() if weight and not self.paused(name)]
        if not names:
            raise UserError("every category of --mix is paused for its errors: see above")
        cells = [(name, level) for name in names for level in range(self.top[name] + 1)]
        solved = [self.cells.get(f"{name}/{level}", (0.5, 0))[0] for name, level in cells]
        odds = np.array([self.mix[name] / (self.top[name] + 1) * (0.25 + 3 * p * (1 - p))
                         for (name, _), p in zip(cells, solved)])
        rng = np.random.default_rng([self.seed, self.drawn])
        self.drawn += 1
        name, level = cells[int(rng.choice(len(cells), p=odds / odds.sum()))]
        return Task(name, int(rng.integers(2 ** 31)), level)

    def note(self, group: list[Episode], live: bool):
        """Enter a finished group into the books; `live`: some of it did better than the rest."""
        task = group[0].task
        errors = [e.score.error for e in group if e.score.error]
        was = self.paused(task.category)
        before = self.faults.get(task.category, (0.0, 0.0, ""))
        book = self.faults[task.category] = [
            0.98 * before[0] + len(errors), 0.98 * before[1] + len(group), [before[2], *errors][-1]]
        if self.paused(task.category) and not was:
            self.say(f"{task.category} is paused: {book[0] / book[1]:.0%} of its rollouts end in "
                     f"errors, the last in: {book[2]}")
        wrong, count = (sum(b[i] for b in self.faults.values()) for i in (0, 1))
        if count >= 32 * len(self.mix) and wrong > 0.5 * count:     # errors are the first to end
            raise UserError(f"{wrong / count:.0%} of all rollouts end in errors, the last in: "
                            f"{max(self.faults.values())[2]}; the run stops")
        if len(errors) == len(group):
            return
        self.silent += 0.02 * ((not live) - self.silent)
        cell = self.cells.setdefault(f"{task.category}/{task.level}", [0.5, 0])
        mean = float(np.mean([e.score.reward for e in group if not e.score.error]))
        cell[1] += 1
        cell[0] += max(0.1, 1 / cell[1]) * (mean - cell[0])
        if (task.level == self.top[task.category] < self.levels - 1 and cell[1] >= 16
                and cell[0] > 0.8):
            self.top[task.category] += 1
            self.say(f"{task.category}: level {task.level + 1} opens")
