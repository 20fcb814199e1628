"""The interpreter compared with Python, programs that try to exhaust it, and the two categories."""
import contextlib
import io
import time

import numpy as np
import pytest

from gym import make
from tasks import Task
from tasks.base import box, pick
from tasks.interpreter import FAULTS, Machine, solves
from tasks.programs import FAMILIES, STATEMENTS

OPERATORS = "+ - * // % ** < <= > >= == != and or".split()
NUMBERS = ("x", "y", "7", "-2", "0", "len(s)", "sum(xs)", "xs[-1]", "xs[y % 3]", "s.count('a')",
           "(not x)", "(x < y <= 9)", "('a' in s)", "(y not in xs)", "int(str(y))", "-x", "abs(y)",
           "max(xs, default=0)", "sum(t > 1 for t in xs)", "(x if y else -y)", "ord(s[0])")
LISTS = ("sorted(xs, reverse=True)", "[t * 2 for t in xs if t % 2]", "xs[::-1]", "xs[1:] * 2",
         "xs + [x]", "list(range(3, x, 2))[:9]", "sorted(s)", "[any(xs), all(xs)]", "xs.copy()")
TEXTS = ("s.upper()", "s[::-1]", "s.replace('a', 'bc')", "s[1:3] * 2 + s", "'-'.join(sorted(s))",
         "str(xs)[:20]", "s.strip('ab') + chr(99)", "''.join([t + t for t in s[:9]])", "str(not y)")
FORMS = (["x = {n}"], ["y {o}= {n}"], ["x, y = y, {n}"], ["xs.append({n})"], ["s = {t}"],
         ["xs[{n} % 3] = {n}"], ["print({l}, {t})"], ["a = b = {n}", "x = a - b"],
         ["x = f({n}, y)"],
         ["if {n}:", 0, "elif {n}:", 0, "else:", "    x = y - 1"],
         ["for k in range({n} % 6):", 0, "    if k == 2:", "        {w}", "    x = x + k"],
         ["n = 0", "while n < 4:", "    n += 1", 0, "    if n == x:", "        {w}", "    y -= 1"],
         ["for k in xs[:3]:", 0, "    y = k"], ["xs.sort()", "xs.insert(1, y)", "y = xs.pop()"])


def number(rng, depth=0):
    if depth > 2 or rng.integers(3) == 0:
        return pick(rng, NUMBERS)
    return f"({number(rng, depth + 1)} {pick(rng, OPERATORS)} {number(rng, depth + 1)})"


def lines(rng, depth=0):
    """Random statements; 0 in a form is a block."""
    found = []
    for _ in range(int(rng.integers(1, 4))):
        for line in pick(rng, FORMS if depth < 2 else FORMS[:8]):
            if line == 0:
                found += ["    " + inner for inner in lines(rng, depth + 1)]
            else:
                found.append(line.format(n=number(rng), o=pick(rng, "+-*"), t=pick(rng, TEXTS),
                                         l=pick(rng, LISTS), w=pick(rng, ("break", "continue"))))
    return found


