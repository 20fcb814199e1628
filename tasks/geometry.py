"""Geometry: find one number in a labelled figure, in one step at level 0 and three at level 4.

Points are complex numbers. Each kind of figure lists its points, which are named A, B, C and so on,
in that order. `Figure` rotates, mirrors and draws them, and finds a free place for each label. The
figures are true to scale, but nobody can measure an angle to the degree by eye. [O]
"""
import re
from cmath import phase, pi, rect
from math import radians, sin
from string import ascii_uppercase

import numpy as np

from .base import held, IMAGE, Obs, OneShot, pick, worded
from .draw import blend, Canvas, ground_and_ink, shades, UNITS

# How a user may word a question; level 0 has the first of each.
ANGLE = ("How many degrees is the angle {}?", "How large is the angle {}, in degrees?",
         "What is the angle {} in degrees?", "Find the angle {}, in degrees.",
         "How many degrees does the angle {} have?")
LENGTH = ("How long is the side {}?", "What is the length of the side {}?", "Find the side {}.",
          "Find the length of the side {}.", "Which length does the side {} have?")
AREA, PERIMETER = [tuple(form.format(what) for form in (
    "What is the {} of the figure?", "Find the {} of the figure.", "Compute the figure's {}.",
    "What is the figure's {}?", "Which {} does the figure have?"))
    for what in ("area", "perimeter")]
