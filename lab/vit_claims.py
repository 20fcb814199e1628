"""Does two-teacher distillation pay? The claims about train_vit.py, over seeds, as a report.

    python -m lab.vit_claims                 one seed; what was interrupted goes on
    python -m lab.vit_claims --seeds=3       about twenty minutes a seed on one quiet core
    python -m lab.vit_claims --labels=600 --out=out/labels     and if the second teacher knew more?
    python -m lab.vit_claims --big=65536     instead: one align step of 64K and one of 1,024

For each seed: both stand-in teachers, then students of both and of either alone, then alignment of
the first. Beside them a tower of random weights. Every figure is a probe of train_vit.py on
held-out pictures.

Our texture stand-in goes on from the semantic one and adds little. With `--labels` a tower stands
in its place that has been told, patch by patch, which shape lies there: no stand-in any more, but a
second teacher that certainly knows what the first does not. It asks whether the method fails or
only that teacher.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import train_vit
from lib.captions import scene
from lib.checkpoint import load_tower
from lib.cli import cli, main, UserError
from lib.common import (checkpoints, find_checkpoint, ROOT, same_options, save_checkpoint, setup,
                        write_json)
from lib.images import pack
from lib.probes import Exam, patch_labels, probe, probe_random_weights
from lib.tensors import save_tensors
from model import init, sized
from optim import OptimConfig, Optimizer, schedule
from tasks.draw import SHAPES

STUDENTS = {"both": {}, "semantic": {"teachers": "semantic"}, "texture": {"teachers": "texture"}}


@dataclass
class Args:
    seeds: int = 1                # how many, from 0
    steps: int = 500              # of each student and of the alignment
    teacher_steps: int = 800      # of the semantic stand-in; a fifth of it of the other
    labels: int = 0               # steps of a texture teacher that is taught with labels; 0: none
    batch: int = 64               # images a step
    big: int = 0                  # global batch of the memory test; 0: the other claims
    micro: int = 128              # images at a time in the memory test
    out: str = "out/vit_claims"   # run folder: report.json, a folder a seed
    device: str = "auto"          # auto, cpu, cuda or mps
    dtype: str = "auto"           # auto, float32 or bfloat16


def stage(args: Args, hw, name: str, folder: Path, seed: int, **changes) -> dict:
    """Run one stage, or what is left of it, and return its figures."""
    settings = train_vit.check(train_vit.Args(
        stage="all", steps=args.teacher_steps if name in ("semantic", "texture") else args.steps,
        batch=args.batch, seed=seed, out=str(folder), resume=True, save_every=100, eval_every=250,
        log_every=50, device=args.device, dtype=args.dtype, workers=0, **changes))
    train_vit.train(name, replace(settings, steps=train_vit.steps_of(name, settings)), hw)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))["figures"][name]


def taught(args: Args, hw, folder: Path, seed: int, exam: Exam) -> dict:
    """A texture teacher that is told the shape under each patch, if there is none; its figures."""
    config, out = sized("tiny"), folder / "texture"
    visual = train_vit.tower(train_vit.Args(), config)
    model = nn.ModuleDict({"visual": visual, "head": nn.Linear(
        config.vision.hidden_size, 1 + len(SHAPES))})
    init(model, seed)
    model.to(hw.device)
    if checkpoints(out):
        load_tower(visual, find_checkpoint(out))
        return probe(visual, exam)
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    for step in range(args.labels):
        first = 10 ** 7 + seed * 10 ** 6 + step * args.batch
        drawn = [scene(first + i) for i in range(args.batch)]
        patches, grids = pack([np.asarray(image) for image, _ in drawn], config.vision)
        kinds = [patch_labels(*pair, config.vision.patch_size) for pair in drawn]
        said = model["head"](visual(patches.to(hw.device), grids.to(hw.device)))
        loss = F.cross_entropy(said, torch.cat(kinds).to(hw.device))
        loss.backward()
        optimizer.accumulate()
        optimizer.step(schedule(step, args.labels, 20, "cosine"))
        if step % 50 == 49:
            print(f"labels {step + 1}/{args.labels} | loss {loss.item():.4f}", flush=True)

    def write(at):
        write_json(at / "config.json", {"stage": "labels", "vision_config": asdict(config.vision)})
        save_tensors(at / "model.safetensors", optimizer.masters)

    save_checkpoint(out, args.labels, write)
    return probe(visual, exam)


def one_seed(args: Args, hw, seed: int) -> dict[str, dict]:
    """{model: its figures}"""
    folder = Path(args.out) / f"seed{seed}"
    exam = Exam(sized("tiny"), 64)
    blank = train_vit.tower(train_vit.Args(), exam.config)
    found = {"random": probe_random_weights(blank, exam, seed)}
    found["teacher semantic"] = stage(args, hw, "semantic", folder, seed)
    found["teacher texture"] = (taught(args, hw, folder, seed, exam) if args.labels else
                                stage(args, hw, "texture", folder, seed))
    for name, changes in STUDENTS.items():
        # A student's folder is its own; the teachers are those of the seed.
        own = folder if name == "both" else folder / f"of_{name}"
        for teacher in ("semantic", "texture"):
            if own != folder and not (own / teacher).exists():
                own.mkdir(parents=True, exist_ok=True)
                (own / teacher).symlink_to(folder.resolve() / teacher)
        found[f"student of {name}"] = stage(args, hw, "distill", own, seed, **changes)
    found["aligned"] = stage(args, hw, "align", folder, seed)
    return found


def verdicts(found: dict[str, dict]) -> dict[str, float]:
    """What was aimed at, as numbers that should be above the one behind their name."""
    def worth(name):
        return found[name]["linear"] + found[name]["dense"]

    both, aligned = found["student of both"], found["aligned"]
    return {
        "linear probe, points over random (20)": 100 * (both["linear"] - found["random"]["linear"]),
        "linear + dense, points over the better single teacher's student (0)": 100 * (
            worth("student of both") - max(worth("student of semantic"),
                                           worth("student of texture"))),
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
    if args.seeds < 1 or args.labels < 0:
        raise UserError("--seeds takes 1 or more, --labels 0 or more")
    hw = setup(args.device, args.dtype)
    asked = {name: getattr(args, name) for name in ("steps", "teacher_steps", "labels", "batch")}
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


def memory(args: Args):
    """One align step each, in a process of its own so that its peak memory is its own."""
    rows = {}
    for batch in (1024, args.big):
        began = time.time()
        done = subprocess.run(
            [sys.executable, "train_vit.py", "--stage=align", "--steps=1", f"--batch={batch}",
             f"--micro={args.micro}", "--budgets=16", "--workers=0", f"--device={args.device}",
             f"--dtype={args.dtype}", f"--out={Path(args.out).resolve() / f'batch{batch}'}"],
            cwd=ROOT, env={**os.environ})
        if done.returncode:
            raise UserError(f"the step with {batch} pairs ended with code {done.returncode}")
        # The kernel keeps the largest of all children so far: the small batch goes first.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
        rows[f"batch {batch}"] = {"peak GiB": peak, "seconds": time.time() - began}
        print(f"batch {batch}: {peak:.2f} GiB at most, {time.time() - began:.0f} s in all")
    write_json(Path(args.out) / "memory.json", {"micro": args.micro, "figures": rows})


if __name__ == "__main__":
    chosen = cli(Args, about=__doc__)
    main(memory if chosen.big else claims, chosen)
