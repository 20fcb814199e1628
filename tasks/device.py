"""The device: a small simulated phone whose state outlives its screens.

Four apps (settings with nested pages, notes, a shop, a calendar) and a home screen. The content
is plain data: `world` never changes (what there is, and how it looks), `data` is what actions can
change, and the rest says what is on the screen. A screen is a list of rows; a row says how it is
drawn and what a click on it does, so the renderer, the touch screen and the oracle read the same
list and can't disagree.

Positions are in units (64 to the side). A row is 8 units high: at 128 pixels just one row of
visual tokens (patch 8, merged 2 x 2), with text of 10 pixels.
"""
import re
from dataclasses import dataclass
from typing import Any

from .base import click, held, pick
from .draw import DARK, LIGHT, UNITS, Canvas, blend, ink_on, shades
from .verify import inside, is_point, parse_action
from .words import CONTROLS, DAYS, NAMES, THINGS, invent, some

ROW, VISIBLE, LEAP, TEXT = 8, 7, 5, 5       # row height, rows in sight, rows a scroll moves, font
TRACK, TRACK_WIDTH = 36, 17                 # where the track of a slider begins, and its length
# Where a control stands in its row.
MARKS = {"switch": (50, 1.5, 59.5, 6.5), "check": (53, 1, 59, 7), "field": (20, 0.5, 60, 7.5),
         "slider": (TRACK - 7.5, 1, TRACK + TRACK_WIDTH + 7, 7), "button": (10, 0.5, 54, 7.5)}
FORMS = {"Notes": ("Title", "Text"), "Calendar": ("Title", "Day")}
ICONS = {"Home": "square", "Settings": "cross", "Notes": "star", "Shop": "diamond",
         "Calendar": "circle"}
ACCENTS = ("red", "green", "blue", "purple", "orange")
OPTIONS = (("Low", "Mid", "High"), ("Light", "Dark", "Auto"), ("Small", "Large", "Huge"),
           ("Daily", "Weekly", "Never"), ("All", "Some", "None"))
# What buttons say: the last of each is held out.
LABELS = {"save": ("Save", "Keep", "Finish"), "delete": ("Delete", "Erase", "Discard"),
          "add": ("Add to cart", "Order", "Buy"), "new": ("New", "Create", "Add"),
          "popup": (("Yes", "No"), ("Allow", "Deny"), ("OK", "Later"))}
USES = {"click": "click takes two integers from 0 to 999", "back": "back takes nothing",
        "done": 'done takes nothing or "infeasible"', "answer": "answer takes one short text",
        "remember": "remember takes up to 20 plain characters",
        "scroll": 'scroll takes "up" or "down"', "open": "open takes the name of an app",
        "type": "type takes up to 20 plain characters, after a click on a field"}


@dataclass(frozen=True)
class Row:
    """A line of a screen. `effect` is what a click does; for sliders and tabs the choice that was
    hit is added to it."""
    kind: str           # app, link, switch, check, option, slider, tabs, field, button, fact
    label: str
    value: Any = None
    effect: tuple = ()
    choices: tuple = ()


def plain_text(args) -> bool:
    """One short string that may stand in a prompt: no marks of any kind."""
    return (len(args) == 1 and type(args[0]) is str
            and re.fullmatch(r"[A-Za-z0-9 .,:'-]{1,20}", args[0]) is not None)


# ---------------------------------------------------------------------------------- what there is

def theme(rng, heldout: bool) -> dict:
    """Colours: light or dark, and an accent."""
    dark = bool(rng.integers(2))
    ground, ink = (pair[heldout] for pair in ((DARK, LIGHT) if dark else (LIGHT, DARK)))
    accent = shades(rng, heldout)[pick(rng, ACCENTS)]
    return {"ground": ground, "ink": ink, "accent": blend(accent, (0, 0, 0), 0.15),
            "panel": blend(ground, (255, 255, 255), 0.1 if dark else 0.8),
            "line": blend(ground, ink, 0.2), "soft": blend(ground, ink, 0.62),
            "off": blend(ground, ink, 0.38)}


def control(rng, kinds) -> tuple[str, tuple, Any]:
    """(kind, choices, value) of a random setting."""
    kind, choices = pick(rng, kinds), ()
    if kind == "slider":
        choices = tuple(range(int(rng.integers(4, 6))))
    elif kind == "choice":
        choices = pick(rng, OPTIONS)
    return kind, choices, pick(rng, choices or (False, True))


