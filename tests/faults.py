"""All that may go wrong in a verifier, by the gold. Workers import it, so it imports little."""
import math
import os
import signal
import sys
import time

import numpy as np


def faulty(evidence):
    gold = evidence["gold"]
    if gold == "hang":
        time.sleep(600)
    if gold == "spin":
        while True:
            pass
    if gold == "exit":
        os._exit(0)
    if gold == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if gold == "raise":
        raise KeyError("gone")
    if gold == "once" and not os.path.exists(evidence["mark"]):
        open(evidence["mark"], "w").close()
        os._exit(1)
    odd = {"nan": math.nan, "inf": math.inf, "string": "1.0", "none": None, "true": True,
           "numpy true": np.bool_(True), "two": 2, "minus": -0.1, "array": np.ones(2)}
    good = {"float": 0.5, "int": 1, "float32": np.float32(0.25), "int64": np.int64(1), "once": 1.0}
    return odd[gold] if gold in odd else good[gold]


def torchless(evidence):
    return float("torch" not in sys.modules and "gym" not in sys.modules)
