"""A small simulated phone with a home screen, settings, notes, a shop and a calendar.

`world` holds what never changes, `data` what actions can change, and the other attributes which
screen is open. A screen is a list of rows. A row defines both how it is drawn and what a click on
it does, so the renderer, the touch screen and the oracle can't disagree. Positions are in units (64
to the side of a square); at 128 pixels a row, 8 units high, is one row of visual tokens, with text
of 10 pixels. From level 1 on half of the screens are portrait or landscape ones, with as many rows
as they have room for, and their colours, bars, corners and lines vary.
"""
import re
from collections import namedtuple
from typing import Any

from .base import held, pick
from .draw import blend, Canvas, CELL, DARK, ground_and_ink, ink_on, LIGHT, shades, UNITS
from .verify import inside, is_point
from .words import CONTROLS, DAYS, invent, NAMES, some, some_of, THINGS

ROW, TEXT, TRACK = 8, 5, 34     # heights of a row and its font; left end of a slider
# Widths and heights of screens that are not square, in units: whole rows, and whole visual tokens
# at 128 pixels, never more of them than the square has.
SCREENS = ((56, 72), (56, 64), (72, 56), (80, 48))
AMOUNTS = ((2, 3, 4), (3, 4, 5), (4, 5, 6), (5, 6, 8), (6, 9, 9))   # pages, rows in each, records
FORMS = {"Notes": ("Title", "Text"), "Calendar": ("Title", "Day")}
ICONS = dict(Home="square", Settings="cross", Notes="star", Shop="diamond", Calendar="circle")
ACCENTS = ("red", "green", "blue", "purple", "orange")
OPTIONS = (("Low", "Mid", "High"), ("Light", "Dark", "Auto"), ("Small", "Large", "Huge"),
           ("Daily", "Weekly", "Never"), ("All", "Some", "None"))
# The words on buttons; the last of each is held out.
LABELS = {"save": ("Save", "Keep", "Finish"), "delete": ("Delete", "Erase", "Discard"),
          "add": ("Add to cart", "Order", "Buy"), "new": ("New", "Create", "Add"),
          "popup": (("Yes", "No"), ("Allow", "Deny"), ("OK", "Later"))}
USES = dict(click="two integers from 0 to 999", back="nothing", scroll='"up" or "down"',
            open="the name of an app", remember="up to 20 plain characters",
            type="up to 20 plain characters, after a click on a field",
            answer="one short text", done='nothing or "infeasible"')


def plain_text(args) -> bool:
    """Whether the arguments are one short string without special characters."""
    return (len(args) == 1 and type(args[0]) is str
            and re.fullmatch(r"[A-Za-z0-9 .,:'-]{1,20}", args[0]) is not None)


def theme(rng, heldout: bool, level: int) -> dict:
    """Random colours, {role: RGB}: a light or a dark theme with an accent colour. "round" is not a
    colour, but the radius of corners as a share of the roundest."""
    if level:
        ground, ink = ground_and_ink(rng, heldout, level)
    else:
        dark = bool(rng.integers(2))
        ground, ink = (pair[heldout] for pair in ((DARK, LIGHT) if dark else (LIGHT, DARK)))
    dark, accent = sum(ground) < 384, shades(rng, heldout)[pick(rng, ACCENTS)]
    look = {"ground": ground, "ink": ink, "accent": blend(accent, (0, 0, 0), 0.15),
            "panel": blend(ground, (255, 255, 255), 0.1 if dark else 0.8),
            "line": blend(ground, ink, 0.2), "soft": blend(ground, ink, 0.62),
            "off": blend(ground, ink, 0.38), "round": 1}
    look["bar"] = look["accent"]
    if level:
        faint = blend(ground, ink, 0.1)
        look["bar"] = pick(rng, (look["bar"], faint, blend(ground, ink, 0.8)))
        look["panel"] = pick(rng, (look["panel"], faint))
        look["line"] = pick(rng, (look["line"], look["soft"], ground))
        look["soft"] = blend(ground, ink, 0.75)
        look["round"] = pick(rng, (0, 0.5, 1))
    return look


def appearance(rng, heldout: bool, level: int, rows=0) -> dict:
    """{"theme", "size": (width, height)} of a random screen. rows: how many it must show at least,
    below or above its bar."""
    oblong = level and rng.integers(2)
    return {"theme": theme(rng, heldout, level),
            "size": pick(rng, [size for size in SCREENS if size[1] >= ROW * (rows + 1)]) if oblong
            else (UNITS, UNITS)}


