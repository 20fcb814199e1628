"""A partition that is planned at loading gives each rank only its share, and an equal one.

Usually every rank holds all patches of a micro-step, encodes a part of them and gathers what the
others have encoded. The paper moves the partition up to data loading: a rank receives only what it
needs, and micro-batches are packed by text length and visual tokens together, so that ranks have
equal work [C]. It gives no figure for either; its 7 GB are of Python objects [C].

lab/bench_partition.py simulates 200 steps of `base` on 2, 4 and 8 ranks with the planner that
pretrain.py uses, and counts; no model computes. Pictures have 64 to 4,096 patches, texts 16 to
4,096 tokens. A run is a number of ranks. `MB`: what the rank with most of them reads and receives
in a step; `max/mean`: the time of a step over that of ranks with equal work.

Plain data parallelism, where each rank loads its own rows, reads as little. What the plan adds to
it is equal work: compare the two `max/mean`.
"""
from lab.bench_partition import simulate
from lab.sheet import Gain, NoLoss, Sheet

STEPS = 200
RANKS = {"2 ranks": 2, "4 ranks": 4, "8 ranks": 8}


def measure(arm, seed, folder):
    ways = simulate(RANKS[arm], seed, STEPS)
    return {f"{figure}, {way}": ways[way][figure]
            for figure in ("MB", "max/mean") for way in ("planned", "gathered", "data parallel")}


def saved(runs):
    """Bytes saved on 8 ranks, in percent of the conventional way's."""
    run = runs["8 ranks"]
    return 100 * (1 - run["MB, planned"] / run["MB, gathered"])


def balance(runs):
    """Minus the percent that a step takes longer than with equal work, for the worst number of
    ranks."""
    return -100 * max(run["max/mean, planned"] - 1 for run in runs.values())


SHEET = Sheet(
    arms=tuple(RANKS), measure=measure, minutes=1.3,
    equal="200 steps, four rows of 16,384 tokens a rank, the same samples in all four ways",
    tests=(Gain("MB that a rank of 8 reads and receives, percent saved", saved,
                claimed=50, source="[O] the paper has no figure; half must be worth the planning"),
           NoLoss("time lost to unequal work, percent, as a loss", balance,
                  claimed=2, source="[O] the paper has no figure; steps vary by more")))
