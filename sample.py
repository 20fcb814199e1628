"""Using a model: ask it about pictures, or evaluate it on the gym.

    python sample.py ask                                 lists the questions that it was trained on
    python sample.py ask --image=docs/example.png "What color is the diamond?"
    python sample.py ask --image=docs/example.png "List all." --temperature=0.7
    python sample.py ask --image=docs/example.png "List all." --drafts=3    speculative decoding
    python sample.py eval --count=300                    held-out tasks of what it was trained on
    python sample.py eval --ckpt=out/pretrain --mix=point,gui_click --levels=3

Without --ckpt the demo's checkpoint in ckpt/ is used: 1.0M parameters, trained for minutes on six
categories of the gym: 64-pixel drawings of shapes, characters and buttons on dark ground, and a few
wordings of questions. It knows nothing else: to a photo, a light ground or a question in other
words it gives some answer of these categories, which means nothing.
"""
import lib  # first of all, before torch: see lib/__init__.py

import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

import gym
from data import document, parse_mix, sight, task_pixels
from engine import Engine, Request
from lib.checkpoint import load_model
from lib.cli import (Count, Device, Drafts, Dtype, main, Natural, NonNegative, Positive, Range,
                     run_verb, Seed, Share, UserError)
from lib.common import read_json, ROOT, setup, write_json
from lib.images import open_image, resize
from lib.rollout import Episode, rollout, RolloutSettings
from lib.runs import find_checkpoint
from tasks.base import Message, Task
from tasks.draw import COLORS, SHAPES
from tasks.scenes import plural
from tokenizer import Tokenizer

DEMO = ROOT / "ckpt" / "demo"       # the checkpoint that is used without --ckpt
DRAWN = 40      # tasks a category that show what a model was trained on
FURTHER = "further ones"    # the questions that follow a task's own about the same picture


def load(ckpt: str, device: str, dtype: str):
    """Model, tokenizer and hardware for a checkpoint or run folder, the demo's if `ckpt` is empty.
    Raises UserError if there is none, or if it has another tokenizer than ours."""
    hw = setup(device, dtype)
    folder = find_checkpoint(ckpt or DEMO)
    model = load_model(folder, hw.device, hw.dtype)
    if not model.config.n_ranks:
        raise UserError(f"{folder} has another tokenizer than ours: its weights can be loaded, but "
                        "it can't be asked here")
    return model, Tokenizer(model.config.n_ranks), hw


# ---- what a model was trained on ----------------------------------------------------------------

def trained_on(folder: Path) -> tuple[str, int, str]:
    """Mix and levels that the checkpoint `folder` was trained on, and which file says so: its own
    report.json (ckpt/demo), or the run folder's config.json. Otherwise the whole gym at level 0.
    Raises UserError where that file is damaged."""
    report, options = folder / "report.json", folder.parent / "config.json"
    if report.exists():
        table = read_json(report).get("table")
        if not table or not isinstance(table, dict):
            raise UserError(f"{report} is damaged: it has no table of categories")
        return ",".join(table), 1, str(report)
    found = read_json(options) if options.exists() else {}
    mix, levels = found.get("mix"), found.get("levels", 1)
    if mix and not (isinstance(mix, str) and isinstance(levels, int) and 1 <= levels <= 5):
        raise UserError(f"{options} is damaged: its mix is {mix}, its levels are {levels}")
    return (mix, levels, str(options)) if mix else ("gym", 1, "no file")


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
        found += [f"its size is {image.shape[1]}x{image.shape[0]}, not "
                  + ", ".join(f"{w}x{h}" for h, w in sorted(self.sizes))
                  for image in images if image.shape[:2] not in self.sizes]
        if not any(wording(question) in known for known in self.questions.values()):
            found.append("no question was worded like this; `sample.py ask` lists them")
        return found


def seen(folder: Path, config) -> Seen | None:
    """What the checkpoint `folder` was trained on, drawn again; None where no file says it, or it
    was no category of the gym."""
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
            text = message.text.replace("<|image|>", "").strip()
            examples.setdefault(wording(text), text)
    return Seen(questions, (min(lights, default=0.0), max(lights, default=255.0)), sizes, source)


def list_questions(folder: Path, config):
    """Print an example of each wording that the checkpoint `folder` was trained on."""
    found = seen(folder, config)
    if found is None:
        return print(f"no file beside {folder} says what the model was trained on")
    further, known = found.questions.pop(FURTHER), set().union(*found.questions.values())
    found.questions[FURTHER] = {words: text for words, text in further.items()
                                if words not in known and "\n" not in text}    # no later turns
    for name, examples in found.questions.items():
        print(f"{name:<17}" + " | ".join(text.replace("\n", " ")[:100]
                                         for text in list(examples.values())[:9]))
    print(f"The categories are those of {found.source}. Brightness of the pictures, 0 to 255: "
          f"{found.light[0]:.0f} to {found.light[1]:.0f}.")


