"""Evaluate a model on questions of your own: `sample.py eval --data=FILE.jsonl`.

Each line of the file is an object:

    {"images": ["cats/1.png"], "question": "What is it?", "answers": ["a cat"], "metric": "exact"}

    images      paths relative to the file, or data URIs, shown in front of the question; `image`
                for a single one. A question may be without any.
    question    the text
    answers     the right ones, any of which counts; `answer` for a single one
    metric      exact, relaxed, anls, contains, contains-formula, choice, iou or point-in-box: see
                lib/scoring.py. The answers of the last two are boxes [x0, y0, x1, y1] in 0-999.
    choices     texts among which to choose; they are shown below the question, as "A. a cat". The
                letters alone, ["A", "B"], only say how many there are.
    group       figures are given for each group, too; without it, the metric is the group

`pretrain.py --data` trains on such lines, too, with the first answer as the reply: on others than
the model is evaluated on, of course. A line that can't be used is skipped, counted by its kind, and
the first of each kind is shown.
"""
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import document
from engine import Engine, Request
from lib.batch import Document
from lib.cli import UserError
from lib.conversations import answers_of, asked, first_of
from lib.images import BadRecord, load
from lib.scoring import chance, interval, METRICS, said, score
from lib.shards import open_shards
from tasks.base import IMAGE, Message
from tokenizer import Tokenizer

EXAMPLES = 24       # answered questions that are kept with their pictures, for the page


# ---- questions ----------------------------------------------------------------------------------

@dataclass
class Question:
    """A line of the file. prompt: its images are not loaded yet."""
    where: str              # for messages: "cats.jsonl: line 7"
    group: str
    metric: str
    answers: list           # texts or boxes, see scoring.checked
    choices: list[str]
    text: str               # as it is asked, with its choices
    prompt: Document


class Skipped(dict):
    """{kind: [how many, the first one]} of the lines that can't be used."""

    def add(self, error: BadRecord):
        self.setdefault(error.kind, [0, str(error)])[0] += 1

    def __str__(self):
        return "; ".join(f"{count} x {kind}, the first: {first}"
                         for kind, (count, first) in self.items())


def question_of(record, tokens: Tokenizer, config, room: int) -> Question:
    """A record as a question. room: tokens that its prompt may have. Raises BadRecord."""
    value, where = record.value or {}, record.where
    metric = value.get("metric")
    if not isinstance(metric, str) or metric not in METRICS:
        raise BadRecord("unknown metric", f"{where}: the metric is {str(metric)[:40]!r}, there are "
                        f"{', '.join(METRICS)}")
    try:
        text, answers, choices = asked(value), answers_of(value), value.get("choices") or []
    except BadRecord as error:
        raise BadRecord(error.kind, f"{where}: {error}") from None
    names = first_of(value, "images", "image") or []
    pictures = [record.find(name) for name in (names if isinstance(names, list) else [names])]
    message = Message("user", IMAGE * len(pictures) + text, tuple(pictures))
    prompt = document([message], tokens, config, answer=True, lazy=True)
    if len(prompt.ids) > room:
        raise BadRecord("too long", f"{where}: {len(prompt.ids)} tokens, more than {room}")
    group = str(value.get("group") or metric)
    return Question(where, group, metric, answers, choices, text, prompt)


def read_questions(path: str, tokens: Tokenizer, config, room: int) -> tuple[list, Skipped]:
    """All questions of a file, and what was skipped. Raises UserError if none is left."""
    shards, questions, skipped = open_shards(path), [], Skipped()
    for number in range(len(shards)):
        try:
            questions.append(question_of(shards[number], tokens, config, room))
        except BadRecord as error:
            skipped.add(error)
    if not questions:
        raise UserError(f"no line of {path} can be used: {skipped}")
    return questions, skipped


# ---- answers ------------------------------------------------------------------------------------

@dataclass
class Answered:
    """A question with the model's reply, its score (None: it can't be read), and the score of the
    reply to blank pictures."""
    question: Question
    reply: str
    score: float | None
    blank: float | None
    cut_off: bool                   # the reply reached max_new tokens
    pictures: list[str] | None      # files; None where the question is no example

    def worth(self, score: float | None) -> float:
        """What a score adds to the mean: of boxes, 1 where their IoU is at least 0.5."""
        score = score or 0.0
        return float(score >= 0.5) if self.question.metric == "iou" else score


