"""RL on perception alone makes agent tasks better, which RL has not played.

The first of the paper's three lenses is that perception stays the foundation of agents [C]. It
gives no number for that. A relative does: RL on grounding alone lifts GUI tasks by 8.1 points over
SFT [R: GLM-4.5V's table of RL on one domain and on all].

The start is that of the sheet `rl_beats_sft`: its annotators err in counts, in points and in clicks
on buttons. From it RL plays counting and pointing, 100 steps of 8 tasks with a signal, and then the
model has to click on buttons and to fill in forms. In a click the annotators made the same mistake
as in a point, a row too low. What can be transferred is its repair, which is a friendlier case than
the relative's [O]. Forms were shown without mistakes, so clicks alone can gain much.

`agent`: percent of 150 held-out tasks each of clicks and forms, greedy; `clicks` and `forms`: of
either; `perception`: of counting and pointing. The start is one model, the same for all seeds.
"""
from dataclasses import replace

from lab import joint
from lab.joint import Phase, share
from lab.sheet import Gain, Sheet
from lab.sheets import rl_beats_sft
from lab.sheets.rl_beats_sft import fallible_start

STEPS = 100
PERCEPTION, AGENT = ["counting", "point"], ["gui_click", "gui_form"]
ARGS = replace(rl_beats_sft.ARGS, count=150, lr=4e-4)       # the rate of lab/joint.py
STUDY = replace(rl_beats_sft.STUDY, names=",".join(PERCEPTION + AGENT), arms={
    "perception": [Phase("rl", ",".join(PERCEPTION), steps=STEPS)]})


def measure(arm, seed, folder):
    start = fallible_start(folder)
    if arm == "start":
        solved = joint.examine(start, folder.parent / "start", STUDY, ARGS.count)
    else:
        solved = joint.run_arm(arm, seed, start, STUDY, ARGS, folder)["solved"]
    return {"agent": share(solved, AGENT), "clicks": share(solved, ["gui_click"]),
            "forms": share(solved, ["gui_form"]), "perception": share(solved, PERCEPTION)}


SHEET = Sheet(
    arms=("start", "perception"), measure=measure, minutes=5, seeds=5,
    equal=f"the start; RL has {STEPS} steps of {ARGS.prompts} groups of 8",
    tests=(Gain("points gained in agent tasks by RL on perception alone",
                lambda runs: runs["perception"]["agent"] - runs["start"]["agent"],
                claimed=8.1, source="[R] GLM-4.5V: RL on grounding alone, GUI +8.1"),))
