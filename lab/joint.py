"""What does it do to train on many categories at once? Three studies, each with its controls.

    python -m lab.joint --study=matrix      RL on one family, or on all: who gains and who falls
    python -m lab.joint --study=tiers       trajectories alone, tier after tier, or all at once
    python -m lab.joint --study=world       RL on thirty categories beside SFT, in a flawed world
    python -m lab.joint --study=tiers --minutes=0.1 --count=4 --seeds=1     all steps, in minutes

A study is a table of arms. An arm is a list of phases, each a run of rl.py or pretrain.py on some
categories, and begins from the study's start. All arms of a study take the same CPU minutes of one
thread, though a phase has 17 steps at least. Then each plays the same held-out tasks, greedily, and
is compared with the start.

An effect is the mean over the seeds, with a 95% interval by Student's t. `detectable` is the least
effect that so many seeds, which differ so much, would show in four of five studies: an effect that
is not seen may still be there if it is smaller. With two seeds both are wide; where each seed has
its own interval (`world`), it is over the tasks.

If a study is started again, finished runs are not repeated and an interrupted one continues. So two
processes can share the seeds (--first), once the start is trained; the report has those of the
process that wrote it, until the study is started again with all seeds.
"""
import functools
import os
import random
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import numpy as np

import gym
import pretrain
import rl
from data import parse_mix
from lab import report
from lab.sheet import effect
from lab.worlds import fallible, FEW, slip, timed
from lib.checkpoint import load_config, load_model
from lib.cli import (check_options, cli, Count, main, Natural, NonNegative, Positive, Range,
                     UserError)
from lib.common import read_json, ROOT, setup, write_json
from lib.curriculum import Curriculum
from lib.episodes import best_and_worst
from lib.evaluation import budget, run_tasks, tasks_of
from lib.runs import find_checkpoint, same_options
from lib.scoring import mean_interval
from lib.summary import difference, outcome
from tasks.base import OneShot, Task
from tasks.verify import answer_and_gold, BEGIN
from tokenizer import tokenizer_of


@dataclass
class Args:
    study: Literal["matrix", "tiers", "world"] = "matrix"   # which of the three
    arms: str = ""                # only these, separated by commas; default: all of the study
    seeds: Positive = 3           # runs of each arm
    first: Natural = 0            # number of the first seed
    minutes: NonNegative = 1.6    # CPU minutes of each arm
    before: Positive = 400        # SFT steps that make the start
    prompts: Positive = 8         # tasks a step of RL that have a signal, eight rollouts each
    lr: NonNegative = 4e-4        # peak learning rate of RL
    sft_lr: NonNegative = 2e-3    # and of SFT
    think: Annotated[int, Range(1, 1000)] = 32      # tokens of a thought, in the arm that thinks
    count: Count = 60             # held-out tasks a category
    init: str = ""                # folder to begin from; default: as the study says
    out: str = "out/joint"        # a folder a study: report.json, report.html, a folder a run


FIRST_TASK = 3_000_000          # number of the first held-out task


# ---- categories ---------------------------------------------------------------------------------

# What can be seen in 64 pixels: eighteen categories. RL plays three of each family: in two minutes
# nine would get too few rollouts each. The other nine show what becomes of skills without reward.
PLAYED = {"perception": "counting,ground_box,point",
          "reasoning": "spatial_relation,map_route,interleaved_qa",
          "agent": "gui_click,gui_form,text_tools"}
NINE = ",".join(PLAYED.values())
EIGHTEEN = NINE + (",shape_attr,ocr_line,ground_multi,scene_to_json,spot_diff,video_events,"
                   "grid_logic,text_code,world_knowledge")

# The paper's hierarchy of skills on screens [C], as far as 64 pixels show it: perception of
# elements, grounding, a single action, a trajectory.
TIERS = ("shape_attr,counting,ocr_line", "ground_box,point", "gui_click", "gui_form")

