"""Coloured shapes: name them, count them, point at them.

The three categories draw the same scenes. At level 0 a scene is square and each shape has a cell of
the grid for itself; from level 1 on half of the scenes are wider or higher, and shapes lie anywhere
without touching, in many sizes. Held out are some pairs of colour and shape, shades, and grounds.

A demonstration asks the category's own question first and then up to four questions of the other
two, or to click something: a picture must not tell which kind of reply is wanted. A question is
asked only if it has exactly one right answer and no earlier turn has given that answer away. Where
it depends on an order, the places in that order must be clearly apart.
"""
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

from .base import box, IMAGE, middle, Obs, OneShot, pick, worded
from .draw import (aspect, Canvas, CELL, COLORS, GRID, ground_and_ink, PAIRS, shades, SHAPES,
                   SQUARE, TRAIN_PAIRS)

# How a user may word a question; level 0 has the first two of each. screens.py asks the same about
# screens.
COLOR_OF = ("What color is the {}?", "Color of the {}?", "What colour is the {}?",
            "Which color is the {}?", "What color does the {} have?",
            "Tell me the color of the {}.")
SHAPE_OF = ("What shape is the {} one?", "Shape of the {} one?", "Which shape is the {} one?",
            "What shape is {}?", "What is the shape of the {} one?", "Name the {} shape.")
HOW_MANY = ("How many {}?", "Count the {}.", "How many {} are there?", "How many {} do you see?",
            "How many {} are in the picture?")
POINT_AT = ("Point at the {}.", "Where is the {}?", "Point to the {}.", "Where's the {}?",
            "Find the {}.")
CLICK_ON = ("Click the {}.", "Click on the {}.", "Press the {}.", "Tap the {}.")
LIST_ALL = ("List all.", "List the shapes row by row.", "Name all shapes, row by row.",
            "What shapes are there, row by row?")
PARTS = ("color", "shape", "place")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom",
          "bottom right")
CHINESE = dict(zip((*COLORS, *SHAPES, *PLACES), (
    "红色 绿色 蓝色 黄色 紫色 橙色 青色 粉色 "
    "圆形 方形 三角形 五角星 十字 菱形 "
    "左上 上方 右上 左边 中间 右边 左下 下方 右下").split()))


@dataclass(frozen=True)
class Item:
    """One shape of a scene."""
    color: str
    shape: str
    area: tuple                 # x0, y0, x1, y1 in 0-999

    @property
    def name(self):
        return f"{self.color} {self.shape}"


def plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def cell(area) -> list[int]:
    """[column, row] of the cell that contains the middle of a box in 0-999."""
    return [int(GRID * c / 1000) for c in middle(area)]


def offset(one, other, axis: int) -> float:
    """How far the middle of a box lies from that of another along an axis, in lengths of the larger
    box. Shapes are as wide as high, so offsets along both axes have the same scale."""
    lengths = [area[axis + 2] - area[axis] for area in (one, other)]
    return (one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) / 2 / max(lengths)


def by_rows(things, area=lambda thing: thing) -> list:
    """Things row by row, each row from left to right. A row has all things whose middle lies at
    most half a thing below the middle of its highest. area: the box of a thing."""
    rows = []
    for thing in sorted(things, key=lambda thing: middle(area(thing))[1]):
        if not rows or offset(area(thing), area(rows[-1][0]), 1) > 0.5:
            rows.append([])
        rows[-1].append(thing)
    return [thing for row in rows for thing in sorted(row, key=lambda thing: area(thing)[0])]


def ask_attribute(rng, item, items, level):
    """(question, answer) about an item's colour or shape; None if neither identifies it."""
    by_shape = sum(other.shape == item.shape for other in items) == 1
    by_color = sum(other.color == item.color for other in items) == 1
    if by_shape and (not by_color or rng.integers(2)):
        return worded(rng, COLOR_OF, level).format(item.shape), item.color
    if not by_color:
        return None
    return worded(rng, SHAPE_OF, level).format(item.color), item.shape


def window(rng, items):
    """A random part of the scene, at least 2 x 2 cells, with all items in it, as (columns, rows),
    each (from, to) in cells. Cropping to it varies the aspect ratio of captioned pictures. [O]"""
    spans = []
    for axis in (0, 1):
        cells = [cell(item.area)[axis] for item in items]
        low = int(rng.integers(min(cells) + 1))
        high = GRID - int(rng.integers(GRID - max(cells)))
        low = min(low, GRID - 2)
        spans.append((low, max(high, low + 2)))
    return spans


