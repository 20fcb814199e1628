"""What should the MTP head read at visual slots? The paper's ablation, and what each option sends.

    python -m lab.mmtp_options                       3 options, 3 seeds, 400 steps: half an hour
    python -m lab.mmtp_options --steps=60 --seeds=1  a first look
    python -m lab.mmtp_options --bytes               only the table of bytes, seconds

Every option trains the same model on the same samples in the same order, with the head from the
first step on. The paper finds the loss of `token` slightly below that of `embed` from step 300 on
at 0.5B, and steadier [C]. The page says what we find, and the least difference that this many seeds
could have shown.

The second part cuts the model in two halves on two processes (plain send and receive, forward and
backward) and counts the bytes that cross the cut: only `embed` has to send visual embeddings to the
half with the head, and their gradients back.
"""
import html
import json
import math
import os
import statistics
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
from lab.drawing import curve, smooth, STYLE
from lib.checkpoint import load_model
from lib.cli import check_options, cli, main, Positive, Range, UserError
from lib.common import read_log, ROOT, write_json
from lib.runs import same_options
from model import GLMV, sized

ONE_SEED = "one seed has no spread, so no difference between options can be told from chance"
KINDS = {"image-heavy": "point,gui_click,shape_attr,ocr_line", "text only": "text,code"}


@dataclass
class Args:
    steps: Positive = 400         # of each run
    seeds: Positive = 3           # runs of each option
    depths: Annotated[int, Range(1, 16)] = 3  # how many tokens ahead the head predicts
    mix: str = "shape_attr,ocr_line,point,gui_click,text:0.5"  # samples, as in pretrain.py
    out: str = "out/mmtp_options"  # run folder
    bytes: bool = False           # only count the bytes that cross a pipeline cut


# ---- the ablation -------------------------------------------------------------------------------

def train(option: str, seed: int, args: Args) -> Path:
    """Train one run, or go on where an earlier call has stopped. Returns its run folder."""
    out = Path(args.out) / f"{option}-{seed}"
    if not (out / f"step_{args.steps:06d}").exists():
        pretrain.run(pretrain.Args(
            steps=args.steps, mix=args.mix, levels=1, seed=seed, mtp=args.depths, mtp_share=1.0,
            image_option=option, out=str(out), resume=True, eval_every=0, log_every=100,
            workers=0, dtype="float32"))
    return out


@torch.no_grad()
def acceptance(folder: Path, option: str, mix: str, depths: int, seed: int = 7) -> list[float]:
    """At each depth, how often the head predicts the trunk's own choice of a token that the loss
    counts, where it did so at all smaller depths: the rates at which drafts would be accepted."""
    model = load_model(folder)
    packer = Packer(Stream(model.config, parse_mix(mix), seed, "test"), 2048)
    tested, accepted = [0] * depths, [0] * depths
    for _ in range(4):
        batch = collate(packer.row(), model.config)
        merged = model.encode_images(batch)
        hidden = model(batch, merged)
        choice = model.lm_head(hidden).argmax(-1)   # of token i+1, at position i
        alive = torch.ones(len(hidden), dtype=torch.bool)
        for k, state in enumerate(mmtp.states(model, hidden, batch, merged, depths, option), 1):
            at = state.kept
            right = mmtp.logits(model, state.hidden).argmax(-1) == choice.roll(-k)[at]
            counts = alive[at] & state.counts & (batch.weights[state.target] > 0)
            tested[k - 1] += int(counts.sum())
            accepted[k - 1] += int((counts & right).sum())
            alive = torch.zeros_like(alive).index_put((at,), counts & right)
    return [a / max(1, t) for a, t in zip(accepted, tested)]


