"""Using a model: ask it about pictures, or evaluate it on the gym or on questions of your own.

    python sample.py ask                                 lists the questions that it was trained on
    python sample.py ask --image=docs/example.png "What color is the diamond?"
    python sample.py ask --image=docs/example.png "List all." --temperature=0.7
    python sample.py ask --image=docs/example.png "List all." --drafts=3    speculative decoding
    python sample.py ask --ckpt=FOLDER --image=page.png "Text Recognition:" --max_new=2048
                                                         GLM-OCR's folder, as it is released
    python sample.py eval --count=300                    held-out tasks of what it was trained on
    python sample.py eval --ckpt=out/pretrain --mix=point,gui_click --levels=3
    python sample.py eval --data=FILE.jsonl              your own questions: see lib/own_eval.py

Without --ckpt the model in ckpt/gym is used: 3.3M parameters, trained on all 36 categories of the
gym, see ckpt/gym/README.md. It knows what the gym draws and the wordings that `ask` lists, and
nothing else: to a photo or a question in other words it gives some answer, which means nothing.
--ckpt=ckpt/demo is the demo's: 1.0M parameters, six categories at level 0.
"""
import lib  # first of all, before torch: see lib/__init__.py

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

import gym
from data import document, parse_mix, sight, task_pixels
from engine import Engine, Request
from lib.card import list_questions, seen, trained_on, write_card
from lib.checkpoint import load_model
from lib.cli import (Count, Device, Drafts, Dtype, main, Natural, NonNegative, Positive, Range,
                     run_verb, Seed, Share, UserError)
from lib.common import ROOT, setup, write_json
from lib.images import open_image
from lib.own_eval import evaluate_file, show_figures
from lib.rollout import Episode, rollout, RolloutSettings
from lib.runs import find_checkpoint
from lib.scoring import interval
from tasks.base import Message, Task
from tokenizer import tokenizer_of

SHIPPED = ROOT / "ckpt" / "gym"     # the checkpoint that is used without --ckpt


def load(ckpt: str, device: str, dtype: str):
    """Model, tokenizer and hardware for a checkpoint or run folder, the shipped one if `ckpt` is
    empty. Raises UserError if there is none, or if it comes without a tokenizer."""
    hw = setup(device, dtype)
    folder = find_checkpoint(ckpt or SHIPPED)
    model = load_model(folder, hw.device, hw.dtype)
    return model, tokenizer_of(model.config), hw


# ---- ask ----------------------------------------------------------------------------------------

