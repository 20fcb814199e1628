"""RL on one kind of task forgets the others less than SFT on it.

The paper sees weaker interference across domains in RL than in SFT [C], without a number. A reason
could be that RL only moves weight among replies that the model gives already, whereas SFT moves it
to replies that are not its own.

From the start of the sheet `hierarchy`, which knows seven categories of four tiers, training goes
on with forms alone, by RL or by SFT, for 30 steps. A step of RL has 8 groups of 8 episodes, a step
of SFT a row of 2,048 tokens, some fifteen episodes: SFT sees a quarter as many, and so the
comparison favours it [O]. The learning rates are those of lab/joint.py, 4e-4 and 2e-3, which were
chosen for what each of them learns.

`forms`: percent of 150 held-out forms, greedy; `others`: the mean of the six other categories;
`before`: the same of the start.
"""
from dataclasses import replace

from lab import joint
from lab.joint import Phase, TIERS
from lab.sheet import Gain, Sheet
from lab.sheets.hierarchy import ARGS, figures, SFT, STUDY as TAUGHT, tiers_start

STEPS = 30
STUDY = replace(TAUGHT, arms={"rl": [Phase("rl", TIERS[-1], steps=STEPS)],
                              "sft": [SFT(TIERS[-1], steps=STEPS)]})


def measure(arm, seed, folder):
    start = tiers_start(folder)
    before = figures(joint.examine(start, folder.parent / "start", STUDY, ARGS.count))
    after = figures(joint.run_arm(arm, seed, start, STUDY, ARGS, folder)["solved"])
    return {"forms": after["forms"], "others": after["below"], "before": before["below"],
            "forms before": before["forms"]}


SHEET = Sheet(
    arms=("rl", "sft"), measure=measure, minutes=10,
    equal=f"the start, {STEPS} optimizer steps",
    tests=(Gain("points of the other categories, after RL minus after SFT",
                lambda runs: runs["rl"]["others"] - runs["sft"]["others"],
                claimed=10.0, source="[O] the paper gives no number"),))
