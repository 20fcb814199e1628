"""What asynchrony gains where environments or verifiers are slow: `python -m lab.bench rl`.

Whole runs of rl.py on two ranks of torchrun, one that plays and one that learns, from the demo's
model. In two of the three worlds each verdict, or each screen, takes a random time, log-normal with
sigma 1 and a mean of WAIT seconds; in the third nothing waits. At most FLIGHT rollouts are played
at once, in groups of SIZE, PROMPTS groups an update. `ours` may lag two updates behind. `theirs`
has staleness 0: all groups must be back before an update begins, and none is begun before it ends.

A reward is the mean of the verdict and of a random 0 or 1, so that nearly every group has a signal
and both sides learn from as many.

The bound is the least of three rates: FLIGHT rollouts that wait W seconds each give at most
FLIGHT / W a second; no more can be played, or learned from, than the seconds allow that playing or
learning takes, on the side where it takes less.
"""
import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import gym
import rl
from lab.bench_case import case_of_speeds
from lib import async_rl
from lib.cli import cli, main, UserError
from lib.common import read_log, ROOT, write_json

WAIT = 1.0                    # mean seconds
FLIGHT, SIZE, PROMPTS, STEPS = 32, 8, 4, 24
HELD_OUT = 200                # tasks of the evaluations before and after
WORLDS = {"verifiers": "counting", "screens": "gui_form", "nothing": "counting"}


class Slow:
    """Sleeps for a random time when called; counts the calls and their seconds."""

    def __init__(self, mean: float):
        self.mean, self.total, self.count = mean, 0.0, 0

    def __call__(self):
        seconds = self.mean * random.lognormvariate(-0.5, 1.0)      # e^(mu + 1/2) = 1
        self.total, self.count = self.total + seconds, self.count + 1
        time.sleep(seconds)


def rank(world: str, wait: float, args: rl.Args):
    """One of the two processes: rl.py with slow verifiers or slow screens."""
    slow = Slow(0.0 if world == "nothing" else wait)

    class Verdicts(gym.Rewards):
        def __init__(self, workers):        # in this process: it only sleeps, in Actor's threads
            super().__init__()

        def score(self, task, evidence):
            score = super().score(task, evidence)
            if task.split == "test":        # evaluations are not slowed down
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


def one_run(world: str, staleness: int, seed: int, dtype: str, steps: int, held_out: int) -> dict:
    """One run: samples a second that were learned from, and how each stage spent its time.
    held_out: tasks of its evaluations."""
    with tempfile.TemporaryDirectory() as out:
        options = dict(mix=WORLDS[world], steps=steps + 1, prompts=PROMPTS, group=SIZE,
                       flight=FLIGHT, slots=FLIGHT, workers=FLIGHT, max_staleness=staleness,
                       seed=seed, mtp=0, eval_every=steps + 1, eval_count=held_out, device="cpu",
                       dtype=dtype, out=out)
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "-m", "lab.bench_rl", world, str(WAIT), *(f"--{k}={v}" for k, v in options.items())],
            cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"a run of {world} has ended with code {done.returncode}: see above")
        lines, waits = read_log(Path(out) / "log.jsonl")[1:], Path(out) / "waits.json"
        wait = json.loads(waits.read_text()) if waits.exists() else {"count": 1, "seconds": 0.0}
        right = json.loads((Path(out) / "report.json").read_text())["figures"]["mean"]
    took, learned = (sum(x[key] for x in lines) for key in ("dt", "groups"))
    if not learned:
        raise UserError(f"no group of {world} had a signal, so nothing was learned from: there is "
                        "no speed to compare")
    learned *= SIZE
    share = {key: sum(x[key] for x in lines) / took
             for key in ("waited", "learning", "idle", "stalled")}
    samples = max(1, sum(x.get("samples", 0) for x in lines))
    turns = wait["count"] * steps / (steps + 1) / samples if wait["seconds"] else 0.0
    return {"rate": learned / took, "learnt": learned, **share,
            "wait": turns * wait["seconds"] / wait["count"], "turns": turns,
            "stale_max": max(x.get("stale_max", 0) for x in lines),
            "playing": (1 - share["idle"]) * took / learned,
            "training": share["learning"] * took / learned,
            "right": list(right.values())[-1]}


def measure(args, hw) -> dict:
    """Run all worlds with both kinds of training, in turn; returns the cases that lab.bench
    prints."""
    cases = {}
    for world in WORLDS:
        runs = {0: [], 2: []}
        for i in range(args.rounds):
            for staleness in runs:
                runs[staleness].append(one_run(world, staleness, args.seed + i, args.dtype, STEPS,
                                               HELD_OUT))
        rates = {s: [run["rate"] for run in found] for s, found in runs.items()}
        mean = {s: {k: statistics.mean(run[k] for run in found) for k in found[0]}
                for s, found in runs.items()}
        waiting = mean[0]["wait"]
        bound = min(FLIGHT / waiting if waiting else math.inf,
                    *(1 / min(run[stage] for found in runs.values() for run in found)
                      for stage in ("playing", "training")))
        settings = []
        for s in (2, 0):
            spread = 1.96 * (mean[s]["right"] * (1 - mean[s]["right"]) / HELD_OUT) ** 0.5
            settings.append(f"staleness {s}; engine idle {mean[s]['idle']:.0%}, loading weights "
                            f"{mean[s]['stalled']:.1%}; trainer waits {mean[s]['waited']:.0%}, "
                            f"learns {mean[s]['learning']:.0%}; held out {mean[s]['right']:.1%} "
                            f"± {100 * spread:.1f}")
        case = case_of_speeds(rates[2], rates[0], settings, bound=bound)
        case["ours"] |= mean[2]
        case["theirs"] |= mean[0]
        if not waiting:
            case["aim"] = 1.0
        cases[f"waiting for {world}"] = case
        print(f"waiting for {world}: {waiting:.2f} s a sample in {mean[0]['turns']:.1f} waits; at "
              f"most {bound:.1f} samples/s, {bound / mean[0]['rate']:.2f} times theirs")
    return {"cases": cases, "aim": 2.5}


def entry():
    """One of the two ranks: python -m lab.bench_rl WORLD SECONDS, and options of rl.py."""
    words = sys.argv[1:3]
    if len(words) < 2 or words[0] not in WORLDS or not re.fullmatch(r"\d+(\.\d+)?", words[1]):
        raise UserError(f"`python -m lab.bench rl` starts this, with {', '.join(WORLDS)} and the "
                        "mean seconds of a wait")
    rank(words[0], float(words[1]), cli(rl.Args, sys.argv[3:]))


if __name__ == "__main__":
    main(entry)
