"""Pictures in the training do not erode what a model knows of text.

The paper pretrains one model on plain text, code and pictures together, and also reports coding
without pictures (CC-Backend 22.8) [C]. The worry is that pictures cost text skill.

Here two runs see the same rows of text, step by step: `tiny` from random weights, one row of 2,048
tokens a step, pieces of Python's language reference and of its standard library. `and pictures`
sees a second row in each step, of the gym's questions about pictures. Each learnt token counts the
same. So the claim is about the text skill for the same text: the second run computes twice as much.

`text loss`: nats a token on held-out pieces (one in fifty files and pages, of which nothing is
trained on). `picture loss`: of the answers, the mean over the last fifth of the steps.
"""
import json
import math
from pathlib import Path
from statistics import fmean

import torch

from data import collate, library_files, library_text, Packer, parse_data, parse_mix, Stream
from lab.drafts import NAMES
from lab.sheet import NoLoss, Sheet
from lib.common import write_text
from model import GLMV, sized
from optim import OptimConfig, Optimizer, schedule
from pretrain import loss_sum

STEPS, TOKENS, HELD_OUT = 240, 2048, 8      # steps of a run, tokens and held-out rows
PIECE = 2000                                # characters of the reference that stay together


def texts_file(folder) -> Path:
    """The file with all texts, a record for each file and each page of the reference; it is written
    unless it is there already."""
    path, pages = folder / "texts.jsonl", library_text()
    if not path.exists():
        texts = [pages[i:i + PIECE] for i in range(0, len(pages), PIECE)]
        texts += [file.read_text(encoding="utf-8", errors="replace") for file in library_files()]
        write_text(path, "\n".join(json.dumps({"text": text}) for text in texts))
    return path


def text_packer(config, path, seed, split):
    own, weights = parse_data(str(path), split)
    return Packer(Stream(config, tuple(weights.items()), seed, own=own, own_tokens=256), TOKENS)


def measure(arm, seed, folder):
    config, path = sized("tiny"), texts_file(folder.parent / "start")
    model = GLMV(config, seed)
    optimizer = Optimizer(model.named_parameters(), OptimConfig(4e-3, 0.05))   # as pretrain.py's
    optimizer.load_masters(model.state_dict())
    packers = [text_packer(config, path, seed, "train")]
    if arm == "and pictures":
        packers.append(Packer(Stream(config, parse_mix(",".join(NAMES)), seed), TOKENS))
    losses = []
    for step in range(STEPS):
        batches = [collate(packer.row(), config) for packer in packers]
        weights = [float(batch.weights[1:].sum()) for batch in batches]
        losses.append([])
        for batch, weight in zip(batches, weights):
            total = loss_sum(model, batch)[0]
            (total / sum(weights)).backward()
            losses[-1].append(total.item() / weight)
        norm = math.sqrt(optimizer.reduce())
        optimizer.step(schedule(step, STEPS, 20, "linear", 0.4), norm)
    tests = text_packer(config, path, 0, "test")
    rows = [collate(tests.row(), config) for _ in range(HELD_OUT)]
    with torch.no_grad():
        held_out = sum(loss_sum(model, row)[0].item() for row in rows)
    found = {"text loss": held_out / sum(float(row.weights[1:].sum()) for row in rows),
             "loss in training, text": [(i + 1, both[0]) for i, both in enumerate(losses)]}
    if arm == "and pictures":
        found["picture loss"] = fmean(both[1] for both in losses[-max(1, STEPS // 5):])
    return found


SHEET = Sheet(
    arms=("text alone", "and pictures"), measure=measure, minutes=8,
    equal=f"the rows of text, {STEPS} steps of one",
    tests=(NoLoss("held-out text loss, nats, without pictures minus with them",
                  lambda runs: runs["text alone"]["text loss"] - runs["and pictures"]["text loss"],
                  claimed=0.05, source="[O] 5% of the perplexity, hardly noticed"),))
