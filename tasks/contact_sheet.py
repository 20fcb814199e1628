"""One instance of every category on one picture: `python gym.py sheet`.

The instances follow a fixed rule (SEED, LEVEL, the train split), so the same command builds the
same picture again, with the same Pillow and numpy.
"""
import re
import textwrap
from math import ceil, sqrt

from PIL import Image, ImageDraw, ImageOps

from . import CATEGORIES
from .base import IMAGE, Task
from .draw import font
from .driver import make

SEED, LEVEL = 0, 3                              # both kinds of ground and pictures of any aspect
COLUMNS, SIDE, GAP, FOOT = 6, 256, 18, 88       # tiles in a row; pixels: picture, between, caption
COLORS = 200                                    # of the palette: as sharp, half the size
PAPER, CARD, INK = (255, 255, 255), (247, 248, 250), (28, 32, 40)
PALE, EDGE = (104, 112, 124), (208, 213, 220)
FAMILIES = {"perception": (38, 90, 216), "reasoning": (206, 92, 22), "agent": (24, 140, 90)}


def framed(image: Image.Image, side: int) -> Image.Image:
    """An image in a square of this side, on grey where it is oblong, with a thin border."""
    image = ImageOps.pad(image, (side, side), Image.LANCZOS, EDGE)
    ImageDraw.Draw(image).rectangle((0, 0, side - 1, side - 1), outline=EDGE)
    return image


def text_tile(text: str) -> Image.Image:
    """A question without a picture, printed on a card."""
    tile = Image.new("RGB", (SIDE, SIDE), CARD)
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 32) or [""]]
    ImageDraw.Draw(tile).multiline_text((14, 12), "\n".join(lines[:12]), INK, font(15), spacing=4)
    return framed(tile, SIDE)


def grid_tile(images: list) -> Image.Image:
    """Frames or screens side by side, in a grid as square as possible."""
    columns, gap = ceil(sqrt(len(images))), 4
    rows, side = ceil(len(images) / columns), (SIDE - gap * (columns - 1)) // columns
    tile = Image.new("RGB", (SIDE, SIDE), PAPER)
    top = (SIDE - rows * (side + gap) + gap) // 2
    for i, image in enumerate(images):
        x, y = i % columns * (side + gap), top + i // columns * (side + gap)
        tile.paste(framed(image, side), (x, y))
    return tile


def stack_tile(images: list) -> Image.Image:
    """Pages that could not be read side by side: the first one in front of the others."""
    shift, behind = 16, len(images) - 1
    tile, side = Image.new("RGB", (SIDE, SIDE), PAPER), SIDE - shift * behind
    for i in range(behind, -1, -1):
        tile.paste(framed(images[i], side), (i * shift, (behind - i) * shift))
    return tile


def instance(category: str) -> tuple[Image.Image, str]:
    """The picture of a category's tile, SIDE x SIDE pixels, and the question under it."""
    env = make(Task(category, SEED, LEVEL, pixels=SIDE))
    obs = env.reset()
    text = re.sub(r"^(<\|image\|>\d*\s*)+", "", obs.text).replace(IMAGE, "[picture]")
    if not obs.images:
        return text_tile(text), ""
    if len(obs.images) == 1:
        return framed(obs.images[0], SIDE), text
    tile = stack_tile(obs.images[:3]) if env.min_pixels >= SIDE else grid_tile(obs.images)
    return tile, text


def contact_sheet() -> Image.Image:
    """All categories in table order, each with its name, family, tier and question."""
    rows = ceil(len(CATEGORIES) / COLUMNS)
    size = GAP + COLUMNS * (SIDE + GAP), GAP + rows * (SIDE + FOOT + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (name, category) in enumerate(CATEGORIES.items()):
        x = GAP + i % COLUMNS * (SIDE + GAP)
        y = GAP + i // COLUMNS * (SIDE + FOOT + GAP)
        tile, question = instance(name)
        sheet.paste(tile, (x, y))
        family, tier, y = category.env.family, category.env.tier, y + SIDE + 5
        pen.text((x, y), name, INK, font(21), stroke_width=0.35)
        pen.text((x, y + 25), f"{family}, tier {tier}", FAMILIES[family], font(16))
        lines = textwrap.wrap(question, 33, max_lines=2, placeholder=" ...")
        pen.multiline_text((x, y + 46), "\n".join(lines), PALE, font(15))
    return sheet.quantize(COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
