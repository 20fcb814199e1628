"""Puzzles: a way through barred streets, a matrix that lacks its last cell, a small grid to fill.

Ways and grids are carried out, never compared with the oracle's: whichever way reaches the goal
and whichever grid keeps the rules is right. [C] for judging by execution, [O] for the puzzles.
"""
from functools import lru_cache
from itertools import accumulate, permutations, product

import numpy as np

from .base import IMAGE, Obs, OneShot, box, held, pick
from .draw import CELL, COLORS, SHAPES, UNITS, Canvas, blend, glyph_mask, plain, shades
from .verify import MOVES, ahead, runs

ROUTES = "Go from the {} to the {} by the shortest way.", "The shortest way from the {} to the {}?"
MATRIX = ("Which choice completes the pattern?", "Which choice belongs in the empty cell?")
SIZES = {"small": 4.5, "middle": 7, "large": 9.5}
VALUES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "number": (1, 2, 3, 4)}
SUDOKU = ("Fill the grid: every row, column and block holds each sign once.", "Solve the sudoku.")
NONOGRAM = ("Solve the nonogram.", "Fill the cells as the numbers of runs tell.")


def shuffled(rng, options) -> list:
    return [options[i] for i in rng.permutation(len(options)).tolist()]


def shortest(start, roads) -> dict:
    """Crossing -> the moves of a shortest way to it, over open roads."""
    ways, queue = {start: []}, [start]
    for place in queue:
        for move in MOVES:
            there, road = ahead(place, move)
            if road in roads and there not in ways:
                ways[there] = [*ways[place], move]
                queue.append(there)
    return ways


