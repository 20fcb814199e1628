"""Speed in comparison with transformers' GLM-OCR and timm's NaFlexViT, at their best settings.

    python -m lab.bench train              forward and backward over documents of mixed length
    python -m lab.bench decode             greedy generation, prompts with and without pictures
    python -m lab.bench decode --dtype=bfloat16 --size=small
    python -m lab.bench vit                the vision encoder on pictures of mixed sizes
    python -m lab.bench rl --rounds=3      asynchronous RL and synchronous RL (lab/bench_rl.py)
    python -m lab.bench busy               a training step while other processes are busy
                                           (lab/bench_busy.py)
    python -m lab.bench memory             what each policy of --memory keeps, by number of images
                                           (lab/bench_memory.py)
    python -m lab.bench loss               linear_cross_entropy and all logits at once, time and
                                           memory (lab/bench_loss.py)
    python -m lab.bench loader             own data from tars, beside the webdataset package
                                           (lab/bench_loader.py)
    python -m lab.bench partition          planned partitioning beside simpler ways, simulated
                                           (lab/bench_partition.py)
    python -m lab.bench serve              serve.py beside transformers' generate behind the same
                                           protocol (lab/bench_serve.py)

In `train`, `decode` and `vit`, both sides get the same random weights, documents, dtype, device and
number of threads. First a check that both do the same work: equal losses, equal tokens. Then a few
settings of each side are tried, and the fastest is kept. Then both sides run in turn, A B A B, and
each round gives a ratio, of which the median counts. Only useful tokens count: real tokens in
training, requested tokens in generation, never padding.

The peer at its best: documents sorted by length, then padded in batches; sdpa or eager attention;
tensors and positions made beforehand; no cache in training. It does not get torch.compile, which we
do not use either, nor its own continuous batching, which does not support pictures.

For `vit` the peer is timm's NaFlexViT, which pads each picture to the size of the largest one in
its batch; patches of pictures count as useful. It is built once of our blocks, with our weights, so
that both give the same numbers, and once of its own blocks (LayerNorm, GELU, a table of positions)
with as many parameters. Its batches hold eight or more pictures in their given order, about half of
it padding; or pictures sorted by size, in batches as small as it likes, down to one picture without
padding.

Replies of mixed length favour the engine, which fills a slot as soon as it is free. So generation
is measured in two more cases: batches sorted by the length of the reply, as if it were known in
advance, and replies of equal length.
"""
import lib  # first of all, before torch: see lib/__init__.py

import dataclasses
import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import gym
from data import collate, Document, document, Stream
from engine import Engine, Request
from lab import (bench_busy, bench_loader, bench_loss, bench_memory, bench_partition,
                 bench_rl, bench_serve)
from lab.bench_case import case_of_speeds, print_case
from lib.checkpoint import save_model
from lib.cli import check_options, cli, Count, Device, main, Natural, Positive, Seed, UserError
from lib.common import setup, write_json
from model import Config, GLMV, init, sized
from pretrain import loss_sum
from tasks.base import Task
from tokenizer import tokenizer_of
from vit import CogViT, MEAN, naflex, patch_positions, patchify, STD

AIM = 1.5                     # our speed over theirs, in training and in generation
# Where the two best logits are closer than this, rounding decides which of them wins.
TIE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
REPLIES = (8, 16, 24, 32, 48, 64)
BUDGETS = (128, 256, 576, 784, 1024)  # patches of a picture, as SigLIP2 draws them [R]


@dataclass
class Args:
    what: str = ""             # one of the words above
    size: Literal["tiny", "mini", "small", "base"] = "tiny"     # not of rl, busy, partition, serve
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Device = "auto"    # auto, cpu, cuda or mps
    rounds: Positive = 5       # measurements of each side, in turn
    documents: Count = 64      # documents to learn, prompts to answer, pictures to encode
    slots: Natural = 0         # decode: our conversations side by side; 0: the best of a few
    seed: Seed = 0             # of weights and documents
    ckpt: str = ""             # serve: checkpoint folder; default: ckpt/gym
    out: str = "out/bench"     # folder of the JSON


