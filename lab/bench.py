"""Speed beside transformers: its GLM-OCR classes with our weights, at their best, in one run.

    python -m lab.bench train              forward and backward over documents of mixed length
    python -m lab.bench decode             greedy generation, prompts with and without pictures
    python -m lab.bench decode --dtype=bfloat16 --size=small

Both sides get the same random weights, documents, dtype, device and number of threads. First it is
checked that they do the same work (equal losses, equal tokens); then each side's few settings are
tried and its fastest is kept; then both run in turn, A B A B, and the medians are compared. What
counts is useful tokens: real ones in training, asked-for ones in generation, never padding.

The peer at its best: documents sorted by length, then padded in batches; sdpa or eager attention;
tensors and positions made beforehand; no cache in training. What it is not given: torch.compile
(which we do without as well) and its own continuous batching, which takes no pictures.

Replies of mixed length favour the engine, which fills a slot as soon as it is free; so generation
is measured twice more: batches sorted by length of reply, as if it were known, and equal lengths.
"""
import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import gym
from common import UserError, cli, main, setup, write_json
from data import Document, Stream, collate, document
from engine import Engine, Request
from model import Config, GLMV, sized
from pretrain import loss_sum
from tasks.base import Task
from tokenizer import Tokenizer
from vit import MEAN, STD

AIM = 1.5                     # DESIGN's: ours over theirs, in training and in generation
TIE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # best two logits this close: either may win
REPLIES = (8, 16, 24, 32, 48, 64)


@dataclass
class Args:
    what: str = ""             # train or decode
    size: str = "tiny"         # tiny, small or base
    dtype: str = "float32"     # float32 or bfloat16
    device: str = "auto"       # auto, cpu, cuda or mps
    rounds: int = 5            # measurements of each side, in turn
    documents: int = 64        # documents to learn, or prompts to answer
    slots: int = 0             # decode: conversations at a time on our side; 0 = best of a few
    seed: int = 0              # of weights and documents
    out: str = "out/bench"     # folder of the JSON


# ---- the documents ------------------------------------------------------------------------------

def roomy(size: str) -> Config:
    """A size's configuration, with room for pictures of 64 tokens even at tiny."""
    config = sized(size)
    config.max_tokens = max(config.max_tokens, 64)
    return config


# Short dialogues at any size of picture: what the demo trains.
CATEGORIES = ("shape_attr", "counting", "ocr_line", "point", "gui_click", "gui_form")


def documents(config: Config, count: int, seed: int, prompts: bool = False) -> list[Document]:
    """Every other one a gym conversation (or its first question) with pictures of 16, 36 or 64
    tokens, every other one plain text of 32 to 400 tokens."""
    rng, tokens, made = np.random.default_rng(seed), Tokenizer(config.n_ranks), []
    sides = [side * config.vision.patch_size // 8 for side in (64, 96, 128)]
    for i in range(count):
        if i % 2:
            length = int(rng.integers(32, 401))
            made.append(Stream(config, (("text", 1.0),), seed, text_tokens=length)(i))
            continue
        name = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        task = Task(name, int(rng.integers(2 ** 31)), int(rng.integers(3)),
                    pixels=int(rng.choice(sides)))
        messages = gym.demonstrate(task)[0]
        made.append(document(messages[:1] if prompts else messages, tokens, config, prompts))
    return made


# ---- the peer -----------------------------------------------------------------------------------

def peer(ours: GLMV, hw):
    """transformers' model with the weights of ours. Raises UserError where it isn't installed."""
    try:
        from transformers import GlmOcrForConditionalGeneration
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f"lab.bench compares with transformers ({error}): "
                        "pip install -r requirements-peers.txt") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        model = GlmOcrForConditionalGeneration.from_pretrained(folder, dtype=hw.dtype)
    model.generation_config.eos_token_id = None  # every reply has the length that was asked for
    model.generation_config.pad_token_id = 0
    return model.to(hw.device)


def padded(docs: list[Document], config: Config, hw, left: bool = False) -> dict:
    """The documents as one batch in transformers' form, filled up on the right or on the left."""
    shape = len(docs), max(len(d.ids) for d in docs)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for i, d in enumerate(docs):
        place = slice(-len(d.ids), None) if left else slice(len(d.ids))
        ids[i, place], mask[i, place] = torch.from_numpy(d.ids.astype(np.int64)), 1
        learn = torch.from_numpy(d.weights > 0)
        labels[i, place] = torch.where(learn, ids[i, place], -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels,
             "mm_token_type_ids": (ids == config.image_token_id).int() * mask.int()}
    row = collate(docs, config)
    if len(row.patches):
        area = config.vision.patch_size ** 2
        mean, std = (torch.tensor(x).repeat_interleave(area) for x in (MEAN, STD))
        pixels = ((row.patches[:, 0] / 255 - mean) / std).view(-1, 3, 1, area)
        pixels = pixels.expand(-1, -1, 2, -1).flatten(1)  # a still image is two equal frames
        batch |= {"pixel_values": pixels.to(hw.dtype), "image_grid_thw": row.grids}
    return {k: v.to(hw.device) for k, v in batch.items()}


