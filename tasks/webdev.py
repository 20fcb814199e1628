"""Web pages: write the HTML of what a picture shows; mend a draft until it looks right.

`likeness` is our own measure, after the idea of Design2Code: matched blocks of text, their wording,
place and colour, and what lies behind them. It is not that benchmark's figure and never stands
under its name. What a page does when it is clicked is scored apart, after Vision2Web.
"""
import math
import re
from collections import Counter
from functools import lru_cache

import numpy as np

from .base import IMAGE, Env, Obs, OneShot, Step, box, held, pick
from .draw import ink_on, shades
from .pages import SIDE, Broken, Site, View, look
from .verify import boxed, distance, parse_action, set_f1
from .words import THINGS, invent, some

SAME_TEXT, LEAST_SHARED = 0.5, 0.3      # below: another text; another page


# --------------------------------------------------------------------------------------- the score

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
    """The colour difference of two CIELAB colours as people see it (CIE 142, Sharma et al.)."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    c7 = ((math.hypot(a1, b1) + math.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * math.sqrt(c7 / (c7 + 25 ** 7))
    c1, c2 = math.hypot(a1 * stretch, b1), math.hypot(a2 * stretch, b2)
    h1, h2 = (math.degrees(math.atan2(b, a * stretch)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = ((h2 - h1 + 180) % 360 - 180 if abs(h2 - h1) != 180 else h2 - h1) if c1 * c2 else 0
    dh = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2))
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    hue = (h1 + h2) / 2 if c1 * c2 else h1 + h2
    if c1 * c2 and abs(h1 - h2) > 180:
        hue += 180 if h1 + h2 < 360 else -180
    cos = [math.cos(math.radians(k * hue - at)) for k, at in ((1, 30), (2, 0), (3, -6), (4, 63))]
    t = 1 - 0.17 * cos[0] + 0.24 * cos[1] + 0.32 * cos[2] - 0.20 * cos[3]
    dl = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2))
    dc, dh = (c2 - c1) / (1 + 0.045 * chroma), dh / (1 + 0.015 * chroma * t)
    bend = 2 * math.sqrt(chroma ** 7 / (chroma ** 7 + 25 ** 7))
    bend *= -math.sin(math.radians(60 * math.exp(-((hue - 275) / 25) ** 2)))
    return math.sqrt(max(0, dl * dl + dc * dc + dh * dh + bend * dc * dh))


def assign(cost: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest pairing of each row with a column of its own (rows <= columns): the Hungarian
    method, one shortest augmenting path a row."""
    rows, columns = cost.shape
    u, v, owner = np.zeros(rows + 1), np.zeros(columns + 1), np.zeros(columns + 1, int)
    for i in range(1, rows + 1):
        owner[0], j = i, 0              # column 0 is where the path starts, not a column of cost
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


@lru_cache(maxsize=16384)
def alike(a: str, b: str) -> float:
    """1 - edits / longer length, worked out only where the letters allow enough of it."""
    most = max(len(a), len(b))
    shared = sum((Counter(a) & Counter(b)).values()) if 2 * min(len(a), len(b)) >= most else 0
    return 1 - distance(a, b) / most if shared >= SAME_TEXT * most else 0.0


def area(block) -> float:
    x0, y0, x1, y1 = block.box
    return (x1 - x0) * (y1 - y0)


def apart(a, b) -> float:
    """How far the middles of two blocks are from one another, the longer way, in canvases."""
    return max(abs(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) for i in (0, 1)) / 2 / SIDE


