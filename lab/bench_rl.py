"""What asynchrony is worth where the world is slow: `python -m lab.bench rl`.

Verifiers, or screens, that take their time: log-normal, sigma 1, with a mean of WAIT seconds a
verdict or of a quarter of it a screen. 32 rollouts are under way at most, in groups of 8, four
groups an update; the model is our own with random weights, and verdicts are drawn by lot. Both
sides run the same Collector and Actor in one process, generation, environments and updates
included; `theirs` is staleness 0: all 32 must be back before the trainer learns, and none is begun
before it is done. `ours` may lag two updates behind.

The bound is the lesser of two: 32 rollouts that wait W seconds on average can't give more than
32 / W a second, however fast the rest is; and one process can't give more than the seconds allow
that it generates and learns. Those are measured, the lesser of both sides, so this half is rough.
"""
import statistics
import time

import numpy as np

import rl
from collect import Actor, Collector, Curriculum
from gym import Score
from model import GLMV, sized
from optim import OptimConfig, Optimizer
from tokenizer import Tokenizer

WAIT = 1.0                    # seconds, the mean
FLIGHT, SIZE, PROMPTS, STEPS = 32, 8, 4, 5


class Slow:
    """Waits, drawn by lot; and how long they were in all."""

    def __init__(self, seed: int, mean: float):
        self.rng, self.mean, self.total, self.count = np.random.default_rng(seed), mean, 0.0, 0

    def __call__(self):
        seconds = self.mean * float(self.rng.lognormal(-0.5, 1.0))      # e^(mu + 1/2) = 1
        self.total, self.count = self.total + seconds, self.count + 1
        time.sleep(seconds)


class Verdicts:
    """Rewards by lot, some time after the question."""

    def __init__(self, seed: int, wait=None):
        self.rng, self.wait = np.random.default_rng(seed), wait

    def score(self, task, evidence) -> Score:
        if self.wait:
            self.wait()
        return Score(float(self.rng.integers(2)))


class SlowPlay(rl.Play):
    """A rollout whose screens come late."""

    def __init__(self, episode, policy, wait):
        super().__init__(episode, policy)
        self.wait = wait

    def advance(self, result=None):
        self.wait()
        return super().advance(result)


def once(world: str, staleness: int, args, hw, seed: int) -> dict:
    """STEPS updates; samples learnt a second, and what each stage did with its time."""
    model = GLMV(sized(args.size), args.seed).to(hw.device, hw.dtype)
    optimizer = Optimizer(model.named_parameters(), OptimConfig(1e-4))
    screens = world == "screens"
    wait = Slow(seed, WAIT / 4 if screens else WAIT)
    settings = rl.Args(steps=STEPS + 1, prompts=PROMPTS, group=SIZE, slots=FLIGHT, mtp=0.0)
    policy = rl.Policy(Tokenizer(model.config.n_ranks), model.config, settings.context, 8,
                       seed=seed)
    actor = Actor(rl.player(model, settings), Verdicts(seed, None if screens else wait),
                  lambda e: SlowPlay(e, policy, wait) if screens else rl.Play(e, policy), FLIGHT)
    category = "gui_form" if screens else "counting"
    collector = Collector(actor, Curriculum(((category, 1.0),), seed, 1), PROMPTS, SIZE, staleness,
                          1e9, rl.has_signal, FLIGHT)
    share = rl.Share(between=collector.turn if staleness else None)
    learnt, waited, learning = 0, 0.0, 0.0
    steps = rl.train(model, optimizer, lambda step: (collector.collect(step), []), settings,
                     share=share)
    for done, groups, figures in steps:
        actor.load({}, done)
        if done == 1:           # the first is for warming up
            began, idle, slept, waits = (time.perf_counter(), actor.idle, wait.total, wait.count)
            continue
        learnt, waited = learnt + SIZE * len(groups), waited + collector.waited
        learning += figures["learning"]
    took = time.perf_counter() - began
    idle, waits = actor.idle - idle, max(1, wait.count - waits)
    return {"rate": learnt / took, "learnt": learnt, "idle": idle / took, "waited": waited / took,
            "wait": (wait.total - slept) / waits, "stale": collector.stale,
            "work": (took - idle) / max(1, learnt), "turns": waits / max(1, learnt)}


def measure(args, hw) -> dict:
    """Both worlds, both ways, in turn; the cases that lab.bench prints."""
    cases = {}
    for world in ("verifiers", "screens"):
        runs = {0: [], 2: []}
        for i in range(args.rounds):
            for staleness in runs:
                runs[staleness].append(once(world, staleness, args, hw, args.seed + i))
        rates = {s: [run["rate"] for run in found] for s, found in runs.items()}
        ratios = [a / b for a, b in zip(rates[2], rates[0])]
        mean = {s: {k: statistics.mean(run[k] for run in found) for k in found[0]}
                for s, found in runs.items()}
        bound = min(FLIGHT / (mean[0]["wait"] * mean[0]["turns"]),
                    1 / min(run["work"] for found in runs.values() for run in found))
        cases[f"waiting for {world}"] = {
            side: {"median": statistics.median(rates[s]), "least": min(rates[s]),
                   "most": max(rates[s]), **mean[s], "setting":
                       f"staleness {s}; nothing to generate {mean[s]['idle']:.0%} of the time, "
                       f"trainer waits {mean[s]['waited']:.0%}, {mean[s]['stale']:.0f} too old"}
            for side, s in (("ours", 2), ("theirs", 0))} | {
                "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)],
                "bound": bound}
        print(f"waiting for {world}: {mean[0]['turns']:.1f} waits of {mean[0]['wait']:.2f} s a "
              f"sample; at most {bound:.1f} samples/s, {bound / mean[0]['rate']:.2f} times theirs")
    return {"cases": cases, "aim": 2.5}
