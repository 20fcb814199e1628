"""What speculative decoding gains: drafts of the MTP head beside plain decoding, in one run.

    python -m lab.drafts                       the demo's checkpoint on held-out tasks
    python -m lab.drafts --ckpt=out/pretrain --slots=1
    python -m lab.drafts --size=small          the cost side: random weights, acceptance made up
    python -m lab.drafts --peer                beside transformers' generate with the same weights

For each K: the share of drafts that stand, tokens a trunk step beside the formula
(1 - p^(K+1)) / (1 - p) with p the mean share, the cost of a step in plain steps, and useful
tokens a second as a ratio to plain decoding (median over rounds that run all K in turn). `auto`
is what the engine chooses by itself. Replies are checked to be those of plain decoding.
transformers pads its batches, `slots` prompts sorted by length in each.

With --size the trunk is random, so nothing would be accepted: drafts are replaced by the known
reply, each token wrong with probability 1 - p. Everything is computed and timed as it would be.
"""
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import gym
import mmtp
import sample
from data import document
from engine import Engine, Request
from lab.bench import in_batches, padded, peer
from lib.cli import cli, main, UserError
from lib.common import setup, write_json
from model import GLMV, sized
from tasks.base import Task
from tokenizer import Tokenizer

NAMES = ("point", "gui_click", "gui_form", "shape_attr", "ocr_line", "counting")


@dataclass
class Args:
    ckpt: str = ""             # checkpoint with a head; default: the demo's
    size: str = ""             # tiny, small or base: random weights instead, made-up acceptance
    p: float = 0.8             # that acceptance
    drafts: str = "1,2,3,5"    # values of K
    slots: int = 16            # conversations side by side
    prompts: int = 96          # requests
    max_new: int = 48          # tokens of a reply at most
    rounds: int = 5            # times that every K is run
    peer: bool = False         # transformers too (requirements-peers.txt)
    seed: int = 0              # of prompts and made-up drafts
    device: str = "auto"       # auto, cpu, cuda or mps
    dtype: str = "float32"     # auto, float32 or bfloat16
    out: str = "out/drafts.json"  # where the figures go


def made_up(engine, replies: dict, p: float, seed: int):
    """Replace the head's drafts by the known reply, each token wrong with probability 1 - p."""
    rng, guess = np.random.default_rng(seed), engine._guess

    def drafts(n, k):
        found, odds = guess(n, k)
        if k:
            known = [replies[r.id][len(r.ids):len(r.ids) + k] for r in engine.running]
            wrong = rng.random((n, k)) >= p
            rows = [[token ^ bool(w) for token, w in zip((*row, *[0] * k), wrong[i])]
                    for i, row in enumerate(known)]
            found = torch.tensor(rows, device=found.device)
        return found, odds
    engine._guess = drafts


def decode(engine, requests: list, replies: list | None, args: Args):
    """Serve all requests; returns the replies in order and the seconds."""
    began = time.perf_counter()
    order = {engine.submit(r): i for i, r in enumerate(requests)}
    if replies:
        made_up(engine, {id: replies[i] for id, i in order.items()}, args.p, args.seed)
    found = [[]] * len(requests)
    while engine.busy:
        for result in engine.step():
            found[order[result.id]] = result.ids
    return found, time.perf_counter() - began