def likeness(page: View, gold: View) -> float:
    """F1 of visible words (a gate: below 0.3 nothing) times the mean of five likenesses: how much
    of both pages' text is matched, size by size; wording; place (nothing from a quarter of the
    canvas on); colour; and the page without its text, against a canvas of one colour. [O]"""
    words = [Counter(" ".join(b.text for b in view.blocks).split()) for view in (page, gold)]
    shared = set_f1(words[0].total(), words[1].total(), (words[0] & words[1]).total())
    if shared < LEAST_SHARED or not words[1]:
        return 0.0
    mine, theirs = page.blocks, gold.blocks
    exact = {b.text for b in mine} & {b.text for b in theirs}
    same = np.array([[float(a.text == b.text) if a.text in exact or b.text in exact else
                      alike(a.text, b.text) for b in theirs] for a in mine])
    cost = 1 - same + 0.1 * np.array([[apart(a, b) for b in theirs] for a in mine])
    pairs = assign(cost) if len(mine) <= len(theirs) else [(i, j) for j, i in assign(cost.T)]
    pairs = [(mine[i], theirs[j], same[i, j]) for i, j in pairs if same[i, j] >= SAME_TEXT]
    if not pairs:
        return 0.0
    matched = 2 * sum(min(area(a), area(b)) for a, b, _ in pairs)
    flat = np.abs(gold.texture - np.median(gold.texture, (0, 1))).mean()
    parts = (matched / sum(map(area, mine + theirs)),
             np.mean([likely for _, _, likely in pairs]),
             np.mean([max(0, 1 - 4 * apart(a, b)) for a, b, _ in pairs]),
             np.mean([max(0, 1 - ciede2000(lab(a.color), lab(b.color)) / 50) for a, b, _ in pairs]),
             max(0, 1 - np.abs(page.texture - gold.texture).mean() / max(flat, 8)))
    return min(1.0, shared * float(np.mean(parts)))


@lru_cache(maxsize=8192)
def page_score(html: str, gold: str) -> float:
    """The likeness of two pages as they open; 0 for a broken one."""
    wanted = look(gold)                     # a broken gold is an error, not a zero
    try:
        return likeness(look(html), wanted)
    except Broken:
        return 0.0


def relative_rewards(scores: list, reference: float | None = None) -> list[float]:
    """RVPO: rewards within a group of replies, from scores or None where nothing was rendered. -1
    for a failed render; 0 for worse than the reference, when polishing; else 1, and for every
    other reply 1 more if it is beaten, 1/2 if equalled. [C]"""
    rank = [-1.0 if score is None else score for score in scores]
    def wins(i):
        return sum((rank[i] > r) + 0.5 * (rank[i] == r) for j, r in enumerate(rank) if j != i)
    return [-1.0 if score is None else 0.0 if reference is not None and score < reference else
            1.0 + wins(i) for i, score in enumerate(scores)]


# ---------------------------------------------------------------------------------------- workflow

def attempt(site: Site, act: str, text: str) -> bool:
    """One step: click a text; or assert that it is seen or gone, that its box is ticked, or that
    this is the page."""
    if act == "click":
        return site.click(text)
    if act == "page":
        return site.page == text
    blocks = [block for block in site.view().blocks if block.text == text]
    if act == "ticked":
        return any("checked" in n.attrs for b in blocks if b.link for n in b.link.walk())
    return bool(blocks) == (act == "see")


def run_workflow(html: str, chains: list) -> list[str]:
    """Each chain of (act, text) starts from the page as it opens -> passed, failed or, after a
    step that failed, blocked, for every step. [R] Vision2Web"""
    found = []
    for chain in chains:
        site, well = None, True
        for act, text in chain:
            try:
                site = site or Site(html)
                fine = well and attempt(site, act, text)
            except Broken:
                fine = False
            found.append("passed" if fine else "failed" if well else "blocked")
            well = fine
    return found


def appearance(evidence: dict) -> float:
    """REND: the mean likeness over the pages, each reached by the link that leads there."""
    html, gold, scores = boxed(evidence["reply"]) or "", evidence["gold"], []
    for path in gold["paths"]:
        wanted = Site(gold["html"])
        try:
            site = Site(html)
        except Broken:
            return 0.0
        reached = all([wanted.click(text) and site.click(text) for text in path])
        scores.append(likeness(site.view(), wanted.view()) if reached else 0.0)
    return sum(scores) / len(scores)


def workings(evidence: dict) -> float:
    """The share of the workflow's steps that pass."""
    found = run_workflow(boxed(evidence["reply"]) or "", evidence["gold"]["flow"])
    return found.count("passed") / len(found)


# -------------------------------------------------------------------------------- made-up pages

