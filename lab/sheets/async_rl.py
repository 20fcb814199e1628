"""Asynchronous RL gets its samples faster where verdicts take time, and learns as well from them.

Rollouts, rewards and updates are decoupled and overlap: a reply is judged when it ends, and nobody
waits for the slowest one [C]. The paper gives no number; relatives report 2.77 times the speed
[R: AReaL] and 2.9 times [R: AsyncWebRL].

Whole runs of rl.py on two processes, one that plays and one that learns (lab/bench_rl.py), from
`ckpt/demo`, on counting. Each verdict takes a random time, a second on average, so that most of a
run is waiting, as with a judge or a page that has to be drawn. 32 rollouts are played at once, and
12 updates learn from 4 groups of 8. `synchronous`: all groups are back before an update begins.
`asynchronous`: a sample may lag two updates behind. Wall-clock times are compared, so nothing else
should run on the machine.

`rate`: samples a second that were learned from. `right`: percent of 400 held-out tasks after the
same number of updates. `lag`: the most updates that a sample was late. `waited`: the share of the
time that the learning process had nothing to learn from.
"""
import math

from lab import bench_rl
from lab.sheet import Gain, NoLoss, Sheet

STEPS, HELD_OUT = 12, 400
STALENESS = {"synchronous": 0, "asynchronous": 2}


def measure(arm, seed, folder):
    found = bench_rl.one_run("verifiers", STALENESS[arm], seed, "float32", STEPS, HELD_OUT)
    return {"rate": found["rate"], "right": 100 * found["right"], "lag": found["stale_max"],
            "waited": found["waited"]}


def doublings(runs):
    """How often the synchronous rate doubles to become the asynchronous one."""
    return math.log2(runs["asynchronous"]["rate"] / runs["synchronous"]["rate"])


SHEET = Sheet(
    arms=tuple(STALENESS), measure=measure, minutes=8,
    equal=f"{STEPS} updates of 4 groups of 8, 32 rollouts at once, two processes",
    tests=(Gain("log2 of samples a second, asynchronous over synchronous", doublings,
                claimed=round(math.log2(2.5), 2),
                source="[O] log2 of 2.5, a little less than 2.77 [R: AReaL] and 2.9 [R]"),
           NoLoss("points of held-out tasks, asynchronous minus synchronous",
                  lambda runs: runs["asynchronous"]["right"] - runs["synchronous"]["right"],
                  claimed=5.0, source="[O] less than that is no loss")))
