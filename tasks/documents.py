"""Paper: a page in columns, a table, a few pages to search, a story told in words and pictures.

Layouts don't depend on the size of the picture: lines are broken by the widths of words at one
large size, with some room for the rounding of small ones.
"""
from functools import lru_cache
from itertools import islice

from .base import IMAGE, Obs, OneShot, box, held, pick
from .draw import COLORS, DARK, LIGHT, SHAPES, TRAIN_PAIRS, Canvas, blend, font, ink_on, shades
from .scenes import Scene
from .words import NAMES, THINGS, invent, some

MARGIN, WIDTH = 4, 56                           # of a page, in units


@lru_cache(maxsize=4096)
def wide(word: str) -> float:
    """The width of a word in print of size one."""
    return font(64).getlength(word) / 64 * 1.08


def prose(rng, words):
    """An endless text: sentences of three to six words that mean nothing."""
    while True:
        *rest, last = [pick(rng, words) for _ in range(int(rng.integers(3, 7)))]
        yield from [rest[0].capitalize(), *rest[1:], last + "."]


def wrapped(words, room: float):
    """The lines of at most `room` that words make, one after another."""
    line = []
    for word in words:
        if line and sum(map(wide, line)) + wide(word) + 0.3 * len(line) > room:
            yield " ".join(line)
            line = []
        line.append(word)
    yield " ".join(line)


class Paged(OneShot):
    """What categories of printed paper share."""
    min_pixels = 256

    def page(self):
        """An empty page; its shade moves a little from one to the next."""
        self.ink, shift = DARK[self.heldout], int(self.rng.integers(-8, 9))
        return Canvas(self.pixels, tuple(min(255, c + shift) for c in LIGHT[self.heldout]))

    def print(self, canvas, line, x, y, size):
        """Word by word, so that every word comes from the cache."""
        for word in line.split():
            canvas.word(word, x, y, self.ink, size)
            x += canvas.width(word, size) + 0.3 * size

    def design(self, *choices):
        """One of each; of all combinations, one in five is held out."""
        while True:
            design = [pick(self.rng, options) for options in choices]
            if held(f"{self.level} {design}") == self.heldout:
                return design


class OcrDocument(Paged):
    """Read a page: one column, two, or two stories one above the other, each in columns."""
    tier, verifier = 0, "ED+LIS"
    stories = ([(1, 3)], [(1, 5)], [(2, 6)], [(2, 4), (1, 3)], [(3, 4), (2, 4)])  # columns, lines
    sizes = (4.5, 4, 3.4, 3.2, 2.8)

    @classmethod
    def chance(cls, level):
        return 0.0              # any other page shares too little with this one

    def make(self):
        rng, size = self.rng, self.sizes[self.level]
        words = [word for word in (*THINGS, *NAMES) if held(word) == self.heldout]
        canvas = self.page()
        stories, lead = self.stories[self.level], 1.5 * size
        high = sum(n + 0.8 + 1.5 * (self.level > 0) for _, n in stories) * lead
        down, middle, rule, hue = self.design((0, 0.3, 0.6), (0, 1), (0, 1), tuple(COLORS))
        color = blend(shades(rng, self.heldout)[hue], self.ink, 0.5)
        read, self.across, y = [], [], MARGIN + lead / 2 + (60 - MARGIN - high) * down
        for k, n in stories:
            room = (WIDTH + 3) / k - 3
            if self.level:
                head = f"{pick(rng, words).capitalize()} {pick(rng, words)}"
                x, anchor = (32, "m") if middle and k > 1 else (MARGIN, "l")
                canvas.word(head, x, y, color, 1.4 * size, anchor)
                y += 1.5 * lead
                read, self.across = [*read, head], [*self.across, head]
            columns = []
            for j in range(k):
                *lines, last = islice(wrapped(prose(rng, words), room / size), n)
                columns.append([*lines, last.rstrip(".") + "."])
                x = MARGIN + j * (room + 3)
                for i, line in enumerate(columns[j]):
                    self.print(canvas, line, x, y + i * lead, size)
                if rule and j:
                    ends = canvas.at(x - 1.5, y - lead / 2, x - 1.5, y + (n - 0.5) * lead)
                    canvas.pen.line(ends, blend(self.ink, LIGHT[0], 0.6))
            read += [line for lines in columns for line in lines]
            self.across += [line for lines in zip(*columns) for line in lines]
            y += (n + 0.8) * lead
        return Obs(f"{IMAGE}Read the page.", [canvas.image]), " ".join(read)

    def glance(self, rng):
        """Straight across the columns."""
        return box(" ".join(self.across))


