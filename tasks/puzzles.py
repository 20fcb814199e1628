"""Puzzles: a route through barred streets, a matrix without its last cell, a small grid to fill.

Routes and grids are executed, never compared with the oracle's: every route that reaches the goal
and every grid that keeps the rules is right. [C] for scores by execution, [O] for the puzzles.
"""
from functools import lru_cache
from itertools import accumulate, permutations, product

import numpy as np

from .base import box, held, IMAGE, Obs, OneShot, pick, worded
from .draw import blend, Canvas, CELL, COLORS, glyph_mask, ground_and_ink, shades, SHAPES, UNITS
from .verify import ahead, MOVES, runs
from .words import some_of

# How a user may word a question; level 0 has the first two of each.
ROUTES = ("Go from the {} to the {} by the shortest way.",
          "The shortest way from the {} to the {}?",
          "Find the shortest way from the {} to the {}.",
          "Which way from the {} to the {} is shortest?",
          "What is the shortest route from the {} to the {}?")
MATRIX = ("Which choice completes the pattern?", "Which choice belongs in the empty cell?",
          "What goes into the empty cell?", "Find the choice that completes the pattern.",
          "Which of the choices fits into the empty cell?")
SUDOKU = ("Fill the grid: every row, column and block holds each sign once.", "Solve the sudoku.",
          "Complete the sudoku.", "Fill the empty cells: each sign once in every row, column and "
          "block.", "Find the solution of the sudoku.")
NONOGRAM = ("Solve the nonogram.", "Fill the cells as the numbers of runs tell.",
            "Complete the nonogram.", "Which cells are filled, as the numbers of runs tell?",
            "Find the solution of the nonogram.")
SIZES = {"small": 4.5, "middle": 7, "large": 9.5}
VALUES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "number": (1, 2, 3, 4)}
LETTERS = "ABCDEFGH"


def shortest(start, roads) -> dict:
    """{crossing: the moves of a shortest route to it}, from `start` over open roads."""
    ways, queue = {start: []}, [start]
    for place in queue:
        for move in MOVES:
            there, road = ahead(place, move)
            if road in roads and there not in ways:
                ways[there] = [*ways[place], move]
                queue.append(there)
    return ways