def mixed(a, b, share: float) -> tuple:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))


def code(color) -> str:
    return "#%02x%02x%02x" % tuple(color)


class Writer:
    """Writes pages in one look: a palette, a radius, a side to which things lean."""
    phrases = ("One {} for every {}", "The {} goes with the {}", "One {} and one {} a day",
               "From the {} to the {}", "Bring the {}, take the {}", "No {} without the {}")
    verbs = ("Get", "Order", "See", "Try", "Take", "Send")
    kinds = {"hero": 92, "profile": 54, "stats": 62, "cards": 105, "items": 100, "table": 104,
             "form": 76, "note": 44, "more": 58}        # and about how high they are

    def __init__(self, rng, heldout: bool, dark: bool):
        self.rng, self.heldout = rng, heldout
        colors = list(shades(rng, heldout).values())
        first, second = rng.permutation(len(colors))[:2].tolist()
        self.strong, self.second = mixed(colors[first], (0, 0, 0), 0.2), colors[second]
        base = (24, 26, 34) if dark else (255, 255, 255)
        self.ground, self.card = (mixed(base, self.strong, share) for share in
                                  ((0.03, 0.12) if dark else (0.09, 0)))
        self.ink = mixed(ink_on(self.card), self.card, 0.12)
        self.pale, self.line = (mixed(self.ink, self.card, share) for share in (0.35, 0.8))
        self.radius, self.lean = pick(rng, (0, 4, 9)), pick(rng, ("left", "center"))
        self.look = f"{first} {self.radius} {self.lean} {dark}"
        self.words = some(rng, THINGS, 20, heldout)
        # every text so far; labels that can be ticked; (what opens, what is inside)
        self.said, self.boxes, self.folds = set(), [], []
        self.rules = {"body": f"background:{code(self.ground)};color:{code(self.ink)}"}

    def rule(self, name: str, text: str) -> str:
        """Set down what a class looks like -> its attribute."""
        self.rules["." + name] = text
        return f'class="{name}"'

    def word(self):
        """One of twenty words; a page that needs more meets the first again."""
        self.words.append(self.words.pop(0))
        return self.words[-1]

    def new(self, make) -> str:
        """What was not yet said on the page, so that a text is found in one place."""
        while (text := make()) in self.said:
            pass
        self.said.add(text)
        return text

    def name(self):
        return self.new(lambda: invent(self.rng, self.heldout))

    def phrase(self):
        return self.new(lambda: pick(self.rng, self.phrases).format(self.word(), self.word()))

    def painted(self, color):
        return f"background:{code(color)};color:{code(ink_on(color))}"

    def pale_text(self, tag, text):
        look = self.rule("pale", f"color:{code(self.pale)};font-size:11px")
        return f"<{tag} {look}>{text}</{tag}>"

    def button(self):
        look = self.rule("go", f"{self.painted(self.second)};border-radius:{self.radius}px;"
                               "font-weight:bold")
        return f"<button {look}>{pick(self.rng, self.verbs)} {self.word()}</button>"

    def carded(self, name, more=""):
        return self.rule(name, f"flex:1;background:{code(self.card)};padding:8px;border:1px solid "
                               f"{code(self.line)};border-radius:{self.radius}px{more}")

    def row(self, lines, name="row", more=""):
        look = self.rule(name, "display:flex;gap:8px;padding:5px 12px" + more)
        return [f"<div {look}>", *lines, "</div>"]

    def bar(self, links):
        look = self.rule("bar", "display:flex;justify-content:space-between;align-items:center;"
                                f"padding:8px 12px;{self.painted(self.strong)}")
        at = self.rule("at", f"color:{code(ink_on(self.strong))}")
        return [f"<div {look}>", f"<b>{self.name()}</b>",
                *(f'<a {at} href="#{name.lower()}">{name}</a>' for name in links), "</div>"]

    def hero(self):
        look = self.rule("hero", f"padding:12px;text-align:{self.lean}")
        return [f"<div {look}>", f"<h1>{self.name()} {self.word()}</h1>",
                self.pale_text("p", self.phrase()), self.button(), "</div>"]

    def profile(self):
        face = self.rule("face", f"width:44px;height:44px;border-radius:22px;"
                                 f"background:{code(self.second)}")
        return self.row([f"<img {face}>", "<div>", f"<h3>{self.name()} {self.name()}</h3>",
                         self.pale_text("span", self.phrase()), "</div>"],
                        "who", ";align-items:center")

    def stats(self):
        look, lines = self.carded("tile", ";text-align:center"), []
        big = self.rule("big", f"color:{code(self.strong)};font-size:18px" if ink_on(self.card) ==
                        (0, 0, 0) else "font-size:18px")
        for _ in range(3):
            lines += [f"<div {look}>", f"<div {big}>{int(self.rng.integers(10, 1000))}</div>",
                      self.pale_text("div", self.word()), "</div>"]
        return self.row(lines)

    def cards(self):
        look, lines, images = self.carded("card"), [], self.rng.integers(2)
        art = self.rule("art", f"width:60px;height:30px;background:{code(self.second)};"
                               f"border-radius:{self.radius}px")
        for _ in range(2):
            lines += [f"<div {look}>", *[f"<img {art}>"] * int(images),
                      f"<h3>{self.word().capitalize()}</h3>",
                      self.pale_text("p", self.phrase()), "</div>"]
        return self.row(lines)

    def items(self):
        look = self.rule("list", "padding:5px 12px")
        return [f"<div {look}>", f"<h2>{self.name()}</h2>", "<ul>",
                *(f"<li>{self.phrase()}</li>" for _ in range(3)), "</ul>", "</div>"]

    def table(self):
        look = self.rule("wide", f"width:100%;background:{code(self.card)};"
                                 f"border:1px solid {code(self.line)}")
        head = self.rule("head", self.painted(self.strong))
        lines = [f"<tr {head}><th>{self.name()}</th><th>{self.name()}</th><th>"
                 f"{self.name()}</th></tr>"]
        for i in range(3):
            one, two = self.rng.integers(1, 900, 2).tolist()
            lines.append(f"<tr><td>{self.word()}</td><td>{one}</td><td>{two}</td></tr>")
        return self.row([f"<table {look}>", *lines, "</table>"])

    def form(self):
        self.boxes.append(f"{self.name()} {self.word()}")
        look = self.rule("form", "padding:5px 12px")
        return [f"<div {look}>", f"<h3>{self.name()}</h3>",
                f'<p><input placeholder="{self.name()} {self.word()}"> {self.button()}</p>',
                f'<label><input type="checkbox"> {self.boxes[-1]}</label>', "</div>"]

    def note(self):
        look = self.rule("note", f"margin:6px 12px;padding:8px;{self.painted(self.strong)};"
                                 f"border-radius:{self.radius}px;text-align:{self.lean}")
        return [f"<div {look}>{self.phrase()}</div>"]

    def more(self):
        self.folds.append((self.name(), self.phrase()))
        look = self.rule("more", f"margin:6px 12px;padding:6px 8px;background:{code(self.card)};"
                                 f"border-radius:{self.radius}px")
        return [f"<details open {look}>", f"<summary>{self.folds[-1][0]}</summary>",
                self.pale_text("p", self.folds[-1][1]), "</details>"]

    def page(self, body: list) -> str:
        style = [f"{name}{{{text}}}" for name, text in self.rules.items()]
        return "\n".join(["<style>", *style, "</style>", "<body>", *body, "</body>"])


