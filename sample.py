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

import gym
from data import document, parse_mix, sight
from engine import Engine, Request
from lib.card import list_questions, seen, trained_on, write_card
from lib.checkpoint import load_model
from lib.cli import (Count, Device, Drafts, Dtype, main, Natural, NonNegative, Positive, Range,
                     run_verb, Seed, Share, UserError)
from lib.common import ROOT, setup, write_json
from lib.evaluation import evaluate, show
from lib.images import open_image
from lib.own_eval import evaluate_file, show_figures
from lib.runs import find_checkpoint
from tasks.base import Message
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
