"""A small HTML renderer: what a page looks like, and where on it every text stands.

The canvas is 256 page pixels to the side and is drawn at any size, with one and the same layout.
The language is a part of HTML and CSS, a little simplified: a box's width counts its border and
padding, and neighbours in a line are centred on one another. A page is measured first and placed
then; since the renderer itself reports the blocks of text, two pages are compared exactly, without
reading pixels. [O] The tags and properties are those of OWN_LOOK and `declare`; others are counted
and do no harm. There is no script and no address.
"""
import re
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser
from math import ceil
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .draw import font, shape_mask

SIDE, LINE = 256, 1.35                  # the canvas; the height of a line, in font sizes
MOST_NODES, MOST_DEPTH, LONGEST = 200, 16, 4000
LEAST_FONT, MOST_FONT, LEAST_CONTRAST = 6, 64, 60   # smaller or paler text does not count
EDGES = ("top", "right", "bottom", "left")
INHERITED = ("color", "font-size", "font-weight", "text-align")
VOID, CLICKS = {"input", "img"}, {"a", "button", "label", "summary"}
ENDS = {"p": ("p",), "li": ("li",), "tr": ("tr", "td", "th"), "td": ("td", "th"),
        "th": ("td", "th")}             # a tag that begins -> those that it ends
NAMED = {"white": "#fff", "black": "#000", "gray": "#808080", "red": "#f00", "green": "#008000",
         "blue": "#00f", "orange": "#ffa500", "yellow": "#ff0", "purple": "#800080"}
CHOICES = {"font-weight": ("normal", "bold"), "text-align": ("left", "center", "right"),
           "display": ("block", "flex", "inline", "inline-block", "none"),
           "flex-direction": ("row", "column"),
           "justify-content": ("flex-start", "center", "flex-end", "space-between"),
           "align-items": ("stretch", "flex-start", "center", "flex-end")}
SHIFT = {"center": 0.5, "right": 1, "flex-end": 1}      # of what is left over; others: none
LENGTHS = {"width", "height", "gap", "border-radius", "font-size", "flex",
           *(f"{name}-{edge}" for name in ("margin", "padding") for edge in EDGES)}
PLAIN = {**dict.fromkeys(LENGTHS, 0), "font-size": 12, "color": (0, 0, 0), "border": 0,
         **dict.fromkeys(("width", "height", "share", "background")),
         **{name: options[0] for name, options in CHOICES.items()}}
OWN_LOOK = {                            # how a tag looks where the page does not say
    "h1": "font-size:20px;font-weight:bold;margin:4px 0",
    "h2": "font-size:16px;font-weight:bold;margin:4px 0",
    "h3": "font-size:13px;font-weight:bold;margin:3px 0", "p": "margin:4px 0",
    "span": "display:inline", "label": "display:inline", "b": "display:inline;font-weight:bold",
    "a": "display:inline;color:#2457c5",
    "button": "display:inline-block;padding:5px 10px;background:#dfe3ea;border-radius:5px;"
              "text-align:center",
    "input": "display:inline-block;padding:4px 7px;width:130px;background:#fff;color:#777;"
             "border:1px solid #b4bbc7;border-radius:4px",
    "img": "display:inline-block;width:40px;height:40px;background:#c3cad5",
    "ul": "margin:4px 0;padding-left:14px", "li": "margin:2px 0", "td": "padding:3px 6px",
    "th": "padding:3px 6px;font-weight:bold", "style": "display:none",
    "summary": "font-weight:bold;padding-right:14px",
    **dict.fromkeys(("html", "body", "div", "table", "tr", "details"), "")}


class Broken(ValueError):
    """Not a page: too long, too many nodes, too deep, or text outside any element."""