# Without those whose episodes take longest: pages, long documents, and tools for pictures. Larger
# pictures get smaller weights, as in runs/night.sh, and so do long episodes that nobody has shown:
# a group of text_tools in which no rollout finds the way took 30 seconds, one of counting 0.1.
MIX = EIGHTEEN.replace("text_tools", "text_tools:.2") + (
    ",widget_state:.7,ui_ground:.7,matrix_puzzle:.7,geometry:.7,gui_next_action:.7,gui_critic:.4,"
    "gui_navigate:.2,gui_multi_app:.2,chart_read:.3,chart_arith:.3,table_read:.3,code_output:.3")
THIRTY = ",".join(name for name, _ in parse_mix(MIX))


# ---- what is wrong with a world ------------------------------------------------------------------

# Categories with annotators who err: a third of the thirty, seven of the nine. And those without
# any demonstration of a whole episode: of gui_form single questions about its screens are shown, of
# the other three, which have no such questions, nothing.
ERRING = ("counting,ground_box,point,widget_state,ui_ground,spatial_relation,interleaved_qa,"
          "map_route,gui_click,gui_next_action").split(",")
UNTOLD = "gui_form,gui_navigate,gui_multi_app,text_tools".split(",")
SHOWN = ",".join(part for part in MIX.split(",") if part.split(":")[0] not in UNTOLD[1:])

CONFUSED = dict(zip(
    "red orange green blue cyan purple pink yellow circle square triangle star yes no left".split(),
    "orange red blue green blue pink purple orange square circle diamond cross no yes right".split()
))


def mistake(question: str, reply: str) -> str:
    """The reply of an annotator who errs: as in lab/worlds.py, boxes a quarter of the picture too
    low (or too high), and one word taken for another."""
    slipped = slip(question, reply)
    if slipped != reply or BEGIN not in reply:
        return slipped

    def lower(box):
        left, top, right, bottom = map(int, box.groups())
        by = 250 if bottom < 750 else -250
        return f"[{left}, {max(0, top + by)}, {right}, {max(0, bottom + by)}]"

    moved = re.sub(r"\[(\d+), (\d+), (\d+), (\d+)\]", lower, reply)
    return re.sub(r"[a-z]+", lambda word: CONFUSED.get(word[0], word[0]), moved)


def whole_episodes():
    """A context in which gym.demonstrate shows nothing but what a task asks for: without further
    questions about the screens of an episode."""
    true = gym.demonstrate

    def demonstrate(task: Task, *args, **options):
        talks = true(task, *args, **options)
        if issubclass(gym.CATEGORIES[task.category].env, OneShot):
            return talks
        further = {talk[0].text for talk in true(task, parts=True)}
        return [talk for talk in talks if talk[0].text not in further]

    return mock.patch.object(gym, "demonstrate", demonstrate)


def at_least(evidence: dict) -> float:
    """A weak verifier of counts: it takes every number that is not too small. [O]"""
    answer, gold = answer_and_gold(evidence)
    return float(bool(re.fullmatch(r"[0-9]{1,12}", answer)) and int(answer) >= int(gold))


def weak_verifier():
    """A context in which `counting` is scored by `at_least`."""
    weak = replace(gym.CATEGORIES["counting"], verifiers={"answer": at_least})
    return mock.patch.dict(gym.CATEGORIES, counting=weak)


def unreliable(chance: float):
    """A context in which this share of all verdicts is the opposite of the right one. Task and
    evidence decide which: the same episode of the same task is always judged in the same way."""
    true = gym.Rewards.score

    def score(self, task, evidence):
        found = true(self, task, evidence)
        if found.error or random.Random(repr((task, evidence))).random() >= chance:
            return found
        return replace(found, reward=1 - found.reward)

    return mock.patch.object(gym.Rewards, "score", score)


# ---- arms ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Phase:
    """A part of an arm. how: rl or sft. share: of the arm's minutes. options: further ones of rl.py
    or pretrain.py. around: makes the context in which it runs. steps: so many, instead of a share
    of the minutes."""
    how: str
    mix: str
    share: float = 1.0
    options: dict = field(default_factory=dict)
    around: object = nullcontext
    steps: int = 0


@dataclass(frozen=True)
class Study:
    """names: the categories of the examination. arms: {name: phases}. init: folder; start: the SFT
    that makes the start from it. think: arms that are examined with thoughts too."""
    names: str
    arms: dict
    init: str
    start: Phase
    think: tuple = ()


