"""A teacher without labels collapses unless its targets are centred and scaled.

Where the paper's encoder learns texture, it learns it from DINOv3, a teacher that was trained
without labels [C]. Such a teacher predicts its own running mean, and the cheapest answer is the
same one for every picture. DINO prevents that by two means: a prototype that everybody chooses
loses its lead (centring), and a target stays decided (a low temperature) [R: DINO].

Two runs a seed of lab/dino.py, from the same tower and on the same pictures: with both means, and
without. `used` is the entropy of the mean target as a share of its maximum: 1 where all prototypes
are in use, 0 where every patch gets the same one.
"""
from dataclasses import replace

from lab import dino
from lab.sheet import Gain, Sheet
from lib.common import read_log

ARMS = {"with both": "none", "without": "both"}
PLAIN = dino.Args(steps=160, batch=32, probes=64)


def measure(arm, seed, folder):
    figures = dino.run(replace(PLAIN, without=ARMS[arm], seed=seed, out=str(folder)))
    log = read_log(folder / "log.jsonl")
    return {"used": figures["used"], "spread": figures["spread"],
            "prototypes in use, share of the maximal entropy":
                [(line["step"], line["used"]) for line in log]}


SHEET = Sheet(
    arms=tuple(ARMS), measure=measure, minutes=4,
    equal="the tower of ckpt/semantic, 160 steps of 32 pictures, the same pictures",
    tests=(Gain("prototypes in use (0 to 1), with centring and scaling minus without",
                lambda runs: runs["with both"]["used"] - runs["without"]["used"],
                claimed=0.3, source="[O] a third of the whole range"),))
