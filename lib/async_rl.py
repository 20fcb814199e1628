"""What to play next, and how groups of rollouts come in while the trainer learns.

    Curriculum   draws tasks of middling difficulty, and keeps the books on every category
    Here         plays what is ordered to the end, in step with the trainer
    Actor        plays many rollouts in this process and waits for none of them
    Collector    sorts what comes in: complete, stale, late, delivered twice
    figures_of, ages_of, accuracy, samples   what is seen of it

A rollout here is anything with `advance(result) -> Request or None`, `evidence`, `episode` and
`judged(score)`: play.Play. Who plays may also be a ranks.Remote. Four things go on at once and wait
for each other as little as may be [C]: generation, environments and verifiers, the making of
batches, the journey of weights.
"""
import json
import math
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass, field

import torch
import torch.distributed as dist

from gym import Score
from lib.cli import UserError
from lib.curriculum import Curriculum
from lib.episodes import figures_of, from_bytes, to_bytes
from lib.rollout import Episode
from model import GLMV
from tasks.base import Task
from tasks.rewards import one_line


def aside(work, *args) -> Future:
    """work(*args) in a thread of its own, which may hang without holding anything up at exit."""
    future = Future()

    def run():
        try:
            future.set_result(work(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Here:
    """The synchronous player: what was ordered is played to its end, all at once, by
    play(engine, orders)."""
    def __init__(self, engine, play):
        self.engine, self.play, self.orders = engine, play, []

    def delays(self) -> tuple[float, float]:
        return 0.0, 0.0

    def start(self, orders: list[Episode]):
        self.orders += orders

    def load(self, weights: dict, version: int):
        self.engine.load(weights, version)

    def step(self, wait_a_little: bool = True) -> list[Episode]:
        orders, self.orders = self.orders, []
        return self.play(self.engine, orders)


class Actor:
    """Rollouts side by side. Environments and verifiers run in threads; each rollout that ends
    goes to its verifier at once, and those that wait hold no slot of the engine."""

    def __init__(self, engine, rewards, begin, judges: int = 1):
        self.engine, self.rewards, self.begin = engine, rewards, begin
        self.outside = {}       # rollout: what its environment will say, as a Future
        self.asked = {}         # the engine's id: rollout
        self.judging = {}       # rollout: Future of its Score
        self.judges = ThreadPoolExecutor(judges)
        self.idle = self.stalled = 0.0

    def delays(self) -> tuple[float, float]:
        """Seconds in which there was nothing to generate, and in which weights were changed."""
        return self.idle, self.stalled

    def start(self, orders: list[Episode]):
        for order in orders:
            play = self.begin(order)
            self.outside[play] = aside(play.advance)

    def abort(self, group: int):
        """Forget a group's rollouts, wherever they are."""
        for id in [id for id, play in self.asked.items() if play.episode.group == group]:
            self.engine.abort(id)
            del self.asked[id]
        for play in [play for play in self.outside if play.episode.group == group]:
            del self.outside[play]
        for play in [play for play in self.judging if play.episode.group == group]:
            self.judging.pop(play).cancel()

    def load(self, weights: dict, version: int):
        began = time.perf_counter()
        self.engine.load(weights, version)
        self.stalled += time.perf_counter() - began

    def step(self, wait_a_little: bool = True) -> list[Episode]:
        """Hand on what has come back, a token or more for all who can; the Episodes that ended."""
        ended, futures = [], [*self.outside.values(), *self.judging.values()]
        if wait_a_little and not self.engine.busy and not any(f.done() for f in futures):
            began = time.perf_counter()
            wait(futures, 0.02, FIRST_COMPLETED) if futures else time.sleep(0.002)
            self.idle += time.perf_counter() - began
        for play in [play for play, future in self.outside.items() if future.done()]:
            request = self.outside.pop(play).result()
            if request:
                self.asked[self.engine.submit(request)] = play
            elif play.evidence is not None:
                self.judging[play] = self.judges.submit(self.rewards.score, play.episode.task,
                                                        play.evidence)
            else:
                ended.append(play.episode)
        for result in self.engine.step() if self.engine.busy else ():
            play = self.asked.pop(result.id)
            self.outside[play] = aside(play.advance, result)
        for play in [play for play, future in self.judging.items() if future.done()]:
            future = self.judging.pop(play)
            fault = future.exception()
            ended.append(play.judged(Score(math.nan, {}, one_line(fault)) if fault
                                     else future.result()))
        return ended


@dataclass
class Group:
    task: Task
    began: float
    got: dict = field(default_factory=dict)     # index: Episode


class Collector:
    """Orders groups of `size` rollouts and hands out `prompts` of them a step, oldest first.

    staleness: how many updates the oldest sampled token may lie behind; with 0 nothing is begun
    while the trainer learns, all groups that are ready are used, and when enough are there the
    rest is given up: abort by count [C]. patience: seconds until a group is given up: abort by
    time [C]. What is given up is played again first, and waited for: if it outlasts patience, its
    unfinished rollouts are errors. flight: rollouts under way at most, groups begun in part; 0: as
    many as staleness allows. leave: asked while it waits for groups.
    """

    def __init__(self, actor, curriculum: Curriculum, prompts: int, size: int, staleness: int,
                 patience: float, live, flight: int = 0, leave=lambda: False):
        self.actor, self.curriculum, self.live, self.flight = actor, curriculum, live, flight
        self.prompts, self.size, self.staleness = prompts, size, staleness
        self.patience, self.leave, self.count, self.finished, self.step = patience, leave, 0, 0, 0
        self.open: dict[int, Group] = {}
        self.orders: list[Episode] = []         # of open groups, not yet started
        self.ready: list[list[Episode]] = []
        self.seen: list[list[Episode]] = []     # every group that ended since the last step
        self.tried: set[Task] = set()           # given up once
        self.clock, self.last = 0.0, time.monotonic()
        self.stale = self.twice = self.given_up = 0
        self.waited, self.before = 0.0, (0.0, 0.0)     # what `collect` took; delays when it began

    def figures(self) -> dict:
        """What is seen of a step, from the beginning of `collect`; `dropped` and `twice` (delivered
        twice, or too late) since the start of the run."""
        idle, stalled = (b - a for a, b in zip(self.before, self.actor.delays()))
        return figures_of(self.seen, self.live) | {
            "waited": self.waited, "idle": idle, "stalled": stalled,
            "dropped": self.stale + self.given_up, "twice": self.twice}

    def state(self) -> dict:
        """What to go on from: finished groups as bytes; those under way are simply run again."""
        ready = [torch.frombuffer(bytearray(to_bytes(group)), dtype=torch.uint8)
                 for group in self.ready]
        books = self.curriculum.state()
        under_way = [astuple(group.task) for group in self.open.values()]
        return {"count": self.count, "ready": ready, "tried": sorted(map(astuple, self.tried)),
                "books": {**books, "kept": under_way + list(books["kept"])}}

    def restore(self, state: dict):
        self.count, self.tried = state["count"], {Task(*task) for task in state["tried"]}
        ready = [from_bytes(data.cpu().numpy().tobytes()) for data in state["ready"]]
        self.ready = [group for group in ready if group[0].task.category in self.curriculum.mix]
        self.curriculum.restore(state["books"])

    def turn(self, collecting: bool = False):
        """Order what there is room for, let the actor take a step, sort what has come."""
        # Of the time between two turns a second counts at most: examinations are nobody's delay.
        now = time.monotonic()
        self.clock, self.last = self.clock + min(1.0, now - self.last), now
        self._order(collecting)
        for episode in self.actor.step(collecting):
            self._file(episode)
        for id, group in list(self.open.items()):
            if self.clock - group.began > self.patience:
                self._too_long(id, group)

    def _order(self, collecting: bool):
        """Draw groups, as many as staleness allows, and start what there is room for."""
        enough = not self.staleness and len(self.ready) >= self.prompts
        wanted = 0 if enough else round(self.prompts * self.curriculum.expansion)
        rounds = self.staleness + collecting
        most = 4 * self.prompts - self.finished if collecting else wanted * rounds
        groups = min(wanted * rounds - len(self.ready), most) - len(self.open)
        unfinished = sum(self.size - len(group.got) for group in self.open.values())
        room = self.flight - unfinished + len(self.orders) if self.flight else self.size * groups
        for _ in range(groups):
            if len(self.orders) >= room:
                break
            task = self.curriculum.draw()
            self.open[self.count] = Group(task, self.clock)
            self.orders += [Episode(task, self.count, i) for i in range(self.size)]
            self.count += 1
        if room > 0:
            self.actor.start(self.orders[:room])
            del self.orders[:room]

    def collect(self, step: int) -> list[list[Episode]] | None:
        """The groups to learn from at `step`, which is also the version of the newest weights;
        None where it is to leave: what has come by then is in `state`."""
        began, self.finished, self.seen, self.step = time.perf_counter(), 0, [], step
        self.before = self.actor.delays()
        self.ready = [group for group in self.ready if not self._is_stale(group, step)]
        while len(self.ready) < self.prompts or not self.staleness and self.tried & {
                group.task for group in self.open.values()}:
            if self.leave():
                return None
            if self.finished >= 4 * self.prompts and not self.open:
                break           # too little to learn here: go on with what there is
            self.turn(collecting=True)
        self.ready.sort(key=lambda group: group[0].group)
        chosen = self.ready[:None if not self.staleness else self.prompts]
        self.ready = self.ready[len(chosen):]
        for id in list(self.open) if not self.staleness else ():
            self._give_up(id)
        self.waited = time.perf_counter() - began
        return chosen

    def _is_stale(self, group, step: int) -> bool:
        oldest = min((d.extras["version"][d.weights > 0].min() for e in group if not e.score.error
                      for d in e.documents if d.weights.any()), default=step)
        if step - oldest > self.staleness:
            self.stale += 1
            self.curriculum.kept.append(astuple(group[0].task))
            return True
        return False

    def _file(self, episode: Episode):
        group = self.open.get(episode.group)
        if group is None or episode.index in group.got:
            self.twice += 1
            return
        group.got[episode.index] = episode
        if len(group.got) == self.size:
            self.tried.discard(self.open.pop(episode.group).task)
            whole = [group.got[i] for i in range(self.size)]
            live = self.live(whole)
            self.curriculum.note(whole, live)
            if live and not self._is_stale(whole, self.step):
                self.ready.append(whole)
            self.seen.append(whole)
            self.finished += 1

    def _abort(self, id: int):
        self.actor.abort(id)
        self.orders = [order for order in self.orders if order.group != id]

    def _give_up(self, id: int):
        self._abort(id)
        task = self.open.pop(id).task
        self.tried.add(task)
        self.curriculum.kept.append(astuple(task))
        self.given_up += 1

    def _too_long(self, id: int, group: Group):
        if group.task not in self.tried:
            return self._give_up(id)
        self._abort(id)
        error = Score(math.nan, {},
                      f"not finished within {self.patience:g} seconds when played again")
        for index in set(range(self.size)) - set(group.got):
            self._file(Episode(group.task, id, index, score=error, status="error"))


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
