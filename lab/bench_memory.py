"""What vision tower and adapter keep for the backward pass: `python -m lab.bench memory`.

For each policy of lib/memory.py and each number of images: the most bytes that autograd holds at
one time, through a forward and its backward, without weights and pixels; and the time of both in
comparison with keeping everything. All settings take turns within a round, so that a load from
outside falls on all alike. `offload` holds as little as `recompute` on the device, and the inputs
of the blocks in host memory besides.
"""
import lib  # first of all, before torch: see lib/__init__.py

import statistics
import time
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks

from lib import memory
from lib.memory import HostCopy, parse_memory, POLICIES
from model import GLMV, sized


class SavedBytes(saved_tensors_hooks):
    """Counts the bytes of what autograd keeps while the block runs: `most` at one time. A storage
    counts once, however many tensors share it; those of `given` tensors do not count."""

    def __init__(self, given):
        self.uses = {}          # storage -> how many saved tensors share it
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.now = self.most = 0
        # Detached: an output that its own operation keeps would hold itself through its graph.
        super().__init__(lambda tensor: Held(tensor.detach(), self), lambda held: held.tensor)


class Held:
    """A tensor that autograd keeps. Autograd drops this object as soon as it needs it no more."""

    def __init__(self, tensor, book: SavedBytes):
        storage = tensor.untyped_storage()
        self.tensor, self.book, self.key = tensor, book, storage.data_ptr()
        self.bytes = 0 if self.key in book.given else storage.nbytes()
        uses = book.uses[self.key] = book.uses.get(self.key, 0) + 1
        book.now += self.bytes * (uses == 1)
        book.most = max(book.most, book.now)

    def __del__(self):
        self.book.uses[self.key] -= 1
        if not self.book.uses[self.key]:
            del self.book.uses[self.key]
            self.book.now -= self.bytes


class CountedCopy(HostCopy):
    """Counts the bytes that go to the host."""
    bytes = 0

    def __init__(self, x, before=None):
        super().__init__(x, before)
        CountedCopy.bytes += x.nbytes


def pictures(count: int, config, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches, and grids on the CPU, of `count` images of noise of train_vit.py's size."""
    p = config.vision.patch_size
    side = (64 if p == 8 else 224) // p
    patches = torch.randint(0, 256, (count * side * side, 1, 3 * p * p), dtype=torch.uint8)
    return patches.to(device), torch.tensor([[1, side, side]] * count)


def encode(model: GLMV, patches, grids):
    """A forward and a backward of tower and adapter."""
    model.zero_grad(set_to_none=True)
    merged = model.encode(patches, grids)
    merged.backward(torch.ones_like(merged))


def saved(model: GLMV, patches, grids) -> tuple[int, int]:
    """The most bytes that autograd keeps, and the bytes that go to the host. On a CPU both lie in
    the same memory, but are counted apart."""
    CountedCopy.bytes, book = 0, SavedBytes([*model.parameters(), patches])
    with mock.patch.object(memory, "HostCopy", CountedCopy), book:
        encode(model, patches, grids)
    return book.most, CountedCopy.bytes


def measure(args, hw) -> dict:
    """Print the table; returns {"images", "rows": {setting: MB kept, MB on the host and time
    ratio, for each number of images}}."""
    config = sized(args.size)
    model = GLMV(config, args.seed).to(hw.device, hw.dtype)
    counts = sorted({n for n in (1, 4, 16) if n < args.documents} | {args.documents})
    chunk = 4 * len(pictures(1, config, hw.device)[0])      # four images
    settings = {policy + words: parse_memory(policy, limit)
                for words, limit in (("", 0), (", chunks of 4 images", chunk))
                for policy in POLICIES}
    rows = {name: {"MB": [], "host MB": [], "time": []} for name in settings}
    for count in counts:
        given, seconds = pictures(count, config, hw.device), {name: [] for name in settings}
        for name, how in settings.items():
            how.use_in(model)
            kept, host = saved(model, *given)       # this first run is slower: it is not timed
            rows[name]["MB"].append(kept / 2 ** 20)
            rows[name]["host MB"].append(host / 2 ** 20)
        for _ in range(args.rounds):
            for name, how in settings.items():
                how.use_in(model)
                began = time.perf_counter()
                encode(model, *given)
                if hw.device.type != "cpu":
                    torch.accelerator.synchronize()
                seconds[name].append(time.perf_counter() - began)
        for name, row in rows.items():
            row["time"].append(statistics.median(seconds[name])
                               / statistics.median(seconds["none"]))
    print(f"{'images':<34}" + "".join(f"{count:>10}" for count in counts))
    for name, row in rows.items():
        for what, values in row.items():
            if any(values):
                print(f"{name + ': ' + what:<34}" + "".join(f"{x:>10,.2f}" for x in values))
    return {"cases": {}, "images": counts, "rows": rows}
