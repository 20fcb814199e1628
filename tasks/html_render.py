"""A small HTML renderer: it draws a page and reports where every text on it is.

The canvas is 256 page pixels wide and high and can be drawn at any size, always with the same
layout. The language is a subset of HTML and CSS with two simplifications: the width of a box
includes its border and padding, and the elements of a line are centred vertically. A page is
measured first and placed afterwards. Since the renderer reports the blocks of text, two pages are
compared exactly, without reading pixels. [O]

DEFAULT_STYLES and `declare` define which tags and properties exist; others are counted and ignored.
There are no scripts and no addresses.
"""
import re
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser
from itertools import groupby, product, zip_longest
from math import ceil
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .draw import cached_by_size, cached_mask, font, shape_mask

SIDE, LINE, SPACE = 256, 1.35, 0.3      # the canvas; height of a line and a space, in font sizes
MOST_NODES, MOST_DEPTH, LONGEST = 200, 16, 4000
LEAST_FONT, MOST_FONT, LEAST_CONTRAST = 6, 64, 60   # text that is smaller or paler does not count
EDGES = ("top", "right", "bottom", "left")
LENGTH = r"(\d{1,3}(?:\.\d{1,2})?)(?:px)?"
INHERITED = ("color", "font-size", "font-weight", "text-align")
WHITE = (255, 255, 255)
VOID, CLICKS = {"input", "img"}, {"a", "button", "label", "summary"}
CELLS = ("td", "th")
ENDS = {"p": ("p",), "li": ("li",), "tr": ("tr", *CELLS), "td": CELLS, "th": CELLS}
NAMED = {"white": "#fff", "black": "#000", "gray": "#808080", "red": "#f00", "green": "#008000",
         "blue": "#00f", "orange": "#ffa500", "yellow": "#ff0", "purple": "#800080"}
CHOICES = {"font-weight": ("normal", "bold"), "text-align": ("left", "center", "right"),
           "display": ("block", "flex", "inline", "inline-block", "none"),
           "flex-direction": ("row", "column"),
           "justify-content": ("flex-start", "center", "flex-end", "space-between"),
           "align-items": ("stretch", "flex-start", "center", "flex-end")}
SHIFT = {"center": 0.5, "right": 1, "flex-end": 1}      # share of the spare room; for others 0
LENGTHS = {"width", "height", "gap", "border-radius", "font-size", "flex",
           *(f"{name}-{edge}" for name in ("margin", "padding") for edge in EDGES)}
PLAIN = {**dict.fromkeys(LENGTHS, 0), "font-size": 12, "color": (0, 0, 0), "border": 0,
         **dict.fromkeys(("width", "height", "share", "background")),
         **{name: options[0] for name, options in CHOICES.items()}}
# The default styles of the tags.
DEFAULT_STYLES = """
html,body,div,table,tr,details{} style{display:none} button,input,img{display:inline-block}
h1,h2,h3,b,th,summary{font-weight:bold} h1{font-size:20px} h2{font-size:16px} h3{font-size:13px}
h1,h2,p,ul{margin:4px 0} h3{margin:3px 0} li{margin:2px 0} ul{padding-left:14px}
td,th{padding:3px 6px} summary{padding-right:14px} span,label,a,b{display:inline} a{color:#2457c5}
button{padding:5px 10px; background:#dfe3ea; border-radius:5px; text-align:center}
input{padding:4px 7px; width:130px; background:#fff; color:#777; border:1px solid #b4bbc7}
input{border-radius:4px} img{width:40px; height:40px; background:#c3cad5}"""


class Broken(ValueError):
    """Raised for a page that is too long, has too many elements, is nested too deep, or lacks what
    is to be clicked."""


