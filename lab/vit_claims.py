"""Do two teachers make a better student than one? Distillation by train_vit.py, over seeds.

    python -m lab.vit_claims                 one seed; an interrupted run goes on
    python -m lab.vit_claims --seeds=3       up to twenty minutes a seed on one quiet core
    python -m lab.vit_claims --steps=1500 --seeds=3       two teachers need more steps to win
    python -m lab.vit_claims --big=65536     instead: the memory of an align step of 64K pairs

For each seed: both stand-in teachers, then a student of both and one of either alone. Every figure
is a probe of train_vit.py on held-out pictures. The lab sheets `two_teachers` and `big_batch` are
made from the same functions.

The texture teacher learns from labels which shape is under each patch. It did not always: the first
one distilled itself (now lab/dino.py), added little to the semantic one, and two teachers were no
better than one. Figures of LOG.md that name `--labels` were measured with today's kind of teacher,
the others with the former.
"""
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import train_vit
from lab.worlds import spread
from lib.cli import check_options, cli, Device, Dtype, main, Natural, Positive, Range, UserError
from lib.common import read_json, ROOT, setup, write_json
from lib.probes import RANDOM
from lib.runs import same_options

TEACHERS = "semantic", "texture"
# {student: further options of train_vit.py}
STUDENTS = {"both": {}, "semantic": {"teachers": "semantic"}, "texture": {"teachers": "texture"}}


@dataclass
class Args:
    seeds: Positive = 1           # how many, from 0
    steps: Positive = 500         # of each student
    teacher_steps: Positive = 800   # of each stand-in teacher
    batch: Positive = 64          # images a step
    probes: Annotated[int, Range(16)] = 1024    # pictures that a probe is fitted on; scored on half
    big: Natural = 0              # pairs of a step whose memory is measured; 0: compare students
    micro: Positive = 128         # of these at a time
    out: str = "out/vit_claims"   # run folder: report.json, a folder a seed; or memory.json
    device: Device = "auto"       # auto, cpu, cuda or mps
    dtype: Dtype = "auto"         # auto, float32 or bfloat16


# ---- teachers and students ----------------------------------------------------------------------

def stage(args: Args, hw, name: str, folder: Path, seed: int, **options) -> dict[str, float]:
    """Run a stage of train_vit.py, or the rest of it, with further options of that script. Returns
    its figures."""
    steps = args.teacher_steps if name in TEACHERS else args.steps
    settings = train_vit.check(train_vit.Args(
        stage="all", steps=steps, batch=args.batch, seed=seed, out=str(folder), resume=True,
        save_every=100, eval_every=250, log_every=50, probes=args.probes, device=args.device,
        dtype=args.dtype, workers=0, **options))
    train_vit.train(name, settings, hw)
    return read_json(folder / "report.json")["figures"][name]


def student(args: Args, hw, name: str, folder: Path, seed: int) -> dict[str, float]:
    """Train a student, one of STUDENTS, of the teachers in `folder`, and return its figures."""
    own = folder
    if name != "both":      # a folder of its own, with links to the teachers
        own = folder / f"of_{name}"
        own.mkdir(parents=True, exist_ok=True)
        for teacher in TEACHERS:
            if not (own / teacher).exists():
                (own / teacher).symlink_to(Path("..") / teacher)
    return stage(args, hw, "distill", own, seed, **STUDENTS[name])


def one_seed(args: Args, hw, seed: int) -> dict[str, dict]:
    """{model: its figures} of the teachers and students of a seed; first of all random weights."""
    folder = Path(args.out) / f"seed{seed}"
    found = {f"teacher {name}": stage(args, hw, name, folder, seed) for name in TEACHERS}
    found |= {f"student of {name}": student(args, hw, name, folder, seed) for name in STUDENTS}
    return {"random": read_json(folder / "report.json")["figures"][RANDOM], **found}


def aims(found: dict[str, dict]) -> dict[str, float]:
    """{aim (threshold): figure} of a seed; an aim is met if its figure exceeds its threshold."""
    def both_probes(name):
        row = found[f"student of {name}"]
        return 100 * (row["linear"] + row["dense"])

    linear = found["student of both"]["linear"] - found["random"]["linear"]
    return {
        "linear probe, points over random (20)": 100 * linear,
        "linear + dense, points over the better single teacher's student (0)":
            both_probes("both") - max(both_probes(name) for name in TEACHERS)}


def compare_students(args: Args):
    hw = setup(args.device, args.dtype)
    figures, of_seeds = {}, []
    asked = {name: value for name, value in asdict(args).items()
             if name not in ("seeds", "big", "micro", "out")}
    for seed in range(args.seeds):
        with same_options(Path(args.out) / "config.json", asked):
            found = one_seed(args, hw, seed)
        of_seeds.append(aims(found))
        figures |= {f"seed {seed}: {name}": row for name, row in found.items()}
        figures[f"seed {seed}: aims"] = of_seeds[-1]
        for name, value in of_seeds[-1].items():
            print(f"seed {seed}  {value:8.1f}  {name}", flush=True)
        means = {name: spread([row[name] for row in of_seeds]) for name in of_seeds[0]}
        write_json(Path(args.out) / "report.json", {
            "title": "one teacher or two", "where": hw.description, "figures": means | figures})
    print(f"figures in {args.out}/report.json; python -m lab.report {args.out} makes the page")


# ---- the memory of a step -----------------------------------------------------------------------

def one_step(args: Args, batch: int, seed: int = 0) -> dict[str, float]:
    """{peak GiB, seconds} of a process that does one align step of `batch` pairs. Raises UserError
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


def compare_memory(args: Args):
    """Peak memory of one align step with a small batch and with a large one."""
    rows = {}
    for batch in (1024, args.big):
        row = rows[f"batch {batch}"] = one_step(args, batch)
        print(f"batch {batch}: {row['peak GiB']:.2f} GiB at most, {row['seconds']:.0f} s in all",
              flush=True)
    write_json(Path(args.out) / "memory.json", {"micro": args.micro, "figures": rows})


def run(args: Args):
    check_options(args)
    if args.big:
        compare_memory(args)
    else:
        compare_students(args)


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__)))