# ---- the documents ------------------------------------------------------------------------------

def config_of(size: str) -> Config:
    """The configuration of a size; pictures of 64 tokens are allowed at tiny as well."""
    config = sized(size)
    config.max_tokens = max(config.max_tokens, 64)
    return config


# The demo's categories: short dialogues, whatever the size of the picture.
CATEGORIES = ("shape_attr", "counting", "ocr_line", "point", "gui_click", "gui_form")


def documents(config: Config, count: int, seed: int, prompts: bool = False) -> list[Document]:
    """Conversations of the gym with pictures of 16, 36 or 64 tokens, alternating with plain text of
    32 to 400 tokens. prompts: only the first question of each conversation."""
    rng, tokens, made = np.random.default_rng(seed), tokenizer_of(config), []
    sides = [side * config.vision.patch_size // 8 for side in (64, 96, 128)]
    for i in range(count):
        if i % 2:
            length = int(rng.integers(32, 401))
            made.append(Stream(config, (("text", 1.0),), seed, text_tokens=length)(i)[0])
            continue
        name = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        task = Task(name, int(rng.integers(2 ** 31)), int(rng.integers(3)),
                    pixels=int(rng.choice(sides)))
        messages = gym.demonstrate(task)[0]
        made.append(document(messages[:1] if prompts else messages, tokens, config, prompts))
    return made


# ---- the peer -----------------------------------------------------------------------------------

def peer(ours: GLMV, hw):
    """transformers' model with our weights. Raises UserError if transformers is not installed."""
    try:
        from transformers import GlmOcrForConditionalGeneration
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f"lab.bench compares with transformers ({error}): "
                        "pip install -r requirements-peers.txt") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        model = GlmOcrForConditionalGeneration.from_pretrained(folder, dtype=hw.dtype)
    model.generation_config.eos_token_id = None  # every reply has the length that was asked for
    model.generation_config.pad_token_id = 0
    return model.to(hw.device)


def padded(docs: list[Document], config: Config, hw, left: bool = False) -> dict:
    """The documents as one batch in transformers' form, padded on the right, or on the left."""
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
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def fastest(variants: dict):
    """The name of the fastest variant, by the better of two runs; the first is also a warm-up."""
    took = {name: min(seconds(work), seconds(work)) for name, work in variants.items()}
    return min(took, key=took.get)


def compare_speeds(ours: dict, theirs: dict, useful: int, rounds: int) -> dict:
    """Run the fastest variant of each side in turn: their useful tokens a second, as a case."""
    names = fastest(ours), fastest(theirs)
    rates = [[], []]
    for _ in range(rounds):
        for side, work in enumerate((ours[names[0]], theirs[names[1]])):
            rates[side].append(useful / seconds(work))
    return case_of_speeds(*rates, names, useful=useful)


# ---- training -----------------------------------------------------------------------------------

def packed(docs: list[Document], config: Config, room: int, hw) -> list:
    """Pack documents in order into rows of at most `room` tokens; a longer document gets a row of
    its own."""
    rows, used = [], room + 1
    for d in docs:
        if used + len(d.ids) > room:
            rows.append([])
            used = 0
        rows[-1].append(d)
        used += len(d.ids)
    return [collate(row, config).to(hw.device) for row in rows]


def train(args: Args, hw) -> dict:
    config = config_of(args.size)
    ours = GLMV(config, args.seed)
    theirs = peer(ours, hw)
    ours, theirs = ours.to(hw.device, hw.dtype), theirs.train()
    docs = documents(config, args.documents, args.seed)
    weight = sum(float((d.weights[1:] > 0).sum()) for d in docs)

    def our_pass(rows):
        ours.zero_grad(set_to_none=True)
        total = 0.0
        for row in rows:
            loss = loss_sum(ours, row)[0] / weight
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
    result = compare_speeds(
        {name: lambda rows=rows: our_pass(rows) for name, rows in our_rows.items()},
        {f"batches of {size}, {kind}": lambda b=batches, k=kind: their_pass(b, k)
         for size, batches in their_batches.items() for kind in ("sdpa", "eager")},
        sum(len(d.ids) for d in docs), args.rounds)
    return {"losses": losses, "norms": norms, "cases": {"mixed lengths": result}}


