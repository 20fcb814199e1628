"""Web pages: write the HTML of a picture; correct a draft until it looks right.

`likeness` is our own measure, after the idea of Design2Code: it matches blocks of text and compares
their wording, position and colour, and the background. It is not that benchmark's score and must
not be reported under its name. Whether a page works when it is clicked is scored separately, after
Vision2Web.
"""
import math
import re
from collections import Counter
from functools import lru_cache
from itertools import cycle
from os.path import commonprefix
from string import Template

import numpy as np

from .base import box, Env, held, IMAGE, Obs, OneShot, pick, quoted, Step
from .draw import blend, ink_on, shades
from .html_render import Broken, page_view, SIDE, Site, View
from .verify import boxed, distance, parse_action, set_f1
from .words import invent, some, some_of, THINGS

SAME_TEXT, LEAST_SHARED = 0.5, 0.3      # less likeness than this: another text; another page


# ---- the score ----------------------------------------------------------------------------------

@lru_cache(maxsize=4096)
def lab(rgb: tuple) -> tuple:
    """CIELAB of an sRGB colour under D65."""
    r, g, b = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb)
    x, y, z = ((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047,
               0.2126729 * r + 0.7151522 * g + 0.0721750 * b,
               (0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883)
    x, y, z = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ciede2000(one: tuple, other: tuple) -> float:
    """The perceived difference of two CIELAB colours, CIEDE2000 (CIE 142, Sharma et al.)."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    c7 = ((math.hypot(a1, b1) + math.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * math.sqrt(c7 / (c7 + 25 ** 7))
    c1, c2 = math.hypot(a1 * stretch, b1), math.hypot(a2 * stretch, b2)
    h1, h2 = (math.degrees(math.atan2(b, a * stretch)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = h2 - h1 if abs(h2 - h1) == 180 else (h2 - h1 + 180) % 360 - 180
    dh = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2))        # 0 where one is grey
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    hue = (h1 + h2) / 2
    if abs(h1 - h2) > 180:
        hue += 180 if h1 + h2 < 360 else -180
    cos = [math.cos(math.radians(k * hue - at)) for k, at in ((1, 30), (2, 0), (3, -6), (4, 63))]
    t = 1 - 0.17 * cos[0] + 0.24 * cos[1] + 0.32 * cos[2] - 0.20 * cos[3]
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2))
    dc, dh = (c2 - c1) / (1 + 0.045 * chroma), dh / (1 + 0.015 * chroma * t)
    bend = 2 * math.sqrt(chroma ** 7 / (chroma ** 7 + 25 ** 7))
    bend *= -math.sin(math.radians(60 * math.exp(-((hue - 275) / 25) ** 2)))
    return math.sqrt(max(0, dl * dl + dc * dc + dh * dh + bend * dc * dh))


def assign(cost: np.ndarray) -> list[tuple[int, int]]:
    """The assignment of each row to a column of its own with the least total cost (rows <= columns)
    as [(row, column)]: the Hungarian method, with one shortest augmenting path for each row."""
    rows, columns = cost.shape
    u, v, owner = np.zeros(rows + 1), np.zeros(columns + 1), np.zeros(columns + 1, int)
    for i in range(1, rows + 1):
        owner[0], j = i, 0              # the path starts at column 0, which is not part of `cost`
        least, way = np.full(columns + 1, np.inf), np.zeros(columns + 1, int)
        seen = np.zeros(columns + 1, bool)
        while owner[j]:
            seen[j] = True
            reduced = np.append(np.inf, cost[owner[j] - 1] - u[owner[j]] - v[1:])
            better = ~seen & (reduced < least)
            least[better], way[better] = reduced[better], j
            nearest = int(np.where(seen, np.inf, least).argmin())
            step = least[nearest]
            u[owner[seen]] += step
            v[seen] -= step
            least -= step
            j = nearest
        while j:
            owner[j], j = owner[way[j]], way[j]
    return [(int(owner[j]) - 1, j - 1) for j in range(1, columns + 1) if owner[j]]


@lru_cache(maxsize=4096)
def text_likeness(a: str, b: str) -> float:
    """1 - edits / longer length; 0, without computing it, if the letters show it is too small."""
    most = max(len(a), len(b))
    enough = sum((Counter(a) & Counter(b)).values()) >= SAME_TEXT * most
    return 1 - distance(a, b) / most if enough else 0.0


def likeness(page: View, gold: View) -> float:
    """How similar two pages look, from 0 to 1. F1 of the visible words (0 below LEAST_SHARED) times
    the mean of five scores: the share of the text that is matched, by size; wording; position (0 at
    a quarter of the canvas or more); colour; and the page without its text. [O]"""
    mine, theirs = page.blocks, gold.blocks
    words = [Counter(" ".join(b.text for b in blocks).split()) for blocks in (mine, theirs)]
    shared = set_f1(words[0].total(), words[1].total(), (words[0] & words[1]).total())
    if shared < LEAST_SHARED or not words[1]:
        return 0.0
    exact = {b.text for b in mine} & {b.text for b in theirs}
    same = np.array([[float(a.text == b.text) if a.text in exact or b.text in exact else
                      text_likeness(a.text, b.text) for b in theirs] for a in mine])
    a, b = (np.array([block.box for block in blocks]) for blocks in (mine, theirs))
    size_a, size_b = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (a, b))
    # distance of the middles along x or y, whichever is longer, in canvas sizes
    apart = np.abs(a[:, None, :2] + a[:, None, 2:] - b[:, :2] - b[:, 2:]).max(2) / 2 / SIDE
    cost = 1 - same + 0.1 * apart
    pairs = assign(cost) if len(mine) <= len(theirs) else [(i, j) for j, i in assign(cost.T)]
    pairs = [(i, j) for i, j in pairs if same[i, j] >= SAME_TEXT]
    if not pairs:
        return 0.0
    i, j = map(list, zip(*pairs))
    far = [ciede2000(lab(mine[i].color), lab(theirs[j].color)) for i, j in pairs]
    flat = np.abs(gold.texture - np.median(gold.texture, (0, 1))).mean()
    parts = (2 * sum(np.minimum(size_a[i], size_b[j])) / sum([*size_a, *size_b]),
             same[i, j].mean(),
             np.maximum(0, 1 - 4 * apart[i, j]).mean(),
             np.maximum(0, 1 - np.array(far) / 50).mean(),
             max(0, 1 - np.abs(page.texture - gold.texture).mean() / max(flat, 8)))
    return min(1.0, shared * float(np.mean(parts)))


def open_site(html: str) -> Site | None:
    """The Site of a page, or None for a broken one."""
    try:
        return Site(html)
    except Broken:
        return None


def visit(html: str, path: list) -> View | None:
    """The view of a page after clicks on these texts; None if it is broken or a click fails."""
    try:
        return page_view(html, *path)
    except Broken:
        return None


@lru_cache(maxsize=1024)
def page_score(html: str, gold: str) -> float:
    """The likeness of the first views of two pages; 0 for a broken one."""
    view = visit(html, [])
    wanted = page_view(gold)           # raises if gold is broken: an error, not a zero
    return likeness(view, wanted) if view else 0.0


def relative_rewards(scores: list, reference: float | None = None) -> list[float]:
    """RVPO: rewards of a group of replies from their scores, None for a failed render. A failed
    render gets -1; when polishing, a score below the reference gets 0; any other gets 1, plus 1 for
    each reply with a lower score and 1/2 for each other with an equal one. [C]"""
    rank = [-1.0 if score is None else score for score in scores]
    return [-1.0 if score is None else 0.0 if reference is not None and score < reference else
            0.5 + sum((score > other) + 0.5 * (score == other) for other in rank)   # 1/2: itself
            for score in scores]


# ---- workflow -----------------------------------------------------------------------------------

def attempt(site: Site, act: str, text: str) -> bool:
    """Carry out one step and return whether it succeeds: "click" a text; or assert that it can be
    seen ("see") or not ("gone"), that its box is "ticked", or that this "page" is shown."""
    if act == "click":
        return site.click(text)
    if act == "page":
        return site.page == text
    blocks = [block for block in site.view().blocks if block.text == text]
    if act == "ticked":
        return any("checked" in n.attrs for b in blocks if b.link for n in b.link.walk())
    return bool(blocks) == (act == "see")


def run_workflow(html: str, chains: list) -> list[str]:
    """Run chains of (act, text), each from a freshly opened page. Returns "passed", "failed" or,
    after a failed step of the chain, "blocked" for every step. [R] Vision2Web"""
    found = []
    for chain in chains:
        site, verdict = open_site(html), "passed"
        for act, text in chain:
            fine = site and verdict == "passed" and attempt(site, act, text)
            verdict = "passed" if fine else "failed" if verdict == "passed" else "blocked"
            found.append(verdict)
    return found


def appearance(evidence: dict) -> float:
    """REND: the mean likeness over the pages, each opened through its link."""
    html, gold = boxed(evidence["reply"]) or "", evidence["gold"]
    views = [(visit(html, path), visit(gold["html"], path)) for path in gold["paths"]]
    return sum(likeness(view, wanted) for view, wanted in views if view) / len(views)


def workings(evidence: dict) -> float:
    """The share of the steps of the workflow that pass."""
    found = run_workflow(boxed(evidence["reply"]) or "", evidence["gold"]["flow"])
    return found.count("passed") / len(found)


# ---- made-up pages ------------------------------------------------------------------------------

PHRASES = ("One {} for every {}", "The {} goes with the {}", "One {} and one {} a day",
           "From the {} to the {}", "Bring the {}, take the {}", "No {} without the {}")
VERBS = ("Get", "Order", "See", "Try", "Take", "Send")
STYLES = """\
body{background:$ground;color:$ink}
.bar{display:flex;justify-content:space-between;align-items:center;padding:8px 12px;$bold}
.at{color:$on_bold}
.top{padding:6px 12px 0}
.pale{color:$pale;font-size:11px}
.go{$lively;$round;font-weight:bold}
.hero{padding:12px;text-align:$lean}
.who{display:flex;gap:8px;padding:5px 12px;align-items:center}
.face{width:44px;height:44px;border-radius:22px;background:$second}
.row{display:flex;gap:8px;padding:5px 12px}
.tile{flex:1;background:$card;padding:8px;border:1px solid $line;$round;text-align:center}
.big{${tint}font-size:18px}
.card{flex:1;background:$card;padding:8px;border:1px solid $line;$round}
.art{width:60px;height:30px;background:$second;$round}
.list{padding:5px 12px}
.wide{width:100%;background:$card;border:1px solid $line}
.head{$bold}
.form{padding:5px 12px}
.note{margin:6px 12px;padding:8px;$bold;$round;text-align:$lean}
.more{margin:6px 12px;padding:6px 8px;background:$card;$round}
"""
# A part of a page: (approximate height; its classes; a field whose text is drawn first, or ""; its
# HTML). Every tag begins a new line, except those that match IN_LINE.
PARTS = {
    "hero": (92, "hero pale go", "", '<div class="hero"><h1>$name $word</h1>'
             '<p class="pale">$phrase</p><button class="go">$verb $word</button></div>'),
    "profile": (54, "face pale who", "", '<div class="who"><img class="face"><div>'
                '<h3>$name $name</h3><span class="pale">$phrase</span></div></div>'),
    "stats": (62, "tile big pale row", "", '<div class="row">' + 3 * '<div class="tile">'
              '<div class="big">$figure</div><div class="pale">$word</div></div>' + "</div>"),
    "cards": (105, "card art pale row", "$art", '<div class="row">' + 2 * '<div class="card">'
              '$first<h3>$Word</h3><p class="pale">$phrase</p></div>' + "</div>"),
    "items": (100, "list", "", '<div class="list"><h2>$name</h2><ul>' + 3 * "<li>$phrase</li>" +
              "</ul></div>"),
    "table": (104, "wide head row", "", '<div class="row"><table class="wide"><tr class="head">' +
              3 * "<th>$name</th>" + "</tr>" + 3 * "<tr><td>$word</td><td>$count</td>"
              "<td>$count</td></tr>" + "</table></div>"),
    "form": (76, "form go", "$name $word", '<div class="form"><h3>$name</h3><p><input '
             'placeholder="$name $word"> <button class="go">$verb $word</button></p>'
             '<label><input type="checkbox"> $first</label></div>'),
    "note": (44, "note", "", '<div class="note">$phrase</div>'),
    "more": (58, "more pale", "", '<details open class="more"><summary>$name</summary>'
             '<p class="pale">$phrase</p></details>'),
}
IN_LINE = "/?t[hd]|/tr|input|/p"


def code(color) -> str:
    """A colour in HTML, #rrggbb."""
    return "#%02x%02x%02x" % tuple(color)


class Writer:
    """Writes the parts of a page in one style: palette, corner radius, text alignment."""

    def __init__(self, rng, heldout: bool, dark: bool):
        colors = list(shades(rng, heldout).values())
        first, second = rng.permutation(len(colors))[:2].tolist()
        strong, second = blend(colors[first], (0, 0, 0), 0.2), colors[second]
        base, shares = ((24, 26, 34), (0.03, 0.12)) if dark else ((255, 255, 255), (0.09, 0))
        ground, card = (blend(base, strong, share) for share in shares)
        ink = blend(ink_on(card), card, 0.12)
        radius, lean = pick(rng, (0, 4, 9)), pick(rng, ("left", "center"))
        colors = {"ground": ground, "card": card, "strong": strong, "second": second, "ink": ink,
                  "pale": blend(ink, card, 0.35), "line": blend(ink, card, 0.8),
                  "on_bold": ink_on(strong)}
        bold, lively = (f"background:{code(c)};color:{code(ink_on(c))}" for c in (strong, second))
        tint = f"color:{code(strong)};" if ink_on(card) == (0, 0, 0) else ""
        styles = Template(STYLES).substitute({name: code(rgb) for name, rgb in colors.items()},
                                             bold=bold, lively=lively, tint=tint, lean=lean,
                                             round=f"border-radius:{radius}px")
        self.rules = {line.partition("{")[0].strip("."): line for line in styles.splitlines()}
        self.look = f"{first} {radius} {lean} {dark}"
        words, said = cycle(some(rng, THINGS, 20, heldout)), set()

        def new(make):
            """A text that is not yet on the page, so that every text is in one place only."""
            while (text := make()) in said:
                pass
            said.add(text)
            return text

        self.draw = {
            "name": lambda: new(lambda: invent(rng, heldout)),
            "phrase": lambda: new(lambda: pick(rng, PHRASES).format(next(words), next(words))),
            "word": lambda: next(words), "Word": lambda: next(words).capitalize(),
            "verb": lambda: pick(rng, VERBS), "first": lambda: self.first,
            "figure": lambda: rng.integers(10, 1000), "count": lambda: rng.integers(1, 900),
            "art": lambda: pick(rng, ("", '<img class="art">'))}

    def __getitem__(self, field: str):
        """A value for $field in the HTML of a part, drawn anew for each occurrence."""
        return self.draw[field]()

    def part(self, kind: str) -> str:
        """The HTML of a part with new texts."""
        _, _, first, html = PARTS[kind]
        self.first = Template(first).substitute(self)
        return Template(html).substitute(self)


class Page:
    """A random page for a level, at level 4 a site of two pages. html: its source; paths: for each
    page the texts to click; views: of each page; parts: the names of its parts."""
    amounts = (1, 1, 2, 3, 2)

    def __init__(self, rng, heldout: bool, level: int):
        while not self.make(rng, heldout, level):
            pass

    def make(self, rng, heldout, level) -> bool:
        """Draw a page. Returns whether it belongs to the split and fits the canvas."""
        writer = Writer(rng, heldout, level >= 2 and rng.integers(4) == 0)
        links = [writer["name"] for _ in range(2 + (level < 4))] if level else []
        kinds, names = list(PARTS)[:4 if level == 0 else None], links if level == 4 else [""]
        self.parts = [some_of(rng, kinds, self.amounts[level]) for _ in names]
        high = max(sum(PARTS[part][0] for part in parts) for parts in self.parts)
        if held(f"{self.parts} {writer.look}") != heldout or high > (185 if level == 4 else 222):
            return False
        classes, body = ["body"], ""
        if level:
            bar = "".join(f'<a class="at" href="#{name.lower()}">{name}</a>' for name in links)
            body = f'<div class="bar"><b>{writer["name"]}</b>{bar}</div>'
            classes += ["bar", "at"]
        for name, parts in zip(names, self.parts):
            html = "".join(writer.part(part) for part in parts)
            classes += " ".join(PARTS[part][1] for part in parts).split()
            if level in (0, 4):
                html = f'<h1 class="top">{name or writer["name"]}</h1>{html}'
                classes.append("top")
            body += f'<div id="{name.lower()}">{html}</div>' if name else html
        styles = "\n".join(writer.rules[name] for name in dict.fromkeys(classes))
        body = re.sub(f"><(?!{IN_LINE})", ">\n<", f"<body>{body}</body>")
        self.html = f"<style>\n{styles}\n</style>\n{body}"
        self.links, self.paths = links, [[], [links[1]]] if level == 4 else [[]]
        self.views = [visit(self.html, path) for path in self.paths]
        return all(view and view.complete for view in self.views)

    def workflow(self) -> list:
        """Chains of steps, as for `run_workflow`, that should work judging by the picture."""
        texts = [{b.text for b in view.blocks} for view in self.views]
        both = set.intersection(*texts) if len(texts) > 1 else set()
        longest = [max(sorted(found - both), key=len) for found in texts]
        flow = [[("see", longest[0])]]
        if len(self.paths) > 1:
            flow.append([("click", self.links[1]), ("see", longest[1]), ("gone", longest[0]),
                         ("click", self.links[0]), ("see", longest[0])])
        boxes = re.findall('"checkbox"> (.*)</label>', self.html)
        folds = re.findall('<summary>(.*)</summary>\n<p class="pale">(.*)</p>', self.html)
        for path, shown in zip(self.paths, texts):
            go = [("click", text) for text in path]
            flow += [[*go, ("click", text), ("ticked", text)] for text in boxes if text in shown]
            flow += [[*go, ("click", text), ("gone", inside)]
                     for text, inside in folds if inside in shown]
        return flow

    def why(self):
        """The parts from top to bottom, in words."""
        first, *others = [" and ".join(parts) for parts in self.parts]
        return f"From the top: {first}." + "".join(f" Other page: {other}." for other in others)


# ---- categories ---------------------------------------------------------------------------------

class UiToCode(OneShot):
    """Write the HTML of a picture; at level 4 of a site of two pages."""
    family, tier, verifier, min_pixels = "agent", 2, "REND", 256
    blind = (0.0,) * 5          # no page can be guessed
    questions = ("Write this page in HTML, 256 px wide.", "What HTML looks like this? 256 px wide.")
    site = ("Two pages of a site, 256 px wide. Write both as one HTML document: each page is a div "
            "with an id in the body, the bar stands before them, and a link in the bar opens the "
            "page whose heading it names.")

    def make(self):
        page = Page(self.rng, self.heldout, self.level)
        self.views, self.why = page.views, page.why()
        images = [view.image(self.pixels) for view in page.views]
        question = self.site if self.level == 4 else pick(self.rng, self.questions)
        gold = {"html": page.html, "paths": page.paths, "flow": page.workflow()}
        return Obs(IMAGE * len(images) + question, images), gold

    def reply(self, gold):
        return box(gold["html"])

    def glance(self, rng):
        """The right texts, one below another, without any style."""
        return box("\n".join(f"<p>{b.text}</p>" for view in self.views for b in view.blocks))


def edited(html: str, reply: str) -> tuple[str, str]:
    """(the page after a reply, a note on the result). The reply has a whole page between the box
    marks, or lines of edit("old", "new"); an edit is made if `old` occurs exactly once."""
    text = boxed(reply) or ""
    whole = text.startswith("<")
    edits = [] if whole else [parse_action(line) for line in text.split("\n")]
    if not all(e and e[0] == "edit" and [*map(type, e[1])] == [str, str] for e in edits):
        edits = []
    page, made = (text, 1) if whole else (html, 0)
    for _, (old, new) in edits:
        if page.count(old) == 1:
            page, made = page.replace(old, new), made + 1
    try:
        page_view(page)
    except Broken as error:
        return html, f"Not a page: {error}."
    return page, f"{made} of {1 if whole else len(edits)} edits made."


def edit_between(old: str, new: str) -> str:
    """The shortest edit of whole words from one page to the other whose old text occurs once."""
    start = len(commonprefix([old, new]))
    end = len(commonprefix([old[start:][::-1], new[start:][::-1]]))
    while start and old[start - 1] not in " ;{}<>\n":
        start -= 1
    while end and old[-end] not in " ;{}<>\n":
        end -= 1
    while start == len(old) - end or old.count(old[start:len(old) - end]) > 1:
        start, end = max(0, start - 1), max(0, end - 1)
    return f"edit({old[start:len(old) - end]!r}, {new[start:len(new) - end]!r})"


FAULTS = (                      # (pattern of the place, function that returns the replacement)
    (r"(?<=>)[^<>\n]+(?=<)",
     lambda rng, old, heldout: f"{invent(rng, heldout)} {pick(rng, THINGS)}"),
    ("#[0-9a-f]{6}", lambda rng, old, heldout: code(rng.integers(0, 256, 3).tolist())),
    (r"((?<=font-size:)|(?<=padding:)|(?<=width:))\d+(?=px)",
     lambda rng, old, heldout: str(round(int(old) * pick(rng, (0.6, 1.6, 2))))),
    (r"\n<(?!/|div|body|style|table|ul|details).*>(?=\n)", lambda rng, old, heldout: ""))


def add_fault(rng, html: str, heldout: bool) -> str:
    """Put one random fault into a page: another text, colour or size, or a missing line. Returns
    the page unchanged if there is no place for that fault."""
    form, instead = pick(rng, FAULTS)
    found = list(re.finditer(form, html))
    if not found:
        return html
    place = pick(rng, found)
    return html[:place.start()] + instead(rng, place[0], heldout) + html[place.end():]


def closer(evidence: dict) -> float:
    """REND: the share of the draft's difference from gold that was removed."""
    before, after = (page_score(evidence[name], evidence["gold"]) for name in ("draft", "page"))
    return max(0.0, (after - before) / (1 - before))


def kept(evidence: dict) -> float:
    """The share of the draft's right blocks that are still right. A block is right if text and
    colour are equal and its position is off by at most 3 pixels."""
    def right(html):
        blocks = page_view(html).blocks
        return {i for i, b in enumerate(page_view(evidence["gold"]).blocks)
                if any(a.text == b.text and a.color == b.color
                       and all(abs(x - y) <= 3 for x, y in zip(a.box, b.box)) for a in blocks)}

    before, after = right(evidence["draft"]), right(evidence["page"])
    return len(before & after) / len(before) if before else 1.0


class UiPolish(Env):
    """Correct a draft until it looks like a picture; each round shows the new draft."""
    family, tier, verifier, max_turns, min_pixels = "agent", 3, "REND", 4, 256
    blind = (0.0,) * 5          # the draft alone does not show what is wrong
    goal = ("Picture 1 is the page as wanted, picture 2 the draft below. Mend the draft: lines of "
            "edit('old', 'new'), where old stands once in it, or the whole page, between box "
            "marks; then done().")

    def reset(self):
        page = Page(self.rng, self.heldout, min(self.level, 3))
        faults, self.chain = self.level + 1, []     # from the wanted page to the draft
        while len(self.chain) <= faults:
            # sometimes start again: after some faults, any other may make it a different page
            self.chain = self.chain if self.chain and self.rng.integers(40) else [page.html]
            worse, last = add_fault(self.rng, self.chain[-1], self.heldout), self.chain[-1]
            if LEAST_SHARED < page_score(worse, page.html) < page_score(last, page.html) - 0.01:
                self.chain.append(worse)
        self.page, self.turns, self.over = self.chain[-1], 0, False
        images = [page_view(html).image(self.pixels) for html in (page.html, self.page)]
        return Obs(f"{IMAGE}{IMAGE}{self.goal}\n{self.page}", images)

    def step(self, text):
        if self.over:
            return Step(None, True)
        self.turns += 1
        finished = parse_action(str(text)) == ("done", [])
        self.over = finished or self.turns >= self.max_turns
        self.page, note = edited(self.page, str(text))
        if self.over:
            return Step(None, True, truncated=not finished)
        return Step(Obs(IMAGE + quoted(note), [page_view(self.page).image(self.pixels)]), False)

    def evidence(self):
        return {"draft": self.chain[-1], "page": self.page, "gold": self.chain[0]}

    def oracle(self):
        """Two faults a round, the last made first."""
        while not self.over:
            left = self.chain.index(self.page) if self.page in self.chain else 0
            steps = [edit_between(self.chain[i], self.chain[i - 1])
                     for i in range(left, max(0, left - 2), -1)]
            self.why = f"{left} faults are left." if left else "It looks as wanted."
            yield box("\n".join(steps)) if steps else "done()"

    def glance(self, rng):
        """Corrects the fault that was made last, and stops."""
        one = box(edit_between(*self.chain[:-3:-1]))
        return one if self.page == self.chain[-1] else "done()"
