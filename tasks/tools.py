"""Tool use: crop what is too small to read, and look up what is not known.

An episode is one conversation with one tool call in each turn, until `answer("...")`. A tool
returns text, a picture or both. The original picture is larger than what the model sees: the whole
picture is shown at a size at which its fine print can't be read, and a crop is cut from the
original.
"""
import ast
import operator
from collections import namedtuple
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from .atlas import ASPECT, draw_emblem, world, YEAR
from .base import Env, held, IMAGE, middle, Obs, pick, Step
from .draw import Canvas, CELL, GRID, ground_and_ink, PAIRS, shades, TRAIN_PAIRS, UNITS
from .verify import inside, iou, parse_action, parse_python, plain
from .words import some_of

USES = {"crop": "x0, y0, x1, y1", "zoom": "x, y", "draw_box": "x0, y0, x1, y1",
        "draw_point": "x, y", "search_image": "x0, y0, x1, y1", "search_text": '"words"',
        "open": '"name"', "calc": '"2*(3+4)"', "answer": '"..."'}
PAPER, INK = (250, 250, 246), (34, 36, 44)
FINE = 1.7                      # font size of fine print, in units: 3 pixels of 128, 14 in a zoom
WORLDS = 64                     # worlds to look things up in: too many to memorise
SKY, LAND, SEA, WALL = (206, 226, 240), (150, 176, 120), (104, 150, 186), (228, 206, 170)
HILL, ROOF, DARK, SKIN = (118, 148, 104), (164, 84, 64), (96, 92, 104), (226, 184, 152)
SCENES = {                      # kind of page: the scenery in its picture, polygons in units
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
               (ROOF, (8, 21, 11, 13, 27, 13, 30, 21)))}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.USub: operator.neg}


def calc(text: str) -> str | None:
    """The result of numbers with + - * / and brackets, as text; None if it is anything else."""
    def value(node):
        result = getattr(node, "value", None)
        if type(result) not in (int, float):
            parts = (getattr(node, name, None) for name in ("operand", "left", "right"))
            result = OPERATORS[type(node.op)](*map(value, filter(None, parts)))
        if abs(result) > 1e12:
            raise ValueError
        return result
    try:
        result = value(parse_python(text.strip(), "eval").body)
    except (SyntaxError, ValueError, AttributeError, LookupError, ArithmeticError, MemoryError,
            RecursionError):
        return None
    return str(result) if type(result) is int else f"{result:.10g}"


def call(name: str, *args) -> str:
    """A tool call as the model writes it."""
    return f"{name}({', '.join(map(repr, args))})".replace("'", '"')


# An original picture; its texts {name: (box in 0-999, font size in units)}; and the emblem in it as
# (name of its page, box), or ().
Photo = namedtuple("Photo", "image labels emblem", defaults=[()])


