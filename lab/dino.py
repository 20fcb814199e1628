"""A texture teacher without labels: self-distillation after DINO and iBOT, and how it collapses.

    python -m lab.dino --steps=240                    from ckpt/semantic, about a minute
    python -m lab.dino --steps=240 --without=both     no centring, no scaling: it collapses
    python -m lab.dino --steps=240 --init=random      from random weights

The teacher is the running mean of the student's weights. The student sees a part of a picture and
predicts what the teacher says: of another crop, and of the patches that are hidden from the student
[R: DINO, iBOT]. Nothing outside says what is right, so the cheapest answer is the same one for
every picture. Two things prevent it: targets are centred, so that a prototype that everybody
chooses loses its lead; and each prototype's logits are divided by their own std, so that targets
stay sharp while features become more alike [O].

Figures of each step, as shares of log K: `used`, the entropy of the mean target, near 1 while all
prototypes are in use; `sure`, the mean entropy of a target, near 0 where it is decided and near 1
where it says nothing. `spread` is the std of the features between pictures.

At our scale this teacher learnt nothing about texture that the semantic one did not know, so
train_vit.py has a texture teacher with labels instead.

Letters: N pictures, V = 2 views a picture, P patches, M hidden patches, W width, K prototypes.
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn, Tensor

import train_vit
from lib.captions import Pictures, random_mask
from lib.checkpoint import load_tower
from lib.cli import (check_options, cli, Device, Dtype, main, NonNegative, Positive, Range, Seed,
                     Share)
from lib.common import Log, setup, write_json
from lib.images import pack
from lib.prefetch import send
from lib.probes import probe, ProbeSet, salient
from lib.runs import find_checkpoint
from model import Config, init, sized
from optim import OptimConfig, Optimizer, schedule

PROTOTYPES = 256                # K [O]
TARGET, STUDENT = 0.25, 0.1     # temperatures: of the target in units of std, of the student [O]


@dataclass
class Args:
    steps: Positive = 240         # optimizer updates
    batch: Positive = 64          # pictures a step
    lr: NonNegative = 1e-3        # a quarter of train_vit.py's: faster, it forgets the start
    ema: Share = 0.99             # how slowly the teacher, a running mean, follows the student
    without: Literal["none", "centre", "std", "both"] = "none"      # what targets do without
    init: str = "ckpt/semantic"   # folder whose tower it starts from; random: random weights
    probes: Annotated[int, Range(16)] = 1024    # pictures that a probe is fitted on; scored on half
    seed: Seed = 0                # of weights and samples
    out: str = "out/dino"         # log.jsonl, report.json
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "float32"      # auto, float32 or bfloat16


@dataclass
class Views:
    """Sample i: two random views (h, w, 3) of picture i of stage 1, a mask (P,) of each."""
    config: Config
    side: int
    seed: int

    def __call__(self, i: int) -> tuple[list, list]:
        image = Image.fromarray(Pictures(self.config, self.side, self.seed)(i).image)
        rng = np.random.default_rng([self.seed, i, 1])
        n = self.side // self.config.vision.patch_size
        return ([self._view(rng, image) for _ in range(2)],
                [random_mask(rng, n, n, 0.35, "block") for _ in range(2)])

    def _view(self, rng, image: Image.Image) -> np.ndarray:
        """A crop of 60-100% of each side, perhaps mirrored, brighter or darker by up to 20%."""
        part = self.side * rng.uniform(0.6, 1)
        x, y = rng.uniform(0, self.side - part, 2)
        view = image.resize(image.size, Image.Resampling.BICUBIC, (x, y, x + part, y + part))
        view = ImageOps.mirror(view) if rng.integers(2) else view
        return (np.asarray(view) * rng.uniform(0.8, 1.2)).clip(0, 255).astype(np.uint8)


class Prototypes(nn.Sequential):
    """(N, W) -> logits (N, K): an MLP onto the unit sphere, then its products with K directions."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width), nn.GELU(),
                         nn.Linear(width, PROTOTYPES, bias=False))

    def forward(self, x):
        return self[2](F.normalize(self[1](self[0](x)), dim=-1)).float()


class Student(nn.Module):
    """A tower, a mask token, a head. Its running mean, a copy, is the teacher."""

    def __init__(self, config: Config):
        super().__init__()
        self.visual = train_vit.tower(train_vit.Args(), config)
        self.token = nn.Parameter(torch.zeros(config.vision.hidden_size))
        self.head = Prototypes(config.vision.hidden_size)


@torch.no_grad()
def answer(teacher: Student, patches: Tensor, grids: Tensor, mask: Tensor):
    """What the teacher, which sees everything, says: logits of the views (N*V, K) and of the hidden
    patches (M, K); and its features of the views (N*V, W)."""
    features = teacher.visual(patches, grids)
    # A view is described by its `salient` patches: the mean of all would be about the ground. [O]
    views = salient(features.unflatten(0, (len(grids), -1)))
    return teacher.head(views), teacher.head(features[mask]), views


