"""Skills on screens are learned better tier by tier than from trajectories alone.

The paper trains for screens in a hierarchy: perception of elements, grounding, a single action, a
trajectory, in SFT and in RL; end-to-end tasks alone are less stable [C]. It gives no number.

Three ways to spend the same SFT, on the four tiers of lab/joint.py: `alone`, all steps on forms,
which are trajectories; `turn`, a quarter of the steps on each tier, from the lowest one; `all`,
every step on all seven categories. They begin with the tower of `ckpt/align` and a decoder that had
250 steps of all seven, so that RL could begin there too, as it does in the sheet `forgetting`. In
`turn` the learning rate rises and falls in each tier [O].

`forms`: percent of 150 held-out forms, greedy. `below`: the mean of the six categories of the three
tiers below. `all` shows whether the order matters, or only that the other
categories are learned too.
"""
import functools

from lab import joint
from lab.joint import Phase, share, TIERS
from lab.sheet import Gain, shared_start, Sheet

STEPS = 160
ARGS = joint.Args(before=250, count=150)
SFT = functools.partial(Phase, "sft", options={"rows": 1, "row_tokens": 2048},
                        around=joint.whole_episodes)
TOGETHER = ",".join(TIERS)
WAYS = {"alone": [SFT(TIERS[-1], steps=STEPS)],
        "turn": [SFT(tier, steps=STEPS // len(TIERS)) for tier in TIERS],
        "all": [SFT(TOGETHER, steps=STEPS)]}
STUDY = joint.Study(TOGETHER, WAYS, joint.tiers(ARGS).init, joint.tiers(ARGS).start)


def tiers_start(folder):
    """The start, which `forgetting` has as well."""
    return joint.make_start(STUDY, ARGS, shared_start(folder, "tiers_start"))


def figures(solved):
    """{forms, below} in percent, of an examination."""
    *below, last = TOGETHER.split(",")
    return {"forms": share(solved, [last]), "below": share(solved, below)}


def measure(arm, seed, folder):
    return figures(joint.run_arm(arm, seed, tiers_start(folder), STUDY, ARGS, folder)["solved"])


SHEET = Sheet(
    arms=tuple(WAYS), measure=measure, minutes=10,
    equal=f"the start, {STEPS} steps of a row of 2,048 tokens",
    tests=(Gain("points of held-out forms, tier by tier minus forms alone",
                lambda runs: runs["turn"]["forms"] - runs["alone"]["forms"],
                claimed=5.0, source="[O] the paper gives no number"),))