def spread(values: list[float]) -> str:
    """Mean and standard deviation as text."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def ablation(args: Args) -> dict:
    """Train all runs. Returns the table {option: {figure: one value a run}} and the curves of the
    loss at depth 1."""
    table, curves = {}, {}
    for option in mmtp.OPTIONS:
        runs = [train(option, seed, args) for seed in range(args.seeds)]
        logs = [read_log(run / "log.jsonl") for run in runs]
        for run, log in zip(runs, logs):
            if len(log) != args.steps:
                raise UserError(f"{run}/log.jsonl has {len(log)} whole lines for {args.steps} "
                                f"steps: remove {run} to train it again")
        tail = [log[-max(1, args.steps // 5):] for log in logs]  # the last fifth
        table[option] = {
            "loss": [statistics.mean(x["loss"] for x in log) for log in tail],
            **{f"mtp{k}": [statistics.mean(x[f"mtp{k}"] for x in log) for log in tail]
               for k in range(1, args.depths + 1)},
            # gradient spikes: steps whose norm is over three times the median
            "spikes": [sum(x["norm"] > 3 * statistics.median(y["norm"] for y in log)
                           for x in log) / len(log) for log in logs],
            "acceptance": {kind: [acceptance(run / f"step_{args.steps:06d}", option, mix,
                                             args.depths) for run in runs]
                           for kind, mix in KINDS.items()}}
        mean = [statistics.mean(log[i]["mtp1"] for log in logs) for i in range(args.steps)]
        curves[option] = smooth(list(enumerate(mean, 1)))
    return {"table": table, "curves": curves}


def least_difference(table: dict, key: str) -> float | None:
    """The least difference between the means of two options that is significant at 95% with so
    many seeds: a t test with the std pooled over all options. None for one seed, which has no
    std."""
    groups = [row[key] for row in table.values()]
    n, free = len(groups[0]), sum(len(g) - 1 for g in groups)
    if not free:
        return None
    pooled = math.sqrt(sum(statistics.variance(g) * (len(g) - 1) for g in groups) / free)
    t = {3: 3.18, 6: 2.45, 9: 2.26, 12: 2.18}.get(free, 2.0)    # two-sided, by degrees of freedom
    return t * pooled * math.sqrt(2 / n)


# ---- what crosses a pipeline cut ----------------------------------------------------------------

class Wire:
    """Sends and receives tensors and counts the bytes sent: hidden states and gradients, no ids."""
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
        x = decoder.embed_tokens(batch.tokens).index_copy(0, slots, merged)
        for i in range(cut):
            x = decoder.layers[i](x, rope, segments, i)
        Wire.send(x.detach(), 1)
        if option == "embed":
            Wire.send(merged.detach(), 1)
        grads = [Wire.receive(shape, 1)]
        if option == "embed":
            grads.append(Wire.receive(merged.shape, 1))
        torch.autograd.backward([x, merged][:len(grads)], grads)
        return 0.0
    x, merged = Wire.receive(shape, 0).requires_grad_(), None
    if option == "embed":
        merged = Wire.receive((len(slots), shape[1]), 0).requires_grad_()
    h = x
    for i in range(cut, c.text.num_hidden_layers):
        h = decoder.layers[i](h, rope, segments, i)
    hidden = decoder.norm(h)
    loss = linear_cross_entropy(hidden[:-1], model.lm_head.weight, batch.tokens[1:],
                                batch.weights[1:])
    loss = loss + 0.1 * sum(mmtp.losses(model, hidden, batch, merged, depths, option))
    loss.backward()
    Wire.send(x.grad, 0)
    if option == "embed":
        Wire.send(merged.grad, 0)
    return loss.item()


def example(args: Args):
    """A model with a head, and a batch of tasks with pictures."""
    model = GLMV(sized("tiny"), 0)
    mmtp.attach(model, args.depths)
    row = Packer(Stream(model.config, parse_mix(KINDS["image-heavy"])), 2048).row()
    return model, collate(row, model.config)


def stage(args: Args):
    """What each of the two processes that torchrun has started does: run all options. Rank 0 writes
    bytes.json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
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
    if dist.get_rank() == 0:
        write_json(Path(args.out) / "bytes.json", rows)
    dist.destroy_process_group()


