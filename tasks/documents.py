"""Documents: a page in columns, a table, a few pages to search, a story in words and pictures.

The layout does not depend on the size of the picture: lines are broken by the widths of words at
one large font size, with some spare room for rounding at small ones.
"""
from functools import lru_cache
from itertools import chain, islice, product

from .base import box, held, IMAGE, Obs, OneShot, pick, worded
from .draw import blend, Canvas, COLORS, DARK, font, ink_on, LIGHT, shades
from .scenes import Scene, ShapeAttr
from .words import invent, NAMES, some, some_of, THINGS

MARGIN, WIDTH = 4, 56                           # of a page and of its text, in units


@lru_cache(maxsize=4096)
def word_width(word: str) -> float:
    """The width of a word at font size 1, plus 8% for rounding."""
    return font(64).getlength(word) / 64 * 1.08


def prose(rng, words):
    """Yield the words of an endless text: meaningless sentences of three to six words."""
    while True:
        *rest, last = [pick(rng, words) for _ in range(int(rng.integers(3, 7)))]
        yield from [rest[0].capitalize(), *rest[1:], last + "."]


def wrap_words(words, room: float):
    """Yield lines of words, each at most `room` wide (in font sizes)."""
    line = []
    for word in words:
        if line and sum(map(word_width, line)) + word_width(word) + 0.3 * len(line) > room:
            yield " ".join(line)
            line = []
        line.append(word)
    yield " ".join(line)


# How a user may word a question; level 0 has the first of each.
READ = ("Read the page.", "What does the page say?", "Read what is on the page.",
        "Write down the text of the page.", "What is written on the page?")
CELL_OF = ("What is the {} of the {}?", "Look up the {} of the {}.", "What {} does the {} have?",
           "Find the {} of the {} in the table.", "Tell me the {} of the {}.")
ROW_OF = ("Which item has the {} {}?", "What item has the {} {}?", "Find the item with the {} {}.",
          "Name the item that has the {} {}.", "Tell me which item has the {} {}.")
BY_OTHER = ("What is the {} of the item whose {} is {}?", "Find the {} of the item whose {} is {}.",
            "Look up the {} of the item with the {} {}.",
            "What {} does the item with the {} {} have?",
            "Tell me the {} of the item whose {} is {}.")
COST = ("What does the {} cost{}?", "How much is the {}{}?", "What is the price of the {}{}?",
        "Look up the price of the {}{}.", "How much does the {} cost{}?")
SHAPE_HAD = ("What shape is the {} thing that {} has?", "What shape is the {} thing of {}?",
             "What is the shape of the {} thing that {} has?", "What shape is {1}'s {0} thing?",
             "Name the shape of the {} thing that {} has.")
COLOR_HAD = ("What color is the {} that {} has?", "What color is the {} of {}?",
             "What is the color of the {} that {} has?", "What color is {1}'s {0}?",
             "Name the color of the {} that {} has.")


class Paged(OneShot):
    """What the categories with printed pages share."""
    min_pixels = 256

    def page(self, *choices):
        """(an empty page of random shade, one random option of each of the choices). A colour's
        name is returned as its RGB. One in five combinations of options is held out."""
        self.ink, shift = DARK[self.heldout], int(self.rng.integers(-8, 9))
        canvas = Canvas(self.pixels, tuple(min(255, c + shift) for c in LIGHT[self.heldout]))
        design = None
        while not design or held(f"{self.level} {design}") != self.heldout:
            design = [pick(self.rng, options) for options in choices]
        colors = shades(self.rng, self.heldout)
        return canvas, *(colors.get(choice, choice) for choice in design)

    def print_line(self, canvas, line, x, y, size):
        """Print a line word by word, so that every word comes from the cache."""
        for word in line.split():
            canvas.word(word, x, y, self.ink, size)
            x += canvas.width(word, size) + 0.3 * size


