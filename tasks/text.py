"""Reading: a short line of large characters. At level 0 each has a cell of the grid for itself;
from level 1 on the line lies anywhere, in many sizes, and half of the pictures are not square."""
from .base import box, click, held, IMAGE, middle, Obs, OneShot, pick, worded
from .draw import aspect, Canvas, CELL, GRID, ground_and_ink, SQUARE
from .scenes import CLICK_ON, POINT_AT

UPPER = "ABCDEFGHJKLMNPRTUVWXY2346789"      # without O and 0, I and 1, S and 5, Z, Q
LOWER = "abdefhnrt"                         # letters that do not look like their capitals
QUESTIONS = ("What does it say?", "Read the text.", "What is written here?",
             "Read what is written.", "What text is this?")
CHARACTER = ("What is character {}?", "Which character is number {}?", "Read character {}.")


def jitter(rng, first: int, end: int) -> int:
    """A shift of up to two units either way, or one towards an edge of the grid, so that nothing is
    cut off. The object covers the cells from `first` to `end` - 1."""
    return int(rng.integers(-2 if first else -1, 3 if end < GRID else 2))


class OcrLine(OneShot):
    """Two to four characters; lower case from level 2 on, rotated from 3 on, noisy at 4. Held-out
    splits show only strings that never occur in training, in another weight of the font."""
    tier, verifier, blind = 0, "ED", (0.01,) * 5        # a character is right by luck
    lengths = ((2, 3), (3, 4), (3, 4), (4, 4), (4, 4))

    def make(self):
        rng = self.rng
        low, high = self.lengths[self.level]
        letters = UPPER + LOWER if self.level >= 2 else UPPER
        gold = ""
        while not gold or held(gold) != self.heldout:
            gold = "".join(pick(rng, letters) for _ in range(int(rng.integers(low, high + 1))))
        ground, ink = ground_and_ink(rng, self.heldout, self.level)
        bold = 0.02 if self.heldout else pick(rng, (0.0, 0.04))
        grid, x, y, side = self.place(len(gold))
        canvas, areas = Canvas(self.pixels, ground, grid), []
        for i, char in enumerate(gold):
            angle = int(rng.integers(-3, 4)) * 5 if self.level >= 3 else 0
            areas.append(canvas.glyph(char, x + i * side, y, ink, 12 / 16, bold, angle, side))
        if self.level >= 4:
            canvas.noise(rng, 25)
        i, level = int(rng.integers(len(gold))), self.level
        self.more = [(worded(rng, CHARACTER, level, 1).format(i + 1), box(gold[i]))]
        if level and gold.count(gold[i]) == 1:     # else it would have two right answers
            place = box([*middle(areas[i])])
            self.more.append((worded(rng, CLICK_ON, level).format(gold[i]), click(areas[i])))
            self.more.append((worded(rng, POINT_AT, level).format(gold[i]), place))
        return Obs(IMAGE + worded(rng, QUESTIONS, level), [canvas.image]), gold

    def place(self, n):
        """A random (grid, x, y, side) for a line of n characters: the picture's columns and rows,
        the line's top left and the side of a character's square, in units. A capital, three
        quarters of the side, is nine units high or more."""
        rng = self.rng
        if self.level == 0:
            row, column = int(rng.integers(GRID)), int(rng.integers(GRID - n + 1))
            dx, dy = jitter(rng, column, column + n), jitter(rng, row, row + 1)
            return SQUARE, column * CELL + dx, row * CELL + dy, CELL
        most = 0
        while most < 12:
            grid = aspect(rng, self.level)
            wide, high = (CELL * side for side in grid)
            most = min(24, wide // n, high)
        side = int(rng.integers(12, most + 1))
        return grid, rng.uniform(0, wide - n * side), rng.uniform(0, high - side), side

    def glance(self, rng):
        return box(self.gold[:2] + "?" * (len(self.gold) - 2))