class Page:
    """A page of a difficulty, or a site of two: its HTML, the links that lead to each of its pages,
    its views, and what it is made of."""
    amounts = (1, 1, 2, 3, 2)

    def __init__(self, rng, heldout: bool, level: int):
        while not self.make(rng, heldout, level):
            pass

    def make(self, rng, heldout, level) -> bool:
        """Whether this draft belongs to the split and fits the canvas."""
        writer = Writer(rng, heldout, level >= 2 and rng.integers(4) == 0)
        links = [writer.name() for _ in range(2 + (level < 4))] if level else []
        kinds, names = list(writer.kinds)[:4 if level == 0 else None], links if level == 4 else [""]
        self.parts = [[kinds[i] for i in rng.permutation(len(kinds))[:self.amounts[level]].tolist()]
                      for _ in names]
        high = max(sum(writer.kinds[part] for part in parts) for parts in self.parts)
        if held(f"{self.parts} {writer.look}") != heldout or high > (185 if level == 4 else 222):
            return False
        body = writer.bar(links) if level else []
        for name, parts in zip(names, self.parts):
            lines = [line for part in parts for line in getattr(writer, part)()]
            if level in (0, 4):
                head = writer.rule("top", "padding:6px 12px 0")
                lines.insert(0, f"<h1 {head}>{name or writer.name()}</h1>")
            body += [f'<div id="{name.lower()}">', *lines, "</div>"] if name else lines
        self.html, self.writer, self.links = writer.page(body), writer, links
        self.paths = [[], [links[1]]] if level == 4 else [[]]
        self.views = [look(self.html)]
        if level == 4 and self.views[0].complete:
            site = Site(self.html)
            site.click(links[1])
            self.views.append(site.view())
        return all(view.complete for view in self.views)

    def workflow(self) -> list:
        """Chains of steps that the picture lets one expect to work."""
        texts = [{b.text for b in view.blocks} for view in self.views]
        both = set.intersection(*texts) if len(texts) > 1 else set()
        longest = [max(sorted(found - both), key=len) for found in texts]
        flow = [[("see", longest[0])]]
        if len(self.paths) > 1:
            flow.append([("click", self.links[1]), ("see", longest[1]), ("gone", longest[0]),
                         ("click", self.links[0]), ("see", longest[0])])
        for path, shown in zip(self.paths, texts):
            go = [("click", text) for text in path]
            flow += [[*go, ("click", text), ("ticked", text)]
                     for text in self.writer.boxes if text in shown]
            flow += [[*go, ("click", text), ("gone", inside)]
                     for text, inside in self.writer.folds if inside in shown]
        return flow

    def why(self):
        """What one sees from the top down."""
        first, *others = [" and ".join(parts) for parts in self.parts]
        return f"From the top: {first}." + "".join(f" Other page: {other}." for other in others)


