"""Drawing: colours, shapes, characters, and a canvas to paste them on.

The layout of a picture is measured in units: a square picture is 64 units wide and has a grid of
4 x 4 cells of 16 units. At 64 pixels one cell is one visual token (patch 8, merged 2 x 2). Other
pictures are wider or higher, with whole cells and never more of them than the square, so that a
model sees them with as many tokens. A larger picture has the same layout, only sharper.

What begins at level 0 lies in cells, each object in one of its own, because a small model learns
aligned objects many times sooner than freely placed ones. From level 1 on objects may lie anywhere:
a model that saw aligned ones only would click on a lattice of points in every picture.

Each shape is drawn once at four times its size, reduced to a smooth mask, and cached. To draw a
picture is then to paste a few masks, which takes about a tenth of a millisecond.
"""
import textwrap
from functools import lru_cache, wraps
from math import cos, pi, sin
from sys import getsizeof
from threading import Lock

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .base import pick

GRID, CELL, UNITS = 4, 16, 64
SQUARE = (GRID, GRID)           # columns and rows of cells
OBLONG = ((3, 4), (4, 3), (3, 5), (5, 3), (2, 7), (7, 2))
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = {                      # name: shade in training, held-out shade
    "red": ((220, 30, 35), (195, 25, 50)),
    "green": ((30, 150, 50), (45, 165, 70)),
    "blue": ((40, 75, 230), (55, 85, 215)),
    "yellow": ((240, 215, 30), (230, 200, 40)),
    "purple": ((125, 40, 175), (138, 55, 190)),
    "orange": ((245, 130, 20), (235, 120, 38)),
    "cyan": ((25, 195, 215), (50, 185, 200)),
    "pink": ((255, 120, 190), (245, 130, 182)),
}
DARK = ((18, 18, 22), (34, 36, 44))         # ink on light and on dark: training, held-out
LIGHT = ((246, 246, 242), (228, 232, 238))
# The greys of plain backgrounds, dark and light, in training and held out. What lies outside 0-255
# becomes black or white, the commonest grounds of the pictures that people show to a model.
GREYS = (((-16, 26), (48, 62)), ((230, 272), (198, 210)))
CACHE_BYTES = 24 << 20                      # the most that each cache of pictures may keep
# One colour of each shape never occurs in training; held-out scenes use all pairs.
HELD_PAIRS = {(list(COLORS)[(3 * i + 1) % 8], shape) for i, shape in enumerate(SHAPES)}
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
TRAIN_PAIRS = [pair for pair in PAIRS if pair not in HELD_PAIRS]


def shades(rng, heldout: bool, spread: int = 14) -> dict:
    """{colour name: RGB}, each channel changed at random by up to `spread`."""
    moves = rng.integers(-spread, spread + 1, (len(COLORS), 3)).tolist()
    return {name: tuple(min(255, max(0, c + d)) for c, d in zip(pair[heldout], move))
            for (name, pair), move in zip(COLORS.items(), moves)}


def ground_and_ink(rng, heldout: bool, level: int) -> tuple:
    """(background, ink): light ink on a dark background or dark ink on a light one. Half of the
    backgrounds are grey, black or white, the others slightly tinted.

    At level 0 all are nearly black. With light ones from the start the smallest model still guessed
    colours and letters when it named most of them on dark ones (LOG.md: 43.8 against 54.5% after
    1,200 steps). [O]
    """
    if level == 0:
        dark, light = DARK[heldout], LIGHT[heldout]
        moves = rng.integers(-8, 9, 3).tolist()
        return tuple(max(0, c + d) for c, d in zip(dark, moves)), light
    light = rng.random() < 0.5
    grey, tinted = int(rng.integers(*GREYS[light][heldout])), int(rng.integers(2))
    ground = tuple(min(255, max(0, grey + move)) for move in rng.integers(-10, 11, 3) * tinted)
    ink = (LIGHT, DARK)[light][heldout]
    return tuple(map(int, ground)), blend(ink, ground, 0.2 * rng.random())


def aspect(rng, level: int) -> tuple:
    """(columns, rows) of a picture, in cells: a square at level 0, half of the time from 1 on."""
    return pick(rng, OBLONG) if level and rng.integers(2) else SQUARE


def ink_on(color) -> tuple:
    """Black or white, whichever has more contrast to a colour."""
    r, g, b = color
    return (255, 255, 255) if 0.30 * r + 0.59 * g + 0.11 * b < 140 else (0, 0, 0)


