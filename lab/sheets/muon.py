"""Muon trains in fewer steps than AdamW, both tuned.

The paper trains its encoder with Muon [C], which gives all directions of a weight matrix an update
of the same size (optim.py). Moonlight reports that Muon needs 52% of the compute that AdamW needs
for the same loss [R: arXiv 2502.16982]. Here AdamW updates the matrices too; all else is the same.

Two arms a seed, each of four runs at four learning rates, of which the best one counts: a tower
learns from random weights to name the shape under each patch (stage `texture` of train_vit.py).
`loss` is the mean over the last tenth of the steps. No picture comes twice, so it is a loss on
pictures that the tower has not seen. The effect is a log2: 1 says that Muon has AdamW's last loss
after half of the steps. That is an underestimate, as Muon's learning rate has not fallen by then.
A step of Muon takes more time: see `CPU seconds a step`.
"""
import math
import statistics
from unittest import mock

import optim
import train_vit
from lab.sheet import Gain, Sheet
from lab.worlds import timed
from lib.common import read_log, setup

STEPS = 250
# Around the best rate of each in a first answer and a look with another seed (LOG.md), so that it
# should not lie at an edge.
RATES = {"Muon": (8e-3, 16e-3, 32e-3, 64e-3), "AdamW": (2e-3, 4e-3, 8e-3, 16e-3)}


def train(args: train_vit.Args):
    train_vit.train("texture", train_vit.check(args), setup("cpu", "float32"))


def losses(folder) -> list[tuple[int, float]]:
    """(step, mean loss of the tenth of the run that ends there), every 5 steps."""
    loss, window = [row["loss"] for row in read_log(folder / "texture/log.jsonl")], STEPS // 10
    return [(step, statistics.fmean(loss[step - window:step]))
            for step in range(window, STEPS + 1, 5)]


def measure(arm, seed, folder):
    curves, seconds = {}, 0.0
    chosen = optim.is_matrix if arm == "Muon" else lambda name, parameter: False
    with mock.patch.object(optim, "is_matrix", chosen):     # what Muon updates; AdamW has the rest
        for rate in RATES[arm]:
            args = train_vit.Args(stage="teachers", steps=STEPS, batch=32, lr=rate, seed=seed,
                                  resume=True, eval_every=0, log_every=50, probes=16, workers=0,
                                  device="cpu", out=str(folder / f"rate{rate}"))
            seconds += timed(train, args)
            curves[rate] = losses(folder / f"rate{rate}")
    best = min(curves, key=lambda rate: curves[rate][-1][1])
    return {"loss": curves[best][-1][1], "best rate": best,
            "CPU seconds a step": seconds / STEPS / len(RATES[arm]),
            **{f"loss at {rate}": curve[-1][1] for rate, curve in curves.items()},
            "loss over steps": curves[best]}


def doublings(runs):
    """log2 of all steps over those after which Muon has AdamW's last loss. If AdamW's is lower in
    the end, the other way round, and negative."""
    muon, adamw = (runs[arm]["loss over steps"] for arm in ("Muon", "AdamW"))
    sign, ahead, behind = 1, muon, adamw
    if muon[-1][1] > adamw[-1][1]:
        sign, ahead, behind = -1, adamw, muon
    reached = next(step for step, loss in ahead if loss <= behind[-1][1])
    return sign * math.log2(ahead[-1][0] / reached)


SHEET = Sheet(
    arms=tuple(RATES), measure=measure, minutes=12,
    equal=f"initial weights, {STEPS} steps of 32 pictures, the same pictures, four learning rates",
    tests=(Gain("doublings of the steps, AdamW over Muon", doublings, claimed=math.log2(1 / 0.52),
                source="[R: Moonlight] 52% of the compute"),))