def control(rng, kinds) -> tuple[str, tuple, Any]:
    """(kind, choices, value) of a random setting of one of these kinds."""
    kind = pick(rng, kinds)
    choices = (tuple(range(int(rng.integers(4, 6)))) if kind == "slider" else
               pick(rng, OPTIONS) if kind == "choice" else ())
    return kind, choices, pick(rng, choices or (False, True))


def random_device(rng, heldout: bool, level: int) -> tuple[dict, dict]:
    """(world, data) of a random device. Lists grow with the level until they have to be scrolled;
    from level 2 on pages are nested; from 3 on several pages have settings of the same name. [O]"""
    n, rows, records = AMOUNTS[level]
    pool = some(rng, CONTROLS, 40, heldout)
    pages, names = pool[:n], pool[n:]
    kinds = ("switch", "switch", "slider", "choice") if level else ("switch",)
    musts = iter([("switch",), ("slider",)] if level else [])   # kinds of the first two settings
    tree, controls, values = {"": []}, {}, {}
    for i, page in enumerate(pages):
        parent = pick(rng, list(tree)[1:]) if level >= 2 and i > n // 2 else ""
        at = f"{parent}/{page}".strip("/")
        tree[parent].append(page)
        tree[at] = (some_of(rng, names[:12], rows) if level >= 3 else
                    [names.pop() for _ in range(rows)])
        for key in (f"{at}/{name}" for name in tree[at]):
            kind, choices, values[key] = control(rng, next(musts, kinds))
            controls[key] = kind, choices
    words = {name: options[-1] if heldout else pick(rng, options[:-1])
             for name, options in LABELS.items()}
    items = {name.capitalize(): int(rng.integers(2, 100))
             for name in some(rng, THINGS, records, heldout)}
    says = ([*"0123456789"], list(items), DAYS[:5])
    notes = [[name, pick(rng, pick(rng, says))] for name in some(rng, NAMES, records, heldout)]
    events = {invent(rng, heldout): pick(rng, DAYS[:5]) for _ in range(records)}
    look = None
    while not look or held(repr(look)) != heldout:      # one in five layouts is held out
        shuffled = {at: some_of(rng, children) for at, children in tree.items()}
        look = {"apps": some_of(rng, ("Settings", *FORMS, "Shop")), "tree": shuffled,
                "bar": pick(rng, ("top", "bottom")), "cards": bool(rng.integers(2)),
                "new": bool(rng.integers(2)), "swap": bool(rng.integers(2)),
                "lift": int(rng.integers(10, 27)), "items": dict(some_of(rng, [*items.items()]))}
    world = {**look, **appearance(rng, heldout, level), "controls": controls, "words": words,
             "popups": {}, "margin": 0}
    return world, {"Settings": values, "Notes": notes, "Shop": [],
                   "Calendar": [list(event) for event in events.items()]}


# A row of a screen. kind: app, link, switch, check, option, slider, tabs, field, button or fact.
# effect: what a click on it does (see `Device.press`); for sliders and tabs the choice that was hit
# is appended.
Row = namedtuple("Row", "kind label value effect choices", defaults=(None, (), ()))


