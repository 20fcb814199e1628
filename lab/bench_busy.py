"""How much four busy processes slow down a training step: `python -m lab.bench busy`.

OpenMP splits each operation among its threads and waits until all are done. If another process has
taken a core, the thread on that core is late, and all the others wait for it. How they wait decides
what happens then: threads that spin keep the other cores busy with nothing. lib/__init__.py lets
them spin for a moment and then sleep.

Each row of ROWS is one way to wait, in a process of its own, since OpenMP reads the environment
only once. All of them run the same training step: `pretrain.py` at `tiny` with the demo's
categories and tokens a step. A round measures every row alone and then beside the busy processes,
so that a load from outside falls on all rows alike. On a machine with 2 cores, four busy processes
leave two threads a third of it: without any waste the step would take 3 times as long.

One row in a process of its own: `python -m lab.bench_busy STEPS` waits for a line on its standard
input, runs STEPS steps, and prints their median in seconds.
"""
import lib  # first of all, before torch: see lib/__init__.py

import contextlib
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from data import collate, Packer, parse_mix, Stream
from lab import demo
from lab.bench_case import case_of_times
from lib.cli import cli, main, Positive, UserError
from lib.common import ROOT, setup
from lib.loader import SampleLoader
from model import GLMV, sized
from optim import OptimConfig, Optimizer
from pretrain import loss_sum

MOST = 3.0          # the aim: with our settings, time beside busy processes over time alone
BUSY = 4            # busy processes
STEPS = 6           # training steps of one measurement; their median counts
ROWS = {            # name: environment; the variables that are not named are unset
    "our settings (lib/__init__.py)": {},
    "spinning, the default of torch": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"},
    "sleeping at once": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"}}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")

# A busy process ends by itself if nobody is left to end it: an orphan gets another parent.
LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10_000))"


@contextlib.contextmanager
def busy(count: int):
    """`count` processes that do nothing but keep a core busy, while the block runs."""
    processes = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-c", LOOP,
                                               str(os.getpid())]))
        time.sleep(0.2)             # until they have started
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def start(environment: dict[str, str], steps: int) -> subprocess.Popen:
    """A process that measures one row whenever it gets a line."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.Popen([sys.executable, "-m", "lab.bench_busy", str(steps)], cwd=ROOT,
                            env=kept | environment, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)


def ask(process: subprocess.Popen) -> float:
    """Let `process` measure, and return its seconds a step. Raises UserError if it has ended."""
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())
    except (ValueError, OSError):
        raise UserError(f"a process that measures has ended with code {process.wait()}: "
                        "see above") from None


def measure(args, hw) -> dict:
    """All rows, {"cases": {row: seconds a step alone and beside busy processes, their ratio}}."""
    alone, beside = ({name: [] for name in ROWS} for _ in range(2))
    processes = {}
    try:
        for name, environment in ROWS.items():
            processes[name] = start(environment, STEPS)
        for process in processes.values():
            ask(process)            # the first steps are slower
        for _ in range(args.rounds):
            for name, process in processes.items():
                alone[name].append(ask(process))
                with busy(BUSY):
                    beside[name].append(ask(process))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    cases = {name: case_of_times({"alone": alone[name],
                                  f"beside {BUSY} busy processes": beside[name]}) for name in ROWS}
    cases[next(iter(ROWS))]["aim"] = MOST       # the others are there for comparison
    return {"cases": cases}


def training_step():
    """A function that runs one training step of the demo on a batch that is made beforehand."""
    hw, config = setup("cpu"), sized("tiny")
    model = GLMV(config, seed=0).to(hw.dtype)
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    stream = Stream(config, parse_mix(demo.MIX), seed=0)
    loader = SampleLoader(stream, 0)
    row = Packer(loader, demo.ROW_TOKENS).row()
    loader.close()
    batch = collate(row, config, demo.ROW_TOKENS)
    weight = float(batch.weights.sum())

    def step():
        loss_sum(model, batch)[0].div(weight).backward()
        norm = optimizer.reduce().sqrt().item()
        optimizer.step(0.0, norm)   # a learning rate of 0: every step does the same work

    return step


@dataclass
class Args:
    steps: Positive = STEPS       # training steps of one measurement; also as a bare word


def worker(steps: int):
    """Measure one row: see the end of the docstring on top."""
    step = training_step()
    for _ in sys.stdin:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        print(statistics.median(seconds), flush=True)


if __name__ == "__main__":
    main(lambda: worker(cli(Args, about=__doc__, positional="steps").steps))
