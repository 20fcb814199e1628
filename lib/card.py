"""What a model was trained on, and the card that says it to whoever uses the model.

A checkpoint that is meant for others holds report.json, which `sample.py eval --card=FOLDER`
writes: its accuracy in each category and level, and, under "seen", the wordings, sizes and
brightness of what it was trained on. README.md, the card, is the same to read. For a run folder of
pretrain.py, whose config.json names the mixture, what it has seen is drawn again.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gym
from data import parse_mix, sight, task_pixels
from lib.cli import UserError
from lib.common import read_json, write_json, write_text
from lib.images import resize
from lib.summary import ahead, groups, mean_of
from tasks.base import IMAGE, Task
from tasks.draw import COLORS, SHAPES
from tasks.scenes import plural

DRAWN = 40      # tasks a category that show what a model was trained on
FURTHER = "further ones"    # the questions that follow a task's own about the same picture


def trained_on(folder: Path) -> tuple[str, int, str]:
    """Mix and levels that the checkpoint `folder` was trained on, and which file says so: its own
    report.json, or the run folder's config.json. Otherwise the whole gym at level 0. Raises
    UserError where that file is damaged."""
    report, options = folder / "report.json", folder.parent / "config.json"
    if report.exists():
        found = read_json(report)
        table, levels = found.get("table"), found.get("trained_levels", 1)
        if not table or not isinstance(table, dict):
            raise UserError(f"{report} is damaged: it has no table of categories")
        mix, source = ",".join(table), report
    else:
        found = read_json(options) if options.exists() else {}
        mix, levels, source = found.get("mix"), found.get("levels", 1), options
        if not mix and found.get("data"):
            mix = "own data"        # a name that no category has
    if not mix:
        return "gym", 1, "no file"
    if not (isinstance(mix, str) and isinstance(levels, int) and 1 <= levels <= 5):
        raise UserError(f"{source} is damaged: its mix is {mix}, its levels are {levels}")
    return mix, levels, str(source)


def wording(question: str) -> str:
    """A question without what it is about: colours, shapes, numbers and words in capitals."""
    things = {*COLORS, *SHAPES, *map(plural, SHAPES)}
    words = re.findall("[A-Za-z]+", question)
    return " ".join(word for word in words if word not in things and not word.isupper())


@dataclass
class Seen:
    """What a model was trained on, by DRAWN tasks of each category.

    questions: {category: {wording: an example}} of the questions that begin a task, and FURTHER's
    of those that follow. light: the least and the largest median brightness of a picture, 0-255.
    sizes: (height, width) in pixels, as the model sees them. source: the file that names the
    categories.
    """
    questions: dict[str, dict[str, str]]
    light: tuple[float, float]
    sizes: set
    source: str

    def differences(self, question: str, images) -> list[str]:
        """What is unlike the training in a question and its images (h, w, 3)."""
        low, high = self.light
        found = [f"its brightness is {np.median(image):.0f}, not {low:.0f} to {high:.0f}"
                 for image in images if not low - 25 <= np.median(image) <= high + 25]
        found += [f"its size is {image.shape[1]}x{image.shape[0]}, not {self.some_sizes()}"
                  for image in images if image.shape[:2] not in self.sizes]
        if not any(wording(question) in known for known in self.questions.values()):
            found.append("no question was worded like this; `sample.py ask` lists them")
        return found

    def some_sizes(self) -> str:
        """The sizes as width x height; of many, the smallest and the largest."""
        sizes = [f"{w}x{h}" for h, w in sorted(self.sizes, key=lambda size: size[0] * size[1])]
        if len(sizes) > 6:
            return f"one of {len(sizes)} from {sizes[0]} to {sizes[-1]}"
        return ", ".join(sizes)


def seen(folder: Path, config) -> Seen | None:
    """What the checkpoint `folder` was trained on: from its report.json, or drawn again. None where
    no file says it, or it was no category of the gym."""
    report = folder / "report.json"
    if report.exists() and (kept := read_json(report).get("seen")) is not None:
        try:
            low, high = map(float, kept["light"])
            sizes = {(int(h), int(w)) for h, w in kept["sizes"]}
            questions = {name: dict(examples) for name, examples in kept["questions"].items()}
            questions.setdefault(FURTHER, {})
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{report} is damaged: what it has seen can't be read") from None
        return Seen(questions, (low, high), sizes, str(report))
    mix, levels, source = trained_on(folder)
    names = [name for name, _ in parse_mix(mix, sight(config)) if name in gym.names()]
    if source == "no file" or not names:
        return None
    questions, lights, sizes = {name: {} for name in (*names, FURTHER)}, [], set()
    for task in (Task(name, i, i % levels, pixels=task_pixels(name, config))
                 for name in names for i in range(DRAWN)):
        asked = [message for talk in gym.demonstrate(task) for message in talk[::2]]
        for i, message in enumerate(asked):
            images = [resize(image, config) for image in message.images]
            lights += [float(np.median(image)) for image in images]
            sizes |= {image.shape[:2] for image in images}
            examples = questions[FURTHER if i else task.category]
            text = message.text.replace(IMAGE, "").strip()
            examples.setdefault(wording(text), text)
    return Seen(questions, (min(lights, default=0.0), max(lights, default=255.0)), sizes, source)


def lists_of(found: Seen) -> dict[str, list[str]]:
    """{category: an example of each of its wordings}, at most nine, and under FURTHER those of
    further questions that begin no task."""
    first = {name: rows for name, rows in found.questions.items() if name != FURTHER}
    known = set().union(*first.values())
    first[FURTHER] = {words: text for words, text in found.questions[FURTHER].items()
                      if words not in known and "\n" not in text}       # no later turns
    return {name: [text.replace("\n", " ")[:100] for text in list(rows.values())[:9]]
            for name, rows in first.items()}


def list_questions(folder: Path, config):
    """Print an example of each wording that the checkpoint `folder` was trained on."""
    found = seen(folder, config)
    if found is None:
        return print(f"no file beside {folder} says what the model was trained on")
    for name, examples in lists_of(found).items():
        print(f"{name:<17}" + " | ".join(examples))
    print(f"The categories are those of {found.source}. Brightness of the pictures, 0 to 255: "
          f"{found.light[0]:.0f} to {found.light[1]:.0f}.")


# ---- the card -----------------------------------------------------------------------------------

def cells(row: dict | None) -> str:
    """Three cells of the table: a category's figures at one level; None: all ended in errors."""
    if row is None:
        return " - | - | - |"
    accuracy, low, high, blank, chance = (
        100 * row[key] for key in ("accuracy", "low", "high", "blank", "chance"))
    return f" {accuracy:.0f} [{low:.0f}-{high:.0f}] | {blank:.0f} | {chance:.0f} |"


