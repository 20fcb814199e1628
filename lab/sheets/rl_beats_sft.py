"""Where annotators err, RL beats SFT on what they have shown, in the same minutes.

RL is what the paper's stages end with: it needs a verifier, not a demonstration [C]. Where
demonstrations are right and endless, there is nothing to gain over them. So the annotators of this
world err, as in lab/worlds.py: 60% of the counts above two, of the points and of the clicks on
buttons are wrong, always in the same way [O]. Verifiers do not err.

The start is `ckpt/demo` after 250 steps of SFT on such answers. From it go on `rl`, on the same six
categories, and `sft`, on more of the same answers, each for a minute and a half of CPU time of one
thread. A step of SFT has a row of 1,024 tokens, a step of RL 8 groups of 8 with a signal.

`mean` and `forms`: percent of 100 held-out tasks of each of the six, and of forms, whose
demonstrations are right; greedy. `minutes`: CPU minutes that were spent, `steps`: for how many.
"""
from lab import joint
from lab.joint import Phase, share
from lab.sheet import Gain, shared_start, Sheet
from lab.worlds import fallible, MIX, NAMES
from lib.common import read_log, ROOT

ARGS = joint.Args(minutes=1.5, before=250, count=100, lr=8e-4)
SFT = Phase("sft", MIX, options={"rows": 1, "row_tokens": 1024}, around=fallible)
STUDY = joint.Study(",".join(NAMES), {"rl": [Phase("rl", MIX)], "sft": [SFT]},
                    f"{ROOT}/ckpt/demo", SFT)


def fallible_start(folder):
    """The start, which `transfer` and `weak_verifier` have as well."""
    return joint.make_start(STUDY, ARGS, shared_start(folder, "fallible_start"))


def measure(arm, seed, folder):
    start = fallible_start(folder)
    before = joint.examine(start, folder.parent / "start", STUDY, ARGS.count)
    found = joint.run_arm(arm, seed, start, STUDY, ARGS, folder)
    steps = read_log(folder / f"{arm}{seed}" / "phase0" / "log.jsonl")[-1]["step"]
    return {"mean": share(found["solved"], NAMES), "forms": share(found["solved"], ["gui_form"]),
            "start": share(before, NAMES), "minutes": found["minutes"], "steps": steps}


SHEET = Sheet(
    arms=("rl", "sft"), measure=measure, minutes=14,
    equal=f"the start and {ARGS.minutes} CPU minutes of one thread",
    tests=(Gain("points of the mean of six categories, RL minus SFT",
                lambda runs: runs["rl"]["mean"] - runs["sft"]["mean"],
                claimed=10.0, source="[O] what this repository has set itself as its aim"),))
