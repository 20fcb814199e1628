"""Whatever a step needs is sent ahead, so that neither the GPU nor the host waits.

The host only launches kernels: they queue up, and the GPU works through the queue. So a step takes
as long as the GPU's work, as long as the queue never runs empty. Two things would empty it:

- The host waits for the GPU, because it asks for a number that is still being computed (.item(), a
  mask as an index). What can be known without the GPU, such as the sizes of pictures and the
  borders of documents, is therefore computed from a copy on the CPU, and `send` does not wait.
- The host prepares the next batch while the GPU has nothing to do. `Prefetch` prepares it in a
  thread, while this one is trained on.
"""
import contextlib
import threading
import time
from concurrent.futures import Future

import torch
from torch import nn, Tensor


def send(x: Tensor, device) -> Tensor:
    """A tensor of the CPU, copied to `device`.

    A GPU copies by itself only from memory that is pinned, which the operating system can't move;
    from other memory the host copies, and waits until it has. PyTorch does not give the pinned
    memory to anyone else before the copy has ended.
    """
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    x = x if x.is_pinned() else x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def pin_weights(model: nn.Module, device):
    """Move the weights of a model on the CPU into pinned memory, for `lent` to `device`."""
    for x in tensors_of(model) if torch.device(device).type == "cuda" else ():
        x.data = x.data.pin_memory()


@contextlib.contextmanager
def lent(model: nn.Module, device):
    """Until the block ends, the weights of a model on the CPU are on `device`. They are not copied
    back: the CPU's have not changed."""
    held = [(x, x.data) for x in tensors_of(model)]
    for x, data in held:
        x.data = send(data, device)
    try:
        yield
    finally:
        for x, data in held:
            x.data = data


def in_thread(work, *args) -> Future:
    """Call work(*args) in a thread of its own. Unlike the threads of a pool it does not keep the
    process alive, so work that hangs does not hang the run."""
    future = Future()
    threading.Thread(target=_complete, args=(future, work, args), daemon=True).start()
    return future


def _complete(future: Future, work, args):
    try:
        future.set_result(work(*args))
    except BaseException as error:
        future.set_exception(error)


class Prefetch:
    """What make() returns, one call after the other, `calls` in all; with `ahead` the next call
    runs in a thread while the trainer uses what the last one made. An error in it is raised when
    its result is asked for. `seconds` is the time that the trainer has waited."""

    def __init__(self, make, calls: int, ahead: bool):
        self.make, self.left, self.ahead = make, calls, ahead
        self.next: Future | None = None
        self.seconds = 0.0
        # A new thread begins on GPU 0, where pinned memory would then take up 500 MB a rank.
        self.device = torch.cuda.current_device() if ahead and torch.cuda.is_available() else None

    def __call__(self):
        began = time.perf_counter()
        if self.ahead:
            made = (self.next or in_thread(self._make)).result()
        else:
            made = self.make()
        self.left -= 1
        self.next = in_thread(self._make) if self.ahead and self.left > 0 else None
        self.seconds += time.perf_counter() - began
        return made

    def _make(self):
        if self.device is not None:
            torch.cuda.set_device(self.device)
        return self.make()

    def close(self):
        """Wait until the thread has ended. What it has made is dropped, and so is an error."""
        if self.next:
            self.next.exception()
        self.next, self.left = None, 0
