"""Grammars as functions: which texts are allowed, letter by letter.

A rule is a function. It returns its alternatives; each is a tuple of items that follow one another:

    b"click("                   these bytes
    frozenset(b"0123")          one byte, any of these
    "<|begin_of_box|>"          a special token, by its name
    (digits, 1, 3)              whatever the rule digits(1, 3) allows

    def digits(least, most):    # up to `most` digits: a rule can count by its arguments
        ways = [] if least > 0 else [()]
        return ways + [(DIGIT, (digits, least - 1, most - 1))] if most > 0 else ways

Rules are called when a reply gets there, so there may be very many: one for each point at which a
box may begin. Two things are required of them:

- the first alternative is a way to the shortest text, so that every reply can be brought to an end;
- no alternative begins with the rule itself, or opening it would never end.

lib/forms.py runs such a grammar; this file knows nothing of tokens. lib/json_grammar.py has the
rules of JSON. [O]
"""
import functools
from collections import defaultdict
from dataclasses import dataclass, replace

from tasks.actions import ACTIONS
from tasks.verify import BEGIN, END

DIGIT, FIRST_DIGIT = frozenset(b"0123456789"), frozenset(b"123456789")
HEX = frozenset(b"0123456789abcdefABCDEF")
MOST_SHORTEST = 4096    # bytes of the shortest text of a form, which each step looks at [O]


# ---- the smallest rules -------------------------------------------------------------------------

def either(*items):
    """One of the items, of which the first is the shortest."""
    return [(item,) for item in items]


def maybe(*items):
    """The items one after another, or nothing."""
    return [(), items]


def joined(*items):
    """The items one after another: makes several items one."""
    return [items]


def digits(least, most):
    ways = [] if least > 0 else [()]
    return ways + [(DIGIT, (digits, least - 1, most - 1))] if most > 0 else ways


def gap(white, most=32):
    """White space of at most 32 characters: enough for a line break and its indent. JSON has no
    such limit, but a model that has not learnt JSON would fill its whole reply with it. [O]"""
    return [(), (white, (gap, white, most - 1))] if most else [()]


def pause(white):
    """As `gap`, where people write one space: after a comma or a colon."""
    return gap(white)


def comma():
    return [(b",",), (b", ",)]


# The alternative of a rule that people write, where it is not the shortest one.
USUAL = {pause: 1, comma: 1}


# ---- numbers ------------------------------------------------------------------------------------

def natural():
    return [(DIGIT,), (FIRST_DIGIT, (digits, 1, 19))]


def integer():
    """At most 20 digits, without zeros in front."""
    return [((natural,),), (b"-", (natural,))]


def number():
    """A number of JSON that is no infinity in Python."""
    return [((integer,), (maybe, b".", (digits, 1, 20)),
             (maybe, frozenset(b"eE"), (either, b"", b"+", b"-"), (digits, 1, 2)))]


def coordinate():
    """From 0 to 999."""
    return [(DIGIT,), (FIRST_DIGIT, DIGIT), (FIRST_DIGIT, DIGIT, DIGIT)]


def above(low):
    """A coordinate that is greater than `low`."""
    text, ways = str(low), []
    for i, digit in enumerate(text):    # the same up to place i, greater there
        greater = frozenset(b"0123456789"[int(digit) + 1:])
        if greater:
            ways.append((*([text[:i].encode()] if i else []), greater,
                         *[DIGIT] * (len(text) - i - 1)))
    longer = [(FIRST_DIGIT, *[DIGIT] * n) for n in range(len(text), 3)]
    return ways + longer


def box():
    """[x0, y0, x1, y1] with x0 < x1 and y0 < y1."""
    return [(b"[", (first_corner, "", ()))]


def first_corner(written, known):
    """The rest of a box, of which `known` coordinates are complete and of the next one these digits
    are written. It remembers them: the second corner must lie beyond the first."""
    ways = []
    if written:
        known_now = (*known, int(written))
        after = ((first_corner, "", known_now) if len(known_now) == 1 else
                 (joined, (above, known_now[0]), (comma,), (above, known_now[1]), b"]"))
        ways.append(((comma,), after))
    if written != "0" and len(written) < 3:
        ways += [(b"%d" % digit, (first_corner, f"{written}{digit}", known))
                 for digit in range(10) if f"{written}{digit}" != "999"]
    return ways


def point():
    return [(b"[", (coordinate,), (comma,), (coordinate,), b"]")]


# ---- texts --------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)   # compared and hashed by identity, which is fast
class Style:
    """How texts and values are written.

    letters: bytes that are characters by themselves; escapes: items of other characters;
    forbidden: words that must not occur; white: what white space is made of; words: true, false
    and null.
    """
    letters: frozenset
    escapes: tuple = ()
    forbidden: tuple = ()
    white: frozenset = frozenset(b" ")
    words: tuple = (b"True", b"False", b"None")


