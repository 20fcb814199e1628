"""Asynchronous RL: rollouts go on while the trainer learns, in one process or over several ranks.

    Actor          plays many rollouts side by side and waits for none of them
    Collector      orders groups, and sorts what comes back: complete, too old, late, sent twice
    AsyncTrainer   the loop of rl.train with these two in place of its steps 1 to 3
    run            what rl.run calls: every rank plays or trains (lib/ranks.py connects them)

Why: environments and verifiers can be slow, and a synchronous step lasts as long as its slowest
rollout. Here generation, environments, verifiers, updates and the transfer of weights overlap [C]:

    synchronous    play 0 .......... | update 0 | play 1 ....... | update 1 |
    asynchronous   play 0 .......... | play 1 ....... | play 2 .... | play 3 ...
                                     | update 0 |     | update 1 |  | update 2 |

The price: samples come from weights up to --max_staleness optimizer steps old, so ratios differ
from 1 and the loss has to mask them (rl.masked). With --max_staleness=0 nothing overlaps with an
update, and the losses are those of the synchronous trainer.
"""
import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import gym
from gym import Score
from lib.cli import UserError
from lib.common import GROUP_TIMEOUT, Log, write_json
from lib.curriculum import Curriculum
from lib.episodes import figures_of, from_bytes, staleness_of, to_bytes
from lib.prefetch import in_thread
from lib.ranks import never, Remote, serve, share_groups, Transfer
from lib.rollout import Episode, Rollout, RolloutSettings
from lib.runs import Checkpointer
from optim import schedule
from tasks.base import Task
from tasks.rewards import one_line


# ---- the actor ----------------------------------------------------------------------------------

class Actor:
    """Plays rollouts side by side. At any time a rollout is in one of three places:

        environment    its `advance` runs in a thread    -> a Request, or the end of the episode
        generating     in the engine                     -> a Result
        scoring        its verifier runs in a thread     -> a Score

    A rollout that has ended goes to its verifier at once, without waiting for its group [C], and
    only those that generate hold a slot of the engine.
    """

    def __init__(self, engine, rewards, settings: RolloutSettings, verifiers: int = 1):
        self.engine, self.rewards, self.settings = engine, rewards, settings
        self.environment: dict[Rollout, Future] = {}
        self.generating: dict[int, Rollout] = {}    # by the engine's request id
        self.scoring: dict[Rollout, Future] = {}
        self.verifiers = ThreadPoolExecutor(verifiers)
        self.idle = self.stalled = 0.0

    def delays(self) -> tuple[float, float]:
        """(idle, stalled): seconds without anything to generate, and seconds in which new weights
        were loaded."""
        return self.idle, self.stalled

    def start(self, orders: list[Episode]):
        for order in orders:
            rollout = Rollout(order, self.settings)
            self.environment[rollout] = in_thread(rollout.advance)

    def abort(self, group: int):
        """Drop the rollouts of a group, wherever they are."""
        for id, rollout in list(self.generating.items()):
            if rollout.episode.group == group:
                self.engine.abort(id)
                del self.generating[id]
        for rollout in list(self.environment):      # its thread ends by itself, unnoticed
            if rollout.episode.group == group:
                del self.environment[rollout]
        for rollout in list(self.scoring):
            if rollout.episode.group == group:
                self.scoring.pop(rollout).cancel()

    def load(self, weights: dict, version: int):
        began = time.perf_counter()
        self.engine.load(weights, version)
        self.stalled += time.perf_counter() - began

    def step(self, wait_a_little: bool = True) -> list[Episode]:
        """Pass on what has become ready, generate a token or more for every running request, and
        return the episodes that ended. wait_a_little: sleep briefly if there is nothing to do."""
        if wait_a_little:
            self._wait()
        ended = self._after_environment()
        self._generate()
        return ended + self._after_scoring()

    def _wait(self):
        futures = [*self.environment.values(), *self.scoring.values()]
        if self.engine.busy or any(future.done() for future in futures):
            return
        began = time.perf_counter()
        if futures:
            wait(futures, 0.02, FIRST_COMPLETED)
        else:
            time.sleep(0.002)
        self.idle += time.perf_counter() - began

    def _after_environment(self) -> list[Episode]:
        """Send the rollouts that have a request to the engine, and those at their end to a
        verifier; return those that ended in an error."""
        failed = []
        for rollout in [r for r, future in self.environment.items() if future.done()]:
            request = self.environment.pop(rollout).result()
            if request:
                self.generating[self.engine.submit(request)] = rollout
            elif rollout.evidence is not None:
                self.scoring[rollout] = self.verifiers.submit(
                    self.rewards.score, rollout.episode.task, rollout.evidence)
            else:
                failed.append(rollout.episode)
        return failed

    def _generate(self):
        for result in self.engine.step() if self.engine.busy else ():
            rollout = self.generating.pop(result.id)
            self.environment[rollout] = in_thread(rollout.advance, result)

    def _after_scoring(self) -> list[Episode]:
        ended = []
        for rollout in [r for r, future in self.scoring.items() if future.done()]:
            future = self.scoring.pop(rollout)
            error = future.exception()
            score = Score(math.nan, {}, one_line(error)) if error else future.result()
            ended.append(rollout.finish(score))
        return ended


