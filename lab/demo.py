"""The whole pipeline on a laptop in about eleven minutes, with a report.

    python -m lab.demo                    on 2 cores without a GPU or a network
    python -m lab.demo --seed=1 --out=out/demo1
    python -m lab.demo --tower_steps=0 --rows=2 --rl_steps=0 --out=out/longer     pretraining only
    python -m lab.demo --keep=out/kept    also write the weights there, in bf16

Every stage of the paper, small:

1. A vision tower: two teachers are trained, a student is distilled from both, and the student is
   aligned with captions (train_vit.py).
2. Pretraining from that tower on six categories of the gym (pretrain.py).
3. Evaluation on held-out tasks, with pictures and with grey ones instead (sample.py).
4. Questions and answers, for the report.
5. Joint RL (rl.py), where it helps: demonstrations are wrong or missing. Two experiments of
   lab/worlds.py run side by side. In `fallible` the annotators make mistakes in 60% of the answers
   in which a mistake is possible; in `untold` no demonstration shows how a form is filled in.

An interrupted demo goes on where it stopped when it is started again. The run folder gets
report.json and report.html: each stage with the figure that it improves, tables, pictures, curves.
"""
import lib  # first of all, before torch: see lib/__init__.py

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import pretrain
import train_vit
from lab import report
from lib.checkpoint import load_model, save_model
from lib.cli import (check_options, cli, Count, Device, Levels, main, Natural, Positive, Seed,
                     UserError)
from lib.common import clock, cores, read_json, read_log, ROOT, setup, write_json
from lib.evaluation import evaluate, show
from lib.probes import RANDOM
from lib.runs import checkpoints, find_checkpoint, same_options, step_of
from tasks.draw import PAIRS
from tokenizer import tokenizer_of

# ---- settings: change them here -----------------------------------------------------------------

MIX = "shape_attr:1.5,counting:0.5,ocr_line:1.2,point:1.2,gui_click:1.4,gui_form:1.5"
ROW_TOKENS = 2048               # tokens of a packed row: about 45 questions; with twice as many
                                # and half the steps the model learns less (LOG.md)

PROBES = 256                    # pictures that a probe of the tower is fitted on

# The stages, as they are announced, with minutes on 2 idle cores.
STAGES = {
    "tower": ("a vision tower: two teachers, distillation, alignment", 2),
    "pretraining": ("pretraining on pictures, questions and answers", 7),
    "evaluation": ("evaluation on held-out seeds, words, colours and layouts", 0.5),
    "answers": ("questions and answers for the report", 0.1),
    "rl": ("joint RL, twice: from wrong demonstrations, and without demonstrations", 2)}

# Stages of the tower: share of its steps, images a step, learning rate. Captions need large batches
# and, in so few steps, half the usual rate; the other two make more of small batches.
TOWER = {"semantic": (1.23, 64, 2e-3), "texture": (1.08, 32, 4e-3), "distill": (0.92, 32, 8e-3),
         "align": (0.77, 64, 2e-3)}
PRETRAIN = {"mtp_alone": True, "mtp_share": 0.12, "save_every": 200, "eval_every": 100,
            "log_every": 50}    # options of pretrain.py besides those of Args
RL = {"seeds": 1, "count": 40, "prompts": 12}       # options of lab.worlds for both experiments
# Experiment: its name in the report, the checkpoint it starts from ("": the demo's), steps of SFT
# before it, the category that it is about.
WORLDS = {
    "fallible": ("wrong demonstrations", "", 80, "mean"),
    "untold": ("no demonstrations of forms", "ckpt/untold", 5, "gui_form")}

# The figure of lib/probes.py that each stage of the tower improves, and what it means.
IMPROVES = {
    "semantic": ("i2t_en", f"finds the caption of a picture, among {PROBES // 2}"),
    "texture": ("dense", "tells which shape a patch shows"),
    "distill": ("linear", "colour and shape, by a linear probe"),
    "align": ("zero_shot_en", f"names a shape, among {len(PAIRS)} names")}


@dataclass
class Args:
    tower_steps: Natural = 130    # a stage of the vision tower, on average; 0: from ckpt/semantic
    steps: Positive = 3000        # of pretraining
    rows: Positive = 1            # packed rows a step
    row_tokens: Positive = ROW_TOKENS   # tokens a row
    own_question: bool = True     # always ask a task's own question about its picture
    rl_steps: Natural = 9         # of RL in each of the two experiments; 0: no RL
    seed: Seed = 0                # of weights and samples
    count: Count = 300            # held-out tasks a category in the evaluation
    levels: Levels = 1            # levels of difficulty, trained and evaluated, from 0
    out: str = "out/demo"         # run folder
    keep: str = ""                # also write the weights here, in bf16
    device: Device = "auto"       # auto, cpu, cuda or mps


