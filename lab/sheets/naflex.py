"""Variable picture sizes (NaFlex) beat squares at equal tokens on wide pictures.

In its second stage the paper replaces the fixed square of 224 pixels by NaFlex: each picture keeps
its shape, within a budget of patches [C]. A line of text shows why that may matter: in a square of
as many patches it is stretched in height, where nothing is gained, and shrunk in width, where the
letters need their pixels.

Two runs a seed: a tower learns from random weights to read lines of 16 random letters, pictures of
128 x 32 pixels. `naflex` shows it 16 x 4 patches, `square` the same picture squeezed into 8 x 8.
From the mean of each column of patches a linear layer names the letters in it: one, or in a square
two. It would take a contrastive loss far more steps to get to single letters, so here the tower is
asked directly [O]. `letters` is the percentage read rightly in 256 held-out lines, by chance 4%.
"""
from dataclasses import replace
from string import ascii_lowercase

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import train_vit
from lab.sheet import Gain, Sheet
from lib.common import Log, setup
from lib.images import budgeted, pack
from model import init, sized
from optim import schedule
from tasks.draw import Canvas
from vit import patch_positions

STEPS, EVERY, BUDGET, ASKED, LETTERS = 250, 25, 64, 256, 16
PLAIN = train_vit.check(train_vit.Args(stage="align", batch=32))


def line(*seed: int) -> tuple[Image.Image, list[int]]:
    """A picture of a line of letters, light on dark, each in 8 of the 128 pixels; the letters."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(len(ascii_lowercase), size=LETTERS).tolist()
    canvas = Canvas(64, tuple(rng.integers(0, 90, 3).tolist()), grid=(8, 2))
    color, x, y = tuple(rng.integers(170, 256, 3).tolist()), rng.uniform(-1, 1), rng.uniform(14, 18)
    for i, letter in enumerate(letters):
        canvas.word(ascii_lowercase[letter], 8 * i + 4 + x, y, color, 11, anchor="m")
    return canvas.image, letters


class Reader(nn.Module):
    """A tower and a linear layer that names the letters in each column of patches."""

    def __init__(self, args, config, columns: int):
        super().__init__()
        self.visual, self.columns = train_vit.tower(args, config), columns
        self.head = nn.Linear(config.vision.hidden_size,
                              LETTERS // columns * len(ascii_lowercase))

    def forward(self, pictures):
        """N pictures of the same size -> logits (N, LETTERS, 26)"""
        patches, grids = pack(pictures, self.visual.config)
        row, column = patch_positions(grids[:1])
        in_columns = (column * len(row) + row).argsort()        # column after column
        features = self.visual(patches, grids).unflatten(0, (len(grids), -1))[:, in_columns]
        means = features.unflatten(1, (self.columns, -1)).mean(2)       # (N, columns, W)
        return self.head(means).view(len(grids), LETTERS, -1)


def measure(arm, seed, folder):
    args, config = replace(PLAIN, seed=seed), sized(PLAIN.size)
    setup("cpu", "float32")

    def lines(*numbers):
        """N pictures of the arm's shape, and their letters (N, LETTERS)."""
        drawn, letters = zip(*(line(seed, *number) for number in numbers))
        if arm == "square":
            drawn = [image.resize(2 * (args.side,), Image.Resampling.BICUBIC) for image in drawn]
        return [budgeted(image, config.vision, BUDGET) for image in drawn], torch.tensor(letters)

    (asked, truth), curve = lines(*((1, i) for i in range(ASKED))), []
    model = Reader(args, config, asked[0].shape[1] // config.vision.patch_size)
    init(model, seed)
    optimizer, log = train_vit.build_optimizer(model, args), Log(folder, "naflex", STEPS)
    for step in range(STEPS):
        pictures, letters = lines(*((0, step * args.batch + i) for i in range(args.batch)))
        loss = F.cross_entropy(model(pictures).flatten(0, 1), letters.flatten())
        loss.backward()
        norm = optimizer.reduce().sqrt().item()
        optimizer.step(schedule(step, STEPS, args.warmup, args.schedule), norm)
        log.step(step + 1, (step + 1) % 50 == 0, loss=loss.item(), norm=norm)
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                right = model(asked).argmax(-1) == truth
            curve.append((step + 1, 100 * right.float().mean().item()))
    log.close()
    return {"letters": curve[-1][1], "lines": 100 * right.all(1).float().mean().item(),
            "loss": loss.item(), "letters read rightly over steps, %": curve}


SHEET = Sheet(
    arms=("naflex", "square"), measure=measure, minutes=4,
    equal=f"{STEPS} steps of 32 pictures, {BUDGET} patches a picture, the same lines",
    tests=(Gain("letters read rightly in points, naflex less square",
                lambda runs: runs["naflex"]["letters"] - runs["square"]["letters"], claimed=10,
                source="[O] a tenth of the letters"),))