def answer_all(engine: Engine, tokens: Tokenizer, questions: list[Question], max_new: int,
               folder: Path, skipped: Skipped) -> list[Answered]:
    """Let the engine answer all questions, greedily, each with its pictures and with plain grey
    ones of the same size. The pictures of EXAMPLES questions, evenly spaced, are written into
    `folder` as the model saw them. A question whose picture is damaged goes to `skipped`."""
    waiting, running, results = deque(range(len(questions))), {}, {}
    examples = {k * len(questions) // EXAMPLES: None for k in range(EXAMPLES)}
    bar = tqdm(total=2 * len(questions), desc="eval", disable=not sys.stderr.isatty())
    while waiting or running:
        # Pixels are loaded shortly before the engine needs them: those of a file may be many.
        while waiting and len(running) < 2 * engine.slots:
            i = waiting.popleft()
            prompt = questions[i].prompt
            try:
                images = [load(x.image, *x.shape[-3:-1]) for x in prompt.images]
            except BadRecord as error:
                skipped.add(error)
                bar.update(2)
                continue
            if i in examples:
                examples[i] = save_pictures(images, folder, i)
            grey = [np.full_like(image, 128) for image in images]
            for blank, pixels in enumerate((images, grey)):
                request = Request(replace(prompt, images=pixels), max_new)
                running[engine.submit(request)] = i, blank
        for result in engine.step() if running else ():
            results[running.pop(result.id)] = result
            bar.update(1)
    bar.close()
    return [graded(question, *(results[i, blank] for blank in (0, 1)), engine.stops, tokens,
                   examples.get(i))
            for i, question in enumerate(questions) if (i, 0) in results]


def graded(question: Question, shown, blank, stops, tokens: Tokenizer, pictures) -> Answered:
    """A question with the scores of the engine's Results, with its pictures and with grey ones."""
    replies = [tokens.decode(result.ids[:-1] if result.ids[-1] in stops else result.ids)
               for result in (shown, blank)]
    scores = [score(question.metric, reply, question.answers, question.choices)
              for reply in replies]
    return Answered(question, replies[0], *scores, shown.finish != "stop", pictures)


def save_pictures(images: list[np.ndarray], folder: Path, number: int) -> list[str]:
    """Write the pictures of an example; returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}-{k}.png" for k in range(len(images))]
    for name, image in zip(names, images):
        Image.fromarray(image).save(folder / name)
    return names


# ---- figures ------------------------------------------------------------------------------------

def figures(answered: list[Answered]) -> dict:
    """{accuracy, low, high, blank, chance, unread, n, mean_iou} of some answered questions.

    accuracy: the mean score, of boxes the share with an IoU of at least 0.5; low, high: its 95%
    interval; blank: the same with grey pictures; chance: of a guess, None unless it is known for
    each question; unread: replies that could not be read; mean_iou: of boxes only.
    """
    n = len(answered)
    accuracy = sum(a.worth(a.score) for a in answered) / n
    low, high = interval(accuracy, n)
    guesses = [chance(a.question.metric, a.question.answers, a.question.choices) for a in answered]
    row = {"accuracy": accuracy, "low": low, "high": high,
           "blank": sum(a.worth(a.blank) for a in answered) / n,
           "chance": None if None in guesses else sum(guesses) / n,
           "unread": sum(a.score is None for a in answered), "n": n}
    overlaps = [a.score or 0.0 for a in answered if a.question.metric == "iou"]
    return row | ({"mean_iou": sum(overlaps) / len(overlaps)} if overlaps else {})


def evaluate_file(model, tokens: Tokenizer, path: str, folder: Path, slots: int = 64,
                  context: int = 0, max_new: int = 256) -> dict:
    """Evaluate a model on the questions of a file; pictures of examples are written into `folder`.

    Returns {groups: {group: figures}, all: figures, skipped: {kind: [how many, the first one]},
    cut_off: replies that reached max_new tokens, samples: examples for the page, replies}. context:
    tokens of a prompt and its reply; 0: as many as the longest prompt needs. Raises UserError if
    no question can be asked.
    """
    limit = model.config.text.max_position_embeddings
    questions, skipped = read_questions(path, tokens, model.config,
                                        min(context or limit, limit) - 1)
    longest = max(len(question.prompt.ids) for question in questions)
    engine = Engine(model, max(1, min(slots, 2 * len(questions))),
                    min(context or longest + max_new, limit))
    engine.stops.add(tokens.image)          # a visual slot in a reply would have no pixels
    answered = answer_all(engine, tokens, questions, max_new, folder, skipped)
    if not answered:
        raise UserError(f"no line of {path} can be used: {skipped}")
    groups = {}
    for a in answered:
        groups.setdefault(a.question.group, []).append(a)
    samples = [{"category": a.question.group, "pictures": a.pictures, "question": a.question.text,
                "detail": f"{a.question.metric}: {a.worth(a.score):.2g}", "answer": said(a.reply),
                "truth": " or ".join(map(str, a.question.answers)), "reward": a.worth(a.score)}
               for a in answered if a.pictures is not None]
    return {"groups": {name: figures(rows) for name, rows in sorted(groups.items())},
            "all": figures(answered), "skipped": skipped,
            "cut_off": sum(a.cut_off for a in answered), "samples": samples,
            "replies": [{"where": a.question.where, "score": a.score, "reply": a.reply}
                        for a in answered]}


def show_figures(found: dict):
    """Print the table of `evaluate_file`, and what was skipped."""
    print(f"{'group':<25}{'score':>7}  {'95% interval':<14}{'blank':>6}{'chance':>8}{'n':>7}"
          f"{'unread':>8}" + "  mean IoU" * ("mean_iou" in found["all"]))
    for name, row in [*found["groups"].items(), ("all", found["all"])]:
        guess = "-" if row["chance"] is None else f"{row['chance']:.1%}"
        overlap = f"{row['mean_iou']:>10.3f}" if "mean_iou" in row else ""
        print(f"{name[:24]:<25}{row['accuracy']:>7.1%}  {row['low']:>5.1%}-{row['high']:<7.1%}"
              f"{row['blank']:>7.1%}{guess:>8}{row['n']:>7,}{row['unread']:>8,}{overlap}")
    if found["cut_off"]:
        print(f"{found['cut_off']:,} replies reached --max_new tokens and were cut off")
    for kind, (count, first) in found["skipped"].items():
        print(f"skipped: {count:,} x {kind}, the first: {first}")
