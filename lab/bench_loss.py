"""linear_cross_entropy beside all logits at once: `python -m lab.bench loss --size=small`.

Both sides compute the loss of the same 4,096 tokens and its gradients, with the vocabulary and the
width of a size. The time, and the most bytes that their tensors take at one time beyond what they
are given; on a CPU those inside one operation of torch are not seen. The ratios are ours over
plain: at most 1 in time and at most a third in memory are the aims.
"""
import lib  # first of all, before torch: see lib/__init__.py

import statistics
import time
import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import linear_cross_entropy
from model import sized

TOKENS = 4096


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made while the block runs: `most` at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.most = {}, 0, 0   # {address: bytes}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor)}
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage and storage._cdata not in given | self.storages.keys():
                self.storages[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata).atexit = False
        return out

    def free(self, address: int):
        self.now -= self.storages.pop(address)


def plain(hidden, weight, targets, weights):
    """All logits at once."""
    every = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    return (every * weights).sum()


def learn(loss, given) -> list[torch.Tensor]:
    """Loss and gradients of hidden and weight."""
    hidden, weight = (x.detach().requires_grad_() for x in given[:2])
    value = loss(hidden, weight, *given[2:])
    value.backward()
    return [value.detach(), hidden.grad, weight.grad]


def measure(args, hw) -> dict:
    """Print both sides; returns {"cases": {}, "time", "memory"}, the ratios."""
    c = sized(args.size).text
    hidden = torch.randn(TOKENS, c.hidden_size).to(hw.device, hw.dtype)
    weight = torch.randn(c.vocab_size, c.hidden_size).mul_(c.hidden_size ** -0.5)
    given = (hidden, weight.to(hw.device, hw.dtype),
             torch.randint(c.vocab_size, (TOKENS,), device=hw.device),
             torch.ones(TOKENS, device=hw.device))
    sides = {"linear_cross_entropy": linear_cross_entropy, "all logits at once": plain}
    peaks, seconds = [], [[] for _ in sides]
    for loss in sides.values():     # this first run is slower: it is not timed
        with PeakBytes() as peak:
            learn(loss, given)
        peaks.append(peak.most)
    for _ in range(args.rounds):
        for times, loss in zip(seconds, sides.values()):
            began = time.perf_counter()
            learn(loss, given)
            if hw.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - began)
    medians = [statistics.median(times) for times in seconds]
    for name, peak, median in zip(sides, peaks, medians):
        print(f"{name:<24} {peak / 2 ** 20:>9,.1f} MB {1000 * median:>9,.1f} ms")
    ratios = {"time": medians[0] / medians[1], "memory": peaks[0] / peaks[1]}
    print("ratio" + " " * 20 + f"{ratios['memory']:>8.2f} {ratios['time']:>14.2f}")
    return {"cases": {}, **ratios}