class TableRead(Paged):
    """A cell; from level 1 on also the row of a cell, from level 3 on the row by another cell."""
    tier, verifier = 0, "EX"
    numbers, owners = ("Price", "Mass", "Age", "Stock", "Size"), ("Owner", "Maker", "Buyer")

    @classmethod
    def chance(cls, level):
        return 0.02             # one of about fifty names, ninety numbers or as many things

    def make(self):
        rng, n = self.rng, (3, 4, 5, 6, 8)[self.level]
        rows = some(rng, THINGS, n, self.heldout)
        k = (2, 2, 3, 4, 5)[self.level]
        heads = [pick(rng, self.owners), *(self.numbers[i] for i in rng.permutation(5)[:k - 1])]
        heads = [heads[i] for i in rng.permutation(k)]
        self.cells = {head: some(rng, NAMES, n, self.heldout) if head in self.owners else
                      [str(value) for value in (11 + rng.permutation(88)[:n]).tolist()]
                      for head in heads}
        image = self.draw(rows)
        asked, order = [], rng.permutation(n * len(heads)).tolist()
        for head, i in ((heads[p // n], p % n) for p in order[:4]):
            other = pick(rng, [h for h in heads if h != head])
            cell, key = self.cells[head][i], self.cells[other][i]
            ways = [(f"What is the {head} of the {rows[i]}?", cell),
                    (f"Which item has the {head} {cell}?", rows[i]),
                    (f"What is the {head} of the item whose {other} is {key}?", cell)]
            asked.append(pick(rng, ways[:(1, 2, 2, 3, 3)[self.level]]))
        self.more = [(question, box(answer)) for question, answer in asked[1:]]
        self.shown = [*sum(self.cells.values(), []), *(rows if self.level else [])]
        return Obs(IMAGE + asked[0][0], [image]), asked[0][1]

    def draw(self, rows):
        canvas, size = self.page(), 2.6 if self.level > 2 else 3.2
        hue, look = self.design(tuple(COLORS), ("bands", "lines", "plain"))
        color, paper = shades(self.rng, self.heldout)[hue], canvas.image.getpixel((0, 0))
        high, aside = min(7, 58 / (len(rows) + 1)), 46 / len(self.cells)
        y = 32 - high * (len(rows) + 1) / 2
        canvas.plate(3, y, 58, high, color, 1)
        for i, cells in enumerate([("Item", *self.cells), *zip(rows, *self.cells.values())]):
            if look == "bands" and i and i % 2 == 0:
                canvas.plate(3, y, 58, high, blend(paper, color, 0.15), 0)
            if look == "lines":
                canvas.pen.line(canvas.at(3, y + high, 61, y + high), blend(paper, self.ink, 0.4))
            for j, cell in enumerate(cells):
                x, anchor = (4.5 if not j else 14 + aside * j, "r" if j else "l")
                canvas.word(cell, x, y + high / 2, self.ink if i else ink_on(color), size, anchor)
            y += high
        return canvas.image

    def glance(self, rng):
        return box(pick(rng, self.shown))


class DocQa(Paged):
    """A price on one of two to four pages. From level 2 on every page lists the same things, each
    for another town; at level 4 the question knows the town by its mayor only."""
    family, tier, verifier = "reasoning", 2, "EX+page"
    pages, items = (2, 2, 3, 3, 4), (2, 3, 4, 5, 6)

    @classmethod
    def chance(cls, level):
        return 0.01             # half of one in 88 prices, without the page

    def make(self):
        rng, k, n = self.rng, self.pages[self.level], self.items[self.level]
        mayors = some(rng, NAMES, k, self.heldout)
        things = some(rng, THINGS, n * (k if self.level < 2 else 1), self.heldout)
        prices = (11 + rng.permutation(88)[:n * k]).tolist()
        first = int(rng.integers(1, 60)) if self.level >= 2 else 1
        towns, lists, images = [], [], []
        while len(towns) < k:
            towns += {invent(rng, self.heldout)} - set(towns)
        for p in range(k):
            own = things[n * p:n * p + n] if self.level < 2 else \
                [things[i] for i in rng.permutation(n).tolist()]
            lists.append(dict(zip(own, prices[n * p:])))
            images.append(self.draw(towns[p], mayors[p], lists[p], first + p))
        self.shown = [(price, first + p) for p in range(k) for price in lists[p].values()]
        thing = pick(rng, list(lists[p := int(rng.integers(k))]))
        where = ("", "", f" in {towns[p]}", f" in {towns[p]}", f" where {mayors[p]} is mayor")
        price, number = lists[p][thing], first + p
        self.why = f"Page {number} is about {towns[p]}, mayor {mayors[p]}: {thing} {price}."
        question = f"What does the {thing} cost{where[self.level]}? Answer: PRICE, page NUMBER."
        return Obs(IMAGE * k + question, images), {"value": price, "page": number}

    def draw(self, town, mayor, prices, number):
        canvas = self.page()
        hue, look, top = self.design(tuple(COLORS), ("list", "prose"), (7, 9, 11))
        color, faint = shades(self.rng, self.heldout)[hue], blend(self.ink, LIGHT[0], 0.35)
        canvas.plate(MARGIN, top - 3.5, WIDTH, 7, color, 1.5)
        canvas.word(f"Prices in {town}", 32, top, ink_on(color), 3.6, "m")
        self.print(canvas, f"Mayor: {mayor}", MARGIN, top + 8, 3)
        y = top + 15
        text = " ".join(f"The {thing} costs {price}." for thing, price in prices.items())
        for i, line in enumerate(wrapped(text.split(), WIDTH / 3) if look == "prose" else ()):
            self.print(canvas, line, MARGIN, y + 4.5 * i, 3)
        for i, (thing, price) in enumerate(prices.items() if look == "list" else ()):
            canvas.word(thing, MARGIN, y + 5.5 * i, self.ink, 3)
            canvas.word(str(price), 46, y + 5.5 * i, self.ink, 3, "r")
            ends = canvas.at(MARGIN, y + 5.5 * i + 2.6, 46, y + 5.5 * i + 2.6)
            canvas.pen.line(ends, blend(self.ink, LIGHT[0], 0.8))
        canvas.word(f"page {number}", 32, 60, faint, 2.8, "m")
        return canvas.image

    def reply(self, gold):
        return box(f"{gold['value']}, page {gold['page']}")

    def glance(self, rng):
        return box("{}, page {}".format(*pick(rng, self.shown)))


class InterleavedQa(Scene):
    """Bags, shown in the midst of a story, change hands; what is where in the end?"""
    family, tier, verifier = "reasoning", 2, "EX"
    people, things, swaps = (2, 2, 3, 3, 4), (1, 2, 2, 3, 3), (0, 1, 2, 2, 3)

    @classmethod
    def chance(cls, level):
        return (len(SHAPES) + len(COLORS)) / len(TRAIN_PAIRS) / 2

    def make(self):
        rng, k = self.rng, self.people[self.level]
        names = some(rng, NAMES, k, self.heldout)
        bags, images, told = [], [], []
        while len(bags) < k:
            bag = [pick(rng, self.pairs()) for _ in range(self.things[self.level])]
            if len(set(sum(bag, ()))) == 2 * len(bag) and not set(bag) & set(sum(bags, [])):
                bags.append(bag)
        for name, bag in zip(names, bags):
            images.append(self.paint(bag)[0])
            told.append(f"{name} has the bag {IMAGE}.")
        owner, log = list(range(k)), []             # owner[i]: who has the i-th bag
        for _ in range(self.swaps[self.level]):
            a, b = rng.permutation(k)[:2].tolist()
            told.append(f"{names[a]} and {names[b]} swap bags.")
            owner = [{a: b, b: a}.get(o, o) for o in owner]
        facts = [(names[owner[i]], names[i], *pair) for i, bag in enumerate(bags) for pair in bag]
        asked = []
        for name, first, color, shape in (facts[i] for i in rng.permutation(len(facts))[:4]):
            by_color = int(rng.integers(2))         # the colour is given, the shape asked
            asked.append([(f"What color is the {shape} that {name} has?", color),
                          (f"What shape is the {color} thing that {name} has?", shape)][by_color])
            if len(asked) == 1:
                self.seen = [fact[2 + by_color] for fact in facts]
                self.why = f"{name} has the bag that {first} had: {color} {shape}."
        self.more = [(question, box(answer)) for question, answer in asked[1:]]
        return Obs(" ".join([*told, asked[0][0]]), images), asked[0][1]

    def glance(self, rng):
        return box(pick(rng, self.seen))