def generate(theirs, prompts: list, config, tokens, args: Args, hw):
    """transformers' replies, and the seconds; padding and positions are its own affair."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    batches = [(part, padded([prompts[i] for i in part], config, hw, left=True))
               for part in in_batches(order, args.slots)]
    found, began = [[]] * len(prompts), time.perf_counter()
    for part, batch in batches:
        batch.pop("labels")
        out = theirs.generate(**batch, max_new_tokens=args.max_new, do_sample=False,
                              eos_token_id=sorted(tokens.stops), pad_token_id=0)
        for i, row in zip(part, out[:, batch["input_ids"].shape[1]:].tolist()):
            end = next((n + 1 for n, token in enumerate(row) if token in tokens.stops), len(row))
            found[i] = row[:end]
    return found, time.perf_counter() - began


def run(args: Args):
    if min(args.slots, args.prompts, args.rounds, args.max_new) < 1 or not 0 <= args.p <= 1:
        raise UserError("--slots, --prompts, --rounds and --max_new take 1 or more, --p 0 to 1")
    if not all(word.isdigit() and int(word) for word in args.drafts.split(",")):
        raise UserError(f"--drafts takes numbers from 1 on, as 1,3,5: not '{args.drafts}'")
    if args.size:
        hw = setup(args.device, args.dtype)
        model = GLMV(sized(args.size), args.seed)
        mmtp.attach(model, 3)
        model, tokens = model.to(hw.device, hw.dtype), Tokenizer(model.config.n_ranks)
    else:
        model, tokens, hw = sample.load(args.ckpt, args.device, args.dtype)
        if mmtp.head_of(model) is None:
            raise UserError("the checkpoint has no MTP head: there is nothing to measure")
    print(f"{hw.description}; {args.prompts} prompts, {args.slots} slots, {args.rounds} rounds")
    prompts = [document(next(gym.drive(gym.make(Task(NAMES[i % len(NAMES)], 3_000_000 + i, 0,
                                                     "test")))), tokens, model.config, True)
               for i in range(args.prompts)]
    requests = [Request(p, args.max_new) for p in prompts]
    context = max(len(p.ids) for p in prompts) + args.max_new + 1
    settings = [0, *map(int, args.drafts.split(",")), -max(map(int, args.drafts.split(",")))]

    def engine(k):
        made = Engine(model, args.slots, context, abs(k), adapt=k < 0, say=lambda _: None)
        if args.size:
            made.stops = set()
        return made

    plain, _ = decode(engine(0), requests, None, args)
    useful, times, facts = sum(map(len, plain)), {k: [] for k in settings}, {}
    theirs = peer(model, hw).eval() if args.peer else None
    for _ in range(args.rounds):
        if theirs:
            found, took = generate(theirs, prompts, model.config, tokens, args, hw)
            times.setdefault("peer", []).append(took)
            agree = sum(a == b for a, b in zip(found, plain))
        for k in settings:
            made = engine(k)
            found, took = decode(made, requests, plain if args.size and k else None, args)
            times[k].append(took)
            trunk = made.steps
            facts[k] = {"tokens": made.tokens / trunk, "steps": trunk, "depth": made.depth,
                        "rates": [s / max(1, t) for s, t in zip(made.stood, made.tried)],
                        "same": sum(a == b for a, b in zip(found, plain))}
    print(f"{'K':<9}{'p':>6}{'tokens/step':>13}{'formula':>9}{'cost':>7}{'ratio':>7}"
          f"  {'range':<12}equal replies")
    rows = {}
    for k in settings:
        ratios = [a / b for a, b in zip(times[0], times[k])]
        f, ratio = facts[k], statistics.median(ratios)
        # the mean p that explains the depths: of all drafts that were tested, those that stood
        alive = np.cumprod([1.0, *f["rates"]])
        p = alive[1:].sum() / max(1e-9, alive[:-1].sum())
        formula = sum(p ** j for j in range(k + 1)) if k >= 0 else math.nan
        rows[str(k) if k >= 0 else f"auto {f['depth']}/{-k}"] = {
            "p": p, "tokens": f["tokens"], "formula": formula, "ratio": ratio, "rates": f["rates"],
            "cost": (statistics.median(times[k]) / f["steps"])
            / (statistics.median(times[0]) / facts[0]["steps"]),
            "range": [min(ratios), max(ratios)], "equal": f["same"]}
    for name, r in rows.items():
        print(f"{name:<9}{r['p']:>6.2f}{r['tokens']:>13.2f}{r['formula']:>9.2f}{r['cost']:>7.2f}"
              f"{r['ratio']:>7.2f}  {r['range'][0]:.2f}-{r['range'][1]:<7.2f}{r['equal']}"
              f"/{args.prompts}")
    if theirs:
        ratios = [a / b for a, b in zip(times["peer"], times[0])]
        print(f"plain decoding beside transformers: {statistics.median(ratios):.2f} "
              f"[{min(ratios):.2f}-{max(ratios):.2f}], equal replies {agree}/{args.prompts}")
        rows["peer"] = {"ratio": 1 / statistics.median(ratios), "equal": agree}
    write_json(Path(args.out), {"hardware": hw.description, "useful": useful, "rows": rows})


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
