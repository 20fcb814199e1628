"""Asynchronous RL over several processes: how orders, episodes and weights travel.

                      orders  ->   key-value store   ->  orders
    rank 0, a trainer                                              the last ranks, which play
    Remote            episodes <-  key-value store   <-  episodes  serve
    Transfer          weights  ->  broadcast         ->  weights   Transfer

Orders and episodes are small and go through torchrun's key-value store, which can be polled; the
receive of gloo cannot. Weights are large and are broadcast in the background. The trainers, ranks
0 to n-1, share each update; only rank 0 talks to the ranks that play, and hands the groups on to
the other trainers by `share_groups`.
"""
import contextlib
import json
import time
from dataclasses import astuple

import torch
import torch.distributed as dist

from lib.cli import UserError
from lib.episodes import Episode, from_bytes, to_bytes
from model import GLMV
from tasks.base import Task


def never() -> bool:
    """The default of `should_leave`: do not stop waiting."""
    return False


class Transfer:
    """Sends the weights that learn from rank 0 of `process_group` to its other ranks, in the
    background; what --train freezes is the same everywhere. With LoRA these are the low-rank
    matrices alone: the player's engine computes with them as the trainer does.

    The weights are copied into a second buffer, end to end, and travel in buckets of at most
    `bucket` bytes [C]. So the trainer may change its own weights while the last ones are on their
    way, and a player changes them between two steps of its engine:

        trainer   step 7 | begin() | step 8  ...
        player    decode | begin() | decode | decode | arrived(): load, version 8 | decode ...
    """

    def __init__(self, model: GLMV, process_group, bucket: int = 2 ** 28):
        like = model.lm_head.weight
        self.process_group, self.work = process_group, []
        shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        self.buffer = like.new_empty(sum(shape.numel() for shape in shapes.values()))
        self.buckets = self.buffer.split(bucket // like.element_size())
        parts = self.buffer.split([shape.numel() for shape in shapes.values()])
        self.weights = {name: part.view(shape) for (name, shape), part
                        in zip(shapes.items(), parts)}

    @torch.no_grad()
    def begin(self, weights: dict | None = None, should_leave=never):
        """Start one transfer; every rank of the process group calls it, the sender with its
        weights. First waits for the last transfer to end, unless `should_leave()` returns true."""
        if not self.wait(should_leave):
            return
        for name, place in self.weights.items() if weights else ():
            place.copy_(weights[name])
        self.work = [dist.broadcast(part, 0, group=self.process_group, async_op=True)
                     for part in self.buckets]

    def arrived(self) -> bool:
        return bool(self.work) and all(work.is_completed() for work in self.work)

    def wait(self, should_leave=never) -> bool:
        """Wait for the transfer to end. Returns False if `should_leave()` returned true before."""
        while self.work and not self.arrived():
            if should_leave():
                return False
            time.sleep(0.001)
        # If the other side has left by the same signal, a broadcast completes with an error.
        if self.work and should_leave():
            return False
        for work in self.work:
            work.wait()
        self.work = []
        return True


@contextlib.contextmanager
def store_may_be_gone():
    """torchrun holds the key-value store: if it is killed, raise UserError."""
    try:
        yield
    except dist.DistError:
        raise UserError("torchrun has ended, and its key-value store with it") from None


class Remote:
    """The trainer's view of the ranks that play; has the methods of async_rl.Actor.

    An order can overtake the weights: each one says which version it needs at least, `slack` steps
    behind the newest, and the player holds it back until then. A rank that has not counted up its
    `alive` key for `silence` seconds ends the run: if its machine is gone, nothing else tells.
    """

    def __init__(self, store, ranks: list[int], transfer: Transfer, version: int, slack: int,
                 should_leave=never, silence: float = 60.0):
        self.store, self.ranks, self.transfer, self.silence = store, ranks, transfer, silence
        self.version, self.slack, self.should_leave = version, slack, should_leave
        self.sent = dict.fromkeys(ranks, 0)             # {rank: orders}
        self.received = dict.fromkeys(ranks, 0)         # {rank: episodes}
        self.alive = dict.fromkeys(ranks, (0, time.monotonic()))    # its count, when it changed

    @store_may_be_gone()
    def delays(self) -> tuple[float, float]:
        """(idle, stalled) seconds of the slowest player: see async_rl.Actor."""
        each = [json.loads(self.store.get(f"delays/{rank}")) for rank in self.ranks]
        return max(idle for idle, _ in each), max(stalled for _, stalled in each)

    def start(self, orders: list[Episode]):
        for e in orders:
            self._send(e.group, [astuple(e.task), e.group, e.index, self.version - self.slack])

    def abort(self, group: int):
        self._send(group, group)

    @store_may_be_gone()
    def _send(self, group: int, order):
        """All orders of a GRPO group go to the same rank, where they share the picture."""
        rank = self.ranks[group % len(self.ranks)]
        self.store.set(f"order/{rank}/{self.sent[rank]}", json.dumps(order))
        self.sent[rank] += 1

    @store_may_be_gone()
    def load(self, weights: dict, version: int):
        self.version = version
        self.store.set(f"weights/{version}", b"yes")
        self.transfer.begin(weights, self._check_and_leave)

    @store_may_be_gone()
    def step(self, wait_a_little: bool = True) -> list[Episode]:
        """Return the episodes that have arrived."""
        ended = []
        self._check_alive(time.monotonic())
        for rank in self.ranks:
            while self.store.check([key := f"episode/{rank}/{self.received[rank]}"]):
                ended += from_bytes(self.store.get(key))
                self.store.delete_key(key)
                self.received[rank] += 1
        if wait_a_little and not ended:
            time.sleep(0.002)
        return ended

    def _check_alive(self, now: float):
        """Raise UserError if a player has shown no sign of life for too long."""
        for rank in self.ranks:
            count = self.store.add(f"alive/{rank}", 0)      # adding 0 reads the count
            if count != self.alive[rank][0]:
                self.alive[rank] = count, now
            elif now - self.alive[rank][1] > self.silence:
                raise UserError(f"rank {rank}, which plays, has not been heard from for "
                                f"{self.silence:g} seconds")

    def _check_and_leave(self) -> bool:
        """While weights travel: raise if a player is gone, else whether to stop waiting."""
        self._check_alive(time.monotonic())
        return self.should_leave()

    @store_may_be_gone()
    def close(self):
        try:
            self.transfer.wait(self._check_and_leave)
        finally:
            self.store.set("over", b"yes")


@store_may_be_gone()
def serve(actor, transfer: Transfer, store, rank: int, version: int):
    """The loop of a rank that plays, with `actor` (async_rl.Actor), until the trainer ends it.
    version: of the weights that it begins with."""
    received, sent, early = 0, 0, []        # early: orders that wait for newer weights
    while not store.check(["over"]):
        store.add(f"alive/{rank}", 1)
        store.set(f"delays/{rank}", json.dumps(actor.delays()))
        while store.check([key := f"order/{rank}/{received}"]):
            order = json.loads(store.get(key))
            store.delete_key(key)
            received += 1
            if isinstance(order, int):      # the number of a group to abort
                actor.abort(order)
                early = [other for other in early if other[1] != order]
            else:
                early.append(order)
        if not transfer.work and store.check([f"weights/{version + 1}"]):
            transfer.begin()
        if transfer.arrived():
            transfer.wait()
            version += 1
            actor.load(transfer.weights, version)
        actor.start([Episode(Task(*task), group, index) for task, group, index, least in early
                     if least <= version])
        early = [order for order in early if order[3] > version]
        for episode in actor.step():
            store.set(f"episode/{rank}/{sent}", to_bytes([episode]))
            sent += 1


def share_groups(groups: list[list[Episode]] | None, process_group) -> list[list[Episode]] | None:
    """Broadcast what rank 0 passes in, a list of GRPO groups or None, to all ranks of
    `process_group`, which call it with anything."""
    data = b"" if groups is None else to_bytes([e for group in groups for e in group])
    size = torch.tensor(len(data))
    dist.broadcast(size, 0, group=process_group)
    if not size:
        return None
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if dist.get_rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, 0, group=process_group)
    shared: dict[int, list] = {}
    for episode in from_bytes(buffer.numpy().tobytes()):
        shared.setdefault(episode.group, []).append(episode)
    return list(shared.values())
