"""Programs: read one and say what it prints; write one from a description."""
import keyword
import re

from .base import box, held, IMAGE, Obs, OneShot, pick, worded
from .draw import Canvas, font, text_mask
from .interpreter import FAULTS, Machine
from .words import invent, some, some_of, THINGS

VARIABLES = """a b c d e g h k m n p q r t u v w x y z area base best bits cost days depth fee gain
gap goal high item jump low mark mass pace part price rank rate rest score seed side start tax team
tide time top total turn unit way wide year zone""".split()
# Statements by group. x and y are numbers, s is a text, xs a list, k a loop variable, f a function
# of p and q. Drawn at random: a, b (2-9), c, d (11-40), the words w, v. Lines before an empty line
# go to the top of the program.
STATEMENTS = (
    ("{x} = {x} + {y}", "{x} = {y} * {a} - {x}", "{y} = {x} - {a}", "{x} += {c}",
     "{y} = {y} + {x} // 2", "{x}, {y} = {y}, {x} + {b}", "{x} = {c} - {x} % {a}"),
    ("if {x} > {y}:\n\t{x} -= {y}\nelse:\n\t{x} += {c}",
     "if {x} % 2 == 0:\n\t{x} = {x} // 2\nelse:\n\t{x} = {x} * 3 + {a}",
     "if {x} < {a} or {y} > {b}:\n\t{x} = {x} + {d}\nelse:\n\t{x} = {c} - {y}",
     "if {y} % 3 == 1 and {x} != {b}:\n\t{x} = {y} * {b}\n{x} += {d}"),
    ("for {k} in range({a}):\n\t{x} += {k} * {b}",
     "for {k} in range({a}, {a} + {b}):\n\tif {k} % 2 == 1:\n\t\t{x} = {x} + {k}",
     "for {k} in [{b}, {d}, {a}]:\n\t{x} = {k} - {x}",
     "for {k} in range(5):\n\t{x} = ({x} * {a} + {b}) % {c}",
     '{s} = "{w}"\nfor {k} in range({a}):\n\t{s} = {s}[1:] + {s}[0]'),
    ("while {x} < {c} + {d}:\n\t{x} += {y}\n\t{y} += {a}",
     "while {x} > {a}:\n\t{x} -= {b}\n\t{y} += {a}\n{x} = {y} - {x}",
     "{xs} = [{a}, {c}, {b}, {d}]\nfor {k} in {xs}:\n\tif {k} > {y}:\n\t\t{x} += {k}",
     "{xs} = sorted([{x}, {c}, {y}, {d}])\n{xs}.append({b})\n{x} = {xs}[1] * 2 - {xs}[-1]",
     '{s} = ""\nfor {k} in "{w}":\n\tif {k} > "m":\n\t\t{s} = {k} + {s}\n\telse:\n'
     "\t\t{s} += {k}"),
    ("def {f}({p}, {q}):\n\tif {p} > {q}:\n\t\treturn {p} - {q}\n\treturn {q} + {p} * {a}\n\n"
     "for {k} in [{c}, {b}, {d}]:\n\t{x} = {f}({x}, {k})",
     "def {f}({p}):\n\tif {p} < {a}:\n\t\treturn {p}\n\treturn {p} % {a} + {f}({p} // {a})\n\n"
     "{x} = {f}({c} * {d}) * {b} + {x}",
     "def {f}({p}, {q}):\n\tfor {k} in {p}:\n\t\t{q} = max({q}, {k}) - {a}\n\treturn {q}\n\n"
     "{xs} = [{c}, {y}, {d}, {b}]\n{x} = {f}({xs}, {x}) + len({xs})",
     'def {f}({p}, {q}):\n\twhile len({p}) < {a} + {b}:\n\t\t{p} = {p}[-1] + {p} + {q}\n'
     '\treturn {p}[{a}:]\n\n{s} = {f}("{w}", "{v}")'))
