"""The vision tower from scratch: two teachers, masked distillation, contrastive alignment.

    python train_vit.py                                all stages, small, any machine, no network
    python train_vit.py --stage=distill --mask=random  one stage, from the earlier ones in --out
    python train_vit.py --stage=distill --semantic_teacher=SIGLIP2 --texture_teacher=DINOV3
    python train_vit.py --stage=align --pairs='cc12m/*.tar' --batch=65536 --micro=256
    torchrun --nproc_per_node=8 train_vit.py --size=small    data parallel; same batch, same result
    python pretrain.py --vit=out/vit/align             pretraining from the finished tower

The paper's stages are distill and align; its teachers are SigLIP2 and DINOv3. Where no folder of
theirs is given, stand-ins as small as the student are trained first; they are no substitute. [O]

semantic  stand-in for SigLIP2: two towers, contrastive, on captions of drawings
texture   stand-in for DINOv3: a tower that names the shape under each patch of drawn scenes
distill   stage 1 [C]: 35% of the patches hidden; the student predicts what two teachers see
align     stage 2 [C]: images of any size, captions in two languages, a global batch of any size

All stages share one loop, `train`:
1. Load this rank's samples of the global batch, one micro-batch at a time.
2. Forward and loss: `contrastive_loss`, `shape_loss` or `distill_loss`.
3. Backward; the optimizer adds the gradients up in fp32. A contrastive batch of several
   micro-batches takes `cached_gradients` for 1-3: each image's loss depends on all texts.
4. Update: Muon for matrices, AdamW for the rest, at the rate of the schedule.
5. Evaluate now and then, log, save.

Letters: P patches, N images, T caption tokens, W width of the tower, E width of the common space.
"""
import lib  # first of all, before torch: see lib/__init__.py

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn, Tensor

from lib.captions import (Captions, collate_pairs, LabelledScenes, MaskedPicture, Pair,
                          PatchClassifier, Pictures, stack_masks, TextTower, TwoTowers)
from lib.checkpoint import export_tower, load_tower, restore
from lib.cli import (check_options, cli, Device, Dtype, main, Natural, NonNegative, Positive, Range,
                     Schedule, Seed, Share, UserError)
from lib.common import (check_same_data, check_same_start, cores, Log, multiples, Part, print_plan,
                        print_plan_on, read_json, setup, sum_over_ranks, write_json)
from lib.images import pack
from lib.loader import RankShard, SampleLoader
from lib.memory import compile_blocks, Memory
from lib.pairs import open_pairs, Skipped
from lib.prefetch import send
from lib.probes import evaluate_tower, ProbeSet, read_report
from lib.ring import ring_sigmoid_loss
from lib.roofline import check_machine, find_machine, Machine, Trace
from lib.runs import Checkpointer, checkpoints, find_checkpoint, move_earlier_run, save_state
from lib.teachers import load_teacher, TowerTeacher
from lib.tensors import save_tensors
from model import Config, DecoderLayer, init, sized
from optim import OptimConfig, Optimizer, schedule
from vit import CogViT, VitBlock


