"""Does RL learn, against a fair control? Three worlds, declared as such, as a report with curves.

    python -m lab.worlds --world=fallible        annotators err, verifiers don't
    python -m lab.worlds --world=untold          nobody has ever shown how a form is filled in
    python -m lab.worlds --world=clean           demonstrations are right and endless
    python -m lab.worlds --seeds=1 --steps=40 --before=120       a quick look

In the gym every category has an oracle, so SFT on its demonstrations is nearly a ceiling. RL's case
is where demonstrations are what they are in life. Each world begins with one model, trained by SFT
in that world; from there RL and its controls go on, each for about the same CPU minutes of one
thread, examined on the way on held-out tasks: a control gets as many steps as RL's minutes hold at
its own pace, measured before. What is done is not done again; what was interrupted goes on.
"""
import functools
import json
import os
import re
import time
from collections import defaultdict
from contextlib import nullcontext as honest
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import gym
import pretrain
import rl
from data import parse_mix
from lab import report
from lib.checkpoint import load_model, save_model
from lib.cli import cli, main, UserError
from lib.common import find_checkpoint, ROOT, same_options, setup, write_json
from lib.episodes import accuracy
from lib.rollout import Episode
from tasks.base import stream, Task
from tasks.draw import GRID
from tokenizer import Tokenizer

MIX = "shape_attr:1.3,counting:0.8,ocr_line:0.8,point:1.6,gui_click:1.6,gui_form:1.6"
NAMES = [name for name, _ in parse_mix(MIX)]
ERR = 0.6                                       # share of an annotator's answers that can be wrong
PARTS = 3                                       # examinations in the course of a run
FEW = 5                                         # steps, of which setting up is most


@dataclass
class Args:
    world: str = "fallible"       # fallible, untold or clean
    seeds: int = 3                # runs of each kind
    minutes: float = 6.0          # CPU minutes of RL, then of each control; fixed for an --out
    steps: int = 0                # of RL instead, and beside it the first control alone
    prompts: int = 32             # tasks a step of RL, eight rollouts each
    lr: float = 8e-4              # peak learning rate of RL; SFT has half of pretraining's
    before: int = 0               # SFT steps that make the start; 0: as many as the world says
    init: str = ""                # folder to begin from; default: the demo's, or ckpt/untold
    count: int = 150              # held-out tasks a category in each examination
    out: str = "out/worlds"       # a folder a world: report.json, report.html, a folder a run
    keep: str = ""                # write the start's weights here, in bf16, and stop


# ---- the worlds ---------------------------------------------------------------------------------

def slip(question: str, reply: str) -> str:
    """What an annotator says who errs: a count of three or more comes one short; a point or a
    click lands one row of the grid too low, or too high where there is no lower one."""
    row = 1000 // GRID
    if re.search("How many|Count the", question):
        return re.sub(r"\d+", lambda n: str(int(n[0]) - (int(n[0]) > 2)), reply)
    if re.search("Point at|Where is|Click|Press", question):
        return re.sub(r"(?<=, )\d+", lambda y: str(
            int(y[0]) + (row if int(y[0]) < 1000 - row else -row)), reply)
    return reply


def fallible():
    """A context in which ERR of the answers that can be are wrong, in systematic ways; which, is a
    function of the task. Forms are shown by others, who make no mistakes. In this process only."""
    true = gym.demonstrate

    def demonstrate(task: Task, *how):
        talks = true(task, *how)
        if task.category == "gui_form":
            return talks
        rng = stream(replace(task, split="annotator"))
        return [[replace(m, text=slip(talk[i - 1].text, m.text))
                 if m.role == "assistant" and rng.random() < ERR else m
                 for i, m in enumerate(talk)] for talk in talks]

    return mock.patch.object(gym, "demonstrate", demonstrate)


