"""Multimodal pretraining and SFT: next-token prediction on conversations, text and code.

    python pretrain.py --steps=200                          a first look, any machine
    python pretrain.py --mix=gym:9,text,code --levels=3     all tasks, up to level 2, some text
    python pretrain.py --init=out/pretrain --lr=1e-3 --out=out/sft   start from other weights
    python pretrain.py --init=ckpt/gym --data=own.jsonl --out=out/own   SFT on own data
    torchrun --nproc_per_node=8 pretrain.py --size=small    two rows of 16,384 tokens a rank
    python pretrain.py --size=base --plan                   what it would need, then stop

`run` is the whole of it, from top to bottom. One optimizer step is:

    1. pack    documents into `rows` rows of `row_tokens` tokens, the global batch. A rank draws its
               share of the samples and loads the pictures that it will encode: lib/partition.py
    2. forward the tower encodes its pictures, each once; their tokens go to the rank that has the
               row, whose decoder reads it
    3. loss    cross-entropy of the next token, divided by the summed weights of the global batch
    4. backward
    5. update  gradients are summed over ranks, then each rank moves its share of the fp32 masters
    6. held-out loss, now and then, on rows of the test split
    7. log, and save when due

Left out: sharded weights (FSDP2). The optimizer's state is shared by the ranks, but each holds all
weights and gradients: 6 bytes a parameter, plus 12 / ranks. So `base` (1.1B) takes 8 GB on each of
eight GPUs, and a model of about 5B would take half of a GPU's 80 GB. Also left out: context
parallelism (a rank computes whole rows), and gradient accumulation as a setting (a rank accumulates
over its rows, so --rows is the setting).

Letters: T tokens of a row.
"""
import lib  # first of all, before torch: see lib/__init__.py

import functools
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from data import collate, pack_rows, Packer, parse_data, parse_mix, sight, Stream
from kernels import linear_cross_entropy
from lib.batch import Batch
from lib.checkpoint import load_config, load_model, load_tower, restore, save_model
from lib.cli import (check_options, cli, Device, Dtype, Levels, main, Natural, NonNegative,
                     Positive, Range, Schedule, Seed, Share, UserError)
from lib.common import (check_same_data, check_same_start, cores, Log, multiples, Part, print_plan,
                        print_plan_on, read_json, setup, sum_over_ranks, write_json)
from lib.loader import RankShard, SampleLoader
from lib.lora import (check_train, count_learning, learns, let_head_learn, set_learning,
                      unmerged)
from lib.memory import compile_blocks, parse_memory
from lib.partition import (AHEAD, balance, Costs, exchange, load_batch, most_bytes_in, PixelLoader,
                           plan_steps, Skeletons)
from lib.prefetch import Prefetch
from lib.roofline import check_machine, find_machine, Machine, Trace
from lib.runs import Checkpointer, checkpoints, find_checkpoint, move_earlier_run, save_state
from mmtp import attach, head_of, losses as mtp_losses
from model import Config, DecoderLayer, GLMV, sized
from optim import OptimConfig, Optimizer, schedule
from tokenizer import tokenizer_of
from vit import VitBlock


