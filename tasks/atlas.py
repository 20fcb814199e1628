"""Invented worlds of countries, cities, shipyards, ships and people, and questions about one.

A world is a pure function of its number and split: two hundred pages of short text, whose facts
refer to one another. Each country has a flag and each yard an emblem, all different. No page
describes them, so a question that starts from one can't be answered without the picture.

World 0 is the atlas. Pretraining reads its pages, with its flags described in words, and
`WorldKnowledge` asks about it without showing a page. The other worlds are for looking things up
(tools.py). The worlds are invented because real facts would have no oracle. [O]
"""
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import log
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from .base import box, held, IMAGE, Obs, OneShot, pick, worded
from .draw import (cached_mask, Canvas, COLORS, ground_and_ink, ink_on, plate_mask, shades, SHAPES,
                   UNITS)
from .words import invent, some_of

MARKS = {"country": "flag", "yard": "emblem"}
ASPECT = {"country": 1.4, "yard": 1}       # over height: flags are oblong, emblems round
KINDS = {"country": 48, "yard": 48, "city": 56, "ship": 32, "person": 24}
# kind: {fact: (kind of its value, sentence)}; "word" is a name without a page
FACTS = {
    "country": {"capital": ("city", "The capital of {} is {}."),
                "river": ("word", "Through {} flows the river {}."),
                "founding year": ("year", "{} was founded in {}."),
                "number of lakes": ("size", "{} has {} lakes.")},
    "yard": {"seat": ("city", "{} has its seat in {}."),
             "founder": ("person", "{} was started by {}."),
             "founding year": ("year", "{} was founded in {}."),
             "number of workers": ("size", "{} employs {} workers.")},
    "city": {"country": ("country", "{} lies in the country of {}."),
             "founding year": ("year", "{} was founded in {}."),
             "number of towers": ("size", "{} has {} towers.")},
    "ship": {"yard": ("yard", "{} was built by {}."),
             "home port": ("city", "{} has her home port in {}."),
             "captain": ("person", "{} sails under captain {}."),
             "launch year": ("year", "{} was launched in {}."),
             "number of sailors": ("size", "{} has a crew of {} sailors.")},
    "person": {"birthplace": ("city", "{} was born in the city of {}."),
               "birth year": ("year", "{} was born in {}."),
               "number of books": ("size", "{} has written {} books.")}}
YEAR = {kind: next(fact for fact, (of, _) in facts.items() if of == "year")
        for kind, facts in FACTS.items()}
WORDS = re.compile(r"[a-z0-9]+").findall
PATTERNS = {                    # name: (the area of the second colour, the words for the pattern)
    "over": ([(0, .5), (1, .5), (1, 1), (0, 1)], "{} over {}"),
    "beside": ([(.5, 0), (1, 0), (1, 1), (.5, 1)], "{} beside {}"),
    "aslant": ([(1, 0), (1, 1), (0, 1)], "{} and {}, parted aslant,"),
    "band": ([(0, .3), (1, .3), (1, .7), (0, .7)], "{} with a level band of {}"),
    "pale": ([(.3, 0), (.7, 0), (.7, 1), (.3, 1)], "{} with an upright band of {}")}


@dataclass
class Page:
    """A page of a world: one country, yard, city, ship or person."""
    name: str
    kind: str
    facts: dict                 # fact -> a name or an integer
    emblem: tuple | None        # pattern, first and second colour, shape and colour on the disc
    ships: list                 # the ships that a yard has built

    def tell(self, fact: str) -> str:
        """A fact as a sentence. For a yard, "ships" is one as well."""
        if fact == "ships":
            return f"{self.name} has built the ships {', '.join(self.ships)}."
        return FACTS[self.kind][fact][1].format(self.name, self.facts[fact])

    @property
    def text(self) -> str:
        known = [*self.facts, "ships"] if self.ships else self.facts
        return " ".join([f"{self.name} is a {self.kind}.", *map(self.tell, known)])

    @property
    def numbers(self) -> list[str]:
        """The names of the facts that are numbers."""
        return [fact for fact, value in self.facts.items() if type(value) is int]

    def describe_emblem(self) -> str:
        """The flag or emblem in words."""
        pattern, first, second, shape, charge = self.emblem
        field = PATTERNS[pattern][1].format(first, second)
        return f"The {MARKS[self.kind]} of {self.name} is {field} and bears a {charge} {shape}."


