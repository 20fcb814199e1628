"""QK-norm keeps attention logits bounded at high learning rates.

The paper trains the first stage of its encoder with QK-Norm "for stability" [C]: queries and keys
pass an RMSNorm before they are multiplied. Without it nothing limits their length. At a high
learning rate they grow until a patch attends to one other patch only, and large vision transformers
have diverged in this way [R: ViT-22B, arXiv 2302.05442].

Two runs a seed, at eight times the learning rate that we train with: a tower that names the shape
under each patch (the stage `texture` of train_vit.py), with QK-Norm and without. `largest logit` is
the largest absolute attention logit, q k / sqrt(width of a head), in any block on 16 pictures that
are not trained on. Its effect is a log2: 1 says that without QK-Norm the logits are twice as large.
`loss` is the mean over the last tenth of the steps. It differs too much between seeds for a claim
about what QK-Norm costs or saves.
"""
import math
import statistics
from dataclasses import replace
from unittest import mock

import torch

import train_vit
import vit
from lab.sheet import Gain, Sheet
from lib.common import Log, setup
from lib.images import pack
from model import sized
from optim import schedule

STEPS, EVERY, TIMES = 250, 10, 8
PLAIN = train_vit.check(train_vit.Args(stage="teachers", batch=32, lr=TIMES * train_vit.Args.lr))


@torch.no_grad()
def largest_logit(tower, patches, grids) -> float:
    """The largest absolute attention logit of all blocks, on N pictures of the same size."""
    largest, attention = [], vit.attention

    def watched(q, k, v, segments):     # q, k, v: (P, H, C), the patches of all pictures
        of_picture = "n i h c, n j h c -> n h i j"
        parts = [x.unflatten(0, (len(grids), -1)) for x in (q, k)]
        largest.append(torch.einsum(of_picture, *parts).abs().max() * q.shape[-1] ** -0.5)
        return attention(q, k, v, segments)

    with mock.patch.object(vit, "attention", watched):
        tower(patches, grids)
    return max(largest).item()


def measure(arm, seed, folder):
    args, hw = replace(PLAIN, qk_norm=arm == "with", seed=seed), setup("cpu", "float32")
    model, stream = train_vit.build("texture", args, sized(args.size), hw)
    optimizer = train_vit.build_optimizer(model, args)
    watched = pack([stream(2 ** 40 + i)[0] for i in range(16)], model.visual.config)
    losses, logits, log = [], [], Log(folder, "qk_norm", STEPS)
    for step in range(STEPS):
        samples = [stream(step * args.batch + i) for i in range(args.batch)]
        loss, _ = train_vit.shape_loss(model, samples, args)
        loss.backward()
        norm = optimizer.reduce().sqrt().item()
        optimizer.step(schedule(step, STEPS, args.warmup, args.schedule), norm)
        losses.append(loss.item())
        log.step(step + 1, (step + 1) % 50 == 0, loss=losses[-1], norm=norm)
        if (step + 1) % EVERY == 0:
            logits.append((step + 1, largest_logit(model.visual, *watched)))
    log.close()
    return {"largest logit": logits[-1][1], "loss": statistics.fmean(losses[-(STEPS // 10):]),
            "largest logit over steps": logits}


def doublings(runs):
    return math.log2(runs["without"]["largest logit"] / runs["with"]["largest logit"])


SHEET = Sheet(
    arms=("with", "without"), measure=measure, minutes=4,
    equal=f"initial weights but for the norms, {STEPS} steps of 32 pictures, the same pictures, "
          f"{TIMES} times the usual learning rate",
    tests=(Gain("doublings of the largest attention logit, without QK-Norm over with",
                doublings, claimed=1, source="[O] bounded means at most half of it"),))