class Device:
    """The state of a phone. `act` carries out an action and `draw` draws the screen."""

    def __init__(self, world: dict, data: dict, app="Home", path=()):
        self.world, self.data, self.app = world, data, app
        self.paths = {name: [*path] if name == app else [] for name in ("Home", *world["apps"])}
        self.path = self.paths[app]         # the pages opened in this app; the last one is shown
        self.turn, self.popup, self.size = 0, None, world["size"]
        self.visible = self.size[1] // ROW - 1 - world["margin"]
        self.reset_page()

    def reset_page(self, up=False):
        """Reset scroll position, focus and draft; `up`: and go to the page above."""
        self.path[:] = self.path[:-1] if up else self.path
        self.scroll, self.focus, self.draft = 0, None, {"Title": "", "Text": "", "Day": ""}

    def outcome(self) -> dict:
        """The data in a fixed order: a note erased and written again counts as unchanged."""
        return {app: kept if app == "Settings" else sorted(kept) for app, kept in self.data.items()}

    def rows(self) -> list[Row]:
        """All rows of the current page, visible or not. In the shop, the notes and the calendar a
        page is the list, one entry, or a form for a new entry."""
        if self.app == "Home":
            return [Row("app", app, None, ("open", app)) for app in self.world["apps"]]
        if self.app == "Settings":
            return self.settings()
        words, form, shop = self.world["words"], FORMS.get(self.app, ()), self.app == "Shop"
        known = dict(self.world["items"] if shop else self.data[self.app])
        if not self.path:
            new = [Row("button", words["new"], None, ("go", words["new"]))] if form else []
            links = [Row("link", title, None if self.app == "Notes" else value, ("go", title))
                     for title, value in known.items()]
            return new + links if self.world["new"] else links + new
        name = self.path[0]
        if form and name == words["new"]:
            rows = [Row("tabs", "Day", self.draft["Day"], ("day",), DAYS[:5]) if field == "Day"
                    else Row("field", field, self.draft[field], ("focus", field)) for field in form]
            return [*rows, Row("button", words["save"], None, ("save",))]
        facts = dict(zip(form, (name, known[name])))
        label, effect = words["delete"], ("delete", [name, known[name]])
        if shop:
            bought = name in self.data["Shop"]
            facts = {"Price": known[name], "In the cart": "yes" if bought else "no"}
            label, effect = "Remove" if bought else words["add"], ("cart", name)
        return [*(Row("fact", *fact) for fact in facts.items()), Row("button", label, None, effect)]

    def settings(self) -> list[Row]:
        """The rows of a page of settings, or the options of one choice."""
        at, values, controls = "/".join(self.path), self.data["Settings"], self.world["controls"]
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

    def in_sight(self) -> list[tuple[int, Row]]:
        """[(y, row)] of the visible rows."""
        top = ROW if self.world["bar"] == "top" else ROW * self.world["margin"]
        shown = self.rows()[self.scroll:self.scroll + self.visible]
        return [(top + ROW * i, row) for i, row in enumerate(shown)]

    def lowest(self) -> int:
        """The number of rows by which the page can be scrolled down."""
        return max(0, len(self.rows()) - self.visible)

    def dialog(self) -> list[tuple[tuple, str, bool]]:
        """[(box in units, word, whether it means yes)] of the buttons of a dialog."""
        pair = list(zip(self.world["words"]["popup"], (True, False)))
        step, y = (self.size[0] - 14) / 2, self.dialog_top() + 16
        return [((8 + step * i, y, 6 + step * (i + 1), y + 7), *entry)
                for i, entry in enumerate(pair[::-1] if self.world["swap"] else pair)]

    def dialog_top(self) -> int:
        """The top of a dialog, which is 27 units high."""
        return min(self.world["lift"], self.size[1] - 28)

    def area(self, box) -> tuple:
        """A box in units -> in 0-999."""
        return Canvas.area(*box, self.size)

    def spots(self) -> list[tuple[tuple, str, Any, tuple]]:
        """[(box in 0-999, label, choice, effect)] of everything that a click can hit."""
        if self.popup:
            return [(self.area(box), word, None, ("answer", agrees))
                    for box, word, agrees in self.dialog()]
        rows, width = self.in_sight(), self.size[0]
        found = [(box, row.label, choice, (*row.effect, choice))
                 for y, row in rows for choice, box in choice_boxes(row, y, width)]
        # a click anywhere in a row counts, but for a button it must be on the button
        found += [(control_box("button" if row.kind == "button" else "row", y, width), row.label,
                   None, row.effect) for y, row in rows if row.effect and not row.choices]
        return [(self.area(box), *rest) for box, *rest in found]

    def named(self) -> list[tuple[str, tuple]]:
        """[(name, box in 0-999)] of all controls, and of the rows without a control."""
        if self.popup:
            return [(f"{word} button", self.area(box)) for box, word, _ in self.dialog()]
        rows, width = self.in_sight(), self.size[0]
        found = [(f"{choice} tab", box) for y, row in rows if row.kind == "tabs"
                 for choice, box in choice_boxes(row, y, width)]
        for y, row in rows:
            if row.kind != "tabs":
                kind = row.kind if row.kind in marks(width) else "row"
                found.append((f"{row.label} {kind}", control_box(row.kind, y, width)))
        return [(name, self.area(box)) for name, box in found]

    def act(self, name: str, args: list) -> str | None:
        """Carry out an action. Returns None, or an error message in one line if the call is not
        valid. Both count as a turn, after which a dialog may open. While a dialog is open, only its
        buttons work. [O]"""
        good = {"click": is_point(args), "back": not args, "scroll": args in (["up"], ["down"]),
                "open": len(args) == 1 and args[0] in list(self.paths),
                "type": plain_text(args) and self.focus is not None}.get(name)
        complaint = None
        if not good:
            complaint = f"{name} takes {USES[name]}" if name in USES else "no such action"
        elif name == "click":
            for *_, effect in [spot for spot in self.spots() if inside(args, spot[0])][:1]:
                self.press(effect)
        elif self.popup:
            complaint = "a dialog is open"
        elif name == "type":
            self.draft[self.focus] = args[0]
        elif name == "scroll":
            way = (self.visible - 2) * (1 if args == ["down"] else -1)
            self.scroll = min(max(0, self.scroll + way), self.lowest())
        elif name == "open" or not self.path:
            self.press(("open", args[0] if args else "Home"))
        else:
            self.reset_page(up=True)
        self.turn += 1
        self.popup = self.popup or self.world["popups"].get(self.turn)
        return complaint

    def press(self, effect: tuple):
        """Carry out the effect of a click."""
        self.focus = None
        match effect:
            case "focus", name:
                self.focus = name
            case "set", key, value:
                self.data["Settings"][key] = value
            case "day", day:
                self.draft["Day"] = day
            case "cart", item:
                cart = self.data["Shop"]
                (cart.remove if item in cart else cart.append)(item)
            case "answer", agrees:
                self.data["Settings"].update({self.popup: True} if agrees else {})
                self.popup = None
            case "go", page:
                self.path.append(page)
                self.reset_page()
            case "open", app if app != self.app:
                self.app, self.path = app, self.paths[app]
                self.reset_page()
            case "delete", record:
                self.data[self.app].remove(record)
                self.reset_page(up=True)
            case "save",:
                known, record = self.data[self.app], [self.draft[n] for n in FORMS[self.app]]
                taken = [self.world["words"]["new"], *(title for title, _ in known)]
                if all(record) and record[0] not in taken:
                    known.append(record)
                    self.reset_page(up=True)

    def draw(self, pixels: int):
        """Draw the screen -> PIL image. pixels: the side of a square one."""
        look, rows, (width, height) = self.world["theme"], self.in_sight(), self.size
        canvas = Canvas(pixels, look["ground"], (width / CELL, height / CELL))
        for y, row in rows:
            draw_row(canvas, look, row, y, self.world["cards"], row.label == self.focus)
        y, ink = 0 if self.world["bar"] == "top" else height - ROW, ink_on(look["bar"])
        canvas.plate(0, y, width, ROW, look["bar"], 0)
        canvas.shape(ICONS[self.app], 2.5, y + 1.5, 5, ink)
        canvas.word([self.app, *self.path][-1], 10, y + ROW / 2, ink, TEXT)
        if self.lowest():
            top, span, n = rows[0][0], ROW * self.visible, len(self.rows())
            canvas.plate(width - 1.5, top, 1.5, span, look["off"], 0)
            canvas.plate(width - 1.5, top + span * self.scroll / n, 1.5,
                         span * self.visible / n, look["ink"], 0)
        if self.popup:
            canvas.image.paste(canvas.image.point([v // 2 for v in range(256)] * 3))
            y, ink, middle = self.dialog_top(), ink_on(look["accent"]), width / 2
            canvas.plate(4, y, width - 8, 27, look["panel"], 3 * look["round"])
            canvas.word("Turn this on:", middle, y + 5, look["ink"], TEXT, "m")
            canvas.word(self.popup.split("/")[-1] + "?", middle, y + 11, look["ink"], TEXT, "m")
            for (x0, y0, x1, y1), word, _ in self.dialog():
                canvas.plate(x0, y0, x1 - x0, y1 - y0, look["accent"], 2 * look["round"])
                canvas.word(word, (x0 + x1) / 2, (y0 + y1) / 2, ink, TEXT, "m")
        return canvas.image


def track(width: float) -> tuple:
    """(left end, length) of a slider's track on a screen of this width."""
    return TRACK, width - 10 - TRACK


def marks(width: float) -> dict:
    """{kind of a row: the box of its control inside the row} on a screen of this width."""
    left, long = track(width)
    return {"switch": (width - 14, 1.5, width - 4.5, 6.5), "check": (width - 11, 1, width - 5, 7),
            "field": (20, 0.5, width - 4, 7.5), "button": (10, 0.5, width - 10, 7.5),
            "slider": (left - 7, 1, left + long + 7, 7)}


def choice_boxes(row: Row, y: float, width: float) -> list[tuple[Any, tuple]]:
    """[(choice, box in units)] of the positions of a slider or of tabs."""
    left, step = 0, (width - 2) / max(1, len(row.choices))
    if row.kind == "slider":
        left, long = track(width)
        step = long / (len(row.choices) - 1)
        left -= step / 2
    return [(choice, (left + step * i, y, left + step * (i + 1), y + ROW))
            for i, choice in enumerate(row.choices)]


def control_box(kind: str, y: float, width: float) -> tuple:
    """The box, in units, of the control of a row of this kind, or of the row if it has none."""
    x0, y0, x1, y1 = marks(width).get(kind, (0, 0, width - 2, ROW))
    return x0, y + y0, x1, y + y1


def draw_row(canvas, look, row, y, cards, focused):
    """Draw a row: its background and label, then its value or control."""
    ink, soft, accent, off = (look[name] for name in ("ink", "soft", "accent", "off"))
    width, radius, middle = canvas.size[0], look["round"], y + ROW / 2
    kind, value, left = row.kind, row.value, control_box(row.kind, y, width)[0]
    on = accent if value else off
    if kind == "button":
        canvas.plate(left, y + 0.5, width - 20, 7, accent, 2 * radius)
        canvas.word(row.label, width / 2, middle, ink_on(accent), TEXT, "m")
        return
    if cards:
        canvas.plate(0.5, y + 0.5, width - 2.5, ROW - 1, look["panel"], 1.5 * radius)
    else:
        canvas.plate(2, y + ROW - 0.5, width - 5, 0.5, look["line"], 0)
    if kind != "tabs":
        color = soft if kind == "field" else ink
        canvas.word(row.label, 10 if kind == "app" else 3, middle, color, TEXT)
    if kind in ("app", "link"):
        canvas.shape("chevron", width - 7.5, y + 2.5, 3, soft)
    if kind == "app":
        canvas.plate(2, y + 1, 6, 6, accent, 1.5 * radius)
        canvas.shape(ICONS[row.label], 3.5, y + 2.5, 3, ink_on(accent))
    elif kind in ("link", "fact") and value is not None:
        at, color = (width - 9, soft) if kind == "link" else (width - 5, ink)
        canvas.word(str(value), at, middle, color, TEXT, "r")
    elif kind == "switch":
        canvas.plate(left, y + 1.5, 9.5, 5, on, 2.5 * radius)
        canvas.shape("circle", left + (5 if value else 0.5), y + 2, 4, (255, 255, 255))
    elif kind == "check":
        canvas.plate(left, y + 1, 6, 6, on, radius)
        canvas.plate(left + 0.5, y + 1.5, 5, 5, accent if value else look["panel"], radius / 2)
    elif kind == "tabs":
        size = TEXT if width >= UNITS else 4.5      # five short words, still 9 pixels high
        for choice, (x0, _, x1, _) in choice_boxes(row, y, width):
            if choice == value:
                canvas.plate(x0 + 0.5, y + 0.5, x1 - x0 - 1, ROW - 1, accent, 1.5 * radius)
            color = ink_on(accent) if choice == value else ink
            canvas.word(choice, (x0 + x1) / 2, middle, color, size, "m")
    elif kind == "slider":
        start, long = track(width)
        canvas.word(str(row.choices[0]), start - 3.5, middle, soft, TEXT, "r")
        canvas.word(str(row.choices[-1]), start + long + 3.5, middle, soft, TEXT)
        canvas.plate(start, middle - 0.5, long, 1, off, 0)
        ends = [x0 + x1 for _, (x0, _, x1, _) in choice_boxes(row, y, width)]
        for both in ends:
            canvas.plate((both - 1) / 2, middle - 1.5, 1, 3, off, 0)
        canvas.shape("circle", (ends[value] - 5) / 2, middle - 2.5, 5, accent)
    elif kind == "field":
        canvas.plate(left, y + 0.5, width - 24, 7, accent if focused else off, 1.5 * radius)
        canvas.plate(left + 0.5, y + 1, width - 25, 6, look["panel"], radius)
        while (long := canvas.width(value, TEXT)) > width - 28:
            value = value[1:]
        canvas.word(value, left + 2, middle, ink, TEXT)
        if focused:
            canvas.plate(left + 2.5 + long, y + 2, 0.5, 4, ink, 0)
    if kind in ("check", "option") and value:
        canvas.shape("tick", width - 10, y + 2, 4, ink_on(accent) if kind == "check" else accent)