@dataclass
class Ask:
    question: str = ""            # also as a bare word; without it, the known ones are listed
    image: list[str] = field(default_factory=list)  # a picture file; may be given several times
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    max_new: Positive = 128       # tokens at most in the answer
    temperature: NonNegative = 0.0  # of sampling; 0 always takes the most likely token
    top_p: Share = 1.0            # sample from the most likely tokens, up to this probability
    seed: Seed = 0                # of sampling
    drafts: Drafts = 0            # tokens that the MTP head drafts in a step; same answer in fp32
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def ask(args: Ask):
    """Print the answer to a question about pictures, and to stderr what the model was given. What
    is unlike its training is named there, too: to what it has not seen a model gives some answer,
    which means nothing."""
    images = tuple(open_image(path) for path in args.image)
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    folder = find_checkpoint(args.ckpt or SHIPPED)
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
    ckpt: str = ""                # checkpoint or run folder; default: ckpt/gym
    data: str = ""                # file of own questions, see lib/own_eval.py; default: the gym's
    mix: str = ""                 # categories; default: those that it was trained on
    levels: Annotated[int, Range(0, 5)] = 0  # tasks of levels 0..levels-1; 0: as it was trained
    count: Count = 200            # tasks a category
    pixels: Natural = 0           # side of the pictures; 0: the least that suits the patches
    split: Literal["test", "train"] = "test"  # test: held-out seeds and factors; or train
    seed: Seed = 1_000_000        # of the first task; the next one has the next seed
    slots: Positive = 64          # conversations generated side by side
    context: Natural = 0          # tokens of a conversation; 0: as tasks or questions need
    max_new: Natural = 0          # tokens a reply may have; 0: as tasks need, or 256 for --data
    card: str = ""                # folder of the same weights that gets a card and report.json
    out: str = ""                 # file for the figures; default: out/eval.json or, for
                                  # --data=X.jsonl, out/eval_X/eval.json
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def budget(tasks, tokens, config) -> tuple[int, int]:
    """How many tokens to allow for a conversation and for a reply: twice as many as the oracle's
    longest in 24 of the tasks, since a model may take detours, and some to spare."""
    longest = reply = 0
    for task in tasks[::max(1, len(tasks) // 24)]:
        for talk in gym.demonstrate(task):
            d = document(talk, tokens, config)
            longest = max(longest, len(d.ids))
            reply = max(reply, max(len(tokens.encode(m.text)) for m in talk[1::2]))
    return min(2 * longest + 64, config.text.max_position_embeddings), 2 * reply + 16


def run_tasks(model, tokens, tasks, slots: int = 64, context: int = 0, max_new: int = 0,
              blank: bool = False, bar=None) -> list[Episode]:
    """Let the model do `tasks`, greedily and `slots` of them side by side. Returns their Episodes
    in the same order. context, max_new: tokens, 0 takes those of `budget`. blank: every picture is
    replaced by plain grey of the same size."""
    if not (context and max_new):
        most, reply = budget(tasks, tokens, model.config)
        context, max_new = context or most, max_new or reply
    engine = Engine(model, max(1, min(slots, len(tasks))), context)
    engine.stops.add(tokens.image)          # a visual slot in a reply would have no pixels
    settings = RolloutSettings(tokens, model.config, context, max_new, temperature=0.0, blank=blank)
    episodes = [Episode(task, i, 0) for i, task in enumerate(tasks)]
    return rollout(engine, episodes, settings, gym.Rewards(), bar)


def figures(tasks, shown, blanked) -> dict | None:
    """The figures of `tasks` from their Episodes with pictures and with blank ones; None where all
    ended in errors: nothing was measured, and 0% would be wrong."""
    valid, grey = ([e for e in played if e.score.error is None] for played in (shown, blanked))
    if not valid:
        return None
    accuracy, blank = (sum(e.score.reward > 0.999 for e in played) / max(1, len(played))
                       for played in (valid, grey))
    low, high = interval(accuracy, len(valid))
    chance = sum(type(gym.make(t)).chance(t.level) for t in tasks) / len(tasks)
    return {"accuracy": accuracy, "low": low, "high": high, "blank": blank, "chance": chance,
            "reward": sum(e.score.reward for e in valid) / len(valid),
            "errors": len(shown) - len(valid), "n": len(tasks)}


def evaluate(model, tokens, mix="gym", levels=2, count=200, split="test", seed=1_000_000,
             slots=64, pixels=0, context=0, max_new=0) -> dict:
    """Evaluate a model on `count` tasks of each category in `mix`, from levels 0..levels-1 in turn.

    Returns {category: {accuracy, low, high, blank, chance, reward, errors, n, by_level}}: accuracy
    is the share of tasks with full reward, low and high its 95% interval, blank the share with grey
    pictures, chance the share that a guess would get, reward the mean reward, and by_level the same
    figures for each level. Tasks that end in an error are counted in `errors` only; a category
    without any other task is left out and named on stderr. Raises UserError if `mix` names what is
    no category, or none is left.
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
        most, reply = budget(tasks, tokens, model.config)
        shown, blanked = (run_tasks(model, tokens, tasks, slots, context or most, max_new or reply,
                                    blank, bar) for blank in (False, True))
        row = figures(tasks, shown, blanked)
        if row is None:
            print(f"{name} is left out, as all {count} tasks ended in errors, the first one in: "
                  f"{shown[0].score.error}", file=sys.stderr)
            continue
        row["by_level"] = [figures(tasks[k::levels], shown[k::levels], blanked[k::levels])
                           for k in range(min(levels, count))]
        table[name] = row
    bar.close()
    if not table:
        raise UserError(f"no task of {', '.join(names)} could be played: there is nothing to show")
    return table


def show(table: dict):
    """Print the table of `evaluate`."""
    levels = max(len(row["by_level"]) for row in table.values())
    print(f"{'category':<17}{'accuracy':>9}  {'95% interval':<14}{'blank':>6}{'chance':>8}{'n':>6}"
          + "".join(f"{f'level {k}':>9}" for k in range(levels) if levels > 1))
    for name, row in table.items():
        print(f"{name:<17}{row['accuracy']:>9.1%}  {row['low']:>5.1%}-{row['high']:<7.1%}"
              f"{row['blank']:>7.1%}{row['chance']:>8.1%}{row['n']:>6}"
              + "".join(f"{level['accuracy']:>9.1%}" if level else f"{'-':>9}"
                        for level in row["by_level"] if levels > 1)
              + (f"  {row['errors']} not counted: errors" if row["errors"] else ""))
    mean = sum(row["accuracy"] for row in table.values()) / len(table)
    print(f"{'mean':<17}{mean:>9.1%}")


def evaluation(args: Eval):
    """Evaluate a checkpoint, print the table and write it to --out; --card: a card too. With --data
    the questions are those of a file, and `python -m lab.report FOLDER` makes a page of them."""
    if args.data:
        return own_evaluation(args)
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    print(hw.description)
    folder = find_checkpoint(args.ckpt or SHIPPED)
    trained_mix, trained_levels, source = trained_on(folder)
    mix, levels = args.mix, args.levels or trained_levels
    if not mix:
        known = dict(parse_mix(trained_mix, sight(model.config)))
        mix = ",".join(name for name in known if name in gym.names())   # without text and code
        if not mix:
            raise UserError(f"{source} names no category, only {trained_mix}: give --mix")
        print(f"what it was trained on, by {source}: {mix}")
    if args.card and not (Path(args.card) / "model.safetensors").exists():
        raise UserError(f"--card={args.card} holds no weights that a card could describe")
    began = time.time()
    table = evaluate(model, tokens, mix, levels, args.count, args.split, args.seed, args.slots,
                     args.pixels, args.context, args.max_new)
    show(table)
    found = {"ckpt": args.ckpt or "ckpt/gym", "split": args.split, "levels": levels,
             "seed": args.seed, "hardware": hw.description, "trained_levels": trained_levels,
             "table": table}
    out = args.out or "out/eval.json"
    write_json(out, found)
    if args.card:
        write_card(Path(args.card), model, seen(folder, model.config), found)
    print(f"{levels} level{'s' * (levels > 1)} in {time.time() - began:.0f} s; the figures are in "
          f"{out}" + f", the card is {args.card}/README.md" * bool(args.card))


def own_evaluation(args: Eval):
    """Evaluate a checkpoint on the questions of --data."""
    for name in ("mix", "levels", "count", "pixels", "split", "seed", "card"):
        if getattr(args, name) != getattr(Eval, name):
            raise UserError(f"--{name} is about the gym's tasks, and --data takes their place")
    model, tokens, hw = load(args.ckpt, args.device, args.dtype)
    print(hw.description)
    began, name = time.time(), Path(args.data).stem
    out = Path(args.out or f"out/eval_{name}/eval.json")
    found = evaluate_file(model, tokens, args.data, out.parent / "pictures", args.slots,
                          args.context, args.max_new or 256)
    show_figures(found)
    write_json(out, {"title": f"{Path(args.data).name}, answered by {args.ckpt or 'ckpt/gym'}",
                     "data": args.data, "ckpt": args.ckpt or "ckpt/gym",
                     "hardware": hw.description, **found})
    print(f"{found['all']['n']:,} questions in {time.time() - began:.0f} s; the figures are in "
          f"{out}, and `python -m lab.report {out.parent}` makes a page of them")


# ---- the command line ---------------------------------------------------------------------------

VERBS = {"ask": (Ask, ask, "question"), "eval": (Eval, evaluation, None)}


if __name__ == "__main__":
    main(lambda: run_verb(VERBS, __doc__))