def count_bytes(args: Args) -> dict:
    """Start the two processes, print and return what they counted: {option: bytes, formula, loss}.
    Raises UserError if they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "lab.mmtp_options", "--bytes", f"--out={Path(args.out).resolve()}",
               f"--depths={args.depths}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          text=True, capture_output=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"the two processes failed: {lines[-1]}")
    rows = json.loads((Path(args.out) / "bytes.json").read_text(encoding="utf-8"))
    row = rows.pop("row")
    print(f"a row of {row['tokens']} tokens, {row['visual']} of them visual, width {row['width']}, "
          "fp32, both directions")
    for option, r in rows.items():
        print(f"{option:<6} {r['bytes']:>9,} bytes cross the cut; by the formula "
              f"2 x 4 x W x {'(T + V)' if option == 'embed' else 'T':<7} {r['formula']:>9,}")
    return rows


# ---- the page -----------------------------------------------------------------------------------

def page(found: dict, sent: dict, args: Args) -> str:
    """The results of `ablation` and `count_bytes` as an HTML page."""
    table = found["table"]
    keys = ["loss", *(f"mtp{k}" for k in range(1, args.depths + 1)), "spikes"]
    rows = [f"<tr><th>{'</th><th>'.join(['option', *keys])}</th></tr>"]
    rows += [f"<tr><td>{option}</td>" + "".join(f"<td>{spread(row[k])}</td>" for k in keys)
             + "</tr>" for option, row in table.items()]
    if args.seeds > 1:
        rows.append("<tr><td>least difference</td>" + "".join(
            f"<td>{least_difference(table, k):.3f}</td>" for k in keys) + "</tr>")
        least = "Least difference between two options: what so many seeds would show at 95%."
    else:
        least = ONE_SEED[0].upper() + ONE_SEED[1:] + "."
    kinds = [f"<tr><td>{option}</td><td>{html.escape(kind)}</td>" + "".join(
        f"<td>{spread([run[k] for run in runs])}</td>" for k in range(args.depths)) + "</tr>"
        for option, row in table.items() for kind, runs in row["acceptance"].items()]
    sizes = [f"<tr><td>{option}</td><td>{r['bytes']:,}</td><td>{r['formula']:,}</td></tr>"
             for option, r in sent.items()]
    heads = "".join(f"<th>depth {k}</th>" for k in range(1, args.depths + 1))
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>MMTP options</title>'
            f"<style>{STYLE}</style><body><h1>What the MTP head reads at visual slots</h1>"
            f'<p class="quiet">{args.seeds} seed{"s" * (args.seeds > 1)}, {args.steps} steps each, '
            "same samples in the same order; means over the last fifth of the steps ± std over "
            "seeds. Spikes: share of steps whose gradient norm is over three times the median. "
            f"{least}</p>"
            + curve(found["curves"], "MTP loss at depth 1, mean over seeds")
            + f"<table>{''.join(rows)}</table><h2>Agreement with the trunk, held-out tasks</h2>"
            f"<table><tr><th>option</th><th>prompts</th>{heads}</tr>{''.join(kinds)}</table>"
            "<h2>Bytes across a pipeline cut, a row forward and backward</h2>"
            "<table><tr><th>option</th><th>counted</th><th>formula</th></tr>"
            f"{''.join(sizes)}</table></body></html>\n")


def run(args: Args):
    check_options(args)
    if "RANK" in os.environ:
        return stage(args)
    Stream(sized("tiny"), parse_mix(args.mix))      # refuses a wrong --mix before anything is run
    sent = count_bytes(args)
    if args.bytes:
        return
    asked = {"steps": args.steps, "depths": args.depths, "mix": args.mix}
    with same_options(Path(args.out) / "config.json", asked):
        found = ablation(args)
    write_json(Path(args.out) / "report.json", {"table": found["table"], "bytes": sent})
    for option, row in found["table"].items():
        print(f"{option:<6} loss {spread(row['loss'])}  " + "  ".join(
            f"depth {k} {spread(row[f'mtp{k}'])}" for k in range(1, args.depths + 1)))
    print(ONE_SEED if args.seeds == 1 else "least difference that could be seen: " + ", ".join(
        f"depth {k} {least_difference(found['table'], f'mtp{k}'):.3f}"
        for k in range(1, args.depths + 1)))
    path = Path(args.out) / "report.html"
    path.write_text(page(found, sent, args), encoding="utf-8")
    print(f"the page is {path}")


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