@dataclass(eq=False)
class Node:
    """An element; or, without a tag, a word or a line. Its place is relative to the content of
    the node above it; kids are the nodes that are laid out."""
    tag: str = ""
    attrs: dict = field(default_factory=dict)
    children: list = field(default_factory=list)
    above: "Node | None" = None
    style: dict = field(default_factory=lambda: PLAIN)
    link: "Node | None" = None          # the nearest node, itself or above, that takes a click
    kids: list | None = None
    text: str = ""
    space: bool = False                 # whether white space goes before it
    x: float = 0
    y: float = 0
    w: float = 0
    h: float = 0

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def checkbox(self):
        return self.tag == "input" and self.attrs.get("type") == "checkbox"

    def frame(self):
        """Border and padding: left, top, both sides, both ends."""
        s = self.style
        left, top = s["padding-left"] + s["border"], s["padding-top"] + s["border"]
        return (left, top, left + s["padding-right"] + s["border"],
                top + s["padding-bottom"] + s["border"])

    def margins(self):
        """Both sides, both ends."""
        s = self.style
        return s["margin-left"] + s["margin-right"], s["margin-top"] + s["margin-bottom"]


# ------------------------------------------------------------------------------- reading a page

def length(word: str) -> float | None:
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,2})?)(?:px)?", word, re.ASCII)
    return float(found[1]) if found else None


def colour(word: str) -> tuple | None:
    """#rgb, #rrggbb or one of a few names."""
    digits = NAMED.get(word, word)[1:]
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    good = NAMED.get(word, word)[:1] == "#" and re.fullmatch("[0-9a-f]{6}", digits)
    return tuple(bytes.fromhex(digits)) if good else None


def declare(name: str, value: str) -> dict:
    """What one declaration sets; nothing where it is not understood."""
    name, sizes = name.replace("background-color", "background"), [*map(length, value.split())]
    if value in CHOICES.get(name, ()):
        return {name: value}
    if name in ("margin", "padding") and None not in sizes and 1 <= len(sizes) <= 4:
        order = ((0, 0, 0, 0), (0, 1, 0, 1), (0, 1, 2, 1), (0, 1, 2, 3))[len(sizes) - 1]
        return {f"{name}-{edge}": sizes[i] for edge, i in zip(EDGES, order)}
    if name in LENGTHS and None not in sizes and len(sizes) == 1:
        return {name: min(sizes[0], MOST_FONT) if name == "font-size" else sizes[0]}
    if name == "width" and re.fullmatch(r"[0-9]{1,2}%|100%", value):
        return {"share": int(value[:-1]) / 100}
    if name in ("color", "background") and colour(value):
        return {name: colour(value)}
    border = re.fullmatch(r"([0-9])px solid (\S+)", value)
    if name == "border" and border and colour(border[2]):
        return {"border": int(border[1]), "edge": colour(border[2])}
    return {}


@lru_cache(maxsize=4096)
def declarations(text: str) -> tuple[dict, int]:
    """The style that "name: value; name: value" sets, and how many were not understood."""
    parts = [part.lower().partition(":") for part in text.split(";") if part.strip()]
    found = [declare(name.strip(), value.strip()) for name, _, value in parts]
    return {k: v for one in found for k, v in one.items()}, sum(not one for one in found)


LOOKS = {tag: declarations(text)[0] for tag, text in OWN_LOOK.items()}


class Reader(HTMLParser):
    """Text to nodes. A stray or missing end tag does no more harm than in a browser."""

    def __init__(self, html: str):
        super().__init__()
        self.root = Node()
        self.open, self.nodes, self.unknown, self.css = [self.root], 0, 0, ""
        if len(html) > LONGEST:
            raise Broken(f"longer than {LONGEST} characters")
        try:
            self.feed(html)
            self.close()
        except AssertionError as error:         # what html.parser says to "<![x"
            raise Broken(str(error)) from None

    def handle_starttag(self, tag, attrs):
        while self.open[-1].tag in ENDS.get(tag, ()):
            self.open.pop()
        self.nodes += 1
        self.unknown += tag not in OWN_LOOK
        if self.nodes > MOST_NODES or len(self.open) > MOST_DEPTH:
            raise Broken(f"more than {MOST_NODES} elements, or deeper than {MOST_DEPTH}")
        node = Node(tag, {name: value or "" for name, value in attrs}, above=self.open[-1])
        node.above.children.append(node)
        if tag not in VOID:
            self.open.append(node)
        elif tag == "input" and not node.checkbox():
            node.children.append(node.attrs.get("value") or node.attrs.get("placeholder", ""))

    def handle_endtag(self, tag):
        at = next((i for i in range(len(self.open) - 1, 0, -1) if self.open[i].tag == tag), None)
        if at:
            del self.open[at:]
        self.unknown += at is None

    def handle_data(self, data):
        if self.open[-1].tag == "style":
            self.css += data
        elif self.open[-1] is not self.root:
            self.open[-1].children.append(data)
        elif data.strip():
            raise Broken("text outside any element")