def emblems(rng, n: int) -> list[tuple]:
    """n different emblems in pairs, of which the second differs from the first in one attribute,
    so that a search by picture also finds wrong pages. [O]"""
    found = []
    while len(found) < n:
        a, b, c = some_of(rng, list(COLORS), 3)
        new = (pick(rng, list(PATTERNS)), a, b, pick(rng, SHAPES), c)
        if len(found) % 2:
            change = int(rng.integers(5))
            new = (*found[-1][:change], new[change], *found[-1][change + 1:])
        if new not in found and len({new[1], new[2], new[4]}) == 3:
            found.append(new)
    return found


class World:
    """The pages of one world, by name, and two ways to search them. World 0 is the atlas."""

    def __init__(self, number: int = 0, heldout: bool = False):
        rng = np.random.default_rng([crc32(b"world"), number, heldout])
        names = {}                                      # a dict, for its order
        while len(names) < sum(KINDS.values()) + KINDS["country"]:
            names[invent(rng, heldout, 2 + len(names) % 2)] = None
        names = iter(names)
        self.named = {kind: [next(names) for _ in range(n)] for kind, n in KINDS.items()}
        rivers, marks = iter(names), iter(emblems(rng, KINDS["country"] + KINDS["yard"]))
        years = iter((1100 + rng.permutation(800)).tolist())    # no year comes twice
        value = {"word": lambda _: next(rivers), "year": lambda _: next(years),
                 "size": lambda _: 11 + int(rng.integers(89)),
                 "yard": lambda i: self.named["yard"][i % 10]}      # three or four ships each
        self.pages = {}
        for kind, listed in self.named.items():
            for i, name in enumerate(listed):
                facts = {fact: value[of](i) if of in value else pick(rng, self.named[of])
                         for fact, (of, _) in FACTS[kind].items()}
                emblem = next(marks) if kind in MARKS else None
                self.pages[name] = Page(name, kind, facts, emblem, [])
        for name, capital in zip(self.named["country"], self.named["city"]):
            self.pages[name].facts["capital"] = capital         # of its own, in the same country
            self.pages[capital].facts["country"] = name
        for name in self.named["ship"]:
            self.pages[self.pages[name].facts["yard"]].ships.append(name)
        self.counts = {name: Counter(WORDS(page.text.lower())) for name, page in self.pages.items()}

    def search(self, query: str, n: int = 3) -> list[Page]:
        """The n best pages for a query by BM25 (k1 1.2, b 0.75), each with at least one word."""
        scores, mean = Counter(), sum(c.total() for c in self.counts.values()) / len(self.pages)
        for word in dict.fromkeys(WORDS(query.lower())):
            found = {name: count for name, count in self.counts.items() if word in count}
            rare = log(1 + (len(self.pages) - len(found) + 0.5) / (len(found) + 0.5))
            for name, count in found.items():
                room = 1.2 * (0.25 + 0.75 * count.total() / mean)
                scores[name] += rare * (2.2 * count[word] / (count[word] + room))
        best = sorted(scores, key=lambda name: (-scores[name], name))[:n]
        return [self.pages[name] for name in best]

    def similar(self, emblem: tuple, n: int = 4) -> list[Page]:
        """The n pages whose emblems have most attributes in common with this one, in the order of
        their names, so that the model has to see which of them is the same."""
        drawn = [page for page in self.pages.values() if page.emblem]
        drawn.sort(key=lambda page: (-sum(map(str.__eq__, page.emblem, emblem)), page.name))
        return sorted(drawn[:n], key=lambda page: page.name)


world = lru_cache(maxsize=64)(World)    # to make one takes milliseconds


def atlas_text(i: int) -> str:
    """The i-th text of the atlas for pretraining. The pages repeat, each time with their sentences
    in another order, since a model hardly learns a fact that it reads in one order only. [O]"""
    pages = list(world().pages.values())
    page, rng = pages[i % len(pages)], np.random.default_rng([crc32(b"atlas"), i])
    told = [page.describe_emblem()] if page.emblem else []
    told += [page.text.partition(". ")[0] + ".", *map(page.tell, page.facts)]
    return " ".join(some_of(rng, told))


@cached_mask
def part_mask(pattern: str, width: int, height: int) -> Image.Image:
    """The area of the second colour as a smooth mask; width and height in pixels."""
    big = Image.new("L", (4 * width, 4 * height))
    corners = [(4 * u * width, 4 * v * height) for u, v in PATTERNS[pattern][0]]
    ImageDraw.Draw(big).polygon(corners, fill=255)
    return big.reduce(4)


