"""What speculative decoding gains: drafts of the MTP head beside plain decoding, in one run.

    python -m lab.drafts                       the demo's checkpoint on held-out tasks
    python -m lab.drafts --trace               a few replies step by step, and no figures
    python -m lab.drafts --ckpt=out/pretrain --slots=1
    python -m lab.drafts --size=small          the cost alone: random weights, made-up acceptance
    python -m lab.drafts --peer                beside transformers' generate with the same weights

For each K: the share p of drafts that are accepted; tokens in a step of the trunk, beside the
formula (1 - p^(K+1)) / (1 - p) with the mean share; the cost of a step in plain steps; and useful
tokens a second as a ratio to plain decoding. Cost and ratio are medians over rounds, each of which
runs all K in turn; their times include the reading of the prompts. `auto` is the engine's own
choice of K; it changes on the way, so there is no formula for it, and its p and tokens are those of
the last round. The replies are compared with those of plain decoding. transformers pads its
batches: `slots` prompts, sorted by length, in each.

With --size the trunk is random, so it would accept nothing. The drafts are then replaced by the
known reply, each token wrong with probability 1 - p; everything else is computed and timed as it
would be.
"""
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import gym
import mmtp
import sample
from data import document, task_pixels
from engine import Engine, Request
from lab.bench import in_batches, padded, peer
from lib.cli import (check_options, cli, Count, Device, Dtype, main, Positive, Range, Seed, Share,
                     UserError)
from lib.common import setup, write_json
from model import Config, GLMV, sized
from rl import DEMO
from tasks.base import Task
from tokenizer import Tokenizer, tokenizer_of

NAMES = ("point", "gui_click", "gui_form", "shape_attr", "ocr_line", "counting")
TRACED = 6      # replies that --trace prints: one a category


@dataclass
class Args:
    ckpt: str = ""             # checkpoint with a head; default: the demo's
    size: Literal["", "tiny", "mini", "small", "base"] = ""     # random weights, made-up acceptance
    p: Share = 0.8             # that acceptance
    drafts: str = "1,2,3,5"    # values of K
    slots: Positive = 16       # conversations side by side
    prompts: Count = 96        # requests
    max_new: Annotated[int, Range(2)] = 48  # tokens of a reply at most; the first needs no step
    rounds: Positive = 5       # how often every K is run
    peer: bool = False         # run transformers as well (requirements-peers.txt)
    trace: bool = False        # print some replies step by step and stop
    seed: Seed = 0             # of random weights and made-up drafts
    device: Device = "auto"    # auto, cpu, cuda or mps
    dtype: Dtype = "float32"   # auto, float32 or bfloat16
    out: str = "out/drafts.json"  # file for the figures


def load(args: Args):
    """Model, tokenizer and hardware: a checkpoint with an MTP head, or random weights of --size."""
    if args.size:
        hw = setup(args.device, args.dtype)
        model = GLMV(sized(args.size), args.seed)
        mmtp.attach(model, 3)
        return model.to(hw.device, hw.dtype), tokenizer_of(model.config), hw
    model, tokens, hw = sample.load(args.ckpt or str(DEMO), args.device, args.dtype)
    if mmtp.head_of(model) is None:
        raise UserError("the checkpoint has no MTP head: there is nothing to measure")
    return model, tokens, hw


def held_out_messages(i: int, config: Config) -> list:
    """The opening messages of held-out task i; the categories take turns."""
    name = NAMES[i % len(NAMES)]
    task = Task(name, 3_000_000 + i, 0, "test", task_pixels(name, config))
    return next(gym.drive(gym.make(task)))


def requests_of(model: GLMV, tokens: Tokenizer, numbers, max_new: int) -> tuple[list, int]:
    """(a Request for each of the held-out tasks `numbers`, the context that the longest needs)."""
    prompts = [document(held_out_messages(i, model.config), tokens, model.config, True)
               for i in numbers]
    return ([Request(prompt, max_new) for prompt in prompts],
            max(len(prompt.ids) for prompt in prompts) + max_new + 1)


# ---- one reply, step by step --------------------------------------------------------------------