def sharpen(logits: Tensor, centre: Tensor, std: Tensor, without: str) -> Tensor:
    """Logits (M, K) -> target distributions (M, K), centred and scaled by each prototype's std."""
    if without not in ("centre", "both"):
        logits = logits - centre
    if without in ("std", "both"):
        return (logits / 0.04).softmax(-1)      # DINO's fixed temperature [R]
    return (logits / (TARGET * std)).softmax(-1)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """Of the student's logits (M, K) with target distributions (M, K): the mean over M."""
    return -(target * (logits / STUDENT).log_softmax(-1)).sum(-1).mean()


def entropy(p: Tensor) -> Tensor:
    """Entropy over the last dim, as a share of its maximum."""
    return -(p * p.clamp_min(1e-9).log()).sum(-1) / math.log(p.shape[-1])


def load(stream: Views, indices, config: Config, device):
    """Samples -> (patches, grids, mask) of all their views. mask (P,): which patches are hidden.
    grids are on the CPU, the others on the device."""
    views, masks = zip(*(stream(i) for i in indices))
    patches, grids = pack([view for pair in views for view in pair], config.vision)
    mask = torch.from_numpy(np.concatenate([m for pair in masks for m in pair]))
    return send(patches, device), grids, send(mask, device)


def run(args: Args) -> dict[str, float]:
    """Train, print and log; returns the last step's figures and the probes' of the teacher."""
    check_options(args)
    hw, config, out = setup(args.device, args.dtype), sized("tiny"), Path(args.out)
    student, stream = Student(config), Views(config, 64, args.seed)
    init(student, args.seed)
    if args.init != "random":
        load_tower(student.visual, find_checkpoint(args.init))
    teacher = copy.deepcopy(student).requires_grad_(False).to(hw.device)
    optimizer = Optimizer(student.to(hw.device).named_parameters(), OptimConfig(lr=args.lr))
    student.to(hw.dtype)
    # Centre and std of each prototype, of views and of patches, measured before the first step.
    logits = answer(teacher, *load(stream, range(2 ** 40, 2 ** 40 + 32), config, hw.device))[:2]
    centres, stds = [x.mean(0) for x in logits], [x.std(0) for x in logits]
    log = Log(out, "dino", args.steps)
    for step in range(args.steps):
        indices = range(step * args.batch, (step + 1) * args.batch)
        patches, grids, mask = load(stream, indices, config, hw.device)
        *logits, views = answer(teacher, patches, grids, mask)
        of_views, of_patches = (sharpen(x, centre, std, args.without)
                                for x, centre, std in zip(logits, centres, stds))
        # DINO: predict the target of the other view. iBOT: that of each hidden patch.
        others = rearrange(of_views, "(n v) k -> n v k", v=2).flip(1).flatten(0, 1)
        features = student.visual(patches, grids, mask, student.token)
        things = salient(features.unflatten(0, (len(grids), -1)))
        loss = (cross_entropy(others, student.head(things))
                + cross_entropy(of_patches, student.head(features[mask])))
        loss.backward()
        rate = schedule(step, args.steps, 20, "cosine")
        norm = optimizer.reduce().sqrt().item()
        optimizer.step(rate, norm)
        masters, _ = optimizer.gather()
        # The teacher follows the student's fp32 weights; centre and std follow its logits.
        for name, p in teacher.named_parameters():
            p.data.lerp_(masters[name], 1 - args.ema)
        for x, centre, std in zip(logits, centres, stds):
            std.lerp_((x - centre).square().mean(0).sqrt(), 0.1)
            centre.lerp_(x.mean(0), 0.1)
        last = {"loss": loss.item(), "used": entropy(of_patches.mean(0)).item(),
                "sure": entropy(of_patches).mean().item(),
                "spread": F.normalize(views, dim=-1).std(0).mean().item()}
        done = step + 1
        log.step(done, done % 20 == 0 or done == args.steps, **last, lr=args.lr * rate, norm=norm)
    log.close()
    figures = {**last, **probe(teacher.visual, ProbeSet(config, 64, args.probes))}
    print("the teacher: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    write_json(out / "report.json", {"title": "self-distillation", "figures": {
        f"without {args.without}": figures}})
    return figures


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade sharpen`.
# 1. sharpen: what keeps two networks that teach each other from agreeing on nothing?
#    pytest tests/test_lab.py -k collapse; 15 minutes.
# 2. Run with --without=both. The loss has never been better. What has become of `used`? And of
#    `sure` with --without=std? 60 minutes.


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
