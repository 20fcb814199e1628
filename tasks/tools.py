"""Tools: what can't be read at the model's size must be cropped, what isn't known looked up.

An episode is one growing conversation. The model writes one call a turn, in the syntax of screen
actions; what comes back is text, a picture or both, and `answer("...")` ends it. A picture is
made larger than the model sees it: the whole is shown without its fine print, a crop is cut from
the large one. So the answer isn't hidden, it is out of sight, and a call that brings nothing new
costs a turn.

Three categories: `visual_tools` reads and reckons with fine print, `text_tools` looks things up
in a world (world.py), `image_mining` goes from a picture through pages and their pictures.
"""
import ast
import operator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from .base import IMAGE, Env, Obs, Step, held, middle, pick
from .draw import CELL, GRID, PAIRS, TRAIN_PAIRS, UNITS, Canvas, plain, shades
from .verify import inside, iou, parse_action, plain as normal
from .world import YEAR, breadth, draw_emblem, world

USES = {"crop": "crop(x0, y0, x1, y1)", "zoom": "zoom(x, y)",
        "draw_box": "draw_box(x0, y0, x1, y1)", "draw_point": "draw_point(x, y)",
        "search_image": "search_image(x0, y0, x1, y1)", "search_text": 'search_text("words")',
        "open": 'open("name")', "calc": 'calc("2*(3+4)")', "answer": 'answer("...")'}
PAPER, INK = (250, 250, 246), (34, 36, 44)
FINE = 1.7                      # height of fine print, in units: 3 pixels of 128, 14 in a zoom
WORLDS = 64                     # that are looked things up in: too many to learn by heart
SKY, LAND, SEA, WALL = (206, 226, 240), (150, 176, 120), (104, 150, 186), (228, 206, 170)
HILL, ROOF, DARK, SKIN = (118, 148, 104), (164, 84, 64), (96, 92, 104), (226, 184, 152)
SCENES = {                      # kind: what is seen in pictures of it, polygons in units
    "country": ((HILL, (-6, 46, 7, 18, 22, 46)), (HILL, (8, 46, 22, 27, 36, 46)),
                (SEA, (14, 45, 18, 45, 34, 64, 20, 64))),
    "yard": ((WALL, (4, 28, 32, 28, 32, 50, 4, 50)), (DARK, (13, 36, 23, 36, 23, 50, 13, 50)),
             (ROOF, (2, 28, 11, 20, 11, 28, 20, 20, 20, 28, 34, 20, 34, 28))),
    "city": ((WALL, (3, 30, 12, 30, 12, 18, 22, 18, 22, 26, 32, 26, 32, 48, 3, 48)),
             (ROOF, (2, 30, 7.5, 23, 13, 30)), (DARK, (11, 18, 17, 6, 23, 18)),
             (ROOF, (21, 26, 27, 20, 33, 26)), (DARK, (15, 38, 19, 38, 19, 48, 15, 48))),
    "ship": ((ROOF, (3, 42, 36, 42, 31, 52, 9, 52)), (DARK, (18, 12, 19, 12, 19, 42, 18, 42)),
             (WALL, (20.5, 13, 33, 38, 20.5, 38)), (WALL, (16.5, 17, 16.5, 38, 6, 38))),
    "person": ((DARK, (4, 64, 6, 44, 14, 39, 24, 39, 32, 44, 34, 64)),
               (SKIN, (12, 20, 26, 20, 26, 32, 22, 40, 16, 40, 12, 32)),
               (ROOF, (8, 21, 11, 13, 27, 13, 30, 21))),
}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


def calc(text: str) -> str | None:
    """Add, subtract, multiply, divide, with brackets; None for anything else or beyond 1e12."""
    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            result = node.value
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            result = -value(node.operand)
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            result = OPERATORS[type(node.op)](value(node.left), value(node.right))
        else:
            raise ValueError
        if abs(result) > 1e12:
            raise ValueError
        return result
    try:
        result = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None
    return str(result) if type(result) is int else f"{result:.10g}"


def call(name: str, *args) -> str:
    """A tool call as the model writes it."""
    return f"{name}({', '.join(map(repr, args))})".replace("'", '"')


@dataclass
class Photo:
    """A large picture, and what stands on it: the fine print, and whose emblem where."""
    image: Image.Image
    labels: dict                # name -> ((x0, y0, x1, y1) in 0-999, height of the font in units)
    emblem: tuple = ()          # (page, area)


