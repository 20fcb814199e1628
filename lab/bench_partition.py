"""Planned partitioning, simulated, beside simpler ways: `python -m lab.bench partition`.

1,000 steps of `base` at its default of four rows of 16,384 tokens a rank, on 2, 4 and 8 ranks, with
the planner of pretrain.py (data.Packer and lib/partition.py) and without a model: what a rank would
take is counted in FLOPs (Costs). Each sample is a text of 16 to 4,096 tokens, which is learnt, and
a picture of 64 to 4,096 patches, nearly square, both log-uniform: half of the texts have fewer than
256 tokens, and half of the tokens are in texts of more than 2,000. No picture has a home.

    planned                 as pretrain.py does it
    data parallel           rows are filled in the order of the samples, and a row is closed by the
                            first one that does not fit; each rank encodes the pictures of its rows
    first-fit decreasing    the samples of a batch, longest first, each go to the first row with
                            room; what finds none waits for the next batch; else data parallel
    gathered                rows as in data parallel; each rank holds all pictures of a micro-step,
                            encodes a stretch of them, and gathers what all have encoded: the
                            conventional way

padding     the share of the rows' tokens that are none
max/mean    the time of a step, over that of ranks with equal work. Data parallel ranks wait for
            each other once a step, for the one with most to do; planned and gathered ones twice in
            a micro-step, for the slowest tower and for the slowest decoder
MB          ids and weights, pixels, embeddings from other ranks and their gradients in bf16 that
            the rank with most of them reads or receives in a step; MicroStep.bytes_in
"""
import lib  # first of all, before torch: see lib/__init__.py

import functools
import math
import time

import numpy as np

from data import Document, pack_rows, Packer
from lib.partition import AHEAD, balance, Costs, most_bytes_in, plan_steps, Stub
from model import sized

