"""Multimodal pretraining and SFT: next-token prediction on conversations, text and code.

    python pretrain.py --steps=200                          a first look, any machine
    python pretrain.py --mix=gym:9,text,code --levels=3     all tasks, up to level 2, some text
    python pretrain.py --init=out/pretrain --lr=1e-3 --out=out/sft   go on from other weights
    torchrun --nproc_per_node=8 pretrain.py --size=small --rows=16     two rows a rank
    python pretrain.py --size=base --plan                   what it would take, then stop

One step is `rows` packed rows, dealt out over the ranks; the loss is divided by the summed weights
of all of them, so one process and eight compute the same update. Each rank draws all the samples
and keeps its rows: simple and exact, and wasteful once drawing costs more than training.
"""
import lib  # first of all, before torch: see lib/__init__.py

import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from data import collate, Packer, parse_mix, SampleLoader, sight, Stream
from kernels import linear_cross_entropy
from lib.checkpoint import load_model, load_tower, save_model
from lib.cli import cli, main, UserError
from lib.common import (check_same_start, Checkpointer, checkpoints, find_checkpoint,
                        first_sentence, Log, move_earlier_run, print_plan, save_state, setup,
                        write_json)
from lib.tensors import load_tensors
from mmtp import attach, head_of, losses as mtp_losses, OPTIONS, prefix
from model import GLMV, sized
from optim import OptimConfig, Optimizer, schedule


@dataclass
class Args:
    size: str = "tiny"            # tiny (2 cores), small (one GPU) or base (GLM-OCR's own size)
    steps: int = 1000             # optimizer updates
    rows: int = 2                 # packed rows a step, over all ranks
    row_tokens: int = 2048        # tokens a row
    mix: str = "gym:8,text:1,code:1"  # sources and weights; gym = all that it can see
    levels: int = 2               # tasks come from levels 0..levels-1
    think: float = 0.0            # share of the gym's replies that state their reasons first
    parts: str = ""               # categories shown only in single questions about their screens
    curriculum: float = 0.2       # share of the run that sees level 0 only
    lr: float = 4e-3              # peak learning rate; Muon and AdamW alike
    vision_scale: float = 1.0     # factor on it for the vision tower
    weight_decay: float = 0.05    # on matrices
    warmup: int = 20              # steps
    schedule: str = "linear"      # constant, linear (over the last part) or cosine
    decay: float = 0.4            # that last part, as a share of the steps
    mtp: int = 3                  # tokens that the MTP head learns to look ahead; 0: no head
    mtp_share: float = 0.2        # the last part of the run, in which it learns
    mtp_alone: bool = False       # its loss moves the head only, the rest is as without it
    image_option: str = "token"   # what it reads at visual slots: embed, mask or token (mmtp.py)
    init: str = ""                # folder whose weights to start from
    vit: str = ""                 # folder of train_vit.py's whose tower to start from
    resume: bool = False          # go on with the newest checkpoint in --out
    out: str = "out/pretrain"     # run folder: log.jsonl, config.json, checkpoints
    save_every: int = 500         # steps between checkpoints
    eval_every: int = 100         # steps between losses on held-out tasks; 0 = never
    log_every: int = 20           # steps between printed lines
    seed: int = 0                 # of weights and samples
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # auto, float32 or bfloat16; masters are fp32 in any case
    workers: int = -1             # drawing processes; -1: as many as cores, at most 8; 0: none
    plan: bool = False            # print parameters, memory, FLOPs, hours, price and stop


# ---- the loss ---------------------------------------------------------------------------------

def loss_sum(model: GLMV, batch, depths: int = 0, option: str = "token", alone: bool = False):
    """Weighted sum of the next-token losses of one row, and a list of the MTP head's at each
    depth: fp32 scalars."""
    merged = model.encode_images(batch)
    hidden = model(batch, merged)
    # Token t is predicted from position t-1; a document's first token has weight 0.
    main = linear_cross_entropy(hidden[:-1], model.lm_head.weight,
                                batch.tokens[1:], batch.weights[1:])
    return main, (mtp_losses(model, hidden, batch, merged, depths, option, alone) if depths
                  else [])