# ---- the stages ---------------------------------------------------------------------------------

def announce(stage: str):
    """Print the number of a stage and the minutes that it takes on 2 idle cores."""
    words, minutes = STAGES[stage]
    about = f"about {minutes:g} minutes" if minutes > 1 else "about a minute or less"
    print(f"\n{list(STAGES).index(stage) + 1}/{len(STAGES)} {words} ({about})")


def train_tower(args: Args) -> dict:
    """Run the stages of train_vit.py that are not done yet, and return its report.json: figures
    {stage: {figure: share}} and pictures of the features."""
    out, hw = Path(args.out) / "vit", setup(args.device)
    for stage, (share, batch, lr) in TOWER.items():
        settings = train_vit.Args(
            steps=max(1, round(share * args.tower_steps)), batch=batch, lr=lr, warmup=10,
            probes=PROBES, eval_every=0, log_every=50, out=str(out), resume=True, seed=args.seed,
            device=args.device)
        train_vit.train(stage, train_vit.check(settings), hw)
    return read_json(out / "report.json")


def improvements(figures: dict[str, dict]) -> dict[str, dict]:
    """The figure that each stage of the tower improves, in percent: {stage: {figure, random,
    before, after}}. Before it stands the tower with random weights; of a figure that needs
    captions, a blind guess, as only stages with a text tower have it."""
    rows = {}
    for stage, (key, meaning) in IMPROVES.items():
        if stage not in figures:        # a full disk is no reason to end here
            continue
        if key == "i2t_en":
            before = figures[stage]["chance_en"]
        elif key == "zero_shot_en":
            before = 1 / len(PAIRS)
        else:
            before = figures[RANDOM][key]
        rows[stage] = {"figure": f"{meaning}, %", "random": 100 * before, "before": 100 * before,
                       "after": 100 * figures[stage][key]}
    return rows


def run_pretraining(args: Args) -> Path:
    """Pretrain, from the newest checkpoint if there is one; returns the folder of the last."""
    run = Path(args.out) / "pretrain"
    done = [p for p in checkpoints(run) if step_of(p) == args.steps]
    if done:
        print(f"pretraining is done: {done[0]}")
        return done[0]
    tower = run.with_name("vit") / "align" if args.tower_steps else ROOT / "ckpt/semantic"
    pretrain.run(pretrain.Args(
        steps=args.steps, rows=args.rows, row_tokens=args.row_tokens, seed=args.seed, mix=MIX,
        own_question=args.own_question, levels=args.levels, out=str(run), resume=True,
        vit=str(tower), device=args.device, **PRETRAIN))
    return find_checkpoint(run)


def accuracy_row(table: dict) -> dict:
    """The row of pretraining: mean accuracy before (a blind guess) and after."""
    def mean(key):
        return 100 * sum(row[key] for row in table.values()) / len(table)

    return {"figure": "held-out tasks solved, %", "random": mean("chance"),
            "before": mean("chance"), "after": mean("accuracy")}


