"""Where things are, in the scenes of scenes.py: the box of one thing that is described by its place
among the others; the boxes of all things of a kind, or of the differences between two pictures; the
frame in which something happens; directions as seen from inside the scene; a scene as JSON.
"""
import json
from collections import Counter
from itertools import product
from math import cos, radians, sin

from .base import box, held, IMAGE, middle, Obs, pick, worded
from .draw import aspect, CELL, COLORS, GRID, shape_mask
from .scenes import by_rows, clear, Item, kinds, offset, plural, refer, Scene
from .verify import KEYS
from .words import some_of

# How a user may word a question. Level 0 has all but the last of each, but one of the last two.
BOX = ("Box the {}.", "Give the box of the {}.", "Draw a box around the {}.",
       "Mark the {} with a box.", "What is the bounding box of the {}?",
       "Show with a box where the {} is.")
BOX_ALL = ("Box all {}.", "Give the boxes of all {}.", "Draw a box around each of the {}.",
           "Mark the {} with boxes.", "What are the bounding boxes of the {}?",
           "Show with boxes where the {} are.")
CHANGED = ("Box what has changed.", "Give the boxes of what differs.", "Box all differences.",
           "Mark what is different with boxes.", "Draw a box around each change.",
           "Show each difference with a box.")
HOW_MANY_IN = ("How many shapes are in the {} picture?", "How many shapes has the {} picture?",
               "Count the shapes in the {} picture.", "How many are in the {} picture?",
               "How many shapes does the {} picture show?")
FIRST_FRAME = ("Which is the first frame {} the {}?", "Name the first frame {} the {}.",
               "What is the number of the first frame {} the {}?",
               "Give the first frame {} the {}.", "Which frame is the first {} the {}?")
ORDER = ("In what order do shapes {}? Name their colors.",
         "Shapes {}: in what order? Name the colors.",
         "Which shapes {} one after the other? Name their colors in this order.",
         "Name the colors of the shapes that {}, in the order in which they do.")
JSON = ("List the shapes as JSON: color, shape, size (small or big), at [x, y].",
        "Give all shapes as JSON with color, shape, size (small or big), at [x, y].",
        "What is in the picture? Answer in JSON: color, shape, size (small or big), at [x, y].",
        "Describe each shape as JSON: color, shape, size (small or big), at [x, y].",
        "Write all shapes down in JSON: color, shape, size (small or big), at [x, y].")
WHAT_AT = ("What is at your {}?", "Which thing is at your {}?", "What do you have at your {}?",
           "Name the thing at your {}.", "Tell me what is at your {}.")
WHERE_AT = ("Where is the {}: {} or {}?", "Where do you have the {}: {} or {}?",
            "On which side is the {}: {} or {}?", "In which direction is the {}: {} or {}?",
            "Tell me where the {} is: {} or {}.")
ENDS = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}     # axis, direction
WAYS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
RANKS = ("first", "second", "third", "fourth")


def ranked(item, items):
    """Expressions such as "second star from the left", if the middles of any two stars lie at least
    half a star apart that way."""
    calls = []
    for name, fits in kinds(item):
        for end, (axis, sign) in ENDS.items():
            line = sorted((other for other in items if fits(other)),
                          key=lambda other: sign * middle(other.area)[axis])
            steps = [sign * offset(b.area, a.area, axis) for a, b in zip(line, line[1:])]
            if 0 < len(steps) < len(RANKS) and min(steps) >= 0.5:
                calls.append(f"{RANKS[line.index(item)]} {name} from the {end}")
    return calls


def ahead(item, anchor, way) -> tuple[float, float]:
    """(distance, aside): how far an item lies from the anchor that way, and to its side, as
    `offset` measures it."""
    axis, sign = WAYS[way]
    return (sign * offset(item.area, anchor.area, axis),
            abs(offset(item.area, anchor.area, 1 - axis)))


def related(item, items):
    """Expressions for an item such as "star left of the blue square". The star must be clearly
    further to the left than above or below, and no other star may lie to the left of the square;
    one that is nearly straight above or below does not."""
    calls, count = [], Counter(other.name for other in items)
    for name, fits in kinds(item):
        rivals = [other for other in items if fits(other) and other is not item]
        anchors = [other for other in items if count[other.name] == 1 and not fits(other)]
        for anchor, way in product(anchors if rivals else [], WAYS):
            far, aside = ahead(item, anchor, way)
            others = [ahead(other, anchor, way) for other in rivals]
            if far > max(0.75, 1.25 * aside) and all(x <= y / 4 for x, y in others):
                calls.append(f"{name} {way} the {anchor.name}")
    return calls


class Grounding(Scene):
    """Scenes with things of several sizes that never touch, not even at level 0."""
    tier, verifier, sizes, gap = 1, "F1", (9, 10, 11, 12, 13), 1


