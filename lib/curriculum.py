"""Which task comes next, from how well the model does: by category and by level."""
import copy
from dataclasses import astuple

import numpy as np

from lib.cli import UserError
from lib.episodes import Episode, from_bytes
from tasks.base import Task


class Curriculum:
    """Chooses tasks by category and level.

    A cell is one level of one category, and p its mean reward, smoothed over groups. A cell is
    chosen with a probability proportional to its category's weight in `mix` times

        1/4 + 3 p (1 - p)       1 at p = 1/2; 1/4 at p = 0 and p = 1

    since a group teaches most where about half of its rollouts succeed [R: GLM-4.5V], and no cell
    drops to 0, since abilities that are not rewarded decline [C]. The numbers are ours [O]. Every
    category begins at level 0; the next level opens once the mean reward of the highest exceeds
    0.8 [O].

    A category is paused when over 10% of its rollouts end in errors; the run ends when over 50%
    of all do [O]: a broken verifier must not shape the model. With `silence`, it also ends when so
    many groups in a row had no signal, unless they were all solved: nothing would be learned.
    """

    # The names in a checkpoint, and the attributes that hold them.
    STATE = {"drawn": "drawn", "kept": "replay", "cells": "cells", "top": "top",
             "faults": "faults", "silent": "no_signal"}

    def __init__(self, mix: tuple, seed: int, levels: int, say=print, pixels: dict | None = None,
                 silence: int = 0):
        self.mix, self.seed, self.levels, self.say = dict(mix), seed, levels, say
        self.pixels = pixels or {}                  # {category: side of its pictures}
        self.silence = silence                      # so many silent groups end the run; 0: never
        self.silent: list[float] = []               # mean rewards of groups since the last signal
        self.drawn = 0                              # tasks so far, without those of `replay`
        self.replay: list[tuple] = []               # tasks of dropped rollouts: they go first
        self.cells: dict[str, list] = {}            # "category/level": mean reward, groups
        self.top = dict.fromkeys(self.mix, 0)       # {category: the highest open level}
        self.faults: dict[str, list] = {}           # category: errors, rollouts, the last error
        self.no_signal = 0.0                        # share of groups without a signal, smoothed
        self.count = 0                              # groups so far: the number of the next one

    def state(self) -> dict:
        """A copy of everything that the choice of tasks depends on."""
        return copy.deepcopy({key: getattr(self, name) for key, name in self.STATE.items()})

    def restore(self, state: dict):
        """Continue from what `state` returned; mix and levels may have changed since."""
        for key, name in self.STATE.items():
            setattr(self, name, state[key])
        self.top = {name: min(self.top.get(name, 0), self.levels - 1) for name in self.mix}
        self.replay = [task for task in self.replay if task[0] in self.mix]
        for name in filter(self.paused, list(self.faults)):     # its verifier may be repaired now
            self.say(f"{name} was paused for its errors and is tried again")
            del self.faults[name]

    def checkpoint(self) -> dict:
        """The state and the count of groups, in the form of async_rl.Collector.state: both trainers
        can resume each other's checkpoints."""
        return {"count": self.count, "ready": [], "tried": [], "books": self.state()}

    def resume(self, saved: dict):
        """Continue from a checkpoint. Groups that an asynchronous run had ready in it are of older
        weights: their tasks are played again."""
        ready = [from_bytes(data.cpu().numpy().tobytes()) for data in saved["ready"]]
        state = dict(saved["books"])
        state["kept"] = state["kept"] + [astuple(group[0].task) for group in ready]
        self.count = saved["count"]
        self.restore(state)

    @property
    def expansion(self) -> float:
        """By what factor to begin more groups than are needed, so that enough of them have a
        signal: 1 / (1 - share of groups without one), from 1 to 4 [R: GLM-4.5V's ratio-EMA]."""
        return min(4.0, 1 / (1 - min(0.99, self.no_signal)))

    def paused(self, name: str) -> bool:
        """Whether over 10% of a category's last rollouts, at least 32, ended in errors."""
        errors, count, _ = self.faults.get(name, (0, 0, ""))
        return count >= 32 and errors > 0.1 * count

    def interest(self, p: float) -> float:
        """The factor on the weight of a cell whose mean reward is p."""
        return 0.25 + 3 * p * (1 - p)

    def next_task(self) -> Task:
        """The next task. The n-th depends only on the seed, n and the state, so a resumed run
        continues with the same tasks. Raises UserError if every category is paused."""
        if self.replay:
            return Task(*self.replay.pop(0))
        names = [name for name, weight in self.mix.items() if weight and not self.paused(name)]
        if not names:
            raise UserError("every category of --mix is paused for its errors: see above")
        cells, weights = [], []
        for name in names:
            for level in range(self.top[name] + 1):
                p = self.cells.get(f"{name}/{level}", (0.5, 0))[0]
                cells.append((name, level))
                weights.append(self.mix[name] / (self.top[name] + 1) * self.interest(p))
        weights = np.array(weights)
        rng = np.random.default_rng([self.seed, self.drawn])
        self.drawn += 1
        name, level = cells[int(rng.choice(len(cells), p=weights / weights.sum()))]
        return Task(name, int(rng.integers(2 ** 31)), level, pixels=self.pixels.get(name, 0))

    def next_group(self, size: int) -> list[Episode]:
        """The next task as a GRPO group: `size` episodes that are to be played."""
        task, number = self.next_task(), self.count
        self.count += 1
        return [Episode(task, number, i) for i in range(size)]

    def record(self, group: list[Episode], has_signal: bool):
        """Take a finished group into account. Raises UserError if the run must end: too many
        rollouts ended in errors, or too many groups in a row had no signal."""
        task = group[0].task
        errors = [e.score.error for e in group if e.score.error]
        self._record_errors(task.category, errors, len(group))
        if len(errors) == len(group):
            return
        # An average over about the last 50 groups: two or three steps at the defaults [O].
        self.no_signal += 0.02 * ((not has_signal) - self.no_signal)
        cell = self.cells.setdefault(f"{task.category}/{task.level}", [0.5, 0])
        mean = float(np.mean([e.score.reward for e in group if not e.score.error]))
        cell[1] += 1
        # The plain mean of the first ten groups, then an average over about the last ten.
        cell[0] += max(0.1, 1 / cell[1]) * (mean - cell[0])
        if (task.level == self.top[task.category] < self.levels - 1 and cell[1] >= 16
                and cell[0] > 0.8):
            self.top[task.category] += 1
            self.say(f"{task.category}: level {task.level + 1} opens")
        self._record_silence(has_signal, mean)

    def _record_silence(self, has_signal: bool, mean: float):
        self.silent = [] if has_signal else [*self.silent, mean]
        if not self.silence or len(self.silent) < self.silence:
            return
        count, mean, self.silent = len(self.silent), float(np.mean(self.silent)), []
        what = (f"none of the last {count} groups had a signal: all rollouts of a task earned the "
                f"same, {mean:.2f} on average")
        if mean > 0.95:
            return self.say(f"{what}. These tasks are solved: --levels or --mix can add others")
        raise UserError(f"{what}, so nothing is learned. Begin with a model that solves some of "
                        "these tasks (SFT, then --init) or with easier ones (--mix, --levels=1); a "
                        "larger --group, a --max_new that does not cut off replies, or --rehearse "
                        "can help, too")

    def _record_errors(self, category: str, errors: list[str], rollouts: int):
        was_paused = self.paused(category)
        # Both counts fade by 2% a group, so that an old error is forgotten.
        old_errors, old_rollouts, last = self.faults.get(category, (0.0, 0.0, ""))
        last = errors[-1] if errors else last
        fault = [0.98 * old_errors + len(errors), 0.98 * old_rollouts + rollouts, last]
        self.faults[category] = fault
        if self.paused(category) and not was_paused:
            self.say(f"{category} is paused: {fault[0] / fault[1]:.0%} of its rollouts end in "
                     f"errors, the last in: {fault[2]}")
        total_errors = sum(fault[0] for fault in self.faults.values())
        total = sum(fault[1] for fault in self.faults.values())
        # Rollouts with errors are the first to end: wait until others have had the time.
        if total >= 32 * len(self.mix) and total_errors > 0.5 * total:
            last = max(self.faults.values())[2]     # of the category with the most errors
            raise UserError(f"{total_errors / total:.0%} of all rollouts end in errors, the last "
                            f"in: {last}; the run stops")
