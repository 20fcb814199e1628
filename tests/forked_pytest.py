"""Runs of pytest that do not wait for torch: this process imports it once, and forks for each run.
An import takes seconds, a fork nothing.

Started in the folder whose tests are to run. Each line of stdin asks for a run:
{"words": what `pytest` is called with, "environment": {name: value}, "log": file for the output}.
Each line of stdout answers with its exit code and the CPU seconds that it took.
"""
import importlib
import json
import os
import resource
import signal
import sys

import pytest

EARLY = ("einops", "numpy", "PIL.Image", "torch.distributed.tensor", "torch.nn.attention.varlen")
LONGEST = 600       # seconds that a run may take, on a machine that is busy


def run(words: list[str], environment: dict, log: str):
    """In the fork: become `pytest WORDS` and end."""
    os.setsid()
    signal.alarm(LONGEST)       # ends this process, unless it has done so itself
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, stream)
    sys.path[0] = os.getcwd()
    if environment:             # perhaps torch or Triton have read it already
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *words])
    code = pytest.main(words)
    sys.stdout.flush()
    os._exit(code)


def seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    for name in EARLY:
        importlib.import_module(name)
    for line in sys.stdin:
        before, child = seconds(), os.fork()
        if not child:
            run(**json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            os.killpg(child, signal.SIGKILL)    # what its tests have left behind
        except ProcessLookupError:
            pass
        print(json.dumps([code, round(seconds() - before, 2)]), flush=True)
