"""Two teachers beat the better single one.

The paper distils its encoder from two frozen teachers: SigLIP2 for what a picture means, DINOv3 for
its texture [C]. A second teacher pays only if the student of both is better than the student of
either alone, in the same number of steps.

Two small stand-ins a seed [O]: one trained on captions, one on the shape under each patch. Then
three students of 1,500 steps, one of both teachers and one of each. `linear` is the accuracy of a
linear probe for colour and shape of a picture, `dense` for the shape under each patch, in percent,
both on held-out pictures; their sum is compared, so that a student has to be good at both.
"""
from dataclasses import replace

from lab import vit_claims
from lab.sheet import Gain, Sheet
from lib.common import setup

PLAIN = vit_claims.Args(steps=1500, teacher_steps=800, device="cpu", dtype="float32")


def measure(arm, seed, folder):
    args, hw = replace(PLAIN, out=str(folder)), setup("cpu", "float32")
    teachers = folder.parent / "start" / f"seed{seed}"
    for name in ("semantic", "texture"):        # trained by the first arm, found by the others
        vit_claims.stage(args, hw, name, teachers, seed)
    found = vit_claims.student(args, hw, arm, teachers, seed)
    linear, dense = 100 * found["linear"], 100 * found["dense"]
    return {"linear + dense": linear + dense, "linear": linear, "dense": dense}


def gain(runs):
    both, *single = (runs[arm]["linear + dense"] for arm in ("both", "semantic", "texture"))
    return both - max(single)


SHEET = Sheet(
    arms=tuple(vit_claims.STUDENTS), measure=measure, kind="night", minutes=180,
    equal="teachers, 1,500 steps of 64 pictures, the same pictures",
    tests=(Gain("linear + dense in points, both less the better single teacher's student", gain,
                claimed=2, source="[O] a point for each of the two probes"),))
