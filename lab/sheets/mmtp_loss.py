"""The option that the paper adopts trains with no more loss than passing visual embeddings.

In a 0.5B ablation, the loss of the head that predicts further tokens is slightly lower with one
learnable embedding at visual slots (`token`) than with the visual embeddings (`embed`), from about
step 300 on, and steadier [C]. The paper shows two curves and no number; the gap is small.

`tiny` trains 350 steps of 2,048 tokens, with the head from the first step on, on questions about
pictures and some text; a seed draws weights and samples, the same ones in the same order for both
options. `MTP loss` is the mean over depths 1 to 3 and the last fifth of the steps, so from step 281
on, and `spikes` the percent of steps whose gradient norm is over three times the median: what
"steadier" may mean.
"""
from statistics import fmean, median

from lab.mmtp_options import train
from lab.sheet import Gain, NoLoss, Sheet

STEPS, DEPTHS = 350, 3


def measure(arm, seed, folder):
    log = train(arm, seed, STEPS, DEPTHS, folder)
    tail = log[-max(1, STEPS // 5):]
    losses = [(line["step"], fmean(line[f"mtp{k}"] for k in range(1, DEPTHS + 1))) for line in log]
    middle = median(line["norm"] for line in log)
    return {"MTP loss": fmean(loss for _, loss in losses[-len(tail):]),
            "main loss": fmean(line["loss"] for line in tail),
            "spikes": 100 * fmean(line["norm"] > 3 * middle for line in log),
            "MTP loss, mean of three depths": losses}


def lower(runs):
    """By how much the MTP loss of `token` is lower, in nats."""
    return runs["embed"]["MTP loss"] - runs["token"]["MTP loss"]


SHEET = Sheet(
    arms=("embed", "token"), measure=measure, minutes=14, seeds=4,
    equal=f"weights at the start, samples and their order, {STEPS} steps",
    tests=(NoLoss("MTP loss, nats, embed minus token, as a loss", lower, claimed=0.05,
                  source="[O] a twentieth of a nat would show in the paper's curves"),
           Gain("MTP loss, nats lower with token", lower, claimed=0.01,
                source="[O] the paper's curves differ by little")))
