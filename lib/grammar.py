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

lib/forms.py runs such a grammar; this file knows nothing of tokens. [O]
"""
import functools
import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from keyword import iskeyword

from lib.cli import UserError
from lib.conversations import literal
from tasks.actions import ACTIONS
from tasks.verify import BEGIN, END

DIGIT, FIRST_DIGIT = frozenset(b"0123456789"), frozenset(b"123456789")
HEX = frozenset(b"0123456789abcdefABCDEF")
DEPTH = 32          # of lists and objects inside one another


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


def gap(white):
    """Any number of characters of white space."""
    return [(), (white, (gap, white))]


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
    return [(b"\\u", d, frozenset(b"89abAB"), HEX, HEX, b"\\u", d, frozenset(b"cdefCDEF"), HEX, HEX)]


PRINTABLE = frozenset(range(0x20, 0x7F))
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


# ---- JSON, and calls ----------------------------------------------------------------------------

def listed(entry, close, white, least=0, most=math.inf, first=True):
    """Entries with commas between them, from `least` to `most` of them, and the closing bracket."""
    ways = [] if least > 0 else [(close,)]
    if most > 0:
        before = () if first else (b",", (pause, white))
        more = (listed, entry, close, white, max(0, least - 1), most - 1, False)
        ways.append((*before, entry, (gap, white), more))
    return ways


def members(entries, close, white, first=True):
    """Each of the entries at most once, in any order, with commas between them, and the closing
    bracket. entries: ((item, whether it must occur), ...)."""
    ways = [] if any(needed for _, needed in entries) else [(close,)]
    before = () if first else (b",", (pause, white))
    for entry in sorted(entries, key=lambda entry: not entry[1]):
        others = tuple(other for other in entries if other is not entry)
        ways.append((*before, entry[0], (gap, white), (members, others, close, white, False)))
    return ways


def value(style, depth=DEPTH):
    """Any value of JSON."""
    ways = [((number,),), ((string, style),), *either(*style.words)]
    return ways + [((array, style, depth),), ((mapping, style, depth),)] if depth else ways


def array(style, depth=DEPTH):
    entry = (value, style, depth - 1)
    return [(b"[", (gap, style.white), (listed, entry, b"]", style.white))]


def mapping(style, depth=DEPTH):
    """Any object of JSON."""
    entry = (joined, (string, style), (gap, style.white), b":", (pause, style.white),
             (value, style, depth - 1))
    return [(b"{", (gap, style.white), (listed, entry, b"}", style.white))]


def document(item, style):
    """A value with white space around it."""
    return [((gap, style.white), item, (gap, style.white))]


# What a schema may say without meaning: these words do not change what is allowed.
REMARKS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id",
           "$comment", "readOnly", "writeOnly"}
BUILT = {"object": {"properties", "required", "additionalProperties"},
         "array": {"items", "minItems", "maxItems"},
         "string": set(), "integer": set(), "number": set(), "boolean": set(), "null": set()}


def schema_item(schema, style: Style, where: str = "the schema"):
    """The item of what a JSON schema allows. Raises UserError where it says what is not built.

    Built are the types, properties, required, items, minItems and maxItems up to 64, enum, const
    and anyOf. Objects get only the properties that are named: this is always allowed by the schema,
    unless it is itself contradictory.
    """
    if schema is True or schema == {}:
        return (value, style)
    if not isinstance(schema, dict):
        raise UserError(f"{where} is no JSON schema")
    said = schema.keys() - REMARKS
    kind = schema.get("type")
    for word in ("enum", "const", "anyOf"):
        if word not in said:
            continue
        if lacking := said - {word, "type"}:
            raise not_built(where, lacking)
        if word == "anyOf":
            if kind is not None:
                raise not_built(where, ["type"], " beside anyOf")
            return one_of([schema_item(one, style, f"{where}, anyOf")
                           for one in entries_of(schema, word, where)])
        values = [schema[word]] if word == "const" else entries_of(schema, word, where)
        return one_of([written(one, style, where) for one in values])
    if isinstance(kind, list) and kind:
        return one_of([schema_item(schema | {"type": one}, style, where) for one in kind])
    if kind not in (None, *BUILT):
        raise UserError(f"{where} has an unknown type: {json.dumps(kind)[:60]}")
    if lacking := said - {"type"} - BUILT.get(kind, set()):
        raise not_built(where, lacking, "" if kind else " without a type")
    return typed(kind, schema, style, where)


def typed(kind, schema: dict, style: Style, where: str):
    """The item of a schema of one type."""
    if kind is None:
        return (value, style)
    if kind == "object":
        entries = properties_of(schema, style, where)
        if entries is None:
            return (mapping, style)
        quoted = tuple(((joined, written(name, style, where), (gap, style.white), b":",
                         (pause, style.white), item), needed) for name, item, needed in entries)
        return (joined, b"{", (gap, style.white), (members, quoted, b"}", style.white))
    if kind == "array":
        least, most = (limit_of(schema, name, where) for name in ("minItems", "maxItems"))
        entry = schema_item(schema.get("items", {}), style, f"{where}, items")
        most = math.inf if most is None else most
        if (least or 0) > most:
            raise UserError(f"{where} wants at least {least} and at most {most} items")
        return (joined, b"[", (gap, style.white),
                (listed, entry, b"]", style.white, least or 0, most))
    simple = {"string": (string, style), "integer": (integer,), "number": (number,),
              "boolean": (either, *style.words[:2]), "null": style.words[2]}
    return simple[kind]


def properties_of(schema: dict, style: Style, where: str) -> list[tuple] | None:
    """[(name, item, whether it is required), ...] of an object; None where it may be any."""
    properties, required = schema.get("properties"), schema.get("required", [])
    more = schema.get("additionalProperties", None)
    if properties is None and more is not False and not required:
        if more not in (None, True, {}):
            raise not_built(where, ["additionalProperties"], " with a schema")
        return None
    if not isinstance(properties or {}, dict) or not isinstance(required, list):
        raise UserError(f"{where}: properties is no object, or required no list")
    if more not in (None, False):
        raise not_built(where, ["additionalProperties"], " beside properties, unless it is false")
    if unknown := [name for name in required if name not in (properties or {})]:
        raise UserError(f"{where} requires {json.dumps(unknown[0])[:60]}, which is not among its "
                        "properties")
    return [(name, schema_item(one, style, f"{where}, {name[:40]}"), name in required)
            for name, one in (properties or {}).items()]


def not_built(where: str, words, condition: str = "") -> UserError:
    return UserError(f"{where} uses {', '.join(sorted(words))}{condition}, which is not built")


def one_of(items: list):
    """An item that is one of these."""
    return (either, *sorted(dict.fromkeys(items), key=lambda item: len(shortest((item,)))))


def entries_of(schema: dict, word: str, where: str) -> list:
    if not isinstance(schema[word], list) or not schema[word]:
        raise UserError(f"{where}: {word} is no list, or an empty one")
    return schema[word]


def limit_of(schema: dict, name: str, where: str) -> int | None:
    limit = schema.get(name)
    if limit is not None and not (type(limit) is int and 0 <= limit <= 64):
        raise UserError(f"{where}: {name} is no integer from 0 to 64")
    return limit


def written(one, style: Style, where: str) -> bytes:
    """A value of JSON as it is written, with a space after commas and colons."""
    try:
        made = literal(one) if style.words[0] == b"True" else json.dumps(
            one, ensure_ascii=False, allow_nan=False)
        return made.encode()
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {repr(one)[:60]} can't be written in JSON") from None


def call(tools, style: Style):
    """A call of one of the tools, as lib/tool_use.py writes it: arguments in the order of the
    schema, or by name. tools: ((name, ((name, item, needed), ...)), ...)"""
    ways = []
    for name, arguments in tools:
        begin, white = f"{name}(".encode(), style.white
        needed = [n for n, argument in enumerate(arguments, 1) if argument[2]]
        items = tuple(item for _, item, _ in arguments)
        ways.append((begin, (gap, white), (ordered, items, max(needed, default=0), white)))
        if all(key.isascii() and key.isidentifier() and not iskeyword(key)
               for key, _, _ in arguments):
            named = tuple(((joined, f"{key}=".encode(), item), needed)
                          for key, item, needed in arguments)
            ways.append((begin, (gap, white), (members, named, b")", white)))
        else:
            quoted = tuple(((joined, written(key, style, name), b":", (pause, white), item), needed)
                           for key, item, needed in arguments)
            ways.append((begin, b"**{", (members, quoted, b"}", white), b")"))
    return sorted(ways, key=lambda way: len(shortest(way)))


def ordered(items, least, white, first=True):
    """The first of the items, at least `least` of them, with commas between them, and ")"."""
    ways = [] if least > 0 else [(b")",)]
    if items:
        before = () if first else (b",", (pause, white))
        ways.append((*before, items[0], (gap, white), (ordered, items[1:], least - 1, white, False)))
    return ways


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