def caption(items, spans=((0, GRID), (0, GRID)), language="en", parts=PARTS) -> str:
    """A caption in reading order, "red star top left, blue circle right", or the same in Chinese
    (zh), where the place comes first. spans: the part of the scene, as from `window`. parts: which
    of colour, shape and place the caption mentions."""
    told = []
    for item in sorted(items, key=lambda item: cell(item.area)[::-1]):
        across, down = ((c + 0.5 - low) / (high - low)
                        for c, (low, high) in zip(cell(item.area), spans))
        third = [(share > 0.45) + (share > 0.55) for share in (down, across)]
        known = {"place": PLACES[3 * third[0] + third[1]], "color": item.color, "shape": item.shape}
        order = PARTS if language == "en" else ("place", "color", "shape")
        words = [known[part] for part in order if part in parts]
        told.append(" ".join(words) if language == "en" else "".join(map(CHINESE.get, words)))
    return (", " if language == "en" else "，").join(told)


def kinds(item):
    """[(name, test)]: an item's names, each with a test whether another item has it, too."""
    return [(item.shape, lambda other: other.shape == item.shape),
            (f"{item.color} one", lambda other: other.color == item.color),
            (item.name, lambda other: other.name == item.name)]


def refer(rng, item, items):
    """A name that fits this item only, "star", "red one" or "red star"; None if there is none."""
    fitting = [name for name, fits in kinds(item) if sum(map(fits, items)) == 1]
    return pick(rng, fitting) if fitting else None


def ask_count(rng, color, shape, items, level):
    """(question, answer); a color or shape of None means any."""
    count = sum(color in (None, i.color) and shape in (None, i.shape) for i in items)
    what = " ".join(filter(None, (color, plural(shape) if shape else "ones")))
    return worded(rng, HOW_MANY, level).format(what), count


MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def moving(item: Item, move: str, language: str = "en", parts=PARTS) -> str:
    """"red star moves left", or the same in Chinese (zh). parts: what it mentions."""
    words = [getattr(item, part) for part in ("color", "shape") if part in parts]
    if language == "en":
        return " ".join([*words, "moves", move])
    return f"{''.join(map(CHINESE.get, words))}向{dict(zip(MOVES, '左右上下'))[move]}移动"


APART = 1.5                     # least distance between things that lie anywhere, in units


def clear(x, y, size, spots) -> bool:
    """Whether a thing at (x, y) would lie APART from those at `spots`, each an (x, y, size)."""
    return not any(x < x1 + size1 + APART and x1 < x + size + APART
                   and y < y1 + size1 + APART and y1 < y + size + APART for x1, y1, size1 in spots)