def composite_lines(table: dict) -> list[str]:
    """The composites of which every category was evaluated, as bars of 40 places; [] if none."""
    rows = {name: mean_of([table[part] for part in parts])
            for name, parts in groups(table)["composite"].items()}
    if not rows:
        return []
    bars = [f"{name:<17}|{'#' * round(40 * row['accuracy']):<40}| {100 * row['accuracy']:.0f} "
            f"[{100 * row['low']:.0f}-{100 * row['high']:.0f}]" for name, row in rows.items()]
    return ["", "Means of categories over all levels, in percent, named after what they ask for "
            "(`lib/summary.py` lists them):", "", "```", *bars, "```"]


def write_card(folder: Path, model, found: Seen | None, facts: dict):
    """Write report.json and README.md beside the weights in `folder`, for others who use them.

    found: what the model was trained on; facts: the result of `sample.py eval`. The card quotes two
    files of the same folder, if they are there: training.md, some lines on how the model was
    trained, and out_of_gym.json, a report of lab/out_of_gym.py."""
    facts = {**facts, "ckpt": str(folder)}
    if found is not None:
        facts["seen"] = {"questions": found.questions, "light": found.light,
                         "sizes": sorted(found.sizes)}
    write_json(folder / "report.json", facts)
    counts, table = model.counts(), facts["table"]
    size = (folder / "model.safetensors").stat().st_size / 1e6
    lines = [f"# A model of {len(table)} categories of the gym", "",
             f"{counts['total'] / 1e6:.2f}M parameters ({size:.1f} MB), trained from random "
             f"weights. `python sample.py ask --ckpt={folder}` lists the questions that it "
             "knows.", ""]
    if (folder / "training.md").exists():
        lines += [(folder / "training.md").read_text(encoding="utf-8").strip(), ""]
    by_level = [row["by_level"] for row in table.values()]
    levels, count = range(len(by_level[0])), max(r["n"] for row in by_level for r in row if r)
    lines += ["## Accuracy", "", "Percent of held-out tasks with full reward, greedy, "
              f"{count} tasks a category and level, with 95% intervals. *Blank*: "
              "with grey pictures; *chance*: what a guess would get.", "",
              "| category |" + "".join(f" level {k} | blank | chance |" for k in levels),
              "|---|" + "---:|" * 3 * len(levels)]
    lines += [f"| {name} |" + "".join(map(cells, row["by_level"])) for name, row in table.items()]
    for k in levels:
        rows = [row[k] for row in by_level if row[k]]
        lines += ["", f"Level {k}: {sum(map(ahead, rows))} of {len(rows)} categories are 20 points "
                  f"or more above both blank and chance; the mean is "
                  f"{100 * sum(r['accuracy'] for r in rows) / max(1, len(rows)):.1f}%."]
    lines += composite_lines(table)
    outside = folder / "out_of_gym.json"
    if outside.exists():
        lines += ["", "## Out of the gym", "", "Single clicks on the screens of level 0, drawn by "
                  "a browser (`python -m lab.out_of_gym`), percent that hit:", "",
                  "| screens | right | 95% |", "|---|---:|---|"]
        lines += [f"| {name} | {row['right, %']:.1f} | {row['from']:.1f}-{row['to']:.1f} |"
                  for name, row in read_json(outside)["figures"].items()]
    if found is not None:
        lines += ["", "## What it has seen", "", f"Pictures of {found.some_sizes()} pixels, median "
                  f"brightness {found.light[0]:.0f} to {found.light[1]:.0f} of 255, of the levels "
                  f"below {facts['trained_levels']}. The wordings, one example each:", ""]
        lines += [f"- {name}: {' | '.join(examples)}"
                  for name, examples in lists_of(found).items() if examples]
    write_text(folder / "README.md", "\n".join(lines) + "\n")