# -------------------------------------------------------------------------------------- categories

class UiToCode(OneShot):
    """A picture of a page -> its HTML. Levels add parts; at 4 it is a site of two pages."""
    family, tier, verifier, min_pixels = "agent", 2, "REND", 256
    questions = ("Write this page in HTML, 256 px wide.", "What HTML looks like this? 256 px wide.")
    site = ("Two pages of a site, 256 px wide. Write both as one HTML document: each page is a div "
            "with an id in the body, the bar stands before them, and a link in the bar opens the "
            "page whose heading it names.")

    @classmethod
    def chance(cls, level):
        return 0.0              # no page can be guessed

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
        """The right texts below one another, without any style."""
        return box("\n".join(f"<p>{b.text}</p>" for view in self.views for b in view.blocks))


def edited(html: str, reply: str) -> tuple[str | None, int, int]:
    """(the page after a reply, edits made, edits asked for). Between the box marks stands a whole
    page, or lines of edit("old", "new"), each made where old stands exactly once; no page where
    it is neither."""
    text = boxed(reply) or ""
    if text.startswith("<"):
        return text, 1, 1
    actions = [parse_action(line) for line in text.split("\n")]
    if not all(a and a[0] == "edit" and len(a[1]) == 2 and all(type(t) is str for t in a[1])
               for a in actions):
        return None, 0, 0
    made = 0
    for _, (old, new) in actions:
        if html.count(old) == 1:
            html, made = html.replace(old, new), made + 1
    return html, made, len(actions)


def edit_between(old: str, new: str) -> str:
    """The shortest edit of whole words that makes one page of the other, and whose old text is
    found in one place."""
    start, end = 0, 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    while start and old[start - 1] not in " ;{}<>\n":
        start -= 1
    while end and old[-end] not in " ;{}<>\n":
        end -= 1
    while start == len(old) - end or old.count(old[start:len(old) - end]) > 1:
        start, end = max(0, start - 1), max(0, end - 1)
    return f"edit({old[start:len(old) - end]!r}, {new[start:len(new) - end]!r})"