@dataclass(eq=False)
class Node:
    """An element, or, without a tag, a word or a line of text. Its position is relative to the
    content of the node above. `kids` are the nodes that are laid out inside it."""
    tag: str = ""
    attrs: dict = field(default_factory=dict)
    children: list = field(default_factory=list)        # elements and strings
    above: "Node | None" = None
    style: dict = field(default_factory=lambda: PLAIN)
    link: "Node | None" = None          # the nearest node, itself or above, that takes a click
    table: "Node | None" = None         # the table to which a row at this place would belong
    kids: list | None = None
    text: str = ""
    space: float = 0                    # the width of the white space before it in a line
    x: float = 0
    y: float = 0
    w: float = 0
    h: float = 0

    def elements(self):
        """The elements that are direct children."""
        return [child for child in self.children if isinstance(child, Node)]

    def walk(self):
        """Yield this element and all elements inside it, in document order."""
        yield self
        for child in self.elements():
            yield from child.walk()

    def checkbox(self):
        """Whether it is a check box."""
        return self.tag == "input" and self.attrs.get("type") == "checkbox"

    def frame(self):
        """Border and padding: left, top, left and right together, top and bottom together."""
        s = self.style
        left, top = s["padding-left"] + s["border"], s["padding-top"] + s["border"]
        return (left, top, left + s["padding-right"] + s["border"],
                top + s["padding-bottom"] + s["border"])

    def margins(self):
        """Margins: left and right together, top and bottom together."""
        s = self.style
        return s["margin-left"] + s["margin-right"], s["margin-top"] + s["margin-bottom"]


# ---- reading a page -----------------------------------------------------------------------------

def colour(word: str) -> tuple | None:
    """RGB of #rgb, #rrggbb or one of a few names; None for anything else."""
    word = NAMED.get(word, word)
    if re.fullmatch("#[0-9a-f]{3}", word):
        word = "#" + "".join(2 * digit for digit in word[1:])
    return tuple(bytes.fromhex(word[1:])) if re.fullmatch("#[0-9a-f]{6}", word) else None


def declare(name: str, value: str) -> dict:
    """{property: value} that one declaration sets; {} if it is not understood."""
    name = name.replace("background-color", "background")
    found = [re.fullmatch(LENGTH, word, re.ASCII) for word in value.split()]
    sizes = [float(one[1]) for one in found] if all(found) else []
    if value in CHOICES.get(name, ()):
        return {name: value}
    if name in ("margin", "padding") and 1 <= len(sizes) <= 4:
        order = ((0, 0, 0, 0), (0, 1, 0, 1), (0, 1, 2, 1), (0, 1, 2, 3))[len(sizes) - 1]
        return {f"{name}-{edge}": sizes[i] for edge, i in zip(EDGES, order)}
    if name in LENGTHS and len(sizes) == 1:
        if name == "font-size":                 # there is no font below one pixel: 0 is invisible
            sizes = [min(sizes[0], MOST_FONT) if sizes[0] >= 1 else 0]
        return {name: sizes[0]}
    if name == "width" and re.fullmatch(r"[0-9]{1,2}%|100%", value):
        return {"share": int(value[:-1]) / 100}
    if name in ("color", "background") and colour(value):
        return {name: colour(value)}
    border = re.fullmatch(r"([0-9])px solid (\S+)", value)
    if name == "border" and border and colour(border[2]):
        return {"border": int(border[1]), "edge": colour(border[2])}
    return {}


@lru_cache(maxsize=1024)
def declarations(text: str) -> tuple[dict, int]:
    """(the style that "name: value; name: value" sets, how many were not understood)."""
    parts = [part.lower().partition(":") for part in text.split(";") if part.strip()]
    found = [declare(name.strip(), value.strip()) for name, _, value in parts]
    return {k: v for one in found for k, v in one.items()}, found.count({})


def inherited_style(style: dict) -> dict:
    """The style that children inherit from a node with this style."""
    return {**PLAIN, **{name: style[name] for name in INHERITED}}


def parse_sheet(sheet: str):
    """Yield (names, declarations) of a style sheet, "names {declarations} ...". Cut at the braces:
    a regular expression would try again from every letter of a sheet that has none."""
    for part in sheet.split("}")[:-1]:
        names, text = ["", *part.split("{")][-2:]
        if names:
            yield names, text


def rules(sheet: str) -> dict:
    """{tag or .class: style} of a style sheet, "name, name {declarations} ..."."""
    found = {}
    for names, text in parse_sheet(sheet):
        for name in names.split(","):
            found.setdefault(name.strip(), {}).update(declarations(text)[0])
    return found


DEFAULTS = rules(DEFAULT_STYLES)


# ---- measuring and placing ----------------------------------------------------------------------

@lru_cache(maxsize=4096)
def text_width(word: str, size: float) -> float:
    """The width of a word; size: of the font, 0 or at least 1."""
    return font(size).getlength(word) if size else 0.0