def furnish(rng, heldout: bool, level: int) -> tuple[dict, dict]:
    """(world, data) of a device; lists grow with the level until they must be scrolled, pages
    nest from level 2 on, and from level 3 on the same setting stands on several pages. [O]"""
    pages, rows, records = ((2, 3, 4), (3, 4, 5), (4, 5, 6), (5, 6, 8), (6, 9, 9))[level]
    pool = some(rng, CONTROLS, 40, heldout)
    pages, names = pool[:pages], pool[pages:]
    names = names[:12] if level >= 3 else names
    kinds = ("switch", "switch", "slider", "choice") if level else ("switch",)
    tree, controls, values = {"": []}, {}, {}
    for i, page in enumerate(pages):
        parent = pick(rng, list(tree)[1:]) if level >= 2 and i > len(pages) // 2 else ""
        key = f"{parent}/{page}".strip("/")
        tree[parent].append(page)
        tree[key] = some_of(rng, names, rows) if level >= 3 else [names.pop() for _ in range(rows)]
        for j, name in enumerate(tree[key]):
            # the first page always has a slider to set and a switch to flip
            first = (("switch",), ("slider",))[j] if level and i == 0 and j < 2 else kinds
            kind, choices, value = control(rng, first)
            controls[f"{key}/{name}"], values[f"{key}/{name}"] = (kind, choices), value
    words = {name: options[-1] if heldout else pick(rng, options[:-1])
             for name, options in LABELS.items()}
    items = {name.capitalize(): int(rng.integers(2, 100))
             for name in some(rng, THINGS, records, heldout)}
    says = [lambda: str(rng.integers(10)), lambda: pick(rng, list(items)),
            lambda: pick(rng, DAYS[:5])]
    notes = [[name, pick(rng, says)()] for name in some(rng, NAMES, records, heldout)]
    events = {invent(rng, heldout): pick(rng, DAYS[:5]) for _ in range(records)}
    while True:                             # of all layouts, one in five is held out
        shuffled = {key: some_of(rng, children, 99) for key, children in tree.items()}
        look = {"apps": some_of(rng, ("Settings", *FORMS, "Shop"), 4), "tree": shuffled,
                "bar": pick(rng, ("top", "bottom")), "cards": bool(rng.integers(2)),
                "new": bool(rng.integers(2)), "swap": bool(rng.integers(2)),
                "lift": int(rng.integers(10, 27)),
                "items": {name: items[name] for name in some_of(rng, list(items), 99)}}
        if held(repr(look)) == heldout:
            break
    world = {**look, "controls": controls, "words": words, "popups": {}, "margin": 0,
             "theme": theme(rng, heldout)}
    return world, {"Settings": values, "Notes": notes, "Shop": [],
                   "Calendar": [list(event) for event in events.items()]}


def some_of(rng, things, n: int) -> list:
    """Up to n of these, in any order."""
    return [things[i] for i in rng.permutation(len(things))[:n].tolist()]


# --------------------------------------------------------------------------------------- the phone