@dataclass
class Args:
    size: Literal["auto", "tiny", "mini", "small", "base"] = "auto"     # that of --init, or tiny
    steps: Positive = 1000        # optimizer updates
    rows: Natural = 0             # packed rows a step, over all ranks; 0: by size, 1 to 4 a rank
    row_tokens: Natural = 0       # tokens a row; 0: by size, 2048, 4096 or 16384
    mix: str = ""                 # sources and weights, gym = all it can see; gym:8,text:1,code:1
    data: str = ""                # own data, FILE:weight,... alone or beside --mix; lib/shards.py
    val: str = ""                 # own data for the held-out loss; default: one in fifty of --data
    levels: Levels = 2            # tasks come from levels 0..levels-1
    think: Share = 0.0            # share of the gym's replies that state their reasons first
    parts: str = ""               # categories shown only in single questions about their screens
    pixels: Natural = 0           # side of the pictures; 0: the least that suits the patches
    own_question: bool = False    # always ask the task's own question, not only the further ones
    curriculum: Share = 0.2       # share of the run that sees level 0 only
    lr: NonNegative = 4e-3        # peak learning rate, of Muon and AdamW alike
    train: str = "all"            # what learns: all, decoder (and adapter), adapter, or lora:16
    vision_scale: NonNegative = 1.0     # factor on lr for the vision tower and the adapter
    weight_decay: NonNegative = 0.05    # on matrices
    warmup: Natural = 20          # steps over which the learning rate rises
    schedule: Schedule = "linear"       # constant, linear (falls in the last part) or cosine
    decay: Share = 0.4            # that last part, as a share of the steps
    mtp: Annotated[int, Range(0, 16)] = 3   # tokens that the MTP head looks ahead; 0: no head
    mtp_share: Share = 0.2        # the last part of the run, in which it learns
    mtp_alone: bool = False       # its loss trains the head only; the rest is as without it
    image_option: Literal["embed", "mask", "token"] = "token"   # its input at visual slots: mmtp.py
    init: str = ""                # folder whose weights to start from
    vit: str = ""                 # folder of train_vit.py whose tower to start from
    resume: bool = False          # continue from the newest checkpoint in --out
    max_hours: NonNegative = 0.0  # hours until the run saves and ends, for --resume; 0: no limit
    out: str = "out/pretrain"     # run folder: log.jsonl, config.json, checkpoints
    keep: str = ""                # folder that gets the weights of each checkpoint too, in bf16
    save_every: Positive = 500    # steps between checkpoints
    eval_every: Natural = 100     # steps between losses on held-out tasks; 0: never
    log_every: Positive = 20      # steps between printed lines
    seed: Seed = 0                # of weights and samples
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16; masters are fp32 in any case
    memory: str = "none"          # or recompute, offload; by part: vit:offload,decoder:recompute
    chunk_patches: Natural = 0    # patches encoded at a time, so that memory stays flat; 0: all
    partition: Literal["planned", "gathered", "plain"] = "planned"  # who loads what: lib/partition
    compile: bool = False         # torch.compile each block: the first step takes a minute more
    workers: Annotated[int, Range(-1, 512)] = -1    # processes that load; -1: one a core, max 8
    plan: bool = False            # print parameters, memory, FLOPs, hours, price and stop
    on: str = ""                  # with --plan: on this machine, e.g. H100 or 8xH100; default: here


MIX = "gym:8,text:1,code:1"     # where neither --mix nor --data say what to learn from

# Rows a rank and tokens a row, where --rows and --row_tokens do not say it. tiny and mini are for
# CPUs; the longest document of mini has about 2,100 tokens. A GPU wants long rows: each takes the
# host as many launches as a short one, and for small with 16 rows of 2,048 it would wait for the
# host half of the time. base: the optimizer's part of a step does not depend on its tokens, and
# with fewer than 64K of them a GPU it is a large one (both computed for an H100, lab/roofline.py).
ROWS = {"tiny": (2, 2048), "mini": (1, 4096), "small": (2, 16384), "base": (4, 16384)}


# ---- the loss -----------------------------------------------------------------------------------

def loss_sum(model: GLMV, batch, depths: int = 0, option: str = "token", alone: bool = False):
    """The weighted sum of the next-token losses of one row, and the MTP head's sums, one for each
    depth: fp32 scalars."""
    merged = exchange(model, batch)             # (slots, width); may be on its way still
    hidden = model(batch, merged)               # (T, width)
    # Position t-1 predicts token t. A document's first token has weight 0: the position before it
    # belongs to another document.
    loss = linear_cross_entropy(hidden[:-1], model.lm_head.weight,
                                batch.tokens[1:], batch.weights[1:], used=batch.learnt)
    if not depths:
        return loss, []
    return loss, mtp_losses(model, hidden, batch, merged, depths, option, alone)