def draw_emblem(canvas: Canvas, page: Page, x, y, height, colors) -> tuple:
    """Draw a flag or emblem with its top left corner at (x, y), in units -> its box in 0-999. The
    shape in the middle is on a black or white disc, for contrast with any colours."""
    pattern, first, second, shape, charge = page.emblem
    width = height * ASPECT[page.kind]
    w, h = canvas.px(width), canvas.px(height)
    field = Image.new("RGB", (w, h), colors[first])
    field.paste(colors[second], (0, 0), part_mask(pattern, w, h))
    round_by = h // 12 if page.kind == "country" else h // 2
    area = canvas.stamp(plate_mask(w, h, round_by), x, y, field)
    for name, size, color in (("circle", 0.62 * height, ink_on(colors[charge])),
                              (shape, 0.40 * height, colors[charge])):
        canvas.shape(name, x + (width - size) / 2, y + (height - size) / 2, size, color)
    return area


# How a user may word a question; level 0 has the first.
ONE = ("What is the {} of the {} with this {}?", "Name the {} of the {} with this {}.",
       "This is the {2} of a {1}. What is its {0}?", "Which is the {} of the {} with this {}?",
       "Tell me the {} of the {} with this {}.")
TWO = ("Take the {} of each {}. By how much do the two differ?",
       "Look up the {} of each {}. What is their difference?",
       "By how much does the {} of one {} differ from that of the other?",
       "Compare the {} of each {}. What is the difference?")


class WorldKnowledge(OneShot):
    """Name the capital of the country with this flag, from what the atlas says. The question is
    about one fact, from level 1 on also of yards; at levels 2 and 4 about a fact of a fact, at 3
    and 4 about two flags. Questions are held out, that is pairs of an emblem and a fact, but never
    the facts themselves."""
    family, tier, verifier = "reasoning", 2, "EX"
    blind = (0.05, 0.05, 0.05, 0.02, 0.02)          # measured

    def paths(self, kind):
        """The paths of facts from an emblem to an answer; from level 3 on, those to a number."""
        ways = {(fact,): of for fact, (of, _) in FACTS[kind].items()}
        if self.level in (2, 4):
            ways = {(fact, then): last for (fact,), of in ways.items() if of in FACTS
                    for then, (last, _) in FACTS[of].items() if then != kind}
        return [way for way, of in ways.items() if self.level < 3 or of in ("year", "size")]

    def ask(self, kind, path):
        """The question about the end of a path."""
        noun = " of the ".join(reversed(path))
        return worded(self.rng, ONE if self.level < 3 else TWO, self.level, 1).format(
            noun, kind, MARKS[kind])

    def make(self):
        rng, atlas, names = self.rng, world(), None
        kind = "yard" if self.level and rng.integers(2) else "country"
        while not names or held(" ".join((*names, *path))) != self.heldout:
            names = some_of(rng, atlas.named[kind], 1 + (self.level >= 3))
            path = pick(rng, self.paths(kind))
        self.pages = [atlas.pages[name] for name in names]
        self.shown = [value for page in self.pages for value in page.facts.values()]
        image = self.paint()
        values, told = [], []
        for value in names:
            for fact in path:
                told.append(atlas.pages[value].tell(fact))
                value = atlas.pages[value].facts[fact]
            values.append(value)
        gold, seen, those = values[0], f"This is the {MARKS[kind]}", " and ".join(names)
        if len(names) == 2:
            gold, seen = abs(values[0] - values[1]), f"These are the {MARKS[kind]}s"
            told.append(f"{max(values)} - {min(values)} = {gold}.")
        self.why = " ".join([f"{seen} of {those}.", *told])
        if self.level < 2:
            self.more = [(self.ask(kind, (fact,)), box(value))
                         for fact, value in self.pages[0].facts.items()
                         if (fact,) != path and held(f"{names[0]} {fact}") == self.heldout]
        return Obs(IMAGE + self.ask(kind, path), [image]), str(gold)

    def paint(self):
        """Draw one large flag or emblem, or two smaller ones, one above the other -> picture."""
        n, moves = len(self.pages), None
        colors = shades(self.rng, self.heldout)
        ground = ground_and_ink(self.rng, self.heldout, self.level)[0]
        canvas, height = Canvas(self.pixels, ground), 40 if n == 1 else 28
        while not moves or held(f"{moves}") != self.heldout:
            moves = self.rng.integers(-3, 4, (n, 2)).tolist()
        for i, (page, (dx, dy)) in enumerate(zip(self.pages, moves)):
            x = (UNITS - height * ASPECT[page.kind]) / 2 + dx
            y = 12 + dy if n == 1 else 3 + 30 * i + dy / 3
            draw_emblem(canvas, page, x, y, height, colors)
        return canvas.image