def add_inline(node: Node, line: Node, space: bool) -> bool:
    """Add the words and boxes of a node to a line of text. space: whether there is white space
    before; returns whether there is white space at the end."""
    style, size = inherited_style(node.style), node.style["font-size"]
    for child in node.children:
        if isinstance(child, str):
            space |= child[:1].isspace()
            for word in child.split():
                # the font has ASCII only, and characters that are not drawn must not count
                word = re.sub("[^!-~]", "?", word)
                line.kids.append(Node(above=line, style=style, link=node.link, text=word,
                                      space=SPACE * size * space, w=text_width(word, size),
                                      h=LINE * size))
                space = True
            space = child[-1:].isspace() or space and not child.strip()
        elif child.style["display"] == "inline" and not child.style["background"]:
            space = add_inline(child, line, space)
        elif child.style["display"] != "none":
            lay_out(child, width_within(child, SIDE, False))
            child.space, space = SPACE * child.style["font-size"] * space, False
            line.kids.append(child)
    return space


def kids_of(node: Node) -> list:
    """Set node.kids, once, and return them: the rows of a table, whose kids are the cells; for
    other elements the block elements, and lines with the inline content between them."""
    def loose(child):
        return isinstance(child, str) or node.style["display"] != "flex" and (
            child.style["display"].startswith("inline"))

    if node.kids is None and node.tag == "table":
        node.kids = [row for row in node.walk() if row.tag == "tr" and row.table is node]
        for row in node.kids:
            row.kids = [cell for cell in row.elements() if cell.tag in CELLS]
    elif node.kids is None:
        closed = node.tag == "details" and "open" not in node.attrs
        shown = [c for c in node.elements() if c.tag == "summary"] if closed else node.children
        node.kids = []
        for inline, group in groupby(shown, loose):
            group = list(group)
            if not inline:
                node.kids += [child for child in group if child.style["display"] != "none"]
            elif any(isinstance(child, Node) or child.strip() for child in group):
                line = Node(children=group, above=node, link=node.link, kids=[],
                            style=inherited_style(node.style) | {"display": "line"})
                add_inline(line, line, False)
                node.kids.append(line)
    return node.kids


def columns(table: Node) -> list[float]:
    """The widths that the columns of a table need."""
    columns = zip_longest(*(row.kids for row in kids_of(table)))
    return [max(natural_width(cell) for cell in column if cell) for column in columns]


def natural_width(node: Node) -> float:
    """The width that a node needs so that no line wraps."""
    style = node.style
    if style["width"] is not None:
        return style["width"]
    if style["display"] == "line":
        return sum(k.w + k.margins()[0] + k.space * (i > 0) for i, k in enumerate(node.kids))
    if node.tag == "table":
        return node.frame()[2] + sum(columns(node))
    sizes = [natural_width(kid) + kid.margins()[0] for kid in kids_of(node)]
    if style["display"] == "flex" and style["flex-direction"] == "row":
        sizes = [sum(sizes) + style["gap"] * (len(sizes) - 1)]
    return node.frame()[2] + max(sizes, default=0)


def width_within(node: Node, room: float, fill: bool) -> float:
    """The width of a node in a space of width `room`. fill: blocks take all of it."""
    if node.style["width"] is not None:
        return node.style["width"]
    if node.style["share"] is not None:
        return node.style["share"] * room
    return room if fill and node.tag != "table" else min(natural_width(node), room)


def lay_out(node: Node, width: float):
    """Lay out a node with this width: set its size and the positions of everything inside."""
    style, (_, _, sides, ends) = node.style, node.frame()
    lay = (wrap if style["display"] == "line" else grid if node.tag == "table" else
           row if style["display"] == "flex" and style["flex-direction"] == "row" else column)
    height = style["height"] and max(0, style["height"] - ends)
    filled = lay(node, max(0, width - sides), height)
    node.w, node.h = width, filled + ends if height is None else style["height"]


# The following functions each lay out one kind of node: they set the positions of the kids in a
# content area `inner` wide (and `height` high, if that is fixed) and return the height they take.

def spread(kids: list, axis: str, spare: float, how: str):
    """Distribute the spare room along an axis: justify-content."""
    for i, kid in enumerate(kids):
        share = i / max(1, len(kids) - 1) if how == "space-between" else SHIFT.get(how, 0)
        setattr(kid, axis, getattr(kid, axis) + max(0, spare) * share)