def in_batches(items: list, size: int) -> list[list]:
    return [items[i:i + size] for i in range(0, len(items), size)]


# ---- measuring ----------------------------------------------------------------------------------

def seconds(work) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def fastest(variants: dict):
    """The name of the variant that takes least, of two runs each; the first also warms it up."""
    took = {name: min(seconds(work), seconds(work)) for name, work in variants.items()}
    return min(took, key=took.get)


def duel(ours: dict, theirs: dict, useful: int, rounds: int) -> dict:
    """Each side's fastest variant, in turn. Returns useful tokens a second (median, least, most)
    and the ratio of the medians, with the range of the ratios within a round."""
    names = fastest(ours), fastest(theirs)
    rates = [[], []]
    for _ in range(rounds):
        for side, work in enumerate((ours[names[0]], theirs[names[1]])):
            rates[side].append(useful / seconds(work))
    pairs = [a / b for a, b in zip(*rates)]
    rows = [{"setting": n, "median": statistics.median(r), "least": min(r), "most": max(r)}
            for n, r in zip(names, rates)]
    return {"ours": rows[0], "theirs": rows[1], "useful": useful,
            "ratio": rows[0]["median"] / rows[1]["median"], "ratios": [min(pairs), max(pairs)]}


# ---- training -----------------------------------------------------------------------------------

def packed(docs: list[Document], config: Config, room: int, hw) -> list:
    """Rows of at most `room` tokens (or of one longer document), in order."""
    rows, used = [], room + 1
    for d in docs:
        if used + len(d.ids) > room:
            rows.append([])
            used = 0
        rows[-1].append(d)
        used += len(d.ids)
    return [collate(row, config).to(hw.device) for row in rows]


def train(args: Args, hw) -> dict:
    config = roomy(args.size)
    ours = GLMV(config, args.seed)
    theirs = peer(ours, hw)
    ours, theirs = ours.to(hw.device, hw.dtype), theirs.train()
    docs = documents(config, args.documents, args.seed)
    weight = sum(float((d.weights[1:] > 0).sum()) for d in docs)

    def our_pass(rows):
        ours.zero_grad(set_to_none=True)
        total = 0.0
        for row in rows:
            loss = loss_sum(ours, row) / weight
            loss.backward()
            total += loss.detach()
        return float(total)

    def their_pass(batches, attention):
        theirs.set_attn_implementation(attention)
        theirs.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            # transformers takes the mean over a batch; many batches make one step.
            share = float((batch["labels"][:, 1:] != -100).sum()) / weight
            loss = theirs(**batch, use_cache=False).loss * share
            loss.backward()
            total += loss.detach()
        return float(total)

    our_rows = {f"rows of {room}": packed(docs, config, room, hw) for room in (1024, 2048, 4096)}
    ordered = sorted(docs, key=lambda d: len(d.ids))
    their_batches = {}
    for size in sorted({min(n, len(docs)) for n in (1, 4, 8, 16, len(docs))}):
        batches = [padded(part, config, hw) for part in in_batches(ordered, size)]
        for batch in batches:  # a data loader can make the positions, so they are not timed
            if "image_grid_thw" in batch:
                batch["position_ids"] = theirs.model.get_rope_index(**batch)[0]
        their_batches[size] = batches
    losses = (our_pass(our_rows["rows of 2048"]),
              their_pass(their_batches[max(their_batches)], "sdpa"))
    norms = [float(sum(p.grad.float().norm() ** 2 for p in m.parameters()) ** 0.5)
             for m in (ours, theirs)]
    print(f"loss           ours {losses[0]:.6f}, theirs {losses[1]:.6f}")
    print(f"gradient norm  ours {norms[0]:.6f}, theirs {norms[1]:.6f}")
    result = duel(
        {name: lambda rows=rows: our_pass(rows) for name, rows in our_rows.items()},
        {f"batches of {size}, {kind}": lambda b=batches, k=kind: their_pass(b, k)
         for size, batches in their_batches.items() for kind in ("sdpa", "eager")},
        sum(len(d.ids) for d in docs), args.rounds)
    return {"losses": losses, "norms": norms, "cases": {"mixed lengths": result}}


# ---- generation ---------------------------------------------------------------------------------

