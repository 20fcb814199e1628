"""Metrics of questions with known answers: pure functions from a reply to a score.

    score("relaxed", "about 41%", ["40"])                   1.0: 41 is within 2.5% of 40
    score("choice", "B. a cat", ["B"], ["a dog", "a cat"])  1.0
    score("iou", "I see none", [[10, 10, 90, 90]])          None: this reply names no box

A metric is a function (reply, answers, choices) -> score in [0, 1]; the best of several right
answers counts. It is None where the reply can't be read: it has no number where one is asked for,
or two boxes instead of one. Replies are searched by regular expressions and never evaluated.

These rules are more lenient than the verifiers of the gym (tasks/verify.py), whose rewards a model
learns to exploit: here, an answer without box marks counts, too, and so does one in a sentence.
"""
import math
import re
from string import ascii_uppercase

import numpy as np

from tasks import verify

NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})(?![0-9])")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")     # the comma in 1,500
POINT = re.compile(r"[\[(]\s*([0-9]{1,3})\s*,\s*([0-9]{1,3})\s*[\])]")
BOX = re.compile(r"[\[(]\s*" + r"\s*,\s*".join(4 * ["([0-9]{1,3})"]) + r"\s*[\])]")
# A letter as the first word, as in B, (B), **B**, Option B, B. a cat; or named: the answer is B.
LETTER_FIRST = re.compile(r"(?:Option )?[(*]*([A-Za-z])(?:[).:,*]|$)")
LETTER_NAMED = re.compile(r"(?:[Aa]nswer|[Cc]orrect (?:option|choice))(?: is)?:?\s*[(*]*([A-Z])\b")


# ---- reading a reply ----------------------------------------------------------------------------

def said(reply: str) -> str:
    """What a reply answers: the text between its box marks where it has one pair of them, otherwise
    everything after its thought. "" if the thought is not closed."""
    inside = verify.boxed(reply)
    if inside is not None:
        return inside
    rest = reply.rpartition("</think>")[2]
    if "<think>" in rest:
        return ""
    return rest.replace(verify.BEGIN, "").replace(verify.END, "").strip()


def number_in(text: str) -> int | float | None:
    """The number in a text, 1500 for "$1,500 a year"; None if there is none, or more than one. It
    is an integer where it is written as one, without a comma."""
    found = NUMBER.findall(THOUSANDS.sub("", text))
    if len(found) != 1:
        return None
    return int(found[0]) if found[0] in text and "." not in found[0] else float(found[0])


def is_number(text: str) -> bool:
    """Whether a text is a number and nothing else, but perhaps a currency or a percent sign."""
    return bool(NUMBER.fullmatch(THOUSANDS.sub("", text).strip("$€£% ")))


def letter_of(text: str, choices=()) -> str | None:
    """The letter that a text chooses: as its first word, as in "the answer is B", or by the words
    of one of the choices. None if it chooses nothing, or more letters than there are choices."""
    words = [verify.plain(choice) for choice in choices]
    if verify.plain(text) in words:
        return ascii_uppercase[words.index(verify.plain(text))]
    found = LETTER_FIRST.match(text) or LETTER_NAMED.search(text)
    letter = found[1].upper() if found else ""
    return letter if letter and letter in ascii_uppercase[:len(choices) or 26] else None


def only(pattern: re.Pattern, text: str) -> list[int] | None:
    """The integers of the only match of a pattern in a text; None if there are none, or several."""
    found = pattern.findall(text)
    return [int(digits) for digits in found[0]] if len(found) == 1 else None


# ---- metrics ------------------------------------------------------------------------------------

def exact(reply: str, answers, choices=()) -> float | None:
    """1 if the reply equals an answer after lower-casing, and without punctuation at the ends."""
    text = verify.plain(said(reply))
    return float(text in map(verify.plain, answers)) if text else None


def relaxed(reply: str, answers, choices=()) -> float | None:
    """1 if the reply's number is within 2.5% of an answer, and exact if that may be a year [R]; an
    answer in words is compared as by `exact`."""
    text = said(reply)
    found = number_in(text)
    numbers = [number_in(answer) for answer in answers if is_number(answer)]
    if found is not None and any(verify.close(found, gold) for gold in numbers):
        return 1.0
    if len(numbers) == len(answers):
        return None if found is None else 0.0
    return exact(reply, answers)


def anls(reply: str, answers, choices=()) -> float | None:
    """Average normalised Levenshtein similarity [DocVQA]: 1 - edits / length of the longer text,
    without regard to case, and 0 below 0.5."""
    text = " ".join(said(reply).lower().split())
    golds = [" ".join(answer.lower().split()) for answer in answers]
    best = max(1 - verify.distance(gold, text) / max(len(text), len(gold)) for gold in golds)
    return (best if best >= 0.5 else 0.0) if text else None


def contains(reply: str, answers, choices=()) -> float | None:
    """1 if an answer occurs in the reply, without regard to case [OCRBench]."""
    text = " ".join(said(reply).lower().split())
    return float(any(" ".join(a.lower().split()) in text for a in answers)) if text else None


