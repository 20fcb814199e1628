"""From samples to batches: conversations and text, mixed, packed into rows, drawn ahead.

    sample i --stream--> Document --packer--> row of documents --collate--> Batch

Sample i of a stream is a pure function of (seed, i). So what a run sees does not depend on the
number of drawing processes or of ranks, and a resumed run goes on bit for bit: the position to
save is the next i and the few documents that wait for a row with room.

Letters: T tokens of a row, D documents, P patches, N images, p patch side.
"""
import atexit
import contextlib
import functools
import math
import multiprocessing
import signal
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import gym
from lib.cli import UserError
from lib.common import clock
from lib.images import pack, resize
from model import Config, rope_positions
from tasks.atlas import atlas_text
from tasks.base import IMAGE, Message, Task
from tokenizer import Tokenizer


# ---- images -----------------------------------------------------------------------------------


# ---- documents --------------------------------------------------------------------------------

@dataclass
class Document:
    """One stretch of tokens that attends to itself only. `weights`: of predicting each token."""
    ids: np.ndarray                              # (L,) int32
    weights: np.ndarray                          # (L,) float32
    images: list = field(default_factory=list)   # (h, w, 3) uint8, exactly as the model sees them
    source: int = 0
    extras: dict = field(default_factory=dict)   # name -> (L,), e.g. log-probabilities


def document(messages, tokens: Tokenizer, config: Config, answer: bool = False,
             source: int = 0) -> Document:
    """A conversation as a Document; `answer`: a prompt, ending where a reply would begin."""
    ids, weights, images = [], [], []
    area = (config.vision.patch_size * config.vision.spatial_merge_size) ** 2
    for piece, learn, image in tokens.chat(messages, answer):
        if image is not None:
            images.append(resize(image, config))
            n = images[-1].shape[0] * images[-1].shape[1] // area
            piece = [piece[0], *[tokens.image] * n, piece[1]]
        ids += piece
        weights += [float(learn)] * len(piece)
    return Document(np.array(ids, np.int32), np.array(weights, np.float32), images, source)


# ---- episodes: documents that a model made itself ----------------------------------------------


# ---- streams: sample i as a pure function of (seed, i) ------------------------------------------

# The share of dialogues kept whole. After 800 steps with one question a document, the smallest
# model pointed at the named one of two things in 68% of the cases; with dialogues of five turns in
# 49%, which is either. [O]
DIALOGUES = 0.05
# Questions asked about one picture, each in a document of its own that sees nothing of the others.
# Different answers to different names in the same picture teach what a name refers to, and the
# encoder sees the picture once. [O]
QUESTIONS = 3


def one_turn(messages, turn: int) -> list[Message]:
    """One question of a dialogue about its first message's pictures, and the reply."""
    question, reply = messages[2 * turn:2 * turn + 2]
    if turn:
        images = messages[0].images
        question = Message("user", IMAGE * len(images) + question.text, images)
    return [question, reply]