# The groups in a program, by level; the question is about the result of the highest group.
PLANS = ((0, 0), (0, 1), (0, 2), (1, 3, 0), (1, 2, 4))
# How a user may word a question; level 0 has three, one and two of them.
ASK = ("What does this program print?", "What is the output?", "What gets printed here?",
       "Which output does this code have?", "Run this in your head: what does it print?")
AT_END = ("What is {} at the end?", "What is the last value of {}?",
          "Which value does {} end with?", "Tell me the value of {} at the end.")
WRITE = ("Write a Python function {} for {}: it returns {}.",
         "Define a Python function {} for {}: it returns {}.",
         "Give me a Python function {} for {}: it returns {}.",
         "I need a Python function {} for {}: it returns {}.",
         "Implement a Python function {} for {}: it returns {}.")
# Colours of background, panel, plain text, keywords, functions, numbers and strings: a dark and a
# light theme for training, then a dark and a light one that are held out
THEMES = (((30, 32, 40), (40, 43, 54), "#e6e8ee", "#ff7ac0", "#6cc7ff", "#ffb86b", "#9be07a"),
          ((250, 250, 248), (232, 234, 238), "#24292e", "#b3189a", "#0b57c4", "#b04a00", "#137333"),
          ((8, 42, 54), (14, 56, 70), "#dfe9e6", "#f2c14e", "#7fd6e8", "#ff9d94", "#b8e08a"),
          ((253, 246, 227), (238, 230, 206), "#39464b", "#a8480a", "#5a46c0", "#0d6e8c", "#55690a"))


def editor(pixels: int, theme, lines: list[str]):
    """Draw code as an editor shows it, as large as fits -> picture."""
    widest = max(font(100).getlength(line) / 100 + 0.27 * line.count(" ") for line in lines)
    canvas, pitch = Canvas(pixels, theme[0]), 1.34
    canvas.plate(0, 0, 6.5, 64, theme[1], 0)
    size = min(4.4, 60 / (pitch * len(lines)), 51 / widest)
    em = canvas.px(size)
    rise = font(em).getmetrics()[0] - em        # the part of the ascent above the font's size
    for i, line in enumerate(lines):
        x, y = canvas.px(8.5), canvas.px(2 + pitch * size * i) - rise
        number = text_mask(str(i + 1), em)
        canvas.image.paste("#868c98", (canvas.px(5.6) - number.width, y), number)
        for token, call in re.findall(r'( +|"[^"]*"|\w+|[^\w\s"]+)(?=(\(?))', line):
            if token[0] == " ":
                x += round(len(token) * em * (0.5 if len(token) > 1 else 0.4))
            else:
                ink = (3 if keyword.iskeyword(token) else 4 if call and token.isidentifier() else
                       5 if token.isdigit() else 6 if token[0] == '"' else 2)
                mask = text_mask(token, em)
                canvas.image.paste(theme[ink], (x, y), mask)
                x += mask.width - 2
    return canvas.image