STEPS = 1000
RANKS = (2, 4, 8)
ROWS, ROOM = 4, 16384       # rows a rank, tokens a row: those of base in pretrain.py
PADDING, BALANCE, BYTES = 0.03, 1.02, 0.5       # the aims; bytes on 4 and 8 ranks, of gathered
TEXT, PATCHES = (16, 4096), (64, 4096)
NO_IDS = np.zeros(TEXT[1] + PATCHES[1] // 4, np.int32)
WEIGHTS = np.repeat(np.float32([0, 1]), [PATCHES[1] // 4, TEXT[1]])     # of a picture, of a text


class Samples:
    """A stream like data.Stream, of which only sizes matter. seed: of all that is random."""

    def __init__(self, seed: int, patch: int):
        self.seed, self.patch = seed, patch

    def __call__(self, i: int) -> list[Document]:
        rng = np.random.default_rng([self.seed, i])
        text, patches = (low * (high / low) ** rng.random() for low, high in (TEXT, PATCHES))
        text, groups = round(text), patches / 4
        height = round(math.sqrt(groups))       # in groups of 2 x 2 patches
        width = round(groups / height)
        picture = Stub((2 * self.patch * height, 2 * self.patch * width, 3), i, 0, None)
        visual, border = height * width, PATCHES[1] // 4
        return [Document(NO_IDS[:visual + text], WEIGHTS[border - visual:border + text], [picture])]


class InOrder:
    """Batches of rows that are filled in the order of the samples, or longest first."""

    def __init__(self, samples, rows: int, decreasing: bool):
        self.samples, self.rows, self.decreasing = samples, rows, decreasing
        self.next, self.waiting = 0, []

    def batch(self) -> list[list[Document]]:
        return self._decreasing() if self.decreasing else [self._row() for _ in range(self.rows)]

    def _sample(self) -> Document:
        if self.waiting:
            return self.waiting.pop(0)
        self.next += 1
        return self.samples(self.next - 1)[0]

    def _row(self) -> list[Document]:
        row, free = [], ROOM
        while len((made := self._sample()).ids) <= free:
            row.append(made)
            free -= len(made.ids)
        self.waiting = [made]
        return row

    def _decreasing(self) -> list[list[Document]]:
        taken, tokens = [], 0
        while tokens < self.rows * ROOM:
            taken.append(self._sample())
            tokens += len(taken[-1].ids)
        rows = pack_rows(sorted(taken, key=lambda d: -len(d.ids)), ROOM)
        self.waiting = [d for row in rows[self.rows:] for d in row] + self.waiting
        return rows[:self.rows]


def data_parallel(rows, ranks: int, costs: Costs) -> tuple[float, int]:
    """(max/mean, bytes in) where rank r computes and encodes rows r, r + ranks, ..."""
    loads, pixels = np.zeros(ranks), np.zeros(ranks)
    for number, row in enumerate(rows):
        _, decoder, tower = costs.documents(row)
        loads[number % ranks] += costs.token * ROOM + decoder + tower
        pixels[number % ranks] += sum(math.prod(d.images[0].shape) for d in row)
    text = 8 * sum(len(d.ids) for row in rows for d in row)
    return loads.max() / loads.mean(), int(pixels.max()) + text


def simulate(ranks: int, seed: int, count: int) -> dict:
    """{way: {"padding", "max/mean", "worst", "MB"}}, means over `count` steps; worst: of max/mean.
    """
    config = sized("base")
    costs = Costs.of(config)
    # Three ways ask for each sample, about at the same time.
    samples = functools.lru_cache(2 ** 14)(Samples(seed, config.vision.patch_size))
    rows, visual_token = ROWS * ranks, 2 * config.text.hidden_size
    planner = Packer(samples, ROOM, rows, costs, ahead=AHEAD)
    in_order = InOrder(samples, rows, False)
    decreasing = InOrder(samples, rows, True)
    found = {way: [] for way in ("planned", "data parallel", "first-fit decreasing", "gathered")}

    def note(way, batch, ratio, received):
        used = sum(len(d.ids) for row in batch for d in row)
        found[way].append((1 - used / (rows * ROOM), ratio, received / 1e6))

    seconds = 0.0
    for _ in range(count):
        began = time.perf_counter()
        batch = planner.batch()
        steps = plan_steps(batch, ROOM, costs, ranks)
        seconds += time.perf_counter() - began
        note("planned", batch, balance(steps), most_bytes_in(steps, visual_token))
        batch = decreasing.batch()
        note("first-fit decreasing", batch, *data_parallel(batch, ranks, costs))
        batch = in_order.batch()
        note("data parallel", batch, *data_parallel(batch, ranks, costs))
        steps = [step for first in range(0, rows, ranks) for step in
                 plan_steps(batch[first:first + ranks], ROOM, costs, ranks, "gathered")]
        note("gathered", batch, balance(steps), most_bytes_in(steps, visual_token))
    print(f"{ranks} ranks; a plan takes {1000 * seconds / count:.1f} ms, drawing sizes included")
    return {way: dict(zip(("padding", "max/mean", "MB"), np.mean(values, 0).tolist()),
                      worst=max(ratio for _, ratio, _ in values)) for way, values in found.items()}


def measure(args, hw) -> dict:
    """Print the table; returns {"cases": {}, "ranks": {number of ranks: what `simulate` gives}}."""
    result = {}
    for ranks in RANKS:
        result[ranks] = ways = simulate(ranks, args.seed, STEPS)
        print(f"{'':<24}{'padding':>10}{'max/mean':>10}{'worst':>10}{'MB':>10}{'of gathered':>12}")
        for way, row in ways.items():
            share = row["MB"] / ways["gathered"]["MB"]
            print(f"{way:<24}{row['padding']:>10.2%}{row['max/mean']:>10.4f}{row['worst']:>10.4f}"
                  f"{row['MB']:>10,.0f}{share:>12.2f}")
        ours, share = ways["planned"], ways["planned"]["MB"] / ways["gathered"]["MB"]
        reached = (ours["padding"] <= PADDING and ours["max/mean"] <= BALANCE
                   and (ranks == 2 or share <= BYTES))
        print(f"aims: padding {PADDING:.0%}, max/mean {BALANCE}"
              f"{f', {BYTES} of the bytes' * (ranks > 2)}: {'reached' if reached else 'missed'}")
    return {"cases": {}, "ranks": result}
