"""The activations that the vision tower keeps do not grow with the number of images.

What the backward pass needs normally grows with the images of a row. The paper gives the vision
tower and the projector memory policies of their own, recomputation and offload to the CPU, so that
their activations do not grow linearly with the number of images [C]. It gives no figure.

Three ways through tower and adapter of `tiny`: keep everything; keep the input of each block and
move it to the host (`--memory=offload`); encode at most 1,024 patches at a time and encode them
again in the backward pass (`--chunk_patches=1024`). `MB` is the most that autograd holds at one
time through a forward and a backward, without weights and pixels. It depends on the sizes of the
images alone: a seed draws 64 of them, of 4 to 16 patches a side, and the first 16 are the few.

The first two ways grow fourfold: only the third makes the claim true. It costs a forward more.
"""
import numpy as np
import torch

from lab.bench_memory import saved
from lab.sheet import Gain, NoLoss, Sheet
from lib.memory import parse_memory
from model import GLMV, sized

COUNTS = (16, 64)
ARMS = {"all kept": parse_memory("none"), "offload": parse_memory("offload"),
        "chunks": parse_memory("none", 1024)}


def measure(arm, seed, folder):
    config = sized("tiny")
    model = GLMV(config, seed)
    ARMS[arm].use_in(model)
    sides = 2 * np.random.default_rng(seed).integers(2, 9, (COUNTS[-1], 2))
    found = {}
    for count in COUNTS:
        grids = torch.tensor([[1, height, width] for height, width in sides[:count].tolist()])
        patches = torch.randint(0, 256, (int(grids.prod(1).sum()), 1,
                                         3 * config.vision.patch_size ** 2), dtype=torch.uint8)
        kept, on_host = saved(model, patches, grids)
        found |= {f"MB, {count} images": kept / 2 ** 20,
                  f"MB on the host, {count} images": on_host / 2 ** 20}
    return found


def growth(runs):
    """Minus the percent by which 64 images need more than 16."""
    few, many = (runs["chunks"][f"MB, {count} images"] for count in COUNTS)
    return -100 * (many / few - 1)


def saved_share(runs):
    """What the chunks save of 64 images' MB, in percent."""
    kept, chunks = (runs[arm][f"MB, {COUNTS[-1]} images"] for arm in ("all kept", "chunks"))
    return 100 * (1 - chunks / kept)


SHEET = Sheet(
    arms=tuple(ARMS), measure=measure, minutes=0.2,
    equal="the same weights and images",
    tests=(NoLoss("growth of the MB kept from 16 to 64 images, percent, as a loss", growth,
                  claimed=10, source="[O] flat means less than a thirtieth of the fourfold growth"),
           Gain("MB kept of 64 images, percent saved", saved_share,
                claimed=50, source="[O] the paper has no figure")))