@functools.cache
def library_files() -> list[Path]:
    """The Python standard library's own source: plain code that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skip & set(p.parts)
                  and p.stat().st_size > 2000 and "topics" not in p.name)


@functools.cache
def library_text() -> str:
    """The language reference as prose; it ships with Python for `help()`."""
    from pydoc_data.topics import topics
    return "\n".join(topics[name] for name in sorted(topics))


@functools.lru_cache(maxsize=256)
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@dataclass
class Stream:
    """A mixture over named sources: gym categories, `text`, `code`, and `atlas`: the pages that
    world_knowledge asks about.

    mix: ((name, weight), ...); levels: tasks are drawn from levels 0..levels-1, but from level 0
    alone for the first `easy` samples: a curriculum [O]; think: the share of conversations in which
    the oracle states its reasons, where it has any; parts: categories of which no episode is shown,
    only single questions about their screens.
    """
    config: Config
    mix: tuple
    seed: int = 0
    split: str = "train"
    levels: int = 1
    easy: int = 0
    think: float = 0.0
    text_tokens: int = 128
    parts: tuple = ()

    def __post_init__(self):
        known = [*gym.names(), "text", "code", "atlas"]
        for name, weight in self.mix:
            if name not in known:
                raise UserError(f"--mix names '{name}'; there are {', '.join(known)}")
            if not weight >= 0:
                raise UserError(f"--mix gives {name} the weight {weight}")
        for name in self.parts:
            if name not in gym.names() or not gym.demonstrate(Task(name, 0), parts=True):
                raise UserError(f"--parts: there are no questions about the screens of '{name}'")
            if name not in dict(self.mix):
                raise UserError(f"--parts names {name}, which is no part of --mix")
        total = sum(weight for _, weight in self.mix)
        if not total:
            raise UserError("--mix has no weight above 0")
        self.edges = np.cumsum([weight / total for _, weight in self.mix])
        self.tokens = Tokenizer(self.config.n_ranks)

    def __call__(self, i: int) -> list[Document]:
        """A picture's questions, as documents that share its pixels; or one stretch of text."""
        rng = np.random.default_rng([self.seed, i])
        source = min(int(np.searchsorted(self.edges, rng.random(), "right")), len(self.mix) - 1)
        name = self.mix[source][0]
        if name in ("text", "code", "atlas"):
            return [self._text(rng, name, source)]
        level = int(rng.integers(self.levels)) if i >= self.easy else 0
        task = Task(name, int(rng.integers(2 ** 31)), level, self.split)
        conversations = gym.demonstrate(task, rng.random() < self.think, name in self.parts)
        chosen = conversations[int(rng.integers(len(conversations)))]
        if rng.random() < DIALOGUES or any(m.role == "observation" for m in chosen):
            talks = [chosen]
        elif len(chosen) > 2:
            talks = [one_turn(chosen, turn) for turn in range(len(chosen) // 2)]
        else:
            talks = [talk for talk in conversations if talk[0].images == chosen[0].images]
        made = [document(talks[t], self.tokens, self.config, source=source)
                for t in rng.permutation(len(talks))[:QUESTIONS].tolist()]
        for other in made[1:]:
            other.images = made[0].images
        return made

    def _text(self, rng, name, source) -> Document:
        if name == "text":
            text = library_text()
        elif name == "atlas":
            text = "\n" + atlas_text(int(rng.integers(2 ** 31)))
        else:
            files = library_files()
            text = _read(files[int(rng.integers(len(files)))])
        start = int(rng.integers(max(1, len(text) - 4 * self.text_tokens)))
        start = text.find("\n", start) + 1
        ids = self.tokens.encode(text[start:start + 8 * self.text_tokens])[:self.text_tokens]
        ids = [self.tokens.special["[gMASK]"], self.tokens.special["<sop>"], *ids]
        weights = np.ones(len(ids), np.float32)
        weights[:2] = 0
        return Document(np.array(ids, np.int32), weights, [], source)


def sight(config: Config) -> int:
    """The side in pixels of the largest square picture that a model sees without reducing it."""
    unit = config.vision.patch_size * config.vision.spatial_merge_size
    return math.isqrt(config.max_tokens) * unit


def parse_mix(text: str, pixels: int = 1024) -> tuple:
    """'point:2,text' -> (('point', 2.0), ('text', 1.0)); 'gym' stands for every category whose
    pictures can be read at this size. What is named twice has both weights."""
    mix = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            raise UserError(f"--mix takes name:weight, not '{part}'") from None
        names = gym.names(pixels) if name == "gym" else [name]
        for n in names:
            mix[n] = mix.get(n, 0.0) + value / len(names)
    return tuple(mix.items())


# ---- drawing ahead, in processes of their own ---------------------------------------------------

@contextlib.contextmanager
def heartbeat(what: str, every: float = 20):
    """Say every `every` seconds what is being waited for, as long as the block lasts."""
    done, began = threading.Event(), time.time()

    def beat():
        while not done.wait(every):
            print(f"... waiting for {what} ({clock(time.time() - began)})", file=sys.stderr)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _draw(pipe, stream):
    """A drawing process: indices in, documents (or the error) out, until the pipe closes.

    A Ctrl-C at the terminal reaches it too. The first one is the trainer's affair, which may have
    to draw once more before it saves; the second ends both."""
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))
    torch.set_num_threads(1)
    try:
        while (indices := pipe.recv()) is not None:
            try:
                pipe.send([stream(i) for i in indices])
            except Exception as error:  # the parent decides; this process goes on
                pipe.send(f"{type(error).__name__}: {error}")
    except (EOFError, BrokenPipeError):
        pass