def compare(model: GLMV, prompts: list, ours: list, theirs: list, hw) -> dict:
    """How many greedy replies are equal, how many part where the two best logits are a tie, and
    how many are really different."""
    counts = {"equal": 0, "ties": 0, "different": 0}
    for prompt, a, b in zip(prompts, ours, theirs):
        first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if first is None:
            counts["equal"] += 1
            continue
        ids = np.concatenate([prompt.ids, np.array(a[:first], np.int32)])
        batch = collate([Document(ids, np.zeros(len(ids), np.float32), prompt.images)],
                        model.config).to(hw.device)
        with torch.no_grad():
            merged = model.encode(batch.patches, batch.grids) if len(batch.patches) else None
            best = model.lm_head(model(batch, merged)[-1]).float().topk(2).values
        counts["ties" if best[0] - best[1] < TIE[hw.dtype] else "different"] += 1
    return counts


def decode(args: Args, hw) -> dict:
    config = roomy(args.size)
    ours = GLMV(config, args.seed)
    theirs = peer(ours, hw).eval()
    ours = ours.to(hw.device, hw.dtype).eval()
    prompts = documents(config, args.documents, args.seed, prompts=True)
    lengths = np.random.default_rng(args.seed).choice(REPLIES, len(prompts)).tolist()
    context = max(len(p.ids) for p in prompts) + max(REPLIES)
    slots = [args.slots] if args.slots else sorted({min(n, len(prompts)) for n in (8, 16, 32, 64)})
    engines = {n: Engine(ours, n, context) for n in slots}
    for engine in engines.values():
        engine.stops = set()

    def our_replies(engine, asked):
        order = {engine.submit(Request(p, n)): i for i, (p, n) in enumerate(zip(prompts, asked))}
        replies = [[]] * len(prompts)
        while engine.busy:
            for result in engine.step():
                replies[order[result.id]] = result.ids
        return replies

    def their_replies(batches, attention):
        theirs.set_attn_implementation(attention)
        replies = [[]] * len(prompts)
        for members, asked, batch in batches:
            out = theirs.generate(**batch, max_new_tokens=max(asked), do_sample=False)
            for i, n, row in zip(members, asked, out[:, batch["input_ids"].shape[1]:].tolist()):
                replies[i] = row[:n]
        return replies

    def batched(asked, size, key):
        batches = []
        for members in in_batches(sorted(range(len(prompts)), key=key), size):
            batch = padded([prompts[i] for i in members], config, hw, left=True)
            del batch["labels"]
            batches.append((members, [asked[i] for i in members], batch))
        return batches

    equal = [32] * len(prompts)
    by_prompt, by_reply = (lambda i: len(prompts[i].ids)), (lambda i: lengths[i])
    cases, agreement = {}, {"equal": 0, "ties": 0, "different": 0}
    for name, asked, key in (("mixed replies", lengths, by_prompt),
                             ("mixed, known to the peer", lengths, by_reply),
                             ("equal replies", equal, by_prompt)):
        sizes = sorted({min(n, len(prompts)) for n in (8, 16, 32, len(prompts))})
        batches = {size: batched(asked, size, key) for size in sizes}
        found = compare(ours, prompts, our_replies(engines[slots[-1]], asked),
                        their_replies(batches[sizes[-1]], "sdpa"), hw)
        agreement = {k: n + found[k] for k, n in agreement.items()}
        cases[name] = duel(
            {f"{n} slots": lambda e=engine: our_replies(e, asked) for n, engine in engines.items()},
            {f"batches of {size}, {kind}": lambda b=b, k=kind: their_replies(b, k)
             for size, b in batches.items() for kind in ("sdpa", "eager")},
            sum(asked), args.rounds)
    print("greedy replies  " + ", ".join(f"{n} {k}" for k, n in agreement.items()))
    return {"agreement": agreement, "cases": cases}


# ---- the report ---------------------------------------------------------------------------------

def run(args: Args) -> dict:
    """Measure, print the table, write out/bench/NAME.json; returns what was written."""
    if args.what not in ("train", "decode"):
        raise UserError(f"lab.bench takes train or decode, not '{args.what}'")
    hw = setup(args.device, args.dtype)
    print(f"{hw.why}; {args.size}, {args.documents} documents, {args.rounds} rounds")
    result = {"args": dataclasses.asdict(args), "hardware": hw.why, "aim": AIM,
              **(train if args.what == "train" else decode)(args, hw)}
    print(f"{'useful tokens/s':<26} {'median':>9} {'least':>9} {'most':>9}  setting")
    for name, case in result["cases"].items():
        print(name)
        for side in ("ours", "theirs"):
            row = case[side]
            print(f"  {side:<24} {row['median']:>9,.0f} {row['least']:>9,.0f} {row['most']:>9,.0f}"
                  f"  {row['setting']}")
        low, high = case["ratios"]
        print(f"  {'ratio':<24} {case['ratio']:>9.2f} {low:>9.2f} {high:>9.2f}"
              f"  aim {AIM}: {'reached' if case['ratio'] >= AIM else 'missed'}")
    where = Path(args.out) / f"{args.what}-{args.size}-{args.dtype}-{hw.device.type}.json"
    write_json(where, result)
    print(f"written to {where}")
    return result


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__, positional="what")))
