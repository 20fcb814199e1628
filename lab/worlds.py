"""Does RL learn, compared fairly with SFT? Three worlds, as a report with curves.

    python -m lab.worlds --world=fallible        60% of the answers that can be wrong are wrong
    python -m lab.worlds --world=untold          no demonstration shows how a form is filled in
    python -m lab.worlds --world=clean           demonstrations are correct and unlimited
    python -m lab.worlds --seeds=1 --steps=40 --before=120       a quick look

In the gym every category has an oracle, so SFT on its demonstrations is nearly a ceiling. RL helps
where demonstrations are wrong or missing, and that is what the first two worlds imitate. Each world
begins with one model, trained by SFT in that world. From it RL and its controls, which are SFT,
continue, each for about the same CPU minutes of one thread: a control gets as many steps as fit
into RL's minutes at its own pace, which is measured before. On the way all are evaluated on the
same held-out tasks. If it is started again, finished runs are not repeated and an interrupted one
continues.
"""
import functools
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext as honest
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch

import gym
import pretrain
import rl
from data import parse_mix, task_pixels
from lab import report
from lib.checkpoint import load_model, save_model
from lib.cli import check_options, cli, Count, main, Natural, NonNegative, Positive, UserError
from lib.common import read_json, ROOT, setup, write_json
from lib.episodes import accuracy
from lib.rollout import Episode
from lib.runs import find_checkpoint, same_options
from tasks.base import stream, Task
from tasks.draw import GRID
from tokenizer import tokenizer_of

MIX = "shape_attr:1.3,counting:0.8,ocr_line:0.8,point:1.6,gui_click:1.6,gui_form:1.6"
NAMES = [name for name, _ in parse_mix(MIX)]
ERR = 0.6                                       # share of wrong answers, where one can be wrong
PARTS = 3                                       # a run is stopped so often to be evaluated
FEW = 5                                         # steps before the pace is measured: slow ones


@dataclass
class Args:
    world: Literal["fallible", "untold", "clean"] = "fallible"  # what is wrong with demonstrations
    seeds: Positive = 3           # runs of each kind
    minutes: NonNegative = 6.0    # CPU minutes of RL, then of each control
    steps: Natural = 0            # of RL, instead of --minutes; then only the first control runs
    prompts: Positive = 32        # tasks a step of RL, eight rollouts each
    before: Natural = 0           # SFT steps that make the start; 0: as many as the world says
    init: str = ""                # folder to begin from; default: ckpt/demo, or ckpt/untold
    count: Count = 150            # held-out tasks a category in each evaluation
    out: str = "out/worlds"       # a folder a world: report.json, report.html, a folder a run
    keep: str = ""                # write the start's weights here, in bf16, and stop


# ---- the worlds ---------------------------------------------------------------------------------

def slip(question: str, reply: str) -> str:
    """The reply of an annotator who is wrong: a count of three or more is one too low; a point or a
    click is one row of the grid too low, or too high where there is no lower row."""
    row = 1000 // GRID
    if re.search("How many|Count the", question):
        return re.sub(r"\d+", lambda n: str(int(n[0]) - (int(n[0]) > 2)), reply)

    def moved(match):
        y = int(match[0])
        return str(y + row if y < 1000 - row else y - row)

    if re.search(r"click\(\d+, \d+\)|\[\d+, \d+\]", reply):
        return re.sub(r"(?<=, )\d+", moved, reply)
    return reply


def fallible(mistake=slip, names=tuple(name for name in NAMES if name != "gui_form")):
    """A context in which gym.demonstrate gives a wrong answer with probability ERR, always wrong in
    the same way; the task decides which ones. mistake: (question, reply) -> the wrong reply. names:
    the categories in which annotators err, by default all but forms. It works in this process only,
    so nothing may be drawn by workers."""
    true = gym.demonstrate

    def demonstrate(task: Task, *args, **options):
        talks = true(task, *args, **options)
        if task.category not in names:
            return talks
        rng = stream(replace(task, split="annotator"))
        for talk in talks:
            for i, message in enumerate(talk):
                if message.role == "assistant" and rng.random() < ERR:
                    talk[i] = replace(message, text=mistake(talk[i - 1].text, message.text))
        return talks

    return mock.patch.object(gym, "demonstrate", demonstrate)