# ---- the collector ------------------------------------------------------------------------------

@dataclass
class Group:
    """A GRPO group that is being played."""
    task: Task
    began: float                                # on the Collector's clock
    ended: dict = field(default_factory=dict)   # index: Episode


class Collector:
    """Keeps an actor busy and hands out `prompts` groups of `size` rollouts a step, oldest first.

    staleness: by how many optimizer steps the weights of the oldest sampled token may lag behind.
    At 0 nothing is played during an update, all groups that are ready are used, and once there are
    enough the others are given up: abort by count [C]. patience: seconds until a group is given up:
    abort by time [C]. A group that was given up is played again, before new tasks, and is then
    waited for: slow tasks must not drop out of training. If it exceeds patience once more, its
    unfinished rollouts are errors.

    flight: at most so many rollouts at once; a group may begin in part. 0: as many as staleness
    allows. should_leave: called while waiting for groups.
    """

    def __init__(self, actor, curriculum: Curriculum, prompts: int, size: int, staleness: int,
                 patience: float, has_signal, flight: int = 0, should_leave=never):
        self.actor, self.curriculum, self.has_signal = actor, curriculum, has_signal
        self.prompts, self.size, self.staleness = prompts, size, staleness
        self.patience, self.flight, self.should_leave = patience, flight, should_leave
        self.step = 0                           # optimizer steps done: version of the weights
        self.open: dict[int, Group] = {}        # groups that are being played, by number
        self.orders: list[Episode] = []         # their rollouts that have not been started
        self.ready: list[list[Episode]] = []    # ended, with a signal, not yet used
        self.seen: list[list[Episode]] = []     # all that ended since the last step
        self.given_up: set[Task] = set()        # tasks to be played again and waited for
        self.clock, self.last = 0.0, time.monotonic()
        self.finished = 0                       # groups that ended in this `collect`
        self.too_old = self.aborted = 0         # groups dropped, since the start of the run
        self.twice = 0                          # episodes that came twice, or after an abort
        self.waited, self.delays_before = 0.0, (0.0, 0.0)

    def figures(self) -> dict:
        """Figures of the step since `collect` was called; `dropped` and `twice` count from the
        start of the run."""
        idle, stalled = self.actor.delays()
        return figures_of(self.seen, self.has_signal) | {
            "waited": self.waited, "idle": idle - self.delays_before[0],
            "stalled": stalled - self.delays_before[1],
            "dropped": self.too_old + self.aborted, "twice": self.twice}

    def state(self) -> dict:
        """What a checkpoint holds: ready groups as bytes; of groups that are being played only the
        task, which is played again."""
        ready = [torch.frombuffer(bytearray(to_bytes(group)), dtype=torch.uint8)
                 for group in self.ready]
        state = self.curriculum.checkpoint()
        open_tasks = [astuple(group.task) for group in self.open.values()]
        state["books"]["kept"] = open_tasks + state["books"]["kept"]
        return state | {"ready": ready, "tried": sorted(map(astuple, self.given_up))}

    def restore(self, state: dict):
        self.given_up = {Task(*task) for task in state["tried"]}
        ready = [from_bytes(data.cpu().numpy().tobytes()) for data in state["ready"]]
        self.ready = [group for group in ready if group[0].task.category in self.curriculum.mix]
        self.curriculum.resume(state | {"ready": []})

    def collect(self, step: int) -> list[list[Episode]] | None:
        """Wait for the groups to learn from at `step`, when the weights are of that version too.
        Returns None if `should_leave()` returned true; what has come by then is in `state`."""
        began, self.finished, self.seen, self.step = time.perf_counter(), 0, [], step
        self.delays_before = self.actor.delays()
        self.ready = [group for group in self.ready if not self._is_stale(group, step)]
        while not self._enough():
            if self.should_leave():
                return None
            if self.finished >= 4 * self.prompts and not self.open:
                break           # few groups have a signal: learn from those that there are
            self.turn(collecting=True)
        self.ready.sort(key=lambda group: group[0].group)
        chosen = self.ready[:self.prompts] if self.staleness else self.ready
        self.ready = self.ready[len(chosen):]
        if not self.staleness:
            for number in list(self.open):
                self._give_up(number)
        self.waited = time.perf_counter() - began
        return chosen

    def _enough(self) -> bool:
        if len(self.ready) < self.prompts:
            return False
        return bool(self.staleness) or not any(group.task in self.given_up
                                               for group in self.open.values())

    def turn(self, collecting: bool = False):
        """Order rollouts, let the actor take one step, and sort what has ended. `collect` calls it
        in a loop; with staleness, an update calls it after each of its rows."""
        # A gap between two turns counts as a second at most: an evaluation delays no rollout.
        now = time.monotonic()
        self.clock, self.last = self.clock + min(1.0, now - self.last), now
        self._order(collecting)
        for episode in self.actor.step(collecting):
            self._file(episode)
        for number, group in list(self.open.items()):
            if self.clock - group.began > self.patience:
                self._exceed_patience(number, group)

    def _order(self, collecting: bool):
        """Begin new groups, as many as staleness allows, and start rollouts, as many as `flight`
        allows."""
        for _ in range(self._groups_to_begin(collecting)):
            if len(self.orders) >= self._room():
                break
            orders = self.curriculum.next_group(self.size)
            self.open[orders[0].group] = Group(orders[0].task, self.clock)
            self.orders += orders
        room = self._room()
        if self.orders and room > 0:
            self.actor.start(self.orders[:room])
            del self.orders[:room]

    def _groups_to_begin(self, collecting: bool) -> int:
        if not self.staleness and len(self.ready) >= self.prompts:
            wanted = 0          # only a group that was given up before is still waited for
        else:                   # for this step if it waits, and for each that may lag behind
            steps = self.staleness + collecting
            wanted = round(self.prompts * self.curriculum.expansion) * steps
        more = wanted - len(self.ready)
        if collecting:          # where few groups have a signal, a step does not go on for ever
            more = min(more, 4 * self.prompts - self.finished)
        return more - len(self.open)

    def _room(self) -> int:
        """How many of `orders` may be started."""
        if not self.flight:
            return 10 ** 9
        unfinished = sum(self.size - len(group.ended) for group in self.open.values())
        return self.flight - (unfinished - len(self.orders))

    def _is_stale(self, group, step: int) -> bool:
        """Whether a token of the group is too old. Then its task is played again."""
        versions = [d.extras["version"][d.weights > 0].min() for e in group if not e.score.error
                    for d in e.documents if d.weights.any()]
        if step - min(versions, default=step) <= self.staleness:
            return False
        self.too_old += 1
        self.curriculum.replay.append(astuple(group[0].task))
        return True

    def _file(self, episode: Episode):
        """Add an episode to its group; a complete group is recorded, and kept if it has a signal.
        An episode of no open group, or that is there already, is ignored."""
        group = self.open.get(episode.group)
        if group is None or episode.index in group.ended:
            self.twice += 1
            return
        group.ended[episode.index] = episode
        if len(group.ended) < self.size:
            return
        del self.open[episode.group]
        self.given_up.discard(group.task)
        complete = [group.ended[i] for i in range(self.size)]
        signal = self.has_signal(complete)
        self.curriculum.record(complete, signal)
        if signal and not self._is_stale(complete, self.step):
            self.ready.append(complete)
        self.seen.append(complete)
        self.finished += 1

    def _abort(self, number: int):
        self.actor.abort(number)
        self.orders = [order for order in self.orders if order.group != number]

    def _give_up(self, number: int):
        """Abort a group; its task is played again before new ones."""
        self._abort(number)
        task = self.open.pop(number).task
        self.given_up.add(task)
        self.curriculum.replay.append(astuple(task))
        self.aborted += 1

    def _exceed_patience(self, number: int, group: Group):
        if group.task not in self.given_up:
            return self._give_up(number)
        self._abort(number)
        error = Score(math.nan, {},
                      f"not finished within {self.patience:g} seconds when played again")
        for index in set(range(self.size)) - set(group.ended):
            self._file(Episode(group.task, number, index, score=error, status="error"))


