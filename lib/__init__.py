"""What the scripts share. Every script imports this package first, before torch.

OpenMP reads its settings when torch is loaded, so they must be in the environment before that. By
default a waiting OpenMP thread spins at full speed until there is work again. Two spinning threads
compete for a core with every other busy process: beside four of them a step of the demo took 1.0
second instead of 0.09. With the settings below, a thread spins for a moment and then sleeps: 0.47
seconds there, 0.10 on a quiet machine. Sleeping at once (a spin count of 0) is no faster beside
others and takes 0.17 seconds on a quiet machine, where the next piece of work arrives within
microseconds. `python -m lab.bench busy` measures this; LOG.md has the figures.

A script that is run with a Python that lacks the packages says in one line where they are.
"""
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # loop iterations; GNU's OpenMP reads this

PACKAGES = "torch", "numpy", "einops", "tiktoken", "PIL", "pytest"      # of requirements.txt


def where_packages_are(name: str) -> str:
    return (f"this Python, {sys.executable}, has no package {name}: `make .venv/ready` installs "
            "what is needed into .venv; use .venv/bin/python then")


def explain(kind, error, trace):
    """Called by Python on an error that nobody caught."""
    if kind is ModuleNotFoundError and error.name in PACKAGES:
        print(f"error: {where_packages_are(error.name)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain
