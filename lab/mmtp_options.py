"""What should the MTP head read at visual slots? What each option sends, and a run with it.

    python -m lab.mmtp_options              the bytes that cross a pipeline cut, seconds
    python -m lab mmtp_bytes mmtp_loss      both comparisons of the paper, as lab sheets

`count_bytes` cuts the model in two halves on two processes (plain send and receive, forward and
backward) and counts the bytes that cross the cut: only `embed` has to send visual embeddings to the
half with the head, and their gradients back. `train` is one run of the ablation: whatever the
option, the same model learns from the same samples in the same order, with the head from the first
step on.
"""
import lib  # first of all, before torch: see lib/__init__.py

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist

import mmtp
import pretrain
from data import collate, Packer, parse_mix, Stream
from kernels import angles, linear_cross_entropy, Segments
from lib.cli import check_options, cli, main, Range, Seed, UserError
from lib.common import read_json, read_log, ROOT, setup, write_json
from model import GLMV, sized

MIX = "shape_attr,ocr_line,point,gui_click,text:0.5"    # of the ablation, as in pretrain.py
PICTURES = "point,gui_click,shape_attr,ocr_line"        # of the row whose bytes are counted


@dataclass
class Args:
    depths: Annotated[int, Range(1, 16)] = 3  # how many tokens ahead the head predicts
    seed: Seed = 0                # of weights and samples
    out: str = "out/mmtp_options"  # folder for bytes.json


# ---- the ablation -------------------------------------------------------------------------------

def train(option: str, seed: int, steps: int, depths: int, out: Path) -> list[dict]:
    """Train one run of `steps` steps, a row each, in the folder `out`, or go on where an earlier
    call has stopped. Returns its log, a dict a step. Raises UserError where lines are missing."""
    if not (out / f"step_{steps:06d}").exists():
        pretrain.run(pretrain.Args(
            steps=steps, rows=1, mix=MIX, levels=1, seed=seed, mtp=depths, mtp_share=1.0,
            image_option=option, out=str(out), resume=True, eval_every=0, log_every=100,
            workers=0, dtype="float32"))
    log = read_log(out / "log.jsonl")
    if len(log) != steps:
        raise UserError(f"{out}/log.jsonl has {len(log)} whole lines for {steps} steps: remove "
                        f"{out} to train it again")
    return log


# ---- what crosses a pipeline cut ----------------------------------------------------------------

class Wire:
    """Sends and receives tensors, and counts the bytes that this process sends."""
    sent = 0

    @classmethod
    def send(cls, tensor, other):
        cls.sent += tensor.numel() * tensor.element_size()
        dist.send(tensor.contiguous(), other)

    @staticmethod
    def receive(shape, other):
        tensor = torch.empty(shape)
        dist.recv(tensor, other)
        return tensor


def two_stages(option: str, model: GLMV, batch, depths: int) -> float:
    """Forward and backward of a model cut in two: the encoder and the first layers on rank 0, the
    other layers and the head on rank 1. Ids and positions are on both. Returns the loss on rank 1,
    and 0 on rank 0."""
    c, decoder, rank = model.config, model.model.language_model, dist.get_rank()
    freqs = angles(batch.positions, c.sections, c.text.rope_theta)
    rope, segments = (freqs.cos(), freqs.sin()), Segments(batch.cu_seqlens, causal=True)
    cut, shape = c.text.num_hidden_layers // 2 or 1, (len(batch.tokens), c.text.hidden_size)
    slots = (batch.tokens == c.image_token_id).nonzero()[:, 0]
    if rank == 0:
        merged = model.encode_images(batch)
        h = decoder.embed_tokens(batch.tokens).index_copy(0, slots, merged)
        for i in range(cut):
            h = decoder.layers[i](h, rope, segments, i)
        sent = [h, merged] if option == "embed" else [h]
        for x in sent:
            Wire.send(x.detach(), 1)
        torch.autograd.backward(sent, [Wire.receive(x.shape, 1) for x in sent])
        return 0.0

    h, merged = Wire.receive(shape, 0).requires_grad_(), None
    received = [h]
    if option == "embed":
        merged = Wire.receive((len(slots), shape[1]), 0).requires_grad_()
        received.append(merged)
    for i in range(cut, c.text.num_hidden_layers):
        h = decoder.layers[i](h, rope, segments, i)
    hidden = decoder.norm(h)
    loss = linear_cross_entropy(hidden[:-1], model.lm_head.weight, batch.tokens[1:],
                                batch.weights[1:])
    loss = loss + 0.1 * sum(mmtp.losses(model, hidden, batch, merged, depths, option))
    loss.backward()
    for x in received:
        Wire.send(x.grad, 0)
    return loss.item()


def example(args: Args):
    """A model with a head, and a batch of tasks with pictures."""
    model = GLMV(sized("tiny"), args.seed)
    mmtp.attach(model, args.depths)
    stream = Stream(model.config, parse_mix(PICTURES), args.seed)
    row = Packer(stream, 2048).row()
    return model, collate(row, model.config)


def stage(args: Args):
    """What each of the two processes that torchrun has started does: run all options. Rank 0 writes
    bytes.json."""
    hw = setup("cpu", "float32")
    model, batch = example(args)
    slots = int((batch.tokens == model.config.image_token_id).sum())
    width, rows = model.config.text.hidden_size, {}
    for option in mmtp.OPTIONS:
        Wire.sent = 0
        loss = two_stages(option, model, batch, args.depths)
        total = torch.tensor([float(Wire.sent), loss], dtype=torch.float64)
        dist.all_reduce(total)
        formula = 2 * 4 * width * (len(batch.tokens) + (slots if option == "embed" else 0))
        rows[option] = {"bytes": int(total[0]), "formula": formula, "loss": float(total[1])}
    rows["row"] = {"tokens": len(batch.tokens), "visual": slots, "width": width}
    if hw.rank == 0:
        write_json(Path(args.out) / "bytes.json", rows)


def count_bytes(args: Args) -> dict:
    """Start the two processes and return what they counted: {option: {bytes, formula, loss}}, and
    {tokens, visual, width} as `row`. Raises UserError if they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "lab.mmtp_options", f"--out={Path(args.out).resolve()}",
               f"--depths={args.depths}", f"--seed={args.seed}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"the two processes ended with code {done.returncode}: see above")
    return read_json(Path(args.out) / "bytes.json")


def run(args: Args):
    check_options(args)
    if "RANK" in os.environ:
        return stage(args)
    rows = count_bytes(args)
    row = rows.pop("row")
    print(f"a row of {row['tokens']} tokens, {row['visual']} of them visual, width {row['width']}, "
          "fp32, both directions")
    for option, r in rows.items():
        print(f"{option:<6} {r['bytes']:>9,} bytes cross the cut; by the formula "
              f"2 x 4 x W x {'(T + V)' if option == 'embed' else 'T':<7} {r['formula']:>9,}")


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
