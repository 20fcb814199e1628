"""Small screens: click a named button; fill in a form, with one action in each turn.

Widgets lie on the grid of draw.py. A button with an icon fills one cell, one with a word two cells,
with a large letter in each (a smaller label can't be read at patch 8). Held-out splits use other
words and other layouts: other combinations of places, though each place occurs in training.
"""
from dataclasses import dataclass

from .base import click, Env, held, IMAGE, Obs, OneShot, pick, recap, Step
from .draw import Canvas, CELL, COLORS, GRID, ink_on, plain, shades, SHAPES
from .verify import inside, is_point, parse_action

WORDS = ("OK", "NO", "GO", "UP", "ON", "IN", "AT", "BY", "DO", "HI", "ME", "MY",
         "WE", "US", "TO", "IT", "IS", "OF", "OR", "AN", "AS", "BE", "HE", "SO", "KG", "OW")
GOALS = ("Click {}.", "Press {}.")


def button(canvas, column, row, color, label):
    """Draw a button, one cell wide with an icon, else two, and return its box in 0-999."""
    wide = label not in SHAPES
    x, y = column * CELL, row * CELL
    area = canvas.plate(x + 1, y + 1, CELL * (1 + wide) - 2, CELL - 2, color)
    ink = ink_on(color)
    if label in SHAPES:
        canvas.shape(label, x + 3, y + 3, 10, ink)
    else:
        for i, char in enumerate(label):
            canvas.glyph(char, x + i * CELL + (1, -1)[i], y, ink, 10 / 16, 0.02)
    return area


@dataclass(frozen=True)
class Widget:
    """One button of a screen."""
    label: str                  # a word, the name of a shape, or ""
    color: str
    area: tuple                 # x0, y0, x1, y1 in 0-999

    def names(self):
        """The names by which a goal may call it, the shortest first."""
        the = "the " if self.label in SHAPES else ""
        named = [the + self.label, f"the {self.color} {self.label}"] if self.label else []
        return [*named, f"the {self.color} button"]

    def answers_to(self, name):
        return name in self.names()


class GuiClick(OneShot):
    """Click the button that is named by its word, its icon or its colour. From level 3 on two
    buttons have the same word or icon and differ only in colour."""
    family, tier, verifier = "agent", 2, "HIT"
    widgets = ((2, 3), (3, 4), (4, 5), (5, 6), (6, 7))

    @classmethod
    def chance(cls, level):
        return 0.12             # a word covers two of 12 to 16 cells, an icon one

    def make(self):
        rng = self.rng
        colors = shades(rng, self.heldout)
        ground, ink = plain(rng, self.heldout, self.level)
        canvas = Canvas(self.pixels, ground)
        low, high = self.widgets[self.level]
        labels = self.labels(int(rng.integers(low, high + 1)))
        bar, spots = self.arrange(labels)
        if bar:
            y = 0 if bar == "top" else (GRID - 1) * CELL + 4
            canvas.plate(0, y, GRID * CELL, CELL - 4, (128, 134, 144), 0)
            for i in range(3):
                canvas.shape("circle", 3 + 6 * i, y + 4, 4, ink)
        self.shown = [Widget(label, color, button(canvas, *spot, colors[color], label))
                      for (label, color), spot in zip(labels, spots) if spot]
        goals = [(w, name) for w in self.shown if (name := self.call(w))]
        order = rng.permutation(len(goals)).tolist()
        # the first widget is the target if it has a name of its own: its label suits the split
        ranked = sorted(order, key=lambda i: goals[i][0] is not self.shown[0])[:5]
        asked = [(pick(rng, GOALS).format(goals[i][1]), goals[i][0]) for i in ranked]
        self.more = [(question, click(w.area)) for question, w in asked[1:]]
        question, target = asked[0]
        return Obs(IMAGE + question, [canvas.image]), {"action": "click", "box": target.area}

    def arrange(self, labels):
        """(bar, spots): bar is None, "top" or "bottom"; spots has a (column, row) for each label,
        or None where there is no room left. One in five layouts is held out."""
        while True:
            bar = pick(self.rng, (None, "top", "bottom"))
            rows = {None: range(GRID), "top": range(1, GRID), "bottom": range(GRID - 1)}[bar]
            free = {(column, row) for row in rows for column in range(GRID)}
            spots = [self.place(free, 1 if label in SHAPES else 2) for label, _ in labels]
            if held(f"{bar} {spots}") == self.heldout:
                return bar, spots

    def labels(self, n):
        """(label, colour) of n widgets, the target first."""
        rng, found = self.rng, []
        words = [w for w in WORDS if held(w) == self.heldout]
        for i, c in zip(range(n), rng.permutation(len(COLORS)).tolist()):
            kind, color = int(rng.integers(5)), list(COLORS)[c]
            label = pick(rng, words) if kind < 2 else pick(rng, SHAPES) if kind < 4 else ""
            if self.level >= 3 and i == 0:
                label = label or pick(rng, words)
            elif self.level >= 3 and i == 1:
                label = found[0][0]             # the target's label in another colour,
            elif any(label == other for other, _ in found):
                label = ""
            if self.level >= 3 and i == 2:
                color = found[0][1]             # and the target's colour with another label
            found.append((label, color))
        return found

    def place(self, free, width):
        """Take `width` cells at a random (column, row) out of `free`; None if there is no room."""
        spots = sorted((c, r) for c, r in free if width == 1 or (c + 1, r) in free)
        if not spots:
            return None
        column, row = pick(self.rng, spots)
        free -= {(column + i, row) for i in range(width)}
        return column, row

    def call(self, widget):
        """A name that fits only this widget, or None if every name also fits another. Mostly it is
        the shortest name; in one case of four the longest, its colour if that is unique."""
        names = [name for name in widget.names()
                 if sum(other.answers_to(name) for other in self.shown) == 1]
        return (names[-1] if self.rng.integers(4) == 0 else names[0]) if names else None

    def reply(self, gold):
        return click(gold["box"])

    def glance(self, rng):
        return click(pick(rng, self.shown).area)