# ---- the run ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Functions:
    """The functions of rl.py that this file uses; rl.run hands them over, since a file imports
    only what is below it. Their arguments are described there."""
    prepare: Callable
    make_engine: Callable
    has_signal: Callable
    to_samples: Callable
    demonstrations: Callable
    update: Callable
    evaluate: Callable
    save_run: Callable


class AsyncTrainer:
    """One rank that trains. Rank 0 also collects the groups, evaluates, logs and saves."""

    def __init__(self, args, hw, rl: Functions, parts, rewards, world: int, process_group=None):
        """parts: what rl.prepare returned. world: how many ranks train; process_group: they."""
        self.args, self.hw, self.rl, self.rewards = args, hw, rl, rewards
        (self.model, self.optimizer, self.reference, self.settings, self.stream, self.curriculum,
         self.progress) = parts
        self.world, self.process_group = world, process_group
        self.actor = self.collector = None      # of rank 0, see `connect`
        self.error: UserError | None = None     # of rank 0, raised once all ranks have saved
        self.checkpointer = Checkpointer(Path(args.out), hw, args.steps, args.save_every,
                                         self.progress.step, self.save, self.optimizer.gather,
                                         process_group)

    def connect(self, actor):
        """Give rank 0 its actor: an Actor in this process, or a Remote."""
        args, self.actor = self.args, actor
        self.collector = Collector(actor, self.curriculum, args.prompts, args.group,
                                   args.max_staleness, args.patience, self.rl.has_signal,
                                   args.flight, self.should_leave)
        if self.progress.collector:
            self.collector.restore(self.progress.collector)

    def should_leave(self) -> bool:
        """Whether a signal asks this rank to stop."""
        return bool(self.checkpointer.stop_signal.received)

    def save(self, folder: Path, masters: dict, state: dict):
        self.progress.collector = self.collector.state()
        self.rl.save_run(self.model, self.args, self.progress, folder, masters, state)

    @contextlib.contextmanager
    def noting_errors(self):
        """Keep an error of rank 0 (too many rollouts fail, a player is gone) until the update is
        done and the other ranks have heard of it, by `next_groups`: all save together, as each
        holds a share of what has been learned."""
        try:
            yield
        except UserError as error:
            self.error = self.error or error

    def after_row(self):
        """Let the actor take a step between two rows of an update."""
        if not self.error:
            with self.noting_errors():
                self.collector.turn()

    def next_groups(self, step: int) -> list[list[Episode]] | None:
        """The groups of this step, the same on all ranks that train; None: stop."""
        groups = None if self.collector else []
        if self.collector and not self.error:
            with self.noting_errors():
                groups = self.collector.collect(step)
        return share_groups(groups, self.process_group) if self.world > 1 else groups

    def learn(self, groups: list[list[Episode]], step: int) -> dict:
        """Steps 4 and 5 of rl.train; returns figures for the log."""
        args, rl, began = self.args, self.rl, time.perf_counter()
        rehearsed = round(args.rehearse * args.prompts * args.group)
        samples = rl.to_samples(groups, args.std)
        samples += rl.demonstrations(self.stream, step * rehearsed, rehearsed)
        rate = schedule(step, args.steps, args.warmup, args.schedule, args.decay)
        last = step + 1 == args.steps       # after it nothing is learned from
        overlap = self.after_row if self.collector and args.max_staleness and not last else None
        figures = rl.update(self.model, self.optimizer, samples, args, rate, self.reference,
                            self.hw.rank, self.world, self.process_group, overlap)
        return figures | {"lr": args.lr * rate, "groups": len(groups),
                          "learning": time.perf_counter() - began}

    def after_update(self, values: dict, done: int, began: float, log: Log):
        """What rank 0 does after an update: send the weights, step 6 of rl.train, log."""
        args, progress = self.args, self.progress
        last = done == args.steps
        if not last:
            self.actor.load(self.optimizer.params, done)
        took = time.perf_counter() - began
        values = self.collector.figures() | values
        values |= {"dt": took, "tok/s": values["tokens"] / took}
        if "reward" in values:      # at least one rollout ended without an error
            progress.rewards.append(values["reward"])
        if args.eval_every and (done % args.eval_every == 0 or last):
            values["accuracy"] = self.evaluate()
        log.step(done, done % args.log_every == 0 or last, **values)

    def evaluate(self) -> float:
        return self.rl.evaluate(self.model, self.settings, self.rewards, self.args, self.progress)

    def train(self):
        args, progress, checkpointer = self.args, self.progress, self.checkpointer
        if self.collector:
            write_json(Path(args.out) / "config.json",
                       asdict(args) | {"hardware": self.hw.description})
            if args.eval_every and not progress.evaluations:
                self.evaluate()
        log = Log(Path(args.out), "rl", args.steps, progress.step, self.hw.rank)
        with self.noting_errors():      # a demonstration can't be made: this, all ranks find alike
            self.train_steps(log)
        log.close()
        self.rewards.close()
        try:
            checkpointer.close()
        finally:
            if self.error:
                raise self.error
            if self.collector and self.hw.world > 1:    # tell the players that it is over
                self.actor.close()

    def train_steps(self, log: Log):
        args, progress, checkpointer = self.args, self.progress, self.checkpointer
        began = time.perf_counter()
        for step in range(progress.step, args.steps):
            groups = self.next_groups(step)
            if groups is None:
                checkpointer.stopping = True
                break
            values = self.learn(groups, step)
            if "norm" in values:        # there were samples
                checkpointer.check_loss(values["pg_loss"], values["norm"])
            progress.step = checkpointer.done = done = step + 1
            if self.collector:
                with self.noting_errors():
                    self.after_update(values | staleness_of(groups, step), done, began, log)
            if checkpointer.after_step(done, log.reader_gone):
                break
            began = time.perf_counter()