# ---- generation ---------------------------------------------------------------------------------

def compare_replies(model: GLMV, prompts: list, ours: list, theirs: list, hw) -> dict:
    """Count greedy replies that are equal, that differ first where the two best logits are a tie
    (TIE), and that are really different."""
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
            merged = model.encode_images(batch)
            best = model.lm_head(model(batch, merged)[-1]).float().topk(2).values
        counts["ties" if best[0] - best[1] < TIE[hw.dtype] else "different"] += 1
    return counts


def decode(args: Args, hw) -> dict:
    config = config_of(args.size)
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
        found = compare_replies(ours, prompts, our_replies(engines[slots[-1]], asked),
                                their_replies(batches[sizes[-1]], "sdpa"), hw)
        agreement = {k: n + found[k] for k, n in agreement.items()}
        cases[name] = compare_speeds(
            {f"{n} slots": lambda e=engine: our_replies(e, asked) for n, engine in engines.items()},
            {f"batches of {size}, {kind}": lambda b=b, k=kind: their_replies(b, k)
             for size, b in batches.items() for kind in ("sdpa", "eager")},
            sum(asked), args.rounds)
    print("greedy replies  " + ", ".join(f"{n} {k}" for k, n in agreement.items()))
    return {"agreement": agreement, "cases": cases}


# ---- the vision encoder -------------------------------------------------------------------------

def naflexvit():
    """timm's module of the NaFlexViT. Raises UserError if timm is not installed."""
    # timm imports torchvision for parts that are not used here. torchvision is hard to get for some
    # builds of torch; where it is missing, mocks make the import succeed.
    missing = [] if importlib.util.find_spec("torchvision") else [
        "torchvision" + part for part in ("", ".models", ".models.feature_extraction", ".ops",
                                          ".ops.misc", ".transforms", ".transforms.functional",
                                          ".datasets")]
    sys.modules.update({name: mock.MagicMock() for name in missing})
    try:
        from timm.models import naflexvit as module
        return module
    except ImportError as error:
        raise UserError(f"lab.bench vit compares with timm ({error}): "
                        "make .venv/peers, or pip install --no-deps timm") from None
    finally:
        for name in missing:
            del sys.modules[name]