# ---- ask ----------------------------------------------------------------------------------------

@dataclass
class Ask:
    question: str = ""            # also as a bare word; without it, the known ones are listed
    image: list[str] = field(default_factory=list)  # a picture file; may be given several times
    ckpt: str = ""                # checkpoint or run folder; default: the demo's
    max_new: Positive = 128       # tokens at most in the answer
    temperature: NonNegative = 0.0  # of sampling; 0 always takes the most likely token
    top_p: Share = 1.0            # sample from the most likely tokens, up to this probability
    seed: Seed = 0                # of sampling
    drafts: Drafts = 0            # tokens that the MTP head drafts in a step; same answer in fp32
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def ask(args: Ask):
    """Print the answer to a question about pictures, and to stderr what the model was given. What
    is unlike its training is named there, too: the included model (ckpt/demo) knows 64-pixel
    drawings on dark ground and the wordings that `sample.py ask` lists; to anything else it gives
    an answer that means nothing."""
    images = tuple(open_image(path) for path in args.image)
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    folder = find_checkpoint(args.ckpt or DEMO)
    if not args.question.strip():
        if images:
            raise UserError('nothing asked: python sample.py ask --image=FILE "question"')
        return list_questions(folder, model.config)
    message = Message("user", "<|image|>" * len(images) + args.question, images)
    prompt = document([message], tokens, model.config, answer=True)
    for path, shown in zip(args.image, prompt.images):
        print(f"{path} is seen at {shown.shape[1]}x{shown.shape[0]} pixels", file=sys.stderr)
    trained = seen(folder, model.config)
    if trained and (unlike := trained.differences(args.question, prompt.images)):
        print(f"unlike its training, so the answer may mean nothing: {'; '.join(unlike)}",
              file=sys.stderr)
    limit = model.config.text.max_position_embeddings
    context = min(limit, len(prompt.ids) + args.max_new + 1)
    # adapt=False: times must not decide on the draws, so that a seed always gives the same answer
    engine = Engine(model, 1, context, args.drafts, adapt=False,
                    say=lambda line: print(line, file=sys.stderr))
    engine.submit(Request(prompt, args.max_new, args.temperature, args.top_p, args.seed))
    results = []
    while engine.busy:
        results += engine.step()
    print(readable(tokens.decode(results[0].ids)))
    if engine.drafts:
        print(f"{engine.tokens / max(1, engine.steps):.2f} tokens a step", file=sys.stderr)


def readable(reply: str) -> str:
    """A reply without the special tokens around and inside it."""
    for mark in ("<|begin_of_box|>", "<|end_of_box|>", "<|user|>", "<|observation|>",
                 "<|endoftext|>"):
        reply = reply.replace(mark, "")
    return reply.strip()


# ---- eval ---------------------------------------------------------------------------------------