@dataclass(frozen=True)
class World:
    """What is demonstrated, and by whom, and what RL plays. Annotators are a function that makes a
    context; in it, gym.demonstrate gives their answers."""
    shown: str                          # mix of the categories in demonstrations
    annotators: Callable                # of those that make the start
    played: str                         # mix of the categories in RL
    controls: dict[str, Callable]       # {SFT run: its annotators}
    parts: str = ""                     # categories of which no episode is shown, only questions
    before: int = 400                   # SFT steps that make the start,
    init: str = f"{ROOT}/ckpt/demo"     # and the model that they begin from


WORLDS = {
    "clean": World(MIX, honest, MIX, {"sft": honest}),
    "fallible": World(MIX, fallible, MIX, {"sft": fallible, "clean_sft": honest}),
    "untold": World(MIX, honest, MIX.replace("gui_form:1.6", "gui_form:10"), {"sft": honest},
                    "gui_form", 5, f"{ROOT}/ckpt/untold")}


# ---- runs ---------------------------------------------------------------------------------------

def timed(work, settings, name: str = "") -> float:
    """Do a run, or the rest of an interrupted one, and return the CPU seconds that all of it took.
    seconds.json in the run folder holds them by `name` (default: the steps): a name that is there
    already is not run again."""
    path, name = Path(settings.out) / "seconds.json", name or f"step {settings.steps}"
    spent = read_json(path) if path.exists() else {"so far": 0.0}
    if name in spent:
        return spent[name]
    before, began = spent["so far"], time.process_time()
    try:
        work(settings)
        spent[name] = before + time.process_time() - began
    finally:
        spent["so far"] = before + time.process_time() - began
        write_json(path, spent)
    return spent[name]


def pace(work, settings, folder: Path, steps: int = 10) -> float:
    """CPU seconds a step, measured over `steps` steps after the first FEW."""
    few, more = (timed(work, replace(settings, out=str(folder), steps=n))
                 for n in (FEW, FEW + steps))
    return max(1e-3, (more - few) / steps)      # CPU time is not exact: never 0, or less


