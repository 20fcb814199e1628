"""Reading: a short line of large characters, one in each cell of the grid."""
from .base import box, held, IMAGE, Obs, OneShot, pick
from .draw import Canvas, CELL, GRID, plain

UPPER = "ABCDEFGHJKLMNPRTUVWXY2346789"      # without O and 0, I and 1, S and 5, Z, Q
LOWER = "abdefhnrt"                         # letters that do not look like their capitals
QUESTIONS = ("Read the text.", "What does it say?")


def jitter(rng, first: int, end: int) -> int:
    """A shift of up to two units either way, or one towards an edge of the grid, so that nothing is
    cut off. The object covers the cells from `first` to `end` - 1."""
    return int(rng.integers(-2 if first else -1, 3 if end < GRID else 2))


class OcrLine(OneShot):
    """Two to four characters; lower case from level 2 on, rotated from 3 on, noisy at 4. Held-out
    splits show only strings that never occur in training, in another weight of the font."""
    tier, verifier = 0, "ED"
    lengths = ((2, 3), (3, 4), (3, 4), (4, 4), (4, 4))

    @classmethod
    def chance(cls, level):
        return 0.03             # one of two or three characters is right by luck

    def make(self):
        rng = self.rng
        low, high = self.lengths[self.level]
        letters = UPPER + LOWER if self.level >= 2 else UPPER
        gold = ""
        while not gold or held(gold) != self.heldout:
            gold = "".join(pick(rng, letters) for _ in range(int(rng.integers(low, high + 1))))
        row, column = int(rng.integers(GRID)), int(rng.integers(GRID - len(gold) + 1))
        ground, ink = plain(rng, self.heldout, self.level)
        canvas = Canvas(self.pixels, ground)
        bold = 0.02 if self.heldout else pick(rng, (0.0, 0.04))
        dx = jitter(rng, column, column + len(gold))    # the same shift for the whole line
        dy = jitter(rng, row, row + 1)
        for i, char in enumerate(gold):
            angle = int(rng.integers(-3, 4)) * 5 if self.level >= 3 else 0
            x, y = (column + i) * CELL + dx, row * CELL + dy
            canvas.glyph(char, x, y, ink, 12 / 16, bold, angle)
        if self.level >= 4:
            canvas.noise(rng, 25)
        i = int(rng.integers(len(gold)))
        self.more = [(f"What is character {i + 1}?", box(gold[i]))]
        return Obs(IMAGE + pick(rng, QUESTIONS), [canvas.image]), gold

    def glance(self, rng):
        return box(self.gold[:2] + "?" * (len(self.gold) - 2))