class Toolbox(Env):
    """An episode with tools. Subclasses define which tools there are and what is asked."""
    family, tier, verifier, min_pixels, max_turns = "agent", 3, "EX", 128, 12
    tools: tuple = ()
    large = property(lambda self: min(4 * self.pixels, 2048))   # side of the original picture

    def start(self, question, gold, photo=None):
        """Set the state -> the first observation."""
        self.first = self.photo = photo
        self.said, self.log, self.marks, self.gold = None, [], [], {"answer": str(gold)}
        where = ", points in 0-999 of the last whole picture" if photo else ""
        uses = ", ".join(f"{name}({USES[name]})" for name in self.tools)
        text = f"{question}\nOne call a turn{where}: {uses}."
        return Obs(IMAGE + text, [self.whole()]) if photo else Obs(text)

    def over(self):
        """Whether an answer was given, or the turns ran out."""
        return self.said is not None or len(self.log) >= self.max_turns

    def step(self, text):
        if self.over():
            return Step(None, True)
        name, args = parse_action(str(text)) or ("", [])
        fits = name in self.tools and self.fits(name, args)
        self.log.append([name if fits else "?"])    # the tool, followed by what could be read
        obs = getattr(self, name)(*args) if fits else Obs("That is none of the calls.")
        return Step(None if self.over() else obs, self.over(), self.over() and self.said is None)

    @staticmethod
    def fits(name, args):
        """Whether these are valid arguments of a tool: one text, or integers in 0-999."""
        if '"' in USES[name]:
            return len(args) == 1 and type(args[0]) in ((str, int) if name == "answer" else (str,))
        n = USES[name].count(",") + 1
        return len(args) == n and all(type(a) is int and 0 <= a <= 999 for a in args)

    def evidence(self):
        return {"answer": self.said, "log": [*map(list, self.log)], "gold": dict(self.gold)}

    def oracle(self):
        """A subclass yields in `steps` (the thought before a call, the tool, its arguments...)."""
        for self.why, *step in self.steps():
            yield call(*step)

    def answer(self, text):
        """The first tool: a method that takes valid arguments. The others return an observation."""
        self.said = str(text)

    def calc(self, text):
        """The result of a sum."""
        return Obs(calc(text) or "That can't be reckoned: numbers, + - * / and brackets only.")

    def zoom(self, x, y):
        """A crop around a point, a quarter of the side wide and high."""
        x, y = (min(749, max(0, c - 125)) for c in (x, y))
        return self.crop(x, y, x + 250, y + 250)

    def crop(self, *window):
        """A part of the original, enlarged to the size at which the whole is shown."""
        size = [window[2] - window[0], window[3] - window[1]]
        if min(size) < 30 or max(size) > 4 * min(size):
            return Obs("A crop is 30 or more wide and high, and no ribbon.")
        self.encode_images(window, self.pixels)
        size = [round(side * (self.pixels / max(size))) for side in size]
        part = [c * (self.photo.image.width / 999) for c in window]
        return Obs(IMAGE, [self.photo.image.resize(size, Image.BICUBIC, part, reducing_gap=2)])

    def draw_box(self, x0, y0, x1, y1):
        """The whole picture with a box drawn on it, which stays in later pictures."""
        if x0 >= x1 or y0 >= y1:
            return Obs("A box is x0, y0, x1, y1, from left and top to right and bottom.")
        self.marks.append((x0, y0, x1, y1))
        return Obs(IMAGE, [self.whole()])

    def draw_point(self, x, y):
        """The whole picture with a small box around a point."""
        return self.draw_box(x - 24, y - 24, x + 24, y + 24)

    def whole(self):
        """The whole picture with the boxes drawn so far. At any size it shows only the detail that
        `min_pixels` can show; otherwise a large picture would need no tools. [O]"""
        self.encode_images((0, 0, 999, 999), self.min_pixels)
        small = self.photo.image.resize((self.min_pixels,) * 2, Image.BOX, reducing_gap=1)
        image = small.resize((self.pixels,) * 2, Image.BICUBIC)
        for corners in self.marks:
            ImageDraw.Draw(image).rectangle([c * (self.pixels / 999) for c in corners],
                                            outline=(255, 0, 200), width=self.pixels // 64)
        return image

    def encode_images(self, window, pixels):
        """Add to the log the names of the texts that can be read, those of at least nine pixels,
        when a window (x0, y0, x1, y1) in 0-999 is shown at a size of `pixels`."""
        share = max(window[2] - window[0], window[3] - window[1]) / 999
        for name, (area, height) in self.photo.labels.items():
            shown = inside(area[:2], window) and inside(area[2:], window)
            if self.log and shown and height / UNITS / share * pixels >= 9:
                self.log[-1].append(name)


class Board(Toolbox):
    """Episodes that start from a board of cards, each with a coloured shape above fine print."""
    cards = ((2, 3), (4, 5), (6, 8), (8, 10), (10, 12))     # least and most, for each level

    def draw_board(self, texts) -> Photo:
        """Draw cards with these texts in random cells -> Photo. Sets `self.names` ("the red star"),
        `self.cells` and `self.spots` (the middles of the cards), in the order of the texts."""
        rng, n, labels, self.spots = self.rng, len(texts), {}, []
        self.colors = shades(rng, self.heldout)
        ground = ground_and_ink(rng, self.heldout, self.level)[0]
        paper, ink = (PAPER, INK) if sum(ground) < 384 else (INK, PAPER)
        canvas, self.cells = Canvas(self.large, ground), None
        while not self.cells or held(str(self.cells)) != self.heldout:
            self.cells = some_of(rng, range(GRID * GRID), n)    # one in five layouts is held out
        chosen = some_of(rng, PAIRS if self.heldout else TRAIN_PAIRS, n)
        self.names = [f"the {color} {shape}" for color, shape in chosen]
        moves = rng.uniform(-0.8, 0.8, (n, 2)).tolist()
        for i, (cell, (dx, dy), (color, shape)) in enumerate(zip(self.cells, moves, chosen)):
            x, y = cell % GRID * CELL + 1 + dx, cell // GRID * CELL + 1 + dy
            canvas.pen.rectangle(canvas.at(x, y, x + 14, y + 14), paper)
            self.spots.append(middle(canvas.area(x, y, x + 14, y + 14)))
            canvas.shape(shape, x + 3, y + 1.5, 8, self.colors[color])
            labels[f"card {i}"] = canvas.text(texts[i], x + 7, y + 11.6, ink, FINE, "mm"), FINE
        return Photo(canvas.image, labels)


class VisualTools(Board):
    """Read the number under the red star. At level 2 add two numbers, at 3 one of them is on the
    card at a given point, at 4 add all numbers in a given box."""
    tools = ("crop", "zoom", "draw_box", "draw_point", "calc", "answer")
    blind = (0.02,) * 5         # one number of ninety

    def reset(self):
        rng, n = self.rng, int(self.rng.integers(*self.cards[self.level], endpoint=True))
        self.values = some_of(rng, range(10, 100), n)
        photo = self.draw_board([*map(str, self.values)])
        self.picked, self.mark = [0] if self.level < 2 else [0, 1], None
        if self.level == 3:
            self.mark = [c + int(rng.integers(-80, 81)) for c in self.spots[1]]
        elif self.level == 4:
            blocks = [[c, r, [i for i, cell in enumerate(self.cells)
                              if cell % GRID - c in (0, 1) and cell // GRID - r in (0, 1)]]
                      for c in range(GRID - 1) for r in range(GRID - 1)]
            c, r, self.picked = pick(rng, [block for block in blocks if len(block[2]) >= 3])
            self.mark = [round(k * 999 / GRID) for k in (c, r, c + 2, r + 2)]
        first, second, *_ = self.names
        ask = (f"What number stands under {first}?",
               f"Add the numbers under {first} and {second}.",
               f"Add the number under {first} and the one on the card at the point {self.mark}.",
               f"Add the numbers of all cards in the box {self.mark}.")[max(0, self.level - 1)]
        return self.start(ask, sum(self.values[i] for i in self.picked), photo)

    def steps(self):
        if self.mark:
            tool = "draw_box" if len(self.mark) == 4 else "draw_point"
            yield "First I mark the place.", tool, *self.mark
        for i in self.picked:
            why = f"The number under {self.names[i]} is too small to read."
            yield why, "zoom", *self.spots[i]
        found = " + ".join(str(self.values[i]) for i in self.picked)
        if len(self.picked) > 1:
            yield f"To reckon: {found}.", "calc", found
            found += f" = {self.gold['answer']}"
        yield f"It is {found}.", "answer", self.gold["answer"]

    def glance(self, rng):
        return call("answer", str(pick(rng, self.values)))


class Library(Toolbox):
    """Episodes with a world (atlas.py) to look things up in, but never world 0."""

    def choose_world(self):
        """Choose the world."""
        self.world = world(1 + int(self.rng.integers(WORLDS)), self.heldout)
        self.pages = self.world.pages

    def search_text(self, words):
        """The names of the pages that fit the words best."""
        found = [f"{page.name} ({page.kind})" for page in self.world.search(words)]
        return Obs(f"Pages: {', '.join(found)}." if found else "No page has these words.")

    def open(self, name):
        """The text of a page."""
        page = self.pages.get(plain(name).capitalize())
        if page is None:
            return Obs("There is no page of that name.")
        self.log[-1].append(page.name)
        return Obs(page.text)

    def random_path(self, links):
        """(names, facts): a random page and `links` more, each a fact of the one before."""
        while True:
            names, facts = [pick(self.rng, list(self.pages))], []
            for _ in range(links):
                known = self.pages[names[-1]].facts
                facts.append(pick(self.rng, [fact for fact in known if known[fact] in self.pages]))
                names.append(known[facts[-1]])
            if len(set(names)) == len(names):
                return names, facts

    def by_year(self, name, form="the {} of the {} {}"):
        """Words that identify a page by its year: "the ship of the launch year 1312"."""
        page = self.pages[name]
        return form.format(page.kind, YEAR[page.kind], page.facts[YEAR[page.kind]])

    def search_step(self, name):
        """The oracle's step that searches for a page by its year."""
        return f"I look for {self.by_year(name)}.", "search_text", self.by_year(name, "{} {} {}")


class TextTools(Library):
    """Look up a number, without a picture; from level 1 on the difference of two numbers, at 2 and
    3 from pages that are one or two links away, at 4 a sum over all ships of a yard."""
    tools, min_pixels = ("search_text", "open", "calc", "answer"), 64
    links = ((0,), (0, 0), (1, 0), (2, 1), ())      # by level: links to follow for each number
    blind = (0.01,) * 5         # the answers are years and numbers of two digits

    def reset(self):
        """Set `self.route`: [(page to open, fact to read there, whether to search for it)]."""
        asked, which, self.route = [], int(self.rng.integers(2)), []    # a year or another number
        self.choose_world()
        for links in self.links[self.level]:
            names, facts = self.random_path(links)
            while names[-1] in [name for name, _, _ in self.route]:
                names, facts = self.random_path(links)
            facts.append(self.pages[names[-1]].numbers[which])
            self.route += zip(names, facts, [bool(links), False, False])
            called = self.by_year(names[0]) if links else names[0]
            asked.append(f"the {' of the '.join(reversed(facts))} of {called}")
        question = (f"By how much do {' and '.join(asked)} differ?" if self.level else
                    f"What is {asked[0]}?")
        if self.level == 4:
            ship = pick(self.rng, self.world.named["ship"])
            yard = self.pages[self.pages[ship].facts["yard"]]
            self.route = [(ship, "yard", True), (yard.name, "ships", False)]
            self.route += [(name, "number of sailors", False) for name in yard.ships]
            question = (f"How many sailors have all ships together that the yard of "
                        f"{self.by_year(ship)} has built?")
        terms = [self.pages[name].facts[fact] for name, fact, _ in self.route
                 if fact in self.pages[name].numbers]
        self.sum = (f"{max(terms)} - {min(terms)}" if len(asked) == 2 else
                    " + ".join(map(str, terms)))
        return self.start(question, calc(self.sum))

    def steps(self):
        why = ""
        for name, fact, sought in self.route:
            if sought:
                yield self.search_step(name)
                why = f"That is {name}."
            yield why, "open", name
            why = self.pages[name].tell(fact)
        if self.level:
            yield why, "calc", self.sum
            why = f"{self.sum} = {self.gold['answer']}."
        yield why, "answer", self.gold["answer"]

    def glance(self, rng):
        page = self.pages[pick(rng, self.route)[0]]
        return call("answer", str(page.facts[pick(rng, page.numbers)]))


class ImageMining(Library, Board):
    """Find a number through pictures and pages. A card of the board names a page, or from level 2
    on a year. From there the way leads from page to page, at 3 and 4 also by an emblem in a picture
    [C], to the sign in the last picture, from 3 on in fine print. Signs and emblems are new in
    every task and occur in no text, so neither memory nor a search by text is enough. [O]"""
    tools = ("crop", "zoom", "search_text", "search_image", "open", "answer")
    cards = ((2, 3), (3, 4), (5, 6), (7, 8), (9, 10))
    blind = (0.0,) * 5          # the right number earns nothing if its sign was not seen

    def reset(self):
        rng, level, names = self.rng, self.level, [""] * 2
        self.choose_world()
        self.salt = int(rng.integers(2 ** 31))
        while len(set(names)) < len(names):
            names, links = self.random_path(level in (1, 2, 4))
            while level >= 3 and self.pages[names[-1]].emblem:      # it must show another's emblem
                names, links = self.random_path(level == 4)
            if level >= 3:
                names.append(self.scene(names[-1])[1])
                links.append("emblem")
            if level == 4:
                links.append(pick(rng, ("seat", "founder")))
                names.append(self.pages[names[-1]].facts[links[-1]])
        self.route = list(zip(names, [*links, None]))       # (page, the fact that leads on from it)
        first, n = self.pages[names[0]], int(rng.integers(*self.cards[level], endpoint=True))
        others = some_of(rng, self.world.named[first.kind], n)
        self.others = [name for name in others if name != first.name][:n - 1]
        clue = "name" if level < 2 else YEAR[first.kind]
        photo = self.draw_board([str(self.pages[name].facts.get(clue, name))
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
        """(the number on the sign, the page whose emblem is shown) in the picture of a page."""
        rng = np.random.default_rng([self.salt, crc32(name.encode())])
        number, yard = 100 + int(rng.integers(900)), pick(rng, self.world.named["yard"])
        return number, name if self.pages[name].emblem else yard

    def open(self, name):
        """The text of a page, and its picture; or, for "board", the first picture again."""
        obs, page = super().open(name), self.pages.get(plain(name).capitalize())
        if plain(name) == "board":
            self.photo = self.first
            return Obs(IMAGE, [self.whole()])
        if page is None:
            return obs
        number, owner = self.scene(page.name)
        flag, canvas = self.pages[owner], Canvas(self.large, SKY)
        ground = (0, 44, 64, 44, 64, 64, 0, 64)
        for color, corners in ((SEA if page.kind == "ship" else LAND, ground), *SCENES[page.kind]):
            canvas.pen.polygon(canvas.at(*corners), fill=color)
        x = 61 - 22 * ASPECT[flag.kind]
        canvas.plate(x - 1.5, 2, 1.5, 40, DARK, 0.5)
        area = draw_emblem(canvas, flag, x, 3, 22, self.colors)
        height = FINE if self.level >= 3 else 8
        canvas.plate(38, 46, 24, 13, PAPER, 1)
        sign = canvas.text(str(number), 50, 52.5, INK, height, "mm")
        self.photo = Photo(canvas.image, {f"sign of {page.name}": (sign, height)}, (owner, area))
        return Obs(IMAGE + obs.text, [self.whole()])

    def search_image(self, *window):
        """Four emblems that are similar to the one in the window."""
        if not self.photo.emblem or iou(window, self.photo.emblem[1]) < 0.25:
            return Obs("No flag or emblem fills that part of the picture.")
        found = self.world.similar(self.pages[self.photo.emblem[0]].emblem)
        canvas = Canvas(self.pixels, INK)
        for i, page in enumerate(found):
            x = (0.5 + i % 2) * UNITS / 2 - 21 * ASPECT[page.kind] / 2
            draw_emblem(canvas, page, x, (5, 38)[i // 2], 21, self.colors)
        names = ", ".join(page.name for page in found)
        return Obs(f"{IMAGE}Row by row: {names}.", [canvas.image])

    def steps(self):
        yield f"What stands under {self.names[0]} is too small to read.", "zoom", *self.spots[0]
        if self.level >= 2:
            yield self.search_step(self.route[0][0])
        why = f"That is {self.route[0][0]}."
        for name, link in self.route:
            yield why, "open", name
            if link == "emblem":
                owner, area = self.photo.emblem
                why = f"Whose emblem hangs in the picture of {name}?"
                yield why, "search_image", *map(round, area)
                why = f"Of these, it is that of {owner}."
            elif link:
                why = self.pages[name].tell(link)
        sign = f"The sign in the picture of {name}"
        if self.level >= 3:
            place = self.photo.labels[f"sign of {name}"][0]
            yield f"{sign} is too small to read.", "zoom", *middle(place)
        yield f"{sign} says {self.gold['answer']}.", "answer", self.gold["answer"]

    def glance(self, rng):
        """Follows the oracle, but answers with the sign of a random page that it has met."""
        reply = next(self.way)
        if not reply.startswith("answer"):
            return reply
        met = [*self.others, *(name for name, _ in self.route)]
        return call("answer", str(self.scene(pick(rng, met))[0]))
