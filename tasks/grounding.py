"""Where things are: boxes, changes between pictures, events in a film, views from within.

All six categories are scenes of coloured shapes on the grid of scenes.py. What differs is what is
asked: the box of one thing, called by its place among the others; the boxes of all of a kind, or of
what two pictures don't share; when things happen; what stands where for one who is among them; all
of it as JSON.
"""
import json
from collections import Counter

from .base import IMAGE, Obs, box, held, pick
from .draw import COLORS, GRID, shape_mask
from .scenes import Item, Scene, cell, kinds, plural, refer, spot
from .verify import KEYS

BOX = ("Box the {}.", "Give the box of the {}.")
WAYS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
ENDS = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}     # axis, direction
RANKS = ("first", "second", "third", "fourth")


def ranked(item, items):
    """Calls such as "second star from the left", where no two stars share a column."""
    calls = []
    for name, fits in kinds(item):
        for end, (axis, sign) in ENDS.items():
            line = sorted(sign * cell(other.area)[axis] for other in items if fits(other))
            if 1 < len(line) == len(set(line)):
                rank = RANKS[line.index(sign * cell(item.area)[axis])]
                calls.append(f"{rank} {name} from the {end}")
    return calls


def ahead(item, anchor, way) -> tuple[int, int]:
    """How many cells an item lies from the anchor that way, and how many to the side of it."""
    dx, dy = (a - b for a, b in zip(cell(item.area), cell(anchor.area)))
    return dx * way[0] + dy * way[1], abs(dx * way[1]) + abs(dy * way[0])


def related(item, items):
    """Calls such as "star left of the blue square": the star lies that way more than to the side
    of it, and no other star lies that way at all."""
    calls, count = [], Counter(other.name for other in items)
    for name, fits in kinds(item):
        rivals = [other for other in items if fits(other) and other is not item]
        anchors = [other for other in items if count[other.name] == 1 and not fits(other)]
        for anchor in anchors if rivals else []:
            for word, way in WAYS.items():
                far, aside = ahead(item, anchor, way)
                if far > aside and all(ahead(other, anchor, way)[0] <= 0 for other in rivals):
                    calls.append(f"{name} {word} the {anchor.name}")
    return calls


class Grounding(Scene):
    """Scenes with things of uneven size that keep apart; `blind` is the chance, by level."""
    tier, verifier, sizes, gap = 1, "F1", (9, 10, 11, 12, 13), 1

    @classmethod
    def chance(cls, level):
        return cls.blind[level]


class GroundBox(Grounding):
    """The box of the one thing that an expression fits: by its name, from level 2 on also by its
    rank in a line or its side of something else, from 3 on by these alone."""
    verifier, blind = "IOU", (0.07, 0.07, 0.09, 0.14, 0.14)     # a rank or a side tells a little

    def make(self):
        target, question = pick(self.rng, self.pairs()), None
        while not question:                     # until the target can be told from the others
            rest = self.others(self.number() - 1, lambda p: self.level >= 3 or p != target,
                               lambda p: p[0] == target[0] or p[1] == target[1])
            image, self.items = self.paint([target, *rest])
            question = self.ask(self.items[0])
        self.more = [(other, self.reply(item.area)) for item in self.items[1:3]
                     if (other := self.ask(item))]
        self.more += self.follow_up(self.items, question, self.items)[-3:]
        return Obs(IMAGE + question, [image]), self.items[0].area

    def ask(self, item):
        """A question for an item's box, or None where nothing tells it from the others."""
        if self.level < 2 or self.level == 2 and self.rng.integers(2):
            call = refer(self.rng, item, self.items)
        else:
            calls = pick(self.rng, (ranked, related))(item, self.items)
            call = pick(self.rng, calls) if calls else None
        return call and pick(self.rng, BOX).format(call)

    def reply(self, gold):
        return box([round(corner) for corner in gold])

    def glance(self, rng):
        return self.reply(pick(rng, self.items).area)


class GroundMulti(Grounding):
    """The boxes of all red ones, all circles, from level 2 on also all red circles, from 3 on
    all circles that are not red."""
    blind = (0.08,) * 5         # a few boxes, of which half must be right to count
    most = (3, 3, 4, 4, 5)
    distractors = ((0, 2), (1, 3), (3, 5), (5, 8), (7, 11))

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
        image, self.items = self.paint([pick(rng, wanted) for _ in range(count)] + rest)
        question = pick(rng, ("Box all {}.", "Give the boxes of all {}.")).format(what)
        self.more = self.follow_up(self.items, question, self.items)
        return Obs(IMAGE + question, [image]), [item.area for item in self.items[:count]]

    def reply(self, gold):
        """Row by row, from left to right."""
        rows = sorted(gold, key=lambda area: cell(area)[::-1])
        return box([[round(corner) for corner in area] for area in rows])

    def glance(self, rng):
        return self.reply([item.area for item in self.items])


