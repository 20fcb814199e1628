"""An episode as pictures: a film of its turns (GIF), and all of them side by side (PNG).

    shots = [Shot([screen], action="click(875, 624)", mark=(875, 624), marked=screen), ...]
    about = "Tick T.", "gui_form, level 0", shots, Verdict(True, "reward 1.00")
    save_film(film(*about), "out/agent/x.gif")
    storyboard(*about).save("out/agent/x.png")

Pillow alone draws them, with its built-in font. Small screens are enlarged by whole numbers, so
that their pixels stay sharp. A point or box that an action names is drawn on the picture it refers
to.
"""
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

from PIL import Image, ImageDraw, ImageOps

from tasks.draw import font, sheet

SIDE, GAP, COLUMN = 320, 14, 250        # pixels: a screen's side, margins, the text beside it
MOST_WIDE = 1600                        # pixels of a storyboard
LINES = 14                              # the most lines of a text card
PAPER, INK, PALE, EDGE = (255, 255, 255), (28, 32, 40), (104, 112, 124), (208, 213, 220)
MARK, GOOD, BAD = (255, 0, 140), (24, 140, 90), (206, 52, 42)
ARROW = ((0, 0), (0, 17), (4, 13.4), (6.6, 19.4), (9.4, 18.2), (6.8, 12.4), (12, 12.2))  # pixels
STEPS = 4                               # pictures of the cursor on its way
WAY, LOOK, PRESS, END = 70, 600, 900, 3000      # milliseconds: a step, a screen, a click, the end


@dataclass
class Shot:
    """One turn. pictures and text: what the model was shown; action: its reply; result: what came
    of it. mark: (x, y) or (x0, y0, x1, y1) in 0-999 of `marked`, which is one of the pictures or an
    earlier one; () where the action names no place."""
    pictures: list = field(default_factory=list)
    text: str = ""
    action: str = ""
    result: str = ""
    thought: str = ""
    mark: tuple = ()
    marked: Image.Image | None = None


@dataclass(frozen=True)
class Verdict:
    """How an episode ended. text: the reward, or the error."""
    good: bool
    text: str

    def __str__(self):
        return f"{'success' if self.good else 'failure'}: {self.text}"


# ---- what a turn shows --------------------------------------------------------------------------

def printable(text: str) -> str:
    """A text in the characters that the font has."""
    return "".join(c if " " <= c <= "~" or c == "\n" else "?" for c in text)


@lru_cache(maxsize=512)
def wrap(text: str, width: int, size: int, most: int = LINES) -> list[str]:
    """A text in lines of at most `width` pixels; of more than `most` lines, the last is "..."."""
    face, lines = font(size), []
    longest = int(width / face.getlength("e"))      # letters, after which a word is broken
    for part in printable(text).splitlines():
        lines.append("")
        for word in (piece for word in part.split() for piece in textwrap.wrap(word, longest)):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and face.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines if len(lines) <= most else [*lines[:most - 1], "..."]