# ------------------------------------------------------------------------- measuring and placing

@lru_cache(maxsize=16384)
def extent(word: str, size: float) -> float:
    return font(size).getlength(word)


def gap(kid: Node) -> float:
    return 0.3 * kid.style["font-size"] * kid.space


def gather(node: Node, line: Node, space: bool) -> bool:
    """Put the words and boxes of a node into the line; whether white space stands at the end."""
    style = {**PLAIN, **{name: node.style[name] for name in INHERITED}}
    for child in node.children if node is not line else list(line.children):
        if isinstance(child, str):
            space |= child[:1].isspace()
            for word in child.split():
                # the face has ASCII only, and what can't be seen must not count as text
                word, size = re.sub("[^!-~]", "?", word), style["font-size"]
                line.kids.append(Node(above=line, style=style, link=node.link, text=word,
                                      space=space, w=extent(word, size), h=LINE * size))
                space = True
            space = child[-1:].isspace() or space and not child.strip()
        elif child.style["display"] == "inline" and not child.style["background"]:
            space = gather(child, line, space)
        elif child.style["display"] != "none":
            flow(child, wide(child, SIDE, False))
            child.space, space = space, False
            line.kids.append(child)
    return space


def divide(node: Node) -> list:
    """The kids, found once: the elements that make blocks, and lines of what stands between."""
    if node.kids is None:
        node.kids, loose, children = [], [], node.children
        if node.tag == "details" and "open" not in node.attrs:
            children = [c for c in children if isinstance(c, Node) and c.tag == "summary"]
        for child in [*children, None]:
            if isinstance(child, str) or child and child.style["display"].startswith(
                    "inline") and node.style["display"] != "flex":
                loose.append(child)
                continue
            if any(isinstance(part, Node) or part.strip() for part in loose):
                kept = {name: node.style[name] for name in INHERITED}
                line = Node("", {}, loose, node, {**PLAIN, **kept, "display": "line"},
                            node.link, [])
                gather(line, line, False)
                node.kids.append(line)
            loose = []
            if child and child.style["display"] != "none":
                node.kids.append(child)
    return node.kids


def cells(table: Node) -> list[tuple[Node, list[Node]]]:
    """Each row of a table, with its cells; rows of a table within it are not its own."""
    def owner(node):
        while node.above and node.above.tag not in ("table", "td", "th"):
            node = node.above
        return node.above
    return [(row, [c for c in row.children if isinstance(c, Node) and c.tag in ("td", "th")])
            for row in table.walk() if row.tag == "tr" and owner(row) is table]


def columns(table: Node) -> list[float]:
    """The widths that the columns of a table need."""
    rows = [inside for _, inside in cells(table)]
    return [max(fit(row[i]) for row in rows if i < len(row))
            for i in range(max(map(len, rows), default=0))]


def fit(node: Node) -> float:
    """The width at which nothing wraps."""
    style = node.style
    if style["width"] is not None:
        return style["width"]
    if style["display"] == "line":
        return sum(k.w + k.margins()[0] + gap(k) * (i > 0) for i, k in enumerate(node.kids))
    sizes = [fit(kid) + kid.margins()[0] for kid in divide(node) if node.tag != "table"]
    if node.tag == "table":
        sizes = [sum(columns(node))]
    elif style["display"] == "flex" and style["flex-direction"] == "row":
        sizes = [sum(sizes) + style["gap"] * (len(sizes) - 1)]
    return node.frame()[2] + max(sizes, default=0)


def wide(node: Node, room: float, fill: bool) -> float:
    """The width of a node that may have `room`; `fill`: blocks take all of it."""
    if node.style["width"] is not None:
        return node.style["width"]
    if node.style["share"] is not None:
        return node.style["share"] * room
    return room if fill and node.tag != "table" else min(fit(node), room)