class MapRoute(OneShot):
    """The shortest way from mark to mark through streets of which some are barred; from level 2
    on some are missing too, and the bars make a detour necessary."""
    family, tier, verifier = "reasoning", 2, "EXEC"
    crossings, closed = (3, 4, 4, 5, 5), (2, 6, 9, 14, 16)
    least = (2, 3, 4, 5, 7)                                     # moves

    @classmethod
    def chance(cls, level):
        return (0.07, 0.03, 0.02, 0.01, 0.01)[level]            # measured

    def make(self):
        n, rng, shut = self.crossings[self.level], self.rng, self.closed[self.level]
        every = [(x, y) for y in range(2 * n - 1) for x in range(2 * n - 1) if (x + y) % 2]
        goals = []
        while not goals:
            order = shuffled(rng, every)
            self.start = x, y = int(rng.integers(n)), int(rng.integers(n))
            ways = shortest(self.start, order[shut:])
            if held(f"{order[:shut]} {self.start}") == self.heldout:
                least, detour = self.least[self.level], self.level >= 2
                goals = [to for to, moves in ways.items() if len(moves) >= least
                         and len(moves) >= abs(to[0] - x) + abs(to[1] - y) + detour]
        goal = pick(rng, goals)
        gone = order[:shut // 2] if self.level >= 2 else []
        streets, bars = [road for road in every if road not in gone], order[len(gone):shut]
        names, image = self.paint(n, streets, bars, [self.start, goal])
        seen = accumulate(ways[goal], lambda at, move: ahead(at, move)[0], initial=self.start)
        seen = " ".join(f"({x + 1}, {y + 1})" for x, y in seen)
        self.why = f"By column and row: {seen}, so {len(ways[goal])} moves."
        exits = [move for move in MOVES if ahead(self.start, move)[1] in order[shut:]]
        self.more = [(f"From the {names[0]}, which moves are possible?", box(", ".join(exits))),
                     ("How many roads are barred?", box(len(bars)))]
        question = f"{pick(rng, ROUTES).format(*names)} Moves: right, down, left, up."
        gold = {"start": self.start, "goal": goal, "roads": order[shut:], "moves": ways[goal]}
        return Obs(IMAGE + question, [image]), gold

    def paint(self, n, streets, bars, marks):
        """Draw the town -> (names of the two marks, picture)."""
        rng, step = self.rng, UNITS / n
        ground, ink = plain(rng, self.heldout, self.level)
        colors, canvas = shades(rng, self.heldout), Canvas(self.pixels, ground)
        street = blend(ground, ink, 0.4)
        for roads, long, half, color in ((streets, 0.67, 0.17, street),
                                         (bars, 0.07, 0.25, colors.pop("red"))):
            for x, y in roads:                  # a road lies along x where its x is odd
                wide, high = (long, half) if x % 2 else (half, long)
                x, y = x / 2 + 0.5, y / 2 + 0.5
                corners = x - wide, y - high, x + wide, y + high
                canvas.pen.rectangle(canvas.at(*(c * step for c in corners)), color)
        names = shuffled(rng, SHAPES)[:2]
        for (x, y), name, color in zip(marks, names, shuffled(rng, list(colors.values()))):
            canvas.shape(name, (x + 0.19) * step, (y + 0.19) * step, 0.62 * step, color)
        return names, canvas.image

    def reply(self, gold):
        return box(", ".join(gold["moves"]))

    def glance(self, rng):
        """Goes straight for the goal, whatever is barred."""
        x, y = (g - s for g, s in zip(self.gold["goal"], self.start))
        legs = [["right" if x > 0 else "left"] * abs(x), ["down" if y > 0 else "up"] * abs(y)]
        first = int(rng.integers(2))
        return box(", ".join(legs[first] + legs[1 - first]))


def rows_of(rng, rule, values) -> list[list]:
    """Three rows of three values under a rule."""
    if rule == "step":          # one further each time; the rows start apart where there is room
        starts = shuffled(rng, range(len(values) - 2)) * 3
        rows = [list(values[start:start + 3]) for start in starts[:3]]
        return [row[::-1] for row in rows] if rng.integers(2) else rows
    order = shuffled(rng, values)[:3]
    if rule == "three":         # the same three, each once in a row and in a column
        turn = pick(rng, (1, 2))
        return [[order[(turn * r + i) % 3] for i in range(3)] for r in range(3)]
    return [[order[r * (rule == "rows")]] * 3 for r in range(3)]    # rows: each row has its own


class MatrixPuzzle(OneShot):
    """Three rows of three cells, the last one missing, and lettered choices. [O]

    The choices are all mixtures of right and wrong in two or three respects, so each value comes
    equally often among them and the choices alone tell nothing; a wrong value is one that could
    as well be right under another matrix.
    """
    family, tier, verifier, min_pixels = "reasoning", 2, "EX", 128
    ruled, respects = (1, 1, 2, 2, 3), (2, 2, 2, 3, 3)

    @classmethod
    def chance(cls, level):
        return 0.5 ** cls.respects[level]

    def make(self):
        rng, matrix = self.rng, {}
        names = shuffled(rng, ["shape", "color", pick(rng, ("size", "number"))])
        while not matrix or held(repr(matrix)) != self.heldout:
            rules = {name: self.rule(i, name) for i, name in enumerate(names)}
            matrix = {name: rows_of(rng, rule, VALUES[name]) for name, rule in rules.items()}
        self.right = right = {name: rows[2][2] for name, rows in matrix.items()}
        pairs = [(right[name],) for name in names]
        for i, (name, rows) in enumerate(list(matrix.items())[:self.respects[self.level]]):
            seen = [rows[2][0], rows[0][0], *shuffled(rng, VALUES[name])]
            pairs[i] += next(value for value in seen if value != right[name]),
        self.choices = shuffled(rng, [dict(zip(names, mixture)) for mixture in product(*pairs)])
        gold = "ABCDEFGH"[self.choices.index(right)]
        word = {"three": "each once a row", "step": "one step a cell"}
        told = [f"{name} {word.get(rules[name], 'the same in a row')}, so {right[name]}"
                for name in names]
        self.why = f"{'; '.join(told).capitalize()}. That is {gold}."
        return Obs(IMAGE + pick(rng, MATRIX), [self.paint(matrix)]), gold

    def rule(self, i, name):
        """The first few respects follow a rule that must be found; the others stay the same."""
        if i >= self.ruled[self.level]:
            return "rows" if self.level else "all"
        return "three" if name in ("shape", "color") or self.rng.integers(2) else "step"

    def paint(self, matrix):
        rng, cell = self.rng, 11.5
        ground, ink = plain(rng, self.heldout, self.level)
        self.colors, canvas = shades(rng, self.heldout), Canvas(self.pixels, ground)
        lines = len(self.choices) // 4
        top = (UNITS - (3 + lines) * cell - 1.5 * lines - 2) / 2
        for r, c in product(range(3), range(3)):
            look = {name: rows[r][c] for name, rows in matrix.items()} if r + c < 4 else None
            x, y = UNITS / 2 + (c - 1.5) * (cell + 0.5), top + r * (cell + 0.5)
            self.cell(canvas, x, y, look, ground, ink)
        for i, look in enumerate(self.choices):
            x, y = i % 4 * 16, top + 3 * cell + 3.5 + i // 4 * (cell + 1.5)
            canvas.plate(x + 0.2, y - 0.4, 15.6, cell + 0.8, blend(ground, ink, 0.3), 1)
            canvas.text("ABCDEFGH"[i], x + 2, y + cell / 2, ink, 5, "mm")
            self.cell(canvas, x + 4, y, look, ground, ink)
        return canvas.image

    def cell(self, canvas, x, y, look, ground, ink):
        """One cell with what stands in it: one thing of some size, or some of one size."""
        canvas.plate(x, y, 11.5, 11.5, blend(ground, ink, 0.1), 1)
        if look is None:
            canvas.text("?", x + 5.75, y + 5.75, ink, 9, "mm")
        for i in range(look.get("number", 1) if look else 0):
            size = SIZES.get(look.get("size"), 4.6)
            left, top = (5.75, 5.75) if "size" in look else (3.1 + i % 2 * 5.3, 3.1 + i // 2 * 5.3)
            canvas.shape(look["shape"], x + left - size / 2, y + top - size / 2, size,
                         self.colors[look["color"]])

    def glance(self, rng):
        """A choice that is right in one respect."""
        name = pick(rng, list(self.right))
        fits = [i for i, look in enumerate(self.choices) if look[name] == self.right[name]]
        return box("ABCDEFGH"[pick(rng, fits)])


BLOCKS = [[r * 4 + c for r in (y, y + 1) for c in (x, x + 1)] for y in (0, 2) for x in (0, 2)]


def lines_of(n):
    """The cells of each row, then of each column, of n x n cells numbered row by row."""
    cells = np.arange(n * n).reshape(n, n)
    return cells.tolist() + cells.T.tolist()


def ruled(canvas, lines, cell, start, color, width):
    """Draw these lines of a grid both ways, from `start` to the edge."""
    for at in (line * cell for line in lines):
        for ends in ((at, start, at, UNITS), (start, at, UNITS, at)):
            canvas.pen.line(canvas.at(*ends), color, max(1, canvas.px(width)))


@lru_cache
def sudokus() -> np.ndarray:
    """All 288 grids of 4 x 4, as rows of 16 signs 0-3."""
    rows = list(permutations(range(4)))
    bands = [a + b for a, b in product(rows, rows) if not {*a[:2]} & {*b[:2]}]
    grids = np.array([a + b for a, b in product(bands, bands)])
    columns = np.sort(grids.reshape(-1, 4, 4), axis=1)
    return grids[(columns == np.arange(4)[:, None]).all((1, 2))]


@lru_cache
def patterns(n: int) -> dict:
    """str(runs) -> the lines of n cells that have them."""
    found = {}
    for line in map("".join, product("01", repeat=n)):
        found.setdefault(str(runs(line)), []).append(line)
    return found


class GridLogic(OneShot):
    """A sudoku of 4 x 4, in digits or in shapes, or a nonogram of 3 x 3, from level 2 on 4 x 4.
    Each has one solution, and a place to start: a cell or a line that can be filled at once."""
    family, tier, verifier = "reasoning", 2, "EXEC"
    holes = (4, 6, 8, 9, 10)
    sizes = (3, 3, 4, 4, 4)
    fillings = ((2, 4), (4, 18), (4, 12), (12, 36), (36, 256))     # that suit the rows alone

    @classmethod
    def chance(cls, level):
        return 0.01

    def make(self):
        self.colors = shades(self.rng, self.heldout)
        self.ground, self.ink = plain(self.rng, self.heldout, self.level)
        gold = self.sudoku() if self.rng.integers(2) else self.nonogram()
        return Obs(IMAGE + self.question, [self.canvas.image]), gold

    def sudoku(self):
        rng, grids, empty, forced = self.rng, sudokus(), self.holes[self.level], []
        groups = lines_of(4) + BLOCKS
        places = [f"row {i // 4 + 1}, column {i % 4 + 1}" for i in range(16)]
        while not forced:
            solution, order = pick(rng, grids), rng.permutation(16).tolist()
            holes, given = (sorted(part) for part in (order[:empty], order[empty:]))
            signs = solution[given].tolist()
            if (held(f"{given} {signs}") == self.heldout and len({*signs}) == 4
                    and (grids[:, given] == signs).all(1).sum() == 1):
                known = [{solution[j] for g in groups if i in g for j in g if j in given}
                         for i in range(16)]
                forced = [i for i in holes if len(known[i]) == 3]
        names = shuffled(rng, pick(rng, (SHAPES, ("1", "2", "3", "4"))))[:4]
        tones = shuffled(rng, list(self.colors.values()))
        self.canvas = canvas = Canvas(self.pixels, self.ground)
        ruled(canvas, (1, 3), CELL, 0, blend(self.ground, self.ink, 0.35), 0.6)
        ruled(canvas, (2,), CELL, 0, blend(self.ground, self.ink, 0.7), 1.6)
        for i in given:
            name, x, y = names[solution[i]], i % 4 * CELL, i // 4 * CELL
            if name in SHAPES:
                canvas.shape(name, x + 2.5, y + 2.5, 11, tones[solution[i]])
            else:
                canvas.glyph(name, x, y, self.ink, 11 / 16, 0.02)
        cells = [names[i] for i in solution]
        told = [f"{places[i].capitalize()} can only be {cells[i]}." for i in forced[:2]]
        self.why = f"{' '.join(told)} The rest follows."
        self.question = f"{pick(rng, SUDOKU)} Answer row by row, with / between rows."
        seen = pick(rng, given)
        self.more = [(f"What stands in {places[seen]}?", box(cells[seen])),
                     ("How many cells are empty?", box(empty))]
        return {"size": 4, "signs": names, "givens": {i: cells[i] for i in given},
                "once": groups, "runs": [], "cells": cells}

    def nonogram(self):
        rng, n, (low, high) = self.rng, self.sizes[self.level], self.fillings[self.level]
        suits, groups, found = patterns(n), lines_of(n), 0
        names = [f"{kind} {i + 1}" for kind in ("row", "column") for i in range(n)]
        while found != 1:
            cells = "".join(map(str, rng.integers(2, size=n * n).tolist()))
            wanted = [runs(cells[i] for i in group) for group in groups]
            lines = [suits[str(want)] for want in wanted]
            at_once = [i for i, line in enumerate(lines) if len(line) == 1]
            if (at_once and low <= np.prod([len(line) for line in lines[:n]]) <= high
                    and held(cells) == self.heldout):
                found = sum([runs(column) for column in zip(*rows)] == wanted[n:]
                            for rows in product(*lines[:n]))
        self.canvas, cell = Canvas(self.pixels, self.ground), UNITS / (n + 2)
        tint, line = (blend(self.ground, self.ink, share) for share in (0.25, 0.7))
        self.canvas.plate(2 * cell, 2 * cell, n * cell, n * cell, tint, 0)
        ruled(self.canvas, range(2, n + 2), cell, 2 * cell, line, 0.6)
        for i, want in enumerate(wanted):
            for k, length in enumerate(want):
                x, y = (2 - len(want) + k, i % n + 2)[::1 if i < n else -1]
                mask = glyph_mask(str(length), self.canvas.px(cell), 11 / 16, 0.02, 0)
                self.canvas.stamp(mask, x * cell, y * cell, self.ink)
        told = [f"{names[i].capitalize()} ({' '.join(map(str, wanted[i]))}) can only be "
                f"{' '.join(lines[i][0])}." for i in at_once[:2]]
        self.why = f"{' '.join(told)} The rest follows."
        self.question = (f"{pick(rng, NONOGRAM)} Answer row by row, 1 for filled and 0 for empty, "
                         "with / between rows.")
        self.more = [(f"Which numbers belong to {names[i]}?", box(" ".join(map(str, wanted[i]))))
                     for i in rng.permutation(2 * n)[:2].tolist()]
        return {"size": n, "signs": ["0", "1"], "givens": {}, "once": [],
                "runs": list(zip(groups, wanted)), "cells": list(cells)}

    def reply(self, gold):
        n, cells = gold["size"], gold["cells"]
        return box(" / ".join(" ".join(cells[i:i + n]) for i in range(0, n * n, n)))

    def glance(self, rng):
        """Minds the rows and forgets the columns."""
        gold, cells = self.gold, []
        for group in lines_of(gold["size"])[:gold["size"]]:
            signs = [gold["givens"].get(i) for i in group]
            rest = shuffled(rng, [sign for sign in gold["signs"] if sign not in signs])
            cells += [sign or rest.pop() for sign in signs] if gold["once"] else pick(
                rng, patterns(gold["size"])[str(runs(gold["cells"][i] for i in group))])
        return self.reply({**gold, "cells": cells})