class MapRoute(OneShot):
    """Find the shortest route between two marks through streets, some of which are barred. From
    level 2 on some streets are missing as well, and a detour is necessary."""
    family, tier, verifier = "reasoning", 2, "EXEC"
    blind = (0.07, 0.03, 0.02, 0.01, 0.01)      # measured
    # by level: crossings along a side, barred or missing roads, moves at least
    crossings, closed, least = (3, 4, 4, 5, 5), (2, 6, 9, 14, 16), (2, 3, 4, 5, 7)

    def make(self):
        rng, hard, shut = self.rng, self.level >= 2, self.closed[self.level]
        n, least, goals = self.crossings[self.level], self.least[self.level], []
        every = [(x, y) for y in range(2 * n - 1) for x in range(2 * n - 1) if (x + y) % 2]
        while not goals:
            order = some_of(rng, every)
            barred, roads = order[:shut], order[shut:]
            start = x, y = int(rng.integers(n)), int(rng.integers(n))
            ways = shortest(start, roads)
            if held(f"{barred} {start}") == self.heldout:
                goals = [(u, v) for (u, v), moves in ways.items()
                         if len(moves) >= max(least, abs(u - x) + abs(v - y) + hard)]
        goal = pick(rng, goals)
        moves, gone = ways[goal], barred[:shut // 2] if hard else []
        streets, bars = [road for road in every if road not in gone], barred[len(gone):]
        names, image = self.paint(n, streets, bars, [start, goal])
        seen = accumulate(moves, lambda at, move: ahead(at, move)[0], initial=start)
        seen = " ".join(f"({x + 1}, {y + 1})" for x, y in seen)
        self.why = f"By column and row: {seen}, so {len(moves)} moves."
        exits = [move for move in MOVES if ahead(start, move)[1] in roads]
        self.more = [(f"From the {names[0]}, which moves are possible?", box(", ".join(exits))),
                     ("How many roads are barred?", box(len(bars)))]
        question = f"{worded(rng, ROUTES, self.level).format(*names)} Moves: right, down, left, up."
        gold = {"start": start, "goal": goal, "roads": roads, "moves": moves}
        return Obs(IMAGE + question, [image]), gold

    def paint(self, n, streets, bars, marks):
        """Draw the streets -> (names of the two marks, picture)."""
        rng, step = self.rng, UNITS / n
        ground, ink = ground_and_ink(rng, self.heldout, self.level)
        colors, canvas = shades(rng, self.heldout), Canvas(self.pixels, ground)
        for roads, long, half, color in ((streets, 0.67, 0.17, blend(ground, ink, 0.4)),
                                         (bars, 0.07, 0.25, colors.pop("red"))):
            for x, y in roads:                  # a road is horizontal if its x is odd
                wide, high = (long, half) if x % 2 else (half, long)
                x, y = x / 2 + 0.5, y / 2 + 0.5
                corners = x - wide, y - high, x + wide, y + high
                canvas.pen.rectangle(canvas.at(*(c * step for c in corners)), color)
        names = some_of(rng, SHAPES)[:2]
        for (x, y), name, color in zip(marks, names, some_of(rng, list(colors.values()))):
            canvas.shape(name, (x + 0.19) * step, (y + 0.19) * step, 0.62 * step, color)
        return names, canvas.image

    def reply(self, gold):
        return box(", ".join(gold["moves"]))

    def glance(self, rng):
        """A direct route to the goal that ignores the bars."""
        x, y = (g - s for g, s in zip(self.gold["goal"], self.gold["start"]))
        legs = [["right" if x > 0 else "left"] * abs(x), ["down" if y > 0 else "up"] * abs(y)]
        return box(", ".join(sum(legs[::pick(rng, (1, -1))], [])))


def pack_rows(rng, rule, values) -> list[list]:
    """Three rows of three values under a rule. all: the same value everywhere; rows: one value for
    each row; three: three values, each once in every row and column; step: each value of a row is
    one step after the last."""
    if rule == "step":          # the rows start at different values if there are enough
        starts, turn = some_of(rng, range(len(values) - 2)) * 3, pick(rng, (1, -1))
        return [list(values[start:start + 3])[::turn] for start in starts[:3]]
    order = some_of(rng, values)[:3]
    if rule == "three":
        turn = pick(rng, (1, 2))
        return [[order[(turn * r + i) % 3] for i in range(3)] for r in range(3)]
    return [[order[r * (rule == "rows")]] * 3 for r in range(3)]


class MatrixPuzzle(OneShot):
    """Choose the last cell of a matrix of three rows and columns. The choices are all combinations
    of the right and one wrong value in two or three attributes, so each value occurs equally often
    and the choices alone give nothing away. Wrong values occur in the matrix where possible. [O]"""
    family, tier, verifier, min_pixels = "reasoning", 2, "EX", 128
    # by level: attributes with a rule along the row; attributes in which choices differ
    ruled, respects, blind = (1, 1, 2, 2, 3), (2, 2, 2, 3, 3), (0.25, 0.25, 0.25, 0.125, 0.125)

    def make(self):
        rng, matrix = self.rng, {}
        names = some_of(rng, ["shape", "color", pick(rng, ("size", "number"))])
        while not matrix or held(repr(matrix)) != self.heldout:
            rules = dict.fromkeys(names, "rows" if self.level else "all")
            for name in names[:self.ruled[self.level]]:
                steps = name in ("size", "number") and not rng.integers(2)
                rules[name] = "step" if steps else "three"
            matrix = {name: pack_rows(rng, rule, VALUES[name]) for name, rule in rules.items()}
        self.right = right = {name: rows[2][2] for name, rows in matrix.items()}
        choices = [right]
        for name in names[:self.respects[self.level]]:
            seen = [matrix[name][2][0], matrix[name][0][0], *some_of(rng, VALUES[name])]
            wrong = next(value for value in seen if value != right[name])
            choices = [{**look, name: value} for look in choices for value in (right[name], wrong)]
        self.choices = some_of(rng, choices)
        gold = LETTERS[self.choices.index(right)]
        word = {"three": "each once a row", "step": "one step a cell"}
        told = [f"{name} {word.get(rules[name], 'the same in a row')}, so {right[name]}"
                for name in names]
        self.why = f"{'; '.join(told).capitalize()}. That is {gold}."
        return Obs(IMAGE + worded(rng, MATRIX, self.level), [self.paint(matrix)]), gold

    def paint(self, matrix):
        """Draw the matrix and, below it, the choices -> picture."""
        rng, cell, lines = self.rng, 11.5, len(self.choices) // 4
        ground, ink = ground_and_ink(rng, self.heldout, self.level)
        colors, canvas = shades(rng, self.heldout), Canvas(self.pixels, ground)
        top = (UNITS - (3 + lines) * cell - 1.5 * lines - 2) / 2
        cells = [(UNITS / 2 + (c - 1.5) * (cell + 0.5), top + r * (cell + 0.5),
                  {name: rows[r][c] for name, rows in matrix.items()})
                 for r, c in product(range(3), range(3))]
        cells[-1] = *cells[-1][:2], {"number": 0}       # the one that is missing
        for i, look in enumerate(self.choices):
            x, y = i % 4 * 16, top + 3 * cell + 3.5 + i // 4 * (cell + 1.5)
            canvas.plate(x + 0.2, y - 0.4, 15.6, cell + 0.8, blend(ground, ink, 0.3), 1)
            canvas.text(LETTERS[i], x + 2, y + cell / 2, ink, 5, "mm")
            cells.append((x + 4, y, look))
        for x, y, look in cells:        # a cell has one shape of some size, or several of one size
            canvas.plate(x, y, cell, cell, blend(ground, ink, 0.1), 1)
            size = SIZES.get(look.get("size"), 4.6)
            for i in range(look.get("number", 1)):
                dx, dy = (5.75, 5.75) if "size" in look else (3.1 + i % 2 * 5.3, 3.1 + i // 2 * 5.3)
                canvas.shape(look["shape"], x + dx - size / 2, y + dy - size / 2, size,
                             colors[look["color"]])
        canvas.text("?", cells[8][0] + 5.75, cells[8][1] + 5.75, ink, 9, "mm")
        return canvas.image

    def glance(self, rng):
        """A choice that is right in one attribute."""
        name = pick(rng, list(self.right))
        return box(pick(rng, [letter for letter, look in zip(LETTERS, self.choices)
                              if look[name] == self.right[name]]))


def lines_of(n):
    """The cells of each row, then of each column, of n x n cells that are numbered row by row."""
    cells = np.arange(n * n).reshape(n, n)
    return cells.tolist() + cells.T.tolist()


def ruled(canvas, lines, cell, start, color, width):
    """Draw the vertical and horizontal lines of a grid, from `start` to the edge."""
    for at in (line * cell for line in lines):
        for ends in ((at, start, at, UNITS), (start, at, UNITS, at)):
            canvas.pen.line(canvas.at(*ends), color, max(1, canvas.px(width)))


@lru_cache
def sudokus() -> np.ndarray:
    """All 288 solved sudokus of 4 x 4: an array (288, 16) of signs 0-3."""
    rows = permutations(range(4))
    bands = [a + b for a, b in permutations(rows, 2) if not {*a[:2]} & {*b[:2]}]
    grids = np.array([a + b for a, b in product(bands, bands)])
    columns = np.sort(grids.reshape(-1, 4, 4), axis=1)
    return grids[(columns == np.arange(4)[:, None]).all((1, 2))]


@lru_cache
def patterns(n: int) -> dict:
    """{str(runs): the lines of n cells, such as "0110", that have these runs}."""
    lines = ["".join(cells) for cells in product("01", repeat=n)]
    return {str(runs(line)): [one for one in lines if runs(one) == runs(line)] for line in lines}


class GridLogic(OneShot):
    """Solve a sudoku of 4 x 4, in digits or in shapes, or a nonogram of 3 x 3, from level 2 on of
    4 x 4. Each has one solution, and a cell or a line that can be filled at once to start with."""
    family, tier, verifier, blind = "reasoning", 2, "EXEC", (0.01,) * 5
    holes, sizes = (4, 6, 8, 9, 10), (3, 3, 4, 4, 4)
    fillings = ((2, 4), (4, 18), (4, 12), (12, 36), (36, 256))     # that satisfy the rows alone

    def make(self):
        self.colors = shades(self.rng, self.heldout)
        self.ground, self.ink = ground_and_ink(self.rng, self.heldout, self.level)
        self.canvas = Canvas(self.pixels, self.ground)
        question, told, gold = self.sudoku() if self.rng.integers(2) else self.nonogram()
        self.why = " ".join([*told[:2], "The rest follows."])
        return Obs(f"{IMAGE}{question}, with / between rows.", [self.canvas.image]), gold

    def sudoku(self):
        """Draw a sudoku -> (question, first steps in words, gold)."""
        rng, canvas, empty, forced = self.rng, self.canvas, self.holes[self.level], []
        groups = lines_of(4) + [[i, i + 1, i + 4, i + 5] for i in (0, 2, 8, 10)]
        places = [f"row {i // 4 + 1}, column {i % 4 + 1}" for i in range(16)]
        while not forced:
            solution, order = pick(rng, sudokus()), rng.permutation(16).tolist()
            holes, given = sorted(order[:empty]), sorted(order[empty:])
            signs = solution[given].tolist()
            if (held(f"{given} {signs}") == self.heldout and len({*signs}) == 4
                    and (sudokus()[:, given] == signs).all(1).sum() == 1):
                forced = [i for i in holes if 3 == len(
                    {solution[j] for group in groups if i in group for j in group if j in given})]
        names = some_of(rng, pick(rng, (SHAPES, "1234")))[:4]
        tones = some_of(rng, list(self.colors.values()))
        cells = [names[i] for i in solution]
        ruled(canvas, (1, 3), CELL, 0, blend(self.ground, self.ink, 0.35), 0.6)
        ruled(canvas, (2,), CELL, 0, blend(self.ground, self.ink, 0.7), 1.6)
        for i in given:
            x, y = i % 4 * CELL, i // 4 * CELL
            if cells[i] in SHAPES:
                canvas.shape(cells[i], x + 2.5, y + 2.5, 11, tones[solution[i]])
            else:
                canvas.glyph(cells[i], x, y, self.ink, 11 / 16, 0.02)
        question, seen = f"{worded(rng, SUDOKU, self.level)} Answer row by row", pick(rng, given)
        self.more = [(f"What stands in {places[seen]}?", box(cells[seen])),
                     ("How many cells are empty?", box(empty))]
        told = [f"{places[i].capitalize()} can only be {cells[i]}." for i in forced]
        return question, told, {"size": 4, "signs": names, "givens": {i: cells[i] for i in given},
                                "once": groups, "runs": [], "cells": cells}

    def nonogram(self):
        """Draw a nonogram -> (question, first steps in words, gold)."""
        rng, n, (low, high) = self.rng, self.sizes[self.level], self.fillings[self.level]
        suits, groups, found = patterns(n), lines_of(n), 0
        while found != 1:
            cells = "".join(map(str, rng.integers(2, size=n * n).tolist()))
            wanted = [runs(cells[i] for i in group) for group in groups]
            lines = [suits[str(want)] for want in wanted]
            single = [i for i, line in enumerate(lines) if len(line) == 1]
            if (single and low <= np.prod([len(line) for line in lines[:n]]) <= high
                    and held(cells) == self.heldout):
                found = sum([runs(column) for column in zip(*rows)] == wanted[n:]
                            for rows in product(*lines[:n]))
        canvas, cell = self.canvas, UNITS / (n + 2)
        canvas.plate(2 * cell, 2 * cell, n * cell, n * cell, blend(self.ground, self.ink, 0.25), 0)
        ruled(canvas, range(2, n + 2), cell, 2 * cell, blend(self.ground, self.ink, 0.7), 0.6)
        for i, want in enumerate(wanted):
            for k, length in enumerate(want, 2 - len(want)):
                x, y = (k, i + 2) if i < n else (i - n + 2, k)
                mask = glyph_mask(str(length), canvas.px(cell), 11 / 16, 0.02, 0)
                canvas.stamp(mask, x * cell, y * cell, self.ink)
        names = [f"{kind} {i + 1}" for kind in ("row", "column") for i in range(n)]
        numbers = [" ".join(map(str, want)) for want in wanted]
        question = (f"{worded(rng, NONOGRAM, self.level)} Answer row by row, "
                    "1 for filled and 0 for empty")
        self.more = [(f"Which numbers belong to {names[i]}?", box(numbers[i]))
                     for i in rng.permutation(2 * n)[:2].tolist()]
        told = [f"{names[i].capitalize()} ({numbers[i]}) can only be {' '.join(lines[i][0])}."
                for i in single]
        return question, told, {"size": n, "signs": ["0", "1"], "givens": {}, "once": [],
                                "runs": list(zip(groups, wanted)), "cells": list(cells)}

    def reply(self, gold):
        n, cells = gold["size"], gold["cells"]
        return box(" / ".join(" ".join(cells[i:i + n]) for i in range(0, n * n, n)))

    def glance(self, rng):
        """A grid that satisfies the rows and ignores the columns."""
        gold, n, cells = self.gold, self.gold["size"], []
        for group in lines_of(n)[:n]:
            signs = [gold["givens"].get(i) for i in group]
            rest = some_of(rng, [sign for sign in gold["signs"] if sign not in signs])
            cells += [sign or rest.pop() for sign in signs] if gold["once"] else pick(
                rng, patterns(n)[str(runs(gold["cells"][i] for i in group))])
        return self.reply({**gold, "cells": cells})
