"""Playing on other ranks than those that train: orders, Episodes and weights between them.

    Transfer   new weights on their way to those who play
    Remote     the trainer's end: like a collect.Actor, but in other processes,
    serve      which run this
    shared     what the first trainer has collected, on all trainers

Nothing here knows what is played or how it is learnt from.
"""
import json
import time
from dataclasses import astuple

import torch
import torch.distributed as dist

from common import UserError
from data import Episode, from_bytes, to_bytes
from model import GLMV
from tasks.base import Task


class Transfer:
    """A model's weights from rank 0 of `group` to its other ranks, while all of them work on.

    They lie end to end in a second buffer and travel in buckets of at most `bucket` bytes. The
    sender may change its own at once; the receiver swaps between two steps of its engine. [C]
    """

    def __init__(self, model: GLMV, group, bucket: int = 2 ** 28):
        like, self.group, self.work = model.lm_head.weight, group, []
        shapes = {name: p.shape for name, p in model.named_parameters()}
        self.buffer = like.new_empty(sum(shape.numel() for shape in shapes.values()))
        self.buckets = self.buffer.split(bucket // like.element_size())
        parts = self.buffer.split([shape.numel() for shape in shapes.values()])
        self.weights = {name: part.view(shape) for (name, shape), part
                        in zip(shapes.items(), parts)}

    @torch.no_grad()
    def begin(self, weights: dict | None = None, leave=lambda: False):
        """Start one journey, on every rank of the group; the sender gives its weights. leave: asked
        while it waits for the last one, for who should take that may be dead."""
        if not self.wait(leave):
            return
        for name, place in self.weights.items() if weights else ():
            place.copy_(weights[name])
        self.work = [dist.broadcast(part, 0, group=self.group, async_op=True)
                     for part in self.buckets]

    def arrived(self) -> bool:
        return bool(self.work) and all(work.is_completed() for work in self.work)

    def wait(self, leave=lambda: False) -> bool:
        """Whether the journey ended, or `leave` did not let it."""
        while self.work and not self.arrived():
            if leave():
                return False
            time.sleep(0.001)
        if self.work and leave():       # it may have ended because the other side did
            return False
        for work in self.work:
            work.wait()
        self.work = []
        return True


class Remote:
    """The trainer's end. Orders and Episodes go through the launcher's key-value store, since
    gloo's receive can't be polled; weights, the bulk, are broadcast. A rank that gives no sign of
    life for `silence` seconds ends the run: its machine may be gone, and nobody else would say so.
    An order may overtake the weights: it says how old they may be, `slack` updates, and waits.
    """

    def __init__(self, store, ranks: list[int], transfer: Transfer, version: int, slack: int,
                 leave=lambda: False, silence: float = 60.0):
        self.store, self.ranks, self.transfer, self.silence = store, ranks, transfer, silence
        self.version, self.slack, self.leave = version, slack, leave
        self.sent, self.heard = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
        self.alive = dict.fromkeys(ranks, (0, time.monotonic()))    # its count, when it changed

    def delays(self) -> tuple[float, float]:
        """Of the players, the worst."""
        return tuple(map(max, zip(*(json.loads(self.store.get(f"delays/{rank}"))
                                    for rank in self.ranks))))

    def _tell(self, rank: int, order):
        self.store.set(f"order/{rank}/{self.sent[rank]}", json.dumps(order))
        self.sent[rank] += 1

    def start(self, orders: list[Episode]):
        for e in orders:        # a group stays together
            rank = self.ranks[e.group % len(self.ranks)]
            self._tell(rank, [astuple(e.task), e.group, e.index, self.version - self.slack])

    def abort(self, group: int):
        self._tell(self.ranks[group % len(self.ranks)], group)

    def load(self, weights: dict, version: int):
        self.version = version
        self.store.set(f"weights/{version}", b"they come")
        self.transfer.begin(weights, self._hopeless)

    def step(self, wait_a_little: bool = True) -> list[Episode]:
        ended = []
        self._feel_pulses(time.monotonic())
        for rank in self.ranks:
            while self.store.check([key := f"episode/{rank}/{self.heard[rank]}"]):
                ended += from_bytes(self.store.get(key))
                self.store.delete_key(key)
                self.heard[rank] += 1
        if wait_a_little and not ended:
            time.sleep(0.002)
        return ended

    def _feel_pulses(self, now: float):
        for rank in self.ranks:
            count = self.store.add(f"alive/{rank}", 0)
            if count != self.alive[rank][0]:
                self.alive[rank] = count, now
            elif now - self.alive[rank][1] > self.silence:
                raise UserError(f"rank {rank}, which plays, has not been heard of for "
                                f"{self.silence:g} seconds")

    def _hopeless(self) -> bool:
        """Whether not to wait for weights to arrive; raises UserError where a rank has gone."""
        self._feel_pulses(time.monotonic())
        return self.leave()

    def close(self):
        try:
            self.transfer.wait(self._hopeless)
        finally:
            self.store.set("over", b"yes")


def serve(actor, transfer: Transfer, store, rank: int, version: int):
    """The life of a rank that plays with `actor`, until the trainer says that it is over."""
    heard, sent, early = 0, 0, []
    while not store.check(["over"]):
        store.add(f"alive/{rank}", 1)
        store.set(f"delays/{rank}", json.dumps(actor.delays()))
        while store.check([key := f"order/{rank}/{heard}"]):
            order = json.loads(store.get(key))
            store.delete_key(key)
            heard += 1
            if isinstance(order, int):
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


def shared(groups: list[list[Episode]] | None, ranks) -> list[list[Episode]] | None:
    """What rank 0 of `ranks` has, on all of them: groups, or None, which is to leave."""
    data = b"" if groups is None else to_bytes([e for group in groups for e in group])
    size = torch.tensor(len(data))
    dist.broadcast(size, 0, group=ranks)
    if not size:
        return None
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if dist.get_rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, 0, group=ranks)
    found: dict[int, list] = {}
    for episode in from_bytes(buffer.numpy().tobytes()):
        found.setdefault(episode.group, []).append(episode)
    return list(found.values())
