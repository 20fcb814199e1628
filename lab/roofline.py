"""One step of pretraining on a GPU that is not here, by the roofline model of lib/roofline.py.

    python -m lab.roofline --size=base --rows=4 --row_tokens=16384 --on=8xH100
    python -m lab.roofline --size=base --rows=4 --row_tokens=16384 --mtp        the MTP head learns
    python -m lab.roofline --size=base --rows=1 --row_tokens=65536 --memory=recompute

A row of the gym's own samples is drawn and packed; the step then runs on meta tensors, as that of
pretrain.py. Printed are, for forward, backward and update: launches, FLOPs, bytes and time; then
memory by kind, and the lines of ours that take most of the time. All of it is computed, nothing
measured. What stands between a step and the machine's peak can be read from it: operations that
only move bytes, launches that the host is too slow for, an update that rows are too few to pay for.
"""
import linecache
from dataclasses import dataclass
from typing import Annotated, Literal

import pretrain
from data import Packer, parse_mix, sight, Stream
from lib.cli import check_options, cli, main, Natural, Positive, Range, Seed
from lib.common import ROOT
from lib.roofline import find_machine, Trace
from model import sized


@dataclass
class Args:
    size: Literal["tiny", "mini", "small", "base"] = "base"
    rows: Positive = 4            # packed rows a step on each GPU
    row_tokens: Annotated[int, Range(32, 2 ** 24)] = 16384  # tokens a row
    mtp: bool = False             # a step of the run's last part, in which the MTP head learns
    memory: str = "none"          # or recompute, offload; by part: vit:offload,decoder:recompute
    chunk_patches: Natural = 0    # patches encoded at a time; 0: all
    on: str = "H100"              # A100, H100, H200, B200, or several, as 8xH100
    lines: Positive = 10          # operations and lines of ours to list
    seed: Seed = 0                # of the samples


def trace_step(args: Args) -> tuple[Trace, float, dict]:
    """The step, the FLOPs that the model needs in it on one GPU, and what the row holds."""
    machine, config = find_machine(args.on), sized(args.size)
    options = pretrain.Args(size=args.size, rows=args.rows * machine.count,
                            row_tokens=args.row_tokens, memory=args.memory,
                            chunk_patches=args.chunk_patches)
    pretrain.check(options)
    mix = parse_mix(pretrain.MIX, sight(config))
    stream = Stream(config, mix, args.seed, levels=options.levels)
    row = Packer(stream, args.row_tokens).row()
    tokens, learnt, images, patches = pretrain.count([row], config.vision.patch_size)
    depths = options.mtp if args.mtp else 0
    model, trace = pretrain.trace_step(machine, options, config, row, depths)
    flops = args.rows * model.flops(tokens, patches, learnt, depths)
    return trace, flops, {"tokens": tokens, "learnt": learnt, "images": images, "patches": patches}


def print_step(args: Args, trace: Trace, flops: float, row: dict):
    """Print the step as a table."""
    machine, ms = trace.machine, 1000
    print(f"{args.size} on {machine}, {args.rows} rows of {args.row_tokens} tokens a GPU, "
          f"{'with' if args.mtp else 'without'} MTP, --memory={args.memory}; computed, not "
          "measured")
    print(f"a row: {row['tokens']} tokens ({row['tokens'] / args.row_tokens:.0%} full), of which "
          f"{row['learnt']} are learnt; {row['images']} images, {row['patches']} patches\n")
    print(f"{'':<14}{'launches':>9}{'TFLOP':>9}{'GB':>9}{'ms':>9}   of it products and attention")
    for phase in ("forward", "backward", "update", ""):
        cost, products = trace.total(phase), trace.total(phase, products=True)
        print(f"{phase or 'all':<14}{cost.launches:>9,}{cost.flops / 1e12:>9.2f}"
              f"{cost.bytes / 1e9:>9.1f}{ms * cost.seconds:>9.1f}{ms * products.seconds:>9.1f} ms")
    print(f"\nhost          {ms * trace.host_seconds:9.1f} ms to launch, beside the GPU"
          + (": the GPU waits for it" if trace.host_seconds >= trace.seconds else ""))
    if machine.count > 1:
        print(f"other GPUs    {ms * trace.exposed:9.1f} ms waited for, to send "
              f"{trace.sent / 1e9:.2f} GB")
    print(f"step          {ms * trace.seconds:9.1f} ms; MFU {trace.mfu(flops):.1%} ("
          f"{flops / 1e12:.1f} TFLOP that the model needs, {machine.peak / 1e12:,.0f} TFLOP/s), "
          f"{args.rows * args.row_tokens * machine.count / trace.seconds:,.0f} tokens/s")
    memory = trace.memory()
    print(f"memory        {memory.pop('total') / 2 ** 30:9.2f} GiB of "
          f"{machine.memory / 2 ** 30:.1f} at most: "
          + ", ".join(f"{kind} {n / 2 ** 30:.2f}" for kind, n in memory.items()))
    print(f"\n{'ms':>9} launches   the dearest operations that only move bytes")
    moves = [(cost, *key) for key, cost in trace.costs.items() if not cost.flops]
    for cost, phase, name in sorted(moves, key=lambda x: -x[0].seconds)[:args.lines]:
        print(f"{ms * cost.seconds:9.2f}{cost.launches:9,}   {name} ({phase})")
    print(f"\n{'ms':>9} launches   the dearest lines of ours, with their backward")
    for line, cost in trace.dearest(args.lines):
        print(f"{ms * cost.seconds:9.2f}{cost.launches:9,}   {line:<24} {source_of(line)}")


def source_of(line: str) -> str:
    """The text of "model.py:210"."""
    name, _, number = line.partition(":")
    return linecache.getline(str(ROOT / name), int(number)).strip() if number else ""


def run(args: Args):
    check_options(args)
    print_step(args, *trace_step(args))


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