def blend(a, b, share: float) -> tuple:
    """The colour that lies `share` of the way from a to b."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


def _ring(n, radius, start=-pi / 2, inner=None):
    """n corner points on a circle around (0.5, 0.5); `inner`: the radius of every second one."""
    radii = [radius, inner or radius]
    return [(0.5 + radii[i % 2] * cos(start + 2 * pi * i / n),
             0.5 + radii[i % 2] * sin(start + 2 * pi * i / n)) for i in range(n)]


OUTLINES = {                    # corner points of each shape in the unit square
    "square": [(.06, .06), (.94, .06), (.94, .94), (.06, .94)],
    "triangle": [(.5, .02), (1, .95), (0, .95)],
    "star": [(x, y + .04) for x, y in _ring(10, .54, inner=.22)],
    "cross": [(.34, 0), (.66, 0), (.66, .34), (1, .34), (1, .66), (.66, .66),
              (.66, 1), (.34, 1), (.34, .66), (0, .66), (0, .34), (.34, .34)],
    "diamond": [(.5, 0), (.92, .5), (.5, 1), (.08, .5)],
    "arrow": [(.5, 0), (1, .48), (.7, .48), (.7, 1), (.3, 1), (.3, .48), (0, .48)],
    "chevron": [(.22, .1), (.36, 0), (.86, .5), (.36, 1), (.22, .9), (.6, .5)],
    "tick": [(.0, .5), (.16, .34), (.4, .58), (.84, .08), (1, .24), (.4, .9)],
}


def cached_by_size(weigh):
    """Like functools.lru_cache, but bounded by memory: what a model writes decides how large a mask
    is, so a number of entries bounds nothing. weigh: result -> its bytes. A cache that would
    outgrow CACHE_BYTES is emptied; what is in use is soon there again. The key's own size and 1,000
    bytes for the objects count as well; `function.bytes` is the sum."""
    def decorate(function):
        kept, lock = {}, Lock()

        @wraps(function)
        def cached(*key):
            result = kept.get(key)
            if result is None:
                result = function(*key)
                cost = 1000 + sum(map(getsizeof, key)) + weigh(result)
                with lock:
                    if cached.bytes + cost > CACHE_BYTES:
                        kept.clear()
                        cached.bytes = 0
                    kept[key] = result
                    cached.bytes += cost
            return result

        cached.bytes = 0
        return cached
    return decorate


cached_mask = cached_by_size(lambda mask: mask.width * mask.height)


@cached_mask
def shape_mask(name: str, size: int) -> Image.Image:
    """A shape of `size` pixels as a smooth (size, size) mask."""
    big = Image.new("L", (4 * size, 4 * size))
    pen = ImageDraw.Draw(big)
    if name == "circle":
        pen.ellipse((0, 0, 4 * size - 1, 4 * size - 1), fill=255)
    else:
        pen.polygon([(x * (4 * size - 1), y * (4 * size - 1)) for x, y in OUTLINES[name]], fill=255)
    return big.reduce(4)


@cached_mask
def plate_mask(width: int, height: int, radius: int) -> Image.Image:
    """A rounded rectangle as a smooth (width, height) mask."""
    big = Image.new("L", (4 * width, 4 * height))
    corners = (0, 0, 4 * width - 1, 4 * height - 1)
    ImageDraw.Draw(big).rounded_rectangle(corners, 4 * radius, fill=255)
    return big.reduce(4)


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font, with printable ASCII characters only; size in pixels."""
    return ImageFont.load_default(size)


@cached_mask
def text_mask(text: str, size: int) -> Image.Image:
    """A line of text as a mask with the full height of the font, so that baselines align."""
    face = font(size)
    mask = Image.new("L", (round(face.getlength(text)) + 2, sum(face.getmetrics())))
    ImageDraw.Draw(mask).text((0, 0), text, 255, face)
    return mask