def run(args, hw, rl: Functions):
    """Enter a run on every rank: the last --rollout_ranks play, the others train. A single process
    does both."""
    players = list(range(hw.world - args.rollout_ranks, hw.world)) if hw.world > 1 else []
    if len(players) >= hw.world:
        raise UserError(f"--rollout_ranks takes 1 to {hw.world - 1} of {hw.world} processes")
    trainers = list(range(hw.world - len(players)))
    process_group = dist.new_group(trainers, timeout=GROUP_TIMEOUT) if players else None
    parts = rl.prepare(args, hw, hw.rank in trainers, process_group)
    model, settings, start = parts[0], parts[3], parts[-1].step
    # At least two verifying processes: one that hangs must not hold up the others' scores.
    verifiers = max(args.workers, 2)
    rewards = gym.Rewards(workers=verifiers)
    transfer = store = actor = None
    if players:
        with_players = dist.new_group([0, *players], timeout=GROUP_TIMEOUT)
        store = dist.PrefixStore("rl", hw.store)
        if hw.rank in [0, *players]:
            transfer = Transfer(model, with_players)
    if hw.rank in players or not players:
        actor = Actor(rl.make_engine(model, args), rewards, settings, verifiers)
        actor.load({}, start)
    if hw.rank in players:
        return serve(actor, transfer, store, hw.rank, start)
    trainer = AsyncTrainer(args, hw, rl, parts, rewards, len(trainers), process_group)
    if players and hw.rank == 0:
        actor = Remote(store, players, transfer, start, args.max_staleness, trainer.should_leave)
    if hw.rank == 0:
        trainer.connect(actor)
    trainer.train()
