"""Charts: read a value, or compute with two values.

Every value is printed at its mark, or its mark lies on a gridline, so that a person can read it
exactly; the tolerance of 2.5% forgives a small misreading, not a poor picture. From level 2 on
there is a legend, and only every second gridline has a number.
"""
from dataclasses import dataclass
from math import cos, pi, sin

from PIL import Image, ImageDraw

from .base import box, held, IMAGE, Obs, OneShot, pick, worded
from .draw import blend, Canvas, DARK, ink_on, LIGHT, shades
from .words import invent, MONTHS, some, some_of, THINGS

MEASURES = ("Sales", "Rain", "Guests", "Harvest", "Births", "Fires", "Weddings", "Repairs")
STEPS = (1, 2, 5, 10, 20, 25)               # from one gridline to the next
HUES = ("blue", "orange", "green", "red", "purple", "cyan", "pink")     # yellow fades on white
LEFT, RIGHT, FOOT, PRINT = 8, 61, 56, 2.6   # the edges of the plot and the size of print, in units
ROUND = 3                                   # oversampling of lines and pies, for smooth edges


@dataclass(frozen=True)
class Chart:
    """The data of a chart, before it is drawn."""
    kind: str                   # bar, line, pie or scatter
    title: str
    link: str                   # the words between "the value" and a name: in, of, at x =
    series: dict                # name of the series ("" if there is only one) -> {name: value}
    step: int = 0               # between gridlines; 0: the values are printed
    across: int = 0             # the same along x, where that is an axis of numbers; else 0

    @property
    def facts(self) -> list[tuple]:
        """(series, name, value) of each value."""
        return [(s, name, value) for s in self.series for name, value in self.series[s].items()]

    def call(self, series, name) -> str:
        """The words for one value, such as "the value of Belun in Mar"."""
        what = "share" if self.kind == "pie" else "value"
        return f"the {what}{series and f' of {series}'} {self.link} {name}"

    def one_series(self, rng):
        """({name: value} of a random series, the words that name the series in a question)."""
        name = pick(rng, list(self.series))
        return self.series[name], name and f" of {name}"


def random_chart(rng, level: int, heldout: bool) -> Chart:
    """A chart with random values: 3 to 7 names, up to three series."""
    kind, n, k = pick(rng, ("bar", "line", "pie", "scatter")), 3 + level, (1, 1, 2, 2, 3)[level]
    towns, measure = [invent(rng, heldout)], pick(rng, MEASURES)
    title = f"{measure} by town" if k > 1 and kind != "pie" else f"{measure} in {towns[0]}"
    if kind == "pie":
        names, shares = some(rng, [word for word in THINGS if len(word) <= 6], n, heldout), []
        while len(set(shares)) < n:     # all different, and wide enough for their numbers
            shares = [6 + int(p * (100 - 6 * n)) for p in rng.dirichlet([2.5] * n)[1:].tolist()]
            shares.append(100 - sum(shares))
        return Chart(kind, f"{title}, percent", "of", {"": dict(zip(names, shares))})
    first, gap = int(rng.integers(1950, 1990)), pick(rng, (1, 2, 5))
    names = MONTHS[first % 5:][:n] if rng.integers(2) else range(first, first + n * gap, gap)
    if k == 1 and kind == "bar" and rng.integers(2):
        return Chart(kind, title, "in", {"": dict(zip(names, some_of(rng, range(12, 99), n)))})
    while len(towns) < k:
        towns = sorted({*towns, invent(rng, heldout)})
    step, across = pick(rng, STEPS), pick(rng, STEPS) if kind == "scatter" else 0
    while True:                 # until no mark hides another and each series has one maximum
        heights = (2 + rng.random((n, 9)).argsort(1)[:, :k]).T.tolist()
        columns = [sorted(some_of(rng, range(10), n)) if across else range(n) for _ in range(k)]
        marks = {mark for places in zip(columns, heights) for mark in zip(*places)}
        if len(marks) == n * k and all(ys.count(max(ys)) == 1 for ys in heights):
            break
    series = {town: {(x + 1) * across if across else names[x]: y * step for x, y in zip(xs, ys)}
              for town, xs, ys in zip(towns if k > 1 else [""], columns, heights)}
    return Chart(kind, title, "at x =" if across else "in", series, step, across)


