"""Geometry: a labelled figure and one number to find, by one step at level 0, by three at level 4.

Points are complex numbers. A figure's maker says what the corners are and which angles and sides
bear labels; `Figure` turns, mirrors and places it, and finds each label a spot of its own. All
figures are true to scale, but no person measures an angle to the degree by eye. [O]
"""
import re
from cmath import phase, pi, rect
from math import radians, sin

import numpy as np

from .base import IMAGE, Obs, OneShot, box, held, pick
from .draw import UNITS, Canvas, blend, plain, shades

ANGLE, LENGTH = "How many degrees is the angle {}?", "How long is the side {}?"
AREA, PERIMETER = "What is the area of the figure?", "What is the perimeter of the figure?"
TRIPLES = [(a, b, c) for c in range(5, 53) for b in range(3, c) for a in range(2 * b // 5, b)
           if a * a + b * b == c * c]
SIZE = 5.5                      # of the labels' font


class Figure:
    """Strokes (lists of points) and labels, in units, and a first outline that is filled."""

    def __init__(self, rng, heldout, kind):
        self.rng, self.strokes, self.labels = rng, [], []
        while True:
            self.turn, self.flip = int(rng.integers(24)), bool(rng.integers(2))
            if held(f"{kind} {self.turn} {self.flip}") == heldout:
                break
        self.x = pick(rng, [c for c in "abcdfghkmnpqrstuvwxyz" if held(c) == heldout])

    def place(self, *points, outline=None):
        """Raw points -> turned, perhaps mirrored, and scaled to the picture; the outline, by
        default all of them, is drawn and filled."""
        raw = np.array(points)
        spots = (raw.conj() if self.flip else raw) * rect(1, self.turn * pi / 12)
        low, high = (f(spots.real) + 1j * f(spots.imag) for f in (np.min, np.max))
        scale = 48 / max((high - low).real, (high - low).imag)
        spots = ((spots - (low + high) / 2) * scale + UNITS * (1 + 1j) / 2).tolist()
        self.outline = [spots[i] for i in outline or range(len(spots))]
        self.strokes.append(self.outline + self.outline[:1])
        return spots

    def angle(self, at, a, b, label=None):
        """Mark the angle from a to b (the smaller way); without a label, as a right one."""
        first, last = ((end - at) / abs(end - at) for end in (a, b))
        if label is None:
            return self.strokes.append([at + 3 * first, at + 3 * (first + last), at + 3 * last])
        sweep = phase(last / first)
        self.strokes.append([at + 5 * first * rect(1, sweep * k / 12) for k in range(13)])
        self.labels.append((label, at, first * rect(1, sweep / 2), range(8, 22)))

    def side(self, a, b, label):
        """Write beside the middle of a side, to the left as one goes from a to b on raw points
        that run clockwise on the picture: outside."""
        away = (b - a) / abs(b - a) * (1j if self.flip else -1j)
        self.labels.append((label, (a + b) / 2, away, (3.6, 4.4, 5.2, 6)))

    def equal(self, *sides):
        """Ticks across sides that are equal."""
        for a, b in sides:
            middle, across = (a + b) / 2, (b - a) / abs(b - a) * 1.6j
            self.strokes.append([middle - across, middle + across])

    def arrow(self, a, b):
        """An arrow head on a line, the mark of parallels."""
        tip, along = a + (b - a) * 0.9, (b - a) / abs(b - a) * 2.2
        self.strokes += [[tip, tip + along * rect(1, s * pi * 5 / 6)] for s in (1, -1)]

    def settle(self):
        """(label, spot) of each label, clear of the strokes, the others and the edge; None where
        one finds no room, and then the figure has to be drawn anew."""
        ink = np.concatenate([np.linspace(a, b, 2 + int(abs(b - a))) for s in self.strokes
                              for a, b in zip(s, s[1:])])
        done = []
        for label, at, way, steps in self.labels:
            wide, high = 0.26 * SIZE * len(label) + 1.2, 0.36 * SIZE + 1
            for spot in (at + way * step for step in steps):
                clear = [abs(ink.real - spot.real) > wide, abs(ink.imag - spot.imag) > high]
                edge = (max(abs(spot.real - 32) + wide, abs(spot.imag - 32) + high) < 32)
                apart = all(abs((spot - s).real) > wide + 0.26 * SIZE * len(t) + 2 or
                            abs((spot - s).imag) > 2 * high for t, s in done)
                if edge and apart and (clear[0] | clear[1]).all():
                    done.append((label, spot))
                    break
            else:
                return None
        return done


def triangle(a, b):
    """The corners of a triangle with these angles in degrees at its first two, clockwise."""
    return 0, 1, rect(sin(radians(b)) / sin(radians(a + b)), radians(a))


def some(rng, low, high):
    return int(rng.integers(low, high + 1))


# Each maker draws a figure -> (question, answer, the steps).

def third_angle(f):
    a, b = some(f.rng, 38, 75), some(f.rng, 38, 75)
    p, q, r = f.place(*triangle(a, b))
    f.angle(p, q, r, f"{a}°"), f.angle(q, r, p, f"{b}°"), f.angle(r, p, q, f.x)
    return ANGLE, 180 - a - b, f"180 - {a} - {b} = {180 - a - b}."


def rectangle(f):
    w, h = some(f.rng, 5, 15), some(f.rng, 5, 15)
    a, b, c, d = f.place(0, w, w + h * 1j, h * 1j)
    f.side(a, b, str(w)), f.side(b, c, str(h))
    for at, before, after in ((a, b, d), (b, c, a), (c, d, b), (d, a, c)):
        f.angle(at, before, after)
    return whole(f, (f"{w} x {h}", w * h), (f"2 x ({w} + {h})", 2 * (w + h)))


def whole(f, area, perimeter, before=""):
    """Ask for either; each is how it comes about, and what it is."""
    question, (how, answer) = pick(f.rng, ((AREA, area), (PERIMETER, perimeter)))
    return question, answer, f"{before}{how} = {answer}."


def isosceles(f):
    base = some(f.rng, 40, 70)
    p, q, r = f.place(*triangle(base, base))
    f.equal((p, r), (q, r))
    if f.rng.integers(2):
        f.angle(p, q, r, f"{base}°"), f.angle(r, p, q, f.x)
        return ANGLE, 180 - 2 * base, f"Equal sides: 180 - 2 x {base} = {180 - 2 * base}."
    f.angle(p, q, r, f.x), f.angle(r, p, q, f"{180 - 2 * base}°")
    return ANGLE, base, f"Equal sides: (180 - {180 - 2 * base}) / 2 = {base}."


def parallel(f):
    a = some(f.rng, 40, 140)
    cross = rect(0.35, radians(a))
    p, q, r, s, end, start, low, top = f.place(
        0.6 - cross, -0.6 - cross, cross - 0.6, cross + 0.6, 2 * cross, -2 * cross, cross, -cross,
        outline=(0, 1, 2, 3))
    f.strokes[:] = [[p, q], [r, s], [start, end]]
    f.arrow(q, p), f.arrow(r, s), f.angle(top, p, low, f"{a}°")
    if f.rng.integers(2):
        f.angle(low, top, s, f.x)
        return ANGLE, 180 - a, f"Between parallels: 180 - {a} = {180 - a}."
    f.angle(low, end, r, f.x)
    return ANGLE, 180 - a, f"Beside the same angle at the other line: 180 - {a} = {180 - a}."


def right_triangle(f):
    sides, i = right(f)
    return LENGTH, sides[i], pythagoras(*sides, i)


def right(f, unknown=True):
    """A right triangle -> (its sides, which of them is sought)."""
    sides, i = pick(f.rng, TRIPLES), some(f.rng, 0, 1 + unknown)
    p, q, r = f.place(0, sides[0], sides[1] * 1j)
    f.angle(p, q, r)
    for k, ends in enumerate(((p, q), (r, p), (q, r))):
        if k != i or unknown:
            f.side(*ends, f.x if k == i else str(sides[k]))
    return sides, i


def pythagoras(a, b, c, i):
    """The step that finds side i of a right triangle with the hypotenuse c."""
    if i == 2:
        return f"{a}^2 + {b}^2 = {a * a} + {b * b} = {c * c} = {c}^2."
    a, b = (b, a) if i == 0 else (a, b)
    return f"{c}^2 - {a}^2 = {c * c} - {a * a} = {b * b} = {b}^2."


def quadrangle(f):
    """Two triangles with a common side, of which only the outline is drawn."""
    a, b, c, d = f.rng.integers(40, 61, 4).tolist()
    p, q, r = triangle(a, b)
    corners = f.place(p, triangle(c, d)[2].conjugate(), q, r)
    angles = (a + c, 180 - c - d, b + d, 180 - a - b)
    i = some(f.rng, 0, 3)
    for k, angle in enumerate(angles):
        f.angle(corners[k], corners[k - 1], corners[(k + 1) % 4], f.x if k == i else f"{angle}°")
    given = [str(angle) for k, angle in enumerate(angles) if k != i]
    return ANGLE, angles[i], f"360 - {' - '.join(given)} = {angles[i]}."


def height(f):
    left, right, h = some(f.rng, 3, 9), some(f.rng, 3, 9), 2 * some(f.rng, 3, 6)
    p, q, r, foot = f.place(0, left + right, left + h * 1j, left, outline=(0, 1, 2))
    f.strokes.append([r, foot]), f.angle(foot, r, q)
    f.side(p, foot, str(left)), f.side(foot, q, str(right)), f.side(foot, r, str(h))
    base = left + right
    return AREA, base * h // 2, f"{left} + {right} = {base}. {base} x {h} / 2 = {base * h // 2}."


def ring(f, half):
    """A circle, two points on it, and a third that sees them under `half` degrees -> (centre,
    the two, the third)."""
    points = [rect(1, radians(t)) for t in (90 - half, 90 + half, 270 + some(f.rng, -20, 20))]
    o, a, b, c, *_ = f.place(0, *points, *(rect(1, k * pi / 12) for k in range(24)))
    f.outline = [o + (a - o) * rect(1, k * pi / 36) for k in range(73)]
    dot = [o + 0.6 * rect(1, k * pi / 6) for k in range(13)]
    f.strokes[:] = [f.outline, [a, c, b], [a, o, b], dot]
    return o, a, b, c


def inscribed(f):
    half = some(f.rng, 35, 70)
    o, a, b, c = ring(f, half)
    if f.rng.integers(2):
        f.angle(o, a, b, f"{2 * half}°"), f.angle(c, a, b, f.x)
        return ANGLE, half, f"Half of that at the centre: {2 * half} / 2 = {half}."
    f.angle(o, a, b, f.x), f.angle(c, a, b, f"{half}°")
    return ANGLE, 2 * half, f"Twice that at the rim: 2 x {half} = {2 * half}."


def chord(f):
    """The same with the angle at the chord in place of that at the centre."""
    half = some(f.rng, 35, 60)
    o, a, b, c = ring(f, half)
    f.strokes.append([a, b])
    f.angle(a, o, b, f"{90 - half}°"), f.angle(c, a, b, f.x)
    return ANGLE, half, (f"Equal radii: 180 - 2 x {90 - half} = {2 * half} at the centre. "
                         f"At the rim half of that: {2 * half} / 2 = {half}.")


def l_shape(f):
    w, h, u, v = some(f.rng, 8, 14), some(f.rng, 8, 14), some(f.rng, 3, 5), some(f.rng, 3, 5)
    corners = f.place(0, w, w + (h - v) * 1j, w - u + (h - v) * 1j, w - u + h * 1j, h * 1j)
    a, b, c, d, e, g = corners
    f.side(a, b, str(w)), f.side(g, a, str(h)), f.side(c, d, str(u)), f.side(d, e, str(v))
    for k in (0, 1, 2, 4, 5):
        f.angle(corners[k], corners[k - 1], corners[(k + 1) % 6])
    return whole(f, (f"{w} x {h} - {u} x {v} = {w * h} - {u * v}", w * h - u * v),
                 (f"The notch changes nothing: 2 x ({w} + {h})", 2 * (w + h)))


def right_whole(f):
    (a, b, c), i = right(f, unknown=False)
    return whole(f, (f"{a} x {b} / 2", a * b // 2), (f"{a} + {b} + {c}", a + b + c),
                 pythagoras(a, b, c, i) + " ")


def trapezium(f):
    (a, b, c), w = pick(f.rng, TRIPLES[:5]), some(f.rng, 4, 15)
    p, q, r, s = f.place(0, w + a, w + b * 1j, b * 1j)
    f.angle(p, q, s), f.angle(s, p, r)
    f.side(p, q, str(w + a)), f.side(q, r, str(c)), f.side(r, s, str(w))
    return whole(f, (f"({w + a} + {w}) x {b} / 2", (w + w + a) * b // 2),
                 (f"{w + a} + {c} + {w} + {b}", w + a + c + w + b),
                 f"{w + a} - {w} = {a}. {pythagoras(a, b, c, 1)} ")


def chain(f):
    """Two isosceles triangles side by side."""
    b = some(f.rng, 26, 35)
    tip = rect(1, radians(2 * b))
    left, right, top, foot = f.place(-1, 2 * tip.real, tip, 0, outline=(0, 1, 2))
    f.equal((left, foot), (foot, top), (top, right)), f.strokes.append([foot, top])
    if f.rng.integers(2):
        f.angle(left, right, top, f"{b}°"), f.angle(top, foot, right, f.x)
        return ANGLE, 180 - 4 * b, (f"Outside the triangle with {b}: {b} + {b} = {2 * b}. "
                                    f"180 - 2 x {2 * b} = {180 - 4 * b}.")
    f.angle(top, foot, right, f"{180 - 4 * b}°"), f.angle(left, right, top, f.x)
    return ANGLE, b, (f"Equal sides: (180 - {180 - 4 * b}) / 2 = {2 * b}, outside the other "
                      f"triangle. {2 * b} / 2 = {b}.")


KINDS = ((third_angle, rectangle), (isosceles, parallel, right_triangle),
         (quadrangle, height, inscribed), (l_shape, right_whole, chord), (trapezium, chain))


class Geometry(OneShot):
    """An angle, a side, an area or a perimeter of a labelled figure."""
    family, tier, verifier, min_pixels = "reasoning", 2, "NUM", 128

    @classmethod
    def chance(cls, level):
        return 0.05

    def make(self):
        maker, labels = pick(self.rng, KINDS[self.level]), None
        while labels is None:
            figure = Figure(self.rng, self.heldout, maker.__name__)
            question, gold, self.why = maker(figure)
            labels = figure.settle()
        ground, ink = plain(self.rng, self.heldout, self.level)
        color = pick(self.rng, list(shades(self.rng, self.heldout).values()))
        canvas = Canvas(4 * self.pixels, ground)        # four times too large, for smooth lines
        flat = [[c for z in stroke for c in canvas.at(z.real, z.imag)]
                for stroke in (figure.outline, *figure.strokes)]
        canvas.pen.polygon(flat[0], blend(ground, color, 0.3))
        for stroke in flat[1:]:
            canvas.pen.line(stroke, ink, canvas.px(0.6), "curve")
        canvas.image, canvas.unit = canvas.image.reduce(4), canvas.unit / 4
        for label, spot in labels:
            canvas.word(label, spot.real, spot.imag, ink, SIZE, "m")
        return Obs(IMAGE + question.format(figure.x), [canvas.image]), gold

    def glance(self, rng):
        """One of the numbers on the way."""
        return box(pick(rng, re.findall(r"\d+", self.why)))