def contains_formula(reply: str, answers, choices=()) -> float | None:
    """1 if an answer occurs in the reply, without regard to white space [OCRBench, for LaTeX]."""
    text = "".join(said(reply).split())
    return float(any("".join(answer.split()) in text for answer in answers)) if text else None


def choice(reply: str, answers, choices=()) -> float | None:
    """1 if the reply chooses the right letter (`letter_of`)."""
    letter = letter_of(said(reply), choices)
    golds = [letter_of(answer, choices) for answer in answers]
    return None if letter is None else float(letter in golds)


def iou(reply: str, answers, choices=()) -> float | None:
    """Intersection over union of the reply's only box x0, y0, x1, y1 and the answer's, 0-999."""
    box = only(BOX, said(reply))
    if box is None or not (box[0] < box[2] and box[1] < box[3]):
        return None
    return max(verify.iou(box, gold) for gold in answers)


def point_in_box(reply: str, answers, choices=()) -> float | None:
    """1 if the reply's only point, as in [412, 377] or click(412, 377), is in an answer's box; all
    in 0-999."""
    point = only(POINT, said(reply))
    return None if point is None else float(any(verify.inside(point, gold) for gold in answers))


METRICS = {"exact": exact, "relaxed": relaxed, "anls": anls, "iou": iou, "choice": choice,
           "point-in-box": point_in_box, "contains": contains,
           "contains-formula": contains_formula}
BOXES = ("iou", "point-in-box")     # their answers are boxes x0, y0, x1, y1 in 0-999


def score(metric: str, reply: str, answers, choices=()) -> float | None:
    """The score of a reply by the metric of this name; None if the reply can't be read."""
    return METRICS[metric](reply, answers, choices)


# ---- answers and chance -------------------------------------------------------------------------

def checked(metric: str, answers, choices=()) -> list:
    """The right answers of a question as its metric takes them, texts or boxes, from one of them or
    a list. Raises ValueError with the reason where they can't be used."""
    if metric in BOXES:
        several = isinstance(answers, list) and answers and isinstance(answers[0], list)
        boxes = answers if several else [answers]
        for box in boxes:
            if not (isinstance(box, list) and len(box) == 4
                    and all(type(c) in (int, float) and 0 <= c <= 999 for c in box)
                    and box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"{str(box)[:60]} is no box x0, y0, x1, y1 in 0-999")
        return boxes
    texts = []
    for answer in answers if isinstance(answers, list) else [answers]:
        if type(answer) not in (str, int, float) or not str(answer).strip():
            raise ValueError(f"{str(answer)[:60]!r} is neither a text nor a number")
        if metric == "choice" and letter_of(str(answer), choices) is None:
            raise ValueError(f"{str(answer)[:60]!r} is none of the choices")
        texts.append(str(answer))
    if not texts:
        raise ValueError("the list of answers is empty")
    return texts


def chance(metric: str, answers, choices=()) -> float | None:
    """The mean score of a guess without looking: one of the choices, or a random point for boxes
    that are to be hit. None for the other metrics."""
    if choices:
        scores = [score(metric, guess, answers, choices) or 0.0 for guess in choices]
        return sum(scores) / len(scores)
    if metric == "point-in-box":
        hit = np.zeros((1000, 1000), bool)      # [y, x]; boxes may overlap
        for x0, y0, x1, y1 in answers:
            hit[math.ceil(y0):math.floor(y1) + 1, math.ceil(x0):math.floor(x1) + 1] = True
        return float(hit.mean())
    return None


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share that was observed in n trials. Of a mean score between 0 and
    1 the variance is no larger than that of a share, so its interval is at most as wide."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(parts) -> tuple[float, float, float]:
    """(mean, low, high) of the mean of several figures that were measured independently, each given
    as (value, low, high). Their distances to the ends are added as squares: MOVER, the method of
    variance estimates recovery [R: Zou and Donner 2008]. Unlike the normal interval from
    variances, it does not shrink to nothing where all shares are 0 or 1."""
    n = len(parts)
    mean = sum(value for value, _, _ in parts) / n
    below = math.sqrt(sum((value - low) ** 2 for value, low, _ in parts)) / n
    above = math.sqrt(sum((high - value) ** 2 for value, _, high in parts)) / n
    return mean, mean - below, mean + above


def paired_difference(first, second) -> tuple[float, float, float]:
    """(difference, low, high): the share of True in `second` minus that in `first`, which are about
    the same tasks in the same order, with its 95% interval. Tasks that both solve, or neither, say
    nothing about the difference, so it is narrower than that of two samples. Half a task is added
    to each of the four cells of the table [R: Agresti and Min 2005]."""
    n = len(first)
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    gained = sum(b and not a for a, b in zip(first, second))
    changed, cells = lost + gained + 1, n + 2
    middle = (gained - lost) / cells
    half = 1.96 * math.sqrt(changed - (gained - lost) ** 2 / cells) / cells
    return (gained - lost) / n, max(-1.0, middle - half), min(1.0, middle + half)


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade interval`.
# 1. interval: all shares p from which `share` is at most 1.96 standard errors away; the standard
#    error is that of p, not of `share`. pytest tests/test_scoring.py -k wilsons; 20 minutes.