class SampleLoader:
    """Samples by index, drawn `burst` at a time by `workers` processes.

    On a CPU a worker that draws while the model trains slows training several times over, so the
    next burst is asked for when the last is used up; with `overlap` (a GPU trains) it is asked for
    at once. Pipes only: no fork, no shared memory. workers=0 draws in this process.
    """

    def __init__(self, stream, workers: int = 0, burst: int = 2048, overlap: bool = False):
        self.stream, self.burst, self.overlap = stream, burst, overlap
        self.ready, self.waiting, self.pipes, self.seconds = {}, [], [], 0.0
        if workers:
            context = multiprocessing.get_context("spawn")
            # What is ignored here is ignored in a child until `_draw` takes over.
            main = threading.current_thread() is threading.main_thread()
            hears = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
            try:
                for _ in range(workers):
                    ours, theirs = context.Pipe()
                    context.Process(target=_draw, args=(theirs, stream), daemon=True).start()
                    theirs.close()
                    self.pipes.append((ours, threading.Lock()))
            finally:
                if main:
                    signal.signal(signal.SIGINT, hears)
            self.pool = ThreadPoolExecutor(workers)
            atexit.register(self.close)

    def __call__(self, i: int) -> list[Document]:
        if not self.pipes:
            began = time.perf_counter()
            made = self.stream(i)
            self.seconds += time.perf_counter() - began
            return made
        if i not in self.ready:
            began = time.perf_counter()
            if not any(i in indices for indices, _ in self.waiting):
                self._ask(i)
            with heartbeat(f"{len(self.pipes)} processes that draw samples {i} and on"):
                for indices, future in self.waiting:
                    drawn = future.result()
                    if isinstance(drawn, str) and drawn.startswith("UserError: "):
                        raise UserError(drawn.removeprefix("UserError: "))
                    if isinstance(drawn, str):
                        raise RuntimeError(f"drawing samples {indices}: {drawn}")
                    self.ready.update(zip(indices, drawn))
            last = max(max(indices) for indices, _ in self.waiting if len(indices))
            self.waiting = []
            self.seconds += time.perf_counter() - began
            if self.overlap:
                self._ask(last + 1)
        return self.ready.pop(i)

    def _ask(self, start: int):
        n = len(self.pipes)
        for w, pipe in enumerate(self.pipes):
            indices = range(start + w, start + self.burst, n)
            self.waiting.append((indices, self.pool.submit(self._exchange, *pipe, indices)))

    @staticmethod
    def _exchange(pipe, lock, indices):
        try:
            with lock:  # who skips ahead asks while the burst before is still under way
                pipe.send(indices)
                return pipe.recv()
        except (EOFError, OSError):
            return "a drawing process died"

    def close(self):
        for pipe, _ in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        self.pipes = []


@dataclass
class RankShard:
    """The samples of one rank, of a stream that is dealt out `share` a batch to each of `world`."""
    stream: object
    rank: int
    world: int
    share: int

    def __call__(self, i: int):
        batch, own = divmod(i, self.share)
        return self.stream((batch * self.world + self.rank) * self.share + own)


# ---- packing ------------------------------------------------------------------------------------

class Packer:
    """Samples in order, packed into rows of `room` tokens.

    A row takes every waiting sample that still fits, oldest first, out of a window; so little is
    padded and none waits for long. The questions of a picture stay together. `state()` is what a
    checkpoint must hold.
    """

    def __init__(self, draw, room: int, window: int = 64, state: dict | None = None, say=print):
        self.draw, self.room, self.window, self.say = draw, room, window, say
        state = state or {"next": 0, "waiting": [], "skipped": 0}
        self.next, self.skipped = state["next"], state["skipped"]
        again = [(i, self._fitting(draw(i))) for i in state["waiting"]]
        self.waiting = [(i, made) for i, made in again if made]
        self.skipped += len(again) - len(self.waiting)  # the rows have become shorter

    def _fitting(self, sample: list[Document]) -> list[Document]:
        """As many of a sample's documents as a whole row has room for."""
        ends = np.cumsum([len(d.ids) for d in sample])
        return sample[:int((ends <= self.room).sum())]

    def row(self) -> list[Document]:
        while len(self.waiting) < self.window:
            sample = self.draw(self.next)
            if made := self._fitting(sample):
                self.waiting.append((self.next, made))
            else:
                if not self.skipped:
                    self.say(f"sample {self.next} has {len(sample[0].ids)} tokens, a row "
                             f"{self.room}: skipped, as will be others of its kind")
                self.skipped += 1
                if self.skipped > 100 and self.skipped > 0.99 * self.next:
                    raise UserError(f"of {self.next + 1} samples, {self.skipped} are longer than "
                                    f"--row_tokens={self.room}")
            self.next += 1
        row, left, room = [], [], self.room
        for i, made in self.waiting:
            length = sum(len(d.ids) for d in made)
            if length <= room:
                row += made
                room -= length
            else:
                left.append((i, made))
        self.waiting = left
        return row

    def state(self) -> dict:
        return {"next": self.next, "waiting": [i for i, _ in self.waiting],
                "skipped": self.skipped}


