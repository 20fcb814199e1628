"""What to play next, and how groups of rollouts come in while the trainer learns.

    Curriculum   draws tasks of middling difficulty, and keeps the books on every category
    Here         plays what is ordered to the end, in step with the trainer
    Actor        plays many rollouts in this process and waits for none of them
    Collector    sorts what comes in: complete, stale, late, delivered twice
    figures_of, ages_of, accuracy, samples   what is seen of it

A rollout here is anything with `advance(result) -> Request or None`, `evidence`, `episode` and
`judged(score)`: play.Play. Who plays may also be a ranks.Remote. Four things go on at once and wait
for each other as little as may be [C]: generation, environments and verifiers, the making of
batches, the journey of weights.
"""
import math
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gym
from common import UserError
from data import Episode, from_bytes, to_bytes
from gym import Score
from tasks.base import Task
from tasks.jury import tally, told
from tokenizer import Tokenizer


# ---- what to play -------------------------------------------------------------------------------

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


# ---- playing ------------------------------------------------------------------------------------

def aside(work, *args) -> Future:
    """work(*args) in a thread of its own, which may hang without holding anything up at exit."""
    future = Future()

    def run():
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Here:
    """The synchronous player: what was ordered is played to its end, all at once, by
    play(engine, orders)."""
    def __init__(self, engine, play):
        self.engine, self.play, self.orders = engine, play, []

    def delays(self) -> tuple[float, float]:
        return 0.0, 0.0

    def start(self, orders: list[Episode]):
        self.orders += orders

    def load(self, weights: dict, version: int):
        self.engine.load(weights, version)

    def step(self, wait_a_little: bool = True) -> list[Episode]:
        orders, self.orders = self.orders, []
        return self.play(self.engine, orders)


class Actor:
    """Rollouts side by side. Environments and verifiers run in threads; each rollout that ends
    goes to its verifier at once, and those that wait hold no slot of the engine."""

    def __init__(self, engine, rewards, begin, judges: int = 1):
        self.engine, self.rewards, self.begin = engine, rewards, begin
        self.outside = {}       # rollout: what its environment will say, as a Future
        self.asked = {}         # the engine's id: rollout
        self.judging = {}       # rollout: Future of its Score
        self.judges = ThreadPoolExecutor(judges)
        self.idle = self.stalled = 0.0

    def delays(self) -> tuple[float, float]:
        """Seconds in which there was nothing to generate, and in which weights were changed."""
        return self.idle, self.stalled

    def start(self, orders: list[Episode]):
        for order in orders:
            play = self.begin(order)
            self.outside[play] = aside(play.advance)

    def abort(self, group: int):
        """Forget a group's rollouts, wherever they are."""
        for id in [id for id, play in self.asked.items() if play.episode.group == group]:
            self.engine.abort(id)
            del self.asked[id]
        for play in [play for play in self.outside if play.episode.group == group]:
            del self.outside[play]
        for play in [play for play in self.judging if play.episode.group == group]:
            self.judging.pop(play).cancel()

    def load(self, weights: dict, version: int):
        began = time.perf_counter()
        self.engine.load(weights, version)
        self.stalled += time.perf_counter() - began

    def step(self, wait_a_little: bool = True) -> list[Episode]:
        """Hand on what has come back, a token or more for all who can; the Episodes that ended."""
        ended, futures = [], [*self.outside.values(), *self.judging.values()]
        if wait_a_little and not self.engine.busy and not any(f.done() for f in futures):
            began = time.perf_counter()
            wait(futures, 0.02, FIRST_COMPLETED) if futures else time.sleep(0.002)
            self.idle += time.perf_counter() - began
        for play in [play for play, future in self.outside.items() if future.done()]:
            request = self.outside.pop(play).result()
            if request:
                self.asked[self.engine.submit(request)] = play
            elif play.evidence is not None:
                self.judging[play] = self.judges.submit(self.rewards.score, play.episode.task,
                                                        play.evidence)
            else:
                ended.append(play.episode)
        for result in self.engine.step() if self.engine.busy else ():
            play = self.asked.pop(result.id)
            self.outside[play] = aside(play.advance, result)
        for play in [play for play, future in self.judging.items() if future.done()]:
            future = self.judging.pop(play)
            fault = future.exception()
            ended.append(play.judged(Score(math.nan, {}, told(fault)) if fault
                                     else future.result()))
        return ended


# ---- groups -------------------------------------------------------------------------------------

@dataclass
class Group:
    task: Task
    began: float
    got: dict = field(default_factory=dict)     # index: Episode