@dataclass(frozen=True)
class World:
    shown: str                  # the demonstrations,
    annotators: object          # and by whom
    played: str                 # the categories of RL
    controls: dict              # for each, the annotators
    parts: str = ""             # categories of which only single questions are shown
    before: int = 400           # SFT steps that make the start
    init: str = f"{ROOT}/ckpt/demo"     # from this model


WORLDS = {
    "clean": World(MIX, honest, MIX, {"sft": honest}),
    "fallible": World(MIX, fallible, MIX, {"sft": fallible, "clean_sft": honest}),
    "untold": World(MIX, honest, MIX.replace("gui_form:1.6", "gui_form:10"), {"sft": honest},
                    "gui_form", 5, f"{ROOT}/ckpt/untold")}


# ---- runs ---------------------------------------------------------------------------------------

def timed(work, settings, name: str = "") -> float:
    """Do a run, or what is left of it; CPU seconds that it has taken in all. What is known by its
    `name` (default: its steps) is not done again."""
    path, began = Path(settings.out) / "seconds.json", time.process_time()
    spent = json.loads(path.read_text()) if path.exists() else {"so far": 0.0}
    if (name := name or f"step {settings.steps}") not in spent:
        before = spent["so far"]
        try:
            work(settings)
            spent[name] = before + time.process_time() - began
        finally:
            write_json(path, spent | {"so far": before + time.process_time() - began})
    return spent[name]


def pace(work, settings, folder: Path, steps: int = 10) -> float:
    """CPU seconds a step: of so many behind the first FEW, so that setting up counts little."""
    few, more = (timed(work, replace(settings, out=str(folder), steps=n))
                 for n in (FEW, FEW + steps))
    return (more - few) / steps