def pack_rows(documents: list[Document], room: int) -> list[list[Document]]:
    """Documents packed into rows of `room` tokens, each into the first that has room for it."""
    rows, left = [], []
    for d in documents:
        row = next((i for i, free in enumerate(left) if free >= len(d.ids)), None)
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(room)
        rows[row].append(d)
        left[row] -= len(d.ids)
    return rows


@dataclass
class Batch:
    """One packed row: all that a forward and a loss need. A picture that several documents ask
    about is held, and encoded, once."""
    tokens: Tensor       # (T,) int64; every visual slot holds the <|image|> id
    weights: Tensor      # (T,) float32, of predicting this token; 0 at each document's start
    positions: Tensor    # (3, T) int64: t, h, w
    cu_seqlens: Tensor   # (D+1,) int32, document borders; the tail is a last document of weight 0
    source: Tensor       # (D,) int64
    patches: Tensor      # (P, F, 3*p*p) uint8, block-major
    grids: Tensor        # (N, 3) int64: 1, height, width in patches
    visual: Tensor       # which of the P/4 encoded groups stands in each visual slot, int64
    extras: dict = field(default_factory=dict)

    def to(self, device) -> "Batch":
        if torch.device(device).type == "cpu":
            return self
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if k != "extras"}
        return Batch(**moved, extras={k: v.to(device) for k, v in self.extras.items()})


def collate(documents: list[Document], config: Config, room: int = 0) -> Batch:
    """Lay documents one behind the other, filled up to `room` tokens by a tail of weight 0."""
    parts = list(documents)
    used = sum(len(d.ids) for d in parts)
    if room > used:
        tail = np.zeros(room - used, np.int32) + (config.n_ranks or 0)  # <|endoftext|>
        parts.append(Document(tail, np.zeros(len(tail), np.float32), source=-1))
    tokens = torch.from_numpy(np.concatenate([d.ids for d in parts]).astype(np.int64))
    weights = torch.from_numpy(np.concatenate([d.weights for d in parts]))
    borders = np.cumsum([0] + [len(d.ids) for d in parts])
    cu_seqlens = torch.from_numpy(borders.astype(np.int32))
    weights[borders[:-1]] = 0  # nothing stands before a document's first token
    own = {id(image): image for d in parts for image in d.images}
    patches, grids = pack(list(own.values()), config.vision)
    groups = grids.prod(1) // config.vision.spatial_merge_size ** 2
    ends, order = groups.cumsum(0), {key: n for n, key in enumerate(own)}
    runs = [order[id(image)] for d in parts for image in d.images]
    visual = torch.cat([torch.arange(ends[n] - groups[n], ends[n]) for n in runs]
                       or [torch.zeros(0, dtype=torch.long)])
    slots = int((tokens == config.image_token_id).sum())
    if slots != len(visual):
        raise ValueError(f"{slots} image tokens for {len(visual)} groups of patches")
    positions = rope_positions(tokens, grids[runs], cu_seqlens, config.image_token_id)
    names = {name for d in parts for name in d.extras}
    extras = {name: torch.from_numpy(np.concatenate(
        [d.extras.get(name, np.zeros(len(d.ids), np.float32)) for d in parts])) for name in names}
    source = torch.tensor([d.source for d in parts])
    return Batch(tokens, weights, positions, cu_seqlens, source, patches, grids, visual, extras)


# Exercises. Delete the body, write it again, run the test.
# 1. Packer.row with next-fit: close a row at the first document that doesn't fit. How much is
#    padded now? pytest tests/test_data.py -k padding tells; 20 minutes.
# 2. Write a source: captions in another language for the scenes of tasks/scenes.py, as another
#    name in Stream. 30 minutes; `python pretrain.py --mix=gym:8,captions:2` trains it.
