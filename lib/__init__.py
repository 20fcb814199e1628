"""What the scripts share. Every script imports this package first, before torch.

OpenMP reads its settings when torch is loaded, so they must be in the environment before that. By
default a waiting OpenMP thread spins at full speed until there is work again. Two spinning threads
compete for a core with every other busy process: a step of the demo then took 19 seconds instead of
0.7. With the settings below a thread spins for a moment and then sleeps. Sleeping at once (a spin
count of 0) would be as robust, but costs half the speed on a quiet machine, where the next piece of
work arrives within microseconds. `python -m lab.bench busy` measures this.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # loop iterations; GNU's OpenMP reads this