@torch.no_grad()
def held_out_losses(model: GLMV, rows: dict[str, list[Batch]]) -> dict[str, float]:
    """The mean loss per unit of weight on rows that are never trained on, as `held_out`; where they
    are of several sources, also of each one, as `held_out_NAME`."""
    losses = {name: sum(loss_sum(model, batch)[0] for batch in rows[name]) for name in rows}
    weights = {name: sum(batch.weights.sum() for batch in rows[name]) for name in rows}
    found = {"held_out": sum(losses.values()) / sum(weights.values())} if rows else {}
    if len(rows) > 1:
        found |= {f"held_out_{name}": losses[name] / weights[name] for name in rows}
    return {name: value.item() for name, value in found.items()}


def mtp_weight(step: int, args: Args) -> float:
    """The factor on the MTP loss at `step`: 0 until the last `mtp_share` of the run, then 0.3, and
    0.1 in the last third of that part [R: GLM-4.5, DeepSeek-V3; that it starts late is ours]."""
    if not args.mtp or not args.mtp_share:
        return 0.0
    left = (args.steps - step) / args.steps / args.mtp_share    # falls from 1 to 0 in that part
    if left > 1:
        return 0.0
    return 0.3 if left > 1 / 3 else 0.1


# ---- counting -----------------------------------------------------------------------------------