class Toolbox(Env):
    """An episode with tools; subclasses say which, and what is asked."""
    family, tier, verifier, min_pixels, max_turns = "agent", 3, "EX", 128, 12
    tools: tuple = ()

    def start(self, question, gold, photo=None):
        """Set out -> the first observation."""
        self.first = self.photo = photo
        self.said, self.log, self.marks, self.gold = None, [], [], {"answer": str(gold)}
        where = ", points in 0-999 of the last whole picture" if photo else ""
        uses = ", ".join(USES[name] for name in self.tools)
        text = f"{question}\nOne call a turn{where}: {uses}."
        return Obs(IMAGE + text, [self.whole()]) if photo else Obs(text)

    def over(self):
        return self.said is not None or len(self.log) >= self.max_turns

    def step(self, text):
        if self.over():
            return Step(None, True)
        name, args = parse_action(str(text)) or ("", [])
        fits = name in self.tools and self.fits(name, args)
        self.log.append([name if fits else "?"])        # what was done, then what was seen by it
        obs = getattr(self, name)(*args) if fits else Obs("That is none of the calls.")
        return Step(None if self.over() else obs, self.over(), self.over() and self.said is None)

    @staticmethod
    def fits(name, args):
        """Whether these are the arguments of a tool: one text, or integers in 0-999."""
        if '"' in USES[name]:
            return len(args) == 1 and type(args[0]) in ((str, int) if name == "answer" else (str,))
        n = USES[name].count(",") + 1
        return len(args) == n and all(type(a) is int and 0 <= a <= 999 for a in args)

    def evidence(self):
        return {"answer": self.said, "log": [list(turn) for turn in self.log],
                "gold": dict(self.gold)}

    # -- the tools: what each shows; arguments fit by the time they come here

    def answer(self, text):
        self.said = str(text)

    def calc(self, text):
        return Obs(calc(text) or "That can't be reckoned: numbers, + - * / and brackets only.")

    def zoom(self, x, y):
        """A quarter of the side about a point."""
        x, y = (min(749, max(0, c - 125)) for c in (x, y))
        return self.crop(x, y, x + 250, y + 250)

    def crop(self, x0, y0, x1, y1):
        wide, high = x1 - x0, y1 - y0
        if min(wide, high) < 30 or max(wide, high) > 4 * min(wide, high):
            return Obs("A crop is 30 or more wide and high, and no ribbon.")
        self.see((x0, y0, x1, y1), self.pixels)
        scale, zoomed = self.photo.image.width / 999, self.pixels / max(wide, high)
        size = (round(wide * zoomed), round(high * zoomed))
        part = [c * scale for c in (x0, y0, x1, y1)]
        return Obs(IMAGE, [self.photo.image.resize(size, Image.BICUBIC, part, reducing_gap=2)])

    def draw_box(self, x0, y0, x1, y1):
        if x0 >= x1 or y0 >= y1:
            return Obs("A box is x0, y0, x1, y1, from left and top to right and bottom.")
        self.marks.append((x0, y0, x1, y1))
        return Obs(IMAGE, [self.whole()])

    def draw_point(self, x, y):
        return self.draw_box(x - 24, y - 24, x + 24, y + 24)

    # -- what is seen

    def whole(self):
        """The whole picture, with the marks on it. However large, it holds what `min_pixels` can:
        else a large one would need no tools. [O]"""
        self.see((0, 0, 999, 999), self.min_pixels)
        small = self.photo.image.resize((self.min_pixels,) * 2, Image.BOX, reducing_gap=1)
        image = small.resize((self.pixels,) * 2, Image.BICUBIC)
        for corners in self.marks:
            pen, scale = ImageDraw.Draw(image), self.pixels / 999
            pen.rectangle([c * scale for c in corners], outline=(255, 0, 200),
                          width=self.pixels // 64)
        return image

    def see(self, window, pixels):
        """Note in the log what can be read in a window shown at a size: text of nine pixels."""
        share = max(window[2] - window[0], window[3] - window[1]) / 999
        for name, (area, height) in self.photo.labels.items():
            shown = inside(area[:2], window) and inside(area[2:], window)
            if self.log and shown and height / UNITS / share * pixels >= 9:
                self.log[-1].append(name)

    def blank(self, color):
        """The large picture to draw on; four times the model's, of which no more than 2048 is
        ever needed."""
        return Canvas(min(4 * self.pixels, 2048), color)


class Board(Toolbox):
    """Starts from a board of cards, each a coloured shape over fine print."""
    cards = ((2, 3), (4, 5), (6, 8), (8, 10), (10, 12))         # least and most, by level

    def number(self):
        low, high = self.cards[self.level]
        return int(self.rng.integers(low, high + 1))

    def pin(self, texts) -> Photo:
        """Cards with these texts in random cells. Leaves `self.names` (the red star) and
        `self.cells`, and `self.spots`, their middles, in the order of the texts."""
        rng, n, labels, self.spots = self.rng, len(texts), {}, []
        self.colors = shades(rng, self.heldout)
        ground = plain(rng, self.heldout, self.level)[0]
        canvas = self.blank(ground)
        while True:             # of all layouts, one in five is held out
            self.cells = rng.permutation(GRID * GRID)[:n].tolist()
            if held(str(self.cells)) == self.heldout:
                break
        pairs = PAIRS if self.heldout else TRAIN_PAIRS
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:n].tolist()]
        self.names = [f"the {color} {shape}" for color, shape in chosen]
        paper, ink = (PAPER, INK) if sum(ground) < 384 else (INK, PAPER)
        moves = rng.uniform(-0.8, 0.8, (n, 2)).tolist()
        for i, (cell, (dx, dy)) in enumerate(zip(self.cells, moves)):
            x, y = cell % GRID * CELL + 1 + dx, cell // GRID * CELL + 1 + dy
            canvas.pen.rectangle(canvas.at(x, y, x + 14, y + 14), paper)
            self.spots.append(middle(canvas.area(x, y, x + 14, y + 14)))
            canvas.shape(chosen[i][1], x + 3, y + 1.5, 8, self.colors[chosen[i][0]])
            labels[f"card {i}"] = canvas.text(texts[i], x + 7, y + 11.6, ink, FINE, "mm"), FINE
        return Photo(canvas.image, labels)