def step_lines(step: int, drafts: list[str], accepted: int, token: str, ended: bool) -> list[str]:
    """A speculative step as three lines: the drafts, the accepted ones, the token that the trunk
    adds. Each token is in the column of its place. ended: an accepted draft has ended the reply."""
    columns = [*drafts, ""]
    widths = [len(text) + 2 for text in columns]
    widths[accepted] = max(widths[accepted], len(token) + 2)

    def line(label: str, texts: list[str], note: str) -> str:
        cells = "".join(text.ljust(width) for text, width in zip(texts, widths))
        return f"{label:<19}{cells.rstrip()}   {note}".rstrip()

    if ended:
        note = "dropped, as the reply has ended"
    elif accepted < len(drafts):
        note = f"replaces {drafts[accepted]}"
    else:
        note = "follows, as all drafts were accepted"
    return [line(f"step {step:<4}drafted", drafts, ""),
            line("         accepted", drafts[:accepted], f"{accepted} of {len(drafts)}"),
            line("         trunk", [""] * accepted + [token], note)]


def trace(model: GLMV, tokens: Tokenizer, messages: list, drafts: int, max_new: int) -> list[str]:
    """A greedy reply to `messages` by speculative decoding, as lines for the terminal."""
    prompt = document(messages, tokens, model.config, True)
    engine = Engine(model, 1, len(prompt.ids) + max_new + 1, drafts, adapt=False)
    lines = []

    def text(id) -> str:
        """A token as it is printed: text in quotes, so that spaces show."""
        word = tokens.decode([int(id)])
        return word if word.startswith("<|") else repr(word)

    def note(drafted, accepted, chosen):
        row, count = drafted[0].tolist(), int(accepted[0])
        ended = any(id in engine.stops for id in row[:count])
        lines.extend(step_lines(engine.steps, [text(id) for id in row], count,
                                text(chosen[0, count]), ended))

    engine.trace = note
    engine.submit(Request(prompt, max_new))
    results = []
    while engine.busy:
        results += engine.step()
    ids = results[0].ids
    return [messages[-1].text.replace("<|image|>", "").strip(),
            f"prompt   trunk      {text(ids[0])}   from the forward that reads the prompt", *lines,
            f"reply    {sample.readable(tokens.decode(ids))}   {len(ids)} tokens in "
            f"{1 + engine.steps} forwards of the trunk"]


# ---- measuring ----------------------------------------------------------------------------------

def made_up(engine, replies: dict, p: float, seed: int):
    """Replace the head's drafts by the known reply, each token wrong with probability 1 - p."""
    rng, draft = np.random.default_rng(seed), engine._draft

    def drafts(n, k):
        found, draft_probs = draft(n, k)
        wrong = rng.random((n, k)) >= p
        for slot, sequence in enumerate(engine.running):
            known = replies[sequence.id][len(sequence.ids):][:k]
            row = torch.tensor(known + [0] * (k - len(known)), dtype=torch.long)
            found[slot] = row ^ torch.from_numpy(wrong[slot]).long()
        return found, draft_probs
    engine._draft = drafts


def decode(engine, requests: list, replies: list | None, args: Args):
    """Serve all requests. Returns the replies in their order, and the seconds. replies: the known
    ones, from which drafts are then made up."""
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
    """The replies of transformers, and the seconds, without the time for padding."""
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


def mean_rate(rates: list[float]) -> float:
    """The mean acceptance p that explains all depths: of all drafts that were tested, those that
    were accepted. rates: as lib.draft_tuner.DraftTuner has them."""
    alive = np.cumprod([1.0, *rates])
    return float(alive[1:].sum() / max(1e-9, alive[:-1].sum()))


def expected(p: float, k: int) -> float:
    """Tokens a step with k drafts, each accepted with probability p where all before it are:
    (1 - p^(k+1)) / (1 - p)."""
    return sum(p ** j for j in range(k + 1))


