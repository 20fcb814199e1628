"""Rules of lib/grammar.py for JSON: any value, what a JSON schema allows, calls of tools.

    (mapping, JSON)                                     an object of JSON
    schema_item({"type": "integer"}, JSON)              the item of what a schema allows
    (call, (("click", (("x", (integer,), True),)),), PYTHON)        click(412) or click(x=412)

The rules take a Style, since calls are written in Python's syntax: True instead of true. [O]
"""
import json
import math
from keyword import iskeyword

from lib.cli import UserError
from lib.conversations import literal
from lib.grammar import (either, gap, integer, joined, MOST_SHORTEST, number, pause, shortest,
                         string, Style)

DEPTH = 32          # of lists and objects inside one another


# ---- values -------------------------------------------------------------------------------------

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


# ---- calls --------------------------------------------------------------------------------------

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
        more = (ordered, items[1:], least - 1, white, False)
        ways.append((*before, items[0], (gap, white), more))
    return ways


# ---- schemas ------------------------------------------------------------------------------------

# What a schema may say without meaning: these words do not change what is allowed.
REMARKS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id",
           "$comment", "readOnly", "writeOnly"}
# The types, as Python has them, and the words that are built beside each.
TYPES = {"object": (dict, {"properties", "required", "additionalProperties"}),
         "array": (list, {"items", "minItems", "maxItems"}), "string": (str, set()),
         "integer": (int, set()), "number": ((int, float), set()), "boolean": (bool, set()),
         "null": (type(None), set())}


def schema_item(schema, style: Style, where: str = "the schema"):
    """The item of what a JSON schema allows. Raises UserError where it says what is not built.

    Built are the types, properties, required, items, minItems and maxItems up to 64, enum, const
    and anyOf. Of an object only those properties are written that are named, which every schema
    allows.
    """
    if schema is True:
        return (value, style)
    if not isinstance(schema, dict):
        raise UserError(f"{where} is no JSON schema")
    said, kind = schema.keys() - REMARKS, schema.get("type")
    if isinstance(kind, list) and kind:
        return one_of([schema_item(schema | {"type": one}, style, where) for one in kind])
    if "type" in said and (not isinstance(kind, str) or kind not in TYPES):
        raise UserError(f"{where} has an unknown type: {json.dumps(kind)[:60]}")
    for word in ("enum", "const", "anyOf"):
        if word in said:
            if others := said - {word} - ({"type"} if word != "anyOf" else set()):
                raise not_built(where, others, f" beside {word}")
            return choice(word, kind, schema, style, where)
    if others := said - {"type"} - (TYPES[kind][1] if kind else set()):
        raise not_built(where, others, "" if kind else " without a type")
    return typed(kind, schema, style, where)


def choice(word: str, kind, schema: dict, style: Style, where: str):
    """The item of one of the values of enum or const, of this type if there is one, or of one of
    the schemas of anyOf."""
    values = [schema[word]] if word == "const" else schema[word]
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {word} is no list, or an empty one")
    if word == "anyOf":
        return one_of([schema_item(one, style, f"{where}, anyOf") for one in values])
    if kind:
        wanted, truth = TYPES[kind][0], kind == "boolean"
        values = [one for one in values
                  if isinstance(one, wanted) and isinstance(one, bool) == truth]
    if not values:
        raise UserError(f"{where}: {word} has nothing of the type {kind}")
    return one_of([written(one, style, where) for one in values])


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
        if least and least * len(shortest((entry,))) > MOST_SHORTEST:   # they multiply when nested
            raise UserError(f"{where} wants {least} items: over {MOST_SHORTEST:,} bytes together")
        return (joined, b"[", (gap, style.white),
                (listed, entry, b"]", style.white, least or 0, most))
    simple = {"string": (string, style), "integer": (integer,), "number": (number,),
              "boolean": (either, *style.words[:2]), "null": style.words[2]}
    return simple[kind]


def properties_of(schema: dict, style: Style, where: str) -> list[tuple] | None:
    """[(name, item, whether it is required), ...] of an object; None where it may be any."""
    properties, required = schema.get("properties"), schema.get("required", [])
    more = schema.get("additionalProperties")
    if properties is None and not required and more is not False:
        if more not in (None, True, {}):
            raise not_built(where, ["additionalProperties"], " with a schema")
        return None
    properties = {} if properties is None else properties
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise UserError(f"{where}: properties is no object, or required no list")
    if more not in (None, False):
        raise not_built(where, ["additionalProperties"], " beside properties, unless it is false")
    if unknown := [name for name in required if name not in list(properties)]:
        raise UserError(f"{where} requires {json.dumps(unknown[0])[:60]}, which is not among its "
                        "properties")
    return [(name, schema_item(one, style, f"{where}, {name[:40]}"), name in required)
            for name, one in properties.items()]


def not_built(where: str, words, condition: str = "") -> UserError:
    return UserError(f"{where} uses {', '.join(sorted(words))}{condition}, which is not built")


def one_of(items: list):
    """An item that is one of these."""
    return (either, *sorted(dict.fromkeys(items), key=lambda item: len(shortest((item,)))))


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