def wrap(line: Node, inner: float, height: float | None) -> float:
    """Lay out words and boxes in as many rows as they need, vertically centred in each."""
    ends, rows, y = [], [], 0
    for kid in line.kids:
        before, width = kid.space, kid.w + kid.margins()[0]
        if not rows or ends[-1] + before + width > inner + 0.01:
            rows.append([])
            ends.append(0)
            before = 0
        kid.x = ends[-1] + before + kid.style["margin-left"]
        ends[-1] += before + width
        rows[-1].append(kid)
    for kids, end in zip(rows, ends):
        tall = max(kid.h + kid.margins()[1] for kid in kids)
        for kid in kids:
            kid.x += (inner - end) * SHIFT.get(line.style["text-align"], 0)
            kid.y = y + (tall - kid.h - kid.margins()[1]) / 2 + kid.style["margin-top"]
        y += tall
    return y


def column(node: Node, inner: float, height: float | None) -> float:
    """Lay out blocks below one another. Outside of a flex box margins of neighbours collapse."""
    style, kids, y, last = node.style, kids_of(node), 0, 0
    flex = style["display"] == "flex"
    for i, kid in enumerate(kids):
        room, top = inner - kid.margins()[0], kid.style["margin-top"]
        lay_out(kid, width_within(kid, room, not flex or style["align-items"] == "stretch"))
        y += last + top + style["gap"] * (i > 0) if flex else max(last, top)
        slack = (room - kid.w) * SHIFT.get(style["align-items"], 0) * flex
        kid.x, kid.y, last = kid.style["margin-left"] + slack, y, kid.style["margin-bottom"]
        y += kid.h
    if flex and height is not None:
        spread(kids, "y", height - y - last, style["justify-content"])
    return y + last


def row(node: Node, inner: float, height: float | None) -> float:
    """Lay out blocks side by side. Those with a `flex` share the room that the others leave."""
    style, kids, x = node.style, kids_of(node), 0
    room = inner - style["gap"] * (len(kids) - 1) - sum(kid.margins()[0] for kid in kids)
    grow = [kid.style["flex"] for kid in kids]
    widths = [0 if share else width_within(kid, inner, False) for kid, share in zip(kids, grow)]
    if sum(widths) > max(0, room):              # too wide: all shrink by the same factor
        widths = [width * max(0, room) / sum(widths) for width in widths]
    spare = room - sum(widths)
    for kid, width, share in zip(kids, widths, grow):
        lay_out(kid, width + spare * share / sum(grow) if share else width)
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


def grid(table: Node, inner: float, height: float | None) -> float:
    """Lay out the rows of a table. The columns share the width in proportion to their needs."""
    needs, y = columns(table), 0
    for line in table.kids:
        line.x, line.y, line.w, x = 0, y, inner, 0
        for cell, need in zip(line.kids, needs):
            lay_out(cell, need * inner / max(1, sum(needs)))
            cell.x, cell.y, x = x, 0, x + cell.w
        line.h = max((cell.h for cell in line.kids), default=0)
        for cell in line.kids:
            cell.h = line.h
        y += line.h
    return y


# ---- the page -----------------------------------------------------------------------------------

class Block(NamedTuple):
    """A visible run of text in one style."""
    text: str
    box: tuple                          # x0, y0, x1, y1 on the canvas
    color: tuple
    ground: tuple                       # the background colour at its place
    link: Node | None                   # the element that a click on it activates


@cached_mask
def word_mask(word: str, size: float, bold: bool) -> Image.Image:
    """A word as a mask; size: of the font, in pixels."""
    word = word[:ceil(10_000 / size)]   # more would not fit on any canvas
    face, stroke = font(size), 0.03 * size * bold
    mask = Image.new("L", (ceil(face.getlength(word) + 2 * stroke) + 2, ceil(LINE * size)))
    ImageDraw.Draw(mask).text((1, 1.03 * size), word, 255, face, "ls", stroke_width=stroke)
    return mask