@functools.cache
def evaluate(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """{greedy, sampled: {category: accuracy}} of a checkpoint, on the same tasks for all."""
    model, args, table = load_model(folder), rl.Args(max_new=16), {}
    tasks = [Task(name, 3_000_000 + i, 0, "test", task_pixels(name, model.config))
             for name in NAMES for i in range(count)]
    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        settings = rl.RolloutSettings(tokenizer_of(model.config), model.config, args.context,
                                      args.max_new, temperature=temperature)
        episodes = [Episode(task, i, 0) for i, task in enumerate(tasks)]
        table[how] = accuracy(rl.rollout(rl.make_engine(model, args), episodes, settings,
                                         gym.Rewards()))
    return table


def course(work, settings, count: int) -> list:
    """A whole run, stopped PARTS times to be evaluated: [(minutes, table of `evaluate`), ...]. The
    learning rate is constant until the last part and falls in it, as in a run without stops."""
    path = Path(settings.out) / "course.json"
    points = (read_json(path, list) if path.exists()
              else [(0.0, evaluate(Path(settings.init), count))])
    for part in range(len(points), PARTS + 1):
        seconds = timed(work, replace(
            settings, steps=settings.steps * part // PARTS, decay=1 / PARTS,
            schedule="linear" if part == PARTS else "constant"))
        points.append((seconds / 60, evaluate(find_checkpoint(settings.out), count)))
        write_json(path, points)
    return points


# ---- the report ---------------------------------------------------------------------------------

def curve(runs: dict[str, list], how: str, name: str) -> list:
    """[(minutes, percent), ...] of one arm, {seed: points of `course`}: means over the seeds."""
    points = []
    for of_all_seeds in zip(*runs.values()):
        pairs = [(minutes, 100 * table[how][name]) for minutes, table in of_all_seeds]
        points.append(tuple(np.mean(pairs, 0)))
    return points


def curves(runs: dict[str, dict]) -> dict:
    """{title: {arm: [(minutes, percent), ...]}}. runs: {arm: {seed: points of `course`}}."""
    return {f"{name}, {how}: % right over minutes": {
        arm: curve(runs[arm], how, name) for arm in runs}
        for name in ("mean", *NAMES) for how in ("greedy", "sampled")}


def gains(runs: dict[str, dict]) -> dict[str, list[float]]:
    """What RL gained, in points of greedy accuracy: a list over the seeds for each figure."""
    first, found = runs["rl"][0][0][1]["greedy"], defaultdict(list)
    for seed, points in runs["rl"].items():
        last = points[-1][1]["greedy"]
        moved = {name: 100 * (last[name] - value) for name, value in first.items()}
        found["RL over its start"].append(moved["mean"])
        found["RL's worst category over its start"].append(min(moved.values()))
        for arm in list(runs)[1:]:
            minutes, table = runs[arm][seed][-1]
            found[f"RL over {arm}"].append(100 * (last["mean"] - table["greedy"]["mean"]))
            found[f"{arm}, minutes over RL's"].append(minutes / points[-1][0])
    return found


def spread(values: list[float]) -> dict[str, float]:
    """One value a seed as {mean, least, most}."""
    return {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}


def figures(runs: dict[str, dict]) -> dict[str, dict[str, float]]:
    """The `spread` of each gain; then the percentage of right answers by category, at the start and
    at the end of each run."""
    table = {name: spread(values) for name, values in gains(runs).items()}
    ends = {"start": runs["rl"][0][0][1]}
    for arm in runs:
        ends |= {f"{arm}, seed {seed}": points[-1][1] for seed, points in runs[arm].items()}
    for how in ("greedy", "sampled"):
        for row, accuracies in ends.items():
            table[f"{row}, {how}"] = {name: 100 * value
                                      for name, value in accuracies[how].items()}
    return table


def worlds(args: Args):
    check_options(args)
    if not args.minutes:
        raise UserError("--minutes takes more than 0")
    os.environ["OMP_NUM_THREADS"] = "1"         # minutes are those of one thread
    hw, world, out = setup("cpu"), WORLDS[args.world], Path(args.out) / args.world
    asked = {name: value for name, value in asdict(args).items()
             if name not in ("seeds", "out", "keep")}
    # No workers: all the work is done by this process, whose CPU time is measured.
    common = dict(resume=True, save_every=10 ** 6, eval_every=0, mtp=0, device="cpu", workers=0)
    # No right answer is longer than 16 tokens, but noise can be. Of the learning rates, RL lost
    # skills at 1.5e-3 (LOG.md); that of SFT is half of pretraining's.
    rl_args = rl.Args(**common, mix=world.played, prompts=args.prompts, lr=8e-4, dtype="float32",
                      max_new=16)
    sft_args = pretrain.Args(**common, mix=world.shown, parts=world.parts, lr=2e-3, levels=1,
                             curriculum=0)
    with same_options(out / "config.json", asked), world.annotators():
        timed(pretrain.run, replace(sft_args, steps=args.before or world.before, seed=100,
                                    init=args.init or world.init, out=f"{out}/start"))
    rl_args.init = sft_args.init = str(find_checkpoint(out / "start"))
    if args.keep:
        return save_model(load_model(rl_args.init), args.keep, torch.bfloat16)
    steps = args.steps or round(60 * args.minutes / pace(rl.run, rl_args, out / "pace_rl"))
    steps = max(PARTS, steps)
    seconds_a_step = pace(pretrain.run, sft_args, out / "pace_sft", 30)
    controls = dict(list(world.controls.items())[:1 if args.steps else None])
    runs: dict[str, dict] = {"rl": {}, **{arm: {} for arm in controls}}
    for seed in range(args.seeds):
        settings = replace(rl_args, steps=steps, seed=seed, out=f"{out}/rl{seed}")
        runs["rl"][seed] = course(rl.run, settings, args.count)
        as_long = max(PARTS, round(60 * runs["rl"][seed][-1][0] / seconds_a_step))
        for arm, annotators in controls.items():
            settings = replace(sft_args, steps=as_long, seed=seed, out=f"{out}/{arm}{seed}")
            with annotators():
                runs[arm][seed] = course(pretrain.run, settings, args.count)
        write_json(out / "report.json", {
            "title": f"RL beside SFT, world: {args.world}", "where": hw.description,
            "unit": "minute", "figures": figures(runs), "curves": curves(runs), "runs": runs})
        print(f"after {seed + 1} seeds, points: " + ", ".join(
            f"{name} {row['mean']:.2f}" for name, row in figures(runs).items() if "least" in row),
            flush=True)
    print(f"the report is {report.write(out)}")


if __name__ == "__main__":
    main(lambda: worlds(cli(Args, about=__doc__)))