class CodeOutput(OneShot):
    """Say what a program of 5 to 16 lines prints. By level it has assignments, a condition, a loop,
    a list or a text, a function. Held-out splits have other combinations of statements."""
    family, tier, verifier, min_pixels = "reasoning", 2, "EX", 256
    blind = (0.03,) * 5         # measured: the most frequent answer

    def write(self) -> list[str]:
        """The lines of a random program. It may fail when it runs."""
        rng, plan = self.rng, None
        while plan is None or held(str(plan)) != self.heldout:
            plan = [(group, int(rng.integers(len(STATEMENTS[group]))))
                    for group in some_of(rng, PLANS[self.level])]
        names = dict(zip("x y s xs k f p q".split(), some(rng, VARIABLES, 8, self.heldout)))
        w, v = some(rng, [word for word in THINGS if len(word) <= 6], 2, self.heldout)
        top, rest, asked = [], [f"{names[n]} = {int(rng.integers(2, 20))}" for n in "xy"], "x"
        for group, which in plan:
            text = STATEMENTS[group][which]
            (a, b), (c, d) = rng.permutation(8)[:2] + 2, rng.permutation(30)[:2] + 11
            own = {**names, "x": names["y"], "y": names["x"]} if rng.integers(3) == 0 else names
            if group == max(PLANS[self.level]):
                own, asked = names, "s" if "{s}" in text else "x"
            text = text.format(a=a, b=b, c=c, d=d, w=w, v=v, **own).expandtabs(4)
            head, _, body = text.rpartition("\n\n")
            top, rest = top + head.splitlines(), rest + body.splitlines()
        return [*top, *rest, f"print({names[asked]})"]

    def make(self):
        rng, gold = self.rng, ""
        while not gold:
            trace, lines = [], self.write()
            try:
                machine = Machine("\n".join(lines), trace)
            except FAULTS:
                continue
            given_away = {"0", "1", *re.findall(r"\w+", " ".join(lines))}
            if len(trace) <= 30 and machine.printed[0] not in given_away:
                gold = machine.printed[0]
        image = editor(self.pixels, pick(rng, THEMES[2 * self.heldout:][:2]), lines)
        others = [(n, v) for n, v in machine.names.items()
                  if lines[-1] != f"print({n})" and not isinstance(v, list)]
        self.more = [(worded(rng, AT_END, self.level, 1).format(n), box(v)) for n, v in others[:2]]
        self.trace, self.shown = trace, list(dict(trace).values())
        self.why = ", ".join(f"{n} = {v}" for n, v in trace) + f". It prints {gold}."
        return Obs(IMAGE + worded(rng, ASK, self.level, 3), [image]), gold


# (description of the result, code), three or more for each level. {xs} is a list of numbers, {s} a
# text, {n} a number. Drawn at random: a, b, c (2-9, all different), e (11-40), the letters w.
FAMILIES = (
    (("the sum of those numbers in {xs} that are greater than {a}",
      "return sum([t for t in {xs} if t > {a}])"),
     ("how many numbers in {xs} are divisible by {a}",
      "return len([t for t in {xs} if t % {a} == 0])"),
     ("{a} times {n}, plus {b}", "return {n} * {a} + {b}")),
    (("a list of the numbers in {xs}, in their order, with {b} in place of each one below {a}",
      "return [{b} if t < {a} else t for t in {xs}]"),
     ("{s} with its first {a} characters moved to its end (a shorter text stays as it is)",
      "return {s}[{a}:] + {s}[:{a}]"),
     ("the sum of the decimal digits of {n}, times {a}",
      "return {a} * sum([int(t) for t in str({n})])")),
    (("the sum of all whole numbers from 1 to {n} that are divisible by {a} or by {b} or by both",
      "return sum([t for t in range(1, {n} + 1) if t % {a} == 0 or t % {b} == 0])"),
     ('{s} with each character that is one of "{w}" written {a} times in its place',
      'u = ""\nfor t in {s}:\n\tu += t * {a} if t in "{w}" else t\nreturn u'),
     ("a list of the numbers in {xs} whose positions, from 0, are divisible by {a}, each plus {b}",
      "return [t + {b} for t in {xs}[::{a}]]")),
    (("the smallest whole number greater than {n} that is not divisible by {a}, but leaves the "
      "remainder 1 when divided by {b}",
      "t = {n} + 1\nwhile t % {a} == 0 or t % {b} != 1:\n\tt += 1\nreturn t"),
     ("the number of steps in which {n} comes to 0 or below, if a step takes away {a} from what "
      "is left where that is divisible by {b}, and {c} where it is not",
      "u = 0\nwhile {n} > 0:\n\t{n} -= {a} if {n} % {b} == 0 else {c}\n\tu += 1\nreturn u"),
     ("how many numbers in {xs} differ by more than {a} from the one just before them",
      "u = 0\nfor t in range(1, len({xs})):\n\tif abs({xs}[t] - {xs}[t - 1]) > {a}:\n\t\tu += 1\n"
      "return u")),
    (("term {n} of the sequence whose terms 0 and 1 are {a} and {b} and whose every further term "
      "is the remainder of the sum of the two before it, divided by {e}",
      "t, u = {a}, {b}\nfor k in range({n}):\n\tt, u = u, (t + u) % {e}\nreturn t"),
     ("the final total, if it starts at {a} and each number in {xs}, from the first to the last, "
      "is added if even and taken away if odd, and the total is set to {b} whenever it is below 0",
      "u = {a}\nfor t in {xs}:\n\tu = u + t if t % 2 == 0 else u - t\n\tif u < 0:\n\t\tu = {b}\n"
      "return u"),
     ("the largest sum of {a} numbers that stand side by side in {xs}, or {b} if it has fewer",
      "u = [sum({xs}[t:t + {a}]) for t in range(len({xs}) - {a} + 1)]\n"
      "return max(u) if u else {b}"),
     ('{b} plus {a} times the sum of the positions, from 0, at which {s} has one of "{w}"',
      'u = {b}\nfor t in range(len({s})):\n\tif {s}[t] in "{w}":\n\t\tu += {a} * t\nreturn u')))