class Device:
    """A phone in use. `act` takes an action and `draw` shows the screen."""

    def __init__(self, world: dict, data: dict, app="Home", path=()):
        self.world, self.data, self.app = world, data, app
        self.paths = {name: [] for name in ("Home", *world["apps"])}
        self.paths[app] = list(path)
        self.turn, self.popup, self.visible = 0, None, VISIBLE - world["margin"]
        self.leave()

    def leave(self, up=False):
        """Turn to another page, perhaps the one above: what is only on the screen is lost."""
        self.path[:] = self.path[:-1] if up else self.path
        self.scroll, self.focus, self.draft = 0, None, {"Title": "", "Text": "", "Day": ""}

    @property
    def path(self) -> list:
        return self.paths[self.app]

    def outcome(self) -> dict:
        """What lasts, in an order of its own: a note erased and written again is the same note."""
        return {**self.data, **{app: sorted(self.data[app]) for app in (*FORMS, "Shop")}}

    # ---- screens

    def rows(self) -> list[Row]:
        if self.app == "Home":
            return [Row("app", app, None, ("open", app)) for app in self.world["apps"]]
        if self.app == "Settings":
            return self.settings("/".join(self.path))
        return self.shop() if self.app == "Shop" else self.records()

    def settings(self, at: str) -> list[Row]:
        values, controls = self.data["Settings"], self.world["controls"]
        if at in controls:
            return [Row("option", option, option == values[at], ("set", at, option))
                    for option in controls[at][1]]
        rows = []
        for name in self.world["tree"][at]:
            key = f"{at}/{name}".strip("/")
            kind, choices = controls.get(key, ("page", ()))
            if kind in ("page", "choice"):
                rows.append(Row("link", name, values.get(key), ("go", name)))
            else:
                effect = ("set", key) if choices else ("set", key, not values[key])
                rows.append(Row(kind, name, values[key], effect, choices))
        return rows

    def shop(self) -> list[Row]:
        items, cart = self.world["items"], self.data["Shop"]
        if not self.path:
            return [Row("link", name, price, ("go", name)) for name, price in items.items()]
        name = self.path[0]
        return [Row("fact", "Price", items[name]),
                Row("fact", "In the cart", "yes" if name in cart else "no"),
                Row("button", "Remove" if name in cart else self.world["words"]["add"], None,
                    ("cart", name))]

    def records(self) -> list[Row]:
        """Lists of notes or events, the form for a new one, and the page of one."""
        words, known = self.world["words"], self.data[self.app]
        if not self.path:
            new = [Row("button", words["new"], None, ("go", words["new"]))]
            links = [Row("link", title, value if self.app == "Calendar" else None, ("go", title))
                     for title, value in known]
            return new + links if self.world["new"] else links + new
        if self.path[0] == words["new"]:
            fields = [Row("tabs", "Day", self.draft["Day"], ("day",), DAYS[:5]) if name == "Day"
                      else Row("field", name, self.draft[name], ("focus", name))
                      for name in FORMS[self.app]]
            return [*fields, Row("button", words["save"], None, ("save",))]
        record = next(record for record in known if record[0] == self.path[0])
        return [*(Row("fact", name, value) for name, value in zip(FORMS[self.app], record)),
                Row("button", words["delete"], None, ("delete", record))]

    # ---- touch

    def in_sight(self) -> list[tuple[int, Row]]:
        """(y, row) of the rows on the screen."""
        top = ROW if self.world["bar"] == "top" else ROW * self.world["margin"]
        shown = self.rows()[self.scroll:self.scroll + self.visible]
        return [(top + ROW * i, row) for i, row in enumerate(shown)]

    def lowest(self) -> int:
        return max(0, len(self.rows()) - self.visible)

    def dialog(self) -> list[tuple[tuple, str, bool]]:
        """(box in units, word, whether it agrees) of the buttons of a dialog."""
        pair, y = list(zip(self.world["words"]["popup"], (True, False))), self.world["lift"] + 16
        return [((8 + 25 * i, y, 31 + 25 * i, y + 7), *entry)
                for i, entry in enumerate(pair[::-1] if self.world["swap"] else pair)]

    def spots(self) -> list[tuple[tuple, str, Any, tuple]]:
        """(box in 0-999, label, choice, effect) of everything that a click can hit."""
        found = [(box, word, None, ("answer", agrees)) for box, word, agrees in self.dialog()]
        if not self.popup:
            found = [((x0, y, x1, y + ROW), row.label, choice, (*row.effect, choice))
                     for y, row in self.in_sight() for choice, x0, x1 in stops(row)]
            # a click anywhere in a row will do, but a button ends where it ends
            found += [(mark(row, y) if row.kind == "button" else (0, y, UNITS - 2, y + ROW),
                       row.label, None, row.effect)
                      for y, row in self.in_sight() if row.effect and not row.choices]
        return [(scaled(box), *rest) for box, *rest in found]

    def named(self) -> list[tuple[str, tuple]]:
        """(name, box in 0-999) of all that can be pointed at; a row without a control is one."""
        if self.popup:
            return [(f"{word} button", scaled(box)) for box, word, _ in self.dialog()]
        found = [(f"{choice} tab", (x0, y, x1, y + ROW)) for y, row in self.in_sight()
                 if row.kind == "tabs" for choice, x0, x1 in stops(row)]
        found += [(f"{row.label} {row.kind if row.kind in MARKS else 'row'}", mark(row, y))
                  for y, row in self.in_sight() if row.kind != "tabs"]
        return [(name, scaled(box)) for name, box in found]

    def act(self, name: str, args: list) -> str | None:
        """Do it; a complaint in one line where the call is not a good one. Either takes a turn,
        and a dialog may come of it. Once one is open, only its buttons work. [O]"""
        good = (name == "back" and not args or name == "click" and is_point(args)
                or name == "scroll" and args in (["up"], ["down"])
                or name == "open" and len(args) == 1 and args[0] in list(self.paths)
                or name == "type" and plain_text(args) and self.focus is not None)
        if not good:
            complaint = USES.get(name, "no such action")
        elif self.popup and name != "click":
            complaint = "a dialog is open"
        else:
            complaint = None
            if name == "click":
                for *_, effect in [spot for spot in self.spots() if inside(args, spot[0])][:1]:
                    self.press(*effect)
            elif name == "type":
                self.draft[self.focus] = args[0]
            elif name == "scroll":
                way = LEAP if args == ["down"] else -LEAP
                self.scroll = min(max(0, self.scroll + way), self.lowest())
            elif name == "open" or not self.path:
                self.press("open", args[0] if args else "Home")
            else:
                self.leave(up=True)
        self.turn += 1
        self.popup = self.popup or self.world["popups"].get(self.turn)
        return complaint

    def press(self, effect: str, *args):
        """What a click on a row, a choice or a button does."""
        data = self.data
        self.focus = args[0] if effect == "focus" else None
        if effect == "set":
            data["Settings"][args[0]] = args[1]
        elif effect == "day":
            self.draft["Day"] = args[0]
        elif effect == "cart":
            (data["Shop"].remove if args[0] in data["Shop"] else data["Shop"].append)(args[0])
        elif effect == "answer":
            if args[0]:
                data["Settings"][self.popup] = True
            self.popup = None
        elif effect == "go":
            self.path.append(args[0])
            self.leave()
        elif effect == "open" and args[0] != self.app:
            self.app = args[0]
            self.leave()
        elif effect == "delete":
            data[self.app].remove(args[0])
            self.leave(up=True)
        elif effect == "save":
            record = [self.draft[name] for name in FORMS[self.app]]
            taken = [self.world["words"]["new"], *(known[0] for known in data[self.app])]
            if all(record) and record[0] not in taken:
                data[self.app].append(record)
                self.leave(up=True)

    # ---- the picture

    def draw(self, pixels: int):
        look = self.world["theme"]
        canvas = Canvas(pixels, look["ground"])
        for y, row in self.in_sight():
            paint(canvas, look, row, y, self.world["cards"], row.effect[1:] == (self.focus,))
        y = 0 if self.world["bar"] == "top" else UNITS - ROW
        canvas.plate(0, y, UNITS, ROW, look["accent"], 0)
        ink = ink_on(look["accent"])
        canvas.shape(ICONS[self.app], 2.5, y + 1.5, 5, ink)
        canvas.word([self.app, *self.path][-1], 10, y + ROW / 2, ink, TEXT)
        if self.lowest():
            top, height, rows = self.in_sight()[0][0], ROW * self.visible, len(self.rows())
            canvas.plate(UNITS - 1.5, top, 1.5, height, look["line"], 0)
            canvas.plate(UNITS - 1.5, top + height * self.scroll / rows, 1.5,
                         height * self.visible / rows, look["soft"], 0)
        if self.popup:
            canvas.image.paste(canvas.image.point([v // 2 for v in range(256)] * 3))
            y = self.world["lift"]
            canvas.plate(4, y, 56, 27, look["panel"], 3)
            canvas.word("Turn this on:", UNITS / 2, y + 5, look["ink"], TEXT, "m")
            canvas.word(self.popup.split("/")[-1] + "?", UNITS / 2, y + 11, look["ink"], TEXT, "m")
            for (x0, y0, x1, y1), word, _ in self.dialog():
                canvas.plate(x0, y0, x1 - x0, y1 - y0, look["accent"], 2)
                canvas.word(word, (x0 + x1) / 2, (y0 + y1) / 2, ink, TEXT, "m")
        return canvas.image


def stops(row: Row) -> list[tuple[Any, float, float]]:
    """(choice, x0, x1) of the places of a slider or of tabs."""
    left, step = 0, (UNITS - 2) / max(1, len(row.choices))
    if row.kind == "slider":
        step = TRACK_WIDTH / (len(row.choices) - 1)
        left = TRACK - step / 2
    return [(choice, left + step * i, left + step * (i + 1))
            for i, choice in enumerate(row.choices)]


def scaled(box) -> tuple:
    """A box in units as one in 0-999."""
    return tuple(round(u * 999 / UNITS, 1) for u in box)


def mark(row: Row, y: float) -> tuple:
    """The box of a row's control or, where it has none, of the row, in units."""
    x0, y0, x1, y1 = MARKS.get(row.kind, (0, 0, UNITS - 2, ROW))
    return x0, y + y0, x1, y + y1


def paint(canvas, look, row, y, cards, focused):
    """Draw one row."""
    ink, soft, accent, off = (look[name] for name in ("ink", "soft", "accent", "off"))
    middle, x0, x1 = y + ROW / 2, *MARKS.get(row.kind, (53, 0, 59, 0))[::2]
    if row.kind == "button":
        canvas.plate(x0, y + 0.5, x1 - x0, 7, accent, 2)
        canvas.word(row.label, UNITS / 2, middle, ink_on(accent), TEXT, "m")
        return
    if cards:
        canvas.plate(0.5, y + 0.5, UNITS - 2.5, ROW - 1, look["panel"], 1.5)
    else:
        canvas.plate(2, y + ROW - 0.5, UNITS - 5, 0.5, look["line"], 0)
    if row.kind == "tabs":
        for choice, left, right in stops(row):
            if choice == row.value:
                canvas.plate(left + 0.5, y + 0.5, right - left - 1, ROW - 1, accent, 1.5)
            color = ink_on(accent) if choice == row.value else ink
            canvas.word(choice, (left + right) / 2, middle, color, TEXT, "m")
        return
    indent = 10 if row.kind == "app" else 3
    canvas.word(row.label, indent, middle, soft if row.kind == "field" else ink, TEXT)
    if row.kind == "app":
        canvas.plate(2, y + 1, 6, 6, accent, 1.5)
        canvas.shape(ICONS[row.label], 3.5, y + 2.5, 3, ink_on(accent))
    if row.kind in ("app", "link"):
        canvas.shape("chevron", 56.5, y + 2.5, 3, soft)
    if row.kind in ("link", "fact") and row.value is not None:
        at, color = (55, soft) if row.kind == "link" else (59, ink)
        canvas.word(str(row.value), at, middle, color, TEXT, "r")
    elif row.kind == "switch":
        canvas.plate(x0, y + 1.5, 9.5, 5, accent if row.value else off, 2.5)
        canvas.shape("circle", x0 + (5 if row.value else 0.5), y + 2, 4, (255, 255, 255))
    elif row.kind == "check":
        canvas.plate(x0, y + 1, 6, 6, accent if row.value else off, 1)
        canvas.plate(x0 + 0.5, y + 1.5, 5, 5, accent if row.value else look["panel"], 0.5)
    if row.kind in ("check", "option") and row.value:
        canvas.shape("tick", x0 + 1, y + 2, 4, ink_on(accent) if row.kind == "check" else accent)
    if row.kind == "slider":
        canvas.word(str(row.choices[0]), TRACK - 4, middle, soft, TEXT, "r")
        canvas.word(str(row.choices[-1]), TRACK + TRACK_WIDTH + 4, middle, soft, TEXT)
        canvas.plate(TRACK, middle - 0.5, TRACK_WIDTH, 1, off, 0)
        for _, left, right in stops(row):
            canvas.plate((left + right - 1) / 2, middle - 1.5, 1, 3, off, 0)
        _, left, right = stops(row)[row.value]
        canvas.shape("circle", (left + right - 5) / 2, middle - 2.5, 5, accent)
    elif row.kind == "field":
        canvas.plate(x0, y + 0.5, x1 - x0, 7, accent if focused else off, 1.5)
        canvas.plate(x0 + 0.5, y + 1, x1 - x0 - 1, 6, look["panel"], 1)
        text = row.value
        while (width := canvas.width(text, TEXT)) > x1 - x0 - 4:
            text = text[1:]
        canvas.word(text, x0 + 2, middle, ink, TEXT)
        if focused:
            canvas.plate(x0 + 2.5 + width, y + 2, 0.5, 4, ink, 0)


def write(screen, action: str, y: float):
    """Put an action into the margin of a screen and, for a click, a ring around its place."""
    canvas = Canvas.on(screen)
    canvas.plate(0, y, UNITS, ROW, (255, 226, 130), 0)
    canvas.word(action, 2, y + ROW / 2, (0, 0, 0), TEXT)
    name, args = parse_action(action)
    if name == "click":
        x, y = (a * UNITS / 999 for a in args)
        canvas.pen.ellipse(canvas.at(x - 3, y - 3, x + 3, y + 3), None, (255, 0, 170), canvas.px(1))