class Collector:
    """Orders groups of `size` rollouts and hands out `prompts` of them a step, oldest first.

    staleness: how many updates the oldest sampled token may lie behind; with 0 nothing is begun
    while the trainer learns, all groups that are ready are used, and when enough are there the
    rest is given up: abort by count [C]. patience: seconds until a group is given up: abort by
    time [C]. What is given up is played again first, and waited for: if it outlasts patience, its
    unfinished rollouts are errors. flight: rollouts under way at most, groups begun in part; 0: as
    many as staleness allows. leave: asked while it waits for groups.
    """

    def __init__(self, actor, curriculum: Curriculum, prompts: int, size: int, staleness: int,
                 patience: float, live, flight: int = 0, leave=lambda: False):
        self.actor, self.curriculum, self.live, self.flight = actor, curriculum, live, flight
        self.prompts, self.size, self.staleness = prompts, size, staleness
        self.patience, self.leave, self.count, self.finished, self.step = patience, leave, 0, 0, 0
        self.open: dict[int, Group] = {}
        self.orders: list[Episode] = []         # of open groups, not yet started
        self.ready: list[list[Episode]] = []
        self.seen: list[list[Episode]] = []     # every group that ended since the last step
        self.tried: set[Task] = set()           # given up once
        self.clock, self.last = 0.0, time.monotonic()
        self.stale = self.twice = self.given_up = 0
        self.waited, self.before = 0.0, (0.0, 0.0)     # what `collect` took; delays when it began

    def figures(self) -> dict:
        """What is seen of a step, from the beginning of `collect`; `dropped` and `twice` (delivered
        twice, or too late) since the start of the run."""
        idle, stalled = (b - a for a, b in zip(self.before, self.actor.delays()))
        return figures_of(self.seen, self.live) | {
            "waited": self.waited, "idle": idle, "stalled": stalled,
            "dropped": self.stale + self.given_up, "twice": self.twice}

    def state(self) -> dict:
        """What to go on from: finished groups as bytes; those under way are simply run again."""
        ready = [torch.frombuffer(bytearray(to_bytes(group)), dtype=torch.uint8)
                 for group in self.ready]
        books = self.curriculum.state()
        under_way = [astuple(group.task) for group in self.open.values()]
        return {"count": self.count, "ready": ready, "tried": sorted(map(astuple, self.tried)),
                "books": {**books, "kept": under_way + list(books["kept"])}}

    def restore(self, state: dict):
        self.count, self.tried = state["count"], {Task(*task) for task in state["tried"]}
        ready = [from_bytes(data.cpu().numpy().tobytes()) for data in state["ready"]]
        self.ready = [group for group in ready if group[0].task.category in self.curriculum.mix]
        self.curriculum.restore(state["books"])

    def turn(self, collecting: bool = False):
        """Order what there is room for, let the actor take a step, sort what has come."""
        # Of the time between two turns a second counts at most: examinations are nobody's delay.
        now = time.monotonic()
        self.clock, self.last = self.clock + min(1.0, now - self.last), now
        self._order(collecting)
        for episode in self.actor.step(collecting):
            self._file(episode)
        for id, group in list(self.open.items()):
            if self.clock - group.began > self.patience:
                self._too_long(id, group)

    def _order(self, collecting: bool):
        """Draw groups, as many as staleness allows, and start what there is room for."""
        enough = not self.staleness and len(self.ready) >= self.prompts
        wanted = 0 if enough else round(self.prompts * self.curriculum.expansion)
        rounds = self.staleness + collecting
        most = 4 * self.prompts - self.finished if collecting else wanted * rounds
        groups = min(wanted * rounds - len(self.ready), most) - len(self.open)
        unfinished = sum(self.size - len(group.got) for group in self.open.values())
        room = self.flight - unfinished + len(self.orders) if self.flight else self.size * groups
        for _ in range(groups):
            if len(self.orders) >= room:
                break
            task = self.curriculum.draw()
            self.open[self.count] = Group(task, self.clock)
            self.orders += [Episode(task, self.count, i) for i in range(self.size)]
            self.count += 1
        if room > 0:
            self.actor.start(self.orders[:room])
            del self.orders[:room]

    def collect(self, step: int) -> list[list[Episode]] | None:
        """The groups to learn from at `step`, which is also the version of the newest weights;
        None where it is to leave: what has come by then is in `state`."""
        began, self.finished, self.seen, self.step = time.perf_counter(), 0, [], step
        self.before = self.actor.delays()
        self.ready = [group for group in self.ready if not self._is_stale(group, step)]
        while len(self.ready) < self.prompts or not self.staleness and self.tried & {
                group.task for group in self.open.values()}:
            if self.leave():
                return None
            if self.finished >= 4 * self.prompts and not self.open:
                break           # too little to learn here: go on with what there is
            self.turn(collecting=True)
        self.ready.sort(key=lambda group: group[0].group)
        chosen = self.ready[:None if not self.staleness else self.prompts]
        self.ready = self.ready[len(chosen):]
        for id in list(self.open) if not self.staleness else ():
            self._give_up(id)
        self.waited = time.perf_counter() - began
        return chosen

    def _is_stale(self, group, step: int) -> bool:
        oldest = min((d.extras["version"][d.weights > 0].min() for e in group if not e.score.error
                      for d in e.documents if d.weights.any()), default=step)
        if step - oldest > self.staleness:
            self.stale += 1
            self.curriculum.kept.append(astuple(group[0].task))
            return True
        return False

    def _file(self, episode: Episode):
        group = self.open.get(episode.group)
        if group is None or episode.index in group.got:
            self.twice += 1
            return
        group.got[episode.index] = episode
        if len(group.got) == self.size:
            self.tried.discard(self.open.pop(episode.group).task)
            whole = [group.got[i] for i in range(self.size)]
            live = self.live(whole)
            self.curriculum.note(whole, live)
            if live and not self._is_stale(whole, self.step):
                self.ready.append(whole)
            self.seen.append(whole)
            self.finished += 1

    def _abort(self, id: int):
        self.actor.abort(id)
        self.orders = [order for order in self.orders if order.group != id]

    def _give_up(self, id: int):
        self._abort(id)
        task = self.open.pop(id).task
        self.tried.add(task)
        self.curriculum.kept.append(astuple(task))
        self.given_up += 1

    def _too_long(self, id: int, group: Group):
        if group.task not in self.tried:
            return self._give_up(id)
        self._abort(id)
        error = Score(math.nan, {},
                      f"not finished within {self.patience:g} seconds when played again")
        for index in set(range(self.size)) - set(group.got):
            self._file(Episode(group.task, id, index, score=error, status="error"))