def count(rows, patch: int) -> tuple[int, int, int, int]:
    """Tokens, learnt tokens (those with a weight), images and patches in packed rows of Documents.
    An image that several documents of a row ask about is encoded once: its patches count once."""
    tokens = learnt = images = patches = 0
    for row in rows:
        tokens += sum(len(d.ids) for d in row)
        learnt += sum(int((d.weights[1:] > 0).sum()) for d in row)
        images += sum(len(d.images) for d in row)
        encoded = {id(image): image for d in row for image in d.images}
        patches += sum(x.shape[-3] * x.shape[-2] // patch ** 2 for x in encoded.values())
    return tokens, learnt, images, patches


def plan(args: Args, hw, config: Config, stream: Stream, workers: int):
    """Print what the run would need (`--plan`). About a second of loading tells how long samples
    take, and how many tokens and patches they have."""
    model = on_meta(args, config)
    if not learns(head_of(model)):
        args = replace(args, mtp=0)
    # From number 10^9 on no sample is an easy one. The first 50 fill caches and are not timed.
    made = [stream(10 ** 9 + i) for i in range(50)]
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < 1:
        made.append(stream(10 ** 9 + len(made)))
    seconds = spent / (len(made) - 50)
    made_tokens, made_learnt, _, made_patches = count(made, config.vision.patch_size)
    tokens = args.steps * args.rows * args.row_tokens
    learnt, patches = tokens * made_learnt / made_tokens, tokens * made_patches / made_tokens
    if args.on:
        return plan_on(find_machine(args.on), args, config, stream, made, seconds)
    # The MTP head learns in the last part of the run, all its depths.
    flops = model.flops(tokens, patches, learnt)
    if args.mtp:
        flops += args.mtp_share * (model.flops(tokens, patches, learnt, args.mtp) - flops)
    # Bytes: weights in the model's dtype; for each that learns a gradient, 4, and master and
    # moments, 12, which the ranks share; 2 for each value that is kept for the backward pass of a
    # row. A frozen tower keeps nothing.
    row_patches = args.row_tokens * patches / tokens * learns(model.model.visual.blocks)
    kept = parse_memory(args.memory, args.chunk_patches).kept(config, args.row_tokens, row_patches)
    counts = model.counts() | {"learning": count_learning(model)}
    memory = counts["total"] * hw.dtype.itemsize + counts["learning"] * (4 + 12 / hw.world)
    memory += 2 * kept
    print_plan(hw, counts, tokens, flops, memory)
    ranks = hw.world if args.partition == "planned" else 1      # that share the samples
    length = made_tokens / len(made)                            # tokens of a sample
    hours = seconds * tokens / length / max(1, workers) / ranks / 3600
    # Workers load while a GPU trains; on a CPU they would take its cores, and loading comes first.
    both = "longer" if workers and hw.device.type != "cpu" else "sum"
    print(f"loading     {hours:,.2f} h by {workers} workers a rank, {1000 * seconds:.2f} ms a "
          f"sample of {length:.0f} tokens; the run takes the {both} of both times")


def plan_on(machine: Machine, args: Args, config: Config, stream: Stream, made: list,
            seconds: float):
    """Print what the run would take on a machine that is not here (`--plan --on`). made: samples of
    the stream from number 10^9 on; seconds: the time that this machine takes to draw one."""
    row = Packer(lambda i: made[i] if i < len(made) else stream(10 ** 9 + i), args.row_tokens).row()
    tokens, learnt, _, patches = count([row], config.vision.patch_size)
    ahead = args.steps * args.mtp_share if args.mtp else 0.0     # steps in which the head learns
    parts = []
    for name, depths, steps in (("steps without MTP", 0, args.steps - ahead),
                                ("steps with MTP", args.mtp, ahead)):
        if steps:
            model, trace = trace_step(machine, args, config, row, depths)
            flops = args.rows * model.flops(tokens, patches, learnt, depths)
            parts.append(Part(name, steps, trace, flops))
    workers = max(1, args.workers) if args.workers >= 0 else min(8, machine.cores)
    documents = args.steps * args.rows * len(row)
    samples = documents / sum(map(len, made)) * len(made)   # a sample may have several documents
    ranks = machine.count if args.partition == "planned" else 1     # that share the samples
    counts = model.counts() | {"learning": count_learning(on_meta(args, config))}
    print_plan_on(machine, counts, args.steps * args.rows * tokens, parts,
                  seconds * samples / workers / ranks / 3600,
                  f"{1000 * seconds:.2f} ms a sample, measured here, by {workers} workers a GPU, "
                  "an assumption")


def on_meta(args: Args, config: Config) -> GLMV:
    """The model of a run, with shapes but without memory."""
    with torch.device("meta"):
        model = GLMV(config)
        if config.mtp_depths:       # as --init brings a head
            attach(model, config.mtp_depths)
        set_learning(model, args.train, args.seed, args.mtp)
    return model


def trace_step(machine: Machine, args: Args, config: Config, row, depths: int):
    """(model, Trace): one step of rank 0 on meta tensors, with this row in place of each of its
    rows. See lib/roofline.py."""
    trace = Trace(machine)
    with trace:
        model = on_meta(args, config)
        parse_memory(args.memory, args.chunk_patches).use_in(model)
        optimizer = Optimizer(model.bfloat16().named_parameters(), OptimConfig())
        let_head_learn(model, optimizer, depths > 0)
        trace.hold_training(model, optimizer)
        optimizer.last_backward()
        batch = collate(row, config, args.row_tokens).to("meta")
        rows = -(-args.rows // machine.count)
        trace.learn(lambda: loss_sum(model, batch, depths, args.image_option, args.mtp_alone), rows)
        trace.update(optimizer)
    return model, trace


# ---- the samples --------------------------------------------------------------------------------

def stream_of(args: Args, config: Config) -> Stream:
    """The stream of samples that the run learns from: own data, categories of the gym, text."""
    own, weights = parse_data(args.data, "all" if args.val else "train")
    if args.mix:
        weights |= dict(parse_mix(args.mix, sight(config)))
    # Level 0 alone for the first fifth of the run. At first a model only learns how answers read:
    # its loss stays on a plateau until it finds out that the picture tells which answer is right.
    # It does so sooner on pictures with few objects [O].
    samples = args.steps * args.rows * args.row_tokens / 110    # about 110 tokens a sample at tiny
    return Stream(config, tuple(weights.items()), args.seed, "train", args.levels,
                  easy_samples=int(args.curriculum * samples), think=args.think,
                  parts=tuple(filter(None, args.parts.split(","))),
                  own_question=args.own_question, pixels=args.pixels, own=own,
                  own_tokens=args.row_tokens)


def held_out_rows(stream: Stream, args: Args, hw, say) -> dict[str, list[Batch]]:
    """Up to two rows of each source that are never trained on; the categories of the gym and its
    texts are one source, `gym`. They do not depend on the step, so that the held-out losses of a
    run can be compared."""
    stream = replace(stream, split="test", easy_samples=0, lazy=False)
    own = parse_data(args.val, "all", "--val")[0] or tuple(
        replace(data, split="test") for data in stream.own)
    drawn = tuple((name, weight) for name, weight in stream.mix if name not in stream.own_data)
    rows = {}
    if any(weight for _, weight in drawn):
        # From all levels of the test split, whose tasks are never trained on.
        packer = Packer(replace(stream, mix=drawn, own=()), args.row_tokens, say=lambda _: None)
        rows["gym"] = [packer.row() for _ in range(2)]
    for data in own:
        documents = stream.once(data, args.row_tokens, 2 * args.row_tokens)
        if documents:
            rows[data.name] = pack_rows(documents, args.row_tokens)[:2]
        else:
            say(f"{data.name} has no held-out record to use: --val=FILE would give some")
    return {name: [collate(row, stream.config).to(hw.device) for row in some]
            for name, some in rows.items()}


# ---- the rows of a step -------------------------------------------------------------------------

@dataclass
class Rows:
    """What one step learns from. Counts are of the rows of all ranks."""
    batches: list[Batch]    # the rows of this rank; where a GPU trains, in pinned memory
    tokens: int
    learnt: int
    images: int
    patches: int
    weight: float           # summed over all tokens
    balance: float          # time of the step, divided by its time if ranks had equal work; 1: best
    bytes_in: int           # read and received by one rank, the one with the most
    position: dict          # of the packer after these rows: a resumed run starts from there


def load_rows(packer: Packer, pixels: PixelLoader, args: Args, config: Config, hw) -> Rows:
    """Pack the global batch, the same on any number of ranks, and load this rank's part of it."""
    rows = packer.batch()
    steps = plan_steps(rows, args.row_tokens, Costs.of(config), hw.world, args.partition)
    pixels.move_drawn(steps, hw.rank)
    batches = [load_batch(step, hw.rank, config, pixels, args.row_tokens) for step in steps]
    if hw.device.type == "cuda":
        batches = [batch.pinned() for batch in batches]
    weight = sum(float(d.weights[1:].sum()) for row in rows for d in row)
    visual_token = config.text.hidden_size * hw.dtype.itemsize
    return Rows(batches, *count(rows, config.vision.patch_size), weight, balance(steps),
                most_bytes_in(steps, visual_token), packer.state())


# ---- start and save -----------------------------------------------------------------------------

def check(args: Args):
    """Refuse at once what would fail, or do nothing, hours later."""
    check_options(args)
    check_machine(args)
    parse_memory(args.memory)
    if 0 < args.row_tokens < 32:
        raise UserError(f"--row_tokens takes 32 or more, or 0: by size; not {args.row_tokens}")
    if args.init and args.vit:
        raise UserError("--init and --vit both bring a tower: give one of them")
    if args.vit:
        find_checkpoint(args.vit)
    kind = check_train(args)
    given = args.init or args.vit and kind == "decoder" or args.resume and checkpoints(args.out)
    if kind != "all" and not given and not args.plan:
        raise UserError(f"--train={args.train} would freeze random weights: name others by --init")
    if kind == "adapter" and args.mtp_alone:
        raise UserError("--mtp_alone does nothing with --train=adapter, which freezes the MTP head")


def start_of(args: Args) -> tuple[Path | None, Config]:
    """The folder whose weights the run starts from, None for random ones, and the configuration of
    its model. Raises UserError if --size names another size than that of the folder."""
    folder = args.out if args.resume and checkpoints(args.out) else args.init
    size = "tiny" if args.size == "auto" else args.size
    if not folder:
        return None, sized(size)
    folder = find_checkpoint(folder)
    config, asked = load_config(folder), sized(size)
    tokenizer_of(config)        # refuses a folder without one
    if args.size != "auto" and (config.text, config.vision) != (asked.text, asked.vision):
        raise UserError(f"--size={size} is not the size of the model in {folder}: leave it out")
    return folder, config


def with_rows(args: Args, config: Config, ranks: int) -> Args:
    """The arguments with --rows and --row_tokens filled in: those that the resumed run has, or by
    the size of the model. Raises UserError where the rows can't be dealt out to the ranks."""
    # The largest of the named sizes that is not wider than the model.
    sizes = [size for size in ROWS if sized(size).text.hidden_size <= config.text.hidden_size]
    rows, row_tokens = ROWS[sizes[-1] if sizes else "tiny"]
    default = {"rows": rows * ranks, "row_tokens": row_tokens}
    if args.resume and checkpoints(args.out) and (begun := Path(args.out, "config.json")).exists():
        default |= {name: value for name, value in read_json(begun).items() if name in default}
    args = replace(args, **{name: getattr(args, name) or default[name] for name in default})
    if args.rows % ranks:
        raise UserError(f"--rows={args.rows} can't be dealt out to {ranks} ranks: take "
                        f"{multiples(args.rows, ranks)}")
    return args


def build(args: Args, hw) -> tuple[GLMV, Optimizer, int, dict | None]:
    """Returns model, optimizer, the number of steps that are done, and the packer's state."""
    # The newest checkpoint comes before --init, so that a job that is restarted can keep its
    # command line.
    folder, config = start_of(args)
    resumed = args.resume and bool(checkpoints(args.out))
    model = load_model(folder) if folder else GLMV(config, args.seed)
    if args.vit and not resumed:
        load_tower(model.model.visual, find_checkpoint(args.vit))
    set_learning(model, args.train, args.seed, args.mtp)
    exact = model.state_dict()      # before it is rounded to bf16
    model = model.to(hw.device, hw.dtype)
    parse_memory(args.memory, args.chunk_patches).use_in(model)
    if args.compile:
        compile_blocks(model, (VitBlock, DecoderLayer), hw.device)

    # lr 4e-3: Muon's updates have the RMS of AdamW's, so one rate serves both [R: Moonlight]. After
    # 150 steps at it the loss of a tiny model was 0.30; with AdamW alone at 2e-3 it was 0.42 [O].
    # weight_decay 0.05: half of GLM-4.5's 0.1 [R], for runs that are far shorter; not tuned [O].
    # momentum 0.95 and betas (0.9, 0.95) are OptimConfig's defaults, as Moonlight has them [R].
    config = OptimConfig(args.lr, args.weight_decay, scales=(("model.visual", args.vision_scale),))
    optimizer = Optimizer(model.named_parameters(), config)
    if not resumed:
        optimizer.load_masters(exact)
        return model, optimizer, 0, None
    state = restore(folder, model, optimizer, args.train)
    if "position" not in state:
        raise UserError(f"{folder} was not saved by pretrain.py; --init={folder} starts from its "
                        "weights")
    return model, optimizer, state["step"], state["position"]


def save(folder: Path, masters: dict, state: dict, step: int, model: GLMV, position: dict,
         args: Args):
    """Write all that `build` needs to continue as if the run had not been interrupted. masters,
    state: from Optimizer.gather."""
    save_model(model, folder, weights=masters)      # fp32; the model may be bf16
    save_state(folder / "train.pt", {
        "step": step, "position": position, "seed": args.seed, "optimizer": state,
        "args": asdict(args), "rng": torch.get_rng_state(),
        "unmerged": unmerged({**model.state_dict(), **masters})})
    if args.keep:
        save_model(model, args.keep, torch.bfloat16, masters)


# ---- the run ------------------------------------------------------------------------------------

def run(args: Args):
    """Train, from the start or from the newest checkpoint, to the last step."""
    check(args)
    if not args.mix and not args.data:
        args = replace(args, mix=MIX)
    hw = setup(args.device, args.dtype, args.max_hours)
    out, config = Path(args.out), start_of(args)[1]
    args = with_rows(args, config, find_machine(args.on).count if args.on else hw.world)
    say = print if hw.rank == 0 else (lambda *_: None)

    stream = stream_of(args, config)
    workers = args.workers if args.workers >= 0 else min(8, max(1, cores() // hw.world))
    if args.plan:
        return plan(args, hw, config, stream, workers) if hw.rank == 0 else None
    say(hw.description)
    for data in stream.own:
        say("\n".join([data.description(), *data.shards.notes]))
    if stream.own:
        check_same_data(stream.digest)
    model, optimizer, start, position = build(args, hw)
    check_same_start(start, out)
    if position and position.get("data", "") != stream.digest:
        raise UserError(f"--data has changed since {out} was saved: --init={out} and another --out "
                        "start a new run from its weights")
    if not learns(head_of(model)):      # --train freezes it, or there is none
        args = replace(args, mtp=0)
    config, counts = model.config, model.counts() | {"learning": count_learning(model)}
    # Of several ranks each makes some of the samples and sends the others all but the pixels. Own
    # pictures are not read before it is decided who encodes them.
    stream = replace(stream, lazy=hw.world > 1)
    planned = hw.world > 1 and args.partition == "planned"
    own = RankShard(stream, hw.rank, hw.world, share=1) if planned else stream
    # On a CPU, workers that load during a step would take its cores: no overlap there.
    loader = SampleLoader(own, workers, overlap=hw.device.type != "cpu")
    samples = Skeletons(loader, hw.rank, hw.world) if planned else loader
    packer = Packer(samples, args.row_tokens, args.rows, Costs.of(config), ahead=AHEAD,
                    state=position, say=say)
    position = packer.state()       # in the loop: that after the rows of the last step
    # On a GPU a thread loads the rows of the next step while this one runs.
    pixels = PixelLoader(stream, max(1, workers), samples.group if planned else None)
    load = Prefetch(functools.partial(load_rows, packer, pixels, args, config, hw),
                    args.steps - start, ahead=hw.device.type == "cuda")
    held_out = held_out_rows(stream, args, hw, say) if args.eval_every else {}

    # Only now, as --init may be in the folder of the earlier run.
    move_earlier_run(out, args.resume, hw, say)
    say(f"{counts['total'] / 1e6:.2f}M parameters, of which {counts['learning'] / 1e6:.2f}M learn, "
        f"{args.rows}x{args.row_tokens} tokens a step, steps {start}..{args.steps}, {workers} "
        f"workers, run folder {out}")
    if hw.rank == 0:        # the page of a run shows its options from here; eval reads the mixture
        write_json(out / "config.json", asdict(args) | {
            "parameters": counts, "hardware": hw.description})
    # From here on a signal no longer ends the process: the loop finishes its step and saves. The
    # lambda reads `checkpointer` and `position` when it is called, so it saves the newest position.
    checkpointer = Checkpointer(
        out, hw, args.steps, args.save_every, start,
        lambda folder, *gathered: save(folder, *gathered, checkpointer.done, model,
                                       position | {"data": stream.digest}, args),
        optimizer.gather)
    log = Log(out, "pretrain", args.steps, start, hw.rank)

    for step in range(start, args.steps):
        began, loading = time.perf_counter(), load.seconds

        # 1. The packed rows. Their position is that of this step, though the packer may be ahead.
        try:
            rows = load()
        except (UserError, OSError):    # samples can't be loaded: keep the steps that are done
            loader.close()
            checkpointer.close()
            raise
        position = rows.position

        # The MTP head joins late: until the hidden states are good there is little to look ahead
        # from, and each depth costs a decoder layer and an output matrix more [O].
        mtp_factor = mtp_weight(step, args)
        depths = args.mtp if mtp_factor else 0
        losses = torch.zeros(1 + depths, device=hw.device)  # of the next token, of each depth
        let_head_learn(model, optimizer, depths > 0)

        for number, batch in enumerate(rows.batches, 1):
            # 2. Forward: the tower, then the decoder, which embeds its text while visual tokens are
            #    on their way. A row is always T tokens long, filled up by a tail without weight.
            batch = batch.to(hw.device)
            loss, further = loss_sum(model, batch, depths, args.image_option, args.mtp_alone)
            # 3. The loss of this row as a part of the global batch: divided by the weight of all
            #    rows of all ranks, not of this one. Rows hold different numbers of learnt tokens;
            #    with a mean per row, a token in a row with few of them would count more, and two
            #    processes would compute another update than one. The MTP loss is the mean over its
            #    depths.
            part = (loss + mtp_factor * sum(further) / max(1, args.mtp)) / rows.weight
            # 4. Backward. The optimizer adds up each gradient as soon as it is computed. In the
            #    last row the sums become complete, and each is sent to the rank that updates these
            #    weights while backward still computes the others.
            if number == len(rows.batches):
                optimizer.last_backward()
            if part.requires_grad:  # not where only the adapter learns and there is no picture
                part.backward()
            # Sums stay on the device: .item() here would make the host wait for every row.
            losses += torch.stack([loss.detach(), *(x.detach() for x in further)]) / rows.weight

        # 5. Update. All ranks see the same summed loss and norm. If one is not finite, all of them
        #    skip the step. To read these numbers the host waits for the device, once a step. The
        #    rate rises at first, while momenta are averages of a few gradients only; it stays at
        #    its peak for most of the run, since large steps leave the plateau; its fall over the
        #    last 40% removes their noise [O].
        squares = optimizer.reduce()
        value, *mtp_values, squares = sum_over_ranks(torch.cat([losses, squares[None]])).tolist()
        norm = math.sqrt(squares)
        rate = schedule(step, args.steps, args.warmup, args.schedule, args.decay)
        optimizer.step(rate, norm, apply=math.isfinite(value))
        checkpointer.check_loss(value, norm)    # the fifth bad step in a row ends the run

        done, seconds = step + 1, time.perf_counter() - began
        values = {"loss": value, "lr": args.lr * rate, "norm": norm, "dt": seconds,
                  "tok/s": rows.tokens / seconds, "img/s": rows.images / seconds}
        if hw.device.type == "cuda":            # a CPU's peak is not known well enough
            flops = model.flops(rows.tokens, rows.patches, rows.learnt, depths)
            values["mfu"] = flops / seconds / hw.peak / hw.world
        values |= {f"mtp{depth}": x for depth, x in enumerate(mtp_values, 1)}
        if hw.world > 1:
            values |= {"balance": rows.balance, "MB in": rows.bytes_in / 1e6}
        if load.seconds - loading > 0.05 * seconds:         # then more --workers may help
            values["loading"] = load.seconds - loading
        # Steps that were not finite, samples longer than a row, records that can't be used.
        passed = sum(position["passed"].values())
        if checkpointer.skipped or position["skipped"] or passed:
            values["skipped"] = checkpointer.skipped + position["skipped"] + passed

        # 6. Held-out loss, without the MTP part; also at the last step, so that two runs can be
        #    compared by their last line.
        if args.eval_every and (done % args.eval_every == 0 or done == args.steps):
            values |= held_out_losses(model, held_out)

        # 7. Log every step, print some. Save when due, and also if a signal has come: then all
        #    ranks leave the loop together.
        log.step(done, done % args.log_every == 0 or done == args.steps, **values)
        if checkpointer.after_step(done, log.reader_gone):
            break
    if position["passed"]:
        counts = (f"{n} x {kind}" for kind, n in position["passed"].items())
        say(f"skipped in all: {', '.join(counts)}")
    log.close()
    load.close()
    loader.close()
    checkpointer.close()


# Exercises. Delete the body, write it again, run the test, or `python -m lab.grade loss_sum`.
# 1. loss_sum: which hidden state predicts which token, and with which token's weight?
#    pytest tests/test_pretrain.py -k loss_sum; 20 minutes.
# 2. Divide each row's loss by its own weight instead of the global sum, and run
#    pytest tests/test_pretrain.py -k two_processes. Why does it fail? 10 minutes.


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)),
         less="a smaller --row_tokens, or --memory=recompute and --chunk_patches=1024")