@functools.cache
def examine(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """{greedy, sampled: {category: accuracy}} of a checkpoint, on the same tasks for all."""
    model, args, marks = load_model(folder), rl.Args(max_new=16), {}
    tasks = [Task(name, 3_000_000 + i, 0, "test") for name in NAMES for i in range(count)]
    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        how_to_play = rl.RolloutSettings(Tokenizer(model.config.n_ranks), model.config,
                                         args.context, args.max_new, temperature=temperature)
        marks[how] = accuracy(rl.rollout(
            rl.make_engine(model, args), [Episode(task, i, 0) for i, task in enumerate(tasks)],
            how_to_play, gym.Rewards()))
    return marks


def course(work, settings, count: int) -> list:
    """A whole run, stopped PARTS times for an examination: [(minutes, marks), ...]. The rate
    stands until the last part and falls in it, as in a run that is not stopped."""
    path = Path(settings.out) / "course.json"
    points = (json.loads(path.read_text()) if path.exists()
              else [(0.0, examine(Path(settings.init), count))])
    for part in range(len(points), PARTS + 1):
        seconds = timed(work, replace(
            settings, steps=settings.steps * part // PARTS, decay=1 / PARTS,
            schedule="linear" if part == PARTS else "constant"))
        points.append((seconds / 60, examine(find_checkpoint(settings.out), count)))
        write_json(path, points)
    return points


# ---- the report ---------------------------------------------------------------------------------

def curves(runs: dict[str, dict]) -> dict:
    """{title: {arm: [(minutes, percent), ...]}}, means over the seeds."""
    def line(arm, how, name):
        return [tuple(np.mean([(minutes, 100 * marks[how][name]) for minutes, marks in at], 0))
                for at in zip(*runs[arm].values())]

    return {f"{name}, {how}: % right over minutes": {arm: line(arm, how, name) for arm in runs}
            for name in ("mean", *NAMES) for how in ("greedy", "sampled")}


def figures(runs: dict[str, dict]) -> dict[str, dict[str, float]]:
    """What RL gained in greedy points: mean, least and most over the seeds. Then percent right by
    category, at the start and at each run's end."""
    first, gains = runs["rl"][0][0][1], defaultdict(list)
    for seed, points in runs["rl"].items():
        last = points[-1][1]["greedy"]
        moved = {name: 100 * (last[name] - value) for name, value in first["greedy"].items()}
        gains["RL over its start"].append(moved["mean"])
        gains["RL's worst category over its start"].append(min(moved.values()))
        for arm in list(runs)[1:]:
            minutes, marks = runs[arm][seed][-1]
            mean = marks["greedy"]["mean"]
            gains[f"RL over {arm}"].append(100 * (last["mean"] - mean))
            gains[f"{arm}, a minute"].append(100 * (mean - first["greedy"]["mean"]) / minutes)
            gains[f"{arm}, minutes over RL's"].append(minutes / points[-1][0])
    ends = {"start": first} | {f"{arm}, seed {seed}": points[-1][1] for arm in runs
                               for seed, points in runs[arm].items()}
    return {name: {"mean": float(np.mean(found)), "least": min(found), "most": max(found)}
            for name, found in gains.items()} | {
        f"{row}, {how}": {name: 100 * value for name, value in marks[how].items()}
        for how in ("greedy", "sampled") for row, marks in ends.items()}


def worlds(args: Args):
    if args.world not in WORLDS:
        raise UserError(f"--world takes {', '.join(WORLDS)}, not '{args.world}'")
    if min(args.seeds, args.count, args.prompts) < 1 or args.minutes <= 0 or min(
            args.before, args.steps) < 0:
        raise UserError("--seeds, --prompts and --count take 1 or more, --minutes more than 0, "
                        "--before and --steps 0 or more")
    os.environ["OMP_NUM_THREADS"] = "1"         # as minutes are those of one thread
    hw, world, out = setup("cpu"), WORLDS[args.world], Path(args.out) / args.world
    plan, asked = out / "config.json", {
        name: value for name, value in asdict(args).items() if name not in ("seeds", "out", "keep")}
    common = dict(resume=True, save_every=10 ** 6, eval_every=0, mtp=0, device="cpu",
                  workers=0)    # so that all the work is this process's, which is timed
    played = rl.Args(**common, mix=world.played, prompts=args.prompts, lr=args.lr,
                     dtype="float32", max_new=16)   # no answer is longer, idle talk would be
    taught = pretrain.Args(**common, mix=world.shown, parts=world.parts, lr=2e-3, levels=1,
                           curriculum=0)
    with same_options(plan, asked), world.annotators():
        timed(pretrain.run, replace(taught, steps=args.before or world.before, seed=100,
                                    init=args.init or world.init, out=f"{out}/start"))
    played.init = taught.init = str(find_checkpoint(out / "start"))
    if args.keep:
        return save_model(load_model(played.init), args.keep, torch.bfloat16)
    steps = max(PARTS, args.steps or round(
        60 * args.minutes / pace(rl.run, played, out / "pace_rl")))
    each = pace(pretrain.run, taught, out / "pace_sft", 30)
    controls = dict(list(world.controls.items())[:1 if args.steps else None])
    runs: dict[str, dict] = {"rl": {}, **{arm: {} for arm in controls}}
    for seed in range(args.seeds):
        plan = replace(played, steps=steps, seed=seed, out=f"{out}/rl{seed}")
        runs["rl"][seed] = course(rl.run, plan, args.count)
        as_long = max(PARTS, round(60 * runs["rl"][seed][-1][0] / each))
        for arm, annotators in controls.items():
            plan = replace(taught, steps=as_long, seed=seed, out=f"{out}/{arm}{seed}")
            with annotators():
                runs[arm][seed] = course(pretrain.run, plan, args.count)
        write_json(out / "report.json", {
            "title": f"RL beside SFT, world: {args.world}", "where": hw.description,
            "unit": "minute",
            "figures": figures(runs), "curves": curves(runs), "runs": runs})
        print(f"after {seed + 1} seeds, points: " + ", ".join(
            f"{name} {row['mean']:.2f}" for name, row in figures(runs).items() if "least" in row))
    print(f"the report is {report.write(out)}")


if __name__ == "__main__":
    main(lambda: worlds(cli(Args, about=__doc__)))