class GuiForm(Env):
    """Tick exactly the named boxes, then press OK. From level 3 on there is also NO, which closes
    the form. Some forms start with wrong ticks, so that demonstrations show how to correct them."""
    family, tier, verifier, layout = "agent", 3, "STATE", "segment"
    max_turns = 16
    fields = ((1, 2), (2, 3), (3, 3), (4, 4), (5, 6))
    letters = "ABCDEFHKLMPR"

    @classmethod
    def chance(cls, level):
        return (0.12, 0.06, 0.05, 0.03, 0.01)[level]         # measured: some start almost right

    def reset(self):
        rng = self.rng
        low, high = self.fields[self.level]
        n = int(rng.integers(low, high + 1))
        self.max_turns = 2 * (n + 1) + 2
        labels = [*self.letters, *SHAPES]
        names = [labels[i] for i in rng.permutation(len(labels))[:n].tolist()]
        # (row, column) of OK; from level 3 on NO takes the other half of that row
        corners = ((3, 0), (3, 2), (0, 0), (0, 2), (3, 1))[:4 if self.level >= 3 else 5]
        while True:             # one in five layouts is held out
            ok_row, ok_column = pick(rng, corners)
            slots = rng.permutation(6)[:n].tolist()
            if held(f"{ok_row} {ok_column} {slots}") == self.heldout:
                break
        rows = [row for row in range(GRID) if row != ok_row]
        self.spots = {name: (s % 2 * 2, rows[s // 2]) for name, s in zip(names, slots)}
        self.buttons = {"OK": (ok_column, ok_row)}
        if self.level >= 3:
            self.buttons["NO"] = (2 - ok_column, ok_row)
        wanted = rng.permutation(n)[:1 + int(rng.integers(n))].tolist()
        self.wanted = {name: i in wanted for i, name in enumerate(names)}
        wrong = rng.integers(2, size=n).tolist() if rng.integers(5) < 2 else [0] * n
        self.ticks = {name: bool(w) for name, w in zip(names, wrong)}
        self.submitted = self.closed = False
        self.colors = shades(rng, self.heldout)
        self.ground, self.ink = plain(rng, self.heldout, self.level)
        self.actions = []
        self.chosen = [name for name in names if self.wanted[name]]
        listed = " and ".join(filter(None, (", ".join(self.chosen[:-1]), self.chosen[-1])))
        self.goal = f"Tick {listed}. Press OK."
        first = self.observe()
        # single clicks are learned before whole forms: each tier builds on the one below [C]
        self.more = [(f"Tick {name}.", click(self.areas[name])) for name in names]
        return first

    def observe(self):
        """Draw the form -> observation."""
        canvas = Canvas(self.pixels, self.ground)
        self.areas = {}
        for name, (column, row) in self.spots.items():
            x, y = column * CELL, row * CELL
            if name in SHAPES:
                canvas.shape(name, x + 2, y + 2, 12, self.ink)
            else:
                canvas.glyph(name, x, y, self.ink, 12 / 16, 0.02)
            self.areas[name] = canvas.plate(x + CELL + 1, y + 1, 14, 14, self.ink, 2)
            canvas.plate(x + CELL + 2.5, y + 2.5, 11, 11, self.ground, 1)
            if self.ticks[name]:
                canvas.shape("tick", x + CELL + 3, y + 3, 10, self.colors["green"])
        for word, (column, row) in self.buttons.items():
            color = self.colors["green" if word == "OK" else "red"]
            self.areas[word] = button(canvas, column, row, color, word)
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
        down = sorted(self.spots, key=lambda name: self.spots[name][::-1])
        while not self.over():
            wrong = [name for name in self.chosen if not self.ticks[name]]
            wrong += [name for name in down if self.ticks[name] and not self.wanted[name]]
            yield click(self.areas[wrong[0] if wrong else "OK"])

    def glance(self, rng):
        return click(pick(rng, list(self.areas.values())))
