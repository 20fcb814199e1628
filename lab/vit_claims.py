"""Does two-teacher distillation pay? The claims about train_vit.py, over seeds, as a report.

    python -m lab.vit_claims                 one seed; an interrupted run goes on
    python -m lab.vit_claims --seeds=3       about twenty minutes a seed on one quiet core
    python -m lab.vit_claims --steps=1500 --seeds=3       two teachers need more steps to win
    python -m lab.vit_claims --big=65536     instead: one align step of 64K and one of 1,024

For each seed: both stand-in teachers, then students of both and of either alone, then alignment of
the first. The baseline is a tower of random weights. Every figure is a probe of train_vit.py on
held-out pictures.

The texture teacher learns from labels which shape is under each patch. It did not always: the first
one distilled itself (now lab/dino.py), added little to the semantic one, and two teachers were no
better than one. Figures of LOG.md that name `--labels` were measured with today's kind of teacher,
the others with the former.
"""
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import train_vit
from lib.cli import (check_options, cli, Device, Dtype, main, Natural, Positive, Range, UserError)
from lib.common import read_json, ROOT, setup, write_json
from lib.probes import probe_random_weights, ProbeSet
from lib.runs import same_options
from model import sized

STUDENTS = {"both": {}, "semantic": {"teachers": "semantic"}, "texture": {"teachers": "texture"}}


@dataclass
class Args:
    seeds: Positive = 1           # how many, from 0
    steps: Positive = 500         # of each student and of the alignment
    teacher_steps: Positive = 800   # of each stand-in teacher
    batch: Positive = 64          # images a step
    probes: Annotated[int, Range(16)] = 1024    # pictures that a probe is fitted on; scored on half
    big: Natural = 0              # global batch of the memory test; 0: the other claims
    micro: Positive = 128         # images at a time in the memory test
    out: str = "out/vit_claims"   # run folder: report.json, a folder a seed
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


def stage(args: Args, hw, name: str, folder: Path, seed: int, **changes) -> dict:
    """Run one stage, or the rest of it, and return its figures."""
    steps = args.teacher_steps if name in ("semantic", "texture") else args.steps
    settings = train_vit.check(train_vit.Args(
        stage="all", steps=steps, batch=args.batch, seed=seed, out=str(folder), resume=True,
        save_every=100, eval_every=250, log_every=50, probes=args.probes, device=args.device,
        dtype=args.dtype, workers=0, **changes))
    train_vit.train(name, settings, hw)
    return read_json(folder / "report.json")["figures"][name]


def student(args: Args, hw, name: str, folder: Path, seed: int) -> dict:
    """Train a student, one of STUDENTS, of the teachers in `folder`, and return its figures."""
    # Each student has a folder of its own, with links to the teachers of its seed.
    own = folder if name == "both" else folder / f"of_{name}"
    for teacher in ("semantic", "texture"):
        if own != folder and not (own / teacher).exists():
            own.mkdir(parents=True, exist_ok=True)
            (own / teacher).symlink_to(folder.resolve() / teacher)
    return stage(args, hw, "distill", own, seed, **STUDENTS[name])


def one_seed(args: Args, hw, seed: int) -> dict[str, dict]:
    """{model: its figures}"""
    folder = Path(args.out) / f"seed{seed}"
    probes = ProbeSet(sized("tiny"), 64, args.probes)
    untrained = train_vit.tower(train_vit.Args(), probes.config)
    found = {"random": probe_random_weights(untrained, probes, seed)}
    for teacher in ("semantic", "texture"):
        found[f"teacher {teacher}"] = stage(args, hw, teacher, folder, seed)
    for name in STUDENTS:
        found[f"student of {name}"] = student(args, hw, name, folder, seed)
    found["aligned"] = stage(args, hw, "align", folder, seed)
    return found


def verdicts(found: dict[str, dict]) -> dict[str, float]:
    """The aims, as {aim (threshold): figure}; an aim is met if its figure exceeds its threshold."""
    def total(name):
        return found[name]["linear"] + found[name]["dense"]

    both, aligned = found["student of both"], found["aligned"]
    return {
        "linear probe, points over random (20)": 100 * (both["linear"] - found["random"]["linear"]),
        "linear + dense, points over the better single teacher's student (0)": 100 * (
            total("student of both") - max(total("student of semantic"),
                                           total("student of texture"))),
        **{f"retrieval {way}_{language}, times chance (10)":
           aligned[f"{way}_{language}"] / aligned[f"chance_{language}"]
           for language in ("en", "zh") for way in ("i2t", "t2i")}}


def spread(figures: dict[str, dict]) -> dict[str, dict]:
    """{aim: mean, least and most over the seeds}"""
    rows = [row for name, row in figures.items() if name.endswith(": aims")]
    return {aim: {"mean": statistics.mean(row[aim] for row in rows),
                  "least": min(row[aim] for row in rows), "most": max(row[aim] for row in rows)}
            for aim in rows[0]}


def claims(args: Args):
    check_options(args)
    hw = setup(args.device, args.dtype)
    asked = {name: getattr(args, name) for name in ("steps", "teacher_steps", "batch")}
    report = {"title": "claims about the vision tower", "where": hw.description, "figures": {}}
    for seed in range(args.seeds):
        with same_options(Path(args.out) / "config.json", asked):
            found = one_seed(args, hw, seed)
        for name, row in found.items():
            report["figures"][f"seed {seed}: {name}"] = row
        report["figures"][f"seed {seed}: aims"] = verdicts(found)
        for name, value in verdicts(found).items():
            print(f"seed {seed}  {value:8.1f}  {name}")
        write_json(Path(args.out) / "report.json", {
            **report, "figures": spread(report["figures"]) | report["figures"]})
    print(f"figures in {args.out}/report.json; python -m lab.report {args.out} makes the page")


def one_step(args: Args, batch: int, seed: int = 0) -> dict[str, float]:
    """{peak GiB, seconds} of a process that does one align step of so many pairs. Raises UserError
    if it fails."""
    began, out = time.time(), Path(args.out).resolve() / f"batch{batch}"
    process = subprocess.Popen(
        [sys.executable, "train_vit.py", "--stage=align", "--steps=1", f"--batch={batch}",
         f"--micro={args.micro}", "--budgets=16", "--workers=0", f"--seed={seed}",
         f"--probes={args.probes}", f"--device={args.device}", f"--dtype={args.dtype}",
         f"--out={out}"], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)     # what this process used, not all children
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the step with {batch} pairs ended with code {process.returncode}")
    # KiB, but bytes on macOS.
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return {"peak GiB": usage.ru_maxrss / unit, "seconds": time.time() - began}


def memory(args: Args):
    """Peak memory of one align step with a small batch and with a large one."""
    rows = {}
    for batch in (1024, args.big):
        row = rows[f"batch {batch}"] = one_step(args, batch)
        print(f"batch {batch}: {row['peak GiB']:.2f} GiB at most, {row['seconds']:.0f} s in all")
    write_json(Path(args.out) / "memory.json", {"micro": args.micro, "figures": rows})


def run(args: Args):
    return memory(args) if args.big else claims(args)


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
