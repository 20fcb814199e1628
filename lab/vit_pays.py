"""Does a trained vision tower pay? Pretraining from three towers, each within the same CPU minutes.

    python -m lab.vit_pays --seeds=3         about twenty minutes a run on one quiet core
    python -m lab.vit_pays --steps=300 --alone=100 --tower=100,50,50,50 --out=out/look

`random`: no tower is trained, all minutes go into pretraining. `contrastive`: a tower is made by
alignment alone, like `ckpt/semantic`. `aligned`: a tower is made by all four stages. `--steps` of
pretraining follow the contrastive tower; the minutes of both together are the budget of each arm.
Each tower is trained once and its time is charged to every seed. An interrupted run goes on. The
lab sheet `tower_pays` takes two of the arms, and draws their losses.
"""
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import pretrain
import train_vit
from lab import report
from lab.demo import MIX
from lab.worlds import pace, spread, timed
from lib.checkpoint import load_model
from lib.cli import check_options, cli, Count, main, Positive, UserError
from lib.common import read_log, setup, write_json
from lib.evaluation import evaluate
from lib.runs import find_checkpoint, same_options
from tokenizer import tokenizer_of


@dataclass
class Args:
    seeds: Positive = 1           # of pretraining, from 0
    steps: Positive = 2600        # of pretraining, from the contrastive tower
    alone: Positive = 1200        # steps of the contrastive tower
    tower: str = "500,100,300,400"  # steps of the four stages of the aligned tower
    count: Count = 300            # held-out tasks a category
    out: str = "out/vit_pays"     # run folder: report.json, report.html, a folder a run


# ---- what equal minutes mean --------------------------------------------------------------------

@dataclass
class Budget:
    """Equal minutes, as steps of pretraining. Dicts are {arm: value}."""
    towers: dict[str, str]      # folder of the tower to begin with; "": random weights
    spent: dict[str, float]     # CPU seconds that it took
    steps: dict[str, int]       # of pretraining, which are left for it
    each: float                 # CPU seconds of such a step


def stage_steps(text: str) -> list[int]:
    """The steps of the four stages in --tower. Raises UserError where they are none."""
    steps = text.split(",")
    right = all(re.fullmatch("[0-9]{1,9}", word) and int(word) for word in steps)
    if len(steps) != len(train_vit.STAGES) or not right:
        raise UserError("--tower takes the steps of semantic, texture, distill and align, as "
                        "500,100,300,400")
    return [int(word) for word in steps]


def make_tower(out: Path, steps: list[int], hw) -> float:
    """Train the first len(steps) stages of a tower; returns the CPU seconds of all of them."""
    settings = train_vit.Args(resume=True, save_every=10 ** 6, eval_every=0, workers=0,
                              dtype="float32", out=str(out))
    for stage, n in zip(train_vit.STAGES, steps):
        seconds = timed(lambda s, stage=stage: train_vit.train(stage, train_vit.check(s), hw),
                        replace(settings, steps=n), f"{stage} {n}")
    return seconds      # of this stage and those before


def budget(args: Args, out: Path) -> Budget:
    """Train the towers, or what is missing of them, and measure a step of pretraining. Raises
    UserError if a tower leaves no minute for pretraining."""
    stages, hw = stage_steps(args.tower), setup("cpu", "float32")
    asked = {name: getattr(args, name) for name in ("steps", "alone", "tower")}
    with same_options(out / "config.json", asked):
        spent = {"random": 0.0, "contrastive": make_tower(out / "contrastive", [args.alone], hw),
                 "aligned": make_tower(out / "aligned", stages, hw)}
    each = pace(pretrain.run, plain(0, "", out), out / "pace", 100)
    seconds = spent["contrastive"] + args.steps * each
    steps = {arm: round((seconds - used) / each) for arm, used in spent.items()}
    if steps["aligned"] < 1:
        raise UserError(f"--tower={args.tower} leaves no minute for pretraining")
    return Budget({"random": "", "contrastive": f"{out}/contrastive/semantic",
                   "aligned": f"{out}/aligned/align"}, spent, steps, each)


# ---- pretraining --------------------------------------------------------------------------------

def plain(seed: int, tower: str, out: Path) -> pretrain.Args:
    """The options of all runs of pretraining."""
    return pretrain.Args(mix=MIX, levels=1, resume=True, mtp_alone=True, mtp_share=0.12,
                         save_every=200, eval_every=100, log_every=50, device="cpu", workers=0,
                         seed=seed, vit=tower, out=str(out))


def pretrained(args: Args, left: Budget, arm: str, seed: int, out: Path) -> tuple[dict, list]:
    """Pretrain within the budget. Returns the evaluation, {category: row}, and the held-out loss as
    [(CPU minutes, those of the tower included, loss), ...]."""
    pretrain.run(replace(plain(seed, left.towers[arm], out), steps=left.steps[arm]))
    model = load_model(find_checkpoint(out))
    table = evaluate(model, tokenizer_of(model.config), MIX, 1, args.count)
    curve = [((left.spent[arm] + left.each * line["step"]) / 60, line["held_out"])
             for line in read_log(out / "log.jsonl") if "held_out" in line]
    return table, curve


# ---- the report ---------------------------------------------------------------------------------

def mean_accuracy(table: dict[str, dict]) -> float:
    """The mean over the categories of an evaluation."""
    return float(np.mean([row["accuracy"] for row in table.values()]))


def figures(tables: dict[str, dict]) -> dict[str, dict]:
    """{run: its mean and {category: accuracy}}, in percent, and what each tower gains over `random`
    in the mean, in points. tables: {"arm, seed N": its evaluation}."""
    rows = {run: {"mean": 100 * mean_accuracy(table)}
            | {name: 100 * row["accuracy"] for name, row in table.items()}
            for run, table in tables.items()}
    gained = {}
    for arm in ("contrastive", "aligned"):
        gained[f"{arm} over random, points"] = spread([
            row["mean"] - rows[run.replace(arm, "random")]["mean"]
            for run, row in rows.items() if run.startswith(arm)])
    return rows | gained


def pays(args: Args):
    check_options(args)
    out, tables = Path(args.out), {}
    left = budget(args, out)
    minutes = (left.spent["contrastive"] + args.steps * left.each) / 60
    for seed in range(args.seeds):
        for arm in left.towers:
            run = f"{arm}, seed {seed}"
            tables[run], _ = pretrained(args, left, arm, seed, out / f"{arm}{seed}")
            print(f"{run}: {left.steps[arm]} steps after {left.spent[arm] / 60:.1f} minutes for "
                  f"the tower, mean {100 * mean_accuracy(tables[run]):.1f}%", flush=True)
        write_json(out / "report.json", {
            "title": f"Does a trained tower pay? {minutes:.1f} CPU minutes each",
            "where": f"towers: {setup('cpu', 'float32').description}; pretraining: "
                     f"{setup('cpu').description}", "figures": figures(tables)})
    print(f"the report is {report.write(out)}")


if __name__ == "__main__":
    main(lambda: pays(cli(Args, about=__doc__)))
