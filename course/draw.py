"""The pictures of lectures 1 to 5, each drawn with the code that its lecture is about.

    python -m course.draw                       all of them, in a few seconds
    python -m course.draw patches row           some of them
    python -m course.draw retrieval --run=out/course/align/align      that of your own run

retrieval needs a run of lecture 4, since the repository holds no text tower; without --run it is
left out.
"""
import lib  # first of all, before torch: see lib/__init__.py

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import gym
import train_vit
from data import document
from lib.batch import Batch, collate
from lib.captions import collate_pairs, Pair, random_mask, scene, TwoTowers
from lib.checkpoint import load_model, load_tower
from lib.cli import cli, main, UserError
from lib.common import ROOT
from lib.probes import pca_picture
from lib.runs import find_checkpoint
from lib.tensors import check_shapes, load_tensors
from model import GLMV, sized
from tasks.draw import font
from tasks.scenes import caption
from tokenizer import tokenizer_of
from vit import patch_positions, patchify

INK, QUIET, GROUND, LINE = "#1d2733", "#8a95a3", "#eef1f5", "#d97706"
FOLDER = Path("course") / "pictures"


@dataclass
class Args:
    what: list[str] = dataclasses.field(default_factory=list)   # names; default: all
    run: str = ""       # of lecture 4, for `retrieval`
    out: str = str(FOLDER)