def spoil(rng, html: str, heldout: bool) -> str:
    """One fault put into a page: another text, colour or size, or a line left out; none where
    what was drawn can't be done."""
    kind = pick(rng, ("text", "colour", "size", "gone"))
    form = {"text": r">([^<>\n]+)<", "colour": "#[0-9a-f]{6}",
            "gone": r"\n<(?!/|div|body|style|table|ul|details).*>(?=\n)",
            "size": r"(?:font-size|padding|width):(\d+)px"}[kind]
    found = list(re.finditer(form, html))
    if not found:
        return html
    place = pick(rng, found)
    start, end = place.span(place.re.groups)
    new = {"text": lambda old: f"{invent(rng, heldout)} {pick(rng, THINGS)}",
           "colour": lambda old: code(rng.integers(0, 256, 3).tolist()),
           "size": lambda old: str(round(int(old) * pick(rng, (0.6, 1.6, 2)))),
           "gone": lambda old: ""}[kind](place[place.re.groups])
    return html[:start] + new + html[end:]


def right_blocks(html: str, gold: View) -> set:
    """Which of gold's blocks stand in a page as they should."""
    blocks = look(html).blocks
    return {i for i, b in enumerate(gold.blocks)
            if any(a.text == b.text and a.color == b.color
                   and all(abs(x - y) <= 3 for x, y in zip(a.box, b.box)) for a in blocks)}


def closer(evidence: dict) -> float:
    """REND: how much of what the draft lacked the page has gained."""
    before, after = (page_score(evidence[name], evidence["gold"]) for name in ("draft", "page"))
    return max(0.0, (after - before) / (1 - before))


def kept(evidence: dict) -> float:
    """The share of what was right in the draft that still is."""
    gold = look(evidence["gold"])
    before, after = (right_blocks(evidence[name], gold) for name in ("draft", "page"))
    return len(before & after) / len(before) if before else 1.0


class UiPolish(Env):
    """A page as wanted, a draft with faults, and what the draft looks like: mend it, seeing after
    each round what came of it."""
    family, tier, verifier, max_turns, min_pixels = "agent", 3, "REND", 4, 256
    goal = ("Picture 1 is the page as wanted, picture 2 the draft below. Mend the draft: lines of "
            "edit('old', 'new'), where old stands once in it, or the whole page, between box "
            "marks; then done().")

    @classmethod
    def chance(cls, level):
        return 0.0              # a fault can't be told from the draft alone

    def reset(self):
        page = Page(self.rng, self.heldout, min(self.level, 3))
        faults, self.chain = self.level + 1, []     # from the wanted page to the draft
        while len(self.chain) <= faults:
            # a new start now and then: after some faults, any more makes it another page
            self.chain = self.chain if self.chain and self.rng.integers(40) else [page.html]
            worse, last = spoil(self.rng, self.chain[-1], self.heldout), self.chain[-1]
            if LEAST_SHARED < page_score(worse, page.html) < page_score(last, page.html) - 0.01:
                self.chain.append(worse)
        self.page, self.turns, self.over = self.chain[-1], 0, False
        images = [look(html).image(self.pixels) for html in (page.html, self.page)]
        return Obs(f"{IMAGE}{IMAGE}{self.goal}\n{self.page}", images)

    def step(self, text):
        if self.over:
            return Step(None, True)
        self.turns += 1
        finished = parse_action(str(text)) == ("done", [])
        self.over = finished or self.turns >= self.max_turns
        html, made, asked = edited(self.page, str(text))
        note = f"{made} of {asked} edits made."
        try:
            self.page = html if html is not None and look(html) else self.page
        except Broken as error:
            note = f"Not a page: {error}."
        if self.over:
            return Step(None, True, truncated=not finished)
        return Step(Obs(f"{IMAGE}{note}", [look(self.page).image(self.pixels)]), False)

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
        """One who mends the first fault and thinks that this was all."""
        one = box(edit_between(*self.chain[:-3:-1]))
        return one if self.page == self.chain[-1] else "done()"
