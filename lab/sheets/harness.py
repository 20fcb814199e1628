"""Model and harness make the agent together: the same weights do more in a better harness.

The paper closes with the remark that an agent is a model and its harness together, and should be
designed and measured so [C]. The published harness of a relative shows the model the goal, the
current screen, and all earlier actions as text [R: GLM-4.5V].

The weights of `ckpt/gym` fill in the held-out forms of `gui_form`, level 0, in two of the harnesses
of lib/harness.py: `plain`, which shows the goal and the current screen, and `history`, which also
shows the earlier actions. The model was trained with the latter. A seed is a set of 500 forms, the
same for both; no two seeds have a form in common. `solved` is the percent of forms that are filled
in exactly as the goal says, `replies` the actions a form.
"""
from lab.sheet import Gain, Sheet
from lib.harness import evaluate_harnesses
from sample import load

COUNT = 500


def measure(arm, seed, folder):
    model, tokens, _ = load("ckpt/gym", "cpu", "float32")
    found = evaluate_harnesses(model, tokens, "gui_form", [arm], count=COUNT,
                               seed=1_000_000 + COUNT * seed)[arm]["gui_form"]
    return {"solved": 100 * found["accuracy"], "replies": found["replies"]}


SHEET = Sheet(
    arms=("plain", "history"), measure=measure, minutes=3, seeds=5,
    equal=f"ckpt/gym, {COUNT} held-out forms, greedy replies",
    tests=(Gain("forms solved, points, with the earlier actions in the prompt minus without",
                lambda runs: runs["history"]["solved"] - runs["plain"]["solved"], claimed=5,
                source="[O] the aim of RESULTS.md; the paper has no figure"),))
