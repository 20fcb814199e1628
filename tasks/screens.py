"""Small screens: click a named button; fill in a form, with one action in each turn.

At level 0 a screen is dark and square, buttons have colours, and widgets lie in the cells of
draw.py: a small model learns it in minutes. From level 1 on screens look as people's do: light or
dark, with buttons that are coloured, outlined in a colour, grey with a border, or flat, and with
labels that are an icon, two large letters or a word in one line. Widgets have any place and size,
half of the screens are portrait or landscape ones, and some have their widgets in a row or a
column. A goal calls a button by what can be seen on it: by a colour only where the button has one.
Further questions about the same screen ask for places, colours, words and numbers, so that only the
words of a question tell its kind.

Held-out splits use other words and other layouts: other combinations of places, though each place
occurs in training.
"""
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from PIL import Image, ImageDraw

from .base import (box, click, Env, held, IMAGE, middle, Obs, OneShot, pick, recap, Step,
                   worded)
from .draw import (blend, cached_mask, Canvas, CELL, COLORS, font, GRID, ground_and_ink, ink_on,
                   OBLONG, shades, SHAPES, SQUARE, UNITS)
from .scenes import COLOR_OF, HOW_MANY, POINT_AT
from .verify import inside, is_point, parse_action
from .words import CONTROLS, some, some_of

SHORT = ("OK", "NO", "GO", "UP", "ON", "IN", "AT", "BY", "DO", "HI", "ME", "MY",
         "WE", "US", "TO", "IT", "IS", "OF", "OR", "AN", "AS", "BE", "HE", "SO", "KG", "OW")
# Longer words are written in one line; the held-out split has "NEXT", "COPY", "PRINT" and others.
WORDS = (*SHORT, "SAVE", "OPEN", "BACK", "NEXT", "HELP", "SEND", "PLAY", "STOP", "EDIT", "EXIT",
         "MENU", "HOME", "LOGIN", "RESET", "START", "CLOSE", "APPLY", "PRINT", "SHARE", "RETRY",
         "DONE", "VIEW", "FIND", "COPY", "QUIT", "SKIP", "YES", "UNDO", "LIST", "BUY")
# How a user may word a goal or a question; other wordings are those of scenes.py.
GOALS = ("Click {}.", "Press {}.", "Click on {}.", "Tap {}.", "Push {}.", "Please click {}.",
         "Hit {}.")
SAYS = ("What does the {} button say?", "Read the {} button.", "What is written on the {} button?",
        "What text is on the {} button?")
ICON_ON = ("Which icon is on the {} button?", "What icon does the {} button have?",
           "Name the icon on the {} button.", "What is the icon of the {} button?")
LIST = ("List the buttons from top to bottom.", "What buttons are there, from top to bottom?",
        "Name all buttons from top to bottom.", "Which buttons do you see, from top to bottom?")
FORM_GOALS = ("Tick {}. Press {}.", "Tick {}, then press {}.", "Check {} and press {}.",
              "Select {}. Then click {}.", "Tick {} and tap {}.", "Choose {}, then {}.")
TICK = ("Tick {}.", "Check {}.", "Select {}.", "Tick the box of {}.")
ENDINGS = (("OK", "NO"), ("GO", "NO"), ("Save", "Back"), ("Send", "Exit"), ("Done", "Undo"))
KINDS = ("plate", "outlined", "grey", "flat")       # of buttons; the first two have a colour
# Fill, border and ink of grey buttons: on light screens, on dark ones.
GREY = (((239, 239, 239), (118, 118, 118), (0, 0, 0)), ((224, 224, 224), (140, 140, 140), (0,) * 3),
        ((250, 250, 250), (190, 190, 190), (40,) * 3), ((60, 60, 66), (135, 135, 140), (240,) * 3))


def proportions(rng, level: int) -> tuple:
    """(columns, rows) of a screen, in cells: a square at level 0, half of the time from 1 on."""
    return pick(rng, OBLONG[:4]) if level and rng.integers(2) else SQUARE


