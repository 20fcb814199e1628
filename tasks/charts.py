"""Charts: read a figure off one, or reckon with two of them.

Both categories share one maker. A figure that is asked for is printed at its mark, or the mark
stands on a gridline, so that a person reads it exactly and the 2.5% forgive a slip of the eye, not
a poor picture. From level 2 on there is a legend, and every second gridline is without a number.
"""
from dataclasses import dataclass
from math import cos, pi, sin

from PIL import Image, ImageDraw

from .base import IMAGE, Obs, OneShot, box, held, pick
from .draw import DARK, LIGHT, Canvas, blend, ink_on, shades
from .words import MONTHS, THINGS, invent, some

MEASURES = ("Sales", "Rain", "Guests", "Harvest", "Births", "Fires", "Weddings", "Repairs")
STEPS = (1, 2, 5, 10, 20, 25)               # from one gridline to the next
HUES = ("blue", "orange", "green", "red", "purple", "cyan", "pink")     # yellow fades on white
LEFT, RIGHT, FOOT, PRINT = 8, 61, 56, 2.6   # the edges of the plot and the size of print, in units
ROUND = 3                                   # how much too large slanting forms are drawn


@dataclass(frozen=True)
class Chart:
    kind: str
    title: str
    link: str                   # what leads from "the value" to a name: in, of, at x =
    series: dict                # name of the series ("" where it is alone) -> {name: value}
    step: int = 0               # between gridlines; 0: the values are printed
    across: int = 0             # the same along x, where that is an axis of numbers

    @property
    def facts(self):
        return [(s, name, value) for s in self.series for name, value in self.series[s].items()]

    def call(self, series, name):
        """the value of Belun in Mar"""
        what = "the share" if self.kind == "pie" else "the value"
        return " ".join(filter(None, (what, series and f"of {series}", self.link, str(name))))


def shares(rng, n: int) -> list[int]:
    """n different whole shares of 100, none so thin that its figure finds no room."""
    while True:
        parts = [6 + int(p * (100 - 6 * n)) for p in rng.dirichlet([2.5] * n)[1:].tolist()]
        if len({*parts, 100 - sum(parts)}) == n:
            return [*parts, 100 - sum(parts)]


def draw_up(rng, level: int, heldout: bool) -> Chart:
    """A chart of random figures: 3 to 7 names, up to three series."""
    kind, n, k = pick(rng, ("bar", "line", "pie", "scatter")), 3 + level, (1, 1, 2, 2, 3)[level]
    towns = [town := invent(rng, heldout)]
    title = f"{pick(rng, MEASURES)} in {town}"
    if kind == "pie":
        names = some(rng, [word for word in THINGS if len(word) <= 6], n, heldout)
        return Chart(kind, f"{title}, percent", "of", {"": dict(zip(names, shares(rng, n)))})
    first, gap = int(rng.integers(1950, 1990)), pick(rng, (1, 2, 5))
    names = MONTHS[first % 5:][:n] if rng.integers(2) else range(first, first + n * gap, gap)
    if k == 1 and kind == "bar" and rng.integers(2):
        values = (12 + rng.permutation(87)[:n]).tolist()
        return Chart(kind, title, "in", {"": dict(zip(names, values))})
    while len(towns) < k:
        towns = sorted({*towns, invent(rng, heldout)})
    step, across = pick(rng, STEPS), pick(rng, STEPS) if kind == "scatter" else 0
    while True:                 # no two marks in one place, and each series has one peak
        heights = (2 + rng.random((n, 9)).argsort(1)[:, :k]).T.tolist()
        columns = [sorted(rng.permutation(10)[:n]) if across else range(n) for _ in range(k)]
        marks = {mark for xs, ys in zip(columns, heights) for mark in zip(xs, ys)}
        if len(marks) == n * k and all(ys.count(max(ys)) == 1 for ys in heights):
            break
    series = {town: {int(x + 1) * across if across else names[x]: y * step for x, y in zip(xs, ys)}
              for town, xs, ys in zip(towns if k > 1 else [""], columns, heights)}
    title = f"{title.split()[0]} by town" if k > 1 else title
    return Chart(kind, title, "at x =" if across else "in", series, step, across)