TRIPLES = [(a, b, c) for c in range(5, 53) for b in range(3, c) for a in range(2 * b // 5, b)
           if a * a + b * b == c * c]
SIZE = 5.5                      # of the labels' font


def unit(z: complex) -> complex:
    """z scaled to length 1."""
    return z / abs(z)


def triangle(a, b):
    """The corners of a triangle with angles a and b, in degrees, at the first two; clockwise."""
    return 0, 1, rect(sin(radians(b)) / sin(radians(a + b)), radians(a))


def pythagoras(a, b, c, i):
    """The calculation of side i of a right triangle with legs a, b and hypotenuse c, in words."""
    p, sign, q, r = ((c, "-", b, a), (c, "-", a, b), (a, "+", b, c))[i]
    return f"{p}^2 {sign} {q}^2 = {p * p} {sign} {q * q} = {r * r} = {r}^2."


class Figure:
    """Strokes (lists of points) and labels, in units, and an outline that is filled.

    The methods from `third_angle` on each draw one kind of figure and return (wordings, answer, the
    steps to it in words). `kinds` lists them by level.
    """

    def __init__(self, rng, heldout, kind):
        self.rng, self.labels = rng, []
        self.turn, self.flip = None, None       # one in five orientations of a kind is held out
        while self.turn is None or held(f"{kind} {self.turn} {self.flip}") != heldout:
            self.turn, self.flip = int(rng.integers(24)), bool(rng.integers(2))
        self.x = pick(rng, [c for c in "abcdfghkmnpqrstuvwxyz" if held(c) == heldout])

    def some(self, low: int, high: int) -> int:
        """A random integer from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def paths(self, names: str) -> list[list[complex]]:
        """The points of each name in a string: "AB CDE" is a line and a corner."""
        return [[self.spots[letter] for letter in name] for name in names.split()]

    def draw(self, *points, outline=ascii_uppercase, lines="", rights="", equal="", arrows="",
             **labels):
        """Rotate, mirror and scale the points to the picture. outline: the points around the filled
        area. lines: further strokes. rights: right angles to mark, equal: sides to mark with a
        tick, arrows: parallels to mark with arrow heads, labels: as for `label`."""
        raw = np.array(points)
        spots = (raw.conj() if self.flip else raw) * rect(1, self.turn * pi / 12)
        low, high = (f(spots.real) + 1j * f(spots.imag) for f in (np.min, np.max))
        scale = 48 / max((high - low).real, (high - low).imag)
        spots = ((spots - (low + high) / 2) * scale + UNITS * (1 + 1j) / 2).tolist()
        self.spots = dict(zip(ascii_uppercase, spots))
        self.outline = [spot for letter, spot in self.spots.items() if letter in outline]
        self.strokes = [self.outline + self.outline[:1], *self.paths(lines)]
        for b, a, c in self.paths(rights):
            first, last = 3 * unit(b - a), 3 * unit(c - a)
            self.strokes.append([a + first, a + first + last, a + last])
        for a, b in self.paths(equal):
            middle, across = (a + b) / 2, unit(b - a) * 1.6j
            self.strokes.append([middle - across, middle + across])
        for a, b in self.paths(arrows):
            tip, along = a + (b - a) * 0.9, unit(b - a) * 2.2
            self.strokes += [[tip, tip + along * rect(1, s * pi * 5 / 6)] for s in (1, -1)]
        self.label(**labels)

    def label(self, **labels):
        """Add labels. BAC=40 writes 40 degrees into the angle at A (the smaller one). AB="x" writes
        the unknown beside that side; it is outside if the points run clockwise."""
        for name, text in labels.items():
            a, b, *c = self.paths(name)[0]
            if c:
                first, sweep = unit(a - b), phase(unit(c[0] - b) / unit(a - b))
                self.strokes.append([b + 5 * first * rect(1, sweep * k / 12) for k in range(13)])
                at, way, steps = b, first * rect(1, sweep / 2), range(8, 22)
            else:
                at, way = (a + b) / 2, unit(b - a) * (1j if self.flip else -1j)
                steps = 3.6, 4.4, 5.2, 6
            text = self.x if text == "x" else f"{text}°" if c else str(text)
            self.labels.append((text, at, way, steps))

    def place_labels(self):
        """[(label, position)] where labels touch nothing; None if one of them finds no room."""
        ink = np.concatenate([np.linspace(a, b, 2 + int(abs(b - a))) for s in self.strokes
                              for a, b in zip(s, s[1:])])
        done, taken, high = [], [(ink, 0, 0)], 0.36 * SIZE + 1      # taken: half widths, heights
        for label, at, way, steps in self.labels:
            wide = 0.26 * SIZE * len(label) + 1.2
            for spot in (at + way * step for step in steps):
                clear = all(np.all((abs((z - spot).real) > wide + w) |
                                   (abs((z - spot).imag) > high + h)) for z, w, h in taken)
                if clear and max(abs(spot.real - 32) + wide, abs(spot.imag - 32) + high) < 32:
                    break
            else:
                return None
            done.append((label, spot))
            taken.append((spot, wide + 0.8, high))
        return done

    def angle(self, *ways):
        """Label the angles in one of these ways, each (answer, its calculation, labels)."""
        answer, how, labels = pick(self.rng, ways)
        self.label(**labels)
        return ANGLE, answer, f"{how} = {answer}."

    def whole(self, area, perimeter, before=""):
        """Ask for one of the two, each (calculation, answer). before: steps that come first."""
        forms, (how, answer) = pick(self.rng, ((AREA, area), (PERIMETER, perimeter)))
        return forms, answer, f"{before}{how} = {answer}."

    def third_angle(self):
        """The third angle of a triangle."""
        a, b = self.some(38, 75), self.some(38, 75)
        self.draw(*triangle(a, b), BAC=a, CBA=b, ACB="x")
        return ANGLE, 180 - a - b, f"180 - {a} - {b} = {180 - a - b}."

    def rectangle(self):
        """The area or perimeter of a rectangle."""
        w, h = self.some(5, 15), self.some(5, 15)
        self.draw(0, w, w + h * 1j, h * 1j, rights="BAD CBA DCB ADC", AB=w, BC=h)
        return self.whole((f"{w} x {h}", w * h), (f"2 x ({w} + {h})", 2 * (w + h)))

    def isosceles(self):
        """The angle at the tip of an isosceles triangle from that at the base, or the reverse."""
        base = self.some(40, 70)
        tip = 180 - 2 * base
        self.draw(*triangle(base, base), equal="AC BC")
        return self.angle((base, f"Equal sides: (180 - {tip}) / 2", dict(BAC="x", ACB=tip)),
                          (tip, f"Equal sides: 180 - 2 x {base}", dict(BAC=base, ACB="x")))

    def parallel(self):
        """An angle between one of two parallels and a line across them."""
        a = self.some(40, 140)
        t = rect(0.35, radians(a))
        self.draw(0.6 - t, -0.6 - t, t - 0.6, t + 0.6, 2 * t, -2 * t, t, -t,
                  outline="ABCD", lines="AB CD FE", arrows="BA CD", AHG=a)
        del self.strokes[0]     # the band between them has no ends
        return self.angle(
            (180 - a, f"Beside the same angle at the other line: 180 - {a}", dict(EGC="x")),
            (180 - a, f"Between parallels: 180 - {a}", dict(HGD="x")))

    def right(self, n, mark):
        """Draw a right triangle -> (its sides, i). One of its first n sides, i, is labelled with
        `mark`, or not at all if that is None; the others with their lengths."""
        sides, i = pick(self.rng, TRIPLES), self.some(0, n - 1)
        labels = dict(zip(("AB", "CA", "BC"), (*sides[:i], mark, *sides[i + 1:])))
        self.draw(0, sides[0], sides[1] * 1j, rights="BAC",
                  **{side: label for side, label in labels.items() if label})
        return sides, i

    def right_triangle(self):
        """One side from the other two."""
        sides, i = self.right(3, "x")
        return LENGTH, sides[i], pythagoras(*sides, i)

    def quadrangle(self):
        """The fourth angle of a quadrangle."""
        a, b, c, d = self.rng.integers(40, 61, 4).tolist()
        p, q, r = triangle(a, b)
        angles = dict(DAB=a + c, ABC=180 - c - d, BCD=b + d, CDA=180 - a - b)
        sought = pick(self.rng, list(angles))
        self.draw(p, triangle(c, d)[2].conjugate(), q, r, **{**angles, sought: "x"})
        given = " - ".join(str(angles[name]) for name in angles if name != sought)
        return ANGLE, angles[sought], f"360 - {given} = {angles[sought]}."

    def height(self):
        """The area of a triangle from its height and the two parts of its base."""
        u, v, h = self.some(3, 9), self.some(3, 9), 2 * self.some(3, 6)
        w, area = u + v, (u + v) * h // 2
        self.draw(0, w, u + h * 1j, u, outline="ABC", lines="CD", rights="CDB", AD=u, DB=v, DC=h)
        return AREA, area, f"{u} + {v} = {w}. {w} x {h} / 2 = {area}."

    def ring(self, half, lines):
        """Draw a circle around A with B, C and D on it; the angle BDC has `half` degrees."""
        points = [rect(1, radians(t)) for t in (90 - half, 90 + half, 270 + self.some(-20, 20))]
        self.draw(0, *points, *(rect(1, k * pi / 12) for k in range(24)), lines=lines)
        o, a = self.paths("AB")[0]
        self.outline = self.strokes[0] = [o + (a - o) * rect(1, k * pi / 36) for k in range(73)]
        self.strokes.append([o + 0.6 * rect(1, k * pi / 6) for k in range(13)])

    def inscribed(self):
        """The inscribed angle from the central angle, or the reverse."""
        rim = self.some(35, 70)
        mid = 2 * rim
        self.ring(rim, "BDC BAC")
        return self.angle((mid, f"Twice that at the rim: 2 x {rim}", dict(BAC="x", BDC=rim)),
                          (rim, f"Half of that at the centre: {mid} / 2", dict(BAC=mid, BDC="x")))

    def chord(self):
        """The inscribed angle from the angle between the chord and a radius."""
        rim = self.some(35, 60)
        self.ring(rim, "BDC BAC BC")
        self.label(ABC=90 - rim, BDC="x")
        return ANGLE, rim, (f"Equal radii: 180 - 2 x {90 - rim} = {2 * rim} at the centre. "
                            f"At the rim half of that: {2 * rim} / 2 = {rim}.")

    def l_shape(self):
        """The area or perimeter of a rectangle without one of its corners."""
        w, h, u, v = self.some(8, 14), self.some(8, 14), self.some(3, 5), self.some(3, 5)
        self.draw(0, w, w + (h - v) * 1j, w - u + (h - v) * 1j, w - u + h * 1j, h * 1j,
                  rights="FAB ABC BCD DEF EFA", AB=w, FA=h, CD=u, DE=v)
        return self.whole((f"{w} x {h} - {u} x {v} = {w * h} - {u * v}", w * h - u * v),
                          (f"The notch changes nothing: 2 x ({w} + {h})", 2 * (w + h)))

    def right_whole(self):
        """The area or perimeter of a right triangle; one leg has to be computed first."""
        (a, b, c), i = self.right(2, None)
        return self.whole((f"{a} x {b} / 2", a * b // 2), (f"{a} + {b} + {c}", a + b + c),
                          pythagoras(a, b, c, i) + " ")

    def trapezium(self):
        """The area or perimeter of a right trapezium; the height has to be computed first."""
        (a, b, c), w = pick(self.rng, TRIPLES[:5]), self.some(4, 15)
        self.draw(0, w + a, w + b * 1j, b * 1j, rights="BAD ADC", AB=w + a, BC=c, CD=w)
        return self.whole((f"({w + a} + {w}) x {b} / 2", (w + w + a) * b // 2),
                          (f"{w + a} + {c} + {w} + {b}", w + a + c + w + b),
                          f"{w + a} - {w} = {a}. {pythagoras(a, b, c, 1)} ")

    def chain(self):
        """An angle in two isosceles triangles that share a side."""
        b = self.some(26, 35)
        last, tip = 180 - 4 * b, rect(1, radians(2 * b))
        self.draw(-1, 2 * tip.real, tip, 0, outline="ABC", lines="DC", equal="AD DC CB")
        back = f"Equal sides: (180 - {last}) / 2 = {2 * b}, outside the other triangle. {2 * b} / 2"
        there = f"Outside the triangle with {b}: {b} + {b} = {2 * b}. 180 - 2 x {2 * b}"
        return self.angle((b, back, dict(DCB=last, BAC="x")), (last, there, dict(BAC=b, DCB="x")))

    kinds = ((third_angle, rectangle), (isosceles, parallel, right_triangle),      # by level
             (quadrangle, height, inscribed), (l_shape, right_whole, chord), (trapezium, chain))


class Geometry(OneShot):
    """Find an angle, a side, an area or a perimeter of a labelled figure."""
    family, tier, verifier, min_pixels = "reasoning", 2, "NUM", 128
    blind = (0.05,) * 5

    def make(self):
        maker, labels = pick(self.rng, Figure.kinds[self.level]), None
        while labels is None:   # until every label finds room
            figure = Figure(self.rng, self.heldout, maker.__name__)
            forms, gold, self.why = maker(figure)
            labels = figure.place_labels()
        self.shown = re.findall(r"\d+", self.why)       # the numbers in the calculation
        ground, ink = ground_and_ink(self.rng, self.heldout, self.level)
        color = pick(self.rng, list(shades(self.rng, self.heldout).values()))
        canvas = Canvas(4 * self.pixels, ground)        # reduced by 4 below, for smooth lines
        flat = [[c for z in stroke for c in canvas.at(z.real, z.imag)]
                for stroke in (figure.outline, *figure.strokes)]
        canvas.pen.polygon(flat[0], blend(ground, color, 0.3))
        for stroke in flat[1:]:
            canvas.pen.line(stroke, ink, canvas.px(0.6), "curve")
        canvas = Canvas.on(canvas.image.reduce(4))
        for label, spot in labels:
            canvas.word(label, spot.real, spot.imag, ink, SIZE, "m")
        question = worded(self.rng, forms, self.level, 1).format(figure.x)
        return Obs(IMAGE + question, [canvas.image]), gold