class VisualTools(Board):
    """Read the number under the red star; from level 2 on add two, at 3 one of them stands on the
    card under a point, at 4 add those in a box."""
    tools = ("crop", "zoom", "draw_box", "draw_point", "calc", "answer")

    @classmethod
    def chance(cls, level):
        return 0.02             # one of ninety numbers

    def reset(self):
        rng, n = self.rng, self.number()
        self.values = (10 + rng.permutation(90)[:n]).tolist()
        photo = self.pin([str(value) for value in self.values])
        self.picked, self.mark = [0] if self.level < 2 else [0, 1], None
        question = f"What number stands under {self.names[0]}?"
        if self.level == 2:
            question = f"Add the numbers under {self.names[0]} and {self.names[1]}."
        elif self.level == 3:
            self.mark = [c + int(rng.integers(-80, 81)) for c in self.spots[1]]
            question = (f"Add the number under {self.names[0]} and the one on the card at the "
                        f"point {self.mark}.")
        elif self.level == 4:
            blocks = {(c, r): [i for i, cell in enumerate(self.cells)
                               if c <= cell % GRID <= c + 1 and r <= cell // GRID <= r + 1]
                      for c in range(GRID - 1) for r in range(GRID - 1)}
            c, r = pick(rng, [corner for corner, cards in blocks.items() if len(cards) >= 3])
            self.picked = blocks[c, r]
            self.mark = [round(k * 999 / GRID) for k in (c, r, c + 2, r + 2)]
            question = f"Add the numbers of all cards in the box {self.mark}."
        return self.start(question, sum(self.values[i] for i in self.picked), photo)

    def oracle(self):
        if self.mark:
            self.why = "First I mark the place."
            yield call("draw_box" if len(self.mark) == 4 else "draw_point", *self.mark)
        for i in self.picked:
            self.why = f"The number under {self.names[i]} is too small to read."
            yield call("zoom", *self.spots[i])
        found = " + ".join(str(self.values[i]) for i in self.picked)
        if len(self.picked) > 1:
            self.why = f"To reckon: {found}."
            yield call("calc", found)
            found += f" = {self.gold['answer']}"
        self.why = f"It is {found}."
        yield call("answer", self.gold["answer"])

    def glance(self, rng):
        return call("answer", str(pick(rng, self.values)))


class Library(Toolbox):
    """Has a world to look things up in, one of many; world 0 is kept for questions without."""

    def settle(self):
        self.world = world(1 + int(self.rng.integers(WORLDS)), self.heldout)
        self.pages = self.world.pages

    def search_text(self, words):
        found = [f"{page.name} ({page.kind})" for page in self.world.search(words)]
        return Obs(f"Pages: {', '.join(found)}." if found else "No page has these words.")

    def open(self, name):
        page = self.pages.get(normal(name).capitalize())
        if page is None:
            return Obs("There is no page of that name.")
        self.log[-1].append(page.name)
        return self.turn_to(page)

    def turn_to(self, page):
        return Obs(page.text)

    def wander(self, links):
        """(names, facts): a page at random, and so many others, each found by a fact of the one
        before; none comes twice."""
        while True:
            names, facts = [pick(self.rng, list(self.pages))], []
            for _ in range(links):
                page = self.pages[names[-1]]
                facts.append(pick(self.rng, [f for f, v in page.facts.items() if v in self.pages]))
                names.append(page.facts[facts[-1]])
            if len(set(names)) == len(names):
                return names, facts

    def seek(self, name):
        """The search for a page of which the year is known; leaves the thought before it."""
        self.why = f"I look for {self.dated(name)}."
        page = self.pages[name]
        return call("search_text", f"{page.kind} {YEAR[page.kind]} {page.facts[YEAR[page.kind]]}")

    def dated(self, name):
        page = self.pages[name]
        return f"the {page.kind} of the {YEAR[page.kind]} {page.facts[YEAR[page.kind]]}"


class TextTools(Library):
    """No picture: a number from one page; from level 1 on the difference of two, at 2 and 3 from
    pages one and two links away; at 4 a sum over all ships of a yard."""
    tools, min_pixels = ("search_text", "open", "calc", "answer"), 64
    links = ((0,), (0, 0), (1, 0), (2, 1), ())

    @classmethod
    def chance(cls, level):
        return 0.01             # years and numbers of two digits

    def reset(self):
        """Leaves `self.route`, the pages to open and what to learn there, and `self.sought`, those
        of them that are called by their year."""
        rng, asked, which = self.rng, [], int(self.rng.integers(2))     # years, other numbers
        self.settle()
        self.route, self.sought = [], []
        for links in self.links[self.level]:
            names, facts = self.wander(links)
            while names[-1] in dict(self.route):
                names, facts = self.wander(links)
            facts.append(self.pages[names[-1]].numbers[which])
            self.route += zip(names, facts)
            self.sought += names[:1] if links else []
            called = self.dated(names[0]) if links else names[0]
            asked.append(f"the {' of the '.join(reversed(facts))} of {called}")
        question = f"By how much do {' and '.join(asked)} differ?"
        if self.level == 0:
            question = f"What is {asked[0]}?"
        elif self.level == 4:
            self.sought = [pick(rng, self.world.named["ship"])]
            yard = self.pages[self.pages[self.sought[0]].facts["yard"]]
            self.route = [(self.sought[0], "yard"), (yard.name, "ships")]
            self.route += [(name, "number of sailors") for name in yard.ships]
            question = (f"How many sailors have all ships together that the yard of "
                        f"{self.dated(self.sought[0])} has built?")
        terms = [self.pages[name].facts[fact] for name, fact in self.route
                 if fact in self.pages[name].numbers]
        terms = [max(terms), -min(terms)] if len(asked) == 2 else terms
        self.sum = " + ".join(map(str, terms)).replace("+ -", "- ")
        return self.start(question, calc(self.sum))

    def oracle(self):
        unknown = list(self.sought)
        for name, fact in self.route:
            if name in unknown:
                unknown.remove(name)
                yield self.seek(name)
                self.why = f"That is {name}."
            yield call("open", name)
            self.why = self.pages[name].tell(fact)
        if self.level:
            yield call("calc", self.sum)
            self.why = f"{self.sum} = {self.gold['answer']}."
        yield call("answer", self.gold["answer"])

    def glance(self, rng):
        page = self.pages[pick(rng, self.route)[0]]
        return call("answer", str(page.facts[pick(rng, page.numbers)]))


class ImageMining(Library, Board):
    """A card of the board names a page, or from level 2 on a year; from there through pages, at 3
    and 4 also by an emblem in a picture, to a sign in the last picture, in fine print from 3 on.
    Signs and emblems in pictures are new in every task and stand in no text: without the board,
    without tools, from memory or by text search alone there is nothing to be had. [C] for a hop
    through an image, [O] for the rest."""
    tools = ("crop", "zoom", "search_text", "search_image", "open", "answer")
    cards = ((2, 3), (3, 4), (5, 6), (7, 8), (9, 10))

    @classmethod
    def chance(cls, level):
        return 0.0              # a sign that was not seen earns nothing

    def reset(self):
        rng = self.rng
        self.settle()
        self.salt, names = int(rng.integers(2 ** 31)), [""] * 2
        while len(set(names)) < len(names):         # what leads on from each, and where to
            names, links = self.wander(self.level in (1, 2, 4))
            if self.level >= 3:
                while self.pages[names[-1]].emblem:         # where another's may hang
                    names, links = self.wander(self.level == 4)
                names.append(self.scene(names[-1])[1])
                links.append("emblem")
            if self.level == 4:
                links.append(pick(rng, ("seat", "founder")))
                names.append(self.pages[names[-1]].facts[links[-1]])
        self.route = list(zip(names, [*links, None]))
        first = self.pages[names[0]]
        alike, n = self.world.named[first.kind], self.number()
        order = rng.permutation(len(alike))[:n].tolist()
        self.others = [alike[i] for i in order if alike[i] != first.name][:n - 1]
        clue = "name" if self.level < 2 else YEAR[first.kind]
        photo = self.pin([str(self.pages[name].facts.get(clue, name))
                          for name in (first.name, *self.others)])
        steps = [f"the {first.kind} whose {clue} stands under {self.names[0]}"]
        steps += ["the yard whose emblem hangs in its picture" if link == "emblem" else
                  f"its {link}" for link in links]
        question = (f"Find {', then '.join(steps)}. What number is on the sign in its picture? "
                    'open("board") shows this picture again.')
        obs = self.start(question, self.scene(names[-1])[0], photo)
        self.gold["needs"] = ["card 0", f"sign of {names[-1]}"]
        self.way = self.oracle()
        return obs

    def scene(self, name):
        """(the number on the sign, whose emblem hangs there) in the picture of a page."""
        rng = np.random.default_rng([self.salt, crc32(name.encode())])
        number, yard = 100 + int(rng.integers(900)), pick(rng, self.world.named["yard"])
        return number, name if self.pages[name].emblem else yard

    def turn_to(self, page):
        number, owner = self.scene(page.name)
        canvas = self.blank(SKY)
        ground = (0, 44, 64, 44, 64, 64, 0, 64)
        for color, corners in ((SEA if page.kind == "ship" else LAND, ground), *SCENES[page.kind]):
            canvas.pen.polygon(canvas.at(*corners), fill=color)
        flag = self.pages[owner]
        x = 61 - breadth(flag, 22)
        canvas.plate(x - 1.5, 2, 1.5, 40, DARK, 0.5)
        area = draw_emblem(canvas, flag, x, 3, 22, self.colors)
        height = FINE if self.level >= 3 else 8
        canvas.plate(38, 46, 24, 13, PAPER, 1)
        sign = canvas.text(str(number), 50, 52.5, INK, height, "mm")
        self.photo = Photo(canvas.image, {f"sign of {page.name}": (sign, height)}, (owner, area))
        return Obs(IMAGE + page.text, [self.whole()])

    def open(self, name):
        if normal(name) != "board":
            return super().open(name)
        self.photo = self.first
        return Obs(IMAGE, [self.whole()])

    def search_image(self, *window):
        if not self.photo.emblem or iou(window, self.photo.emblem[1]) < 0.25:
            return Obs("No flag or emblem fills that part of the picture.")
        found = self.world.alike(self.pages[self.photo.emblem[0]].emblem)
        canvas = Canvas(self.pixels, INK)
        for i, page in enumerate(found):
            x = (0.5 + i % 2) * UNITS / 2 - breadth(page, 21) / 2
            draw_emblem(canvas, page, x, (5, 38)[i // 2], 21, self.colors)
        names = ", ".join(page.name for page in found)
        return Obs(f"{IMAGE}Row by row: {names}.", [canvas.image])

    def oracle(self):
        start, card = self.route[0][0], self.names[0]
        self.why = f"What stands under {card} is too small to read."
        yield call("zoom", *self.spots[0])
        if self.level >= 2:
            yield self.seek(start)
        self.why = f"That is {start}."
        for name, link in self.route:
            yield call("open", name)
            if link == "emblem":
                self.why = f"Whose emblem hangs in the picture of {name}?"
                owner, area = self.photo.emblem
                yield call("search_image", *map(round, area))
                self.why = f"Of these, it is that of {owner}."
            elif link:
                self.why = self.pages[name].tell(link)
        if self.level >= 3:
            self.why = f"The sign in the picture of {name} is too small to read."
            yield call("zoom", *middle(self.photo.labels[f"sign of {name}"][0]))
        self.why = f"The sign in the picture of {name} says {self.gold['answer']}."
        yield call("answer", self.gold["answer"])

    def glance(self, rng):
        """Goes the right way, but at its end names the sign of any page that it has met."""
        reply = next(self.way)
        if not reply.startswith("answer"):
            return reply
        met = [*self.others, *(name for name, _ in self.route)]
        return call("answer", str(self.scene(pick(rng, met))[0]))