@dataclass
class Eval:
    ckpt: str = ""                # checkpoint or run folder; default: the demo's
    mix: str = ""                 # categories; default: those that it was trained on
    levels: Annotated[int, Range(0, 5)] = 0  # tasks of levels 0..levels-1; 0: as it was trained
    count: Count = 200            # tasks a category
    pixels: Natural = 0           # side of the pictures; 0: the least that suits the patches
    split: Literal["test", "train"] = "test"  # test: held-out seeds and factors; or train
    seed: Seed = 1_000_000        # of the first task; the next one has the next seed
    slots: Positive = 64          # conversations generated side by side
    context: Positive = 512       # tokens of a whole conversation
    max_new: Positive = 48        # tokens a reply may have
    out: str = "out/eval.json"    # file for the figures
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def run_tasks(model, tokens, tasks, slots: int = 64, context: int = 512, max_new: int = 48,
              blank: bool = False, bar=None) -> list[Episode]:
    """Let the model do `tasks`, greedily and `slots` of them side by side. Returns their Episodes
    in the same order. blank: every picture is replaced by plain grey of the same size."""
    engine = Engine(model, max(1, min(slots, len(tasks))), context)
    engine.stops.add(tokens.image)          # a visual slot in a reply would have no pixels
    settings = RolloutSettings(tokens, model.config, context, max_new, temperature=0.0, blank=blank)
    episodes = [Episode(task, i, 0) for i, task in enumerate(tasks)]
    return rollout(engine, episodes, settings, gym.Rewards(), bar)


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share that was observed in n trials."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(model, tokens, mix="gym", levels=2, count=200, split="test", seed=1_000_000,
             slots=64, pixels=0, context=512, max_new=48) -> dict:
    """Evaluate a model on `count` tasks of each category in `mix`, from levels 0..levels-1 in turn.

    Returns {category: {accuracy, low, high, blank, chance, reward, errors, n}}: accuracy is the
    share of tasks with full reward, low and high its 95% interval, blank the share with grey
    pictures, chance the share that a guess would get, reward the mean reward. Tasks that end in an
    error are counted in `errors` only; a category without any other task is left out and named on
    stderr. Raises UserError if `mix` names what is no category, or none is left.
    """
    names = [name for name, _ in parse_mix(mix, sight(model.config))]
    if not names:
        raise UserError("--mix names no category")
    unknown = [name for name in names if name not in gym.names()]
    if unknown:
        raise UserError(f"there is no category '{unknown[0]}'; `python gym.py list` shows them")
    table = {}
    bar = tqdm(total=2 * count * len(names), desc="eval", disable=not sys.stderr.isatty())
    for name in names:
        side = task_pixels(name, model.config, pixels)
        tasks = [Task(name, seed + i, i % levels, split, side) for i in range(count)]
        bar.set_postfix_str(name)
        shown, blanked = (run_tasks(model, tokens, tasks, slots, context, max_new, blank, bar)
                          for blank in (False, True))
        valid, grey = ([e for e in played if e.score.error is None] for played in (shown, blanked))
        if not valid:       # nothing was measured: 0% would be wrong
            print(f"{name} is left out, as all {count} tasks ended in errors, the first one in: "
                  f"{shown[0].score.error}", file=sys.stderr)
            continue
        accuracy, blank = (sum(e.score.reward > 0.999 for e in played) / max(1, len(played))
                           for played in (valid, grey))
        low, high = interval(accuracy, len(valid))
        chance = sum(type(gym.make(t)).chance(t.level) for t in tasks) / count
        table[name] = {
            "accuracy": accuracy, "low": low, "high": high,
            "blank": blank, "chance": chance,
            "reward": sum(e.score.reward for e in valid) / len(valid),
            "errors": len(shown) - len(valid), "n": count}
    bar.close()
    if not table:
        raise UserError(f"no task of {', '.join(names)} could be played: there is nothing to show")
    return table


def show(table: dict):
    """Print the table of `evaluate`."""
    print(f"{'category':<17}{'accuracy':>9}  {'95% interval':<14}{'blank':>6}{'chance':>8}{'n':>6}")
    for name, row in table.items():
        print(f"{name:<17}{row['accuracy']:>9.1%}  {row['low']:>5.1%}-{row['high']:<7.1%}"
              f"{row['blank']:>7.1%}{row['chance']:>8.1%}{row['n']:>6}"
              + (f"  {row['errors']} not counted: errors" if row["errors"] else ""))
    mean = sum(row["accuracy"] for row in table.values()) / len(table)
    print(f"{'mean':<17}{mean:>9.1%}")


def evaluation(args: Eval):
    """Evaluate a checkpoint, print the table and write it to --out."""
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    print(hw.description)
    mix, levels = args.mix, args.levels
    if not mix or not levels:
        trained_mix, trained_levels, source = trained_on(find_checkpoint(args.ckpt or DEMO))
        names = [name for name, _ in parse_mix(trained_mix, sight(model.config))
                 if name in gym.names()]        # without text and code, which have no tasks
        mix, levels = mix or ",".join(names), levels or trained_levels
        if not mix:
            raise UserError(f"{source} names no category, only {trained_mix}: give --mix")
        if not args.mix:
            print(f"what it was trained on, by {source}: {mix}")
    began = time.time()
    table = evaluate(model, tokens, mix, levels, args.count, args.split, args.seed, args.slots,
                     args.pixels, args.context, args.max_new)
    show(table)
    write_json(args.out, {"ckpt": args.ckpt or "ckpt/demo", "split": args.split,
                          "levels": levels, "seed": args.seed, "table": table})
    print(f"{levels} level{'s' * (levels > 1)} in {time.time() - began:.0f} s; the figures are in "
          f"{args.out}")


# ---- the command line ---------------------------------------------------------------------------

VERBS = {"ask": (Ask, ask, "question"), "eval": (Eval, evaluation, None)}


if __name__ == "__main__":
    main(lambda: run_verb(VERBS, __doc__))