class OcrDocument(Paged):
    """Read a page: one column, two, or two stories, one above the other, each in columns."""
    tier, verifier = 0, "ED+LIS"
    blind = (0.0,) * 5          # another page has too little in common with this one
    stories = ([(1, 3)], [(1, 5)], [(2, 6)], [(2, 4), (1, 3)], [(3, 4), (2, 4)])  # columns, lines
    sizes = (4.5, 4, 3.4, 3.2, 2.8)

    def make(self):
        rng, size = self.rng, self.sizes[self.level]
        words = [word for word in (*THINGS, *NAMES) if held(word) == self.heldout]
        stories, lead = self.stories[self.level], 1.5 * size
        canvas, down, middle, ruled, color = self.page((0, 0.3, 0.6), (0, 1), (0, 1), (*COLORS,))
        high = sum(n + 0.8 + 1.5 * (self.level > 0) for _, n in stories) * lead
        read, across, y = [], [], MARGIN + lead / 2 + (60 - MARGIN - high) * down
        for k, n in stories:
            heads = [f"{pick(rng, words).capitalize()} {pick(rng, words)}"] if self.level else []
            x, anchor = (32, "m") if middle and k > 1 else (MARGIN, "l")
            for head in heads:
                canvas.word(head, x, y, blend(color, self.ink, 0.5), 1.4 * size, anchor)
                y += 1.5 * lead
            room, columns = (WIDTH + 3) / k - 3, []
            for x in (MARGIN + j * (room + 3) for j in range(k)):
                *lines, last = islice(wrap_words(prose(rng, words), room / size), n)
                columns.append([*lines, last.rstrip(".") + "."])
                for i, line in enumerate(columns[-1]):
                    self.print_line(canvas, line, x, y + i * lead, size)
                if ruled and x > MARGIN:
                    ends = canvas.at(x - 1.5, y - lead / 2, x - 1.5, y + (n - 0.5) * lead)
                    canvas.pen.line(ends, blend(self.ink, LIGHT[0], 0.6))
            read += [*heads, *chain(*columns)]
            across += [*heads, *chain(*zip(*columns))]
            y += (n + 0.8) * lead
        self.shown = [" ".join(across)]
        return Obs(IMAGE + worded(rng, READ, self.level, 1), [canvas.image]), " ".join(read)


class TableRead(Paged):
    """Read a cell; from level 1 on also find its row, from 3 on also by another cell of it."""
    tier, verifier = 0, "EX"
    blind = (0.02,) * 5         # one of about fifty names, ninety numbers or as many things
    numbers, owners = ("Price", "Mass", "Age", "Stock", "Size"), ("Owner", "Maker", "Buyer")

    def make(self):
        rng, n, k = self.rng, (3, 4, 5, 6, 8)[self.level], (2, 2, 3, 4, 5)[self.level]
        rows = some(rng, THINGS, n, self.heldout)
        heads = [pick(rng, self.owners), *some_of(rng, self.numbers, k - 1)]
        self.cells = {head: some(rng, NAMES, n, self.heldout) if head in self.owners else
                      [str(value) for value in some_of(rng, range(11, 99), n)]
                      for head in some_of(rng, heads)}
        image, asked = self.draw(rows), []
        for head, i in some_of(rng, [*product(self.cells, range(n))], 4):
            other = pick(rng, [h for h in self.cells if h != head])
            cell, key = self.cells[head][i], self.cells[other][i]
            ways = [(CELL_OF, (head, rows[i]), cell), (ROW_OF, (head, cell), rows[i]),
                    (BY_OTHER, (head, other, key), cell)]
            forms, names, answer = pick(rng, ways[:(1, 2, 2, 3, 3)[self.level]])
            asked.append((worded(rng, forms, self.level, 1).format(*names), answer))
        self.more = [(question, box(answer)) for question, answer in asked[1:]]
        self.shown = [*chain(*self.cells.values()), *(rows if self.level else [])]
        return Obs(IMAGE + asked[0][0], [image]), asked[0][1]

    def draw(self, rows):
        """Draw the table -> picture."""
        canvas, color, look = self.page((*COLORS,), ("bands", "lines", "plain"))
        paper, size = canvas.image.getpixel((0, 0)), 2.6 if self.level > 2 else 3.2
        high, aside = min(7, 58 / (len(rows) + 1)), 46 / len(self.cells)
        y = 32 - high * (len(rows) + 1) / 2
        canvas.plate(3, y, 58, high, color, 1)
        for i, cells in enumerate([("Item", *self.cells), *zip(rows, *self.cells.values())]):
            if look == "bands" and i and i % 2 == 0:
                canvas.plate(3, y, 58, high, blend(paper, color, 0.15), 0)
            if look == "lines":
                canvas.pen.line(canvas.at(3, y + high, 61, y + high), blend(paper, self.ink, 0.4))
            for j, cell in enumerate(cells):
                x, anchor = (14 + aside * j, "r") if j else (4.5, "l")
                canvas.word(cell, x, y + high / 2, self.ink if i else ink_on(color), size, anchor)
            y += high
        return canvas.image