def table_row(k: int, times: dict, facts: dict) -> dict:
    """The figures of one setting: k drafts, none, or at most -k where the engine chooses. times:
    {k: (seconds, steps) of each round}; facts: {k: figures of the last round}."""
    ratios = [plain / own for (plain, _), (own, _) in zip(times[0], times[k])]
    p = mean_rate(facts[k]["rates"])
    cost, plain_cost = (statistics.median(seconds / steps for seconds, steps in times[i])
                        for i in (k, 0))
    return {"p": p, "tokens": facts[k]["tokens"],
            "formula": expected(p, k) if k >= 0 else None,
            "ratio": statistics.median(ratios), "rates": facts[k]["rates"],
            "cost": cost / plain_cost, "range": [min(ratios), max(ratios)],
            "equal": facts[k]["same"]}


def run(args: Args):
    check_options(args)
    if not all(re.fullmatch("0*([1-9]|1[0-6])", word) for word in args.drafts.split(",")):
        raise UserError(f"--drafts takes numbers from 1 to 16, as 1,3,5: not '{args.drafts}'")
    model, tokens, hw = load(args)
    if args.trace:
        k = model.config.mtp_depths or 1        # as many as the head was trained for
        print(f"greedy, {k} drafts a step, {TRACED} held-out tasks\n")
        for i in range(TRACED):
            messages = held_out_messages(i, model.config)
            print("\n".join(trace(model, tokens, messages, k, args.max_new)) + "\n")
        return
    print(f"{hw.description}; {args.prompts} prompts, {args.slots} slots, {args.rounds} rounds")
    requests, context = requests_of(model, tokens, range(args.prompts), args.max_new)
    prompts = [request.prompt for request in requests]
    counts = [int(word) for word in args.drafts.split(",")]
    settings = [0, *counts, -max(counts)]       # negative: at most so many, the engine chooses

    def engine(k):
        made = Engine(model, min(args.slots, args.prompts), context, abs(k), adapt=k < 0,
                      say=lambda _: None)
        if args.size:
            made.stops = set()
        return made

    plain, _ = decode(engine(0), requests, None, args)
    if max(map(len, plain)) < 2:
        raise UserError("every reply ends with its first token, which the forward over its prompt "
                        "gives: there is no step to measure")
    useful, times, facts = sum(map(len, plain)), {k: [] for k in settings}, {}
    theirs, peer_times = peer(model, hw).eval() if args.peer else None, []
    for _ in range(args.rounds):
        if theirs:
            found, took = generate(theirs, prompts, model.config, tokens, args, hw)
            peer_times.append(took)
            agree = sum(a == b for a, b in zip(found, plain))
        for k in settings:
            made = engine(k)
            found, took = decode(made, requests, plain if args.size and k else None, args)
            times[k].append((took, made.steps))
            facts[k] = {"tokens": made.tokens / made.steps, "best": made.tuner.best,
                        "rates": made.tuner.rates,
                        "same": sum(a == b for a, b in zip(found, plain))}
    rows = {str(k) if k >= 0 else f"auto {facts[k]['best']}/{-k}": table_row(k, times, facts)
            for k in settings}
    print(f"{'K':<9}{'p':>6}{'tokens/step':>13}{'formula':>9}{'cost':>7}{'ratio':>7}"
          f"  {'range':<12}equal replies")
    for name, r in rows.items():
        formula = "-" if r["formula"] is None else f"{r['formula']:.2f}"
        print(f"{name:<9}{r['p']:>6.2f}{r['tokens']:>13.2f}{formula:>9}{r['cost']:>7.2f}"
              f"{r['ratio']:>7.2f}  {r['range'][0]:.2f}-{r['range'][1]:<7.2f}{r['equal']}"
              f"/{args.prompts}")
    if theirs:
        ratios = [took / own for took, (own, _) in zip(peer_times, times[0])]
        print(f"plain decoding beside transformers: {statistics.median(ratios):.2f} "
              f"[{min(ratios):.2f}-{max(ratios):.2f}], equal replies {agree}/{args.prompts}")
        rows["peer"] = {"ratio": 1 / statistics.median(ratios), "equal": agree}
    write_json(Path(args.out), {"hardware": hw.description, "useful": useful, "rows": rows})


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
