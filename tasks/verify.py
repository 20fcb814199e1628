"""Verifiers: pure functions from evidence to a score in [0, 1].

Evidence comes from an environment: {"reply": what the model wrote, "gold": ...} or, for
trajectories, {"state": ..., "gold": ...}. What a model wrote is parsed, never evaluated, and
whatever it wrote, nothing here raises: a reply that breaks the form is a wrong reply. Broken
*evidence* does raise; the reward system turns that into an error instead of a zero.

The strictness is against known hacks: a range instead of a number ("a correct number between 0
and 10"), a list of all options, several boxes, marks within marks. [C] for the box marks, [O]
for the limits.
"""
import ast
import re

BEGIN, END = "<|begin_of_box|>", "<|end_of_box|>"
LONGEST_REPLY, LONGEST_ACTION = 4000, 400


def spoken(text: str) -> str:
    """The reply without its thoughts: what follows the last </think>; nothing where a thought
    was never closed, or where the rest is longer than any answer."""
    rest = text.rpartition("</think>")[2].strip()
    return "" if "<think>" in rest or len(rest) > LONGEST_REPLY else rest


def boxed(text: str) -> str | None:
    """The answer between the marks; None unless there is exactly one of each, in order."""
    text = spoken(text)
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        return None
    answer, end, _ = text.partition(BEGIN)[2].partition(END)
    return answer.strip() if end else None


def parse_action(text: str) -> tuple[str, list] | None:
    """A Python-style call with literal arguments, `click(412, 377)` -> ("click", [412, 377]).
    None for anything else; keywords are not part of the language."""
    text = spoken(text)
    if not 0 < len(text) <= LONGEST_ACTION:
        return None
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            return None
        return call.func.id, [ast.literal_eval(argument) for argument in call.args]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def is_point(args) -> bool:
    """Whether these are two integers in 0-999 (True and 1.0 are not)."""
    return len(args) == 2 and all(type(a) is int and 0 <= a <= 999 for a in args)


def inside(point, area) -> bool:
    return area[0] <= point[0] <= area[2] and area[1] <= point[1] <= area[3]


def plain(text: str) -> str:
    """Case, outer punctuation and runs of spaces don't matter."""
    return " ".join(text.lower().split()).strip(" .!\"'")


def distance(a: str, b: str) -> int:
    """Levenshtein distance, O(len(a) len(b))."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def exact(evidence: dict) -> float:
    """EX: the boxed answer equals gold after normalisation."""
    answer = boxed(evidence["reply"])
    return float(answer is not None and plain(answer) == plain(evidence["gold"]))


def number(evidence: dict) -> float:
    """NUM: the boxed answer is this one integer, in digits and nothing else."""
    answer = boxed(evidence["reply"])
    well_formed = answer is not None and re.fullmatch(r"-?[0-9]{1,12}", answer)
    return float(bool(well_formed) and int(answer) == int(evidence["gold"]))


def edit(evidence: dict, floor: float = 0.4) -> float:
    """ED: 1 - edits / longer length; case matters; below `floor` nothing, so that listing the
    alphabet earns nothing. [R] for the idea of cut-offs, [O] for the value."""
    answer, gold = boxed(evidence["reply"]), evidence["gold"]
    if not answer or len(answer) > 4 * len(gold):
        return 0.0
    score = 1 - distance(answer, gold) / max(len(answer), len(gold))
    return score if score >= floor else 0.0


def hit_point(evidence: dict) -> float:
    """HIT: the boxed [x, y] lies in the gold box (x0, y0, x1, y1)."""
    answer = boxed(evidence["reply"]) or ""
    found = re.fullmatch(r"\[\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\]", answer, re.ASCII)
    return float(bool(found) and inside([int(g) for g in found.groups()], evidence["gold"]))


def verb(evidence: dict) -> float:
    """The reply is an action of the right kind."""
    action = parse_action(evidence["reply"])
    return float(action is not None and action[0] == evidence["gold"]["action"])


def hit_click(evidence: dict) -> float:
    """HIT: the action's arguments are a point in the gold box."""
    action = parse_action(evidence["reply"])
    good = action is not None and is_point(action[1])
    return float(good and inside(action[1], evidence["gold"]["box"]))


def state(evidence: dict) -> float:
    """STATE: the whole final state is the wanted one, so nothing else has changed either."""
    return float(evidence["state"] == evidence["gold"])


def hacks(reply: str, question: str) -> list[str]:
    """Replies that must earn nothing, made from the right one: broken forms and known hacks. [O]"""
    answer = boxed(reply) or reply
    listed = ("1-10", "a number between 0 and 10", "1, 2, 3, 4, 5, 6, 7, 8", "ABCDEFGHJKLMNPRTUVW",
              "red green blue yellow purple orange cyan pink", "[0, 0, 999, 999]", "[5]", question,
              "[[100, 100], [500, 500]]", "7" * 1_000_000, BEGIN + answer + END, f"{answer} or not")
    calls = ("click()", "click(1, 2, 3)", "click(True, False)", "click(-5, 2000)", "click(1e9, 1)",
             "click(x=1, y=2)", "click([1, 2])", "click(*[1, 2])", "__import__('os').getcwd()",
             "f(" * 150, "(" * 399, f"{reply}; {reply}", f"{reply} or {reply}")
    return [*(BEGIN + text + END for text in listed), *calls, "", " ", "\0", question, 2 * reply,
            BEGIN + answer, answer + END, END + answer + BEGIN, "<think>" + reply,
            "x" * 1_000_000, reply + "x" * 1_000_000]