# ---- what is seen -------------------------------------------------------------------------------

def ages_of(groups: list[list[Episode]], step: int) -> dict:
    """How many updates the tokens that are learnt from lag behind those done: mean and most."""
    ages = [step - d.extras["version"][d.weights > 0]
            for group in groups for e in group if not e.score.error for d in e.documents]
    ages = np.concatenate(ages) if ages else np.zeros(0)
    return {"stale": float(ages.mean()), "stale_max": float(ages.max())} if len(ages) else {}


def figures_of(groups: list[list[Episode]], live) -> dict:
    """What the groups show that ended in a step, learnt from or not; `by` category, reward and
    pass@k. Errors count for neither."""
    episodes = [e for group in groups for e in group]
    if not episodes:
        return {}
    size = len(groups[0])
    scores = {group[0].task: [e.score for e in group] for group in groups}
    once, often = tally(scores), tally(scores, size)
    valid = [e for e in episodes if not e.score.error]
    rewards = [e.score.reward for e in valid]
    count = len(episodes)
    return {**({"reward": float(np.mean(rewards))} if rewards else {}),
            "pass1": sum(r > 0.999 for r in rewards) / max(1, len(rewards)),
            "silent": sum(not live(group) for group in groups) / len(groups),
            "truncated": sum(e.status == "truncated" for e in episodes) / count,
            "errors": 1 - len(valid) / count, "samples": count,
            "by": {name: {"reward": row["reward"], "pass1": row["pass"],
                          f"pass{size}": often[name]["pass"],
                          "errors": row["errors"] / (row["tasks"] * size)}
                   for name, row in once.items()}}


def accuracy(episodes: list[Episode]) -> dict[str, float]:
    """Share of full rewards by category, and their mean."""
    table = {name: row["pass"] for name, row in
             tally({e.task: [e.score] for e in episodes}).items()}
    return {**table, "mean": float(np.nanmean(list(table.values())))}


def samples(episodes: list[Episode], tokens: Tokenizer, folder: Path) -> list[dict]:
    """The best and the worst Episode of each category for report.json, with pictures on disk."""
    folder.mkdir(parents=True, exist_ok=True)

    def words(ids):
        return tokens.decode([i for i in ids if i < tokens.n_ranks]).strip()

    made = []
    for name in dict.fromkeys(e.task.category for e in episodes):
        own = sorted((e for e in episodes if e.task.category == name and not e.score.error),
                     key=lambda e: -e.score.reward)
        for e in own[:1] + own[1:][-1:]:
            files = []
            for i, image in enumerate(image for d in e.documents for image in d.images):
                files.append(f"{name}-{e.task.seed}-{i}.png")
                Image.fromarray(image).save(folder / files[-1])
            first, truth = e.documents[0], " → ".join(gym.play_out(e.task)[1])
            made.append({
                "category": name, "level": e.task.level, "pictures": files,
                "question": words(first.ids[:int(first.weights.argmax())]).replace("\n", " "),
                "answer": " → ".join(words(d.ids[d.weights > 0]) for d in e.documents),
                "truth": words(tokens.encode_reply(truth)), "reward": e.score.reward})
    return made