@dataclass
class Args:
    size: Literal["tiny", "mini", "small", "base"] = "tiny"     # base: CogViT-L
    stage: Literal["all", "teachers", "distill", "align"] = "all"   # what to train
    steps: Positive = 600         # optimizer updates of each stage
    batch: Annotated[int, Range(0, 2 ** 24)] = 0    # images a step, over all ranks; 0: 64 or so
    micro: Natural = 0            # images at a time on a rank; 0: its whole share
    side: Annotated[int, Range(0, 1024)] = 0        # of pictures, in pixels; 0: 64 or 224, by size
    mask: Literal["block", "random"] = "block"          # which patches are hidden
    masked: Share = 0.35          # the share of them [C]
    supervise: Literal["all", "masked"] = "all"         # which patches the loss counts [O]
    cosine: Share = 0.9           # weight of 1 - cosine; the rest is smooth-L1
    qk_norm: bool = True          # RMSNorm on queries and keys
    teachers: Literal["both", "semantic", "texture"] = "both"       # of the student
    semantic_teacher: str = ""    # Hugging Face folder of SigLIP2; default: the stand-in of --out
    texture_teacher: str = ""     # Hugging Face folder of DINOv3 or DINOv2; default: the stand-in
    budgets: str = ""             # align: patches an image, drawn for each batch; default: by size
    pairs: str = ""               # pictures with captions: a folder, tars, JSONL or parquet
    languages: str = "en,zh"      # of captions that say their language; all: every one
    clips: Share = 0.0            # share of those drawings in which a shape moves, in two frames
    lr: NonNegative = 4e-3        # peak rate of the vision tower, for Muon and AdamW alike
    text_scale: NonNegative = 1.0       # align: factor on it for the text tower
    proj_scale: NonNegative = 1.0       # align: factor on it for pools and projections
    weight_decay: NonNegative = 0.05    # on the vision tower's matrices
    text_decay: NonNegative = 0.05      # on the text tower's
    proj_decay: NonNegative = 0.0       # on the pools' and projections'
    warmup: Natural = 20          # steps
    schedule: Schedule = "cosine"       # constant, linear or cosine
    memory: Literal["none", "recompute", "offload"] = "none"    # the towers': see lib/memory.py
    chunk_patches: Natural = 0    # patches encoded at a time, so that memory stays flat; 0: all
    init: str = ""                # folder whose tower distill starts from, or align alone
    resume: bool = False          # continue from the newest checkpoints in --out
    max_hours: NonNegative = 0.0  # hours until the run saves and ends, for --resume; 0: no limit
    out: str = "out/vit"          # run folder: one folder a stage, report.json
    keep: str = ""                # also write each stage's tower here, alone and in bf16
    save_every: Positive = 200    # steps between checkpoints
    eval_every: Natural = 200     # steps between evaluations; 0: at the end only
    probes: Annotated[int, Range(16, 2 ** 20)] = 1024   # pictures a probe is fitted on
    log_every: Positive = 20      # steps between printed lines
    seed: Seed = 0                # of weights and samples
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16; masters are fp32 in any case
    compile: bool = False         # torch.compile each block: the first step takes a minute more
    workers: Annotated[int, Range(-1, 512)] = -1    # processes that load; -1: one a core, max 8
    plan: bool = False            # print parameters, memory, FLOPs, hours, price and stop
    on: str = ""                  # with --plan: on this machine, e.g. H100 or 8xH100; default: here


STAGES = "semantic", "texture", "distill", "align"


def tower(args: Args, config: Config) -> CogViT:
    """A CogViT without the adapter, which belongs to the decoder and is trained by pretrain.py."""
    visual = CogViT(config.vision)
    del visual.downsample, visual.merger
    if not args.qk_norm:
        for block in visual.blocks:
            block.attn.q_norm = block.attn.k_norm = nn.Identity()
    return visual


# ---- semantic and align: does this caption belong to this image? --------------------------------

def contrastive_loss(model: TwoTowers, pairs: list[Pair], args: Args) -> tuple[Tensor, dict]:
    """SigLIP's loss [C]: for every image and every text of the global batch, do they match?

    Returns this rank's part of the mean over the batch's images: the parts of all ranks add up."""
    batch = collate_pairs(pairs, model.visual.config).to(model.logit_bias.device)
    x, y = model.embed(batch)
    return ring_sigmoid_loss(x, y, model.logit_scale.exp(), model.logit_bias) / args.batch, {}


# ---- texture: the shape under each patch --------------------------------------------------------

def shape_loss(model: PatchClassifier, scenes: list, args: Args) -> tuple[Tensor, dict]:
    """Cross-entropy of the shape under each patch, from samples of `LabelledScenes`: this
    micro-batch's part of the mean over the global batch, and no figures."""
    patches, grids = pack([image for image, _ in scenes], model.visual.config)
    device = model.head.weight.device
    logits = model.head(model.visual(send(patches, device), grids))      # (P, classes)
    labels = send(torch.cat([labels for _, labels in scenes]), device)
    return len(scenes) / args.batch * F.cross_entropy(logits.float(), labels), {}


# ---- distill: two frozen teachers, hidden patches -----------------------------------------------