class GroundBox(Grounding):
    """Give the box of the one thing that an expression describes: by its name, from level 2 on also
    by its rank in a row or by its direction from another thing, from 3 on only by these."""
    verifier, blind = "IOU", (0.06, 0.02, 0.01, 0.01, 0.01)

    def make(self):
        target, question = pick(self.rng, self.pairs()), None
        while not question:                     # until an expression describes only the target
            rest = self.others(self.number() - 1, lambda p: self.level >= 3 or p != target,
                               lambda p: p[0] == target[0] or p[1] == target[1])
            image, self.items = self.paint([target, *rest])
            question = self.ask(self.items[0])
        self.more = [(other, self.reply(item.area)) for item in self.items[1:3]
                     if (other := self.ask(item))]
        self.more += self.follow_up(self.items, question, self.items)[-3:]
        self.shown = [item.area for item in self.items]
        return Obs(IMAGE + question, [image]), self.shown[0]

    def ask(self, item):
        """A question for an item's box, or None if no expression describes only this item."""
        if self.level < 2 or self.level == 2 and self.rng.integers(2):
            call = refer(self.rng, item, self.items)
        else:
            calls = pick(self.rng, (ranked, related))(item, self.items)
            call = pick(self.rng, calls) if calls else None
        return call and worded(self.rng, BOX, self.level, 5).format(call)

    def reply(self, gold):
        return box([round(corner) for corner in gold])


class GroundMulti(Grounding):
    """Give the boxes of all red ones or all circles, from level 2 on also of all red circles, from
    3 on also of all circles that are not red."""
    blind = (0.08, 0.01, 0.01, 0.01, 0.01)  # half of the boxes must be right to earn anything
    most, distractors = (3, 3, 4, 4, 5), ((0, 2), (1, 3), (3, 5), (5, 8), (7, 11))

    def make(self):
        rng, (color, shape) = self.rng, pick(self.rng, self.pairs())
        what, fits = (
            (f"{color} ones", lambda c, s: c == color),
            (plural(shape), lambda c, s: s == shape),
            (f"{color} {plural(shape)}", lambda c, s: c == color and s == shape),
            (f"{plural(shape)} that are not {color}", lambda c, s: c != color and s == shape),
        )[int(rng.integers((2, 2, 3, 4, 4)[self.level]))]
        count = 1 + int(rng.integers(self.most[self.level]))
        rest = self.others(self.between(self.distractors), lambda p: not fits(*p),
                           lambda p: p[0] == color or p[1] == shape)
        wanted = [pair for pair in self.pairs() if fits(*pair)]
        image, items = self.paint([pick(rng, wanted) for _ in range(count)] + rest)
        question = worded(rng, BOX_ALL, self.level, 5).format(what)
        self.more = self.follow_up(items, question, items)
        self.shown = [[item.area for item in items]]
        return Obs(IMAGE + question, [image]), self.shown[0][:count]

    def reply(self, gold):
        """The boxes row by row, from left to right."""
        return box([[round(corner) for corner in area] for area in by_rows(gold)])


class SpotDiff(Grounding):
    """Compare two pictures and give the boxes of what is new or gone, from level 1 on also of what
    has another colour, from 2 on another shape. At level 4 each picture has its own noise."""
    blind = (0.04, 0.02, 0.01, 0.01, 0.01)
    objects = ((3, 4), (4, 6), (6, 8), (8, 11), (11, 14))
    changes = ((1, 1), (1, 2), (1, 3), (2, 4), (2, 5))

    def make(self):
        rng, before = self.rng, [pick(self.rng, self.pairs()) for _ in range(self.number())]
        after, n = list(before), self.between(self.changes)
        for i in range(n):
            kind = int(rng.integers(min(4, 2 + self.level)))        # new, gone, colour, shape
            kept = before[i][1 - kind % 2]
            other = pick(rng, [p for p in self.pairs() if kept in p and p != before[i]])
            (after if kind else before)[i] = other if kind > 1 else None
        palette, spots = self.palette(), self.place(len(before))
        (first, old), (second, new) = (self.draw(palette, p, spots) for p in (before, after))
        self.shown = [[(a or b).area] for a, b in zip(old, new)]
        ask = [worded(rng, HOW_MANY_IN, self.level, 4).format(which)
               for which in ("first", "second")]
        self.more = [(question, box(sum(map(bool, pairs))))
                     for question, pairs in zip(ask, (before, after))]
        question = worded(rng, CHANGED, self.level, 5)
        # Noise comes last: it draws more numbers for a larger picture, and everything before it
        # must be the same at every size.
        for canvas in (first, second) if self.level >= 4 else ():
            canvas.noise(rng, 16)
        return Obs(2 * IMAGE + question, [first.image, second.image]), sum(self.shown[:n], [])

    reply = GroundMulti.reply


