"""One weak verifier among many spoils every domain of joint RL.

A single verifier that could be deceived sank the results in all domains after about 150 steps [R:
GLM-4.5V]; by how much, is not said.

From the start of the sheet `rl_beats_sft` RL plays six categories, 150 steps of 4 tasks with a
signal. In `weak` counting has a verifier that takes every number which is not too small [O]; the
other five keep theirs. In `right` all keep theirs. The weak one is soon deceived: a model that
always says a large number gets every reward. Then counting gives no signal any more, since all
replies of a group have the same reward, and RL drops such groups.

`others`: percent of 100 held-out tasks of each of the five other categories, `counting`: of
counting, all greedy and by the right verifiers.
"""
from dataclasses import replace

from lab import joint
from lab.joint import Phase, share
from lab.sheet import Gain, Sheet
from lab.sheets import rl_beats_sft
from lab.sheets.rl_beats_sft import fallible_start
from lab.worlds import MIX, NAMES

STEPS = 150
OTHERS = [name for name in NAMES if name != "counting"]
ARGS = replace(rl_beats_sft.ARGS, prompts=4)
STUDY = replace(rl_beats_sft.STUDY, arms={
    "right": [Phase("rl", MIX, steps=STEPS)],
    "weak": [Phase("rl", MIX, around=joint.weak_verifier, steps=STEPS)]})


def measure(arm, seed, folder):
    start = fallible_start(folder)
    solved = joint.run_arm(arm, seed, start, STUDY, ARGS, folder)["solved"]
    return {"others": share(solved, OTHERS), "counting": share(solved, ["counting"])}


SHEET = Sheet(
    arms=("right", "weak"), measure=measure, minutes=12,
    equal=f"the start, {STEPS} steps of {ARGS.prompts} groups of 8",
    tests=(Gain("points lost in the other categories, right minus weak",
                lambda runs: runs["right"]["others"] - runs["weak"]["others"],
                claimed=5.0, source="[O] the relative gives no number"),))
