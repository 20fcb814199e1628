"""A larger contrastive batch costs no more memory.

The paper aligns pictures and texts with a global batch of 64K pairs [C], so that each picture is
compared with as many other texts. Each loss depends on all pairs, and all activations of a batch do
not fit into memory. But the towers meet only in the embeddings: `cached_gradients` of train_vit.py
embeds micro-batches without keeping activations, takes the loss over all embeddings, and runs each
micro-batch once more for its gradients [R: GradCache]. What grows with the batch are the
embeddings, 0.4 KB a pair and tower.

Two runs a seed, each a process of its own that does one step: 512 and 4,096 pairs, 128 at a time.
`peak GiB` is the most memory that the process held, with Python and PyTorch, and `seconds` is wall
time with the start of both. The paper's own size: `python -m lab.vit_claims --big=65536`.
"""
from dataclasses import replace

from lab import vit_claims
from lab.sheet import NoLoss, Sheet

BATCHES = {"512 pairs": 512, "4,096 pairs": 4096}
PLAIN = vit_claims.Args(micro=128, probes=16, device="cpu", dtype="float32")


def measure(arm, seed, folder):
    return vit_claims.one_step(replace(PLAIN, out=str(folder)), BATCHES[arm], seed)


def saved(runs):
    """The memory that the large batch needs less, in percent: negative if it needs more."""
    small, large = (runs[arm]["peak GiB"] for arm in BATCHES)
    return 100 * (1 - large / small)


SHEET = Sheet(
    arms=tuple(BATCHES), measure=measure, minutes=2,
    equal="one step, from the same weights, 128 pairs at a time, 16 patches a picture",
    tests=(NoLoss("peak memory that eight times the batch saves, %", saved, claimed=10,
                  source="[O] a tenth, where memory in proportion would be 700% more"),))
