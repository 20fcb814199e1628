"""What asynchrony is worth where the world is slow: `python -m lab.bench rl`.

Whole runs of rl.py on two ranks of torchrun, one that plays and one that learns, from the demo's
model. Verifiers, or screens, take their time: log-normal, sigma 1, with a mean of WAIT seconds a
verdict or a screen; or neither does. At most FLIGHT rollouts are under way, in groups of SIZE,
PROMPTS groups an update. `ours` may lag two updates behind. `theirs` is staleness 0: all groups
must be back before the trainer learns, and none is begun before it is done.

Half of a reward is the verdict and half is drawn by lot, so that every group has something to
teach and both sides learn from as many.

The bound is the least of three: FLIGHT rollouts that wait W seconds each can't give more than
FLIGHT / W a second; nor can more be played, or learnt, than the seconds allow that this takes,
whichever side it took less.
"""
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import gym
import rl
from lib import async_rl
from lib.cli import cli, main
from lib.common import read_log, ROOT, write_json

WAIT = 1.0                    # seconds, the mean
FLIGHT, SIZE, PROMPTS, STEPS = 32, 8, 4, 24
EXAM = 200                    # held-out tasks, before and after
WORLDS = {"verifiers": "counting", "screens": "gui_form", "nothing": "counting"}


class Slow:
    """Waits, drawn by lot; and how long they were in all."""

    def __init__(self, mean: float):
        self.mean, self.total, self.count = mean, 0.0, 0

    def __call__(self):
        seconds = self.mean * random.lognormvariate(-0.5, 1.0)      # e^(mu + 1/2) = 1
        self.total, self.count = self.total + seconds, self.count + 1
        time.sleep(seconds)


def rank(world: str, wait: float, args: rl.Args):
    """One of the two processes: rl.py in this world."""
    slow = Slow(0.0 if world == "nothing" else wait)

    class Verdicts(gym.Rewards):
        def __init__(self, workers):        # here in this process: it is waiting that takes long
            super().__init__()

        def score(self, task, evidence):
            score = super().score(task, evidence)
            if task.split == "test":        # examinations are none of it
                return score
            if world == "verifiers":
                slow()
            return replace(score, reward=(score.reward + random.randrange(2)) / 2)

    class Screens(async_rl.Rollout):
        def advance(self, result=None):
            if world == "screens":
                slow()
            return super().advance(result)

    gym.Rewards, async_rl.Rollout = Verdicts, Screens
    rl.run(args)
    if slow.count:
        write_json(Path(args.out) / "waits.json", {"count": slow.count, "seconds": slow.total})


def one_run(world: str, staleness: int, seed: int, dtype: str) -> dict:
    """A run; samples learnt a second, and what each stage did with its time."""
    with tempfile.TemporaryDirectory() as out:
        options = dict(mix=WORLDS[world], steps=STEPS + 1, prompts=PROMPTS, group=SIZE,
                       flight=FLIGHT, slots=FLIGHT, workers=FLIGHT, max_staleness=staleness,
                       seed=seed, mtp=0, eval_every=STEPS + 1, eval_count=EXAM, device="cpu",
                       dtype=dtype, out=out)
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "-m", "lab.bench_rl", world, str(WAIT), *(f"--{k}={v}" for k, v in options.items())],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines, waits = read_log(Path(out) / "log.jsonl")[1:], Path(out) / "waits.json"
        wait = json.loads(waits.read_text()) if waits.exists() else {"count": 1, "seconds": 0.0}
        exam = json.loads((Path(out) / "report.json").read_text())["figures"]["mean"]
    took, learnt = (sum(x[key] for x in lines) for key in ("dt", "groups"))
    learnt *= SIZE
    share = {key: sum(x[key] for x in lines) / took
             for key in ("waited", "learning", "idle", "stalled")}
    samples = max(1, sum(x.get("samples", 0) for x in lines))
    turns = wait["count"] * STEPS / (STEPS + 1) / samples if wait["seconds"] else 0.0
    return {"rate": learnt / took, "learnt": learnt, **share,
            "wait": turns * wait["seconds"] / wait["count"], "turns": turns,
            "stale_max": max(x.get("stale_max", 0) for x in lines),
            "playing": (1 - share["idle"]) * took / learnt,
            "training": share["learning"] * took / learnt,
            "right": list(exam.values())[-1]}


def measure(args, hw) -> dict:
    """All worlds, both ways, in turn; the cases that lab.bench prints."""
    cases = {}
    for world in WORLDS:
        runs = {0: [], 2: []}
        for i in range(args.rounds):
            for staleness in runs:
                runs[staleness].append(one_run(world, staleness, args.seed + i, args.dtype))
        rates = {s: [run["rate"] for run in found] for s, found in runs.items()}
        ratios = [a / b for a, b in zip(rates[2], rates[0])]
        mean = {s: {k: statistics.mean(run[k] for run in found) for k in found[0]}
                for s, found in runs.items()}
        waiting = mean[0]["wait"]
        bound = min(FLIGHT / waiting if waiting else np.inf,
                    *(1 / min(run[stage] for found in runs.values() for run in found)
                      for stage in ("playing", "training")))
        spread = {s: 1.96 * (m["right"] * (1 - m["right"]) / EXAM) ** 0.5 for s, m in mean.items()}
        cases[f"waiting for {world}"] = {
            side: {"median": statistics.median(rates[s]), "least": min(rates[s]),
                   "most": max(rates[s]), **mean[s], "setting":
                       f"staleness {s}; players idle {mean[s]['idle']:.0%}, stalled by weights "
                       f"{mean[s]['stalled']:.1%}; trainer waits {mean[s]['waited']:.0%}, learns "
                       f"{mean[s]['learning']:.0%}; held out {mean[s]['right']:.1%} "
                       f"± {100 * spread[s]:.1f}"}
            for side, s in (("ours", 2), ("theirs", 0))} | {
                "ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)],
                "bound": bound, **({} if waiting else {"aim": 1.0})}
        print(f"waiting for {world}: {waiting:.2f} s a sample in {mean[0]['turns']:.1f} waits; at "
              f"most {bound:.1f} samples/s, {bound / mean[0]['rate']:.2f} times theirs")
    return {"cases": cases, "aim": 2.5}


if __name__ == "__main__":
    which, mean_wait = sys.argv.pop(1), float(sys.argv.pop(1))
    main(lambda: rank(which, mean_wait, cli(rl.Args)))
