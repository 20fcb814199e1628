"""With drafts of the MTP head a step gives several tokens, as many as its acceptance explains.

The head drafts K tokens, the trunk checks them in one forward and adds one of its own. If each
draft is accepted with probability p where all before it are, a step gives (1 - p^(K+1)) / (1 - p)
tokens [R: speculative decoding]. GLM-OCR, a relative with the paper's shared head, predicts ten
tokens a step and keeps 5.2 [R]: by the formula p = 0.84, and with three drafts 3.1 tokens.

`ckpt/demo` answers held-out tasks of its six categories greedily, three drafts a step. Most replies
are short, and the first token of each comes from the forward over the prompt and does not count. A
seed is a set of 192 tasks; no two seeds have one in common. p is counted over all steps of a run.
"""
from engine import Engine
from lab.drafts import decode, expected, mean_rate, requests_of
from lab.sheet import Gain, NoLoss, Sheet
from sample import load

K, COUNT, MAX_NEW = 3, 192, 48
GLM_OCR = expected(0.84, K)


def measure(arm, seed, folder):
    model, tokens, _ = load("ckpt/demo", "cpu", "float32")
    numbers = range(COUNT * seed, COUNT * (seed + 1))
    requests, context = requests_of(model, tokens, numbers, MAX_NEW)
    engine = Engine(model, 16, context, K, adapt=False)
    reached = [0] * (K + 1)     # steps of a request in which so many drafts or more are accepted

    def note(drafts, accepted, chosen):
        for k in range(K + 1):
            reached[k] += int((accepted >= k).sum())

    engine.trace = note
    decode(engine, requests, None, None)
    p = mean_rate([more / max(1, less) for less, more in zip(reached, reached[1:])])
    return {"tokens a step": engine.tokens / engine.steps, "p": p, "formula": expected(p, K)}


def deviation(runs):
    """Minus the percent by which tokens a step differ from the formula."""
    run = runs["ckpt/demo"]
    return -100 * abs(run["tokens a step"] / run["formula"] - 1)


SHEET = Sheet(
    arms=("ckpt/demo",), measure=measure, minutes=0.2,
    equal=f"three drafts a step, {COUNT} held-out tasks, greedy replies",
    tests=(Gain("tokens that a step gives with three drafts, minus the one of plain decoding",
                lambda runs: runs["ckpt/demo"]["tokens a step"] - 1, claimed=GLM_OCR - 1,
                source="[R] GLM-OCR's 5.2 of ten, by the formula"),
           NoLoss("difference from the formula, percent, as a loss", deviation, claimed=10,
                  source="[O] the aim of RESULTS.md")))