class Scene(OneShot):
    """Shapes on a plain background."""
    objects = ((1, 3), (2, 4), (4, 6), (6, 9), (9, 13))     # least and most, for each level
    sizes, gap = (11, 12, 13), 0    # level 0, in units; gap: least distance from the cell's border
    grid = SQUARE                   # columns and rows of the picture, in cells

    def paint(self, pairs):
        """Draw (color, shape) pairs at random places -> (picture, items in the pairs' order)."""
        palette, spots = self.palette(), self.place(len(pairs))
        canvas, items = self.draw(palette, pairs, spots)
        return canvas.image, items

    def palette(self):
        """(RGB of each colour, background, ink)"""
        return shades(self.rng, self.heldout), *ground_and_ink(self.rng, self.heldout, self.level)

    def place(self, n, sizes=()):
        """A random (x, y, size), in units, for each of n things. sizes: those of level 1 on, if
        they are not left to chance."""
        if self.level == 0:
            return self.in_cells(self.rng.permutation(GRID * GRID)[:n].tolist())
        return self.anywhere(n, sizes)

    def in_cells(self, cells):
        """A random (x, y, size) for a thing in each of these cells, shifted by up to two units."""
        rng, n, spots = self.rng, len(cells), []
        sizes, moves = rng.integers(len(self.sizes), size=n), rng.integers(-2, 3, (n, 2))
        for number, i, (dx, dy) in zip(cells, sizes.tolist(), moves.tolist()):
            size = self.sizes[i]
            room = (CELL - size) / 2
            reach = room - self.gap
            spots.append((number % GRID * CELL + room + max(-reach, min(reach, dx)),
                          number // GRID * CELL + room + max(-reach, min(reach, dy)), size))
        return spots

    def anywhere(self, n, sizes=()):
        """A random (x, y, size) for each of n things, in a picture of a random aspect with at least
        a cell for each. Sizes are whole units, at least 9, so that there are few masks; the fewer
        things, the larger. The largest things are placed first, or there would be no room."""
        rng = self.rng
        while True:
            self.grid = columns, rows = aspect(rng, self.level)
            wide, high = CELL * columns, CELL * rows
            most = int(sqrt(0.4 * wide * high / n) - APART)     # covers two fifths at most
            chosen = sizes or rng.integers(9, max(9, min(24, most)) + 1, n).tolist()
            spots = {}
            for i in sorted(range(n), key=lambda i: -chosen[i]) if n <= columns * rows else ():
                size = chosen[i]
                corners = rng.random((20, 2)) * (wide - size, high - size)
                for x, y in corners.tolist():
                    if clear(x, y, size, spots.values()):
                        spots[i] = x, y, size
                        break
                else:
                    break
            if len(spots) == n:
                return [spots[i] for i in range(n)]

    def spot(self, area) -> list[int]:
        """The answer to the question where a thing is: the middle of its box, which is always a
        point on it. At level 0 the middle of its cell, which is, too: it does not depend on the
        random shift of the thing, so the training targets have no noise. [O]"""
        if self.level:
            return list(middle(area))
        return [round((c + 0.5) * 999 / GRID) for c in cell(area)]

    def draw(self, palette, pairs, spots):
        """Draw a (color, shape), or nothing for None, at each spot -> (canvas, items in order)."""
        colors, ground, _ = palette
        canvas = Canvas(self.pixels, ground, self.grid)
        items = [pair and Item(*pair, canvas.shape(pair[1], x, y, size, colors[pair[0]]))
                 for pair, (x, y, size) in zip(pairs, spots)]
        return canvas, items

    def clip(self):
        """(two frames, the single item in the first, the direction in which it moves). It moves by
        half a patch of the model size `tiny`, so that one patch sees the movement. No category uses
        this; the vision tower learns movement from it. [O]"""
        rng, palette, pair = self.rng, self.palette(), pick(self.rng, self.pairs())
        move = pick(rng, tuple(MOVES))
        dx, dy = MOVES[move]
        x, y = rng.integers(1, GRID - 1, 2).tolist()    # every direction is possible from there
        [(left, top, size)] = self.in_cells([y * GRID + x])
        (before, [item]), (after, _) = (
            self.draw(palette, [pair], [(left + far * dx, top + far * dy, size)])
            for far in (0, CELL // 4))
        return (before.image, after.image), item, move

    def others(self, n, allowed, close=lambda pair: False):
        """n (color, shape) distractors for which `allowed` is true. From level 2 on half of them
        are also `close` to the target, if there are such pairs. A pair may occur twice."""
        pool = [pair for pair in self.pairs() if allowed(pair)]
        near = [pair for pair in pool if close(pair)] if self.level >= 2 else []
        near = near or pool
        return [pick(self.rng, near if i % 2 else pool) for i in range(n)]

    def pairs(self):
        """The (color, shape) pairs of the split."""
        return PAIRS if self.heldout else TRAIN_PAIRS

    def number(self):
        """A random number of objects for the level."""
        return self.between(self.objects)

    def between(self, table):
        """A random number from the least to the most that a table has for the level."""
        low, high = table[self.level]
        return int(self.rng.integers(low, high + 1))

    def follow_up(self, items, own, named):
        """Up to four more (question, reply) after the question `own`, and a list of all. named:
        items whose colour and shape the dialogue has already given away."""
        rng, asked, more = self.rng, {own}, []
        for kind in rng.integers(4 if self.level else 3, size=8).tolist():
            item = pick(rng, items)
            if kind == 0 and item not in named and (found := ask_attribute(
                    rng, item, items, self.level)):
                question, reply = found[0], box(found[1])
                named = [*named, item]
            elif kind == 1:
                color, shape = (item.color, None) if rng.integers(2) else (None, item.shape)
                question, count = ask_count(rng, color, shape, items, self.level)
                if count == 1 and rng.integers(4):      # or nearly every answer would be 1
                    continue
                reply = box(count)
            elif kind >= 2 and (called := refer(rng, item, items)):
                forms = CLICK_ON if kind == 3 else POINT_AT
                question = worded(rng, forms, self.level).format(called)
                x, y = self.spot(item.area)
                reply = f"click({x}, {y})" if kind == 3 else box([x, y])
                named = [*named, item]
            else:
                continue
            if question not in asked and len(more) < 4:
                asked.add(question)
                more.append((question, reply))
        # A list has the most to learn from for its length. Its rows must be clear.
        if len(items) <= 6 and not any(0.4 < abs(offset(one.area, other.area, 1)) < 0.75
                                       for one, other in combinations(items, 2)):
            listed = by_rows(items, lambda item: item.area)
            ask = worded(rng, LIST_ALL, self.level, 1)
            more.append((ask, box(", ".join(item.name for item in listed))))
        return more


class ShapeAttr(Scene):
    """Name the colour of the star, or the shape of the red one."""
    tier, verifier = 0, "EX"

    @classmethod
    def chance(cls, level):
        return (len(SHAPES) + len(COLORS)) / len(TRAIN_PAIRS) / 2

    def make(self):
        rng = self.rng
        color, shape = pick(rng, self.pairs())
        self.by_color = bool(rng.integers(2))       # the colour is given, the question is the shape
        given, gold, forms = (color, shape, SHAPE_OF) if self.by_color else (shape, color, COLOR_OF)
        rest = self.others(self.number() - 1, lambda pair: given not in pair)
        image, self.items = self.paint([(color, shape), *rest])
        question = worded(rng, forms, self.level).format(given)
        self.more = self.follow_up(self.items, question, self.items[:1])
        return Obs(IMAGE + question, [image]), gold

    def glance(self, rng):
        item = pick(rng, self.items)
        return box(item.shape if self.by_color else item.color)


class Counting(Scene):
    """Count the circles, the red ones, from level 2 on also the red circles."""
    tier, verifier = 0, "NUM"
    most = (4, 5, 6, 7, 8)
    distractors = ((0, 2), (1, 3), (2, 5), (3, 6), (4, 8))

    @classmethod
    def chance(cls, level):
        return 1 / cls.most[level]

    def make(self):
        rng = self.rng
        color, shape = pick(rng, self.pairs())
        kind = int(rng.integers(2 if self.level < 2 else 3))
        color, shape = ((color, None), (None, shape), (color, shape))[kind]
        count = 1 + int(rng.integers(self.most[self.level]))

        def matches(pair):
            return color in (None, pair[0]) and shape in (None, pair[1])

        wanted = [pair for pair in self.pairs() if matches(pair)]
        rest = self.others(self.between(self.distractors), lambda p: not matches(p),
                           lambda p: kind == 2 and (p[0] == color or p[1] == shape))
        pairs = [pick(rng, wanted) for _ in range(count)] + rest
        image, items = self.paint(pairs)
        question, gold = ask_count(rng, color, shape, items, self.level)
        self.more = self.follow_up(items, question, [])
        return Obs(IMAGE + question, [image]), gold

    def glance(self, rng):
        return box(1 + int(rng.integers(self.most[self.level])))


class Point(Scene):
    """Point at the red star."""
    tier, verifier, blind = 1, "HIT", (0.08, 0.10, 0.08, 0.05, 0.04)

    def make(self):
        target = pick(self.rng, self.pairs())
        rest = self.others(self.number() - 1, lambda p: p != target,
                           lambda p: p[0] == target[0] or p[1] == target[1])
        image, self.items = self.paint([target, *rest])
        called = refer(self.rng, self.items[0], self.items)
        question = worded(self.rng, POINT_AT, self.level).format(called)
        self.more = self.follow_up(self.items, question, self.items[:1])
        return Obs(IMAGE + question, [image]), self.items[0].area

    def reply(self, gold):
        return box(self.spot(gold))

    def glance(self, rng):
        return self.reply(pick(rng, self.items).area)