class SpotDiff(Grounding):
    """Two pictures, and the boxes of what is new or gone, from level 1 on of another colour, from
    2 on of another shape; at level 4 both are noisy, each in its own way."""
    blind = (0.06, 0.08, 0.08, 0.08, 0.08)
    objects = ((3, 4), (4, 6), (6, 8), (8, 11), (11, 14))
    changes = ((1, 1), (1, 2), (1, 3), (2, 4), (2, 5))

    def make(self):
        rng = self.rng
        before = [pick(rng, self.pairs()) for _ in range(self.number())]
        after, changed = list(before), range(self.between(self.changes))
        for i in changed:
            kind = int(rng.integers(min(4, 2 + self.level)))        # new, gone, colour, shape
            kept = before[i][1 - kind % 2]
            other = pick(rng, [p for p in self.pairs() if kept in p and p != before[i]])
            (after if kind else before)[i] = other if kind > 1 else None
        palette, spots = self.palette(), self.place(rng.permutation(GRID * GRID).tolist())
        (first, old), (second, new) = (self.draw(palette, p, spots) for p in (before, after))
        self.items = [a or b for a, b in zip(old, new)]
        self.more = [(f"How many shapes are in the {which} picture?", box(sum(map(bool, pairs))))
                     for which, pairs in (("first", before), ("second", after))]
        question = pick(rng, ("Box what has changed.", "Give the boxes of what differs."))
        for canvas in (first, second) if self.level >= 4 else ():   # last: sizes share the stream
            canvas.noise(rng, 16)
        gold = [item.area for item in self.items[:len(changed)]]
        return Obs(2 * IMAGE + question, [first.image, second.image]), gold

    reply = GroundMulti.reply

    def glance(self, rng):
        return self.reply([pick(rng, self.items).area])


class VideoEvents(Grounding):
    """Four to twelve frames in which shapes come, go or jump elsewhere: the frame in which one
    does, or the order in which all do. From level 1 on others stay, from 2 on they may do
    something else. The number of a frame follows it, as in GLM the time does. [R]"""
    tier, verifier, sizes = 0, "LIS/NUM", (12,)
    blind = (0.17, 0.11, 0.08, 0.06, 0.05)      # half are frames; an order can't be guessed
    frames = ((4, 4), (5, 6), (6, 8), (8, 10), (10, 12))
    actors = ((2, 2), (2, 2), (3, 3), (3, 3), (4, 4))
    extras = ((0, 0), (1, 1), (1, 2), (2, 3), (3, 4))
    acts = {"appear": "with", "vanish": "without", "jump": "after the jump of"}

    def make(self):
        rng, length, n = self.rng, self.between(self.frames), self.between(self.actors)
        act, *others = rng.permutation(list(self.acts)).tolist()
        other = pick(rng, [None, *others]) if self.level >= 2 else None
        self.cast = rng.permutation(list(COLORS))[:n + self.between(self.extras)].tolist()
        pairs = [pick(rng, [p for p in self.pairs() if p[0] == color]) for color in self.cast]
        acts = [act] * n + [other] * (len(pairs) - n)
        times = [2 + t for t in rng.permutation(length - 1)[:n].tolist()]
        times += rng.integers(2, length + 1, len(pairs) - n).tolist()
        palette, spots, film = self.palette(), self.place(rng.permutation(GRID ** 2).tolist()), []
        for frame in range(1, length + 1):
            over = [frame >= when for when in times]
            shown = [None if does == ("vanish" if done else "appear") else pair
                     for pair, does, done in zip(pairs, acts, over)]
            stand = [spots[i + 8 * (does == "jump" and done)]
                     for i, (does, done) in enumerate(zip(acts, over))]
            film.append(self.draw(palette, shown, stand)[0].image)
        items, self.last = [Item(*pair, None) for pair in pairs], length
        calls = [refer(rng, item, items) for item in items]
        asked = [(f"Which is the first frame {self.acts[does]} the {call}?", when)
                 for call, does, when in zip(calls, acts, times) if does]
        events = sorted(zip(times, self.cast[:n]))
        told = f"In what order do shapes {act}? Name their colors.", [color for _, color in events]
        (question, gold), *rest = [told, *asked] if rng.integers(2) else [*asked, told]
        self.why = "; ".join(f"frame {when}: {color}" for when, color in events)
        self.more = [(later, self.reply(answer)) for later, answer in rest[:4]]
        frames = " ".join(f"{IMAGE}{number}" for number in range(1, length + 1))
        return Obs(f"{frames}\n{question}", film), gold

    def reply(self, gold):
        return box(", ".join(gold) if isinstance(gold, list) else gold)

    def glance(self, rng):
        if isinstance(self.gold, int):
            return box(2 + int(rng.integers(self.last - 1)))
        return self.reply(rng.permutation(self.cast).tolist())


