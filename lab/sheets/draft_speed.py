"""Drafts of the MTP head make generation faster.

GLM-OCR, a relative with the paper's shared head, reports about half more throughput from drafts
[R]. On a GPU a forward of a few tokens takes about as long as one of a single token, since it waits
for the weights. A CPU computes each token, and the head besides: there a step with three drafts
costs several plain ones.

`ckpt/demo` answers the same held-out tasks greedily, without drafts and with three a step, 16
conversations side by side. `tokens` counts those of the replies in a second of CPU time, prompts
included; the best of five rounds. On a GPU, `python -m lab.drafts --device=cuda` asks the same. A
seed is a set of 192 tasks; no two seeds have one in common.
"""
import time

from engine import Engine
from lab.drafts import decode, requests_of
from lab.sheet import Gain, Sheet
from sample import load

COUNT, MAX_NEW, ROUNDS = 192, 48, 5
ARMS = {"plain": 0, "three drafts": 3}


def measure(arm, seed, folder):
    model, tokens, _ = load("ckpt/demo", "cpu", "float32")
    numbers = range(COUNT * seed, COUNT * (seed + 1))
    requests, context = requests_of(model, tokens, numbers, MAX_NEW)
    rates = []
    for _ in range(ROUNDS + 1):             # the first one warms up
        engine = Engine(model, 16, context, ARMS[arm], adapt=False)
        began = time.process_time()
        replies, _ = decode(engine, requests, None, None)
        rates.append(sum(map(len, replies)) / (time.process_time() - began))
    return {"tokens": max(rates[1:])}


SHEET = Sheet(
    arms=tuple(ARMS), measure=measure, minutes=0.8,
    equal=f"ckpt/demo, {COUNT} held-out tasks, greedy replies, which drafts do not change",
    tests=(Gain("tokens in a second of CPU time with drafts, percent more than without",
                lambda runs: 100 * (runs["three drafts"]["tokens"] / runs["plain"]["tokens"] - 1),
                claimed=50, source="[R] GLM-OCR, on GPUs"),))