ARGUMENTS = [v for v in VARIABLES if len(v) > 1 and v not in repr(FAMILIES)]
KINDS = {"xs": "a list of whole numbers", "s": "a text", "n": "a whole number, 0 or more"}


class TextCode(OneShot):
    """Write a function from its description; there is no picture. Held-out splits have other
    numbers in the same descriptions, and other names."""
    family, tier, verifier, blind = "reasoning", 2, "EXEC", (0.0,) * 5

    def draw(self, rng) -> tuple[str, str, str]:
        """Draw the numbers of a description -> (description, code, text that `held` decides on)."""
        (a, b, c), e = rng.permutation(8)[:3] + 2, rng.integers(11, 41)
        w = "".join(sorted("abcdefgh"[i] for i in rng.permutation(8)[:3]))
        what, body = (text.format(a=a, b=b, c=c, e=e, w=w, **{self.kind: self.argument})
                      for text in FAMILIES[self.level][self.row])
        code = f"def {self.name}({self.argument}):\n{body}"
        return what, code.replace("\n", "\n\t").expandtabs(4), what.replace(self.argument, "")

    def make(self):
        rng = self.rng
        self.name = "do_" + invent(rng, self.heldout).lower()
        self.argument = some(rng, ARGUMENTS, 1, self.heldout)[0]
        rule = None
        while rule is None or held(rule) != self.heldout:
            self.row = int(rng.integers(len(FAMILIES[self.level])))
            self.kind = re.search(r"{(xs|s|n)}", FAMILIES[self.level][self.row][0])[1]
            what, self.code, rule = self.draw(rng)
        cases = []
        while len({str(r) for [each], r in cases if r != each}) < 3:    # or a constant would do
            sizes = rng.integers(1, 31 if self.kind == "n" else 13, 7).tolist()
            machine, inputs = Machine(self.code), [0, max(sizes), *sizes]
            if self.kind != "n":
                inputs = [rng.integers(-9, 31, n).tolist() for n in inputs]
            if self.kind == "s":
                inputs = ["".join("abcdefgh"[i % 8] for i in drawn) for drawn in inputs]
            cases = [([each], machine.invoke(self.name, [each])) for each in inputs]
        least, most = (f"{self.name}({each!r}) is {result!r}" for [each], result in cases[:2])
        self.why = f"{least}, {most}."
        text = worded(rng, WRITE, self.level).format(
            f"{self.name}({self.argument})", KINDS[self.kind], what)
        return Obs(f"{text} For example, {most}."), {"name": self.name, "cases": cases}

    def reply(self, gold):
        return box(self.code)

    def glance(self, rng):
        return box(self.draw(rng)[1])           # the right code with other numbers