SIDES = ("front", "front right", "right", "back right", "back", "back left", "left", "front left")
SKY = ("up", "up right", "right", "down right", "down", "down left", "left", "up left")
STEPS = ((0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1))  # of SKY
TURNS = {"turn right": 2, "turn around": 4, "turn left": 6}                     # in eighths


class SpatialRelation(Grounding):
    """An arrow seen from above: what stands at which side of it? It looks up, so that its sides
    are the picture's, from level 2 on another way; at level 4 it turns before it looks. Four
    sides at levels 0 and 2, else eight. Held-out splits have other layouts."""
    family, tier, verifier = "reasoning", 2, "EX"
    blind = (0.14, 0.08, 0.14, 0.08, 0.08)      # half ask for one of the sides
    objects = ((2, 3), (4, 5), (3, 4), (5, 6), (6, 8))

    def make(self):
        rng, n, pairs = self.rng, self.number(), self.pairs()
        pairs = [pairs[i] for i in rng.permutation(len(pairs))[:n].tolist()]
        self.sides = SIDES[::2] if self.level in (0, 2) else SIDES
        self.choice = f"{', '.join(self.sides[:-1])} or {self.sides[-1]}"
        held_out = None
        while held_out != self.heldout:
            arrow = (1 + rng.integers(2, size=2)).tolist()
            looks = 0 if self.level < 2 else 2 * int(rng.integers(1, 4))
            ways = (rng.permutation(len(self.sides))[:n] * (8 // len(self.sides))).tolist()
            cells = [self.beside(arrow, way) for way in ways]
            held_out = held(f"{arrow} {looks} {cells}")
        cells = [x + GRID * y for x, y in [*cells, arrow]]
        palette, (*spots, (x, y, size)) = self.palette(), self.place(cells)
        canvas, self.items = self.draw(palette, pairs, spots)
        canvas.stamp(shape_mask("arrow", canvas.px(size)).rotate(-45 * looks), x, y, palette[2])
        (question, gold, self.why), *more = [self.ask(looks, *seen)
                                             for seen in zip(ways, self.items[:4])]
        self.more = [(other, box(answer)) for other, answer, _ in more]
        return Obs(IMAGE + question, [canvas.image]), gold

    def beside(self, arrow, way):
        """A cell that lies so from the arrow's; straight ways may have two such."""
        (x, y), (dx, dy) = arrow, STEPS[way]
        room = max(dx * (3 - x), -dx * x, dy * (3 - y), -dy * y)
        far = 1 if dx and dy else 1 + int(self.rng.integers(room))
        return x + far * dx, y + far * dy

    def ask(self, looks, way, item):
        """(question, answer, thought) about an item `way` of the arrow in the picture."""
        now, who, why = looks, "You are the arrow", f"The arrow looks {SKY[looks]}"
        if self.level >= 4:
            turn = pick(self.rng, list(TURNS))
            now = (looks + TURNS[turn]) % 8
            who, why = f"{who} and {turn}", f"{why}, then {SKY[now]}"
        side = SIDES[(way - now) % 8]
        if self.rng.integers(2):
            return (f"{who}. What is at your {side}?", item.name,
                    f"{why}. Its {side} is {SKY[way]} in the picture: {item.name}.")
        return (f"{who}. Where is the {item.name}: {self.choice}?", side,
                f"{why}. The {item.name} is {SKY[way]} from it in the picture: its {side}.")

    def glance(self, rng):
        named = [item.name for item in self.items]
        return box(pick(rng, named if self.gold in named else self.sides))


class SceneToJson(Grounding):
    """Everything in the picture as a JSON list, row by row; "at" is any point on the thing."""
    tier, sizes = 0, (8, 13)
    blind = (0.01,) * 5         # one thing, in the right one of 16 cells
    objects = ((2, 2), (2, 3), (3, 4), (4, 6), (6, 8))

    def make(self):
        rng = self.rng
        pairs = [pick(rng, self.pairs()) for _ in range(self.number())]
        cells = sorted(rng.permutation(GRID * GRID)[:len(pairs)].tolist())
        palette, spots = self.palette(), []
        while len({size for _, _, size in spots}) < 2:      # big beside small, or neither is
            spots = self.place(cells)
        canvas, items = self.draw(palette, pairs, spots)
        gold = [{"color": item.color, "shape": item.shape, "size": ("small", "big")[size > 10],
                 "box": item.area} for item, (_, _, size) in zip(items, spots)]
        self.more = [(pick(rng, BOX).format(call), GroundBox.reply(self, item.area))
                     for item in items if (call := refer(rng, item, items))][:2]
        question = "List the shapes as JSON: color, shape, size (small or big), at [x, y]."
        return Obs(IMAGE + question, [canvas.image]), gold

    def reply(self, gold):
        told = [{key: thing[key] if key in thing else spot(thing["box"]) for key in KEYS}
                for thing in gold]
        return box(json.dumps(told, separators=(",", ":")))

    def glance(self, rng):          # at three things at most
        return self.reply(self.gold[:3])