def load_teachers(args: Args, config: Config, hw) -> dict:
    """{"semantic": teacher, "texture": teacher}, or the one that --teachers names. Raises UserError
    if a stand-in is needed and its stage has left no checkpoint."""
    teachers = {}
    for name in ("semantic", "texture") if args.teachers == "both" else (args.teachers,):
        folder, trained = getattr(args, f"{name}_teacher"), Path(args.out) / name
        if folder:
            teachers[name] = load_teacher(folder, hw.device, hw.dtype)
            continue
        visual = tower(args, config)
        if hw.device.type != "meta":
            if not checkpoints(trained):
                raise UserError(f"no {name} teacher in {trained}: --stage=teachers trains one, "
                                f"--{name}_teacher=FOLDER takes one")
            load_tower(visual, find_checkpoint(trained))
        # On a GPU in half precision, for varlen attention; a CPU has no gain from it.
        dtype = hw.dtype if hw.device.type == "cuda" else torch.float32
        teachers[name] = TowerTeacher(visual.to(hw.device, dtype))
    return teachers


class Distiller(nn.Module):
    """The student of stage 1: a tower, a learnable mask token [O], one linear head a teacher."""

    def __init__(self, args: Args, config: Config, teachers: dict):
        super().__init__()
        width = config.vision.hidden_size
        self.visual, self.token = tower(args, config), nn.Parameter(torch.zeros(width))
        self.heads = nn.ModuleDict({n: nn.Linear(width, t.width) for n, t in teachers.items()})
        self.teachers = teachers    # a plain dict: frozen, and no part of the checkpoint
        for name, teacher in teachers.items():
            self.register_buffer(f"mean_{name}", torch.zeros(teacher.width))
            self.register_buffer(f"std_{name}", torch.ones(teacher.width))

    def targets(self, images: list) -> dict[str, Tensor]:
        """{teacher: its features of all patches (P, width), fp32}, with mean 0 and std 1 in each
        channel: or the teacher with the larger numbers would drown the other. [O, after PHI-S]"""
        _, grids = pack(images, self.visual.config)
        targets = {}
        for name, teacher in self.teachers.items():
            mean, std = getattr(self, f"mean_{name}"), getattr(self, f"std_{name}")
            targets[name] = (teacher(images, grids).float() - mean) / std
        return targets


def measure_teachers(model: Distiller, stream: Pictures):
    """Set the model's mean and std of each teacher's channels, which are still 0 and 1, from 64
    pictures that training will never reach; a checkpoint keeps them."""
    images = [stream(2 ** 40 + i).image for i in range(64)]
    for name, features in model.targets(images).items():
        getattr(model, f"mean_{name}").copy_(features.mean(0))
        getattr(model, f"std_{name}").copy_(features.std(0) + 1e-6)


def distill_loss(model: Distiller, samples: list[MaskedPicture], args: Args) -> tuple[Tensor, dict]:
    """--cosine x (1 - cosine) + the rest x smooth-L1 between what the student's heads predict and
    what the teachers see, the mean over patches and teachers [O]: this micro-batch's part of the
    mean over the global batch, and of the mean cosine to each teacher."""
    device, images = model.token.device, [sample.image for sample in samples]
    patches, grids = pack(images, model.visual.config)
    # The student sees the mask token in place of 35% of the patches [C]: enough that it has to
    # infer what is there from the rest. The teachers see the whole picture.
    mask = stack_masks(samples)
    features = model.visual(send(patches, device), grids, send(mask, device), model.token)  # (P, W)
    # The paper rebuilds the hidden patches. With the loss on all patches a small student learns
    # more: linear probe 92.5 against 68.1. [O]
    chosen = mask if args.supervise == "masked" else torch.ones_like(mask)
    chosen = send(chosen.nonzero()[:, 0], device)
    share, loss, figures = len(samples) / args.batch, 0.0, {}
    for name, target in model.targets(images).items():
        target, predicted = target[chosen], model.heads[name](features[chosen]).float()
        cosine = F.cosine_similarity(predicted, target, dim=-1).mean()
        distance = F.smooth_l1_loss(predicted, target)
        loss += (args.cosine * (1 - cosine) + (1 - args.cosine) * distance) / len(model.heads)
        figures[f"cos_{name}"] = share * cosine.detach()
    return share * loss, figures