def tokens(args: Args):
    """01: one conversation token by token, and how well each learnt token is predicted."""
    model = load_model(ROOT / "ckpt/demo")
    config, words = model.config, tokenizer_of(model.config)
    talk = gym.demonstrate(gym.Task("point", 1_000_005, 0, "test"))[0][:2]
    batch = collate([document(talk, words, config)], config)
    losses = [losses_of(GLMV(config), batch), losses_of(model, batch)]
    wide, high, across = 88, 48, 9
    rows = -(-len(batch.tokens) // across)
    page = Image.new("RGB", (wide * across + 1, (high + 8) * rows + 30), "white")
    pen = ImageDraw.Draw(page)
    for t, (token, weight) in enumerate(zip(batch.tokens.tolist(), batch.weights.tolist())):
        x, y = wide * (t % across), (high + 8) * (t // across)
        visual = token == config.image_token_id
        fill = "#cfe0f7" if visual else "#fbe3c2" if weight else GROUND
        pen.rectangle((x, y, x + wide - 4, y + high), fill=fill)
        name = words.decode([token]).replace("\n", "\\n")
        name = "image" if visual else name.strip("<|>") or "space"
        pen.text((x + 4, y + 5), name, INK, font(10 if len(name) > 9 else 14))
        if weight:
            before, after = (abs(loss[t].item()) for loss in losses)
            pen.text((x + 4, y + 26), f"{before:.1f}, {after:.2f}", INK, font(14))
        else:
            pen.text((x + 4, y + 26), str(t), QUIET, font(14))
    note = "grey: given   blue: a visual token   orange: learnt, loss before and after training"
    pen.text((4, page.height - 24), note, INK, font(14))
    return page


@torch.no_grad()
def losses_of(model: GLMV, batch: Batch) -> torch.Tensor:
    """The loss of each token of a row, (T,): the state before a token predicts it."""
    hidden = model(batch, model.encode_images(batch))
    logp = model.lm_head(hidden[:-1]).log_softmax(-1)
    loss = -logp.gather(1, batch.tokens[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), loss])


def patches(args: Args):
    """02: a screen of the gym, its patches numbered as `patchify` stores them."""
    screen = gym.make(gym.Task("gui_form", 1_000_003, 0, "test", 64)).reset().images[0]
    stored, grid = patchify(np.asarray(screen), 8)
    side = 60                   # of a patch in the picture
    page = Image.new("RGB", (side * grid[2], side * grid[1]))
    pen = ImageDraw.Draw(page)
    rows, columns = patch_positions(torch.tensor([grid])).tolist()
    for n, (row, column) in enumerate(zip(rows, columns)):
        # Drawn from what is stored, so that a wrong order would give a wrong picture.
        pixels = stored[n, 0].reshape(3, 8, 8).transpose(1, 2, 0)
        patch = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        page.paste(patch, (side * column, side * row))
        at = side * column + 5, side * row + 4
        pen.text(at, str(n), "white", font(15), stroke_width=2, stroke_fill="black")
    for k in range(0, grid[1] + 1, 2):          # the downsample groups
        pen.line((0, side * k, page.width, side * k), LINE, 3)
        pen.line((side * k, 0, side * k, page.height), LINE, 3)
    return page


def teachers(args: Args):
    """03: pictures, what the student sees of them, and the features of three towers."""
    images = [scene(4_000_000 + i, "test")[0] for i in range(6)]
    strips = []
    for name in ("semantic", "texture", "distill"):
        visual = train_vit.tower(train_vit.Args(), sized("tiny"))
        load_tower(visual, ROOT / "ckpt" / name)
        pca_picture(visual, images, Path("out/course/features.png"))
        strips.append(Image.open("out/course/features.png").convert("RGB"))
    page = Image.new("RGB", (98 * len(images) + 150, 98 * 5), "white")
    pen, rng = ImageDraw.Draw(page), np.random.default_rng(3)
    for i, image in enumerate(images):
        page.paste(image.resize((96, 96)), (98 * i, 0))
        seen = np.array(image)
        mask = random_mask(rng, 8, 8, 0.35, "block")
        positions = patch_positions(torch.tensor([[1, 8, 8]])).T.tolist()
        for hidden, (y, x) in zip(mask, positions):
            if hidden:
                seen[8 * y:8 * y + 8, 8 * x:8 * x + 8] = 128
        page.paste(Image.fromarray(seen).resize((96, 96)), (98 * i, 98))
    for k, picture in enumerate(strips):
        page.paste(picture.crop((0, 98, picture.width, 194)), (0, 98 * (k + 2)))
    for k, text in enumerate(("picture", "the student sees", "semantic teacher", "texture teacher",
                              "student, trained")):
        pen.text((98 * len(images) + 8, 98 * k + 38), text, INK, font(16))
    return page


@torch.no_grad()
def retrieval(args: Args):
    """04: every held-out picture with every caption, after a run of lecture 4."""
    if not args.run:
        raise UserError("retrieval needs --run, the folder of a run of lecture 4")
    config = sized("tiny")
    model = TwoTowers(train_vit.tower(train_vit.Args(), config), config)
    weights = load_tensors(find_checkpoint(args.run))
    check_shapes(f"--run={args.run} is no run of lecture 4", model.state_dict(), weights)
    model.load_state_dict(weights)
    words, drawn, number = tokenizer_of(config), {}, 4_000_000
    while len(drawn) < 12:      # twelve different captions
        image, items = scene(number, "test")
        drawn.setdefault(caption(items), image)
        number += 1
    pairs = [Pair(np.asarray(image), np.array(words.encode(text)[:64], np.int32))
             for text, image in drawn.items()]
    x, y = model.embed(collate_pairs(pairs, config.vision))
    similar = x @ y.T
    side, left, top = 50, 56, 12
    page = Image.new("RGB", (left + side * 12 + 8, top + side * 12 + 12 * 20 + 36), "white")
    pen = ImageDraw.Draw(page)
    for i, (text, image) in enumerate(drawn.items()):
        page.paste(image.resize((side - 2, side - 2)), (2, top + side * i))
        pen.text((left + side * i + 18, top + side * 12), chr(65 + i), INK, font(16))
        pen.text((left, top + side * 12 + 26 + 20 * i), f"{chr(65 + i)}  {text}", INK, font(14))
        for k in range(12):
            at = left + side * k, top + side * i
            share = max(0.0, (similar[i, k].item() + 0.2) / 1.2)
            color = tuple(round(255 - share * (255 - c)) for c in (47, 111, 208))
            pen.rectangle((*at, at[0] + side - 3, at[1] + side - 3), color)
            if k == similar[i].argmax():
                pen.rectangle((*at, at[0] + side - 3, at[1] + side - 3), None, LINE, 4)
    return page


def row(args: Args):
    """05: who may attend to whom in a packed row, and the three positions of every token."""
    config = sized("tiny")
    words, documents = tokenizer_of(config), []
    for name, seed in (("point", 3), ("gui_click", 4), ("point", 5)):
        talk = gym.demonstrate(gym.Task(name, seed))[0][:2]
        documents.append(document(talk, words, config))
    batch = collate(documents, config, room=sum(len(d.ids) for d in documents) + 12)
    count, scale = len(batch.tokens), 5
    own = torch.repeat_interleave(torch.arange(len(documents) + 1), batch.cu_seqlens.diff().long())
    allowed = (own[:, None] == own[None]).tril()
    visual = batch.tokens == config.image_token_id
    color = np.full((count, count, 3), 255, np.uint8)
    color[allowed.numpy()] = (159, 180, 208)
    color[(allowed & visual[None]).numpy()] = (47, 111, 208)
    color[(allowed & (own[:, None] == len(documents))).numpy()] = (222, 226, 231)
    mask = Image.fromarray(color).resize((scale * count,) * 2, Image.Resampling.NEAREST)
    # Below it the positions of the first tokens, enlarged.
    page = Image.new("RGB", (mask.width, mask.height + 340), "white")
    page.paste(mask, (0, 0))
    pen, shown, wide, high = ImageDraw.Draw(page), 28, mask.width / 28, 20
    # w last: where all three are equal, in text, its marks cover the others.
    for axis, (letter, shade) in enumerate((("t", INK), ("h", LINE), ("w", "#2f6fd0"))):
        for n, position in enumerate(batch.positions[axis, :shown].tolist()):
            x, y = wide * n, page.height - 24 - high * position
            pen.rectangle((x + 2, y - 3 + 4 * axis, x + wide - 2, y + 4 * axis), shade)
        pen.text((8 + 28 * axis, mask.height + 20), letter, shade, font(24))
    return page


PICTURES = {"tokens": (tokens, "01-tokens.png"), "patches": (patches, "02-patches.png"),
            "teachers": (teachers, "03-teachers.png"), "retrieval": (retrieval, "04-retrieval.png"),
            "row": (row, "05-row.png")}


def save_pictures(args, pictures: dict, without: str, colors: int = 0):
    """Draw and save the pictures that args.what names, else all but the one named `without`, and
    print their paths. pictures: {name: (function of args, file in args.out)}. colors: reduce each
    picture to so many, 0: keep all. Raises UserError on an unknown name, before anything is
    drawn."""
    names = args.what or [name for name in pictures if name != without]
    for name in names:
        if name not in pictures:
            raise UserError(f"there is no picture '{name}', only {', '.join(pictures)}")
    for name in names:
        draw, file = pictures[name]
        path = Path(args.out) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        page = draw(args)
        if colors:
            page = page.quantize(colors, dither=Image.Dither.NONE)
        page.save(path, optimize=True)
        print(path)


def run(args: Args):
    save_pictures(args, PICTURES, without="" if args.run else "retrieval")


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__, positional="what")))