def start_world(name: str, args: Args, start: Path, out: Path) -> subprocess.Popen:
    """Start one experiment of lab.worlds with one thread, its output in a pipe."""
    _, checkpoint, before, _ = WORLDS[name]
    init = ROOT / checkpoint if checkpoint else start
    options = {**RL, "world": name, "before": before, "steps": args.rl_steps,
               "init": init.resolve(), "out": out}
    return subprocess.Popen(
        [sys.executable, "-m", "lab.worlds", *(f"--{k}={v}" for k, v in options.items())],
        cwd=ROOT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def two_worlds(args: Args, start: Path) -> dict[str, dict]:
    """Run both experiments side by side, each in a process of its own, and print their lines as
    they come. Returns {experiment and arm: {category: % right}} at the start, after RL, and after
    as many minutes of SFT. Raises UserError if one of them fails."""
    out = Path(args.out).resolve() / f"rl_{args.rl_steps}"
    runs = {name: start_world(name, args, start, out) for name in WORLDS}

    def forward_lines(name):
        for line in runs[name].stdout:
            print(f"  {name}: {line}", end="", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threads = [threading.Thread(target=forward_lines, args=(name,), daemon=True) for name in runs]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except SystemExit:          # a Ctrl-C reaches the processes without our help
        for run in runs.values():
            run.terminate()
        raise
    finally:                    # wait until they have saved what they have done
        codes = {name: run.wait() for name, run in runs.items()}
    figures = {}
    for name, code in codes.items():
        if code:
            raise UserError(f"the experiment `{name}` ended with code {code}: see above")
        found = read_json(out / name / "report.json")["figures"]
        for arm, row in (("start", "start"), ("RL", "rl, seed 0"), ("SFT, as long", "sft, seed 0")):
            figures[f"{WORLDS[name][0]}: {arm}"] = found[f"{row}, greedy"]
    return figures


def rl_rows(figures: dict[str, dict]) -> dict[str, dict]:
    """The rows of RL: accuracy before and after, for each experiment."""
    rows = {}
    for title, _, _, category in WORLDS.values():
        name = "held-out tasks" if category == "mean" else f"held-out tasks of {category}"
        rows[f"RL, {title}"] = {"figure": f"{name} solved, %",
                                "before": figures[f"{title}: start"][category],
                                "after": figures[f"{title}: RL"][category]}
    return rows


# ---- the report ---------------------------------------------------------------------------------

def print_stages(rows: dict[str, dict]):
    """The table of the report on the terminal."""
    for stage, row in rows.items():
        random = f"{row['random']:.1f}" if "random" in row else ""
        print(f"  {stage:<31} {row['figure']:<46} {random:>6} {row['before']:>6.1f} -> "
              f"{row['after']:.1f}")


def demo(args: Args):
    """Run all stages, print their results and write the report."""
    check_options(args)
    began, out = time.time(), Path(args.out)
    hw = setup(args.device)
    if hw.world > 1:
        raise UserError("the demo is one process; `torchrun pretrain.py` trains with several")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > cores():
        print(f"this machine is busy (load {os.getloadavg()[0]:.1f} on {cores()} cores): "
              "everything will take longer than announced")
    asked = {name: getattr(args, name) for name in (
        "tower_steps", "steps", "rows", "row_tokens", "own_question", "levels", "seed")}
    stages, pictures = {}, []
    with same_options(out / "config.json", asked):
        if args.tower_steps:
            announce("tower")
            tower = train_tower(args)
            pictures = [(f"vit/{name}", title) for name, title in tower["pictures"]]
            stages = improvements(tower["figures"])
            print_stages(stages)
        announce("pretraining")
        folder = run_pretraining(args)
    trained = sum(line["dt"] for line in read_log(folder.parent / "log.jsonl"))
    model = load_model(folder, hw.device, hw.dtype)
    tokens = tokenizer_of(model.config)
    announce("evaluation")
    table = evaluate(model, tokens, MIX, args.levels, args.count)
    show(table)
    stages["pretraining"] = accuracy_row(table)
    announce("answers")
    tasks = report.tasks_of(MIX, args.levels, model.config)
    samples = report.answer(model, tokens, tasks, out / "pictures")
    for s in samples:
        print(f"  {s['category']:<11} {s['question']}  {s['answer']}   (truth: {s['truth']})")
    facts = {
        "title": "nanoGLM-V demo", "hardware": hw.description, "machine": platform.platform(),
        "torch": torch.__version__, "seed": args.seed, "steps": args.steps,
        "parameters": model.counts(), "training_seconds": round(trained),
        "table": table, "samples": samples, "pictures": pictures}

    def write_report(figures):
        write_json(out / "report.json", {**facts, "seconds": round(time.time() - began),
                                         "stages": stages, "figures": figures})
        return report.write(out)

    page = write_report({})
    if args.keep:
        save_model(model, args.keep, torch.bfloat16)
        write_json(Path(args.keep) / "report.json", {
            "table": table, "steps": args.steps, "seed": args.seed, "hardware": hw.description})
        print(f"weights kept in {args.keep}")
    if args.rl_steps:
        announce("rl")
        figures = two_worlds(args, folder)
        stages |= rl_rows(figures)
        page = write_report(figures)
    print("\nwhat each stage improves (random weights or a blind guess, before -> after)")
    print_stages(stages)
    print(f"\n{clock(time.time() - began)} in all; the report is {page}")
    print(f'next: python sample.py ask --ckpt={out}/pretrain --image={out}/pictures/'
          f'{samples[0]["pictures"][0]} "{samples[0]["question"]}"')


if __name__ == "__main__":
    main(lambda: demo(cli(Args, about=__doc__)))