LOSSES = {"semantic": contrastive_loss, "texture": shape_loss,
          "distill": distill_loss, "align": contrastive_loss}


# ---- the loop -----------------------------------------------------------------------------------

def build(stage: str, args: Args, config: Config, hw):
    """(model, stream): what a stage trains, with random weights, and its training samples."""
    if stage == "texture":
        model = PatchClassifier(tower(args, config))
        stream = LabelledScenes(config, args.side, args.seed)
    elif stage == "distill":
        model = Distiller(args, config, load_teachers(args, config, hw))
        stream = Pictures(config, args.side, args.seed, args.mask, args.masked, args.pairs,
                          args.languages)
    else:
        model = TwoTowers(tower(args, config), config)
        stream = Captions(config, patch_budgets(stage, args), args.batch, args.seed, "train",
                          args.side, args.pairs, args.languages, args.clips)
    # The texture teacher has another seed than the semantic teacher and the student. From equal
    # weights the two teachers would have more in common than what they have learnt.
    if hw.device.type != "meta":
        init(model, args.seed + (stage == "texture"))
    Memory(args.memory, decoder=args.memory, chunk_patches=args.chunk_patches).use_in(model)
    return model.to(hw.device), stream


def build_optimizer(model: nn.Module, args: Args) -> Optimizer:
    """Muon and AdamW with separate rates and weight decay for vision, text and projections [C]."""
    projections = "pool.", "text.pool.", "image_proj.", "text_proj."
    return Optimizer(model.named_parameters(), OptimConfig(
        # 4e-3 was tuned for Muon, whose update has the RMS of an AdamW step: one rate serves both.
        # Decay keeps matrices from growing under updates that do not shrink by themselves. [O]
        args.lr, args.weight_decay,
        # First match wins. AdamW moves a scalar by about the rate a step, and logit_scale and
        # logit_bias have far to go: in 1,200 steps from log 10 to 3.0 and from -10 to -14.6. [O]
        scales=(*((name, args.proj_scale) for name in projections), ("text.", args.text_scale),
                ("logit", 10.0)),
        # No decay on projections: their outputs are normalised, so a decay changes nothing but
        # how fast their directions turn. [O]
        decays=(*((name, args.proj_decay) for name in projections), ("text.", args.text_decay))))


def prepare(stage: str, args: Args, config: Config, hw, say):
    """(model, stream, optimizer, number of steps done). The weights are those of the stage's newest
    checkpoint, or of --init, or, for `align`, of the student's tower, or they are random."""
    out = Path(args.out) / stage
    model, stream = build(stage, args, config, hw)
    resumed = find_checkpoint(out) if args.resume and checkpoints(out) else None
    if resumed and (size := read_json(resumed / "config.json").get("size")) != args.size:
        raise UserError(f"{out} was begun with --size={size}")
    if not resumed:
        first = args.init if stage in (args.stage, "distill") else ""
        if stage == "align" and not first and checkpoints(out.with_name("distill")):
            first = out.with_name("distill")
        if first:
            load_tower(model.visual, find_checkpoint(first))
        say(f"{stage} goes on from {first}" if first else f"{stage} begins with a new tower")
        if stage == "distill":
            measure_teachers(model, stream)
    optimizer = build_optimizer(model, args)        # takes its fp32 masters from the model
    dtype = hw.dtype
    if isinstance(model, TwoTowers) and hw.device.type == "cpu" and args.dtype == "auto":
        # Captions have ever new lengths, and a CPU compiles its bf16 kernels for each shape and
        # keeps them: 1.5 GB and 0.37 s a step of 64, in fp32 0.7 GB and 0.30 s. [O]
        say("captions vary in length and a CPU compiles bf16 for each shape: in float32")
        dtype = torch.float32
    for p in model.parameters():
        if p.requires_grad and p.ndim:      # bf16 is too coarse for the scale and the bias
            p.data = p.data.to(dtype)
    if args.compile:
        compile_blocks(model, (VitBlock, DecoderLayer), hw.device)
    if not resumed:
        return model, stream, optimizer, 0
    state = restore(resumed, model, optimizer)
    start, before = state["step"], state["args"]
    for name in ("batch", "seed") if start < args.steps else ():
        if before[name] != getattr(args, name):
            raise UserError(f"{out} was begun with --{name}={before[name]}: with another, samples "
                            "would be seen twice or never")
    return model, stream, optimizer, start