def ahead_weight(step: int, args: Args) -> float:
    """What the MTP loss counts at `step`: nothing at first, then 0.3, then 0.1 in the last third
    of its part [R: GLM-4.5, DeepSeek-V3; that it starts late is ours]."""
    left = (args.steps - step) / args.steps / args.mtp_share if args.mtp_share else 2.0
    return 0.0 if not args.mtp or left > 1 else 0.3 if left > 1 / 3 else 0.1


def flops_per_step(model: GLMV, args: Args, patches_per_token: float) -> float:
    """FLOPs of forward and backward over all ranks' rows: 6 for each parameter and token, see
    GLMV.flops_per_token."""
    return args.rows * args.row_tokens * model.flops_per_token(patches_per_token)


# ---- the run ----------------------------------------------------------------------------------

def build(args: Args, hw):
    """Model, optimizer and the step and data position to go on from."""
    start, position = 0, None
    resumed = args.resume and bool(checkpoints(args.out))
    folder = (find_checkpoint(args.out) if resumed
              else find_checkpoint(args.init) if args.init else None)
    model = load_model(folder) if folder else GLMV(sized(args.size), args.seed)
    if not model.config.n_ranks:
        raise UserError(f"{folder} comes with another tokenizer; only its weights can be used here")
    if args.mtp and not head_of(model):
        attach(model, args.mtp, args.seed)
    model.config.mtp_depths = max(model.config.mtp_depths, args.mtp)
    if args.vit and not resumed:
        load_tower(model.model.visual, find_checkpoint(args.vit))
    model = model.to(hw.device, hw.dtype)
    config = OptimConfig(args.lr, args.weight_decay, scales=(("model.visual", args.vision_scale),))
    optimizer = Optimizer(model.named_parameters(), config)
    if folder:  # the model may be bf16, the masters start from what the file holds
        stored = {k: v.to(hw.device, torch.float32) for k, v in load_tensors(folder).items()}
        optimizer.load_masters(optimizer.masters | stored)  # a new head is not in the file
    if resumed:
        try:
            state = torch.load(folder / "train.pt", map_location=hw.device, weights_only=True)
            start, position = state["step"], state["position"]
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch.load answers damage with some ten kinds of them
            raise UserError(f"{folder}/train.pt is damaged ({first_sentence(error)}); "
                            f"--init={folder} starts from its weights alone") from None
    return model, optimizer, start, position


def check(args: Args):
    """Refuse at once what would fail, or do nothing, hours later."""
    for name in ("steps", "rows", "row_tokens", "save_every", "log_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} takes 1 or more, not {getattr(args, name)}")
    if args.seed < 0:
        raise UserError(f"--seed takes 0 or more, not {args.seed}")
    if not 1 <= args.levels <= 5:
        raise UserError(f"--levels takes 1 to 5, not {args.levels}")
    if args.mtp < 0 or not 0 <= args.mtp_share <= 1:
        raise UserError("--mtp takes 0 or more, --mtp_share 0 to 1")
    if args.image_option not in OPTIONS:
        raise UserError(f"--image_option takes {', '.join(OPTIONS)}, not '{args.image_option}'")
    if args.init and args.vit:
        raise UserError("--init and --vit both bring a tower: give one of them")
    if args.schedule not in ("constant", "linear", "cosine"):
        raise UserError(f"--schedule takes constant, linear or cosine, not '{args.schedule}'")