def flow(node: Node, width: float):
    """Give a node this width, everything in it a place, and it the height that it needs."""
    style, (_, _, sides, ends) = node.style, node.frame()
    lay = (wrap if style["display"] == "line" else grid if node.tag == "table" else
           row if style["display"] == "flex" and style["flex-direction"] == "row" else column)
    fixed = style["height"]
    height = None if fixed is None else max(0, fixed - ends)
    filled = lay(node, divide(node), max(0, width - sides), height)
    node.w, node.h = width, filled + ends if fixed is None else fixed


def spread(kids: list, axis: str, spare: float, how: str):
    """Move kids along an axis into the room that is left over."""
    for i, kid in enumerate(kids):
        share = i / max(1, len(kids) - 1) if how == "space-between" else SHIFT.get(how, 0)
        setattr(kid, axis, getattr(kid, axis) + max(0, spare) * share)


def wrap(node, kids, inner, height):
    lines, ends, y = [[]], [0], 0
    for kid in kids:
        before, width = gap(kid) if lines[-1] else 0, kid.w + kid.margins()[0]
        if lines[-1] and ends[-1] + before + width > inner + 0.01:
            lines.append([])
            ends.append(0)
            before = 0
        kid.x = ends[-1] + before + kid.style["margin-left"]
        ends[-1] += before + width
        lines[-1].append(kid)
    for line, end in zip(lines, ends):
        tall = max((kid.h + kid.margins()[1] for kid in line), default=0)
        for kid in line:
            kid.x += (inner - end) * SHIFT.get(node.style["text-align"], 0)
            kid.y = y + (tall - kid.h - kid.margins()[1]) / 2 + kid.style["margin-top"]
        y += tall
    return y


def column(node, kids, inner, height):
    """Blocks below one another; outside a flex box neighbours share their margins."""
    style, y, last, flex = node.style, 0, 0, node.style["display"] == "flex"
    for i, kid in enumerate(kids):
        room, top = inner - kid.margins()[0], kid.style["margin-top"]
        flow(kid, wide(kid, room, not flex or style["align-items"] == "stretch"))
        y += last + top + style["gap"] * (i > 0) if flex else max(last, top)
        slack = (room - kid.w) * SHIFT.get(style["align-items"], 0) * flex
        kid.x, kid.y, last = kid.style["margin-left"] + slack, y, kid.style["margin-bottom"]
        y += kid.h
    if flex and height is not None:
        spread(kids, "y", height - y - last, style["justify-content"])
    return y + last


def row(node, kids, inner, height):
    style, x = node.style, 0
    room = inner - style["gap"] * (len(kids) - 1) - sum(kid.margins()[0] for kid in kids)
    grow = [kid.style["flex"] for kid in kids]
    widths = [0 if share else wide(kid, inner, False) for kid, share in zip(kids, grow)]
    if sum(widths) > room:                      # too much: all give way alike
        widths = [width * max(0, room) / sum(widths) for width in widths]
    spare = room - sum(widths)
    for kid, width, share in zip(kids, widths, grow):
        flow(kid, width + spare * share / sum(grow) if share else width)
        kid.x = x + kid.style["margin-left"]
        x += kid.w + kid.margins()[0] + style["gap"]
    tall = max((kid.h + kid.margins()[1] for kid in kids), default=0) if height is None else height
    for kid in kids:
        space = tall - kid.margins()[1]
        if style["align-items"] == "stretch" and kid.style["height"] is None:
            kid.h = space
        kid.y = kid.style["margin-top"] + (space - kid.h) * SHIFT.get(style["align-items"], 0)
    spread(kids, "x", inner + style["gap"] - x, style["justify-content"])
    return tall


def grid(table, kids, inner, height):
    """The columns of a table share its width as they need it."""
    needs, y = columns(table), 0
    table.kids = [line for line, _ in cells(table)]
    for line, inside in cells(table):
        line.kids, x = inside, 0
        for cell, need in zip(inside, needs):
            flow(cell, need * inner / max(1, sum(needs)))
            cell.x, cell.y, x = x, 0, x + cell.w
        line.x, line.y, line.w, line.h = 0, y, inner, max((c.h for c in inside), default=0)
        for cell in inside:
            cell.h = line.h
        y += line.h
    return y


# --------------------------------------------------------------------------------------- the page