class Plot(Canvas):
    """The picture of a chart."""

    def __init__(self, chart: Chart, rng, level: int, heldout: bool, pixels: int):
        self.chart, self.level, self.head = chart, level, 15 if len(chart.series) > 1 else 11
        hues, x = None, None    # one in five designs is held out
        while not hues or held(f"{chart.kind} {x} {hues[:3]}") != heldout:
            hues, x = some_of(rng, HUES), pick(rng, (LEFT, 32))
        self.ground, self.ink = LIGHT[heldout], DARK[heldout]
        if level >= 3 and rng.integers(4) == 0:
            self.ground, self.ink = self.ink, self.ground
        super().__init__(pixels, self.ground)
        colors = shades(rng, heldout)
        self.hues = [blend(colors[hue], self.ink, 0.15) for hue in hues]
        self.put(chart.title, x, 4.2, "l" if x == LEFT else "m", size=3.6)
        if chart.kind == "pie":
            return self.pie(chart.series[""])
        self.axes(next(iter(chart.series.values())))
        self.legend(filter(None, chart.series), LEFT, 9.2, 18, 0)
        for j, values in enumerate(chart.series.values()):
            self.marks(values, j)

    def put(self, text, x, y, anchor="m", color=None, size=PRINT):
        """Print a text, in ink unless a colour is given."""
        self.word(str(text), x, y, color or self.ink, size, anchor)

    def legend(self, labels, x, y, right, down):
        """Draw labels with their colours, from (x, y) on, each `right` and `down` of the last."""
        for i, (label, hue) in enumerate(zip(labels, self.hues)):
            self.plate(x + i * right, y + i * down - 1.2, 2.4, 2.4, hue, 0.5)
            self.put(label, x + i * right + 3.6, y + i * down, "l")

    def spot(self, name, value, i):
        """(x, y) of a mark. x is the middle of the i-th slot, or the number `name` on an axis."""
        across = 10 * self.chart.across
        share = name / across if across else (i + 0.5) / self.slots
        return LEFT + (RIGHT - LEFT) * share, FOOT - (FOOT - self.head) * value / self.top

    def axes(self, names):
        """Draw the axes with their gridlines and numbers, and the names below."""
        step, across, self.slots = self.chart.step or 10, self.chart.across, len(names)
        every = 1 if self.chart.step and self.level < 2 else 2      # gridlines for each number
        self.top = -(-max(fact[2] for fact in self.chart.facts) // (every * step)) * every * step
        lines = [blend(self.ground, self.ink, share) for share in (0.3, 0.12)]
        for i in range(self.top // step + 1):
            y = self.spot(0, i * step, 0)[1]
            self.pen.line(self.at(LEFT, y, RIGHT, y), lines[i % every > 0])
            self.put("" if i % every else i * step, LEFT - 1, y, "r")
        for i, name in enumerate(range(0, 11 * across, across) if across else names):
            x = self.spot(name, 0, i)[0]
            if across:
                self.pen.line(self.at(x, self.head, x, FOOT), lines[i % every > 0])
            self.put("" if across and i % every else name, x, FOOT + 2.6)
        self.put("x" if across else "", RIGHT + 1.5, FOOT + 5)
        corner = self.at(LEFT, self.head - 1, LEFT, FOOT, RIGHT + 1, FOOT)
        self.pen.line(corner, self.ink, max(1, self.px(0.3)))

    def marks(self, values, j):
        """Draw the bars or the dots of the j-th series, in a line chart also the line."""
        spots = [self.spot(name, value, i) for i, (name, value) in enumerate(values.items())]
        hue, kind, n = self.hues[j], self.chart.kind, len(self.chart.series)
        if kind == "line":
            mask = Image.new("L", [ROUND * self.image.width] * 2)
            path = [ROUND * u for spot in spots for u in self.at(*spot)]
            ImageDraw.Draw(mask).line(path, 255, round(0.6 * ROUND * self.unit), "curve")
            self.image.paste(hue, (0, 0), mask.reduce(ROUND))
        width = min(0.76 * (RIGHT - LEFT) / self.slots / n, 7)
        for (x, y), value in zip(spots, values.values()):
            if kind == "bar":
                x += (j - n / 2) * width
                x0, y0, x1, y1 = map(round, self.at(x, y, x + width, FOOT))
                self.pen.rectangle((x0, y0, x1 - 2, y1 - 1), hue)
                self.put("" if self.chart.step else value, x + width / 2, y - 2)
            else:
                self.shape("circle", x - 1.1, y - 1.1, 2.2, hue)

    def pie(self, values):
        """Draw the slices clockwise from the top; their names around them or in a legend."""
        x, y, r = (24, 35, 20) if self.level >= 2 else (32, 35.5, 18)
        side, start = ROUND * round(2 * r * self.unit), 0
        big = Image.new("RGB", (side, side), self.ground)
        for value, hue in zip(values.values(), self.hues):
            ends = 3.6 * start - 90, 3.6 * (start := start + value) - 90
            ImageDraw.Draw(big).pieslice((0, 0, side - 1, side - 1), *ends, hue, self.ground,
                                         round(ROUND * self.unit / 3))
        self.image.paste(big.reduce(ROUND), tuple(map(round, self.at(x - r, y - r))))
        for (name, value), hue in zip(values.items(), self.hues):
            turn = 2 * pi * (start + value / 2) / 100       # start is 100 here: a full turn
            right, down, start = sin(turn), -cos(turn), start + value
            self.put(value, x + 0.74 * r * right, y + 0.74 * r * down, "m", ink_on(hue))
            if self.level < 2:
                self.put(name, x + (r + 1.5) * right, y + (r + 2.4) * down, "rl"[right > 0])
        self.legend(values if self.level >= 2 else (), 47.5, y - 2.2 * (len(values) - 1), 0, 4.4)


# How a user may word a question; level 0 has the first of each.
VALUE = ("What is {}?", "Read {} from the chart.", "Which value does the chart show for {}?",
         "Look up {}.", "Tell me {}.")
HIGHEST = ("In which year is the value{} highest?", "Which year has the highest value{}?",
           "When is the value{} highest?", "Name the year of the highest value{}.",
           "In what year is the highest value{}?")
SUM = ("What do {} and {} make together?", "What is the sum of {} and {}?", "Add {} and {}.",
       "How much are {} and {} together?", "What do you get if you add {} and {}?")
DIFFERENCE = ("How much larger is {1} than {0}?", "By how much is {1} larger than {0}?",
              "What is the difference between {} and {}?", "Subtract {} from {}.",
              "How much more is {1} than {0}?")
RATIO = ("By what must one multiply {} to get {}?", "How many times {} is {}?",
         "What is {1}, divided by {0}?", "Divide {1} by {0}.", "What is the ratio of {1} to {0}?")
LATER = ("Which {} after {} has the largest value{}?", "Name the {} after {} with the largest "
         "value{}.", "After {1}, which {0} has the largest value{2}?",
         "Which is the {} after {} with the largest value{}?")
PEAK = ("Where {} is highest, what is the value of {}?", "Where {} is highest, how high is {}?",
        "Look where {} is highest. What is {} there?",
        "What is the value of {1} where {0} is highest?")
SPAN = ("How much larger is the largest value{} than the smallest?",
        "By how much do the largest and the smallest value{} differ?",
        "Subtract the smallest value{} from the largest.",
        "What is the difference between the largest and the smallest value{}?")


class ChartRead(OneShot):
    """Read one value, or find the year of the maximum."""
    tier, min_pixels, verifier = 0, 256, "NUM"
    blind = (0.05,) * 5         # measured: a round number in the middle of the axis

    def make(self):
        rng, self.chart = self.rng, random_chart(self.rng, self.level, self.heldout)
        self.shown = [value for _, _, value in self.chart.facts]
        plot = Plot(self.chart, rng, self.level, self.heldout, self.pixels)
        question, gold = self.ask(rng, self.chart)
        return Obs(IMAGE + question, [plot.image]), gold

    def ask(self, rng, chart):
        """(question, answer). Further questions go into `self.more`."""
        asked = [(worded(rng, VALUE, self.level, 1).format(chart.call(series, name)), value)
                 for series, name, value in some_of(rng, chart.facts)]
        values, of = chart.one_series(rng)
        year = max(values, key=values.get)
        if chart.link == "in" and year not in MONTHS and rng.integers(2):
            asked.insert(0, (worded(rng, HIGHEST, self.level, 1).format(of), year))
        self.more = [(question, box(answer)) for question, answer in asked[1:4]]
        return asked[0]


class ChartArith(ChartRead):
    """Two steps: compute with two values, or find one value by means of another."""
    family, tier, verifier = "reasoning", 2, "EX/NUM"

    def ask(self, rng, chart):
        ways, found = (self.pair, self.later, self.peak, self.span), None
        while not found:        # a question that does not fit the chart gives None
            found = pick(rng, ways[:(1, 2, 4, 4, 4)[self.level]])(rng, chart)
        question, gold, self.why = found
        return question, gold

    def pair(self, rng, chart):
        """The sum, the difference or, from level 1 on, the ratio of two values."""
        (*low, b), (*high, a) = sorted(some_of(rng, chart.facts, 2), key=lambda fact: fact[2])
        low, high = chart.call(*low), chart.call(*high)
        sign, gold, forms = pick(rng, (("+", a + b, SUM), ("-", a - b, DIFFERENCE),
                                       ("/", round(a / b, 2), RATIO))[:2 + (self.level > 0)])
        question = worded(rng, forms, self.level, 1).format(low, high)
        why = f"{a} is {high}, {b} is {low}. {a} {sign} {b} = {gold}."
        return (question, gold, why) if a > b else None

    def later(self, rng, chart):
        """The name of the largest value after a given month or year."""
        values, of = chart.one_series(rng)
        if chart.link != "in":
            return None
        start, *names = list(values)[int(rng.integers(len(values) - 3)):]
        told, gold = [values[name] for name in names], max(names, key=values.get)
        what = "month" if gold in MONTHS else "year"
        question = worded(rng, LATER, self.level, 1).format(what, start, of)
        why = f"After {start}: {', '.join(map(str, told))}. The largest is that of {gold}."
        return (question, gold, why) if told.count(max(told)) == 1 else None

    def peak(self, rng, chart):
        """The value of one series where another has its maximum."""
        if len(chart.series) == 1 or chart.across:
            return None
        (one, values), (two, others), *_ = some_of(rng, [*chart.series.items()])
        name = max(values, key=values.get)
        return (worded(rng, PEAK, self.level, 1).format(one, two), others[name],
                f"{one} is highest in {name}; there {two} is {others[name]}.")

    def span(self, rng, chart):
        """The difference between the largest and the smallest value of a series."""
        values, of = chart.one_series(rng)
        high, low = max(values.values()), min(values.values())
        return (worded(rng, SPAN, self.level, 1).format(of), high - low,
                f"The largest is {high}, the smallest {low}. {high} - {low} = {high - low}.")

    def glance(self, rng):
        a, b = some_of(rng, self.shown, 2)
        return box(a + b if rng.integers(2) else abs(a - b))