@cached_mask
def glyph_mask(char: str, cell: int, height: float, bold: float, angle: int) -> Image.Image:
    """One character as a (cell, cell) mask. height: of a capital, and bold: the stroke width, both
    as fractions of the cell; angle: in degrees. Wide letters are narrowed to fit."""
    big = 4 * cell
    face = font(round(height * big / 0.71))             # a capital is 0.71 of the font's size
    stroke = round(bold * big)
    x0, _, x1, _ = face.getbbox(char, stroke_width=stroke, anchor="ls")
    glyph = Image.new("L", (x1 - x0, big))
    base = round(big * (1 + height) / 2)
    ImageDraw.Draw(glyph).text((-x0, base), char, 255, face, anchor="ls", stroke_width=stroke)
    if x1 - x0 > 0.84 * big:
        glyph = glyph.resize((round(0.84 * big), big))
    out = Image.new("L", (big, big))
    out.paste(glyph, ((big - glyph.width) // 2, 0))
    return out.rotate(angle, Image.BICUBIC).reduce(4) if angle else out.reduce(4)


class Canvas:
    """A picture. Positions and sizes are in units, which are as long down as across: `size` is
    (width, height), (64, 64) for the square. Each drawing method returns the box (x0, y0, x1, y1)
    that it filled, in the coordinates of answers, 0-999 on each axis.

    pixels: the side of the square, also where another `grid`, (columns, rows) in cells, is drawn.
    """

    def __init__(self, pixels: int, color: tuple, grid=SQUARE):
        self.unit, self.size = pixels / UNITS, (CELL * grid[0], CELL * grid[1])
        self.image = Image.new("RGB", tuple(map(self.px, self.size)), color)

    @classmethod
    def on(cls, image: Image.Image, pixels: int = 0):
        """A canvas that continues to draw on an existing picture. pixels: as above, where the
        picture isn't square."""
        canvas = cls(pixels or image.width, (0, 0, 0), (0, 0))
        canvas.image, canvas.size = image, tuple(side / canvas.unit for side in image.size)
        return canvas

    def px(self, units: float) -> int:
        """Units to whole pixels."""
        return round(units * self.unit)

    def at(self, *units):
        """Units to pixels, as `pen` takes them."""
        return [u * self.unit for u in units]

    @property
    def pen(self):
        return ImageDraw.Draw(self.image)

    @staticmethod
    def area(x0, y0, x1, y1, size=(UNITS, UNITS)) -> tuple:
        """A box in units -> (x0, y0, x1, y1) in 0-999, in a picture of this size."""
        return tuple(round(u * 999 / side, 1) for u, side in zip((x0, y0, x1, y1), 2 * size))

    def width(self, text: str, size: float, bold=False) -> float:
        """The width of a line of text in units. size: of the font, in units."""
        return (font(self.px(size)).getlength(text) + bold) / self.unit

    def text(self, text: str, x, y, color, size: float, anchor="la", bold=False):
        """Draw a line of text and return its box. anchor: as in Pillow ("la": top left at x, y)."""
        if not text.isascii():
            raise ValueError(f"the font has no glyph for {ascii(text)}")
        face, at = font(self.px(size)), self.at(x, y)
        self.pen.text(at, text, color, face, anchor, stroke_width=int(bold))
        corners = self.pen.textbbox(at, text, face, anchor, stroke_width=int(bold))
        return self.area(*corners, self.image.size)

    def word(self, text, x, y, color, size, anchor="l"):
        """Draw a short line from cached masks, five times as fast as `text`. y is its middle; x is
        its left end, middle or right end (anchor l, m, r)."""
        mask = text_mask(text, self.px(size))
        left = self.px(x) - {"l": 0, "m": (mask.width - 1) // 2, "r": mask.width - 2}[anchor]
        self.image.paste(color, (left, self.px(y) - mask.height // 2), mask)

    def wrap(self, text: str, size: float, width: float) -> list[str]:
        """Break a text into lines of at most `width` units; a longer word gets its own line."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self.width(longer, size) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def stamp(self, mask, x, y, color):
        """Paste a colour, or an image, through a mask whose top left corner is at (x, y)."""
        left, top = self.px(x), self.px(y)
        self.image.paste(color, (left, top), mask)
        corners = (left, top, left + mask.width, top + mask.height)
        return self.area(*corners, self.image.size)

    def shape(self, name, x, y, size, color):
        return self.stamp(shape_mask(name, self.px(size)), x, y, color)

    def plate(self, x, y, width, height, color, radius=3):
        return self.stamp(plate_mask(self.px(width), self.px(height), self.px(radius)), x, y, color)

    def glyph(self, char, x, y, color, height=13 / 16, bold=0.0, angle=0, cell=CELL):
        """Draw a character in the cell, 16 units wide by default, with (x, y) as its top left."""
        return self.stamp(glyph_mask(char, self.px(cell), height, bold, angle), x, y, color)

    def noise(self, rng, strength: float):
        """Add grey noise with a standard deviation of `strength` (of 255)."""
        grain = rng.normal(0, strength, self.image.size[::-1])[..., None]
        pixels = np.asarray(self.image) + grain
        self.image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tile(picture: Image.Image, caption: str, side: int = 192) -> Image.Image:
    """A picture, its longer side enlarged to about `side` pixels, with its caption below."""
    scale = max(1, round(side / max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    lines, face, width = [], font(12), max(192, picture.width)
    for line in caption.splitlines():
        lines += textwrap.wrap(line, width // 7) or [""]
    lines = lines if len(lines) <= 16 else [*lines[:11], "...", *lines[-4:]]
    out = Image.new("RGB", (width + 12, picture.height + 16 * len(lines) + 14), "white")
    out.paste(picture, (6, 6))
    ImageDraw.Draw(out).multiline_text((6, picture.height + 8), "\n".join(lines), "black", face)
    return out


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Arrange rows of tiles on one white page."""
    width = max(sum(t.width for t in row) for row in rows)
    heights = [max(t.height for t in row) for row in rows]
    page = Image.new("RGB", (width, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            page.paste(picture, (sum(t.width for t in row[:j]), sum(heights[:i])))
    return page


def strip(images) -> Image.Image:
    """All images of one observation on one picture; a white line where there are none."""
    if len(images) == 1:
        return images[0]
    framed = [ImageOps.expand(image, 2, "silver") for image in images]
    row = max(1, 1100 // framed[0].width) if framed else 1
    return sheet([framed[i:i + row] for i in range(0, len(framed), row)]
                 or [[Image.new("RGB", (384, 1), "white")]])