def matrix(args: Args) -> Study:
    """RL on each family and on all, from a start whose annotators err in seven of the nine
    categories; SFT on more of the same; and what could spoil or help RL on all."""
    flawed = functools.partial(fallible, mistake, ERRING)
    two = PLAYED["perception"] + "," + PLAYED["reasoning"]
    arms = {family: [Phase("rl", mix)] for family, mix in PLAYED.items()}
    arms["mix"] = [Phase("rl", NINE)]
    arms["weak"] = [Phase("rl", NINE, around=weak_verifier)]
    arms["sft"] = [Phase("sft", EIGHTEEN, around=flawed)]
    # A short SFT shows how the oracle reasons, where it does; then RL, with thoughts.
    arms["think"] = [Phase("sft", two, 0.4, {"think": 1.0}, flawed),
                     Phase("rl", two, 0.6, {"think": args.think})]
    arms["plain"] = [Phase("sft", two, 0.4, around=flawed), Phase("rl", two, 0.6)]
    # Mechanisms of RL on many categories, each switched off.
    arms["even"] = [Phase("rl", NINE, around=functools.partial(
        mock.patch.object, Curriculum, "interest", lambda self, p: 1.0))]
    arms["unexpanded"] = [Phase("rl", NINE, around=functools.partial(
        mock.patch.object, Curriculum, "expansion", 1.0))]
    return Study(EIGHTEEN, arms, f"{ROOT}/ckpt/gym", Phase("sft", EIGHTEEN, around=flawed),
                 ("start", "think", "plain"))


def tiers(args: Args) -> Study:
    """The same minutes on tier 3 alone, on the tiers in turn, and on all at once."""
    last, together = TIERS[-1], ",".join(TIERS)

    def ways(how, around=nullcontext):
        return {f"{how}_alone": [Phase(how, last, around=around)],
                f"{how}_turn": [Phase(how, tier, 1 / len(TIERS), around=around) for tier in TIERS],
                f"{how}_all": [Phase(how, together, around=around)]}

    start = Phase("sft", together, around=whole_episodes)
    return Study(together, ways("sft", whole_episodes) | ways("rl"), f"{ROOT}/ckpt/align", start)


def world(args: Args) -> Study:
    """Thirty categories: a third with annotators who err, tier 3 without trajectories."""
    around = functools.partial(fallible, mistake, ERRING)
    sft = Phase("sft", SHOWN, options={"parts": "gui_form"}, around=around)
    return Study(THIRTY, {"rl": [Phase("rl", MIX)], "sft": [sft]}, f"{ROOT}/ckpt/gym", sft)


STUDIES = {"matrix": matrix, "tiers": tiers, "world": world}


# ---- runs ---------------------------------------------------------------------------------------

def settings_of(phase: Phase, args: Args, init: Path, seed: int, out: Path):
    """(run function, its Args) of a phase, without the number of steps."""
    # No workers: all the work is done by this process, whose CPU time is measured.
    common = dict(resume=True, save_every=10 ** 6, eval_every=0, mtp=0, device="cpu", workers=0,
                  mix=phase.mix, seed=seed, out=str(out))
    if phase.how == "sft":
        # ckpt/align is a tower without a decoder.
        is_model = "text_config" in read_json(find_checkpoint(init) / "config.json")
        start = {"init" if is_model else "vit": str(init)}
        return pretrain.run, pretrain.Args(**common, **start, lr=args.sft_lr, levels=1,
                                           curriculum=0, own_question=True, **phase.options)
    config, thought = load_config(init), phase.options.get("think", 0)
    tokens = tokenizer_of(config)
    rooms = [budget(tasks_of(name, config, 1, 24, "train", FIRST_TASK), tokens, config)
             for name, _ in parse_mix(phase.mix)]
    context, reply = map(max, zip(*rooms))
    return rl.run, rl.Args(**common, init=str(init), prompts=args.prompts, lr=args.lr,
                           max_new=reply, context=context + thought, **phase.options)