def train(stage: str, args: Args, hw):
    """Train one stage, from its newest checkpoint or from the start. Returns whether the run must
    end here because the time of --max_hours is over."""
    out, lead, config = Path(args.out) / stage, hw.rank == 0, sized(args.size)
    say = print if lead else (lambda *_: None)
    model, stream, optimizer, start = prepare(stage, args, config, hw, say)
    check_same_start(start, out)
    # Move an earlier run away, its later stages too: --resume would take them for this run's.
    for name in STAGES[STAGES.index(stage):]:
        move_earlier_run(out.with_name(name), args.resume, hw, say)
    probes = ProbeSet(config, args.side, args.probes) if lead else None
    pairs = open_pairs(args.pairs, args.languages) if args.pairs else None
    if start >= args.steps:     # nothing to train; the evaluation may be missing
        if lead and read_report(out.parent)["figures"].get(stage, {}).get("step") != start:
            evaluate_tower(model, probes, out, start, args.seed, args.clips > 0, pairs)
        return say(f"{stage}: {start} steps are done, of {args.steps}")

    share = args.batch // hw.world      # images of this rank in each step
    # A contrastive batch of several micro-batches loads each sample twice, for two forward passes.
    # The loader drops a sample once it is taken: of a larger burst some would be loaded in vain.
    cached = isinstance(model, TwoTowers) and args.micro < share
    burst = args.micro if cached else max(args.micro, min(8 * share, 4096))
    workers = args.workers if args.workers >= 0 else min(8, max(1, cores() // hw.world))
    loader = SampleLoader(RankShard(stream, hw.rank, hw.world, share), workers, burst,
                          overlap=not cached and hw.device.type != "cpu")
    say(f"{stage}: {len(optimizer.grad) / 1e6:.2f}M parameters, {args.batch} images a step, "
        f"{args.micro} at a time, steps {start}..{args.steps}, {workers} loading, in {out}")
    if lead:
        write_json(out / "config.json", asdict(args) | {"hardware": hw.description})
        write_json(out.parent / "report.json", read_report(out.parent))
    skipped = Skipped()
    watch = Checkpointer(out, hw, args.steps, args.save_every, start, lambda folder, *parts: (
        save_stage(folder, *parts, stage, watch.done, model, config, args)), optimizer.gather)
    log = Log(out, stage, args.steps, start, hw.rank)

    for step in range(start, args.steps):
        began, loading, values = time.perf_counter(), loader.seconds, {}
        # Sample numbers count over all steps, so the step alone says which samples come next: a
        # resumed run sees exactly those that it would have seen.
        mine = range(step * share, (step + 1) * share)
        try:
            if cached:
                values = cached_gradients(model, loader, mine, args, skipped)
            else:
                for first in range(0, share, args.micro):
                    # 1. Load one micro-batch: as many images as fit into memory in one forward.
                    samples = [loader(i) for i in mine[first:first + args.micro]]
                    skipped.note(samples)
                    # 2. Forward and loss, already divided by the global batch: so parts of
                    #    micro-batches and ranks add up to one batch's gradient, whatever the cut.
                    loss, figures = LOSSES[stage](model, samples, args)
                    # 3. Backward. The optimizer adds gradients up in fp32: in bf16 the sum over
                    #    many micro-batches would lose its small terms.
                    loss.backward()
                    for name, value in {"loss": loss.detach(), **figures}.items():
                        values[name] = values.get(name, 0.0) + value
            squares = optimizer.reduce()
            if args.pairs:
                values["skipped"] = squares.new_full((), skipped.latest())
            # The only wait for the device in a step.
            *sums, squares = sum_over_ranks(torch.stack([*values.values(), squares])).tolist()
            values, norm = dict(zip(values, sums)), math.sqrt(squares)
        except (UserError, OSError, RuntimeError):  # no samples, here or on a rank that has ended
            loader.close()
            watch.close()       # saves the steps that are done
            raise

        # 4. Update. 20 steps of warm-up, since Muon's first momentum is a single noisy gradient;
        #    then a cosine down to a tenth [R: GLM-4.5]: at 0 the last steps would teach nothing.
        rate = schedule(step, args.steps, args.warmup, args.schedule)
        # `step` clips gradients to norm 1, and changes no weight if norm or loss is not finite.
        optimizer.step(rate, norm, apply=math.isfinite(values["loss"]))
        watch.check_loss(values["loss"], norm)      # the fifth bad step in a row ends the run

        # 5. Evaluate, log, save. All ranks leave together when one of them gets a signal.
        done, took = step + 1, time.perf_counter() - began
        values |= {"lr": args.lr * rate, "norm": norm, "dt": took, "img/s": args.batch / took}
        if loader.seconds - loading > 0.05 * took:      # then more --workers may help
            values["loading"] = loader.seconds - loading
        last = done == args.steps
        if lead and (last or args.eval_every and done % args.eval_every == 0):
            values |= evaluate_tower(model, probes, out, done, args.seed, args.clips > 0, pairs)
        log.step(done, last or done % args.log_every == 0, **values)
        if watch.after_step(done, log.reader_gone):
            break
    log.close()
    loader.close()
    watch.close()
    skipped.summary()
    return watch.out_of_time


def save_stage(folder: Path, masters: dict, state: dict, stage: str, step: int, model: nn.Module,
               config: Config, args: Args):
    """Write a checkpoint, all that --resume needs; masters, state: from Optimizer.gather."""
    save_tensors(folder / "model.safetensors", {**model.state_dict(), **masters})
    write_json(folder / "config.json", {"stage": stage, "size": args.size,
                                        "vision_config": asdict(config.vision)})
    save_state(folder / "train.pt", {"step": step, "args": asdict(args), "optimizer": state})


# ---- align: batches larger than memory ----------------------------------------------------------

def cached_gradients(model: TwoTowers, load, mine: range, args: Args, skipped: Skipped) -> dict:
    """Steps 1-3 for a contrastive batch of several micro-batches, in the memory of one [R:
    GradCache]. The gradients are those of one large batch.

    Each image's loss depends on the texts of all others, so the losses of micro-batches would add
    up to another loss. But the towers meet only in the embeddings, which are small."""
    device = model.logit_bias.device
    chunks = [mine[i:i + args.micro] for i in range(0, len(mine), args.micro)]
    # a. Embed all micro-batches without a graph, into two tensors: thousands of small ones, kept
    #    until the end of the step, would fragment the heap.
    x, y = torch.empty(2, len(mine), len(model.image_proj.weight), device=device)
    for chunk, x_rows, y_rows in zip(chunks, x.split(args.micro), y.split(args.micro)):
        pairs = [load(i) for i in chunk]
        skipped.note(pairs)
        with torch.no_grad():
            images, texts = model.embed(collate_pairs(pairs, model.visual.config).to(device))
        x_rows.copy_(images)
        y_rows.copy_(texts)

    # b. Take the loss over all embeddings; backward fills x.grad, y.grad and those of the scalars.
    x.requires_grad_(), y.requires_grad_()
    loss = ring_sigmoid_loss(x, y, model.logit_scale.exp(), model.logit_bias) / args.batch
    loss.backward()

    # c. Run each forward once more, with a graph, and backpropagate its rows of x.grad and y.grad.
    #    Loading a sample again gives the same sample: it is a function of (seed, i).
    for chunk, *rows in zip(chunks, x.grad.split(args.micro), y.grad.split(args.micro)):
        pairs = [load(i) for i in chunk]
        embeddings = model.embed(collate_pairs(pairs, model.visual.config).to(device))
        torch.autograd.backward(embeddings, rows)
    return {"loss": loss.detach()}


# ---- the run ------------------------------------------------------------------------------------

def stages(args: Args) -> list[str]:
    """The stages that this run trains: a stand-in only if no folder replaces it."""
    stand_ins = [name for name in ("semantic", "texture")
                 if args.teachers in (name, "both") and not getattr(args, f"{name}_teacher")]
    return {"teachers": stand_ins, "distill": ["distill"], "align": ["align"],
            "all": [*stand_ins, "distill", "align"]}[args.stage]


def patch_budgets(stage: str, args: Args) -> tuple:
    """How many patches an image may have. Only `align` varies them, as in the paper [C]."""
    side = args.side // sized(args.size).vision.patch_size
    return tuple(map(int, args.budgets.split(","))) if stage == "align" else (side ** 2,)


def check(args: Args) -> Args:
    """The arguments, defaults filled in. Raises UserError on what would fail hours later."""
    check_options(args)
    check_machine(args)
    world, cpu = int(os.environ.get("WORLD_SIZE", 1)), args.size in ("tiny", "mini")
    patch = sized(args.size).vision.patch_size
    batch = args.batch or -(-64 // world) * world       # the first multiple from 64 on
    side = args.side or (64 if cpu else 224)            # 224 [C]
    own = (side // patch) ** 2
    # SigLIP2's budgets [R]. On CPUs: sizes around the scene's own, and that one twice, since shapes
    # are learnt much later from scenes off the grid of patches [O].
    around = f"{own * 9 // 16},{own},{own},{own * 25 // 16}"
    unit = world * (args.micro or 1)
    args = replace(args, batch=batch, micro=args.micro or batch // world, side=side,
                   budgets=args.budgets or (around if cpu else "128,256,576,784,1024"))
    refused = (
        (args.pairs and args.clips, "--clips is a share of drawings; --pairs takes their place"),
        (args.batch % unit, f"--batch={args.batch} is no multiple of {world} ranks x --micro="
         f"{args.micro or 1}: take {multiples(args.batch, unit)}"),
        (args.side % (2 * patch) or args.side < 64, f"--side takes a multiple of {2 * patch}, two "
         f"patches of {patch} pixels, and at least 64, not {args.side}"),
        (round(args.masked * own) < 1, f"--masked={args.masked} hides no patch at all"),
        (not all(w.isdecimal() and len(w) < 5 and int(w) > 3 for w in args.budgets.split(",")),
         f"--budgets takes numbers of patches from 4 to 9999, as 36,64: {args.budgets}"),
        (not stages(args), "the teachers are given as folders: there is nothing to train"),
        (args.init and args.stage == "teachers",
         "--init is where distill starts, or align alone: no teacher does"))
    for is_wrong, message in refused:
        if is_wrong:
            raise UserError(message)
    if args.init:
        load_tower(tower(args, sized(args.size)), find_checkpoint(args.init))
        first, moved = Path(args.init).resolve(), [Path(args.out, s).resolve() for s in STAGES]
        if args.stage == "all" and not args.resume and {first, *first.parents} & set(moved):
            raise UserError(f"--init={args.init} is part of what it replaces; choose another --out")
    for kind in ("semantic", "texture"):
        folder = getattr(args, f"{kind}_teacher")
        if folder and "distill" in stages(args) and load_teacher(folder).kind != kind:
            raise UserError(f"--{kind}_teacher={folder} holds a teacher of the other kind")
    return args


def run(args: Args):
    """Train the stages one after the other, or print the plan."""
    args = check(args)
    hw = setup(args.device, args.dtype, args.max_hours)
    if args.plan:
        return forecast(args, hw) if hw.rank == 0 else None
    say = print if hw.rank == 0 else (lambda *_: None)
    say(hw.description)
    if {"semantic", "texture"} & set(stages(args)):
        say("teachers without a folder are stand-ins: small towers that are trained here")
    if args.pairs:
        pairs = open_pairs(args.pairs, args.languages)
        check_same_data(pairs.shards.digest)
        say(f"{len(pairs.training)} pairs for training in {args.pairs}, "
            f"{len(pairs.numbers('test'))} held out", *pairs.shards.notes, sep="\n")
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)  # or fail before hours have passed
    for stage in stages(args):
        if train(stage, args, hw):
            return
        if args.keep and hw.rank == 0:
            export_tower(find_checkpoint(Path(args.out) / stage), Path(args.keep) / stage)
        if hw.world > 1:
            dist.barrier()      # the next stage reads what rank 0 has saved


def forecast(args: Args, hw):
    """Print what each stage would take (`--plan`), FLOPs without captions and attention, as if
    teachers were of the student's size."""
    config = sized(args.size)
    for stage in stages(args):
        with torch.device("meta"):
            counts = {"tower": sum(p.numel() for p in tower(args, config).parameters())}
            if stage in ("semantic", "align"):
                counts["text"] = sum(p.numel() for p in TextTower(config.text).parameters())
        cached = "text" in counts and args.micro * hw.world < args.batch
        frozen, width = 2 * (stage == "distill"), config.vision.hidden_size
        patches = np.mean(patch_budgets(stage, args)).item() * args.batch       # of a step
        # 6 FLOPs a weight and patch for forward and backward, 2 for each further forward.
        flops = (6 + 2 * frozen) * counts["tower"] * patches
        print(f"stage       {stage}, {args.steps} steps of {args.batch} images")
        if args.on:
            trace, *loading = trace_stage(find_machine(args.on), stage, args, config, hw)
            parts = [Part("steps", args.steps, trace, flops)]
            print_plan_on(trace.machine, counts, args.steps * patches, parts, *loading)
            continue
        flops += 2 * cached * counts["tower"] * patches
        kept = Memory(args.memory, chunk_patches=args.chunk_patches).kept(
            config, 0, args.micro * patches / args.batch)
        memory = (sum(counts.values()) * (4 + hw.dtype.itemsize + 12 / hw.world)
                  + 4 * frozen * counts["tower"] + 2 * kept             # teachers, activations
                  + 16 * args.batch / hw.world * width * cached)        # embeddings
        print_plan(hw, counts, args.steps * patches, args.steps * flops, memory)


def trace_stage(machine: Machine, stage: str, args: Args, config: Config, hw):
    """One step of rank 0 on meta tensors, a Trace of lib/roofline.py, in which one micro-batch of
    each budget stands for all of them; and the last arguments of print_plan_on."""
    share, budgets = -(-args.batch // machine.count), patch_budgets(stage, args)
    micro, paired = min(args.micro, share), stage in ("semantic", "align")
    cached, times = paired and micro < share, share / micro / len(budgets)
    trace, seconds, workers = Trace(machine), 0.0, min(8, machine.cores)
    with trace:
        with torch.device("meta"):
            model, stream = build(stage, args, config, replace(hw, device=torch.device("meta")))
        optimizer = build_optimizer(model.bfloat16(), args)
        trace.hold_training(model, optimizer)
        for budget in budgets:
            stream.budgets, began = (budget,), time.perf_counter()
            samples = [stream(i) for i in range(micro)]
            seconds += (time.perf_counter() - began) / micro / len(budgets)     # to draw one
            if paired:
                batch = collate_pairs(samples, config.vision).to("meta")
                trace.learn(lambda: model.embed(batch), times, 1 + cached)
            else:
                trace.learn(lambda: LOSSES[stage](model, samples, args)[0], times)
        if paired:      # the loss, of all embeddings of this rank
            x, y = torch.empty(2, share, len(model.image_proj.weight), device="meta",
                               requires_grad=True)
            trace.learn(lambda: ring_sigmoid_loss(x, y, model.logit_scale, model.logit_bias), 1)
        trace.update(optimizer)
    hours = args.steps * share * (1 + cached) * seconds / workers / 3600
    return (trace, hours, f"{1000 * seconds:.2f} ms a sample, measured here, by {workers} workers "
            "a GPU, an assumption", not cached)


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade NAME`.
# 1. cached_gradients: micro-batches as one. pytest tests/test_train_vit.py -k cached; 45 minutes.
# 2. ring in lib/ring.py: all ranks' texts. pytest tests/test_train_vit.py -k ring; 45 minutes.


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)),
         less="a smaller --micro, or --memory=recompute and --chunk_patches=1024")
