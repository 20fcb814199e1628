"""The whole pipeline on a laptop: train, examine, answer, learn from reward, report.

    python -m lab.demo                    6 to 11 minutes on 2 cores, no network
    python -m lab.demo --seed=1 --out=out/demo1
    python -m lab.demo --tower_steps=0 --rows=2 --rl_steps=0 --out=out/longer     pretraining alone
    python -m lab.demo --keep=out/kept    also write the weights there, in bf16

What it trains stands for the big run in small, every stage: a vision tower with its teachers,
distilled and aligned (train_vit.py); pretraining from that tower on six categories of the gym at
their easiest level; then joint RL, in two of lab.worlds' worlds, where demonstrations are what they
are in life: in `fallible` the annotators err in 60% of what can be wrong, in `untold` nobody has
ever shown how a form is filled in. The tower is here because it belongs there: at this scale the
same minutes of pretraining teach more (lab.vit_pays). Interrupted, the demo goes on where it was.
It writes report.json and report.html (curves, tables, pictures) into the run folder.
"""
import json
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
from PIL import Image

import gym
import pretrain
import train_vit
from data import parse_mix
from lab import report
from lib.checkpoint import load_model, save_model
from lib.cli import cli, main, UserError
from lib.common import (checkpoints, clock, find_checkpoint, read_log, ROOT, same_options, setup,
                        write_json)
from sample import evaluate, play, readable, show
from tasks.base import Task
from tokenizer import Tokenizer

MIX = "shape_attr:1.5,counting:0.5,ocr_line:1.2,point:1.2,gui_click:1.4,gui_form:1.5"
ROW_TOKENS = 4096

PROBES = {"linear": "linear probe", "dense": "dense probe", "zero_shot_en": "zero-shot naming",
          "i2t_en": "R@1 image to text", "t2i_en": "R@1 text to image"}     # of train_vit.py
NOTE = ("Tower: shares of right answers in percent, on pictures that training never saw. In so few "
        "steps a stage shows how it goes, not what it can do: a young teacher's features may be "
        "worse than those of random weights, which stand first. `make tower` takes 1,200 steps.")
WORLDS = {"fallible": "annotators err", "untold": "forms never shown"}


@dataclass
class Args:
    tower_steps: int = 150        # of each stage of the vision tower; 0: take ckpt/semantic
    steps: int = 2400             # of pretraining
    rows: int = 1                 # of 2,048 tokens a step, some 45 pictures each
    rl_steps: int = 12            # of RL in each of the two worlds; 0: without them
    seed: int = 0                 # of weights and samples
    count: int = 300              # held-out tasks a category in the examination
    levels: int = 1               # levels trained and examined, from 0
    out: str = "out/demo"         # run folder
    keep: str = ""                # also write the weights here, in bf16
    device: str = "auto"          # auto, cpu, cuda or mps


def make_tower(args: Args) -> dict:
    """All stages of train_vit.py, or what is left of them: {"figures": {stage: what its probes say,
    in percent}, "pictures": of its features}."""
    out = Path(args.out) / "vit"
    train_vit.run(train_vit.Args(steps=args.tower_steps, out=str(out), resume=True, log_every=50,
                                 seed=args.seed, device=args.device,
                                 ema=0.8))  # slower, in so few steps the mean stays where it began
    facts = json.loads((out / "report.json").read_text(encoding="utf-8"))
    figures = {f"tower: {stage}": {told: 100 * row[name] for name, told in PROBES.items()
                                   if name in row}
               for stage, row in facts["figures"].items()}
    return {"figures": figures,
            "pictures": [(f"vit/{name}", told) for name, told in facts["pictures"]]}


def train(args: Args) -> Path:
    """Pretraining, or what is left of it; the folder of the newest checkpoint."""
    run = Path(args.out) / "pretrain"
    done = [p for p in checkpoints(run) if p.name == f"step_{args.steps:06d}"]
    if done:
        print(f"pretraining is done: {done[0]}")
        return done[0]
    tower = run.with_name("vit") / "align" if args.tower_steps else ROOT / "ckpt/semantic"
    pretrain.run(pretrain.Args(
        steps=args.steps, rows=args.rows, seed=args.seed, mix=MIX, levels=args.levels,
        out=str(run), resume=True, vit=str(tower), mtp_alone=True, mtp_share=0.12, save_every=200,
        eval_every=100, log_every=50, device=args.device))
    return find_checkpoint(run)


def answer(model, tokens, folder: Path, levels: int) -> list[dict]:
    """Two held-out tasks a category: pictures on disk, question, answer and truth."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for name, _ in parse_mix(MIX):
        tasks = [Task(name, 2_000_000 + i, i % levels, "test") for i in range(2)]
        for task, played in zip(tasks, play(model, tokens, tasks)):
            replies = played.replies(tokens)
            frames, goal, truth = frames_of(task, replies)
            files = []
            for i, frame in enumerate(frames):
                files.append(f"{name}-{task.seed}-{i}.png")
                frame.resize((192, 192), Image.Resampling.NEAREST).save(folder / files[-1])
            samples.append({"category": name, "level": task.level, "pictures": files,
                            "question": goal, "truth": truth, "reward": played.score.reward,
                            "answer": " → ".join(readable(r) for r in replies)})
    return samples


def frames_of(task: Task, replies: list[str]):
    """The pictures that were seen while `replies` were given, the goal, the oracle's replies."""
    episode = gym.drive(gym.make(task))
    messages = next(episode)
    goal = messages[-1].text.replace("<|image|>", "")
    frames = [messages[-1].images[0]]
    for reply in replies[:-1]:
        frames.append(episode.send(reply)[-1].images[0])
    return frames, goal, " → ".join(map(readable, gym.play_out(task)[1]))