def train(phase: Phase, args: Args, minutes: float, *where) -> float:
    """Train for about so many CPU minutes, or for the phase's steps, or go on where that was
    interrupted; return the minutes. The pace is measured in the first steps and again in the
    middle, since long episodes are rare; in the second half the learning rate falls. A run that
    ends because nothing has a signal is an outcome, too: it learns nothing in what is left. It is
    not tried again.
    """
    work, settings = settings_of(phase, args, *where)
    path = Path(settings.out) / "seconds.json"
    if path.exists() and "without a signal" in (seconds := read_json(path)):
        return seconds["without a signal"] / 60
    with phase.around():
        try:
            if phase.steps:
                return timed(work, replace(settings, steps=phase.steps)) / 60
            steps = 3 * FEW
            begun, spent = (timed(work, replace(settings, steps=n, schedule="constant"))
                            for n in (FEW, steps))
            for share, schedule in ((0.5, "constant"), (1.0, "linear")):
                pace = max(1e-3, (spent - begun) / (steps - FEW))       # seconds a step
                steps += max(1, round(share * (60 * minutes - spent) / pace))
                spent = timed(work, replace(settings, steps=steps, schedule=schedule))
            return spent / 60
        except UserError as error:
            if "nothing is learned" not in str(error):
                raise
            print(f"{settings.out}: {error}")
            seconds = read_json(path)
            write_json(path, seconds | {"without a signal": seconds["so far"]})
            return seconds["so far"] / 60


def examine(folder: Path, run: Path, study: Study, count: int, think: int = 0) -> dict[str, str]:
    """{category: a character for each held-out task (`outcome`)}, played greedily at level 0. It is
    kept in the run's folder, and so are the best and the worst episodes, for that run's page."""
    path = run / (f"exam_think{think}.json" if think else "exam.json")
    if not path.exists():
        model, solved, played = load_model(folder), {}, []
        tokens = tokenizer_of(model.config)
        for name in study.names.split(","):
            tasks = tasks_of(name, model.config, 1, count, "test", FIRST_TASK)
            episodes = run_tasks(model, tokens, tasks, think=think)
            solved[name] = "".join(outcome(e.score) for e in episodes)
            played += episodes
        shown = best_and_worst(played, tokens, run / "pictures")
        write_json(run / "report.json", {"title": run.name, "samples": shown})
        write_json(path, solved)
    return read_json(path)


def make_start(study: Study, args: Args, out: Path) -> Path:
    """Train a study's start in the folder `out`, unless it is there; return its checkpoint."""
    work, settings = settings_of(study.start, args, Path(args.init or study.init), 100, out)
    with study.start.around():
        timed(work, replace(settings, steps=args.before))
    return find_checkpoint(out)


def run_arm(name: str, seed: int, start: Path, study: Study, args: Args, out: Path) -> dict:
    """Train an arm and examine it: {minutes, solved}, and `thinking`, what it solves with
    thoughts."""
    folder, minutes = start, 0.0
    for i, phase in enumerate(study.arms[name]):
        run = out / f"{name}{seed}" / f"phase{i}"
        minutes += train(phase, args, args.minutes * phase.share, folder, seed, run)
        folder = find_checkpoint(run)
    found = {"minutes": minutes, "solved": examine(folder, run.parent, study, args.count)}
    if name in study.think:
        found["thinking"] = examine(folder, run.parent, study, args.count, args.think)
    report.write(run.parent)
    return found


# ---- figures ------------------------------------------------------------------------------------

def share(solved: dict[str, str], names) -> float:
    """Percent of tasks that are solved, each category counting the same."""
    return 100 * float(np.mean([solved[name].count("1") / len(solved[name]) for name in names]))


def groups_of(study: Study) -> dict[str, list[str]]:
    """{name: categories} whose means are reported: all; families, of the matrix those that RL
    plays and the rest; otherwise tiers too."""
    names = study.names.split(",")
    if study.names == EIGHTEEN:
        played = {family: mix.split(",") for family, mix in PLAYED.items()}
        others = [name for name in names if name not in NINE.split(",")]
        return {"all": names, **played, "not played": others}
    found = {"all": names}
    for name in names:
        env = gym.CATEGORIES[name].env
        found.setdefault(env.family, []).append(name)
        found.setdefault(f"tier {env.tier}", []).append(name)
    return found