class Block(NamedTuple):
    """A run of text in one style that can be seen."""
    text: str
    box: tuple                          # x0, y0, x1, y1 on the canvas
    color: tuple
    ground: tuple                       # the colour behind it
    link: Node | None                   # what a click on it reaches


@lru_cache(maxsize=4096)
def word_mask(word: str, size: float, bold: bool) -> Image.Image:
    word = word[:ceil(10_000 / size)]   # more would not fit on any canvas
    face, stroke = font(size), 0.03 * size * bold
    mask = Image.new("L", (ceil(face.getlength(word) + 2 * stroke) + 2, ceil(LINE * size)))
    ImageDraw.Draw(mask).text((1, 1.03 * size), word, 255, face, "ls", stroke_width=stroke)
    return mask


class View:
    """A page laid out: `forms` and `words` to draw, and `blocks`, the text that can be seen."""

    def __init__(self, root: Node):
        bodies = [node for node in root.walk() if node.tag == "body"]
        self.color = bodies and bodies[0].style["background"] or (255, 255, 255)
        self.forms, self.words = [], []
        flow(root, SIDE)
        self.place(root, 0, 0)
        small = self.ground(SIDE // 2)
        self.texture = np.asarray(small.reduce(4), np.float32)      # the page without its text
        runs = list(self.runs(small))
        self.blocks = [block for block in runs if block]
        low = max((y + h for _, _, y, _, h, _, _ in self.forms), default=0)
        self.complete = None not in runs and low <= SIDE

    def place(self, node: Node, x: float, y: float):
        """Note what is to be drawn, from the outside in."""
        x, y, w, h, style = x + node.x, y + node.y, node.w, node.h, node.style
        if node.text:
            self.words.append((x, y, node))
        edge, radius, ink = style["border"], style["border-radius"], style["color"]
        ground = style["background"] or (255, 255, 255) if edge else style["background"]
        if edge:
            self.forms.append(("plate", x, y, w, h, style["edge"], radius))
        if ground:
            self.forms.append(("plate", x + edge, y + edge, w - 2 * edge, h - 2 * edge, ground,
                               max(0, radius - edge)))
        if node.tag == "li":                    # signs that a page need not ask for
            self.forms.append(("circle", x - 9, y + 0.5 * style["font-size"], 4, 4, ink, 0))
        elif node.checkbox() and "checked" in node.attrs:
            self.forms.append(("tick", x + 2, y + 2, w - 4, h - 4, (30, 120, 60), 0))
        elif node.tag == "summary":             # minus, or plus where there is more to see
            self.forms.append(("plate", x + w - 10, y + h / 2 - 1, 8, 2, ink, 0))
            if "open" not in node.above.attrs:
                self.forms.append(("plate", x + w - 7, y + h / 2 - 4, 2, 8, ink, 0))
        left, top, _, _ = node.frame()
        for kid in node.kids or ():
            self.place(kid, x + left, y + top)

    def ground(self, pixels: int) -> Image.Image:
        """The picture without its text."""
        image, unit = Image.new("RGB", (pixels, pixels), self.color), pixels / SIDE
        pen = ImageDraw.Draw(image)
        for kind, x, y, w, h, color, radius in self.forms:
            left, top, right, bottom = (min(pixels, round(c * unit)) for c in (x, y, x + w, y + h))
            r = min(round(radius * unit), (right - left) // 2, (bottom - top) // 2)
            if kind != "plate":
                image.paste(color, (left, top), shape_mask(kind, max(1, bottom - top)))
                continue
            for area in ((left + r, top, right - r, bottom), (left, top + r, right, bottom - r)):
                if area[0] < area[2] and area[1] < area[3]:
                    pen.rectangle((area[0], area[1], area[2] - 1, area[3] - 1), color)
            for corner in ((x, y) for x in (left, right - 2 * r) for y in (top, bottom - 2 * r)):
                if r > 0:
                    image.paste(color, corner, shape_mask("circle", 2 * r))
        return image

    def image(self, pixels: int) -> Image.Image:
        image, unit = self.ground(pixels), pixels / SIDE
        for x, y, word in self.words:
            size, bold = word.style["font-size"] * unit, word.style["font-weight"] == "bold"
            if x < SIDE and y < SIDE and size >= 1:
                at = round(x * unit) - 1, round(y * unit)
                image.paste(word.style["color"], at, word_mask(word.text, size, bold))
        return image

    def runs(self, ground: Image.Image):
        """A Block for neighbouring words of one line, look and target; None for text that is
        tiny, not set off from what lies behind it, or not on the canvas as a whole."""
        runs, last = [], None
        for x, y, word in self.words:
            key = (word.above, word.link, *(word.style[name] for name in INHERITED))
            if key != last:
                runs.append([])
            runs[-1].append((x, y, word))
            last = key
        for run in runs:
            word = run[0][2]
            size, color = word.style["font-size"], word.style["color"]
            box = (min(x for x, _, _ in run), run[0][1] + 0.25 * size,
                   max(x + w.w for x, _, w in run), run[-1][1] + 1.1 * size)
            if size < LEAST_FONT or min(box) < -1 or max(box) > SIDE + 1:
                yield None
                continue
            behind = ground.getpixel((min(max(0, int(box[0] / 2)), ground.width - 1),
                                      min(int((box[1] + box[3]) / 4), ground.width - 1)))
            contrast = sum(abs(a - b) for a, b in zip(color, behind))
            text = "".join(" " * w.space + w.text for _, _, w in run).strip()
            yield Block(text, box, color, behind, word.link) if contrast >= LEAST_CONTRAST else None


class Site:
    """A page, or several, as a browser has it: the nodes keep what was clicked. Children of the
    body that have an id are pages of their own, of which one is shown, the first to begin with;
    whatever else the body holds, such as a bar with links, is on all of them."""

    def __init__(self, html: str):
        reader = Reader(html)
        self.root, self.rules = reader.root, {}
        self.unknown = reader.unknown + sum(declarations(node.attrs.get("style", ""))[1]
                                            for node in self.root.walk())
        for names, text in re.findall(r"([^{}]+)\{([^{}]*)\}", reader.css):
            style, unknown = declarations(text)
            self.unknown += unknown
            for name in names.split(","):
                self.rules[name.strip()] = {**self.rules.get(name.strip(), {}), **style}
        body = next((node for node in self.root.walk() if node.tag == "body"), self.root)
        self.pages = {node.attrs["id"]: node for node in body.children
                      if isinstance(node, Node) and node.attrs.get("id")}
        self.page, self.seen = next(iter(self.pages), ""), None

    def dress(self, node: Node):
        """Settle the style of what stands below, from the weakest rule to the strongest."""
        for child in (c for c in node.children if isinstance(c, Node)):
            own, _ = declarations(child.attrs.get("style", ""))
            names = [child.tag, *("." + n for n in child.attrs.get("class", "").split())]
            child.style = {**PLAIN, **{name: node.style[name] for name in INHERITED},
                           **LOOKS.get(child.tag, {})}
            for rule in [*(self.rules.get(name, {}) for name in names), own]:
                child.style.update(rule)
            if child.checkbox():
                child.style.update(width=12, height=12)
            if child in self.pages.values() and child is not self.pages[self.page]:
                child.style["display"] = "none"
            child.link, child.kids = child if child.tag in CLICKS else node.link, None
            self.dress(child)

    def view(self) -> View:
        if self.seen is None:
            self.root.kids = None
            self.dress(self.root)
            self.seen = View(self.root)
        return self.seen

    def click(self, text: str) -> bool:
        """Click the text that reads so; whether there is one, and it does something."""
        link = next((b.link for b in self.view().blocks if b.text == text and b.link), None)
        boxes = [node for node in link.walk() if node.checkbox()] if link else []
        if boxes:
            toggle(boxes[0], "checked")
        elif link and link.tag == "summary":
            toggle(link.above, "open")
        elif link and link.attrs.get("href", "")[1:] in self.pages:
            self.page = link.attrs["href"][1:]
        else:
            return False
        self.seen = None
        return True


def toggle(node: Node, attribute: str):
    if attribute in node.attrs:
        del node.attrs[attribute]
    else:
        node.attrs[attribute] = ""


@lru_cache(maxsize=400)
def look(html: str) -> View:
    """The first view of a page; raises Broken."""
    return Site(html).view()