def two_worlds(args: Args, start: Path) -> dict[str, dict]:
    """Two worlds of lab.worlds in small, each in a process of its own, their lines printed as they
    come: {what: {category: % right}} of the start, of RL and of as many minutes of the same SFT.
    """
    out, runs = Path(args.out).resolve() / f"rl_{args.rl_steps}", {}
    for name, init, before in (("fallible", start, 120), ("untold", ROOT / "ckpt/untold", 5)):
        runs[name] = subprocess.Popen(
            [sys.executable, "-m", "lab.worlds", f"--world={name}", "--seeds=1", "--count=60",
             "--prompts=12", f"--before={before}", f"--steps={args.rl_steps}",
             f"--init={init.resolve()}", f"--out={out}"], cwd=ROOT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)

    def pass_on(name):
        for line in runs[name].stdout:
            print(f"  {name}: {line}", end="", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tellers = [threading.Thread(target=pass_on, args=(name,), daemon=True) for name in runs]
    try:
        for teller in tellers:
            teller.start()
        for teller in tellers:
            teller.join()
    except SystemExit:          # Ctrl-C reaches them by itself
        for run in runs.values():
            run.terminate()
        raise
    finally:                    # they save what they have done
        codes = {name: run.wait() for name, run in runs.items()}
    figures = {}
    for name, code in codes.items():
        if code:
            raise UserError(f"the world `{name}` ended with code {code}: see above")
        found = json.loads((out / name / "report.json").read_text(encoding="utf-8"))["figures"]
        figures |= {f"{WORLDS[name]}: {told}": found[f"{row}, greedy"] for told, row in (
            ("start", "start"), ("RL", "rl, seed 0"), ("SFT, as long", "sft, seed 0"))}
    return figures


def tell(figures: dict[str, dict]):
    for row, found in figures.items():
        print(f"  {row:<31} " + "  ".join(f"{name} {value:.0f}" for name, value in found.items()))


def demo(args: Args):
    if min(args.steps, args.rows, args.count) < 1 or min(args.tower_steps, args.rl_steps) < 0:
        raise UserError("--steps, --rows and --count take 1 or more, --tower_steps and --rl_steps "
                        "0 or more")
    if not 1 <= args.levels <= 5:       # pretraining would say so, after the tower's minutes
        raise UserError(f"--levels takes 1 to 5, not {args.levels}")
    began, out = time.time(), Path(args.out)
    hw = setup(args.device)
    if hw.world > 1:
        raise UserError("the demo is one process; `torchrun pretrain.py` trains with several")
    asked = {name: getattr(args, name)
             for name in ("tower_steps", "steps", "rows", "levels", "seed")}
    tower = {"figures": {}, "pictures": []}
    with same_options(out / "config.json", asked):
        if args.tower_steps:
            print("1/5 a vision tower: teachers, distillation, alignment")
            tower = make_tower(args)
            tell(tower["figures"])
        print("2/5 pretraining: pictures, questions and answers")
        folder = train(args)
    trained = sum(line["dt"] for line in read_log(folder.parent / "log.jsonl"))
    model = load_model(folder, hw.device, hw.dtype)
    tokens = Tokenizer(model.config.n_ranks)
    print("3/5 examination: tasks of held-out seeds, words, shades and layouts")
    table = evaluate(model, tokens, MIX, args.levels, args.count)
    show(table)
    print("4/5 answers")
    samples = answer(model, tokens, out / "pictures", args.levels)
    for s in samples:
        print(f"  {s['category']:<11} {s['question']}  {s['answer']}   (truth: {s['truth']})")
    facts = {
        "title": "nanoGLM-V demo", "hardware": hw.description, "machine": platform.platform(),
        "torch": torch.__version__, "seed": args.seed, "steps": args.steps,
        "parameters": model.counts(), "training_seconds": round(trained),
        "table": table, "samples": samples, "pictures": tower["pictures"],
        "note": NOTE if args.tower_steps else ""}

    def write_down(figures):
        write_json(out / "report.json", {**facts, "seconds": round(time.time() - began),
                                         "figures": tower["figures"] | figures})
        return report.write(out)

    page = write_down({})
    if args.keep:
        save_model(model, args.keep, torch.bfloat16)
        write_json(Path(args.keep) / "report.json", {"table": table, "steps": args.steps,
                                                     "seed": args.seed, "hardware": hw.description})
        print(f"weights kept in {args.keep}")
    if args.rl_steps:
        print("5/5 joint RL, two worlds side by side: annotators who err, forms nobody has shown")
        figures = two_worlds(args, folder)
        tell(figures)
        page = write_down(figures)
    print(f"{clock(time.time() - began)} in all; the report is {page}")
    print(f'next: python sample.py ask --ckpt={out}/pretrain --image={out}/pictures/'
          f'{samples[0]["pictures"][0]} "{samples[0]["question"]}"')


if __name__ == "__main__":
    main(lambda: demo(cli(Args, about=__doc__)))
