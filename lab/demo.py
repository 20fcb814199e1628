"""The whole pipeline on a laptop: see, speak, act, learn by doing, examine, report.

    python -m lab.demo                    about eleven minutes on 2 cores, no network
    python -m lab.demo --seed=1 --out=out/demo1
    python -m lab.demo --keep=ckpt        rebuild the checkpoints that stand in the repository

What it trains stands for the big run in small:

    tower      masked distillation from two teachers, which stand in ckpt/ where others would have
               downloaded theirs (`make teachers` trains them), then alignment with captions
    pretrain   from that tower, five categories of the gym at their easiest level
    sft        a sixth, forms, but in single questions ("Tick K."): nobody ever shows how one is
               filled in. The MTP head learns beside it
    rl         joint RL on all six: forms are learnt by their outcome alone

Interrupted, it goes on where it was. It writes report.json and report.html (curves, tables,
pictures) into the run folder.
"""
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import gym
import mmtp
import pretrain
import rl
import train_vit
from common import (UserError, checkpoints, clock, cli, find_checkpoint, main, setup,
                    write_json)
from data import parse_mix
from lab import report
from sample import evaluate, play, readable, show
from tasks.base import Task
from tokenizer import Tokenizer

TOWER = {"distill": 200, "align": 200}  # steps of 64 pictures
MIX = "shape_attr:1.5,counting:0.8,ocr_line:1.2,point:1.2,gui_click:1.4"
SCREENS = MIX + ",gui_form:1.6"
PLAYED = "shape_attr,counting,ocr_line,point,gui_click,gui_form:5"


@dataclass
class Args:
    steps: int = 1400             # of pretraining, about five minutes on 2 cores
    sft_steps: int = 200          # of SFT, less than a minute
    rl_steps: int = 40            # of RL, about three minutes
    seed: int = 0                 # of weights and samples
    count: int = 300              # held-out tasks a category in the examination
    levels: int = 1               # levels trained and examined, from 0
    out: str = "out/demo"         # run folder, one folder a stage in it
    keep: str = ""                # also write the weights here, in bf16: align, start, demo
    device: str = "auto"          # auto, cpu, cuda or mps


def tower(args: Args, hw) -> Path:
    """Two stages of train_vit.py, or what is left of them; the aligned tower."""
    for name, steps in TOWER.items():
        if not (Path(args.out) / name / f"step_{steps:06d}").exists():
            train_vit.train(name, train_vit.check(train_vit.Args(
                stage="all", steps=steps, seed=args.seed, out=args.out, resume=True, eval_every=0,
                budgets="64", log_every=20, device=args.device)), hw)
    return find_checkpoint(Path(args.out) / "align")


def stage(work, settings) -> Path:
    """A run of pretrain.py or rl.py, or what is left of it; its last checkpoint."""
    last = Path(settings.out) / f"step_{settings.steps:06d}"
    if last in checkpoints(settings.out):
        print(f"done already: {last}")
    else:
        work(settings)
    return find_checkpoint(settings.out)


def answer(model, tokens, folder: Path, levels: int) -> list[dict]:
    """Two held-out tasks a category: pictures on disk, question, answer and truth."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for name, _ in parse_mix(PLAYED):
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


def keep(args: Args, vit: Path, start: Path, last: Path, table: dict, hw):
    """The tower, the model before RL and the one after it, as small folders."""
    for name, folder in (("start", start), ("demo", last)):
        mmtp.load(folder).save_pretrained(Path(args.keep) / name, torch.bfloat16)
    train_vit.keep(vit, Path(args.keep) / "align")
    write_json(Path(args.keep) / "demo" / "report.json", {
        "table": table, "steps": args.steps, "sft_steps": args.sft_steps,
        "rl_steps": args.rl_steps, "seed": args.seed, "hardware": hw.why})
    print(f"weights kept in {args.keep}")


def demo(args: Args):
    began, out, seconds = time.time(), Path(args.out), {}
    hw = setup(args.device)
    if hw.world > 1:
        raise UserError("the demo is one process; `torchrun pretrain.py` trains with several")

    def told(name, work, *given):
        """Say which part begins, and note how long it takes."""
        start = time.time()
        print(f"{len(seconds) + 1}/5 {name}", flush=True)
        found = work(*given)
        seconds[name.partition(":")[0]] = round(time.time() - start)
        return found

    common = dict(levels=args.levels, resume=True, device=args.device)
    vit = told("tower: distillation from two teachers, alignment", tower, args, hw)
    first = told("pretraining: questions and answers", stage, pretrain.run, pretrain.Args(
        steps=args.steps, seed=args.seed, mix=MIX, vit=str(vit), mtp=0, save_every=200,
        eval_every=100, log_every=50, out=f"{out}/pretrain", **common))
    start = told("SFT: forms, but no form filled in", stage, pretrain.run, pretrain.Args(
        steps=args.sft_steps, seed=args.seed + 1000, mix=SCREENS, parts="gui_form",
        init=str(first), lr=2e-3, curriculum=0, mtp_alone=True, mtp_share=1, log_every=50,
        out=f"{out}/sft", **common))
    last = told("RL: what pays becomes more likely", stage, rl.run, rl.Args(
        steps=args.rl_steps, seed=args.seed, prompts=32, mix=PLAYED, init=str(start), save_every=20,
        eval_every=args.rl_steps, eval_count=args.count // 3, out=f"{out}/rl", **common))
    model = mmtp.load(last, hw.device, hw.dtype)
    tokens = Tokenizer(model.config.n_ranks)
    table = told("examination: held-out seeds, words, shades and layouts", evaluate, model, tokens,
                 PLAYED, args.levels, args.count)
    show(table)
    samples = answer(model, tokens, out / "pictures", args.levels)
    for s in samples:
        print(f"  {s['category']:<11} {s['question']}  {s['answer']}   (truth: {s['truth']})")
    probes, played = (json.loads((folder / "report.json").read_text(encoding="utf-8"))
                      for folder in (out, out / "rl"))
    write_json(out / "report.json", {
        "title": "nanoGLM-V demo", "hardware": hw.why, "machine": platform.platform(),
        "torch": torch.__version__, "seed": args.seed, "parts": seconds,
        "steps": args.steps + args.sft_steps + args.rl_steps,
        "parameters": model.counts(), "training_seconds": sum(seconds.values()),
        "seconds": round(time.time() - began), "table": table, "samples": samples,
        "figures": probes["figures"], "pictures": probes["pictures"], "rl": played["figures"]})
    page = report.write(out)
    if args.keep:
        keep(args, vit, start, last, table, hw)
    print(f"{clock(time.time() - began)} in all; the report is {page}")
    print(f'next: python sample.py ask --ckpt={out}/rl --image={out}/pictures/'
          f'{samples[0]["pictures"][0]} "{samples[0]["question"]}"')


if __name__ == "__main__":
    main(lambda: demo(cli(Args, about=__doc__)))