def vit_peers(ours: CogViT) -> dict:
    """Two NaFlexViTs of the same width, depth and heads: one of our blocks, with our weights; and
    one of timm's own blocks, whose MLP is wider, so that its two matrices have as many parameters
    as our three."""
    c, module = ours.config, naflexvit()
    same = dict(patch_size=c.patch_size, embed_dim=c.hidden_size, depth=c.depth,
                num_heads=c.num_heads, patchify_channels_last=False, global_pool="",
                fc_norm=False, use_key_only_attn_mask=True)
    ratio = c.intermediate_size / c.hidden_size
    plain = module.NaFlexVit(module.NaFlexVitCfg(mlp_ratio=1.5 * ratio, **same), num_classes=0)
    twin = module.NaFlexVit(module.NaFlexVitCfg(
        mlp_ratio=ratio, pos_embed="none", rope_type="axial", attn_type="rope", qk_norm=True,
        swiglu_mlp=True, norm_layer="rmsnorm", **same), num_classes=0)

    def pairs(x):  # a rotation's two channels are half a head apart in ours, neighbours in timm's
        return rearrange(x, "(h two c) ... -> (h c two) ...", two=2, c=c.hidden_size
                         // c.num_heads // 2)

    state = {"norm.weight": ours.post_layernorm.weight,
             "embeds.proj.weight": ours.patch_embed.proj.weight.sum(2).flatten(1),
             "embeds.proj.bias": ours.patch_embed.proj.bias}
    for name, value in ours.blocks.state_dict().items():
        if ".attn.qkv." in name:
            q, k, v = value.chunk(3)
            value = torch.cat([pairs(q), pairs(k), v])
        elif "_norm." in name:
            value = pairs(value)
        elif ".gate_proj." in name:  # one matrix there
            up = ours.blocks.state_dict()[name.replace("gate", "up")]
            name, value = name.replace("gate_proj", "fc1"), torch.cat([value, up])
        elif ".up_proj." in name:
            continue
        state["blocks." + name.replace("down_proj", "fc2")] = value
    twin.load_state_dict(state)
    return {"our blocks": twin, "its own blocks": plain}


def pictures(count: int, patch: int, seed: int) -> list[np.ndarray]:
    """Noise pictures of NaFlex's sizes: a budget from BUDGETS, a side ratio from 1:2 to 2:1."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        tall, budget = np.exp2(rng.uniform(-1, 1)), int(rng.choice(BUDGETS))
        size = naflex(round(1000 * tall), 1000, 2 * patch, budget // 4)
        made.append(rng.integers(0, 256, (*size, 3)).astype(np.uint8))
    return made


def padded_pictures(images: list, patch: int, hw) -> dict:
    """One batch in timm's form, with everything that a data loader could prepare: also the mask."""
    cut = [patchify(image, patch, merge=1) for image in images]
    longest = max(len(patches) for patches, _ in cut)
    mean, std = (torch.tensor(x).repeat_interleave(patch ** 2) for x in (MEAN, STD))
    pixels, places, valid = [], [], []
    for patches, grid in cut:
        room = longest - len(patches)
        flat = (torch.from_numpy(patches[:, 0]) / 255 - mean) / std
        pixels.append(F.pad(flat, (0, 0, 0, room)))
        places.append(F.pad(patch_positions(torch.tensor([grid]), merge=1).T, (0, 0, 0, room)))
        valid.append(torch.arange(longest) < len(patches))
    valid = torch.stack(valid).to(hw.device)
    batch = {"patches": torch.stack(pixels).to(hw.device, hw.dtype),
             "patch_coord": torch.stack(places).to(hw.device)}
    if not valid.all():  # without padding it needs no mask, which is faster
        mask = torch.zeros(valid.shape, device=hw.device, dtype=hw.dtype)
        mask.masked_fill_(~valid, torch.finfo(hw.dtype).min)
        batch |= {"patch_valid": valid, "attn_mask": mask[:, None, None]}
    return {"batch": batch, "valid": valid.float()}


def vit(args: Args, hw) -> dict:
    config = dataclasses.replace(sized(args.size).vision, rms_norm_eps=1e-6)  # as timm's norms
    ours = CogViT(config)
    init(ours, args.seed)
    peers = {name: m.to(hw.device, hw.dtype) for name, m in vit_peers(ours).items()}
    ours, p = ours.to(hw.device, hw.dtype), config.patch_size
    images = pictures(args.documents, p, args.seed)
    useful = sum(i.shape[0] * i.shape[1] // p ** 2 for i in images)
    generator = torch.Generator().manual_seed(args.seed)
    along = torch.randn(config.hidden_size, generator=generator).to(hw.device) / useful

    def backward(value, learn):
        if learn:
            value.backward()
        return float(value.detach())

    def our_pass(rows, learn):
        ours.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(learn):
            return sum(backward((ours(*row).float() @ along).sum(), learn) for row in rows)

    def their_pass(model, batches, learn):
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(learn):
            return sum(backward((model.forward_features(**b["batch"])["patches"].float() @ along
                                 * b["valid"]).sum(), learn) for b in batches)

    rows = {}
    for size in sorted({min(n, len(images)) for n in (4, 16, len(images))}):
        cuts = [[patchify(i, p) for i in part] for part in in_batches(images, size)]
        rows[f"rows of {size} pictures"] = [
            (torch.from_numpy(np.concatenate([patches for patches, _ in cut])).to(hw.device),
             torch.tensor([grid for _, grid in cut]).to(hw.device)) for cut in cuts]
    orders = {"as they come": (images, (8, 16, len(images))),
              "sorted by size": (sorted(images, key=lambda i: i.size), (1, 4, 8, 16, len(images)))}
    cases, losses, norms = {}, [], []
    for order, (listed, sizes) in orders.items():
        batches = {}
        for size in sorted({min(n, len(images)) for n in sizes}):
            made = [padded_pictures(part, p, hw) for part in in_batches(listed, size)]
            share = 1 - useful / sum(b["valid"].numel() for b in made)
            batches[f"batches of {size}, {share:.0%} padding"] = made
        if not cases:  # once: check that the model of our blocks computes the same
            losses = [our_pass(rows[min(rows)], True),
                      their_pass(peers["our blocks"], batches[min(batches)], True)]
            norms = [float(sum(x.grad.float().norm() ** 2 for x in m.blocks.parameters()) ** 0.5)
                     for m in (ours, peers["our blocks"])]
            print(f"loss           ours {losses[0]:.6f}, theirs {losses[1]:.6f}")
            print(f"gradient norm  ours {norms[0]:.6f}, theirs {norms[1]:.6f}")
        for kind, model in peers.items():
            for name, learn in (("forward and backward", True), ("forward", False)):
                cases[f"{name}, {order}, {kind}"] = compare_speeds(
                    {k: lambda r=r, learn=learn: our_pass(r, learn) for k, r in rows.items()},
                    {k: lambda m=model, b=b, learn=learn: their_pass(m, b, learn)
                     for k, b in batches.items()}, useful, args.rounds)
    return {"losses": losses, "norms": norms, "cases": cases}


# ---- the report ---------------------------------------------------------------------------------

VERBS = {"train": train, "decode": decode, "vit": vit, "rl": bench_rl.measure,
         "busy": bench_busy.measure, "memory": bench_memory.measure, "loss": bench_loss.measure,
         "loader": bench_loader.measure, "partition": bench_partition.measure,
         "serve": bench_serve.measure}
UNITS = {"vit": "useful patches/s", "rl": "samples learnt/s", "busy": "seconds a step",
         "loader": "samples/s", "serve": "tokens/s, or as said"}


def model_of(args: Args) -> str:
    """The size that is measured, or the checkpoint's name: some measurements take no --size."""
    if args.what == "serve":
        return Path(args.ckpt or bench_serve.CKPT).resolve().name
    return {"rl": "demo", "busy": "tiny", "partition": "base"}.get(args.what, args.size)


def run(args: Args) -> dict:
    """Measure, print the table and write out/bench/NAME.json; returns what was written."""
    if args.what not in VERBS:
        raise UserError(f"lab.bench takes {', '.join(VERBS)}, not '{args.what}'")
    check_options(args)
    if args.what == "partition":        # counted, not timed
        args = dataclasses.replace(args, rounds=1)
    hw = setup("cpu" if args.what in ("rl", "busy", "partition") else args.device,
               "auto" if args.what == "busy" else args.dtype)
    model, documents = model_of(args), ""
    if args.what in ("train", "decode", "vit", "memory"):
        documents = f" {args.documents} documents,"
    print(f"{hw.description}; {model},{documents} {args.rounds} rounds")
    result = {"args": dataclasses.asdict(args), "hardware": hw.description, "aim": AIM,
              **VERBS[args.what](args, hw)}
    unit = UNITS.get(args.what, "useful tokens/s")
    if result["cases"]:
        print(f"{unit:<26} {'median':>9} {'least':>9} {'most':>9}  setting")
    for name, case in result["cases"].items():
        print_case(name, case, result["aim"])
    where = Path(args.out) / f"{args.what}-{model}-{str(hw.dtype)[6:]}-{hw.device.type}.json"
    write_json(where, result)
    print(f"written to {where}")
    return result


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__, positional="what")))