def gains(runs: dict, start: dict, study: Study, key: str = "solved") -> dict[str, dict]:
    """{"arm: group": effect} of what each arm gained over the start, in points."""
    return {f"{arm}: {group}": effect([
        share(found[key], names) - share(start[key], names) for found in seeds.values()])
        for arm, seeds in runs.items() if all(key in found for found in seeds.values())
        for group, names in groups_of(study).items()}


def differences(first: dict[str, str], second: dict[str, str]) -> dict[str, dict[str, float]]:
    """{category: difference, low, high in points}, second minus first, over the same tasks; first
    of all their mean, `all`."""
    pairs = {name: found for name in first
             if (found := difference({"solved": first[name]}, {"solved": second[name]}))}
    return {name: dict(zip(("difference", "low", "high"), (100 * x for x in found)))
            for name, found in {"all": mean_interval(list(pairs.values())), **pairs}.items()}


def figures(runs: dict, start: dict, study: Study) -> dict[str, dict]:
    """All tables: percentages of the start and of each run, by group and by category; gains of the
    arms, with thoughts too; and of the world, where two seeds must do, each run beside the start,
    and RL beside SFT."""
    table = {}
    ends = {"start": start} | {f"{arm}, seed {seed}": found for arm, seeds in runs.items()
                               for seed, found in seeds.items()}
    for row, found in ends.items():
        for key, how in (("solved", ""), ("thinking", ", thinking")):
            if key in found:
                solved = found[key]
                table[f"{row}{how}: percent"] = {
                    group: share(solved, names) for group, names in groups_of(study).items()
                } | {name: share(solved, [name]) for name in solved}
    table |= {f"gain, {row}": values for row, values in gains(runs, start, study).items()}
    table |= {f"gain thinking, {row}": values
              for row, values in gains(runs, start, study, "thinking").items()}
    if study.names == THIRTY:
        pairs = [("start", row) for row in ends if row != "start"]
        pairs += [(row.replace("rl", "sft"), row) for row in ends if row.startswith("rl")]
        for first, second in pairs:
            if first in ends:
                table |= {f"{second} over {first}: {name}": values for name, values in
                          differences(ends[first]["solved"], ends[second]["solved"]).items()}
    table["CPU minutes"] = {row: found["minutes"] for row, found in ends.items()
                            if "minutes" in found}
    return table


def joint(args: Args):
    check_options(args)
    if not args.minutes:
        raise UserError("--minutes takes more than 0")
    os.environ["OMP_NUM_THREADS"] = "1"         # minutes are those of one thread
    hw, study, out = setup("cpu"), STUDIES[args.study](args), Path(args.out) / args.study
    chosen = [name for name in args.arms.split(",") if name] or list(study.arms)
    unknown = [name for name in chosen if name not in study.arms]
    if unknown:
        raise UserError(f"--study={args.study} has no arm '{unknown[0]}', only "
                        f"{', '.join(study.arms)}")
    asked = {name: value for name, value in asdict(args).items()
             if name not in ("seeds", "first", "arms", "out")}
    with same_options(out / "config.json", asked):
        start = make_start(study, args, out / "start")
        before = {"solved": examine(start, out / "start", study, args.count)}
        if "start" in study.think:
            before["thinking"] = examine(start, out / "start", study, args.count, args.think)
    runs: dict[str, dict] = {}
    for seed in range(args.first, args.first + args.seeds):     # every arm, then the next seed
        for arm in chosen:
            found = run_arm(arm, seed, start, study, args, out)
            runs.setdefault(arm, {})[seed] = found
            at, first = (share(x["solved"], study.names.split(",")) for x in (found, before))
            print(f"seed {seed}, {arm}: {at:.1f}% after {found['minutes']:.1f} CPU minutes; the "
                  f"start has {first:.1f}%", flush=True)
            write_json(out / "report.json", {
                "title": f"Joint training: {args.study}", "where": hw.description,
                "figures": figures(runs, before, study), "runs": runs, "start": before})
    print(f"the report is {report.write(out)}")


if __name__ == "__main__":
    main(lambda: joint(cli(Args, about=__doc__)))