class Plot:
    """A chart on its canvas."""

    def __init__(self, chart: Chart, rng, level: int, heldout: bool, pixels: int):
        self.chart, self.level = chart, level
        while True:             # of all designs, one in five is held out
            hues, x = [HUES[i] for i in rng.permutation(7).tolist()], pick(rng, (LEFT, 32))
            if held(f"{chart.kind} {x} {hues[:3]}") == heldout:
                break
        self.ground, self.ink = LIGHT[heldout], DARK[heldout]
        if level >= 3 and rng.integers(4) == 0:
            self.ground, self.ink = self.ink, self.ground
        colors = shades(rng, heldout)
        self.hues = [blend(colors[hue], self.ink, 0.15) for hue in hues]
        self.canvas = Canvas(pixels, self.ground)
        self.pen, self.at = self.canvas.pen, self.canvas.at
        self.put(chart.title, x, 4.2, "l" if x == LEFT else "m", size=3.6)
        if chart.kind == "pie":
            self.pie(*(24, 35, 20) if level >= 2 else (32, 35.5, 18))
            return
        if len(chart.series) > 1:
            self.legend(chart.series, LEFT, 9.2, 18, 0)
        self.head = 15 if len(chart.series) > 1 else 11
        self.axes(next(iter(chart.series.values())))
        for i, (values, hue) in enumerate(zip(chart.series.values(), self.hues)):
            self.marks(values, hue, i)

    def put(self, text, x, y, anchor="m", color=None, size=PRINT):
        self.canvas.word(str(text), x, y, color or self.ink, size, anchor)

    def legend(self, labels, x, y, right, down):
        for i, (label, hue) in enumerate(zip(labels, self.hues)):
            self.canvas.plate(x + i * right, y + i * down - 1.2, 2.4, 2.4, hue, 0.5)
            self.put(label, x + i * right + 3.6, y + i * down, "l")

    def spot(self, name, value, i):
        """Where a figure stands: in the middle of the i-th slot, or at its number."""
        across = 10 * self.chart.across
        x = LEFT + (RIGHT - LEFT) * (name / across if across else (i + 0.5) / self.slots)
        return x, FOOT - (FOOT - self.head) * value / self.top

    def axes(self, names):
        chart, every = self.chart, 1 if self.chart.step and self.level < 2 else 2
        step, self.slots = chart.step or 10, len(names)
        self.top = -(-max(value for _, _, value in chart.facts) // (every * step)) * every * step
        lines = [blend(self.ground, self.ink, share) for share in (0.3, 0.12)]
        for i in range(self.top // step + 1):
            y = self.spot(0, i * step, 0)[1]
            self.pen.line(self.at(LEFT, y, RIGHT, y), lines[i % every > 0])
            self.put("" if i % every else i * step, LEFT - 1, y, "r")
        for i in range(11 if chart.across else 0):
            x = self.spot(i * chart.across, 0, 0)[0]
            self.pen.line(self.at(x, self.head, x, FOOT), lines[i % every > 0])
            self.put("" if i % every else i * chart.across, x, FOOT + 2.6)
        for i, name in enumerate(() if chart.across else names):
            self.put(name, self.spot(name, 0, i)[0], FOOT + 2.6)
        self.put("x" if chart.across else "", RIGHT + 1.5, FOOT + 5)
        corner = self.at(LEFT, self.head - 1, LEFT, FOOT, RIGHT + 1, FOOT)
        self.pen.line(corner, self.ink, max(1, self.canvas.px(0.3)))

    def marks(self, values, hue, j):
        """The bars or the dots of the j-th series, and the line through them."""
        spots = [self.spot(name, value, i) for i, (name, value) in enumerate(values.items())]
        if self.chart.kind == "line":
            mask = Image.new("L", [ROUND * self.canvas.image.width] * 2)
            path = [ROUND * u for spot in spots for u in self.at(*spot)]
            ImageDraw.Draw(mask).line(path, 255, round(0.6 * ROUND * self.canvas.unit), "curve")
            self.canvas.image.paste(hue, (0, 0), mask.reduce(ROUND))
        width = min(0.76 * (RIGHT - LEFT) / self.slots / len(self.chart.series), 7)
        for (x, y), value in zip(spots, values.values()):
            if self.chart.kind != "bar":
                self.canvas.shape("circle", x - 1.1, y - 1.1, 2.2, hue)
                continue
            x += (j - len(self.chart.series) / 2) * width
            x0, y0, x1, y1 = map(round, self.at(x, y, x + width, FOOT))
            self.pen.rectangle((x0, y0, x1 - 2, y1 - 1), hue)
            self.put("" if self.chart.step else value, x + width / 2, y - 2)

    def pie(self, x, y, r):
        """Slices from the top on, clockwise; their names beside them or, from level 2, aside."""
        values, side, start = self.chart.series[""], round(2 * r * self.canvas.unit), 0
        big = Image.new("RGB", (ROUND * side, ROUND * side), self.ground)
        corners, gap = (0, 0, ROUND * side - 1, ROUND * side - 1), ROUND * self.canvas.unit / 3
        for value, hue in zip(values.values(), self.hues):
            ends = 3.6 * start - 90, 3.6 * (start := start + value) - 90
            ImageDraw.Draw(big).pieslice(corners, *ends, hue, self.ground, round(gap))
        self.canvas.image.paste(big.reduce(ROUND), tuple(map(round, self.at(x - r, y - r))))
        for (name, value), hue in zip(values.items(), self.hues):
            turn = 2 * pi * (start + value / 2) / 100       # a full turn on from where it began
            right, down, start = sin(turn), -cos(turn), start + value
            self.put(value, x + 0.74 * r * right, y + 0.74 * r * down, "m", ink_on(hue))
            if self.level < 2:
                self.put(name, x + (r + 1.5) * right, y + (r + 2.4) * down, "rl"[right > 0])
        if self.level >= 2:
            self.legend(values, 47.5, y - 2.2 * (len(values) - 1), 0, 4.4)


class ChartRead(OneShot):
    """One figure, or the year of a peak."""
    tier, min_pixels, verifier = 0, 256, "NUM"

    @classmethod
    def chance(cls, level):
        return 0.05             # measured: a round number in the middle of the scales

    def make(self):
        self.chart = draw_up(self.rng, self.level, self.heldout)
        plot = Plot(self.chart, self.rng, self.level, self.heldout, self.pixels)
        question, gold = self.ask()
        return Obs(IMAGE + question, [plot.canvas.image]), gold

    def ask(self):
        rng, chart = self.rng, self.chart
        facts = [chart.facts[i] for i in rng.permutation(len(chart.facts)).tolist()]
        asked = [(f"What is {chart.call(series, name)}?", value) for series, name, value in facts]
        values, of = self.one_series()
        year = max(values, key=values.get)
        if chart.link == "in" and year not in MONTHS and rng.integers(2):
            asked.insert(0, (f"In which year is the value{of} highest?", year))
        self.more = [(question, box(answer)) for question, answer in asked[1:4]]
        return asked[0]

    def one_series(self):
        """The values of a series, and the words that name it in a question."""
        name = pick(self.rng, list(self.chart.series))
        return self.chart.series[name], name and f" of {name}"

    def glance(self, rng):
        return box(pick(rng, self.chart.facts)[2])


class ChartArith(ChartRead):
    """Two hops: two figures and what comes of them, or a place that another figure tells."""
    family, tier, verifier = "reasoning", 2, "EX/NUM"

    def ask(self):
        ways = [self.pair, self.later, self.peak, self.span][:(1, 2, 4, 4, 4)[self.level]]
        while not (found := pick(self.rng, ways)()):
            pass                # not every question suits every chart
        return found

    def pair(self):
        facts = self.chart.facts
        two = (facts[i] for i in self.rng.permutation(len(facts))[:2].tolist())
        (*low, b), (*high, a) = sorted(two, key=lambda fact: fact[2])
        low, high = self.chart.call(*low), self.chart.call(*high)
        sign, gold, question = pick(self.rng, (
            ("+", a + b, f"What do {low} and {high} make together?"),
            ("-", a - b, f"How much larger is {high} than {low}?"),
            ("/", round(a / b, 2), f"By what must one multiply {low} to get {high}?"),
        )[:2 + (self.level > 0)])
        self.why = f"{a} is {high}, {b} is {low}. {a} {sign} {b} = {gold}."
        return (question, gold) if a > b else None

    def later(self):
        values, of = self.one_series()
        if self.chart.link != "in":
            return None
        first = int(self.rng.integers(len(values) - 3))
        start, *names = list(values)[first:]
        told = [values[name] for name in names]
        gold = names[told.index(max(told))]
        self.why = f"After {start}: {', '.join(map(str, told))}. The largest is that of {gold}."
        what = "month" if gold in MONTHS else "year"
        question = f"Which {what} after {start} has the largest value{of}?"
        return (question, gold) if told.count(max(told)) == 1 else None

    def peak(self):
        chart = self.chart
        if len(chart.series) == 1 or chart.across:
            return None
        one, two = [list(chart.series)[i] for i in self.rng.permutation(len(chart.series))[:2]]
        name = max(chart.series[one], key=chart.series[one].get)
        gold = chart.series[two][name]
        self.why = f"{one} is highest in {name}; there {two} is {gold}."
        return f"Where {one} is highest, what is the value of {two}?", gold

    def span(self):
        values, of = self.one_series()
        high, low = max(values.values()), min(values.values())
        self.why = f"The largest is {high}, the smallest {low}. {high} - {low} = {high - low}."
        return f"How much larger is the largest value{of} than the smallest?", high - low

    def glance(self, rng):
        facts = self.chart.facts
        a, b = (facts[i][2] for i in rng.permutation(len(facts))[:2].tolist())
        return box(a + b if rng.integers(2) else abs(a - b))
