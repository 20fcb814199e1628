"""A trajectory is learned where its verifier is reliable, and less where it errs.

Long-horizon tasks need a clear specification and reliable verification [C: the third of the paper's
lenses, an experience without a number]. Here the specification stays clear, and the verifier does
not: RL on forms, whose reward comes once, at the end of an episode of several clicks.

The start is `ckpt/demo` after 200 steps of SFT on forms, whose annotators click a row of the grid
too low in 60% of the clicks (lab/worlds.py). From it RL plays forms, 25 steps of 8 tasks with a
signal. `exact` is the gym's verifier. `unreliable` is the same, but 30% of its verdicts are the
opposite [O]. Task and episode decide which, so that to repeat what was rewarded once is rewarded
again, as with a goal that two people read in two ways.

`forms`: percent of 300 held-out forms, greedy, by the exact verifier; `start`: the same of the
start, which is one model for all seeds. `reward`: the mean reward that a run saw, by step.
"""
import functools
from contextlib import nullcontext

from lab import joint
from lab.joint import Phase, share
from lab.sheet import Gain, Sheet
from lab.worlds import fallible
from lib.common import read_log, ROOT

WRONG = 0.3                     # share of the verdicts that are the opposite
STEPS = 25
VERIFIERS = {"exact": nullcontext, "unreliable": functools.partial(joint.unreliable, WRONG)}
ARGS = joint.Args(before=200, count=300, prompts=8, lr=8e-4)
STUDY = joint.Study(
    "gui_form", {arm: [Phase("rl", "gui_form", around=verifier, steps=STEPS)]
                 for arm, verifier in VERIFIERS.items()}, f"{ROOT}/ckpt/demo",
    Phase("sft", "gui_form", options={"rows": 1, "row_tokens": 512},
          around=functools.partial(fallible, names=("gui_form",))))


def measure(arm, seed, folder):
    start = joint.make_start(STUDY, ARGS, folder.parent / "form_start")
    before = joint.examine(start, folder.parent / "start", STUDY, ARGS.count)
    solved = joint.run_arm(arm, seed, start, STUDY, ARGS, folder)["solved"]
    log = read_log(folder / f"{arm}{seed}" / "phase0" / "log.jsonl")
    return {"forms": share(solved, ["gui_form"]), "start": share(before, ["gui_form"]),
            "reward": [(line["step"], line["reward"]) for line in log if "reward" in line]}


SHEET = Sheet(
    arms=tuple(VERIFIERS), measure=measure, minutes=12, seeds=6,
    equal=f"the start, {STEPS} steps of {ARGS.prompts} groups of 8, the exact examination",
    tests=(Gain("points of held-out forms, exact minus unreliable",
                lambda runs: runs["exact"]["forms"] - runs["unreliable"]["forms"],
                claimed=5.0, source="[O] the paper gives no number"),))
