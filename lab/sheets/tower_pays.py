"""A trained tower pays in pretraining at equal minutes.

The paper trains its encoder in two stages, distillation and alignment, before the decoder ever sees
a picture [C]. A trained tower is ahead in steps, but its training has taken minutes in which
pretraining could have gone on, tower and decoder together.

Two runs a seed of lab/vit_pays.py, within the same CPU minutes: pretraining from a tower that went
through all stages, whose time counts, and from random weights. `mean` is the accuracy over the
demo's six categories of the gym, in percent of 300 held-out tasks each.
"""
from lab import vit_pays
from lab.sheet import Gain, Sheet

PLAIN = vit_pays.Args()


def start(folder):
    """The towers and the pace of a step: trained and measured once, then found in the folder."""
    return vit_pays.budget(PLAIN, folder)


def measure(arm, seed, folder):
    left = start(folder.parent / "start")
    table, curve = vit_pays.pretrained(PLAIN, left, arm, seed, folder)
    return {"mean": 100 * vit_pays.mean_accuracy(table),
            "minutes of the tower": left.spent[arm] / 60, "steps": left.steps[arm],
            **{name: 100 * row["accuracy"] for name, row in table.items()},
            "held-out loss over CPU minutes": curve}


SHEET = Sheet(
    arms=("aligned", "random"), measure=measure, kind="night", minutes=145,
    equal=f"CPU minutes: those of a tower by alignment alone and {PLAIN.steps} steps from it",
    tests=(Gain("mean accuracy in points, from the trained tower less from random weights",
                lambda runs: runs["aligned"]["mean"] - runs["random"]["mean"], claimed=2,
                source="[O] less would not be worth a stage of its own"),))
