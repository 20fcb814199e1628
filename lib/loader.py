"""Samples loaded ahead, in worker processes, in their order.

A stream is a function of the index: `stream(i)` makes sample i, whatever has been made before. So a
worker makes every n-th sample, the trainer takes them in order, and a worker that has died is asked
again. `SampleLoader` does that; `RankShard` gives each rank its own samples.
"""
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass

import torch

from lib.cli import UserError
from lib.common import first_sentence, heartbeat


def make_sample(stream, i: int):
    """Sample i, or a UserError that names it, after the traceback on stderr, where making it fails.
    So a run can save its steps and end, instead of losing them."""
    try:
        return stream(i)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"sample {i} can't be made: {type(error).__name__}: "
                        f"{first_sentence(error)}") from None


def end_with_trainer():
    """Wait until the process that has started this one has ended, then end at once."""
    multiprocessing.parent_process().join()
    os._exit(1)


def serve_samples(pipe, stream):
    """The work of a worker process: receive indices, send their samples or a UserError, until None
    comes or the trainer ends. If that is killed it can't say so, and a worker may be drawing for
    minutes: therefore a thread watches it.

    A Ctrl-C at the terminal sends SIGINT to every process of a run. A worker must survive the first
    one, since the trainer finishes its step, which may need more samples, and saves:

        event              trainer                           worker
        workers start      ignores SIGINT until all run      inherits that while Python starts up
        this function      has its own handler again         the first SIGINT only restores the
                                                             default: the next one ends the process
        first Ctrl-C       notes it, finishes the step       continues to serve
        second Ctrl-C      raises KeyboardInterrupt          ends
    """
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))
    threading.Thread(target=end_with_trainer, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):    # the trainer has ended
        while (indices := pipe.recv()) is not None:
            try:
                answer = [make_sample(stream, i) for i in indices]
            except UserError as error:      # the trainer decides what to do; this process continues
                answer = error
            pipe.send(answer)


@contextlib.contextmanager
def ignore_ctrl_c():
    """Ignore SIGINT until the block ends; processes that are started in it begin by ignoring it."""
    if threading.current_thread() is not threading.main_thread():
        yield                           # Python lets only the main thread set handlers
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class SampleLoader:
    """Samples by index: `loader(i)`, loaded `burst` at a time by `workers` processes.

    On a CPU, workers that load while the model trains slow training down several times. So the next
    burst is requested when this one is used up; with `overlap` (a GPU trains) as soon as it has
    arrived. The processes share pipes only: no fork, no shared memory. workers=0 loads in this
    process. `seconds` is the time that the trainer has waited for samples.
    """

    def __init__(self, stream, workers: int = 0, burst: int = 2048, overlap: bool = False):
        self.stream, self.burst, self.overlap = stream, burst, overlap
        self.seconds = 0.0
        self.ready = {}             # {index: sample}
        self.requests = []          # [(number of the worker, indices), ...] without an answer yet
        self.workers = [self._start() for _ in range(workers)]      # [(process, our pipe), ...]

    def _start(self):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_samples, args=(theirs, self.stream), daemon=True)
        with ignore_ctrl_c():       # see serve_samples
            process.start()
        theirs.close()
        return process, ours

    def __call__(self, i: int):
        began = time.perf_counter()
        if not self.workers:
            sample = make_sample(self.stream, i)
        else:
            if i not in self.ready:
                self._receive(i)
            sample = self.ready.pop(i)
        self.seconds += time.perf_counter() - began
        return sample

    def _receive(self, i: int):
        """Wait for all that has been requested, which sample i is part of, into `ready`. Raises
        UserError where a sample can't be made or the workers do not live."""
        if not any(i in indices for _, indices in self.requests):
            self._request(i)
        last = max(indices[-1] for _, indices in self.requests)
        with heartbeat(f"samples {i} and on, from {len(self.workers)} workers"):
            while self.requests:
                answer = self._answer()
                _, indices = self.requests.pop(0)
                if isinstance(answer, UserError):
                    raise answer
                self.ready.update(zip(indices, answer))
        if self.overlap:
            self._request(last + 1)

    def _request(self, start: int):
        """Ask the workers for samples start .. start + burst - 1: worker w of n makes every n-th,
        from start + w on."""
        for w in range(min(len(self.workers), self.burst)):
            self.requests.append((w, range(start + w, start + self.burst, len(self.workers))))
            self._send(*self.requests[-1])

    def _send(self, w: int, indices):
        with contextlib.suppress(OSError):      # it has died: `_answer` will see that
            self.workers[w][1].send(indices)

    def _answer(self):
        """The answer to the first request. A worker that has died, for example killed by the kernel
        when memory ran out, is started again and asked again: a sample depends on its index alone.
        Raises UserError where three in a row die without an answer."""
        w, indices = self.requests[0]
        for deaths in (1, 2, 3):
            process, pipe = self.workers[w]
            try:
                return pipe.recv()
            except (EOFError, OSError):
                process.join()
                pipe.close()
                died = (f"a process that loads samples {indices[0]} and on has died (exit code "
                        f"{process.exitcode}; -9 often means that memory ran out)")
                if deaths == 3:
                    raise UserError(f"{died}, three times; fewer --workers need less memory") \
                        from None
                print(f"{died}: started again", file=sys.stderr)
                self.workers[w] = self._start()
                for request in self.requests:
                    if request[0] == w:
                        self._send(*request)

    def close(self):
        """End the workers, even in the middle of a sample, and forget what they have made."""
        for process, pipe in self.workers:
            process.kill()
            process.join()
            process.close()
            pipe.close()
        self.workers, self.requests, self.ready = [], [], {}


@dataclass
class RankShard:
    """The samples of one rank: each global batch of world * share samples is dealt out in
    consecutive shares. With world=2, share=3 rank 1 gets samples 3 4 5, 9 10 11, ..."""
    stream: object
    rank: int
    world: int
    share: int          # samples a rank and batch

    def __call__(self, i: int):
        batch, own = divmod(i, self.share)
        return make_sample(self.stream, (batch * self.world + self.rank) * self.share + own)