def run(args: Args):
    check(args)
    hw = setup(args.device, args.dtype)
    out, lead = Path(args.out), hw.rank == 0
    say = print if lead else (lambda *_: None)
    if args.plan:
        with torch.device("meta"):
            model = GLMV(sized(args.size))
        counts = model.counts()
        flops = args.steps * flops_per_step(model, args, 1.0)
        tokens = args.rows * args.row_tokens
        memory = counts["total"] * (16 + hw.dtype.itemsize) + (
            args.row_tokens * model.config.text.hidden_size * 2 * 34
            * (model.config.text.num_hidden_layers + 4 * model.config.vision.depth))
        return print_plan(hw, counts, args.steps * tokens, flops, memory)
    say(hw.description)
    model, optimizer, start, position = build(args, hw)
    check_same_start(start, out)
    mix = parse_mix(args.mix, sight(model.config))
    # About 110 tokens a sample at tiny: close enough to place the curriculum's end.
    easy = int(args.curriculum * args.steps * args.rows * args.row_tokens / 110)
    stream = Stream(model.config, mix, args.seed, "train", args.levels, easy, args.think,
                    parts=tuple(filter(None, args.parts.split(","))))
    cores = os.cpu_count() or 1
    workers = args.workers if args.workers >= 0 else min(8, max(1, cores // hw.world))
    loader = SampleLoader(stream, workers, overlap=hw.device.type != "cpu")
    packer = Packer(loader, args.row_tokens, state=position, say=say)
    held_out = Packer(replace(stream, split="test", easy_samples=0), args.row_tokens, say=lambda _: None)
    exam = [collate(held_out.row(), model.config).to(hw.device) for _ in range(2)]
    move_earlier_run(out, args.resume, hw, say)
    counts = model.counts()
    say(f"{counts['total'] / 1e6:.2f}M parameters, {args.rows}x{args.row_tokens} tokens a step, "
        f"steps {start}..{args.steps}, {workers} drawing processes, run folder {out}")
    if lead:
        write_json(out / "config.json", asdict(args))

    def write(folder):
        save_model(model, folder, weights=optimizer.masters)
        save_state(folder / "train.pt", {
            "step": watch.done, "position": packer.state(), "seed": args.seed,
            "optimizer": optimizer.state_dict(), "args": asdict(args),
            "rng": torch.get_rng_state()})

    watch = Checkpointer(out, hw, args.steps, args.save_every, start, write)
    log = Log(out, "pretrain", args.steps, start, hw.rank)
    for step in range(start, args.steps):
        began, drawing = time.perf_counter(), loader.seconds
        rows = [packer.row() for _ in range(args.rows)]
        weight = sum(float(d.weights[1:].sum()) for row in rows for d in row)
        tokens = sum(len(d.ids) for row in rows for d in row)
        images = sum(len(d.images) for row in rows for d in row)
        ahead = ahead_weight(step, args)
        total = torch.zeros(1 + args.mtp * (ahead > 0), device=hw.device)
        for row in rows[hw.rank::hw.world]:
            batch = collate(row, model.config, args.row_tokens).to(hw.device)
            loss, further = loss_sum(model, batch, args.mtp if ahead else 0,
                                     args.image_option, args.mtp_alone)
            (loss + ahead * sum(further) / max(1, args.mtp)).div(weight).backward()
            optimizer.accumulate()
            total += torch.stack([loss.detach(), *(x.detach() for x in further)]) / weight
        if hw.world > 1:
            dist.all_reduce(total)
        rate = schedule(step, args.steps, args.warmup, args.schedule, args.decay)
        value, *further = total.tolist()
        norm = optimizer.step(rate, math.isfinite(value), skip_prefix="" if ahead else prefix(model))
        watch.check_loss(value, norm)

        done, took = step + 1, time.perf_counter() - began
        drew = loader.seconds - drawing
        values = {"loss": value, "lr": args.lr * rate, "norm": norm, "dt": took,
                  "tok/s": tokens / took, "img/s": images / took}
        if hw.device.type == "cuda":
            per_token = sum(len(d.images) * 4 for row in rows for d in row) / max(1, tokens)
            values["mfu"] = flops_per_step(model, args, per_token) / took / hw.peak / hw.world
        if further:
            values |= {f"mtp{k}": x for k, x in enumerate(further, 1)}
        if drew > 0.05 * took:
            values["loading"] = drew
        if watch.skipped or packer.skipped:
            values["skipped"] = watch.skipped + packer.skipped
        if args.eval_every and done % args.eval_every == 0:
            with torch.no_grad():
                sums = sum(loss_sum(model, b)[0] for b in exam)
            values["held_out"] = (sums / sum(b.weights.sum() for b in exam)).item()
        log.step(done, done % args.log_every == 0 or done == args.steps, **values)
        if watch.after_step(done, log.reader_gone):
            break
    log.close()
    loader.close()
    watch.close()


# Exercises. Write it again, run the test.
# 1. loss_sum: which hidden state predicts which token, and with whose weight?
#    pytest tests/test_pretrain.py; 20 minutes.
# 2. Divide each row's loss by its own weight instead of the global sum, and run the test that two
#    processes equal one. Why does it go red?


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
