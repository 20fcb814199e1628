"""The option that the paper adopts sends no visual embeddings along the pipeline.

The head that predicts further tokens is on the last stage of a pipeline, the vision tower on the
first. If the head reads the visual embeddings themselves (`embed`), each stage has to pass them on,
and to send their gradients back. The paper puts one learnable embedding at all visual slots
(`token`), which the last stage looks up from the ids, so nothing is sent [C].

lab/mmtp_options.py cuts `tiny` in two halves, on two processes, and counts the bytes that cross the
cut in one step, forward and backward; a seed draws the weights and a row of tasks with pictures.
By the formula, `embed` sends hidden states and embeddings, T + V vectors of a row of T tokens with
V visual slots, `token` sends T: the share saved is V / (T + V). Half of a row visual gives 33%.
"""
from lab.mmtp_options import Args, count_bytes
from lab.sheet import Gain, Sheet


def measure(arm, seed, folder):
    rows = count_bytes(Args(seed=seed, out=str(folder)))
    row = rows["row"]
    return {"bytes, embed": rows["embed"]["bytes"], "bytes, token": rows["token"]["bytes"],
            "tokens": row["tokens"], "visual": row["visual"],
            "saved by the formula, percent": 100 * row["visual"] / (row["tokens"] + row["visual"])}


def saved(runs):
    """The bytes that `token` saves of those of `embed`, in percent."""
    run = runs["one step"]
    return 100 * (1 - run["bytes, token"] / run["bytes, embed"])


SHEET = Sheet(
    arms=("one step",), measure=measure, minutes=0.7,
    equal="the same weights and the same row for both options",
    tests=(Gain("bytes across the cut, percent saved by token", saved, claimed=10,
                source="[O] a ninth of the tokens is visual; pictures have more than that"),))