class DocQa(Paged):
    """Find a price on one of two to four pages, and name the page. From level 2 on every page lists
    the same things, each for another town; at level 4 the question names only the mayor."""
    family, tier, verifier = "reasoning", 2, "EX+page"
    blind = (0.01,) * 5         # one price in 88, which earns half without the page
    pages, items = (2, 2, 3, 3, 4), (2, 3, 4, 5, 6)

    def make(self):
        rng, k, n = self.rng, self.pages[self.level], self.items[self.level]
        mayors = some(rng, NAMES, k, self.heldout)
        things = some(rng, THINGS, n * (k if self.level < 2 else 1), self.heldout)
        prices = some_of(rng, range(11, 99), n * k)
        first, towns = int(rng.integers(1, 60)) if self.level >= 2 else 1, []
        while len(towns) < k:
            towns += {invent(rng, self.heldout)} - set(towns)
        pages, images = [], []
        for i, (town, mayor) in enumerate(zip(towns, mayors)):
            own = things[n * i:n * i + n] if self.level < 2 else some_of(rng, things)
            pages.append((town, mayor, dict(zip(own, prices[n * i:])), first + i))
            images.append(self.draw(*pages[i]))
        self.shown = [{"value": price, "page": number}
                      for _, _, listed, number in pages for price in listed.values()]
        town, mayor, listed, number = pick(rng, pages)
        thing = pick(rng, list(listed))
        where = ("", "", f" in {town}", f" in {town}", f" where {mayor} is mayor")[self.level]
        self.why = f"Page {number} is about {town}, mayor {mayor}: {thing} {listed[thing]}."
        ask = worded(rng, COST, self.level, 1).format(thing, where)
        question = f"{ask} Answer: PRICE, page NUMBER."
        return Obs(IMAGE * k + question, images), {"value": listed[thing], "page": number}

    def draw(self, town, mayor, prices, number):
        """Draw a page -> picture."""
        canvas, color, look, top = self.page((*COLORS,), ("list", "prose"), (7, 9, 11))
        canvas.plate(MARGIN, top - 3.5, WIDTH, 7, color, 1.5)
        canvas.word(f"Prices in {town}", 32, top, ink_on(color), 3.6, "m")
        self.print_line(canvas, f"Mayor: {mayor}", MARGIN, top + 8, 3)
        text, y = " ".join(f"The {thing} costs {prices[thing]}." for thing in prices), top + 15
        for i, line in enumerate(wrap_words(text.split(), WIDTH / 3) if look == "prose" else ()):
            self.print_line(canvas, line, MARGIN, y + 4.5 * i, 3)
        for thing, price in prices.items() if look == "list" else ():
            canvas.word(thing, MARGIN, y, self.ink, 3)
            canvas.word(str(price), 46, y, self.ink, 3, "r")
            canvas.pen.line(canvas.at(MARGIN, y + 2.6, 46, y + 2.6), blend(self.ink, LIGHT[0], 0.8))
            y += 5.5
        canvas.word(f"page {number}", 32, 60, blend(self.ink, LIGHT[0], 0.35), 2.8, "m")
        return canvas.image

    def reply(self, gold):
        return box(f"{gold['value']}, page {gold['page']}")


class InterleavedQa(Scene):
    """Bags, shown as pictures in a story, change owners: who has what in the end?"""
    family, tier, verifier = "reasoning", 2, "EX"
    chance = ShapeAttr.chance
    people, things, swaps = (2, 2, 3, 3, 4), (1, 2, 2, 3, 3), (0, 1, 2, 2, 3)

    def make(self):
        rng, k = self.rng, self.people[self.level]
        names, bags = some(rng, NAMES, k, self.heldout), []
        while len(bags) < k:    # all different in a bag, and nothing is in two bags
            bag = [pick(rng, self.pairs()) for _ in range(self.things[self.level])]
            if len({*chain(*bag)}) == 2 * len(bag) and not {*bag} & {*chain(*bags)}:
                bags.append(bag)
        images = [self.paint(bag)[0] for bag in bags]
        told = [f"{name} has the bag {IMAGE}." for name in names]
        owner = list(names)                     # owner[i] has the i-th bag
        for _ in range(self.swaps[self.level]):
            a, b = some_of(rng, names, 2)
            told.append(f"{a} and {b} swap bags.")
            owner = [{a: b, b: a}.get(name, name) for name in owner]
        facts = [(*who, *pair) for *who, bag in zip(owner, names, bags) for pair in bag]
        picked = [(*fact, int(rng.integers(2))) for fact in some_of(rng, facts, 4)]
        asked = [(worded(rng, SHAPE_HAD, self.level, 1).format(color, name), shape) if by_color else
                 (worded(rng, COLOR_HAD, self.level, 1).format(shape, name), color)
                 for name, _, color, shape, by_color in picked]
        name, first, color, shape, by_color = picked[0]
        self.shown = [fact[2 + by_color] for fact in facts]
        self.why = f"{name} has the bag that {first} had: {color} {shape}."
        self.more = [(question, box(answer)) for question, answer in asked[1:]]
        return Obs(" ".join([*told, asked[0][0]]), images), asked[0][1]