def wide():
    """A character of more than one byte in UTF-8."""
    def of(first, last):
        return frozenset(range(first, last + 1))
    more = of(0x80, 0xBF)
    return [(of(0xC2, 0xDF), more), (b"\xE0", of(0xA0, 0xBF), more),
            (of(0xE1, 0xEC) | of(0xEE, 0xEF), more, more), (b"\xED", of(0x80, 0x9F), more),
            (b"\xF0", of(0x90, 0xBF), more, more), (of(0xF1, 0xF3), more, more, more),
            (b"\xF4", of(0x80, 0x8F), more, more)]


def short_escape():
    return [(b"\\", frozenset(b'"\\bfnrt'))]


def unicode_escape():
    r"""\u and four digits, but none of the two halves of a character beyond 16 bits."""
    return [(b"\\u", HEX - frozenset(b"dD"), HEX, HEX, HEX),
            (b"\\u", frozenset(b"dD"), frozenset(b"01234567"), HEX, HEX)]


def both_halves():
    r"""A character beyond 16 bits, in JSON: \ud83d\ude00."""
    d = frozenset(b"dD")
    first, second = frozenset(b"89abAB"), frozenset(b"cdefCDEF")
    return [(b"\\u", d, first, HEX, HEX, b"\\u", d, second, HEX, HEX)]


PRINTABLE = frozenset(range(0x20, 0x80))
PYTHON = Style(PRINTABLE - frozenset(b'"\\'), ((short_escape,), (unicode_escape,)))
ACTION = replace(PYTHON, forbidden=(b"<think>", b"</think>"))
JSON = Style(PYTHON.letters, (*PYTHON.escapes, (joined, b"\\/"), (both_halves,)),
             white=frozenset(b" \t\n\r"), words=(b"true", b"false", b"null"))
BOXED = Style(PRINTABLE | frozenset(b"\n\t"),
              forbidden=(b"<think>", b"</think>", BEGIN.encode(), END.encode()))


def begun(tail: bytes, forbidden: tuple) -> bytes | None:
    """The longest beginning of a forbidden word with which `tail` ends; None if it ends with a
    whole one."""
    for start in range(len(tail) + 1):
        for word in forbidden:
            if word == tail[start:]:
                return None
            if word.startswith(tail[start:]):
                return tail[start:]
    return b""


@functools.lru_cache(256)
def letters_after(style: Style, before: bytes) -> list[tuple[frozenset, bytes]]:
    """[(letters, the beginning of a forbidden word with which the text ends after one of them)]"""
    found = defaultdict(set)
    for letter in style.letters:
        found[begun(before + bytes([letter]), style.forbidden)].add(letter)
    return [(frozenset(found[begin]), begin) for begin in found if begin is not None]


def text(style, before=b""):
    """Any text. before: the beginning of a forbidden word with which it ends so far."""
    ways = [(letters, (text, style, begin)) for letters, begin in letters_after(style, before)]
    others = [(wide,), *style.escapes]
    return [(), *ways, *((other, (text, style)) for other in others)]


def string(style):
    return [(b'"', (text, style), b'"')]


# ---- the gym's replies --------------------------------------------------------------------------

def boxed(begin, end, kind):
    """An answer between the box marks."""
    inside = {"text": (text, BOXED), "box": (box,), "point": (point,),
              "integer": (joined, (maybe, b"-"), (digits, 1, 12))}[kind]
    return [(begin, inside, end)]


def actions(verbs):
    """A call of one of the verbs of tasks/actions.py, as the gym's oracle writes it."""
    found = []
    for verb in map(ACTIONS.__getitem__, verbs):
        name, kinds = f"{verb.name}(".encode(), list(verb.arguments.values())
        if verb.optional or not kinds:
            found.append((name, b")"))
        if kinds:
            items = list(map(argument, kinds))
            rest = [item for one in items[1:] for item in ((comma,), one)]
            found.append((name, items[0], *rest, b")"))
    return sorted(found, key=lambda way: len(shortest(way)))


def argument(kind):
    """The item of an argument, by its kind in tasks/actions.py."""
    if kind == "coordinate":
        return (coordinate,)
    if kind == "text":
        return (string, ACTION)
    return (either, *sorted((f'"{word}"'.encode() for word in kind), key=len))


# ---- the shortest text --------------------------------------------------------------------------

def shortest(items, usual: bool = False) -> list:
    """The shortest text that the items allow: bytes as integers, special tokens as names. usual:
    with a space after commas and colons, as people write."""
    symbols, left = [], list(reversed(items))
    while left:
        item = left.pop()
        if isinstance(item, bytes):
            symbols += item
        elif isinstance(item, str):
            symbols.append(item)
        elif isinstance(item, frozenset):
            symbols.append(32 if 32 in item else min(item))
        else:
            rule, *arguments = item
            way = rule(*arguments)[USUAL.get(rule, 0) if usual else 0]
            left += reversed(way)
    return symbols