@lru_cache(maxsize=4096)
def length(text: str, size: int) -> int:
    """The width of a line of text in units, measured at one unit a pixel, so that all sizes of a
    picture have the same layout."""
    return ceil(font(size).getlength(text))


@cached_mask
def bold_mask(text: str, size: int) -> Image.Image:
    """A line of thick text as a smooth mask with the full height of the font."""
    face, stroke = font(4 * size), round(0.12 * size)
    width, height = face.getlength(text) + 2 * stroke, sum(face.getmetrics())
    mask = Image.new("L", (4 * ceil(width / 4) + 4, 4 * ceil(height / 4)))
    ImageDraw.Draw(mask).text((2, 0), text, 255, face, stroke_width=stroke)
    return mask.reduce(4)


class Theme:
    """What the widgets of one screen have in common, drawn at random."""

    def __init__(self, rng, heldout: bool, level: int):
        self.colors = shades(rng, heldout)
        self.ground, self.ink = ground_and_ink(rng, heldout, level)
        self.round = pick(rng, (0, 0.2, 0.2, 0.5))      # radius of the corners / height
        self.shadow, self.bold = rng.integers(4) == 0, rng.integers(3) == 0
        self.tinted = bool(rng.integers(2))             # flat buttons: a faint plate, or a line
        dark = sum(self.ground) < 384
        self.grey = pick(rng, GREY[-2:] if dark else GREY[:3])
        self.bar_height = int(rng.integers(8, 13)) if level else 12
        self.bar_color = pick(rng, ((128, 134, 144), blend(self.ground, self.ink, 0.15),
                                    blend(self.ground, self.ink, 0.8), *self.colors.values()))
        self.dots_left = bool(rng.integers(2))
        self.accent = self.colors[pick(rng, ("green", "green", "blue", "purple"))]
        # border and inside of a box to tick, its mark, and whether it is filled when ticked
        self.edge, self.inside, self.mark = pick(rng, (
            (self.ink, self.ground, self.accent), (self.ink, self.ground, self.ink),
            ((118, 118, 118), (255, 255, 255), (0, 0, 0))))
        self.filled, self.line = rng.integers(3) == 0, int(rng.integers(1, 3))
        if not level:           # one look, which the smallest model learns in minutes
            self.round, self.shadow, self.bold = 0.2, False, False
            self.bar_color, self.dots_left = (128, 134, 144), True
            self.accent = self.colors["green"]
            self.edge, self.inside, self.mark = self.ink, self.ground, self.accent
            self.filled, self.line = False, 1.5

    def write(self, canvas, text, x, y, color, size):
        """Write a line of text around the point (x, y)."""
        if not self.bold:
            canvas.word(text, x, y, color, size, "m")
            return
        mask = bold_mask(text, canvas.px(size))
        canvas.stamp(mask, x - mask.width / 2 / canvas.unit, y - mask.height / 2 / canvas.unit,
                     color)

    def bar(self, canvas, side):
        """Draw a title bar with three dots at the top or bottom -> its height; 0 without a side."""
        (width, height), thick = canvas.size, self.bar_height
        if not side:
            return 0
        y = 0 if side == "top" else height - thick
        canvas.plate(0, y, width, thick, self.bar_color, 0)
        for i in range(3):
            left = (3 if self.dots_left else width - 19) + 6 * i
            canvas.shape("circle", left, y + thick / 2 - 2, 4, ink_on(self.bar_color))
        return thick

    def check(self, canvas, x, y, side, ticked):
        """Draw a box to tick and return its box in 0-999."""
        full, line = ticked and self.filled, self.line
        area = canvas.plate(x, y, side, side, self.accent if full else self.edge, 2)
        if not full:
            canvas.plate(x + line, y + line, side - 2 * line, side - 2 * line, self.inside, 1)
        if ticked:
            canvas.shape("tick", x + 2, y + 2, side - 4,
                         ink_on(self.accent) if full else self.mark)
        return area

    def button(self, canvas, kind, spot, color, label, size=0):
        """Draw a button and return its box in 0-999. spot: x, y, width, height in units; size: of
        a label in one line; 0: of two letters, each as high as the button allows."""
        x, y, width, height = spot
        # a square button never looks like a circle, which may be the icon of another one
        radius = height * (self.round if width > 1.5 * height else min(0.25, self.round))
        paint = self.colors.get(color)
        fill, edge, ink = {
            "plate": lambda: (paint, None, ink_on(paint)),
            "outlined": lambda: (self.ground, paint, self.ink),
            "grey": lambda: self.grey,
            "flat": lambda: (blend(self.ground, self.ink, 0.12 * self.tinted), None, self.ink),
        }[kind]()
        if self.shadow and kind != "flat":
            canvas.plate(x, y + 1, width + 1, height, blend(self.ground, (0, 0, 0), 0.3), radius)
        area = canvas.plate(x, y, width, height, edge or fill, radius)
        if edge:
            line = 2 if kind == "outlined" and height - size > 4 else 1
            canvas.plate(x + line, y + line, width - 2 * line, height - 2 * line, fill,
                         max(0, radius - line))
        if kind == "flat" and not self.tinted:
            canvas.plate(x + 1, y + height - 1, width - 2, 1, self.ink, 0)
        if label in SHAPES:
            side = min(width, height) - 4
            canvas.shape(label, x + (width - side) / 2, y + (height - side) / 2, side, ink)
        elif size:
            self.write(canvas, label, x + width / 2, y + height / 2, ink, size)
        else:
            cell, inner = min(height + 2, width // 2 + 1), bool(edge)
            for i, char in enumerate(label):
                left = x + width / 2 + (i - 1) * cell + (1 + 2 * inner) * (1, -1)[i]
                canvas.glyph(char, left, y + (height - cell) // 2, ink, (10 - 2 * inner) / 16,
                             0.02 + 0.03 * self.bold, cell=cell)
        return area


@dataclass(frozen=True)
class Widget:
    """One button of a screen."""
    label: str                  # a word, the name of a shape, or ""
    color: str                  # "" for grey and flat buttons
    area: tuple                 # x0, y0, x1, y1 in 0-999
    kind: str = "plate"

    def names(self):
        """The names by which a goal may call it, the shortest first."""
        label, color = self.label, self.color
        named = ["the " * (label in SHAPES) + label, f"the {label} button"] if label else []
        named += [f"the {color} {label} button"] if label and color else []
        return named + [f"the {color} button"] if color else named

    def answers_to(self, name):
        return name in self.names()


class GuiClick(OneShot):
    """Click the button that is named by its word, its icon or its colour. From level 3 on, where
    buttons have colours, two have the same word or icon and differ only in colour. Where long words
    leave no room, there are fewer buttons than `widgets` says: on one screen in 40 at level 4."""
    family, tier, verifier = "agent", 2, "HIT"
    blind = (0.15, 0.2, 0.2, 0.17, 0.15)    # few buttons are large ones
    widgets = ((2, 3), (3, 4), (4, 5), (5, 6), (6, 7))
    gap = 2                     # least distance between two buttons, in units

    def make(self):
        rng, theme = self.rng, Theme(self.rng, self.heldout, self.level)
        bar, (low, high) = pick(rng, (None, "top", "bottom")), self.widgets[self.level]
        # two large letters, else words in one line
        self.letters = not self.level or bool(rng.integers(2))
        entries = self.entries(int(rng.integers(low, high + 1)))
        spots, rounds = None, 0
        while not spots:        # again, with another aspect and smaller, if there is no room
            if rounds % 10 == 9 and len(entries) > 2:       # long words may leave no room at all
                entries.pop()
            canvas = Canvas(self.pixels, theme.ground, proportions(rng, self.level))
            sizes = [self.measure(label, len(entries) + rounds) for label, *_ in entries]
            spots = self.arrange(sizes, canvas.size, bar, theme.bar(canvas, bar))
            rounds += 1
        self.shown = [
            Widget(label, color, theme.button(canvas, kind, (*spot, *size[:2]), color, label,
                                              size[2]), kind)
            for (label, color, kind), size, spot in zip(entries, sizes, spots) if spot]
        goals = [(w, name) for w in self.shown if (name := self.call(w))]
        order = rng.permutation(len(goals)).tolist()
        # the first widget is the target if it has a name of its own: its label suits the split
        ranked = sorted(order, key=lambda i: goals[i][0] is not self.shown[0])
        (question, area), *more = [(worded(rng, GOALS, self.level).format(goals[i][1]),
                                    goals[i][0].area)
                                   for i in ranked]
        clicks = [(other, click(place)) for other, place in more[:2 if self.level else 4]]
        others = self.questions() if self.level else []
        self.more = some_of(rng, clicks + some_of(rng, others, 5 - len(clicks)))
        self.more.sort(key=lambda entry: entry[0] in LIST)      # it tells much, so it comes last
        return Obs(IMAGE + question, [canvas.image]), {"action": "click", "box": area}

    def entries(self, n):
        """(label, colour, kind) of n widgets, the target first."""
        rng, found = self.rng, []
        words = [w for w in (SHORT if self.letters else WORDS) if held(w) == self.heldout]
        common = pick(rng, (*KINDS, *KINDS, "plate", "plate", None, None))      # None: several
        if not self.level:
            common = "plate"
        for i, c in zip(range(n), rng.permutation(len(COLORS)).tolist()):
            sort, color, kind = int(rng.integers(5)), list(COLORS)[c], common or pick(rng, KINDS)
            label = pick(rng, SHAPES) if 1 < sort < 4 else pick(rng, words) if sort < 2 else ""
            if not self.letters and label in words and (rng.integers(2) or length(label, 9) > 25):
                label = label.capitalize()
            twin = self.level >= 3 and common in (None, *KINDS[:2]) and i < 3
            if twin:
                kind = kind if kind in KINDS[:2] else "plate"
                label = (label or pick(rng, words)) if i == 0 else found[0][0] if i == 1 else label
                color = found[0][1] if i == 2 else color    # the target's colour with another label
            used = [other.upper() for other, *_ in found]
            if not (twin and i == 1) and label.upper() in used:
                label = ""
            if kind not in KINDS[:2]:
                color, label = "", label or pick(rng, [word for word in (*words, *SHAPES)
                                                       if word.upper() not in used])
            found.append((label, color, kind))
        return found

    def measure(self, label, crowd):
        """(width, height, size of its font; 0: large letters) of a button, in units. crowd: how
        many there are, more if that many had no room."""
        rng, icon = self.rng, label in SHAPES
        line = not (icon or self.letters)
        if not self.level:
            sizes = [s for s in range(9, 13) if length(label, s) <= 25] if line else [0]
            return CELL * (2 - icon) - 2, CELL - 2, pick(rng, sizes or [9])
        spare = max(0, 0.95 - 0.1 * crowd)                  # smaller where there are many
        scale = 0.75 + spare * rng.random()
        if line and label:
            size = max(9, round(10 * scale))
            return (length(label, size) + 5 + int(rng.integers(max(1, 8 - crowd))),
                    size + 2 + int(rng.integers(1 + round(6 * scale))), size)
        height = max(11, round(14 * scale))
        return height if icon else 2 * height + 2, height, 0

    def arrange(self, sizes, room, bar, thick):
        """The (x, y) of each button, or None where there is no room for all; at level 0 for two.
        One in five layouts, compared by cells, is held out."""
        for _ in range(10 if self.level else 50):
            spots, taken, line = [], [], int(self.rng.integers(4))
            for width, height, _ in sizes:
                spot = self.place(width, height, taken, room, bar, thick, line)
                if self.level and not spot:
                    break
                spots.append(spot)
                taken += [(*spot, width, height)] if spot else []
            cells = [spot and (int(spot[0]) // CELL, int(spot[1]) // CELL) for spot in spots]
            if (len(spots) == len(sizes) and len(taken) > 1
                    and held(f"{bar} {cells}") == self.heldout):
                return spots
        return None

    def place(self, width, height, taken, room, bar, thick, line):
        """A random place for a button of this size beside those that are `taken`, or None. line:
        1 and 2 ask for one column or row, if there is room in it, and 3 for a place beside another
        button."""
        gap, first, last = self.gap, thick * (bar == "top"), room[1] - thick * (bar == "bottom")
        if not self.level:          # whole cells
            ys = range(CELL * (bar == "top"), int(last) // CELL * CELL, CELL)
            spots = [(x + 1, y + 1) for x in range(0, room[0] - width, CELL) for y in ys]
            spots = some_of(self.rng, spots)
        else:
            free = room[0] - width - 1, last - first - height - 1
            corners = self.rng.random((30, 2)) * free + (1, first + 1)
            spots = corners.astype(int).tolist()
            if line in (1, 2) and taken:
                x, y = taken[0][:2]
                spots = [(x, b) if line == 1 else (a, y) for a, b in spots[:20]] + spots
            elif line == 3:
                beside = [spot for x, y, w, h in taken for spot in (
                    (x + w + gap, y), (x - width - gap, y), (x, y + h + gap),
                    (x, y - height - gap))]
                spots = some_of(self.rng, beside) + spots
        for x, y in spots:
            if 0 < x < room[0] - width and first < y < last - height and not any(
                    x < a + w + gap and a < x + width + gap and
                    y < b + h + gap and b < y + height + gap for a, b, w, h in taken):
                return x, y
        return None

    def fitting(self, widget):
        """The names that fit only this widget."""
        return [name for name in widget.names()
                if sum(other.answers_to(name) for other in self.shown) == 1]

    def call(self, widget):
        """A name that fits only this widget, mostly the shortest, or None if there is none."""
        names = self.fitting(widget)
        return (pick(self.rng, names) if self.rng.integers(3) == 0 else names[0]) if names else None

    def questions(self):
        """[(question, reply)] that ask for something else than a click."""
        rng, level, asked = self.rng, self.level, []
        for w in self.shown:
            names = [name[4:] for name in self.fitting(w) if name.startswith("the ")]
            bare = [name for name in names if name == f"{w.label} button"]
            if names:
                asked.append((worded(rng, POINT_AT, level).format(pick(rng, names)),
                              box(list(middle(w.area)))))
            about = []
            if w.color and bare:
                about.append((worded(rng, COLOR_OF, level).format(bare[0]), box(w.color)))
            if w.color and w.label and f"{w.color} button" in names:
                forms = ICON_ON if w.label in SHAPES else SAYS
                about.append((worded(rng, forms, level).format(w.color), box(w.label)))
            asked += some_of(rng, about, 1)     # either gives the other away
        down = sorted(self.shown, key=lambda w: w.area[1::-1])
        told = ", ".join(" ".join(filter(None, (w.color, w.label or "button"))) for w in down)
        return [*asked, (worded(rng, HOW_MANY, level).format("buttons"), box(len(down))),
                (worded(rng, LIST, level), box(told))]

    def reply(self, gold):
        return click(gold["box"])

    def glance(self, rng):
        return click(pick(rng, self.shown).area)


class GuiForm(Env):
    """Tick exactly the named boxes, then press the button that the goal names, OK. From level 3 on
    there is also NO, which closes the form; from 1 on both may have other words. Some forms start
    with wrong ticks, so that demonstrations show how to correct them."""
    family, tier, verifier, layout = "agent", 3, "STATE", "segment"
    max_turns = 16
    fields = ((1, 2), (2, 3), (3, 3), (4, 4), (5, 6))
    letters = "ABCDEFHKLMPR"
    words = [word for word in CONTROLS if len(word) <= 5]
    blind = (0.12, 0.06, 0.05, 0.03, 0.01)      # some start almost right

    def reset(self):
        rng = self.rng
        low, high = self.fields[self.level]
        n = int(rng.integers(low, high + 1))
        self.max_turns = 2 * (n + 1) + 2
        self.theme = Theme(rng, self.heldout, self.level)
        self.place(n)
        wanted = rng.permutation(n)[:1 + int(rng.integers(n))].tolist()
        self.wanted = {name: i in wanted for i, name in enumerate(self.spots)}
        wrong = rng.integers(2, size=n).tolist() if rng.integers(5) < 2 else [0] * n
        self.ticks = {name: bool(w) for name, w in zip(self.spots, wrong)}
        self.submitted = self.closed = False
        self.actions = []
        self.chosen = [name for name in self.spots if self.wanted[name]]
        listed = " and ".join(filter(None, (", ".join(self.chosen[:-1]), self.chosen[-1])))
        goal = worded(rng, FORM_GOALS, self.level, 1)
        self.goal = goal.format(listed, self.buttons["OK"][0])
        first = self.observe()
        # single clicks are learned before whole forms: each tier builds on the one below [C]
        self.more = [(worded(rng, TICK, self.level, 1).format(name), click(self.areas[name]))
                     for name in self.spots]
        return first

    def place(self, n):
        """Choose names and places for n fields, places for the buttons, and their words. A field is
        (x, y of its label, x of its box), a button (word, kind, colour, font size, x, y, width,
        height)."""
        rng, level = self.rng, self.level
        self.grid = proportions(rng, level)
        width, height = (CELL * cells for cells in self.grid)
        while True:             # one in five layouts is held out
            self.bar = pick(rng, (None, None, "top", "bottom")) if level else None
            room = height - self.theme.bar_height * bool(self.bar)
            single = bool(level) and (n + 1) * 12 <= room and rng.integers(3) > 0
            rows = n + 1 if single else -(-n // 2) + 1 if level else GRID
            if rows * 11 > room:        # too low for a bar
                continue
            slots = rng.permutation(n if single else 2 * rows - 2)[:n].tolist()
            last = pick(rng, (0, rows - 1, rows - 1))
            left = int(rng.integers(3 if level or last else 2))
            if held(f"{self.grid} {self.bar} {single} {last} {left} {slots}") == self.heldout:
                break
        pitch = room // rows
        pitch = int(rng.integers(min(pitch, 12), pitch + 1)) if level else CELL
        top = int(rng.integers(room - rows * pitch + 1)) + self.theme.bar_height * (
            self.bar == "top")
        span = width if single else width // 2
        # the next column is farther from a box than its own label
        self.side = min(pitch - 1, 14, span // 2 - 3) - int(rng.integers(3)) if level else 14
        self.side = max(9, self.side)
        self.size = min(12, pitch - 3)
        spelt, swap = single and rng.integers(3) > 0, bool(level) and rng.integers(2)
        names = (some(rng, self.words, n, self.heldout) if spelt else
                 some_of(rng, [*self.letters, *SHAPES], n))
        if spelt and span < UNITS:     # a long word and its box fit side by side
            self.size, self.side = 9, 9
        long = max(length(name, self.size) for name in names) + 2 if spelt else self.side + 2
        spare = span - long - self.side - 2
        start = 1 + int(rng.integers(max(1, spare))) * bool(level)
        ys = [top + pitch * row for row in range(rows) if row != last]
        self.spots = {}
        for name, slot in zip(names, slots):
            row, column = (slot, 0) if single else (slot // 2, slot % 2)
            x = column * span + start
            self.spots[name] = ((x + self.side + 3, ys[row], x) if swap else
                                (x, ys[row], x + long))
        self.pitch = pitch
        self.end(top + pitch * last, left, width)

    def end(self, y, left, width):
        """Choose the last buttons in the row at height y."""
        rng, level, pair = self.rng, self.level, ENDINGS[0]
        if level and width >= 64:
            pair = ENDINGS[-1] if self.heldout else pick(rng, ENDINGS[:-1])
        kind, height = pick(rng, (*KINDS[:2], *KINDS) if level else ("plate",)), self.pitch - 2
        colors = some_of(rng, list(COLORS)) if level else ["green", "red"]
        large = not level or rng.integers(2)
        size = 0 if len(pair[0]) == 2 and large else min(12, height - 2)
        wide = min(width // 2 - 2, 30, 2 * height + 2) if not size else min(
            width // 2 - 2, max(length(word, size) for word in pair) + 4)
        xs = (1, width - wide - 1, (width - wide) // 2)[left], (width - wide - 1, 1, 0)[left]
        if level >= 3 and left == 2:
            xs = 1, width - wide - 1
        self.buttons = {name: (word, kind, color, size, x, y + 1, wide, height) for
                        name, word, color, x in list(zip(("OK", "NO"), pair, colors, xs))[
                            :1 + (level >= 3)]}

    def observe(self):
        """Draw the form -> observation."""
        theme, side = self.theme, self.side
        canvas = Canvas(self.pixels, theme.ground, self.grid)
        theme.bar(canvas, self.bar)
        self.areas = {}
        for name, (x, y, at) in self.spots.items():
            top = y + (self.pitch - side) // 2
            if name in SHAPES:
                canvas.shape(name, x, top + 1, side - 2, theme.ink)
            elif len(name) == 1:
                canvas.glyph(name, x - 1, top - 1, theme.ink, 12 / 16, 0.02, cell=side + 2)
            else:
                theme.write(canvas, name, x + length(name, self.size) / 2, y + self.pitch / 2,
                            theme.ink, self.size)
            self.areas[name] = theme.check(canvas, at, top, side, self.ticks[name])
        for name, (word, kind, color, size, *spot) in self.buttons.items():
            self.areas[name] = theme.button(canvas, kind, spot, color, word, size)
        return Obs(recap(self.goal, self.actions), [canvas.image])

    def over(self):
        return self.submitted or self.closed or len(self.actions) >= self.max_turns

    def step(self, text):
        if self.over():
            return Step(None, True)
        action = parse_action(str(text))
        name, args = action or ("", [])
        if name == "click" and is_point(args):
            self.actions.append(f"click({args[0]}, {args[1]})")
            self.press(args)
        else:
            self.actions.append("done()" if name == "done" else "?")
            self.closed = name == "done"
        if not self.over():
            return Step(self.observe(), False)
        return Step(None, True, truncated=not (self.submitted or self.closed))

    def press(self, point):
        """Carry out a click."""
        self.more = []
        for name, area in self.areas.items():
            if not inside(point, area):
                continue
            if name in self.ticks:
                self.ticks[name] = not self.ticks[name]
            self.submitted |= name == "OK"
            self.closed |= name == "NO"

    def evidence(self):
        return {"state": {"ticks": dict(self.ticks), "submitted": self.submitted},
                "gold": {"ticks": dict(self.wanted), "submitted": True},
                "log": list(self.actions)}

    def oracle(self):
        """Tick what is missing, in the order of the goal; then untick what is wrong, from the top
        down; then press OK. So each click follows from the goal and the current screen."""
        down = sorted(self.spots, key=lambda name: self.spots[name][1::-1])
        while not self.over():
            wrong = [name for name in self.chosen if not self.ticks[name]]
            wrong += [name for name in down if self.ticks[name] and not self.wanted[name]]
            yield click(self.areas[wrong[0] if wrong else "OK"])

    def glance(self, rng):
        return click(pick(rng, list(self.areas.values())))