class VideoEvents(Grounding):
    """Four to twelve frames in which shapes appear, vanish or jump: name the frame in which one of
    them does, or the order in which all of them do. From level 1 on there are other shapes that
    stay, from 2 on they may do something else. Frames are numbered, as in GLM by time. [R]"""
    tier, verifier, sizes = 0, "LIS/NUM", (12,)
    blind = (0.17, 0.11, 0.08, 0.06, 0.05)      # half ask for a frame; an order can't be guessed
    frames = ((4, 4), (5, 6), (6, 8), (8, 10), (10, 12))
    actors, extras = (2, 2, 3, 3, 4), ((0, 0), (1, 1), (1, 2), (2, 3), (3, 4))
    acts = {"appear": "with", "vanish": "without", "jump": "after the jump of"}

    def make(self):
        rng, length, n = self.rng, self.between(self.frames), self.actors[self.level]
        act, *others = some_of(rng, list(self.acts))
        other = pick(rng, [None, *others]) if self.level >= 2 else None
        self.cast = some_of(rng, list(COLORS))[:n + self.between(self.extras)]
        pairs = [pick(rng, [p for p in self.pairs() if p[0] == color]) for color in self.cast]
        acts = [act] * n + [other] * (len(pairs) - n)
        self.shown = range(2, length + 1)
        times = some_of(rng, self.shown, n) + [pick(rng, self.shown) for _ in pairs[n:]]
        jumpers = [i for i, does in enumerate(acts) if does == "jump"]
        places, palette, film = len(pairs) + len(jumpers), self.palette(), []
        spots = self.place(places, [12 if places <= 8 else 9] * places)
        landing = dict(zip(jumpers, spots[len(pairs):]))
        for frame in range(1, length + 1):
            done = [frame >= when and does for does, when in zip(acts, times)]
            shown = [None if did == "vanish" or does == "appear" and not did else pair
                     for pair, does, did in zip(pairs, acts, done)]
            stand = [landing[i] if did == "jump" else spots[i] for i, did in enumerate(done)]
            film.append(self.draw(palette, shown, stand)[0].image)
        items = [Item(*pair, None) for pair in pairs]
        calls = [refer(rng, item, items) for item in items]
        asked = [(worded(rng, FIRST_FRAME, self.level, 4).format(self.acts[does], call), when)
                 for call, does, when in zip(calls, acts, times) if does]
        events = sorted(zip(times, self.cast[:n]))
        told = worded(rng, ORDER, self.level, 3).format(act), [color for _, color in events]
        (question, gold), *rest = [told, *asked] if rng.integers(2) else [*asked, told]
        self.why = "; ".join(f"frame {when}: {color}" for when, color in events)
        self.more = [(later, self.reply(answer)) for later, answer in rest[:4]]
        frames = " ".join(f"{IMAGE}{number}" for number in range(1, length + 1))
        return Obs(f"{frames}\n{question}", film), gold

    def reply(self, gold):
        return box(", ".join(gold) if isinstance(gold, list) else gold)

    def glance(self, rng):
        order = isinstance(self.gold, list)
        return self.reply(some_of(rng, self.cast) if order else pick(rng, self.shown))


SIDES = ("front", "front right", "right", "back right", "back", "back left", "left", "front left")
SKY = ("up", "up right", "right", "down right", "down", "down left", "left", "up left")
STEPS = ((0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1))  # of SKY
TURNS = {"turn right": 2, "turn around": 4, "turn left": 6}                     # in eighths