def python(code):
    """What Python prints; None where it fails."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, {})                              # our own program, made above
    except FAULTS:
        return None
    return out.getvalue().splitlines()


def ours(code):
    try:
        return Machine(code).printed
    except FAULTS:
        return None


def test_it_does_what_python_does():
    both = 0
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        ways = pick(rng, ("y", "x - 1", "f(y, x)"))
        code = "\n".join([
            "def f(x, y):", "    if x > y:", f"        return {ways}", "    while x < y:",
            "        x += 2", "        if x == 5:", "            return", "    return x",
            "x, y, xs, s = 3, 7, 0, 'abba'", "xs = [4, 1, 9]", *lines(rng), "print(x, y, xs, s)"])
        mine = ours(code)
        if mine is None:                                # too large, or a fault in Python as well
            continue
        assert mine == python(code), code
        both += 1
    assert both > 1000


@pytest.mark.parametrize("code,printed", [
    ("print((1, 2) == [1, 2])", ["True"]), ("x = y = []\nx += [1]\nprint(y)", ["[]"]),
    ("xs = ['a', 'b', 'abab']\nprint(xs.pop().replace(xs.pop(), 'x'))", ["b"]),
    ("print(1, end='')\nprint(2)", ["1", "2"]),
    ("sum = 3\nprint(sum([1, 2]))", ["3"])])
def test_where_it_differs_from_python_as_its_docstring_says(code, printed):
    assert Machine(code).printed == printed and python(code) != printed


def test_generated_programs_give_the_same_result_in_python():
    for seed in range(100):
        env = make(Task("code_output", seed, seed % 5))
        code = "\n".join(env.write())
        assert ours(code) in (None, python(code))
        task = make(Task("text_code", seed, seed % 5, ("train", "test")[seed % 2]))
        task.reset()
        space = {}
        exec(task.code, space)
        for args, result in task.gold["cases"]:
            assert space[task.gold["name"]](*args) == result


BOMBS = [
    "[0] * 10**9", "10**9 * [0]", "'a' * 10**9", "9**9**9", "2**60**2", "(-9)**999", "1 << 10**9",
    "list(range(10**12))", "sum(range(10**14))", "sorted(range(10**9))", "'a' in range(10**13)",
    "'%99999999d' % 1", "f'{1:99999999}'", "'a'.ljust(10**9)", "'{:99999999}'.format(1)", "1e308",
    "[x for x in range(10**9)]", "max(t for t in range(10**9))", "int('9' * 199)",
    "'a'.replace('', 'a' * 199).replace('', 'a' * 199)", "[*range(10**9)]", "-" * 3000 + "1",
    "not " * 900 + "1", "1+" * 1900 + "1", "x." * 1900 + "x", "[" * 190 + "]" * 190,
    "__import__('os').getcwd()", "open('x')", "().__class__.__bases__", "''.join.__self__",
    "(lambda: 1)()", "len.__name__", "print.__globals__", "eval('1')", "b'a' * 10**9",
    "f.__code__", "f(**xs)"]
LOOPS = [
    "while 1:\n        pass", "while 1: x = [1]", "for k in range(10**15): pass", "return f(xs)",
    "xs = [1]\n    for k in xs: xs.append(k)", "s = 'a'\n    while 1: s += s", "import os",
    "n = 2\n    while 1: n *= n", "xs = []\n    xs.append(xs)", "xs = [xs]", "xs += [[1]]",
    "t = 1, [2]", "a = []\n    a[0:0] = [1] * 99", "x = 1\n    while 1: x = -x",
    "a = []\n    a.extend(range(10**15))", "try:\n        pass\n    finally:\n        pass",
    "for a in 'ab':\n        for b in range(10**9):\n            for c in range(10**9): pass"]


@pytest.mark.parametrize("body", [*("x = " + bomb for bomb in BOMBS), *LOOPS])
def test_bombs_are_bounded(body):
    """In a function that is right but for it, before such a function, and alone."""
    gold = {"name": "f", "cases": [[[[1, 2]], 3]]}
    start = time.process_time()         # of this process alone, however busy the machine is
    before = f"if 1:\n    xs = [1, 2]\n    {body}\ndef f(xs):\n    return 3"
    for code in (f"def f(xs):\n    {body}\n    return 3", before, body):
        assert solves({"reply": box(code), "gold": gold}) == 0
    assert time.process_time() - start < 2


@pytest.mark.filterwarnings("error")
def test_python_does_not_warn_about_a_program():
    assert Machine("print('\\d' * 2)").printed == ["\\d\\d"]


def test_what_is_printed_is_bounded():
    """Printed as a list, a text of 200 strange characters takes 2,000."""
    with pytest.raises(ValueError):
        Machine("xs = [chr(917504) * 200] * 200\nfor k in range(30): print(xs, xs)")


def test_solves():
    gold = {"name": "f", "cases": [[[[3, 1]], [1, 3]], [[[]], []]]}
    right = ["def f(xs):\n    return sorted(xs)", "def f(a):\n    a.sort()\n    return a",
             'def f(xs: list) -> list:\n    """Sorts."""\n    return [x for x in sorted(xs)]']
    wrong = ["", "f", "def f(xs):\n    return xs", "def g(xs):\n    return sorted(xs)", "sorted",
             "def f(xs):\n    print(sorted(xs))", "def f():\n    return []",
             "def f(xs): return xs[9]", right[0] + "\nimport os", "\0", "\ud800", "é" * 3000,
             "(" * 3999]
    assert [solves({"reply": box(code), "gold": gold}) for code in right] == [1] * len(right)
    assert [solves({"reply": box(code), "gold": gold}) for code in wrong] == [0] * len(wrong)
    assert gold["cases"][0][0] == [[3, 1]]              # sorting in place spoils nothing
    yes = {"name": "f", "cases": [[[2], True], [[3], False]]}
    assert solves({"reply": box("def f(n):\n    return n % 2 == 0"), "gold": yes}) == 1
    assert solves({"reply": box("def f(n):\n    return 1 - n % 2"), "gold": yes}) == 0
    for broken in ({}, {"reply": box("x")}, {"reply": box("x"), "gold": {"name": "f"}}):
        with pytest.raises(KeyError):
            solves(broken)


def test_stubs_earn_nothing_and_every_family_is_drawn():
    seen, total = set(), 0
    for seed in range(150):
        env = make(Task("text_code", seed, seed % 5, ("train", "test")[seed // 5 % 2]))
        env.reset()
        seen.add((env.level, env.row))
        argument, results = env.argument, [result for _, result in env.gold["cases"]]
        for stub in {argument, "0", "[]", "''", repr(max(results, key=results.count))}:
            reply = box(f"def {env.name}({argument}):\n    return {stub}")
            total += solves({"reply": reply, "gold": env.gold})
        assert not {env.name, env.argument} & {"t", "u", "k"}
    assert total == 0 and len(seen) == sum(map(len, FAMILIES)) >= 12


def test_the_descriptions_say_what_the_functions_do():
    """Each family by hand, apart from its own code: a, b, c = 3, 5, 2 and so on."""
    def said(level, row, given, **drawn):
        kind = "xs" if isinstance(given, list) else "s" if isinstance(given, str) else "n"
        body = FAMILIES[level][row][1].format(**{kind: "given"}, **drawn).replace("\n", "\n\t")
        return Machine(f"def f(given):\n\t{body}").invoke("f", [given])

    xs = [4, 7, 3, 12, -6]
    assert said(0, 0, xs, a=3) == 4 + 7 + 12 and said(0, 1, xs, a=3) == 3
    assert said(0, 2, 4, a=3, b=5) == 17 and said(1, 0, xs, a=5, b=9) == [9, 7, 9, 12, 9]
    assert said(1, 1, "abcde", a=2) == "cdeab" and said(1, 1, "ab", a=3) == "ab"
    assert said(1, 2, 27, a=3) == 27 and said(2, 0, 10, a=3, b=5) == 3 + 5 + 6 + 9 + 10
    assert said(2, 1, "abcd", a=2, w="bd") == "abbcdd" and said(2, 2, xs, a=2, b=5) == [9, 8, -1]
    assert said(3, 0, 5, a=2, b=5) == 11 and said(3, 0, 11, a=2, b=5) == 21
    assert said(3, 1, 10, a=3, b=5, c=4) == 3           # 10, 7, 3, -1
    assert said(3, 2, xs, a=3) == 3                     # 4 to 7 is no more than 3
    assert [said(4, 0, n, a=3, b=5, e=11) for n in range(5)] == [3, 5, 8, 2, 10]
    assert said(4, 1, xs, a=3, b=5) == 11               # 7, 0, -3 is 5, 17, 11
    assert said(4, 2, xs, a=2, b=5) == 15 and said(4, 2, [1], a=2, b=5) == 5
    assert said(4, 3, "abcab", a=3, b=5, w="bd") == 5 + 3 * (1 + 4)


def test_programs_of_the_splits_share_no_name_and_say_how_they_run():
    names = {split: set() for split in ("train", "test")}
    for seed in range(60):
        for split in names:
            env = make(Task("code_output", seed, seed % 5, split))
            env.reset()
            assert env.why.endswith(f"It prints {env.gold}.") and len(env.trace) <= 30
            names[split] |= {name for name, _ in env.trace}
            assert all(dict(env.trace).keys() & set(question.strip("?.").split())
                       for question, _ in env.more)
    assert not names["train"] & names["test"] and sum(map(len, STATEMENTS)) > 20