class View:
    """A page after layout: `forms` and `words` to draw, and `blocks`, the visible text."""

    def __init__(self, root: Node, color: tuple):
        self.color, self.forms, self.words = color, [], []
        lay_out(root, SIDE)
        self.place(root, 0, 0)
        small = self.image(SIDE // 2, text=False)
        self.texture = np.asarray(small.reduce(4), np.float32)      # the page without its text
        runs = list(self.runs(small))
        self.blocks = [block for block in runs if block]
        fits = all(y + h <= SIDE for _, _, y, _, h, _, _ in self.forms)
        self.complete = fits and None not in runs

    def place(self, node: Node, x: float, y: float):
        """Collect what is to be drawn, from the outside in."""
        x, y, w, h, style = x + node.x, y + node.y, node.w, node.h, node.style
        if node.text:
            self.words.append((x, y, node))
        edge, radius, ink = style["border"], style["border-radius"], style["color"]
        ground, forms = style["background"] or edge and WHITE, self.forms
        if edge:
            forms.append(("plate", x, y, w, h, style["edge"], radius))
        if ground:
            forms.append(("plate", x + edge, y + edge, w - 2 * edge, h - 2 * edge, ground,
                          max(0, radius - edge)))
        if node.tag == "li":                    # signs that are drawn without any style
            forms.append(("circle", x - 9, y + 0.5 * style["font-size"], 4, 4, ink, 0))
        elif node.checkbox() and "checked" in node.attrs:
            forms.append(("tick", x + 2, y + 2, w - 4, h - 4, (30, 120, 60), 0))
        elif node.tag == "summary":             # a minus if it is open, else a plus
            signs = [(10, 1, 8, 2), (7, 4, 2, 8)][:1 if "open" in node.above.attrs else 2]
            forms += [("plate", x + w - right, y + h / 2 - up, *size, ink, 0)
                      for right, up, *size in signs]
        left, top, _, _ = node.frame()
        for kid in node.kids or ():
            self.place(kid, x + left, y + top)

    def image(self, pixels: int, text: bool = True) -> Image.Image:
        """Draw the page -> PIL image, `pixels` wide and high; text=False leaves its text out."""
        image, unit = Image.new("RGB", (pixels, pixels), self.color), pixels / SIDE
        pen = ImageDraw.Draw(image)
        for kind, x, y, w, h, color, radius in self.forms:
            left, top, right, bottom = (min(pixels, round(c * unit)) for c in (x, y, x + w, y + h))
            # half the canvas at most, as a box that reaches far out of it may be huge
            r = min(round(radius * unit), (right - left) // 2, (bottom - top) // 2, pixels // 2)
            if kind != "plate":
                image.paste(color, (left, top), shape_mask(kind, max(1, bottom - top)))
                continue
            # a rectangle with round corners: a cross, and a circle in each corner
            for dx, dy in ((r, 0), (0, r)):
                if left + dx < right - dx and top + dy < bottom - dy:
                    pen.rectangle((left + dx, top + dy, right - dx - 1, bottom - dy - 1), color)
            for corner in product((left, right - 2 * r), (top, bottom - 2 * r)) if r > 0 else ():
                image.paste(color, corner, shape_mask("circle", 2 * r))
        for x, y, word in self.words if text else ():
            size, bold = word.style["font-size"] * unit, word.style["font-weight"] == "bold"
            if x < SIDE and y < SIDE and size >= 1:
                at = round(x * unit) - 1, round(y * unit)
                image.paste(word.style["color"], at, word_mask(word.text, size, bold))
        return image

    def runs(self, ground: Image.Image):
        """Yield a Block for each run of neighbouring words of the same line, style and link; None
        for a run that is too small, has too little contrast, or is not wholly on the canvas."""
        def belongs(placed):
            word = placed[2]
            return word.above, word.link, *(word.style[name] for name in INHERITED)

        for (line, link, color, size, *_), run in groupby(self.words, belongs):
            xs, ys, words = zip(*run)
            box = (min(xs), ys[0] + 0.25 * size,
                   max(x + word.w for x, word in zip(xs, words)), ys[-1] + 1.1 * size)
            if size < LEAST_FONT or min(box) < -1 or max(box) > SIDE + 1:
                yield None
                continue
            at = (int(box[0] / 2), int((box[1] + box[3]) / 4))
            behind = ground.getpixel(tuple(min(c, ground.width - 1) for c in at))
            contrast = sum(abs(a - b) for a, b in zip(color, behind))
            text = "".join(" " * (word.space > 0) + word.text for word in words).strip()
            yield Block(text, box, color, behind, link) if contrast >= LEAST_CONTRAST else None


class Site(HTMLParser):
    """One or several pages as in a browser, with a state that clicks change. Children of the body
    that have an id are separate pages, one of which is shown, at first the first; everything else
    in the body is shown with each of them. `unknown` counts what was not understood. A stray or
    missing end tag is tolerated as in a browser. Raises Broken."""

    def __init__(self, html: str):
        super().__init__()
        self.root = Node()
        self.open, self.nodes, self.unknown, self.css = [self.root], 0, 0, ""
        if len(html) > LONGEST:
            raise Broken(f"longer than {LONGEST} characters")
        try:
            self.feed(html)
            self.close()
        except AssertionError:      # from html.parser; its words quote the page, ours must not
            raise Broken("a declaration <! that cannot be read") from None
        texts = [node.attrs.get("style", "") for node in self.root.walk()]
        texts += [text for _, text in parse_sheet(self.css)]
        self.unknown += sum(declarations(text)[1] for text in texts)
        self.rules = rules(self.css)
        self.body = next((node for node in self.root.walk() if node.tag == "body"), self.root)
        self.pages = {node.attrs["id"]: node for node in self.body.elements()
                      if node.attrs.get("id")}
        self.page, self.seen = next(iter(self.pages), ""), None

    def handle_starttag(self, tag, attrs):
        while self.open[-1].tag in ENDS.get(tag, ()):
            self.open.pop()
        self.nodes += 1
        self.unknown += tag not in DEFAULTS
        if self.nodes > MOST_NODES or len(self.open) > MOST_DEPTH:
            raise Broken(f"more than {MOST_NODES} elements, or deeper than {MOST_DEPTH}")
        node = Node(tag, {name: value or "" for name, value in attrs}, above=self.open[-1])
        node.table = node if tag == "table" else None if tag in CELLS else node.above.table
        node.above.children.append(node)
        if tag not in VOID:
            self.open.append(node)
        elif tag == "input" and not node.checkbox():
            node.children.append(node.attrs.get("value") or node.attrs.get("placeholder", ""))

    def handle_endtag(self, tag):
        depth = max((i for i, node in enumerate(self.open) if node.tag == tag), default=None)
        if depth:
            del self.open[depth:]
        self.unknown += depth is None

    def handle_data(self, data):
        if self.open[-1].tag == "style":
            self.css += data
        elif self.open[-1] is not self.root:
            self.open[-1].children.append(data)
        elif data.strip():
            raise Broken("text outside any element")

    def compute_styles(self, node: Node):
        """Compute the styles of everything below a node, from the weakest rule to the strongest."""
        for child in node.elements():
            child.style = inherited_style(node.style) | DEFAULTS.get(child.tag, {})
            for name in (child.tag, *("." + n for n in child.attrs.get("class", "").split())):
                child.style |= self.rules.get(name, {})
            child.style |= declarations(child.attrs.get("style", ""))[0]
            if child.checkbox():
                child.style |= {"width": 12, "height": 12}
            if child in self.pages.values() and child is not self.pages[self.page]:
                child.style["display"] = "none"
            child.link, child.kids = child if child.tag in CLICKS else node.link, None
            self.compute_styles(child)

    def view(self) -> View:
        """The current view."""
        if self.seen is None:
            self.root.kids = None
            self.compute_styles(self.root)
            self.seen = View(self.root, self.body.style["background"] or WHITE)
        return self.seen

    def click(self, text: str) -> bool:
        """Click on the block with this text. Returns whether there is one and it did something."""
        link = next((b.link for b in self.view().blocks if b.text == text and b.link), None)
        if link is None:
            return False
        boxes = [node for node in link.walk() if node.checkbox()]
        target = link.attrs.get("href", "")[1:]
        if boxes or link.tag == "summary":
            node, mark = (boxes[0], "checked") if boxes else (link.above, "open")
            if node.attrs.pop(mark, None) is None:
                node.attrs[mark] = ""
        elif target in self.pages:
            self.page = target
        else:
            return False
        self.seen = None
        return True


@cached_by_size(lambda view: 100_000 + 600 * len(view.words))
def page_view(html: str, *clicks: str) -> View:
    """The view of a page after clicks on these texts; raises Broken, also where a click fails."""
    site = Site(html)
    for text in clicks:
        if not site.click(text):
            raise Broken("a click has no effect")
    return site.view()