def enlarged(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture, enlarged by a whole number to about `side` pixels; never made smaller."""
    scale = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def card(text: str, width: int) -> Image.Image:
    """A text on a card of this width in pixels."""
    lines = wrap(text, width - 24, 14)
    page = Image.new("RGB", (width, 18 * len(lines) + 20), (247, 248, 250))
    pen = ImageDraw.Draw(page)
    pen.multiline_text((12, 8), "\n".join(lines), INK, font(14), spacing=3)
    pen.rectangle((0, 0, page.width - 1, page.height - 1), outline=EDGE)
    return page


def panel(shot: Shot, marks: bool, number: int = 0) -> Image.Image:
    """What the model was shown in a turn: its pictures side by side, the text below them. marks:
    with the place that the action names, and the turn's number, on the picture it refers to, which
    comes first. A picture keeps its place in the top left corner."""
    pictures = list(shot.pictures)
    if marks and shot.mark:
        pictures = [shot.marked, *(one for one in pictures if one is not shot.marked)]
    tiles = [enlarged(picture, SIDE if len(pictures) < 3 else SIDE // 2) for picture in pictures]
    if marks and shot.mark:
        draw_mark(tiles[0], shot.mark, number)
    width = max(SIDE // 4 * 3, sum(tile.width for tile in tiles[:3])) if tiles else SIDE
    tiles = [ImageOps.expand(tile, (0, 0, 6, 6), PAPER) if len(tiles) > 1 else tile
             for tile in tiles]
    rows = [tiles[i:i + 3] for i in range(0, len(tiles), 3)]
    return sheet(rows + [[card(shot.text, width)]] if shot.text or not rows else rows)


def pixels_of(shot: Shot) -> list[float]:
    """The place that the action of a shot names, in pixels of its panel with marks."""
    size = enlarged(shot.marked, SIDE if len(shot.pictures) < 3 else SIDE // 2).size
    return to_pixels(shot.mark, size)


def to_pixels(mark: tuple, size: tuple) -> list[float]:
    """(x, y) or (x0, y0, x1, y1) in 0-999 as pixels of a picture of this size."""
    return [place * side / 999 for place, side in zip(mark, 2 * size)]


# ---- drawing marks ------------------------------------------------------------------------------

def smooth(picture: Image.Image, center: tuple, reach: int, draw):
    """Draw without jagged edges: draw(pen, k, x, y) draws around (x, y) on a layer of k = 4 times
    the size, which is laid over the picture within `reach` pixels around `center`."""
    left, top = (int(place) - reach for place in center)
    layer = Image.new("RGBA", (8 * reach, 8 * reach))
    draw(ImageDraw.Draw(layer), 4, 4 * (center[0] - left), 4 * (center[1] - top))
    layer = layer.resize((2 * reach, 2 * reach), Image.BOX)
    picture.paste(layer, (left, top), layer)


def draw_ring(picture: Image.Image, x: float, y: float, radius: float = 13):
    """A ring around a point, in pixels."""
    def draw(pen, k, x, y):
        for grow, line, color in ((1.5, 6, PAPER), (0, 3, MARK)):
            r = k * (radius + grow)
            pen.ellipse((x - r, y - r, x + r, y + r), None, color, k * line)
    smooth(picture, (x, y), ceil(radius) + 4, draw)


def draw_frame(picture: Image.Image, x0, y0, x1, y1):
    """A frame around a box, in pixels."""
    pen = ImageDraw.Draw(picture)
    box = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
    pen.rectangle(box, None, PAPER, 5)
    pen.rectangle([c + d for c, d in zip(box, (1, 1, -1, -1))], None, MARK, 3)


def draw_cursor(picture: Image.Image, x: float, y: float):
    """An arrow whose tip is at a point, in pixels."""
    def draw(pen, k, x, y):
        corners = [(x + k * a, y + k * b) for a, b in ARROW]
        pen.polygon(corners, PAPER)
        pen.line([*corners, *corners[:2]], INK, round(1.4 * k), "curve")
    smooth(picture, (x, y), 24, draw)


def draw_number(picture: Image.Image, number: int, x: float, y: float):
    """The number of a turn on a disc beside a point, inside the picture."""
    def draw(pen, k, x, y):
        pen.ellipse((x - 10 * k, y - 10 * k, x + 10 * k, y + 10 * k), MARK, PAPER, k)
    x = x + 20 if x + 32 < picture.width else x - 20
    y = y - 18 if y - 30 > 0 else y + 18
    smooth(picture, (x, y), 12, draw)
    ImageDraw.Draw(picture).text((x, y), str(number), PAPER, font(13), "mm", stroke_width=0.3)


def draw_mark(picture: Image.Image, mark: tuple, number: int = 0):
    """Draw a place in 0-999 of a picture, with the number of a turn unless it is 0."""
    places = to_pixels(mark, picture.size)
    if len(places) == 4:
        draw_frame(picture, *places)
    else:
        draw_ring(picture, *places)
    if number:
        draw_number(picture, number, *places[:2])


def with_point(picture: Image.Image, point: tuple) -> Image.Image:
    """A picture at its full size, with a ring and the cursor at a point in pixels."""
    picture = picture.copy()
    draw_ring(picture, *point, radius=max(13, max(picture.size) / 60))
    draw_cursor(picture, *point)
    return picture


# ---- the film -----------------------------------------------------------------------------------

def film(goal: str, label: str, shots: list[Shot], verdict: Verdict) -> list[tuple]:
    """An episode as [(picture, milliseconds)], all of one size: in each turn the new screen, the
    cursor on its way, the place that the action names. label: a line about the episode."""
    panels = [(panel(shot, False), panel(shot, True)) for shot in shots]
    size = [max(picture.size[axis] for both in panels for picture in both) for axis in (0, 1)]
    size[1] = max(size[1], 240)
    steps = STEPS if len(shots) <= 12 else 1            # a long film stays a small file
    at, pictures = (size[0] / 2, size[1] - 20), []      # where the cursor is, in pixels

    def add(picture, turns, milliseconds, end=None):
        drawn = page(picture, size, goal, label, shots[:turns], end)
        pictures.append((drawn, milliseconds))

    for turn, (shot, (seen, marked)) in enumerate(zip(shots, panels)):
        points = len(shot.mark) == 2
        look = seen.copy()
        if points:
            draw_cursor(look, *at)
        add(look, turn, 3 * LOOK if shot.text else LOOK)
        if points:
            to = pixels_of(shot)
            # on its way, unless the point is on an earlier picture, which is not shown yet
            here = any(shot.marked is picture for picture in shot.pictures)
            for step in range(1, steps * here + 1):
                share = step / steps
                share = share * share * (3 - 2 * share)         # it starts and ends slowly
                look = seen.copy()
                draw_cursor(look, *(a + share * (b - a) for a, b in zip(at, to)))
                add(look, turn, WAY)
            at = to
        look = marked.copy()
        if points:
            draw_cursor(look, *at)
        add(look, turn + 1, PRESS)
    if shots:
        add(look, len(shots), END, verdict)
    return pictures


def page(picture: Image.Image, size, goal: str, label: str, shots: list[Shot],
         end: Verdict | None) -> Image.Image:
    """One picture of the film: what the model sees on the left; on the right the goal, the actions
    so far and, at the end, the verdict."""
    width, height = size[0] + COLUMN + 3 * GAP, size[1] + 2 * GAP
    out = Image.new("RGB", (width, height), PAPER)
    out.paste(picture, (GAP, GAP))
    pen = ImageDraw.Draw(out)
    pen.rectangle((GAP - 1, GAP - 1, GAP + picture.width, GAP + picture.height), outline=EDGE)
    x, y, foot = size[0] + 2 * GAP, GAP - 3, height - GAP - 38
    for line in wrap(goal, COLUMN, 19, 6):
        pen.text((x, y), line, INK, font(19), stroke_width=0.35)
        y += 24
    for line in wrap(label, COLUMN, 13, 2):
        pen.text((x, y + 3), line, PALE, font(13))
        y += 17
    y += 16
    rows = [(number, *line) for number, shot in enumerate(shots, 1)
            for line in enumerate(wrap(shot.action or "?", COLUMN - 26, 16, 2))]
    for number, part, line in rows[-max(1, (foot - y - 20) // 24):]:
        newest = number == len(shots) and not end
        if part == 0:
            pen.text((x, y), str(number), MARK if newest else PALE, font(16), stroke_width=0.3)
        pen.text((x + 26, y), line, INK if newest else PALE, font(16))
        y += 24
    if end:
        pen.rounded_rectangle((x, foot, x + COLUMN - 1, height - GAP), 6, color_of(end))
        pen.text((x + COLUMN / 2, foot + 19), wrap(str(end), COLUMN - 16, 16, 2)[0], PAPER,
                 font(16), "mm", stroke_width=0.3)
    return out


def color_of(end: Verdict) -> tuple:
    return GOOD if end.good else BAD


def save_film(pictures: list[tuple[Image.Image, int]], path):
    """Write a film as a GIF that repeats. One palette for all pictures keeps it small."""
    images = [picture for picture, _ in pictures]
    some = images[::max(1, len(images) // 8)] + images[-1:]
    palette = sheet([[image] for image in some]).quantize(256, Image.Quantize.FASTOCTREE)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], loop=0,
                   duration=[milliseconds for _, milliseconds in pictures])


# ---- all turns on one picture -------------------------------------------------------------------

def storyboard(goal: str, label: str, shots: list[Shot], verdict: Verdict) -> Image.Image:
    """All turns side by side, at most four in a row: the screen, the place that the action names
    with the turn's number, the action, what came of it."""
    tiles = []
    for number, shot in enumerate(shots, 1):
        tiles.append(captioned(panel(shot, True, number), number, shot))
    columns = min(4, max(1, MOST_WIDE // tiles[0].width)) if tiles else 1
    rows = [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
    body = sheet(rows or [[card("", SIDE)]])
    width = max(body.width, 520)
    lines = wrap(goal, width - 2 * GAP, 20, 4)
    top = GAP + 25 * len(lines) + 24
    out = Image.new("RGB", (width, top + body.height), PAPER)
    pen = ImageDraw.Draw(out)
    pen.multiline_text((GAP, GAP - 3), "\n".join(lines), INK, font(20), spacing=5,
                       stroke_width=0.35)
    said = printable(str(verdict))
    pen.text((GAP, top - 23), said, color_of(verdict), font(15), stroke_width=0.35)
    pen.text((GAP + font(15).getlength(said) + 16, top - 22), printable(label), PALE, font(14))
    out.paste(body, (0, top))
    return out


def captioned(picture: Image.Image, number: int, shot: Shot) -> Image.Image:
    """A turn of the storyboard: its picture with action and result below."""
    said = wrap(f"{number}  {shot.action or '?'}", picture.width, 15, 4)
    came = wrap(shot.result, picture.width, 13, 3)
    out = Image.new("RGB", (picture.width + 2 * GAP,
                            picture.height + 20 * len(said) + 17 * len(came) + 2 * GAP), PAPER)
    out.paste(picture, (GAP, GAP))
    pen = ImageDraw.Draw(out)
    pen.rectangle((GAP - 1, GAP - 1, GAP + picture.width, GAP + picture.height), outline=EDGE)
    y = GAP + picture.height + 5
    pen.multiline_text((GAP, y), "\n".join(said), INK, font(15), spacing=3, stroke_width=0.2)
    pen.multiline_text((GAP, y + 20 * len(said)), "\n".join(came), PALE, font(13), spacing=3)
    return out