class SpatialRelation(Grounding):
    """Take the place of an arrow seen from above and say what is at which side. Up to level 1 the
    arrow looks up, so its sides are those of the picture; from level 2 on it looks another way, and
    at level 4 it turns first. There are four sides at levels 0 and 2, else eight."""
    family, tier, verifier = "reasoning", 2, "EX"
    blind = (0.14, 0.08, 0.14, 0.08, 0.08)      # half ask for a side
    objects = ((2, 3), (4, 5), (3, 4), (5, 6), (6, 8))

    def make(self):
        rng, n = self.rng, self.number()
        pairs = some_of(rng, self.pairs(), n)
        apart = 2 if self.level in (0, 2) else 1        # angle between two sides, in eighths
        layout = None           # at level 0 the cells, then only the directions, in order
        while not layout or held(f"{looks} {layout}") != self.heldout:
            looks = 0 if self.level < 2 else 2 * int(rng.integers(1, 4))
            ways = layout = some_of(rng, range(0, 8, apart), n)
            if self.level == 0:
                arrow = (1 + rng.integers(2, size=2)).tolist()
                layout = [*(self.beside(arrow, way) for way in ways), arrow]
        *spots, (x, y, size) = (self.around(ways, 12 * apart) if self.level else
                                self.in_cells([x + GRID * y for x, y in layout]))
        palette = self.palette()
        canvas, items = self.draw(palette, pairs, spots)
        canvas.stamp(shape_mask("arrow", canvas.px(size)).rotate(-45 * looks), x, y, palette[2])
        (question, gold, self.why), *more = [self.ask(looks, way, item.name, SIDES[::apart])
                                             for way, item in zip(ways[:4], items)]
        self.more = [(other, box(answer)) for other, answer, _ in more]
        self.shown = SIDES[::apart] if gold in SIDES else [item.name for item in items]
        return Obs(IMAGE + question, [canvas.image]), gold

    def beside(self, arrow, way):
        """A random cell in this direction from the arrow's cell."""
        (x, y), (dx, dy) = arrow, STEPS[way]
        room = max(dx * (3 - x), -dx * x, dy * (3 - y), -dy * y)
        far = 1 if dx and dy else 1 + int(self.rng.integers(room))
        return x + far * dx, y + far * dy

    def around(self, ways, spread):
        """A random (x, y, size) for a thing in each of these directions from the arrow, up to
        `spread` degrees beside them, and last the arrow's. They don't touch."""
        rng = self.rng
        while True:
            self.grid = aspect(rng, self.level)
            wide, high = (CELL * side for side in self.grid)
            x, y = rng.uniform(0.35, 0.65, 2) * (wide, high)    # the arrow's middle
            spots = [(x - 6, y - 6, 12)]
            for way, turn in zip(ways, rng.uniform(-spread, spread, len(ways))):
                size, angle = int(rng.integers(9, 13)), radians(45 * way + turn)
                dx, dy = sin(angle), -cos(angle)
                room = min((abs((side if d > 0 else 0) - c) - size / 2) / max(abs(d), 1e-9)
                           for side, c, d in ((wide, x, dx), (high, y, dy)))
                far = rng.uniform(11, max(11, room))
                left, top = x + far * dx - size / 2, y + far * dy - size / 2
                if far > room or not clear(left, top, size, spots):
                    break
                spots.append((left, top, size))
            else:
                return spots[1:] + spots[:1]

    def ask(self, looks, way, name, sides):
        """(question, answer, thought) about a thing that lies in direction `way` (an index of SKY)
        from the arrow in the picture. looks: the direction of the arrow."""
        who, why = "You are the arrow", f"The arrow looks {SKY[looks]}"
        if self.level >= 4:
            turn = pick(self.rng, list(TURNS))
            looks = (looks + TURNS[turn]) % 8
            who, why = f"{who} and {turn}", f"{why}, then {SKY[looks]}"
        side = SIDES[(way - looks) % 8]
        if self.rng.integers(2):
            return (f"{who}. {worded(self.rng, WHAT_AT, self.level, 1).format(side)}", name,
                    f"{why}. Its {side} is {SKY[way]} in the picture: {name}.")
        where = worded(self.rng, WHERE_AT, self.level, 1)
        return (f"{who}. {where.format(name, ', '.join(sides[:-1]), sides[-1])}", side,
                f"{why}. The {name} is {SKY[way]} from it in the picture: its {side}.")


class SceneToJson(Grounding):
    """List everything in the picture as JSON, row by row; "at" is any point on the thing. Small
    things measure 8 or 9 units, big ones 13 or 14."""
    tier, sizes, blind = 0, (8, 13), (0.01,) * 5        # one thing in one of 16 cells
    objects = ((2, 2), (2, 3), (3, 4), (4, 6), (6, 8))

    def make(self):
        rng, pairs = self.rng, [pick(self.rng, self.pairs()) for _ in range(self.number())]
        palette, spots = self.palette(), []
        while len({size > 10 for _, _, size in spots}) < 2:     # "small" needs a big one to compare
            spots = self.place(len(pairs), [pick(rng, (8, 9, 13, 14)) for _ in pairs])
        canvas, items = self.draw(palette, pairs, spots)
        gold = [{"color": item.color, "shape": item.shape, "size": ("small", "big")[size > 10],
                 "box": item.area} for item, (_, _, size) in zip(items, spots)]
        gold = by_rows(gold, lambda thing: thing["box"])
        self.more = [(worded(rng, BOX, self.level, 5).format(call),
                      GroundBox.reply(self, item.area))
                     for item in items if (call := refer(rng, item, items))][:2]
        self.shown = [gold[:3]]                 # `glance` lists three things at most
        return Obs(IMAGE + worded(rng, JSON, self.level, 4), [canvas.image]), gold

    def reply(self, gold):
        told = [{key: thing.get(key, self.spot(thing["box"])) for key in KEYS} for thing in gold]
        return box(json.dumps(told, separators=(",", ":")))
